"""What floating point hides of a density, and how much of its mass may be there: at its ends, and around a pole.

A positive site s = eᵘ is 0 from u = −746 on, and 1/s is not a number there: of a density that has not died out by then the
rest is missed, and no lattice says so, as all of them see the same cliff. As little is seen of |z − c|⁻ᵖ closer to c
than its rounding. Both are power laws, f(ρ) ∝ ρ⁻ᵖ of the distance ρ from the centre of the density or from the pole, so
that what is seen says what is not:

    ∫_{ρ > R} f dρ = ∫_{R/2 < ρ < R} f dρ / (2^{p−1} − 1)  if p > 1, else ∞     (an exponential in u has ever larger p)
    ∫_{|z−c| < r} f dz ∝ r^{d−p} / (d − p)                 if p < d, else ∞

Shapes: ``N`` rows, ``Q`` cells, ``K`` charts a row, ``d`` dims. Masses are relative to the integral of their row.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.distributions import Transform

from lvmppl.exact.batches import Restrict
from lvmppl.exact.evaluation import LogJoint, checked_value, evaluate
from lvmppl.exact.refinement import Cells

PAST = (1.02, 1.05, 1.1, 1.2, 1.4, 1.7)  # of the way to the outermost cell, where an end is looked for
MARGIN = 0.05  # an exponent so close to divergence cannot be told from it
LEAST = 1e-6  # mass in the last tenth before an end, below which no more than that is thought to be beyond
POWERS = 5.0  # a model may take a power so high of a site or of its exponential, which then overflows early
LOST = 1e-2  # relative error of a point in the support at which it no longer says where it is
ROUNDS, LEVEL = 40, 0.3  # steps towards a pole, and the nats that each must rise
RISE = 3.0  # nats that a density rises from where its chart is centred if there is a pole
NARROW = 4096.0  # a chart of so few units of rounding may stand on a pole itself, with nothing to be climbed
SHORT = 1e-6  # widths of a chart within which there is hardly another mode
TOWARDS = tuple(2.0**-k for k in range(-1, 8))  # lengths of a step, in the last one
FAR = 31  # distances from a pole at which its density is looked at, its exponent over the first third


def beyond_ends(log_joint: LogJoint, transform: Transform | None, cells: Cells, z: Tensor) -> Tensor:
    """Mass beyond the points where the log density ``log_joint`` over ℝᵈ is no number, or its support is rounded away:
    ``[N]``.

    ``z [Q, N, d]``: the cells' points.
    """
    weight = cells.log_weight.exp()
    seen = (cells.log_weight > -torch.inf) & ~_lost(transform, z)
    centre = (weight.unsqueeze(-1) * z).sum(0)
    mass = torch.zeros_like(weight[0])
    rows = torch.arange(z.shape[1], device=z.device)
    for axis, side in itertools.product(range(z.shape[-1]), (1.0, -1.0)):
        along = torch.where(seen, side * z[..., axis], -torch.inf)
        way = z[along.argmax(0), rows] - centre  # [N, d]
        past = centre + torch.tensor(PAST).to(z).view(-1, 1, 1) * way
        far = _extreme(past if transform is None else transform(past)) | _lost(transform, past)
        share = (side * (z[..., axis] - centre[:, axis])) / (side * way[:, axis]).clamp(min=1e-300)
        last, half = (torch.where(share > s, weight, 0.0).sum(0) for s in (0.9, 0.5))
        doubtful = far.any(0) & (last > LEAST)
        beyond = last
        if bool(doubtful.any()):  # only then, as every look is a run of the model
            hidden = _lost(transform, past) | _unseen(log_joint, past)
            nearer, end = evaluate(log_joint, centre + torch.tensor([0.6, 0.98]).to(z).view(-1, 1, 1) * way)
            power = (nearer - end).nan_to_num(nan=0.0) / math.log(0.98 / 0.6) - (z.shape[-1] - 1)
            rest = half / torch.expm1((power - 1.0).clamp(min=MARGIN) * math.log(2.0))
            rest = torch.where(power > 1.0 + MARGIN, rest, torch.inf)
            beyond = torch.where(doubtful, torch.where(hidden.any(0), rest, 0.0), last)
        mass = mass + torch.where(far.any(0), beyond, 0.0)
    return mass


def _extreme(support: Tensor) -> Tensor:
    """Points ``[..., d]`` with an entry so large or so small that a model may overflow there: ``[...]``."""
    far = math.log(torch.finfo(support.dtype).max) / POWERS
    return ((support.abs() > far) | (support.abs() < math.exp(-far))).any(-1)


@torch.no_grad()
def _unseen(log_joint: LogJoint, z: Tensor) -> Tensor:
    """Points ``z [S, N, d]`` where the log density is no number: ``[S, N]``."""
    value = checked_value(log_joint, z)
    return value.isnan() | (value == torch.inf)


def _lost(transform: Transform | None, z: Tensor) -> Tensor:
    """Points ``[..., d]`` whose image in the support does not say where they are: ``[...]``."""
    if transform is None:
        return torch.zeros_like(z[..., 0], dtype=torch.bool)
    back = transform.inv(transform(z))
    lost: Tensor = (((back - z).abs() > LOST * (1.0 + z.abs())) | ~back.isfinite()).any(-1)
    return lost


def around_poles(restrict: Restrict, cells: Cells, log_evidence: Tensor, rows: Tensor) -> Tensor:
    """Mass closer to a pole than the width of a chart of the ``rows [M]``: ``[N]``, 0 where none is climbed to.

    More than a lattice misses of it, by far if the chart stands next to the pole and not on it.
    """
    mass = torch.zeros_like(log_evidence)
    for centre, scale, present in zip(cells.centre, cells.scale, cells.partition.present, strict=True):
        some = rows[present[rows]]
        if len(some):
            mass[some] += _around(restrict, some, centre[some], scale[some], log_evidence[some])
    return mass


def _around(restrict: Restrict, rows: Tensor, centre: Tensor, scale: Tensor, log_evidence: Tensor) -> Tensor:
    """``around_poles`` of one chart, at ``centre [M, d]`` and of ``scale [M, d, d]``: ``[M]``."""
    dim = centre.shape[-1]
    left, widths, _ = torch.linalg.svd(scale)
    ellipsoid = (left * widths.unsqueeze(-2)).movedim(-1, 0)  # [d, M, d], its axes
    coordinates = torch.diag_embed(scale.norm(dim=-1)).movedim(-1, 0)
    frames = [ellipsoid, coordinates] if dim > 1 else [ellipsoid]
    pole, near, risen = _climbed_to_pole(restrict, rows, centre, torch.cat(frames))
    rounding = NARROW * torch.finfo(scale.dtype).eps * pole.norm(dim=-1)
    narrow = widths.amin(-1)
    # Steps towards another mode, which is no pole, end long before rounding does.
    ended = (near * narrow < rounding) | (near < SHORT)
    mass = torch.zeros_like(log_evidence)
    for i in ((risen > RISE) & ended | (narrow < rounding)).nonzero().squeeze(-1).tolist():
        part = restrict(rows[i : i + 1])
        found = [_room(part, pole[i], float(near[i]), axes[:, i]) for axes in frames]
        room, height = min(r for r, _ in found), max(h for _, h in found)
        within = height + float(widths[i].log().sum() - log_evidence[i])
        mass[i] = torch.inf if room < MARGIN else math.exp(min(within, 700.0)) / room
    return mass


def _room(log_density: LogJoint, pole: Tensor, near: float, axes: Tensor) -> tuple[float, float]:
    """(d − p, log mass of the box around a ``pole [d]`` that the farthest points looked at span, over the volume of the
    axes ``[d, d]``, in units of which points are told from the pole if they are not ``near``.

    A pole may be a ridge: d counts the axes along which the density falls, p is the least of their exponents.
    """
    rounding = 4.0 * torch.finfo(pole.dtype).eps * float((pole.norm() / axes.norm(dim=-1)).max())
    first = math.log10(max(8.0 * near, rounding))
    depth = torch.logspace(first, max(0.0, first + 3.0), FAR).to(pole)
    steps = depth.view(-1, 1, 1, 1) * torch.stack([axes, -axes])  # [F, 2, d, d]
    value = evaluate(log_density, (pole + steps).reshape(-1, 1, len(pole))).view(FAR, 2, -1)
    profile = value.logsumexp(1) - math.log(2.0)  # [F, d]
    power = (profile[0] - profile[FAR // 3]) / (depth[FAR // 3] / depth[0]).log()
    steep = power[power > MARGIN]
    room = len(steep) - float(steep.min()) if len(steep) else float(len(pole))
    return room, float(profile[-1].max()) + len(pole) * float(depth[-1].log() + math.log(2.0))


def _climbed_to_pole(
    restrict: Restrict, rows: Tensor, centre: Tensor, axes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The highest points ``[M, d]`` that ever shorter steps along the axes ``[d, M, d]`` lead to, the length of the last
    step in units of the axes, and the rise from the centre in nats, ``[M]`` each.
    """
    pole, length = centre.clone(), torch.ones_like(centre[:, 0])
    first = top = torch.full_like(length, -torch.inf)
    left = torch.arange(len(rows), device=rows.device)
    shares = torch.tensor([sign * share for share in TOWARDS for sign in (1.0, -1.0)]).to(centre)
    lengths = shares.abs().repeat_interleave(len(axes))
    for turn in range(ROUNDS):
        steps = shares.view(-1, 1, 1, 1) * length[left].unsqueeze(-1) * axes[:, left]  # [S, d, M, d]
        tried = torch.cat([pole[left].unsqueeze(0), pole[left] + steps.flatten(0, 1)])
        values = evaluate(restrict(rows[left]), tried)
        if turn == 0:  # with the centres in the first request, most rows are done after one run of the model
            first, top = values[0], values[0].clone()
        value, which = values[1:].max(0)
        rises = value > top[left] + LEVEL
        left, value, which = left[rises], value[rises], which[rises]
        if len(left) == 0:
            break
        pole[left] = tried[1:, rises][which, torch.arange(len(left), device=left.device)]
        top[left], length[left] = value, lengths[which] * length[left]
    return pole, length, top - first


__all__ = ["around_poles", "beyond_ends"]
