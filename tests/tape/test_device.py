"""Passes of a network on a GPU, in Triton's interpreter where there is none, equal those of the definitions."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from torchmdnet.forces import Slopes, forces_of
from torchmdnet.graph import Graph, build_graph
from torchmdnet.models.base import set_radial_mode
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.spline import Spline
from torchmdnet.ops.irreps import harmonics
from torchmdnet.ops.kernels import forms, support
from torchmdnet.testing.tiny import tiny_model

pytest.importorskip("triton.language")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send tensors to Triton, those of the CPU to its interpreter."""
    monkeypatch.setitem(forms.TWINS, DEVICE, "torchmdnet.ops.triton")


def passes() -> Any:
    return importlib.import_module("torchmdnet.ops.triton.passes")


def atoms(kind: str = "cell") -> tuple[Tensor, Tensor, Tensor | None]:
    pos = torch.tensor([[0.0, 0.1, 0.2], [1.3, 0.2, -0.1], [0.2, 1.4, 0.3]], dtype=torch.float64, device=DEVICE)
    box = 2.9 * torch.eye(3, dtype=torch.float64, device=DEVICE) if kind == "cell" else None
    return torch.tensor([1, 6, 8], device=DEVICE), pos, box


def graph_of(kind: str = "cell") -> Graph:
    z, pos, box = atoms(kind)
    return build_graph(z, pos, None, box, cutoff_upper=2.0, loop=True)


@pytest.mark.parametrize("lower", [0.0, 0.7])
def test_tables_are_read_with_the_envelope_and_its_slope(lower: float) -> None:
    spline, envelope = Spline(lower, 5.0, 17), CosineCutoff(lower, 5.0)
    r = torch.tensor([0.0, 1e-9, 0.3, 0.7, 1.234, 2.5, 4.9999, 5.0, 6.0, float("nan")], dtype=torch.float64)
    r = r.to(DEVICE).requires_grad_()
    points = spline.locate(r)
    expected = envelope(r)[:, None] * points.coef
    coef, slope, cell = passes().read_grid(r.detach(), spline, (lower, 5.0))
    torch.testing.assert_close(coef, expected.detach(), rtol=1e-12, atol=1e-13, equal_nan=True)
    assert torch.equal(cell, points.cell)
    for k in range(6):
        (of_r,) = torch.autograd.grad(expected[:, k].sum(), r, retain_graph=True)
        inside = (r != lower) & (r != 5.0) & ~r.isnan()  # where the definition has a kink
        torch.testing.assert_close(slope[inside, k], of_r[inside], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_directions_and_slopes_in_the_geometry(sign: float) -> None:
    graph = graph_of()
    assert graph.pairs is not None
    pairs, E = graph.pairs, graph.edge_index.shape[1]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    vec, dist = graph.edge_vec.clone().requires_grad_(), pairs.dist.clone().requires_grad_()
    spline, envelope = Spline(0.0, 2.0, 9), CosineCutoff(0.0, 2.0)
    r = dist.index_select(0, pairs.of_edge)[:, None]
    Y = harmonics(vec / torch.where(r == 0, 1.0, r), handedness=sign)
    found = passes().directions(vec.detach(), dist.detach(), pairs.of_edge, sign)
    torch.testing.assert_close(found, Y.detach(), rtol=1e-12, atol=1e-13)
    of_Y, of_coef = random(2, E, 9), random(3, E, 6)
    coef = envelope(dist)[:, None] * spline.locate(dist).coef
    energy = (of_Y.sum(dim=0) * Y).sum() + (of_coef.sum(dim=0) * coef.index_select(0, pairs.of_edge)).sum()
    of_vec, of_dist = torch.autograd.grad(energy, (vec, dist))
    _, slope, _ = passes().read_grid(dist.detach(), spline, (0.0, 2.0))
    geometry = (vec.detach(), dist.detach(), pairs.of_edge, pairs.reverse, slope)
    ours = passes().slopes_of_geometry(*geometry, of_Y, of_coef, sign)
    others = r[:, 0] > 0  # vectors and the distance of self loops are no variables
    torch.testing.assert_close(ours[0][others], of_vec[others], rtol=1e-11, atol=1e-12)
    others = pairs.dist > 0
    torch.testing.assert_close(ours[1][others], of_dist[others], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("strained", [False, True])
def test_forces_and_virials_of_slopes(strained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of()
    assert graph.pairs is not None
    generator = torch.Generator().manual_seed(1)
    slopes = Slopes(
        *(
            torch.randn(x.shape, generator=generator, dtype=x.dtype).to(DEVICE)
            for x in (graph.edge_vec, graph.pairs.dist)
        )
    )
    forces, virial = forces_of(graph, slopes, strained=strained)
    monkeypatch.setattr(support, "has_triton", lambda device: False)
    expected = forces_of(graph, slopes, strained=strained)
    torch.testing.assert_close(forces, expected[0], rtol=1e-12, atol=1e-12)
    assert (virial is None) == (not strained)
    if strained:
        torch.testing.assert_close(virial, expected[1], rtol=1e-12, atol=1e-12)


def test_algebra_of_gates() -> None:
    from torchmdnet.ops.irreps import mix_channels_plain, scale_parts, squared_norm

    generator = torch.Generator().manual_seed(2)
    X = torch.randn(3, 9, 5, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()
    gate = torch.randn(3, 15, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()
    weights = [torch.randn(4, 5, generator=generator, dtype=torch.float64).to(DEVICE) for _ in range(3)]
    kernels = passes()
    by_parts = lambda X, gate: scale_parts(X, gate.unflatten(1, (3, 5)))  # noqa: E731
    torch.testing.assert_close(kernels.scale(X, gate), by_parts(X, gate).detach())
    grad = torch.randn(3, 9, 5, generator=generator, dtype=torch.float64).to(DEVICE)
    expected = torch.autograd.grad(by_parts(X, gate), [X, gate], grad)
    for ours, theirs in zip(kernels.scale_backward(X, gate, grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(kernels.square_norm(X), squared_norm(X).detach())
    (expected_of_X,) = torch.autograd.grad(squared_norm(X), X, grad[:, 0])
    torch.testing.assert_close(kernels.square_norm_backward(X, grad[:, 0]), expected_of_X)
    matrices = kernels.by_component(weights)
    mixed = mix_channels_plain(X.detach(), weights)
    torch.testing.assert_close(kernels.mix(X.detach(), matrices.mT), mixed)
    torch.testing.assert_close(kernels.mix(mixed, matrices), mix_channels_plain(mixed, [w.T for w in weights]))


CASES: list[dict[str, Any]] = [
    {},
    {"equivariance_invariance_group": "SO(3)", "handedness": "legacy", "activation": "tanh"},
    {"system_embedding": "charge"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("kind", ["open", "cell"])
def test_tensornet_is_evaluated_without_autograd(
    options: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Energy, forces and stress in double precision equal those of the definitions."""
    from torchmdnet.tape import device

    z, pos, box = atoms(kind)
    sizes = {"embedding_dimension": 4, "num_layers": 1, "num_rbf": 4, "cutoff_upper": 2.0}
    model = tiny_model("tensornet", derivative=True, **sizes, **options).to(DEVICE).eval()
    set_radial_mode(model, "grid")
    q = torch.ones(1, dtype=torch.float64, device=DEVICE) if options.get("system_embedding") else None
    runs = []
    backward = device.DeviceTape.backward
    monkeypatch.setattr(
        device.DeviceTape, "backward", lambda tape, *args: (runs.append(tape), backward(tape, *args))[1]
    )
    ours = model(z, pos, None, box, q, stress=box is not None)
    assert len(runs) == 1
    monkeypatch.setattr(support, "has_triton", lambda device: False)
    theirs = model(z, pos, None, box, q, stress=box is not None)
    assert len(runs) == 1
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
