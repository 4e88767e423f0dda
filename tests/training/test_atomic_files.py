import json
import pickle

import pytest
import torch

from torchmdnet.errors import CheckpointError
from torchmdnet.training.files import (
    SafeCheckpointIO,
    copy_file,
    draft_of,
    read_table,
    write_json,
    write_table,
    write_text,
)


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fails():
        with draft_of(path) as draft:
            draft.write_text("ne")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fails()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_cannot_be_pickled_leaves_the_old_one(tmp_path):
    path, io = tmp_path / "last.ckpt", SafeCheckpointIO()
    io.save_checkpoint({"state_dict": {"w": torch.ones(2)}}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        io.save_checkpoint({"state_dict": {}, "f": lambda: 0}, path)
    torch.testing.assert_close(io.load_checkpoint(path)["state_dict"]["w"], torch.ones(2))


class Evil:
    def __reduce__(self):
        return (open, ("harmed.txt", "w"))


def test_a_crafted_checkpoint_is_refused_and_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="open"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not (tmp_path / "harmed.txt").exists()


def test_a_copy_stays_when_the_original_is_replaced(tmp_path):
    write_text(tmp_path / "a", "one")
    copy_file(tmp_path / "a", tmp_path / "b")
    write_text(tmp_path / "a", "two")
    assert (tmp_path / "b").read_text() == "one"


def test_tables_come_back_without_their_empty_cells(tmp_path):
    write_table(tmp_path / "t.csv", ["a", "b"], [{"a": 1}, {"a": 2.5, "b": 0.0}])
    assert read_table(tmp_path / "t.csv") == [{"a": "1"}, {"a": "2.5", "b": "0.0"}]
    assert read_table(tmp_path / "none.csv") == []


def test_json_has_null_for_what_is_not_a_number(tmp_path):
    write_json(tmp_path / "s.json", {"a": float("nan"), "b": [float("inf"), 1]})
    assert json.loads((tmp_path / "s.json").read_text()) == {"a": None, "b": [None, 1]}
