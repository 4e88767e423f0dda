r"""What a wrong prediction costs: functions of (prediction, target) -> mean over all elements.

With weights (R,), one for each row, the element (r, c) of R rows and C columns counts :math:`w_r` times:

.. math:: \ell = \frac{1}{R C} \sum_{r c} w_r\, \ell(d_{rc})

The divisor is the number of elements, not the sum of weights. So a weight is what multiplies the loss of a row,
whatever else is in its batch, and the gradient over an epoch does not depend on how the batches were drawn.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torchmdnet.catalogue import Catalogue
from torchmdnet.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LOSSES", "LossFunction", "huber_loss", "l1_loss", "loss_class_mapping", "loss_name", "mse_loss"]

#: Training losses by the name that ``train_loss`` takes.
LOSSES = Catalogue(
    "train_loss",
    {
        "mse_loss": "torchmdnet.losses:mse_loss",
        "l1_loss": "torchmdnet.losses:l1_loss",
        "huber_loss": "torchmdnet.losses:huber_loss",
    },
)


def mse_loss(prediction: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Mean of d², d = prediction - target.

    Args:
        prediction: Predictions, (R, ...).
        target: Labels of the same shape.
        weight: Weight of each row, (R,); None weighs all alike.
    """
    from torch.nn.functional import mse_loss

    if weight is None:
        return mse_loss(prediction, target)
    return _weighted_mean(mse_loss(prediction, target, reduction="none"), weight)


def l1_loss(prediction: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Mean of |d|, d = prediction - target.

    Args:
        prediction: Predictions, (R, ...).
        target: Labels of the same shape.
        weight: Weight of each row, (R,); None weighs all alike.
    """
    from torch.nn.functional import l1_loss

    if weight is None:
        return l1_loss(prediction, target)
    return _weighted_mean(l1_loss(prediction, target, reduction="none"), weight)


def huber_loss(prediction: Tensor, target: Tensor, delta: float = 1.0, *, weight: Tensor | None = None) -> Tensor:
    """Mean of d²/2 where |d| <= delta and of delta (|d| - delta/2) beyond, d = prediction - target.

    Args:
        prediction: Predictions, (R, ...).
        target: Labels of the same shape.
        delta: Deviation beyond which the loss is linear, in the unit of the labels.
        weight: Weight of each row, (R,); None weighs all alike.
    """
    from torch.nn.functional import huber_loss

    if weight is None:
        return huber_loss(prediction, target, delta=delta)
    return _weighted_mean(huber_loss(prediction, target, reduction="none", delta=delta), weight)


def _weighted_mean(loss: Tensor, weight: Tensor) -> Tensor:
    """Mean over all elements of (R, ...) times the weight of their row, (R,)."""
    return (weight.reshape(-1, *[1] * (loss.dim() - 1)) * loss).mean()


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
        name = getattr(loss_fn, "__name__", str(loss_fn))
        if isinstance(loss_fn, type) or not callable(loss_fn):
            what = "a class" if isinstance(loss_fn, type) else f"a {type(loss_fn).__name__}"
            raise ConfigError(f"train_loss: {name} is {what}. It takes a function of prediction and target.")
        self.loss_fn = loss_fn
        self.extra_args = dict(extra_args or {})
        try:
            parameters = inspect.signature(loss_fn).parameters
        except ValueError as error:
            raise ConfigError(
                f"train_loss: the arguments of {name} are not known. It takes a function of prediction and target."
            ) from error
        #: Whether rows can have weights: the loss has an argument ``weight``, (R,).
        self.takes_weights = "weight" in parameters
        try:
            if "weight" in self.extra_args:
                raise TypeError("weights come with the data")
            inspect.signature(loss_fn).bind(None, None, **self.extra_args)
        except TypeError as error:
            known = [name for name in list(parameters)[2:] if not name.startswith("_") and name != "weight"]
            raise ConfigError(
                f"train_loss_arg: {self.extra_args} does not fit {getattr(loss_fn, '__name__', loss_fn)} ({error}). "
                f"It takes {', '.join(known) if known else 'no arguments'}."
            ) from error

    def check(self) -> None:
        """Refuse a loss that gives no number for two predictions and their labels.

        Raises:
            ConfigError: With what it gave, or what it says of its arguments.
        """
        import torch

        name = getattr(self.loss_fn, "__name__", self.loss_fn)
        try:
            found = self(torch.tensor([[0.5], [2.0]]), torch.tensor([[1.0], [1.0]]))
        except Exception as error:  # of code that is not ours, or of arguments of another kind
            words = (str(error).splitlines() or [type(error).__name__])[0]
            key = f"train_loss_arg: {self.extra_args}" if self.extra_args else f"train_loss: {name}"
            raise ConfigError(f"{key} cannot be used: {words}") from error
        if not (isinstance(found, torch.Tensor) and found.numel() == 1 and bool(torch.isfinite(found).all())):
            what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else repr(found)[:60]
            if isinstance(found, torch.Tensor) and found.numel() == 1:
                what = f"{float(found)}"
            raise ConfigError(
                f"train_loss: {name} gives {what} for two predictions and their labels. It takes a function that gives "
                "one finite number, as a tensor."
            )

    def __call__(self, x: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of (R, ...) predictions; ``weight`` (R,) multiplies rows."""
        if weight is None:
            return self.loss_fn(x, target, **self.extra_args)
        if not self.takes_weights:
            raise ConfigError(
                f"train_loss: {getattr(self.loss_fn, '__name__', self.loss_fn)} takes no weights, but the data have "
                "them. Give it an argument 'weight', (rows,), that multiplies the loss of each row, or leave weights "
                "out with dataset_arg: {weight_keys: false}."
            )
        return self.loss_fn(x, target, weight=weight, **self.extra_args)


def loss_name(train_loss: str) -> str:
    """The name a loss has in logs: for an address, ``"my_package.losses:cauchy"``, the part after the colon."""
    return str(train_loss).rpartition(":")[2]
