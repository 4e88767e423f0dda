"""The priors that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchmdnet.arguments import arguments_of, check_names, takes_any
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.priors import PRIORS, named_priors
from torchmdnet.priors.base import BasePrior

__all__ = ["check_priors", "create_prior_models"]


def create_prior_models(args: Mapping[str, Any], dataset: Any = None) -> list[BasePrior]:
    """Build the priors a configuration names.

    Args:
        args: ``prior_model`` is a name, ``{name: keywords}``, or a list of either; ``prior_args``, one dictionary for
            each prior as a checkpoint stores them, takes the place of the keywords.
        dataset: Asked by priors for what was not given, such as reference energies.

    Raises:
        ConfigError: For an unknown prior or keyword, or if ``prior_args`` does not match.
    """
    named = named_priors(args.get("prior_model"))
    stored = args.get("prior_args")
    if stored is not None:
        stored = [stored] if isinstance(stored, Mapping) else list(stored)
        if len(stored) != len(named):
            raise ConfigError(
                f"prior_args: {len(stored)} given for {len(named)} priors ({', '.join(name for name, _ in named)}). "
                "Give one dictionary for each prior, in the same order."
            )
        named = [(name, dict(keywords or {})) for (name, _), keywords in zip(named, stored, strict=True)]
    return [_create(name, keywords, dataset) for name, keywords in named]


def _create(name: str, keywords: Mapping[str, Any], dataset: Any) -> BasePrior:
    prior = PRIORS[name]
    _check_keywords(name, prior, keywords)
    try:
        return prior(dataset=dataset, **keywords)
    except ConfigError as error:
        raise type(error)(f"prior_model: {error}") from error
    except DataError:
        raise
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ConfigError(
            f"prior_model: {name} cannot be built from {keywords or 'no arguments'}: {str(error).splitlines()[0]}"
        ) from error


class _AnyData:
    """Data that are not read yet: they state a unit of length and of energy, and energies of elements."""

    distance_scale = energy_scale = 1.0

    def get_atomref(self, max_z: int = 100) -> Tensor:
        """Energy of each element."""
        return torch.zeros(max_z, 1)


def check_priors(prior_model: Any) -> None:
    """Refuse arguments that no data make right, before any are read.

    Args:
        prior_model: As in a configuration.

    Raises:
        ConfigError: For an unknown prior, a keyword it does not take, or a value that is not valid.
    """
    for name, keywords in named_priors(prior_model):
        _check_keywords(name, PRIORS[name], keywords)
        if name in PRIORS:  # what others do with data that are none is not known
            create_prior_models({"prior_model": {name: keywords}}, _AnyData())


def _check_keywords(name: str, prior: type[BasePrior], keywords: Mapping[str, Any]) -> None:
    """Refuse keywords that a prior does not take, and ask for those that it needs."""
    known = arguments_of(prior, given=("dataset",))
    doubtful = keywords.keys() & {"dataset"} if takes_any(prior) else keywords
    check_names(f"prior_model: {name}", doubtful, known)
    missing = [key for key, parameter in known.items() if parameter.default is parameter.empty and key not in keywords]
    if missing:
        example = ", ".join(f'"{key}": ...' for key in missing)
        raise ConfigError(f'prior_model: {name} needs {" and ".join(missing)}: {{"{name}": {{{example}}}}}.')
