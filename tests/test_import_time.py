"""Heavy libraries load on first use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

HEAVY = ("torch", "lightning", "torch_geometric", "ase", "matplotlib", "numba", "h5py", "scipy", "vesin")


def loaded_after(code: str) -> set[str]:
    """The heavy libraries that a fresh interpreter has loaded after running ``code``."""
    code = f"import sys\n{code}\nprint('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert end.returncode == 0, end.stderr
    return set(end.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("module", ["torchmdnet", "torchmdnet.models", "torchmdnet.datasets", "torchmdnet.priors",
                                    "torchmdnet.heads", "torchmdnet.training", "torchmdnet.losses",
                                    "torchmdnet.config", "torchmdnet.config.settings", "torchmdnet.scripts.train",
                                    "torchmdnet.utils"])  # fmt: skip
def test_importing_loads_nothing_heavy(module):
    assert loaded_after(f"import {module}") == set()


def test_help_loads_nothing_heavy_nor_the_checks():
    code = (
        "from torchmdnet.scripts.train import main\n"
        "main(['--help'])\n"
        "assert not {'pydantic', 'yaml', 'numpy'} & sys.modules.keys(), 'too much for --help'"
    )
    assert loaded_after(code) == set()


def test_usage_errors_load_nothing_heavy():
    code = (
        "from torchmdnet.scripts.train import main\n"
        "try:\n    main(['--dataset', 'QM9', '--lr', 'fast'])\n"
        "except SystemExit as end:\n    assert end.code == 2"
    )
    assert loaded_after(code) == set()


def test_public_names_load_on_first_use():
    code = (
        "import torchmdnet\n"
        "assert {'load_model', '__version__'} <= set(dir(torchmdnet))\n"
        "assert not hasattr(torchmdnet, 'load_models') and 'torch' not in sys.modules\n"
        "from torchmdnet import load_model\n"
        "from torchmdnet.models.model import load_model as established\n"
        "assert load_model is torchmdnet.load_model is established"
    )
    assert "torch" in loaded_after(code)


def test_settings_resolve_without_anything_heavy(tmp_path):
    code = (
        f"import os; os.chdir({str(tmp_path)!r})\nfrom torchmdnet.config import resolve\nresolve(['--dataset', 'QM9'])"
    )
    assert loaded_after(code) == set()
