"""Every architecture trains with nothing but the defaults of the command line and leaves all the files it promises."""

import inspect
import json

import pytest
from toy_data import Toy

from torchmdnet.build import default_of, representation_arguments
from torchmdnet.calculators import TMDNETCalculator
from torchmdnet.checkpoint import describe, load_model
from torchmdnet.models import ARCHITECTURES
from torchmdnet.options import OPTIONS
from torchmdnet.scripts.train import main

RESULTS = {
    "best.ckpt", "last.ckpt", "potential.safetensors", "metrics.csv", "errors.csv", "hparams.yaml", "input.yaml",
    "splits.npz", "summary.json", "learning_curves.png", "parity.png", "report.html",
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_file_leaves_out_means_the_default_of_the_option_table(name):
    """Files leave out options that release 3 does not know where they are at their default."""
    for key, parameter in representation_arguments(ARCHITECTURES[name]).items():
        if key == "system_embedding":  # written as what "auto" came to
            continue
        if key in OPTIONS and not OPTIONS[key].established and parameter.default is not inspect.Parameter.empty:
            assert default_of(key, parameter) == OPTIONS[key].default, key


def train(folder, *flags):
    main(["--dataset", "toy_data:Toy", "--num-epochs", "1", "--log-dir", str(folder), *flags])
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == RESULTS
    return folder


def assert_all_files_load(folder, name):
    sample = Toy()[0]
    energies = []
    for file in ("potential.safetensors", "best.ckpt", "last.ckpt"):
        assert describe(folder / file)["architecture"] == name
        model = load_model(folder / file, derivative=False)
        energies.append(float(model(sample.z, sample.pos.float())[0]))
    assert energies == pytest.approx([energies[0]] * 3, rel=1e-6)
    assert TMDNETCalculator(str(folder / "potential.safetensors")) is not None
    assert json.loads((folder / "summary.json").read_text())["stopped"] == "all epochs done"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_small_models_with_all_other_settings_at_their_defaults(name, tmp_path):
    flags = ["--embedding-dimension", "8", "--num-layers", "1", "--num-rbf", "8", "--batch-size", "36"]
    assert_all_files_load(train(tmp_path / "run", "--model", name, *flags), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_but_defaults(name, tmp_path):
    assert_all_files_load(train(tmp_path / "run", "--model", name), name)
