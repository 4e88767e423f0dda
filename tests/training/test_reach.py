"""Cutoffs that do not fit the data are refused or warned of before training."""

from types import SimpleNamespace

import pytest
import torch
from toy_runs import train_toy

from torchmdnet.errors import ConfigError
from torchmdnet.training.reach import Reach, check_reach, reach_of


def batch_of(*systems, box=None):
    pos = torch.cat([torch.tensor(system, dtype=torch.float32) for system in systems])
    ptr = torch.tensor([0, *(len(system) for system in systems)]).cumsum(0)
    return SimpleNamespace(
        pos=pos, ptr=ptr, batch=torch.repeat_interleave(torch.arange(len(systems)), ptr.diff()), box=box
    )


def test_neighbours_and_the_farthest_pair_are_counted():
    pair, alone = [[0.0, 0, 0], [0, 0, 3]], [[0.0, 0, 0], [0, 0, 9]]
    assert reach_of(batch_of(pair, alone), 0.0, 5.0, 8) == Reach(2, 0.5, 9.0)
    assert reach_of(batch_of(pair), 3.5, 5.0, 8) == Reach(1, 0.0, 3.0)
    box = 4 * torch.eye(3)[None]
    assert reach_of(batch_of([[0.0, 0, 0]], box=box), 0.0, 4.5, 8) == Reach(1, 6.0, float("inf"))


def test_a_cutoff_with_more_images_than_memory_holds_is_refused():
    with pytest.raises(ConfigError, match=r"cutoff_upper: 1000 Å is too far for periodic cells.*one of 1 atoms"):
        reach_of(batch_of([[0.0, 0, 0]], box=torch.eye(3)[None]), 0.0, 1000.0, 64)


def test_large_systems_are_not_looked_at():
    assert reach_of(batch_of([[0.0, 0, 0]] * 20_000), 0.0, 5.0, 8) is None


@pytest.mark.parametrize(
    ("reach", "words"),
    [
        (Reach(3, 0.0, 9.0), "no atom of the first 3 training systems has a neighbour there"),
        (Reach(3, 2.0, 4.0), "no two atoms of the first 3 training systems are farther apart than 4 Å"),
        (Reach(3, 2.0, 9.0), ""),
        (Reach(3, 2.0, float("inf")), ""),
    ],
)
def test_odd_cutoffs_are_warned_of(reach, words, caplog):
    check_reach(reach, 0.0, 10.0)
    assert (words in caplog.text) if words else not caplog.text


def test_a_run_looks_at_its_cutoffs(tmp_path, caplog):
    train_toy(tmp_path / "run", num_epochs=0, cutoff_upper=0.05)
    assert "cutoff_upper=0.05 Å: no atom of the first 24 training systems has a neighbour" in caplog.text
