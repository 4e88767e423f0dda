"""One simulation in one folder, which can be killed at any moment and goes on as if it had not been."""

from __future__ import annotations

import csv
import io
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet.errors import DataError
from torchmdnet.simulation.ensembles import (
    ENSEMBLES,
    Protocol,
    degrees_of_freedom,
    dynamics_of,
    ensemble_of,
    ramped,
)
from torchmdnet.simulation.sanity import closest_pair, explosion, what_is_wrong
from torchmdnet.simulation.state import State, put_numbers, read_atoms, take_numbers, write_atoms

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["LOG", "STATE", "TRAJECTORY", "VELOCITIES", "Progress", "Simulation", "prepared"]

TRAJECTORY, LOG, VELOCITIES = "trajectory.extxyz", "log.csv", "velocities.f32"
STATE, START, STOPPED = "state.npz", "start.json", "stopped.extxyz"
#: Files that grow.
GROWING = (TRAJECTORY, LOG, VELOCITIES)
#: Seconds of work after which the state is saved.
SAVE_SECONDS = 10.0
#: Bytes of velocities that are kept at most; a longer simulation keeps those of its last part.
MOST_VELOCITIES = 1 << 26


@dataclass
class Progress:
    """What is seen of a simulation while it runs."""

    step: int = 0
    steps: int = 0
    temperature: float = math.nan  # K
    pressure: float | None = None  # GPa
    drift: float | None = None  # meV/atom/ps, of the conserved energy
    ns_per_day: float | None = None
    uncertainty: float | None = None  # eV/Å


@dataclass
class Simulation:
    """Dynamics of one structure.

    The folder holds ``trajectory.extxyz``, ``log.csv``, ``velocities.f32`` and ``state.npz``. The state is replaced as
    a whole every few seconds, and whatever the other files hold beyond it is cut off when the simulation goes on, so
    that a simulation that was killed gives the same files, byte for byte, as one that was not.

    Args:
        folder: Where everything is written; it exists.
        atoms: The structure with its calculator, as :func:`prepared` returns it; not used where there is a state.
        protocol: How it is moved.
        number: What distinguishes its random numbers from those of others with the same seed.
    """

    folder: Path
    atoms: Atoms
    protocol: Protocol
    number: tuple[int, ...] = (0,)
    reason: str | None = field(default=None, init=False)
    should_stop: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.ensemble = ensemble_of(self.protocol.ensemble)
        self.rng = np.random.default_rng([self.protocol.seed, *self.number])
        self.step, self.seconds, self.is_done = 0, 0.0, False
        self._times: list[float] = []  # ps and meV/atom of the rows of the log
        self._conserved: list[float] = []
        self._files: dict[str, Any] = {}
        self._latest: dict[str, Any] = {}
        state = self.folder / STATE
        found = State.read(state) if state.is_file() else None
        calculator: Any = self.atoms.calc
        if hasattr(calculator, "reset"):
            calculator.reset()  # so that nothing depends on what was calculated before
        self._restore_search({} if found is None else found.search)
        if found is not None:
            self.atoms = read_atoms(self.folder / START)
            self.atoms.calc = calculator
            self._place(found)
        elif not (self.protocol.keep_velocities and self.atoms.has("momenta")):
            give_velocities(self.atoms, self.protocol, self.rng)
        self.dynamics = dynamics_of(self.atoms, self.protocol, self.rng)
        self.freedom = degrees_of_freedom(self.atoms, self.ensemble)
        steps = self.protocol.steps
        room = MOST_VELOCITIES // max(12 * len(self.atoms), 1) * self.protocol.velocity_interval
        self._velocities_from = max(0, steps - room)
        if found is None:
            for name in GROWING:  # of a start that was killed before it saved anything
                (self.folder / name).unlink(missing_ok=True)
            write_atoms(self.folder / START, self.atoms)
        else:
            self._go_on(found)

    # ------------------------------------------------------------------------------------------------ state

    def _place(self, state: State) -> None:
        atoms = self.atoms
        atoms.set_cell(state.cell, scale_atoms=False)
        atoms.arrays["positions"] = state.positions.copy()
        atoms.arrays["momenta"] = state.momenta.copy()
        self.rng.bit_generator.state = state.random
        self.step, self.seconds, self.is_done = state.step, state.seconds, state.done

    def _go_on(self, state: State) -> None:
        """Continue from a state: the integrator as it was, files cut to what they held."""
        self._place(state)  # building an integrator may have calculated or drawn
        put_numbers(self.dynamics, state.integrator)
        self._restore_search(state.search)
        for name in GROWING:
            path, size = self.folder / name, state.sizes.get(name, 0)
            there = path.stat().st_size if path.exists() else 0
            if there < size:
                raise DataError(
                    f"{path} has {there:,} bytes, but had {size:,} when the state was saved. Bring it back, or start "
                    "again with --overwrite."
                )
            if there > size:
                os.truncate(path, size)
        for row in read_log(self.folder / LOG):
            self._remember(row)
        self.is_done = state.done and self.step >= self.protocol.steps

    def _restore_search(self, search: dict[str, np.ndarray]) -> None:
        home = getattr(self.atoms.calc, "home", None)
        if home is not None:
            home.restore(search)

    def save(self) -> None:
        """Write the state, after everything that it counts on has reached the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        home = getattr(self.atoms.calc, "home", None)
        sizes = {name: (self.folder / name).stat().st_size for name in GROWING if (self.folder / name).exists()}
        State(
            step=self.step,
            positions=self.atoms.positions,
            momenta=self.atoms.get_momenta(),
            cell=self.atoms.cell.array,
            integrator=take_numbers(self.dynamics),
            search={} if home is None else home.state(),
            random=dict(self.rng.bit_generator.state),
            sizes=sizes,
            seconds=self.seconds,
            done=self.is_done,
        ).write(self.folder / STATE)

    # ------------------------------------------------------------------------------------------------ running

    def run(self, tell: Callable[[Progress], None] = lambda progress: None) -> bool:
        """Simulate to the end, or until :attr:`should_stop` is set or something is wrong.

        Args:
            tell: Called about every tenth of a second.

        Returns:
            Whether the end was reached. Otherwise :attr:`reason` says what is wrong, or is None after a stop.
        """
        protocol = self.protocol
        if self.is_done:
            return True
        with self._open():
            if not (self.folder / STATE).exists():
                self._record()
                self.save()
                self._look()
                if self.reason is not None:
                    self._keep_stopped()
                    return False
            began = saved = time.monotonic()
            first = told = began
            seconds_before, since = self.seconds, self.step
            while self.step < protocol.steps and not self.should_stop:
                self._ramp()
                self.dynamics.run(1)
                self.step += 1
                if self.step == since + 1:
                    first = time.monotonic()  # loops are compiled in the first step
                self._look()
                if self.reason is not None:
                    self._keep_stopped()
                    return False
                self._record()
                now = time.monotonic()
                if now - told > 0.1 or self.step == protocol.steps:
                    told = now
                    done = self.step - since - 1
                    speed = done * protocol.timestep * 1e-6 / max(now - first, 1e-9) * 86400 if done else None
                    tell(self._progress(speed))
                if now - saved > SAVE_SECONDS:
                    self.seconds = seconds_before + now - began
                    self.save()
                    saved = time.monotonic()
            self.seconds = seconds_before + time.monotonic() - began
            self.is_done = self.step >= protocol.steps
            self.save()
        return self.is_done

    def _ramp(self) -> None:
        protocol, ensemble = self.protocol, self.ensemble
        for values, setter in (
            (protocol.temperature, ensemble.set_temperature),
            (protocol.pressure, ensemble.set_pressure),
        ):
            if setter is not None and values[0] != values[1]:
                setter(self.dynamics, ramped(values, self.step, protocol.steps))

    def _look(self) -> None:
        """Find out whether the structure is still one."""
        atoms, protocol = self.atoms, self.protocol
        self.reason = explosion(atoms, max(protocol.temperature), protocol.hottest) or what_is_wrong(
            atoms,
            forces=atoms.get_forces(apply_constraint=False),
            energy=float(atoms.get_potential_energy()),
            max_force=protocol.max_force,
        )
        if self.reason is None and self.step % protocol.log_interval == 0:
            self.reason = closest_pair(atoms)
        limit, spread = protocol.stop_if_uncertain, self.uncertainty
        if self.reason is None and limit is not None and spread is not None and spread > limit:
            self.reason = (
                f"the models of the ensemble differ by {spread:.3g} eV/Å in a component of a force (standard "
                f"deviation), more than {limit:g}"
            )

    def _keep_stopped(self) -> None:
        """Write the structure that ended the simulation; the state stays the last one in order."""
        from ase.io import write

        copy = self.atoms.copy()
        copy.info["stopped"] = self.reason
        copy.info["step"] = self.step
        write(self.folder / STOPPED, copy, format="extxyz")

    @property
    def temperature(self) -> float:
        """In K, of what is free to move."""
        from ase import units

        return float(2 * self.atoms.get_kinetic_energy() / (self.freedom * units.kB))

    @property
    def uncertainty(self) -> float | None:
        """Largest standard deviation of a component of a force over the members of an ensemble, in eV/Å."""
        calculator: Any = self.atoms.calc
        spread = calculator.results.get("forces_std")
        return None if spread is None else float(np.abs(spread).max())

    def _progress(self, speed: float | None) -> Progress:
        row = self._latest
        return Progress(
            self.step,
            self.protocol.steps,
            self.temperature,
            row.get("pressure_GPa"),
            self.drift(),
            speed,
            self.uncertainty,
        )

    def drift(self) -> float | None:
        """Slope of the conserved energy in meV/atom/ps so far; None without one."""
        if len(self._times) < 3 or self.ensemble.conserved is None:
            return None
        return float(np.polyfit(self._times, self._conserved, 1)[0])

    # ------------------------------------------------------------------------------------------------ recording

    def _open(self) -> Any:
        import contextlib

        @contextlib.contextmanager
        def opened() -> Any:
            with contextlib.ExitStack() as stack:
                for name in GROWING:
                    self._files[name] = stack.enter_context(open(self.folder / name, "ab"))
                yield
            self._files.clear()

        return opened()

    def _record(self) -> None:
        protocol, step = self.protocol, self.step
        is_last = step == protocol.steps
        if step % protocol.log_interval == 0 or is_last:
            self._log()
        if step % protocol.interval == 0 or is_last:
            self._frame()
        if step >= self._velocities_from and step % protocol.velocity_interval == 0:
            self._files[VELOCITIES].write(self.atoms.get_velocities().astype("<f4").tobytes())

    def _log(self) -> None:
        row = self._row()
        self._remember(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(row), lineterminator="\n")
        file = self._files[LOG]
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({name: "" if value is None else f"{value:.10g}" for name, value in row.items()})
        file.write(text.getvalue().encode())

    def _row(self) -> dict[str, float | None]:
        from ase import units

        atoms, protocol = self.atoms, self.protocol
        potential, kinetic = float(atoms.get_potential_energy()), float(atoms.get_kinetic_energy())
        row: dict[str, float | None] = {
            "step": self.step,
            "time_ps": self.step * protocol.timestep / 1000,
            "temperature_K": self.temperature,
            "potential_energy_eV": potential,
            "kinetic_energy_eV": kinetic,
            "total_energy_eV": potential + kinetic,
            "largest_force_eV_A": float(np.linalg.norm(atoms.get_forces(apply_constraint=False), axis=1).max()),
        }
        if self.ensemble.conserved is not None:
            row["conserved_energy_eV"] = self.ensemble.conserved(self.dynamics)
        if self.ensemble.has_thermostat:
            row["target_temperature_K"] = ramped(protocol.temperature, self.step, protocol.steps)
        if atoms.pbc.all() and atoms.cell.rank == 3:
            stress = atoms.get_stress(voigt=False, include_ideal_gas=True, apply_constraint=False)
            row["pressure_GPa"] = float(-np.trace(stress) / 3 / units.GPa)
            row["volume_A3"] = float(atoms.get_volume())
            row["density_g_cm3"] = float(atoms.get_masses().sum() / atoms.get_volume() * 1e24 / units._Nav)
        if self.uncertainty is not None:
            row["largest_force_std_eV_A"] = self.uncertainty
        return row

    def _remember(self, row: dict[str, Any]) -> None:
        self._latest = row
        if row.get("conserved_energy_eV") is not None:
            self._times.append(float(row["time_ps"]))
            self._conserved.append(1000 * float(row["conserved_energy_eV"]) / max(len(self.atoms), 1))

    def _frame(self) -> None:
        from ase.calculators.singlepoint import SinglePointCalculator
        from ase.io import write

        frame = self.atoms.copy()
        frame.set_constraint()
        frame.info["time_ps"] = self.step * self.protocol.timestep / 1000
        frame.info["step"] = self.step
        results = {
            "energy": float(self.atoms.get_potential_energy()),
            "forces": self.atoms.get_forces(apply_constraint=False),
        }
        frame.calc = SinglePointCalculator(frame, **results)
        text = io.StringIO()
        write(text, frame, format="extxyz")
        self._files[TRAJECTORY].write(text.getvalue().encode())


def prepared(atoms: Atoms, calculator: Any) -> Atoms:
    """A copy of a structure, with a calculator, without labels."""
    copy = atoms.copy()
    copy.info = {name: value for name, value in copy.info.items() if np.size(value) == 1}
    for name in set(copy.arrays) - {"numbers", "positions", "momenta", "masses", "tags", "initial_charges"}:
        del copy.arrays[name]
    copy.calc = calculator
    return copy


def give_velocities(atoms: Atoms, protocol: Protocol, rng: np.random.Generator) -> None:
    """Random velocities at the temperature at the beginning: for constant energy exactly that temperature."""
    from ase import units
    from ase.md.velocitydistribution import Stationary, ZeroRotation

    kelvin = protocol.temperature[0]
    ensemble = ENSEMBLES[protocol.ensemble]
    normal = rng.standard_normal((len(atoms), 3))
    atoms.set_momenta(normal * np.sqrt(atoms.get_masses() * units.kB * kelvin)[:, None])
    if ensemble.is_centred and not atoms.constraints:
        Stationary(atoms, preserve_temperature=False)
        if protocol.ensemble == "nve" and not atoms.pbc.any() and len(atoms) > 2:
            ZeroRotation(atoms, preserve_temperature=False)
    if protocol.ensemble == "nve" and kelvin > 0:
        now = 2 * atoms.get_kinetic_energy() / (degrees_of_freedom(atoms, ensemble) * units.kB)
        if now > 0:
            atoms.set_momenta(atoms.get_momenta() * math.sqrt(kelvin / now))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of ``log.csv`` as numbers; None where a cell is empty."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: float(value) if value else None for name, value in row.items() if name}
            for row in csv.DictReader(file)
        ]
