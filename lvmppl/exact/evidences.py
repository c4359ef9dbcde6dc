"""The log evidence of a model from that of its rows in each configuration of the enumerated sites.

    log p(x) = log Σ_g exp[ a(g) + Σ_n s_n log Σ_c p(x⁽ⁿ⁾, c | g) ]

g: enumerated sites outside of the data plate (none: a sum over rows); c: those of a row; s: the scale of its plate; a(g):
what stands outside of the plate, the prior of g above all. Where rows are no data there is one row and g is part of c.

Shapes: G, L configurations of g and of c, N rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvmppl.exact.layout import Layout
from lvmppl.exact.named import Named, log_sum_exp
from lvmppl.exact.scales import times


def by_sharing(table: Tensor, layout: Layout) -> Tensor:
    """[*C, N, *rest] in the order of `layout.discrete` → [G, L, N, *rest]."""
    axes = [layout.discrete.index(name) for name in layout.outer]
    shared = math.prod(layout.discrete_sizes[a] for a in axes)
    count = len(layout.discrete)
    return table.movedim(axes, tuple(range(len(axes)))).reshape(shared, -1, *table.shape[count:])


def of_rows(table: Tensor, layout: Layout) -> Tensor:
    """log p(x⁽ⁿ⁾ | g) [G, N] from log p(x⁽ⁿ⁾, c | g) [*C, N]; without a scale."""
    return log_sum_exp(by_sharing(table, layout), 1)


def scaled(rows: Tensor, layout: Layout, data_plate: str | None) -> Tensor:
    """Values of rows [G, N] times the scale of their plate."""
    plate = data_plate if layout.local and data_plate is not None else ""
    return times(Named(rows, ("", plate or "·row")), layout.scale).tensor


def of_shared(table: Tensor, constant: Tensor, layout: Layout, data_plate: str | None) -> Tensor:
    """log p(x, g) [G]; constant: a(g) [*outer sizes]."""
    return constant.reshape(-1) + scaled(of_rows(table, layout), layout, data_plate).sum(-1)


def error_of_sum(weights: Tensor, error: Tensor) -> Tensor:
    """Bound on the error of log Σ_c e^a(c) over the first axis, from p(c) ∝ e^a(c) and bounds |δ(c)| of those of a(c):

        |log Σ_c e^(a + δ) − log Σ_c e^a| ≤ log Σ_c p(c) e^|δ(c)|

    ∞ wherever one of them is, however small its weight; 0 if all weights are.
    """
    terms = torch.where(error.isinf(), torch.inf, weights.log() + error)
    return torch.where(weights.sum(0) > 0, log_sum_exp(terms, 0), 0.0)


__all__ = ["by_sharing", "error_of_sum", "of_rows", "of_shared", "scaled"]
