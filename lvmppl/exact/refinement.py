"""Refine the lattices of every row until its error meets a tolerance, and keep the cells that carry the
posterior.

The error of a lattice is taken to be the largest of: its change from the last one, whose offset differs; the
spread of its sub-lattices of three times the spacing, or, once their fall shows the density to be smooth, of
those of twice the spacing; and the mass beyond its box.

Shapes: ``N`` rows, ``M`` of them in a chart, ``K`` charts a row, ``Q`` cells kept a row, ``d`` dims. Logs in
nats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lvmppl.exact.batches import in_step
from lvmppl.exact.charts import Chart, Density, Partition
from lvmppl.exact.lattice import Lattice, integrate

# Points an axis of successive lattices: multiples of 6, as lattices of twice and three times the spacing are
# compared.
LADDER = (12, 18, 24, 30, 36, *(6 * round(7 * 1.25**i) for i in range(32)))
MAX_NODES = {1: 1 << 15, 2: 1 << 20, 3: 1 << 21}
# Spacing of the first lattice, in standard deviations of a Gaussian: the next one then tells of it that it is exact.
FIRST = {1: 0.25, 2: 0.45, 3: 0.45}
# Nodes times rows worked on at once.
POINTS = 1 << 18
# Nodes of a row, over all its charts and lattices, after which it keeps the error that it has: minutes would not tell more
# of a density along a thin curve, whose every piece has a chart of its own.
SPENT = 1 << 23
# Factor on disagreements that may be small by accident.
SAFETY = 4.0
# Cells kept of a block: the nodes of a hard row are those of its finest lattice that has few enough.
KEPT = 1 << 23
KEPT_LEAST = 1 << 12
# Nodes this far below the integral, in nats, are not kept.
PRUNED = 16.0


@dataclass(frozen=True)
class Cells:
    """The lattice cells that carry the posterior, for flat rows N: what sampling and error estimates need.

    ``t [Q, N, d]``, ``log_weight [Q, N]`` (normalised), ``residue [Q, N]`` (which of the 3ᵈ lattices of three
    times the spacing), ``chart [Q, N]``; the charts' ``centre``, ``scale``, ``spacing [K, N, ...]``; the
    modes' weights.
    """

    t: Tensor
    log_weight: Tensor
    residue: Tensor
    chart: Tensor
    centre: Tensor
    scale: Tensor
    linear: Tensor
    spacing: Tensor
    partition: Partition

    def place(self, t: Tensor, chart: Tensor, measured: bool) -> tuple[Tensor, Tensor]:
        """z ``[S, N, d]`` and log (|∂z/∂t|·r_k(z)·cell volume) ``[S, N]`` at ``t [S, N, d]`` of ``chart [S,
        N]``.
        """
        rows = torch.arange(t.shape[1], device=t.device)
        z, log_measure = torch.empty_like(t), t.new_zeros(t.shape[:-1])
        for k in range(len(self.centre)):
            box = self.spacing[k]
            whole = Chart(k, rows, self.centre[k], self.scale[k], self.linear[k], box, box)
            at, mine = whole.place(t), chart == k
            z = torch.where(mine.unsqueeze(-1), at, z) if k else at
            if measured:
                measure = whole.log_jacobian(t) + box.log().sum(-1) + self.partition.log_weight(k, at)
                log_measure = torch.where(mine, measure, log_measure)
        return z, log_measure


@dataclass
class Progress:
    """What is known of the K charts of N rows while they are refined."""

    log_integral: Tensor  # [K, N]
    error: Tensor  # [K, N], relative; ∞ before there are two lattices
    spread: Tensor  # [K, N], of the lattices of three times the spacing
    level: Tensor  # [K, N], index into LADDER of the next lattice
    reached: Tensor  # [K, N], and of the last one
    kept_level: Tensor  # [K, N], of the lattice whose nodes are kept
    spacing: Tensor  # [K, N, d], of that lattice
    kept: list[tuple[Tensor, ...]]  # row, chart, level, residue [4, ·]; t [·, d]; log weight [·]

    def shares(self) -> Tensor:
        """Each chart's part in the relative error of its row: ``[K, N]``."""
        share = (self.log_integral - self.log_integral.logsumexp(0)).exp().nan_to_num(nan=0.0)
        return torch.where(share > 0, share * self.error, 0.0)


def refined(
    density: Density, charts: list[Chart], num_rows: int, tolerance: float, max_nodes: int
) -> Progress:
    """Refine every chart that stands between its row and the tolerance."""
    dim = charts[0].low.shape[-1]
    top = max((i for i, n in enumerate(LADDER) if n**dim <= max_nodes), default=0)
    like, shape = charts[0].low, (len(charts), num_rows)
    progress = Progress(
        log_integral=like.new_full(shape, -torch.inf),
        error=like.new_zeros(shape),
        spread=like.new_zeros(shape),
        level=torch.zeros(shape, dtype=torch.long, device=like.device),
        reached=torch.zeros(shape, dtype=torch.long, device=like.device),
        kept_level=torch.zeros(shape, dtype=torch.long, device=like.device),
        spacing=like.new_ones(*shape, dim),
        kept=[],
    )
    active = torch.zeros(shape, dtype=torch.bool, device=like.device)
    for k, chart in enumerate(charts):
        active[k, chart.rows] = True
        progress.error[k, chart.rows] = torch.inf
        steps = (chart.high - chart.low).amax(-1, keepdim=True) / FIRST[dim]
        level = (torch.tensor(LADDER[:-1]).to(steps) < steps).sum(-1)
        progress.level[k, chart.rows] = level.clamp(max=max(0, top - 1))
    floor = max(0.9 * tolerance, 64.0 * torch.finfo(like.dtype).eps)
    first, spent = True, like.new_zeros(num_rows)
    while active.any():
        # One lattice says little of its error: the first two are evaluated together.
        begin = [progress.level, (progress.level + 1).clamp(max=top)] if first and top else [progress.level]
        sides = torch.tensor(LADDER).to(like)
        spent += sum(torch.where(active, sides[level] ** dim, 0.0).sum(0) for level in begin)
        charts[:] = _step(density, charts, active, begin, progress)
        progress.level, first = begin[-1], False
        matters = progress.shares()
        active = (
            active
            & (matters.sum(0) > floor)
            & (matters > 0.5 * floor / len(charts))
            & (progress.level < top)
            & (spent < SPENT)
        )
        progress.level = torch.where(active, _next_level(progress, floor, top), progress.level)
    return progress


def _next_level(progress: Progress, tolerance: float, top: int) -> Tensor:
    """The level at which the error, if it falls exponentially with n, meets the tolerance: at least the next,
    at most three on.
    """
    ladder = torch.tensor(LADDER).to(progress.error)
    needed = math.log(0.1 * tolerance) / 3.0 / progress.spread.clamp(1e-12, 0.5).log()
    wanted = (ladder < (ladder[progress.level] * needed).unsqueeze(-1)).sum(-1)
    return torch.maximum(progress.level + 1, torch.minimum(wanted, progress.level + 3)).clamp(max=top)


def _step(
    density: Density, charts: list[Chart], active: Tensor, levels: list[Tensor], progress: Progress
) -> list[Chart]:
    """A lattice of each of the ``levels [K, N]`` for the active rows of every chart; the charts with their boxes fitted
    anew.
    """
    low, high = [c.low.clone() for c in charts], [c.high.clone() for c in charts]
    for group in _groups(charts, active, levels):
        searches = [integrate(density, charts[k].of(part), LADDER[level], level) for k, level, part in group]
        for (k, level, part), lattice in zip(group, in_step(searches, density.values), strict=True):
            _record(lattice, level, progress)
            low[k][part], high[k][part] = lattice.chart.low, lattice.chart.high
    return [replace(c, low=low[c.k], high=high[c.k]) for c in charts]


Part = tuple[int, int, Tensor]
"""A chart, a level, and positions in the chart's rows."""


def _groups(charts: list[Chart], active: Tensor, levels: list[Tensor]) -> Iterator[list[Part]]:
    """The lattices that are wanted, a row's in order, as many at once as have ``POINTS`` nodes together."""
    group: list[Part] = []
    size = 0
    for chart, level in itertools.product(charts, levels):
        of_rows = level[chart.k, chart.rows].masked_fill(~active[chart.k, chart.rows], -1)
        for wanted in of_rows.unique().tolist():
            if wanted < 0:
                continue
            nodes = LADDER[wanted] ** chart.low.shape[-1]
            for part in torch.split((of_rows == wanted).nonzero().squeeze(-1), max(1, POINTS // nodes)):
                if group and size + nodes * len(part) > POINTS:
                    yield group
                    group, size = [], 0
                group.append((chart.k, wanted, part))
                size += nodes * len(part)
    if group:
        yield group


def _record(lattice: Lattice, level: int, progress: Progress) -> None:
    """Enter a lattice: its integral, the error that the last one and those of three times the spacing
    suggest, its nodes.
    """
    k, rows, values = lattice.used.k, lattice.used.rows, lattice.log_values
    before, past = progress.log_integral[k, rows], progress.spread[k, rows]
    change = torch.expm1(before - lattice.log_integral).abs().nan_to_num(nan=0.0)
    twice, thrice = lattice.spread
    # The spread at three times the spacing cannot vanish by accident. It bounds the error of a density with
    # kinks or jumps; of a smooth one, known by the fall of the spread since the last lattice, the error is
    # its third power or less.
    shrinkage = 0.5 * (torch.tensor(LADDER).to(past)[progress.reached[k, rows]] / lattice.n) ** 4
    smooth = torch.where(
        thrice < shrinkage * past, SAFETY * torch.maximum(twice, 10.0 * thrice**3), torch.inf
    )
    error = torch.maximum(SAFETY * change, torch.minimum(thrice, smooth)) + 2.0 * lattice.tail
    first = progress.error[k, rows].isinf() & (before == -torch.inf)
    progress.error[k, rows] = torch.where(first, torch.inf, error)
    progress.log_integral[k, rows], progress.spread[k, rows] = lattice.log_integral, thrice
    progress.reached[k, rows] = level
    log_weight = values + lattice.spacing.log().sum(-1) - lattice.log_integral
    use = log_weight > -PRUNED - math.log(len(values))
    use &= use.sum(0) <= max(KEPT_LEAST, KEPT // progress.level.shape[1])
    held = rows[use.any(0)]
    progress.kept_level[k, held], progress.spacing[k, held] = level, lattice.spacing[use.any(0)]
    node, column = use.nonzero().unbind(-1)
    dim = lattice.spacing.shape[-1]
    residue = sum((node // lattice.n ** (dim - 1 - i)) % 3 * 3**i for i in range(dim))
    which = torch.stack([rows[column], node * 0 + k, node * 0 + level, torch.as_tensor(residue)])
    progress.kept.append((which, lattice.nodes()[node, column], log_weight[node, column]))


def kept_cells(progress: Progress, charts: list[Chart], partition: Partition, log_evidence: Tensor) -> Cells:
    """The nodes of every chart's last lattice, row by row, padded to the longest."""
    which, t, log_weight = (
        torch.cat(part, -1 if part[0].dtype == torch.long else 0) for part in zip(*progress.kept, strict=True)
    )
    row, chart, level, residue = which
    log_weight = log_weight + (progress.log_integral[chart, row] - log_evidence[row])
    use = (progress.kept_level[chart, row] == level) & (log_weight > -PRUNED - 14.0)
    order = use.nonzero().squeeze(-1)
    order = order[torch.argsort(row[order], stable=True)]
    row, count = row[order], torch.bincount(row[order], minlength=len(log_evidence))
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    shape = (max(1, int(count.max())), len(log_evidence))
    dim = t.shape[-1]
    cells = Cells(
        t=t.new_zeros(*shape, dim),
        log_weight=t.new_full(shape, -torch.inf),
        residue=torch.zeros(shape, dtype=torch.long, device=t.device),
        chart=torch.zeros(shape, dtype=torch.long, device=t.device),
        centre=t.new_zeros(len(charts), shape[1], dim),
        scale=torch.eye(dim).to(t).repeat(len(charts), shape[1], 1, 1),
        linear=t.new_ones(len(charts), shape[1], 1),
        spacing=progress.spacing,
        partition=partition,
    )
    cells.t[place, row], cells.log_weight[place, row] = t[order], log_weight[order]
    cells.residue[place, row], cells.chart[place, row] = residue[order], chart[order]
    for one in charts:
        cells.centre[one.k, one.rows], cells.scale[one.k, one.rows] = one.centre, one.scale
        cells.linear[one.k, one.rows] = one.linear
    total = cells.log_weight.logsumexp(0)
    return replace(cells, log_weight=torch.where(total > -torch.inf, cells.log_weight - total, -torch.inf))


def joined_cells(parts: list[Cells]) -> Cells:
    """The cells of all blocks, padded to the most nodes and charts."""
    if len(parts) == 1:
        return parts[0]

    def join(tensors: list[Tensor], filler: float) -> Tensor:
        most = max(len(v) for v in tensors)
        return torch.cat(
            [torch.cat([v, v.new_full((most - len(v), *v.shape[1:]), filler)]) for v in tensors], 1
        )

    fillers = {"log_weight": -torch.inf, "spacing": 1.0, "linear": 1.0}
    joined = {
        f.name: join([getattr(p, f.name) for p in parts], fillers.get(f.name, 0.0))
        for f in fields(Cells)
        if f.name != "partition"
    }
    partition = Partition(
        centre=join([p.partition.centre for p in parts], 0.0),
        square=join([p.partition.square for p in parts], 1.0),
        white=torch.cat([p.partition.white for p in parts]),
        present=join([p.partition.present for p in parts], False),
    )
    return Cells(**joined, partition=partition)
