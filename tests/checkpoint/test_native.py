"""The native file gives the model back, says what it is, and is refused when it was damaged or changed."""

from __future__ import annotations

import json
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from torchmdnet.build import create_model
from torchmdnet.checkpoint import Example, describe, load_model, read_checkpoint, save_model
from torchmdnet.checkpoint.golden import default_examples
from torchmdnet.checkpoint.load import load_weights
from torchmdnet.checkpoint.native import card_digest
from torchmdnet.ensemble import Ensemble
from torchmdnet.errors import CheckpointError, ConfigError
from torchmdnet.heads import HEADS
from torchmdnet.models import ARCHITECTURES
from torchmdnet.potential import TorchMD_Net
from torchmdnet.priors.base import BasePrior
from torchmdnet.testing import cell_of_atoms, small_molecules, tiny_model

SYSTEMS = small_molecules(charges=True)
PROVENANCE = {"units": {"energy": "kcal/mol", "length": "Å"}, "elements": [1, 6, 7, 8], "level_of_theory": "PBE"}


def answers(model: TorchMD_Net, systems=SYSTEMS) -> tuple[torch.Tensor, torch.Tensor]:
    systems = systems.to(model.dtype)
    energy, forces = model(systems.z, systems.pos, systems.batch, box=systems.box, q=systems.q)
    return energy.detach(), forces.detach()


def write(path: Path, state: dict, card: dict | None, **metadata: str) -> Path:
    """A safetensors file with any card, digests as the card says."""
    stored = {} if card is None else {"torchmdnet": json.dumps(card)}
    path.write_bytes(save_tensors(state, metadata={**stored, **metadata}))
    return path


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and card of a file, without any check."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    return load_tensors(content), json.loads(header["__metadata__"]["torchmdnet"])


@pytest.fixture
def saved(tmp_path: Path) -> tuple[TorchMD_Net, Path]:
    model = tiny_model("tensornet")
    save_model(model, tmp_path / "model.safetensors", provenance=PROVENANCE)
    return model, tmp_path / "model.safetensors"


# ------------------------------------------------------------------------------------------------ what is kept


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("precision", [32, 64])
def test_every_architecture_comes_back_as_it_was(name: str, precision: int, tmp_path: Path) -> None:
    model = tiny_model(name, precision=precision, charge=True)
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert not loaded.training
    assert loaded.dtype == model.dtype
    for found, expected in zip(answers(loaded), answers(model), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("equivariant-transformer", {"output_model": "VectorOutput", "derivative": False}),
        ("equivariant-transformer", {"output_model": "DipoleMoment", "derivative": False}),
        ("graph-network", {"output_model": "ElectronicSpatialExtent", "derivative": False}),
        ("graph-network", {"atom_filter": 1, "derivative": False}),
        ("tensornet", {"equivariance_invariance_group": "SO(3)", "handedness": "legacy"}),
        ("tensornet", {"box_vecs": [[6.0, 0, 0], [0, 6.0, 0], [0, 0, 6.0]]}),
        ("tensornet", {"properties": {"dipole": None, "charges": None, "polarizability": None}}),
        ("tensornet", {"prior_model": [{"ZBL": {"cutoff_distance": 4.0, "distance_scale": 1e-10, "energy_scale": 1e-19}},  # noqa: E501
                                       {"Atomref": {"max_z": 20}}]}),
        ("tensornet", {"prior_model": {"D2": {"cutoff_distance": 5.0, "distance_scale": 1e-10,
                                              "energy_scale": 1e-19}}}),
        ("tensornet2", {"output_model": "ScalarPlusWeightedCoulomb", "q_weights": [1.0, 0.5, 0.25]}),
        ("tensornet2", {"output_model": "ScalarPlusWeightedCoulomb", "q_weights": [1.0, 0.5, 0.25],
                        "coulomb_cutoff": 8.0}),
        ("tensornet2", {"repulsion": True}),
    ],
)  # fmt: skip
def test_heads_priors_and_options_come_back(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    original = tiny_model(model, **options)
    card = save_model(original, tmp_path / "model.safetensors")
    assert card["golden"]["systems"]
    loaded = load_model(tmp_path / "model.safetensors")
    given = (SYSTEMS.z[:9], SYSTEMS.pos[:9], SYSTEMS.batch[:9])
    if options.get("properties"):
        found, expected = (m(*given, properties=True).properties for m in (loaded, original))
        assert found.keys() == expected.keys() == options["properties"].keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(loaded(*given)[0], original(*given)[0])
    assert {name: type(module) for name, module in loaded.named_modules()} == {
        name: type(module) for name, module in original.named_modules()
    }


def test_names_of_tensors_are_those_of_checkpoints_without_prefix(saved) -> None:
    model, path = saved
    state, _ = parts(path)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_the_card_is_plain_text_that_states_what_is_known(saved) -> None:
    _, path = saved
    _, card = parts(path)
    assert card["format"] == 1
    assert card["architecture"] == "tensornet"
    assert card["cutoff"] == 4.0
    assert card["elements"] == ["H", "C", "N", "O"]
    assert card["units"] == {"energy": "kcal/mol", "length": "Å"}
    assert card["level_of_theory"] == "PBE"
    assert card["hyper_parameters"]["embedding_dimension"] == 8


def test_facts_about_the_data_come_back_with_the_model(saved) -> None:
    _, path = saved
    provenance = load_model(path).provenance
    assert provenance["units"] == {"energy": "kcal/mol", "length": "Å"}
    assert provenance["elements"] == [1, 6, 7, 8]
    assert provenance["level_of_theory"] == "PBE"


def test_unknown_units_are_said_to_be_unknown(tmp_path: Path) -> None:
    card = save_model(tiny_model("tensornet"), tmp_path / "model.safetensors")
    assert card["units"] == {"energy": None, "length": None}
    assert card["elements"] is None
    assert load_model(tmp_path / "model.safetensors").provenance["units"]["energy"] is None


def test_two_writings_of_one_model_are_the_same_file(saved, tmp_path: Path) -> None:
    model, path = saved
    save_model(model, tmp_path / "again.safetensors", provenance=PROVENANCE)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_golden_numbers_are_those_of_the_model_in_double_precision(tmp_path: Path) -> None:
    model = tiny_model("tensornet", precision=32)
    card = save_model(model, tmp_path / "model.safetensors")
    (system,) = card["golden"]["systems"]
    pos = torch.tensor(system["pos"], dtype=torch.float64)
    energy, forces = model.double()(torch.tensor(system["z"]), pos)
    assert energy.tolist() == system["answers"]["energy"]
    assert forces.tolist() == system["answers"]["forces"]


def test_models_of_periodic_systems_have_a_periodic_golden_system(tmp_path: Path) -> None:
    card = save_model(
        tiny_model("tensornet", charge=True),
        tmp_path / "model.safetensors",
        provenance={**PROVENANCE, "training": {"periodic": True}},
    )
    molecule, cell = card["golden"]["systems"]
    assert "box" not in molecule
    assert np.linalg.det(cell["box"]) > 100
    assert cell["q"] == 1.0
    assert set(cell["z"]) == {1, 6, 7, 8}


def test_systems_of_ones_own_can_be_the_golden_ones(tmp_path: Path) -> None:
    cell = cell_of_atoms()
    model = tiny_model("tensornet")
    card = save_model(model, tmp_path / "m.safetensors", examples=[Example("mine", cell.z, cell.pos, cell.box)])
    (system,) = card["golden"]["systems"]
    assert system["answers"]["energy"] == model(cell.z, cell.pos, box=cell.box)[0].tolist()


def test_training_can_start_from_a_native_file(saved) -> None:
    model, path = saved
    other = tiny_model("tensornet", seed=5)
    load_weights(other, path)
    assert torch.equal(answers(other)[0], answers(model)[0])


def test_the_content_decides_the_format_not_the_name(saved, tmp_path: Path) -> None:
    model, path = saved
    renamed = tmp_path / "renamed.ckpt"
    renamed.write_bytes(path.read_bytes())
    assert torch.equal(answers(load_model(renamed))[0], answers(model)[0])


@pytest.mark.parametrize("keywords", [{"check_errors": False}, {"compatibility_load": True}, {"static_shapes": True}])
def test_retired_keywords_change_nothing(saved, keywords: dict[str, bool]) -> None:
    model, path = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_model(path, **keywords)
    assert torch.equal(answers(loaded)[0], answers(model)[0])


def test_options_can_be_changed_on_loading(saved) -> None:
    model, path = saved
    assert load_model(path, derivative=False)(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)[1].shape == (0,)
    assert load_model(path, precision=32).dtype == torch.float32
    boxed = load_model(path, box_vecs=[[6.0, 0, 0], [0, 6.0, 0], [0, 0, 6.0]])
    assert not torch.equal(answers(boxed)[0], answers(model)[0])


# ------------------------------------------------------------------------------------------------ ensembles


def test_ensembles_are_a_zip_of_native_files_or_a_list(tmp_path: Path) -> None:
    members = [tiny_model("tensornet", seed=seed) for seed in range(3)]
    ensemble = Ensemble(members, return_std=True)
    card = save_model(ensemble, tmp_path / "three.zip", provenance=PROVENANCE)
    assert len(card["members"]) == 3
    expected = ensemble(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)
    with zipfile.ZipFile(tmp_path / "three.zip") as archive:
        archive.extractall(tmp_path)
    files = sorted(tmp_path.glob("member*.safetensors"))
    save_model(Ensemble(members[1:]), tmp_path / "two.zip")
    for source in (tmp_path / "three.zip", files, [files[0], tmp_path / "two.zip"]):
        found = load_model(source, return_std=True)(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("damage", [lambda c: c[:-200], lambda c: c[:4000] + b"\x00\xff" + c[4002:]])
def test_a_damaged_ensemble_is_refused(tmp_path: Path, damage) -> None:
    path = tmp_path / "two.zip"
    save_model(Ensemble([tiny_model("tensornet", seed=seed) for seed in range(2)]), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"two\.zip .*(damaged|no zip file)"):
        load_model(path)


def test_names_say_the_format(tmp_path: Path) -> None:
    model = tiny_model("tensornet")
    with pytest.raises(ConfigError, match=r"ends in \.safetensors, \.zip .* or \.ckpt"):
        save_model(model, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=r"An ensemble is written to a \.zip"):
        save_model(Ensemble([model]), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="A single model is not"):
        save_model(model, tmp_path / "model.zip")


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("size", [0, 5, 100, 5000, -10])
def test_a_truncated_file_is_called_damaged(saved, size: int) -> None:
    _, path = saved
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as a model file.*damaged"):
        load_model(path)


def test_a_changed_weight_is_noticed(saved) -> None:
    _, path = saved
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="the tensors of the file do not have the digest"):
        load_model(path)


@pytest.mark.parametrize("change", [{"cutoff": 5.0}, {"units": {"energy": "eV", "length": "Å"}}, {"elements": ["H"]}])
def test_a_changed_card_is_noticed(saved, tmp_path: Path, change: dict[str, Any]) -> None:
    _, path = saved
    state, card = parts(path)
    with pytest.raises(CheckpointError, match="the card of the file do not have the digest"):
        load_model(write(tmp_path / "changed.safetensors", state, {**card, **change}))


def test_a_model_that_gives_other_numbers_here_is_refused(saved, tmp_path: Path) -> None:
    _, path = saved
    state, card = parts(path)
    card["hyper_parameters"]["activation"] = "tanh"  # somebody who also knew how to compute the digest
    card["sha256"]["card"] = card_digest(card)
    path = write(tmp_path / "other.safetensors", state, card)
    with pytest.raises(CheckpointError, match=r"gives other numbers here .* check=False"):
        load_model(path)
    load_model(path, check=False)


def test_files_of_other_programs_are_refused(saved, tmp_path: Path) -> None:
    state, _ = parts(saved[1])
    with pytest.raises(CheckpointError, match=r"no card of this package.*written by another program"):
        load_model(write(tmp_path / "foreign.safetensors", state, None, format="pt"))


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ("no JSON", "is no JSON"),
        ([1, 2], "does not state its format"),
        ({"format": "1"}, "does not state its format"),
        ({"format": 2, "written_by": "torchmd-net 9.1"}, "format 2, written by torchmd-net 9.1.*Update torchmd-net"),
        ({"format": 1, "architecture": "tensornet"}, "lacks hyper_parameters"),
    ],
)
def test_cards_that_cannot_be_understood_are_refused(saved, tmp_path: Path, card: Any, words: str) -> None:
    state, _ = parts(saved[1])
    path = tmp_path / "odd.safetensors"
    text = card if isinstance(card, str) else json.dumps(card)
    path.write_bytes(save_tensors(state, metadata={"torchmdnet": text}))
    with pytest.raises(CheckpointError, match=words):
        load_model(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_model(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("key", ["model", "output_model", "prior_model"])
def test_a_file_cannot_choose_what_is_called(saved, tmp_path: Path, key: str) -> None:
    trap = tmp_path / "created"
    state, card = parts(saved[1])
    card["hyper_parameters"] |= {key: "subprocess:Popen", "args": ["touch", str(trap)], "prior_args": [{}]}
    card["sha256"]["card"] = card_digest(card)
    path = write(tmp_path / "evil.safetensors", state, card)
    with pytest.raises(ConfigError, match=r"subprocess:Popen' is no subclass of torch"):
        load_model(path)
    torch.save({"state_dict": state, "hyper_parameters": card["hyper_parameters"]}, tmp_path / "evil.ckpt")
    with pytest.raises(ConfigError, match=r"subprocess:Popen' is no subclass"):
        load_model(tmp_path / "evil.ckpt")
    assert not trap.exists()


def test_no_pickle_is_read_or_written(saved, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pickle

    _, path = saved

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    load_model(path)
    describe(path)


# ------------------------------------------------------------------------------------------------ writing


def test_a_failed_writing_leaves_the_old_file(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = saved
    before = path.read_bytes()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tiny_model("tensornet", seed=1), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_model_of_unknown_options_asks_for_them(tmp_path: Path) -> None:
    model = tiny_model("tensornet")
    options, model.hyper_parameters = model.hyper_parameters, {}
    with pytest.raises(ConfigError, match="hyper_parameters: the model does not carry"):
        save_model(model, tmp_path / "model.safetensors")
    save_model(model, tmp_path / "model.safetensors", hyper_parameters=options)


def test_options_that_do_not_rebuild_the_model_are_noticed(tmp_path: Path) -> None:
    model = tiny_model("tensornet")
    for changed, words in (({"num_layers": 1}, "is in one of them only"), ({"activation": "tanh"}, "answers change")):
        with pytest.raises(CheckpointError, match=words):
            save_model(model, tmp_path / "m.safetensors", hyper_parameters={**model.hyper_parameters, **changed})
    assert not (tmp_path / "m.safetensors").exists()


class Forgetful(BasePrior):
    """A prior whose arguments are not all saved."""

    def __init__(self, strength: float = 0.0, dataset: Any = None) -> None:
        super().__init__()
        self.strength = strength

    def per_system(self, graph):
        return graph.pos.new_full((graph.num_systems, 1), self.strength)


def test_priors_that_forget_an_argument_are_noticed(tmp_path: Path) -> None:
    model = tiny_model("tensornet", prior_model={f"{__name__}:Forgetful": {"strength": 2.0}})
    with pytest.raises(CheckpointError, match="get_init_args of its priors"):
        save_model(model, tmp_path / "model.safetensors")


class Demanding(BasePrior):
    """A prior that needs what nobody can make up."""

    def per_system(self, graph):
        return graph.extra["field"].reshape(-1, 1)


def test_models_that_need_more_than_atoms_are_saved_without_golden_numbers(tmp_path: Path, caplog) -> None:
    model = tiny_model("tensornet", prior_model=f"{__name__}:Demanding")
    card = save_model(model, tmp_path / "model.safetensors")
    assert "golden" not in card
    assert "no golden numbers" in caplog.text
    z, pos = SYSTEMS.z[:3], SYSTEMS.pos[:3]
    card = save_model(
        model,
        tmp_path / "model.safetensors",
        examples=[Example("in a field", z, pos, extra={"field": torch.tensor([0.5], dtype=torch.float64)})],
    )
    assert card["golden"]["systems"][0]["extra"] == {"field": [0.5]}
    load_model(tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------------------------ what info tells


def test_a_checkpoint_is_described_with_the_same_words(saved, tmp_path: Path) -> None:
    model, path = saved
    save_model(model, tmp_path / "model.ckpt", provenance=PROVENANCE)
    native, checkpoint = describe(path), describe(tmp_path / "model.ckpt")
    assert (native["kind"], checkpoint["kind"]) == ("native", "checkpoint")
    same = ("architecture", "head", "priors", "num_parameters", "cutoff", "elements", "units", "level_of_theory")
    assert {key: native[key] for key in same} == {key: checkpoint[key] for key in same}
    assert torch.equal(answers(load_model(tmp_path / "model.ckpt"))[0], answers(model)[0])


def test_a_native_file_reads_as_a_checkpoint(saved) -> None:
    model, path = saved
    content = read_checkpoint(path)
    assert content["state_dict"].keys() == model.state_dict().keys()
    assert content["hyper_parameters"]["model"] == "tensornet"
    assert content["torchmdnet"]["units"]["energy"] == "kcal/mol"


def test_made_up_systems_keep_atoms_apart_and_inside_the_embedding() -> None:
    model = create_model({**tiny_model("tensornet").hyper_parameters, "max_z": 7})
    for example in default_examples(model, is_periodic=True):
        shifts = torch.zeros(1, 3, dtype=torch.float64)
        if example.box is not None:
            shifts = torch.cartesian_prod(*[torch.arange(-1.0, 2.0, dtype=torch.float64)] * 3) @ example.box
        vec = example.pos[:, None, None] - example.pos[None, :, None] + shifts
        dist = vec.norm(dim=-1).flatten()
        assert float(dist[dist > 1e-9].min()) > 1.0
        assert int(example.z.max()) < 7


def test_every_head_of_the_catalogue_is_a_module_so_that_files_may_name_it() -> None:
    assert all(issubclass(HEADS[name], torch.nn.Module) for name in HEADS)


def test_a_conversion_does_not_contradict_what_the_file_states(tmp_path: Path) -> None:
    from torchmdnet.scripts.convert import main

    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    facts = {"units": {"energy": "eV", "length": "Å"}, "elements": [1, 8]}
    save_model(tiny_model("tensornet"), old, provenance=facts)
    for words, text in (
        (["--units", "kcal/mol"], "--units: the file states eV, Å"),
        (["--elements", "Cl"], "--elements"),
    ):
        with pytest.raises(ConfigError, match=text):
            main([str(old), str(new), *words])
        assert not new.exists()
    main([str(old), str(new), "--units", "eV/A", "--level-of-theory", "HF"])
    assert new.exists()
