"""The contract every architecture, head and prior meets, for tests here and in other packages."""

from torchmdnet.testing.contract import CHECKS, QUICK
from torchmdnet.testing.derivatives import derivatives
from torchmdnet.testing.steps import check_step
from torchmdnet.testing.systems import Systems, cell_of_atoms, mixed_boxes, small_molecules
from torchmdnet.testing.tiny import tiny_model

__all__ = [
    "CHECKS",
    "QUICK",
    "Systems",
    "cell_of_atoms",
    "check_step",
    "derivatives",
    "mixed_boxes",
    "small_molecules",
    "tiny_model",
]
