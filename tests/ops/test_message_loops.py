"""Loops over edges in blocks of channels, against their definition in PyTorch and its derivatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from torchmdnet.ops.kernels.loops import blocks, embedding, message

PARTS = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2, 2])


class Case(NamedTuple):
    """Receivers with edges to random senders, both directions of a pair with the same coefficients."""

    sender: Tensor
    receiver: Tensor
    row: Tensor
    row_start: Tensor
    cell: Tensor
    num_atoms: int
    num_rows: int
    table: Tensor
    coef: Tensor
    dcoef: Tensor

    def weights(self, table: Tensor, coef: Tensor) -> Tensor:
        """Of each edge, (E, 3, F)."""
        rows = self.cell[:, None] + torch.arange(coef.shape[1])
        return torch.einsum("pk,pkcf->pcf", coef, table[rows])[self.row]

    def gather(self, table: Tensor, coef: Tensor, X: Tensor) -> Tensor:
        out = torch.zeros_like(X)
        return out.index_add(0, self.receiver, self.weights(table, coef)[:, PARTS] * X[self.sender])

    def embed(self, table: Tensor, coef: Tensor, Y: Tensor, Z: Tensor) -> Tensor:
        factor = Z[self.receiver, 0] + Z[self.sender, 1]
        parts = (self.weights(table, coef) * factor[:, None])[:, PARTS]
        out = torch.zeros(self.num_atoms, 9, Z.shape[2], dtype=Z.dtype)
        return out.index_add(0, self.receiver, Y[:, :, None] * parts)


def make_case(channels: int, num_coefs: int, num_atoms: int = 23) -> Case:
    rng = np.random.default_rng(channels)
    linked = np.triu(rng.random((num_atoms, num_atoms)) < 0.4)
    linked[3] = linked[:, 3] = False  # one atom alone
    first, second = np.nonzero(linked)
    both = first != second
    receiver, sender = np.concatenate([first, second[both]]), np.concatenate([second, first[both]])
    row = np.concatenate([np.arange(len(first)), np.arange(len(first))[both]])
    order = np.lexsort((sender, receiver))
    receiver, sender, row = receiver[order], sender[order], row[order]
    row_start = np.searchsorted(receiver, np.arange(num_atoms + 1))
    num_rows = 2 * len(first) if num_coefs == 2 else 31
    cell = 2 * np.arange(len(first)) if num_coefs == 2 else rng.integers(0, num_rows - num_coefs + 1, len(first))
    make = lambda *shape: torch.from_numpy(rng.normal(size=shape))  # noqa: E731
    index = lambda x: torch.from_numpy(x.astype(np.int64))  # noqa: E731
    return Case(
        sender=index(sender),
        receiver=index(receiver),
        row=index(row),
        row_start=index(row_start),
        cell=index(cell),
        num_atoms=num_atoms,
        num_rows=num_rows,
        table=make(num_rows, 3, channels),
        coef=make(len(first), num_coefs),
        dcoef=make(len(first), num_coefs),
    )


def packed(X: Tensor) -> np.ndarray:
    size = blocks.block_size(X.element_size())
    out = np.full((-(-X.shape[2] // size), *X.shape[:2], size), np.nan, X.numpy().dtype)
    blocks.pack(X.numel(), X.numpy(), out)
    return out


def unpacked(ranges: np.ndarray, channels: int) -> Tensor:
    return torch.from_numpy(ranges).sum(0).permute(1, 2, 0, 3).flatten(2)[:, :, :channels]


@pytest.fixture(params=[(16, 6, (1, 1)), (5, 6, (1, 3)), (24, 6, (2, 1)), (24, 2, (3, 2)), (13, 3, (1, 1))], ids=str)
def setup(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    channels, num_coefs, shares = request.param
    monkeypatch.setattr(blocks, "PAIRS_PER_CHUNK", 25)
    case = make_case(channels, num_coefs)
    plan = blocks.schedule(case.cell.numpy(), case.row.numpy(), case.row_start.numpy(), 0 if num_coefs == 2 else 31)
    assert len(plan.chunk) > 3
    where = (case.sender.numpy(), plan.slot, plan.chunk, plan.first, case.row_start.numpy(), plan.max_pairs, *shares)
    coefs = [np.empty((len(plan.rows), num_coefs)) for _ in range(2)]
    for values, out in zip((case.coef, case.dcoef), coefs, strict=True):
        blocks.pick(values.numpy(), plan.rows, out)
    place = case.cell.numpy()[plan.rows]
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    torch.manual_seed(0)
    return case, where, coefs, place, shares, channels, make


def assert_close(found: Any, wanted: Tensor) -> None:
    found = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_every_edge_finds_its_pair_and_chunks_hold_all_receivers(setup: Any) -> None:
    case, *_ = setup
    plan = blocks.schedule(case.cell.numpy(), case.row.numpy(), case.row_start.numpy(), case.num_rows)
    assert plan.chunk[0] == 0
    assert plan.chunk[-1] == case.num_atoms
    chunk_of_edge = np.searchsorted(plan.chunk, case.receiver.numpy(), side="right") - 1
    assert np.array_equal(plan.rows[plan.first[chunk_of_edge] + plan.slot], case.row.numpy())
    assert plan.max_pairs == np.diff(plan.first).max()
    for begin, end in zip(plan.first[:-1], plan.first[1:], strict=True):
        rows = plan.rows[begin:end]
        assert len(set(rows)) == len(rows)
        assert np.all(np.diff(case.cell.numpy()[rows]) >= 0)


def test_a_receiver_with_more_edges_than_a_chunk_has_room_for_is_a_chunk_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "PAIRS_PER_CHUNK", 2)
    case = make_case(8, 6)
    plan = blocks.schedule(case.cell.numpy(), case.row.numpy(), case.row_start.numpy(), 31)
    assert plan.max_pairs == np.diff(case.row_start.numpy()).max()


def test_messages_and_their_gradients_are_those_of_the_definition(setup: Any) -> None:
    case, where, (coef, slope), place, shares, channels, make = setup
    X, O, tables = make(case.num_atoms, 9, channels), make(case.num_atoms, 9, channels), packed(case.table)
    out = np.full(X.shape, np.nan)
    message.message_sum(0, coef, place, tables, packed(X), *where, out)
    X.requires_grad_()
    wanted = case.gather(case.table, case.coef, X)
    assert_close(out, wanted.detach())

    sides, _ = shares
    per_edge = np.full((sides, len(case.sender)), np.nan)
    arrays = (coef, slope, place, tables, packed(O), packed(X.detach()))
    message.message_backward(0, *arrays, *where, out, per_edge)
    assert_close(out, torch.autograd.grad(wanted, X, O)[0])
    steep = case.weights(case.table, case.dcoef)[:, PARTS]
    # an edge i <- j stands for what its distance does to the message from i to j
    of_edge = (steep * X.detach()[case.receiver] * O[case.sender]).sum((1, 2))
    assert_close(per_edge.sum(0), of_edge)


def test_derivatives_of_messages_along_a_direction_and_their_gradients_are_those_of_the_definition(setup: Any) -> None:
    case, where, coefs, place, shares, channels, make = setup
    X, dX, O, dO = (make(case.num_atoms, 9, channels) for _ in range(4))
    tables = packed(case.table)
    out = np.full(X.shape, np.nan)
    message.message_tangent(0, *coefs, place, tables, packed(X), packed(dX), *where, out)
    table = case.table.clone().requires_grad_()
    value = case.gather(table, case.coef, X)
    change = case.gather(table, case.coef, dX) + case.gather(table, case.dcoef, X)
    assert_close(out, change.detach())

    _, ranges = shares
    of_table = np.full((ranges, *tables.shape), np.nan)
    message.message_reverse(0, *coefs, place, *(packed(x) for x in (O, dO, X, dX)), *where, of_table)
    (wanted,) = torch.autograd.grad([value, change], table, [O, dO])
    assert_close(unpacked(of_table, channels), wanted)


def test_embeddings_and_their_gradients_are_those_of_the_definition(setup: Any) -> None:
    case, where, (coef, slope), place, shares, channels, make = setup
    Y, Z, O = make(len(case.sender), 9), make(case.num_atoms, 2, channels), make(case.num_atoms, 9, channels)
    tables = packed(case.table)
    out = np.full(O.shape, np.nan)
    embedding.embed_sum(0, coef, place, tables, Y.numpy(), packed(Z), *where, out)
    Y.requires_grad_()
    wanted = case.embed(case.table, case.coef, Y, Z)
    assert_close(out, wanted.detach())

    sides, _ = shares
    of_Y, per_edge = np.full((sides, len(Y), 8), np.nan), np.full((sides, len(Y)), np.nan)
    arrays = (tables, packed(O), Y.detach().numpy(), packed(Z))
    embedding.embed_backward(0, coef, slope, place, *arrays, *where, of_Y, per_edge)
    assert_close(of_Y.sum(0), torch.autograd.grad(wanted, Y, O)[0][:, 1:])
    factor = Z[case.receiver, 0] + Z[case.sender, 1]
    steep = (case.weights(case.table, case.dcoef) * factor[:, None])[:, PARTS]
    assert_close(per_edge.sum(0), (steep * Y.detach()[:, :, None] * O[case.receiver]).sum((1, 2)))


def test_derivatives_of_embeddings_along_a_direction_and_their_gradients_are_those_of_the_definition(
    setup: Any,
) -> None:
    case, where, coefs, place, shares, channels, make = setup
    Y, dY = make(len(case.sender), 9), make(len(case.sender), 9)
    Z, O, dO = make(case.num_atoms, 2, channels), *(make(case.num_atoms, 9, channels) for _ in range(2))
    tables = packed(case.table)
    out = np.full(O.shape, np.nan)
    arrays = (Y.numpy(), dY.numpy(), packed(Z))
    embedding.embed_tangent(0, *coefs, place, tables, *arrays, *where, out)
    table = case.table.clone().requires_grad_()
    Z.requires_grad_()
    value = case.embed(table, case.coef, Y, Z)
    change = case.embed(table, case.coef, dY, Z) + case.embed(table, case.dcoef, Y, Z)
    assert_close(out, change.detach())

    _, ranges = shares
    of_table, of_Z = np.full((ranges, *tables.shape), np.nan), np.full((ranges, *arrays[2].shape), np.nan)
    embedding.embed_reverse(0, *coefs, place, tables, packed(O), packed(dO), *arrays, *where, of_table, of_Z)
    wanted = torch.autograd.grad([value, change], [table, Z], [O, dO])
    assert_close(unpacked(of_table, channels), wanted[0])
    assert_close(unpacked(of_Z, channels), wanted[1])


def test_threads_share_blocks_of_channels_unless_receivers_are_many() -> None:
    assert blocks.shares(1, 8, 20) == (1, 1)
    assert blocks.shares(2, 8, 20) == (2, 16)
    assert blocks.shares(2, 8, 3) == (2, 3)
    assert blocks.shares(20, 8, 20) == (8, 20)
    assert blocks.shares(20, 8, 20 * blocks.CHUNKS_PER_THREAD) == (1, 320)


def test_what_ranges_sum_is_made_once_for_each_thread() -> None:
    assert blocks.shares(1, 8, 20, sums=True) == (1, 1)
    assert blocks.shares(2, 8, 20, sums=True) == (2, 1)
    assert blocks.shares(20, 8, 20, sums=True) == (8, 2)
    assert blocks.shares(20, 8, 20 * blocks.CHUNKS_PER_THREAD, sums=True) == (1, 20)
