"""Calculators by name, and what one of them says about a structure."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchmdnet.catalogue import Catalogue
from torchmdnet.errors import ConfigError, DataError, did_you_mean
from torchmdnet.labelling.sound import check_structure

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

__all__ = ["CALCULATORS", "PROPERTIES", "Method", "charge_and_unpaired"]

#: Functions that return an ASE calculator; those of the table take total charge and multiplicity of the structure.
CALCULATORS = Catalogue(
    "calculator",
    {
        "gfn2-xtb": "torchmdnet.labelling.methods:gfn2_xtb",
        "gfn1-xtb": "torchmdnet.labelling.methods:gfn1_xtb",
        "emt": "torchmdnet.labelling.methods:emt",
        "lj": "torchmdnet.labelling.methods:lennard_jones",
    },
)
_LEVELS = {"gfn2-xtb": "GFN2-xTB", "gfn1-xtb": "GFN1-xTB", "emt": "EMT", "lj": "Lennard-Jones"}

#: What is written of a structure, with the shape for N atoms; in eV, Å and e.
PROPERTIES = {"energy": "()", "forces": "(N, 3)", "stress": "(6,)", "dipole": "(3,)", "charges": "(N,)"}

#: Names of a total charge and of a spin in a structure's header, and how the latter count.
_CHARGES = ("total_charge", "charge", "q", "net_charge")
_MULTIPLICITIES = ("spin_multiplicity", "multiplicity")
_UNPAIRED = ("n_unpaired", "unpaired_electrons", "nupdown")


def gfn2_xtb(charge: int = 0, multiplicity: int = 1, **options: Any) -> Calculator:
    """GFN2-xTB by tblite: Bannwarth, Ehlert and Grimme, https://doi.org/10.1021/acs.jctc.8b01176."""
    return _tblite("GFN2-xTB", charge, multiplicity, options)


def gfn1_xtb(charge: int = 0, multiplicity: int = 1, **options: Any) -> Calculator:
    """GFN1-xTB by tblite: Grimme, Bannwarth and Shushkov, https://doi.org/10.1021/acs.jctc.7b00118."""
    return _tblite("GFN1-xTB", charge, multiplicity, options)


def _tblite(method: str, charge: int, multiplicity: int, options: Mapping[str, Any]) -> Calculator:
    try:
        from tblite.ase import TBLite
    except ImportError as error:
        raise ConfigError(
            f"calculator: {method} is computed by tblite, which cannot be imported ({error}). Install it with: "
            "pip install 'torchmd-net[labels]'"
        ) from None
    _check_options(options, {**TBLite.default_parameters, "verbosity": 0})
    return TBLite(method=method, charge=charge, multiplicity=multiplicity, **{"verbosity": 0, **options})


def emt(charge: int = 0, multiplicity: int | None = None, **options: Any) -> Calculator:
    """ASE's effective medium theory: quick, for Ni Cu Pd Ag Pt Au Al, and for H C N O to play with."""
    from ase.calculators.emt import EMT

    _refuse_charge("emt", charge)
    _check_options(options, EMT.default_parameters)
    return EMT(**options)


def lennard_jones(charge: int = 0, multiplicity: int | None = None, **options: Any) -> Calculator:
    """ASE's Lennard-Jones potential, one kind of atom; ``sigma`` in Å, ``epsilon`` in eV."""
    from ase.calculators.lj import LennardJones

    _refuse_charge("lj", charge)
    _check_options(options, LennardJones.default_parameters)
    return LennardJones(**options)


def _refuse_charge(name: str, charge: int) -> None:
    if charge:
        raise DataError(f"the structure has total charge {charge:+d}, which {name} knows nothing of")


def _check_options(options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in options:
        if name not in known:
            raise ConfigError(
                f"option: {name!r} is not known to the calculator.{did_you_mean(name, known)} "
                f"Choose from {', '.join(known)}."
            )


@dataclass(frozen=True)
class Method:
    """A way to compute energies and forces that can be sent to another process.

    Args:
        name: A name of :data:`CALCULATORS`, or ``"package.module:factory"``, a function or class that returns an ASE
            calculator.
        options: Its keyword arguments.
        stated_level: What to call the level of theory, if not by name and options.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    stated_level: str | None = None

    def __post_init__(self) -> None:
        if self.name not in CALCULATORS and ":" not in self.name:
            CALCULATORS[self.name]  # raises, naming those that there are

    @property
    def level_of_theory(self) -> str:
        """The name that is written beside the labels."""
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return self.stated_level or _LEVELS.get(self.name, self.name) + (f" ({options})" if options else "")

    def describe(self) -> dict[str, Any]:
        """All that the numbers depend on, for JSON."""
        return {"calculator": self.name, "options": dict(self.options), "level_of_theory": self.level_of_theory}

    def prepare(self) -> Calculators:
        """Import the calculator; done once in each process.

        Raises:
            ConfigError: If it cannot be found or made.
        """
        return Calculators(self)


class Calculators:
    """The calculators of one process, for structures of any charge and spin.

    Those of the table are created for every structure, so that a result does not depend on the structure before it.
    Others may be slow to make, and are kept, one for each charge and multiplicity if the factory takes these.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.factory: Callable[..., Any] = CALCULATORS[method.name]
        self.is_known = method.name in CALCULATORS
        known = _parameters(self.factory)
        self.takes = {name for name in ("charge", "multiplicity") if name in known}
        self.kept: dict[tuple[int, int], Any] = {}
        if self.is_known or not self.takes:  # what cannot work is an error before the first structure
            self.get(0, 0)

    def get(self, charge: int, unpaired: int) -> Any:
        """The calculator for a total charge in e and a number of unpaired electrons."""
        key = (charge, unpaired) if self.takes else (0, 0)
        if key in self.kept:
            return self.kept[key]
        state = {"charge": charge, "multiplicity": unpaired + 1}
        made = self.factory(**{name: state[name] for name in self.takes}, **self.method.options)
        if not hasattr(made, "get_property"):
            raise ConfigError(
                f"calculator: {self.method.name} returned {type(made).__name__}, which is no ASE calculator."
            )
        if not self.is_known:
            self.kept[key] = made
        return made

    def attach(self, atoms: Atoms) -> Atoms:
        """Give a structure its calculator."""
        check_structure(atoms)
        charge, unpaired = charge_and_unpaired(atoms)
        atoms.calc = self.get(charge, unpaired)
        return atoms

    def evaluate(self, atoms: Atoms, properties: Sequence[str] = ()) -> dict[str, Any]:
        """Labels of a structure as plain numbers and lists, in eV, Å and e.

        The energy is the one whose gradient the forces are, where a calculator with fractional occupations has two.

        Args:
            atoms: The structure.
            properties: What to compute. Default: energy and forces, the stress of a cell that is periodic in all
                directions, and dipole and charges of the electrons' density where they come with the rest.

        Raises:
            DataError: If a number is not finite or is missing.
        """
        import numpy as np

        calculator: Any = self.attach(atoms).calc
        wanted = list(properties) or ["energy", "forces"]
        if not properties and atoms.pbc.all() and "stress" in calculator.implemented_properties:
            wanted.append("stress")
        found: dict[str, Any] = {}
        for name in sorted(wanted, key=lambda name: name == "energy"):  # forces bring the energy with them
            found[name] = calculator.get_property(name, atoms)
        results = calculator.results
        if "energy" in found:
            found["energy"] = results.get("free_energy", found["energy"])
        if not properties:
            also = () if atoms.pbc.any() else ("dipole",)
            found.update({name: results[name] for name in (*also, "charges") if results.get(name) is not None})
        shapes = {"energy": (), "forces": (len(atoms), 3), "stress": (6,), "dipole": (3,), "charges": (len(atoms),)}
        labels: dict[str, Any] = {}
        for name in PROPERTIES:
            if name in found:
                value = np.asarray(found[name], dtype=float)
                if name == "stress" and value.shape == (3, 3):
                    value = value[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
                if value.shape != shapes[name]:
                    raise DataError(f"{name} has shape {value.shape} instead of {shapes[name]}")
                if not np.isfinite(value).all():
                    raise DataError(f"{name} is not finite")
                labels[name] = value.tolist()
        return labels


def _parameters(factory: Callable[..., Any]) -> set[str]:
    """Keywords that a factory names, in its signature or, as ASE's calculators do, in a table."""
    try:
        named = set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        named = set()
    return named | set(getattr(factory, "default_parameters", ()))


def charge_and_unpaired(atoms: Atoms) -> tuple[int, int]:
    """Total charge in e and number of unpaired electrons, as ``atoms.info`` states them.

    Without a charge it is the sum of the initial charges; without a spin there are as few unpaired electrons as can be.
    A plain ``spin`` counts unpaired electrons or is a multiplicity, whichever the number of electrons allows.

    Raises:
        DataError: If charge, spin and number of electrons do not go together.
    """
    info = atoms.info
    name = next((name for name in _CHARGES if name in info), None)
    total = float(info[name]) if name is not None else float(atoms.get_initial_charges().sum())
    if not math.isfinite(total) or abs(total - round(total)) > 1e-3:
        raise DataError(f"the total charge is {total:g}, which is no whole number")
    charge = round(total)
    electrons = int(atoms.numbers.sum()) - charge
    for names, offset in ((_MULTIPLICITIES, 1), (_UNPAIRED, 0)):
        for name in names:
            if name in info:
                return charge, _checked_unpaired(info[name], float(info[name]) - offset, name, electrons)
    if "spin" in info:
        spin = float(info["spin"])
        unpaired = spin if (spin - electrons) % 2 == 0 else spin - 1
        return charge, _checked_unpaired(info["spin"], unpaired, "spin", electrons)
    return charge, electrons % 2


def _checked_unpaired(given: Any, unpaired: float, name: str, electrons: int) -> int:
    if unpaired < 0 or unpaired != round(unpaired) or (unpaired - electrons) % 2 or unpaired > electrons:
        raise DataError(f"{name} = {given} is not possible with {electrons} electrons")
    return int(unpaired)
