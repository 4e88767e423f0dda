"""Reading and writing YAML."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import yaml

from torchmdnet.config.reader import Setting, plain, read_yaml, write_yaml
from torchmdnet.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "conf.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_each_value_comes_with_its_line(write):
    path = write("# comment\nlr: 0.5\n\ndataset_arg:\n  label: x\nmodel: tensornet\n")
    found = read_yaml(path)
    assert found["lr"] == Setting(0.5, f"{path}, line 2")
    assert found["dataset_arg"] == Setting({"label": "x"}, f"{path}, line 4")
    assert found["model"].source.endswith("line 6")


@pytest.mark.parametrize(("text", "value"), [
    ("1e-4", 1e-4), ("1E-4", 1e-4), ("1.0e-4", 1e-4), ("1.e5", 100000), ("1e3", 1000), ("-2e-3", -2e-3), (".5e1", 5),
    ("1000.0", 1000.0), ("0x10", 16), ("1.1.4", "1.1.4"), ("e5", "e5"), ("2024-01-31", "2024-01-31"),
    ("'1e-4'", "1e-4"),
])  # fmt: skip
def test_numbers_with_an_exponent_are_numbers(write, text, value):
    found = read_yaml(write(f"lr: {text}\nnested: {{a: [{text}]}}"))
    assert found["lr"].value == value
    assert type(found["lr"].value) is type(value)
    assert found["nested"].value == {"a": [value]}


@pytest.mark.parametrize("word", ["No", "NO", "no", "off", "Off", "on", "yes", "Y", "N", "y", "n"])
def test_words_that_yaml_1_1_takes_for_true_and_false_are_text(write, word):
    found = read_yaml(write(f"energies: {{{word}: -1.5, H: -13.6}}\nnames: [{word}]\n{word}: {word}\n"))
    assert found["energies"].value == {word: -1.5, "H": -13.6}
    assert found["names"].value == [word]
    assert found[word].value == word


@pytest.mark.parametrize(("word", "value"), [("true", True), ("True", True), ("FALSE", False), ("false", False)])
def test_true_and_false_are_true_and_false(write, word, value):
    found = read_yaml(write(f"a: {word}\nnested: {{b: {word}}}\n"))
    assert found["a"].value is value
    assert found["nested"].value == {"b": value}


def test_text_that_other_readers_take_for_true_is_written_in_quotes(tmp_path):
    write_yaml(tmp_path / "a.yaml", {"No": "off", "flag": True})
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == {"No": "off", "flag": True}
    assert {key: value for key, (value, _) in read_yaml(tmp_path / "a.yaml").items()} == {"No": "off", "flag": True}


def test_a_repeated_key_is_reported_and_the_later_value_used(write, caplog):
    with caplog.at_level(logging.WARNING):
        found = read_yaml(write("precision: 32\nlr: 1\nprecision: 64\n"))
    assert found["precision"].value == 64
    assert "'precision' stands on line 1 and again on line 3" in caplog.text


@pytest.mark.parametrize(("text", "name", "message"), [
    ("", "conf.yaml", "is empty"),
    ("# nothing\n", "conf.yaml", "is empty"),
    ("- 1\n- 2\n", "conf.yaml", "is not a mapping"),
    ("just words", "conf.yaml", "is not a mapping"),
    ("a: 1", "conf.txt", "does not end in .yaml or .yml"),
    ("a: 1\nb: [1, 2\nc: 3\n", "conf.yaml", "line 2: this is not YAML"),
    ("a: 1\n---\nb: 2\n", "conf.yaml", "this is not YAML"),
    ("lr: !!python/object/apply:os.system ['true']", "conf.yaml", "line 1: .*refused"),
    ("lr: !!python/name:os.system", "conf.yaml", "line 1: .*refused"),
])  # fmt: skip
def test_files_that_hold_no_settings_are_refused_by_name(write, text, name, message):
    path = write(text, name)
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(path)
    assert name in str(error.value)


def test_a_missing_file_is_refused_with_its_neighbours(write):
    path = write("a: 1")
    with pytest.raises(ConfigError, match=r"there is no file .*Beside it: conf.yaml"):
        read_yaml(path.with_name("other.yaml"))


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "x.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be read"):
        read_yaml(tmp_path / "x.yaml")


def test_tuples_that_were_saved_by_name_are_lists(write):
    assert read_yaml(write("a: !!python/tuple [1, 2]"))["a"].value == [1, 2]


def test_merge_keys_work(write):
    found = read_yaml(write("base: &base {x: 1}\nother:\n  <<: *base\n  y: 2\n"))
    assert found["other"].value == {"x": 1, "y": 2}


def test_what_is_written_is_read_back(tmp_path):
    values = {"lr": 1e-7, "none": None, "text": "1e-4", "list": [[1.5, 2], []], "map": {"a": {"b": True}}, "o": "O(3)"}
    write_yaml(tmp_path / "x.yaml", values)
    assert {key: setting.value for key, setting in read_yaml(tmp_path / "x.yaml").items()} == values


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.yaml"
    write_yaml(path, {"a": 1})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_yaml(path, {"a": 2})
    assert path.read_text() == "a: 1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["x.yaml"]


def test_arrays_and_the_like_become_plain_values(tmp_path):
    value = {"t": torch.tensor([1, 2]), "n": np.float64(0.5), "s": (1, np.int64(2)), "p": tmp_path, 3: None}
    assert plain(value) == {"t": [1, 2], "n": 0.5, "s": [1, 2], "p": str(tmp_path), "3": None}
    assert type(plain(np.float64(0.5))) is float
