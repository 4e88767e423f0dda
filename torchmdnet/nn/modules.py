"""Small helpers over the modules of a network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

__all__ = ["is_plain", "layer_norm", "reset_all", "weights_of", "xavier_all"]


def reset_all(*modules: Any) -> None:
    """Call ``reset_parameters`` of each module but None, in this order; seeded results depend on it."""
    for module in modules:
        if module is not None:
            module.reset_parameters()


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is the unmodified class and has no hooks, so that it need not be called."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """What a layer norm makes of x, with derivatives of every order; from the third on PyTorch's own are wrong."""
    if not is_plain(norm, nn.LayerNorm):
        return norm(x)
    away = x - x.mean(dim=-1, keepdim=True)
    layer: Any = norm
    y = away * (away.square().mean(dim=-1, keepdim=True) + layer.eps).rsqrt()
    return y if layer.weight is None else y * layer.weight + layer.bias


def weights_of(linears: Iterable[Any]) -> list[Tensor]:
    """The weight matrix of each layer; any tensor that ``torch.func.functional_call`` may have put there."""
    return [linear.weight for linear in linears]


def xavier_all(*linears: nn.Module) -> None:
    """Draw Xavier-uniform weights and set biases to zero, in this order; seeded results depend on it."""
    for linear in linears:
        nn.init.xavier_uniform_(linear.get_parameter("weight"))
        bias = getattr(linear, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)
