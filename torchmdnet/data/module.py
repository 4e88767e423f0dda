"""The data of a training run: which set, which part of it, in which batches."""

from __future__ import annotations

import copy
import errno
import inspect
import logging
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from torchmdnet.config.values import with_truths
from torchmdnet.data.arguments import check_arguments
from torchmdnet.data.digest import differences, digest_by_field
from torchmdnet.data.groups import GROUPINGS, groups_of, steps_between
from torchmdnet.data.labels import check_targets, complete_targets, targets_of
from torchmdnet.data.loader import EpochBatchSampler, IndexedSubset, Loader, collect
from torchmdnet.data.splits import digest_in, load_splits, make_splits, save_splits
from torchmdnet.datasets import DATASETS
from torchmdnet.datasets.ase import ASE
from torchmdnet.datasets.base import FramesDataset, atomref_table
from torchmdnet.datasets.custom import Custom
from torchmdnet.datasets.files import progress
from torchmdnet.datasets.hdf5 import HDF5
from torchmdnet.datasets.labels import ARTICLES, LARGEST_LABEL, Absence, LabelKind, too_large
from torchmdnet.datasets.reference_energies import fit_energies
from torchmdnet.elements import symbols
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.options import OPTIONS, defaults_of
from torchmdnet.priors.base import stated_energies
from torchmdnet.units import energy_factor

__all__ = ["DataModule", "PriorSource", "count_atoms"]

logger = logging.getLogger(__name__)

#: Samples of a part whose atoms are counted at most, where each has to be made by a call.
MAX_COUNTED = 20_000

#: Samples whose charges and compositions are compared at most.
MAX_LOOKED_AT = 100_000

#: More than there are elements, or types of beads.
MAX_TYPES = 256

_WORDS = {"train": "training", "val": "validation", "test": "test"}


class DataModule(LightningDataModule):
    """Builds a data set, divides it, and serves batches of its parts.

    Args:
        hparams: Options by name, a mapping or a Namespace, see :data:`torchmdnet.options.OPTIONS`; never changed.
        dataset: A data set to use instead of building one.

    Attributes:
        dataset: The whole set, after :meth:`setup`.
        idx_train: Numbers of the training samples, int64; ``idx_val`` and ``idx_test`` likewise.
        train_dataset: The training samples; ``val_dataset`` and ``test_dataset`` likewise.
    """

    idx_train: Tensor
    idx_val: Tensor
    idx_test: Tensor
    train_dataset: IndexedSubset
    val_dataset: IndexedSubset
    test_dataset: IndexedSubset

    def __init__(self, hparams: Mapping[str, Any] | Namespace, dataset: Any = None) -> None:
        super().__init__()
        options = vars(hparams) if isinstance(hparams, Namespace) else dict(hparams)
        hparams = copy.deepcopy(options)  # what is saved must not change when the caller's options do
        # the module saves the same options; logging them here too would make Lightning compare the two and give up
        self.save_hyperparameters(hparams, logger=False)
        self.options: dict[str, Any] = {**defaults_of("data"), **copy.deepcopy(options)}
        self.dataset = dataset
        #: What is learnt beside energies and forces, and of which every sample is known to have the label.
        self.targets = targets_of(self.options)
        self.complete: frozenset[str] = frozenset()
        self._is_set_up = False
        #: Whether the data are looked over elsewhere, so that setup need not warn of units, signs and charges.
        self.is_examined = False
        self._mean: Tensor | None = None
        self._std: Tensor | None = None
        self._energies: dict[int, float] | None = None
        self._elements: dict[str, list[int]] = {}
        self._digest: dict[str, Any] | None = None
        self._loaders: dict[str, Loader] = {}

    # ------------------------------------------------------------------------------------------------ building

    def prepare_data(self) -> None:
        """Download and convert what the data set needs, in the first process of each machine."""
        if self.dataset is None and int(os.environ.get("LOCAL_RANK", "0")) == 0:
            self.dataset = self._build()

    def setup(self, stage: str | None = None) -> None:
        """Build the data set and divide it, once; later calls do nothing.

        Raises:
            ConfigError: If options do not fit each other or the data.
            DataError: If the data cannot be used.
        """
        if self._is_set_up:
            return
        self.open()
        self._check_dataset()
        self._divide()
        self._check_labels()
        if not self.is_examined:
            self._look_at_the_unit()
            self._look_at_the_data()
            self._look_at_charges()
        self._check_compositions()
        if self.options["standardize"]:
            self._standardize()
        self._is_set_up = True

    def open(self) -> Any:
        """The data set, built if need be; :meth:`setup` divides it."""
        if self.dataset is None:
            self.dataset = self._build()
        return self.dataset

    def digest(self) -> dict[str, Any]:
        """What tells these data from others, see :func:`torchmdnet.data.digest.digest_by_field`; read once."""
        if self._digest is None:
            self._digest = digest_by_field(self.open())
        return self._digest

    def _build(self) -> Any:
        kind, positional, keywords = self.source()
        try:
            return kind(*positional, **keywords)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise DataError(
                f"{kind.__name__}: no access to {error.filename} ({error.strerror}). Choose another folder or file "
                "with dataset_root, or have its owner allow it."
            ) from error

    def source(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """The class of the data set that the options ask for, and its arguments.

        Raises:
            ConfigError: If there is no such class, or it does not take these arguments.
        """
        options = self.options
        name = options["dataset"]
        if name is None:
            raise ConfigError(f"dataset: none is given. Choose from {', '.join(DATASETS)}.")
        kind = DATASETS[name]
        arguments = options["dataset_arg"] or {}
        if not isinstance(arguments, Mapping):
            raise ConfigError(f"dataset_arg: {arguments!r} should be a mapping of arguments to values.")
        keywords = dict(arguments)
        if name == "Custom":
            files = ("coord_files", "embed_files", "energy_files", "force_files", "dataset_preload_limit")
            positional = [options[key] for key in files]
        else:
            positional = [options["dataset_root"]]
            if name == "ASE" and "files" in keywords:
                if options["dataset_root"] != OPTIONS["dataset_root"].default:
                    raise ConfigError(
                        f"dataset_root: {options['dataset_root']!r} stands beside files in dataset_arg. List all there."
                    )
                positional = []
            if name == "HDF5":
                keywords.setdefault("dataset_preload_limit", options["dataset_preload_limit"])
        labels = {t.label: t.shape for t in self.targets.values() if t.head is not None}
        if labels and "labels" not in keywords and "labels" in _parameters(kind):
            keywords["labels"] = labels
        by = options["split_by"]
        named = by is not None and by not in GROUPINGS and by not in (keywords.get("extra_keys") or ())
        if named and "group_key" in _parameters(kind):
            keywords.setdefault("group_key", by)
        check_arguments(name, kind, positional, keywords)
        _check_root(name, kind, positional)
        return kind, positional, with_truths(kind, keywords)

    def _divide(self) -> None:
        options, total = self.options, len(self.dataset)
        splits = options["splits"]
        stated = self.dataset.splits if getattr(self.dataset, "is_divided", False) else None
        if splits is None and stated is not None:
            splits = "dataset"
            if _is_first_process():
                logger.info(
                    "The data state which samples train, validate and test, and are divided so; splits: random divides "
                    "all of them at random instead."
                )
        elif splits == "random":
            splits = None
        if splits == "dataset":
            splits = getattr(self.dataset, "splits", None)
            if splits is None:
                raise ConfigError(
                    f"splits: 'dataset' is asked for, but {type(self.dataset).__name__} publishes no split. "
                    "Give sizes, or an .npz file with idx_train, idx_val and idx_test."
                )
        elif splits is not None and not isinstance(splits, Mapping):
            self._check_splits_file(splits)
        path = None if options["log_dir"] is None else Path(options["log_dir"]) / "splits.npz"
        sizes = [options[f"{part}_size"] for part in ("train", "val", "test")]
        by = options["split_by"]
        groups = None if by is None else groups_of(self.dataset, by)
        gap = int(options["split_gap"]) if by == "time" else None
        parts = make_splits(total, sizes[0], sizes[1], sizes[2], options["seed"], splits=splits, groups=groups, gap=gap)
        if stated is not None and options["splits"] not in (None, "dataset", "random"):
            _check_against_stated(parts, stated, options["splits"])
        if path is not None and _is_first_process():
            self._compare_with_earlier(path, parts, total)
            self.write_splits(path, parts)
        self.idx_train, self.idx_val, self.idx_test = parts
        self.train_dataset, self.val_dataset, self.test_dataset = (IndexedSubset(self.dataset, p) for p in parts)
        if _is_first_process():
            numbers = [f"{name} {len(part)}" for name, part in zip(("train", "val", "test"), parts, strict=True)]
            if groups is not None:
                numbers = [f"{n} ({len(np.unique(groups[p]))})" for n, p in zip(numbers, parts, strict=True)]
            logger.info("%s%s", ", ".join(numbers), f", in brackets groups by {by}" if by else "")
            for name, size, part in zip(("train", "val", "test"), sizes, parts, strict=True):
                if size and len(part) == 0 and splits is None and stated is None:
                    kept = "" if groups is None else f"; split_by={by} keeps together {len(np.unique(groups))} groups"
                    logger.warning("%s_size: %s gives none of %d samples%s.", name, size, total, kept)
            if splits is None and by is None and stated is None:
                self._look_for_a_trajectory(parts)

    def write_splits(self, path: Path, parts: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        """Write which samples train, validate and test, with the digest of the data."""
        parts = (self.idx_train, self.idx_val, self.idx_test) if parts is None else parts
        save_splits(path, parts[0].numpy(), parts[1].numpy(), parts[2].numpy(), self.digest())

    def _check_splits_file(self, path: Any) -> None:
        """Refuse the division of other structures: labels may be new ones, as of another level of theory."""
        before = digest_in(path)
        if before is None or self.options["accept_changed_data"]:
            return
        changed = differences(before, self.digest(), structures_only=True)
        if changed:
            raise DataError(
                f"splits: {path} divides other data: {changed}, so its test samples may be training samples now. "
                "Restore the data, or leave splits out for another division; --accept-changed-data uses the file all "
                "the same."
            )

    def _look_for_a_trajectory(self, parts: tuple[Tensor, Tensor, Tensor]) -> None:
        """Warn if a random division puts neighbours of test samples into training."""
        frames = getattr(self.dataset, "frames", None)
        steps = None if frames is None or not (len(parts[1]) or len(parts[2])) else steps_between(frames)
        unit = getattr(self.dataset, "length_unit", None) or "length units"
        if steps is not None and steps[0] < 0.5 * steps[1]:
            logger.warning(
                "The samples look like a trajectory: from one to the next atoms move by %.2g %s, between samples "
                "far apart by %.2g %s. A random division trains on the neighbours of test samples, so errors come "
                "out too low. Consider split_by: time.",
                steps[0], unit, steps[1], unit,
            )  # fmt: skip

    def _compare_with_earlier(self, path: Path, parts: tuple[Tensor, Tensor, Tensor], total: int) -> None:
        if not (self.options["load_model"] and path.exists()):
            return
        try:
            earlier = load_splits(path, total)
            same = all(
                np.array_equal(np.sort(part), np.sort(earlier[f"idx_{name}"]))
                for name, part in zip(("train", "val", "test"), parts, strict=True)
            )
        except (ConfigError, DataError):
            same = False
        if not same:
            logger.warning(
                "The data are divided otherwise than in %s: samples that were trained on may now be tested on. "
                "Keep the seed, the sizes and the data of the earlier run, or pass its file as splits.",
                path,
            )

    # ------------------------------------------------------------------------------------------------ checking

    def _check_dataset(self) -> None:
        if not len(self.dataset):
            raise DataError(f"{type(self.dataset).__name__}: the data set is empty.")
        options = self.options
        fields = self._fields()
        for option, field, what in (("charge", "q", "total charge"), ("spin", "s", "spin")):
            if options[option] and field not in fields:
                raise ConfigError(
                    f"{option}: true, but the data have no {what} ({field!r}), only {', '.join(sorted(fields))}. "
                    f"Set {option}: false, or name the key it is stored under."
                )
        max_z = options.get("max_z")  # of the model; where it is not given, the data decide
        largest = self._largest_z()
        if max_z is not None and largest is not None and largest >= max_z:
            raise ConfigError(
                f"max_z: {max_z} is too small, the data hold atomic number {largest}. Set it to {largest + 1} or more."
            )

    def _check_labels(self) -> None:
        check_targets(self.dataset, self.targets)
        self.complete = complete_targets(self.dataset, self.targets)
        frames = getattr(self.dataset, "frames", None)
        fields = self._fields()
        self._check_weights(fields)
        if "y" not in fields and "neg_dy" not in fields and not self.targets:
            raise DataError(f"The samples have neither y nor neg_dy to learn, only {', '.join(sorted(fields))}.")
        if frames is None or not getattr(frames, "in_memory", False):
            return  # large sets are checked when they are made
        for name in ("pos", "y", "neg_dy"):
            if name in frames and not (fine := np.abs(frames[name]) <= LARGEST_LABEL).all():
                row = int(np.argwhere(~fine)[0][0])
                system = row if name == "y" else int(np.searchsorted(np.cumsum(frames.counts), row, side="right"))
                value = float(np.asarray(frames[name])[tuple(np.argwhere(~fine)[0])])
                told = too_large(value) if np.isfinite(value) else "Leave the sample out, or repair it."
                kind = "larger than any label can be" if np.isfinite(value) else "not a finite number"
                raise DataError(f"{name} of sample {system} is {kind}. {told}")

    def _check_weights(self, fields: set[str]) -> None:
        """Refuse a weight whose label no sample has; warn where the weight is a default and the data do without."""
        for kind, (field, option) in self.asked_labels().items():
            if field in fields:
                continue
            weight = self.options[option]
            if isinstance(self.dataset, FramesDataset):
                absence = self.dataset.absent_label(kind)
            else:
                absence = Absence(f"the samples hold no {field}, only {', '.join(sorted(fields))}.", False)
            if absence is None:
                continue
            text = f"{option}={weight:g} asks for {ARTICLES[kind]}, but {absence.reason}"
            if absence.is_mistake or weight != OPTIONS[option].default:
                without = "derivative: false to train on energies alone" if kind == "forces" and "y" in fields else ""
                without = without or f"{option}: 0 to train without"
                raise DataError(f"{text} Set {without}.")
            if _is_first_process():
                logger.warning("%s The weight has no effect.", text)
        weight = self.options.get("neg_dy_weight") or 0.0  # other weights than the default are warned of beforehand
        is_silent = weight == OPTIONS["neg_dy_weight"].default and not self.options.get("derivative")
        if is_silent and {"y", "neg_dy"} <= fields and _is_first_process():
            logger.warning(
                "neg_dy_weight: %g has no effect without derivative: true, so the forces in the data are not trained. "
                "Set derivative: true to train on them, or neg_dy_weight: 0.",
                weight,
            )

    def asked_labels(self) -> dict[LabelKind, tuple[str, str]]:
        """The energies and forces that training asks for: the field of a sample and the option with the weight."""
        options = self.options
        asked: dict[LabelKind, tuple[str, str]] = {"energy": ("y", "y_weight")}
        if options.get("derivative"):
            asked["forces"] = ("neg_dy", "neg_dy_weight")
        return {kind: names for kind, names in asked.items() if (options.get(names[1]) or 0.0) > 0}

    def _look_at_the_unit(self) -> None:
        """Warn if energies without a stated unit are total energies in another unit than the data set takes."""
        dataset = self.dataset
        if not (isinstance(dataset, FramesDataset) and "y" in dataset.frames.fields and _is_first_process()):
            return
        if dataset.unit_advice("eV") is None or not len(self.idx_train):
            return
        from torchmdnet.data.doctor.units import unit_of_totals

        rows = self.idx_train[:: -(-len(self.idx_train) // 300)]
        batch = dataset.frames.gather(rows)
        z, number = batch["z"].numpy(), len(rows)
        elements, column = np.unique(z, return_inverse=True)
        counts = np.bincount(batch["batch"].numpy() * len(elements) + column, minlength=number * len(elements))
        energies = batch["y"].double().numpy().reshape(number, -1)[:, 0]
        fine = np.isfinite(energies)
        ratio, unit = unit_of_totals(counts.reshape(number, -1)[fine], elements, energies[fine])
        if unit not in (None, dataset.energy_unit or "eV"):
            logger.warning(
                "Energies look like %s%s: they are %.3f times those of the free atoms in %s. No unit is stated. %s",
                unit, f", but are taken as {dataset.energy_unit}" if dataset.energy_unit else "",
                ratio / energy_factor("Hartree", unit), unit, dataset.unit_advice(unit),
            )  # fmt: skip

    def _look_at_charges(self) -> None:
        """Tell of total charges and spins that differ between samples and that the model is not given."""
        frames = getattr(self.dataset, "frames", None)
        if frames is None or not len(self.idx_train) or not _is_first_process():
            return
        rows, kinds = self.idx_train.numpy()[:: -(-len(self.idx_train) // MAX_LOOKED_AT)], None
        for option, field, what in (("charge", "q", "total charge"), ("spin", "s", "number of unpaired electrons")):
            if self.options[option] or field not in frames or field in frames.atom_fields:
                continue
            values = np.asarray(frames[field], dtype=np.float64).reshape(len(frames), -1)[rows, 0]
            if not np.isfinite(values).any() or np.nanmin(values) == np.nanmax(values):
                continue
            if kinds is None:
                kinds = np.unique(frames.composition()[0][rows], axis=0, return_inverse=True)[1].reshape(-1)
            pairs = np.unique(np.stack([kinds, np.nan_to_num(values)], axis=1), axis=0)[:, 0]
            several = int((np.bincount(pairs.astype(np.int64)) > 1).sum())
            low, high = np.nanmin(values), np.nanmax(values)
            told = f"the data hold a {what} of {low:g} to {high:g}, which the model is not given"
            if several:
                logger.warning(
                    "%s: %s, although %d composition%s with several. Set %s: true.",
                    option, told, several, " occurs" if several == 1 else "s occur", option,
                )  # fmt: skip
            else:
                logger.info("%s: %s. Set %s: true to give it.", option, told, option)

    def _look_at_the_data(self) -> None:
        """Warn of signs and units in files of the user's own that would be learnt as they are."""
        if not (isinstance(self.dataset, (ASE, HDF5, Custom)) and len(self.idx_train) and _is_first_process()):
            return
        from torchmdnet.data.doctor.first_look import first_look

        learnt: set[LabelKind] = {*self.asked_labels()}
        if "stress" in self.targets:
            learnt.add("stress")
        root = self.options["dataset_root"]
        is_file = (
            isinstance(root, str)
            and not isinstance(self.dataset, Custom)
            and "files" not in (self.options["dataset_arg"] or {})
        )
        command = f"torchmd-net data {root}" if is_file else "torchmd-net data --conf FILE"
        for finding in first_look(self.dataset, self.idx_train.numpy(), frozenset(learnt)):
            logger.warning("The data, %s: %s %s See %s.", finding.check, finding.text, finding.advice, command)

    def elements(self, part: str) -> list[int]:
        """Atomic numbers in the training (``train``), validation (``val``) or test samples (``test``)."""
        return self._elements[part]

    def _check_compositions(self) -> None:
        """See that what is validated and tested on can be predicted from what is trained on.

        Raises:
            ConfigError: If an element lies outside the training samples and its reference energy would be fitted.
        """
        kinds = self._kinds_of_composition()
        self._elements = {part: np.flatnonzero(counts.any(axis=0)).tolist() for part, (counts, _) in kinds.items()}
        fits = self._fits_energies()
        train = kinds["train"][0].astype(np.float64)
        for part in ("val", "test"):
            new = [z for z in self._elements[part] if z not in self._elements["train"]]
            counts, first = kinds[part]
            if new:
                samples = first[counts[:, new].any(axis=1)]
                where = f"{symbols(new)} in the {_WORDS[part]} set (sample {int(samples.min())} is the first)"
                if fits and not set(new) <= set(getattr(self.dataset, "reference_energies", None) or ()):
                    raise ConfigError(
                        f"{where}, but in no training sample: there is no energy to fit a reference to, and errors of "
                        "millions of meV/atom would follow. Move such samples to the training set (splits), leave "
                        "them out, or state the energies of the elements (for dataset: ASE, dataset_arg: {atomref: "
                        "{symbol: energy}})."
                    )
                if _is_first_process():
                    logger.warning("%s, but in no training sample: the potential is not trained on them.", where)
            elif fits and len(train) and len(counts) and _is_first_process():
                rest = counts - counts @ np.linalg.pinv(train) @ train  # what no training composition adds up to
                outside = int((np.abs(rest).max(axis=1) > 1e-6 * counts.sum(axis=1)).sum())
                if outside:
                    logger.warning(
                        "%d compositions in the %s set cannot be made up from those of the training set, so the fitted "
                        "reference energies say little about them; expect large errors of their energies.",
                        outside, _WORDS[part],
                    )  # fmt: skip

    def _fits_energies(self) -> bool:
        """Whether the model gets reference energies that the data do not state."""
        wanted = self.options["remove_ref_energy"] or _has_atomref(self.options["prior_model"])
        return bool(wanted) and "y" in self._fields() and not self.states_energies

    def _kinds_of_composition(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The different compositions of each part, (K, Z), and the first sample of each, (K,)."""
        parts = {"train": self.idx_train.numpy(), "val": self.idx_val.numpy(), "test": self.idx_test.numpy()}
        frames = getattr(self.dataset, "frames", None)
        every: tuple[np.ndarray, np.ndarray] | None = frames.composition() if frames is not None else None
        found = {}
        for part, rows in parts.items():
            if every is not None:
                counts, elements = every[0][rows], every[1]
            else:
                rows = rows[:: max(1, len(rows) // MAX_COUNTED)]  # samples that have to be made one by one
                batches = (collect(self.dataset, rows[i : i + 500]) for i in range(0, len(rows), 500))
                elements = np.arange(MAX_TYPES)
                counts = np.concatenate([np.zeros((0, MAX_TYPES), dtype=np.int64), *map(count_atoms, batches)])
            kinds, first = np.unique(counts, axis=0, return_index=True)
            table = np.zeros((len(kinds), MAX_TYPES), dtype=np.int64)
            table[:, elements] = kinds
            found[part] = (table, rows[first])
        return found

    def _fields(self) -> set[str]:
        frames = getattr(self.dataset, "frames", None)
        return set(frames.fields) if frames is not None else set(self.dataset[0].keys())

    def _largest_z(self) -> int | None:
        frames = getattr(self.dataset, "frames", None)
        if frames is not None:
            return int(frames.elements().max())
        stored = getattr(self.dataset, "_data", None)  # torch_geometric's in-memory sets
        z = getattr(stored, "z", None)
        return int(z.max()) if isinstance(z, Tensor) and z.numel() else None

    # ---------------------------------------------------------------------------------------------- batches

    def train_dataloader(self) -> Loader:
        """Shuffled batches of training samples."""
        return self._get_dataloader(self.train_dataset, "train")

    def val_dataloader(self) -> list[Loader]:
        """Batches of validation samples, and of test samples in the epochs where they are due."""
        loaders = [self._get_dataloader(self.val_dataset, "val")]
        interval = self.options["test_interval"]
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        if len(self.test_dataset) and interval > 0 and epoch > 0 and epoch % interval == 0:
            loaders.append(self._get_dataloader(self.test_dataset, "test"))
        return loaders

    def test_dataloader(self) -> Loader:
        """Batches of test samples."""
        return self._get_dataloader(self.test_dataset, "test")

    def _get_dataloader(self, dataset: Any, stage: str, store_dataloader: bool = True) -> Loader:
        if store_dataloader and stage in self._loaders:
            return self._loaders[stage]
        options = self.options
        is_train = stage == "train"
        size = options["batch_size"] if is_train else options["inference_batch_size"] or options["batch_size"]
        block = options["shuffle_block"]
        neighbours = np.argsort(dataset.rows) if block and isinstance(dataset, IndexedSubset) else None
        sampler = EpochBatchSampler(
            len(dataset), size, shuffle=is_train, seed=options["seed"], block=block, neighbours=neighbours
        )
        loader = Loader(dataset, sampler, options["num_workers"])
        if store_dataloader:
            self._loaders[stage] = loader
        return loader

    # ------------------------------------------------------------------------------- reference energies, scaling

    @property
    def atomref(self) -> Tensor | None:
        """Energy of each element, (max_z, 1): the data set's own, else fitted to the training samples."""
        return PriorSource(self).get_atomref()

    @property
    def prior_source(self) -> PriorSource:
        """The data set as priors should see it: with reference energies, fitted to training samples if need be."""
        return PriorSource(self)

    @property
    def mean(self) -> Tensor | None:
        """Mean of the training labels, when standardising."""
        return self._mean

    @property
    def std(self) -> Tensor | None:
        """Standard deviation of the training labels, when standardising."""
        return self._std

    def fitted_energies(self) -> dict[int, float] | None:
        """Least-squares energy of each element over the training samples; None without energies."""
        if self._energies is None and "y" in self._fields():
            if isinstance(self.dataset, FramesDataset):
                self._energies = self.dataset.fit_reference_energies(self.idx_train)
            else:
                counts, y = [], []
                for batch in self._batches("Fitting reference energies"):
                    counts.append(count_atoms(batch))
                    y.append(batch.y.reshape(int(batch.num_graphs), -1)[:, 0].double().numpy())
                elements = np.arange(MAX_TYPES)
                self._energies = fit_energies(np.concatenate(counts), elements, np.concatenate(y))
            if _is_first_process():
                self._warn_of_ratios()
        return self._energies

    def _warn_of_ratios(self) -> None:
        """Say where the training samples do not tell the energies of elements apart."""
        elements = self._elements["train"]
        kinds = self._kinds_of_composition()["train"][0][:, elements]
        if np.linalg.matrix_rank(kinds.astype(np.float64)) < len(elements):
            logger.warning(
                "Reference energies: the training samples hold %s in too few ratios to tell the energy of each. "
                "Energies are right for compositions made up of those in the training set, not for others.",
                symbols(elements),
            )

    @property
    def states_energies(self) -> bool:
        """Whether the data set states the energy of every element."""
        return self._stated_energies(1) is not None

    def _stated_energies(self, rows: int) -> Tensor | None:
        """Energy of each element as the data set states it, (rows, 1)."""
        dataset = self.dataset
        is_partly_stated = isinstance(dataset, FramesDataset) and not dataset.states_reference_energies
        if is_partly_stated and (dataset.reference_energies or type(dataset).get_atomref is FramesDataset.get_atomref):
            return None  # fitted, those that are stated included
        return stated_energies(dataset, rows) if hasattr(dataset, "get_atomref") else None

    def _batches(self, description: str) -> Iterator[Any]:
        size = self.options["inference_batch_size"] or self.options["batch_size"]
        sampler = EpochBatchSampler(len(self.train_dataset), size, rank=0, world_size=1)
        batches = (self.train_dataset.batch(rows) for rows in sampler)
        yield from progress(batches, description, total=len(sampler), unit="batch")

    def _standardize(self) -> None:
        if _is_first_process():
            logger.warning(
                "standardize is deprecated. Reference energies, prior_model: Atomref or remove_ref_energy, "
                "serve the same purpose better."
            )
        if "y" not in self._fields():
            logger.warning("standardize: the data have no y, so there is nothing to standardise.")
            return
        atomref = self.atomref if _has_atomref(self.options["prior_model"]) else None
        values = []
        for batch in self._batches("Mean and standard deviation of labels"):
            y = batch.y.reshape(int(batch.num_graphs), -1).double()
            if atomref is not None:
                energies = atomref.reshape(-1)[batch.z].double()
                y = y - y.new_zeros(len(y)).index_add_(0, batch.batch, energies)[:, None]
            values.append(y)
        y = torch.cat(values).squeeze(1)
        if len(y) < 2:
            raise ConfigError("standardize: one training sample has no standard deviation.")
        self._mean, self._std = y.mean(dim=0), y.std(dim=0)


class PriorSource:
    """A data set whose reference energies are always known, if it has energies; the rest is the data set's.

    Args:
        module: The data module, after ``setup``.
    """

    def __init__(self, module: DataModule) -> None:
        self._module = module

    def get_atomref(self, max_z: int = 100) -> Tensor | None:
        """Energy of each element, (max_z, 1) float32; more rows where the data hold heavier elements."""
        module = self._module
        largest = module._largest_z()
        rows = max(max_z, 0 if largest is None else largest + 1)
        stated = module._stated_energies(rows)
        if stated is not None:
            return stated
        energies = module.fitted_energies()
        return None if energies is None else atomref_table(energies, rows)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._module.dataset, name)


def count_atoms(batch: Any) -> np.ndarray:
    """Atoms of each element, or type, in each system of a batch, (S, 256)."""
    size = int(batch.num_graphs)
    table = torch.bincount(batch.batch * MAX_TYPES + batch.z, minlength=size * MAX_TYPES)
    return table.reshape(size, MAX_TYPES).numpy()


def _check_against_stated(parts: Sequence[Tensor], stated: Mapping[str, np.ndarray], name: Any) -> None:
    """Refuse a division that trains on what the data name for validation or testing.

    Raises:
        ConfigError: With the number of such samples.
    """
    for part in ("val", "test"):
        mixed = np.intersect1d(parts[0].numpy(), stated.get(f"idx_{part}", []))
        if len(mixed):
            raise ConfigError(
                f"splits: {name} trains on {len(mixed)} samples that the data name for {part} (sample {int(mixed[0])} "
                "is the first). Leave splits out to divide as the data say, or set splits: random for a division of "
                "all of them."
            )


def _is_first_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _has_atomref(prior_model: Any) -> bool:
    """Whether reference energies are among the priors, in any of the forms a configuration may have."""
    if prior_model is None:
        return False
    if isinstance(prior_model, str):
        return prior_model.rpartition(":")[2] in ("Atomref", "LearnableAtomref")
    return any(_has_atomref(entry) for entry in prior_model)  # a list, or the names in a mapping


def _parameters(kind: Any) -> Mapping[str, inspect.Parameter]:
    """Arguments of a class, as far as Python knows them."""
    try:
        return inspect.signature(kind).parameters
    except (TypeError, ValueError):
        return {}


def _check_root(name: str, kind: Any, positional: Sequence[Any]) -> None:
    """Say that files were not named where the default stands for them and is none."""
    is_ours = getattr(kind, "__module__", "").startswith("torchmdnet.") and name in ("ASE", "HDF5")
    if (
        not is_ours
        or positional != [OPTIONS["dataset_root"].default]
        or os.path.isfile(os.path.expanduser(positional[0]))
    ):
        return
    also = ", or list them in dataset_arg: {files: [...]}" if name == "ASE" else ""
    raise ConfigError(
        f"dataset_root is not set, and its default, {positional[0]}, is no file. Name the files of dataset {name}, "
        f"e.g. dataset_root: data/*.{'h5' if name == 'HDF5' else 'extxyz'}{also}."
    )
