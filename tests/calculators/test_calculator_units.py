"""Units are read the way people write them, and conversions are looked up, never executed."""

from __future__ import annotations

import math

import pytest

from torchmdnet.calculators import Units, tranforms, transforms
from torchmdnet.calculators.units import make_transform
from torchmdnet.errors import ConfigError


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("kcal/mol", Units("kcal/mol", "Å")),
        ("kcal/mol/A", Units("kcal/mol", "Å")),
        ("Hartree/Bohr", Units("Hartree", "Bohr")),
        ("ev", Units("eV", "Å")),
        ("kJ/mol/nm", Units("kJ/mol", "nm")),
        (("eV", "nm"), Units("eV", "nm")),
        ({"energy_unit": "Hartree"}, Units("Hartree", "Å")),
        ({"energy_unit": "eV", "length_unit": "Bohr"}, Units("eV", "Bohr")),
    ],
)
def test_units_are_read_in_the_usual_spellings(stated, expected) -> None:
    assert Units.parse(stated) == expected


@pytest.mark.parametrize("stated", ["evv", "kcal/mol/parsec", "kcal/A/mol", "", ("eV", "parsec"), {"energy_unit": "x"}])
def test_unknown_units_are_refused_by_name(stated) -> None:
    with pytest.raises(ConfigError, match=r"unit.*: .* is not known"):
        Units.parse(stated)


def test_both_spellings_name_the_same_table() -> None:
    assert transforms is tranforms


@pytest.mark.parametrize(
    ("name", "energy_by", "forces_by"),
    [
        ("eV/A -> kcal/mol/A", 23.0609, 23.0609),
        ("Hartree/Bohr -> kcal/mol/A", 627.509, 627.509 / 0.529177),
        ("Hartree/A -> kcal/mol/A", 627.509, 627.509),
    ],
)
def test_presets_keep_their_established_constants(name: str, energy_by: float, forces_by: float) -> None:
    assert make_transform(name, None)(1.0, 1.0) == (energy_by, forces_by)


def test_a_target_converts_exactly_from_the_units_of_the_model() -> None:
    avogadro, charge = 6.02214076e23, 1.602176634e-19
    to_kj = charge * avogadro / 1000
    energy, forces = make_transform("kJ/mol/nm", Units("eV", "Å"))(1.0, 1.0)
    assert math.isclose(energy, to_kj, rel_tol=1e-9)
    assert math.isclose(forces, 10 * to_kj, rel_tol=1e-9)
    energy, forces = make_transform("kcal/mol/A", Units("Hartree", "Bohr"))(1.0, 1.0)
    assert math.isclose(energy, 627.5094740631, rel_tol=1e-9)
    assert math.isclose(forces, 627.5094740631 / 0.529177210903, rel_tol=1e-9)


def test_a_preset_that_starts_from_other_units_than_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"starts from eV/Å, but the model predicts kcal/mol/Å. Pass 'kcal/mol/A'"):
        make_transform("eV/A -> kcal/mol/A", Units("kcal/mol", "Å"))
    make_transform("eV/A -> kcal/mol/A", Units("eV", "Å"))


@pytest.mark.parametrize("text", ["eV -> kcal", 'print("x") or (lambda e, f: (e, f))', "__import__('os')", ""])
def test_text_is_a_name_not_code(text: str, capsys) -> None:
    with pytest.raises(ConfigError, match=r"is not available.*Choose from 'eV/A -> kcal/mol/A'"):
        make_transform(text, None)
    assert capsys.readouterr().out == ""
