"""What a scan along one axis can overlook of a sum of log-concave terms, by the values of the terms alone.

    log p(x, z) = log Σ_c exp Σ_f f_c(z)

A log-factor f_c that is concave in z lies between two neighbours z_i, z_{i+1} of a scan at most e_f above its chord, as the
chords next to it say when they are prolonged; and a log-sum-exp of chords is convex. Where all f_c are concave, then,

    log p(x, z) ≤ max(log p(x, z_i), log p(x, z_{i+1})) + Σ_f max_c e_f(c)        for z_i ≤ z ≤ z_{i+1},

and beyond an interval in which all configurations fall, Σ_f max_c s_f(c) < 0 of their slopes s_f, they fall for good. No
term needs to be smooth, and none can hide between the points, however narrow (secants of concave functions: Boyd and
Vandenberghe, *Convex Optimization*, 2004, ch. 3.1). Whether f_c is concave is looked at where the scan is.

Shapes: S points, N rows. Values in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lvmppl.exact.scans import NEGLIGIBLE

SLACK = 1e-9  # of a value, by which a term may lie below a chord: 1 − p is rounded as p nears 1
RISE = 0.2  # nats between two points of a scan that are too few to be another mode


@dataclass(frozen=True)
class Bounds:
    """Of the S − 1 intervals between the points of a scan ``[S - 1, N]``: ``rise`` ≥ 0, by which log p may exceed both ends
    (∞ where a term is not concave), and the ``least`` and ``steepest`` slope that any configuration may have there.
    """

    rise: Tensor
    least: Tensor
    steepest: Tensor


BoundsOf = Callable[[Tensor, Tensor], Bounds]
"""The bounds of some rows ``[M]`` over the points ``z [S, M, 1]`` of a scan, ascending."""


def secant_bounds(values: Tensor, gap: Tensor) -> Bounds:
    """Those of single functions, by their values ``[S, ...]`` at S ≥ 4 points and the distances ``gap [S - 1, ...]``.

    The first and last interval have a neighbour on one side only, and no bound.
    """
    slope = (values[1:] - values[:-1]) / gap
    bend = slope[:-1] - slope[1:]  # of the inner points
    room = (
        gap[:-1] * gap[1:] / (gap[:-1] + gap[1:])
    )  # bend · room is the height above the chord of the neighbours
    slight = SLACK * (1.0 + values[1:-1].abs())
    concave = bend * room >= -slight
    bend = bend.clamp(min=0.0) + slight / room
    inner = gap[1:-1] * bend[:-1] * bend[1:] / (bend[:-1] + bend[1:])
    inner = torch.where(concave[:-1] & concave[1:] & inner.isfinite(), inner, torch.inf)
    rise = torch.full_like(slope, torch.inf)
    rise[1:-1] = inner
    return Bounds(rise, slope.nan_to_num(nan=-torch.inf), slope.nan_to_num(nan=torch.inf))


def sees_all(values: Tensor, bounds: Bounds) -> Tensor:
    """Rows ``[N]`` of which a scan with log densities ``values [S, N]`` overlooks no mode that matters.

    The scan is trusted from the last interval before its peak to the first behind it in which all configurations fall
    towards the ends, from a height that is negligible.
    """
    low = values < values.amax(0) - NEGLIGIBLE
    interval = torch.arange(len(values) - 1, device=values.device).unsqueeze(-1)
    behind = interval >= values.argmax(0)
    falls = behind & low[:-1] & (bounds.steepest < 0)
    rises = ~behind & low[1:] & (bounds.least > 0)
    past = falls.int().cumsum(0) - falls.int() > 0
    before = (rises.int().flip(0).cumsum(0).flip(0) - rises.int()) > 0
    height = torch.maximum(values[1:], values[:-1]) + bounds.rise
    slight = (bounds.rise <= RISE) | (height < values.amax(0) - NEGLIGIBLE)
    return falls.any(0) & rises.any(0) & (slight | past | before).all(0)


__all__ = ["Bounds", "BoundsOf", "secant_bounds", "sees_all"]
