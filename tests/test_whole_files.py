"""Folders that a user lacks or may not enter cost no run, or are named in one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WITHOUT_RIGHTS

from torchmdnet import files
from torchmdnet.data import DataModule
from torchmdnet.errors import ConfigError, DataError

CACHED = """
import numpy as np
from torchmdnet.datasets.cache import cached_frames
from torchmdnet.datasets.frames import Frames

def build(folder):
    return Frames.from_samples([{"z": np.array([1]), "pos": np.zeros((1, 3)), "y": 0.0}]), {}

print(len(cached_frames("ase", "key", build)[0]))
"""


@pytest.fixture
def closed(tmp_path: Path):
    """A folder that nobody may enter, such as the home folder of another user."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    yield folder
    folder.chmod(0o700)


def call(code: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WITHOUT_RIGHTS, sys.executable, "-c", code, *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_data_are_kept_in_memory_where_the_cache_may_not_be_entered(closed: Path) -> None:
    end = call(CACHED, TORCHMDNET_CACHE=str(closed / "cache"))
    assert end.stdout == "1\n", end.stderr
    assert f"The cache {closed / 'cache/ase'} cannot be used" in end.stderr


class Closed:
    """A data set in a folder of another user."""

    def __init__(self) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/home/other/data/raw")


def test_a_data_set_in_a_folder_that_may_not_be_entered_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataModule, "source", lambda self: (Closed, [], {}))
    expected = r"Closed: no access to /home/other/data/raw \(Permission denied\). Choose another folder.*dataset_root"
    with pytest.raises(DataError, match=expected):
        DataModule({"dataset": "Closed"}).open()


def test_a_folder_called_tilde_is_not_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of/somebody")
    assert files.expanded("~/run") == Path("/home/of/somebody/run")
    assert files.expanded("./~/run") == files.expanded(files.expanded("./~/run")) == tmp_path / "~" / "run"


def without_home(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    """A user that the system knows nothing of."""
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(files.os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(files.tempfile, "tempdir", str(temporary))


def test_a_user_without_a_home_folder_gets_a_temporary_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without_home(monkeypatch, tmp_path)
    files.ensure_home()
    home = Path(os.environ["HOME"])
    assert home.parent == tmp_path
    assert home.stat().st_mode & 0o777 == 0o700
    assert "Set HOME to a folder that is kept" in caplog.text
    home.chmod(0o777)  # others could put something there
    with pytest.raises(ConfigError, match="HOME: it is not set"):
        files.ensure_home()
