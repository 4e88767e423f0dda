"""Checkpoints written by torchmd-net 3.1.0 give its energies and forces here."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SHARED, shared

from torchmdnet.models.model import load_model


def tool() -> ModuleType:
    """The command that prints the same comparison as a table."""
    spec = importlib.util.spec_from_file_location("interop", REPOSITORY / "tools" / "interop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


interop = tool()
CASES = interop.cases_in(SHARED)


@pytest.mark.filterwarnings("ignore:The file is in the tensor layout")
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("precision", [64, 32])
@pytest.mark.parametrize("case", CASES or ["(absent)"])
def test_stored_numbers_are_reproduced(case: str, precision: int) -> None:
    found = list(interop.compare(interop.load_case(shared(f"interop/{case}")), precision))
    assert found
    assert [row for row in found if not row.agrees] == []


def test_the_command_prints_a_table_and_the_worst_deviation(capsys: pytest.CaptureFixture[str]) -> None:
    shared("interop/tn_o3")
    assert interop.main(["tn_o3", "ens_tn_zip", "--data", str(SHARED)]) == 0
    header, first, second, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["case", "architecture", *["energy", "64", "forces", "64", "energy", "32", "forces", "32"]]
    assert first.startswith("tn_o3 ")
    assert "tensornet x 3" in second
    assert last.startswith("worst relative deviation of ")
    assert last.endswith("; all within tolerance")


def test_the_command_fails_when_a_number_is_off(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    shared("interop/tn_o3")
    monkeypatch.setattr(interop, "TOLERANCE", {64: (0.0, 0.0), 32: (0.0, 0.0)})
    assert interop.main(["tn_o3", "--data", str(SHARED)]) == 1
    assert "OFF" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The file is in the tensor layout")
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("case", CASES or ["(absent)"])
def test_gradients_of_the_parameters_are_reproduced(case: str) -> None:
    folder = shared(f"interop/{case}")
    meta = json.loads((folder / "case.json").read_text())
    arrays = np.load(folder / "data.npz")
    scenarios = [name for name in meta["scenarios"] if f"{name}/grad_norms64" in arrays.files]
    if not scenarios or not isinstance(meta.get("files", ""), str) or meta.get("files", "").endswith(".zip"):
        pytest.skip("the reference stored no gradients for this case")
    so3 = {"handedness": "legacy"} if "so3" in meta else {}  # the convention the gradients were stored in
    for scenario in scenarios:
        model = load_model(folder / "model.ckpt", precision=64, **meta["load_kwargs"], **so3).train()
        values = {
            name: torch.tensor(arrays[f"{scenario}/{name}"]) if f"{scenario}/{name}" in arrays.files else None
            for name in ("z", "pos", "batch", "box", "q")
        }
        energy, forces = model(values["z"], values["pos"], values["batch"], box=values["box"], q=values["q"])
        (energy.square().sum() + forces.square().sum()).backward()
        norms = {
            name: 0.0 if parameter.grad is None else float(parameter.grad.norm())
            for name, parameter in model.named_parameters()
        }
        names = [str(name) for name in arrays[f"{scenario}/grad_names"]]
        found = np.array([norms[name.removeprefix("model.")] for name in names])
        reference = arrays[f"{scenario}/grad_norms64"]
        tolerance = 1e-5 if meta.get("loose64") else 1e-8
        np.testing.assert_allclose(found, reference, rtol=tolerance, atol=tolerance * (1 + np.abs(reference).max()))


@pytest.mark.parametrize("index", range(8))
def test_seeded_models_start_from_the_same_weights(index: int) -> None:
    from torchmdnet.models.model import create_model

    case = json.loads(shared("interop/init_fingerprints.json").read_text())[index]
    torch.manual_seed(case["seed"])
    model = create_model(case["args"])
    assert float(torch.rand(1)) == pytest.approx(case["next_rand"], abs=1e-7)
    assert [name for name, _ in model.named_parameters()] == case["parameter_names"]
    state = model.state_dict()
    assert set(state) == set(case["state"])
    for name, stored in case["state"].items():
        assert list(state[name].shape) == stored["shape"], name
        assert float(state[name].double().sum()) == pytest.approx(stored["sum"], rel=1e-5, abs=1e-5), name
