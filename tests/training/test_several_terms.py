"""Training on more than energies and forces: stress, dipoles, charges; labels that are missing or do not fit."""

import copy
import csv
import json

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data
from toy_labels import ToyLabels
from toy_runs import finish, kill_me, one_thread, rows, settings, start, train_toy  # noqa: F401 (fixtures)

from torchmdnet.checkpoint import read_checkpoint
from torchmdnet.checkpoint.load import load_model
from torchmdnet.config.command_line import resolve
from torchmdnet.config.reader import write_yaml
from torchmdnet.data import DataModule
from torchmdnet.datasets import TinyQM
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.training.evaluate import evaluate
from torchmdnet.training.lightning import LNNP

MODEL = {
    "model": "tensornet",
    "output_model": "Scalar",
    "embedding_dimension": 8,
    "num_layers": 1,
    "num_rbf": 8,
    "cutoff_upper": 5.0,
    "max_z": 20,
    "derivative": True,
    "precision": 64,
}
PROPERTIES = {"dipole": {"weight": 2.0}, "charges": {"weight": 5.0, "loss": "l1_loss"}}


def module(**changes):
    torch.manual_seed(0)
    return LNNP({**MODEL, **changes})


def toy_batch(*numbers, **arguments):
    return ToyLabels(**arguments).batch(np.array(numbers))


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


# ------------------------------------------------------------------------------------------------ one step


def outputs(lnnp, batch):
    batch = lnnp.data_transform(copy.copy(batch))
    return batch, lnnp(batch.z, batch.pos, batch=batch.batch, properties=True)


def test_the_total_is_the_weighted_sum_of_all_terms_each_with_its_own_loss():
    lnnp = module(properties=PROPERTIES, y_weight=0.5, neg_dy_weight=3.0)
    batch, found = outputs(lnnp, toy_batch(0, 1, 2))
    expected = (
        0.5 * ((found.energy - batch.y) ** 2).mean()
        + 3.0 * ((found.forces - batch.neg_dy) ** 2).mean()
        + 2.0 * ((found.properties["dipole"] - batch.dipole) ** 2).mean()
        + 5.0 * (found.properties["charges"][:, 0] - batch.charges).abs().mean()
    )
    torch.testing.assert_close(lnnp.training_step(toy_batch(0, 1, 2)), expected, rtol=1e-10, atol=0)


def test_with_a_loss_per_atom_energies_are_divided_by_the_number_of_atoms_in_every_stage():
    lnnp = module(y_loss_per_atom=True, y_weight=10.0, neg_dy_weight=2.0)
    batch, found = outputs(lnnp, toy_batch(0, 1, 2))
    num_atoms = torch.bincount(batch.batch).unsqueeze(1)  # (S, 1)
    assert num_atoms.unique().numel() > 1
    error, force = ((found.energy - batch.y) / num_atoms).detach(), (found.forces - batch.neg_dy).detach()
    expected = 10.0 * error.square().mean() + 2.0 * force.square().mean()
    torch.testing.assert_close(lnnp.training_step(toy_batch(0, 1, 2)).detach(), expected, rtol=1e-10, atol=0)
    lnnp.validation_step(toy_batch(0, 1, 2))
    lnnp.test_step(toy_batch(0, 1, 2))
    assert lnnp.losses["val"]["y"]["mse_loss"].mean() == pytest.approx(float(error.square().mean()))
    for stage in ("val", "test"):
        assert lnnp.losses[stage]["y"]["l1_loss"].mean() == pytest.approx(float(error.abs().mean()))


def test_a_loss_per_atom_does_not_depend_on_how_often_a_cell_is_repeated():
    """Two molecules far apart have twice the energy and the same loss, where without the option it is four times."""
    one, two = Data(**toy_batch(1).to_dict()), Data(**toy_batch(1).to_dict())
    two.z, two.pos = two.z.repeat(2), torch.cat([two.pos, two.pos + 50.0])
    two.neg_dy, two.y, two.charges = two.neg_dy.repeat(2, 1), 2 * two.y, two.charges.repeat(2)
    for per_atom, ratio in ((True, 1.0), (False, 4.0)):
        lnnp = module(y_loss_per_atom=per_atom, neg_dy_weight=0.0)
        losses = [lnnp.training_step(Batch.from_data_list([copy.copy(data)])) for data in (one, two)]
        assert float((losses[1] / losses[0]).detach()) == pytest.approx(ratio, rel=1e-6)


def test_a_run_with_a_loss_per_atom_says_so_in_tables_summary_and_report(tmp_path):
    folder = train_toy(tmp_path / "run", num_epochs=1, y_loss_per_atom=True, y_weight=10.0, report=True)
    last, (val, test) = rows(folder), rows(folder, "errors.csv")
    assert float(last[0]["val_y_l1_loss"]) == pytest.approx(float(val["y_mae_per_atom"]), rel=1e-5)
    assert float(last[-1]["test_y_l1_loss"]) == pytest.approx(float(test["y_mae_per_atom"]), rel=1e-5)
    total = 10 * float(test["y_mae_per_atom"]) + float(test["neg_dy_mae"])
    assert float(last[-1]["test_total_l1_loss"]) == pytest.approx(total, rel=1e-5)
    words = "10 × mse_loss(energies per atom) + 1 × mse_loss(force components)"
    assert summary(folder)["loss"] == words
    assert words in (folder / "report.html").read_text()
    assert read_checkpoint(folder / "best.ckpt")["hyper_parameters"]["y_loss_per_atom"] is True


def test_systems_without_a_label_count_neither_in_the_loss_nor_in_its_mean():
    lnnp, options = module(properties=PROPERTIES, y_weight=0.0, neg_dy_weight=0.0), {"missing": 3}
    loss = lnnp.training_step(toy_batch(0, 1, 2, 3, 4, **options))  # 0 and 3 have none
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, lnnp.training_step(toy_batch(1, 2, 4, **options)), rtol=1e-10, atol=0)
    assert lnnp.losses["train"]["dipole"]["mse_loss"].weight == 6.0  # systems, of both steps
    assert lnnp.losses["train"]["charges"]["mse_loss"].weight == 2 * (5 + 4 + 5)  # atoms


def test_a_batch_without_any_label_has_no_loss_and_a_finite_gradient():
    lnnp = module(properties=PROPERTIES, y_weight=0.0, neg_dy_weight=0.0)
    loss = lnnp.training_step(toy_batch(0, 3, missing=3))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in lnnp.model.property_heads.parameters())
    assert lnnp._take_means("train") == {}


def test_every_parameter_takes_part_when_only_a_property_is_trained():
    """Processes that share gradients wait for one from each parameter."""
    lnnp = module(properties={"dipole": None}, derivative=False)
    lnnp.training_step(toy_batch(0, 1, fields=("dipole",))).backward()
    assert all(p.grad is not None for p in lnnp.parameters() if p.requires_grad)


def test_a_stress_of_some_systems_is_learnt_beside_open_molecules():
    """The open system changes the loss of the energies and forces alone."""
    cells, molecules = TinyQM(level="gfn1"), TinyQM(level="gfn2")
    periodic, open_system = cells[0], molecules[0]

    def sample(data, box, stress):
        return Data(z=data.z, pos=data.pos, y=data.y, neg_dy=data.neg_dy, box=box, stress=stress)

    nowhere = torch.zeros(1, 3, 3, dtype=periodic.box.dtype)
    mixed = Batch.from_data_list(
        [
            sample(open_system, nowhere, torch.full((1, 3, 3), torch.nan)),
            sample(periodic, periodic.box, periodic.stress),
        ]
    )
    alone = Batch.from_data_list([sample(periodic, periodic.box, periodic.stress)])
    lnnp = module(stress_weight=100.0, y_weight=0.0, neg_dy_weight=0.0)
    loss = lnnp.training_step(copy.copy(mixed))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in lnnp.parameters() if p.grad is not None)
    torch.testing.assert_close(loss.detach(), lnnp.training_step(alone).detach(), rtol=1e-8, atol=0)
    only_open = Batch.from_data_list([sample(open_system, nowhere, torch.full((1, 3, 3), torch.nan))])
    assert float(lnnp.training_step(only_open).detach()) == 0.0


def test_a_label_may_come_under_a_usual_or_a_given_name():
    names = {"dipole": "dp", "charges": "mulliken"}
    properties = {"dipole": {"weight": 2.0}, "charges": {"weight": 5.0, "loss": "l1_loss", "label": "mulliken"}}
    ours = module(properties=properties).training_step(toy_batch(0, 1, names=names))
    torch.testing.assert_close(ours, module(properties=PROPERTIES).training_step(toy_batch(0, 1)))


def test_runs_without_more_terms_ask_the_model_for_nothing_else():
    lnnp, asked = module(), []
    forward = lnnp.model.forward
    lnnp.model.forward = lambda *args, **kwargs: asked.append(set(kwargs)) or forward(*args, **kwargs)
    lnnp.training_step(toy_batch(0, 1))
    assert asked == [{"batch", "box", "q", "s", "extra_args", "num_systems"}]
    assert not {"properties", "stress_weight"} & set(lnnp.hparams)


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def molecules(tmp_path_factory):
    """Energies, forces, dipoles and charges of real molecules, for four epochs."""
    folder = tmp_path_factory.mktemp("molecules") / "run"
    return train_toy(
        folder,
        dataset="TinyQM",
        charge=True,
        remove_ref_energy=True,
        train_size=240,
        val_size=40,
        test_size=60,
        embedding_dimension=16,
        num_rbf=16,
        num_epochs=4,
        batch_size=12,
        lr=4e-3,
        y_weight=0.1,
        properties={"dipole": {"weight": 1.0}, "charges": {"weight": 10.0, "loss": "l1_loss"}},
        report=True,
    )


def test_several_heads_learn_together(molecules):
    found = summary(molecules)
    errors, trivial = found["errors"], found["baseline"]
    assert errors["dipole_mae"] < 0.8 * trivial["dipole_mae"]
    assert errors["charges_mae"] < 0.6 * trivial["charges_mae"]
    assert errors["neg_dy_mae"] < 0.75 * trivial["neg_dy_mae"]
    table = rows(molecules)
    assert float(table[3]["train_y_mse_loss"]) < 0.85 * float(table[0]["train_y_mse_loss"])


def test_each_term_has_a_column_named_after_its_loss(molecules):
    with open(molecules / "metrics.csv", newline="") as file:
        columns = set(next(csv.reader(file)))
    terms = {"y_mse_loss", "neg_dy_mse_loss", "dipole_mse_loss", "charges_l1_loss", "total_mse_loss"}
    assert {name for name in columns if name.startswith("train_")} == {f"train_{term}" for term in terms}
    absolute = {f"{term}_l1_loss" for term in ("y", "neg_dy", "dipole", "charges", "total")}
    assert {name for name in columns if name.startswith("val_")} == {f"val_{term}" for term in terms | absolute}
    row = {name: float(value) for name, value in rows(molecules)[0].items()}
    total = 0.1 * row["val_y_mse_loss"] + row["val_neg_dy_mse_loss"]
    total += row["val_dipole_mse_loss"] + 10 * row["val_charges_l1_loss"]
    assert row["val_total_mse_loss"] == pytest.approx(total, rel=1e-6)


def test_reported_errors_are_those_of_the_written_model(molecules):
    """Asked system by system, and with the trivial prediction worked out from the arrays."""
    model = load_model(molecules / "best.ckpt", derivative=True)
    data, splits = TinyQM(), np.load(molecules / "splits.npz")
    dipoles, charges = [], []
    for number in splits["idx_test"][:20]:
        sample = data[int(number)]
        found = model(sample.z, sample.pos.float(), q=sample.q, properties=True)
        dipoles.append((found.properties["dipole"] - sample.dp).abs().detach().numpy().ravel())
        charges.append((found.properties["charges"][:, 0] - sample.partial_charges).abs().detach().numpy())
    errors = summary(molecules)["errors"]
    row = rows(molecules)[-1]
    assert float(row["test_dipole_l1_loss"]) == pytest.approx(errors["dipole_mae"])
    assert float(rows(molecules, "errors.csv")[-1]["charges_mae"]) == pytest.approx(errors["charges_mae"])
    few = data.batch(splits["idx_test"][:20])
    lnnp = LNNP.load_from_checkpoint(molecules / "best.ckpt")
    again = evaluate(lnnp, [few], "test", device=torch.device("cpu")).errors
    assert again.others["dipole"][0] == pytest.approx(np.concatenate(dipoles).mean(), rel=1e-4)
    assert again.others["charges"][0] == pytest.approx(np.concatenate(charges).mean(), rel=1e-4)
    train, test = data.frames["dp"][splits["idx_train"]], data.frames["dp"][splits["idx_test"]]
    trivial = np.abs(test - train.mean(axis=0)).mean()
    assert summary(molecules)["baseline"]["dipole_mae"] == pytest.approx(trivial, rel=1e-5)


def test_report_and_plots_show_the_terms_in_their_units(molecules):
    page = (molecules / "report.html").read_text()
    assert "dipole component" in page
    assert "e·Å" in page
    assert "charges" in page
    assert (molecules / "parity.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Energies, forces and stress of real periodic cells, for three epochs."""
    folder = tmp_path_factory.mktemp("cells") / "run"
    return train_toy(
        folder,
        dataset="TinyQM",
        dataset_arg={"level": "GFN1-xTB"},
        splits="dataset",
        remove_ref_energy=True,
        embedding_dimension=16,
        num_rbf=16,
        num_epochs=3,
        lr=4e-3,
        y_weight=0.1,
        stress_weight=100.0,
        report=True,
    )


def test_energy_forces_and_stress_of_cells_learn_together(cells):
    found = summary(cells)
    assert found["errors"]["stress_mae"] < 0.75 * found["baseline"]["stress_mae"]
    assert found["errors"]["neg_dy_mae"] < 0.75 * found["baseline"]["neg_dy_mae"]
    assert {"train_stress_mse_loss", "val_stress_l1_loss", "val_stress_mse_loss"} <= set(rows(cells)[0])


def test_a_trained_stress_is_the_slope_of_the_energy(cells):
    model = load_model(cells / "best.ckpt", derivative=True).double()
    sample = TinyQM(level="gfn1")[5]
    stress = model(sample.z, sample.pos, box=sample.box, stress=True).stress[0]
    energies = []
    for change in (1e-4, -1e-4):
        strain = torch.eye(3, dtype=torch.float64)
        strain[0, 0] += change
        energies.append(float(model(sample.z, sample.pos @ strain, box=sample.box @ strain)[0].detach()))
    volume = float(torch.linalg.det(sample.box[0]).abs())
    assert float(stress[0, 0].detach()) == pytest.approx((energies[0] - energies[1]) / 2e-4 / volume, rel=1e-5)


def test_stress_is_reported_in_gigapascal_too(cells):
    page = (cells / "report.html").read_text()
    assert "meV/Å³" in page
    assert "GPa" in page


VALIDATED = ("dipole_mse", "total_mse", "dipole_l1", "total_l1")


def test_a_single_property_is_trained_without_energies_and_without_forces(tmp_path):
    folder = train_toy(
        tmp_path / "run",
        dataset="toy_labels:ToyLabels",
        dataset_arg={"fields": ["dipole"], "size": 60},
        derivative=False,
        properties={"dipole": None},
        train_size=40,
        num_epochs=12,
        precision=64,
    )
    table = rows(folder)
    assert set(table[0]) - {"epoch", "lr", "step"} == {
        f"{column}_loss" for column in ("train_dipole_mse", "train_total_mse", *(f"val_{term}" for term in VALIDATED))
    }
    found = summary(folder)
    assert found["errors"]["dipole_mae"] < 0.5 * found["baseline"]["dipole_mae"]
    assert found["errors"]["y_mae"] is None


def test_missing_labels_are_left_out_of_a_whole_run(tmp_path):
    folder = train_toy(
        tmp_path / "run",
        dataset="toy_labels:ToyLabels",
        dataset_arg={"missing": 2},
        properties={"dipole": None, "charges": None},
        num_epochs=2,
    )
    for row in rows(folder)[:2]:
        assert all(np.isfinite(float(value)) for value in row.values())
    errors = rows(folder, "errors.csv")
    assert all(np.isfinite(float(row["charges_mae"])) for row in errors)


CONTINUED = {
    "dataset": "toy_labels:ToyLabels",
    "dataset_arg": {"missing": 4},
    "properties": {"dipole": {"weight": 2.0}, "charges": {"weight": 3.0, "loss": "l1_loss"}},
    "num_epochs": 4,
    "batch_size": 5,
    "test_interval": 2,
}


def die_in_a_step():
    step, calls = LNNP.training_step, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 13:
            kill_me()
        return step(*args, **kwargs)

    LNNP.training_step = dies


def test_a_killed_run_with_several_heads_continues_to_the_same_numbers(tmp_path):
    folders = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        settings(folder, **CONTINUED)
    assert finish(start(["--conf", tmp_path / "whole.yaml"])) == 0
    assert finish(start(["--conf", tmp_path / "killed.yaml"], fault=die_in_a_step)) != 0
    assert finish(start(["--load-model", folders[1] / "last.ckpt"])) == 0
    whole, killed = folders
    for name in ("metrics.csv", "errors.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    ours, theirs = (read_checkpoint(folder / "last.ckpt")["state_dict"] for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ------------------------------------------------------------------------------------------------ refusals


def refused(**changes):
    options = {"dataset": "toy_labels:ToyLabels", "train_size": 20, "val_size": 5, "test_size": 5, **changes}
    DataModule(options).setup()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stress_weight": 1.0}, r"stress_weight: the data hold no 'stress', only .*dipole.*Set stress_weight to 0"),
        (
            {"properties": {"dipole": {"label": "dipol"}}},
            r"properties: dipole: the data hold no 'dipol'.*Did you mean 'dipole'.*label",
        ),
        (
            {"properties": {"polarizability": {"label": "dipole"}}},
            r"polarizability: 'dipole' of a sample with 3 atoms has shape \(1, 3\), but Polarizability "
            r"predicts 9 numbers per system, \(1, 3, 3\)",
        ),
        (
            {"properties": {"dipole": {"label": "charges"}}},  # three charges of the first sample look like a vector
            r"properties: dipole: 'charges' has a row for each atom in the data, but Dipole predicts 3 numbers per ",
        ),
        (
            {"properties": {"dipole": None}, "dataset_arg": {"missing": 1}},
            r"properties: dipole: 'dipole' is NaN, that is missing, in every sample",
        ),
        ({"properties": {"total": "Dipole"}}, r"properties: 'total' is the name of the whole loss"),
    ],
)
def test_labels_that_are_absent_or_misshapen_are_refused_before_any_work(changes, words):
    with pytest.raises((DataError, ConfigError), match=words):
        refused(**changes)


def resolved(tmp_path, **changes):
    path = tmp_path / "conf.yaml"
    write_yaml(path, {"dataset": "TinyQM", "model": "tensornet", "log_dir": str(tmp_path / "run"), **changes})
    return resolve(["--conf", str(path)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stress_weight": 1.0}, r"conf.yaml, line \d+: stress_weight=1 needs derivative"),
        ({"properties": {"spectrum": None}}, r"properties: spectrum needs a head"),
        ({"properties": {"dipole": {"wieght": 2}}}, r"'wieght' is unknown. Did you mean 'weight'"),
        ({"properties": {"dipole": {"loss": "l3_loss"}}}, r"properties: dipole: .*'l3_loss' is not available"),
        ({"properties": 3}, r"properties=3 is not valid"),
        (
            {"y_weight": 0, "properties": {"dipole": {"weight": 0}}},
            r"y_weight=0 and derivative=False.*nothing to train on",
        ),
        (
            {"standardize": True, "output_model": "DipoleMoment"},
            r"conf.yaml, line \d+: standardize=True: output_model 'DipoleMoment' predicts vectors",
        ),
        (
            {"standardize": True, "output_model": "VectorOutput", "model": "equivariant-transformer"},
            r"standardize=True: output_model 'VectorOutput'",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_data_are_read(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        resolved(tmp_path, **changes)


def test_properties_may_be_written_as_names_a_mapping_or_json(tmp_path):
    as_names = resolved(tmp_path, properties=["dipole", "charges"]).properties
    assert as_names == {"dipole": None, "charges": None}
    flags = ["--dataset", "TinyQM", "--log-dir", str(tmp_path / "run")]
    assert resolve([*flags, "--properties", "dipole", "charges"]).properties == as_names
    assert resolve([*flags, "--properties", "dipole=Dipole"]).properties == {"dipole": "Dipole"}
    written = resolve([*flags, "--properties", '{"charges": {"weight": 0.5}}']).properties
    assert written == {"charges": {"weight": 0.5}}


def test_only_a_property_may_be_trained(tmp_path):
    resolved(tmp_path, y_weight=0, properties=["dipole"])
