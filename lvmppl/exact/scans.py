"""Grids over which a log density is looked at: for its peaks, and for whether it is concave.

Their spacing grows with the distance from the centre, as does the width of the basin around a mode of a given width.

Shapes: ``S`` points, ``N`` rows, ``d`` dims. Log densities in nats.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, max_pool2d, max_pool3d

from lvmppl.exact.batches import Restrict
from lvmppl.exact.evaluation import evaluate

# A mode whose Laplace mass is this much below the best one's, in nats, cannot matter.
NEGLIGIBLE = 40.0
# Distance from the centre, in its units, up to which spacings hardly grow.
LINEAR = 2.0
# Points an axis of the scan, and the asinh of half its reach: spacings grow with the distance from its
# centre.
SCAN = {1: (257, 6.0), 2: (33, 4.0), 3: (13, 3.0)}
PEAKS = {1: 48, 2: 24, 3: 12}
# The same of the scan of rows that may hide a mode: it finds one whose width is 1/500 (1/20, 1/5 in two and three dims)
# of that of the mode which covers it, at whatever distance, as both the spacing and the width of its basin grow with it.
DENSE = {1: (8193, 10.0), 2: (257, 8.0), 3: (41, 6.0)}
DENSE_PIECE = 1 << 21  # points of such scans held at once
# Points of all rows of a block together: with more rows than it serves, scans are less dense.
SCANNED = 1 << 25


def scan_points(centre: Tensor, scale: Tensor, count: int, reach: float) -> Tensor:
    """The points of a scan around ``centre [N, d]`` in units of ``scale [N, d, d]``: ``[countᵈ, N, d]``."""
    return centre + (scale @ scan_grid(centre, count, reach).unsqueeze(-1)).squeeze(-1)


def _pairs(count: int, like: Tensor) -> list[Tensor]:
    """For every point of a scan others: its neighbour, at all distances from the centre as the points are, and random
    ones.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(like.device)
    return [torch.arange(count, device=like.device).roll(1), order, order.roll(1)]


def scan_midpoints(z: Tensor) -> Tensor:
    """Midpoints of pairs of points of a scan ``z [S, N, d]``: ``[3S, N, d]``."""
    return torch.cat([0.5 * (z + z[other]) for other in _pairs(len(z), z)])


def is_concave(values: Tensor, middles: Tensor) -> Tensor:
    """Rows ``[N]`` whose log density lies nowhere below the chord at the midpoint of two points of a scan, by the values
    ``[S, N]`` there and ``[3S, N]`` at ``scan_midpoints``.
    """
    concave = torch.ones_like(values[0], dtype=torch.bool)
    slack = 1e3 * torch.finfo(values.dtype).eps
    for other, middle in zip(_pairs(len(values), values), middles.split(len(values)), strict=True):
        chord = 0.5 * (values + values[other])
        size = 1.0 + values.abs() + values[other].abs()
        concave &= ((middle >= chord - slack * size) | (chord == -torch.inf)).all(0)
    return concave


def scan_grid(like: Tensor, count: int, reach: float) -> Tensor:
    """``countᵈ`` points whose spacing grows with the distance from the origin: ``[S, 1, d]``."""
    dim = like.shape[-1]
    axis = LINEAR * torch.linspace(-reach, reach, count).to(like).sinh()
    return torch.cartesian_prod(*[axis] * dim).view(-1, 1, dim)


@dataclass(frozen=True)
class Peaks:
    """The highest local maxima of a log density over a scan: ``points [P, N, d]``, their ``values [P, N]`` (−∞ of points
    that are none); rows ``missed [N]`` that have more of them that may matter, and rows that have one ``only [N]``.
    """

    points: Tensor
    values: Tensor
    missed: Tensor
    only: Tensor

    def of(self, rows: Tensor) -> Peaks:
        """Those of some rows."""
        return Peaks(self.points[:, rows], self.values[:, rows], self.missed[rows], self.only[rows])


def scan_peaks(z: Tensor, values: Tensor, count: int) -> Peaks:
    """The peaks among the points ``z [S, N, d]`` of a scan of ``count`` points an axis, by the values ``[S, N]`` there."""
    rows, dim = z.shape[1:]
    pool = (max_pool1d, max_pool2d, max_pool3d)[dim - 1]
    around = pool(values.T.reshape(rows, 1, *[count] * dim), 3, 1, 1).reshape(rows, -1).T
    peaks = torch.where(values >= around, values, -torch.inf)
    heights, index = peaks.topk(PEAKS[dim] + 1, 0)
    place = torch.stack([index // count ** (dim - 1 - i) % count for i in range(dim)], -1)
    only = ((heights == -torch.inf) | ((place - place[0]).abs() <= 1).all(-1)).all(
        0
    )  # neighbours are as high
    missed = heights[-1] > heights[0] - NEGLIGIBLE
    if bool(missed.any()):  # a plateau is one peak, though each of its points is as high as those around it
        grids = values.T.reshape(rows, *[count] * dim)
        strict = torch.where((grids > _highest_neighbour(grids)).reshape(rows, -1).T, values, -torch.inf)
        missed = strict.topk(PEAKS[dim] + 1, 0).values[-1] > heights[0] - NEGLIGIBLE
    points = torch.gather(z, 0, index[:-1].unsqueeze(-1).expand(-1, -1, dim))
    return Peaks(points, heights[:-1], missed, only & (heights[0] > -torch.inf))


def dense_peaks(
    restrict: Restrict, doubtful: Tensor, best: Tensor, width: Tensor, chunk: int
) -> Iterator[tuple[Tensor, list[Peaks]]]:
    """Of some rows ``[M]`` of the doubtful at a time: these rows, and the peaks of dense scans around the origin and around
    ``best [N, d]``.
    """
    dim = best.shape[-1]
    most, reach = DENSE[dim]
    count = max(SCAN[dim][0], min(most, int((SCANNED // len(doubtful)) ** (1.0 / dim)) | 1))
    for some in torch.split(doubtful, max(1, DENSE_PIECE // count**dim)):
        unit = torch.eye(dim).to(best).expand_as(width[some])
        scans = [
            scan_points(torch.zeros_like(best[some]), unit, count, reach),
            scan_points(best[some], width[some], count, reach),
        ]
        values = evaluate(restrict(some), torch.cat(scans), chunk).split([len(z) for z in scans])
        yield some, [scan_peaks(z, v, count) for z, v in zip(scans, values, strict=True)]


def _highest_neighbour(grids: Tensor) -> Tensor:
    """The maximum over the 3ᵈ − 1 points around each point of ``[N, *d]``."""
    dim = grids.dim() - 1
    padded = torch.nn.functional.pad(grids, (1, 1) * dim, value=-torch.inf)
    highest = torch.full_like(grids, -torch.inf)
    for shift in itertools.product((0, 1, 2), repeat=dim):
        if shift != (1,) * dim:
            window = padded[
                (slice(None), *(slice(s, s + n) for s, n in zip(shift, grids.shape[1:], strict=True)))
            ]
            highest = torch.maximum(highest, window)
    return highest
