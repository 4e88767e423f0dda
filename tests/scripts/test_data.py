"""``torchmd-net data`` says what it found, in words or JSON, and ends with a status that scripts can use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.io import read, write

from torchmdnet.scripts.data import get_parser
from torchmdnet.scripts.main import main


@pytest.fixture
def clusters(tmp_path: Path) -> Path:
    """Rattled copper tetrahedra with EMT labels."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(40):
        atoms = Atoms("Cu4", [[0, 0, 0], [1.7, 1.7, 0], [1.7, 0, 1.7], [0, 1.7, 1.7]])
        atoms.rattle(0.1, rng=rng)
        atoms.calc = EMT()
        atoms.get_forces()
        frames.append(atoms)
    write(tmp_path / "cu.extxyz", frames)
    return tmp_path / "cu.extxyz"


def run(*words: str | Path) -> int:
    """Status of the command."""
    try:
        main(["data", *map(str, words)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_clean_file_gives_status_zero_and_a_page(clusters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = clusters.with_name("page.html")
    assert run(clusters, "--strict", "--html", page) == 0
    told = capsys.readouterr().out
    assert "No errors, no warnings." in told
    assert "Cu" in told
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert 'src="http' not in text


def test_warnings_count_only_when_asked_to_and_errors_always(
    clusters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = read(clusters, ":")
    write(clusters, [*frames, frames[3]])
    assert run(clusters) == 0
    assert run(clusters, "--strict", "--quiet") == 1
    assert "duplicates" in capsys.readouterr().out
    for atoms in frames:
        atoms.calc.results["forces"] = -atoms.calc.results["forces"]
    write(clusters, frames)
    assert run(clusters) == 1
    assert "wrong sign" in " ".join(capsys.readouterr().out.split())


def test_a_cleaned_copy_is_written_and_passes(clusters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = read(clusters, ":")
    frames[7].calc.results["forces"][2, 1] = np.nan
    write(clusters, [*frames, frames[0]])
    clean = clusters.with_name("clean.extxyz")
    before = clusters.read_bytes()
    assert run(clusters, "--fix", clean) == 1
    assert "39 samples written to" in capsys.readouterr().out
    assert clusters.read_bytes() == before
    assert run(clean, "--strict") == 0
    assert run(clusters, "--fix", clean) == 2
    assert "exists" in capsys.readouterr().err


def test_json_holds_every_finding(clusters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(clusters, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == 40
    assert told["energy_over_work"]["value"] == pytest.approx(1.0, abs=0.2)  # steps of 0.1 Å
    assert {finding["severity"] for finding in told["findings"]} == {"note"}


@pytest.mark.parametrize("command", ["data", "label", "sample", "bench"])
def test_every_command_ends_with_1_for_data_and_2_for_arguments(tmp_path, capsys, command: str) -> None:
    (tmp_path / "a.xyz").write_text("1\nProperties=species:S:1:pos:R:99999999999\nH 0 0 0\n")
    words = {
        "data": ["data", "A"],
        "label": ["label", "A", "-c", "lj", "-o", str(tmp_path / "o.extxyz")],
        "sample": ["sample", "A", "-m", "rattle", "-o", str(tmp_path / "o.extxyz")],
        "bench": ["bench", "A"],
    }[command]
    for name, more, status in (("a.xyz", [], 1), ("absent.xyz", [], 1), ("a.xyz", ["--no-such-flag"], 2)):
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path / name) if word == "A" else word for word in words] + more)
        assert ended.value.code == status
    assert "Traceback" not in capsys.readouterr().err


def test_arguments_of_the_data_set_are_named_with_the_nearest(clusters: Path, capsys) -> None:
    assert run(clusters, "--dataset-arg", "energyunit=Hartree") == 2  # as torchmd-train takes it
    assert "ASE has no argument 'energyunit'. Did you mean 'energy_unit'?" in capsys.readouterr().err
    assert run(clusters, "--dataset-arg", "{energykey: x}") == 2
    told = capsys.readouterr().err
    assert "dataset_arg: ASE has no argument 'energykey'. Did you mean 'energy_key'? It takes" in told
    assert "forces_key" in told
    assert run(clusters, "--dataset-arg", "{root: x}") == 2
    assert "'root' of ASE is given twice" in capsys.readouterr().err
    assert run("--dataset", "MD17", "--dataset-arg", "{mol: aspirin}") == 2
    assert "MD17 has no argument 'mol'. Did you mean 'molecules'?" in capsys.readouterr().err


def test_arguments_that_are_given_one_after_the_other_all_count() -> None:
    words = ["a.xyz", "--dataset-arg", "energy_key=a", "--dataset-arg", "{forces_key: b}"]
    assert get_parser().parse_args(words).dataset_arg == {"energy_key": "a", "forces_key": "b"}
    assert get_parser().parse_args(words[:1]).dataset_arg == {}  # of no parser before
    assert get_parser().parse_args([*words, "--dataset-arg", "[1]"]).dataset_arg == [1]  # and refused for it


def test_what_cannot_work_is_refused(tmp_path: Path, clusters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "nothing is given" in capsys.readouterr().err
    assert run(clusters, "--dataset", "QM9") == 2
    assert run(tmp_path / "absent.extxyz") == 1  # as torchmd-net label and torchmd-train end for data
    assert "There is no file" in capsys.readouterr().err
    assert run("my.yaml") == 2
    assert run(clusters, "--html", tmp_path / "nowhere" / "page.html") == 2
