"""Scales beside continuous sites: a scale of s repeats a plate s times, once its latent sites are integrated out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from scipy import integrate, stats
from torch import Tensor

import lvmppl
from lvmppl.errors import IntractableError

ENUMERATED = {"enumerate": "parallel"}
WEIGHTS = (0.3, 0.7)
LOC = (-1.0, 2.0)
RANGE = (-6.0, 6.0)  # of mu: its density is 1e-15 of the highest beyond


Row = Callable[[Tensor, Tensor], None]


def gaussian(x: Tensor, theta: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.4, theta[0].exp()))
    pyro.sample("x", dist.Normal(z, 0.8), obs=x)


def poisson(x: Tensor, theta: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(theta[0], 0.9))
    pyro.sample("x", dist.Poisson(z.exp()), obs=x.abs().round())


def mixed(x: Tensor, theta: Tensor) -> None:
    c = pyro.sample("c", dist.Categorical(torch.tensor(WEIGHTS)), infer=ENUMERATED)
    z = pyro.sample("z", dist.Normal(theta[c], 0.6))
    pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def weighed(row: Row) -> Callable[..., None]:
    def model(x: Tensor, w: Tensor) -> None:
        theta = pyro.param("theta", torch.tensor([0.3, 1.1]))
        with pyro.plate("data", len(x)), poutine.scale(scale=w):
            row(x, theta)

    return model


def plain(row: Row) -> Callable[..., None]:
    def model(x: Tensor) -> None:
        theta = pyro.param("theta", torch.tensor([0.3, 1.1]))
        with pyro.plate("data", len(x)):
            row(x, theta)

    return model


@settings(max_examples=15, deadline=None)
@given(
    row=st.sampled_from([gaussian, poisson, mixed]),
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_log_evidence_of_whole_weights_equals_that_of_rows_repeated(
    row: Row, counts: list[int], seed: int
) -> None:
    x = 2.0 * torch.randn(len(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    number = torch.tensor(counts)
    post = lvmppl.posterior(weighed(row), {"x": x, "w": number.double()})
    repeated = lvmppl.posterior(plain(row), {"x": x.repeat_interleave(number)})
    once = lvmppl.posterior(plain(row), {"x": x})
    assert post.kind == once.kind
    assert post.log_evidence == pytest.approx(repeated.log_evidence, rel=1e-9)
    assert post.log_evidence_error == pytest.approx(repeated.log_evidence_error, rel=0.5, abs=1e-12)
    np.testing.assert_allclose(
        post.log_evidence_per_datum, once.log_evidence_per_datum * number, rtol=1e-9, atol=1e-12
    )
    frames = [p.to_frame()[["probability", "mean", "sd"]].astype(float) for p in (post, once)]
    np.testing.assert_allclose(frames[0], frames[1], rtol=1e-7)


@pytest.mark.parametrize("algorithm", ["em", "enumeration"])
@pytest.mark.parametrize("row", [gaussian, poisson, mixed])
def test_fit_of_whole_weights_equals_that_of_rows_repeated(row: Row, algorithm: str) -> None:
    x = torch.tensor([2.9, -1.6, 0.3, 4.1], dtype=torch.float64)
    number = torch.tensor([1, 3, 2, 1])
    options = {"algorithm": algorithm, "max_steps": 2, "tolerance": 0.0}
    fit = lvmppl.fit(weighed(row), {"x": x, "w": number.double()}, **options)
    repeated = lvmppl.fit(plain(row), {"x": x.repeat_interleave(number)}, **options)
    assert fit.log_evidence == pytest.approx(repeated.log_evidence, rel=1e-7)
    for name, value in repeated.parameters.items():
        np.testing.assert_allclose(fit.parameters[name], value, rtol=1e-5)


def likelihood(x: np.ndarray, mu: float, kind: str) -> np.ndarray:
    """p(x_n | mu) of each row, its own latent site summed out."""
    if kind == "normal":
        return np.asarray(stats.norm(mu, 0.7).pdf(x))
    if kind == "poisson":
        return np.asarray(stats.poisson(math.exp(mu)).pmf(x))
    return np.asarray(sum(w * stats.norm(mu + m, 1.5).pdf(x) for w, m in zip(WEIGHTS, LOC, strict=True)))


def shared(x: Tensor, kind: str, scale: Any) -> None:
    mu = pyro.sample("mu", dist.Normal(0.5, 1.5))
    with pyro.plate("data", len(x)), poutine.scale(scale=scale):
        if kind == "normal":
            pyro.sample("x", dist.Normal(mu, 0.7), obs=x)
        elif kind == "poisson":
            pyro.sample("x", dist.Poisson(mu.exp()), obs=x)
        else:
            c = pyro.sample("c", dist.Categorical(torch.tensor(WEIGHTS)), infer=ENUMERATED)
            pyro.sample("x", dist.Normal(mu + torch.tensor(LOC)[c], 1.5), obs=x)


@pytest.mark.parametrize("scale", [2.5, (0.5, 3.0, 1.0)])
@pytest.mark.parametrize("kind", ["normal", "poisson", "mixture"])
def test_minibatch_beneath_a_global_site_equals_quadrature(kind: str, scale: Any) -> None:
    """log p(x) = log ∫ p(mu) Π_n p(x_n | mu)^s_n dmu; p(c_n | x) is that of one copy."""
    rows = np.array([1.0, 4.0, 2.0])
    weights = torch.as_tensor(scale, dtype=torch.float64)
    s = np.broadcast_to(weights.numpy(), 3)

    def density(mu: float) -> float:
        prior = stats.norm(0.5, 1.5).logpdf(mu)
        return float(np.exp(prior + (s * np.log(likelihood(rows, mu, kind))).sum()))

    post = lvmppl.posterior(lambda x: shared(x, kind, weights), {"x": torch.tensor(rows)})
    total = integrate.quad(density, *RANGE, epsabs=0, epsrel=1e-12, limit=300)[0]
    mean = integrate.quad(lambda m: m * density(m), *RANGE, epsabs=0, epsrel=1e-12, limit=300)[0] / total
    assert post.log_evidence == pytest.approx(math.log(total), rel=1e-8)
    assert float(post.moments("mu")[0]) == pytest.approx(mean, rel=1e-6)
    if kind == "mixture":

        def state(mu: float, n: int) -> float:
            return WEIGHTS[1] * stats.norm(mu + LOC[1], 1.5).pdf(rows[n]) / likelihood(rows, mu, kind)[n]

        for n in range(3):
            found = integrate.quad(lambda m, n=n: state(m, n) * density(m), *RANGE, epsrel=1e-12, limit=300)[
                0
            ]
            assert float(post.probabilities("c")[n, 1]) == pytest.approx(found / total, rel=1e-6)


def seen_alone(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        with poutine.scale(scale=2.0):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_beneath_global(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.scale(scale=3.0):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "named"), [(seen_alone, "'x' carries another"), (local_beneath_global, "'z'")]
)
def test_scale_within_a_row_is_refused_by_name(model: Callable[..., None], named: str) -> None:
    with pytest.raises(IntractableError, match=f"{named}.*put poutine.scale around"):
        lvmppl.posterior(model, {"x": torch.tensor([0.3, 0.9, -2.0])})
