"""SO(3) models of old files keep their handedness through further training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchmdnet.checkpoint import load_model
from torchmdnet.checkpoint.load import load_weights
from torchmdnet.testing import small_molecules, tiny_model
from torchmdnet.testing.tiny import TINY
from torchmdnet.training.lightning import LNNP

SYSTEMS = small_molecules()
SO3 = {**TINY, "model": "tensornet", "equivariance_invariance_group": "SO(3)"}


def energy_of(model) -> torch.Tensor:
    return model(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)[0].detach()


@pytest.fixture
def old_file(tmp_path: Path) -> tuple[torch.Tensor, Path]:
    """A file in the layout before 3.0, and the energies its model was trained to give."""
    model = tiny_model("tensornet", equivariance_invariance_group="SO(3)", handedness="legacy")
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    layers = ["tensor_embedding.linears_scalar.1", "layers.0.linears_scalar.2", "layers.1.linears_scalar.2"]
    for name in (f"model.representation_model.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")):
        state[name] = state[name].unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": {**SO3, "check_errors": True}}, path)
    return energy_of(model), path


def saved_again(module: LNNP, path: Path) -> Path:
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, path)
    return path


@pytest.mark.filterwarnings("ignore:The file is in the tensor layout")
def test_a_module_started_from_an_old_model_saves_what_it_is(old_file, tmp_path: Path) -> None:
    expected, path = old_file
    module = LNNP({**SO3, "load_model": str(path)})
    torch.testing.assert_close(energy_of(load_model(saved_again(module, tmp_path / "new.ckpt"))), expected)


@pytest.mark.filterwarnings("ignore:The file is in the tensor layout")
def test_weights_of_an_old_model_bring_their_handedness(old_file, tmp_path: Path) -> None:
    expected, path = old_file
    module = LNNP(SO3)
    load_weights(module.model, path)
    module.note_handedness()
    torch.testing.assert_close(energy_of(module.model.eval()), expected)
    torch.testing.assert_close(energy_of(load_model(saved_again(module, tmp_path / "new.ckpt"))), expected)
