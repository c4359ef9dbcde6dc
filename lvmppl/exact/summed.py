"""Enumerated sites that are summed out at every point of the continuous ones: chains, and sites of plates within a row.

    log p(x, z_sn; θ) = log Σ_c p(x, z_sn, c; θ)     and     p(c_n = k | x) = Σ_s w_sn ∂ log p(x, z_sn) / ∂ f⁰_n(k)

by elimination with the points of all rows as one plate; f⁰ is a log-factor of zeros over the site, and w_sn are the
posterior weights of the points. Shapes: S points, N rows (1 where the data share the continuous sites), K states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from lvmppl.density import POINTS, Evaluation, Factor, Variable, time_axis
from lvmppl.exact.elimination import eliminate
from lvmppl.exact.named import Named, align

ENTRIES = 2**22  # of the largest factor at the points evaluated together


@dataclass(frozen=True)
class ByRow:
    """Log-factors of one pass with the plate of rows and the points of each as one plate, `POINTS`, of S·N elements.

    It is the first plate of every variable; element s·N + n is point s of row n.
    """

    factors: tuple[Factor, ...]
    variables: Mapping[str, Variable]
    plate_sizes: Mapping[str, int]


Evaluate = Callable[[Tensor], tuple[Evaluation, list[Factor]]]
"""z [S, *rows, d] → one pass of the model there, and those of its log-factors that belong to rows."""


def by_row(evaluation: Evaluation, factors: Sequence[Factor], home: tuple[str, ...], points: int) -> ByRow:
    """The factors at S = `points` points of each row; home: the plate of rows, if rows are data."""
    axes = (POINTS, *home)
    sizes = (points, *(evaluation.plate_sizes[p] for p in home))

    def joined(tensor: Tensor, dims: tuple[str, ...]) -> tuple[Tensor, tuple[str, ...]]:
        own = [d for d in dims if d in axes]
        if not own:
            return tensor, dims
        at = dims.index(own[0])
        before, after = dims[:at], tuple(d for d in dims[at:] if d not in axes)
        whole = align(Named(tensor, dims), (*before, *axes, *after))
        whole = whole.expand(*whole.shape[:at], *sizes, *whole.shape[at + len(axes) :])
        return whole.flatten(at, at + len(axes) - 1), (*before, POINTS, *after)

    def placed(factor: Factor) -> Factor:
        table, dims = joined(factor.log_prob, factor.dims)
        plates = (factor.plates - set(home)) | {POINTS}
        if not isinstance(factor.scale, Tensor):
            return replace(factor, log_prob=table, dims=dims, plates=plates)
        scale, scale_dims = joined(factor.scale, factor.scale_dims)
        return replace(factor, log_prob=table, dims=dims, plates=plates, scale=scale, scale_dims=scale_dims)

    variables = {}
    for name, variable in evaluation.variables.items():
        plates = (POINTS, *(p for p in variable.plates if p not in home))
        variables[name] = replace(variable, plates=plates)
        if variable.lengths is not None:
            lengths, dims = joined(variable.lengths, variable.lengths_dims)
            variables[name] = replace(variables[name], lengths=lengths, lengths_dims=dims)
    inside = {p: s for p, s in evaluation.plate_sizes.items() if p not in home}
    return ByRow(tuple(map(placed, factors)), variables, {**inside, POINTS: prod(sizes)})


def log_joint_at(rows: ByRow, straight_through: bool = False) -> Tensor:
    """log p(x, z_sn; θ) [S·N], every enumerated site summed out."""
    done = eliminate(
        rows.factors, rows.variables, rows.plate_sizes, POINTS, straight_through=straight_through
    )
    total = done.constant if done.per_datum is None else done.per_datum
    return total.expand(rows.plate_sizes[POINTS])


def pieces_of(z: Tensor, entries: int) -> Iterator[Tensor]:
    """z [S, …] cut such that a piece's largest factor has at most `ENTRIES` entries; entries: of it at one point."""
    yield from torch.split(z, max(1, ENTRIES // max(1, entries)))


def entries_at_a_point(variables: Mapping[str, Variable], sizes: Mapping[str, int]) -> int:
    """Of the largest site: its states times the elements of its plates (and the steps of a chain)."""
    return max(v.size * prod(sizes[p] for p in v.plates) * (v.steps or 1) for v in variables.values())


def summed_probabilities(
    evaluate: Evaluate, z: Tensor, weights: Tensor, entries: int, home: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """p(c = k | x) of every summed site, [*plates, (T,) K], from points z [S, *rows, d] and weights [S, *rows]."""
    result: dict[str, Tensor] = {}
    begin = 0
    for part in pieces_of(z, entries):
        with torch.no_grad():
            evaluation, factors = evaluate(part)
        own = weights[begin : begin + len(part)].flatten()
        begin += len(part)
        like = {f.site: f for f in factors}
        zeros = {n: _zero(v, evaluation.plate_sizes, like[n]) for n, v in evaluation.variables.items()}
        with torch.enable_grad():
            rows = by_row(evaluation, (*factors, *zeros.values()), home, len(part))
            total = log_joint_at(rows, straight_through=True)
            seen = torch.where(own > 0, total, torch.zeros_like(total))
            grads = torch.autograd.grad((own * seen).sum(), [f.log_prob for f in zeros.values()])
        for name, grad in zip(zeros, grads, strict=True):
            table = grad.movedim(0, -1)
            result[name] = result[name] + table if name in result else table
    return result


def _zero(variable: Variable, sizes: Mapping[str, int], like: Factor) -> Factor:
    """A log-factor of zeros over a site, one for all points, at the scale of its own."""
    steps = () if variable.steps is None else (time_axis(variable.steps),)
    shape = [variable.size, *(sizes[p] for p in variable.plates), *(s for s in (variable.steps,) if s)]
    zero = like.log_prob.new_zeros(shape).requires_grad_()
    dims = (variable.name, *variable.plates, *steps)
    return Factor("", zero, dims, frozenset(variable.plates), like.scale, like.scale_dims)


__all__ = [
    "ByRow",
    "Evaluate",
    "by_row",
    "entries_at_a_point",
    "log_joint_at",
    "pieces_of",
    "summed_probabilities",
]
