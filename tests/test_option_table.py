"""The option table."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import get_args

import pytest

import torchmdnet
from torchmdnet.config import OPTIONS, get_argparse
from torchmdnet.config.values import coerce
from torchmdnet.errors import ConfigError
from torchmdnet.heads import HEADS
from torchmdnet.options import (
    RENAMED,
    RETIRED,
    SYNONYMS,
    TYPES,
    Reader,
    defaults_of,
    has_fixed_default,
    keys_read_by,
    value_of,
)

# Key and default of every option of release 3.1, written down from its documentation; log_dir is the one that changed.
RELEASE_3 = {
    "load_model": None, "conf": None, "num_epochs": 300, "batch_size": 32, "inference_batch_size": None, "seed": 1,
    "num_workers": 4, "ngpus": -1, "num_nodes": 1, "precision": 32, "redirect": False, "load_weights": None,
    "reset_trainer": False, "lr": 1e-4, "lr_patience": 10, "lr_metric": "val", "lr_min": 1e-6, "lr_factor": 0.8,
    "lr_warmup_steps": 0, "weight_decay": 0.0, "gradient_clipping": 0.0, "early_stopping_patience": 30,
    "early_stopping_monitor": "val_total_mse_loss", "checkpoint_monitor": "val_total_mse_loss", "ema_alpha_y": 1.0,
    "ema_alpha_neg_dy": 1.0, "y_weight": 1.0, "neg_dy_weight": 1.0, "train_loss": "mse_loss", "train_loss_arg": None,
    "splits": None, "train_size": None, "val_size": 0.05, "test_size": 0.1, "test_interval": -1, "save_interval": 10,
    "dataset": None, "dataset_root": "~/data", "dataset_arg": None, "coord_files": None, "embed_files": None,
    "energy_files": None, "force_files": None, "dataset_preload_limit": 1024, "remove_ref_energy": False,
    "standardize": False, "model": "graph-network", "output_model": "Scalar", "output_mlp_num_layers": 0,
    "prior_model": None, "charge": False, "spin": False, "embedding_dimension": 256, "num_layers": 6, "num_rbf": 64,
    "activation": "silu", "rbf_type": "expnorm", "trainable_rbf": False, "neighbor_embedding": False, "aggr": "add",
    "distance_influence": "both", "attn_activation": "silu", "num_heads": 8, "vector_cutoff": False,
    "equivariance_invariance_group": "O(3)", "box_vecs": None, "static_shapes": False, "derivative": False,
    "cutoff_lower": 0.0, "cutoff_upper": 5.0, "atom_filter": -1, "max_z": 100, "max_num_neighbors": 32,
    "reduce_op": "add", "wandb_use": False, "wandb_name": "training", "wandb_project": "training_",
    "wandb_resume_from_id": None, "tensorboard_use": False,
}  # fmt: skip

NEW = {"overwrite", "report", "prior_args", "q_dim", "q_weights", "coulomb_cutoff", "coulomb_max_num_neighbors",
       "coulomb_neighbor_strategy", "coulomb_epsilon_solvent", "repulsion", "properties", "stress_weight",
       "radial", "compile", "split_by", "split_gap", "shuffle_block", "y_loss_per_atom",
       "keep_checkpoints", "system_embedding", "accept_changed_data", "max_time", "lr_schedule", "lr_decay_fraction",
       "weight_decay_on", "model_ema_decay"}  # fmt: skip


def test_every_option_of_release_3_is_there_with_its_default():
    assert len(RELEASE_3) == 79  # 80 with log_dir
    assert {key: OPTIONS[key].default for key in RELEASE_3} == RELEASE_3
    assert all(type(OPTIONS[key].default) is type(default) for key, default in RELEASE_3.items())
    assert {key for key, option in OPTIONS.items() if option.established} == {*RELEASE_3, "log_dir"}


def test_options_that_release_3_does_not_have_are_marked():
    assert {key for key, option in OPTIONS.items() if not option.established} == NEW


def test_the_table_says_what_reads_an_option():
    words = set(get_args(Reader))
    assert all(set(option.read_by.split()) <= words for option in OPTIONS.values())
    assert {"model", "output_model", "coulomb_epsilon_solvent", "charge", "radial"} <= keys_read_by("model")
    assert "embedding_dimension" not in keys_read_by("model"), "architectures read it, under the name they give it"
    assert defaults_of("training", established=True).keys() < keys_read_by("training")
    assert defaults_of("data")["num_workers"] == OPTIONS["num_workers"].default


def test_what_a_missing_option_means():
    assert value_of({}, "q_dim") == value_of({"q_dim": None}, "q_dim") == 0
    assert value_of({"train_size": None}, "train_size") is None
    assert value_of({"val_size": None}, "val_size") is None
    assert value_of({}, "val_size") == 0.05
    value_of({}, "q_weights").append(1.0)
    assert value_of({}, "q_weights") == []
    assert all(has_fixed_default(key) for key in NEW)
    assert {key for key in RELEASE_3 if has_fixed_default(key)} == {"static_shapes", "box_vecs"}
    assert not has_fixed_default("hidden_size_of_my_network")


#: Parts that read options out of configurations; the older files of `migrations.py` have defaults of their own.
READERS = (
    "build.py",
    "checkpoint",
    "compiled.py",
    "data",
    "heads",
    "models",
    "potential.py",
    "properties.py",
    "training",
)


@pytest.mark.parametrize("part", READERS)
def test_no_default_is_written_down_twice(part):
    place = Path(torchmdnet.__file__).parent / part
    for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "get":
                key, default = (*call.args, None, None)[:2]
                is_second = isinstance(key, ast.Constant) and key.value in OPTIONS and isinstance(default, ast.Constant)
                assert not is_second or path.name == "migrations.py", f"{path}, line {call.lineno}: use value_of"


def test_parsing_nothing_gives_the_defaults():
    args = get_argparse().parse_args([])
    assert isinstance(args, argparse.Namespace)
    assert vars(args) == {key: option.default for key, option in OPTIONS.items()}


def test_the_parser_knows_defaults_without_parsing():
    assert get_argparse().get_default("lr") == 1e-4


def test_lists_in_the_table_are_not_shared_between_runs():
    get_argparse().parse_args([]).q_weights.append(1.0)
    assert get_argparse().parse_args([]).q_weights == []


NUMBERS = {key: option for key, option in OPTIONS.items() if option.type in ("int", "float") and not option.choices}


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_bounds_beyond_which_it_is_refused_with_them(key):
    """Nothing else is asked of what lies within; beyond them a run would train nothing, or never begin."""
    option = NUMBERS[key]
    least = option.ge
    most = option.most if option.most is not None else option.lt
    assert least is not None
    assert most is not None
    assert -1 <= least <= most <= 1e12
    assert option.default is None or least <= option.default <= most
    beyond = [least - 1, most * 1.01 if option.type == "float" else most + 1, 10**400, -(10**400)]
    small = [1e-300, *((option.least / 2,) if option.least else ())]
    beyond += small if option.type == "float" and (least > 0 or option.least) else []
    for value in [*beyond, *([] if option.type == "int" else [float("nan"), float("inf")])]:
        with pytest.raises(ConfigError, match=rf"^conf\.yaml: {key}=.* is not valid.*It takes a (whole )?number"):
            coerce(key, value, "conf.yaml")
    for value in (least, most, *((option.least,) if option.least else ())):
        if value != option.lt:
            assert coerce(key, value, "conf.yaml") == value


def test_no_split_has_more_samples_than_data_have():
    for key in ("train_size", "val_size", "test_size"):
        with pytest.raises(ConfigError, match=f"{key}=.*1,000,000,000"):
            coerce(key, 10**30, "conf.yaml")


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_options_are_described(option):
    assert option.help.endswith(".")
    assert option.type in TYPES
    assert option.group
    assert option.default is None or option.takes_address or option.choices == () or option.default in option.names
    assert option.expects


def test_keys_of_earlier_releases_are_not_options():
    assert not {*RENAMED, *RETIRED, *SYNONYMS} & OPTIONS.keys()
    assert {*RENAMED.values(), *SYNONYMS.values()} <= OPTIONS.keys()


def test_choices_come_from_the_catalogues():
    from torchmdnet.datasets import DATASETS
    from torchmdnet.losses import LOSSES
    from torchmdnet.models import ARCHITECTURES

    assert OPTIONS["model"].names == tuple(ARCHITECTURES)
    assert OPTIONS["dataset"].names == tuple(DATASETS)
    assert OPTIONS["train_loss"].names == tuple(LOSSES)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lr_factor", "a number between 1e-06 and 1 (exclusive)"),
        ("coulomb_epsilon_solvent", "a number between 1 and 1000000000"),
        ("save_interval", "a whole number of 1 or more"),
        ("ema_alpha_y", "a number between 1e-06 and 1"),
        ("y_weight", "a number between 1e-12 and 1e+12, or 0"),
        ("precision", "one of 32, 64"),
        ("derivative", "true or false"),
        (
            "output_model",
            "one of " + ", ".join(HEADS) + " or 'my_package.module:Class', or one name with its arguments, "
            '{"Name": {"argument": value}}',
        ),
    ],
)
def test_what_would_do_is_said_in_words(key, words):
    assert OPTIONS[key].expects == words
