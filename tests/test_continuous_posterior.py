"""Models with continuous latent sites against closed forms, quadrature, and independent libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, special, stats
from sklearn.decomposition import FactorAnalysis
from torch import Tensor

import lvmppl
from lvmppl.continuous_posteriors import ContinuousPosterior, Path
from lvmppl.errors import IntractableError

N, D, Z = 7, 3, 2


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(N, D, generator=generator, dtype=torch.float64) * 2 + 1


LOADINGS = torch.tensor(
    [[[1.0, 0.5, -0.3], [0.2, -1.0, 0.7]], [[-0.4, 0.9, 1.1], [1.5, 0.1, 0.2]]], dtype=torch.float64
)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)


def mixture_of_factor_analysers(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(torch.zeros(Z).to(x), 1.0).to_event(1))
        loc = (z.unsqueeze(-2) @ LOADINGS[c]).squeeze(-2)
        pyro.sample("x", dist.Normal(loc, 0.6).to_event(1), obs=x)


def _component(x: Tensor, k: int) -> np.ndarray:
    covariance = (LOADINGS[k].T @ LOADINGS[k]).numpy() + 0.36 * np.eye(D)
    result: np.ndarray = stats.multivariate_normal(np.zeros(D), covariance).logpdf(x.numpy())
    return result


def test_mixture_of_factor_analysers_equals_closed_form(x: Tensor) -> None:
    post = lvmppl.posterior(mixture_of_factor_analysers, {"x": x})
    assert isinstance(post, ContinuousPosterior) and post.kind == "exact"
    parts = np.stack([math.log(WEIGHTS[k]) + _component(x, k) for k in range(2)])
    evidence = np.logaddexp(*parts)
    np.testing.assert_allclose(post.log_evidence_per_datum, evidence, rtol=1e-10)
    responsibilities = np.exp(parts - evidence).T
    np.testing.assert_allclose(post.marginal("c").probs, responsibilities, rtol=1e-8, atol=1e-12)
    means, seconds = [], []
    for k in range(2):
        w = LOADINGS[k].numpy()
        covariance = np.linalg.inv(np.eye(Z) + w @ w.T / 0.36)
        mean = x.numpy() @ w.T @ covariance / 0.36
        means.append(mean)
        seconds.append(np.diag(covariance) + mean**2)
    mean = (responsibilities.T[..., None] * np.stack(means)).sum(0)
    second = (responsibilities.T[..., None] * np.stack(seconds)).sum(0)
    found, sd = post.moments("z")
    np.testing.assert_allclose(found, mean, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(sd, np.sqrt(second - mean**2), rtol=1e-8)


def test_gaussian_posterior_samples_mode_and_entropy_agree_with_its_log_prob(x: Tensor) -> None:
    post = lvmppl.posterior(mixture_of_factor_analysers, {"x": x})
    mode = post.mode()
    assert mode.states["z"].shape == (N, Z) and mode.states["c"].shape == (N,)
    torch.testing.assert_close(post.log_prob(mode.states), mode.log_prob, rtol=1e-10, atol=1e-10)
    draws = post.sample(4000, seed=1)
    scores = torch.stack([post.log_prob({k: v[i] for k, v in draws.items()}) for i in range(4000)])
    assert bool((scores.amax(0) <= mode.log_prob + 1e-9).all())
    error = scores.std(0) / math.sqrt(4000)
    assert bool(((-scores.mean(0) - post.entropy()).abs() < 4.5 * error).all())


def test_factor_analysis_log_evidence_equals_sklearn(x: Tensor) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(40, 5, generator=generator, dtype=torch.float64) @ torch.randn(
        5, 5, generator=generator, dtype=torch.float64
    )
    found = FactorAnalysis(2, random_state=0).fit(rows.numpy())
    loadings, noise, centre = (
        torch.tensor(a) for a in (found.components_, found.noise_variance_, found.mean_)
    )

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(centre + z @ loadings, noise.sqrt()).to_event(1), obs=x)

    post = lvmppl.posterior(model, {"x": rows})
    np.testing.assert_allclose(post.log_evidence_per_datum, found.score_samples(rows.numpy()), rtol=1e-9)
    np.testing.assert_allclose(post.moments("z")[0], found.transform(rows.numpy()), rtol=1e-8, atol=1e-9)


def test_local_level_equals_statsmodels_smoother_on_nile() -> None:
    from statsmodels.datasets import nile
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    y = nile.load_pandas().data["volume"].to_numpy()
    noise, level = 15099.0, 1469.0

    def model(x: Tensor) -> None:
        z = pyro.sample("z_0", dist.Normal(1000.0, 400.0))
        for t in range(len(x)):
            if t:
                z = pyro.sample(f"z_{t}", dist.Normal(z, math.sqrt(level)))
            pyro.sample(f"x_{t}", dist.Normal(z, math.sqrt(noise)), obs=x[t])

    post = lvmppl.posterior(model, {"x": torch.tensor(y)})
    assert isinstance(post, ContinuousPosterior) and isinstance(post.kernel, Path)
    reference = UnobservedComponents(y, "llevel")
    reference.ssm.initialize_known(np.array([1000.0]), np.array([[400.0**2]]))
    reference.loglikelihood_burn = 0
    smoothed = reference.smooth([noise, level])
    assert post.log_evidence == pytest.approx(smoothed.llf, rel=1e-10)
    means = [float(post.moments(f"z_{t}")[0]) for t in range(len(y))]
    np.testing.assert_allclose(means, smoothed.smoothed_state[0], rtol=1e-8)
    sds = [float(post.moments(f"z_{t}")[1]) for t in range(len(y))]
    np.testing.assert_allclose(sds, np.sqrt(smoothed.smoothed_state_cov[0, 0]), rtol=1e-7)


def test_gamma_poisson_quadrature_equals_conjugate_posterior() -> None:
    counts = torch.tensor([0.0, 3.0, 7.0, 1.0], dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0).to(x), 1.5))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    post = lvmppl.posterior(model, {"x": counts})
    evidence = stats.nbinom(2.0, 1.5 / 2.5).logpmf(counts.numpy())
    error = np.abs(post.log_evidence_per_datum.numpy() - evidence)
    assert error.max() < 1e-6
    assert bool((torch.tensor(error) <= post.log_evidence_error_per_datum).all())
    assert post.kind == "quadrature" and 0 < post.log_evidence_error < 1e-5
    exact = stats.gamma(2.0 + counts.numpy(), scale=1 / 2.5)
    mean, sd = post.moments("rate")
    np.testing.assert_allclose(mean, exact.mean(), rtol=1e-6)
    np.testing.assert_allclose(sd, exact.std(), rtol=1e-6)
    np.testing.assert_allclose(post.entropy(), exact.entropy(), rtol=1e-5)


def test_direction_under_a_von_mises_prior_is_integrated_over_one_turn() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.VonMises(0.5, 2.0))
            pyro.sample("x", dist.VonMises(z, 3.0), obs=x)

    x = torch.tensor([3.1, -2.0, 0.4], dtype=torch.float64)
    post = lvmppl.posterior(model, {"x": x})
    length = np.abs(2.0 * np.exp(0.5j) + 3.0 * np.exp(1j * x.numpy()))
    expected = np.log(special.i0(length) / (2 * np.pi * special.i0(2.0) * special.i0(3.0)))
    # torch's Bessel function is a polynomial good to 1e-7
    np.testing.assert_allclose(post.log_evidence_per_datum, expected, rtol=1e-7)
    assert bool((post.sample(200)["z"].abs() <= math.pi).all())


def test_direction_under_a_mixture_of_von_mises_equals_scipy() -> None:
    weights, loc, concentration = np.array([0.3, 0.7]), np.array([-2.0, 1.0]), np.array([3.0, 0.7])

    def model(x: Tensor) -> None:
        parts = dist.VonMises(torch.tensor(loc), torch.tensor(concentration))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.tensor(weights)), parts))
            pyro.sample("x", dist.Normal(2.0 * z.sin() + z.cos(), 0.8), obs=x)

    def density(z: float, x: float) -> float:
        prior = weights @ stats.vonmises(concentration, loc=loc).pdf(z)
        return float(prior * stats.norm(2.0 * np.sin(z) + np.cos(z), 0.8).pdf(x))

    x = torch.tensor([0.3, -1.2, 2.5], dtype=torch.float64)
    expected = [np.log(integrate.quad(density, -np.pi, np.pi, args=(v,), epsabs=1e-12)[0]) for v in x.numpy()]
    found = lvmppl.posterior(model, {"x": x}).log_evidence_per_datum
    np.testing.assert_allclose(found, expected, rtol=1e-7)  # as torch's Bessel function


def test_quadrature_with_an_enumerated_site_equals_scipy(x: Tensor) -> None:
    y = x[:3, 0].abs().round()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.25).to(x)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(2.0 * c - 1.0, 0.5))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    post = lvmppl.posterior(model, {"x": y})
    expected = []
    for value in y.tolist():
        parts = [
            weight
            * integrate.quad(
                lambda z, m=m, v=value: stats.norm(m, 0.5).pdf(z) * stats.poisson(math.exp(z)).pmf(v),
                -8,
                8,
                epsabs=1e-13,
            )[0]
            for weight, m in ((0.75, -1.0), (0.25, 1.0))
        ]
        expected.append((math.log(sum(parts)), parts[1] / sum(parts)))
    np.testing.assert_allclose(post.log_evidence_per_datum, [e for e, _ in expected], atol=1e-6)
    np.testing.assert_allclose(post.probabilities("c")[:, 1], [p for _, p in expected], atol=1e-6)


def test_global_latent_couples_the_data(x: Tensor) -> None:
    y = x[:, 0]

    def model(x: Tensor) -> None:
        centre = pyro.sample("centre", dist.Normal(torch.tensor(0.5).to(x), 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    post = lvmppl.posterior(model, {"x": y})
    covariance = (1 + 0.49) * np.eye(N) + 4.0
    expected = stats.multivariate_normal(np.full(N, 0.5), covariance).logpdf(y.numpy())
    assert post.log_evidence == pytest.approx(expected, rel=1e-10)
    assert post.log_evidence_per_datum is None
    assert post.moments("centre")[0].shape == () and post.moments("z")[0].shape == (N,)
    frame = post.to_frame()
    assert len(frame) == 1 + N


def high_dimensional(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(5).to(x), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson(z.sum(-1).exp()), obs=x)


def poisson_latent(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("count", dist.Poisson(torch.tensor(3.0).to(x)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def simplex_latent(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3).to(x)))
        pyro.sample("x", dist.Categorical(p), obs=x.abs().round().clamp_max(2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (high_dimensional, r"z \(5\): 5 dimensions, and log p\(x, z\) is not quadratic.*use vem or svi"),
        (poisson_latent, r"count \(Poisson\): discrete sites whose states cannot be listed; truncate"),
        (simplex_latent, r"p \(Dirichlet\): a support .* whose coordinates are tied"),
    ],
)
def test_intractable_model_names_the_sites_and_the_way_out(x: Tensor, model: Any, message: str) -> None:
    with pytest.raises(IntractableError, match=message):
        lvmppl.posterior(model, {"x": x[:, 0].abs().round()})


@pytest.mark.parametrize(
    ("likelihood", "row", "reason"),
    [
        (lambda z: dist.Laplace(z, 1.0), 0, "its curvature changes from place to place"),
        (lambda z: dist.Laplace(z - 60.0, 1.0), 1, "it departs from its quadratic further away"),
    ],
)
def test_engine_says_what_is_not_quadratic_and_where(
    likelihood: Callable[[Tensor], Any], row: int, reason: str
) -> None:
    """Row `row` is the one whose log p(x, z) has a kink at a place where it is looked at."""

    def model(x: Tensor, quadratic: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0).to(x), 1.0))
            with pyro.poutine.mask(mask=~quadratic):
                pyro.sample("x", likelihood(z), obs=x)

    plain = torch.arange(2) != row
    post = lvmppl.posterior(model, {"x": torch.tensor([0.5, 0.25]).double(), "quadratic": plain})
    assert post.engine == (
        f"quadrature over z (1 dimension a row): log p(x, z) is not quadratic in z ({reason}, as at row {row})"
    )


def test_long_path_that_is_not_quadratic_says_why_it_is_no_path() -> None:
    def model(x: Tensor) -> None:
        steps = x.shape[1]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(steps).to(x), 1.0).to_event(1))
            pyro.sample("x", dist.Laplace(z, 1.0).to_event(1), obs=x)

    said = r"401 dimensions a row are more .* takes \(400\), and log p\(x, z\) is no path \(it is no quadratic whose steps"
    with pytest.raises(IntractableError, match=said):
        lvmppl.posterior(
            model, {"x": torch.randn(2, 401, generator=torch.Generator().manual_seed(0)).double()}
        )


def test_summary_of_a_fit_with_continuous_sites_is_exact_where_it_can_be(x: Tensor) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0).to(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    from pyro.infer.autoguide import AutoNormal

    fit = lvmppl.fit(
        model, {"x": x[:, 0]}, algorithm="svi", guide=AutoNormal, max_steps=400, learning_rate=0.05
    )
    expected = stats.norm(0, math.sqrt(2)).logpdf(x[:, 0].numpy())
    assert fit.log_evidence == pytest.approx(expected.sum(), rel=1e-10)
    assert fit.elbo < fit.log_evidence + 4 * fit.elbo_error
    np.testing.assert_allclose(fit.moments["z"][0], x[:, 0] / 2, atol=0.25)
