"""Other packages at work on the same atoms, each through its own ASE calculator; the counterpart of ``worker.py``.

The weights are random: how long a step takes does not depend on them.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

from systems import SYSTEMS
from worker import Call, Facts, dynamics, serve

#: Elements that every model here knows.
ELEMENTS = {"H": 1, "C": 6, "N": 7, "O": 8}


def prepare(order: dict[str, Any]) -> tuple[Call, Facts]:
    """A step of velocity Verlet with the ordered ``package`` on the ordered ``system``."""
    import torch

    torch.set_num_threads(order["threads"])
    torch.manual_seed(0)
    name = order["package"]
    calculator, model, settings, distribution = PACKAGES[name](order["device"])
    call, facts = dynamics(calculator, SYSTEMS[order["system"]](), order["device"])
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return call, facts | {
        "package": name,
        "version": importlib.metadata.version(distribution),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "settings": f"{settings}; {num_parameters:,} parameters, float32",
    }


def mace(device: str) -> tuple[Any, Any, str, str]:
    """MACE (Batatia et al., 2022) of the size its authors call small."""
    import numpy as np
    import torch
    from e3nn import o3
    from mace import modules
    from mace.calculators import MACECalculator

    blocks = modules.interaction_classes
    model = modules.ScaleShiftMACE(
        r_max=5.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=blocks["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=blocks["RealAgnosticInteractionBlock"],
        num_interactions=2,
        num_elements=len(ELEMENTS),
        hidden_irreps=o3.Irreps("128x0e"),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros(len(ELEMENTS)),
        avg_num_neighbors=50.0,
        atomic_numbers=list(ELEMENTS.values()),
        correlation=3,
        gate=torch.nn.functional.silu,
        radial_MLP=[64, 64, 64],
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    ).to(device, torch.float32)
    settings = "128 scalar channels between 2 layers, l up to 3 on edges, correlation order 3, 5 Å"
    return MACECalculator(models=model, device=device, default_dtype="float32"), model, settings, "mace-torch"


def torchani(device: str) -> tuple[Any, Any, str, str]:
    """An ANI network (Smith et al., 2017), one member, of the usual size: symmetry functions, no messages."""
    from torchani.arch import simple_ani

    model = simple_ani(
        list(ELEMENTS), lot="wb97x-631gd", repulsion=False, neighborlist="adaptive", self_energies="zero"
    ).to(device)
    settings = "16 radial and 8×4 angular symmetry functions to 5.2 and 3.5 Å, no message passing, one network"
    return model.ase(), model, settings, "torchani"


#: How to ask each package: calculator, model, settings in words, and the name it is installed under.
PACKAGES: dict[str, Callable[[str], tuple[Any, Any, str, str]]] = {"mace": mace, "torchani": torchani}

if __name__ == "__main__":
    serve(prepare)
