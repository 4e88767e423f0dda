"""``torchmd-net export`` in its formats."""

from __future__ import annotations

import pickle

import ase.io
import pytest
import torch
from ase.build import molecule

from torchmdnet.checkpoint import save_model
from torchmdnet.scripts.export import main
from torchmdnet.testing import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    facts = {"units": {"energy": "eV", "length": "Å"}, "elements": [1, 8]}
    save_model(tiny_model("tensornet", num_layers=1, charge=True), path, provenance=facts)
    return str(path)


def test_a_file_for_lammps_says_how_it_is_used(model, tmp_path, capsys):
    target = tmp_path / "model.pkl"
    main([model, str(target), "--format", "lammps", "--style", "real", "--charge", "-1"])
    said = capsys.readouterr().out
    for words in ("pair_style  mliap unified model.pkl 0", "units       real", "elements H O", "total charge -1"):
        assert words in said
    written = pickle.loads(target.read_bytes())
    assert (written.style, written.charge, written.element_types) == ("real", -1.0, ["H", "O"])


def test_torchscript_for_openmm_takes_elements_from_a_structure(model, tmp_path, capsys):
    ase.io.write(tmp_path / "water.xyz", molecule("H2O"))
    options = ["--format", "torchscript", "--interface", "openmm", "--structure", str(tmp_path / "water.xyz")]
    main([model, str(tmp_path / "force.pt"), *options, "--dtype", "float32"])
    assert "energy in kJ/mol" in capsys.readouterr().out
    script = torch.jit.load(str(tmp_path / "force.pt"))
    assert script(torch.tensor(molecule("H2O").positions / 10)).dtype == torch.float32


def test_options_that_a_format_does_not_read_are_refused(model, tmp_path):
    for options, words in (
        (["--style", "real"], "--style: --format package does not read it, but lammps"),
        (["--format", "lammps", "--inputs", "edges"], "--inputs: --format lammps does not read it"),
        (["--format", "torchscript", "--interface", "openmm"], "--structure: needed for --interface openmm"),
    ):
        with pytest.raises(ValueError, match=words):
            main([model, str(tmp_path / "out"), *options])
    assert not list(tmp_path.iterdir())
