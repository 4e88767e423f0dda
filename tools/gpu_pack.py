#!/usr/bin/env python3
"""Put together what :mod:`gpu_check` needs on a machine that can fetch nothing.

    python tools/gpu_pack.py gpu-pack [--python 3.12]

The folder holds ``golden.npz``, energies, forces and norms of gradients in double precision found here on the CPU, and
``wheels/`` for Linux on x86-64 with the packages in :data:`WHEELS`. Its size is printed; beyond :data:`LARGEST` the
command fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.extend(str(REPOSITORY / folder) for folder in ("tests/gates", "benchmarks"))

import gates
import numpy as np
import torch
from systems import SYSTEMS
from workloads import OPTIONS

from torchmdnet.build import create_model

__all__ = ["SYSTEMS_IN_PACK", "WHEELS", "golden_numbers", "main", "model_of", "numbers"]

#: Packages that machines made for PyTorch often lack: ours, and those that ours need.
WHEELS = (
    "ase",
    "vesin",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "shtab",
)
#: Kinds of Linux that wheels are built for; pip matches each exactly.
PLATFORMS = (*(f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17, 12)), "manylinux2014_x86_64", "linux_x86_64")
#: Bytes that the folder may have.
LARGEST = 60 * 2**20
#: What is computed beforehand, for each architecture of the benchmarks.
SYSTEMS_IN_PACK = ("32-benzenes", "192-water", "2187-water")
DRY_SYSTEMS = {"32-benzenes": "benzene"}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="release of Python there (default: %(default)s)")
    parser.add_argument("--no-wheels", action="store_true", help="golden numbers alone")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not args.no_wheels:
        download(args.folder / "wheels", args.python)
    found = golden_numbers(None, list(OPTIONS))
    np.savez_compressed(args.folder / "golden.npz", **found)
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"{args.folder}: {size / 2**20:.1f} MiB")
    if size > LARGEST:
        print(f"more than {LARGEST / 2**20:.0f} MiB: leave out wheels", file=sys.stderr)
        return 1
    return 0


def download(folder: Path, python: str) -> None:
    """Fetch one wheel of each package, in place of all that is there, as this machine's pip and registry have them."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", python, "--implementation", "cp", "--dest", made]
        for platform in PLATFORMS:
            command += ["--platform", platform]
        # pydantic asks for one release of its core, which pip chooses where it may look at what packages need
        subprocess.run([*command, *(name for name in WHEELS if name != "pydantic-core")], check=True)
        (pydantic,) = Path(made).glob("pydantic-*.whl")
        subprocess.run([*command, _core_of(pydantic)], check=True)
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.whl"):
            old.unlink()
        for wheel in Path(made).glob("*.whl"):
            wheel.rename(folder / wheel.name)


def _core_of(pydantic: Path) -> str:
    """The release of pydantic-core that a wheel of pydantic needs."""
    import re
    import zipfile

    with zipfile.ZipFile(pydantic) as files:
        name = next(name for name in files.namelist() if name.endswith("METADATA"))
        found = re.search(r"^Requires-Dist: (pydantic-core==\S+)", files.read(name).decode(), re.MULTILINE)
    assert found is not None
    return found[1]


def model_of(architecture: str, dtype: torch.dtype, *, is_dry: bool = False) -> Any:
    """A model of the benchmarks with fixed weights."""
    size = {"embedding_dimension": 16, "num_layers": 1, "num_heads": 2} if is_dry else {}
    model = create_model({**OPTIONS[architecture], **size, "precision": 64})
    return gates.with_fixed_weights(model).to(dtype)


def numbers(
    architecture: str, system: str, dtype: torch.dtype, device: str = "cpu", *, is_dry: bool = False
) -> dict[str, np.ndarray]:
    """Energy and forces of a system, and the norm of the gradient of each weight for a loss of both."""
    atoms = SYSTEMS[DRY_SYSTEMS.get(system, system) if is_dry else system]()
    model = model_of(architecture, dtype, is_dry=is_dry).to(device).eval()
    pos = torch.tensor(atoms.pos, dtype=dtype, device=device)
    z = torch.tensor(atoms.z, device=device)
    batch = None if atoms.batch is None else torch.tensor(atoms.batch, device=device)
    box = None if atoms.box is None else torch.tensor(atoms.box, dtype=dtype, device=device)
    energy, forces = model(z, pos, batch, box)
    found = {"energy": energy, "forces": forces}
    if system == SYSTEMS_IN_PACK[0]:
        model.train()
        energy, forces = model(z, pos, batch, box)
        weights = [weight for _, weight in sorted(model.named_parameters()) if weight.requires_grad]
        loss = energy.mean() + forces.square().mean()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        found["gradients"] = torch.stack([gradient.double().norm() for gradient in gradients])
    return {name: value.detach().double().cpu().numpy() for name, value in found.items()}


def golden_numbers(pack: Path | None, architectures: Sequence[str], *, is_dry: bool = False) -> dict[str, np.ndarray]:
    """Those of the pack or, without one, found now on the CPU; by architecture, system and quantity."""
    if pack is not None and not is_dry:
        return dict(np.load(pack / "golden.npz"))
    return {
        f"{architecture}/{system}/{quantity}": value
        for architecture in architectures
        for system in SYSTEMS_IN_PACK[: 1 if is_dry else None]
        for quantity, value in numbers(architecture, system, torch.float64, is_dry=is_dry).items()
    }


if __name__ == "__main__":
    sys.exit(main())
