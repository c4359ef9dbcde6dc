"""Linear-Gaussian chains and the shipped state-space models beside dense Gaussians and statsmodels."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from statsmodels.datasets import nile
from statsmodels.tsa.statespace.structural import UnobservedComponents
from torch import Tensor

import lvmppl
from lvmppl.distributions import GaussianChain
from lvmppl.errors import InputError
from lvmppl.models.state_space import linear_gaussian, local_level

A = np.array([[0.8, 0.3], [-0.4, 0.6]])
Q = np.array([[0.7, 0.2], [0.2, 0.5]])
STEPS = 5


def tensor(value: Any) -> Tensor:
    return torch.as_tensor(np.array(value, dtype=float))


def chain(full: bool, steps: int = STEPS) -> GaussianChain:
    first = dist.Normal(tensor([1.0, -0.5]), tensor([2.0, 0.7])).to_event(1)
    noise: Any = dist.Normal(tensor([0.1, -0.2]), tensor([0.6, 0.9])).to_event(1)
    if full:
        noise = dist.MultivariateNormal(tensor([0.1, -0.2]), tensor(Q))
    return GaussianChain(first, tensor(A), noise, steps)


def moments(full: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the stacked path, by writing z = M e with independent blocks e."""
    noise = Q if full else np.diag([0.36, 0.81])
    blocks = np.zeros((STEPS, 2, STEPS, 2))
    for t in range(STEPS):
        for s in range(t + 1):
            blocks[t, :, s] = np.linalg.matrix_power(A, t - s)
    matrix = blocks.reshape(2 * STEPS, 2 * STEPS)
    covariance = np.kron(np.eye(STEPS), noise)
    covariance[:2, :2] = np.diag([4.0, 0.49])
    mean = np.tile([0.1, -0.2], STEPS)
    mean[:2] = [1.0, -0.5]
    return matrix @ mean, matrix @ covariance @ matrix.T


@pytest.mark.parametrize("full", [True, False])
def test_log_prob_and_moments_of_a_gaussian_chain_equal_the_dense_normal(full: bool) -> None:
    fn, (mean, covariance) = chain(full), moments(full)
    z = np.random.default_rng(1).normal(size=(7, STEPS, 2))
    expected = stats.multivariate_normal(mean, covariance).logpdf(z.reshape(7, -1))
    np.testing.assert_allclose(fn.log_prob(tensor(z)), expected, rtol=1e-11)
    np.testing.assert_allclose(fn.expand([7]).log_prob(tensor(z)), expected, rtol=1e-11)
    torch.manual_seed(0)
    draws = fn.expand([3]).sample((40_000,))
    assert draws.shape == (40_000, 3, STEPS, 2)
    np.testing.assert_allclose(draws[:, 0].mean(0).flatten(), mean, atol=0.06)
    np.testing.assert_allclose(np.cov(draws[:, 2].flatten(1).numpy().T), covariance, atol=0.15)


def test_shapes_and_families_that_do_not_fit_are_refused() -> None:
    first = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    with pytest.raises(InputError, match=r"transition \(2, 2\)"):
        GaussianChain(first, torch.eye(3), first, 4)
    with pytest.raises(InputError, match=r"GaussianChain noise: expected a Normal.*Gamma"):
        GaussianChain(first, torch.eye(2), dist.Gamma(torch.ones(2), 1.0).to_event(1), 4)
    with pytest.raises(InputError, match="num_steps"):
        GaussianChain(first, torch.eye(2), first, 0)


def nile_flow() -> np.ndarray:
    return np.asarray(nile.load_pandas().data["volume"], dtype=float)


def peer(y: np.ndarray) -> Any:
    found = UnobservedComponents(y, "llevel")
    found.ssm.initialize_known(np.array([y[0]]), np.array([[(10 * y.std()) ** 2]]))
    found.loglikelihood_burn = 0
    return found


def test_local_level_of_the_nile_equals_statsmodels() -> None:
    y = nile_flow()
    best = peer(y).fit(disp=0, method="bfgs", maxiter=500, gtol=1e-9)
    fit = lvmppl.fit(local_level, {"x": tensor(y)[None]}, algorithm="enumeration", tolerance=1e-12)
    assert fit.status == "converged"
    assert fit.log_evidence_kind == "exact"
    assert fit.log_evidence == pytest.approx(best.llf, abs=1e-6)
    np.testing.assert_allclose(fit.parameters["noise_variance"], best.params[0], rtol=1e-4)
    np.testing.assert_allclose(fit.parameters["level_variance"], best.params[1], rtol=1e-4)
    again = lvmppl.fit(local_level, {"x": tensor(y)[None]}, algorithm="em", start_from=fit, tolerance=1e-9)
    assert again.steps <= 2
    np.testing.assert_allclose(again.parameters["level_variance"], best.params[1], rtol=1e-4)


def test_em_step_of_the_local_level_equals_the_smoothers_expectations() -> None:
    """Shumway & Stoffer (1982): variances are the mean expected squares of the smoothed disturbances."""
    y = nile_flow()[:30]
    change = np.mean(np.diff(y) ** 2)
    found = peer(y).smooth([change / 4, change / 2])
    mean, variance = found.smoothed_state[0], found.smoothed_state_cov[0, 0]
    lagged = found.smoothed_state_autocov[0, 0, :-1]  # Cov(z_{t+1}, z_t | x)
    steps = np.diff(mean) ** 2 + variance[1:] + variance[:-1] - 2 * lagged
    fit = lvmppl.fit(local_level, {"x": tensor(y)[None]}, algorithm="em", max_steps=1, tolerance=0)
    assert {s.how for s in fit.m_step} == {"closed-form"}
    np.testing.assert_allclose(fit.parameters["level_variance"], steps.mean(), rtol=1e-8)
    np.testing.assert_allclose(
        fit.parameters["noise_variance"], ((y - mean) ** 2 + variance).mean(), rtol=1e-8
    )


@pytest.mark.parametrize("steps", [4, 11])
def test_log_evidence_of_a_linear_gaussian_model_equals_the_dense_normal(steps: int) -> None:
    x = np.random.default_rng(4).normal(size=(3, steps, 2)).cumsum(1)
    model = functools.partial(linear_gaussian, state_dim=3)
    fit = lvmppl.fit(model, {"x": tensor(x)}, algorithm="em", max_steps=3, tolerance=0)
    assert {s.how for s in fit.m_step} == {"closed-form"}
    assert fit.history["objective"].diff().min() > 0
    p = {k: v.numpy() for k, v in fit.parameters.items()}
    powers = [np.linalg.matrix_power(p["transition"], k) for k in range(steps)]
    path = np.block(
        [[powers[t - s] if s <= t else np.zeros((3, 3)) for s in range(steps)] for t in range(steps)]
    )
    seen = np.kron(np.eye(steps), p["emission"])
    covariance = seen @ path @ path.T @ seen.T + np.kron(np.eye(steps), np.diag(p["variance"]))
    normal = stats.multivariate_normal(np.tile(p["offset"], steps), covariance)
    assert fit.log_evidence == pytest.approx(normal.logpdf(x.reshape(3, -1)).sum(), rel=1e-9)


@pytest.mark.parametrize("model", [local_level, functools.partial(linear_gaussian, state_dim=2)])
def test_log_evidence_does_not_depend_on_what_stands_beyond_a_length(model: Any) -> None:
    x = np.random.default_rng(5).normal(size=(1, 10)).cumsum(1)
    longer = np.concatenate([x, np.full((1, 3), 99.0)], 1)
    data = {"x": tensor(longer), "lengths": torch.tensor([10])}
    whole = lvmppl.posterior(model, {"x": tensor(x)})
    assert lvmppl.posterior(model, data).log_evidence == pytest.approx(whole.log_evidence, rel=1e-9)
