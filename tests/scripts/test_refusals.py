"""Arguments that cannot work end a command at once with status 2 and a message, whichever command it is."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from ase.build import molecule
from ase.io import write

from torchmdnet.errors import ConfigError
from torchmdnet.files import check_target, expanded
from torchmdnet.scripts.main import main

SAMPLE = ["sample", "in.xyz", "-o", "out.extxyz", "-m", "rattle"]
LABEL = ["label", "in.xyz", "-o", "out.extxyz", "-c", "lj"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("in.xyz", molecule("H2O"))
    (tmp_path / "folder").mkdir()
    return tmp_path


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    told = capsys.readouterr().err
    assert end.value.code == 2, told
    assert "Traceback" not in told
    return told


NUMBERS = [
    *((SAMPLE, flag, word) for flag in ("--stdev", "--temperature", "--timestep", "--interval", "--friction")
      for word in ("nan", "inf", "0", "-1", "x")),
    *((SAMPLE, flag, word) for flag in ("--equilibration", "--strain", "--min-distance") for word in ("nan", "-1")),
    *((SAMPLE, flag, word) for flag in ("--count", "--processes") for word in ("-1", "1.5", "9" * 5000, "1e400")),
    (SAMPLE, "--count", "0"), (SAMPLE, "--seed", "-1"), (SAMPLE, "--seed", "9" * 30), (LABEL, "--processes", "99999"),
    *((LABEL, "--timeout", word) for word in ("-1", "0", "nan", "-inf")),
    *((SAMPLE, "--memory", word) for word in ("-1", "0", "nan", "inf")),
    *((["bench", "m.ckpt"], flag, word) for flag in ("--seconds", "--timestep") for word in ("nan", "-1", "0", "1e9")),
    *((["bench", "m.ckpt"], flag, "nan") for flag in ("--charge", "--spin")),
    (["bench", "m.ckpt"], "--index", "9" * 5000), (["bench", "m.ckpt"], "--threads", "9" * 5000),
    (["bench", "m.ckpt"], "--threads", "0"), (["bench", "m.ckpt"], "--replicate", "nan"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "flag", "word"), NUMBERS, ids=lambda value: str(value)[:20])
def test_numbers_out_of_bounds_are_refused(command, flag, word, capsys):
    told = refused([*command, f"{flag}={word}"], capsys)
    assert flag in told
    assert len(told) < 4000
    assert not Path("out.extxyz.journal").exists()


@pytest.mark.parametrize("words", [
    [*LABEL, "--option", "a=!!int b"], [*LABEL, "--option", "a=[" + "[" * 3000], [*LABEL, "--option", "a=.nan"],
    [*LABEL, "--option", "a=!!binary YQ=="], [*LABEL, "--option", "a=\0"], [*LABEL, "--option", "a=&b [*b]"],
    ["data", "in.xyz", "--dataset-arg", "[" * 100_000], ["data", "in.xyz", "--dataset-arg", "9" * 5000],
    ["data", "in.xyz", "--dataset-arg", "{a: &b {c: *b}}"], ["data", "in.xyz", "--dataset-arg", "[1]"],
])  # fmt: skip
def test_values_in_yaml_or_json_are_refused_by_their_flag(words, capsys):
    assert words[-2] in refused(words, capsys)


@pytest.mark.parametrize("command", [
    ["data", "in.xyz", "--html", "TARGET"], ["data", "in.xyz", "--fix", "TARGET.xyz"],
    ["sample", "in.xyz", "-m", "rattle", "-o", "TARGET.xyz"], ["label", "in.xyz", "-c", "lj", "-o", "TARGET.xyz"],
    ["convert", "in.xyz", "TARGET.ckpt"], ["export", "in.xyz", "TARGET.pt2"],
])  # fmt: skip
@pytest.mark.parametrize("target", ["folder", "/proc/none", "in.xyz/below", "a" * 300, "fifo"])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(command, target, here, capsys, monkeypatch):
    suffix = command[-1].removeprefix("TARGET")
    if target in ("folder", "fifo"):
        target += suffix
        if target.startswith("fifo"):
            os.mkfifo(target)
        else:
            Path(target).mkdir(exist_ok=True)
        suffix = ""
    before = sorted(here.iterdir())
    told = refused([*command[:-1], target + suffix], capsys)
    assert command[-2].strip("-") in told or command[-2] in ("in.xyz", "-o")
    assert any(word in told for word in ("is a folder", "cannot be written", "no regular file"))
    assert sorted(here.iterdir()) == before


def test_a_target_below_folders_that_can_be_made_is_accepted(here):
    assert check_target("new/folder/file.xyz", "output") == Path("new/folder/file.xyz")
    assert sorted(path.name for path in here.iterdir()) == ["folder", "in.xyz"]


def test_a_way_through_a_folder_that_is_not_there_is_refused(here):
    with pytest.raises(ConfigError, match=r"output: 'a/\.\./b\.xyz' leads through a folder that is not there"):
        check_target("a/../b.xyz", "output")
    assert check_target("folder/../b.xyz", "output") == Path("folder/../b.xyz")


def test_what_the_system_says_of_a_file_begins_with_its_name():
    from torchmdnet.errors import shown

    assert shown(FileNotFoundError(2, "No such file or directory", "a b")) == "a b: No such file or directory."
    assert shown(OSError(28, "No space left on device")) == "No space left on device."
    assert shown(OSError("as it is")) == "as it is"


def test_users_that_there_are_not_are_names_of_folders():
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    with pytest.raises(ConfigError, match="output: "):
        check_target("a\0b", "output")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["info", ""], "argument 1 of torchmd-net info"),
        (["convert", "a.ckpt", "  "], "argument 2 of torchmd-net convert"),
        (["convert", "a.ckpt", "b.ckpt", "--elements", ""], "--elements"),
        (["convert", "a.ckpt", "b.ckpt", "--units="], "--units"),
        (["sample", "in.xyz", "-o", "", "-m", "rattle"], "-o"),
        (["bench", ""], "argument 1 of torchmd-net bench"),
    ],
)
def test_empty_arguments_are_named(words, name, capsys):
    assert f"error: {name} is empty. Give it a value" in refused(words, capsys)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_asked_to_end_says_so_in_one_line(number, monkeypatch, capsys):
    from torchmdnet.scripts import info

    monkeypatch.setattr(info, "main", lambda words: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as end:
        main(["info", "x.ckpt"])
    assert end.value.code == 128 + number
    assert capsys.readouterr().err == f"{number.name}: stopped before the end.\n"
