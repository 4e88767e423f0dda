"""Threads divide the rows of a loop, and one of them does all where cores are not free."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchmdnet.ops.kernels import sharing, threads
from torchmdnet.ops.kernels.sharing import claimed, compiled
from torchmdnet.testing import tiny_model

MUCH = 10**9


@compiled
def count(job, first, second):
    """Add one to each row of two arrays."""
    for i in claimed(job, first.shape[0]):
        if first[i] < 0:
            raise ValueError("negative")
        first[i] += 1
    for i in claimed(job, second.shape[0], 1):
        second[i] += 1


@pytest.fixture
def two_threads(monkeypatch):
    """On cores of which nothing is known yet."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(sharing, "cores", threads.Cores())
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [0, 1, 2, 31, 33, 1000])
def test_every_row_is_done_once(number: int, rows: int, monkeypatch) -> None:
    monkeypatch.setattr(threads.Cores, "for_loops", lambda self: number)
    first, second = np.zeros(rows, np.int64), np.zeros(rows // 2, np.int64)
    for _ in range(20):
        count(MUCH, first, second)
    assert (first == 20).all()
    assert (second == 20).all()


def test_an_error_on_any_thread_is_raised(two_threads) -> None:
    rows = np.zeros(1000, np.int64)
    rows[-1] = -1
    with pytest.raises(ValueError, match="negative"):
        count(MUCH, rows, rows[:0].copy())


def test_a_thread_that_failed_for_itself_is_told(two_threads, monkeypatch) -> None:
    monkeypatch.setattr(sharing, "FAILED", sharing.LEFT)  # as if each had found no memory
    with pytest.raises(MemoryError, match="A thread had no memory"):
        count(MUCH, np.zeros(10, np.int64), np.zeros(1, np.int64))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(threads, "time", clock)
    return clock


def test_one_thread_is_used_for_a_while_where_another_program_has_the_cores(two_threads, clock) -> None:
    cores = threads.Cores()
    for _ in range(100):
        cores.notice(False)
    cores.notice(True)
    assert cores.for_loops() == 2  # once is nothing
    for _ in range(10):
        cores.notice(True)
    assert cores.for_loops() == 1
    assert cores.count() == 2
    with cores.for_all():
        assert torch.get_num_threads() == 1
        assert cores.count() == 2
        with cores.for_all():
            assert cores.for_loops() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    clock.now += threads.LONGEST
    assert cores.for_loops() == 2
    with cores.for_all():
        assert torch.get_num_threads() == 1  # loops try first
    for _ in range(10):
        cores.notice(False)
    assert cores.for_loops() == 2
    with cores.for_all():
        assert torch.get_num_threads() == 2


def test_of_many_threads_half_are_left_each_time(clock, monkeypatch) -> None:
    cores = threads.Cores()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    found = []
    for _ in range(40):
        if not found or cores.for_loops() != found[-1]:
            found.append(cores.for_loops())
        if cores.for_loops() > 1:
            cores.notice(True)
    assert found == [12, 6, 3, 1]
    for _ in range(3):
        clock.now += threads.LONGEST
        found.append(cores.for_loops())
    assert found == [12, 6, 3, 1, 3, 6, 12]


def test_short_loops_say_nothing_of_the_cores(two_threads, monkeypatch) -> None:
    noticed = []
    monkeypatch.setattr(sharing.cores, "notice", noticed.append)
    rows = np.zeros(1000, np.int64)
    count(sharing.WORTH_THREADS, rows, rows[:0].copy())
    assert noticed == []
    count(2 * sharing.WORTH_THREADS, rows, rows[:0].copy())
    assert len(noticed) == 1


def test_deterministic_algorithms_keep_the_threads_of_pytorch(two_threads, clock) -> None:
    cores = threads.Cores()
    for _ in range(10):
        cores.notice(True)
    torch.use_deterministic_algorithms(True)
    try:
        with cores.for_all():
            assert torch.get_num_threads() == 2
    finally:
        torch.use_deterministic_algorithms(False)


def test_cores_that_stay_taken_are_tried_with_few_loops(two_threads, clock) -> None:
    cores, tries = threads.Cores(), 0
    for _ in range(10000):  # a hundred seconds
        clock.now += 0.01
        if cores.for_loops() > 1:
            cores.notice(True)
            tries += 1
    assert tries < 100


def test_without_openmp_one_thread_runs_all(two_threads, monkeypatch) -> None:
    monkeypatch.setattr(threads, "openmp", lambda: 0)
    rows = np.zeros(1000, np.int64)
    count(MUCH, rows, rows[:0].copy())
    assert (rows == 1).all()
    assert sharing.cores.for_loops() == 1


def test_taken_cores_change_no_bit(two_threads, monkeypatch) -> None:
    """What loops add up is divided as for the threads that were asked for."""
    monkeypatch.setattr(sharing, "WORTH_THREADS", 0)
    torch.manual_seed(0)
    model = tiny_model("tensornet", embedding_dimension=16).float().eval()
    z, pos = torch.randint(1, 9, (40,)), 3 * torch.randn(40, 3)
    free = model(z, pos)
    monkeypatch.setattr(threads.Cores, "for_loops", lambda self: 1)
    taken = model(z, pos)
    assert torch.equal(free[0], taken[0])
    assert torch.equal(free[1], taken[1])
