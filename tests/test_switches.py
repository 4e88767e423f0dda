"""Switches in the environment are on or off, and nothing else."""

import re
import runpy

import pytest
from conftest import REPOSITORY

from torchmdnet import switches
from torchmdnet.errors import ConfigError
from torchmdnet.scripts import main, train


@pytest.mark.parametrize("name", sorted(switches.SWITCHES))
def test_a_switch_is_on_off_or_as_without_it(name, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    usual = switches.SWITCHES[name]
    assert switches.is_on(name) is usual
    for text, expected in (("1", True), ("0", False), ("", usual), (" 1 ", True), (" ", usual)):
        monkeypatch.setenv(name, text)
        assert switches.is_on(name) is expected, text
        switches.check_switches()


@pytest.mark.parametrize("text", ["yes", "2", "-1", "true", "nan", "a\nb"])
@pytest.mark.parametrize("name", sorted(switches.SWITCHES))
def test_another_word_is_refused_by_name(name, text, monkeypatch):
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=f"^{name}: .* in the environment is neither 1 "):
        switches.check_switches()


def test_commands_refuse_it_before_they_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHMDNET_PLAIN_OPS", "on")
    with pytest.raises(SystemExit) as ended:
        main.main(["data", "--dataset", "TinyQM"])
    assert ended.value.code == 2
    assert "error: TORCHMDNET_PLAIN_OPS: 'on'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        train.main(["--dataset", "TinyQM", "--log-dir", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "error: TORCHMDNET_PLAIN_OPS: 'on'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "expected"), [("0", False), ("1", True), ("", False)])
def test_loops_are_checked_where_the_switch_is_on(text, expected, monkeypatch):
    from torchmdnet.ops.kernels import work

    monkeypatch.setenv("TORCHMDNET_CHECK_LOOPS", text)
    assert runpy.run_path(work.__file__)["CHECKS"] is expected


def test_the_page_lists_every_switch_as_it_is_without_it():
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(TORCHMDNET_\w+)` \| (on|off) \|", page, re.MULTILINE))
    assert {name: word == "on" for name, word in rows.items()} == switches.SWITCHES
