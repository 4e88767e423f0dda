"""Calculations that cannot fit into memory are refused before they start, and no others."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from ase.build import bulk

from torchmdnet import memory
from torchmdnet.errors import NotEnoughMemory
from torchmdnet.testing import tiny_model

MODELS = ("tensornet", "tensornet2", "equivariant-transformer", "transformer", "graph-network")


def crystal(repeats: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    atoms = bulk("Si", cubic=True) * (repeats, repeats, repeats)
    numbers = torch.as_tensor(atoms.numbers, dtype=torch.long)
    return numbers, torch.as_tensor(atoms.positions), torch.as_tensor(atoms.cell.array)


@pytest.mark.parametrize("name", MODELS)
def test_the_message_names_atoms_edges_and_bytes_and_comes_before_the_search(name, monkeypatch):
    z, pos, box = crystal(11)  # 10,648 atoms
    model = tiny_model(name)
    monkeypatch.setattr(memory, "available_memory", lambda device: 1_000_000)
    monkeypatch.setattr("torchmdnet.models.base.build_graph", lambda *args, **kwargs: pytest.fail("it searched"))
    with pytest.raises(
        NotEnoughMemory, match=r"10,648 atoms with about [\d,]+ edges need at least [\d.]+ GB.*0\.001 GB"
    ):
        model(z, pos, box=box)


def test_edges_that_only_the_search_finds_count_too(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 10_000_000)
    pos = 0.02 * torch.rand(1100, 3, generator=torch.Generator().manual_seed(0)) + torch.arange(1100)[:, None] * 1e-3
    with pytest.raises(NotEnoughMemory, match=r"1,100 atoms with about 1,208,900 edges"):
        tiny_model("graph-network").representation_model.graph(torch.ones(1100, dtype=torch.long), pos)


def test_small_calculations_are_not_looked_at_and_the_check_can_be_turned_off(monkeypatch):
    sizes = {"components": 1, "channels": 64, "itemsize": 4, "device": torch.device("cpu")}
    monkeypatch.setattr(memory, "available_memory", lambda device: 0)
    memory.check_memory(9_999, 999_999, **sizes)
    with pytest.raises(NotEnoughMemory):
        memory.check_memory(10_000, 0, **sizes)
    monkeypatch.setenv("TORCHMDNET_MEMORY_CHECK", "0")
    memory.check_memory(10_000, 0, **sizes)


def test_edges_are_expected_from_the_density():
    z, pos, box = crystal(5)
    representation = tiny_model("graph-network").representation_model
    found = representation.graph(z, pos, box=box).edge_dist.shape[0]
    expected = memory.expected_edges(len(z), float(box.det()), representation.cutoff_upper)
    assert found == pytest.approx(expected, rel=0.3)


def test_a_job_with_less_memory_than_the_machine_is_told_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 400000\n")
    assert memory.available_memory() == 900_000
    assert memory.total_memory() == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert (memory.available_memory() or 0) > 3_000_000


PEAK = """
import resource, sys, torch
from test_memory import crystal
from torchmdnet import memory
from torchmdnet.testing import tiny_model

torch.set_num_threads(1)
model = tiny_model(sys.argv[1], embedding_dimension=64, precision=32)
z, pos, box = crystal(2)
model(z, pos.float(), box=box.float())  # what is made once
z, pos, box = crystal(8)
pos, box = pos.float(), box.float()
bound = []
memory.check_memory, check = lambda *args, **more: None, memory.check_memory
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
energy, forces = model(z, pos, box=box)
peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
r = model.representation_model
size = 9 if r.has_tensors else 4 if r.has_vectors else 1
edges = r.graph(z, pos, box=box).edge_dist.shape[0]
print(peak / (len(z) * memory.FEATURES * size * 64 * 4 + edges * memory.EDGE_BYTES))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_what_is_counted_is_less_than_what_is_taken(name):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, name], capture_output=True, text=True, cwd=__file__.rpartition("/")[0], check=True
    )
    assert float(done.stdout.split()[-1]) > 1.0
