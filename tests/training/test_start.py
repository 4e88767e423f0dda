"""Training that starts from a model of another level, of other units, elements, boxes; and runs that continue."""

import json
import logging

import numpy as np
import pytest
from toy_data import Toy
from toy_runs import one_thread, rows, settings, train_toy  # noqa: F401 (fixtures)

from torchmdnet.checkpoint import describe, load_model
from torchmdnet.datasets.frames import Frames
from torchmdnet.datasets.tinyqm import TinyQM
from torchmdnet.errors import CheckpointError, ConfigError
from torchmdnet.training import run

TINY = {
    "dataset": "TinyQM",
    "dataset_root": "~/data",
    "train_size": 96,
    "val_size": 16,
    "test_size": 16,
    "batch_size": 16,
    "inference_batch_size": 16,
    "charge": True,
    "y_weight": 0.1,
    "save_interval": 9,
}
REFERENCES = {
    "delta": {"remove_ref_energy": True},
    "totals": {"prior_model": "Atomref"},
    "learned": {"prior_model": "LearnableAtomref"},
}


class Other(Toy):
    """The toy data at another level of theory: other energies of the elements, and more that only these data have.

    Args:
        change: What is different: nothing, ``energies``, ``unit``, ``level`` or ``element``.
    """

    def __init__(self, root=None, change: str = "energies") -> None:
        super().__init__()
        stored = self.frames
        samples = []
        for number in range(len(stored)):
            sample = stored.data(number)
            z = sample.z.numpy().copy()
            y = sample.y.numpy().astype(np.float64)
            if change == "energies":
                y = y - 100.0 * (z > 1).sum() - 7.0 * (z == 1).sum()
            if change == "element" and number % 3 == 0:
                z[z == 8] = 16
            q = np.zeros(1, np.float32)
            samples.append({"z": z, "pos": sample.pos.numpy(), "y": y, "neg_dy": sample.neg_dy.numpy(), "q": q})
        self.frames = Frames.from_samples(samples)
        if change == "unit":
            self.energy_unit = "kcal/mol"
        if change == "level":
            self.level_of_theory = "another potential"


@pytest.fixture(scope="module")
def xtb(tmp_path_factory):
    """A run on GFN2-xTB with delta learning."""
    folder = tmp_path_factory.mktemp("xtb") / "run"
    return train_toy(folder, **TINY, **REFERENCES["delta"], dataset_arg={"level": "GFN2-xTB"}, num_epochs=3)


def errors(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("kind", REFERENCES)
def test_fine_tuning_at_another_level_of_theory_starts_at_a_sane_error(tmp_path, xtb, kind, caplog):
    """The two levels differ by hundreds of eV an atom; without steps the error is that of the network."""
    with caplog.at_level(logging.INFO, logger="torchmdnet"):
        folder = train_toy(
            tmp_path / "run", **TINY, **REFERENCES[kind], dataset_arg={"level": "wB97X"}, num_epochs=1, lr=0.0,
            load_weights=str(xtb / "best.ckpt"),
        )  # fmt: skip
    mae = errors(folder)["errors"]["y_mae_per_atom"]
    assert mae < 1.0  # eV; 613 with the reference energies of the file
    assert "with its own reference energies" in caplog.text
    told = describe(folder / "potential.safetensors")
    assert told["training"]["started_from"] == str(xtb / "best.ckpt")
    model = load_model(folder / "potential.safetensors", remove_ref_energy=False, derivative=False)
    sample = TinyQM(level="wB97X")[int(np.load(folder / "splits.npz")["idx_test"][0])]
    total = float(model(sample.z, sample.pos.float(), q=sample.q.float())[0])
    assert abs(total - float(sample.y)) / len(sample.z) < 1.0  # of some -400 eV an atom


def test_the_same_data_leave_the_reference_energies_nearly_alone_and_the_network_as_it_was(tmp_path, xtb):
    folder = train_toy(
        tmp_path / "run", **TINY, **REFERENCES["delta"], dataset_arg={"level": "GFN2-xTB"}, num_epochs=1, lr=0.0,
        load_weights=str(xtb / "best.ckpt"),
    )  # fmt: skip
    before, after = (load_model(path / "best.ckpt") for path in (xtb, folder))
    for (name, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        if name.startswith("prior_model."):
            np.testing.assert_allclose(new, old, atol=2.0)  # eV, the mean error of few epochs in another place
        else:
            np.testing.assert_array_equal(new, old)


def test_reset_trainer_fits_the_reference_energies_too(tmp_path):
    first = train_toy(tmp_path / "first", num_epochs=2, remove_ref_energy=True)
    folder = train_toy(
        tmp_path / "run", num_epochs=1, lr=0.0, remove_ref_energy=True, load_model=str(first / "last.ckpt"),
        reset_trainer=True, dataset="test_start:Other",
    )  # fmt: skip
    assert errors(folder)["errors"]["y_mae_per_atom"] < 3 * errors(first)["errors"]["y_mae_per_atom"] + 0.05
    assert float(rows(folder)[0]["epoch"]) == 0


def test_the_mean_follows_the_data_where_outputs_are_standardised(tmp_path):
    first = train_toy(tmp_path / "first", num_epochs=1, standardize=True)
    changes = {"standardize": True, "dataset": "test_start:Other", "num_epochs": 1, "lr": 0.0}
    folder = train_toy(tmp_path / "run", load_weights=str(first / "best.ckpt"), **changes)
    old, new = (load_model(path / "best.ckpt") for path in (first, folder))
    assert float(new.mean - old.mean) == pytest.approx(-122, abs=20)  # 100 and two to four times 7
    assert float(new.std) == float(old.std)


def test_without_reference_energies_a_far_start_is_warned_of(tmp_path, caplog):
    first = train_toy(tmp_path / "first", num_epochs=1)
    with caplog.at_level(logging.WARNING, logger="torchmdnet"):
        train_toy(tmp_path / "run", num_epochs=1, dataset="test_start:Other", load_weights=str(first / "best.ckpt"))
    assert "have other reference energies. Set remove_ref_energy: true or prior_model: Atomref" in caplog.text


def test_elements_that_the_file_was_not_trained_on_are_named(tmp_path, caplog):
    first = train_toy(tmp_path / "first", num_epochs=1, remove_ref_energy=True)
    changes = {"dataset": "test_start:Other", "dataset_arg": {"change": "element"}, "remove_ref_energy": True}
    with caplog.at_level(logging.WARNING, logger="torchmdnet"):
        folder = train_toy(tmp_path / "run", num_epochs=1, load_weights=str(first / "best.ckpt"), **changes)
    assert "was not trained on S, which the data hold" in caplog.text
    assert describe(folder / "potential.safetensors")["elements"] == ["H", "C", "N", "S"]
    assert errors(folder)["errors"]["y_mae_per_atom"] < 1.0


def test_the_box_and_the_other_priors_are_those_of_the_run(tmp_path, caplog):
    box = [[30.0, 0.0, 0.0], [0.0, 30.0, 0.0], [0.0, 0.0, 30.0]]
    first = train_toy(tmp_path / "first", num_epochs=1, box_vecs=box)
    with caplog.at_level(logging.WARNING, logger="torchmdnet"):
        folder = train_toy(tmp_path / "run", num_epochs=1, lr=0.0, load_weights=str(first / "best.ckpt"))
    assert not load_model(folder / "best.ckpt").representation_model.distance.box.any()
    assert "box_vecs: " in caplog.text
    assert describe(folder / "potential.safetensors")["hyper_parameters"].get("box_vecs") is None


@pytest.mark.parametrize("option", ["load_weights", "load_model"])
def test_other_units_are_refused(tmp_path, option):
    first = train_toy(tmp_path / "first", num_epochs=1)
    changes = {option: str(first / "last.ckpt"), "dataset": "test_start:Other", "dataset_arg": {"change": "unit"}}
    with pytest.raises(ConfigError, match=r"with energy in eV, but these data have energy in kcal/mol\. Convert"):
        run.train(settings(tmp_path / "run", num_epochs=2, **changes))


def test_another_number_of_elements_names_the_setting(tmp_path):
    first = train_toy(tmp_path / "first", num_epochs=1)
    with pytest.raises(CheckpointError, match="set max_z: 100"):
        train_toy(tmp_path / "run", num_epochs=1, max_z=50, load_weights=str(first / "best.ckpt"))


@pytest.mark.parametrize(
    ("references", "changes", "message"),
    [
        (
            {"remove_ref_energy": True},
            {"dataset": "test_start:Other", "accept_changed_data": True},
            r"reference energies in .* eV/atom off these data",
        ),
        (
            {"prior_model": "Atomref"},
            {"dataset": "test_start:Other", "accept_changed_data": True},
            r"reference energies in .* eV/atom off these data",
        ),
        (
            {"standardize": True},
            {"dataset": "test_start:Other", "accept_changed_data": True},
            r"mean energy in .* eV/atom off these data",
        ),
        (
            {},
            {"dataset": "test_start:Other", "dataset_arg": {"change": "level"}},
            "trained on pair potential, but these",
        ),
        (
            {},
            {"charge": True, "dataset": "test_start:Other", "dataset_arg": {"change": "nothing"}},
            "charge: true, but the run of .* had false",
        ),
        ({}, {"box_vecs": [[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]]}, "box_vecs: .* had None"),
    ],
)
def test_a_run_does_not_continue_on_other_data(tmp_path, references, changes, message):
    first = train_toy(tmp_path / "first", num_epochs=1, **references)
    with pytest.raises(ConfigError, match=message) as refused:
        run.train(
            settings(tmp_path / "run", num_epochs=2, load_model=str(first / "last.ckpt"), **references, **changes)
        )
    assert "--load-weights" in str(refused.value)


def test_a_run_continues_with_the_reference_energies_it_had(tmp_path):
    first = train_toy(tmp_path / "run", num_epochs=1, remove_ref_energy=True)
    told = describe(first / "potential.safetensors")["references"]
    table = load_model(first / "last.ckpt").prior_model[-1].initial_atomref.clone()
    again = run.train(settings(first, num_epochs=2, remove_ref_energy=True, load_model=str(first / "last.ckpt")))
    np.testing.assert_array_equal(load_model(again / "last.ckpt").prior_model[-1].initial_atomref, table)
    assert describe(again / "potential.safetensors")["references"] == told
    assert told["source"] == "fitted to the training energies"
    assert set(told["energies"]) == {"H", "C", "N", "O"}
