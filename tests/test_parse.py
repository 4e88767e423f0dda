"""Text from outside to plain values: whatever it holds, the answer is a value or an error, and soon."""

from __future__ import annotations

import time

import pytest

from torchmdnet.config.command_line import resolve
from torchmdnet.config.reader import read_yaml
from torchmdnet.config.values import coerce
from torchmdnet.errors import CheckpointError, ConfigError
from torchmdnet.parse import MAX_BYTES, MAX_DEPTH, check_plain, parse_json, parse_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))


@pytest.mark.parametrize(("content", "message"), [
    (b"dataset: X\nlr: &a [*a]", r"line 2: .*\*a contains itself"),
    (b"lr: &a {b: *a}", r"\*a contains itself"),
    (b"lr: &a {<<: *a}", r"\*a contains itself"),
    (BOMB.encode(), "repeat more than 10,000 values"),
    (MERGES.encode(), "repeat more than 10,000 values"),
    (b"a: 1\nlr: !!int abc", r"line 2: .*'abc' is not a whole number; quotes make it text"),
    (b"lr: !!float abc", "'abc' is not a number"),
    (b"lr: !!bool abc", "'abc' is not true or false"),
    (b"lr: !!timestamp abc", "'abc' is not a date"),
    (b"lr: !!int {}", "line 1: "),
    (b"lr: !!map abc", "line 1: "),
    (b"lr: !!binary 'a'", "line 1: "),
    (b"lr: !!omap {a: 1}", "line 1: "),
    (b"? [a, b]\n: 1", "line 1: "),
    (b"batch_size: 0x_", "line 1: .*'0x_' is not a whole number"),
    (b"batch_size: " + b"9" * 5000, "has 5,000 digits"),
    (b"lr: " + b"1:" * 3000 + b"1", "digits"),
    (b"log_dir: \"\\x00abc\"", "line 1: .*character of code 0"),
    (b"log_dir: \"\\ud800\"", "half of a character"),
    (b"lr: \x01", "the character of code 0x01"),
    (b"lr: " + b"[" * 3000 + b"]" * 3000, f"nested more than {MAX_DEPTH} deep"),
    (b"\n".join(b" " * n + b"a:" for n in range(1000)), f"nested more than {MAX_DEPTH} deep"),
    (b"a: 1\nlr: \xff\xfe", "line 2: the byte 0xff is not UTF-8"),
    ("lr: 1".encode("utf-16"), "is not UTF-8"),
    (b"#" * (MAX_BYTES + 1), "is larger than"),
    (b"lr: *nothing", "line 1: .*undefined alias"),
    (b"%YAML 99.1\n---\nlr: 1", "line 1: "),
    (b"&a lr: 1\n&a b: 2", "line 2: .*an anchor is defined twice"),
    (b"a: 1\nc: [1", "line 2: "),
])  # fmt: skip
def test_a_settings_file_that_cannot_be_read_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "conf.yaml"
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(path)
    assert "conf.yaml" in str(error.value)
    assert len(str(error.value)) < 1000
    assert time.monotonic() - start < 20


def test_aliases_that_repeat_little_are_values(tmp_path):
    path = tmp_path / "conf.yaml"
    path.write_text("a: &a [1, 2]\nb: [*a, *a]\nc: {<<: &m {x: 1}, y: 2}\n")
    found = {key: setting.value for key, setting in read_yaml(path).items()}
    assert found == {"a": [1, 2], "b": [[1, 2], [1, 2]], "c": {"x": 1, "y": 2}}


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    path = tmp_path / "conf.yaml"
    path.write_bytes(b"\xef\xbb\xbflr: 0.5\n")
    assert list(read_yaml(path)) == ["lr"]


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "conf.yaml")
    with pytest.raises(ConfigError, match="no regular file"):
        read_yaml(tmp_path / "conf.yaml")


@pytest.mark.parametrize(("text", "message"), [
    ("[" * 100_000, "nested too deeply"), ("9" * 5000, "not JSON"), ("{", "not JSON"), (b"\xff\xfe\x00", "not JSON"),
])  # fmt: skip
def test_json_that_cannot_be_read_is_the_error_of_the_caller(text, message):
    with pytest.raises(CheckpointError, match=f"card: .*{message}"):
        parse_json(text, "card", CheckpointError)


def _holding_itself() -> list:
    value: list = [1]
    value += [value, value]
    return value


@pytest.mark.parametrize("value", [_holding_itself(), {"a": {"b": "\0"}}, {"a\udc80": 1}, [10**5000]])
def test_values_nobody_can_write_are_refused_wherever_they_come_from(value):
    with pytest.raises(ConfigError, match="here: "):
        check_plain(value, "here")
    with pytest.raises(ConfigError, match="here: dataset_arg"):
        coerce("dataset_arg", value, "here")


@pytest.mark.parametrize("words", [
    ["--dataset-arg", "{a: &x [*x]}"], ["--dataset-arg", "a=!!int b"], ["--prior-model", "[" * 3000],
    ["--box-vecs", "[[0x_]]"], ["--batch-size", "9" * 5000], ["--log-dir", "\0"], ["--splits", "\udcff"],
    ["--properties", "{" * 3000], ["--conf", "\0.yaml"], ["--num-epochs", "1e999"], ["--lr", "0x_"],
    ["--load-model", "a" * 5000], ["--conf", "a" * 5000 + ".yaml"], ["--dataset", "X" * 5000],
])  # fmt: skip
def test_words_of_a_command_line_pass_the_same_door(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        resolve(["--dataset", "TinyQM", *words])
    assert words[0].strip("-").replace("-", "_").split("_")[0] in str(error.value)


@pytest.mark.parametrize(("line", "message"), [
    ("dataset_root: [a, null]", "dataset_root"), ("coord_files: [a, [b]]", "coord_files"), ("model: [a]", "model"),
    ("dataset: {a: b}", "dataset"), ("output_model: [[]]", "output_model"), ("train_loss: {}", "train_loss"),
    ("prior_model: [{ZBL: 3}]", "ZBL"), ("prior_model: [[3]]", "prior_model"),
    ("early_stopping_monitor: [a]", "early_stopping_monitor"), ("properties: [[a]]", "properties"),
    ("log_dir: [a, b]", "log_dir"), ("train_size: [1]", "train_size"), ("train_size: {a: 1}", "train_size"),
])  # fmt: skip
def test_a_value_of_another_kind_is_refused_by_its_key(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(f"dataset: TinyQM\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        resolve(["--conf", "c.yaml"])


def test_a_value_alone_is_read():
    assert parse_yaml("{a: [1e3, no]}") == {"a": [1000, "no"]}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("lr 1e-4\nbatch_size: 3\n", "line 1"),  # no colon, which is noticed on the next line
        ("a: 1\nb: [1, 2\nc: 3\n", "line 2"),
        ("a: 1\nb: 'text\nc: 3\n", "line 2"),
        ("a: 1\n  b: 2\n", "line 2"),
        ("a: 1\nb: 2\n c\nd: - 3\n", "line 4"),
        ("a:\n  - 1\n - 2\n", "at or before line 3"),
    ],
)
def test_the_line_of_an_error_is_the_one_that_is_wrong(text, line):
    with pytest.raises(ConfigError, match=f"^c.yaml, {line}: this is not YAML"):
        parse_yaml(text, "c.yaml")


@pytest.mark.parametrize("text", ["010", "-017", "0_10"])
def test_what_yaml_takes_for_octal_is_refused(text):
    with pytest.raises(ConfigError, match=f"{text} is octal in YAML"):
        parse_yaml(f"batch_size: {text}")


@pytest.mark.parametrize(("text", "value"), [("007", 7), ("0", 0), ("0x10", 16), ('"010"', "010"), ("10", 10)])
def test_other_numbers_are_what_they_look_like(text, value):
    assert parse_yaml(f"batch_size: {text}") == {"batch_size": value}
