"""Signs, units and charges that a run would learn as they are, told before it begins."""

from __future__ import annotations

import ase.io
import pytest
from doctor_data import molecules

from torchmdnet.data import DataModule


def looked_at(folder, frames, caplog, **options):
    """What is logged when a run opens these frames."""
    ase.io.write(folder / "a.extxyz", frames)
    caplog.clear()
    given = {"dataset": "ASE", "dataset_root": str(folder / "a.extxyz"), "dataset_arg": {"cache": False}}
    DataModule({**given, "derivative": True, "y_weight": 1.0, "neg_dy_weight": 1.0, **options}).setup()
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


PLANTED = {
    "nothing": ({}, None),
    "gradients": ({"forces": -1.0}, "The data, force sign: Forces have the wrong sign"),
    "lengths in nm": ({"positions": 0.1}, "The data, length unit: Lengths are certainly in nm, not in Å"),
    "lengths in Bohr": ({"positions": 1.8897}, "The data, length unit: Lengths are certainly in Bohr, not in Å"),
    "no forces": ({"forces": 0.0}, "The data, labels: Every force is zero"),
    "energies in kcal/mol": ({"energy": 23.06}, "The data, force units: Forces do not go with the energies"),
}


STATED = {
    "eV, stated as Hartree": (1.0, {"energy_unit": "Hartree"}, "Energies are certainly in eV, not in Hartree"),
    "eV, stated as kJ/mol": (1.0, {"energy_unit": "kJ/mol"}, "Energies are certainly in eV, not in kJ/mol"),
    "kcal/mol, stated as Hartree": (23.06, {"energy_unit": "Hartree"}, "Energies are certainly in kcal/mol, not in Ha"),
    "forces stated per Bohr": (1.0, {"forces_unit": "Hartree/Bohr"}, "energies in eV with forces in eV/Å"),
    "energies alone stated": (1.0, {"energy_unit": "Hartree", "forces_unit": "eV/Å"}, "not in Hartree as stated"),
    "lengths stated": (1.0, {"length_unit": "Bohr"}, "Lengths are certainly in Å, not in Bohr as stated"),
    "right": (23.06, {"energy_unit": "kcal/mol"}, None),
    "right, forces apart": (1.0, {"energy_unit": "eV", "forces_unit": "eV/Å"}, None),
}


@pytest.mark.parametrize("name", STATED)
def test_units_that_are_stated_are_compared_with_the_data_before_a_run(tmp_path, caplog, name):
    factor, stated, words = STATED[name]
    frames = molecules()
    for atoms in frames:
        for label in ("energy", "forces"):
            atoms.calc.results[label] = atoms.calc.results[label] * factor
    told = looked_at(tmp_path, frames, caplog, dataset_arg={"cache": False, **stated})
    told = [text for text in told if text.startswith("The data, ")]
    assert (told == []) if words is None else any(words in text for text in told)


def test_forces_in_another_unit_are_told_where_energies_cannot_be_compared(tmp_path, caplog):
    frames = molecules()[::8]  # no two are close, and no total energies
    for atoms in frames:
        atoms.calc.results = {"energy": 0.01 * len(atoms), "forces": atoms.calc.results["forces"] * 23.06}
    told = looked_at(tmp_path, frames, caplog)
    assert any("Forces look like kcal/mol/Å, not eV/Å" in text for text in told)


@pytest.mark.parametrize("name", PLANTED)
def test_signs_and_units_are_looked_at_before_a_run(tmp_path, caplog, name):
    factors, words = PLANTED[name]
    frames = molecules()
    for atoms in frames:
        atoms.positions *= factors.get("positions", 1.0)
        for label in ("energy", "forces"):
            atoms.calc.results[label] = atoms.calc.results[label] * factors.get(label, 1.0)
    told = [text for text in looked_at(tmp_path, frames, caplog) if text.startswith("The data, ")]
    if words is None:
        assert told == []
    else:
        assert any(text.startswith(words) and "torchmd-net data " in text for text in told)


def test_further_quantities_are_let_be(tmp_path, caplog):
    frames = molecules()[:20]
    for atoms in frames:
        atoms.arrays["hirshfeld"] = atoms.positions.copy()
        atoms.info["mine"] = 1.0
    options = {"dataset_arg": {"cache": False, "extra_keys": ["hirshfeld", "mine"]}}
    assert not [text for text in looked_at(tmp_path, frames, caplog, **options) if text.startswith("The data, ")]


def test_charges_that_the_model_is_not_given_are_told(tmp_path, caplog):
    frames = molecules()[:20]
    for number, atoms in enumerate(frames):
        atoms.info = {"charge": number % 2}
    (told,) = [text for text in looked_at(tmp_path, frames, caplog) if text.startswith("charge:")]
    assert "a total charge of 0 to 1, which the model is not given" in told
    assert told.endswith("Set charge: true.")
    assert not [text for text in looked_at(tmp_path, frames, caplog, charge=True) if text.startswith("charge:")]
