"""SiLU in compiled loops, to be differentiated any number of times."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchmdnet.ops.kernels import loops
from torchmdnet.ops.kernels.forms import Stage
from torchmdnet.ops.kernels.layout import array

__all__ = ["silu"]


def _silu_value(x: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    loops.activation.silu(20 * x.numel(), array(x), _no_bias(x), out.numpy())
    return out


def _silu_gradients(grad: Tensor, needed: tuple[bool, ...], x: Tensor) -> tuple[Tensor | None, ...]:
    return (_silu_slope(x, grad),)


#: SiLU of a matrix, (E, K) with K at least as large as a vector.
silu = Stage("silu", F.silu, _silu_value, _silu_gradients, is_differentiable=True)


def _silu_slope_definition(x: Tensor, grad: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return grad * sigmoid * (1 + x * (1 - sigmoid))


def _silu_slope_value(x: Tensor, grad: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    loops.activation.silu_backward(20 * x.numel(), array(x), _no_bias(x), array(grad), out.numpy())
    return out


def _silu_slope_gradients(
    grad: Tensor, needed: tuple[bool, ...], x: Tensor, inner: Tensor
) -> tuple[Tensor | None, ...]:
    of_x, of_inner = torch.empty_like(grad), torch.empty_like(grad)
    arrays = (array(x), array(inner), array(grad), of_x.numpy(), of_inner.numpy())
    loops.activation.silu_twice(20 * x.numel(), *arrays)
    return of_x, of_inner


#: The gradient of :data:`silu`, which training with forces differentiates again.
_silu_slope = Stage("silu_slope", _silu_slope_definition, _silu_slope_value, _silu_slope_gradients)


def _no_bias(x: Tensor) -> Any:
    return torch.zeros_like(x[0]).numpy() if x.shape[0] else x.detach().numpy()
