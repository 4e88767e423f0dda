"""``torchmd-net info``: what energies are relative to, and the unit of every number."""

import json
from pathlib import Path

import pytest
from ase.build import molecule
from ase.io import write

from torchmdnet.config.command_line import resolve
from torchmdnet.scripts.info import main
from torchmdnet.training.run import train

SMALL = "--model tensornet --embedding-dimension 4 --num-layers 1 --num-rbf 4 --num-epochs 1 --no-report --batch-size 8"


@pytest.fixture
def potential(tmp_path, monkeypatch):
    """Trains on shaken water and ammonia; the file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHMDNET_CACHE", str(tmp_path / "cache"))
    for name, start in (("train", 0), ("test", 100)):
        frames = []
        for number in range(12):
            atoms = molecule(["H2O", "NH3"][number % 2])
            atoms.rattle(0.1, seed=start + number)
            atoms.info["energy"] = -10.0 * float(atoms.numbers.sum()) + 0.01 * number
            atoms.arrays["forces"] = 0.1 * atoms.positions
            frames.append(atoms)
        write(f"{name}.extxyz", frames)

    def make(*flags):
        arguments = [*SMALL.split(), "--dataset", "ASE", "--dataset-root", "train.extxyz", "--log-dir", "run", *flags]
        return train(resolve(arguments)) / "potential.safetensors"

    return make


def shown(path, capsys):
    capsys.readouterr()
    main([str(path)])
    lines = capsys.readouterr().out.splitlines()[1:]
    return {line[:2].strip() + line[2:].split("  ")[0]: line.split("  ", 2)[2].strip() for line in lines}


def test_fitted_references_are_told_as_such_and_every_number_has_its_unit(potential, capsys):
    path = potential("--dataset-arg", '{"test": "test.extxyz"}', "--remove-ref-energy", "--derivative")
    told = shown(path, capsys)
    assert "fitted to the training energies" in told["energies"]
    assert "isolated" not in told["energies"]
    assert told["reference energies"].count(" eV") == 3
    assert told["training: energy per atom"].endswith("eV/atom")
    assert told["training: largest force"].endswith("eV/Å")
    errors = dict(each.rsplit(" ", 2)[::2] for each in told["training: errors"].split(", ") if " MAE " in each)
    assert errors == {"energy MAE": "meV", "energy per atom MAE": "meV/atom", "force component MAE": "meV/Å"}
    assert "test 12" in told["training: systems"]
    assert "val_size" not in told["training: settings"]
    assert "test_size" not in told["training: settings"]


def test_stated_references_are_told_as_such(potential, capsys):
    stated = '{"atomref": {"H": -10.0, "N": -70.0, "O": -80.0}}'
    told = shown(potential("--dataset-arg", stated, "--prior-model", "Atomref"), capsys)
    assert told["energies"] == "totals: the network adds to the reference energies of the elements, stated by the data"
    assert told["parameters"] == f"{json.loads(Path('run/summary.json').read_text())['parameters']:,}"
    assert told["reference energies"] == "H -10 eV, N -70 eV, O -80 eV"


def test_a_network_alone_has_no_references(potential, capsys):
    assert "energies" not in shown(potential(), capsys)
