"""The four passes of the steps of transformers are those of their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_steps import GRIDS, atoms, graph_of, radial_of

from torchmdnet.models.torchmd_et import EquivariantMultiHeadAttention
from torchmdnet.models.torchmd_t import MultiHeadAttention
from torchmdnet.nn.filters import RadialFunction
from torchmdnet.nn.spline import Spline
from torchmdnet.ops import kernels
from torchmdnet.ops.kernels import loops
from torchmdnet.tape.attention import Attention, Receive, projections, scalars_of_first
from torchmdnet.testing import check_step


def layer_of(kind: str, channels: int, num_heads: int) -> Any:
    torch.manual_seed(0)
    make: Any = MultiHeadAttention if kind == "scalars" else EquivariantMultiHeadAttention
    options = {"distance_influence": "both", "activation": "silu", "attn_activation": "silu"}
    layer = make(hidden_channels=channels, num_rbf=6, num_heads=num_heads, dtype=torch.float64, **options)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return layer


def check_attention(
    kind: str, channels: int, num_heads: int, *, spline: Spline | None, loop: bool, fades: bool, constant: tuple = ()
) -> None:
    graph, layer = graph_of(loop), layer_of(kind, channels, num_heads)
    radial, of_basis = radial_of(graph, spline)
    step = Attention(layer, RadialFunction(layer, "radial", fades=False), values_fade=fades)
    inputs = [atoms(graph, (3 if kind == "scalars" else 5) * channels)]
    if kind == "vectors":
        inputs.append(atoms(graph, 3, channels, seed=1))
    weights = [*layer.dk_proj.parameters(), *layer.dv_proj.parameters(), *of_basis]
    check_step(step, inputs, graph, radial, weights, constant=constant)


@pytest.mark.parametrize("kind", ["scalars", "directions", "vectors"])
@pytest.mark.parametrize("fades", [False, True])
@pytest.mark.parametrize(("channels", "num_heads"), [(12, 3), (16, 2), (16, 1)])
def test_attention(kind: str, fades: bool, channels: int, num_heads: int) -> None:
    loop = kind == "scalars"  # a definition differentiates directions of self loops, which models never move
    check_attention(kind, channels, num_heads, spline=GRIDS["grid"], loop=loop, fades=fades)


@pytest.mark.parametrize("kind", ["scalars", "directions", "vectors"])
def test_attention_of_first_features_without_a_grid(kind: str) -> None:
    constant = (0, 1) if kind == "vectors" else (0,)
    check_attention(kind, 16, 2, spline=None, loop=False, fades=False, constant=constant)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_attention(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WORTH_THREADS", 0)
    monkeypatch.setattr(loops.blocks, "PAIRS_PER_CHUNK", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    check_attention("vectors", 24, 3, spline=GRIDS["grid"], loop=False, fades=False)


@pytest.mark.parametrize("constant", [(), (0, 1, 2), (3, 4)])
def test_receiving(constant: tuple[int, ...]) -> None:
    graph = graph_of(False)
    radial, _ = radial_of(graph, None)
    shapes = [(12,), (3, 12), (3, 12), (36,), (3, 36)]
    inputs = [atoms(graph, *shape, seed=k) for k, shape in enumerate(shapes)]
    check_step(Receive(), inputs, graph, radial, constant=constant)


@pytest.mark.parametrize("has_hook", [False, True])
@pytest.mark.parametrize("make", [projections, scalars_of_first])
def test_what_is_read_and_what_the_first_layer_makes(make, has_hook: bool) -> None:
    graph, layer = graph_of(False), layer_of("vectors", 12, 3)
    radial, _ = radial_of(graph, None)
    if has_hook:
        layer.v_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
        layer.o_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    linears = [layer.q_proj, layer.k_proj, layer.v_proj] if make is projections else [layer.o_proj]
    weights = [weight for linear in linears for weight in linear.parameters()]
    check_step(make(layer), [atoms(graph, 12)], graph, radial, weights)
