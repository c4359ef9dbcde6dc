"""Rows whose density has one mode, told by scans alone: nothing is climbed, and the scans say where the mode is enclosed.

A scan around the origin gives a first centre and scale, those of the core of the density; scans around that, in units of
it, repeat until centre and scale stay. A row is taken to have one mode if neither scan has a peak elsewhere and, unless
the log density lies above its chords, if dense scans have none either. Every other row is left to be climbed.

Shapes: ``S`` points of a scan, ``N`` rows, ``M`` of them, ``P`` candidates, ``d`` dims. Log densities in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lvmppl.exact.batches import Restrict
from lvmppl.exact.evaluation import evaluate
from lvmppl.exact.scans import (
    LINEAR,
    SCAN,
    Peaks,
    dense_peaks,
    is_concave,
    scan_grid,
    scan_midpoints,
    scan_peaks,
    scan_points,
)
from lvmppl.exact.secants import BoundsOf, sees_all

CORE = 2.0  # a density is centred and scaled by the part of it this far below the maximum
ROUNDS = 8  # of scans, until centre and scale stay
NEAR = 2.0  # standard deviations of the centre within which the one peak of a scan is
SLACK = 1e3  # units of rounding by which a density may seem to fall
WAYS = 1 << 21  # points on the ways to candidates that are held at once
# Where the log density is looked at on the way to a candidate: ever closer to it, and all along.
WAY = (*(2.0**-j for j in range(12, 2, -1)), 0.22, 0.33, 0.44, 0.55, 0.66, 0.77, 0.88)


@dataclass(frozen=True)
class Box:
    """Where a mode is enclosed: ``low`` and ``high [N, d]`` in the t of its chart, of the rows ``known [N]``."""

    low: Tensor
    high: Tensor
    known: Tensor

    @classmethod
    def unknown(cls, like: Tensor) -> Box:
        """Of no row of ``like [N, d]``."""
        return cls(like, like, torch.zeros_like(like[:, 0], dtype=torch.bool))


@dataclass
class Single:
    """Rows ``found [N]`` with one mode, at ``centre [N, d]``, of ``scale [N, d, d]``, and whether ``concave [N]`` or even
    ``sure [N]``: bounds of the terms of the density leave no room for another mode, and concavity is not looked at.

    ``top [N]``: the highest value of a scan around the mode. ``box`` is that of the mode's chart. Entered row by row while
    they are sought.
    """

    centre: Tensor
    scale: Tensor
    found: Tensor
    concave: Tensor
    sure: Tensor
    top: Tensor
    box: Box

    @classmethod
    def nowhere(cls, centre: Tensor, scale: Tensor) -> Single:
        """None found yet."""
        no = torch.zeros_like(centre[:, 0], dtype=torch.bool)
        box = Box(centre.clone(), centre.clone(), no.clone())
        return cls(centre, scale, no, no.clone(), no.clone(), torch.full_like(centre[:, 0], -torch.inf), box)

    def of(self, rows: Tensor) -> Single:
        """Some of the rows."""
        box = Box(self.box.low[rows], self.box.high[rows], self.box.known[rows])
        one = (self.centre[rows], self.scale[rows], self.found[rows], self.concave[rows])
        return Single(*one, self.sure[rows], self.top[rows], box)

    def near(self, z: Tensor) -> Tensor:
        """Points ``z [P, N, d]`` within ``NEAR`` of the centre: ``[P, N]``."""
        white = torch.linalg.solve(self.scale, (z - self.centre).movedim(0, -1))  # [N, d, P]
        near: Tensor = (torch.linalg.vector_norm(white, dim=1) < NEAR).T
        return near

    def holds(self, peaks: Peaks) -> Tensor:
        """Whether a scan has one peak, and that within ``NEAR``: ``[N]``."""
        return peaks.only & self.near(peaks.points[:1])[0]


def single_modes(
    restrict: Restrict,
    num_rows: int,
    dim: int,
    starts: Tensor | None,
    like: Tensor,
    chunk: int,
    drop: float,
    wary: bool,
    bounds: BoundsOf | None = None,
) -> Single:
    """The rows that are seen to have one mode.

    ``starts [P, N, d]``: points from which the way to the mode must rise all along. ``drop``: a box ends where the
    density is so many nats below its maximum. ``wary``: scan rows densely even where the log density looks concave.
    ``bounds``: of the terms of the density of one axis, to tell rows of which a scan overlooks nothing.
    """
    centre, unit = like.new_zeros(num_rows, dim), torch.eye(dim).to(like).repeat(num_rows, 1, 1)
    z = scan_points(centre, unit, *SCAN[dim])
    values = evaluate(restrict(torch.arange(num_rows, device=like.device)), z, chunk)
    first = scan_peaks(z, values, SCAN[dim][0])
    begin = _core(values, centre, unit)
    single = Single.nowhere(begin[0], begin[1])
    todo = (~first.missed & (first.values[0] > -torch.inf)).nonzero().squeeze(-1)
    _scanned(restrict, single, todo, chunk, drop, bounds)
    # One axis is seen from end to end; where a scan is not in units of the mode, a ridge has peaks in several.
    single.found &= first.only | (single.concave & (dim > 1))
    elsewhere = (first.values > -torch.inf) & ~single.near(first.points)
    candidates = [torch.where(elsewhere.unsqueeze(-1), first.points, torch.nan)]
    candidates += [] if starts is None else [starts]
    _check_ways(restrict, single, torch.cat(candidates), chunk)
    doubtful = (single.found & ~single.sure & (~single.concave | wary)).nonzero().squeeze(-1)
    if len(doubtful):
        for some, scans in dense_peaks(restrict, doubtful, single.centre, single.scale, chunk):
            for peaks in scans:
                single.found[some] &= single.of(some).holds(peaks)
    return single


def _scanned(
    restrict: Restrict, single: Single, todo: Tensor, chunk: int, drop: float, bounds: BoundsOf | None
) -> None:
    """Scan the rows ``todo [M]`` around their centres until these stay, and enter what is seen then."""
    dim = single.centre.shape[-1]
    for _ in range(ROUNDS):
        if len(todo) == 0:
            return
        z = scan_points(single.centre[todo], single.scale[todo], *SCAN[dim])
        # with bounds few rows are asked whether they are concave, else one run of the model says so of all
        asked = z if bounds is not None else torch.cat([z, scan_midpoints(z)])
        values = evaluate(restrict(todo), asked, chunk)
        values, middles = values[: len(z)], values[len(z) :]
        centre, scale, settled = _core(values, single.centre[todo], single.scale[todo])
        rests, z, values, middles = todo[settled], z[:, settled], values[:, settled], middles[:, settled]
        if len(rests):
            single.found[rests] = single.of(rests).holds(scan_peaks(z, values, SCAN[dim][0]))
            single.top[rests] = values.amax(0)
            single.box.low[rests], single.box.high[rests], single.box.known[rests] = _enclosed(
                values, dim, drop
            )
            if bounds is None:
                single.concave[rests] = is_concave(values, middles)
            else:
                _bounded(restrict, single, rests, z, values, chunk, bounds)
        todo = todo[~settled]
        single.centre[todo], single.scale[todo] = centre[~settled], scale[~settled]


def _bounded(
    restrict: Restrict, single: Single, rows: Tensor, z: Tensor, values: Tensor, chunk: int, bounds: BoundsOf
) -> None:
    """Enter of which of the rows ``[M]`` a scan with ``values [S, M]`` at ``z [S, M, 1]`` overlooks nothing, and which of
    the others look concave.
    """
    single.sure[rows] = sees_all(values, bounds(rows, z))
    left = ~single.sure[rows]
    if bool(left.any()):
        middles = evaluate(restrict(rows[left]), scan_midpoints(z[:, left]), chunk)
        single.concave[rows[left]] = is_concave(values[:, left], middles)


def _core(values: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre and scale of the core of a density, by its values ``[S, N]`` over a scan in units of others, and where these
    are those already.
    """
    dim = centre.shape[-1]
    count, reach = SCAN[dim]
    u = scan_grid(centre, count, reach)  # [S, 1, d]
    wider = (u / LINEAR).square() + 1.0
    top, index = values.max(0)
    log_weight = (values + 0.5 * wider.log().sum(-1)).masked_fill(values <= top - CORE, -torch.inf)
    weight = log_weight.softmax(0).nan_to_num(0.0).unsqueeze(-1)
    mean = (weight * u).sum(0)
    centred = (weight.sqrt() * (u - mean)).movedim(0, -1)  # [N, d, S]
    covariance = centred @ centred.mT
    widths = torch.linalg.eigvalsh(covariance).clamp(min=0.0).sqrt()
    settled = (mean.norm(dim=-1) < 0.5) & (widths.amax(-1) < 1.5) & (widths.amin(-1) > 0.6)
    # A core narrower than the spacing may be anywhere between its neighbours.
    spacing = _spacing(dim) * wider[index, 0].sqrt()
    cholesky = torch.linalg.cholesky(covariance + torch.diag_embed((0.25 * spacing).square()))
    return centre + (scale @ mean.unsqueeze(-1)).squeeze(-1), scale @ cholesky, settled


def _spacing(dim: int) -> float:
    """Of the points of a scan next to its centre."""
    count, reach = SCAN[dim]
    return LINEAR * 2.0 * reach / (count - 1)


def _enclosed(values: Tensor, dim: int, drop: float) -> tuple[Tensor, Tensor, Tensor]:
    """The ends of the box ``[M, d]`` beyond which a scan in units of the mode has densities ``drop`` below the highest, and
    where both are within the scan.
    """
    count, reach = SCAN[dim]
    ticks = LINEAR * torch.linspace(-reach, reach, count).to(values)
    u = scan_grid(values.new_zeros(1, dim), count, reach)
    grid = values + 0.5 * ((u / LINEAR).square() + 1.0).log().sum(-1)
    grid = (grid - grid.amax(0)).view(*[count] * dim, -1)
    low, high = [], []
    for axis in range(dim):
        others = tuple(i for i in range(dim) if i != axis)
        matters = (grid.amax(others) if others else grid) > -drop
        low.append(matters.int().argmax(0))
        high.append(count - 1 - matters.flip(0).int().argmax(0))
    first, last = torch.stack(low, -1), torch.stack(high, -1)
    known = ((first > 0) & (last < count - 1)).all(-1)
    return ticks[(first - 1).clamp(min=0)], ticks[(last + 1).clamp(max=count - 1)], known


def _check_ways(restrict: Restrict, single: Single, candidates: Tensor, chunk: int) -> None:
    """Leave out rows in which the density does not rise all the way from the candidates ``[P, N, d]`` (NaN: none) to the
    height of the centre, or is higher there than the grid of a smooth mode can overlook.
    """
    there = ~candidates[..., 0].isnan()
    dim = candidates.shape[-1]
    which, rows = there.any(1), (there.any(0) & single.found).nonzero().squeeze(-1)
    if len(rows) == 0:
        return
    candidates = candidates[which]
    share = torch.tensor([0.0, *WAY, 1.0]).to(candidates).view(-1, 1, 1, 1)
    for some in torch.split(rows, max(1, WAYS // (len(share) * len(candidates)))):
        begin, end = candidates[:, some], single.centre[some]
        z = torch.where(begin.isnan(), end, begin)
        z = z + share * (end - z)
        values = evaluate(restrict(some), z.flatten(0, 1), chunk).view(z.shape[:-1])
        peak = single.top[some] + dim * (0.02 + 0.2 * _spacing(dim) ** 2)
        single.found[some] &= ~((values[0] > peak) & begin.isfinite().all(-1)).any(0)
        values = torch.minimum(values, values[-1])
        slack = SLACK * (1.0 + values[-1].abs()) * torch.finfo(values.dtype).eps
        falls = (values[1:] < values[:-1] - slack) & begin.isfinite().all(-1)
        single.found[some] &= ~falls.any(0).any(0)
