"""Ensembles by name: which integrator of ASE samples each, and how its temperature and pressure are changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torchmdnet.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["ENSEMBLES", "Ensemble", "Protocol", "check_protocol", "degrees_of_freedom", "dynamics_of", "ramped"]


@dataclass(frozen=True)
class Protocol:
    """How a structure is moved.

    Args:
        ensemble: A name of :data:`ENSEMBLES`.
        steps: How many steps.
        timestep: In fs.
        temperature: In K, at the beginning and at the end; linear in between.
        pressure: In bar, likewise; of the ensembles with a pressure.
        friction: Of Langevin dynamics, in 1/fs.
        thermostat_time: In which Bussi, MTK and Berendsen thermostats act, in fs.
        barostat_time: In which barostats act, in fs.
        compressibility: For the Berendsen barostat, in 1/GPa.
        seed: Of the velocities and of the thermostat.
        interval: Steps between frames of the trajectory.
        log_interval: Steps between rows of the log.
        velocity_interval: Steps between the velocities that the vibrational density of states is made of.
        keep_velocities: Start with the momenta of the structure instead of random ones.
        max_temperature: Above which the structure counts as exploded, in K; None for ten times the temperature + 1000.
        max_force: On an atom, above which it does, in eV/Å.
        stop_if_uncertain: Standard deviation of a force component over an ensemble of models, in eV/Å, at which to
            stop; None for never.
    """

    ensemble: str
    steps: int
    timestep: float = 0.5
    temperature: tuple[float, float] = (300.0, 300.0)
    pressure: tuple[float, float] = (1.0, 1.0)
    friction: float = 0.01
    thermostat_time: float = 100.0
    barostat_time: float = 1000.0
    compressibility: float = 0.46
    seed: int = 0
    interval: int = 20
    log_interval: int = 20
    velocity_interval: int = 8
    keep_velocities: bool = False
    max_temperature: float | None = None
    max_force: float = 100.0
    stop_if_uncertain: float | None = None

    @property
    def is_ramped(self) -> bool:
        """Whether temperature or pressure change on the way."""
        return len(set(self.temperature)) > 1 or len(set(self.pressure)) > 1

    @property
    def hottest(self) -> float:
        """The temperature in K above which a structure counts as exploded."""
        return self.max_temperature if self.max_temperature is not None else 10 * max(self.temperature) + 1000


class Ensemble(NamedTuple):
    """An integrator of ASE."""

    words: str
    #: The integrator for atoms, by a protocol, with a generator of random numbers.
    build: Callable[[Atoms, Protocol, np.random.Generator], Any]
    has_thermostat: bool = True
    has_barostat: bool = False
    #: Whether the centre of mass has no momentum of its own.
    is_centred: bool = False
    set_temperature: Callable[[Any, float], None] | None = None
    set_pressure: Callable[[Any, float], None] | None = None
    #: The energy that the exact motion conserves, in eV; None where there is none.
    conserved: Callable[[Any], float] | None = None


def check_protocol(protocol: Protocol, atoms: Atoms, name: str) -> None:
    """Refuse what an integrator cannot do with a structure.

    Args:
        protocol: How it would be moved.
        atoms: The structure.
        name: What to call it.

    Raises:
        ConfigError: With the option to change.
    """
    ensemble = ensemble_of(protocol.ensemble)
    if ensemble.has_barostat:
        if not atoms.pbc.all() or atoms.cell.rank < 3:
            raise ConfigError(
                f"--ensemble {protocol.ensemble}: {name} is periodic along {int(atoms.pbc.sum())} of three directions, "
                "and a pressure needs all of them. Choose nve, langevin or bussi."
            )
        if atoms.constraints:
            kinds = ", ".join(sorted({type(constraint).__name__ for constraint in atoms.constraints}))
            raise ConfigError(
                f"--ensemble {protocol.ensemble}: {name} has constraints ({kinds}), which no barostat of ASE takes. "
                "Remove them with --no-constraints, or choose nve, langevin or bussi."
            )
    for option, values, setter in (
        ("temperature", protocol.temperature, ensemble.set_temperature),
        ("pressure", protocol.pressure, ensemble.set_pressure),
    ):
        if len(set(values)) > 1 and setter is None:
            able = [key for key, each in ENSEMBLES.items() if getattr(each, f"set_{option}") is not None]
            raise ConfigError(
                f"--{option}: {protocol.ensemble} cannot change it on the way, from {values[0]:g} to {values[1]:g}. "
                f"Give one value, or choose from {', '.join(able)}."
            )
    if ensemble.has_thermostat and min(protocol.temperature) <= 0:
        raise ConfigError(f"--temperature: {protocol.ensemble} needs one above 0 K.")


def ensemble_of(name: str) -> Ensemble:
    """An ensemble by its name."""
    if name not in ENSEMBLES:
        raise ConfigError(
            f"--ensemble: {name!r} is not available.{did_you_mean(name, ENSEMBLES)} Choose from {', '.join(ENSEMBLES)}."
        )
    return ENSEMBLES[name]


def dynamics_of(atoms: Atoms, protocol: Protocol, rng: np.random.Generator) -> Any:
    """The integrator, at the beginning of the protocol.

    Args:
        atoms: With a calculator and momenta.
        protocol: How to move them.
        rng: Where random numbers come from.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="ase")  # of heuristics for masses of barostats
        return ensemble_of(protocol.ensemble).build(atoms, protocol, rng)


def ramped(values: tuple[float, float], step: int, steps: int) -> float:
    """A temperature or pressure at a step."""
    first, last = values
    return first if first == last else first + (last - first) * min(step / max(steps, 1), 1.0)


def degrees_of_freedom(atoms: Atoms, ensemble: Ensemble) -> int:
    """That share in the kinetic energy: without constraints, and the momentum of the whole where there is none."""
    free = int(atoms.get_number_of_degrees_of_freedom())
    if ensemble.is_centred and not atoms.constraints and len(atoms) > 1:
        free -= 3
    return max(free, 1)


# -------------------------------------------------------------------------------------------------- integrators


def _times(protocol: Protocol) -> dict[str, float]:
    from ase import units

    return {
        "timestep": protocol.timestep * units.fs,
        "thermostat": protocol.thermostat_time * units.fs,
        "barostat": protocol.barostat_time * units.fs,
    }


def _verlet(atoms: Atoms, protocol: Protocol, rng: np.random.Generator) -> Any:
    from ase.md.verlet import VelocityVerlet

    return VelocityVerlet(atoms, _times(protocol)["timestep"])


def _langevin(atoms: Atoms, protocol: Protocol, rng: np.random.Generator) -> Any:
    from ase import units
    from ase.md.langevin import Langevin

    return Langevin(
        atoms,
        _times(protocol)["timestep"],
        temperature_K=protocol.temperature[0],
        friction=protocol.friction / units.fs,
        fixcm=False,
        rng=rng,
    )


def _bussi(atoms: Atoms, protocol: Protocol, rng: np.random.Generator) -> Any:
    from ase.constraints import FixCom

    try:
        from ase.md.bussi import Bussi
    except ImportError:
        raise _too_old("bussi") from None
    if not atoms.constraints and len(atoms) > 1:
        atoms.set_constraint(FixCom())  # which the thermostat then does not count as degrees of freedom
    times = _times(protocol)
    return Bussi(atoms, times["timestep"], protocol.temperature[0], times["thermostat"], rng=rng)


def _baoab(atoms: Atoms, protocol: Protocol, rng: np.random.Generator) -> Any:
    from ase import units

    try:
        from ase.md.langevinbaoab import LangevinBAOAB
    except ImportError:
        raise _too_old(protocol.ensemble) from None
    times = _times(protocol)
    return LangevinBAOAB(
        atoms,
        times["timestep"],
        temperature_K=protocol.temperature[0],
        externalstress=-_pressure(protocol.pressure[0]),
        hydrostatic=protocol.ensemble == "npt-isotropic",
        T_tau=units.fs / protocol.friction,
        P_tau=times["barostat"],
        rng=rng,
    )


def _mtk(atoms: Atoms, protocol: Protocol, rng: np.random.Generator) -> Any:
    try:
        from ase.md.nose_hoover_chain import MTKNPT
    except ImportError:
        raise _too_old("npt") from None
    times = _times(protocol)
    return MTKNPT(
        atoms,
        times["timestep"],
        temperature_K=protocol.temperature[0],
        pressure_au=_pressure(protocol.pressure[0]),
        tdamp=times["thermostat"],
        pdamp=times["barostat"],
    )


def _berendsen(atoms: Atoms, protocol: Protocol, rng: np.random.Generator) -> Any:
    from ase import units
    from ase.md.nptberendsen import NPTBerendsen

    times = _times(protocol)
    return NPTBerendsen(
        atoms,
        times["timestep"],
        temperature_K=protocol.temperature[0],
        pressure_au=_pressure(protocol.pressure[0]),
        taut=times["thermostat"],
        taup=times["barostat"],
        compressibility_au=protocol.compressibility / units.GPa,
    )


def _too_old(ensemble: str) -> ConfigError:
    import ase

    return ConfigError(
        f"--ensemble {ensemble}: ASE {ase.__version__} does not have its integrator. Run 'pip install --upgrade ase', "
        "or choose langevin or npt-berendsen."
    )


def _pressure(bar: float) -> float:
    """bar in eV/Å³."""
    from ase import units

    return bar * units.bar


def _heat_bussi(dynamics: Any, kelvin: float) -> None:
    from ase import units

    dynamics.temp = kelvin * units.kB
    dynamics.target_kinetic_energy = 0.5 * dynamics.temp * dynamics.ndof


def _heat(dynamics: Any, kelvin: float) -> None:
    dynamics.set_temperature(temperature_K=kelvin)


def _press_baoab(dynamics: Any, bar: float) -> None:
    stress = -_pressure(bar)
    dynamics.externalstress = stress if dynamics.hydrostatic else stress * np.identity(3)


def _press_berendsen(dynamics: Any, bar: float) -> None:
    dynamics.set_pressure(pressure_au=_pressure(bar))


def _total(dynamics: Any) -> float:
    return float(dynamics.atoms.get_total_energy())


def _total_of_bussi(dynamics: Any) -> float:
    return _total(dynamics) - float(getattr(dynamics, "transferred_energy", math.nan))


#: What can be sampled.
ENSEMBLES: dict[str, Ensemble] = {
    "nve": Ensemble(
        "constant energy, velocity Verlet", _verlet, has_thermostat=False, is_centred=True, conserved=_total
    ),
    "langevin": Ensemble("constant temperature, Langevin", _langevin, set_temperature=_heat),
    "bussi": Ensemble(
        "constant temperature, stochastic velocity rescaling (Bussi)",
        _bussi,
        is_centred=True,
        set_temperature=_heat_bussi,
        conserved=_total_of_bussi,
    ),
    "npt": Ensemble(
        "constant temperature and pressure, cell of any shape, Nosé-Hoover chains (Martyna, Tobias, Klein)",
        _mtk,
        has_barostat=True,
        conserved=lambda dynamics: float(dynamics.get_conserved_energy()),
    ),
    "npt-langevin": Ensemble(
        "constant temperature and pressure, cell of any shape, Langevin (BAOAB)",
        _baoab,
        has_barostat=True,
        set_temperature=_heat,
        set_pressure=_press_baoab,
    ),
    "npt-isotropic": Ensemble(
        "constant temperature and pressure, cell of fixed shape, Langevin (BAOAB)",
        _baoab,
        has_barostat=True,
        set_temperature=_heat,
        set_pressure=_press_baoab,
    ),
    "npt-berendsen": Ensemble(
        "constant temperature and pressure, cell of fixed shape, Berendsen; for equilibration",
        _berendsen,
        has_barostat=True,
        set_temperature=_heat,
        set_pressure=_press_berendsen,
    ),
}
