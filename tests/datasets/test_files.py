"""Paths, patterns and lists of them become files in natural order."""

from __future__ import annotations

import pytest

from torchmdnet.datasets.files import find_files, natural_key, progress
from torchmdnet.errors import DataError


def names(paths):
    return [path.name for path in paths]


@pytest.fixture
def folder(tmp_path):
    for name in ("a10.x", "a2.x", "a1.x", "b[1].x"):
        (tmp_path / name).write_text("")
    return tmp_path


def test_matches_are_sorted_as_people_count(folder):
    assert names(find_files(f"{folder}/a*.x", "dataset_root")) == ["a1.x", "a2.x", "a10.x"]
    assert sorted(["x10y2", "x9y10", "x9y9"], key=natural_key) == ["x9y9", "x9y10", "x10y2"]


def test_lists_and_semicolons_keep_their_order(folder):
    assert names(find_files([folder / "a2.x", f"{folder}/a1*.x"], "dataset_root")) == ["a2.x", "a1.x", "a10.x"]
    assert names(find_files(f"{folder}/a2.x; {folder}/a1.x", "dataset_root")) == ["a2.x", "a1.x"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(folder):
    assert names(find_files(folder / "b[1].x", "dataset_root")) == ["b[1].x"]


def test_home_and_variables_are_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("DATA", str(folder))
    assert find_files("~/a1.x", "dataset_root") == find_files("$DATA/a1.x", "dataset_root") == [folder / "a1.x"]


def test_what_cannot_be_found_is_refused(folder):
    for where, message in [
        (f"{folder}/c*.x", "No file matches the pattern"),
        (folder / "c.x", "There is no file"),
        (folder, "is a folder"),
        ([], "no file is given"),
        ("", "no file is given"),
        ([folder / "a1.x", f"{folder}/a*.x"], "listed twice"),
    ]:
        with pytest.raises(DataError, match=message):
            find_files(where, "dataset_root")


def test_progress_passes_everything_on_and_keeps_quiet(capsys):
    assert list(progress(iter(range(5)), "Counting", 5)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")
