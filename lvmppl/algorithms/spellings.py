"""How a model may spell a distribution's parameter: g(entry of a `pyro.param`), and the way back.

A spelling maps a whole parameter to the coordinates of its kind (probabilities, a rate or precision τ, a location, a
covariance), entry by entry, row by row or matrix by matrix; `invert` returns the parameter from solved coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from lvmppl.families import safe_log


class Spelling(NamedTuple):
    """name: as reported. unit: axes of a parameter that belong together. applies: to parameters of this constraint."""

    name: str
    unit: int
    applies: Callable[[Constraint], bool]
    apply: Callable[[Tensor], Tensor]
    invert: Callable[[Tensor, Tensor], Tensor]
    """(solved coordinates, the parameter before) → the parameter."""


def plain(constraint: Constraint) -> Constraint:
    """The constraint of one entry, row or matrix, without the axes that `.to_event` adds."""
    return (
        plain(constraint.base_constraint) if isinstance(constraint, constraints.independent) else constraint
    )


def _elementwise(constraint: Constraint) -> bool:
    return plain(constraint).event_dim == 0 and not constraint.is_discrete


def is_real(constraint: Constraint) -> bool:
    """Whether the entries of a parameter may take any value."""
    return plain(constraint) is constraints.real


def bounds(constraint: Constraint) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of an elementwise constraint: numbers, or one an entry."""
    own = plain(constraint)
    low, high = getattr(own, "lower_bound", -torch.inf), getattr(own, "upper_bound", torch.inf)
    return torch.as_tensor(low, dtype=torch.float64), torch.as_tensor(high, dtype=torch.float64)


def _positive(constraint: Constraint) -> bool:
    return _elementwise(constraint) and bool((bounds(constraint)[0] >= 0).all())


def _unit(constraint: Constraint) -> bool:
    return _positive(constraint) and bool((bounds(constraint)[1] <= 1).all())


def _unbounded_above_zero(constraint: Constraint) -> bool:
    low, high = bounds(constraint)
    return _elementwise(constraint) and bool((low == 0).all() & (high == torch.inf).all())


def _is(*names: str) -> Callable[[Constraint], bool]:
    return lambda constraint: type(plain(constraint)).__name__.lstrip("_") in names


def _softplus_inverse(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))


SIMPLEX = (
    Spelling("probabilities", 1, _is("Simplex"), lambda p: p, lambda p, old: p),
    Spelling(
        "unnormalised weights",
        1,
        _unbounded_above_zero,
        lambda p: p / p.sum(-1, keepdim=True),
        lambda p, old: p * old.sum(-1, keepdim=True),
    ),
    Spelling(
        "logits",
        1,
        is_real,
        lambda p: torch.softmax(p, -1),
        lambda p, old: safe_log(p) + torch.logsumexp(old, -1, keepdim=True),
    ),
)

PROBABILITY = (
    Spelling("probability", 0, _unit, lambda p: p, lambda p, old: p),
    Spelling("1 − probability", 0, _unit, lambda p: 1 - p, lambda p, old: 1 - p),
    Spelling("logit", 0, is_real, torch.sigmoid, lambda p, old: torch.logit(p)),
)

POSITIVE = (
    Spelling("rate or precision", 0, _positive, lambda p: p, lambda t, old: t),
    Spelling("mean or variance", 0, _positive, lambda p: 1 / p, lambda t, old: 1 / t),
    Spelling("standard deviation", 0, _positive, lambda p: p**-2, lambda t, old: t**-0.5),
    Spelling("root of the rate", 0, _positive, torch.square, lambda t, old: t**0.5),
    Spelling("log rate or log precision", 0, is_real, torch.exp, lambda t, old: safe_log(t)),
    Spelling("log mean or log variance", 0, is_real, lambda p: torch.exp(-p), lambda t, old: -safe_log(t)),
    Spelling(
        "log standard deviation", 0, is_real, lambda p: torch.exp(-2 * p), lambda t, old: -safe_log(t) / 2
    ),
    Spelling(
        "softplus of the rate", 0, is_real, torch.nn.functional.softplus, lambda t, old: _softplus_inverse(t)
    ),
    Spelling(
        "softplus of the standard deviation",
        0,
        is_real,
        lambda p: torch.nn.functional.softplus(p) ** -2,
        lambda t, old: _softplus_inverse(t**-0.5),
    ),
)

LOCATION = (
    Spelling("location", 0, _elementwise, lambda p: p, lambda m, old: m),
    Spelling("− location", 0, is_real, lambda p: -p, lambda m, old: -m),
    Spelling("exp of the location", 0, _positive, torch.log, lambda m, old: m.exp()),
)

_SYMMETRIC = _is("PositiveDefinite", "PositiveSemidefinite")
_TRIANGULAR = _is("LowerCholesky", "SoftplusLowerCholesky")

MATRIX = (
    Spelling("covariance", 2, _SYMMETRIC, lambda p: p, lambda c, old: (c + c.mT) / 2),
    Spelling("Cholesky factor", 2, _TRIANGULAR, lambda p: p @ p.mT, lambda c, old: torch.linalg.cholesky(c)),
    Spelling("precision matrix", 2, _SYMMETRIC, torch.linalg.inv, lambda c, old: _inverse(c)),
    Spelling(
        "Cholesky factor of the precision",
        2,
        _TRIANGULAR,
        lambda p: torch.linalg.inv(p @ p.mT),
        lambda c, old: torch.linalg.cholesky(_inverse(c)),
    ),
)

SPELLINGS: dict[tuple[str, str], tuple[Spelling, ...]] = {
    ("simplex", "probs"): SIMPLEX,
    ("beta", "probs"): PROBABILITY,
    ("gamma", "rate"): POSITIVE,
    ("normal", "loc"): LOCATION,
    ("normal", "precision"): POSITIVE,
    ("mvn", "loc"): LOCATION,
    ("mvn", "covariance"): MATRIX,
}
"""Candidates for each field of each kind, the plainest first."""


def _inverse(matrix: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.inv(matrix)
    return (inverse + inverse.mT) / 2
