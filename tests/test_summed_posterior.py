"""Questions about enumerated sites jointly with the continuous ones at every point of which they are summed out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, optimize, stats
from torch import Tensor

import lvmppl
from lvmppl.distributions import MarkovChain

ENUMERATE = {"enumerate": "parallel"}
X = torch.tensor([0.3, 0.9, 1.9], dtype=torch.float64)
LOC, PRIOR = np.array([-1.0, 1.2]), np.array([0.3, 0.7])
FLIP = np.array([[0.9, 0.1], [0.4, 0.6]])


def unknown_location(x: Tensor) -> None:
    """shift ~ Gamma, so that nothing is Gaussian; c_n ~ PRIOR, b_n | c_n ~ FLIP; x_n ~ N(shift + LOC_c + b/2, 0.6)."""
    shift = pyro.sample("shift", dist.Gamma(x.new_tensor(2.0), 1.5))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor(PRIOR)), infer=ENUMERATE)
        b = pyro.sample("b", dist.Categorical(torch.tensor(FLIP)[c]), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(shift + torch.tensor(LOC)[c] + 0.5 * b, 0.6), obs=x)


def log_terms(shift: float) -> np.ndarray:
    """log p(x_n, c, b | shift) [N, 2, 2]."""
    mean = shift + LOC[:, None] + 0.5 * np.arange(2)
    table: np.ndarray = np.log(PRIOR[:, None] * FLIP) + stats.norm.logpdf(X.numpy()[:, None, None], mean, 0.6)
    return table


def log_prior(shift: float) -> float:
    return float(stats.gamma.logpdf(shift, 2.0, scale=1 / 1.5))


def marginal(shift: float) -> float:
    return float(np.exp(log_prior(shift) + np.logaddexp.reduce(log_terms(shift).reshape(3, 4), 1).sum()))


def integral(function: Any) -> float:
    return float(integrate.quad(function, 0.0, 14.0, epsabs=0, epsrel=1e-11, limit=300)[0])


@pytest.fixture(scope="module")
def post() -> Any:
    return lvmppl.posterior(unknown_location, {"x": X})


def test_joint_mode_equals_the_best_of_all_labellings(post: Any) -> None:
    best = (-math.inf, 0.0, ())
    for labels in itertools.product(itertools.product(range(2), repeat=2), repeat=3):

        def negative(shift: float, labels: Any = labels) -> float:
            table = log_terms(shift)
            return -log_prior(shift) - sum(table[n, c, b] for n, (c, b) in enumerate(labels))

        found = optimize.minimize_scalar(
            negative, bounds=(1e-6, 8.0), method="bounded", options={"xatol": 1e-10}
        )
        best = max(best, (-found.fun, found.x, labels))
    mode = post.mode()
    assert mode.states["shift"].item() == pytest.approx(best[1], abs=1e-5)
    assert list(zip(mode.states["c"].tolist(), mode.states["b"].tolist(), strict=True)) == list(best[2])
    assert mode.log_prob.item() == pytest.approx(best[0] - math.log(integral(marginal)), abs=1e-6)
    torch.testing.assert_close(post.log_prob(mode.states), mode.log_prob, rtol=0, atol=1e-9)


def test_log_prob_of_samples_equals_that_by_hand(post: Any) -> None:
    draws = post.sample(6, seed=4)
    assert draws["c"].shape == (6, 3) and draws["shift"].shape == (6,)
    total = math.log(integral(marginal))
    found = post.log_prob(draws)
    for s in range(6):
        table = log_terms(draws["shift"][s].item())
        terms = sum(table[n, draws["c"][s, n], draws["b"][s, n]] for n in range(3))
        expected = log_prior(draws["shift"][s].item()) + terms - total
        assert found[s].item() == pytest.approx(expected, abs=1e-6)


def test_samples_have_the_joint_moments_of_scipy_quadrature(post: Any) -> None:
    """E[shift · 1(c_n = 1)], which neither marginal alone would give."""
    draws = post.sample(6000, seed=1)
    total = integral(marginal)
    for n in range(3):

        def joint(shift: float, n: int = n) -> float:
            table = np.exp(log_terms(shift))[n].sum(1)
            return float(shift * marginal(shift) * table[1] / table.sum())

        values = draws["shift"] * draws["c"][:, n]
        error = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean()) - integral(joint) / total) < 4.5 * error


def test_entropy_equals_scipy_quadrature(post: Any) -> None:
    total = integral(marginal)

    def density(shift: float) -> float:
        table = log_terms(shift).reshape(3, 4)
        given = table - np.logaddexp.reduce(table, 1)[:, None]
        own = marginal(shift) / total
        return float(own * (-np.log(own) - (np.exp(given) * given).sum())) if own > 0 else 0.0

    assert float(post.entropy()) == pytest.approx(integral(density), abs=2e-6)


def test_pair_marginals_equal_scipy_quadrature(post: Any) -> None:
    total = integral(marginal)
    pair, given = post.pair_marginal("c", "b"), post.pair_marginal("shift", "c")
    assert pair.shape == (3, 2, 2) and given.mean.shape == (3, 2, 1)
    for n, c in itertools.product(range(3), range(2)):

        def share(shift: float, b: int | None, power: int = 0, n: int = n, c: int = c) -> float:
            table = np.exp(log_terms(shift))[n]
            part = table[c].sum() if b is None else table[c, b]
            return float(shift**power * marginal(shift) * part / table.sum())

        for b in range(2):
            expected = integral(lambda s, b=b: share(s, b)) / total
            assert pair[n, c, b].item() == pytest.approx(expected, abs=1e-6)
        mean = integral(lambda s: share(s, None, 1)) / integral(lambda s: share(s, None))
        assert given.mean[n, c, 0].item() == pytest.approx(mean, abs=1e-5)


def test_chain_under_a_global_site_equals_the_sum_over_all_paths() -> None:
    stay = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    x = torch.tensor([-1.4, -0.9, 0.2, 1.1], dtype=torch.float64)

    def model(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", MarkovChain(x.new_tensor([0.5, 0.5]), stay, x.shape[1]), infer=ENUMERATE)
            loc = torch.tensor([-1.0, 1.0], dtype=x.dtype)[z]
            pyro.sample("x", dist.Normal(shift.unsqueeze(-1) + loc, x.new_full((4,), 0.6)).to_event(1), obs=x)

    post: Any = lvmppl.posterior(model, {"x": x.unsqueeze(0)})
    paths, logs, means = list(itertools.product(range(2), repeat=4)), [], []
    for z in paths:  # given the path all is Gaussian
        residual = x.numpy() - np.array([-1.0, 1.0])[list(z)]
        log = stats.multivariate_normal(np.zeros(4), 4.0 + 0.36 * np.eye(4)).logpdf(residual) + math.log(0.5)
        logs.append(log + sum(math.log(stay[i, j]) for i, j in itertools.pairwise(z)))
        means.append(residual.sum() / 0.36 / (0.25 + 4 / 0.36))
    sd = (0.25 + 4 / 0.36) ** -0.5
    weights = np.exp(np.array(logs) - np.logaddexp.reduce(logs))
    best = int(np.argmax(weights))  # the Gaussians of all paths are equally wide
    mode = post.mode()
    assert tuple(mode.states["z"][0].tolist()) == paths[best]
    assert mode.states["shift"].item() == pytest.approx(means[best], abs=1e-6)
    height = math.log(weights[best]) + stats.norm.logpdf(0.0, 0.0, sd)
    assert mode.log_prob.item() == pytest.approx(height, abs=1e-5)
    pair = np.zeros((3, 2, 2))
    for weight, z in zip(weights, paths, strict=True):
        for t, (i, j) in enumerate(itertools.pairwise(z)):
            pair[t, i, j] += weight
    np.testing.assert_allclose(post.pair_marginal("z")[0], pair, atol=1e-6)
    entropy = -(weights * np.log(weights)).sum() + 0.5 * math.log(2 * math.pi * math.e * sd**2)
    assert float(post.entropy()) == pytest.approx(entropy, abs=2e-6)
    draws = post.sample(5, seed=2)
    found = post.log_prob(draws)
    for s in range(5):
        which = paths.index(tuple(draws["z"][s, 0].tolist()))
        expected = math.log(weights[which]) + stats.norm.logpdf(draws["shift"][s].item(), means[which], sd)
        assert found[s].item() == pytest.approx(expected, abs=1e-5)
