"""Total charge and spin of a system in every architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from daily import daily

from torchmdnet.build import create_model
from torchmdnet.checkpoint import load_model, save_model
from torchmdnet.checkpoint.load import load_weights
from torchmdnet.errors import ConfigError
from torchmdnet.graph import Graph, bare_graph
from torchmdnet.models import ARCHITECTURES
from torchmdnet.models.base import set_radial_mode
from torchmdnet.nn.system_embedding import SYSTEM_EMBEDDINGS, SystemEmbedding, make_system_embedding
from torchmdnet.testing import QUICK, mixed_boxes, small_molecules, tiny_model
from torchmdnet.testing.tiny import TINY

SPIN = {"spin": True}
BOTH = {"spin": True, "charge": True}


def systems_with_spins() -> tuple[torch.Tensor, ...]:
    systems = small_molecules(charges=True)
    s = torch.arange(systems.num_systems, dtype=torch.float64) + 1
    return systems.z, systems.pos, systems.batch, None, systems.q, s


def graph(q: list[float] | None, s: list[float] | None) -> Graph:
    count = len(q or s or [0])
    empty = bare_graph(torch.zeros(0).long(), torch.zeros(0, 3).double(), torch.zeros(0).long(), num_systems=count)
    q_, s_ = (None if values is None else torch.tensor(values, dtype=torch.float64) for values in (q, s))
    return empty._replace(q=q_, s=s_)


def test_a_neutral_system_without_unpaired_electrons_gains_nothing() -> None:
    embedding = SystemEmbedding(6, ("charge", "spin"), torch.float64)
    e = embedding(graph([0.0, 1.0, 0.0], [0.0, 0.0, 2.0]))
    assert e.shape == (3, 6)
    assert not e[0].any()
    assert (e[1:] != 0).all()
    torch.testing.assert_close(embedding(graph(None, [0.0, 2.0]))[1], e[2])  # a charge that is not given is 0
    with pytest.raises(ValueError, match="s: this model was trained with the spin"):
        embedding(graph([1.0], None))


def test_unknown_kinds_are_refused() -> None:
    assert make_system_embedding("none", 4, torch.float32) is None
    with pytest.raises(ConfigError, match=r"system_embedding: 'spins' is not available. Did you mean 'spin'"):
        make_system_embedding("spins", 4, torch.float32)
    assert set(SYSTEM_EMBEDDINGS) == {"none", "charge", "spin", "charge+spin"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_option_alone_tells_states_apart(name: str) -> None:
    z, pos, batch, _, q, s = systems_with_spins()
    plain = tiny_model(name)
    assert not any("system_embedding" in key for key in plain.state_dict())
    for option, changed in (("spin", {"q": q, "s": s + 2}), ("charge", {"q": q + 1, "s": s})):
        model = tiny_model(name, **{option: True})
        assert option in model.representation_model.reads
        energy, forces = model(z, pos, batch, q=q, s=s)
        other, moved = model(z, pos, batch, **changed)
        assert ((energy - other).abs() > 1e-7).all()
        assert float((forces - moved).abs().max()) > 1e-6
    # the embedding is an addition: without charge and unpaired electrons there is the model without it
    model, neutral = tiny_model(name, **BOTH), torch.zeros_like(q)
    own = model.state_dict()
    plain.load_state_dict({key: own[key] for key in plain.state_dict()})
    torch.testing.assert_close(model(z, pos, batch, q=neutral, s=neutral), plain(z, pos, batch, q=neutral))


def test_charge_keeps_the_form_it_has_where_layers_read_it() -> None:
    for name, options, expected in (
        ("tensornet", {}, "none"),
        ("tensornet", {"num_layers": 0}, "charge"),
        ("tensornet2", {}, "none"),
        ("tensornet2", {"q_dim": 0}, "charge"),
        ("graph-network", {}, "charge"),
        ("equivariant-transformer", {}, "charge"),
    ):
        model = create_model({**TINY, "model": name, "charge": True, **options})
        assert model.hyper_parameters["system_embedding"] == expected, (name, options)
        assert "charge" in model.representation_model.reads


@pytest.mark.parametrize("check", QUICK.values(), ids=QUICK)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_contract(name: str, check) -> None:
    check(tiny_model(name, **BOTH), mixed_boxes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", daily(ARCHITECTURES, "tensornet", "graph-network"))
def test_one_operation_gives_what_the_layers_give(name: str, dtype: torch.dtype, monkeypatch) -> None:
    z, pos, batch, box, q, s = (None if x is None else x.to(dtype) if x.is_floating_point() else x
                                for x in systems_with_spins())  # fmt: skip
    model = tiny_model(name, **BOTH, embedding_dimension=16).to(dtype)
    tolerance = {"rtol": 1e-8, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}

    def gradients() -> list[torch.Tensor]:
        trained = copy.deepcopy(model).train()
        energy, forces = trained(z, pos, batch, box, q, s)
        (energy.square().sum() + forces.square().sum()).backward()
        return [p.grad for p in trained.representation_model.system_embedding.parameters() if p.grad is not None]

    set_radial_mode(model, "grid")
    fused, through = model(z, pos, batch, box, q, s), gradients()
    set_radial_mode(model, "exact")
    monkeypatch.setenv("TORCHMDNET_PLAIN_OPS", "1")
    plain, expected = model(z, pos, batch, box, q, s), gradients()
    torch.testing.assert_close(fused, plain, **tolerance)
    assert len(expected) == 2
    for found, wanted in zip(through, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=max(1e-6, tolerance["rtol"]), atol=10 * tolerance["atol"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_energies_can_be_differentiated_in_charge_and_spin(name: str) -> None:
    z, pos, batch, box, q, s = systems_with_spins()
    model = tiny_model(name, **BOTH, derivative=False)
    q, s = q.requires_grad_(), s.requires_grad_()
    slopes = torch.autograd.grad(model(z, pos, batch, box, q, s)[0].sum(), [q, s])
    step = 1e-5
    with torch.no_grad():
        for n, slope in enumerate(slopes):
            ends = []
            for sign in (1, -1):
                changed = [q.detach(), s.detach()]
                changed[n] = changed[n] + sign * step
                ends.append(model(z, pos, batch, box, *changed)[0][:, 0])
            torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_files_keep_it(name: str, tmp_path) -> None:
    call = systems_with_spins()
    model = tiny_model(name, **BOTH)
    given = {**model.hyper_parameters, "system_embedding": "auto"}
    for options in (None, given, {key: value for key, value in given.items() if key != "system_embedding"}):
        save_model(model, tmp_path / "model.safetensors", hyper_parameters=options)  # with golden numbers
    loaded = load_model(tmp_path / "model.safetensors", derivative=True)
    assert loaded.hyper_parameters["system_embedding"] == "charge+spin"
    torch.testing.assert_close(loaded(*call), model(*call))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_files_trained_with_spin_before_it_was_read_keep_their_numbers(name: str, tmp_path, caplog) -> None:
    call = systems_with_spins()
    old = tiny_model(name)
    hyper_parameters = {**TINY, "model": name, "spin": True}
    state = {f"model.{key}": value for key, value in old.state_dict().items()}
    torch.save({"hyper_parameters": hyper_parameters, "state_dict": state}, tmp_path / "old.ckpt")
    loaded = load_model(tmp_path / "old.ckpt")
    assert "the spin has no effect" in caplog.text
    assert set(loaded.state_dict()) == set(old.state_dict())
    torch.testing.assert_close(loaded(*call), old(*call))
    if name == "tensornet":  # and can be the start of one that reads it
        model = create_model({**hyper_parameters, "charge": True})
        load_weights(model, tmp_path / "old.ckpt")
        neutral = (*call[:4], 0 * call[4], 0 * call[5])
        torch.testing.assert_close(model.eval()(*neutral), old(*neutral))


def test_two_states_of_one_molecule_are_learnt_apart() -> None:
    """Four arrangements of three atoms, each as singlet and as triplet with an energy of its own."""
    torch.manual_seed(0)
    z = torch.tensor([6, 1, 1]).repeat(8)
    batch = torch.arange(8).repeat_interleave(3)
    base = torch.tensor([[0.0, 0.0, 0.0], [0.9, 0.6, 0.0], [-0.9, 0.6, 0.0]], dtype=torch.float64)
    pos = (base + 0.1 * torch.randn(4, 3, 3, dtype=torch.float64)).repeat_interleave(2, dim=0).reshape(-1, 3)
    s = torch.tensor([0.0, 2.0], dtype=torch.float64).repeat(4)
    angle = pos.view(8, 3, 3)[:, 1:].prod(dim=1).sum(dim=1)
    target = (1 + s / 2) * angle + s
    errors = {}
    for spin in (False, True):
        torch.manual_seed(1)
        model = create_model({**TINY, "model": "tensornet", "num_layers": 1, "spin": spin, "derivative": False})
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(80):
            optimizer.zero_grad()
            loss = (model(z, pos, batch, s=s)[0][:, 0] - target).square().mean()
            loss.backward()
            optimizer.step()
        errors[spin] = float(loss.detach().sqrt())
    assert errors[True] < 0.4, errors
    assert errors[False] > 0.7, errors  # about half the difference between the states
