"""The posterior of up to three continuous latents a row, as the rule that found its evidence left it.

Nodes, weights and log densities are kept, so that what is asked for later costs no evaluation of the model, or one
batch of them: E_post[f] = Σ_s w_s f(z_s), and log p(z_s | x) is what a node's weight is made of,

    log w_s = log p(z_s | x) + log r_k(z_s) + log |∂z/∂t| + log (volume of the cell).

Shapes: ``rows`` (``(N,)``, or ``(C, N)``), ``Q`` nodes, ``K`` charts a row, ``d`` dims. Everything is in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Transform

from lvmppl.density import unvalidated
from lvmppl.exact.evaluation import CHUNK, LogJoint, evaluate
from lvmppl.exact.peaks import maximised
from lvmppl.exact.refinement import Cells

METROPOLIS_STEPS = 12
# A chart whose highest node is this far below that of another, in nats a dimension, does not hold the mode: nodes are half
# a standard deviation apart.
BELOW = 1.0


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
    def log_density(self) -> Tensor:
        """log p(z_s | x) at the nodes, over the support, without evaluating anything: ``[Q, *rows]``, −∞ for padding."""
        cells = self.cells
        z, log_measure = cells.place(cells.t, cells.chart, True)
        present = cells.log_weight > -torch.inf
        density = torch.where(present, cells.log_weight - log_measure, -torch.inf).view(
            self.log_weights.shape
        )
        if self._transform is None:
            return density
        log_det = _log_det(self._transform, z.view(self.points.shape), self.points)
        return torch.where(density > -torch.inf, density - log_det, -torch.inf)

    @property
    def entropy(self) -> Tensor:
        """−Σ_s w_s log p(z_s | x), of the density over the support: ``[*rows]``. No evaluation."""
        density = self.log_density
        return -torch.where(density > -torch.inf, self.log_weights.exp() * density, 0.0).sum(0)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z | x) for ``z [S, *rows, d]`` in the support: ``[S, *rows]``. One evaluation."""
        return self._log_joint(z) - self.log_evidence

    def mode(self) -> tuple[Tensor, Tensor]:
        """The highest point of p(z | x) in the support, and log p(x, z) there: ``[*rows, d]`` and ``[*rows]``.

        Sought around the highest node of every chart. One batch of evaluations where the density is smooth there; more
        for a kink, or a maximum at the edge of the support. A density without bound at the edge has no mode: the point is
        where floating point ends.
        """
        return self.highest(self._log_joint, self.log_density, self.cells.chart.view(self.log_weights.shape))

    def highest(self, function: LogJoint, heights: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The highest point of a function of z that is piecewise smooth, and its value there, as ``mode`` has them.

        ``heights [Q, *rows]`` are its values at the nodes, to within a constant of a row. Sought around the highest node
        of each of the ``groups [Q, *rows]``, numbered from 0, but those far below the highest of all.
        """
        cells, rows, dim = self.cells, self.log_weights.shape[1:], self.points.shape[-1]
        heights, groups = heights.reshape(cells.log_weight.shape), groups.reshape(cells.log_weight.shape)
        starts, tops = [], []
        for group in range(int(groups.max()) + 1):
            top, index = heights.masked_fill(groups != group, -torch.inf).max(0)  # [N]
            starts.append(index)
            tops.append(top)
        sought = (torch.stack(tops) > heights.amax(0) - BELOW * dim).any(1)
        index = torch.stack(starts)[sought]  # [P, N]
        chart = torch.gather(cells.chart, 0, index)
        start = torch.gather(cells.t, 0, index.unsqueeze(-1).expand(*index.shape, dim))  # [P, N, d]

        def placed(t: Tensor) -> Tensor:
            z = cells.place(t, chart.repeat(len(t) // len(chart), 1), False)[0].view(-1, *rows, dim)
            return z if self._transform is None else self._transform(z)

        half = cells.spacing[chart, torch.arange(chart.shape[1], device=chart.device)]
        with unvalidated():  # the edge of the support is reached on the way
            point, value = maximised(lambda t: function(placed(t)).flatten(1), start, half, self._chunk)
        best = value.argmax(0)
        value = torch.gather(value, 0, best.unsqueeze(0))[0]
        at = placed(point).view(point.shape)
        found = torch.gather(at, 0, best[None, :, None].expand(1, *point.shape[1:]))[0]
        return found.view(*rows, dim), value.view(rows)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` draws a row: ``[n, *rows, d]``. One batch of (1 + ``METROPOLIS_STEPS``) n evaluations a row.

        A node is drawn by weight and a point uniformly in its cell; 12 independence Metropolis steps with
        this proposal correct the density within the cells. What is left is a bias of (1 − 1/c)¹² in total
        variation, c the largest ratio of the density in a cell to that at its node: below 1e-6 for a smooth
        density, whose cells are half a standard deviation.
        """
        rows = self.log_weights.shape[1:]
        proposals, ratios = self._propose((1 + METROPOLIS_STEPS) * n, generator)
        state, ratio = proposals[:n], ratios[:n]
        for proposal, other in zip(proposals[n:].split(n), ratios[n:].split(n), strict=True):
            uniform = torch.rand(ratio.shape, generator=generator, dtype=ratio.dtype, device=ratio.device)
            accept = uniform.log() < other - ratio
            state = torch.where(accept.unsqueeze(-1), proposal, state)
            ratio = torch.where(accept, other, ratio)
        z = state.reshape(n, *rows, -1)
        return z if self._transform is None else self._transform(z)

    def _propose(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Unconstrained proposals ``[n, N, d]`` and their log importance ratios ``[n, N]``."""
        cells = self.cells
        cumulative = cells.log_weight.exp().cumsum(0).T.contiguous()  # [N, Q]
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
        with unvalidated():
            value = evaluate(unconstrained(self._log_joint, self._transform), shaped, self._chunk).reshape(
                n, -1
            )
        return z, value + log_measure - torch.gather(cells.log_weight, 0, node)

    def _piece(self) -> int:
        """Nodes over all rows at once such that ``chunk`` points are not exceeded."""
        return max(1, self._chunk // max(1, self.log_weights[0].numel()))


def unconstrained(log_joint: LogJoint, transform: Transform | None) -> LogJoint:
    """The log joint as a density over ℝᵈ: log p(x, T(z)) + log |∂T/∂z|."""
    if transform is None:
        return log_joint

    def density(z: Tensor) -> Tensor:
        support = transform(z)
        return log_joint(support) + _log_det(transform, z, support)

    return density


def _log_det(transform: Transform, z: Tensor, support: Tensor) -> Tensor:
    """log |∂T/∂z| at ``z [S, *rows, d]``: ``[S, *rows]``."""
    log_det: Tensor = transform.log_abs_det_jacobian(z, support)
    return log_det.sum(-1) if log_det.dim() == z.dim() else log_det


__all__ = ["QuadraturePosterior", "unconstrained"]
