"""Reading a checkpoint never runs code of the file."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from torchmdnet.checkpoint import hyper_parameters_of, read_checkpoint
from torchmdnet.errors import CheckpointError


class Payload:
    """Unpickling it would create a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_crafted_pickle_is_refused_by_name_and_does_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "created by the payload"
    torch.save({"state_dict": {}, "hyper_parameters": {"x": Payload(trap)}}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"evil\.ckpt is refused: .*mkdir.*weights_only=False"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not trap.exists()


def test_trust_can_be_given_on_purpose(tmp_path: Path) -> None:
    trap = tmp_path / "created"
    torch.save({"state_dict": {}, "hyper_parameters": {"x": Payload(trap)}}, tmp_path / "trusted.ckpt")
    read_checkpoint(tmp_path / "trusted.ckpt", weights_only=False)
    assert trap.exists()


def test_older_files_with_a_namespace_and_numpy_numbers_are_read(tmp_path: Path) -> None:
    content = {
        "state_dict": {"model.mean": torch.zeros(())},
        "hyper_parameters": argparse.Namespace(lr=np.float64(0.1), log_dir=Path("logs")),
    }
    torch.save(content, tmp_path / "old.ckpt")
    checkpoint = read_checkpoint(tmp_path / "old.ckpt")
    assert hyper_parameters_of(checkpoint)["lr"] == 0.1


@pytest.mark.parametrize("size", [0, 10, 300, 2000])
def test_a_truncated_file_is_called_damaged(tmp_path: Path, size: int) -> None:
    whole = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {"w": torch.rand(1000)}}, whole)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt cannot be read as a checkpoint"):
        read_checkpoint(cut)


def test_an_altered_byte_never_changes_what_is_read(tmp_path: Path) -> None:
    whole = tmp_path / "whole.ckpt"
    content = {"state_dict": {"w": torch.rand(50)}, "optimizer_states": [{"step": 7, "m": torch.rand(50)}]}
    torch.save(content, whole)
    data, refused = whole.read_bytes(), 0
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path = tmp_path / "damaged.ckpt"
        path.write_bytes(damaged)
        try:
            read = read_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:  # padding between the records, or a time stamp
            assert torch.equal(read["state_dict"]["w"], content["state_dict"]["w"]), place
            assert torch.equal(read["optimizer_states"][0]["m"], content["optimizer_states"][0]["m"]), place
            assert read["optimizer_states"][0]["step"] == 7
    assert refused > 50


def test_a_record_that_became_a_folder_is_refused(tmp_path: Path) -> None:
    """PyTorch would read no byte of it, and return memory as it was."""
    whole, path = tmp_path / "whole.ckpt", tmp_path / "damaged.ckpt"
    torch.save({"state_dict": {"w": torch.rand(50), "b": torch.rand(3)}}, whole)
    data = whole.read_bytes()
    places = [match.start() for match in re.finditer(rb"PK\x01\x02", data)]
    assert len(places) >= 4
    for place in places:
        damaged = bytearray(data)
        damaged[place + 38] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"the record '[a-z/.\d_]+' is marked as a folder"):
            read_checkpoint(path)


def test_the_list_of_records_may_not_be_altered(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.ckpt", tmp_path / "damaged.ckpt"
    w = torch.rand(50)
    torch.save({"state_dict": {"w": w}}, whole)
    data = whole.read_bytes()
    for place in range(data.index(b"PK\x01\x02"), len(data)):
        for bit in (0x01, 0x10, 0x80):
            damaged = bytearray(data)
            damaged[place] ^= bit
            path.write_bytes(damaged)
            try:
                found = read_checkpoint(path)
            except CheckpointError:
                continue
            assert torch.equal(found["state_dict"]["w"], w), (place, bit)


def test_only_whole_checkpoints_are_offered(tmp_path: Path) -> None:
    for name in ("best.ckpt", "last.ckpt", "epoch=2.ckpt"):
        torch.save({"state_dict": {"w": torch.rand(50)}}, tmp_path / name)
    for name in ("last.ckpt", "epoch=2.ckpt"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"its end is missing.*newest first: best\.ckpt\.$"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_every_truncation_is_called_damaged_and_offers_the_other_checkpoints(tmp_path: Path) -> None:
    whole = tmp_path / "epoch=3.ckpt"
    torch.save({"state_dict": {"w": torch.rand(50)}}, whole)
    data = whole.read_bytes()
    for size in range(0, len(data), 41):
        (tmp_path / "last.ckpt").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read .* newest first: epoch=3\.ckpt"):
            read_checkpoint(tmp_path / "last.ckpt")


def test_another_kind_of_file_is_called_so_without_the_advice_of_pytorch(tmp_path: Path) -> None:
    (tmp_path / "frames.extxyz").write_text("3\nProperties=species:S:1:pos:R:3\nH 0 0 0\n")
    with pytest.raises(CheckpointError, match=r"frames\.extxyz is not a model file: it is neither"):
        read_checkpoint(tmp_path / "frames.extxyz")
    np.savez(tmp_path / "arrays.npz", z=np.ones(3))
    with pytest.raises(CheckpointError, match=r"arrays\.npz is not a model file"):
        read_checkpoint(tmp_path / "arrays.npz")
    (tmp_path / "cut.ckpt").write_bytes(b"\x80\x02}q\x00(X")
    with pytest.raises(CheckpointError, match=r"truncated or damaged") as refused:
        read_checkpoint(tmp_path / "cut.ckpt")
    assert "torch.load" not in str(refused.value)


def test_a_file_without_weights_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="expected a dictionary with 'state_dict', found keys"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at .*nowhere\.ckpt"):
        read_checkpoint(tmp_path / "nowhere.ckpt")


def test_missing_hyper_parameters_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="no hyper_parameters"):
        hyper_parameters_of({"state_dict": {}})
