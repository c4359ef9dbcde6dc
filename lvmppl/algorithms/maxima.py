"""The maximum of Q in one parameter given what adds up for it: an equation for each kind, floors and bounds kept.

Shapes: R restarts lead every tensor; P entries of a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from lvmppl.algorithms.recorded import as_one
from lvmppl.algorithms.spellings import Spelling, bounds, plain

FLOOR = "floor"
"""The part of what adds up of which the largest holds: the least variance of an entry."""
PULL, HOLD = "pull", "hold"
"""The parts of a location's prior: its mean times its precision, and that. (Sums of data are about the location before.)"""
_BELOW = 1e-6  # share of its floor by which a variance must be below it to be raised at the start: the rest is rounding


@dataclass
class Sums:
    """What adds up for one parameter, in the coordinates of its spelling: [R, P]."""

    kind: str
    spelling: Spelling
    parts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, key: str, part: Tensor) -> None:
        """Add a part; of floors the largest holds."""
        if key in self.parts:
            part = torch.maximum(self.parts[key], part) if key == FLOOR else self.parts[key] + part
        self.parts[key] = part


def _solve_simplex(sums: Sums, old: Tensor) -> tuple[Tensor, Tensor | None]:
    counts = sums.parts["counts"].reshape(old.shape).clamp_min(0)
    total = counts.sum(-1, keepdim=True)
    solved = torch.where(total > 0, counts / torch.where(total > 0, total, 1.0), sums.spelling.apply(old))
    return sums.spelling.invert(solved, old), None


def _solve_beta(sums: Sums, old: Tensor) -> tuple[Tensor, Tensor | None]:
    a, b = (sums.parts[k].reshape(old.shape).clamp_min(0) for k in "ab")
    total = a + b
    solved = torch.where(total > 0, a / torch.where(total > 0, total, 1.0), sums.spelling.apply(old))
    return sums.spelling.invert(solved, old), None


def _solve_gamma(sums: Sums, old: Tensor) -> tuple[Tensor, Tensor | None]:
    a, b = (sums.parts[k].reshape(old.shape).clamp_min(0) for k in "ab")
    now = sums.spelling.apply(old)
    held = None
    if FLOOR in sums.parts:
        least = a * sums.parts[FLOOR].reshape(
            1, *old.shape[1:]
        )  # b ≥ this holds the variance b/a at the floor
        held = ((b < least) & (a > 0)).reshape(len(b), -1).any(1)
        b = torch.maximum(b, least)
    solved = torch.where((a > 0) | (b > 0), a / torch.where(b > 0, b, torch.finfo(b.dtype).tiny), now)
    inverted = sums.spelling.invert(solved, old)
    return torch.where((a > 0) | (b > 0), inverted, old), held


def _solve_location(sums: Sums, old: Tensor) -> tuple[Tensor, Tensor | None]:
    moment, weight = (sums.parts[k].reshape(old.shape) for k in ("moment", "weight"))
    if PULL in sums.parts:
        pull, hold = (sums.parts[k].reshape(1, *old.shape[1:]) for k in (PULL, HOLD))
        moment, weight = moment + pull - hold * old, weight + hold
    step = torch.where(weight > 0, moment / torch.where(weight > 0, weight, 1.0), 0.0)
    if sums.spelling.name == "location":
        return old + step, None
    return sums.spelling.invert(sums.spelling.apply(old) + step, old), None


def _solve_covariance(sums: Sums, old: Tensor) -> tuple[Tensor, Tensor | None]:
    n, scatter = (sums.parts[k].reshape(old.shape) for k in ("n", "scatter"))
    filled = n.diagonal(dim1=-2, dim2=-1).amin(-1)[..., None, None] > 0
    n = torch.where(filled, n, 1.0)
    eye = torch.eye(old.shape[-1], dtype=old.dtype)
    covariance = torch.where(filled, (scatter + scatter.mT) / 2 / n, eye)
    least = torch.where(filled, sums.parts[FLOOR].reshape(1, *old.shape[1:]), eye / 2)
    covariance, below = as_one(_at_or_above, covariance, least)
    held = below.reshape(len(below), -1).any(1)
    solved = sums.spelling.invert(covariance, old)
    return torch.where(filled, solved, old), held


def _at_or_above(covariance: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """The covariance, raised where it is below the floor; and where that is."""
    result, least = covariance.clone(), least.expand_as(covariance)
    below = torch.linalg.cholesky_ex(covariance - least)[1] != 0
    if bool(below.any()):
        result[below] = _raised(covariance[below], least[below])
    return result, below


def _raised(covariance: Tensor, least: Tensor) -> Tensor:
    """The covariance with every direction raised to the floor: the maximum of the likelihood under Σ ⪰ floor."""
    scale = least.diagonal(dim1=-2, dim2=-1).sqrt()
    outer = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(covariance / outer)
    raised: Tensor = (vectors * values.clamp_min(1.0).unsqueeze(-2)) @ vectors.mT * outer
    return (raised + raised.mT) / 2


def raised_to_floor(sums: Sums, old: Tensor) -> tuple[Tensor, Tensor]:
    """The parameter with a spread that lies below its floor raised to it, and in which restarts it was [R]."""
    floor, now = sums.parts[FLOOR].reshape(1, *old.shape[1:]), sums.spelling.apply(old)
    if sums.kind == "covariance":
        below = torch.linalg.cholesky_ex(now - (1 - _BELOW) * floor)[1] != 0
        solved = _raised(now, torch.where(below[..., None, None], floor, 0.5 * now))
        where = below[..., None, None]
    else:
        where = below = now * floor > 1 + _BELOW
        solved = 1 / torch.where(below, floor, 1.0)
    raised = torch.where(where, sums.spelling.invert(solved, old), old)
    return raised, below.reshape(len(old), -1).any(1)


SOLVE = {
    "simplex": _solve_simplex,
    "beta": _solve_beta,
    "gamma": _solve_gamma,
    "loc": _solve_location,
    "precision": _solve_gamma,
    "covariance": _solve_covariance,
}


def within(value: Tensor, constraint: Constraint) -> Tensor:
    """The parameter within the bounds of an elementwise constraint, strictly where these are open."""
    constraint = plain(constraint)
    if constraint.event_dim:
        return value
    low, high = (b.to(value.dtype) for b in bounds(constraint))
    if bool((low == -torch.inf).all() & (high == torch.inf).all()):
        return value
    inner = value.clone()
    for bound, other in ((low, torch.inf), (high, -torch.inf)):
        inside = constraint.check(bound) | bound.isinf()
        next_to = torch.nextafter(bound, bound.new_full((), other))
        next_to = torch.where(
            bound == 0, torch.finfo(value.dtype).tiny * torch.sign(bound.new_full((), other)), next_to
        )
        edge = torch.where(inside, bound, next_to)
        inner = torch.maximum(inner, edge) if other > 0 else torch.minimum(inner, edge)
    return inner
