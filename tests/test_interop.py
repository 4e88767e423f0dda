"""Checkpoints written by torchmd-net 3.1.0 give its energies and forces here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, shared

from torchmdnet.models.model import load_model

CASES = sorted(path.parent.name for path in (SHARED / "interop").glob("*/case.json"))
#: Relative to 1 + max|reference|: (energy, forces).
TOLERANCE = {64: (1e-10, 1e-10), 32: (5e-6, 3e-5)}
LOOSE_64 = (1e-7, 1e-6)  # where the reference itself rounds constants to single precision


def relative(result: torch.Tensor, reference: np.ndarray) -> float:
    assert tuple(result.shape) == reference.shape
    return float(np.abs(result.detach().numpy() - reference).max() / (1 + np.abs(reference).max()))


@pytest.mark.filterwarnings("ignore:The file is in the tensor layout")
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("precision", [64, 32])
@pytest.mark.parametrize("case", CASES or ["(absent)"])
def test_stored_numbers_are_reproduced(case: str, precision: int) -> None:
    folder = shared(f"interop/{case}")
    meta = json.loads((folder / "case.json").read_text())
    arrays = np.load(folder / "data.npz")
    files = meta.get("files", "model.ckpt")
    path: Path | list[Path] = folder / files if isinstance(files, str) else [folder / name for name in files]
    dtype = {64: torch.float64, 32: torch.float32}[precision]
    model = load_model(path, precision=precision, **meta["load_kwargs"])
    for scenario in meta["scenarios"]:

        def stored(name: str, scenario: str = scenario) -> torch.Tensor | None:
            key = f"{scenario}/{name}"
            if key not in arrays.files:
                return None
            value = torch.tensor(arrays[key])
            return value.to(dtype) if value.is_floating_point() else value

        extra = {
            key.split("/")[-1]: stored("extra/" + key.split("/")[-1])
            for key in arrays.files
            if key.startswith(f"{scenario}/extra/")
        }
        output = model(
            stored("z"), stored("pos"), stored("batch"), box=stored("box"), q=stored("q"), extra_args=extra or None
        )
        names = ("y", "f", "ystd", "fstd")[: len(output)]
        for index, (name, result) in enumerate(zip(names, output, strict=True)):
            plain = f"{scenario}/{name}{precision}"
            if plain not in arrays.files:
                continue
            exact = f"{plain}_mirror" if meta.get("so3") == "mirror" else f"{plain}_py"
            reference = arrays[exact if exact in arrays.files else plain]
            allowed = LOOSE_64 if precision == 64 and meta.get("loose64") else TOLERANCE[precision]
            assert relative(result, reference) <= allowed[index % 2], (scenario, name)


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
