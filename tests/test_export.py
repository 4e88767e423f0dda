"""Packages give the numbers of the model in a process that has never heard of this package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from daily import daily

from torchmdnet.checkpoint import save_model
from torchmdnet.errors import ConfigError
from torchmdnet.export import INPUTS, OUTPUTS, export_model
from torchmdnet.models import ARCHITECTURES
from torchmdnet.scripts.main import main
from torchmdnet.testing import Systems, cell_of_atoms, mixed_boxes, small_molecules, tiny_model

NAMES = sorted(set(ARCHITECTURES))
CUTOFF = 4.0
READER = """
import json, sys
import torch
from torch._inductor import aoti_load_package
package = aoti_load_package(sys.argv[1])
torch.save([package(*call) for call in torch.load(sys.argv[2])], sys.argv[3])
assert not any(name.startswith("torchmdnet") for name in sys.modules)
get = getattr(package, "get_metadata", None) or package.loader.get_metadata
print(json.dumps(get()))
"""


def edges(model, systems: Systems) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges in no order, and two beyond the cutoff, as in a list with a skin."""
    graph = model.representation_model.graph(systems.z, systems.pos, systems.batch, systems.box)
    generator = torch.Generator().manual_seed(1)
    kept = (graph.edge_dist > 0).nonzero()[:, 0]
    kept = kept[torch.randperm(kept.shape[0], generator=generator)]
    index, vec = graph.edge_index[:, kept], graph.edge_vec[kept]
    if systems.z.shape[0] > 2:
        far = torch.tensor([CUTOFF + 0.3, 0.0, 0.0], dtype=vec.dtype)
        index, vec = torch.cat([index, torch.tensor([[0, 1], [1, 0]])], dim=1), torch.cat([vec, far[None], -far[None]])
    return index, vec


def structures() -> list[Systems]:
    """Odd and even numbers of atoms, a single atom with images and one without, one system and several."""
    molecules = small_molecules(charges=True)
    alone = Systems(torch.tensor([7]), torch.zeros(1, 3).double(), torch.tensor([0]), None, None)
    return [molecules, molecules.system(0), cell_of_atoms(7), cell_of_atoms(1, 3.0), alone, mixed_boxes()]


def expect_same(answer, plain) -> None:
    wanted = [plain.energy[:, 0], plain.forces, plain.virial, plain.edge_gradient, plain.atomic[:, 0]]
    for number, (found, expected) in enumerate(zip(answer, wanted, strict=True)):
        if number == 3 and plain.forces.shape[0] == 1:
            continue  # among its own images the vectors of an atom vanish, where their length has no derivative
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def ask_package(path: Path, calls: list[tuple[torch.Tensor, ...]]) -> tuple[list, dict[str, str]]:
    torch.save(calls, path.with_suffix(".calls"))
    files = [str(path.with_suffix(end)) for end in (".pt2", ".calls", ".answers")]
    done = subprocess.run([sys.executable, "-c", READER, *files], capture_output=True, text=True, check=True)
    return torch.load(files[2]), json.loads(done.stdout.splitlines()[-1])


def check_package(model, path: Path, entry: str) -> dict[str, str]:
    calls, expected = [], []
    for systems in structures():
        index, vec = edges(model, systems)
        nothing = torch.zeros(systems.num_systems, dtype=vec.dtype)
        q = nothing if systems.q is None else systems.q
        i, j = index
        shifts = vec - (systems.pos[i] - systems.pos[j])
        where = (index, vec) if entry == "edges" else (systems.pos, index, shifts)
        calls.append((systems.z, *where, systems.batch, q, nothing))
        expected.append(
            model.from_edges(systems.z, index, vec, systems.batch, None, q, num_systems=systems.num_systems)
        )
    answers, card = ask_package(path, calls)
    for answer, plain in zip(answers, expected, strict=True):
        expect_same(answer, plain)
    return card


@pytest.mark.slow
def test_the_command_writes_a_package_that_other_programs_load(tmp_path: Path, capsys) -> None:
    model = tiny_model("graph-network", num_layers=1, neighbor_embedding=False)
    save_model(
        model, tmp_path / "model.ckpt", provenance={"units": {"energy": "eV", "length": "Å"}, "elements": [1, 8]}
    )
    main(["export", str(tmp_path / "model.ckpt"), str(tmp_path / "model.pt2"), "--inputs", "positions"])
    printed = capsys.readouterr()
    steps = re.findall(r"^(\d of 3): (\w+)", printed.err, re.MULTILINE)
    assert steps == [("1 of 3", "reading"), ("2 of 3", "recording"), ("3 of 3", "compiling")]
    said = printed.out
    assert all(name in said for name in (*INPUTS["positions"], *OUTPUTS, "in eV and Å", "cutoff 4.0 Å"))
    card = check_package(model, tmp_path / "model.pt2", "positions")
    assert card["cutoff"] == "4.0"
    assert card["energy_unit"] == "eV"
    assert card["length_unit"] == "Å"
    assert json.loads(card["elements"]) == [1, 8]
    assert json.loads(card["inputs"]) == INPUTS["positions"]
    assert json.loads(card["outputs"]) == OUTPUTS


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_packages_of_every_architecture_give_the_numbers_of_the_model(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    export_model(model, tmp_path / "model.pt2")
    check_package(model, tmp_path / "model.pt2", "edges")


@pytest.mark.parametrize("name", daily(["graph-network", "tensornet"], "graph-network"))
def test_what_a_package_is_made_from_gives_the_numbers_of_the_model(name: str) -> None:
    """Without the minutes a package takes: the recorded function itself, at sizes it has not seen."""
    from torchmdnet.export import recorded

    model = tiny_model(name, num_layers=1).requires_grad_(False)
    graph, _ = recorded(model, "edges")
    for systems in structures():
        index, vec = edges(model, systems)
        nothing = torch.zeros(systems.num_systems, dtype=vec.dtype)
        q = nothing if systems.q is None else systems.q
        plain = model.from_edges(systems.z, index, vec, systems.batch, None, q, num_systems=systems.num_systems)
        expect_same(graph(systems.z, index, vec, systems.batch, q, nothing), plain)


def test_parts_that_look_for_pairs_are_refused_by_name(tmp_path: Path) -> None:
    prior = {
        "ZBL": {
            "cutoff_distance": 3.0,
            "atomic_number": list(range(20)),
            "distance_scale": 1e-10,
            "energy_scale": 1e-19,
        }
    }
    model = tiny_model("graph-network", prior_model=[prior])
    with pytest.raises(ConfigError, match=r"export: ZBL needs the positions of the atoms, or pairs"):
        export_model(model, tmp_path / "model.pt2")


def test_a_name_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a package ends in \.pt2\. Name it model\.pt2"):
        export_model(tiny_model("graph-network"), tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="inputs: 'atoms' is not available"):
        export_model(tiny_model("graph-network"), tmp_path / "model.pt2", inputs="atoms")
