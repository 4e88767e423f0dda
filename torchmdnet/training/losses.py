"""What a wrong prediction costs: functions of (prediction, target) -> mean over all elements."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torchmdnet.errors import ConfigError
from torchmdnet.training import LOSSES

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LOSSES", "LossFunction", "huber_loss", "l1_loss", "loss_class_mapping", "loss_name", "mse_loss"]


def mse_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of d², d = prediction - target."""
    from torch.nn.functional import mse_loss

    return mse_loss(prediction, target)


def l1_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of |d|, d = prediction - target."""
    from torch.nn.functional import l1_loss

    return l1_loss(prediction, target)


def huber_loss(prediction: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    """Mean of d²/2 where |d| <= delta and of delta (|d| - delta/2) beyond, d = prediction - target."""
    from torch.nn.functional import huber_loss

    return huber_loss(prediction, target, delta=delta)


#: The losses as established by name.
loss_class_mapping: dict[str, Callable[..., Any]] = {
    "mse_loss": mse_loss,
    "l1_loss": l1_loss,
    "huber_loss": huber_loss,
}


class LossFunction:
    """A loss with its options bound: ``obj(x, target)`` is ``loss_fn(x, target, **extra_args)``. It can be pickled.

    Args:
        loss_fn: Function of prediction and target.
        extra_args: Keyword arguments of the loss, ``train_loss_arg`` in a configuration.

    Raises:
        ConfigError: If the loss takes no such argument.
    """

    def __init__(self, loss_fn: Callable[..., Tensor], extra_args: Mapping[str, Any] | None = None) -> None:
        self.loss_fn = loss_fn
        self.extra_args = dict(extra_args or {})
        try:
            inspect.signature(loss_fn).bind(None, None, **self.extra_args)
        except TypeError as error:
            known = [name for name in list(inspect.signature(loss_fn).parameters)[2:] if not name.startswith("_")]
            raise ConfigError(
                f"train_loss_arg: {self.extra_args} does not fit {getattr(loss_fn, '__name__', loss_fn)} ({error}). "
                f"It takes {', '.join(known) if known else 'no arguments'}."
            ) from error

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss_fn(x, target, **self.extra_args)


def loss_name(train_loss: str) -> str:
    """The name a loss has in logs: for an address, ``"my_package.losses:cauchy"``, the part after the colon."""
    return str(train_loss).rpartition(":")[2]
