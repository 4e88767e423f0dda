"""Functions that are linear in each of their tensors, and operators with a cheap first and an exact second derivative.

A :class:`Form` knows how to evaluate its partial derivative in each of its tensors, its slots. Such a derivative is
linear in the tensors that are left, and its gradient in one of them is again a partial derivative of the same form,
with the incoming gradient in the slot it came from. So one kernel for each slot serves every order.

A :class:`Stage` is any other function: a kernel for the value, one for the gradient, and a definition in PyTorch that
takes over when the gradient itself has to be differentiated.

Both carry the loops of the CPU. Devices in :data:`TWINS` have a package with their own, under the same names.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from torchmdnet.ops.batched import one_by_one
from torchmdnet.tracing import device_kind, is_recording

__all__ = ["RECORDED", "TWINS", "Form", "Stage", "needed"]

#: Packages with a twin of every form and stage, by device.
TWINS = {"cuda": "torchmdnet.ops.triton"}


def _twin(operator: Any, tensor: Tensor) -> Any:
    """The operator's twin on the device of a tensor."""
    package = TWINS.get(device_kind(tensor))
    return getattr(importlib.import_module(package), operator.name) if package else operator


#: How a call of a form is recorded, by the name of the form: :mod:`torchmdnet.ops.library` names the operators.
RECORDED: dict[str, Callable[[str, Sequence[int], Any, Sequence[Tensor]], Tensor]] = {}


class Form(abc.ABC):
    """A multilinear form of named tensors.

    Everything that is not differentiated, such as indices, travels in ``where``, any object.
    """

    name: str
    #: Names of the tensors, in the order they are passed in.
    slots: tuple[str, ...]

    @abc.abstractmethod
    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: Any) -> Tensor:
        """∂form/∂slot, of the given shape, at the tensors known by name."""

    def gradients(self, wanted: list[str], known: dict[str, Tensor], shapes: Any, where: Any) -> dict[str, Tensor]:
        """Several derivatives at once, when none is differentiated again; a form may share work between them."""
        return {slot: self.derivative(slot, known, shapes[slot], where) for slot in wanted}

    def __call__(self, slot: str, shape: tuple[int, ...], where: Any, *tensors: Tensor) -> Tensor:
        """:meth:`derivative` with the other tensors in order; it can be differentiated any number of times."""
        if is_recording():
            return RECORDED[self.name](slot, shape, where, tensors)
        return _Derivative.apply(_twin(self, tensors[0]), slot, shape, where, *tensors)  # type: ignore[return-value]


class _Derivative(Function):
    @staticmethod
    def forward(ctx: Any, form: Form, slot: str, shape: tuple[int, ...], where: Any, *tensors: Tensor) -> Tensor:
        ctx.form, ctx.slot, ctx.where = form, slot, where
        ctx.save_for_backward(*tensors)
        others = (name for name in form.slots if name != slot)
        return form.derivative(slot, dict(zip(others, tensors, strict=True)), shape, where)

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *grads: Any) -> Any:
        form, slot = ctx.form, ctx.slot
        others = [name for name in form.slots if name != slot]
        known = dict(zip(others, ctx.saved_tensors, strict=True))
        shapes = {name: tuple(tensor.shape) for name, tensor in known.items()}
        known[slot] = grads[0].contiguous()
        wanted = [name for name, needed in zip(others, needed(ctx), strict=True) if needed]
        if torch.is_grad_enabled():
            found = {}
            for name in wanted:
                rest = (known[other] for other in form.slots if other != name)
                found[name] = form(name, shapes[name], ctx.where, *rest)
        else:
            found = form.gradients(wanted, known, shapes, ctx.where)
        return (None, None, None, None, *(found.get(name) for name in others))


def needed(ctx: Any) -> list[bool]:
    """Which tensors' gradients somebody waits for in this run of the engine; ``needs_input_grad`` tells of any run."""
    return [node is not None and _will_run(node) for node, _ in ctx.next_functions]


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf, of which the engine does not tell
        return True


class Stage(NamedTuple):
    """A function of tensors with compiled loops for its value and its first derivatives.

    ``gradients(grad, needed, *args)`` returns one for each argument, None where there is none or it is not needed.
    Unless they can be differentiated themselves, the definition takes over for higher derivatives.
    """

    name: str
    definition: Callable[..., Tensor]
    value: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor | None, ...]]
    is_differentiable: bool = False

    def __call__(self, *args: Any) -> Tensor:
        """The value; it can be differentiated any number of times."""
        return _Staged.apply(_twin(self, args[0]), *args)  # type: ignore[return-value]


class _Staged(Function):
    @staticmethod
    def forward(ctx: Any, stage: Stage, *args: Any) -> Tensor:
        ctx.stage = stage
        ctx.is_tensor = [isinstance(arg, Tensor) for arg in args]
        ctx.constants = [arg for arg in args if not isinstance(arg, Tensor)]
        ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))
        return stage.value(*args)

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *grads: Any) -> Any:
        tensors, constants = iter(ctx.saved_tensors), iter(ctx.constants)
        args = [next(tensors) if is_tensor else next(constants) for is_tensor in ctx.is_tensor]
        waiting = iter(needed(ctx))
        is_needed = tuple(is_tensor and next(waiting) for is_tensor in ctx.is_tensor)
        if ctx.stage.is_differentiable or not torch.is_grad_enabled():
            return None, *ctx.stage.gradients(grads[0].contiguous(), is_needed, *args)
        with torch.enable_grad():  # as new tensors, so that one which depends on another does not count twice
            args = [arg.view_as(arg) if wanted else arg for arg, wanted in zip(args, is_needed, strict=True)]
            inputs = [arg for arg, wanted in zip(args, is_needed, strict=True) if wanted]
            found = iter(torch.autograd.grad(ctx.stage.definition(*args), inputs, grads[0], create_graph=True))
        return None, *(next(found) if wanted else None for wanted in is_needed)
