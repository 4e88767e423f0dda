"""Evaluations of small systems that are repeated give what evaluations give that are not."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from torchmdnet.models import taped
from torchmdnet.potential import TorchMD_Net
from torchmdnet.tape import replay
from torchmdnet.tape.replay import Recording
from torchmdnet.testing import cell_of_atoms, small_molecules, tiny_model

ARCHITECTURES = ["tensornet", "tensornet2", "graph-network", "transformer", "equivariant-transformer"]
WIDE = {"embedding_dimension": 16, "num_heads": 2}
Z = torch.tensor([6, 6, 8, 1, 1, 1, 1, 1, 1])
POS = torch.tensor(
    [
        [-0.75, 0.0, 0.1],
        [0.75, 0.0, 0.0],
        [1.3, 1.3, 0.1],
        [-1.1, 1.0, 0.2],
        [-1.1, -0.6, 0.9],
        [-1.1, -0.6, -0.9],
        [1.1, -0.6, 0.9],
        [1.1, -0.6, -0.9],
        [2.2, 1.3, 0.0],
    ],
    dtype=torch.float64,
)


@pytest.fixture
def repeats(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each evaluation that was repeated."""
    found: list[int] = []
    fill = replay._fill
    monkeypatch.setattr(replay, "_fill", lambda *args: found.append(1) or fill(*args))
    return found


def moved(step: int) -> torch.Tensor:
    return POS + 0.02 * torch.randn(POS.shape, generator=torch.Generator().manual_seed(step), dtype=POS.dtype)


def unrepeated(model: TorchMD_Net, monkeypatch: pytest.MonkeyPatch, *inputs, **options):
    with monkeypatch.context() as patch:
        patch.setattr(taped, "SMALL", -1)
        return model(*inputs, **options)


@pytest.mark.parametrize("precision", [32, 64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_repeated_evaluations_are_equal_to_the_last_bit(name: str, precision: int, repeats, monkeypatch) -> None:
    model = tiny_model(name, **WIDE, precision=precision)
    for step in range(8):
        pos = moved(step).to(model.dtype)
        energy, forces = model(Z, pos)
        expected = unrepeated(model, monkeypatch, Z, pos)
        assert torch.equal(energy, expected.energy)
        assert torch.equal(forces, expected.forces)
    assert len(repeats) == 6


@pytest.mark.parametrize("options", [{"activation": "tanh"}, {"embedding_dimension": 12}, {"num_layers": 0}])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_so_are_those_of_steps_that_are_called_again(name: str, options: dict, repeats, monkeypatch) -> None:
    model = tiny_model(name, **{**WIDE, "num_heads": 1, **options})
    for step in range(4):
        found, expected = model(Z, moved(step)), unrepeated(model, monkeypatch, Z, moved(step))
        assert torch.equal(found.energy, expected.energy)
        assert torch.equal(found.forces, expected.forces)


@pytest.mark.parametrize("systems", [small_molecules(charges=True), cell_of_atoms()], ids=["molecules", "cell"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batches_cells_and_stress(name: str, systems, repeats, monkeypatch) -> None:
    model = tiny_model(name, **WIDE)
    z, pos, batch, box, q = systems
    q = q if "charge" in model.representation_model.reads else None
    options = {"stress": True} if box is not None else {}
    for _ in range(4):
        found = model(z, pos, batch, box, q, **options)
        expected = unrepeated(model, monkeypatch, z, pos, batch, box, q, **options)
        assert torch.equal(found.energy, expected.energy)
        assert torch.equal(found.forces, expected.forces)
    assert len(repeats) == 2


def test_edges_that_come_and_go(repeats, monkeypatch) -> None:
    model = tiny_model("tensornet", **WIDE)
    for step in range(40):
        pos = POS * (1.0 + 0.15 * torch.sin(torch.tensor(0.4 * (step // 3))))
        assert torch.equal(model(Z, pos).forces, unrepeated(model, monkeypatch, Z, pos).forces)
    assert repeats


def test_other_atoms_or_charges_are_noticed(repeats, monkeypatch) -> None:
    model = tiny_model("tensornet", **WIDE)
    for charge in (0.0, 1.0, 1.0, 1.0, -1.0, -1.0):
        for z in (Z, Z.flip(0)):
            q = torch.tensor([charge], dtype=torch.float64)
            found = model(z, POS, q=q)
            assert torch.equal(found.energy, unrepeated(model, monkeypatch, z, POS, q=q).energy)


def test_results_are_not_written_over() -> None:
    model = tiny_model("equivariant-transformer", **WIDE)
    found = [model(Z, moved(step)) for step in range(5)]
    kept = [(energy.clone(), forces.clone()) for energy, forces in found]
    model(Z, moved(5))
    for (energy, forces), (before, then) in zip(found, kept, strict=True):
        assert torch.equal(energy, before)
        assert torch.equal(forces, then)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_changed_weights_and_modules_are_noticed(name: str, repeats, monkeypatch) -> None:
    model = tiny_model(name, **WIDE)
    network = model.representation_model
    for _ in range(3):
        model(Z, POS)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
            assert torch.equal(model(Z, POS).energy, unrepeated(model, monkeypatch, Z, POS).energy)
    for _ in range(2):
        model(Z, POS)
    before = model(Z, POS).energy
    for owner in [*network.modules()]:
        for child, module in owner.named_children():
            if type(module) is nn.Linear:
                setattr(
                    owner, child, nn.Linear(module.in_features, module.out_features, module.bias is not None).double()
                )
    after = model(Z, POS).energy
    assert not torch.equal(after, before)
    assert torch.equal(after, unrepeated(model, monkeypatch, Z, POS).energy)


def test_hooks_are_called_each_time(repeats) -> None:
    model, heard = tiny_model("tensornet", **WIDE), []
    for _ in range(3):
        model(Z, POS)
    handle = model.representation_model.linear.register_forward_hook(lambda *_: heard.append(1))
    number = len(repeats)
    for _ in range(3):
        model(Z, POS)
    assert len(heard) == 3
    assert len(repeats) == number
    handle.remove()
    for _ in range(3):
        model(Z, POS)
    assert len(heard) == 3
    assert len(repeats) > number


def test_few_recordings_are_kept_and_only_of_small_systems(monkeypatch) -> None:
    made = []
    init = Recording.__init__
    monkeypatch.setattr(Recording, "__init__", lambda *args: made.append(1) or init(*args))
    model = tiny_model("graph-network", **WIDE)
    for number in range(3, 9):
        for _ in range(3):
            model(Z[:number], POS[:number])
    kept = model.representation_model._recordings
    assert len(made) == 6
    assert len(kept._free) == replay.MOST
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.representation_model._recordings._free
    model.train()
    model.eval()
    assert not model.representation_model._recordings._free
    monkeypatch.setattr(taped, "SMALL", 16)
    for _ in range(3):
        model(Z, POS)
    assert len(made) == 6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_threads_share_a_model(name: str) -> None:
    model = tiny_model(name, **WIDE)
    expected = [model(Z, moved(step)) for step in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda step: model(Z, moved(step % 4)), range(60))]
    for step, (energy, forces) in enumerate(found):
        assert torch.equal(energy, expected[step % 4].energy)
        assert torch.equal(forces, expected[step % 4].forces)


def test_an_evaluation_that_fails_half_way_leaves_nothing_behind(monkeypatch) -> None:
    model = tiny_model("tensornet", **WIDE)
    for _ in range(2):
        model(Z, POS)
    expected = model(Z, POS)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.output_model), "value_and_slope", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(Z, POS)
    for _ in range(3):
        assert torch.equal(model(Z, POS).forces, expected.forces)


def test_a_program_of_somebody_else_is_repeated_only_where_it_says_so(repeats, monkeypatch) -> None:
    """It may read what a recording does not follow, here the height of the atoms."""
    from torchmdnet.models.torchmd_gn import TorchMD_GN
    from torchmdnet.tape.steps import Add, Plain

    class Heights(TorchMD_GN):
        def program(self, tape, graph):
            features = super().program(tape, graph)
            height = tape(Plain(lambda: graph.pos[:, 2:].expand(-1, self.hidden_channels).clone()))
            return features._replace(x=tape(Add(), features.x, height))

    model = tiny_model("graph-network", **WIDE).eval()
    model.representation_model.__class__ = Heights
    energies = [model(Z, POS + shift)[0].item() for shift in (0.0, 0.0, 0.0, 0.3, 0.6)]
    assert energies[0] == energies[1] == energies[2]
    assert len({round(energy, 9) for energy in energies}) == 3
    assert repeats == []
    assert not model.representation_model._can_be_repeated
