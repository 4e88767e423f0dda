r"""Attention over neighbours, with radial filters on keys and values.

.. math::
    a_{ijh} &= \tau\Big(\sum_{d \in h} q_i \odot k_j \odot w^0_{ij}\Big)\, C_{ij}, \qquad
    m_i = \sum_j a_{ij}\, X_{j0} \odot w^1_{ij} \\
    \mu_i &= \sum_j X_{j,2\dots4} \odot w^2_{ij} + u_{ij}\, X_{j1} \odot w^3_{ij}

with one weight a for all channels d of a head h. The product inside :math:`\tau` and the sum over j that makes m are
derivatives of one form that is linear in each of its tensors,

.. math:: T(S, q, k, w) = \sum_{(i, j)} \sum_h S_{ijh} \sum_{d \in h} q_{id}\, k_{jd}\, w_{ij,d},

and :math:`\mu` is made of those in :mod:`torchmdnet.ops.messages`: together they serve every order of differentiation.
"""

from __future__ import annotations

import torch
from torch import nn

from torchmdnet.ops import kernels
from torchmdnet.ops.kernels.attention import contract_edges, contract_receivers
from torchmdnet.ops.messages import EdgeRows, RadialFilter, RadialPoints, embed_edges, gather_weight_sum
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

    Returns:
        m, (N, 1, F), or with vectors [m, μ], (N, 4, F).
    """
    if not (kernels.has_edge_kernel(q) and edges.come_in_pairs):
        plain = {"num_heads": num_heads, "activation": activation, "vectors_fade": vectors_fade}
        return attend_plain(q, k, X, direction, filter, envelope, edges, **plain)
    coef, cell, table = filter.points.coef, filter.points.cell, filter.table
    layout = edges.layout(filter.points, 1)
    keys, values, *others = (table[:, part, None] for part in range(table.shape[1]))  # (R, 1, F) each
    a = activation(contract_edges(q, k, coef, keys, layout, num_heads))  # (E, H)
    a = a * envelope.index_select(0, edges.row)[:, None]
    m = contract_receivers(a, X[:, 0], coef, values, layout)[:, None]  # (N, 1, F)
    if direction is None:
        return m
    points = RadialPoints(coef * envelope[:, None] if vectors_fade else coef, cell)
    beta, gamma = (RadialFilter(part, points) for part in others)
    along = torch.stack([torch.zeros_like(X[:, 1]), X[:, 1]], dim=1)  # (N, 2, F)
    mu = gather_weight_sum(X[:, 2:], beta, edges) + embed_edges(direction, gamma, along, edges)  # (N, 3, F)
    return torch.cat([m, mu], dim=1)


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
