"""A run leaves its best potential as one file that says what it was trained on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_data import Toy
from toy_runs import finished_run, one_thread, train_toy  # noqa: F401 (fixtures)

from torchmdnet.checkpoint import describe, load_model
from torchmdnet.training.potential_file import training_ranges


def test_the_file_holds_the_weights_of_the_best_checkpoint(finished):
    native = load_model(finished.folder / "potential.safetensors")
    best = load_model(finished.folder / "best.ckpt")
    assert native.state_dict().keys() == best.state_dict().keys()
    assert all(torch.equal(value, best.state_dict()[name]) for name, value in native.state_dict().items())
    sample = Toy()[0]
    for found, expected in zip(native(sample.z, sample.pos.float()), best(sample.z, sample.pos.float()), strict=True):
        assert torch.equal(found, expected)


def test_the_card_says_what_the_potential_was_trained_on(finished):
    card = describe(finished.folder / "potential.safetensors")
    numbers = np.load(finished.folder / "splits.npz")["idx_train"]
    samples = [Toy()[int(number)] for number in numbers]
    training = card["training"]
    assert training["dataset"] == "toy_data:Toy"
    assert training["systems"] == {"train": 24, "val": 8, "test": 8}
    assert training["atoms"] == [min(len(s.z) for s in samples), max(len(s.z) for s in samples)]
    energies = [float(s.y) / len(s.z) for s in samples]
    assert training["energy_per_atom"] == pytest.approx([min(energies), max(energies)], rel=1e-6)
    force = max(float(s.neg_dy.norm(dim=1).max()) for s in samples)
    assert training["largest_force"] == pytest.approx(force, rel=1e-6)
    assert training["periodic"] is False
    assert training["epochs"] == 4
    assert training["errors"]["split"] == "test"
    assert training["errors"]["y_mae"] > 0
    assert training["settings"]["lr"] == 1e-2
    assert card["golden"]["systems"]


def test_paths_of_the_users_machine_stay_out_of_the_file(finished):
    assert str(finished.folder).encode() not in (finished.folder / "potential.safetensors").read_bytes()


def batch(sizes, **fields):
    ptr = torch.tensor([0, *np.cumsum(sizes)])
    held = {name: torch.tensor(value) for name, value in fields.items()}
    return SimpleNamespace(ptr=ptr, to_dict=lambda: held)


def test_ranges_cover_all_batches_and_leave_missing_labels_out():
    box = np.zeros((2, 3, 3))
    box[1] = np.eye(3)
    found = training_ranges(
        [
            batch([1, 2], y=[[2.0], [float("nan")]], q=[0.0, 1.0], s=[0.0, 2.0]),
            batch([4, 2], y=[[-8.0], [1.0]], neg_dy=[[3.0, 4.0, 0.0]] * 6, box=box),
        ]
    )
    assert found == {
        "atoms": [1, 4],
        "energy_per_atom": [-2.0, 2.0],
        "largest_force": 5.0,
        "total_charge": [0.0, 1.0],
        "spin": [0.0, 2.0],
        "periodic": "some",
    }
