"""Dispersion that knows how each atom is bonded."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchmdnet.elements import SYMBOLS
from torchmdnet.errors import ConfigError
from torchmdnet.graph import Graph, sum_to_systems
from torchmdnet.ops.scatter import widened
from torchmdnet.priors.base import BasePrior
from torchmdnet.priors.pairs import ImagePairs, find_pairs
from torchmdnet.priors.scales import (
    FARTHEST,
    JOULES_PER_EV,
    elements_of_types,
    joules_per_energy,
    metres_per_length,
    number_of,
)
from torchmdnet.tracing import device_kind, is_abstract
from torchmdnet.units import energy_factor, length_factor

__all__ = ["D3"]

BOHR = length_factor("Bohr") * 1e-10  # m
HARTREE = energy_factor("Hartree") * JOULES_PER_EV  # J

CUTOFF = 50.0  # Bohr, of the energy of a pair
COORDINATION_CUTOFF = 40.0  # Bohr, of who counts as a neighbour at all
SWITCHED = 0.1  # the part of either cutoff over which a smooth step ends it
COUNTING = 16.0  # steepness of the coordination number

#: Pairs that are looked at together, and pairs from which on what derivatives need is computed again, not kept.
PAIRS_AT_ONCE = 1 << 18
PAIRS_TO_KEEP = 1 << 22

#: What each damping reads beside s6 and s8, and its defaults.
DAMPINGS: dict[str, dict[str, float | None]] = {
    "bj": {"s6": 1.0, "s8": None, "a1": None, "a2": None},
    "bjm": {"s6": 1.0, "s8": None, "a1": None, "a2": None},
    "zero": {"s6": 1.0, "s8": None, "rs6": None, "rs8": 1.0, "alp": 14.0},
}


class D3(BasePrior):
    r"""Dispersion correction D3, its two-body terms (Grimme and others 2010; Grimme, Ehrlich and Goerigk 2011).

    .. math::
        E = -\sum_{i < j} \sum_{n = 6, 8} s_n C_n^{ij} f_n(r_{ij}), \qquad
        C_6^{ij} = \sum_{ab} w_a(N_i)\, w_b(N_j)\, C_6^{ab}, \qquad C_8^{ij} = Q_{ij}\, C_6^{ij}

    with coordination numbers
    :math:`N_i = \sum_j 1 / (1 + \exp(-16 ((R_i + R_j) / r_{ij} - 1)))`, weights w of the reference compounds of each
    element, and the damping of Becke and Johnson (``"bj"``) or the original one (``"zero"``):

    .. math::
        f_n^{BJ} = \frac{1}{r^n + (a_1 \sqrt{Q_{ij}} + a_2)^n}, \qquad
        f_n^{zero} = \frac{1}{r^n \left(1 + 6\, (r / (r_n R_{ij}^0))^{-\alpha_n}\right)}

    Reference coefficients, radii and the parameters of each functional are those of the package tad-dftd3
    (Friede, Ehlert, Grimme and Mewes 2024). The three-body term is not included.

    Pairs count up to a cutoff, in every periodic image; over the last tenth of it their energy is led to zero by a
    step with continuous second derivatives. Coordination numbers end at 40 Bohr, or at the cutoff, in the same way.

    Args:
        functional: Density functional whose parameters are used, such as ``pbe`` or ``wb97m``.
        damping: ``"bj"``, ``"bjm"`` (refitted by Smith and others in 2016) or ``"zero"``.
        s6: Scale of the :math:`C_6` term; this and the following numbers come before those of the functional.
        s8: Scale of the :math:`C_8` term.
        a1: Of Becke-Johnson damping.
        a2: Of Becke-Johnson damping, in Bohr.
        rs6: Scale of the radii of zero damping.
        rs8: Scale of the radii of zero damping in the :math:`C_8` term.
        alp: Exponent :math:`\alpha_6` of zero damping; :math:`\alpha_8` is larger by 2.
        cutoff_distance: Pairs further apart are left out, in the data set's unit of length; None is 50 Bohr (26.5 Å).
        atomic_number: Atomic number of each type of atom; None asks the data set, or takes types for atomic numbers.
        distance_scale: Metres in one unit of length; None asks the data set.
        energy_scale: Joules in one unit of energy; None asks the data set.
        dataset: Asked for what is not given.

    Raises:
        ConfigError: If tad-dftd3 is not installed, the functional is unknown, a parameter is missing, or a scale is
            neither given nor known to the data set.
    """

    atomic_number: Tensor  # (types,)

    def __init__(
        self,
        functional: str | None = None,
        damping: str = "bj",
        s6: float | None = None,
        s8: float | None = None,
        a1: float | None = None,
        a2: float | None = None,
        rs6: float | None = None,
        rs8: float | None = None,
        alp: float | None = None,
        cutoff_distance: float | None = None,
        atomic_number: Sequence[int] | Tensor | None = None,
        distance_scale: float | None = None,
        energy_scale: float | None = None,
        dataset: Any = None,
    ) -> None:
        super().__init__()
        _library()
        if cutoff_distance is not None:
            number_of(cutoff_distance, "cutoff_distance", "D3", most=FARTHEST)
        given = {"s6": s6, "s8": s8, "a1": a1, "a2": a2, "rs6": rs6, "rs8": rs8, "alp": alp}
        self.functional = functional
        self.damping = damping
        self.parameters_of_damping = _parameters(functional, damping, given)
        self.register_buffer("atomic_number", elements_of_types(atomic_number, dataset))
        self.distance_scale = metres_per_length(distance_scale, dataset, "D3")
        self.energy_scale = joules_per_energy(energy_scale, dataset, "D3")
        self.cutoff_distance = (
            CUTOFF * BOHR / self.distance_scale if cutoff_distance is None else float(cutoff_distance)
        )

    def get_init_args(self) -> dict[str, Any]:
        return {
            "functional": self.functional,
            "damping": self.damping,
            **self.parameters_of_damping,
            "cutoff_distance": self.cutoff_distance,
            "atomic_number": self.atomic_number.tolist(),
            "distance_scale": self.distance_scale,
            "energy_scale": self.energy_scale,
        }

    def per_system(self, graph: Graph) -> Tensor:
        """Dispersion energy of each system, (S, 1).

        Raises:
            ValueError: If there are no parameters for an element.
        """
        to_bohr = self.distance_scale / BOHR
        pos = graph.pos * to_bohr  # (N, 3)
        box = None if graph.box is None else graph.box * to_bohr
        Z = self.atomic_number.index_select(0, graph.z)  # (N,)
        tables = _tables(pos.dtype, pos.device)
        _check(Z, tables)
        cutoff = self.cutoff_distance * to_bohr
        pairs = find_pairs(graph, graph.box, self.cutoff_distance)
        kinds = self._kinds(Z, tables)
        starts = range(0, max(pairs.i.shape[0], 1), PAIRS_AT_ONCE)
        run = _forgetful if pairs.i.shape[0] > PAIRS_TO_KEEP and torch.is_grad_enabled() else _plain

        coordination = pos.new_zeros(Z.shape[0])  # (N,)
        for start in starts:
            some = pairs.rows(start, PAIRS_AT_ONCE)
            coordination = coordination + run(_coordination, pos, box, graph.batch, some, kinds, cutoff)
        partial, weights = _mixed_coefficients(Z, coordination, kinds, tables)
        energy = pos.new_zeros(Z.shape[0])  # (N,)
        for start in starts:
            some = pairs.rows(start, PAIRS_AT_ONCE)
            energy = energy + run(self._energies, pos, box, graph.batch, some, kinds, partial, weights, cutoff)
        total = sum_to_systems(widened(energy), graph)[:, None]
        return (total * (HARTREE / self.energy_scale)).to(pos.dtype)

    def _kinds(self, Z: Tensor, tables: _Tables) -> _Kinds:
        """What depends on the two elements of a pair alone."""
        elements, column = torch.unique(Z, return_inverse=True)
        p, r4r2, covalent = self.parameters_of_damping, tables.r4r2[elements], tables.covalent[elements]
        Q = 3 * r4r2[:, None] * r4r2  # (U, U) C_8 / C_6
        if self.damping == "zero":
            R, alpha = tables.radius[elements][:, elements], p["alp"]
            short = 6 * (p["rs6"] * R) ** alpha, 6 * (p["rs8"] * R) ** (alpha + 2)
        else:
            R = p["a1"] * Q.sqrt() + p["a2"]
            short = R**6, R**8
        bonded = covalent[:, None] + covalent
        return _Kinds(elements, column, *(table.flatten() for table in (bonded, Q, *short)))

    def _energies(
        self,
        pos: Tensor,
        box: Tensor | None,
        batch: Tensor,
        pairs: ImagePairs,
        kinds: _Kinds,
        partial: Tensor,
        weights: Tensor,
        cutoff: float,
    ) -> Tensor:
        """Energies in Hartree, each pair booked on its first atom, (N,)."""
        i, j, _ = pairs
        r = pairs.distances(pos, batch, box)  # (P,)
        kind = kinds.of(pairs)
        row = i * kinds.elements.shape[0] + kinds.column.index_select(0, j)
        C_6 = (partial.index_select(0, row) * weights.index_select(0, j)).sum(dim=1)  # (P,)
        f_6, f_8 = self._damped(r, kinds.short_6.index_select(0, kind), kinds.short_8.index_select(0, kind))
        p = self.parameters_of_damping
        both = p["s6"] * f_6 + p["s8"] * kinds.Q.index_select(0, kind) * f_8
        return pos.new_zeros(pos.shape[0]).index_add(0, i, -C_6 * both * _switch(r, cutoff))

    def _damped(self, r: Tensor, short_6: Tensor, short_8: Tensor) -> tuple[Tensor, Tensor]:
        """The damped inverse powers f_6 and f_8 of the distance, each (P,)."""
        square = r * r
        if self.damping != "zero":
            sixth = square * square * square
            return 1 / (sixth + short_6), 1 / (sixth * square + short_8)
        # r^(α - n) / (r^α + 6 R^α): the same as the equation, and defined where two atoms are at one place
        power = r ** (self.parameters_of_damping["alp"] - 6)
        far = power * square * square * square
        return power / (far + short_6), power / (far * square + short_8)


class _Kinds(NamedTuple):
    """The U elements of a batch, and constants of their U² pairs."""

    elements: Tensor  # (U,)
    column: Tensor  # (N,) which of them each atom is
    bonded: Tensor  # (U²,) sums of covalent radii
    Q: Tensor  # (U²,) C_8 / C_6
    short_6: Tensor  # (U²,) what damping adds to the power of the distance
    short_8: Tensor

    def of(self, pairs: ImagePairs) -> Tensor:
        """The kind of each pair, (P,)."""
        return self.column.index_select(0, pairs.i) * self.elements.shape[0] + self.column.index_select(0, pairs.j)


class _Tables(NamedTuple):
    """Constants of tad-dftd3 by atomic number, in atomic units."""

    covalent: Tensor  # (Z,) covalent radii, scaled by 4/3
    r4r2: Tensor  # (Z,) roots of the quotients that make C_8 from C_6
    radius: Tensor  # (Z, Z) radii of zero damping
    reference: Any  # coordination numbers (Z, 7) and C_6 (Z, Z, 7, 7) of the reference compounds


@functools.lru_cache(maxsize=8)
def _tables(dtype: torch.dtype, device: torch.device) -> _Tables:
    """The constants, in the precision they are used in: casting a model never rounds them."""
    library, data = _library()
    options = {"dtype": dtype, "device": device}
    with torch.inference_mode(False), torch._C._DisableFuncTorch():  # what is kept must outlive every transform
        reference = library.reference.Reference(**options)
        covalent, r4r2, radius = data.COV_D3(**options), library.data.R4R2(**options), data.VDW_PAIRWISE(**options)
    return _Tables(covalent, r4r2, radius, reference)


def _library() -> tuple[Any, Any]:
    """The package tad-dftd3, and the constants it rests on."""
    try:
        import tad_dftd3
        import tad_mctc.data
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("tad_dftd3", "tad_mctc"):
            raise
        raise ConfigError(
            "prior_model: D3 takes its reference data from the package tad-dftd3, which is not installed. Install it "
            'with: pip install "torchmd-net[d3]"'
        ) from error
    return tad_dftd3, tad_mctc.data


def _parameters(functional: str | None, damping: str, given: dict[str, float | None]) -> dict[str, float]:
    """The numbers a damping needs: as given, else those of the functional, else the usual ones."""
    if damping not in DAMPINGS:
        raise ConfigError(f"D3: damping={damping!r} is not available. Choose from {', '.join(DAMPINGS)}.")
    usual = DAMPINGS[damping]
    for name, value in given.items():
        if value is not None and name not in usual:
            raise ConfigError(f"D3: {name}={value} has no meaning with damping={damping!r}. Leave one of them out.")
    chosen = {name: number_of(value, name, "D3", above=-math.inf) for name, value in given.items() if value is not None}
    if functional is not None and any(name not in chosen for name in usual):
        chosen = {**_published(functional, damping), **chosen}
    numbers = {name: chosen.get(name, value) for name, value in usual.items()}
    missing = [name for name, value in numbers.items() if value is None]
    if missing:
        raise ConfigError(
            f"D3: {', '.join(missing)} missing. Name the functional the data were computed with, "
            "{'D3': {'functional': 'pbe'}}, or give the numbers."
        )
    return {name: float(value) for name, value in numbers.items() if value is not None}


def _published(functional: str, damping: str) -> dict[str, float]:
    """The parameters of a functional."""
    library, _ = _library()
    try:
        found = library.param.get_functional_params(functional, damping=damping, dtype=torch.float64)
    except KeyError as error:
        raise ConfigError(
            f"D3: tad-dftd3 has no parameters for functional={functional!r}. Write it as there (pbe, b3lyp, r2scan, "
            "wb97m, ...), or give s8, a1 and a2."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"D3: tad-dftd3 has no {damping!r} parameters for functional={functional!r}. Choose another damping "
            f"({', '.join(DAMPINGS)}), or give the numbers."
        ) from error
    return {name: float(value) for name, value in found.items() if name in DAMPINGS[damping]}


def _switch(r: Tensor, cutoff: float) -> Tensor:
    """From 1 to 0 over the last tenth of the cutoff, with two continuous derivatives."""
    t = ((r - (1 - SWITCHED) * cutoff) / (SWITCHED * cutoff)).clamp(0.0, 1.0)
    return 1 - t**3 * (10 - t * (15 - 6 * t))


def _coordination(
    pos: Tensor, box: Tensor | None, batch: Tensor, pairs: ImagePairs, kinds: _Kinds, cutoff: float
) -> Tensor:
    """What some pairs add to the coordination numbers, (N,)."""
    i, j, _ = pairs
    r = pairs.distances(pos, batch, box)  # (P,)
    bonded = kinds.bonded.index_select(0, kinds.of(pairs)) / r.clamp(min=1e-2)
    count = torch.sigmoid(COUNTING * (bonded - 1)) * _switch(r, min(cutoff, COORDINATION_CUTOFF))
    return pos.new_zeros(pos.shape[0]).index_add(0, i, count).index_add(0, j, count)


def _mixed_coefficients(Z: Tensor, coordination: Tensor, kinds: _Kinds, tables: _Tables) -> tuple[Tensor, Tensor]:
    """C_6 between atoms i and j is ``(partial[i * U + column[j]] * weights[j]).sum()``, for U different elements.

    Summing over the references of i first, once for each element that occurs, leaves a product of seven numbers for
    each pair, where the full interpolation has 49.

    Returns:
        ``partial`` (N U, 7) and ``weights`` (N, 7).
    """
    library, _ = _library()
    weights = library.model.weight_references(Z, coordination, tables.reference)  # (N, 7)
    elements, column = kinds.elements, kinds.column
    C_6 = tables.reference.c6[elements][:, elements]  # (U, U, 7, 7)
    partial = weights.new_zeros(Z.shape[0], *C_6.shape[1:3])  # (N, U, 7)
    for row in range(elements.shape[0]):
        members = (column == row).nonzero()[:, 0]
        values = torch.einsum("na,uab->nub", weights.index_select(0, members), C_6[row])
        partial = partial.index_copy(0, members, values)
    return partial.flatten(0, 1), weights


def _plain(function: Any, *args: Any) -> Any:
    return function(*args)


def _forgetful(function: Any, *args: Any) -> Any:
    """Call a function without keeping what its derivative needs: that is computed again when asked for."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _check(Z: Tensor, tables: _Tables) -> None:
    """Refuse elements the tables do not cover (on CPU, where looking costs nothing)."""
    if is_abstract() or device_kind(Z) != "cpu" or Z.numel() == 0:
        return
    last = tables.reference.cn.shape[0] - 1
    for number in (int(Z.min()), int(Z.max())):
        if not 1 <= number <= last:
            name = SYMBOLS[number] if 0 < number < len(SYMBOLS) else "not an element"
            raise ValueError(
                f"D3 has reference data for the elements 1 (H) to {last} ({SYMBOLS[last]}), but there is an atom of "
                f"{number} ({name}). Leave D3 out, or check atomic_number."
            )
