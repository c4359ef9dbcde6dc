"""The bounds of `lvmppl.exact.secants` from the log-factors of a model whose enumerated sites are summed out.

Shapes: S points, N rows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import Transform

from lvmppl.density import POINTS, Evaluation, Factor, time_axis
from lvmppl.exact.continuous import LogJointOfModel
from lvmppl.exact.layout import is_constant
from lvmppl.exact.named import Named, align
from lvmppl.exact.secants import Bounds, BoundsOf, secant_bounds
from lvmppl.exact.summed import ENTRIES

POINTS_TOGETHER = 32  # at least, of which the outer ones are looked at twice


def bounds_of_factors(log_joint: LogJointOfModel, transform: Transform | None) -> BoundsOf:
    """Those of ``log_joint`` over the points z of ℝ that ``transform`` takes to the support of its one continuous site."""
    layout = log_joint.layout

    def bounds(index: Tensor, z: Tensor) -> Bounds:
        rows = math.prod(layout.rows(log_joint.plate))
        entries = max(1, log_joint.entries // rows)  # of a row at one point
        together = max(1, ENTRIES // (POINTS_TOGETHER * entries))
        found = []
        for some in torch.split(torch.arange(len(index), device=z.device), together):
            part = log_joint.of_rows(index[some]) if layout.local else log_joint
            step = max(POINTS_TOGETHER, ENTRIES // (entries * len(some)))
            found.append(_in_pieces(part, z[:, some], transform, step))
        return Bounds(*(torch.cat(parts, 1) for parts in zip(*map(_parts, found), strict=True)))

    return bounds


@torch.no_grad()
def _in_pieces(log_joint: LogJointOfModel, z: Tensor, transform: Transform | None, step: int) -> Bounds:
    """The bounds over z [S, N, 1] from pieces of `step` intervals, each with one more on either side."""
    found = []
    for begin in range(0, len(z) - 1, step):
        first, last = max(0, begin - 1), min(len(z), begin + step + 2)
        piece = _bounds(log_joint, z[first:last], transform)
        own = slice(begin - first, begin - first + min(step, len(z) - 1 - begin))
        found.append([part[own] for part in _parts(piece)])
    return Bounds(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _bounds(log_joint: LogJointOfModel, z: Tensor, transform: Transform | None) -> Bounds:
    support = z if transform is None else transform(z)
    evaluation, layout = log_joint.evaluation(support), log_joint.layout
    gap = (z[1:] - z[:-1]).squeeze(-1)  # [S - 1, N]
    over = (POINTS, *layout.home(log_joint.plate))
    total = [torch.zeros_like(gap)] * 3
    if transform is not None:
        jacobian = transform.log_abs_det_jacobian(z, support).reshape(z.shape[:-1])
        total = list(_parts(secant_bounds(jacobian, gap)))
    for factor in evaluation.factors:
        if POINTS not in factor.dims or is_constant(factor, log_joint.joint, layout):
            continue
        if not _is_plain(factor, evaluation):
            return Bounds(torch.full_like(gap, torch.inf), *total[1:])
        parts = (log_joint.row_table(part, over) for part in _of_factor(factor, evaluation, gap, over))
        total = [t + part.reshape(len(gap), -1) for t, part in zip(total, parts, strict=True)]
    return Bounds(*total)


def _is_plain(factor: Factor, evaluation: Evaluation) -> bool:
    """Whether all axes of a factor are points, enumerated sites, plates, or the steps of a chain."""
    known = {POINTS, *evaluation.variables, *evaluation.plate_sizes}
    known |= {time_axis(v.steps) for v in evaluation.variables.values() if v.steps is not None}
    return set(factor.dims) <= known


def _of_factor(factor: Factor, evaluation: Evaluation, gap: Tensor, over: tuple[str, ...]) -> list[Factor]:
    """Its rise, least and steepest slope, the extremes over the states of enumerated sites, as factors of S - 1 points."""
    states = [d for d in factor.dims if d in evaluation.variables]
    rest = [d for d in factor.dims if d != POINTS and d not in states]
    by_row = set(over[1:]) & set(factor.dims)  # else there is one row
    own = Named(gap, over) if by_row else Named(gap[:, 0], (POINTS,))
    dims = (POINTS, *states, *rest)
    seen = secant_bounds(align(Named(factor.log_prob, factor.dims), dims), align(own, dims))
    axes = tuple(range(1, 1 + len(states)))
    if axes:
        seen = Bounds(seen.rise.amax(axes), seen.least.amin(axes), seen.steepest.amax(axes))
    return [replace(factor, log_prob=table, dims=(POINTS, *rest)) for table in _parts(seen)]


def _parts(bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    return bounds.rise, bounds.least, bounds.steepest


__all__ = ["bounds_of_factors"]
