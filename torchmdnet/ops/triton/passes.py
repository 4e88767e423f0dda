"""What :mod:`torchmdnet.tape.device` asks of Triton: values and backward passes, without history."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor

from torchmdnet.ops.irreps import PARTS
from torchmdnet.ops.kernels import EdgeLayout
from torchmdnet.ops.triton import edges, geometry, nodes, operators

__all__ = [
    "blocks_of",
    "by_component",
    "directions",
    "embed",
    "embed_backward",
    "forces_of_slopes",
    "interact",
    "interact_backward",
    "message",
    "message_backward",
    "mix",
    "normalize",
    "normalize_backward",
    "part_norms",
    "part_norms_backward",
    "read_grid",
    "refine",
    "refine_backward",
    "scale",
    "scale_backward",
    "slopes_of_geometry",
    "square_norm",
    "square_norm_backward",
]

#: Edges and pairs of a program, and edges of an atom that a program adds up side by side.
BLOCK, ROW = 128, 32

# ------------------------------------------------------------------------------------------------------------ geometry


def read_grid(
    dist: Tensor, grid: tuple[float, float, int], cutoffs: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """How pairs read a table, with the envelope: coefficients and slopes (P, 6), and cells (P,).

    Args:
        dist: Distances, (P,).
        grid: Where the grid begins and ends, and its number of cells.
        cutoffs: Of the cosine that fades, below and above.
    """
    P = dist.shape[0]
    coef, slope, cell = dist.new_empty(P, 6), dist.new_empty(P, 6), dist.new_empty(P, dtype=torch.int64)
    constants = dict(zip(("START", "STOP", "CELLS", "LOWER", "UPPER"), (*grid, *cutoffs), strict=True))
    blocks = (triton.cdiv(P, BLOCK),)
    operators._launch(geometry.pairs_forward, blocks, dist, coef, slope, cell, P, **constants, BLOCK=BLOCK)
    return coef, slope, cell


def directions(vec: Tensor, dist: Tensor, of_edge: Tensor, sign: float) -> Tensor:
    """Components of the directions of edges, (E, 9)."""
    E = vec.shape[0]
    out, blocks = vec.new_empty(E, 9), (triton.cdiv(E, BLOCK),)
    operators._launch(geometry.edges_forward, blocks, vec, dist, of_edge, out, E, SIGN=int(sign), BLOCK=BLOCK)
    return out


def slopes_of_geometry(
    vec: Tensor,
    dist: Tensor,
    of_edge: Tensor,
    reverse: Tensor,
    slope: Tensor,
    of_Y: Tensor,
    of_coef: Tensor,
    sign: float,
) -> tuple[Tensor, Tensor]:
    """Slopes in vectors (E, 3) and distances (P,).

    Args:
        vec: Vectors of edges, (E, 3).
        dist: Distances of pairs, (P,).
        of_edge: The pair of each edge, (E,).
        reverse: The edge of opposite direction, (E,).
        slope: Derivatives of coefficients in the distance, (P, 6).
        of_Y: Slopes in components of directions, to be added up, (B, E, 9).
        of_coef: Slopes in the coefficients of the pair of each edge, likewise, (B', E, 6).
        sign: Of the antisymmetric components.
    """
    E = vec.shape[0]
    if of_Y.shape[0] == 0:
        of_Y = vec.new_zeros(1, E, 9)
    of_vec, of_dist = torch.empty_like(vec), torch.empty_like(dist)
    arrays = (vec, dist, of_edge, reverse, slope, of_Y, of_coef, of_vec, of_dist, E)
    options = {"SIGN": int(sign), "NUM_Y": of_Y.shape[0], "NUM": of_coef.shape[0], "BLOCK": BLOCK}
    operators._launch(geometry.geometry_backward, (triton.cdiv(E, BLOCK),), *arrays, **options)
    return of_vec, of_dist


def forces_of_slopes(
    row_start: Tensor,
    of_edge: Tensor,
    reverse: Tensor,
    geometry_of: tuple[Tensor, Tensor],
    slopes: tuple[Tensor, Tensor],
    *,
    strained: bool,
) -> tuple[Tensor, Tensor | None]:
    """Forces (N, 3) and, if wanted, what the edges of each atom add to the virial of its system, (N, 3, 3).

    Args:
        row_start: Where the edges of each receiver begin, (N + 1,).
        of_edge: The pair of each edge, (E,).
        reverse: The edge of opposite direction, (E,).
        geometry_of: Vectors of edges (E, 3) and distances of pairs (P,).
        slopes: Derivatives of the energy in these.
        strained: Whether to add up a virial.
    """
    vec, dist, of_vec, of_dist = operators._ready(*geometry_of, *slopes)
    N = row_start.shape[0] - 1
    forces, virial = vec.new_empty(N, 3), vec.new_empty(N if strained else 0, 3, 3)
    arrays = (row_start, of_edge, reverse, vec, dist, of_vec, of_dist, forces, virial)
    operators._launch(geometry.pull_back, (N,), *arrays, HAS_VIRIAL=strained, EDGES=ROW, num_warps=1)
    return forces, virial if strained else None


# --------------------------------------------------------------------------------------------------------------- edges


def blocks_of(like: Tensor, num_channels: int) -> int:
    """Blocks of channels in which slopes in coefficients are found, which are added up afterwards."""
    return operators._tile(like.new_empty(0, num_channels), is_lean=False)[0]


def message(at: EdgeLayout, coef: Tensor, table: Tensor, X: Tensor) -> Tensor:
    """Sum the weighted features of neighbours, (N, 9, F)."""
    return operators._gather(at, at.row, coef, table, X)[0]


def message_backward(at: EdgeLayout, coef: Tensor, table: Tensor, grad: Tensor, X: Tensor, into: Tensor) -> Tensor:
    """The slope in features, (N, 9, F); those in coefficients are written (B, E, 6)."""
    return operators._gather(at, at.back, coef, table, grad, X, slopes=True, into=into)[0]


def _embed(
    at: EdgeLayout, coef: Tensor, table: Tensor, O: Tensor, Y: Tensor, Z: Tensor, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    (N, _, F), C, L = Z.shape, Y.shape[1], table.shape[1]
    blocks, tile = operators._tile(Z, is_lean=False)
    wanted = dict(zip(("SUMS", "DIRECTIONS", "SLOPES"), (x.numel() > 0 for x in out), strict=True))
    indices = (at.sender, at.row, at.row_start)
    arguments = (coef, at.cell, table, O, Y, Z, *indices, *out, at.sender.shape[0], F, C)
    operators._launch(edges.embed, (N, blocks, 1), *arguments, L=L, K=coef.shape[1], **wanted, **tile)


def embed(at: EdgeLayout, coef: Tensor, table: Tensor, Y: Tensor, Z: Tensor) -> Tensor:
    """Sum directions with radial weights and pair factors, (N, 9, F)."""
    out, nothing = Z.new_empty(Z.shape[0], Y.shape[1], Z.shape[2]), Z.new_empty(0)
    _embed(at, coef, table, Z, Y, Z, (out, nothing, nothing))
    return out


def embed_backward(
    at: EdgeLayout, coef: Tensor, table: Tensor, grad: Tensor, Y: Tensor, Z: Tensor, into: Tensor
) -> Tensor:
    """Slopes in directions, to be added up, (B, E, 9); those in coefficients are written (B, E, 6)."""
    of_Y = Y.new_empty(into.shape[0], *Y.shape)
    _embed(at, coef, table, grad, Y, Z, (Z.new_empty(0), of_Y, into))
    return of_Y


# --------------------------------------------------------------------------------------------------- atoms and channels


def by_component(weights: Sequence[Tensor]) -> Tensor:
    """The matrix of each component, (9, G, F), from those of the three parts."""
    stacked = torch.stack([weight.detach() for weight in weights])
    counts = torch.tensor(PARTS, device=stacked.device)
    return stacked.repeat_interleave(counts, dim=0, output_size=sum(PARTS))


def mix(X: Tensor, matrices: Tensor) -> Tensor:
    """Multiply every component by its matrix from the right, in one product: (N, 9, F), (9, F, G) -> (N, 9, G)."""
    out = X.new_empty(*X.shape[:2], matrices.shape[2])
    torch.bmm(X.transpose(0, 1), matrices, out=out.transpose(0, 1))
    return out


def normalize(X: Tensor) -> Tensor:
    """See :func:`torchmdnet.ops.triton.nodes.normalize`."""
    return operators._map(nodes.normalize)(X)[0]


def normalize_backward(X: Tensor, grad: Tensor) -> Tensor:
    """Its gradient."""
    return operators._map(nodes.normalize_backward)(X, grad)[0]


def interact(Y: Tensor, M: Tensor, factor: Tensor, both: bool) -> Tensor:
    """See :func:`torchmdnet.ops.triton.nodes.interact`."""
    return operators._map(nodes.interact, BOTH=both)(Y, M, factor)[0]


def interact_backward(Y: Tensor, M: Tensor, factor: Tensor, grad: Tensor, both: bool) -> tuple[Tensor, ...]:
    """Its gradients in Y and M."""
    return operators._map(nodes.interact_backward, 2, BOTH=both)(Y, M, factor, grad)


def refine(X: Tensor, D: Tensor, factor: Tensor) -> Tensor:
    """See :func:`torchmdnet.ops.triton.nodes.refine`."""
    return operators._map(nodes.refine)(X, D, factor)[0]


def refine_backward(D: Tensor, factor: Tensor, grad: Tensor) -> Tensor:
    """Its gradient in D; that in X is the one given."""
    return operators._map(nodes.refine_backward)(D, factor, grad)[0]


def scale(X: Tensor, gate: Tensor) -> Tensor:
    """See :func:`torchmdnet.ops.triton.nodes.scale`."""
    return operators._map(nodes.scale)(X, gate)[0]


def scale_backward(X: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Its gradients in X and gate."""
    X, gate, grad = operators._ready(X, gate, grad)
    of_X, of_gate = torch.empty_like(X), torch.empty_like(gate)
    operators._on_channels(nodes.scale_backward, X, X, gate, grad, of_X, of_gate)
    return of_X, of_gate


def square_norm(X: Tensor) -> Tensor:
    """See :func:`torchmdnet.ops.triton.nodes.square_norm`."""
    (X,) = operators._ready(X)
    out = X.new_empty(X.shape[0], X.shape[2])
    operators._on_channels(nodes.square_norm, X, X, out)
    return out


def square_norm_backward(X: Tensor, grad: Tensor) -> Tensor:
    """Its gradient."""
    return operators._map(nodes.square_norm_backward)(X, grad)[0]


def part_norms(X: Tensor) -> Tensor:
    """See :func:`torchmdnet.ops.triton.nodes.part_norms`."""
    return operators._norms_value(X)


def part_norms_backward(X: Tensor, grad: Tensor) -> Tensor:
    """Its gradient."""
    return operators._map(nodes.part_norms_backward)(X, grad)[0]
