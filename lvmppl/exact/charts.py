"""Coordinates in which any low-dimensional density looks like a bump: a chart for every mode.

A chart of a row maps t ∈ ℝᵈ to z = c + A·(a sinh(t/a)): centred at a mode, scaled to its width, linear within
``a`` standard deviations and exponential beyond, so that Gaussian and power tails alike vanish at a moderate
|t|.

Several modes are shared out by weights r_k(z) ≥ 0, Σ_k r_k = 1, that fall off as inverse distances, so that
chart k holds p·r_k, which has the one mode and, around the others, no feature finer than their distance
(after Becke, *A multicenter numerical integration scheme for polyatomic molecules*, J. Chem. Phys. 88, 1988).

Shapes: ``N`` rows, ``M`` of them in a chart, ``K`` modes a row, ``S`` points, ``d`` dims. Logs in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lvmppl.exact.batches import Restrict, Search, evaluated, in_step
from lvmppl.exact.modes import Modes, square_range
from lvmppl.exact.scans import LINEAR
from lvmppl.exact.single_modes import CORE

# a, standard deviations up to which the map is linear, is LINEAR while a chart is sought; then 4 if all of the density
# is within 12 standard deviations, 1 if it reaches beyond 100: a longer straight part suits light tails, a
# shorter one heavy tails.
LIGHT, HEAVY = (12.0, 4.0), (100.0, 1.0)
LIMIT = 340.0  # |t/a| where the square of sinh is about to overflow
POWER = 4.0  # β of the weights r_k ∝ (|z − c_k|² + s_k²)^−β
# Where mass is looked for around another mode: in units of its scale, and of its distance.
STEPS = tuple(sign * 2.0**k for k in range(1, 7) for sign in (1.0, -1.0))
SHARES = tuple(sign * s for s in (0.03, 0.06, 0.12, 0.25, 0.5, 0.75, 1.0, 2.0) for sign in (1.0, -1.0))
WIDENED = 4  # times that a box is widened by what is found so
# Offsets of successive lattices, in spacings, differ so that two of them do not err alike.
OFFSETS = (0.6180339887498949, 0.7548776662466927, 0.8191725133961645)


@dataclass(frozen=True)
class Partition:
    """The weights r_k: ``centre [K, N, d]`` and ``square [K, N]`` (s_k²) in the units of ``white [N, d,
    d]``.
    """

    centre: Tensor
    square: Tensor
    white: Tensor
    present: Tensor

    def log_weight(self, k: int, z: Tensor) -> Tensor:
        """log r_k(z) at ``z [S, N, d]``: ``[S, N]``."""
        if len(self.centre) == 1:
            return z.new_zeros(z.shape[:-1])
        away = applied(self.white, z - self.centre.unsqueeze(1))  # [K, S, N, d]
        # Distances whose squares would overflow are all alike.
        far = square_range(away.dtype)[1]
        square = away.clamp(-far, far).square().sum(-1) + self.square.unsqueeze(1)
        logs = (-POWER * square.log()).masked_fill(~self.present.unsqueeze(1), -torch.inf)
        return logs[k] - logs.logsumexp(0)

    def of(self, rows: Tensor) -> Partition:
        """The weights of some rows."""
        return Partition(self.centre[:, rows], self.square[:, rows], self.white[rows], self.present[:, rows])


@dataclass(frozen=True)
class Chart:
    """Chart k of the rows ``rows [M]``: ``centre [M, d]``, ``scale [M, d, d]``, and the box ``low``, ``high
    [M, d]`` in t.
    """

    k: int
    rows: Tensor
    centre: Tensor
    scale: Tensor
    linear: Tensor
    low: Tensor
    high: Tensor

    def place(self, t: Tensor) -> Tensor:
        """z at ``t [S, M, d]``."""
        return self.centre + applied(self.scale, self.linear * (t / self.linear).sinh())

    def find(self, z: Tensor) -> Tensor:
        """t at ``z [S, M, d]``."""
        u = applied(torch.linalg.inv(self.scale), z - self.centre)
        return self.linear * (u / self.linear).asinh()

    def log_jacobian(self, t: Tensor) -> Tensor:
        """log |∂z/∂t|: ``[S, M]``."""
        return self.scale.det().abs().log() + (t / self.linear).cosh().log().sum(-1)

    def of(self, index: Tensor) -> Chart:
        """The chart of some of its rows, by position or mask in ``rows``."""
        tensors = (self.rows, self.centre, self.scale, self.linear, self.low, self.high)
        return Chart(self.k, *(v[index] for v in tensors))


Ask = tuple[Chart, Tensor]
"""A chart, and the points t ``[S, M, d]`` at which p·r_k is asked for."""


@dataclass(frozen=True)
class Density:
    """What is integrated: the log joint of any rows, and the weights of the modes.

    A box ends where the integrand is ``drop`` nats below its maximum.
    """

    restrict: Restrict
    partition: Partition
    drop: float
    chunk: int

    def values(self, asks: Sequence[Ask]) -> list[Tensor]:
        """log (p·r_k) at the points ``t [S, M, d]`` of every chart that is asked of: ``[S, M]`` each, −∞ where it is not a
        number.
        """
        points = [chart.place(t) for chart, t in asks]
        requests = [(chart.rows, z) for (chart, _), z in zip(asks, points, strict=True)]
        found = []
        for (chart, _), z, value in zip(
            asks, points, evaluated(self.restrict, requests, self.chunk), strict=True
        ):
            whole = value + self.partition.of(chart.rows).log_weight(chart.k, z)
            found.append(whole.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))
        return found


def applied(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix [M, d, d]`` times ``vector [..., M, d]``, column by column: far faster than matmul for d ≤
    3.
    """
    columns = (matrix[..., j] * vector[..., j : j + 1] for j in range(vector.shape[-1]))
    total: Tensor = sum(columns, torch.zeros((), dtype=vector.dtype, device=vector.device))
    return total


def partition_of(modes: Modes) -> Partition:
    """The weights r_k of ``modes``, their distances measured in units of the mean of their covariances."""
    dim = modes.centre.shape[-1]
    share = (modes.present / modes.present.sum(0))[..., None, None]
    cholesky = torch.linalg.cholesky_ex((share * (modes.scale @ modes.scale.mT)).sum(0)).L
    white = torch.linalg.solve_triangular(cholesky, torch.eye(dim).to(cholesky), upper=False)
    square = (white @ modes.scale).det().abs() ** (2.0 / dim)
    return Partition(modes.centre, square.clamp(min=torch.finfo(square.dtype).tiny), white, modes.present)


def charts_of(density: Density, modes: Modes) -> list[Chart]:
    """A chart for every mode, centred, scaled and bracketed."""
    charts, settled = [], []
    for k, present in enumerate(modes.present):
        rows = present.nonzero().squeeze(-1)
        box = torch.full_like(modes.centre[k, rows], 5.0)
        linear = torch.full_like(box[:, :1], LINEAR)
        known = modes.box.known[rows] & (k == 0)
        low = torch.where(known.unsqueeze(-1), modes.box.low[rows], -box)
        high = torch.where(known.unsqueeze(-1), modes.box.high[rows], box)
        charts.append(Chart(k, rows, modes.centre[k, rows], modes.scale[k, rows], linear, low, high))
        settled.append(known)
    searches = [
        _fitted(density, modes, c, (~s).nonzero().squeeze(-1)) for c, s in zip(charts, settled, strict=True)
    ]
    return in_step(searches, density.values)


def _fitted(density: Density, modes: Modes, chart: Chart, todo: Tensor) -> Search[Ask, Chart]:
    """The chart centred, scaled and bracketed in its rows ``todo [M]``, then tailored.

    A face that lies where another mode leaves nothing to this chart hides what is left beyond: the box is widened to what
    is seen around the other modes, and bracketed anew.
    """
    if len(todo):
        chart = yield from _centred(chart, todo)
        chart = yield from _bracketed(density.drop, chart, todo)
        for _ in range(WIDENED):
            wider = yield from _with_islands(density.drop, modes, chart)
            grown = ((wider.low < chart.low) | (wider.high > chart.high)).any(-1).nonzero().squeeze(-1)
            chart = wider
            if len(grown) == 0:
                break
            again = yield from _bracketed(density.drop, chart, grown)
            chart = replace(again, low=again.low.minimum(chart.low), high=again.high.maximum(chart.high))
    return _tailored(chart)


def lattice_points(chart: Chart, n: int, level: int) -> Tensor:
    """The nodes t ``[nᵈ, M, d]`` of lattice number ``level``, last axis fastest."""
    dim = chart.low.shape[-1]
    index = torch.cartesian_prod(*[torch.arange(n, device=chart.low.device)] * dim).view(-1, dim)
    offset = torch.tensor([(0.5 + level * phase) % 1.0 for phase in OFFSETS[:dim]]).to(chart.low)
    return chart.low + (index + offset).unsqueeze(1) * ((chart.high - chart.low) / n)


def _centred(chart: Chart, todo: Tensor) -> Search[Ask, Chart]:
    """Move and scale the chart to the mean and covariance of the core of p·r_k (curvature misleads at kinks
    and flat tops).
    """
    dim = chart.centre.shape[-1]
    n = (33, 13, 11)[dim - 1]
    for _ in range(8):
        part = chart.of(todo)
        part = replace(part, low=torch.full_like(part.low, -5.0), high=torch.full_like(part.high, 5.0))
        t = lattice_points(part, n, 0)
        values = yield part, t
        core = values > values.amax(0) - CORE
        weight = (values + part.log_jacobian(t)).masked_fill(~core, -torch.inf).softmax(0).nan_to_num(0.0)
        u = part.linear * (t / part.linear).sinh()
        mean = (weight.unsqueeze(-1) * u).sum(0)
        centred = (weight.sqrt().unsqueeze(-1) * (u - mean)).movedim(0, -1)  # [M, d, S]
        cholesky = torch.linalg.cholesky(centred @ centred.mT + 0.03 * torch.eye(dim).to(mean))
        widths = torch.linalg.svdvals(cholesky)
        off = (mean.norm(dim=-1) > 0.5) | (widths.amax(-1) > 1.5) | (widths.amin(-1) < 0.6)
        off &= weight.sum(0) > 0
        if not off.any():
            break
        todo = todo[off]
        centre, scale = chart.centre.clone(), chart.scale.clone()
        centre[todo] = (part.centre + applied(part.scale, mean))[off]
        scale[todo] = (part.scale @ cholesky)[off]
        chart = replace(chart, centre=centre, scale=scale)
    return chart


def _bracketed(drop: float, chart: Chart, todo: Tensor) -> Search[Ask, Chart]:
    """Widen the box until the integrand has fallen by ``drop`` at every face, or ``LIMIT`` is
    reached.
    """
    dim = chart.centre.shape[-1]
    n = (32, 12, 9)[dim - 1]
    near = torch.tensor([-1.0, 0.0, 1.0] if dim == 3 else [-3.0, -1.0, 0.0, 1.0, 3.0]).to(chart.low)
    index = torch.cartesian_prod(*[torch.arange(n + len(near))] * dim).view(-1, dim).to(chart.rows.device)
    low, high, reach = chart.low.clone(), chart.high.clone(), LIMIT * LINEAR
    for _ in range(24):
        part = chart.of(todo)
        even = torch.arange(n).to(low).view(-1, 1, 1) / (n - 1)
        ticks = torch.cat(
            [low[todo] + even * (high - low)[todo], near.view(-1, 1, 1).expand(-1, *part.low.shape)]
        )
        t = torch.stack([ticks[index[:, i], :, i] for i in range(dim)], -1)
        values = (yield part, t) + part.log_jacobian(t)
        grid = (values - values.amax(0)).view(*[n + len(near)] * dim, -1)
        spacing = ((high - low) / (n - 1))[todo]
        open_ = torch.zeros_like(todo, dtype=torch.bool)
        for axis in range(dim):
            others = tuple(i for i in range(dim) if i != axis)
            matters = (grid.amax(others) if others else grid) > -drop
            tick = ticks[..., axis]
            first = torch.where(matters, tick, torch.inf).amin(0)
            last = torch.where(matters, tick, -torch.inf).amax(0)
            at_low = (first <= low[todo, axis]) & (first > -reach)
            at_high = (last >= high[todo, axis]) & (last < reach)
            wider = 0.7 * (high - low)[todo, axis]
            ahead = torch.where(at_low, first - wider, first - spacing[:, axis])
            behind = torch.where(at_high, last + wider, last + spacing[:, axis])
            known = first.isfinite() & last.isfinite()
            low[todo, axis] = torch.where(known, ahead, low[todo, axis]).clamp(min=-reach)
            high[todo, axis] = torch.where(known, behind, high[todo, axis]).clamp(max=reach)
            open_ |= known & (at_low | at_high)
        todo = todo[open_]
        if len(todo) == 0:
            break
    return replace(chart, low=low, high=high)


def _with_islands(drop: float, modes: Modes, chart: Chart) -> Search[Ask, Chart]:
    """Widen the box to hold what the other modes leave to this chart, which a search from its own mode may
    overlook.
    """
    rows, low, high = chart.rows, chart.low, chart.high
    others = [j for j, present in enumerate(modes.present) if j != chart.k and present[rows].any()]
    if not others:
        return chart
    around = [_around(modes.centre[j, rows], modes.scale[j, rows], chart.centre) for j in others]
    points = torch.cat([chart.centre.unsqueeze(0), *(z for z, _ in around)])
    own, *values = (yield chart, chart.find(points)).split([1, *(len(z) for z, _ in around)])
    least = own[0] + chart.scale.det().abs().log() - drop
    for j, (z, log_volume), value in zip(others, around, values, strict=True):
        matters = ((value + log_volume > least) & modes.present[j, rows]).unsqueeze(-1)
        t = chart.find(z)
        low = torch.minimum(low, torch.where(matters, t - 0.5, torch.inf).amin(0))
        high = torch.maximum(high, torch.where(matters, t + 0.5, -torch.inf).amax(0))
    return replace(chart, low=low, high=high)


def _around(centre: Tensor, scale: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Points ``[S, M, d]`` at all distances around a mode at ``centre [M, d]``, in units of its scale and of its distance
    from ``own [M, d]``, and the log volumes ``[S, M]`` that each stands for.
    """
    dim = centre.shape[-1]
    axes = scale.movedim(-1, 0)  # [d, M, d]
    distance = (centre - own).norm(dim=-1, keepdim=True)
    units = axes / axes.norm(dim=-1, keepdim=True)
    steps = torch.cat(
        [
            torch.zeros_like(centre).unsqueeze(0),
            *(s * axes for s in STEPS),
            *(s * distance * units for s in SHARES),
            *(s * (centre - own).unsqueeze(0) for s in SHARES if s != -1.0),
        ]
    )
    white = torch.linalg.solve(scale, steps.movedim(0, -1)).movedim(-1, 0)
    log_volume = scale.det().abs().log() + dim * white.norm(dim=-1).clamp(min=1.0).log()
    return centre + steps, log_volume


def _tailored(chart: Chart) -> Chart:
    """The a that suits the reach of the chart, its box being the same in z."""
    u_low, u_high = (chart.linear * (t / chart.linear).sinh() for t in (chart.low, chart.high))
    reach = torch.maximum(u_low.abs(), u_high.abs()).amax(-1, keepdim=True)
    linear = torch.where(reach > HEAVY[0], HEAVY[1], torch.where(reach < LIGHT[0], LIGHT[1], chart.linear))
    low, high = (linear * (u / linear).asinh() for u in (u_low, u_high))
    return replace(chart, linear=linear, low=low, high=high)
