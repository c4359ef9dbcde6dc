"""Log evidence and posterior of up to three continuous latents a row by quadrature, with an error estimate.

    log p(x) = log ∫ p(x, z) dz ≈ log Σ_s w_s p(x, z_s)

The modes are found from many starts (``lvmppl.exact.modes``); each gets a chart in which the trapezoidal rule
converges exponentially if the density is smooth (``lvmppl.exact.charts``, ``lattice``). Lattices are refined,
row by row (``lvmppl.exact.refinement``), until two in succession and the lattices of three times the spacing
agree within the tolerance. What is reported is the larger disagreement, an error of the coarser rules and so
a conservative one, plus the mass beyond the box, plus what floating point hides (``lvmppl.exact.unseen``), plus
rounding. What no rule can see it cannot cover: a mode
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
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Transform

from lvmppl.errors import InputError
from lvmppl.exact.batches import Restrict
from lvmppl.exact.charts import Density, charts_of, partition_of
from lvmppl.exact.evaluation import CHUNK, LogJoint, Rows, row_shape, with_gradient
from lvmppl.exact.modes import find_modes
from lvmppl.exact.quadrature_posterior import QuadraturePosterior, unconstrained
from lvmppl.exact.refinement import MAX_NODES, Cells, joined_cells, kept_cells, refined
from lvmppl.exact.secants import BoundsOf
from lvmppl.exact.unseen import around_poles, beyond_ends

# Rows a block, such that usual lattices fit.
BLOCK = {1: 1 << 15, 2: 1 << 11, 3: 1 << 7}


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
    bounds: BoundsOf | None = None,
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
    ``bounds(index [M], z [S, M, 1])``, for d = 1: of the terms of the log joint, unconstrained; rows of which they
    show that a plain scan overlooks nothing are not searched densely (``lvmppl.exact.secants``).
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
            restrict,
            index,
            None if starts is None else starts[:, index],
            tolerance,
            nodes,
            chunk,
            wary,
            transform,
            bounds,
        )
        solved.append(block.solve(like, dim))
    log_evidence = torch.cat([s[0] for s in solved])
    error = torch.cat([s[1] for s in solved])
    concave = torch.cat([s[2] for s in solved])
    cells = joined_cells([s[3] for s in solved])
    z, _ = cells.place(cells.t, cells.chart, False)
    points = z if transform is None else transform(z)
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
    transform: Transform | None
    bounds: BoundsOf | None

    def log_joint(self, rows: Tensor) -> LogJoint:
        """The log joint of some rows of the block."""
        return self.restrict(self.index[rows])

    def _bounds(self) -> BoundsOf | None:
        """Those of some rows of the block."""
        whole = self.bounds
        return None if whole is None else lambda rows, z: whole(self.index[rows], z)

    def solve(self, like: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Cells]:
        """Log evidence, its error and whether the density is log-concave, ``[M]`` each, and the cells.

        ``like`` gives dtype and device.
        """
        size = len(self.index)
        drop = 10.0 - math.log(self.tolerance)
        modes = find_modes(
            self.log_joint, size, dim, self.starts, like, self.chunk, drop, self.wary, self._bounds()
        )
        partition = partition_of(modes)
        density = Density(self.log_joint, partition, drop, self.chunk)
        charts = charts_of(density, modes)
        progress = refined(density, charts, size, self.tolerance, self.max_nodes)
        log_evidence = progress.log_integral.logsumexp(0)
        # The last term stands for what lies beyond the boxes, at whose faces the density has fallen by
        # e^-drop.
        relative = progress.shares().sum(0) + 1e-3 * self.tolerance
        cells = kept_cells(progress, charts, partition, log_evidence)
        z, _ = cells.place(cells.t, cells.chart, False)
        whole = self.log_joint(torch.arange(size, device=like.device))
        relative = relative + beyond_ends(whole, self.transform, cells, z)
        bent = (~modes.concave).nonzero().squeeze(-1)
        relative = relative + around_poles(self.log_joint, cells, log_evidence, bent)
        relative = torch.where(modes.missed, torch.inf, relative)
        error = torch.where(relative < 1.0, -torch.log1p(-relative.clamp(max=1.0)), torch.inf)
        rounding = 16.0 * torch.finfo(like.dtype).eps * (1.0 + log_evidence.abs())
        error = torch.where(log_evidence == -torch.inf, 0.0, error + rounding)
        if torch.is_grad_enabled():
            log_evidence = with_gradient(log_evidence, whole, z, cells.log_weight.exp(), self.chunk)
        return log_evidence, error, modes.concave, cells


__all__ = ["QuadraturePosterior", "quadrature", "unconstrained"]
