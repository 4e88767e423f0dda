"""The data module: one set, built and divided once, served in reproducible batches, with its options left alone."""

from __future__ import annotations

import copy
import logging
from argparse import Namespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torch_geometric.data import Data

from torchmdnet.data import DataModule
from torchmdnet.data.digest import digest_by_field
from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.frames import Frames
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.priors import Atomref, LearnableAtomref

ENERGY = {1: -13.5, 6: -1030.25, 8: -2042.75}


def molecules(count=20, seed=0, **extra):
    """Energies that are the sum of the atoms' and a little more."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        z = rng.choice([1, 6, 8], rng.integers(2, 7))
        sample = {"z": z, "pos": rng.normal(size=(len(z), 3)), "neg_dy": rng.normal(size=(len(z), 3))}
        sample["y"] = sum(ENERGY[int(i)] for i in z) + 0.01 * rng.normal()
        yield sample | extra


def dataset(count=20, **kwargs):
    return FramesDataset(Frames.from_samples(molecules(count)), **kwargs)


class PerSample(Dataset):
    """A data set of the plain kind."""

    def __init__(self, frames):
        self.frames_ = frames

    def __len__(self):
        return len(self.frames_)

    def __getitem__(self, index):
        return self.frames_.data(int(index))


def options(tmp_path, **changes):
    return {
        "train_size": None,
        "val_size": 4,
        "test_size": 6,
        "seed": 3,
        "log_dir": str(tmp_path / "log"),
        "batch_size": 4,
        "inference_batch_size": 5,
        "num_workers": 0,
        **changes,
    }


def ready(tmp_path, data=None, **changes):
    module = DataModule(options(tmp_path, **changes), dataset() if data is None else data)
    module.prepare_data()
    module.setup("fit")
    return module


def test_parts_follow_sizes_and_seed(tmp_path):
    module = ready(tmp_path)
    order = np.random.default_rng(3).permutation(20)
    np.testing.assert_array_equal(module.idx_train, order[:10])
    np.testing.assert_array_equal(module.idx_val, order[10:14])
    np.testing.assert_array_equal(module.idx_test, order[14:])
    with np.load(tmp_path / "log" / "splits.npz") as file:  # the folder did not exist before
        np.testing.assert_array_equal(file["idx_val"], order[10:14])
    assert isinstance(module.train_dataset, torch.utils.data.Subset)
    assert len(module.test_dataset) == 6


def test_a_splits_file_overrides_sizes(tmp_path):
    np.savez(tmp_path / "mine.npz", idx_train=[0, 1], idx_val=[2], idx_test=[3, 4, 5])
    module = ready(tmp_path, splits=str(tmp_path / "mine.npz"), train_size=None, val_size=None, test_size=None)
    assert [len(part) for part in (module.idx_train, module.idx_val, module.idx_test)] == [2, 1, 3]


def test_the_split_of_the_data_set_is_used_when_asked_for(tmp_path):
    class Published(FramesDataset):
        splits = {"idx_train": np.arange(12), "idx_val": np.arange(12, 15), "idx_test": np.arange(15, 20)}

    data = Published(Frames.from_samples(molecules()))
    module = ready(tmp_path, data, splits="dataset")
    np.testing.assert_array_equal(module.idx_test, np.arange(15, 20))
    np.testing.assert_array_equal(ready(tmp_path, data).idx_test, np.random.default_rng(3).permutation(20)[14:])
    with pytest.raises(ConfigError, match="publishes no split"):
        ready(tmp_path, splits="dataset")


def test_groups_are_not_torn_apart(tmp_path):
    data = dataset(60)
    data.names = np.repeat(["a", "b", "c", "d", "e", "f"], 10)
    module = ready(tmp_path, data, split_by="names", val_size=10, test_size=20)
    parts = [set(data.names[part]) for part in (module.idx_train, module.idx_val, module.idx_test)]
    assert [len(part) for part in parts] == [3, 1, 2]
    assert len(set.union(*parts)) == 6
    with pytest.raises(ConfigError, match="split_by: the data set has no 'nmaes'"):
        ready(tmp_path, data, split_by="nmaes")


def test_everything_is_built_and_divided_once(tmp_path, monkeypatch):
    import torchmdnet.data.module as home

    calls = []

    class Counted(FramesDataset):
        def __init__(self, root):
            calls.append(root)
            super().__init__(Frames.from_samples(molecules()))

    monkeypatch.setattr(home, "DATASETS", {"Counted": Counted})
    module = DataModule(options(tmp_path, dataset="Counted", dataset_root="here"))
    module.prepare_data()
    module.setup("fit")
    written = (tmp_path / "log" / "splits.npz").stat().st_mtime_ns
    for stage in ("fit", "test"):
        module.prepare_data()
        module.setup(stage)
    assert calls == ["here"]
    assert (tmp_path / "log" / "splits.npz").stat().st_mtime_ns == written


def test_only_the_first_process_prepares_and_writes(tmp_path, monkeypatch):
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    module = DataModule(options(tmp_path, dataset="TinyQM"))
    module.prepare_data()
    assert module.dataset is None
    ready(tmp_path)
    assert not (tmp_path / "log").exists()


def test_missing_options_take_their_defaults():
    module = DataModule({}, dataset(40))
    module.setup()
    assert [len(part) for part in (module.idx_train, module.idx_val, module.idx_test)] == [34, 2, 4]
    assert len(next(iter(module.train_dataloader())).y) == 32
    assert len(module.val_dataloader()) == 1


@pytest.mark.parametrize("kind", [dict, lambda d: Namespace(**d)])
def test_options_are_never_changed(tmp_path, kind, monkeypatch):
    import torchmdnet.data.module as home

    class HDF5(FramesDataset):
        def __init__(self, filename, dataset_preload_limit=1024):
            assert dataset_preload_limit == 7
            super().__init__(Frames.from_samples(molecules()))

    monkeypatch.setattr(home, "DATASETS", {"HDF5": HDF5})
    given = kind(options(tmp_path, dataset="HDF5", dataset_arg={}, dataset_preload_limit=7))
    before = copy.deepcopy(given)
    DataModule(given).setup()
    assert given == before


def test_custom_gets_its_files_by_position(tmp_path, monkeypatch):
    import torchmdnet.data.module as home

    class Custom(FramesDataset):
        def __init__(self, *files):
            assert files == ("c*", "z*", "e*", None, 1024)
            super().__init__(Frames.from_samples(molecules()))

    monkeypatch.setattr(home, "DATASETS", {"Custom": Custom})
    DataModule(options(tmp_path, dataset="Custom", coord_files="c*", embed_files="z*", energy_files="e*")).setup()


def test_wrong_data_set_options_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'TinyQM'"):
        ready_by_name(tmp_path, dataset="TinyQN")
    with pytest.raises(ConfigError, match=r"dataset_arg: ASE has no argument 'energy_kye'\. Did you mean 'energy_key'"):
        ready_by_name(tmp_path, dataset="ASE", dataset_arg={"energy_kye": "E"})
    with pytest.raises(ConfigError, match="should be a mapping"):
        ready_by_name(tmp_path, dataset="ASE", dataset_arg="energy_key")
    with pytest.raises(ConfigError, match="dataset: none is given"):
        ready_by_name(tmp_path)


def ready_by_name(tmp_path, **changes):
    DataModule(options(tmp_path, **changes)).setup()


# ------------------------------------------------------------------------------------------------------ batches


def test_training_is_shuffled_and_evaluation_is_not(tmp_path):
    module = ready(tmp_path)
    train = module.train_dataloader()
    assert [batch.num_graphs for batch in train] == [4, 4, 2]
    first = torch.cat([batch.y for batch in train])
    train.batch_sampler.set_epoch(1)
    second = torch.cat([batch.y for batch in train])
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sort(dim=0).values, second.sort(dim=0).values, rtol=0, atol=0)
    test = torch.cat([batch.y for batch in module.test_dataloader()])
    torch.testing.assert_close(test, torch.cat([module.dataset[int(i)].y for i in module.idx_test]), rtol=0, atol=0)
    assert [batch.num_graphs for batch in module.val_dataloader()[0]] == [4]


def test_loaders_are_kept(tmp_path):
    module = ready(tmp_path)
    assert module.train_dataloader() is module.train_dataloader()
    assert (
        module._get_dataloader(module.train_dataset, "train", store_dataloader=False) is not module.train_dataloader()
    )


@pytest.mark.parametrize(
    ("epoch", "interval", "test_size", "expected"),
    [(0, 1, 6, 1), (1, 1, 6, 2), (2, 2, 6, 2), (3, 2, 6, 1), (4, -1, 6, 1), (4, 0, 6, 1), (4, 2, 0, 1)],
)
def test_the_test_set_joins_validation_when_it_is_due(tmp_path, epoch, interval, test_size, expected):
    module = ready(tmp_path, test_interval=interval, test_size=test_size)
    module.trainer = Namespace(current_epoch=epoch)
    assert len(module.val_dataloader()) == expected


# ------------------------------------------------------------------------------------- energies and scaling


def test_stated_reference_energies_are_used(tmp_path):
    module = ready(tmp_path, dataset(reference_energies={1: -1.0, 6: -2.0, 8: -3.0}))
    assert module.atomref[[1, 6, 8], 0].tolist() == [-1, -2, -3]


@pytest.mark.parametrize("kind", ["frames", "per sample"])
def test_missing_reference_energies_are_fitted_to_the_training_samples(tmp_path, kind):
    frames = Frames.from_samples(molecules(40))
    module = ready(tmp_path, FramesDataset(frames) if kind == "frames" else PerSample(frames))
    counts, elements = frames.composition(module.idx_train)
    y = frames["y"][module.idx_train.numpy(), 0]
    expected = np.linalg.solve(counts.T @ counts, counts.T @ y)
    np.testing.assert_allclose(module.atomref[elements, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(module.prior_source.get_atomref(20)[[1, 6, 8], 0], list(ENERGY.values()), atol=0.02)


@pytest.mark.parametrize("kind", ["per sample", "frames"])
@pytest.mark.parametrize("form", ["no argument", "max_z", "keyword"])
def test_a_data_set_may_state_its_reference_energies_with_and_without_an_argument(tmp_path, kind, form):
    table = torch.arange(20.0)

    class OfFrames(FramesDataset):
        pass

    class Own(PerSample):
        pass

    base = OfFrames if kind == "frames" else Own
    base.get_atomref = {
        "no argument": lambda self: table[:, None],
        "max_z": lambda self, max_z: torch.cat([table, torch.zeros(max_z - 20)])[:, None],
        "keyword": lambda self, *, max_z=100: table.double().numpy(),
    }[form]
    module = ready(tmp_path, base(Frames.from_samples(molecules())))
    assert module.atomref.shape == (100, 1)
    assert module.atomref[[1, 6, 8, 20], 0].tolist() == [1, 6, 8, 0]
    prior = Atomref(dataset=module.dataset)
    assert prior.initial_atomref[[1, 6, 8], 0].tolist() == [1, 6, 8]
    assert LearnableAtomref(dataset=module.dataset).atomref.num_embeddings == (100 if form == "max_z" else 20)


def test_a_table_of_reference_energies_has_one_number_for_each_element(tmp_path):
    data = PerSample(Frames.from_samples(molecules()))
    data.get_atomref = lambda: torch.zeros(20, 6)
    with pytest.raises(DataError, match=r"PerSample.get_atomref\(\) has shape \(20, 6\) instead of \(max_z, 1\)"):
        _ = ready(tmp_path, data).atomref


def test_a_composition_that_leaves_a_choice_has_the_shortest_solution(tmp_path):
    water = [{"z": [8, 1, 1], "pos": np.zeros((3, 3)), "y": 30.0} for _ in range(20)]
    module = ready(tmp_path, FramesDataset(Frames.from_samples(water)))
    np.testing.assert_allclose(module.atomref[[1, 8], 0], [12.0, 6.0], rtol=1e-6)


def test_data_without_energies_have_no_reference(tmp_path):
    forces = [{k: v for k, v in sample.items() if k != "y"} for sample in molecules()]
    assert ready(tmp_path, FramesDataset(Frames.from_samples(forces))).atomref is None


def test_priors_see_the_data_set_with_energies(tmp_path):
    data = dataset()
    data.distance_scale = 2.5
    source = ready(tmp_path, data).prior_source
    assert source.distance_scale == 2.5
    assert not hasattr(source, "energy_scale")
    assert source.get_atomref().shape == (100, 1)


@pytest.mark.parametrize("kind", ["frames", "per sample"])
def test_standardising_gives_mean_and_deviation_of_the_training_labels(tmp_path, kind, caplog):
    frames = Frames.from_samples(molecules(20))
    module = ready(tmp_path, FramesDataset(frames) if kind == "frames" else PerSample(frames), standardize=True)
    y = frames["y"][module.idx_train.numpy(), 0]
    assert module.mean.item() == pytest.approx(y.mean(), rel=1e-12)
    assert module.std.item() == pytest.approx(y.std(ddof=1), rel=1e-12)
    assert "standardize is deprecated" in caplog.text
    assert ready(tmp_path).mean is None


@pytest.mark.parametrize(
    "prior",
    [
        "Atomref",
        ["Atomref"],
        {"Atomref": None},
        [{"ZBL": {"x": 1}}, {"Atomref": {"enable": False}}],
        ["LearnableAtomref"],
    ],
)
def test_standardising_knows_reference_energies_in_every_form(tmp_path, prior):
    data = dataset(19, reference_energies=ENERGY)  # nine training samples in batches of four: the last has one
    module = ready(tmp_path, data, standardize=True, prior_model=prior, inference_batch_size=4)
    assert abs(module.mean.item()) < 0.05
    assert 0 < module.std.item() < 0.05


def test_other_priors_leave_the_mean_alone(tmp_path):
    assert abs(ready(tmp_path, standardize=True, prior_model=["ZBL"]).mean.item()) > 1000


# ------------------------------------------------------------------------------------------------------- checks


def test_an_element_beyond_max_z_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"max_z: 8 is too small, the data hold atomic number 8\. Set it to 9"):
        ready(tmp_path, max_z=8)
    ready(tmp_path, max_z=9)


@pytest.mark.parametrize(("option", "field"), [("charge", "q"), ("spin", "s")])
def test_charges_and_spins_that_are_not_there_are_refused(tmp_path, option, field):
    with pytest.raises(ConfigError, match=f"{option}: true, but the data have no .*'{field}'.*neg_dy, pos, y, z"):
        ready(tmp_path, **{option: True})
    ready(tmp_path, FramesDataset(Frames.from_samples(molecules(**{field: 1}))), **{option: True})


@pytest.mark.parametrize("name", ["y", "neg_dy"])
def test_labels_that_are_not_finite_are_refused_by_sample(tmp_path, name):
    samples = list(molecules())
    samples[7][name] = np.full_like(samples[7][name], np.nan)
    with pytest.raises(DataError, match=f"{name} of sample 7 is not a finite number"):
        ready(tmp_path, FramesDataset(Frames.from_samples(samples)))


@pytest.mark.parametrize("value", [1e30, -1e300])
@pytest.mark.parametrize("name", ["y", "neg_dy"])
def test_labels_that_no_calculation_gives_are_refused_by_sample(tmp_path, name, value):
    samples = list(molecules())
    samples[7][name] = np.full_like(samples[7][name], value)
    with pytest.raises(DataError, match=f"{name} of sample 7 is (larger than any label|not a finite number)"):
        ready(tmp_path, FramesDataset(Frames.from_samples(samples)))


def test_data_without_labels_are_refused(tmp_path):
    samples = [{"z": s["z"], "pos": s["pos"]} for s in molecules()]
    with pytest.raises(DataError, match="neither y nor neg_dy"):
        ready(tmp_path, FramesDataset(Frames.from_samples(samples)))


def test_a_resumed_run_with_another_split_is_warned(tmp_path, caplog):
    ready(tmp_path)
    ready(tmp_path, load_model="x.ckpt")
    assert "divided otherwise" not in caplog.text
    ready(tmp_path, load_model="x.ckpt", seed=4)
    assert "divided otherwise" in caplog.text


def test_a_part_that_was_asked_for_and_is_empty_is_warned_of(tmp_path, caplog):
    ready(tmp_path, log_dir=None, test_size=0.01)
    assert "test_size: 0.01 gives none of" in caplog.text
    caplog.clear()
    ready(tmp_path, log_dir=None, test_size=0)
    assert "gives none" not in caplog.text


# ---------------------------------------------------------------------------------------------------- Lightning


class Plain(pl.LightningModule):
    """Fits a constant, and remembers which samples it saw."""

    def __init__(self, hparams):
        super().__init__()
        self.save_hyperparameters(hparams)
        self.constant = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch.y.reshape(-1).tolist())
        return ((self.constant - batch.y) ** 2).mean()

    def validation_step(self, batch, _, dataloader_idx=0):
        self.seen.append(("val", "test")[dataloader_idx])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)


def trainer(tmp_path, epochs, **kwargs):
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        **kwargs,
    )


def test_a_resumed_run_sees_what_an_uninterrupted_one_does(tmp_path):
    given = options(tmp_path, test_interval=2)
    whole = Plain(given)
    trainer(tmp_path, 4, logger=False, enable_checkpointing=False).fit(whole, DataModule(given, dataset()))
    first, second = Plain(given), Plain(given)
    begin = trainer(tmp_path, 2, logger=False)
    begin.fit(first, DataModule(given, dataset()))
    begin.save_checkpoint(tmp_path / "half.ckpt")
    torch.rand(100)
    trainer(tmp_path, 4, logger=False).fit(second, DataModule(given, dataset()), ckpt_path=tmp_path / "half.ckpt")
    assert first.seen + second.seen == whole.seen
    assert whole.seen.count("test") == 2  # one test epoch, of two batches


def test_options_of_module_and_data_may_differ(tmp_path):
    given = options(tmp_path)
    other = {**given, "load_model": "before.ckpt", "num_epochs": 7}
    run = trainer(tmp_path, 1, logger=pl.loggers.CSVLogger(tmp_path))
    run.fit(Plain(other), DataModule(given, dataset()))
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["datamodule_hyper_parameters"] == given
    assert saved["datamodule_hparams_name"] == "hparams"


def test_samples_of_the_plain_kind_train_with_workers(tmp_path):
    module = ready(tmp_path, PerSample(Frames.from_samples(molecules())), num_workers=1)
    assert module.train_dataloader().num_workers == 1
    assert sum(batch.num_graphs for batch in module.train_dataloader()) == 10


def test_a_sample_may_be_any_data(tmp_path):
    class Bare(Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, index):
            return Data(z=torch.tensor([1, 1]), pos=torch.rand(2, 3), y=torch.rand(1))

    module = ready(tmp_path, Bare())
    assert next(iter(module.train_dataloader())).y.shape == (4,)
    assert module.atomref.shape == (100, 1)


class Mixed(FramesDataset):
    """Nine times water and three other molecules.

    Args:
        energies: Stated energies of the elements, if any.
        last: The atoms of the other molecules.
    """

    energy_unit = "eV"
    length_unit = "Å"

    def __init__(self, energies=None, last=(16, 1, 1)) -> None:
        rng = np.random.default_rng(1)
        kinds = [(8, 1, 1)] * 9 + [last] * 3
        samples = [{"z": np.array(z), "pos": rng.normal(size=(len(z), 3)), "y": -100.0 * sum(z)} for z in kinds]
        super().__init__(Frames.from_samples(samples), reference_energies=energies)


def test_an_element_that_no_training_sample_has_is_refused_where_its_energy_would_be_fitted(tmp_path, caplog):
    np.savez(tmp_path / "s.npz", idx_train=np.arange(8), idx_val=[8, 9], idx_test=[10, 11])
    options = {"splits": str(tmp_path / "s.npz")}
    for wanted in ({"remove_ref_energy": True}, {"prior_model": "Atomref"}, {"prior_model": ["LearnableAtomref"]}):
        with pytest.raises(ConfigError, match=r"S in the validation set \(sample 9 is the first\), but in no training"):
            ready(tmp_path, Mixed(), **options, **wanted)
    with caplog.at_level(logging.WARNING, logger="torchmdnet"):
        module = ready(tmp_path, Mixed(), **options)
    assert "S in the validation set (sample 9 is the first), but in no training sample: the potential is" in caplog.text
    assert (module.elements("train"), module.elements("val")) == ([1, 8], [1, 8, 16])
    stated = {1: -100.0, 8: -800.0, 16: -1600.0}
    assert ready(tmp_path, Mixed(stated), **options, prior_model="Atomref").elements("train") == [1, 8]


def test_elements_in_one_ratio_and_compositions_beyond_it_are_warned_of(tmp_path, caplog):
    np.savez(tmp_path / "s.npz", idx_train=np.arange(8), idx_val=[8, 9], idx_test=[10, 11])
    data = Mixed(last=(8, 8, 1, 1))
    with caplog.at_level(logging.WARNING, logger="torchmdnet"):
        module = ready(tmp_path, data, splits=str(tmp_path / "s.npz"), prior_model="Atomref")
        table = module.prior_source.get_atomref(20).flatten()
    assert "1 compositions in the validation set cannot be made up from those of the training set" in caplog.text
    assert "hold H, O in too few ratios to tell the energy of each" in caplog.text
    assert float(table[8] + 2 * table[1]) == pytest.approx(-1000)
    caplog.clear()
    ready(tmp_path, data, train_size=10, val_size=1, test_size=1, prior_model="Atomref").fitted_energies()
    assert "ratios" not in caplog.text
    assert "compositions" not in caplog.text


def test_a_file_that_divides_other_structures_is_refused(tmp_path):
    first = ready(tmp_path)
    path = str(tmp_path / "log" / "splits.npz")
    assert set(np.load(path).files) == {"idx_train", "idx_val", "idx_test", "data_digest"}
    samples = [first.dataset.frames.sample(number) for number in range(len(first.dataset))]
    samples = [{name: value.numpy() for name, value in sample.items()} for sample in samples]
    relabelled = [{**sample, "y": sample["y"] + 1} for sample in samples]
    ready(tmp_path / "relabelled", FramesDataset(Frames.from_samples(relabelled)), splits=path)
    reordered = FramesDataset(Frames.from_samples(samples[::-1]))
    with pytest.raises(DataError, match=r"splits.npz divides other data: the \d+ systems are others, or stand"):
        ready(tmp_path / "reordered", reordered, splits=path)
    accepted = ready(tmp_path / "reordered", reordered, splits=path, accept_changed_data=True)
    assert torch.equal(accepted.idx_train, first.idx_train)


class Restless(FramesDataset):
    """Samples that are other ones each time."""

    def batch(self, indices):
        batch = super().batch(indices)
        batch.pos = batch.pos + torch.rand_like(batch.pos)
        return batch


def test_fields_that_change_from_one_reading_to_the_next_are_not_compared(tmp_path):
    fields = digest_by_field(Restless(Frames.from_samples(molecules())))["fields"]
    assert "pos" not in fields
    assert {"z", "y", "sizes"} <= set(fields)
