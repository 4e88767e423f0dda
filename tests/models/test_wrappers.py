"""A model that hides light atoms from its head works like any other: boxes, files and charges included."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.checkpoint import load_model
from torchmdnet.errors import DataError
from torchmdnet.models.wrappers import AtomFilter
from torchmdnet.testing import cell_of_atoms, small_molecules, tiny_model
from torchmdnet.testing.tiny import TINY


def filtered(name: str = "tensornet", **options):
    return tiny_model(name, atom_filter=1, derivative=False, **options)


@pytest.mark.parametrize("name", ["graph-network", "equivariant-transformer", "tensornet2"])
def test_the_energy_is_the_sum_over_heavy_atoms(name: str) -> None:
    model = filtered(name, repulsion=True)
    systems = small_molecules(charges=True)
    whole = tiny_model(name, derivative=False, repulsion=True)
    state = {
        key.replace("representation_model.model.", "representation_model."): v for key, v in model.state_dict().items()
    }
    whole.load_state_dict(state)
    atomic = whole.per_atom(systems.z, systems.pos, systems.batch, q=systems.q)
    expected = torch.zeros(3, 1, dtype=torch.float64)
    for n in range(len(systems.z)):
        if systems.z[n] > 1:
            expected[systems.batch[n]] += atomic[n]
    energy, forces = model(systems.z, systems.pos, systems.batch, q=systems.q)
    assert forces.numel() == 0
    torch.testing.assert_close(energy, expected, rtol=1e-12, atol=1e-12)


def test_it_knows_boxes() -> None:
    model, systems = filtered(), cell_of_atoms()
    periodic, _ = model(systems.z, systems.pos, systems.batch, box=systems.box)
    open_, _ = model(systems.z, systems.pos, systems.batch)
    assert not torch.allclose(periodic, open_)


def test_called_directly_it_keeps_heavy_atoms_with_their_rows() -> None:
    model = filtered("equivariant-transformer").representation_model
    assert isinstance(model, AtomFilter)
    systems = small_molecules()
    x, v, z, pos, batch = model(systems.z, systems.pos, systems.batch, None, None)
    kept = systems.z > 1
    assert v is not None
    assert len(x) == len(v) == len(z) == len(pos) == len(batch) == int(kept.sum())
    assert torch.equal(z, systems.z[kept])
    assert torch.equal(pos, systems.pos[kept])
    assert torch.equal(batch, systems.batch[kept])


def test_its_graph_holds_the_edges_among_heavy_atoms() -> None:
    model, systems = filtered().representation_model, small_molecules()
    features, graph = model.select(
        *(lambda g: (model.encode(g), g))(model.graph(systems.z, systems.pos, systems.batch))
    )
    i, j = graph.edge_index
    torch.testing.assert_close(graph.pos[i] - graph.pos[j], graph.edge_vec)
    assert len(features.x) == graph.num_atoms == 4
    assert graph.num_systems == 3


def test_a_system_without_heavy_atoms_is_refused_by_number() -> None:
    z = torch.tensor([6, 1, 1])
    with pytest.raises(DataError, match="atom_filter=1 leaves no atom of system 1"):
        filtered()(z, torch.rand(3, 3, dtype=torch.float64), torch.tensor([0, 0, 1]))


def test_a_saved_model_loads_again_also_into_a_box(tmp_path) -> None:
    model, systems = filtered(), cell_of_atoms()
    options = {**TINY, "model": "tensornet", "atom_filter": 1, "derivative": False}
    path = tmp_path / "filtered.ckpt"
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"hyper_parameters": options, "state_dict": state}, path)
    expected, _ = model(systems.z, systems.pos, box=systems.box)
    torch.testing.assert_close(load_model(path)(systems.z, systems.pos, box=systems.box)[0], expected)
    boxed = load_model(path, box_vecs=systems.box.tolist() if systems.box is not None else None)
    torch.testing.assert_close(boxed(systems.z, systems.pos)[0], expected)
