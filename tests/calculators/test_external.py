"""External answers for batches of positions, as TorchMD and others bring them."""

from __future__ import annotations

import json
import logging
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from checkpoint_files import write_checkpoint
from conftest import shared
from torch import nn

from torchmdnet.calculators import External
from torchmdnet.errors import ConfigError
from torchmdnet.testing import cell_of_atoms, tiny_model

WATER = [8, 1, 1]
POS = torch.tensor([[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]], dtype=torch.float64)


def replicas_of_water(number: int, seed: int = 1) -> torch.Tensor:
    """Differently distorted copies, (R, 3, 3) float64."""
    generator = torch.Generator().manual_seed(seed)
    return POS + 0.1 * torch.randn(number, 3, 3, generator=generator, dtype=torch.float64)


@pytest.fixture
def model():
    return tiny_model("tensornet")


@pytest.fixture
def water(model) -> External:
    return External(model, WATER, dtype=torch.float64)


@pytest.mark.parametrize(("case", "dtype"), [("tn_o3", "float64"), ("tn_old_layout", torch.float32)])
@pytest.mark.filterwarnings("ignore:The file is in the tensor layout")
def test_energies_and_forces_of_stored_models_are_reproduced(case, dtype) -> None:
    tolerance = 1e-7 if dtype == "float64" else 3e-5
    folder = shared(f"interop/{case}")
    arrays = np.load(folder / "data.npz")
    model = External(folder / "model.ckpt", [1], dtype=dtype, q=0).model
    for scenario in json.loads((folder / "case.json").read_text())["scenarios"]:
        z, pos, batch = (arrays[f"{scenario}/{name}"] for name in ("z", "pos", "batch"))
        boxes = arrays.get(f"{scenario}/box")
        charges = arrays.get(f"{scenario}/q")
        for system in range(batch.max() + 1):
            members = batch == system
            energy, forces = External(model, z[members], dtype=dtype).calculate(
                pos[members],
                boxes if boxes is None or boxes.ndim == 2 else boxes[system],
                q=None if charges is None else float(charges[system]),
            )
            expected, expected_forces = arrays[f"{scenario}/y64"][system], arrays[f"{scenario}/f64"][members]
            assert energy.shape == (1, 1)
            assert forces.shape == (1, members.sum(), 3)
            np.testing.assert_allclose(energy[0].double(), expected, rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(forces[0].double(), expected_forces, rtol=tolerance, atol=10 * tolerance)


def test_replicas_with_boxes_of_their_own_equal_single_calls(model) -> None:
    pos = replicas_of_water(4)
    boxes = torch.stack([3.0 * torch.eye(3), 9.0 * torch.eye(3), torch.zeros(3, 3), 2.9 * torch.eye(3)]).double()
    boxes[3] += 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    energy, forces = External(model, [WATER] * 4, dtype="float64").calculate(pos, boxes)
    assert energy.shape == (4, 1)
    assert forces.shape == (4, 3, 3)
    alone = External(model, WATER, dtype="float64")
    for replica in range(4):
        one_energy, one_forces = alone.calculate(pos[replica], boxes[replica])
        torch.testing.assert_close(one_energy[0], energy[replica], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one_forces[0], forces[replica], rtol=1e-10, atol=1e-12)
    assert energy.unique().numel() == 4


def test_one_box_is_shared_by_all_replicas(model) -> None:
    pos, box = replicas_of_water(2), 3.5 * torch.eye(3)
    external = External(model, [WATER] * 2, dtype="float64")
    shared_energy, _ = external.calculate(pos, box)
    own_energy, _ = external.calculate(pos, box.expand(2, 3, 3))
    assert torch.equal(shared_energy, own_energy)
    assert not torch.equal(shared_energy, external.calculate(pos)[0])


@pytest.mark.parametrize("shape", [(3, 3), (1, 3, 3)])
def test_a_box_of_zeros_is_no_box(water, shape) -> None:
    energy, forces = water.calculate(POS, torch.zeros(shape))
    free_energy, free_forces = water.calculate(POS, None)
    assert torch.equal(energy, free_energy)
    assert torch.equal(forces, free_forces)


def test_a_turned_cell_has_the_same_energy(model) -> None:
    crystal = cell_of_atoms()
    external = External(model, crystal.z, dtype="float64")
    turn = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert crystal.box is not None
    energy, forces = external.calculate(crystal.pos, crystal.box)
    turned_energy, turned_forces = external.calculate(crystal.pos @ turn, crystal.box @ turn)
    torch.testing.assert_close(turned_energy, energy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(turned_forces[0], forces[0] @ turn, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "embeddings", [WATER, [WATER], torch.tensor(WATER), torch.tensor([WATER]), np.array(WATER), [np.array(WATER)]]
)
def test_embeddings_may_be_flat_or_lists(model, embeddings) -> None:
    external = External(model, embeddings, dtype="float64")
    assert external.embeddings.tolist() == WATER
    assert external.batch.tolist() == [0, 0, 0]
    assert external.n_atoms == 3
    assert external.calculate(POS)[0].shape == (1, 1)


@pytest.mark.parametrize("shape", [(3, 3), (1, 3, 3), (9,)])
def test_positions_may_have_any_shape_with_enough_numbers(water, shape) -> None:
    assert torch.equal(water.calculate(POS.reshape(shape))[0], water.calculate(POS)[0])


def test_the_callers_tensors_stay_as_they_are(water) -> None:
    pos = POS.clone().requires_grad_()
    box = (5 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    plain = POS.clone()
    for given in (pos, plain):
        energy, forces = water.calculate(given, box)
        assert not energy.requires_grad
        assert not forces.requires_grad
    assert pos.requires_grad
    assert pos.grad is None
    assert not plain.requires_grad
    assert torch.equal(plain, POS)


def test_results_are_not_overwritten_by_the_next_call(water) -> None:
    energy, forces = water.calculate(POS)
    kept = energy.clone(), forces.clone()
    water.calculate(POS + torch.tensor([0.3, 0, 0]) * POS)
    assert torch.equal(energy, kept[0])
    assert torch.equal(forces, kept[1])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_forces_come_out_where_gradients_are_switched_off(water, context) -> None:
    _, expected = water.calculate(POS)
    with context():
        _, forces = water.calculate(POS.clone(), 20 * torch.eye(3))
    torch.testing.assert_close(forces.clone(), expected, rtol=1e-10, atol=1e-12)


def test_a_model_without_derivative_is_differentiated(water) -> None:
    external = External(tiny_model("tensornet", derivative=False), WATER, dtype="float64")
    for one, other in zip(external.calculate(POS), water.calculate(POS), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Springs(nn.Module):
    """A harmonic energy around the origin; forces are its own, only an energy, or neither."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, z, pos, batch, box=None):
        energy = pos.new_zeros(int(batch.max()) + 1, 1).index_add(0, batch, pos.square().sum(dim=1, keepdim=True))
        if self.kind == "direct":
            return energy.detach(), torch.ones_like(pos)
        return energy if self.kind == "energy" else energy.detach()


def test_forces_a_module_returns_are_believed() -> None:
    _, forces = External(Springs("direct"), WATER).calculate(POS)
    assert torch.equal(forces, torch.ones(1, 3, 3))


def test_a_module_that_returns_only_energies_is_differentiated() -> None:
    energy, forces = External(Springs("energy"), [WATER] * 2, dtype="float64").calculate(torch.stack([POS, 2 * POS]))
    torch.testing.assert_close(energy, POS.square().sum() * torch.tensor([[1.0], [4.0]], dtype=torch.float64))
    torch.testing.assert_close(forces, torch.stack([-2 * POS, -4 * POS]))


def test_a_module_without_forces_in_any_form_is_refused() -> None:
    with pytest.raises(ValueError, match="Springs returns neither forces"):
        External(Springs("detached"), WATER).calculate(POS)


def test_a_model_of_something_else_than_energies_is_refused() -> None:
    class Vector(nn.Module):
        def forward(self, z, pos, batch, box=None):
            return pos.sum(dim=0, keepdim=True)

    with pytest.raises(ValueError, match=r"shape \(1, 3\) for 1 systems"):
        External(Vector(), WATER).calculate(POS)


def test_the_precision_asked_for_is_the_precision_of_the_work(model) -> None:
    single = External(model, WATER).calculate(POS)
    double = External(model, WATER, dtype="float64").calculate(POS)
    assert {x.dtype for x in single} == {torch.float32}
    assert {x.dtype for x in double} == {torch.float64}
    assert model.dtype == torch.float64  # yours is left alone
    torch.testing.assert_close(single[0].double(), double[0], rtol=1e-5, atol=1e-5)


def test_a_module_that_fits_is_used_itself(model) -> None:
    external = External(model.train(), WATER, dtype=torch.float64)
    assert external.model is model
    assert not model.training


def test_another_model_may_be_put_in_place(water) -> None:
    before = water.calculate(POS)[0]
    water.model = tiny_model("tensornet", seed=5, precision=32)
    assert next(water.model.parameters()).dtype == torch.float64
    assert not torch.equal(water.calculate(POS)[0], before)


def test_files_load_frozen_with_forces_and_options(tmp_path, model) -> None:
    path = write_checkpoint(tmp_path / "model.ckpt", derivative=False)
    external = External(str(path), WATER, dtype="float64", max_num_neighbors=50)
    assert external.model.derivative
    assert not any(parameter.requires_grad for parameter in external.model.parameters())
    for one, other in zip(external.calculate(POS), External(model, WATER, dtype="float64").calculate(POS), strict=True):
        torch.testing.assert_close(one, other)


def test_precision_is_said_through_dtype(tmp_path) -> None:
    path = write_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(ConfigError, match=r"precision: 64 contradicts dtype=torch.float32"):
        External(path, WATER, precision=64)


def test_options_for_loading_are_idle_with_a_module(model) -> None:
    with pytest.warns(UserWarning, match="box_vecs would only change how a file is loaded"):
        External(model, WATER, box_vecs=None)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"netfile": 3}, "netfile is a int"),
        ({"embeddings": [1.5, 2.0]}, r"embeddings has shape .* Pass integer atomic numbers"),
        ({"embeddings": 8}, r"embeddings has shape \(\)"),
        ({"embeddings": [[8, 1, 1], [8]]}, "embeddings has rows of different lengths"),
        ({"embeddings": [8, 92]}, r"92 \(U\)"),
        ({"dtype": "float33"}, "dtype: 'float33' is not available"),
        ({"dtype": torch.int64}, "dtype: torch.int64 is not available"),
        ({"output_transform": "eV/A -> kcal/mol"}, r"Did you mean 'eV/A -> kcal/mol/A'\?"),
        ({"units": "kcal/mole"}, "units: 'kcal/mole' is not known. Write"),
    ],
)
def test_arguments_that_cannot_work_are_named(model, kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        External(**{"netfile": model, "embeddings": WATER, **kwargs})


def test_shapes_that_do_not_fit_are_named(model) -> None:
    external = External(model, [WATER, WATER], dtype="float64")
    with pytest.raises(ValueError, match=r"pos has shape .* embeddings hold 2 replicas of 3 atoms"):
        external.calculate(POS)
    with pytest.raises(ValueError, match="box has shape"):
        external.calculate(torch.stack([POS, POS]), torch.eye(3).expand(3, 3, 3))
    with pytest.raises(ValueError, match="q holds 3 values but there are 2 replicas"):
        external.calculate(torch.stack([POS, POS]), q=[1, 2, 3])


# ------------------------------------------------------------------------------------------- charge and spin


def test_charges_are_shared_or_one_per_replica(tmp_path) -> None:
    path = write_checkpoint(tmp_path / "model.ckpt", charge=True)
    pos = POS.expand(2, 3, 3)
    two = External(path, [WATER] * 2, dtype="float64", q=[1, -1])
    energy, _ = two.calculate(pos)
    for replica, q in enumerate((1, -1)):
        one, _ = External(path, WATER, dtype="float64", q=q).calculate(POS)
        torch.testing.assert_close(one[0], energy[replica])
    assert not torch.equal(energy[0], energy[1])
    called, _ = two.calculate(pos, q=torch.tensor(1))
    torch.testing.assert_close(called, energy[:1].expand(2, 1))


def test_a_missing_charge_is_zero_with_one_notice(tmp_path, caplog) -> None:
    path = write_checkpoint(tmp_path / "model.ckpt", charge=True)
    external = External(path, WATER)
    with caplog.at_level(logging.WARNING):
        silent = external.calculate(POS)[0]
        external.calculate(POS)
    assert [record.message for record in caplog.records if record.message.startswith("q:")] == [
        "q: the model was trained with charges and none is given; 0 is assumed. Pass q=."
    ]
    assert torch.equal(silent, external.calculate(POS, q=0)[0])


def test_a_charge_the_model_never_learned_of_is_reported(tmp_path, caplog) -> None:
    external = External(write_checkpoint(tmp_path / "model.ckpt"), WATER, q=1)
    with caplog.at_level(logging.WARNING):
        external.calculate(POS)
    assert "q: the model was trained without charge" in caplog.text


def test_spin_reaches_the_model_and_is_asked_for(tmp_path) -> None:
    path = write_checkpoint(tmp_path / "model.ckpt", spin=True)
    with pytest.raises(ConfigError, match=r"trained with spin. Pass s="):
        External(path, WATER).calculate(POS)
    External(path, WATER, s=1).calculate(POS)

    class Magnet(nn.Module):
        def forward(self, z, pos, batch, box=None, s=None):
            return s[:, None] * pos.sum()

    energy, _ = External(Magnet(), [WATER] * 2, dtype="float64").calculate(POS.expand(2, 3, 3), s=[1, 3])
    torch.testing.assert_close(energy[1], 3 * energy[0])


def test_elements_the_training_never_showed_are_pointed_out(tmp_path, caplog) -> None:
    path = write_checkpoint(tmp_path / "model.ckpt", facts={"elements": [1, 6]})
    with caplog.at_level(logging.WARNING):
        External(path, WATER)
    assert "The model has never seen O: it was trained on H, C." in caplog.text


# -------------------------------------------------------------------------------------------------- units


def test_presets_and_functions_convert_the_results(water, model) -> None:
    energy, forces = water.calculate(POS)
    preset = External(model, WATER, dtype="float64", output_transform="eV/A -> kcal/mol/A").calculate(POS)
    torch.testing.assert_close(preset, (energy * 23.0609, forces * 23.0609))
    custom = External(model, WATER, dtype="float64", output_transform=lambda e, f: (e + 1, 2 * f)).calculate(POS)
    torch.testing.assert_close(custom, (energy + 1, forces * 2))


def test_the_units_in_the_file_decide_the_conversion(tmp_path, caplog) -> None:
    path = write_checkpoint(tmp_path / "model.ckpt", facts={"units": {"energy": "kJ/mol", "length": "Å"}})
    with caplog.at_level(logging.WARNING):
        plain = External(path, WATER, dtype="float64").calculate(POS)
        converted = External(path, WATER, dtype="float64", output_transform="kcal/mol/A").calculate(POS)
    assert caplog.text == ""
    torch.testing.assert_close(converted, (plain[0] / 4.184, plain[1] / 4.184))
    with pytest.raises(ConfigError, match="starts from eV/Å, but the model predicts kJ/mol/Å"):
        External(path, WATER, output_transform="eV/A -> kcal/mol/A")


def test_units_that_nobody_states_are_taken_as_ev_with_a_word(tmp_path, caplog) -> None:
    path = write_checkpoint(tmp_path / "model.ckpt")
    with caplog.at_level(logging.WARNING):
        External(path, WATER, output_transform="kcal/mol/A")
        External(path, WATER, output_transform="kcal/mol/A", units="eV")
    assert caplog.text.count("eV and Å are assumed") == 1


def test_positions_are_given_in_angstrom_whatever_the_model_measures_in(model) -> None:
    bohr = 0.529177210903
    external = External(model, WATER, dtype="float64", units="Hartree/Bohr")
    energy, forces = external.calculate(bohr * POS, 20 * torch.eye(3))
    expected, expected_forces = External(model, WATER, dtype="float64").calculate(POS)
    torch.testing.assert_close(energy, expected)
    torch.testing.assert_close(forces, expected_forces)


# --------------------------------------------------------------------------------------------- CUDA graphs


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_graphs_need_cuda(model) -> None:
    with pytest.raises(ValueError, match="use_cuda_graph=True needs CUDA"):
        External(model, WATER, use_cuda_graph=True)


def test_cuda_graphs_need_the_model_on_the_gpu(model, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="device is 'cpu'"):
        External(model, WATER, use_cuda_graph=True)


@pytest.mark.parametrize("failure", ["refuses", "answers something else"])
def test_a_model_that_cannot_be_captured_runs_plainly_and_says_so(water, caplog, monkeypatch, failure) -> None:
    def capture(function, inputs, warmup_steps):
        if failure == "refuses":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        frozen = function(*inputs)
        return Mock(side_effect=lambda *inputs: frozen)

    monkeypatch.setattr("torchmdnet.calculators.external.CudaGraph", capture)
    expected = water.calculate(POS)
    water.use_cuda_graph = True
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(water.calculate(POS), expected)
        water.calculate(POS)
    assert caplog.text.count("TorchMD_Net cannot be captured") == 1
    assert not water.use_cuda_graph


def test_a_faithful_capture_is_replayed(water, monkeypatch) -> None:
    calls = []

    def capture(function, inputs, warmup_steps):
        assert warmup_steps == 12

        def replay(*inputs):
            calls.append(inputs)
            return function(*inputs)

        return replay

    monkeypatch.setattr("torchmdnet.calculators.external.CudaGraph", capture)
    expected = water.calculate(POS)
    water.use_cuda_graph = True
    torch.testing.assert_close(water.calculate(POS), expected)
    torch.testing.assert_close(water.calculate(POS), expected)
    assert len(calls) == 3  # one of them the check


def test_files_are_loaded_with_fixed_shapes_for_cuda_graphs(tmp_path, monkeypatch) -> None:
    path = write_checkpoint(tmp_path / "model.ckpt")
    monkeypatch.setattr("torchmdnet.calculators.external.check_cuda", lambda device, option: None)
    with pytest.warns(UserWarning, match="static_shapes=True is set"):
        External(path, WATER, use_cuda_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        External(path, WATER, use_cuda_graph=True, static_shapes=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_results_on_the_gpu_equal_those_on_the_cpu(model, water) -> None:
    energy, forces = External(model, WATER, device="cuda", dtype="float64", use_cuda_graph=True).calculate(POS)
    expected, expected_forces = water.calculate(POS)
    torch.testing.assert_close(energy.cpu(), expected)
    torch.testing.assert_close(forces.cpu(), expected_forces)
