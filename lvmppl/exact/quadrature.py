"""Log evidence and posterior of up to three continuous latents a row by quadrature, with an error estimate.

    log p(x) = log ∫ p(x, z) dz ≈ log Σ_s w_s p(x, z_s)

The modes are found from many starts (``lvmppl.exact.modes``); each gets a chart in which the trapezoidal rule
converges exponentially if the density is smooth (``lvmppl.exact.lattice``). Lattices are refined, row by row,
until two in succession and the lattices of three times the spacing agree within the tolerance. What is
reported is the larger disagreement, an error of the coarser rules and so a conservative one, plus the mass
beyond the box, plus rounding. What no rule can see, a mode that none of the starts leads to, it cannot cover:
give ``starts`` (draws from the prior, say) where the posterior may have modes that lie far from one another
and from the origin.

Shapes: ``rows`` (``(N,)``, or ``(C, N)`` for N data under each of C discrete configurations, whose evidence
is then the log-sum-exp over C), ``S`` points, ``Q`` nodes kept, ``K`` charts a row, ``d`` dims. Everything is
in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from torch.distributions import Transform

from lvmppl.errors import InputError
from lvmppl.exact.evaluation import CHUNK, LogJoint, Rows, evaluate, row_shape, with_gradient
from lvmppl.exact.lattice import Chart, Density, Lattice, Partition, charts_of, integrate, partition_of
from lvmppl.exact.modes import Restrict, ascend, find_modes

# Points an axis of successive lattices: multiples of 6, as lattices of twice and three times the spacing are
# compared.
LADDER = (12, 18, 24, 30, 36, *(6 * round(7 * 1.25**i) for i in range(32)))
MAX_NODES = {1: 1 << 15, 2: 1 << 20, 3: 1 << 21}
# Nodes times rows worked on at once, and rows a block such that usual lattices fit.
POINTS = 1 << 18
BLOCK = {1: 1 << 15, 2: 1 << 11, 3: 1 << 7}
# Cells kept of a block: the nodes of a hard row are those of its finest lattice that has few enough.
KEPT = 1 << 23
KEPT_LEAST = 1 << 12
# Nodes this far below the integral, in nats, are not kept.
PRUNED = 16.0
METROPOLIS_STEPS = 12


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


@dataclass(frozen=True)
class QuadraturePosterior:
    """p(z | x) of every row as weighted nodes, and the log evidence with its error.

    ``log_evidence [*rows]`` is differentiable in whatever the log joint closes over, its gradient being that
    of log Σ_s w_s p(x, z_s; θ) with nodes and weights fixed. ``log_evidence_error [*rows]`` bounds its
    absolute error; ∞ if nothing can be said. ``points [Q, *rows, d]`` (in the support, after the transform)
    and ``log_weights [Q, *rows]`` (normalised, −∞ for padding) are the nodes. Where the density is 0 at every
    start, log evidence is −∞ with error 0.
    """

    log_evidence: Tensor
    log_evidence_error: Tensor
    points: Tensor
    log_weights: Tensor
    cells: Cells = field(repr=False)
    _log_joint: LogJoint = field(repr=False)
    _transform: Transform | None = field(repr=False)
    _chunk: int = field(repr=False, default=CHUNK)

    def expectation(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """E_post[function(z)] and an estimate of its error, for ``function(z [S, *rows, d]) -> [S, *rows,
        ...]``.

        The error is the largest deviation among the 3ᵈ lattices of three times the spacing. Both are
        ``[*rows, ...]``.
        """
        values = torch.cat([function(part) for part in torch.split(self.points, self._piece())])
        rows = self.log_weights.shape[1:]
        shape = (*self.log_weights.shape, *[1] * (values.dim() - self.log_weights.dim()))
        weights = self.log_weights.exp().view(shape)
        values = torch.where(weights > 0, values, torch.zeros_like(values))
        mean = (weights * values).sum(0)
        error = torch.zeros_like(mean)
        for residue in range(3 ** self.points.shape[-1]):
            part = weights * (self.cells.residue.view(-1, *rows).view(shape) == residue)
            coarse = (part * values).sum(0) / part.sum(0)
            error = torch.maximum(error, 0.5 * (coarse - mean).abs().nan_to_num(nan=0.0))
        return mean, error

    @property
    def mean(self) -> Tensor:
        """E[z | x]: ``[*rows, d]``."""
        return (self.log_weights.exp().unsqueeze(-1) * self.points).sum(0)

    @property
    def covariance(self) -> Tensor:
        """Cov[z | x]: ``[*rows, d, d]``."""
        centred = (0.5 * self.log_weights).exp().unsqueeze(-1) * (self.points - self.mean)
        centred = centred.movedim(0, -1)
        return centred @ centred.mT

    @property
    def sd(self) -> Tensor:
        """Posterior standard deviations: ``[*rows, d]``."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).sqrt()

    @property
    def entropy(self) -> Tensor:
        """log Z − E_post[log p(x, z)], of the density over the support: ``[*rows]``."""
        mean, _ = self.expectation(lambda z: evaluate(self._log_joint, z, self._chunk))
        return self.log_evidence.detach() - mean

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z | x) for ``z [S, *rows, d]`` in the support: ``[S, *rows]``."""
        return self._log_joint(z) - self.log_evidence

    def mode(self) -> tuple[Tensor, Tensor]:
        """The highest point of p(z | x) in the support, and log p(x, z) there: ``[*rows, d]`` and
        ``[*rows]``.
        """
        values = evaluate(self._log_joint, self.points, self._chunk).masked_fill(
            self.log_weights.isinf(), -torch.inf
        )
        index = values.argmax(0, keepdim=True).unsqueeze(-1).expand(1, *self.points.shape[1:])
        point, value = ascend(self._log_joint, torch.gather(self.points, 0, index), self._chunk)
        return point[0], value[0]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` draws a row: ``[n, *rows, d]``.

        A node is drawn by weight and a point uniformly in its cell; 12 independence Metropolis steps with
        this proposal correct the density within the cells. What is left is a bias of (1 − 1/c)¹² in total
        variation, c the largest ratio of the density in a cell to that at its node: below 1e-6 for a smooth
        density, whose cells are half a standard deviation.
        """
        cells, rows = self.cells, self.log_weights.shape[1:]
        cumulative = cells.log_weight.exp().cumsum(0).T.contiguous()  # [N, Q]
        state, ratio = self._draw(n, cumulative, generator)
        for _ in range(METROPOLIS_STEPS):
            proposal, other = self._draw(n, cumulative, generator)
            uniform = torch.rand(ratio.shape, generator=generator, dtype=ratio.dtype, device=ratio.device)
            accept = uniform.log() < other - ratio
            state = torch.where(accept.unsqueeze(-1), proposal, state)
            ratio = torch.where(accept, other, ratio)
        z = state.reshape(n, *rows, -1)
        return z if self._transform is None else self._transform(z)

    def _draw(self, n: int, cumulative: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Unconstrained proposals ``[n, N, d]`` and their log importance ratios ``[n, N]``."""
        cells = self.cells
        uniform = torch.rand(
            (len(cumulative), n), generator=generator, dtype=cumulative.dtype, device=cumulative.device
        )
        node = (
            torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).clamp(max=cumulative.shape[1] - 1).T
        )
        chart = torch.gather(cells.chart, 0, node)
        t = torch.gather(cells.t, 0, node.unsqueeze(-1).expand(-1, -1, cells.t.shape[-1]))
        jitter = torch.rand(t.shape, generator=generator, dtype=t.dtype, device=t.device) - 0.5
        t = t + jitter * cells.spacing[chart, torch.arange(chart.shape[1], device=chart.device)]
        z, log_measure = cells.place(t, chart, True)
        shaped = z.reshape(n, *self.log_weights.shape[1:], -1)
        value = evaluate(_unconstrained(self._log_joint, self._transform), shaped, self._chunk).reshape(n, -1)
        return z, value + log_measure - torch.gather(cells.log_weight, 0, node)

    def _piece(self) -> int:
        """Nodes over all rows at once such that ``chunk`` points are not exceeded."""
        return max(1, self._chunk // max(1, self.log_weights[0].numel()))


def quadrature(
    log_joint: LogJoint,
    num_rows: Rows,
    dim: int,
    *,
    transform: Transform | None = None,
    starts: Tensor | None = None,
    tolerance: float = 1e-6,
    max_nodes: int | None = None,
    select: Restrict | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    chunk: int = CHUNK,
) -> QuadraturePosterior:
    """The posterior and log evidence of ``log_joint(z [S, *rows, dim]) -> [S, *rows]`` for dim ≤ 3.

    ``transform`` maps ℝᵈ to the support of z (``ExpTransform``, ``SigmoidTransform``, ``biject_to(...)``);
    its log-Jacobian is added, and everything returned is in the support. ``starts [S, *rows, d]``,
    unconstrained, are tried besides points around the origin. ``tolerance`` on log evidence stops the
    refinement of a row, or else ``max_nodes`` a chart does (2¹⁵, 2¹⁸, 2²⁰ for d = 1, 2, 3): the error then
    says how far it came. ``select(index [M])``, the log joint ``[S, M, d] -> [S, M]`` of some flat rows, lets
    rows be worked on in blocks, and only the hard ones be refined; give it for many rows. Memory: O(chunk)
    for the log joint, and the nodes kept.
    """
    if not 1 <= dim <= 3:
        raise InputError(
            "quadrature", "1 to 3 continuous latent dims a row", f"{dim}", "use a bound or sampling"
        )
    rows = row_shape(num_rows)
    count = math.prod(rows)
    restrict = _restriction(log_joint, rows, select, transform)
    like = torch.zeros((), dtype=dtype, device=device)
    if starts is not None:
        starts = starts.detach().to(like).reshape(-1, count, dim)
    size = BLOCK[dim] if select is not None else max(1, count)
    solved = [
        _block(
            restrict,
            index,
            dim,
            None if starts is None else starts[:, index],
            like,
            tolerance,
            max_nodes,
            chunk,
        )
        for index in torch.split(torch.arange(count, device=device), size)
    ]
    log_evidence = torch.cat([s[0] for s in solved])
    error = torch.cat([s[1] for s in solved])
    cells = _joined([s[2] for s in solved])
    z, _ = cells.place(cells.t, cells.chart, False)
    points = z if transform is None else transform(z)
    if transform is not None:
        error = error + _saturated(transform, z, points, cells.log_weight)
    return QuadraturePosterior(
        log_evidence.reshape(rows),
        error.reshape(rows),
        points.reshape(-1, *rows, dim),
        cells.log_weight.reshape(-1, *rows),
        cells,
        log_joint,
        transform,
        chunk,
    )


def _unconstrained(log_joint: LogJoint, transform: Transform | None) -> LogJoint:
    """The log joint as a density over ℝᵈ: log p(x, T(z)) + log |∂T/∂z|."""
    if transform is None:
        return log_joint

    def density(z: Tensor) -> Tensor:
        support = transform(z)
        log_det = transform.log_abs_det_jacobian(z, support)
        return log_joint(support) + (log_det.sum(-1) if log_det.dim() == z.dim() else log_det)

    return density


def _restriction(
    log_joint: LogJoint, rows: tuple[int, ...], select: Restrict | None, transform: Transform | None
) -> Restrict:
    """The unconstrained log joint of any of the flat rows; without ``select`` all rows are evaluated and some
    used.
    """
    count = math.prod(rows)

    def restrict(index: Tensor) -> LogJoint:
        if select is not None:
            return _unconstrained(select(index), transform)
        whole = _unconstrained(log_joint, transform)

        def some(z: Tensor) -> Tensor:
            if len(index) == count:
                return whole(z.reshape(len(z), *rows, -1)).reshape(len(z), count)
            full = z.new_zeros(len(z), count, z.shape[-1])
            full[:, index] = z
            return whole(full.reshape(len(z), *rows, -1)).reshape(len(z), count)[:, index]

        return some

    return restrict


@dataclass
class _Progress:
    """What is known of the K charts of N rows while they are refined."""

    log_integral: Tensor  # [K, N]
    error: Tensor  # [K, N], relative; ∞ before there are two lattices
    spread: Tensor  # [K, N], of the lattices of three times the spacing
    level: Tensor  # [K, N], index into LADDER of the next lattice
    reached: Tensor  # [K, N], and of the last one
    kept_level: Tensor  # [K, N], of the lattice whose nodes are kept
    spacing: Tensor  # [K, N, d], of that lattice
    kept: list[tuple[Tensor, ...]]  # row, chart, level, residue [4, ·]; t [·, d]; log weight [·]


def _block(
    restrict: Restrict,
    index: Tensor,
    dim: int,
    starts: Tensor | None,
    like: Tensor,
    tolerance: float,
    max_nodes: int | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Cells]:
    """Log evidence ``[M]``, its error ``[M]`` and the cells of the rows ``index [M]``."""

    def within(part: Tensor) -> LogJoint:
        return restrict(index[part])

    modes = find_modes(within, len(index), dim, starts, like, chunk)
    density = Density(within, partition_of(modes), 10.0 - math.log(tolerance), chunk)
    charts = charts_of(density, modes)
    progress = _refined(density, charts, len(index), tolerance, max_nodes or MAX_NODES[dim])
    log_evidence = progress.log_integral.logsumexp(0)
    share = (progress.log_integral - log_evidence).exp().nan_to_num(nan=0.0)
    relative = torch.where(share > 0, share * progress.error, 0.0).sum(0)
    relative = torch.where(modes.missed, torch.inf, relative)
    log_error = torch.where(relative < 1.0, -torch.log1p(-relative.clamp(max=1.0)), torch.inf)
    rounding = 16.0 * torch.finfo(like.dtype).eps * (1.0 + log_evidence.abs())
    dead = log_evidence == -torch.inf
    log_error = torch.where(dead, 0.0, log_error + rounding)
    cells = _kept_cells(progress, charts, density.partition, log_evidence)
    if torch.is_grad_enabled():
        z, _ = cells.place(cells.t, cells.chart, False)
        everything = torch.arange(len(index), device=index.device)
        log_evidence = with_gradient(log_evidence, within(everything), z, cells.log_weight.exp(), chunk)
    return log_evidence, log_error, cells


def _refined(
    density: Density, charts: list[Chart], num_rows: int, tolerance: float, max_nodes: int
) -> _Progress:
    """Refine every chart that stands between its row and the tolerance."""
    dim = charts[0].low.shape[-1]
    top = max((i for i, n in enumerate(LADDER) if n**dim <= max_nodes), default=0)
    like, shape = charts[0].low, (len(charts), num_rows)
    progress = _Progress(
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
        steps = (chart.high - chart.low).amax(-1, keepdim=True) / 0.7  # spacings to begin with
        level = (torch.tensor(LADDER[:-1]).to(steps) < steps).sum(-1)
        progress.level[k, chart.rows] = level.clamp(max=max(0, top - 1))
    floor = max(tolerance, 64.0 * torch.finfo(like.dtype).eps)
    while active.any():
        for k in range(len(charts)):
            charts[k] = _step(density, charts[k], active[k], progress)
        share = (progress.log_integral - progress.log_integral.logsumexp(0)).exp().nan_to_num(nan=0.0)
        matters = torch.where(share > 0, share * progress.error, 0.0)
        active = (
            active & (matters.sum(0) > floor) & (matters > 0.5 * floor / len(charts)) & (progress.level < top)
        )
        progress.level = torch.where(active, _next_level(progress, floor, top), progress.level)
    return progress


def _next_level(progress: _Progress, tolerance: float, top: int) -> Tensor:
    """The level at which the error, if it falls exponentially with n, meets the tolerance: at least the next,
    at most three on.
    """
    ladder = torch.tensor(LADDER).to(progress.error)
    needed = math.log(0.1 * tolerance) / 3.0 / progress.spread.clamp(1e-12, 0.5).log()
    wanted = (ladder < (ladder[progress.level] * needed).unsqueeze(-1)).sum(-1)
    return torch.maximum(progress.level + 1, torch.minimum(wanted, progress.level + 3)).clamp(max=top)


def _step(density: Density, chart: Chart, active: Tensor, progress: _Progress) -> Chart:
    """One more lattice for the active rows of a chart; the chart with its boxes fitted anew."""
    k, dim = chart.k, chart.low.shape[-1]
    low, high = chart.low.clone(), chart.high.clone()
    levels = progress.level[k, chart.rows].masked_fill(~active[chart.rows], -1)
    for level in levels.unique().tolist():
        if level < 0:
            continue
        n = LADDER[level]
        for part in torch.split((levels == level).nonzero().squeeze(-1), max(1, POINTS // n**dim)):
            lattice = integrate(density, chart.of(part), n, level)
            _record(lattice, level, progress)
            low[part], high[part] = lattice.chart.low, lattice.chart.high
    return replace(chart, low=low, high=high)


def _record(lattice: Lattice, level: int, progress: _Progress) -> None:
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
    smooth = torch.where(thrice < shrinkage * past, torch.maximum(twice, 10.0 * thrice**3), torch.inf)
    error = torch.maximum(change, torch.minimum(0.5 * thrice, smooth)) + 2.0 * lattice.tail
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


def _kept_cells(
    progress: _Progress, charts: list[Chart], partition: Partition, log_evidence: Tensor
) -> Cells:
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


def _joined(parts: list[Cells]) -> Cells:
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


def _saturated(transform: Transform, z: Tensor, points: Tensor, log_weight: Tensor) -> Tensor:
    """Error from nodes where the support's edge is reached in floating point, so the density beyond cannot be
    seen: ``[N]``.
    """
    back = transform.inv(points)
    lost = ((back - z).abs() > 1e-2 * (1.0 + z.abs())).any(-1) | ~back.isfinite().all(-1)
    mass = torch.where(lost, log_weight.exp(), 0.0).sum(0)
    return torch.where(mass > 1e-3, torch.inf, 100.0 * mass)
