"""Known physics beside the network."""

from __future__ import annotations

from typing import Any

from torchmdnet.catalogue import Catalogue

PRIORS = Catalogue(
    "prior_model",
    {
        "Atomref": "torchmdnet.priors.atomref:Atomref",
        "LearnableAtomref": "torchmdnet.priors.atomref:LearnableAtomref",
        "D2": "torchmdnet.priors.d2:D2",
        "D3": "torchmdnet.priors.d3:D3",
        "ZBL": "torchmdnet.priors.zbl:ZBL",
        "Coulomb": "torchmdnet.priors.coulomb:Coulomb",
    },
    base="torchmdnet.priors.base:BasePrior",
)

__all__ = list(PRIORS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in PRIORS:
        return PRIORS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
