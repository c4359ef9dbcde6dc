"""Gaussian posteriors whose precision loses digits to rounding, beside linear algebra with 60 of them (mpmath)."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lvmppl
from lvmppl.distributions import GaussianChain


def exact(
    x: Tensor, transition: np.ndarray, noise: np.ndarray, first: np.ndarray, r: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log evidence, means, sds [T, d]: z_1 ~ N(0, diag first²), z_{t+1} ~ N(A z_t, diag noise²), x_t ~ N(z_t[0], r²)."""
    with mpmath.workdps(60):
        steps, dim = len(x), len(first)
        size = steps * dim
        a = mpmath.matrix(transition.tolist())
        path = mpmath.zeros(size)  # z = path · e, e independent
        for s in range(steps):
            block = mpmath.eye(dim)
            for t in range(s, steps):
                path[t * dim : (t + 1) * dim, s * dim : (s + 1) * dim] = block
                block = a * block
        sds = [*first, *np.tile(noise, steps - 1)]
        prior = path * mpmath.diag([mpmath.mpf(float(v)) ** 2 for v in sds]) * path.T
        seen = mpmath.zeros(steps, size)
        for t in range(steps):
            seen[t, t * dim] = 1
        total = seen * prior * seen.T + mpmath.mpf(r) ** 2 * mpmath.eye(steps)
        gain, y = prior * seen.T * total**-1, mpmath.matrix([mpmath.mpf(float(v)) for v in x])
        square = (y.T * total**-1 * y)[0]
        log_evidence = -(steps * mpmath.log(2 * mpmath.pi) + mpmath.log(mpmath.det(total)) + square) / 2
        mean, covariance = gain * y, prior - gain * seen * prior
        sd = [float(mpmath.sqrt(covariance[i, i])) for i in range(size)]
        means = [float(v) for v in mean]
    return float(log_evidence), np.reshape(means, (steps, dim)), np.reshape(sd, (steps, dim))


def level_by_sites(x: Tensor, q: float, r: float) -> None:
    z = torch.zeros(())
    for t in range(len(x)):
        z = pyro.sample(f"z{t}", dist.Normal(z, q if t else 10.0))
        pyro.sample(f"x{t}", dist.Normal(z, r), obs=x[t])


def trend(x: Tensor, q: Tensor, r: float) -> None:
    first = dist.Normal(torch.zeros(2), torch.tensor([10.0, 2.0])).to_event(1)
    noise = dist.Normal(torch.zeros(2), q).to_event(1)
    z = pyro.sample("z", GaussianChain(first, torch.tensor([[1.0, 1.0], [0.0, 1.0]]), noise, len(x)))
    pyro.sample("x", dist.Normal(z[..., 0], r).to_event(1), obs=x)


def data(steps: int, r: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 5.0 + r * torch.randn(steps, generator=generator, dtype=torch.float64)


def moments_by_step(post: Any, steps: int) -> tuple[Tensor, Tensor]:
    found = [post.moments(f"z{t}") for t in range(steps)]
    means, sds = zip(*found, strict=True)
    return torch.stack(means).reshape(steps, 1), torch.stack(sds).reshape(steps, 1)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.sampled_from([2, 3, 5, 8, 13]),
    digits=st.integers(0, 7),
    r=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_level_that_hardly_moves_equals_sixty_digits(steps: int, digits: int, r: float, seed: int) -> None:
    x, q = data(steps, r, seed), r * 10.0**-digits
    post = lvmppl.posterior(lambda x: level_by_sites(x, q, r), {"x": x})
    log_evidence, mean, sd = exact(x, np.eye(1), np.array([q]), np.array([10.0]), r)
    assert post.kind == "exact" or digits > 4
    assert post.log_evidence_error < 1e-6
    found_mean, found_sd = moments_by_step(post, steps)
    assert post.log_evidence == pytest.approx(log_evidence, rel=1e-11)
    np.testing.assert_allclose(found_mean, mean, rtol=1e-10)
    np.testing.assert_allclose(found_sd, sd, rtol=1e-10)


@pytest.mark.parametrize("q", [(1e-6, 1e-6), (1e-3, 1e-7)])
def test_trend_that_hardly_moves_equals_sixty_digits(q: tuple[float, float]) -> None:
    x, a = data(11, 1.0), np.array([[1.0, 1.0], [0.0, 1.0]])
    post = lvmppl.posterior(lambda x: trend(x, torch.tensor(q), 1.0), {"x": x})
    log_evidence, mean, sd = exact(x, a, np.array(q), np.array([10.0, 2.0]), 1.0)
    assert post.kind == "exact"
    assert post.log_evidence == pytest.approx(log_evidence, rel=1e-9)
    found_mean, found_sd = post.moments("z")
    np.testing.assert_allclose(found_mean, mean, atol=1e-8)
    np.testing.assert_allclose(found_sd, sd, rtol=1e-8)


@pytest.mark.parametrize("q", [(1e-7, 0.5), (1e-6, 0.5), (1e-5, 0.5), (1e-4, 0.5), (1e-9, 1e-9), (1e-3, 0.5)])
def test_error_of_a_level_tied_to_a_free_slope_covers_sixty_digits(q: tuple[float, float]) -> None:
    """The first step's level and slope are tied by what follows to 1e-7: rounding mixes them with what is free."""
    x, a = data(11, 1.0), np.array([[1.0, 1.0], [0.0, 1.0]])
    post = lvmppl.posterior(lambda x: trend(x, torch.tensor(q), 1.0), {"x": x})
    log_evidence, _, sd = exact(x, a, np.array(q), np.array([10.0, 2.0]), 1.0)
    assert abs(post.log_evidence - log_evidence) <= post.log_evidence_error + 1e-12 * abs(log_evidence)
    assert post.log_evidence_error < 1e-4
    assert post.kind == ("estimate" if min(q) < 1e-5 else "exact")
    if post.kind == "exact":
        np.testing.assert_allclose(post.moments("z")[1], sd, rtol=1e-6)


def normal(difference: Tensor, sd: float) -> Tensor:
    scale = torch.tensor(sd, dtype=difference.dtype)
    return torch.distributions.Normal(torch.zeros_like(scale), scale).log_prob(difference).sum(-1)


def test_samples_and_log_probabilities_of_a_stiff_path_agree_with_its_density() -> None:
    """log p(z | x) = log p(x, z) − log p(x), at draws, whose steps differ by 1e-6."""
    x, q = data(9, 1.0), 1e-6
    post = lvmppl.posterior(lambda x: level_by_sites(x, q, 1.0), {"x": x})
    draws = post.sample(5, seed=3)
    z = torch.stack([draws[f"z{t}"] for t in range(9)], -1).reshape(5, 9)
    joint = normal(z[:, 1:] - z[:, :-1], q) + normal(z[:, :1], 10.0) + normal(z - x, 1.0)
    np.testing.assert_allclose(post.log_prob(draws).reshape(5), joint - post.log_evidence, rtol=1e-8)
