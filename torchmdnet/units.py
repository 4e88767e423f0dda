"""Units of energy and length, as data sets state them and calculators convert them.

The first block holds the constants that existing data sets were converted with; changing a digit would change
labels. Labels and results are converted with :func:`energy_factor` and :func:`length_factor`.
"""

from __future__ import annotations

from torchmdnet.errors import ConfigError, did_you_mean

HARTREE_TO_EV = 27.211386246
BOHR_TO_ANGSTROM = 0.529177
DEBYE_TO_E_ANGSTROM = 0.2081943
KCAL_MOL_TO_EV = 0.0433641153087705

#: One eV/Å³ in GPa, exact by the definition of the elementary charge.
GPA_PER_EV_A3 = 160.2176634

# CODATA 2018, in eV and Å
_ENERGY = {
    "eV": 1.0,
    "meV": 1e-3,
    "Hartree": 27.211386245988,
    "Rydberg": 13.605693122994,
    "kcal/mol": 4.184 * 0.010364269656262175,
    "kJ/mol": 0.010364269656262175,
}
_LENGTH = {"Å": 1.0, "nm": 10.0, "Bohr": 0.529177210903, "pm": 0.01}
_ALIASES = {
    "ev": "eV",
    "mev": "meV",
    "hartree": "Hartree",
    "ha": "Hartree",
    "eh": "Hartree",
    "e_h": "Hartree",
    "ry": "Rydberg",
    "rydberg": "Rydberg",
    "kcal/mol": "kcal/mol",
    "kcal": "kcal/mol",
    "kj/mol": "kJ/mol",
    "kj": "kJ/mol",
    "å": "Å",
    "angstrom": "Å",
    "ångström": "Å",
    "ang": "Å",
    "a": "Å",
    "nm": "nm",
    "nanometer": "nm",
    "bohr": "Bohr",
    "a0": "Bohr",
    "au": "Bohr",
    "pm": "pm",
}

__all__ = [
    "BOHR_TO_ANGSTROM",
    "DEBYE_TO_E_ANGSTROM",
    "GPA_PER_EV_A3",
    "HARTREE_TO_EV",
    "KCAL_MOL_TO_EV",
    "energy_factor",
    "force_factor",
    "length_factor",
    "normalise_unit",
]


def normalise_unit(unit: str, kind: str) -> str:
    """The spelling of a unit that the package uses: ``normalise_unit("hartree", "energy") -> "Hartree"``.

    Args:
        unit: Name of the unit; upper and lower case are alike.
        kind: ``"energy"`` or ``"length"``.

    Raises:
        ValueError: If the unit is not known; the message lists those that are.
    """
    table = _ENERGY if kind == "energy" else _LENGTH
    name = _ALIASES.get(str(unit).strip().lower(), str(unit))
    if name not in table:
        raise ConfigError(
            f"{kind}_unit: {unit!r} is not known.{did_you_mean(unit, table)} Choose from {', '.join(table)}."
        )
    return name


def energy_factor(unit: str, to: str = "eV") -> float:
    """Multiply an energy in ``unit`` by this to have it in ``to`` (CODATA 2018)."""
    return _ENERGY[normalise_unit(unit, "energy")] / _ENERGY[normalise_unit(to, "energy")]


def length_factor(unit: str, to: str = "Å") -> float:
    """Multiply a length in ``unit`` by this to have it in ``to`` (CODATA 2018)."""
    return _LENGTH[normalise_unit(unit, "length")] / _LENGTH[normalise_unit(to, "length")]


def force_factor(unit: str) -> float:
    """Multiply a force in ``unit``, such as ``"Hartree/Bohr"`` or ``"kcal/mol/Å"``, by this to have it in eV/Å.

    Raises:
        ConfigError: If it is not a unit of energy over one of length.
    """
    energy, _, length = str(unit).rpartition("/")
    try:
        return energy_factor(energy.strip()) / length_factor(length.strip())
    except ConfigError:
        raise ConfigError(
            f"forces_unit: {unit!r} is not known. Write an energy ({', '.join(_ENERGY)}) over a length "
            f"({', '.join(_LENGTH)}), such as eV/Å."
        ) from None
