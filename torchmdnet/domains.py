r"""A system in several domains, each of which computes its own atoms.

Beside its own atoms a domain sees copies of those around it, which other domains own, or which are periodic images of
its own. Where atoms look at their neighbours, the copies need the features of their owners: :func:`exchanged`. Forces
follow from the adjoint, in which the gradients in the copies return to the owners. Sums over a system are sums over the
own atoms of all domains: :func:`totalled`. Every domain has to call the same of these in the same order.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["Domain", "exchanged", "totalled"]


class Domain(Protocol):
    """What joins a domain to the others. Rows are atoms, its own first; nothing is tracked by autograd."""

    def to_copies(self, x: Tensor) -> Tensor:
        """The same features (N, ...) with those of the copies as their owners have them."""
        ...

    def to_owners(self, grad: Tensor) -> Tensor:
        """The adjoint: gradients (N, ...) with those of the copies added to those of their owners, and then zero."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """The sum over all domains, which is its own adjoint."""
        ...


class _Exchanged(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, domain: Domain) -> Tensor:
        ctx.domain = domain
        return domain.to_copies(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        return ctx.domain.to_owners(grads[0]), None


class _Totalled(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, domain: Domain) -> Tensor:
        ctx.domain = domain
        return domain.total(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        return ctx.domain.total(grads[0]), None


def exchanged(x: Tensor, domain: Domain) -> Tensor:
    """Features (N, ...) with those of the copies as their owners have them; differentiable once."""
    return _Exchanged.apply(x, domain)  # type: ignore[return-value]


def totalled(x: Tensor, domain: Domain) -> Tensor:
    """The sum over all domains; differentiable once."""
    return _Totalled.apply(x, domain)  # type: ignore[return-value]
