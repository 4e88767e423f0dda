"""Small helpers over the modules of a network."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["Weights", "is_plain", "layer_norm", "reset_all", "weights_of", "xavier_all"]


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


class Weights:
    """The weights of modules: whether one has changed, or a module was replaced.

    Args:
        owners: Modules that hold the weights, themselves or in modules inside of them.
    """

    def __init__(self, owners: Sequence[nn.Module]) -> None:
        self.owners = list(owners)
        unique = {id(owner): owner for owner in owners}.values()
        #: Kept, so that no other module comes to have the address of one of them.
        self.modules = [module for owner in unique for module in owner.modules()]
        held: list[Any] = [*(module._parameters for module in self.modules)]
        held += [module._buffers for module in self.modules]
        # these dictionaries stay when a weight or a module is replaced
        self.held: list[dict[str, Tensor | None]] = [weights for weights in held if weights]
        self.children = [module._modules for module in self.modules if module._modules]
        self.kept: list[Tensor] = []

    def is_of(self, owners: Sequence[nn.Module]) -> bool:
        """Whether the owners are the same modules."""
        return len(owners) == len(self.owners) and all(map(operator.is_, owners, self.owners))

    def state(self) -> tuple[list[Any], list[int]] | None:
        """Something that changes when a weight or a module does; None if that cannot be known."""
        try:
            weights = [(x.data_ptr(), x._version) for held in self.held for x in held.values() if x is not None]
        except RuntimeError:  # made in inference mode: versions are not counted
            return None
        return weights, [id(child) for inside in self.children for child in inside.values()]

    def keep(self) -> None:
        """Hold on to the memory of the weights, so that none that replaces one later comes to have its address."""
        self.kept = [x.detach() for held in self.held for x in held.values() if x is not None]
