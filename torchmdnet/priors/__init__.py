"""Known physics beside the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchmdnet.catalogue import Catalogue
from torchmdnet.errors import ConfigError

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

__all__ = ["named_priors", *PRIORS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in PRIORS:
        return PRIORS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def named_priors(prior_model: Any) -> list[tuple[str, dict[str, Any]]]:
    """All forms of ``prior_model`` as a list of names with arguments.

    Raises:
        ConfigError: If it has none of these forms.
    """
    if not prior_model:
        return []
    if isinstance(prior_model, str):
        return [(prior_model, {})]
    if isinstance(prior_model, Mapping):
        return [(name, dict(arguments or {})) for name, arguments in prior_model.items()]
    if isinstance(prior_model, Sequence):
        return [pair for entry in prior_model for pair in named_priors(entry)]
    raise ConfigError(
        f"prior_model: {prior_model!r} is neither a name, a mapping of names to keywords, nor a list of these."
    )
