"""How fast a potential is on each route to its forces, and how far each route is from exact arithmetic."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from ase import Atoms
from ase import units as ase_units
from ase.md.verlet import VelocityVerlet
from torch import nn

from torchmdnet.calculators.ase import TMDNETCalculator
from torchmdnet.calculators.external import External
from torchmdnet.calculators.loading import as_dtype, load, members_of, stated_units, trained_with, units_or_default
from torchmdnet.calculators.units import Units
from torchmdnet.errors import ConfigError
from torchmdnet.graph import Inputs
from torchmdnet.models.base import set_radial_mode
from torchmdnet.nn.filters import RadialEngine
from torchmdnet.timing.machine import Memory, matrix_products, num_threads
from torchmdnet.timing.routes import DTYPES, Route

__all__ = ["Measured", "Subject", "measure", "radial_engines"]

#: Configurations that calls take turns with, so that none can be answered from memory; the first is as given.
NUM_FRAMES = 3
#: Å by which the coordinates of the others are moved, each way.
AMPLITUDE = 0.02
#: Steps of dynamics after which it starts again, so that a model that is not stable can be timed too.
STRETCH = 20


@dataclass
class Measured:
    """What one route needs, and how far it is from exact.

    Args:
        route: The route.
        num_atoms: Number of atoms N.
        wall: Wall-clock seconds of each step.
        cpu: Processor seconds of each step, all threads together.
        working_memory: Bytes held at the worst moment of a step beyond what is held between steps; None where unknown.
        energy_error: Largest deviation of the energy from exact, in eV per atom; None if not compared.
        force_error: Largest deviation of a component of a force from exact, in eV/Å.
        note: Why there are no times, or few.
    """

    route: Route
    num_atoms: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    working_memory: int | None = None
    energy_error: float | None = None
    force_error: float | None = None
    note: str | None = None

    @property
    def seconds(self) -> float:
        """Median wall-clock time of a step."""
        return statistics.median(self.wall)

    @property
    def processor_share(self) -> float:
        """Processor time over wall-clock time; 1 is one thread that never had to wait."""
        return sum(self.cpu) / max(sum(self.wall), 1e-12)

    def ns_per_day(self, timestep: float) -> float:
        """Simulated time in ns that a day of such steps makes.

        Args:
            timestep: Length of a step in fs.
        """
        return 86400 / self.seconds * timestep * 1e-6

    def as_json(self, timestep: float) -> dict[str, Any]:
        """Plain values."""
        plain = {**self.route._asdict(), "num_atoms": self.num_atoms}
        if self.wall:
            plain |= {
                "num_steps": len(self.wall),
                "ms_median": 1e3 * self.seconds,
                "ms_min": 1e3 * min(self.wall),
                "steps_per_second": 1 / self.seconds,
                "ns_per_day": self.ns_per_day(timestep),
                "processor_share": self.processor_share,
            }
        return plain | {
            "working_memory_bytes": self.working_memory,
            "energy_error_ev_per_atom": self.energy_error,
            "force_error_ev_per_angstrom": self.force_error,
            "note": self.note,
        }


class Answer(NamedTuple):
    """Of one configuration."""

    energy: float  # eV
    forces: np.ndarray  # (N, 3) eV/Å


class Subject:
    """A model file and atoms to time it on.

    Args:
        file: Anything :func:`torchmdnet.checkpoint.load_model` takes.
        atoms: The structure.
        units: Of the model, where its file does not state them.
        differentiate: Whether to differentiate the energy of a model that was trained without forces.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it cannot be read.
        ConfigError: If the model cannot compute the structure, has no energy, or was trained without forces.
    """

    def __init__(
        self, file: str | Path, atoms: Atoms, *, units: str | None = None, differentiate: bool = False
    ) -> None:
        self.file, self.atoms = file, atoms.copy()
        exact = load(file, device="cpu", dtype=torch.float64, derivative=True, **_OPTIONS)
        for member in members_of(exact):
            head: Any = getattr(member, "output_model", None)
            if getattr(head, "output_shape", (1,)) != (1,):
                shape = "×".join(map(str, head.output_shape))
                raise ConfigError(
                    f"{file} predicts {shape} numbers a system ({type(head).__name__}), no energy, so that there are "
                    "no forces. Name a model with an energy, output_model: Scalar."
                )
        if not differentiate and _is_without_forces(file):
            raise ConfigError(
                f"{file} was trained without forces (derivative: false), so that dynamics with it is not learned. "
                "Pass --differentiate to time the gradient of its energy all the same."
            )
        self.units: Units = units_or_default(stated_units(exact, units), file)
        if trained_with(exact, "charge"):
            self.atoms.info.setdefault("charge", float(self.atoms.get_initial_charges().sum()))
        rng = np.random.default_rng(0)
        self.frames = [self.atoms.copy() for _ in range(NUM_FRAMES)]
        for frame in self.frames[1:]:
            frame.positions += rng.uniform(-AMPLITUDE, AMPLITUDE, frame.positions.shape)
        set_radial_mode(exact, "exact")
        self.calculator = TMDNETCalculator(exact, dtype="float64", units=self.units)
        self._reference: list[Answer] | None = None
        try:
            self.inputs: list[Inputs] = [self.calculator._inputs(frame) for frame in self.frames]
        except ValueError as error:
            raise ConfigError(f"{file} cannot compute {atoms.get_chemical_formula()}: {error}") from None

    def reference(self) -> list[Answer]:
        """Energies and forces of all frames with exact filters in float64.

        Raises:
            ConfigError: If the model cannot compute the structure.
        """
        if self._reference is None:
            try:
                self._reference = [_ask(self.calculator, frame) for frame in self.frames]
            except ValueError as error:
                raise ConfigError(f"{self.file} cannot compute {self.atoms.get_chemical_formula()}: {error}") from None
        return self._reference


_OPTIONS = {"remove_ref_energy": True}  # as in TMDNETCalculator


def _is_without_forces(file: str | Path) -> bool:
    """Whether a model file says that forces were not trained."""
    from torchmdnet.checkpoint import describe

    card = describe(file)
    return any(member["hyper_parameters"].get("derivative") is False for member in card.get("members", [card]))


def radial_engines(model: nn.Module) -> list[RadialEngine]:
    """What evaluates the radial filters of a model."""
    engines = (getattr(module, "radial", None) for module in model.modules())
    return [engine for engine in engines if isinstance(engine, RadialEngine)]


class Trial(Protocol):
    """A route, ready to be taken."""

    model: nn.Module

    def answer(self, number: int) -> Answer:
        """What it says of a frame."""
        ...

    def prepare(self) -> None:
        """Whatever goes before a step and is not counted."""
        ...

    def step(self) -> None:
        """What is timed."""
        ...


class ModelCall:
    """The model called from PyTorch, with tensors that exist already."""

    def __init__(self, subject: Subject, route: Route) -> None:
        dtype = as_dtype(route.numbers)
        self.units = subject.units
        self.model = load(subject.file, device=route.device, dtype=dtype, derivative=True, **_OPTIONS)
        set_radial_mode(self.model, route.radial)
        self.inputs = [_placed(inputs, route.device, dtype) for inputs in subject.inputs]
        self.turn = itertools.cycle(self.inputs)
        self.next = self.inputs[0]

    def answer(self, number: int) -> Answer:
        energy, forces = self._ask(self.inputs[number])
        per_length = self.units.in_ev / self.units.in_angstrom
        return Answer(self.units.in_ev * float(energy.detach()), per_length * forces.detach().double().cpu().numpy())

    def prepare(self) -> None:
        self.next = next(self.turn)

    def step(self) -> None:
        self._ask(self.next)

    def _ask(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        energy, forces = self.model(*inputs[:8])[:2]
        return energy, forces


class Dynamics:
    """Velocity Verlet in ASE, from 300 K, with everything ASE asks of a calculator on the way."""

    def __init__(self, subject: Subject, route: Route, timestep: float) -> None:
        options: dict[str, Any] = {"device": route.device, "dtype": route.numbers, "units": subject.units, **_OPTIONS}
        self.calculator = TMDNETCalculator(str(subject.file), **options)
        self.model = self.calculator.model
        set_radial_mode(self.model, route.radial)
        self.frames, self.timestep = subject.frames, timestep
        self.start = subject.atoms.copy()
        normal = np.random.default_rng(0).standard_normal((len(self.start), 3))
        self.start.set_momenta(normal * np.sqrt(self.start.get_masses() * ase_units.kB * 300)[:, None])
        self.steps: Iterator[Any] = iter(())
        self.left = 0

    def answer(self, number: int) -> Answer:
        return _ask(self.calculator, self.frames[number])

    def prepare(self) -> None:
        if self.left == 0:
            atoms = self.start.copy()
            atoms.calc = self.calculator
            dynamics = VelocityVerlet(atoms, timestep=self.timestep * ase_units.fs)
            self.steps, self.left = iter(dynamics.irun(STRETCH)), STRETCH
            next(self.steps)  # the forces to start with

    def step(self) -> None:
        next(self.steps)
        self.left -= 1


class ExternalCall:
    """:class:`External` as an engine uses it, plainly or replaying a CUDA graph."""

    def __init__(self, subject: Subject, route: Route) -> None:
        inputs = subject.inputs[0]
        options: dict[str, Any] = dict(_OPTIONS)
        if route.through == "graph":
            options["static_shapes"] = True
        self.external = External(
            subject.file,
            inputs.z.tolist(),
            device=route.device,
            output_transform="eV/A",
            use_cuda_graph=route.through == "graph",
            dtype=route.numbers,
            q=None if inputs.q is None else inputs.q.tolist(),
            s=None if inputs.s is None else inputs.s.tolist(),
            units=subject.units,
            **options,
        )
        self.model = self.external.model
        set_radial_mode(self.model, route.radial)
        dtype, device = as_dtype(route.numbers), route.device
        self.pos = [torch.tensor(frame.positions, dtype=dtype, device=device) for frame in subject.frames]
        cell = np.where(subject.atoms.pbc[:, None], subject.atoms.cell.array, 0.0)
        self.box = torch.tensor(cell, dtype=dtype, device=device) if cell.any() else None
        self.turn = itertools.cycle(self.pos)
        self.next = self.pos[0]

    def answer(self, number: int) -> Answer:
        energy, forces = self.external.calculate(self.pos[number], self.box)
        return Answer(float(energy), forces[0].double().cpu().numpy())

    def prepare(self) -> None:
        self.next = next(self.turn)

    def step(self) -> None:
        self.external.calculate(self.next, self.box)


def _trial(subject: Subject, route: Route, timestep: float) -> Trial:
    if route.through == "call":
        return ModelCall(subject, route)
    if route.through == "ase":
        return Dynamics(subject, route, timestep)
    return ExternalCall(subject, route)


def measure(
    subject: Subject, route: Route, *, seconds: float = 2.0, timestep: float = 1.0, compare: bool = True
) -> Measured:
    """Take a route again and again.

    The steps before the clock counts, during which loops are compiled and tables made, answer for the deviation.

    Args:
        subject: Model and atoms.
        route: The way to take.
        seconds: How long; up to three times as long for the first three steps, and one step at least.
        timestep: Of dynamics, in fs.
        compare: Whether to compare with exact arithmetic in float64, which evaluates the reference once.

    Raises:
        ConfigError: If the model cannot compute the structure.
    """
    found = Measured(route, len(subject.atoms))
    reference = subject.reference() if compare else None
    with num_threads(route.threads), matrix_products(DTYPES[route.dtype]):
        trial = _trial(subject, route, timestep)
        try:
            answers = [trial.answer(number) for number in range(NUM_FRAMES)]
        except ValueError as error:
            raise ConfigError(
                f"{subject.file} cannot compute {subject.atoms.get_chemical_formula()}: {error}"
            ) from None
        if reference is not None:
            pairs = list(zip(answers, reference, strict=True))
            found.energy_error = max(abs(a.energy - b.energy) for a, b in pairs) / len(subject.atoms)
            found.force_error = max(float(np.abs(a.forces - b.forces).max()) for a, b in pairs)
        if isinstance(trial, ExternalCall) and route.through == "graph" and trial.external.cuda_graph is None:
            found.note = "cannot be captured as a CUDA graph; External runs plainly"
        elif route.radial == "grid" and not any(engine.spline is not None for engine in radial_engines(trial.model)):
            found.note = "no grid is used; filters are evaluated pair by pair, as under exact"
        else:
            memory = Memory(route.device)
            memory.start()
            _take(trial, found, seconds)
            found.working_memory = memory.used()
    return found


def _take(trial: Trial, found: Measured, seconds: float) -> None:
    """Step until the time is over."""
    is_cuda = found.route.device != "cpu"
    start = time.perf_counter()
    try:
        while time.perf_counter() - start < (seconds if len(found.wall) >= 3 else 3 * seconds) or not found.wall:
            trial.prepare()
            if is_cuda:
                torch.cuda.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            trial.step()
            if is_cuda:
                torch.cuda.synchronize()
            found.wall.append(time.perf_counter() - wall)
            found.cpu.append(time.process_time() - cpu)
    except ValueError as error:  # positions that are no numbers any more
        found.note = f"stopped after {len(found.wall)} steps: {error}"


def _ask(calculator: TMDNETCalculator, atoms: Atoms) -> Answer:
    atoms = atoms.copy()
    calculator.calculate(atoms, ["energy", "forces"])
    return Answer(calculator.results["energy"], calculator.results["forces"])


def _placed(inputs: Inputs, device: str, dtype: torch.dtype) -> Inputs:
    """The same on a device and, but for indices, in a precision."""

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

    return Inputs(*map(place, inputs))
