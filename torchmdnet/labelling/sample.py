"""Structures around given ones: from dynamics, along normal modes, or at random.

Each starting structure and temperature has its own stream of random numbers, so that the result depends on the seed
and not on the number of processes.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet.errors import ConfigError, DataError
from torchmdnet.files import check_target
from torchmdnet.labelling.label import Summary, collect, failures, key_of, open_journal, read_all, told, without_labels
from torchmdnet.labelling.methods import Calculators, Method
from torchmdnet.labelling.output import writer_for
from torchmdnet.labelling.sound import check_structure
from torchmdnet.labelling.workers import run
from torchmdnet.simulation.modes import normal_modes_of
from torchmdnet.simulation.sanity import CLOSEST, explosion

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["SAMPLERS", "Sampling", "closest_contact", "displaced", "harmonic_modes", "sample"]

logger = logging.getLogger(__name__)

#: Attempts at a structure without contacts before the settings are given up.
ATTEMPTS = 200
#: Modes softer than this are left out, in 1/cm: they are imaginary, or are rotations by numerical error.
SOFTEST = 10.0
#: Steps of dynamics, and structures, for one start; more would never end.
MOST_STEPS = 1e9
#: How many times the temperature asked for structures of a dynamics may have, where more atoms fluctuate less.
HOTTEST = 3.0
#: Steps between two looks at a dynamics.
LOOK = 5
#: Displacement for finite differences of forces, in Å.
STEP = 0.005


@dataclass(frozen=True)
class Sampling:
    """How structures are sampled.

    Args:
        method: A name of :data:`SAMPLERS`.
        count: Structures for each starting structure and temperature.
        seed: Of all random numbers.
        temperatures: In K; of ``md`` and ``modes``.
        relax: Whether to relax atoms, not the cell, before. Normal modes need it.
        timestep: Of the dynamics, in fs.
        friction: Of the Langevin thermostat, in 1/fs.
        interval: Time between two structures of the dynamics, in fs, so that they are not alike.
        equilibration: Time before the first one, in fs.
        stdev: Standard deviation of a random displacement along each axis, in Å; of ``rattle``.
        strain: Standard deviation of the components of a random strain of a cell; of ``rattle``.
        min_distance: Smallest distance of two atoms as a fraction of the sum of their covalent radii; of ``modes`` and
            ``rattle``.
    """

    method: str
    count: int = 10
    seed: int = 0
    temperatures: tuple[float, ...] = (300.0,)
    relax: bool = False
    timestep: float = 0.5
    friction: float = 0.02
    interval: float = 50.0
    equilibration: float = 200.0
    stdev: float = 0.05
    strain: float = 0.0
    min_distance: float = 0.6

    def __post_init__(self) -> None:
        if self.method not in SAMPLERS:
            raise ConfigError(f"method: {self.method!r} is not available. Choose from {', '.join(SAMPLERS)}.")
        if not self.temperatures:
            raise ConfigError("temperature: none is given. Give one or more in K.")
        positive = ("count", "timestep", "friction", "interval", "stdev")
        for name in (*positive, "strain", "min_distance", "equilibration", "temperatures"):
            value = getattr(self, name)
            smallest = min(value) if isinstance(value, tuple) else value
            is_above = smallest > 0 or (smallest == 0 and name not in (*positive, "temperatures"))
            if not is_above or not np.isfinite(value).all():
                shown = value if isinstance(value, tuple) else f"{value:g}"
                raise ConfigError(f"{name}: {shown} must be finite and above zero.")
        steps = self.equilibration / self.timestep + self.count * (self.interval / self.timestep)
        if max(steps, self.count) > MOST_STEPS:
            raise ConfigError(
                f"count: {self.count:,} are {max(steps, self.count):.2g} steps of {self.timestep:g} fs, "
                f"more than {MOST_STEPS:g}. Take fewer, a shorter interval and equilibration, or a longer timestep."
            )


def sample(
    sources: Sequence[str | Path],
    output: str | Path,
    sampling: Sampling,
    method: Method | None = None,
    *,
    processes: int = 1,
    retry: bool = False,
    timeout: float | None = None,
    memory: float | None = None,
) -> Summary:
    """Sample structures around those of some files, and write them as extended XYZ, in order.

    Works like :func:`~torchmdnet.labelling.label.label`: it can be interrupted, and what failed is left out.

    Args:
        sources: Files that ASE reads, or patterns.
        output: File to write, ``.extxyz``.
        sampling: How.
        method: The calculator; ``rattle`` without relaxation needs none.
        processes: How many processes, each with one starting structure and temperature at a time.
        retry: Try again what failed before.
        timeout: Seconds after which a starting structure at a temperature counts as failed. None: never.
        memory: Bytes that all processes may use together, as for ``label``.

    Raises:
        ConfigError: If an argument or the calculator cannot work.
        DataError: If a file cannot be read or written.
    """
    from torchmdnet.datasets.files import find_files

    needs_calculator = sampling.method != "rattle" or sampling.relax
    if needs_calculator and method is None:
        raise ConfigError(f"calculator: sampling by {sampling.method} needs one. Choose gfn2-xtb, emt or the like.")
    files = find_files([str(source) for source in sources], "structures")
    output = check_target(output, "output")
    write = writer_for(output)
    if output.suffix not in (".extxyz", ".xyz"):
        raise ConfigError(f"output: {output.name} should end in .extxyz; HDF5 is for labelled structures.")
    header = {**asdict(sampling), **(method.describe() if needs_calculator and method else {})}
    temperatures = sampling.temperatures if sampling.method != "rattle" else sampling.temperatures[:1]
    with open_journal(output, header, files) as journal:

        def pieces() -> Iterator[tuple[str, Atoms, str]]:
            for number, (place, atoms) in enumerate(read_all(files)):
                for which in range(len(temperatures)):
                    yield f"{number}.{which}.{key_of(atoms)}", atoms, place

        def missing() -> Iterator[tuple[str, Any]]:
            for key, atoms, _ in pieces():
                if key in todo:
                    start = without_labels(atoms)
                    number, which = key.split(".")[:2]
                    yield key, (start, [sampling.seed, int(number), int(which)], temperatures[int(which)])

        places = {key: place for key, _, place in pieces()}
        todo = {
            key: place
            for key, place in places.items()
            if key not in journal or (retry and not journal.succeeded(key))
        }  # fmt: skip
        work = _Sampler(sampling, method if needs_calculator else None)
        outcomes = run(work, missing(), processes=processes, timeout=timeout, memory=memory)
        computed = collect(outcomes, journal, todo, len(places), "Sampling", "start")
        failed, where = failures(journal, places)
        if failed.total() == len(places):
            raise DataError(f"nothing could be sampled; {told(failed, where)}")

        def sampled() -> Iterator[Atoms]:
            for key, atoms, place in pieces():
                if journal.succeeded(key):
                    result = journal[key]["result"]
                    yield from _structures(atoms, place, sampling, temperatures[int(key.split(".")[1])], result)

        written = write(sampled())
        dropped: Counter[str] = Counter()
        for key in places:
            if journal.succeeded(key):
                dropped.update(journal[key]["result"].get("dropped", {}))
    return Summary(written, computed, failed, where, dropped)


def _structures(
    start: Atoms, place: str, sampling: Sampling, kelvin: float, result: Mapping[str, Any]
) -> Iterator[Atoms]:
    for positions, cell in zip(result["positions"], result["cells"], strict=True):
        atoms = without_labels(start)
        atoms.arrays.pop("momenta", None)
        atoms.set_cell(cell)
        atoms.positions = positions
        atoms.set_constraint()
        atoms.info.update(source=place, sampled_by=sampling.method)
        if sampling.method != "rattle":
            atoms.info["temperature_K"] = kelvin
        yield atoms


@dataclass(frozen=True)
class _Sampler:
    """The work of a process: structures around one after another."""

    sampling: Sampling
    method: Method | None

    def prepare(self) -> Callable[[Any], dict[str, Any]]:
        calculators = None if self.method is None else self.method.prepare()

        def sampled(piece: tuple[Atoms, list[int], float]) -> dict[str, Any]:
            atoms, seed, kelvin = piece
            check_structure(atoms)
            atoms.set_constraint()
            if self.sampling.relax or self.sampling.method == "modes":
                assert calculators is not None
                atoms = relaxed(calculators.attach(atoms), 0.005 if self.sampling.method == "modes" else 0.05)
            rng, dropped = np.random.default_rng(seed), Counter[str]()
            if self.sampling.method == "md":
                frames = list(dynamics(atoms, self.sampling, kelvin, calculators, rng, dropped))
            else:
                frames = list(SAMPLERS[self.sampling.method](atoms, self.sampling, kelvin, calculators, rng))
            if not frames:
                why = "; ".join(f"{count} times {reason}" for reason, count in dropped.most_common())
                raise DataError(f"no structure is within bounds: {why}")
            return {
                **({"dropped": dict(dropped)} if dropped else {}),
                "positions": [atoms.positions.tolist() for atoms in frames],
                "cells": [atoms.cell.array.tolist() for atoms in frames],
            }

        return sampled


def relaxed(atoms: Atoms, largest_force: float, steps: int = 1000) -> Atoms:
    """A structure at the minimum of energy nearby, its cell unchanged.

    Args:
        atoms: The structure, with its calculator.
        largest_force: On any atom at the end, in eV/Å.
        steps: How many steps may be taken.

    Raises:
        DataError: If there is no minimum after this many steps.
    """
    from ase.optimize import LBFGS

    if not LBFGS(atoms, logfile=None).run(fmax=largest_force, steps=steps):  # pyright: ignore[reportArgumentType]
        raise DataError(f"no minimum is reached after {steps} steps of relaxation")
    return atoms


# ------------------------------------------------------------------------------------------------------------ dynamics


def dynamics(
    atoms: Atoms,
    sampling: Sampling,
    kelvin: float,
    calculators: Calculators | None,
    rng: np.random.Generator,
    dropped: Counter[str] | None = None,
) -> Iterator[Atoms]:
    """Snapshots of Langevin dynamics at a temperature, an interval apart.

    Args:
        atoms: The start.
        sampling: How.
        kelvin: The temperature in K.
        calculators: Give energies and forces.
        rng: Source of random numbers.
        dropped: Gets the reasons of snapshots that are left out: atoms that collide, a temperature far above the one
            asked for.

    Raises:
        DataError: If the dynamics explodes before its first good snapshot. Later, the rest of it is left out.
    """
    from ase import units
    from ase.md.langevin import Langevin

    assert calculators is not None
    calculators.attach(atoms)
    momenta = rng.normal(size=(len(atoms), 3)) * np.sqrt(atoms.get_masses() * units.kB * kelvin)[:, None]
    atoms.set_momenta(momenta - momenta.mean(axis=0))
    timestep, friction = sampling.timestep * units.fs, sampling.friction / units.fs
    motion = Langevin(atoms, timestep, temperature_K=kelvin, friction=friction, fixcm=False, rng=rng)
    steps = [round(time / sampling.timestep) for time in (sampling.equilibration, sampling.interval)]
    motion.attach(lambda: _stop_explosion(atoms, kelvin), interval=LOOK)
    dropped = Counter() if dropped is None else dropped
    found = 0
    hottest = kelvin * max(HOTTEST, 1 + 8 * math.sqrt(2 / (3 * len(atoms))))  # eight deviations of the mean
    try:
        motion.run(steps[0])
        for _ in range(sampling.count):
            motion.run(max(steps[1], 1))
            _stop_explosion(atoms, kelvin)
            if closest_contact(atoms) < CLOSEST:
                dropped[f"atoms closer than {CLOSEST:g} of the sum of their covalent radii"] += 1
            elif atoms.get_temperature() > hottest:
                dropped[f"a temperature above {hottest:.0f} K, where {kelvin:g} K were asked for"] += 1
            else:
                found += 1
                yield _centred(atoms)
    except _Explosion as explosion:
        if not found:
            raise DataError(f"{explosion}. Take a shorter --timestep, or --relax first") from None
        dropped[str(explosion)] += sampling.count - found - dropped.total()


class _Explosion(Exception):
    """A dynamics whose atoms fly apart; says how."""


def _stop_explosion(atoms: Atoms, kelvin: float) -> None:
    reason = explosion(atoms, kelvin, 20 * kelvin + 1000)
    if reason:
        raise _Explosion(f"the dynamics exploded at {kelvin:g} K: {reason}")


def _centred(atoms: Atoms) -> Atoms:
    """A copy without the drift of a molecule in space."""
    copy = atoms.copy()
    copy.calc = None
    if not copy.pbc.any():
        copy.positions -= copy.get_center_of_mass()
    return copy


# -------------------------------------------------------------------------------------------------------- normal modes


def normal_modes(
    atoms: Atoms, sampling: Sampling, kelvin: float, calculators: Calculators | None, rng: np.random.Generator
) -> Iterator[Atoms]:
    r"""Displacements along normal modes whose harmonic energies are a random division of a thermal one.

    .. math:: \tfrac12 \omega_i^2 q_i^2 = \tfrac32 c_i N k_B T, \qquad \sum_i c_i \le 1

    with :math:`c` uniform over its simplex, the sign of each mass-weighted coordinate :math:`q_i` random, and N atoms.

    Smith, Isayev and Roitberg, Chem. Sci. 8, 3192 (2017), https://doi.org/10.1039/C6SC05720A.
    """
    assert calculators is not None
    omega, modes = harmonic_modes(calculators.attach(atoms))
    if not len(omega):
        raise DataError("there are no modes of vibration to follow")
    for _ in range(sampling.count):
        yield _without_contacts(atoms, sampling, lambda: displaced(atoms, omega, modes, kelvin, rng))


def harmonic_modes(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Normal modes of vibration at a minimum, by central differences of forces.

    Translations, and rotations of what is not periodic, are projected out; imaginary modes are left out.

    Args:
        atoms: N atoms with their calculator.

    Returns:
        Angular frequencies (M,) in ASE's unit of 1/time, and the mass-weighted modes (M, 3N), orthonormal.
    """
    from ase import units

    size = 3 * len(atoms)
    start = atoms.positions.copy()
    hessian = np.empty((size, size))
    for row in range(size):
        sides = []
        for sign in (1, -1):
            atoms.positions = start
            atoms.positions[row // 3, row % 3] += sign * STEP
            sides.append(atoms.get_forces(apply_constraint=False).ravel())
        hessian[row] = (sides[1] - sides[0]) / (2 * STEP)
    atoms.positions = start
    squares, vectors = normal_modes_of(hessian, atoms)
    keep = squares > (SOFTEST * units.invcm / (units._hbar * units.J * units.second)) ** 2
    return np.sqrt(squares[keep]), vectors[keep]


def displaced(atoms: Atoms, omega: np.ndarray, modes: np.ndarray, kelvin: float, rng: np.random.Generator) -> Atoms:
    """One structure displaced along normal modes; see :func:`normal_modes`.

    Args:
        atoms: N atoms at a minimum.
        omega: Angular frequencies (M,).
        modes: Mass-weighted modes (M, 3N).
        kelvin: Temperature in K.
        rng: Source of random numbers.
    """
    from ase import units

    share = rng.dirichlet(np.ones(len(omega) + 1))[:-1]  # uniform where the sum is at most one
    sign = rng.choice((-1.0, 1.0), len(omega))
    q = sign * np.sqrt(3.0 * share * len(atoms) * units.kB * kelvin) / omega  # (M,)
    copy = _centred(atoms)
    copy.positions += (q @ modes).reshape(-1, 3) / np.sqrt(atoms.get_masses())[:, None]
    return copy


# ----------------------------------------------------------------------------------------------------------- rattling


def rattled(
    atoms: Atoms, sampling: Sampling, kelvin: float, calculators: Calculators | None, rng: np.random.Generator
) -> Iterator[Atoms]:
    """Gaussian displacements of all atoms, and of a periodic cell a random symmetric strain."""

    def one() -> Atoms:
        copy = _centred(atoms)
        if sampling.strain and copy.pbc.any():
            strain = rng.normal(0.0, sampling.strain, (3, 3))
            copy.set_cell(copy.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
        copy.positions += rng.normal(0.0, sampling.stdev, copy.positions.shape)
        return copy

    for _ in range(sampling.count):
        yield _without_contacts(atoms, sampling, one)


def _without_contacts(atoms: Atoms, sampling: Sampling, make: Callable[[], Atoms]) -> Atoms:
    """Make structures until one has no two atoms too close."""
    for _ in range(ATTEMPTS):
        made = make()
        if np.isfinite(made.positions).all() and closest_contact(made) >= sampling.min_distance:
            return made
    raise DataError(
        f"{ATTEMPTS} structures in a row had atoms closer than {sampling.min_distance:g} of the sum of their covalent "
        f"radii (the start itself: {closest_contact(atoms):.2f}). Take a lower temperature or displacement, or a "
        "smaller --min-distance"
    )


def closest_contact(atoms: Atoms) -> float:
    """Smallest distance of two atoms, images included, as a fraction of the sum of their covalent radii; at most 1."""
    from ase.data import covalent_radii
    from ase.neighborlist import neighbor_list

    radii = covalent_radii[atoms.numbers]
    i, j, distance = neighbor_list("ijd", atoms, radii)  # pairs whose spheres touch
    return float((distance / (radii[i] + radii[j])).min(initial=1.0))


#: Ways to sample.
SAMPLERS: dict[str, Callable[..., Iterator[Atoms]]] = {"md": dynamics, "modes": normal_modes, "rattle": rattled}
