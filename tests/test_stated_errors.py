"""The error that quadrature states covers the truth: random posteriors in one and two dimensions of known evidence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor

import lvmppl
from lvmppl.exact.quadrature import quadrature

SHAPE, SCALE = st.floats(0.3, 9.0), st.floats(0.05, 3.0)
SOME = settings(max_examples=10, deadline=None, derandomize=True, database=None)
FEW = settings(SOME, max_examples=5)


def assert_covered(model: Callable[[Tensor], None], x: Tensor, truth: np.ndarray) -> None:
    """log p(x) of every datum is within its stated error."""
    post = lvmppl.posterior(model, {"x": x})
    assert post.kind == "quadrature" and post.log_evidence_per_datum is not None
    deviation = np.abs(post.log_evidence_per_datum.numpy() - truth)
    assert (deviation <= post.log_evidence_error_per_datum.numpy() + 1e-12).all(), deviation


@pytest.mark.parametrize("shared", [False, True])
def test_error_is_infinite_where_that_of_a_state_is_whose_weight_underflows(shared: bool) -> None:
    def state() -> Tensor:
        c: Tensor = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(1000.0 * c, 1.0), obs=torch.tensor(1000.0))
        return c

    def model(x: Tensor) -> None:
        c = state() if shared else None
        with pyro.plate("data", len(x)):
            c = state() if c is None else c
            p = pyro.sample(
                "p", dist.Beta(0.01 + 4.99 * c, 0.01 + 4.99 * c)
            )  # at c = 0 too steep at its edges
            pyro.sample("x", dist.Binomial(10, p), obs=x)

    x = tensor(0.0, 10.0, 3.0)
    post = lvmppl.posterior(model, {"x": x})
    assert post.kind == "estimate" and post.log_evidence_error == math.inf
    times = 1 if shared else len(x)
    expected = stats.betabinom(10, 5.0, 5.0).logpmf(x.numpy()).sum() + times * (
        math.log(0.5) + stats.norm.logpdf(0.0)
    )
    assert post.log_evidence == pytest.approx(expected, rel=1e-8)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@SOME
@given(SHAPE, SCALE, st.lists(st.integers(0, 40), min_size=3, max_size=3))
def test_error_covers_negative_binomial_in_scipy(shape: float, rate: float, counts: list[int]) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(pyro.sample("z", dist.Gamma(tensor(shape)[0], rate))), obs=x)

    assert_covered(model, tensor(*counts), stats.nbinom(shape, rate / (1.0 + rate)).logpmf(counts))


@SOME
@given(SHAPE, SHAPE, st.integers(1, 60), st.floats(0.0, 1.0))
def test_error_covers_beta_binomial_in_scipy(a: float, b: float, total: int, share: float) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Binomial(total, pyro.sample("p", dist.Beta(tensor(a)[0], b))), obs=x)

    counts = np.array([0, round(share * total), total])
    assert_covered(model, tensor(*counts), stats.betabinom(total, a, b).logpmf(counts))


@SOME
@given(st.floats(0.2, 20.0), SCALE, st.floats(-4.0, 4.0))
def test_error_covers_truncated_normal_in_scipy(width: float, scale: float, away: float) -> None:
    """Uniform(0, width) and Normal data within and beyond it: the density does not vanish at the edges."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Uniform(tensor(0.0)[0], width)), scale), obs=x)

    x = np.array([0.4 * width, width + away * scale, -away * scale])
    below, above = stats.norm.logcdf((0.0 - x) / scale), stats.norm.logcdf((width - x) / scale)
    mirrored = stats.norm.logsf((0.0 - x) / scale), stats.norm.logsf((width - x) / scale)
    mass = np.where(
        x < 0.5 * width, mirrored[0] + np.log1p(-np.exp(mirrored[1] - mirrored[0])),
        above + np.log1p(-np.exp(below - above)),
    )  # fmt: skip
    assert_covered(model, tensor(*x), mass - math.log(width))


@SOME
@given(SCALE, SHAPE, st.floats(-6.0, 6.0))
def test_error_covers_heavy_tails_by_scipy_quadrature(scale: float, freedom: float, place: float) -> None:
    """Normal prior and StudentT likelihood: two modes where they disagree."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample(
                "x", dist.StudentT(freedom, pyro.sample("z", dist.Normal(tensor(0.0)[0], 1.0)), scale), obs=x
            )

    def joint(z: float) -> float:
        return float(stats.norm.pdf(z) * stats.t.pdf((place - z) / scale, freedom) / scale)

    marks = sorted(
        {
            -12.0,
            12.0,
            *(c + d for c in (0.0, place) for s in (scale, 1.0) for d in (-4 * s, -s, 0.0, s, 4 * s)),
        }
    )
    area = sum(
        integrate.quad(joint, a, b, epsabs=0, epsrel=1e-12, limit=300)[0]
        for a, b in itertools.pairwise(marks)
        if a >= -12.0 and b <= 12.0
    )
    assert_covered(model, tensor(place), np.log([area]))


@st.composite
def mixtures(draw: st.DrawFn, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [K], means [K, d] and Cholesky factors [K, d, d] of Gaussians, overlapping or apart, narrow or broad."""
    count = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    apart = 10.0 ** draw(st.floats(-1.0, 1.3))
    loc = apart * torch.randn(count, dim, generator=generator, dtype=torch.float64)
    narrow = 10.0 ** (-1.0 * torch.rand(count, 1, 1, generator=generator, dtype=torch.float64))
    lower = torch.randn(count, dim, dim, generator=generator, dtype=torch.float64).tril(-1)
    diagonal = 0.5 + torch.rand(count, dim, generator=generator, dtype=torch.float64)
    return weights / weights.sum(), loc, narrow * (lower + torch.diag_embed(diagonal))


@SOME
@given(st.sampled_from([1, 2]).flatmap(mixtures))
def test_error_covers_mixtures_of_gaussians(mixture: tuple[Tensor, Tensor, Tensor]) -> None:
    """Normalised densities: log evidence 0, of the rule itself and told nothing of the terms."""
    weights, loc, factor = mixture
    parts = dist.MultivariateNormal(loc, scale_tril=factor)

    def log_joint(z: Tensor) -> Tensor:
        return (parts.log_prob(z.unsqueeze(-2)) + weights.log()).logsumexp(-1)

    found = quadrature(log_joint, 1, loc.shape[-1], wary=True)
    assert found.log_evidence.abs().item() <= found.log_evidence_error.item() + 1e-12


@FEW
@given(SHAPE, SHAPE, st.integers(0, 15), st.integers(0, 12))
def test_error_covers_two_bounded_dimensions_in_scipy(a: float, b: float, count: int, hits: int) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(tensor(a + 0.7)[0], 1.2))
            p = pyro.sample("p", dist.Beta(tensor(b + 0.7)[0], 2.0))
            pyro.sample("count", dist.Poisson(rate), obs=x[:, 0])
            pyro.sample("hits", dist.Binomial(12, p), obs=x[:, 1])

    truth = stats.nbinom(a + 0.7, 1.2 / 2.2).logpmf(count) + stats.betabinom(12, b + 0.7, 2.0).logpmf(hits)
    assert_covered(model, tensor(count, hits).unsqueeze(0), np.array([truth]))
