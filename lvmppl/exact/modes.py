"""Where a low-dimensional log density is large: all of its modes, found from many starts at once, and their
scales.

Shapes: ``S`` starts, ``N`` rows (independent densities), ``d`` dims, ``K`` modes kept a row. Log densities in
nats.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lvmppl.exact.batches import Restrict
from lvmppl.exact.evaluation import LogJoint, evaluate, value_and_gradient
from lvmppl.exact.scans import (
    NEGLIGIBLE,
    PEAKS,
    SCAN,
    dense_peaks,
    is_concave,
    scan_midpoints,
    scan_peaks,
    scan_points,
)
from lvmppl.exact.secants import BoundsOf
from lvmppl.exact.single_modes import Box, single_modes

MAX_MODES = {1: 24, 2: 12, 3: 8}

# Where a dip between two modes is looked for: not at simple ratios, at which modes of equal distance stand.
BETWEEN = (0.0869, 0.2231, 0.3679, 0.5413, 0.6321, 0.7788, 0.9131)


def square_range(dtype: torch.dtype) -> tuple[float, float]:
    """The smallest and largest length whose square can still be held."""
    return torch.finfo(dtype).tiny ** 0.5, torch.finfo(dtype).max ** 0.5 / 8


@dataclass(frozen=True)
class Modes:
    """``centre [K, N, d]`` and ``scale [K, N, d, d]`` (z = centre + scale·u has unit curvature in u),
    ``present [K, N]``.

    ``missed [N]``: rows with more modes than are kept. ``concave [N]``: rows whose log density lay above its chords
    wherever it was looked at, and one mode was found. Mode 0 is always present and the highest. ``box``: of rows with one
    mode whose centre and scale are those of the core of the density already, where that mode is enclosed.
    """

    centre: Tensor
    scale: Tensor
    present: Tensor
    missed: Tensor
    concave: Tensor
    box: Box


def find_modes(
    restrict: Restrict,
    num_rows: int,
    dim: int,
    starts: Tensor | None,
    like: Tensor,
    chunk: int,
    drop: float,
    wary: bool = False,
    bounds: BoundsOf | None = None,
) -> Modes:
    """The modes of every row, once each, the highest first.

    Where scans show that there is one, they show where as well (``lvmppl.exact.single_modes``); of other rows modes are
    climbed to. ``starts [S, N, d]`` are looked at too. ``like`` gives dtype and device, ``drop`` is of ``single_modes``,
    ``wary`` of ``_climbed``, ``bounds`` of ``single_modes``.
    """
    single = single_modes(restrict, num_rows, dim, starts, like, chunk, drop, wary, bounds)
    centre, scale = single.centre.unsqueeze(0), single.scale.unsqueeze(0)
    present = torch.ones_like(centre[..., 0], dtype=torch.bool)
    missed, concave = torch.zeros_like(present[0]), single.concave & single.found
    box = replace(single.box, known=single.box.known & single.found)
    several = (~single.found).nonzero().squeeze(-1)
    if len(several) == 0:
        return Modes(centre, scale, present, missed, concave, box)
    found = _several_modes(
        lambda index: restrict(several[index]),
        len(several),
        dim,
        None if starts is None else starts[:, several],
        like,
        chunk,
        wary,
    )
    more = len(found.present) - 1
    centre, scale = centre.repeat(1 + more, 1, 1), scale.repeat(1 + more, 1, 1, 1)
    present = torch.cat([present, torch.zeros_like(present).expand(more, -1)])
    centre[:, several], scale[:, several] = found.centre, found.scale
    present[:, several] = found.present
    missed[several], concave[several] = found.missed, found.concave
    return Modes(centre, scale, present, missed, concave, box)


def _several_modes(
    restrict: Restrict,
    num_rows: int,
    dim: int,
    starts: Tensor | None,
    like: Tensor,
    chunk: int,
    wary: bool,
) -> Modes:
    """The modes of rows that may have several, climbed to from the peaks of scans and from ``starts``.

    A candidate is dropped if the density does not dip on the way to a mode already kept, or if both scales see the two as
    overlapping, as one lattice then resolves them together.
    """
    everything, most = torch.arange(num_rows, device=like.device), MAX_MODES[dim]
    points, values, missed, concave = _climbed(restrict, everything, dim, starts, like, chunk, wary)
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    left = torch.where(values.isfinite(), values, -torch.inf)
    for k in range(most * 2):
        rows = everything if k == 0 else (left > -torch.inf).any(0).nonzero().squeeze(-1)
        if len(rows) == 0:
            break
        kept = torch.stack([f[3] for f in found]).sum(0)[rows] if found else torch.zeros_like(rows)
        value, which = left[:, rows].max(0)
        centre = points[which, rows]
        part = restrict(rows)
        scale = local_scale(part, centre, value, chunk)
        new = _distinct(found, rows, centre, scale, value)
        missed[rows] |= new & (kept >= most)
        found.append(_spread(rows, num_rows, centre, scale, value, new & (kept < most)))
        left[which, rows] = -torch.inf
        left[:, rows] = _unexplained(part, points[:, rows], left[:, rows], centre, value, scale, chunk)
    else:
        missed |= (left > -torch.inf).any(0)
    return _packed(found, missed, concave)


def _climbed(
    restrict: Restrict,
    rows: Tensor,
    dim: int,
    starts: Tensor | None,
    like: Tensor,
    chunk: int,
    wary: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where climbs end, ``[P, N, d]`` with values ``[P, N]``; rows with more peaks than were climbed and rows that are
    concave, ``[N]``.

    The first scan is around the origin, the second around the best point found from the first and in units of its scale.
    Rows whose log density is not concave, or all if ``wary``, are scanned densely too.
    """
    whole = restrict(rows)
    origin, unit = like.new_zeros(len(rows), dim), torch.eye(dim).to(like).expand(len(rows), dim, dim)
    z = scan_points(origin, unit, *SCAN[dim])
    peaks = scan_peaks(z, evaluate(whole, z, chunk), SCAN[dim][0])
    extra = torch.cat([torch.zeros(1, dim), 3.0 * torch.eye(dim), -3.0 * torch.eye(dim)]).to(like)
    first = torch.cat([peaks.points, extra.unsqueeze(1).expand(-1, len(rows), -1)])
    points, values = ascend(whole, first if starts is None else torch.cat([first, starts]), chunk)
    value, which = values.max(0)
    best = points[which, rows]
    width = local_scale(whole, best, value, chunk)
    z = scan_points(best, width, *SCAN[dim])
    around, middles = evaluate(whole, torch.cat([z, scan_midpoints(z)]), chunk).split([len(z), 3 * len(z)])
    second = scan_peaks(z, around, SCAN[dim][0])
    climbs = [(points, values), ascend(whole, second.points, chunk)]
    missed = peaks.missed | second.missed
    concave = is_concave(around, middles)
    doubtful = rows if wary else (~concave).nonzero().squeeze(-1)
    if len(doubtful):
        *climb, cut = _climbed_densely(restrict, doubtful, best, width, chunk)
        climbs.append((climb[0], climb[1]))
        missed = missed | cut
    return torch.cat([c[0] for c in climbs]), torch.cat([c[1] for c in climbs]), missed, concave


def _climbed_densely(
    restrict: Restrict, doubtful: Tensor, best: Tensor, width: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What is climbed to from the peaks of dense scans around the origin and around ``best [N, d]``, of the rows
    ``doubtful``: ``[P, N, d]``, the values ``[P, N]`` (−∞ in other rows), and rows with more peaks ``[N]``.
    """
    dim = best.shape[-1]
    points = best.expand(2 * PEAKS[dim], *best.shape).clone()
    values = torch.full_like(points[..., 0], -torch.inf)
    missed = torch.zeros(len(best), dtype=torch.bool, device=best.device)
    for some, scans in dense_peaks(restrict, doubtful, best, width, chunk):
        starts = torch.cat([peaks.points for peaks in scans])
        points[:, some], values[:, some] = ascend(restrict(some), starts, chunk)
        # On a ridge in several dimensions there are ever more peaks as the grid gets denser, and no more modes.
        missed[some] = torch.stack([peaks.missed for peaks in scans]).any(0) & (dim == 1)
    return points, values, missed


def ascend(log_density: LogJoint, start: Tensor, chunk: int, iterations: int = 80) -> tuple[Tensor, Tensor]:
    """Climb from ``start [S, N, d]`` by BFGS with backtracking: points ``[S, N, d]`` and their values ``[S,
    N]``.

    Points of density 0 or with a gradient that is not finite stay where they are, with value −∞.
    """
    z = start
    value, gradient = _clean(*value_and_gradient(log_density, z, chunk))
    length = 0.5 * (1.0 + z.norm(dim=-1)) / gradient.norm(dim=-1).clamp(min=1e-6)
    identity = torch.eye(z.shape[-1]).to(z)
    inverse = length[..., None, None] * identity
    rate, fresh = torch.ones_like(value), torch.ones_like(value, dtype=torch.bool)
    running = value.isfinite()
    for _ in range(iterations):
        step = rate.unsqueeze(-1) * (inverse @ gradient.unsqueeze(-1)).squeeze(-1)
        gain = (step * gradient).sum(-1)
        running = running & (gain / rate > 1e-9) & (rate > 1e-12)
        if not running.any():
            break
        moved = torch.where(running.unsqueeze(-1), z + step, z)
        trial, slope = _clean(*value_and_gradient(log_density, moved, chunk))
        better = running & (trial >= value + 1e-4 * gain) & (trial > -torch.inf)
        bend = (step * (gradient - slope)).sum(-1)
        curved = better & (bend > 1e-10 * gain.abs())
        first = (bend / (gradient - slope).square().sum(-1))[..., None, None] * identity
        base = torch.where((fresh & curved)[..., None, None], first, inverse)
        updated = _bfgs(base, step, gradient - slope, bend)
        # Where the density is convex the model has no maximum: go further next time.
        longer = torch.where((better & ~curved)[..., None, None], 4.0 * inverse, inverse)
        inverse = torch.where(curved[..., None, None], updated, longer)
        fresh = fresh & ~curved
        z = torch.where(better.unsqueeze(-1), moved, z)
        value = torch.where(better, trial, value)
        gradient = torch.where(better.unsqueeze(-1), slope, gradient)
        rate = torch.where(better, 1.0, 0.25 * rate)
    return z, value


def local_scale(log_density: LogJoint, centre: Tensor, value: Tensor, chunk: int) -> Tensor:
    """The scale A ``[N, d, d]`` with −log density ≈ ½|u|² at z = ``centre [N, d]`` + Au, for drops of about
    ½.

    Axis by axis, the distance at which the log density drops by ½ is sought; second differences at these
    distances then give the curvature, for a kink or a flat top as well as for a smooth mode. Where it is not
    positive definite, A is diagonal.
    """
    dim = centre.shape[-1]
    axes = torch.eye(dim).to(centre).unsqueeze(1)  # [d, 1, d]
    size = torch.ones_like(centre)
    for _ in range(16):
        ahead = evaluate(log_density, centre + torch.cat([axes, -axes]) * size, chunk)
        drop = (value - torch.maximum(ahead[:dim], ahead[dim:])).T  # [N, d]
        factor = (
            (0.5 / drop.clamp(min=torch.finfo(drop.dtype).tiny)).sqrt().clamp(1e-3, 1e3).nan_to_num(nan=1e-3)
        )
        if ((drop > 0.2) & (drop < 1.0)).all():
            break
        size = (size * factor).clamp(*square_range(size.dtype))
    pairs = list(itertools.combinations(range(dim), 2))
    steps = [a * s for i, j in pairs for a in (axes[i] + axes[j], axes[i] - axes[j]) for s in (1.0, -1.0)]
    around = evaluate(log_density, centre + torch.stack([*axes, *-axes, *steps]) * size, chunk)
    curvature = torch.diag_embed((2.0 * value - around[:dim] - around[dim : 2 * dim]).T)
    for p, (i, j) in enumerate(pairs):
        same_up, same_down, cross_up, cross_down = around[2 * dim + 4 * p : 2 * dim + 4 * p + 4]
        curvature[:, i, j] = curvature[:, j, i] = 0.25 * (cross_up + cross_down - same_up - same_down)
    cholesky, failed = torch.linalg.cholesky_ex(curvature.nan_to_num(nan=-1.0, posinf=-1.0, neginf=-1.0))
    cholesky = torch.where((failed == 0)[:, None, None], cholesky, torch.eye(dim).to(centre))
    inverse: Tensor = torch.linalg.solve_triangular(cholesky.mT, torch.eye(dim).to(centre), upper=True)
    return size.unsqueeze(-1) * inverse


def _clean(value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Value −∞ and gradient 0 where either is not finite."""
    good = value.isfinite() & gradient.isfinite().all(-1)
    return torch.where(good, value, -torch.inf), torch.where(good.unsqueeze(-1), gradient, 0.0)


def _bfgs(inverse: Tensor, step: Tensor, change: Tensor, bend: Tensor) -> Tensor:
    """The BFGS update of the inverse curvature ``[S, N, d, d]``; rows with ``bend`` ≤ 0 are not used by the
    caller.
    """
    rho = 1.0 / torch.where(bend > 0, bend, 1.0)
    s, y = step.unsqueeze(-1), change.unsqueeze(-1)
    left = torch.eye(step.shape[-1]).to(step) - rho[..., None, None] * s @ y.mT
    return left @ inverse @ left.mT + rho[..., None, None] * s @ s.mT


def _distance(scale: Tensor, difference: Tensor) -> Tensor:
    """|A⁻¹(z − c)|: ``[..., N]``."""
    white: Tensor = torch.linalg.solve(scale, difference.unsqueeze(-1))
    distance: Tensor = torch.linalg.vector_norm(white.squeeze(-1), dim=-1)
    return distance


def _distinct(
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    rows: Tensor,
    centre: Tensor,
    scale: Tensor,
    value: Tensor,
) -> Tensor:
    """Which candidates ``[M]`` are neither negligible nor overlap a mode found before in the eyes of both
    scales.
    """
    new = torch.ones_like(value, dtype=torch.bool)
    if found:
        mass = value + scale.det().abs().log()
        best = torch.stack([f[2] + f[1].det().abs().log() for f in found]).amax(0)[rows]
        new = mass > best - NEGLIGIBLE
    for other_centre, other_scale, _, present in found:
        difference = centre - other_centre[rows]
        far = torch.maximum(_distance(scale, difference), _distance(other_scale[rows], difference))
        new &= (far > 4.0) | ~present[rows]
    return new


def _spread(
    rows: Tensor, num_rows: int, centre: Tensor, scale: Tensor, value: Tensor, present: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre, scale, value and presence of one mode for all N rows; placeholders elsewhere."""
    dim = centre.shape[-1]
    everywhere = (
        centre.new_zeros(num_rows, dim),
        torch.eye(dim).to(centre).repeat(num_rows, 1, 1),
        value.new_full((num_rows,), -torch.inf),
        torch.zeros(num_rows, dtype=torch.bool, device=rows.device),
    )
    for whole, part in zip(everywhere, (centre, scale, value, present), strict=True):
        whole[rows] = part
    return everywhere


def _unexplained(
    log_density: LogJoint,
    points: Tensor,
    left: Tensor,
    centre: Tensor,
    value: Tensor,
    scale: Tensor,
    chunk: int,
) -> Tensor:
    """``left [S, M]`` with −∞ for candidates at this mode, or from which the way to it does not dip."""
    difference = points - centre
    left = torch.where(_distance(scale, difference) < 0.5, -torch.inf, left)
    some = (left > -torch.inf).any(-1)
    if not some.any():
        return left
    ways = torch.cat([centre + fraction * difference[some] for fraction in BETWEEN])
    lowest = evaluate(log_density, ways, chunk).view(len(BETWEEN), -1, left.shape[-1]).amin(0)
    left[some] = torch.where(lowest >= torch.minimum(left[some], value) - 0.01, -torch.inf, left[some])
    return left


def _packed(found: list[tuple[Tensor, Tensor, Tensor, Tensor]], missed: Tensor, concave: Tensor) -> Modes:
    """The modes with those present in a row first."""
    centre, scale, _, present = (torch.stack(part) for part in zip(*found, strict=True))
    count = max(1, int(present.sum(0).max()))
    order = torch.argsort((~present).int(), dim=0, stable=True)[:count]
    rows = torch.arange(present.shape[1], device=present.device)
    return Modes(
        centre[order, rows],
        scale[order, rows],
        present[order, rows],
        missed,
        concave & (present.sum(0) == 1),
        Box.unknown(centre[0]),
    )
