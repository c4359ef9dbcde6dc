"""The table of exponential families: of each, its kind, its parameters in the kind's coordinates and its statistics.

The kinds are those of `lvmppl.exponential`. The M-step reads the table one way (expected statistics to parameters), the
densities of `lvmppl.bilinear` the other (parameters to natural parameters).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from lvmppl.families import unexpanded

Getter = Callable[[Any], dict[str, Tensor]]


class Family(NamedTuple):
    """One line of the table.

    kind: see the module. fields: the distribution's parameters in the kind's coordinates. known: what must not depend
    on θ (a number of trials, say). statistics: (x, known) → (a, b) for beta and gamma, (x,) for normal.
    """

    kind: str
    fields: Getter
    known: Getter
    statistics: Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, ...]]
    base: Callable[[Tensor, Mapping[str, Tensor]], Tensor] | None = None


def _category_probs(fn: Any) -> dict[str, Tensor]:
    own = getattr(fn, "_categorical", fn)
    if "probs" in own.__dict__:
        return {"probs": unexpanded(own.probs, 1)}
    return {"probs": torch.softmax(unexpanded(own.logits, 1), -1)}


def _probs(fn: Any) -> dict[str, Tensor]:
    if "probs" in fn.__dict__:
        return {"probs": unexpanded(fn.probs)}
    return {"probs": torch.sigmoid(unexpanded(fn.logits))}


def _nothing(fn: Any) -> dict[str, Tensor]:
    return {}


def _trials(fn: Any) -> dict[str, Tensor]:
    return {"total_count": torch.as_tensor(fn.total_count, dtype=torch.get_default_dtype())}


def _one(x: Tensor) -> Tensor:
    return torch.ones((), dtype=x.dtype if x.is_floating_point() else torch.get_default_dtype())


def _value(x: Tensor, known: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return (x,)


def _precision(fn: Any) -> dict[str, Tensor]:
    return {"loc": fn.loc, "precision": unexpanded(fn.scale) ** -2}


def _choose(x: Tensor, n: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)


FAMILIES: dict[type, Family] = {
    dist.Categorical: Family("simplex", _category_probs, _nothing, _value),
    dist.OneHotCategorical: Family("simplex", _category_probs, _nothing, _value),
    dist.Multinomial: Family(
        "simplex",
        _category_probs,
        _nothing,
        _value,
        lambda x, k: torch.lgamma(x.sum(-1) + 1) - torch.lgamma(x + 1).sum(-1),
    ),
    dist.Bernoulli: Family("beta", _probs, _nothing, lambda x, k: (x, 1 - x)),
    dist.Binomial: Family(
        "beta",
        _probs,
        _trials,
        lambda x, k: (x, k["total_count"] - x),
        lambda x, k: _choose(x, k["total_count"]),
    ),
    dist.Geometric: Family("beta", _probs, _nothing, lambda x, k: (_one(x), x)),
    dist.NegativeBinomial: Family(
        "beta",
        _probs,
        _trials,
        lambda x, k: (x, k["total_count"]),
        lambda x, k: _choose(x, k["total_count"] + x - 1),
    ),
    dist.Poisson: Family(
        "gamma",
        lambda f: {"rate": f.rate},
        _nothing,
        lambda x, k: (x, _one(x)),
        lambda x, k: -torch.lgamma(x + 1),
    ),
    dist.Exponential: Family("gamma", lambda f: {"rate": f.rate}, _nothing, lambda x, k: (_one(x), x)),
    dist.Gamma: Family(
        "gamma",
        lambda f: {"rate": f.rate},
        lambda f: {"concentration": f.concentration},
        lambda x, k: (k["concentration"], x),
        lambda x, k: (k["concentration"] - 1) * x.log() - torch.lgamma(k["concentration"]),
    ),
    dist.InverseGamma: Family(
        "gamma",
        lambda f: {"rate": f.rate},
        lambda f: {"concentration": f.concentration},
        lambda x, k: (k["concentration"], 1 / x),
        lambda x, k: -(k["concentration"] + 1) * x.log() - torch.lgamma(k["concentration"]),
    ),
    dist.Laplace: Family(
        "gamma",
        lambda f: {"rate": 1 / unexpanded(f.scale)},
        lambda f: {"loc": f.loc},
        lambda x, k: (_one(x), (x - k["loc"]).abs()),
        lambda x, k: torch.full((), -0.6931471805599453, dtype=x.dtype),
    ),
    dist.HalfNormal: Family(
        "gamma",
        lambda f: {"rate": unexpanded(f.scale) ** -2},
        _nothing,
        lambda x, k: (_one(x) / 2, x.square() / 2),
        lambda x, k: torch.full((), -0.2257913526447274, dtype=x.dtype),
    ),
    dist.Pareto: Family(
        "gamma",
        lambda f: {"rate": f.alpha},
        lambda f: {"scale": f.scale},
        lambda x, k: (_one(x), (x / k["scale"]).log()),
        lambda x, k: -x.log(),
    ),
    dist.Normal: Family("normal", _precision, _nothing, _value),
    dist.LogNormal: Family("normal", _precision, _nothing, lambda x, k: (x.log(),), lambda x, k: -x.log()),
    dist.MultivariateNormal: Family(
        "mvn", lambda f: {"loc": f.loc, "covariance": _covariance(f)}, _nothing, _value
    ),
}
"""The table of exponential families."""


def _covariance(fn: Any) -> Tensor:
    """As it was given, not as rebuilt from its Cholesky factor, where it was given."""
    if "covariance_matrix" in fn.__dict__:
        return fn.covariance_matrix  # type: ignore[no-any-return]
    root = fn._unbroadcasted_scale_tril
    return root @ root.mT  # type: ignore[no-any-return]
