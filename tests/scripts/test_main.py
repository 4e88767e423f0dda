"""``torchmd-net info`` and ``convert`` do what their help says, and refuse in one line what they cannot."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import shared

from torchmdnet import __version__
from torchmdnet.checkpoint import describe, load_model, save_model
from torchmdnet.ensemble import Ensemble
from torchmdnet.errors import ConfigError
from torchmdnet.scripts.convert import convert
from torchmdnet.scripts.main import COMMANDS, main
from torchmdnet.testing import small_molecules, tiny_model

SYSTEMS = small_molecules()


def energy_of(path: Path, **options) -> torch.Tensor:
    return load_model(path, **options)(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)[0].detach()


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    """Exit status and message of a command that has to fail in one line."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    assert isinstance(end.value.code, int)
    return end.value.code, message


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_model(tiny_model("tensornet", charge=True), tmp_path / "old.ckpt")
    return tmp_path / "old.ckpt"


def test_help_lists_the_commands_without_loading_anything_heavy() -> None:
    code = (
        "import sys; from torchmdnet.scripts.main import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n"
    )
    code += "    assert end.code == 0\nassert not {'torch', 'numpy', 'rich', 'ase'} & sys.modules.keys()"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"  {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: torchmd-net {name}" in capsys.readouterr().out


def test_both_programs_tell_their_version_without_loading_anything_heavy() -> None:
    for module, program in (("main", "torchmd-net"), ("train", "torchmd-train")):
        code = f"import sys; from torchmdnet.scripts.{module} import main; main(['--version'])"
        code += "\nassert not {'torch', 'numpy', 'rich', 'ase', 'pydantic'} & sys.modules.keys()"
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert printed == f"{program} {__version__}\n"


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    status, message = refused(capsys, "inof")
    assert status == 2
    assert "command: 'inof' is not available. Did you mean 'info'?" in message


def test_info_prints_what_a_file_states_and_says_what_it_does_not(checkpoint, capsys) -> None:
    main(["info", str(checkpoint)])
    rows = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines()[1:])
    rows = {name.strip(): text.strip() for name, text in rows.items()}
    assert rows["kind"] == "checkpoint"
    assert rows["architecture"] == "tensornet"
    assert rows["cutoff"] == "4 Å"
    assert rows["inputs"] == "total charge"
    assert rows["elements"] == "not stated"
    assert rows["units"].startswith("not stated; calculators take eV and Å")


def test_info_gives_the_card_as_json(checkpoint, capsys) -> None:
    main(["info", str(checkpoint), "--json"])
    card = json.loads(capsys.readouterr().out)
    assert card == describe(checkpoint)
    assert card["units"] == {"energy": None, "length": None}


def test_info_repeats_golden_numbers_on_request(tmp_path: Path, capsys) -> None:
    path = tmp_path / "model.safetensors"
    save_model(tiny_model("tensornet"), path)
    main(["info", str(path), "--check"])
    assert "golden numbers repeated; largest relative deviation" in capsys.readouterr().out


def test_info_shows_every_member_of_an_ensemble(tmp_path: Path, capsys) -> None:
    save_model(Ensemble([tiny_model("tensornet", seed=seed) for seed in range(2)]), tmp_path / "two.zip")
    main(["info", str(tmp_path / "two.zip"), "--check"])
    printed = capsys.readouterr().out
    assert "member 1 of 2" in printed
    assert "member 2 of 2" in printed
    assert "golden numbers repeated" in printed


def test_info_names_the_old_tensor_layout(capsys) -> None:
    main(["info", str(shared("interop/tn_old_layout/model.ckpt"))])
    assert "of releases before 3.0; brought up to date on loading" in capsys.readouterr().out


def test_conversion_keeps_every_number_and_states_what_is_told(checkpoint, tmp_path: Path, capsys) -> None:
    native = tmp_path / "new.safetensors"
    words = ["--units", "kcal/mol/A", "--elements", "H,C,N,O", "--level-of-theory", "PBE", "--citation", "doi:1"]
    main(["convert", str(checkpoint), str(native), *words])
    assert "agree with the old file to 0e+00" in capsys.readouterr().out
    assert torch.equal(energy_of(native), energy_of(checkpoint))
    card = describe(native)
    assert card["units"] == {"energy": "kcal/mol", "length": "Å"}
    assert card["elements"] == ["H", "C", "N", "O"]
    assert (card["level_of_theory"], card["citation"]) == ("PBE", "doi:1")

    main(["convert", str(native), str(tmp_path / "back.ckpt")])
    assert torch.equal(energy_of(tmp_path / "back.ckpt"), energy_of(checkpoint))
    assert describe(tmp_path / "back.ckpt")["units"]["energy"] == "kcal/mol"


@pytest.mark.filterwarnings("ignore:The file is in the tensor layout")
@pytest.mark.parametrize("case", ["tn_old_layout", "tn2_old_nqe", "tn_delta", "tn_priors", "tn_so3_f64", "tn2_coul"])
def test_old_files_are_migrated_for_good(case: str, tmp_path: Path, capsys) -> None:
    old = shared(f"interop/{case}/model.ckpt")
    main(["convert", str(old), str(tmp_path / "new.safetensors")])
    assert "agree with the old file" in capsys.readouterr().out
    options = {"precision": 64}
    assert torch.equal(energy_of(tmp_path / "new.safetensors", **options), energy_of(old, **options))


def test_several_files_become_an_ensemble(tmp_path: Path, capsys) -> None:
    files = [tmp_path / f"{seed}.ckpt" for seed in range(3)]
    for seed, path in enumerate(files):
        save_model(tiny_model("tensornet", seed=seed), path)
    main(["convert", *map(str, files), str(tmp_path / "all.zip")])
    mean = torch.stack([energy_of(path) for path in files]).mean(dim=0)
    torch.testing.assert_close(energy_of(tmp_path / "all.zip"), mean, rtol=1e-12, atol=1e-12)


def test_files_of_release_2_6_2_are_converted_on_request(tmp_path: Path, capsys) -> None:
    old = shared("interop/tn_old_unmarked/model.ckpt")
    main(["convert", str(old), str(tmp_path / "new.safetensors"), "--compatibility-load"])
    expected = energy_of(old, compatibility_load=True, precision=64)
    assert torch.equal(energy_of(tmp_path / "new.safetensors", precision=64), expected)


def test_existing_files_are_kept_unless_told(checkpoint, tmp_path: Path, capsys) -> None:
    (tmp_path / "there.safetensors").write_text("mine")
    status, message = refused(capsys, "convert", checkpoint, tmp_path / "there.safetensors")
    assert status == 2
    assert "exists. Pass --overwrite" in message
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    main(["convert", str(checkpoint), str(tmp_path / "there.safetensors"), "--overwrite"])
    assert torch.equal(energy_of(tmp_path / "there.safetensors"), energy_of(checkpoint))


def test_a_file_does_not_replace_the_one_it_is_made_of(checkpoint, capsys) -> None:
    before = Path(checkpoint).read_bytes()
    status, message = refused(capsys, "convert", checkpoint, checkpoint, "--overwrite")
    assert status == 2
    assert "is the file that is read" in message
    assert Path(checkpoint).read_bytes() == before


def test_a_conversion_that_would_change_numbers_is_not_left_there(
    checkpoint, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("torchmdnet.scripts.convert._deviation", lambda old, new: 1e-3)
    status, message = refused(capsys, "convert", checkpoint, tmp_path / "new.safetensors")
    assert status == 1
    assert "was not written: it would deviate" in message
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize("command", ["info", "convert"])
def test_what_cannot_be_read_is_said_in_one_line(command: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "text.ckpt").write_text("no model")
    more = [tmp_path / "new.safetensors"] if command == "convert" else []
    assert "is not a model file" in refused(capsys, command, tmp_path / "text.ckpt", *more)[1]
    status, message = refused(capsys, command, tmp_path / "nowhere.ckpt", *more)
    assert status == 1
    assert "nowhere.ckpt" in message


def test_a_folder_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder '.*nowhere'"):
        convert("old.ckpt", tmp_path / "nowhere" / "x.safetensors")
    assert not (tmp_path / "nowhere").exists()


def test_the_file_that_was_asked_for_is_named_when_it_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    def refuse(model, path, **options):
        raise ConfigError(f"{path} cannot be written: {Path(path).name} is for ensembles.")

    monkeypatch.setattr("torchmdnet.checkpoint.load_model", lambda *_, **__: None)
    monkeypatch.setattr("torchmdnet.checkpoint.save_model", refuse)
    with pytest.raises(ConfigError) as caught:
        convert("old.ckpt", tmp_path / "x.zip")
    assert str(caught.value) == f"{tmp_path / 'x.zip'} cannot be written: x.zip is for ensembles."


@pytest.mark.parametrize("name", ["p.safetensors", "p.ckpt"])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_full_disk_is_told_of_the_file_that_was_asked_for(
    checkpoint, name: str, is_there: bool, tmp_path: Path, monkeypatch, capsys
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / name
    if is_there:
        target.write_text("earlier")
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(torch, "save", full)
    status, message = refused(capsys, "convert", checkpoint, target, "--overwrite")
    assert status == 1
    left = "The file that was there is unchanged." if is_there else "Nothing is left of it."
    assert message == f"error: {target} could not be written: No space left on device. {left}"
    assert {path.name for path in tmp_path.iterdir()} == {"old.ckpt", *([name] * is_there)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--units", "parsec"], "units: 'parsec' is not known"),
        (["--elements", "H,Xx"], "--elements: Xx is not known"),
    ],
)
def test_statements_that_are_not_known_are_refused(checkpoint, tmp_path: Path, words, message: str, capsys) -> None:
    status, found = refused(capsys, "convert", checkpoint, tmp_path / "new.safetensors", *words)
    assert status == 2
    assert message in found
