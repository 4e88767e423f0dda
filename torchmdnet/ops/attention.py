r"""Attention over neighbours, with radial filters on keys and values.

.. math::
    a_{ijh} &= \tau\Big(\sum_{d \in h} q_i \odot k_j \odot w^0_{ij}\Big)\, C_{ij}, \qquad
    m_i = \sum_j a_{ij}\, X_{j0} \odot w^1_{ij} \\
    \mu_i &= \sum_j X_{j,2\dots4} \odot w^2_{ij} + u_{ij}\, X_{j1} \odot w^3_{ij}

with one weight a for all channels d of a head h. The product inside :math:`\tau` and the sum over j that makes m are
derivatives of one form that is linear in each of its tensors,

.. math:: T(S, q, k, w) = \sum_{(i, j)} \sum_h S_{ijh} \sum_{d \in h} q_{id}\, k_{jd}\, w_{ij,d},

and :math:`\mu` is made of those in :mod:`torchmdnet.ops.messages`: together they serve every order of differentiation.
Where nothing is differentiated twice, one loop over the edges does it all, and one more its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchmdnet.ops import kernels
from torchmdnet.ops.kernels.attention import (
    AttentionLayout,
    attend_gradients,
    attend_value,
    contract_edges,
    contract_receivers,
    is_fused,
)
from torchmdnet.ops.kernels.forms import Stage
from torchmdnet.ops.messages import EdgeRows, RadialFilter, RadialPoints, embed_edges, gather_weight_sum
from torchmdnet.tracing import is_recording
from torchmdnet.typing import AtomFeatures, AtomTensors, EdgeVectors, PairScalars

__all__ = ["attend", "attend_plain"]


def attend(
    q: AtomFeatures,
    k: AtomFeatures,
    X: AtomTensors,
    direction: EdgeVectors | None,
    filter: RadialFilter,
    envelope: PairScalars,
    edges: EdgeRows,
    *,
    num_heads: int,
    activation: nn.Module,
    vectors_fade: bool = False,
    is_final: bool = False,
) -> AtomTensors:
    """Gather what neighbours send, by attention and, where there are vectors, without.

    Args:
        q: Queries, (N, F).
        k: Keys, (N, F).
        X: What an atom sends, (N, 1, F), or with vectors (N, 5, F): for the weighted sum, along the direction, and the
            three components of a vector.
        direction: Unit vectors u of the edges, (E, 3); None where there are no vectors.
        filter: Weights of the keys and of all that is sent, L = 2 or with vectors 4, without the envelope.
        envelope: C of each row of the filter, (P,).
        edges: The row of the filter that each edge uses; both directions of a pair use the same one.
        num_heads: Heads that share the channels evenly.
        activation: τ.
        vectors_fade: Whether the envelope multiplies what makes μ too.
        is_final: Whether derivatives of second order are unlikely to be asked for. They are there all the same.

    Returns:
        m, (N, 1, F), or with vectors [m, μ], (N, 4, F).
    """
    if not (kernels.has_edge_kernel(q) and edges.come_in_pairs):
        plain = {"num_heads": num_heads, "activation": activation, "vectors_fade": vectors_fade}
        return attend_plain(q, k, X, direction, filter, envelope, edges, **plain)
    options = (edges, filter.points.cell, num_heads, activation, vectors_fade)
    if direction is None:
        direction = q.new_empty(0, 3)
    tensors = (q, k, X, direction, filter.points.coef, envelope, filter.table)
    if is_final and isinstance(activation, nn.SiLU) and not is_recording() and is_fused(q, num_heads):
        return _attend(*tensors, options)
    return _attend_by_forms(*tensors, options)


def attend_plain(
    q: AtomFeatures,
    k: AtomFeatures,
    X: AtomTensors,
    direction: EdgeVectors | None,
    filter: RadialFilter,
    envelope: PairScalars,
    edges: EdgeRows,
    *,
    num_heads: int,
    activation: nn.Module,
    vectors_fade: bool = False,
) -> AtomTensors:
    """The definition of :func:`attend`."""
    i, j = edges.edge_index
    weight = filter.rows().index_select(0, edges.row)  # (E, L, F)
    fade = envelope.index_select(0, edges.row)[:, None]  # (E, 1)
    sent = X.index_select(0, j)  # (E, 1, F) or (E, 5, F)
    product = q.index_select(0, i) * k.index_select(0, j) * weight[:, 0]  # (E, F)
    a = activation(product.unflatten(1, (num_heads, -1)).sum(dim=-1)) * fade  # (E, H)
    a = a.repeat_interleave(q.shape[1] // num_heads, dim=1)  # (E, F)
    message = (a * sent[:, 0] * weight[:, 1])[:, None]  # (E, 1, F)
    if direction is not None:
        beta, gamma = weight[:, 2], sent[:, 1] * weight[:, 3]  # (E, F) each
        if vectors_fade:
            beta, gamma = beta * fade, gamma * fade
        vectors = sent[:, 2:] * beta[:, None] + gamma[:, None] * direction[:, :, None]  # (E, 3, F)
        message = torch.cat([message, vectors], dim=1)  # (E, 4, F)
    return message.new_zeros(q.shape[0], *message.shape[1:]).index_add(0, i, message)


def _attend_by_forms(
    q: Tensor, k: Tensor, X: Tensor, direction: Tensor, coef: Tensor, envelope: Tensor, table: Tensor, options: Any
) -> Tensor:
    """:func:`attend` as a chain of forms, for derivatives of any order."""
    edges, cell, num_heads, activation, vectors_fade = options
    layout = edges.layout(RadialPoints(coef, cell), 1)
    keys, values, *others = (table[:, part, None] for part in range(table.shape[1]))  # (R, 1, F) each
    a = activation(contract_edges(q, k, coef, keys, layout, num_heads))  # (E, H)
    a = a * envelope.index_select(0, edges.row)[:, None]
    m = contract_receivers(a, X[:, 0], coef, values, layout)[:, None]  # (N, 1, F)
    if not others:
        return m
    points = RadialPoints(coef * envelope[:, None] if vectors_fade else coef, cell)
    beta, gamma = (RadialFilter(part, points) for part in others)
    along = torch.stack([torch.zeros_like(X[:, 1]), X[:, 1]], dim=1)  # (N, 2, F)
    mu = gather_weight_sum(X[:, 2:], beta, edges) + embed_edges(direction, gamma, along, edges)  # (N, 3, F)
    return torch.cat([m, mu], dim=1)


def _where(coef: Tensor, options: Any) -> AttentionLayout:
    edges, cell, num_heads, _, vectors_fade = options
    return AttentionLayout(edges.layout(RadialPoints(coef, cell), 1), num_heads, vectors_fade)


def _value(*args: Any) -> Tensor:
    q, k, X, direction, coef, envelope, table, options = args
    return attend_value(q, k, X, direction, coef, envelope, table, _where(coef, options))


def _gradients(grad: Tensor, needed: tuple[bool, ...], *args: Any) -> tuple[Tensor | None, ...]:
    q, k, X, direction, coef, envelope, table, options = args
    if needed[6]:  # weights are trained
        with torch.enable_grad():
            tensors = [x.detach().requires_grad_(is_needed) for x, is_needed in zip(args[:-1], needed, strict=False)]
            out = _attend_by_forms(*tensors, options)  # type: ignore[call-arg]
            found = iter(torch.autograd.grad(out, [x for x in tensors if x.requires_grad], grad))
        return *(next(found) if is_needed else None for is_needed in needed[:-1]), None
    gradients = attend_gradients(grad, q, k, X, direction, coef, envelope, table, _where(coef, options))
    return *(x if is_needed else None for x, is_needed in zip(gradients, needed, strict=False)), None, None


_attend = Stage("attend", _attend_by_forms, _value, _gradients)
