"""Tangent and reverse passes of attention equal the derivatives of its plain formula, taken twice by PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_message_loops import make_case, packed, unpacked
from torch import Tensor

from torchmdnet.ops.kernels import sharing
from torchmdnet.ops.kernels.loops import attention_atoms, attention_keys, attention_values, blocks
from torchmdnet.ops.kernels.work import lanes_of

#: Parts of the filters of values, by components sent.
NUM_PARTS = {1: 1, 2: 2, 5: 3}


def along(function: Callable[..., Any], inputs: list[Tensor], changes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A function and its derivative along a direction, both with a history."""
    for x in inputs:
        x.requires_grad_(x.is_leaf or x.requires_grad)
    value = function(*inputs)
    dummy = torch.zeros_like(value, requires_grad=True)
    slopes = torch.autograd.grad(value, inputs, dummy, create_graph=True, allow_unused=True)
    parts = [(slope, change) for slope, change in zip(slopes, changes, strict=True) if slope is not None]
    (change,) = torch.autograd.grad([s for s, _ in parts], dummy, [c for _, c in parts], create_graph=True)
    return value, change


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Case(NamedTuple):
    """Edges of both directions, and everything attention reads, with changes."""

    edges: Any
    reverse: Tensor
    num_heads: int
    head_dim: int
    C: int
    q: Tensor
    k: Tensor
    V: Tensor
    fade: Tensor
    u: Tensor
    keys: Tensor  # (R, 1, F)
    values: Tensor  # (R, parts, F)
    changes: dict[str, Tensor]

    def weights(self, table: Tensor, coef: Tensor) -> Tensor:
        """Of each edge, (E, parts, F)."""
        return self.edges.weights(table, coef)

    def product(self, q: Tensor, k: Tensor, coef: Tensor, keys: Tensor) -> Tensor:
        """p of each head, (H, E)."""
        each = q[self.edges.receiver] * k[self.edges.sender] * self.weights(keys, coef)[:, 0]
        return each.unflatten(1, (self.num_heads, self.head_dim)).sum(2).T

    def gather(self, weight: Tensor, V: Tensor, coef: Tensor, u: Tensor, values: Tensor) -> Tensor:
        """m and μ, (N, 1 or 4, F), of the attention (H, E)."""
        w, sent = self.weights(values, coef), V[self.edges.sender]
        of_heads = weight.T.repeat_interleave(self.head_dim, dim=1)
        found = [(of_heads * w[:, 0] * sent[:, 0])[:, None]]
        if self.C > 1:
            mu = u[:, :, None] * (w[:, 1] * sent[:, 1])[:, None]
            found.append(mu if self.C == 2 else mu + w[:, 2:] * sent[:, 2:])
        message = torch.cat(found, dim=1)
        out = torch.zeros(V.shape[0], *message.shape[1:], dtype=V.dtype)
        return out.index_add(0, self.edges.receiver, message)

    def attend(self, q: Tensor, k: Tensor, V: Tensor, coef: Tensor, fade: Tensor, u: Tensor) -> Tensor:
        """All of it."""
        weight = torch.nn.functional.silu(self.product(q, k, coef, self.keys)) * fade
        return self.gather(weight, V, coef, u, self.values)


class Setup(NamedTuple):
    """A case as the loops take it."""

    case: Case
    dtype: type
    shares: tuple[int, int]
    where: tuple[Any, ...]
    coefs: tuple[Any, ...]
    width: int
    stride: int

    def pack(self, x: Tensor) -> np.ndarray:
        """Features (N, F) or (N, C, F) in blocks."""
        x = x.detach() if x.ndim == 3 else x.detach()[:, None]
        return packed(x.to(torch.float32) if self.dtype == np.float32 else x.contiguous())

    def array(self, x: Tensor) -> np.ndarray:
        return x.detach().numpy().astype(self.dtype)

    def rows(self, x: Tensor) -> np.ndarray:
        """Numbers of edges, (H, E) or (E,), with anything behind the last."""
        out = np.full((*x.shape[:-1], self.stride), 7, self.dtype)
        out[..., : x.shape[-1]] = x.detach().numpy()
        return out

    def directions(self, u: Tensor) -> np.ndarray:
        """(E, 4), with a zero behind each."""
        return self.array(torch.cat([u, torch.zeros(len(u), 1)], dim=1))

    def empty(self, *shape: int) -> np.ndarray:
        return np.full(shape, np.nan, self.dtype)

    def received(self) -> tuple[np.ndarray, np.ndarray]:
        """For m and μ."""
        N, channels = self.case.q.shape
        return self.empty(N, channels), self.empty(0 if self.case.C == 1 else N, 3, channels)

    @property
    def num_pieces(self) -> int:
        blocks_of = -(-self.case.q.shape[1] // (2 * lanes_of(np.dtype(self.dtype).itemsize)))
        return 2 * blocks_of if self.width == 1 else blocks_of

    def in_heads(self, pieces: np.ndarray) -> np.ndarray:
        """Pieces of the heads that exist."""
        return pieces[: self.case.num_heads] if self.width == 1 else pieces

    def of_heads(self, pieces: np.ndarray) -> Tensor:
        """The sums of pieces, (H, E)."""
        pieces = self.in_heads(pieces)[:, : len(self.case.reverse)]
        return torch.from_numpy(pieces.reshape(self.case.num_heads, -1, pieces.shape[1]).sum(1)).double()

    def compare(self, found: Any, wanted: Tensor) -> None:
        found, wanted = torch.from_numpy(found) if isinstance(found, np.ndarray) else found, wanted.detach()
        tolerance = (1e-12 if self.dtype == np.float64 else 1e-4) * (1 + float(wanted.abs().max()))
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)


def joined(received: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    m, mu = received
    return np.concatenate([m[:, None], mu], axis=1) if len(mu) else m[:, None]


#: Heads of one vector, of half a block and of whole blocks; rows that end within a block; parts for threads.
KINDS = [
    (np.float64, 12, 3, 1, (1, 1)),
    (np.float64, 16, 2, 2, (2, 2)),
    (np.float64, 16, 4, 5, (2, 1)),
    (np.float64, 20, 5, 5, (1, 3)),
    (np.float64, 32, 2, 5, (1, 1)),
    (np.float64, 16, 1, 1, (1, 2)),
    (np.float64, 20, 5, 2, (2, 1)),
    (np.float32, 32, 2, 5, (1, 1)),
    (np.float32, 24, 3, 2, (1, 2)),
    (np.float32, 32, 4, 1, (2, 1)),
]


def make_setup(dtype: type, channels: int, num_heads: int, C: int, shares: tuple[int, int], num_atoms: int) -> Setup:
    torch.manual_seed(channels + C)
    edges = make_case(channels, 6, num_atoms)
    loops_of_all = (edges.receiver == edges.sender).nonzero()[:, 0]
    edges.row[loops_of_all] = edges.row[loops_of_all[-1]].clone()  # all self loops are one pair
    pairs = {pair: e for e, pair in enumerate(zip(edges.receiver.tolist(), edges.sender.tolist(), strict=True))}
    reverse = torch.tensor([pairs[j, i] for i, j in pairs])
    sign = torch.where(edges.receiver < edges.sender, 1.0, -1.0) * (edges.receiver != edges.sender)
    P, N, R = len(edges.cell), edges.num_atoms, edges.num_rows

    def directions() -> Tensor:
        return random(P, 3)[edges.row] * sign[:, None]

    case = Case(
        edges=edges,
        reverse=reverse,
        num_heads=num_heads,
        head_dim=channels // num_heads,
        C=C,
        q=random(N, channels),
        k=random(N, channels),
        V=random(N, C, channels),
        fade=random(P)[edges.row],
        u=directions(),
        keys=random(R, 1, channels),
        values=random(R, NUM_PARTS[C], channels),
        changes={
            "q": random(N, channels),
            "k": random(N, channels),
            "V": random(N, C, channels),
            "coef": edges.dcoef,
            "fade": random(P)[edges.row],
            "u": random(len(reverse), 3),
        },
    )
    plan = blocks.schedule(edges.cell.numpy(), edges.row.numpy(), edges.row_start.numpy(), R)
    coefs = [np.empty((len(plan.rows), 6), dtype) for _ in range(2)]
    for values, out in zip((edges.coef, edges.dcoef), coefs, strict=True):
        blocks.pick(values.numpy().astype(dtype), plan.rows, out)
    place = edges.cell.numpy()[plan.rows].astype(np.int32)
    slot, start = plan.slot.astype(np.int32), edges.row_start.numpy()
    where = (slot, plan.chunk, plan.first, start, plan.max_pairs, *shares)
    width = case.head_dim // lanes_of(np.dtype(dtype).itemsize)
    return Setup(case, dtype, shares, where, (*coefs, place), width, -(-len(reverse) // 8) * 8)


@pytest.fixture(params=KINDS, ids=str)
def setup(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr(blocks, "PAIRS_PER_CHUNK", 25)
    setup = make_setup(*request.param, num_atoms=23)
    assert len(setup.where[1]) > 3  # chunks
    return setup


def ends(setup: Setup) -> tuple[np.ndarray, np.ndarray]:
    edges = setup.case.edges
    return edges.sender.numpy().astype(np.int32), setup.case.reverse.numpy().astype(np.int32)


def test_products_of_keys_change_as_their_formula_does(setup: Setup) -> None:
    case, d = setup.case, setup.case.changes
    out, (sender, _) = setup.empty(setup.num_pieces, setup.stride), ends(setup)
    arrays = (setup.pack(case.keys), *(setup.pack(x) for x in (case.q, d["q"], case.k, d["k"])), sender)
    attention_keys.key_tangent(0, *setup.coefs, *arrays, *setup.where, setup.width, out)
    inputs = [case.q, case.k, case.edges.coef]
    _, wanted = along(lambda *x: case.product(*x, case.keys), inputs, [d["q"], d["k"], d["coef"]])
    setup.compare(setup.of_heads(out), wanted)


def test_gradients_of_keys_are_those_of_the_formula(setup: Setup) -> None:
    case, d, channels = setup.case, setup.case.changes, setup.case.q.shape[1]
    of_p, of_dp = random(case.num_heads, len(case.reverse)), random(case.num_heads, len(case.reverse))
    out, tables = setup.empty(case.q.shape[0], 3 * channels), setup.pack(case.keys)
    table = setup.empty(setup.shares[1], *tables.shape)
    arrays = (setup.rows(of_p), setup.rows(of_dp), *(setup.pack(x) for x in (case.q, d["q"], case.k, d["k"])))
    attention_keys.key_reverse(0, *setup.coefs, tables, *arrays, *ends(setup), *setup.where, setup.width, out, table)
    weights = [case.q, case.k, case.keys.requires_grad_()]
    inputs = [case.q, case.k, case.edges.coef]
    found = along(lambda *x: case.product(*x, case.keys), inputs, [d["q"], d["k"], d["coef"]])
    of_q, of_k, of_table = torch.autograd.grad(found, weights, [of_p, of_dp])
    setup.compare(out[:, : 2 * channels], torch.cat([of_q, of_k], dim=1))
    assert np.isnan(out[:, 2 * channels :]).all()
    setup.compare(unpacked(table, channels), of_table)


def test_attention_changes_as_its_formula_does_and_so_do_its_gradients(setup: Setup) -> None:
    case, d, E = setup.case, setup.case.changes, len(setup.case.reverse)
    each = setup.in_heads(setup.empty(setup.num_pieces, setup.stride)).shape[0]
    pieces, dpieces, grad, dgrad = (random(each, E) for _ in range(4))
    sums = [x.unflatten(0, (case.num_heads, -1)).sum(1) for x in (pieces, dpieces)]
    fades = (setup.rows(case.fade), setup.rows(d["fade"]))
    value, change = along(lambda p, c: torch.nn.functional.silu(p) * c, [sums[0], case.fade], [sums[1], d["fade"]])
    out, other = (setup.empty(case.num_heads, setup.stride) for _ in range(2))
    attention_keys.attention_tangent(0, setup.rows(pieces), setup.rows(dpieces), *fades, out, other)
    setup.compare(out[:, :E], value)
    setup.compare(other[:, :E], change)

    arrays = (setup.rows(pieces), setup.rows(dpieces), setup.rows(grad), setup.rows(dgrad), ends(setup)[1])
    attention_keys.attention_reverse(0, *arrays, *fades, out, other)
    dp = sums[1].requires_grad_()
    value, change = along(lambda p, c: torch.nn.functional.silu(p) * c, [sums[0], case.fade], [dp, d["fade"]])
    given = [x.unflatten(0, (case.num_heads, -1)).sum(1)[:, case.reverse] for x in (grad, dgrad)]
    of_p, of_dp = torch.autograd.grad([value, change], [sums[0], dp], given)
    setup.compare(out[:, :E], of_p)
    setup.compare(other[:, :E], of_dp)


def test_what_is_received_changes_as_its_formula_does(setup: Setup) -> None:
    case, d, (sender, _) = setup.case, setup.case.changes, ends(setup)
    weight, dweight = random(case.num_heads, len(sender)), random(case.num_heads, len(sender))
    inputs = [weight, case.V, case.edges.coef, case.u]
    _, wanted = along(lambda *x: case.gather(*x, case.values), inputs, [dweight, d["V"], d["coef"], d["u"]])
    arrays = (setup.rows(weight), setup.rows(dweight), setup.pack(case.V), setup.pack(d["V"]))
    arrays = (setup.pack(case.values), *arrays, setup.directions(case.u), setup.directions(d["u"]), sender)
    out = setup.received()
    attention_values.value_tangent(0, *setup.coefs, *arrays, *setup.where, setup.width, *out)
    setup.compare(joined(out), wanted)


def test_gradients_of_what_is_received_are_those_of_the_formula(setup: Setup) -> None:
    case, d, channels = setup.case, setup.case.changes, setup.case.q.shape[1]
    weight, dweight = (random(case.num_heads, len(case.reverse)).requires_grad_() for _ in range(2))
    inputs, values = [weight, case.V, case.edges.coef, case.u], case.values.requires_grad_()
    found = along(lambda *x: case.gather(*x, values), inputs, [dweight, d["V"], d["coef"], d["u"]])
    grads = [random(*x.shape) for x in found]
    of_V, of_weight, of_change, of_table = torch.autograd.grad(found, [case.V, weight, dweight, values], grads)
    tables = setup.pack(values)
    out, table = setup.empty(*case.V.shape), setup.empty(setup.shares[1], *tables.shape)
    pieces, dpieces = (setup.empty(setup.num_pieces, setup.stride) for _ in range(2))
    arrays = (setup.rows(weight), setup.rows(dweight), setup.pack(case.V), setup.pack(d["V"]))
    arrays = (*arrays, setup.directions(case.u), setup.directions(d["u"]), *(setup.pack(x) for x in grads))
    results = (out, pieces, dpieces, table)
    attention_values.value_reverse(0, *setup.coefs, tables, *arrays, *ends(setup), *setup.where, setup.width, *results)
    setup.compare(out, of_V)
    setup.compare(setup.of_heads(pieces)[:, case.reverse], of_weight)
    setup.compare(setup.of_heads(dpieces)[:, case.reverse], of_change)
    setup.compare(unpacked(table, channels), of_table)


def chain(setup: Setup) -> list[np.ndarray]:
    """Values, changes and gradients of a layer of attention, with work for all threads that there are."""
    case, d, much, width = setup.case, setup.case.changes, 10**9, setup.width
    (sender, reverse), (N, channels), E = ends(setup), case.q.shape, setup.stride
    torch.manual_seed(1)
    O, dO = (setup.pack(random(N, 1 if case.C == 1 else 4, channels)) for _ in range(2))
    Q, dQ, K, dK, V, dV = (setup.pack(x) for x in (case.q, d["q"], case.k, d["k"], case.V, d["V"]))
    u, du, fade, dfade = *map(setup.directions, (case.u, d["u"])), *map(setup.rows, (case.fade, d["fade"]))
    keys, values = setup.pack(case.keys), setup.pack(case.values)
    p, dp, of_a, of_da = (setup.empty(setup.num_pieces, E) for _ in range(4))
    a, da, of_p, of_dp = (setup.empty(case.num_heads, E) for _ in range(4))
    coef, _, place = setup.coefs
    attention_keys.key_products(much, coef, place, keys, Q, K, sender, *setup.where, width, p)
    attention_keys.key_tangent(much, *setup.coefs, keys, Q, dQ, K, dK, sender, *setup.where, width, dp)
    p, dp = setup.in_heads(p), setup.in_heads(dp)
    attention_keys.attention_tangent(much, p, dp, fade, dfade, a, da)
    out, change = setup.received(), setup.received()
    attention_values.value_sum(much, coef, place, values, a, V, u, sender, *setup.where, width, *out)
    both = (a, da, V, dV, u, du)
    attention_values.value_tangent(much, *setup.coefs, values, *both, sender, *setup.where, width, *change)
    of_V, of_values = setup.empty(N, case.C, channels), setup.empty(setup.shares[1], *values.shape)
    results = (of_V, of_a, of_da, of_values)
    attention_values.value_reverse(
        much, *setup.coefs, values, *both, O, dO, sender, reverse, *setup.where, width, *results
    )
    of_a, of_da = setup.in_heads(of_a), setup.in_heads(of_da)
    attention_keys.attention_reverse(much, p, dp, of_a, of_da, reverse, fade, dfade, of_p, of_dp)
    of_qk, of_keys = setup.empty(N, 2 * channels), setup.empty(setup.shares[1], *keys.shape)
    arrays = (keys, of_p, of_dp, Q, dQ, K, dK, sender, reverse)
    attention_keys.key_reverse(much, *setup.coefs, *arrays, *setup.where, width, of_qk, of_keys)
    out, change = joined(out), joined(change)
    return [out, change, of_V, of_qk, unpacked(of_keys, channels).numpy(), unpacked(of_values, channels).numpy()]


def definition(setup: Setup) -> list[Tensor]:
    """The same by the formula."""
    case, d = setup.case, setup.case.changes
    for table in (case.keys, case.values):
        table.requires_grad_()
    inputs = [case.q, case.k, case.V, case.edges.coef, case.fade, case.u]
    value, change = along(case.attend, inputs, [d[name] for name in ("q", "k", "V", "coef", "fade", "u")])
    torch.manual_seed(1)
    grads = [random(*value.shape) for _ in range(2)]
    weights = [case.V, case.q, case.k, case.keys, case.values]
    of_V, of_q, of_k, *tables = torch.autograd.grad([value, change], weights, grads)
    return [value, change, of_V, torch.cat([of_q, of_k], dim=1), *tables]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("C", [1, 2, 5])
def test_a_layer_of_attention_gives_the_derivatives_of_its_formula(
    C: int, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "PAIRS_PER_CHUNK", 25)
    monkeypatch.setattr(sharing.cores, "for_loops", lambda: num_threads)
    setup = make_setup(np.float64, 16, 2, C, (2, 2), 23)
    for ours, theirs in zip(chain(setup), definition(setup), strict=True):
        setup.compare(ours, theirs)


# --------------------------------------------------------------------------------------------------------------- atoms


def sent(projected: Tensor, v: Tensor) -> Tensor:
    """[queries | keys | values | along directions | factors · v], (N, 7, F)."""
    q, k, value, factor, turned = projected.unflatten(1, (5, -1)).unbind(1)
    return torch.cat([torch.stack([q, k, value, turned], dim=1), factor[:, None] * v], dim=1)


def received(x: Tensor, v: Tensor, mu: Tensor, o: Tensor, projected: Tensor) -> Tensor:
    """Scalars and vectors, (N, 4, F)."""
    o1, o2, o3 = o.unflatten(1, (3, -1)).unbind(1)
    v1, v2, v3 = projected.unflatten(2, (3, -1)).unbind(2)
    scalars = x + (v1 * v2).sum(1) * o2 + o3
    return torch.cat([scalars[:, None], v + v3 * o1[:, None] + mu], dim=1)


def assert_close(found: Any, wanted: Tensor) -> None:
    found = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [16, 12])
def test_what_atoms_send_changes_as_its_formula_does_and_so_do_its_gradients(channels: int) -> None:
    N, B = 7, -(-channels // 8)
    projected, change = random(N, 5 * channels), random(N, 5 * channels)
    v, dv = random(N, 3, channels), random(N, 3, channels)
    value, found = along(sent, [projected, v], [change, dv])
    Q, K, V = np.full((B, N, 1, 8), np.nan), np.full((B, N, 1, 8), np.nan), np.full((B, N, 5, 8), np.nan)
    arrays = [x.detach().numpy() for x in (projected, change, v, dv)]
    attention_atoms.send_tangent(0, *arrays, Q, K, V)
    assert_close(unpacked(np.concatenate([Q, K, V], axis=2)[None], channels), found)
    assert not np.concatenate([Q, K, V], axis=2)[-1, :, :, channels - 8 * (B - 1) :].any()

    grads = [random(*value.shape), random(*value.shape)]
    wanted = torch.autograd.grad([value, found], [projected, v], grads)
    out, out_v = np.full((N, 5 * channels), np.nan), np.full((N, 3, channels), np.nan)
    given = [np.ascontiguousarray(x[:, 2:].numpy()) for x in grads]
    attention_atoms.send_reverse(0, *arrays, *given, out, out_v)
    assert np.isnan(out[:, : 2 * channels]).all()
    assert_close(out[:, 2 * channels :], wanted[0][:, 2 * channels :])
    assert_close(out_v, wanted[1])


@pytest.mark.parametrize("F", [16, 12])
def test_what_atoms_receive_changes_as_its_formula_does_and_so_do_its_gradients(F: int) -> None:
    N = 7
    shapes = [(N, F), (N, 3, F), (N, 3, F), (N, 3 * F), (N, 3, 3 * F)]
    inputs, changes = [random(*shape) for shape in shapes], [random(*shape) for shape in shapes]
    value, found = along(received, inputs, changes)
    _, _, _, o, projected = (x.detach().numpy() for x in inputs)
    dx, dv, dm, do, dprojected = (x.numpy() for x in changes)
    out_x, out_v = np.full((N, F), np.nan), np.full((N, 3, F), np.nan)
    attention_atoms.receive_tangent(0, dx, dv, dm, o, do, projected, dprojected, out_x, out_v)
    assert_close(np.concatenate([out_x[:, None], out_v], axis=1), found)

    grads = [random(*value.shape), random(*value.shape)]
    wanted = torch.autograd.grad([value, found], inputs[3:], grads)
    given = [np.ascontiguousarray(part) for x in grads for part in (x[:, 0].numpy(), x[:, 1:].numpy())]
    out_o, out_projected = np.full((N, 3 * F), np.nan), np.full((N, 3, 3 * F), np.nan)
    attention_atoms.receive_reverse(0, *given, o, do, projected, dprojected, out_o, out_projected)
    assert_close(out_o, wanted[0])
    assert_close(out_projected, wanted[1])
