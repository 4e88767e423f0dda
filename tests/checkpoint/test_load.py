"""Files of every release load into the model they describe."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from torchmdnet.checkpoint import load_model
from torchmdnet.ensemble import Ensemble
from torchmdnet.errors import CheckpointError
from torchmdnet.options import OPTIONS, keys_read_by
from torchmdnet.potential import TorchMD_Net
from torchmdnet.testing import small_molecules, tiny_model
from torchmdnet.testing.tiny import TINY

SYSTEMS = small_molecules()


def save(model: TorchMD_Net, path: Path, **changes: Any) -> Path:
    """A minimal checkpoint in today's form."""
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {**TINY, "model": "tensornet", **changes}}, path)
    return path


def edit(path: Path, change) -> Path:
    content = torch.load(path, weights_only=True)
    change(content["state_dict"], content["hyper_parameters"])
    torch.save(content, path)
    return path


def energy_of(model, **kwargs) -> torch.Tensor:
    return model(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch, **kwargs)[0].detach()


def to_old_layout(state: dict, args: dict) -> None:
    layers = ["tensor_embedding.linears_scalar.1", "layers.0.linears_scalar.2", "layers.1.linears_scalar.2"]
    for name in (f"model.representation_model.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")):
        state[name] = state[name].unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[TorchMD_Net, Path]:
    model = tiny_model("tensornet")
    return model, save(model, tmp_path / "model.ckpt")


def test_saved_and_loaded_models_agree_and_are_ready_for_evaluation(saved) -> None:
    model, path = saved
    loaded = load_model(path)
    assert isinstance(loaded, TorchMD_Net)
    assert not loaded.training
    assert torch.equal(energy_of(loaded), energy_of(model))


def test_the_file_decides_the_tensor_layout_not_a_keyword(saved) -> None:
    model, path = saved
    torch.testing.assert_close(energy_of(load_model(path, check_errors=False)), energy_of(model))


def test_files_with_check_errors_are_in_the_old_layout(saved) -> None:
    model, path = saved

    def change(state: dict, args: dict) -> None:
        to_old_layout(state, args)
        args["check_errors"] = True

    edit(path, change)
    with pytest.warns(UserWarning, match="tensor layout of releases before 3.0"):
        loaded = load_model(path)
    torch.testing.assert_close(energy_of(loaded), energy_of(model))


def test_given_arguments_do_not_hide_the_layout_of_the_file(saved) -> None:
    model, path = saved

    def change(state: dict, args: dict) -> None:
        to_old_layout(state, args)
        args["check_errors"] = True

    edit(path, change)
    with pytest.warns(UserWarning, match="tensor layout of releases before 3.0"):
        loaded = load_model(path, args={**TINY, "model": "tensornet"})
    torch.testing.assert_close(energy_of(loaded), energy_of(model))


def test_files_from_before_the_box_buffer_are_in_the_old_layout(saved) -> None:
    model, path = saved

    def change(state: dict, args: dict) -> None:
        to_old_layout(state, args)
        del state["model.representation_model.distance.box"]

    edit(path, change)
    with pytest.warns(UserWarning, match="tensor layout"):
        loaded = load_model(path)
    torch.testing.assert_close(energy_of(loaded), energy_of(model))


def test_compatibility_load_overrules_the_detection(saved) -> None:
    model, path = saved
    edit(path, to_old_layout)
    torch.testing.assert_close(energy_of(load_model(path, compatibility_load=True)), energy_of(model))


def test_old_so3_files_keep_the_handedness_they_were_trained_with(tmp_path: Path) -> None:
    model = tiny_model("tensornet", equivariance_invariance_group="SO(3)", handedness="legacy")
    path = save(model, tmp_path / "so3.ckpt", equivariance_invariance_group="SO(3)")
    edit(path, to_old_layout)
    loaded = load_model(path, compatibility_load=True)
    torch.testing.assert_close(energy_of(loaded), energy_of(model))


def test_so3_handedness_mirrors_the_system() -> None:
    mirror = tiny_model("tensornet", equivariance_invariance_group="SO(3)")
    legacy = tiny_model("tensornet", equivariance_invariance_group="SO(3)", handedness="legacy")
    there, _ = legacy(SYSTEMS.z, -SYSTEMS.pos, SYSTEMS.batch)
    torch.testing.assert_close(there.detach(), energy_of(mirror))
    assert not torch.allclose(energy_of(legacy), energy_of(mirror))


def test_a_new_box_replaces_the_stored_one(tmp_path: Path) -> None:
    box = [[6.0, 0, 0], [0, 6.0, 0], [0, 0, 6.0]]
    plain = tiny_model("tensornet")
    path = save(plain, tmp_path / "nobox.ckpt")
    expected = energy_of(plain, box=torch.tensor(box, dtype=torch.float64))
    torch.testing.assert_close(energy_of(load_model(path, box_vecs=box)), expected)

    boxed = save(load_model(path, box_vecs=[[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]]), tmp_path / "box.ckpt")
    torch.testing.assert_close(energy_of(load_model(boxed, box_vecs=box)), expected)
    torch.testing.assert_close(energy_of(load_model(boxed, box_vecs=None)), energy_of(plain))


def test_stored_boxes_of_any_shape_are_kept(tmp_path: Path) -> None:
    model = tiny_model("tensornet")
    boxes = torch.eye(3, dtype=torch.float64).expand(3, 3, 3) * 7
    expected = energy_of(model, box=boxes)
    path = save(model, tmp_path / "boxes.ckpt")
    edit(path, lambda state, args: state.update({"model.representation_model.distance.box": boxes.clone()}))
    torch.testing.assert_close(energy_of(load_model(path)), expected)


def test_delta_learned_models_give_totals_on_request(tmp_path: Path) -> None:
    args = {"prior_model": [{"Atomref": {"enable": False}}], "prior_args": [{"max_z": 20, "enable": False}]}
    model = tiny_model("tensornet", **args)
    table = torch.arange(20, dtype=torch.float64)[:, None]
    model.prior_model[0].initial_atomref.copy_(table)
    model.prior_model[0].reset_parameters()
    path = save(model, tmp_path / "delta.ckpt", remove_ref_energy=True, **args)
    relative = energy_of(load_model(path))
    total = energy_of(load_model(path, remove_ref_energy=False))
    references = torch.zeros(3, 1, dtype=torch.float64).index_add(0, SYSTEMS.batch, table[SYSTEMS.z])
    torch.testing.assert_close(total - relative, references)


def test_totals_without_reference_energies_are_refused(tmp_path: Path) -> None:
    path = save(tiny_model("tensornet"), tmp_path / "m.ckpt", remove_ref_energy=True)
    with pytest.raises(CheckpointError, match="no Atomref"):
        load_model(path, remove_ref_energy=False)


def test_weights_of_another_shape_are_refused_with_their_names(saved) -> None:
    _, path = saved
    with pytest.raises(CheckpointError, match=r"do not fit .*missing: .*layers\.2"):
        load_model(path, num_layers=3)


def test_unknown_keywords_warn_with_the_nearest_name(saved) -> None:
    _, path = saved
    with pytest.warns(
        UserWarning, match=r"Unknown hyperparameter: max_num_neighbours\. Did you mean 'max_num_neighbors'"
    ):
        load_model(path, max_num_neighbours=64)


@pytest.mark.parametrize("key", sorted(keys_read_by("model") - {"model", "output_model", "prior_model", "properties"}))
def test_every_option_of_models_is_known(saved, key, recwarn) -> None:
    _, path = saved
    load_model(path, **{key: OPTIONS[key].default})
    assert not [warning for warning in recwarn if "Unknown" in str(warning.message)]


def test_options_that_change_the_physics_are_reported(saved, caplog: pytest.LogCaptureFixture) -> None:
    _, path = saved
    load_model(path, cutoff_upper=5.0, precision=32)
    assert "cutoff_upper: the model was trained with 4.0" in caplog.text
    assert "precision" not in caplog.text


def test_arguments_are_not_modified(saved) -> None:
    _, path = saved
    args = {**TINY, "model": "tensornet"}
    before = dict(args)
    load_model(path, args=args, precision=32)
    assert args == before


@pytest.mark.parametrize("form", ["list", "zip"])
def test_copies_of_one_file_make_an_ensemble_without_spread(saved, tmp_path: Path, form: str) -> None:
    model, path = saved
    files: Any = [path] * 3
    if form == "zip":
        files = tmp_path / "members.zip"
        with zipfile.ZipFile(files, "w") as archive:
            for number in range(3):
                archive.write(path, f"folder/../../member{number}.ckpt")
    ensemble = load_model(files, return_std=True)
    assert isinstance(ensemble, Ensemble)
    energy, forces, energy_std, forces_std = ensemble(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)
    torch.testing.assert_close(energy.detach(), energy_of(model))
    assert (energy_std == 0).all()
    assert (forces_std == 0).all()
    assert forces.shape == forces_std.shape == (10, 3)
    assert not (tmp_path.parent / "member0.ckpt").exists()


def test_an_empty_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(CheckpointError, match=r"no \.ckpt member"):
        load_model(tmp_path / "empty.zip")


def test_how_filters_are_evaluated_is_chosen_on_loading_not_stored(tmp_path):
    from torchmdnet.checkpoint import load_model, save_model
    from torchmdnet.testing import tiny_model

    model = tiny_model("tensornet", radial="exact")
    for name in ("model.ckpt", "model.safetensors"):
        save_model(model, tmp_path / name)
        assert load_model(tmp_path / name).representation_model.radial.mode == "auto"
        assert load_model(tmp_path / name, radial="exact").representation_model.radial.mode == "exact"
