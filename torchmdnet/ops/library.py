"""The operators along edges under names that PyTorch knows, ``torchmdnet::message`` and others, for recorded functions.

There is one operator for each form of :mod:`torchmdnet.ops.kernels.forms`, and the slot it is differentiated in is an
argument: ``torchmdnet::message(slot, shape, tensors, indices)`` is ∂form/∂slot. Its gradients are the same operator in
other slots, so a compiler sees a handful of names in derivatives of any order and calls the compiled loops for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchmdnet.ops.kernels.attention import CONTRACTION
from torchmdnet.ops.kernels.embedding import EMBEDDING
from torchmdnet.ops.kernels.forms import RECORDED, Form
from torchmdnet.ops.kernels.layout import EdgeLayout
from torchmdnet.ops.kernels.message import MESSAGE
from torchmdnet.ops.messages import edge_layout

__all__ = ["OPERATORS"]


def _register(form: Form) -> Any:
    others = {slot: [name for name in form.slots if name != slot] for slot in form.slots}

    @torch.library.custom_op(f"torchmdnet::{form.name}", mutates_args=())
    def operator(
        slot: str, shape: Sequence[int], tensors: Sequence[Tensor], indices: Sequence[Tensor], num_components: int
    ) -> Tensor:
        layout = edge_layout(indices, num_components, tensors[0].device)
        return form(slot, tuple(shape), layout, *tensors)

    @operator.register_fake
    def _(
        slot: str, shape: Sequence[int], tensors: Sequence[Tensor], indices: Sequence[Tensor], num_components: int
    ) -> Tensor:
        return tensors[0].new_empty(shape)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.slot, _, tensors, indices, ctx.num_components = inputs
        ctx.num_tensors = len(tensors)
        ctx.save_for_backward(*tensors, *indices)

    def gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint gives them once
        tensors, indices = saved[: ctx.num_tensors], list(saved[ctx.num_tensors :])
        known = {ctx.slot: grad.contiguous(), **dict(zip(others[ctx.slot], tensors, strict=True))}
        found = [
            operator(name, known[name].shape, [known[other] for other in others[name]], indices, ctx.num_components)
            for name in others[ctx.slot]
        ]
        return None, None, found, [None] * len(indices), None

    operator.register_autograd(gradients, setup_context=remember)
    return operator


#: The operators by the name of their form.
OPERATORS = {form.name: _register(form) for form in (MESSAGE, EMBEDDING, CONTRACTION)}


def _recorded(operator: Any) -> Any:
    """The derivative of a form through its operator; ``where`` holds tensors."""

    def call(slot: str, shape: Sequence[int], where: EdgeLayout, tensors: Sequence[Tensor]) -> Tensor:
        *indices, starts = where
        return operator(slot, list(shape), list(tensors), indices, int(starts[-1]))

    return call


RECORDED.update({name: _recorded(operator) for name, operator in OPERATORS.items()})
