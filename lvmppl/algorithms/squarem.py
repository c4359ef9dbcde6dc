"""Accelerated EM: squared iterative extrapolation (Varadhan & Roland 2008, Scand. J. Statist. 35, scheme S3).

Of two EM steps θ₀ → θ₁ → θ₂, in unconstrained coordinates u, with r = u₁ − u₀ and v = (u₂ − u₁) − r,

    u' = u₀ − 2 α r + α² v        α = −‖r‖ / ‖v‖, at most −1

is what the steps would come to were they those of a linear map; α = −1 gives u₂ itself. Whoever steps there must first
see that the objective is no lower than at θ₁, and else go to θ₂ as EM does: then it never falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lvmppl.algorithms.expected import Weights
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.statistics import Statistics
from lvmppl.density import Coordinates, Values

Expected = tuple[float, Weights, Mapping[str, Statistics]]
"""An E-step: log p(x; θ), the weights of every factor, and the expected statistics."""


class Squarem:
    """Every second of EM's updates extrapolated from the two before it."""

    def __init__(self, problem: Problem, admissible: Callable[[Values], dict[str, Tensor]]) -> None:
        """admissible: θ → the nearest over which M-steps maximise (spreads at or above their floor)."""
        self._coordinates = Coordinates(problem.model.specs, problem.free_theta)
        self._admissible = admissible
        self._start: Values | None = None

    def step(
        self, before: Values, after: dict[str, Tensor], objective: float, e_step: Callable[[Values], Expected]
    ) -> tuple[dict[str, Tensor], Expected | None]:
        """`after`, the update of `before`, or if it is a pair's second and log p is no lower there, θ' and its E-step.

        objective: log p at `before`.
        """
        if self._start is None:
            self._start = before
            return after, None
        start, self._start = self._start, None
        farther = self._extrapolated(start, before, after)
        if farther is None:
            return after, None
        try:
            farther = self._admissible(farther)
            expected = e_step(farther)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # far off, a matrix may be singular
            return after, None
        return (farther, expected) if objective <= expected[0] < math.inf else (after, None)

    def _extrapolated(self, *points: Values) -> dict[str, Tensor] | None:
        """θ beyond the last of three points; parameters at a boundary, where u is infinite, stay at the last."""
        first, middle, last = (self._coordinates.unconstrain(p) for p in points)
        names = [n for n in first if all(bool(torch.isfinite(u[n]).all()) for u in (first, middle, last))]
        r = {n: middle[n] - first[n] for n in names}
        v = {n: last[n] - middle[n] - r[n] for n in names}
        length, bend = (sum(float(t.square().sum()) for t in own.values()) ** 0.5 for own in (r, v))
        if not length > bend > 0:  # α ≥ −1: the steps do not shrink slowly, and EM's own is as good
            return None
        alpha = -length / bend
        moved = {n: first[n] - 2 * alpha * r[n] + alpha**2 * v[n] for n in names}
        new = self._coordinates.constrain({**last, **moved})
        return {**points[-1], **{n: new[n] for n in names}}


__all__ = ["Expected", "Squarem"]
