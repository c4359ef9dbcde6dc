"""Effects a ~ p(a; τ) of groups outside of the data plate, whose own prior is fitted: integrated out, not maximised."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import statsmodels.api as sm
import torch
from scipy import optimize, stats
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.errors import IntractableError

GROUPS, BLOCKS, ROWS = 6, 4, 50
GENERATOR = np.random.default_rng(3)
G = torch.tensor(GENERATOR.integers(0, GROUPS, ROWS))
H = torch.tensor(GENERATOR.integers(0, BLOCKS, ROWS))
X = torch.tensor(GENERATOR.normal(size=ROWS))
EFFECTS = torch.tensor(GENERATOR.normal(size=GROUPS)), torch.tensor(GENERATOR.normal(size=BLOCKS))
Y = EFFECTS[0][G] + 0.7 * EFFECTS[1][H] + 0.5 * X + 0.3 * torch.tensor(GENERATOR.normal(size=ROWS))


def start(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def positive(name: str, value: float) -> Tensor:
    return pyro.param(name, start(value), constraint=constraints.positive)


def intercepts(g: Tensor, x: Tensor, y: Tensor) -> None:
    """One point at a time: `a[g]` reads the first axis."""
    mu, tau = pyro.param("mu", start(0.2)), positive("tau", 1.0)
    slope, sigma = pyro.param("slope", start(0.0)), positive("sigma", 0.5)
    with pyro.plate("groups", GROUPS):
        a = pyro.sample("a", dist.Normal(mu, tau))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[g] + slope * x, sigma), obs=y)


def leading(g: Tensor, x: Tensor, y: Tensor) -> None:
    """The same at many points at once."""
    mu, tau = pyro.param("mu", start(0.2)), positive("tau", 1.0)
    slope, sigma = pyro.param("slope", start(0.0)), positive("sigma", 0.5)
    with pyro.plate("groups", GROUPS):
        a = pyro.sample("a", dist.Normal(mu, tau))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[..., g] + slope * x, sigma), obs=y)


def slopes(g: Tensor, x: Tensor, y: Tensor) -> None:
    covariance = pyro.param(
        "covariance", torch.eye(2, dtype=torch.float64), constraint=constraints.positive_definite
    )
    loc, sigma = pyro.param("loc", start([0.2, 0.0])), positive("sigma", 0.5)
    with pyro.plate("groups", GROUPS):
        a = pyro.sample("a", dist.MultivariateNormal(loc, covariance))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[g, 0] + a[g, 1] * x, sigma), obs=y)


@pytest.mark.parametrize("algorithm", ["em", "enumeration"])
@pytest.mark.parametrize("model", [intercepts, leading])
def test_log_evidence_of_random_intercepts_equals_statsmodels(
    model: Callable[..., None], algorithm: str
) -> None:
    fit = lvmppl.fit(model, {"g": G, "x": X, "y": Y}, algorithm=algorithm, tolerance=1e-12)
    mixed = sm.MixedLM(Y.numpy(), sm.add_constant(X.numpy()), G.numpy()).fit(reml=False)
    assert set(fit.history["objective_kind"]) == {"log_evidence"}
    assert "a" not in fit.parameters
    assert fit.log_evidence == pytest.approx(mixed.llf, abs=1e-7)
    assert float(fit.parameters["slope"]) == pytest.approx(mixed.params[1], abs=1e-4)
    assert float(fit.parameters["sigma"]) == pytest.approx(np.sqrt(mixed.scale), abs=1e-4)
    if algorithm == "em":
        assert {s.how for s in fit.m_step} == {"closed-form"}
    effects = lvmppl.posterior(model, {"g": G, "x": X, "y": Y}, parameters=fit.parameters).marginal("a").mean
    expected = [mixed.random_effects[i].iloc[0] + mixed.params[0] for i in range(GROUPS)]
    assert effects.flatten().numpy() == pytest.approx(np.array(expected), abs=1e-3)


def test_em_step_of_random_intercepts_equals_textbook_update() -> None:
    fit = lvmppl.fit(intercepts, {"g": G, "x": X, "y": Y}, algorithm="em", max_steps=1, init="params")
    z = np.eye(GROUPS)[G.numpy()]
    precision = np.eye(GROUPS) + z.T @ z / 0.25
    covariance = np.linalg.inv(precision)
    mean = covariance @ (np.full(GROUPS, 0.2) + z.T @ Y.numpy() / 0.25)
    variance = np.diag(covariance)
    assert float(fit.parameters["mu"]) == pytest.approx(mean.mean(), rel=1e-9)
    tau = np.sqrt((variance + (mean - mean.mean()) ** 2).mean())
    assert float(fit.parameters["tau"]) == pytest.approx(tau, rel=1e-9)
    x, left = X.numpy(), Y.numpy() - z @ mean
    slope = (x * left).sum() / (x * x).sum()
    assert float(fit.parameters["slope"]) == pytest.approx(slope, rel=1e-9)
    residual = (left - slope * x) ** 2 + z @ variance
    assert float(fit.parameters["sigma"]) == pytest.approx(np.sqrt(residual.mean()), rel=1e-9)


def test_fixed_point_of_random_slopes_has_no_gradient_of_the_multivariate_normal() -> None:
    fit = lvmppl.fit(slopes, {"g": G, "x": X, "y": Y}, algorithm="em", tolerance=1e-13, max_steps=2000)
    found = {n: v.clone().requires_grad_() for n, v in fit.parameters.items()}
    z = torch.nn.functional.one_hot(G, GROUPS).double()
    design = torch.stack([z, z * X.unsqueeze(-1)], -1)  # [N, J, 2]
    covariance = torch.einsum("njk,kl,mjl->nm", design, found["covariance"], design)
    covariance = covariance + found["sigma"] ** 2 * torch.eye(ROWS, dtype=torch.float64)
    loc = found["loc"][0] + found["loc"][1] * X
    total = torch.distributions.MultivariateNormal(loc, covariance).log_prob(Y)
    assert fit.log_evidence == pytest.approx(float(total.detach()), abs=1e-8)
    for gradient in torch.autograd.grad(total, list(found.values())):
        assert float(gradient.abs().max()) < 1e-2


def crossed(g: Tensor, h: Tensor, x: Tensor, y: Tensor) -> None:
    tau, upsilon = positive("tau", 1.0), positive("upsilon", 1.0)
    coefficients, sigma = pyro.param("coefficients", start([0.0, 0.0])), positive("sigma", 0.5)
    with pyro.plate("groups", GROUPS):
        a = pyro.sample("a", dist.Normal(start(0.0), tau))
    with pyro.plate("blocks", BLOCKS):
        b = pyro.sample("b", dist.Normal(start(0.0), upsilon))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[g] + b[h] + coefficients[0] + coefficients[1] * x, sigma), obs=y)


@pytest.mark.parametrize("init", ["params", "random"])
def test_log_evidence_of_crossed_effects_equals_multivariate_normal(init: str) -> None:
    data = {"g": G, "h": H, "x": X, "y": Y}
    fit = lvmppl.fit(crossed, data, algorithm="em", max_steps=15, init=init)
    p = {n: v.numpy() for n, v in fit.parameters.items()}
    z, w = np.eye(GROUPS)[G.numpy()], np.eye(BLOCKS)[H.numpy()]
    covariance = p["tau"] ** 2 * z @ z.T + p["upsilon"] ** 2 * w @ w.T + p["sigma"] ** 2 * np.eye(ROWS)
    loc = p["coefficients"][0] + p["coefficients"][1] * X.numpy()
    expected = stats.multivariate_normal(loc, covariance).logpdf(Y.numpy())
    assert fit.log_evidence == pytest.approx(expected, abs=1e-8)
    steps = fit.history["objective"].to_numpy()
    assert (np.diff(steps) >= -1e-9 * np.abs(steps[1:])).all()


def test_effects_under_a_prior_that_is_held_are_maximised() -> None:
    data = {"g": G, "x": X, "y": Y}
    fit = lvmppl.fit(intercepts, data, algorithm="em", freeze=["mu", "tau"], tolerance=1e-13)
    assert set(fit.history["objective_kind"]) == {"log_posterior"}
    assert {s.parameter: s.how for s in fit.m_step}["a"] == "closed-form"
    a, sigma = fit.parameters["a"].numpy(), float(fit.parameters["sigma"])
    z = np.eye(GROUPS)[G.numpy()]
    left = Y.numpy() - float(fit.parameters["slope"]) * X.numpy()
    expected = np.linalg.solve(np.eye(GROUPS) + z.T @ z / sigma**2, 0.2 + z.T @ left / sigma**2)
    assert a == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("many", [True, False])
def test_em_step_of_a_shift_under_labels_equals_quadrature(many: bool) -> None:
    """Enumerated sites are summed out at every point of a shift that all rows share."""
    x = torch.tensor(np.concatenate([GENERATOR.normal(-2.0, 1.0, 4), GENERATOR.normal(2.5, 1.0, 5)]))

    def model(x: Tensor) -> None:
        loc, tau = pyro.param("loc", start(0.5)), positive("tau", 1.5)
        weights = pyro.param("weights", start([0.4, 0.6]), constraint=constraints.simplex)
        shift = pyro.sample("shift", dist.Normal(loc, tau))
        assert many or shift.dim() == 0
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(shift + 3.0 * z - 1.5, 1.0), obs=x)

    fit = lvmppl.fit(model, {"x": x}, algorithm="em", max_steps=1)
    grid = np.linspace(-12.0, 12.0, 40001)
    each = stats.norm.pdf(x.numpy()[:, None], grid + np.array([-1.5, 1.5])[:, None, None]) * np.array(
        [0.4, 0.6]
    ).reshape(2, 1, 1)
    joint = stats.norm.logpdf(grid, 0.5, 1.5) + np.log(each.sum(0)).sum(0)
    density = np.exp(joint - joint.max())
    density /= density.sum()
    assert fit.history["objective"].iloc[0] == pytest.approx(
        np.log(np.exp(joint).sum() * (grid[1] - grid[0])), abs=1e-7
    )
    mean = (density * grid).sum()
    assert float(fit.parameters["loc"]) == pytest.approx(mean, abs=1e-6)
    assert float(fit.parameters["tau"]) == pytest.approx(
        np.sqrt((density * (grid - mean) ** 2).sum()), abs=1e-6
    )
    labels = (each / each.sum(0) * density).sum(-1).mean(1)
    assert fit.parameters["weights"].numpy() == pytest.approx(labels, abs=1e-6)


def fitted_spread() -> Tensor:
    return positive("tau", 1.0)


def spread_under_a_prior() -> Tensor:
    tau: Tensor = pyro.sample("tau", dist.Gamma(start(2.0), 2.0))
    return tau


@pytest.mark.parametrize("spread", [fitted_spread, spread_under_a_prior])
def test_effects_that_no_engine_integrates_are_refused_and_maximised_if_their_spread_is_held(
    spread: Callable[[], Tensor],
) -> None:
    def model(g: Tensor, y: Tensor) -> None:
        tau = spread()
        with pyro.plate("groups", GROUPS):
            a = pyro.sample("a", dist.Normal(start(0.0), tau))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=a[g]), obs=y)

    data = {"g": G, "y": (Y > 0).double()}
    with pytest.raises(IntractableError, match=r"a \(6\).*freeze"):
        lvmppl.fit(model, data, algorithm="em")
    assert "a" in lvmppl.fit(model, data, algorithm="em", freeze=["tau"]).parameters


def test_model_that_reads_a_value_is_run_point_by_point() -> None:
    """torch.vmap does not take `float(a[0])`; a run at every point does, and agrees."""

    def model(g: Tensor, x: Tensor, y: Tensor) -> None:
        tau = positive("tau", 1.0)
        with pyro.plate("groups", GROUPS):
            a = pyro.sample("a", dist.Normal(start(0.0), tau))
        assert np.isfinite(float(a.detach().reshape(-1)[0]))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a[g], 0.5), obs=y)

    z = np.eye(GROUPS)[G.numpy()]
    expected = stats.multivariate_normal(np.zeros(ROWS), z @ z.T + 0.25 * np.eye(ROWS)).logpdf(Y.numpy())
    post = lvmppl.posterior(model, {"g": G, "x": X, "y": Y})
    assert post.log_evidence == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("algorithm", ["em", "enumeration"])
def test_mode_of_a_spread_under_a_fixed_prior_equals_search_with_effects_integrated_out(
    algorithm: str,
) -> None:
    """The joint density of the effects and a spread that has a prior itself has no bound as the spread goes to 0."""

    def model(g: Tensor, x: Tensor, y: Tensor) -> None:
        sigma, tau = positive("sigma", 0.5), pyro.sample("tau", dist.HalfCauchy(start(2.0)))
        mu = pyro.sample("mu", dist.Normal(start(0.0), 3.0))
        with pyro.plate("groups", GROUPS):
            a = pyro.sample("a", dist.Normal(mu, tau))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a[g], sigma), obs=y)

    fit = lvmppl.fit(model, {"g": G, "x": X, "y": Y}, algorithm=algorithm, tolerance=1e-12)
    assert set(fit.parameters) == {"sigma", "tau", "mu"}
    z = np.eye(GROUPS)[G.numpy()]

    def log_posterior(free: np.ndarray) -> float:
        mu, tau, sigma = free[0], np.exp(free[1]), np.exp(free[2])
        covariance = tau**2 * z @ z.T + sigma**2 * np.eye(ROWS)
        prior = stats.norm.logpdf(mu, 0.0, 3.0) + stats.halfcauchy.logpdf(tau, scale=2.0)
        return float(prior + stats.multivariate_normal(np.full(ROWS, mu), covariance).logpdf(Y.numpy()))

    best = optimize.minimize(lambda free: -log_posterior(free), np.zeros(3), options={"gtol": 1e-7})
    assert fit.history["objective"].iloc[-1] == pytest.approx(-best.fun, abs=1e-7)
    assert float(fit.parameters["tau"]) == pytest.approx(np.exp(best.x[1]), abs=1e-3)
