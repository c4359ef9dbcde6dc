"""What is asked of a posterior by quadrature comes from the rule that found its evidence: the model is not run anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

import lvmppl
from lvmppl.exact.peaks import maximised
from lvmppl.exact.quadrature import quadrature

COUNTS = torch.tensor([0.0, 3.0, 7.0, 1.0, 12.0], dtype=torch.float64)


def gamma_poisson(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.5))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def beta_binomial(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Beta(x.new_tensor(2.0), 3.5))
        pyro.sample("x", dist.Binomial(12, p), obs=x)


def funnel(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(0.0, (a / 2).exp()))
        pyro.sample("x", dist.Poisson(b.exp()), obs=x)


def counted(model: Callable[..., None]) -> tuple[Callable[..., None], list[int]]:
    runs: list[int] = []

    def program(x: Tensor) -> None:
        runs.append(len(x))
        model(x)

    return program, runs


@pytest.mark.parametrize("model", [gamma_poisson, beta_binomial, funnel])
def test_questions_run_the_model_once_or_not_at_all(model: Callable[..., None]) -> None:
    program, runs = counted(model)
    post: Any = lvmppl.posterior(program, {"x": COUNTS})
    site = post.layout.blocks[0].name
    runs.clear()
    post.marginal(site), post.moments(site), post.entropy(), post.to_frame(), post.log_evidence_error
    assert len(runs) == 0
    mode = post.mode()
    assert len(runs) == 1
    post.sample(7)
    assert len(runs) == 2
    torch.testing.assert_close(post.log_prob(mode.states), mode.log_prob, rtol=1e-9, atol=1e-9)
    assert len(runs) == 3


def test_mode_and_entropy_equal_those_of_conjugate_posteriors() -> None:
    x = COUNTS.numpy()
    post: Any = lvmppl.posterior(gamma_poisson, {"x": COUNTS})
    gamma = stats.gamma(2.0 + x, scale=1 / 2.5)
    np.testing.assert_allclose(post.mode().states["rate"], (1.0 + x) / 2.5, rtol=1e-6)
    np.testing.assert_allclose(post.mode().log_prob, gamma.logpdf((1.0 + x) / 2.5), atol=2e-6)
    np.testing.assert_allclose(post.entropy(), gamma.entropy(), atol=2e-6)
    post = lvmppl.posterior(beta_binomial, {"x": COUNTS})
    beta = stats.beta(2.0 + x, 3.5 + 12 - x)
    np.testing.assert_allclose(post.mode().states["p"], (1.0 + x) / 15.5, rtol=1e-6)
    np.testing.assert_allclose(post.entropy(), beta.entropy(), atol=2e-6)


def test_mode_of_a_funnel_equals_scipy_optimize() -> None:
    post: Any = lvmppl.posterior(funnel, {"x": COUNTS})
    mode = post.mode()
    for n, count in enumerate(COUNTS.tolist()):

        def negative(z: np.ndarray, count: float = count) -> float:
            prior = stats.norm.logpdf(z[0]) + stats.norm.logpdf(z[1], 0.0, np.exp(z[0] / 2))
            return float(-prior - stats.poisson.logpmf(count, np.exp(z[1])))

        found = optimize.minimize(negative, [0.0, 0.5], method="BFGS", options={"gtol": 1e-9})
        height = -found.fun - post.log_evidence_per_datum[n].item()
        assert mode.log_prob[n].item() == pytest.approx(height, abs=1e-8)
        np.testing.assert_allclose([mode.states["a"][n], mode.states["b"][n]], found.x, atol=1e-5)


def test_mode_at_the_edge_and_at_a_kink_equals_closed_forms() -> None:
    """Exponential prior and Poisson(rate) of nothing: highest at 0. Laplace prior, Cauchy data far away: highest at 0."""

    def edge(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(pyro.sample("rate", dist.Exponential(x.new_ones(())))), obs=x)

    def kink(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Cauchy(z, 3.0), obs=x)

    post: Any = lvmppl.posterior(edge, {"x": torch.zeros(2, dtype=torch.float64)})
    np.testing.assert_allclose(post.mode().states["rate"], 0.0, atol=1e-9)
    np.testing.assert_allclose(post.mode().log_prob, np.log(2.0), atol=2e-6)
    post = lvmppl.posterior(kink, {"x": torch.tensor([2.0, -1.5], dtype=torch.float64)})
    np.testing.assert_allclose(post.mode().states["z"], 0.0, atol=1e-7)


def test_mode_is_the_higher_of_two_that_nodes_do_not_tell_apart() -> None:
    """Two modes of nearly one height: which is the higher is seen at the modes themselves and not at the nodes nearest."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            parts = dist.Normal(x.new_tensor([-6.0, 6.3]), x.new_tensor([1.0, 0.4]))
            weights = torch.stack([0.7149 + x, 0.2851 - x], -1)
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(weights), parts))
            pyro.sample("y", dist.Normal(z, 1e3), obs=torch.zeros_like(x))

    shift = torch.tensor([-0.002, 0.002], dtype=torch.float64)
    post: Any = lvmppl.posterior(model, {"x": shift})
    np.testing.assert_allclose(post.mode().states["z"], [6.3, -6.0], atol=1e-4)


def test_samples_follow_the_conjugate_posterior() -> None:
    post: Any = lvmppl.posterior(gamma_poisson, {"x": COUNTS})
    draws = post.sample(4000, seed=3)["rate"].numpy()
    for n, count in enumerate(COUNTS.tolist()):
        assert stats.kstest(draws[:, n], stats.gamma(2.0 + count, scale=1 / 2.5).cdf).pvalue > 1e-3


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_maximum_of_smooth_functions_from_one_batch_equals_closed_form(dim: int) -> None:
    """Σ z_i a_i − exp(z_i), coupled by a quadratic: its maximum is where Newton's method by hand ends."""
    calls: list[int] = []
    slope = torch.linspace(0.7, 1.3, 4 * dim, dtype=torch.float64).view(4, dim)

    def function(t: Tensor) -> Tensor:
        calls.append(len(t))
        return (slope * t - t.exp()).sum(-1) - 0.1 * t.sum(-1).square()

    point, value = maximised(function, torch.full_like(slope[None], 0.2), torch.full_like(slope[None], 0.5))
    assert len(calls) == 1
    expected = torch.zeros(4, dim, dtype=torch.float64)
    for _ in range(30):
        gradient = slope - expected.exp() - 0.2 * expected.sum(-1, keepdim=True)
        hessian = torch.diag_embed(expected.exp()) + 0.2
        expected = expected + torch.linalg.solve(hessian, gradient.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(point[0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(value[0], function(expected.unsqueeze(0))[0], rtol=0, atol=1e-9)


def log_rate(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


@pytest.mark.parametrize(("model", "most"), [(gamma_poisson, 10), (beta_binomial, 11), (log_rate, 14)])
def test_smooth_posterior_of_one_mode_takes_few_runs(model: Callable[..., None], most: int) -> None:
    """Scans say where the mode is and how wide; nothing is climbed, and lattices are evaluated together."""
    program, runs = counted(model)
    post = lvmppl.posterior(program, {"x": COUNTS})
    assert len(runs) <= most
    assert post.log_evidence_error < 1e-5


def test_mass_that_one_mode_leaves_to_the_chart_of_another_is_counted() -> None:
    """A narrow term within a broad one, and a third apart: what is left to the chart of the third lies in the broad one's
    flank, with a hole at the narrow one's place.
    """
    weights = torch.tensor([[0.46, 0.52], [0.08, 0.13], [0.46, 0.35]], dtype=torch.float64)
    loc = torch.tensor([[0.2645, 0.2118], [4.7428, 0.6723], [0.0519, -3.0614]], dtype=torch.float64)
    scale = torch.tensor([[0.4012, 0.3055], [0.0853, 2.2658], [0.0408, 0.0252]], dtype=torch.float64)

    def log_joint(z: Tensor) -> Tensor:
        normal = dist.Normal(loc[:, 0], scale[:, 0]).log_prob(z[:, 0])
        student = dist.StudentT(3.0, loc[:, 1], scale[:, 1]).log_prob(z[:, 1])
        return (torch.stack([normal, student], 1) + weights.log().T).logsumexp(-1)

    found = quadrature(log_joint, 2, 1, wary=True)
    assert (found.log_evidence - weights.sum(0).log()).abs().max() < 1e-8
