"""Reference data: published sets, your own files, and small sets that come with the package."""

from __future__ import annotations

from typing import Any

from torchmdnet.catalogue import Catalogue

DATASETS = Catalogue(
    "dataset",
    {
        "Ace": "torchmdnet.datasets.ace:Ace",
        "AceHF": "torchmdnet.datasets.ace:AceHF",
        "ANIMD": "torchmdnet.datasets.comp6:ANIMD",
        "ANI1": "torchmdnet.datasets.ani:ANI1",
        "ANI1CCX": "torchmdnet.datasets.ani:ANI1CCX",
        "ANI1X": "torchmdnet.datasets.ani:ANI1X",
        "ANI2X": "torchmdnet.datasets.ani:ANI2X",
        "COMP6v1": "torchmdnet.datasets.comp6:COMP6v1",
        "COMP6v2": "torchmdnet.datasets.comp6:COMP6v2",
        "Custom": "torchmdnet.datasets.custom:Custom",
        "DrugBank": "torchmdnet.datasets.comp6:DrugBank",
        "GDB07to09": "torchmdnet.datasets.comp6:GDB07to09",
        "GDB10to13": "torchmdnet.datasets.comp6:GDB10to13",
        "GenentechTorsions": "torchmdnet.datasets.genentech:GenentechTorsions",
        "HDF5": "torchmdnet.datasets.hdf5:HDF5",
        "MDCATH": "torchmdnet.datasets.mdcath:MDCATH",
        "MD17": "torchmdnet.datasets.md17:MD17",
        "MD22": "torchmdnet.datasets.md22:MD22",
        "QM9": "torchmdnet.datasets.qm9:QM9",
        "QM9q": "torchmdnet.datasets.qm9q:QM9q",
        "S66X8": "torchmdnet.datasets.comp6:S66X8",
        "SPICE": "torchmdnet.datasets.spice:SPICE",
        "Tripeptides": "torchmdnet.datasets.comp6:Tripeptides",
        "WaterBox": "torchmdnet.datasets.water:WaterBox",
        "MACEOFF": "torchmdnet.datasets.maceoff:MACEOFF",
        "ASE": "torchmdnet.datasets.ase:ASE",
        "TinyQM": "torchmdnet.datasets.tinyqm:TinyQM",
    },
    needs=("__len__", "__getitem__"),
)

__all__ = list(DATASETS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in DATASETS:
        return DATASETS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
