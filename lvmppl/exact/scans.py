"""Grids over which a log density is looked at: for its peaks, and for whether it is concave.

Their spacing grows with the distance from the centre, as does the width of the basin around a mode of a given width.

Shapes: ``S`` points, ``N`` rows, ``d`` dims. Log densities in nats.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, max_pool2d, max_pool3d

from lvmppl.exact.evaluation import LogJoint, evaluate

# A mode whose Laplace mass is this much below the best one's, in nats, cannot matter.
NEGLIGIBLE = 40.0
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


def is_concave(log_density: LogJoint, centre: Tensor, scale: Tensor, chunk: int) -> Tensor:
    """Rows ``[N]`` whose log density lies nowhere below the chord at the midpoint of two points of a scan.

    The pairs are neighbours, at all distances from ``centre [N, d]`` as those of the scan are, and random ones.
    """
    dim = centre.shape[-1]
    z = centre + (scale @ _grid(centre, *SCAN[dim]).unsqueeze(-1)).squeeze(-1)
    value = evaluate(log_density, z, chunk)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0)).to(z.device)
    concave = torch.ones_like(value[0], dtype=torch.bool)
    slack = 1e3 * torch.finfo(value.dtype).eps
    for other in (torch.arange(len(z), device=z.device).roll(1), order, order.roll(1)):
        chord = 0.5 * (value + value[other])
        middle = evaluate(log_density, 0.5 * (z + z[other]), chunk)
        size = 1.0 + value.abs() + value[other].abs()
        concave &= ((middle >= chord - slack * size) | (chord == -torch.inf)).all(0)
    return concave


def _grid(like: Tensor, count: int, reach: float) -> Tensor:
    """``countᵈ`` points whose spacing grows with the distance from the origin: ``[S, 1, d]``."""
    dim = like.shape[-1]
    axis = 2.0 * torch.linspace(-reach, reach, count).to(like).sinh()
    return torch.cartesian_prod(*[axis] * dim).view(-1, 1, dim)


def scan_peaks(
    log_density: LogJoint, centre: Tensor, scale: Tensor, chunk: int, count: int, reach: float
) -> tuple[Tensor, Tensor]:
    """The highest local maxima of the log density over a grid around ``centre [N, d]``: ``[PEAKS, N, d]``, and the
    rows ``[N]`` that have more of them that may matter.
    """
    rows, dim = centre.shape
    z = centre + (scale @ _grid(centre, count, reach).unsqueeze(-1)).squeeze(-1)  # [S, N, d]
    values = evaluate(log_density, z, chunk)
    pool = (max_pool1d, max_pool2d, max_pool3d)[dim - 1]
    around = pool(values.T.reshape(rows, 1, *[count] * dim), 3, 1, 1).reshape(rows, -1).T
    peaks = torch.where(values >= around, values, -torch.inf)
    heights, index = peaks.topk(PEAKS[dim] + 1, 0)
    missed = heights[-1] > heights[0] - NEGLIGIBLE
    if bool(missed.any()):  # a plateau is one peak, though each of its points is as high as those around it
        grids = values.T.reshape(rows, *[count] * dim)
        strict = torch.where((grids > _highest_neighbour(grids)).reshape(rows, -1).T, values, -torch.inf)
        missed = strict.topk(PEAKS[dim] + 1, 0).values[-1] > heights[0] - NEGLIGIBLE
    return torch.gather(z, 0, index[:-1].unsqueeze(-1).expand(-1, -1, dim)), missed


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
