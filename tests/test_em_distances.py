"""The E-step of tables where expanded squares would lose digits, against scipy's densities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm
from torch import Tensor
from torch.distributions import constraints

from lvmppl.algorithms import tabulated
from lvmppl.algorithms.m_step import plan_m_step
from lvmppl.algorithms.problem import build_problem
from lvmppl.algorithms.tabulation import tabulate
from lvmppl.density import isolated

N, D, K = 70, 4, 3
SCALES = [1e-5, 1.0, 3e-4, 0.2]  # of the first component, by restart: the data reach 30 from their mean


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(8)


X = 10 * torch.randn(N, D, generator=generator(), dtype=torch.float64)


def full(x: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(K) / K, constraint=constraints.simplex)
    loc = pyro.param("loc", X[:K].clone())
    spread = pyro.param("spread", torch.eye(D).repeat(K, 1, 1), constraint=constraints.positive_definite)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.MultivariateNormal(loc[z], spread[z]), obs=x)


def diagonal(x: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(K) / K, constraint=constraints.simplex)
    loc = pyro.param("loc", X[:K].clone())
    spread = pyro.param("spread", torch.ones(K, D), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[z], spread[z].sqrt()).to_event(1), obs=x)


def by_feature(x: Tensor) -> None:
    """Features are a plate, which the locations share with the data."""
    weights = pyro.param("weights", torch.ones(K) / K, constraint=constraints.simplex)
    loc = pyro.param("loc", X[:K].clone())
    spread = pyro.param("spread", torch.ones(K, D), constraint=constraints.positive)
    features = pyro.plate("features", D, dim=-1)
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        with features:
            f = torch.arange(D)
            pyro.sample("x", dist.Normal(loc[z, f], spread[z, f].sqrt()), obs=x)


def values(covariance: bool) -> dict[str, Tensor]:
    """Of every restart: the first component sits next to a datum, as narrow as its scale says."""
    noise = torch.randn(len(SCALES), K, D, D, generator=generator(), dtype=torch.float64)
    spread = noise @ noise.mT + torch.eye(D) if covariance else 1 + noise[..., 0].square()
    spread[:, 0] *= torch.tensor(SCALES).double().square().reshape([-1] + [1] * (spread.dim() - 2))
    loc = X[:K] + torch.cat([1e-6 * noise[:, :1, 1], noise[:, 1:, 1]], 1)
    weights = torch.softmax(noise[:, :, 0, 0], -1)
    return {"weights": weights, "loc": loc, "spread": spread}


@pytest.mark.parametrize("small", [tabulated.SMALL, 0], ids=["all", "the coarse"])
@pytest.mark.parametrize("model", [full, diagonal, by_feature])
def test_e_step_by_distances_equals_scipy(model: Any, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tabulated, "SMALL", small)
    with isolated(0, torch.float64):
        problem = build_problem("tables", model, {"x": X})
        plan = plan_m_step(problem)
        tables = tabulate(problem, plan)
        assert tables is not None
        own = values(model is full)
        total, statistics = tables.e_step(own)
    site = next(s for s in plan.sites if s.name == "x")
    assert site.reference is not None
    centred = X.numpy() - site.reference.tensor.numpy()
    for r in range(len(SCALES)):
        loc, spread = own["loc"][r].numpy(), own["spread"][r].numpy()
        joint = np.log(own["weights"][r].numpy()) + np.stack(
            [
                multivariate_normal(m, s, allow_singular=False).logpdf(X.numpy())
                if model is full
                else norm(m, s**0.5).logpdf(X.numpy()).sum(-1)
                for m, s in zip(loc, spread, strict=True)
            ],
            -1,
        )
        log_evidence = logsumexp(joint, -1)
        q = np.exp(joint - log_evidence[:, None])
        assert float(total[r]) == pytest.approx(log_evidence.sum(), rel=1e-9)
        first = statistics["x"]["first"].tensor[r].reshape(K, D).numpy()
        np.testing.assert_allclose(first, q.T @ centred, rtol=1e-8, atol=1e-8)
