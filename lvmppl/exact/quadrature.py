"""Log evidence and posterior of up to three continuous latents a row by quadrature, with an error estimate.

    log p(x) = log ∫ p(x, z) dz ≈ log Σ_s w_s p(x, z_s)

The modes are found from many starts (``lvmppl.exact.modes``); each gets a chart in which the trapezoidal rule
converges exponentially if the density is smooth (``lvmppl.exact.charts``, ``lattice``). Lattices are refined,
row by row (``lvmppl.exact.refinement``), until two in succession and the lattices of three times the spacing
agree within the tolerance. What is reported is the larger disagreement, an error of the coarser rules and so
a conservative one, plus the mass beyond the box, plus rounding. What no rule can see it cannot cover: a mode
that none of the starts leads to. Rows whose log density is not concave where it is looked at are searched
densely (``wary``: all are); the error is a bound then if no mode is narrower than 1/500 (1/20, 1/5 in two and three
dims) of the one that it hides behind. ``starts`` add to the search: `lvmppl.exact.hidden` finds those that a model
shows.

Shapes: ``rows`` (``(N,)``, or ``(C, N)`` for N data under each of C discrete configurations, whose evidence
is then the log-sum-exp over C), ``S`` points, ``Q`` nodes kept, ``K`` charts a row, ``d`` dims. Everything is
in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Transform

from lvmppl.errors import InputError
from lvmppl.exact.charts import Density, charts_of, partition_of
from lvmppl.exact.evaluation import CHUNK, LogJoint, Rows, evaluate, row_shape, with_gradient
from lvmppl.exact.modes import Restrict, ascend, find_modes
from lvmppl.exact.refinement import MAX_NODES, Cells, joined_cells, kept_cells, refined

# Rows a block, such that usual lattices fit.
BLOCK = {1: 1 << 15, 2: 1 << 11, 3: 1 << 7}
METROPOLIS_STEPS = 12


@dataclass(frozen=True)
class QuadraturePosterior:
    """p(z | x) of every row as weighted nodes, and the log evidence with its error.

    ``log_evidence [*rows]`` is differentiable in whatever the log joint closes over, its gradient being that
    of log Σ_s w_s p(x, z_s; θ) with nodes and weights fixed. ``log_evidence_error [*rows]`` bounds its
    absolute error; ∞ if nothing can be said. ``points [Q, *rows, d]`` (in the support, after the transform)
    and ``log_weights [Q, *rows]`` (normalised, −∞ for padding) are the nodes. Where the density is 0 at every
    start, log evidence is −∞ with error 0. ``concave [*rows]``: whether the log density (unconstrained) was found concave,
    so that there is one mode and none to be missed.
    """

    log_evidence: Tensor
    log_evidence_error: Tensor
    points: Tensor
    log_weights: Tensor
    concave: Tensor
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

    def nodes(self) -> tuple[Tensor, Tensor]:
        """The nodes ``[Q, *rows, d]`` and their weights ``[Q, *rows]``: E_post[f] ≈ Σ_s w_s f(z_s)."""
        return self.points, self.log_weights.exp()

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
        value = evaluate(unconstrained(self._log_joint, self._transform), shaped, self._chunk).reshape(n, -1)
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
    wary: bool = False,
    select: Restrict | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    chunk: int = CHUNK,
) -> QuadraturePosterior:
    """The posterior and log evidence of ``log_joint(z [S, *rows, dim]) -> [S, *rows]`` for dim ≤ 3.

    ``transform`` maps ℝᵈ to the support of z (``ExpTransform``, ``SigmoidTransform``, ``biject_to(...)``);
    its log-Jacobian is added, and everything returned is in the support. ``starts [S, *rows, d]``,
    unconstrained, are tried besides points around the origin. ``tolerance`` on log evidence stops the
    refinement of a row, or else ``max_nodes`` a chart does (2¹⁵, 2²⁰, 2²¹ for d = 1, 2, 3): the error then
    says how far it came. ``wary``: search densely for modes even where the log density looks concave.
    ``select(index [M])``, the log joint ``[S, M, d] -> [S, M]`` of some flat rows, lets
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
    nodes = MAX_NODES[dim] if max_nodes is None else max_nodes
    solved = []
    for index in torch.split(torch.arange(count, device=device), BLOCK[dim] if select else max(1, count)):
        block = _Block(
            restrict, index, None if starts is None else starts[:, index], tolerance, nodes, chunk, wary
        )
        solved.append(block.solve(like, dim))
    log_evidence = torch.cat([s[0] for s in solved])
    error = torch.cat([s[1] for s in solved])
    concave = torch.cat([s[2] for s in solved])
    cells = joined_cells([s[3] for s in solved])
    z, _ = cells.place(cells.t, cells.chart, False)
    points = z if transform is None else transform(z)
    if transform is not None:
        error = error + _saturated(transform, z, points, cells.log_weight)
    return QuadraturePosterior(
        log_evidence.reshape(rows),
        error.reshape(rows),
        points.reshape(-1, *rows, dim),
        cells.log_weight.reshape(-1, *rows),
        concave.reshape(rows),
        cells,
        log_joint,
        transform,
        chunk,
    )


def unconstrained(log_joint: LogJoint, transform: Transform | None) -> LogJoint:
    """The log joint as a density over ℝᵈ: log p(x, T(z)) + log |∂T/∂z|."""
    if transform is None:
        return log_joint

    def density(z: Tensor) -> Tensor:
        support = transform(z)
        log_det: Tensor = transform.log_abs_det_jacobian(z, support)
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
            return unconstrained(select(index), transform)
        whole = unconstrained(log_joint, transform)

        def some(z: Tensor) -> Tensor:
            if len(index) == count:
                return whole(z.reshape(len(z), *rows, -1)).reshape(len(z), count)
            full = z.new_zeros(len(z), count, z.shape[-1])
            full[:, index] = z
            return whole(full.reshape(len(z), *rows, -1)).reshape(len(z), count)[:, index]

        return some

    return restrict


@dataclass(frozen=True)
class _Block:
    """Rows ``index [M]`` that are worked on together."""

    restrict: Restrict
    index: Tensor
    starts: Tensor | None
    tolerance: float
    max_nodes: int
    chunk: int
    wary: bool

    def log_joint(self, rows: Tensor) -> LogJoint:
        """The log joint of some rows of the block."""
        return self.restrict(self.index[rows])

    def solve(self, like: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Cells]:
        """Log evidence, its error and whether the density is log-concave, ``[M]`` each, and the cells.

        ``like`` gives dtype and device.
        """
        size = len(self.index)
        modes = find_modes(self.log_joint, size, dim, self.starts, like, self.chunk, self.wary)
        partition = partition_of(modes)
        density = Density(self.log_joint, partition, 10.0 - math.log(self.tolerance), self.chunk)
        charts = charts_of(density, modes)
        progress = refined(density, charts, size, self.tolerance, self.max_nodes)
        log_evidence = progress.log_integral.logsumexp(0)
        # The last term stands for what lies beyond the boxes, at whose faces the density has fallen by
        # e^-drop.
        relative = progress.shares().sum(0) + 1e-3 * self.tolerance
        relative = torch.where(modes.missed, torch.inf, relative)
        error = torch.where(relative < 1.0, -torch.log1p(-relative.clamp(max=1.0)), torch.inf)
        rounding = 16.0 * torch.finfo(like.dtype).eps * (1.0 + log_evidence.abs())
        error = torch.where(log_evidence == -torch.inf, 0.0, error + rounding)
        cells = kept_cells(progress, charts, partition, log_evidence)
        if torch.is_grad_enabled():
            z, _ = cells.place(cells.t, cells.chart, False)
            whole = self.log_joint(torch.arange(size, device=like.device))
            log_evidence = with_gradient(log_evidence, whole, z, cells.log_weight.exp(), self.chunk)
        return log_evidence, error, modes.concave, cells


def _saturated(transform: Transform, z: Tensor, points: Tensor, log_weight: Tensor) -> Tensor:
    """Error from where the support's edge is reached in floating point, so the density beyond cannot be seen: ``[N]``.

    A power law at the edge is an exponential in z: what lies beyond is the geometric continuation of the masses of the
    last two bands before the edge, each a fifth of the way to it.
    """
    back = transform.inv(points)
    lost = ((back - z).abs() > 1e-2 * (1.0 + z.abs())) | ~back.isfinite()
    weight = log_weight.exp()
    mass = torch.where(lost.any(-1), weight, 0.0).sum(0)
    error = torch.where(mass > 1e-3, torch.inf, 100.0 * mass)
    for side in (z, -z):
        edge = torch.where(lost & (side > 0), side, torch.inf).amin(0)  # [N, d]
        share = torch.where(edge.isfinite(), side / edge, 0.0)
        bands = [
            torch.where((share > low) & (share <= low + 0.2), weight.unsqueeze(-1), 0.0).sum(0)
            for low in (0.6, 0.8)
        ]
        falling = bands[1] < bands[0]
        ratio = torch.where(falling, bands[1] / torch.where(falling, bands[0], 1.0), 0.0)
        beyond = torch.where(
            falling, bands[1] * ratio / (1.0 - ratio), torch.where(bands[1] > 0, torch.inf, 0.0)
        )
        error = error + 2.0 * beyond.sum(-1)
    return error
