"""Geometries that no model can answer for: positions without a place, and atoms that all but coincide.

On the CPU, where looking at values costs nothing, they are refused. Elsewhere, and where a call is recorded or
compiled, the energies and forces of the system are NaN: without it an atom at NaN would just have no neighbours, and
the energy of the others would look right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchmdnet.errors import DataError
from torchmdnet.ops import kernels
from torchmdnet.tracing import device_kind, is_traced

__all__ = ["CLOSEST", "apart", "can_check", "check_apart", "check_finite", "farthest", "in_bounds", "not_a_number"]

#: Atoms nearer than this, relative to the cutoff, but not at the same place, have no direction between them that
#: rounding leaves meaningful; forces grow as the inverse of the distance. 5e-5 Å for a cutoff of 5 Å.
CLOSEST = 1e-5


#: What positions have to resolve, in Å, and the largest number that is looked for.
RESOLVED, LARGEST = 0.01, 1e300


def farthest(x: Tensor) -> float:
    """How far from the origin coordinates of this precision still resolve places :data:`RESOLVED` apart, in Å.

    These are 8.4e4 Å in single and 4.5e13 Å in double precision.
    """
    return RESOLVED / (2.0**-52 if x.dtype == torch.float64 else 2.0**-23)


def can_check(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or deciding something in a recording."""
    return device_kind(x) == "cpu" and not is_traced()


def check_finite(name: str, x: Tensor, rows: str) -> None:
    """Refuse values that are NaN or infinite, where :func:`can_check` allows it.

    Args:
        name: Name of the argument.
        x: Its values, (R, ...).
        rows: What a row belongs to, ``"atom"``, ``"system"`` or ``"edge"``.

    Raises:
        ValueError: Naming the first row.
    """
    if not can_check(x) or not x.is_floating_point():
        return
    most = farthest(x) if name == "pos" else math.inf
    if not x.numel() or float(torch.linalg.vector_norm(x.detach(), math.inf)) <= min(most, LARGEST):
        return
    is_fine = (x.detach().abs() <= most).reshape(x.shape[0], -1).all(dim=1)  # NaN is not
    is_fine &= torch.isfinite(x.detach()).reshape(x.shape[0], -1).all(dim=1)
    if bool(is_fine.all()):
        return
    row = int((~is_fine).nonzero()[0, 0])
    if bool(torch.isfinite(x[row]).all()):
        raise DataError(
            f"{name} of {rows} {row} is {x[row].tolist()}, counting from 0, farther than {most:.3g} Å from the origin, "
            f"where {str(x.dtype).removeprefix('torch.')} cannot tell places {RESOLVED:g} Å apart. Move it to "
            "the origin; in a simulation it may have fallen apart."
        )
    raise DataError(
        f"{name} of {rows} {row} is {x[row].tolist()}, counting from 0. Pass finite numbers. In a simulation the "
        "structure has fallen apart: look at the steps before, and use a smaller time step."
    )


def not_a_number(pos: Tensor, index: Tensor, num_systems: int, *others: Tensor | None) -> Tensor:
    """Zero for each row of systems in place, NaN for all rows of others, and with the gradient 0 or NaN in ``pos``.

    Args:
        pos: Positions of atoms or vectors of edges, (N, 3).
        index: The system of each, (N,).
        num_systems: Number of systems S.
        *others: Further values that have to be finite, (S, ...) or (1, ...).
    """
    place = pos.detach()  # NaN is not within bounds either
    marker = torch.where(place.abs() <= farthest(place), 0.0, math.nan).to(place.dtype).sum(dim=1)  # (N,)
    marker = marker.new_zeros(num_systems).index_add(0, index, marker)  # (S,)
    for value in others:
        if value is not None:
            marker = marker + (0 * value.detach()).reshape(value.shape[0], -1).sum(dim=1)
    return (pos * marker.index_select(0, index)[:, None]).sum(dim=1)


def in_bounds(
    z: Tensor,
    pos: Tensor,
    batch: Tensor,
    num_systems: int,
    max_z: int,
    box: Tensor | None = None,
    q: Tensor | None = None,
    s: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Elements and systems that can be looked up without leaving an array, and what :func:`not_a_number` makes of all.

    On a GPU an index out of range ends the process's use of the device, and looking for one would wait for it. So it is
    brought into the range, and the results of its system are NaN.

    Args:
        z: Atomic numbers, (N,) int64.
        pos: Positions, (N, 3) Å.
        batch: System of each atom, (N,) int64.
        num_systems: Number of systems S.
        max_z: Atomic numbers are below this.
        box: Lattice vectors, (1, 3, 3) or (S, 3, 3) Å.
        q: Total charges, (S,).
        s: Spins, (S,).
    """
    is_followed = torch.is_grad_enabled() and pos.requires_grad
    if device_kind(pos) in kernels.TWINS and kernels.has_kernel(pos) and not is_followed:
        from torchmdnet.ops.triton import sums

        return sums.guard(z, pos, batch, num_systems, max_z, farthest(pos), box, q, s)
    elements, systems = z.clamp(0, max_z - 1), batch.clamp(0, max(num_systems - 1, 0))
    is_out = (elements != z) | (systems != batch)  # (N,)
    of_atoms = torch.where(is_out[:, None], math.nan, pos.detach())
    marked = pos + (of_atoms - pos.detach())  # with the gradient in pos
    return elements, systems, not_a_number(marked, systems, num_systems, box, q, s)


def apart(vec: Tensor, dist: Tensor, closest: float) -> Tensor:
    """The distances (P,) of vectors (P, 3), NaN where they are shorter than ``closest`` but not zero."""
    is_close = (dist < closest) & (vec != 0).any(dim=1)
    return dist * torch.where(is_close, torch.nan, 1.0).to(dist.dtype)


def check_apart(edge_index: Tensor, vec: Tensor, dist: Tensor, closest: float, of_pairs: Tensor | None = None) -> None:
    """Refuse edges that are shorter than ``closest`` but not zero, where :func:`can_check` allows it.

    Args:
        edge_index: (2, E).
        vec: Their vectors, (E, 3) Å.
        dist: Their lengths, (E,) Å.
        closest: In Å.
        of_pairs: The same lengths, each once and without self loops, which are quicker to look through.

    Raises:
        ValueError: Naming the first two atoms.
    """
    of_pairs = dist if of_pairs is None else of_pairs
    if not can_check(dist) or not of_pairs.numel() or not float(of_pairs.detach().min()) < closest:
        return
    close = (dist.detach() < closest).nonzero()[:, 0]  # self loops among them
    close = close[(vec.detach()[close] != 0).any(dim=1)]
    if not close.numel():
        return
    i, j = edge_index[:, close[0]].tolist()
    between = math.hypot(*vec[close[0]].tolist())
    raise DataError(
        f"pos: atoms {i} and {j}, counting from 0, are {between:.2g} Å apart, nearer than {closest:.2g} Å, so there is "
        "no meaningful direction between them. Remove one of them, or move them apart."
    )
