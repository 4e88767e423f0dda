"""Text and YAML values into option values."""

from __future__ import annotations

import numpy as np
import pytest

from torchmdnet.config.values import coerce, number, with_truths
from torchmdnet.datasets import ASE
from torchmdnet.errors import ConfigError
from torchmdnet.priors import named_priors


@pytest.mark.parametrize(
    ("text", "value"),
    [("None", None), (None, None), ("20", 20), ("1", 1), ("1.0", 1.0), ("3.0", 3.0), ("0.2", 0.2), ("1e3", 1000),
     ("5e-1", 0.5), (7, 7), (0.5, 0.5)],
)  # fmt: skip
def test_sizes_are_counts_or_fractions(text, value):
    assert number(text) == value
    assert type(number(text)) is type(value)


@pytest.mark.parametrize("text", ["many", "nan", "inf", ""])
def test_sizes_that_are_no_numbers_are_refused(text):
    with pytest.raises(ValueError, match=r"not a number|finite"):
        number(text)


@pytest.mark.parametrize("word", ["false", "False", "0", "no", "off", "", False, 0])
def test_words_for_false_are_false(word):
    assert coerce("derivative", word, "--derivative") is False


@pytest.mark.parametrize("word", ["true", "True", "1", "yes", "on", True, 1])
def test_words_for_true_are_true(word):
    assert coerce("derivative", word, "--derivative") is True


@pytest.mark.parametrize(("word", "value"), [("no", False), ("Off", False), ("YES", True), ("on", True)])
def test_words_for_truth_reach_the_arguments_that_are_true_or_false(word, value):
    priors = coerce("prior_model", [{"Atomref": {"trainable": word}}, "ZBL"], "conf.yaml")
    assert priors == [{"Atomref": {"trainable": value}}, "ZBL"]
    found = with_truths(
        ASE, {"cache": word, "stress_key": word, "atomref": {"No": 1.0}, "index": word, "extra_keys": [word]}
    )
    assert found == {"cache": value, "stress_key": value, "atomref": {"No": 1.0}, "index": word, "extra_keys": [word]}
    files = [{"path": "a.xyz", "energy_key": word, "split": word}]
    assert with_truths(ASE, {"files": files})["files"] == [{"path": "a.xyz", "energy_key": value, "split": word}]
    heads = coerce("properties", {"q": {"head": "PartialCharges", "conserve": word, "label": "No"}}, "conf.yaml")
    assert heads["q"]["label"] == "No"


@pytest.mark.parametrize("word", ["x", "maybe", 2, [], {}])
def test_other_words_are_neither_true_nor_false(word):
    with pytest.raises(ConfigError, match=r"derivative=.*It takes true or false"):
        coerce("derivative", word, "--derivative")


@pytest.mark.parametrize(("key", "given", "value"), [
    ("lr", "1e-4", 1e-4), ("lr", 1, 1.0), ("batch_size", 16.0, 16), ("batch_size", "16", 16),
    ("num_epochs", "1e2", 100),
    ("precision", "64", 64), ("wandb_name", 12, "12"), ("train_size", "0.5", 0.5), ("max_z", 100.0, 100),
])  # fmt: skip
def test_numbers_may_be_written_in_any_way(key, given, value):
    result = coerce(key, given, "conf.yaml, line 1")
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(("key", "given"), [
    ("lr", 1e-300), ("gradient_clipping", 1e-300), ("gradient_clipping", -1),
    ("lr", "fast"), ("lr", True), ("lr", -1), ("lr", float("nan")), ("lr", "inf"), ("batch_size", 0),
    ("batch_size", 2.5),
    ("batch_size", True), ("lr_factor", 1.0), ("cutoff_upper", 0), ("seed", -1), ("train_size", -0.1), ("lr", [1]),
    ("model", 3), ("dataset_arg", "text"), ("dataset_arg", [1, 2]), ("train_loss_arg", "{a: "),
    ("box_vecs", [[1, 2], [3, 4]]), ("box_vecs", [1, 2, 3]), ("box_vecs", "wide"), ("prior_model", 4),
    ("prior_model", {"ZBL": 3}), ("q_weights", "a"), ("log_dir", ""), ("num_epochs", None),
])  # fmt: skip
def test_values_that_do_not_fit_are_refused_with_place_key_and_value(key, given):
    with pytest.raises(ConfigError) as error:
        coerce(key, given, "conf.yaml, line 7")
    message = str(error.value)
    assert message.startswith("conf.yaml, line 7: ")
    assert key in message
    assert given is None or str(given) in message


@pytest.mark.parametrize(("key", "given", "nearest"), [
    ("model", "tensor-net", "tensornet"), ("dataset", "QM-9", "QM9"), ("train_loss", "mse", "mse_loss"),
    ("activation", "sillu", "silu"), ("prior_model", "Atomreff", "Atomref"),
    ("prior_model", [{"atomref": {}}], "Atomref"),
    ("precision", 48, None), ("output_model", "Skalar", "Scalar"),
])  # fmt: skip
def test_unknown_names_are_refused_with_the_nearest(key, given, nearest):
    with pytest.raises(ConfigError, match=rf"{key}: .* is not available.") as error:
        coerce(key, given, "--x")
    assert "Choose from" in str(error.value)
    assert nearest is None or f"Did you mean '{nearest}'?" in str(error.value)


@pytest.mark.parametrize("key", ["model", "output_model", "dataset", "train_loss", "prior_model"])
def test_addresses_stand_in_for_names(key):
    assert coerce(key, "my_package.parts:Mine", "--x") == "my_package.parts:Mine"


@pytest.mark.parametrize("given", [
    '{"label": "energy_U0", "version": 2}', "{label: energy_U0, version: 2}",
    ['{"label":', '"energy_U0",', '"version":2}'],
    ["label=energy_U0", "version=2"], {"label": "energy_U0", "version": 2},
])  # fmt: skip
def test_mappings_are_read_from_json_yaml_and_words(given):
    assert coerce("dataset_arg", given, "--dataset-arg") == {"label": "energy_U0", "version": 2}


def test_numbers_in_words_are_numbers_and_versions_stay_text():
    found = coerce("dataset_arg", ["max_gradient=5e1", "version=1.1.4", "path=a=b", "flag=true"], "--dataset-arg")
    assert found == {"max_gradient": 50, "version": "1.1.4", "path": "a=b", "flag": True}


def test_the_mapping_of_the_caller_is_not_shared():
    mine = {"label": "energy_U0"}
    found = coerce("dataset_arg", mine, "--dataset-arg")
    found["more"] = 1
    assert mine == {"label": "energy_U0"}


@pytest.mark.parametrize(("given", "value"), [
    ("Atomref", "Atomref"),
    (["Atomref", "D2"], ["Atomref", "D2"]),
    ({"ZBL": {"cutoff_distance": 4}}, {"ZBL": {"cutoff_distance": 4}}),
    ({"ZBL": None}, {"ZBL": None}),
    (['{"ZBL": {"cutoff_distance": 4}}', "D2"], [{"ZBL": {"cutoff_distance": 4}}, "D2"]),
    ('["Atomref", {"D2": {"cutoff_distance": 9}}]', ["Atomref", {"D2": {"cutoff_distance": 9}}]),
    (["None"], None),
    ([], []),
])  # fmt: skip
def test_priors_are_names_or_mappings_in_any_mixture(given, value):
    assert coerce("prior_model", given, "--prior-model") == value


def test_all_forms_of_priors_give_names_and_arguments():
    assert named_priors(None) == []
    assert named_priors("Atomref") == [("Atomref", {})]
    assert named_priors({"ZBL": {"a": 1}, "D2": None}) == [("ZBL", {"a": 1}), ("D2", {})]
    assert named_priors(["Atomref", {"ZBL": {"a": 1}}]) == [("Atomref", {}), ("ZBL", {"a": 1})]


def test_boxes_and_weights_are_lists_of_numbers():
    assert coerce("box_vecs", ["[[10,0,0],[0,10,0],[0,0,10]]"], "--box-vecs") == [[10, 0, 0], [0, 10, 0], [0, 0, 10]]
    assert coerce("q_weights", ["[1,", "0.5]"], "--q-weights") == [1, 0.5]
    assert coerce("q_weights", [[1, 2], [3, 4]], "conf.yaml, line 1") == [[1, 2], [3, 4]]


def test_arrays_become_lists():
    assert coerce("box_vecs", np.eye(3), "here") == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_one_path_is_a_path_and_several_are_a_list():
    assert coerce("dataset_root", ["a.xyz"], "--dataset-root") == "a.xyz"
    assert coerce("dataset_root", ["a.xyz", "b.xyz"], "--dataset-root") == ["a.xyz", "b.xyz"]


def test_home_is_found_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert coerce("log_dir", "~/runs", "--log-dir") == "/home/me/runs"


@pytest.mark.parametrize(("key", "value"), [("num_epochs", "100 epochs"), ("train_size", "half"), ("batch_size", "x")])
def test_numbers_with_words_are_refused_without_the_text_of_python(key, value):
    with pytest.raises(ConfigError, match=rf"{key}='{value}' is not valid \('{value}' is not a number\). It takes a"):
        coerce(key, value, "c.yaml, line 1")


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ("[[1,0,0],[2,0,0],[0,0,1]]", "its three vectors lie in a plane"),
        ("[[1e-3,0,0],[0,1e-3,0],[0,0,1e-3]]", "its opposite faces are 0.001 Å apart"),
        ("[[5,0,0],[0,5,0],[0,0,1e-9]]", "its opposite faces are 1e-09 Å apart"),
        ("[[5,0,0],[4.99,0.09,0],[0,0,5]]", "its opposite faces are 0.09 Å apart"),
        ("[[1e300,0,0],[0,1,0],[0,0,1]]", "no lattice vector is longer than 1,000,000 Å"),
    ],
)
def test_boxes_that_hold_nothing_are_refused(box, words):
    with pytest.raises(ConfigError, match=words):
        coerce("box_vecs", box, "--box-vecs")
    assert coerce("box_vecs", "[[9,0,0],[0,0,0],[0,0,7]]", "--box-vecs")[0][0] == 9
    assert coerce("box_vecs", "[[9,0,0],[4.5,7,0],[1,2,7]]", "--box-vecs")[2] == [1, 2, 7]


def test_zero_turns_clipping_off_and_what_is_far_below_any_gradient_is_refused():
    assert coerce("gradient_clipping", 0, "--gradient-clipping") == 0
    assert coerce("gradient_clipping", 1e-6, "--gradient-clipping") == 1e-6
    with pytest.raises(ConfigError, match=r"It takes a number between 1e-09 and 1e\+12, or 0"):
        coerce("gradient_clipping", 1e-300, "--gradient-clipping")


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("00:10:00", 600), ("10:00", 600), (600, 600), ("600", 600), ("1.5e2", 150), ("100:00:01", 360_001)],
)
def test_times_are_seconds_or_hours_minutes_and_seconds(given, seconds):
    assert coerce("max_time", given, "here") == seconds


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:10:00", 600), ("10:00:00", 36_000), ('"10:00:00"', 36_000), ("90", 90)]
)
def test_times_in_yaml_need_no_quotes(text, seconds, tmp_path):
    from torchmdnet.config import resolve

    (tmp_path / "run.yaml").write_text(f"dataset: TinyQM\nlog_dir: {tmp_path / 'run'}\nmax_time: {text}\n")
    assert resolve(["--conf", str(tmp_path / "run.yaml")]).max_time == seconds


@pytest.mark.parametrize("given", ["10 min", "1:60", "1:0:0:0", "-1:00", "::", 0, -5, True, "long", 1e12])
def test_other_times_are_refused(given):
    with pytest.raises(ConfigError, match=r"here: max_time=.*It takes a time in seconds, or hours:minutes:seconds"):
        coerce("max_time", given, "here")
