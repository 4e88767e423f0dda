"""Every architecture meets the contract: on molecules, ions, in a small triclinic cell, and in boxes of all kinds."""

from __future__ import annotations

import importlib.util

import pytest

from torchmdnet.models import ARCHITECTURES
from torchmdnet.testing import CHECKS, Systems, cell_of_atoms, mixed_boxes, small_molecules, tiny_model

SYSTEMS = {
    "molecules": small_molecules(),
    "charged": small_molecules(charges=True),
    "cell": cell_of_atoms(),
    "mixed boxes": mixed_boxes(),
}
POTENTIALS: dict[str, dict] = {name: {"model": name} for name in ARCHITECTURES} | {
    "tensornet, SO(3)": {"model": "tensornet", "equivariance_invariance_group": "SO(3)"},
    "tensornet, gauss, lower cutoff": {"model": "tensornet", "rbf_type": "gauss", "cutoff_lower": 0.8},
}


#: Variants of an architecture are tried every day on ions and in boxes of all kinds, which hold the others.
CASES = [
    pytest.param(
        options,
        systems,
        id=f"{name}-{which}",
        marks=pytest.mark.slow if name not in ARCHITECTURES and which in ("molecules", "cell") else [],
    )
    for name, options in POTENTIALS.items()
    for which, systems in SYSTEMS.items()
]


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize(("options", "systems"), CASES)
def test_contract(options, systems: Systems, check) -> None:
    module = ARCHITECTURES.addresses[options["model"]].partition(":")[0]
    assert importlib.util.find_spec(module), module
    check(tiny_model(**options), systems)
