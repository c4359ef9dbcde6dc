"""Conjugate priors of closed-form parameters, as pseudo-statistics of the M-step (MAP-EM).

A global latent site (`loc ~ Normal`, `weights ~ Dirichlet` outside of the data plate) is a parameter with a prior: its
log-density joins Q(θ). Where it has the form of the expected log-likelihood it only adds to the statistics:

    Dirichlet(α) on probabilities       S + α − 1           Gamma(α, β) on a rate or precision     A + α − 1, B + β
    Beta(α, β) on a probability         A + α − 1, B + β − 1  InverseGamma(α, β) on a variance     A + α + 1, B + β

    Normal(m, s) on a location          Σ w x + m/s², Σ w + 1/s²   (w = q τ: here the scale does not cancel)

A normal on a location that is computed, or of a multivariate site, keeps Q quadratic (`least_squares`); a Uniform
changes nothing within its bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from lvmppl.algorithms.maxima import HOLD, PULL

Parts = dict[str, Tensor]

_CONJUGATE: dict[tuple[type, str, str], Callable[[Any], Parts]] = {
    (dist.Dirichlet, "simplex", "probabilities"): lambda f: {"counts": f.concentration - 1},
    (dist.Beta, "beta", "probability"): lambda f: {"a": f.concentration1 - 1, "b": f.concentration0 - 1},
    (dist.Beta, "beta", "1 − probability"): lambda f: {"a": f.concentration0 - 1, "b": f.concentration1 - 1},
    (dist.Gamma, "gamma", "rate or precision"): lambda f: {"a": f.concentration - 1, "b": f.rate},
    (dist.Exponential, "gamma", "rate or precision"): lambda f: {"a": torch.zeros_like(f.rate), "b": f.rate},
    (dist.Normal, "loc", "location"): lambda f: {PULL: f.loc * f.scale**-2, HOLD: f.scale**-2},
    (dist.InverseGamma, "gamma", "mean or variance"): lambda f: {"a": f.concentration + 1, "b": f.rate},
}


def base_of(fn: Any) -> Any:
    """The distribution within its wrappers."""
    while isinstance(fn, dist.Independent | td.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def is_quadratic(fn: Any) -> bool:
    """Whether the log-density is quadratic in its value."""
    return isinstance(base_of(fn), dist.Normal | dist.MultivariateNormal)


def pseudo_statistics(fn: Any, group: str, spelling: str, value: Tensor) -> Parts | None:
    """What the prior adds to the sums of a parameter of this kind and spelling, None where it has another form.

    A prior whose density has a pole (a concentration below 1) has none either: counts less than 0 are not counts.
    """
    base = base_of(fn)
    if isinstance(base, dist.Uniform):
        return {}
    make = _CONJUGATE.get((type(base), group, spelling))
    if make is None:
        return None
    parts = {k: v.detach().expand(value.shape) for k, v in make(base).items()}
    return None if any(bool((v < 0).any()) for k, v in parts.items() if k != PULL) else parts
