"""What is written here loads in torchmd-net 3.1.0 and gives the same numbers there.

``TORCHMDNET_REFERENCE_PYTHON`` names the interpreter of an environment that has it; the tests are skipped without one.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchmdnet.checkpoint import load_model, save_model
from torchmdnet.potential import TorchMD_Net
from torchmdnet.testing import cell_of_atoms, small_molecules, tiny_model
from torchmdnet.testing.tiny import TINY

REFERENCE = os.environ.get("TORCHMDNET_REFERENCE_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not REFERENCE, reason="TORCHMDNET_REFERENCE_PYTHON does not name an interpreter"),
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),
]

SCALES = {"distance_scale": 1e-10, "energy_scale": 1.602176634e-19}
#: Every architecture and head of the reference, its priors, and options that leave their mark in a file. What it cannot
#: load from its own files, LearnableAtomref and atom_filter, is not among them.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{model} {head}": (model, {"output_model": head, "derivative": head == "Scalar"})
        for model in ("tensornet", "tensornet2", "equivariant-transformer", "transformer", "graph-network")
        for head in ("Scalar", "DipoleMoment", "ElectronicSpatialExtent")
    },
    "equivariant-transformer VectorOutput": (
        "equivariant-transformer",
        {"output_model": "VectorOutput", "derivative": False},
    ),
    "tensornet2 Coulomb": (
        "tensornet2",
        {"output_model": "ScalarPlusWeightedCoulomb", "q_weights": [1.0, 0.5, 0.25]},
    ),
    "tensornet2 reaction field": (
        "tensornet2",
        {"output_model": "ScalarPlusWeightedCoulomb", "q_weights": [1.0, 0.5, 0.25], "coulomb_cutoff": 8.0},
    ),
    "tensornet2 repulsion": ("tensornet2", {"repulsion": True}),
    "tensornet SO(3)": ("tensornet", {"equivariance_invariance_group": "SO(3)"}),
    "tensornet gauss": ("tensornet", {"rbf_type": "gauss", "trainable_rbf": True, "activation": "mish"}),
    "tensornet priors": (
        "tensornet",
        {
            "prior_model": [
                {"ZBL": {"cutoff_distance": 4.0, "max_num_neighbors": 50, **SCALES}},
                {"Atomref": {"max_z": 20}},
            ]
        },
    ),
}
WAYS = ("trained", "converted")

READER = """
import logging, sys, warnings
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import numpy as np, torch
from torchmdnet.models.model import load_model
inputs = np.load(sys.argv[1])
answers = {}
for path in sys.argv[3:]:
    model = load_model(path, precision=64).eval()
    for name in ("molecules", "cell"):
        given = {key: torch.tensor(inputs[f"{name}/{key}"]) for key in ("z", "pos", "batch")}
        box = torch.tensor(inputs["cell/box"]) if name == "cell" else None
        q = torch.tensor(inputs[f"{name}/q"])
        try:
            y, f = model(given["z"], given["pos"], given["batch"], box=box, q=q)
        except ValueError:  # the Coulomb energy of all pairs takes no box
            if box is None:
                raise
            continue
        answers[f"{path}/{name}/y"], answers[f"{path}/{name}/f"] = y.detach().numpy(), f.detach().numpy()
np.savez(sys.argv[2], **answers)
"""


def written(model: TorchMD_Net, path: Path, how: str) -> Path:
    """A checkpoint as training writes it, or as a conversion does."""
    if how == "converted":
        save_model(model, path.with_suffix(".safetensors"))
        save_model(load_model(path.with_suffix(".safetensors")), path)
        return path
    from torchmdnet.training.lightning import LNNP

    module = LNNP(
        {**TINY, **model.hyper_parameters, "prior_args": [p.get_init_args() for p in model.prior_model or ()]}
    )
    module.model.load_state_dict(model.state_dict())
    content = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "pytorch-lightning_version": "2.6.0",
        "global_step": 1,
        "epoch": 0,
    }
    module.on_save_checkpoint(content)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[tuple[str, str], tuple[TorchMD_Net, dict[str, np.ndarray]]]:
    """All cases in one process of the reference, which takes seconds to start: case and way -> model, answers."""
    folder = tmp_path_factory.mktemp("files")
    molecules, cell = small_molecules(charges=True), cell_of_atoms()
    inputs = {f"molecules/{name}": getattr(molecules, name).numpy() for name in ("z", "pos", "batch", "q")}
    inputs |= {f"cell/{name}": getattr(cell, name).numpy() for name in ("z", "pos", "batch")}
    # the reference knows lattices in its own orientation alone, with cells of twice the cutoff
    inputs |= {"cell/box": np.diag([17.0, 18.0, 19.0]), "cell/q": np.array([0.0])}
    np.savez(folder / "inputs.npz", **inputs)
    models = {case: tiny_model(model, **options) for case, (model, options) in CASES.items()}
    paths = {
        (case, way): written(model, folder / f"{number}{way}.ckpt", way)
        for number, (case, model) in enumerate(models.items())
        for way in WAYS
    }
    command = [
        REFERENCE,
        "-c",
        READER,
        str(folder / "inputs.npz"),
        str(folder / "answers.npz"),
        *map(str, paths.values()),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    end = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=900)
    assert end.returncode == 0, end.stderr[-3000:]
    found = np.load(folder / "answers.npz")
    return {
        key: (
            models[key[0]],
            {name.removeprefix(f"{path}/"): found[name] for name in found.files if name.startswith(f"{path}/")}
            | {f"inputs/{name}": value for name, value in inputs.items()},
        )
        for key, path in paths.items()
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_checkpoints_load_in_the_reference_and_give_the_same_numbers(answers, case: str, way: str) -> None:
    model, found = answers[case, way]
    tolerance = 1e-6 if case.startswith("tensornet") else 1e-10  # where the reference rounds constants
    compared = 0
    for name in ("molecules", "cell"):
        if f"{name}/y" not in found:
            continue
        z, pos, batch, q = (torch.tensor(found[f"inputs/{name}/{key}"]) for key in ("z", "pos", "batch", "q"))
        box = torch.tensor(found["inputs/cell/box"]) if name == "cell" else None
        with torch.no_grad():
            ours = model(z, pos, batch, box=box, q=q)
        for key, value in zip(("y", "f"), ours, strict=True):
            theirs = found[f"{name}/{key}"]
            if theirs.size:
                np.testing.assert_allclose(
                    value.numpy(), theirs, rtol=tolerance, atol=tolerance * (1 + np.abs(theirs).max())
                )
                compared += 1
    assert compared
