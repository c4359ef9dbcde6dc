"""Models whose tables repeat entries, and further spellings of their distributions' parameters, for the tests of EM."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from em_models import ENUMERATE, blobs, case, counts, line, normal, positive_data, simplex, weights
from torch import Tensor
from torch.distributions import constraints

__all__: list[str] = []


def two_latents(size: int) -> tuple[Any, Tensor, Tensor]:
    """The data plate and two states a row, the second's distribution chosen by the first."""
    first = weights(2, "first")
    second = pyro.param("second", lambda: simplex(2, 2, seed=70), constraint=constraints.simplex)
    plate = pyro.plate("data", size)
    with plate:
        a = pyro.sample("a", dist.Categorical(first), infer=ENUMERATE)
        b = pyro.sample("b", dist.Categorical(second[a]), infer=ENUMERATE)
    return plate, a, b


@case(counts, "first second rate")
def symmetric_rates(x: Tensor) -> None:
    """A symmetric table: the entry off the diagonal stands in two places."""
    start = torch.tensor([2.0, 5.0, 11.0], dtype=torch.float64)
    rate = pyro.param("rate", start, constraint=constraints.positive)
    table = torch.stack([rate[:2], rate[1:]])
    plate, a, b = two_latents(len(x))
    with plate:
        pyro.sample("x", dist.Poisson(table[a, b]), obs=x)


@case(line, "first second loc scale")
def triangular_locations(x: Tensor) -> None:
    """A triangular table with a repeated diagonal and a constant above it."""
    loc = pyro.param("loc", torch.tensor([3.0, -1.5], dtype=torch.float64))
    scale = pyro.param("scale", torch.tensor(1.5, dtype=torch.float64), constraint=constraints.positive)
    table = torch.stack([torch.stack([loc[0], torch.zeros(()).double()]), torch.stack([loc[1], loc[0]])])
    plate, a, b = two_latents(len(x))
    with plate:
        pyro.sample("x", dist.Normal(table[a, b], scale), obs=x)


def of_pairs(x: Tensor, **spread: Any) -> None:
    """A mixture of two normals of pairs."""
    loc, mixing = pyro.param("loc", lambda: normal(2, 2, seed=71)), weights(2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.MultivariateNormal(loc[z], **spread), obs=x[:, :2])


@case(blobs, "weights loc", "variance correlation")
def covariance_with_equal_variances(x: Tensor) -> None:
    """A symmetric matrix of two entries, each in two places."""
    variance = pyro.param("variance", torch.tensor(2.0, dtype=torch.float64), constraint=constraints.positive)
    bounds = constraints.interval(-0.9, 0.9)
    correlation = pyro.param("correlation", torch.tensor(0.2, dtype=torch.float64), constraint=bounds)
    one = torch.ones(()).double()
    unit = torch.stack([one, correlation, correlation, one]).reshape(2, 2)
    of_pairs(x, covariance_matrix=variance * unit)


@case(blobs, "weights loc", "diagonal below")
def triangle_with_a_repeated_diagonal(x: Tensor) -> None:
    start = torch.tensor(1.5, dtype=torch.float64)
    diagonal = pyro.param("diagonal", start, constraint=constraints.positive)
    below = pyro.param("below", torch.tensor(-0.4, dtype=torch.float64))
    triangle = torch.stack([diagonal, torch.zeros(()).double(), below, diagonal]).reshape(2, 2)
    of_pairs(x, scale_tril=triangle)


@case(positive_data, "logits log_rate logit chance soft log_scale")
def further_spellings(x: Tensor, y: Tensor, w: Tensor) -> None:
    logits = pyro.param("logits", torch.tensor([0.4, -0.2], dtype=torch.float64))
    log_rate = pyro.param("log_rate", torch.tensor([0.5, 2.0], dtype=torch.float64))
    logit = pyro.param("logit", torch.tensor([-1.0, 0.3], dtype=torch.float64))
    chance = pyro.param("chance", torch.tensor([-2.0, -1.0], dtype=torch.float64))
    soft = pyro.param("soft", torch.tensor([0.6, 1.2], dtype=torch.float64))
    log_scale = pyro.param("log_scale", torch.tensor([0.1, 0.5], dtype=torch.float64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=logits), infer=ENUMERATE)
        pyro.sample("a", dist.Poisson(log_rate[z].exp()), obs=x)
        pyro.sample("b", dist.Binomial(30, logits=logit[z]), obs=x)
        pyro.sample("c", dist.Geometric(logits=chance[z]), obs=x)
        pyro.sample("d", dist.Exponential(torch.nn.functional.softplus(soft[z])), obs=y)
        pyro.sample("e", dist.Normal(0.2, log_scale[z].exp()), obs=w)
