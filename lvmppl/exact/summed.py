"""Enumerated sites inside plates that continuous sites outside of them reach: summed out at every point.

    log p(x, z_s; θ) = log Σ_c p(x, z_s, c; θ)       and       p(c_n = k | x) = Σ_s w_s ∂ log p(x, z_s) / ∂ f⁰_n(k)

by elimination with the points as one plate more; f⁰ is a log-factor of zeros over the site, and w_s are the posterior
weights of the points. Shapes: S points, K states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from lvmppl.density import POINTS, Evaluation, Factor, Variable, time_axis
from lvmppl.exact.elimination import eliminate

Evaluate = Callable[[Tensor], Evaluation]
"""z [S, 1, d] → the log-factors there."""

ENTRIES = 2**22  # of the largest factor at the points evaluated together


def log_joint_at(evaluation: Evaluation, factors: Sequence[Factor], points: int) -> Tensor:
    """log p(x, z_s; θ) [S], every enumerated site summed out of these factors of one pass."""
    return _total(evaluation, factors, points)


def _total(
    evaluation: Evaluation, factors: Sequence[Factor], points: int, straight_through: bool = False
) -> Tensor:
    own = [replace(f, plates=f.plates | {POINTS}) for f in factors]
    variables = {n: replace(v, plates=(*v.plates, POINTS)) for n, v in evaluation.variables.items()}
    sizes = {**evaluation.plate_sizes, POINTS: points}
    done = eliminate(own, variables, sizes, POINTS, straight_through=straight_through)
    if done.per_datum is None:  # no factor depends on the points
        return done.constant.expand(points)
    return done.per_datum.expand(points)


def pieces_of(z: Tensor, entries: int) -> Iterator[Tensor]:
    """z [S, …] cut such that a piece's largest factor has at most `ENTRIES` entries; entries: of it at one point."""
    yield from torch.split(z, max(1, ENTRIES // max(1, entries)))


def entries_at_a_point(variables: Mapping[str, Variable], sizes: Mapping[str, int]) -> int:
    """Of the largest site: its states times the elements of its plates (and the steps of a chain)."""
    return max(v.size * prod(sizes[p] for p in v.plates) * (v.steps or 1) for v in variables.values())


def summed_probabilities(evaluate: Evaluate, z: Tensor, weights: Tensor, entries: int) -> dict[str, Tensor]:
    """p(c = k | x) of every summed site, [*plates, (T,) K], from points z [S, 1, d] and their weights [S]."""
    result: dict[str, Tensor] = {}
    begin = 0
    for part in pieces_of(z, entries):
        with torch.no_grad():
            evaluation = evaluate(part)
        own = weights[begin : begin + len(part)]
        begin += len(part)
        scales = {f.site: (f.scale, f.scale_dims) for f in evaluation.factors}
        zeros = {
            n: replace(_zero(v, evaluation.plate_sizes, own), scale=scales[n][0], scale_dims=scales[n][1])
            for n, v in evaluation.variables.items()
        }
        with torch.enable_grad():
            total = _total(evaluation, (*evaluation.factors, *zeros.values()), len(part), True)
            seen = torch.where(own > 0, total, torch.zeros_like(total))
            grads = torch.autograd.grad((own * seen).sum(), [f.log_prob for f in zeros.values()])
        for name, grad in zip(zeros, grads, strict=True):
            table = grad.movedim(0, -1)
            result[name] = result[name] + table if name in result else table
    return result


def _zero(variable: Variable, sizes: Mapping[str, int], like: Tensor) -> Factor:
    steps = () if variable.steps is None else (time_axis(variable.steps),)
    shape = [variable.size, *(sizes[p] for p in variable.plates), *(s for s in (variable.steps,) if s)]
    zero = like.new_zeros(shape).requires_grad_()
    dims = (variable.name, *variable.plates, *steps)
    return Factor("", zero, dims, frozenset(variable.plates))


__all__ = ["entries_at_a_point", "log_joint_at", "pieces_of", "summed_probabilities"]
