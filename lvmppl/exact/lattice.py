"""The trapezoidal rule over the box of a chart, and what it says about its own error.

On a function that vanishes smoothly at the faces of the box the rule converges exponentially (Trefethen &
Weideman, *The exponentially convergent trapezoidal rule*, SIAM Review 56, 2014); the sub-lattices of twice
and three times the spacing, which the same values give, show how far it has come.

Shapes: ``M`` rows, ``n`` points an axis, ``S = nᵈ`` nodes, ``d`` dims. Logs in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lvmppl.exact.batches import Search
from lvmppl.exact.charts import LIMIT, Ask, Chart, Density, lattice_points


@dataclass(frozen=True)
class Lattice:
    """The trapezoidal rule with ``n`` points an axis over a chart's box.

    ``log_values [S, M]`` of the integrand in t, ``log_integral [M]``, ``spread`` (the largest relative
    deviations ``[M]`` of the 2ᵈ lattices of twice, and of the 3ᵈ of three times the spacing), ``tail [M]``
    (mass beyond the box, extrapolated, relative), ``chart`` with the box fitted anew.
    """

    n: int
    level: int
    spacing: Tensor
    log_values: Tensor
    log_integral: Tensor
    spread: tuple[Tensor, ...]
    tail: Tensor
    used: Chart
    chart: Chart

    def nodes(self) -> Tensor:
        """t of all nodes: ``[S, M, d]``."""
        return lattice_points(self.used, self.n, self.level)


def integrate(density: Density, chart: Chart, n: int, level: int) -> Search[Ask, Lattice]:
    """One trapezoidal rule with nᵈ nodes (n a multiple of 6) over the chart's box; asks for values once."""
    dim = chart.low.shape[-1]
    t = lattice_points(chart, n, level)
    values = (yield chart, t) + chart.log_jacobian(t)
    spacing = (chart.high - chart.low) / n
    log_volume = spacing.log().sum(-1)
    total = values.logsumexp(0)
    spread = tuple(_spread(values, n, stride, dim) for stride in (2, 3))
    grid = values.view(*[n] * dim, -1)
    tail, low, high = torch.zeros_like(total), [], []
    for axis in range(dim):
        others = tuple(i for i in range(dim) if i != axis)
        mass = grid.logsumexp(others) - total if others else grid - total
        tail = tail + _beyond(mass[0], mass[1]) + _beyond(mass[-1], mass[-2])
        reach = 0.999 * LIMIT * chart.linear[:, 0]
        tail = tail + torch.where(chart.low[:, axis] < -reach, _beyond_limit(mass), 0.0)
        tail = tail + torch.where(chart.high[:, axis] > reach, _beyond_limit(mass.flip(0)), 0.0)
        peaks = grid.amax(others) if others else grid
        edges = _box(peaks, chart.low[:, axis], chart.high[:, axis], density.drop, chart.linear[:, 0])
        low.append(edges[0])
        high.append(edges[1])
    fitted = replace(chart, low=torch.stack(low, -1), high=torch.stack(high, -1))
    if len(density.partition.centre) > 1:  # never let go of what other modes leave to this chart
        fitted = replace(fitted, low=fitted.low.minimum(chart.low), high=fitted.high.maximum(chart.high))
    return Lattice(n, level, spacing, values, total + log_volume, spread, tail, chart, fitted)


def _spread(values: Tensor, n: int, stride: int, dim: int) -> Tensor:
    """The largest relative deviation of the strideᵈ lattices of ``stride`` times the spacing from all
    together: ``[M]``.
    """
    coarse = values.view(*[n // stride, stride] * dim, -1).logsumexp(tuple(range(0, 2 * dim, 2)))
    ratio = (coarse.flatten(0, dim - 1) + dim * math.log(stride) - values.logsumexp(0)).exp()
    return (ratio - 1.0).abs().amax(0).nan_to_num(nan=0.0, posinf=torch.inf)


def _beyond(edge: Tensor, inner: Tensor) -> Tensor:
    """The mass beyond a box whose last two slices have log masses ``inner`` and ``edge``, if it goes on
    falling so.
    """
    mass, ratio = edge.exp(), (edge - inner).exp().nan_to_num(nan=0.0)
    falling = mass * ratio / (1.0 - ratio)
    stuck = torch.where(mass > 1e-12, torch.inf, 1e3 * mass)
    return torch.where(ratio < 0.9999, falling, stuck).nan_to_num(nan=0.0, posinf=torch.inf)


def _beyond_limit(mass: Tensor) -> Tensor:
    """The mass beyond a box that ends at ``LIMIT``, by the fall of the slices ``[n, M]`` some way inside its first one.

    In several dims the last slices fall because the other sides of the box end as well.
    """
    width = len(mass) // 12
    edge, inner = mass[width], mass[2 * width]
    ratio = ((edge - inner) / width).exp().nan_to_num(nan=0.0)
    rest = torch.where(ratio < 0.9999, edge.exp() / (1.0 - ratio), torch.inf)
    return torch.where(edge.exp() > 1e-12, rest, 0.0)


def _box(peaks: Tensor, low: Tensor, high: Tensor, drop: float, linear: Tensor) -> tuple[Tensor, Tensor]:
    """The box that reaches one spacing beyond the outermost of the slices ``[n, M]`` which matter, within
    ``LIMIT``.

    If the outermost slice itself matters, the fall from the one inside it says how much further to go.
    """
    n = len(peaks)
    spacing = (high - low) / n
    above = peaks - (peaks.amax(0) - drop)
    order = torch.arange(n, device=peaks.device).unsqueeze(-1)
    first = torch.where(above > 0, order, n).amin(0)
    last = torch.where(above > 0, order, -1).amax(0)
    some = last >= 0
    further = [
        (1.0 + edge.clamp(min=0.0) / (inner - edge).clamp(min=1e-3)).nan_to_num(nan=1.0).clamp(max=0.5 * n)
        for edge, inner in ((above[0], above[1]), (above[-1], above[-2]))
    ]
    new_low = low + spacing * torch.where(first == 0, -further[0], first - 1)
    new_high = low + spacing * torch.where(last == n - 1, n + further[1], last + 2)
    reach = LIMIT * linear
    new_low, new_high = torch.where(some, new_low, low), torch.where(some, new_high, high)
    return new_low.maximum(-reach), new_high.minimum(reach)
