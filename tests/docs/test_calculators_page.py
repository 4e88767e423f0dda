"""The parts of the page on calculators that need other programs, done where those are installed."""

from __future__ import annotations

import importlib
import runpy
import shlex
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml
from conftest import REPOSITORY
from doc_pages import DOCS, Block, Reader, blocks_of, folder_of_its_own


def program_of(block: Block) -> str:
    """The program a block of the page is for, empty for the package alone."""
    section = "".join((DOCS / "calculators.md").read_text(encoding="utf-8").splitlines(keepends=True)[: block.line])
    heading = section.rpartition("\n## ")[2].partition("\n")[0].strip().lower()
    return heading.replace("-", "_") if heading in ("torchmd", "openmm", "torch-sim") else ""


@pytest.mark.parametrize("program", ["", "torchmd", "openmm", "torch_sim"])
def test_following_the_page_with_another_program_works(program, tmp_path, monkeypatch) -> None:
    if program and find_spec(program) is None:
        pytest.skip(f"{program} is not installed")
    with folder_of_its_own(tmp_path):
        reader = Reader()
        for block in blocks_of(DOCS / "calculators.md"):
            if program_of(block) not in ("", program):
                continue
            if block.wish != "file":
                reader.follow(block)
            elif block.language == "python":
                reader.do_python(block)
            elif block.language == "bash":
                _, script, *arguments = shlex.split(block.text)
                monkeypatch.setattr(sys, "argv", [script, *arguments])
                runpy.run_path(str(REPOSITORY / script), run_name="__main__")
                assert (tmp_path / "md" / "energy.png").stat().st_size > 5000
                assert (tmp_path / "md" / "trajectory.traj").exists()
            elif block.language == "yaml":
                ask_as_torchmd_does(yaml.safe_load(block.text)["external"])


def ask_as_torchmd_does(settings: dict) -> None:
    """TorchMD repeats the embeddings for its replicas, passes on what it does not know, and a box of zeros."""
    module = importlib.import_module(settings.pop("module"))
    embeddings = torch.tensor(settings.pop("embeddings")).repeat(2, 1)
    external = module.External(settings.pop("file"), embeddings, device="cpu", **settings)
    generator = torch.Generator().manual_seed(0)
    energy, forces = external.calculate(2 * torch.randn(2, 9, 3, generator=generator), torch.zeros(2, 3, 3))
    assert [float(e) for e in energy] == energy.flatten().tolist()
    assert torch.isfinite(forces).all()
