"""Parameters under a prior, written as global latent sites: MAP by EM and by gradient beside conjugate closed forms."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor
from torch.distributions import constraints

import lvmppl

ENUMERATE = {"enumerate": "parallel"}


def real(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def conjugate(x: Tensor, count: Tensor, flag: Tensor, kind: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(real(1.0), 0.5))
    variance = pyro.sample("variance", dist.InverseGamma(real(3.0), 4.0))
    precision = pyro.sample("precision", dist.Gamma(real(2.5), 0.7))
    rate = pyro.sample("rate", dist.Gamma(real(2.0), 3.0))
    chance = pyro.sample("chance", dist.Beta(real(2.0), 5.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([3.0, 2.0, 4.0], dtype=torch.float64)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.3), obs=x)
        pyro.sample("y", dist.Normal(0.4, variance.sqrt()), obs=x)
        pyro.sample("w", dist.Normal(0.4, precision**-0.5), obs=x)
        pyro.sample("count", dist.Poisson(rate), obs=count)
        pyro.sample("flag", dist.Bernoulli(chance), obs=flag)
        pyro.sample("kind", dist.Categorical(shares), obs=kind)


def rows() -> dict[str, Tensor]:
    rng = np.random.default_rng(3)
    data = {
        "x": rng.normal(2, 1.5, 17),
        "count": rng.poisson(2.0, 17).astype(float),
        "flag": (rng.random(17) < 0.6).astype(float),
        "kind": rng.integers(0, 3, 17),
    }
    return {k: torch.as_tensor(v) for k, v in data.items()}


@pytest.mark.parametrize("algorithm", ["em", "enumeration"])
def test_map_of_conjugate_priors_equals_their_modes(algorithm: str) -> None:
    data = rows()
    x, count, flag, kind = (v.numpy() for v in data.values())
    fit = lvmppl.fit(conjugate, data, algorithm=algorithm, tolerance=1e-13)
    n, squares = len(x), ((x - 0.4) ** 2).sum()
    expected = {
        "mean": (x.sum() / 1.69 + 1.0 / 0.25) / (n / 1.69 + 1 / 0.25),
        "variance": (4.0 + squares / 2) / (3.0 + n / 2 + 1),
        "precision": (2.5 - 1 + n / 2) / (0.7 + squares / 2),
        "rate": (count.sum() + 1) / (n + 3),
        "chance": (flag.sum() + 1) / (n + 5),
        "shares": (np.bincount(kind, minlength=3) + np.array([2, 1, 3])) / (n + 6),
    }
    assert set(fit.parameters) == set(expected)
    tolerance = 1e-10 if algorithm == "em" else 1e-4
    for name, value in expected.items():
        np.testing.assert_allclose(fit.parameters[name], value, rtol=tolerance, err_msg=name)
    if algorithm == "em":
        assert {s.how for s in fit.m_step} == {"closed-form"}
        assert "with a prior (Gamma)" in {s.parameter: s.why for s in fit.m_step}["rate"]


def mixture(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 3.0], dtype=torch.float64)))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(real(0.0), 3.0))
    precision = pyro.sample("precision", dist.Gamma(real(2.0), 1.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)
        pyro.sample("y", dist.Normal(0.0, precision**-0.5), obs=x)


def line() -> Tensor:
    rng = np.random.default_rng(5)
    return torch.as_tensor(np.concatenate([rng.normal(-2, 1, 11), rng.normal(3, 1, 8)]))


def log_prior(p: dict[str, np.ndarray]) -> float:
    total = stats.dirichlet.logpdf(p["weights"], [2, 3]) + stats.norm.logpdf(p["loc"], 0, 3).sum()
    return float(total + stats.gamma.logpdf(p["precision"], 2.0, scale=1 / 1.5))


def log_joint(p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """log p(x, y, z) [K, N]."""
    parts = np.log(p["weights"])[:, None] + stats.norm.logpdf(x, p["loc"][:, None], 1.0)
    total: np.ndarray = parts + stats.norm.logpdf(x, 0.0, p["precision"] ** -0.5)
    return total


def by_entry(x: Tensor, kind: Tensor) -> None:
    """Priors with event axes of their own."""
    variance = pyro.sample(
        "variance", dist.InverseGamma(real(3.0), torch.tensor([4.0, 1.0]).double()).to_event(1)
    )
    shares = pyro.sample("shares", dist.Dirichlet(torch.full((2, 3), 2.0).double()).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.4, variance.sqrt()).to_event(1), obs=torch.stack([x, 2 * x], -1))
        pyro.sample("kind", dist.Categorical(shares).to_event(1), obs=torch.stack([kind, 2 - kind], -1))


def test_map_of_priors_with_event_axes_equals_their_modes() -> None:
    data = {k: v for k, v in rows().items() if k in ("x", "kind")}
    fit = lvmppl.fit(by_entry, data, algorithm="em", tolerance=1e-13)
    assert {s.how for s in fit.m_step} == {"closed-form"}
    x, kind = data["x"].numpy(), data["kind"].numpy()
    squares = ((np.stack([x, 2 * x], -1) - 0.4) ** 2).sum(0)
    counts = np.stack([np.bincount(kind, minlength=3), np.bincount(2 - kind, minlength=3)]) + 1
    np.testing.assert_allclose(
        fit.parameters["variance"], (np.array([4.0, 1.0]) + squares / 2) / (len(x) / 2 + 4)
    )
    np.testing.assert_allclose(fit.parameters["shares"], counts / counts.sum(1, keepdims=True), rtol=1e-12)


def test_em_step_under_priors_equals_pseudo_counts_by_hand() -> None:
    x = line().numpy()
    fit = lvmppl.fit(mixture, {"x": line()}, algorithm="em", max_steps=1, tolerance=0, seed=2)
    again = lvmppl.fit(mixture, {"x": line()}, algorithm="em", max_steps=2, tolerance=0, seed=2)
    assert {s.how for s in again.m_step} == {"closed-form"}
    p = {k: v.numpy() for k, v in fit.parameters.items()}
    joint = log_joint(p, x)
    q = np.exp(joint - np.logaddexp(*joint))
    expected = {
        "weights": (q.sum(1) + np.array([1, 2])) / (len(x) + 3),
        "loc": q @ x / (q.sum(1) + 1 / 9),
        "precision": (len(x) / 2 + 1) / ((x**2).sum() / 2 + 1.5),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(again.parameters[name], value, rtol=1e-9, err_msg=name)
    assert not np.allclose(p["loc"], expected["loc"], rtol=1e-4)


@pytest.mark.parametrize("algorithm", ["em", "enumeration"])
def test_objective_is_the_log_posterior_and_log_evidence_leaves_priors_out(algorithm: str) -> None:
    x = line()
    fit = lvmppl.fit(mixture, {"x": x}, algorithm=algorithm, tolerance=1e-12)
    p = {k: v.numpy() for k, v in fit.parameters.items()}
    evidence = float(np.logaddexp(*log_joint(p, x.numpy())).sum())
    assert fit.log_evidence == pytest.approx(evidence, rel=1e-10)
    assert set(fit.history["objective_kind"]) == {"log_posterior"}
    assert fit.history["objective"].max() == pytest.approx(evidence + log_prior(p), rel=1e-10)
    post = lvmppl.posterior(mixture, {"x": x}, parameters=fit.parameters)
    assert post.log_evidence == pytest.approx(evidence, rel=1e-10)
    step = 1e-5  # a maximum: no neighbour is higher
    for name in ("loc", "precision"):
        for sign in (-1, 1):
            moved = {**p, name: p[name] + sign * step * 50}
            near = float(np.logaddexp(*log_joint(moved, x.numpy())).sum()) + log_prior(moved)
            assert near < evidence + log_prior(p) + 1e-7


def test_prior_that_is_not_conjugate_is_climbed_by_gradient() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(real(2.0)))
        centre = pyro.sample("centre", dist.Normal(real(0.3), 0.5))
        loc = pyro.sample("loc", dist.Normal(centre, 1.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.5, scale), obs=x)
            pyro.sample("y", dist.Normal(loc, 1.0), obs=x)

    fit = lvmppl.fit(model, {"x": line()}, algorithm="em", tolerance=1e-13)
    reasons = {s.parameter: (s.how, s.why) for s in fit.m_step}
    assert reasons["scale"] == ("gradient", "its prior (HalfCauchy) is not conjugate")
    assert reasons["loc"] == ("gradient", "its prior is fitted too")
    assert reasons["centre"][0] == "gradient"
    x = line().numpy()
    precision = np.array([[1 / 0.25 + 1 / 2.25, -1 / 2.25], [-1 / 2.25, 1 / 2.25 + len(x)]])
    centre, loc = np.linalg.solve(precision, [0.3 / 0.25, x.sum()])
    assert float(fit.parameters["centre"]) == pytest.approx(centre, abs=1e-4)
    assert float(fit.parameters["loc"]) == pytest.approx(loc, abs=1e-4)
    grid = np.linspace(1.5, 4.5, 60001)
    density = stats.halfcauchy.logpdf(grid, scale=2.0)
    density += stats.norm.logpdf(x[:, None], 0.5, grid).sum(0)
    assert float(fit.parameters["scale"]) == pytest.approx(grid[density.argmax()], abs=1e-3)


def test_map_beside_continuous_latents_equals_the_gradient_of_the_same_model() -> None:
    """A prior on loadings and a latent Gaussian: both kinds of continuous site in one model."""

    def model(x: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(3).double(), 0.8).to_event(1))
        noise = pyro.param("noise", real(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(real(0.0), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * slope, 0.7).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(0.2, noise), obs=x[:, 0])

    rng = np.random.default_rng(8)
    x = torch.as_tensor(rng.normal(size=(23, 1)) * [1.0, -2.0, 0.5] + 0.5 * rng.normal(size=(23, 3)))
    em = lvmppl.fit(model, {"x": x}, algorithm="em", tolerance=1e-12, seed=1)
    climbed = lvmppl.fit(model, {"x": x}, algorithm="enumeration", tolerance=1e-12, seed=1)
    assert {s.parameter: s.how for s in em.m_step} == {"slope": "closed-form", "noise": "closed-form"}
    assert em.history["objective"].diff().min() >= -1e-9 * abs(em.log_evidence)
    slope = em.parameters["slope"].numpy()
    covariance = np.outer(slope, slope) + 0.49 * np.eye(3)
    expected = stats.multivariate_normal(np.zeros(3), covariance).logpdf(x.numpy()).sum()
    expected += stats.norm.logpdf(x[:, 0].numpy(), 0.2, float(em.parameters["noise"])).sum()
    assert em.log_evidence == pytest.approx(expected, rel=1e-9)
    assert em.history["objective"].iloc[-1] == pytest.approx(
        expected + stats.norm.logpdf(slope, 0, 0.8).sum(), rel=1e-9
    )
    assert em.history["objective"].max() == pytest.approx(climbed.history["objective"].max(), abs=1e-5)


def shrunk(x: Tensor) -> None:
    """Locations under a Normal prior whose scales are fitted too: neither maximum is had without the other."""
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(torch.tensor([1.0, -0.5], dtype=torch.float64), real(0.4)))
    scale = pyro.param(
        "scale", torch.tensor([1.0, 2.5], dtype=torch.float64), constraint=constraints.positive
    )
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6], dtype=torch.float64)), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def shrunk_log_joint(loc: np.ndarray, scale: np.ndarray, x: np.ndarray) -> np.ndarray:
    log_weights = np.log([0.4, 0.6])[:, None]
    joint: np.ndarray = log_weights + stats.norm.logpdf(x, loc[:, None], scale[:, None])
    return joint


def test_em_step_of_a_location_under_a_prior_and_its_scale_equals_their_joint_maximum_by_search() -> None:
    x = line().numpy()
    steps = [
        lvmppl.fit(shrunk, {"x": line()}, algorithm="em", max_steps=n, tolerance=0, seed=4) for n in (1, 2)
    ]
    how = {s.parameter: (s.how, s.why) for s in steps[0].m_step}
    assert how["loc"][0] == how["scale"][0] == "closed-form"
    assert "with a prior (Normal)" in how["loc"][1] and "conditional maximisation" in how["loc"][1]
    loc, scale = (steps[0].parameters[k].numpy() for k in ("loc", "scale"))
    joint = shrunk_log_joint(loc, scale, x)
    q = np.exp(joint - np.logaddexp(*joint))

    def negative_q(free: np.ndarray) -> float:
        prior = stats.norm.logpdf(free[:2], [1.0, -0.5], 0.4).sum()
        return -float((q * shrunk_log_joint(free[:2], np.exp(free[2:]), x)).sum() + prior)

    best = optimize.minimize(negative_q, np.concatenate([loc, np.log(scale)]), tol=1e-12).x
    np.testing.assert_allclose(steps[1].parameters["loc"], best[:2], rtol=1e-5)
    np.testing.assert_allclose(steps[1].parameters["scale"], np.exp(best[2:]), rtol=1e-5)
    alone = q @ x / q.sum(1)
    assert np.abs(best[:2] - alone).max() > 0.05  # the prior matters


def test_gradient_of_the_log_posterior_vanishes_where_locations_and_scales_in_turn_end() -> None:
    x = line()
    fit = lvmppl.fit(shrunk, {"x": x}, algorithm="em", max_steps=2000, tolerance=1e-15)
    assert fit.history["objective"].diff().min() >= -1e-9 * abs(fit.log_evidence)
    free = torch.cat([fit.parameters["loc"], fit.parameters["scale"].log()]).requires_grad_()
    density = dist.Normal(free[:2, None], free[2:, None].exp()).log_prob(x)
    log_evidence = torch.logsumexp(
        torch.tensor([0.4, 0.6], dtype=torch.float64).log()[:, None] + density, 0
    ).sum()
    prior = dist.Normal(torch.tensor([1.0, -0.5], dtype=torch.float64), 0.4).log_prob(free[:2]).sum()
    (gradient,) = torch.autograd.grad(log_evidence + prior, free)
    assert float(gradient.abs().max()) < 1e-5
    assert fit.history["objective"].iloc[-1] == pytest.approx((log_evidence + prior).item(), rel=1e-12)


def test_regression_under_a_prior_with_its_noise_fitted_equals_the_maximum_by_search() -> None:
    rng = np.random.default_rng(1)
    u = rng.normal(size=(23, 3))
    y = u @ np.array([0.5, -1.0, 2.0]) + 0.7 * rng.normal(size=23)

    def model(u: Tensor, y: Tensor) -> None:
        with pyro.plate("slopes", 3):
            slope = pyro.sample("slope", dist.Normal(real(0.0), 0.5))
        noise = pyro.param("noise", real(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(u @ slope, noise), obs=y)

    fit = lvmppl.fit(model, {"u": torch.as_tensor(u), "y": torch.as_tensor(y)}, algorithm="em")
    why = {s.parameter: s.why for s in fit.m_step}["slope"]
    assert "least squares" in why and "conditional maximisation" in why

    def negative(free: np.ndarray) -> float:
        prior = stats.norm.logpdf(free[:3], 0, 0.5).sum()
        return -float(stats.norm.logpdf(y, u @ free[:3], np.exp(free[3])).sum() + prior)

    best = optimize.minimize(negative, np.zeros(4), tol=1e-12).x
    np.testing.assert_allclose(fit.parameters["slope"], best[:3], rtol=1e-4)
    np.testing.assert_allclose(fit.parameters["noise"], np.exp(best[3]), rtol=1e-5)


def test_modes_under_uniform_priors_equal_the_maxima_within_their_bounds() -> None:
    """Bounds of their own for every entry; a Uniform has density 0 at its upper one, so the mode stands next to it."""
    low = torch.tensor([[-9.0, 0.0], [0.1, 0.1]], dtype=torch.float64)
    high = torch.tensor([[0.5, 9.0], [9.0, 0.7]], dtype=torch.float64)

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Uniform(low[0], high[0]).to_event(1))
        scale = pyro.sample("scale", dist.Uniform(low[1], high[1]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    x = np.random.default_rng(1).normal([2.0, 3.0], [1.5, 2.5], (17, 2))
    fit = lvmppl.fit(model, {"x": torch.as_tensor(x)}, algorithm="em", standard_errors=True)
    assert fit.status == "converged"
    assert {s.how for s in fit.m_step} == {"closed-form"}
    loc = np.array([0.5, x[:, 1].mean()])  # the mean of the first lies above its bound
    scale = np.array([((x[:, 0] - 0.5) ** 2).mean() ** 0.5, 0.7])
    np.testing.assert_allclose(fit.parameters["loc"], loc, rtol=1e-14)
    np.testing.assert_allclose(fit.parameters["scale"], scale, rtol=1e-14)
    expected = stats.norm(loc, scale).logpdf(x).sum()
    assert fit.log_evidence == pytest.approx(expected, rel=1e-12)
    prior = -float((high - low).log().sum())
    assert fit.history["objective"].iloc[-1] == pytest.approx(expected + prior, rel=1e-12)
    errors = fit.standard_errors
    assert errors is not None
    at_bound = [errors[n].isnan().tolist() for n in ("loc", "scale")]
    assert at_bound == [[True, False], [False, True]]
