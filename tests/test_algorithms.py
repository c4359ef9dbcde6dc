"""Algorithms against independent answers: scikit-learn's optimum, the identity log p = ELBO + KL, exact gradients."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.datasets import load_iris
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.compare import kl_per_datum
from lvmppl.errors import InputError, IntractableError
from lvmppl.guides.categorical import categorical, categorical_encoder
from lvmppl.models.mixture import gaussian_mixture


@pytest.fixture(scope="module")
def iris() -> Tensor:
    return torch.tensor(load_iris().data)


@pytest.fixture(scope="module")
def sklearn_optimum() -> float:
    mixture = GaussianMixture(3, reg_covar=0, n_init=10, tol=1e-9, max_iter=1000, random_state=0)
    rows = load_iris().data
    return float(mixture.fit(rows).score(rows) * len(rows))


model = functools.partial(gaussian_mixture, num_components=3)


@pytest.mark.parametrize("algorithm", ["em", "enumeration"])
def test_iris_log_evidence_equals_sklearn_optimum(
    iris: Tensor, sklearn_optimum: float, algorithm: str
) -> None:
    fit = lvmppl.fit(model, {"x": iris}, algorithm=algorithm)
    assert fit.status == "converged"
    assert fit.log_evidence == pytest.approx(sklearn_optimum, abs=1e-3)
    assert fit.log_evidence == pytest.approx(-180.1855, abs=1e-3)


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
def test_mixture_log_evidence_and_responsibilities_equal_sklearn(iris: Tensor, covariance: Any) -> None:
    mixture = GaussianMixture(4, covariance_type=covariance, random_state=1, max_iter=3, tol=1e-1).fit(
        iris.numpy()
    )
    spread = torch.tensor(mixture.covariances_)
    name = "covariance" if covariance in ("full", "tied") else "variance"
    theta = {"weights": torch.tensor(mixture.weights_), "loc": torch.tensor(mixture.means_), name: spread}
    four = functools.partial(gaussian_mixture, num_components=4, covariance=covariance)
    found = lvmppl.posterior(four, {"x": iris}, parameters=theta)
    np.testing.assert_allclose(found.log_evidence_per_datum, mixture.score_samples(iris.numpy()), rtol=1e-9)
    expected = mixture.predict_proba(iris.numpy())
    np.testing.assert_allclose(found.marginal("z").probs, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("init", ["params", "kmeans", "random"])
def test_em_never_decreases_log_evidence(iris: Tensor, init: str) -> None:
    fit = lvmppl.fit(model, {"x": iris}, algorithm="em", init=init, restarts=2, max_steps=15, tolerance=0)
    for _, rows in fit.all_history.groupby("restart"):
        steps = np.diff(rows["objective"])
        assert steps.min() >= -1e-9 * abs(fit.log_evidence)
        assert steps.max() > 0.1
    assert fit.status == "max_steps"
    assert fit.history["step"].tolist() == list(range(16))


def test_best_restart_is_kept(iris: Tensor) -> None:
    fit = lvmppl.fit(model, {"x": iris}, algorithm="em", init="random", restarts=3, max_steps=8)
    best = fit.all_history.groupby("restart")["objective"].max()
    assert best.nunique() == 3
    assert fit.restart == best.idxmax()
    assert fit.log_evidence == pytest.approx(best.max(), rel=1e-12)


@pytest.mark.parametrize("algorithm", ["em", "enumeration"])
def test_seconds_of_a_fit_are_within_the_time_it_took(iris: Tensor, algorithm: str) -> None:
    """Restarts of EM step together here, those of the gradient one after the other."""
    model = functools.partial(gaussian_mixture, num_components=3, covariance="diag")
    options: dict[str, Any] = {"algorithm": algorithm, "init": "random", "max_steps": 30, "tolerance": 0}
    started = time.perf_counter()
    fit = lvmppl.fit(model, {"x": iris}, restarts=8, **options)
    took = time.perf_counter() - started
    ends = fit.all_history.groupby("restart")["seconds"].max()
    assert len(ends) == 8
    assert ends.max() <= fit.seconds <= took
    if algorithm == "enumeration":
        assert fit.seconds >= ends.sum()


GUIDED = [
    ("vem", categorical, {"max_steps": 6, "e_step": "gradient", "m_step": "gradient"}),
    ("svi", categorical, {"max_steps": 40}),
    ("svi", categorical, {"max_steps": 40, "batch_size": 32}),
    ("svi", categorical_encoder, {"max_steps": 40, "batch_size": 50}),
]


@pytest.mark.parametrize(("algorithm", "guide", "options"), GUIDED)
def test_elbo_plus_kl_equals_log_evidence_per_datum(
    iris: Tensor, algorithm: str, guide: Any, options: Any
) -> None:
    fit = lvmppl.fit(model, {"x": iris}, algorithm=algorithm, guide=guide, **options)
    assert fit.variational is not None and fit.posterior is not None and fit.elbo_per_datum is not None
    q, p = fit.variational.probabilities("z"), fit.posterior.probabilities("z")
    kl = torch.where(q > 0, q * (q.log() - p.log()), 0.0).sum(-1)  # from the two tables alone
    mixture = _numpy_log_evidence(iris, fit.parameters)
    torch.testing.assert_close(fit.elbo_per_datum + kl, mixture, rtol=0, atol=1e-6)
    torch.testing.assert_close(kl_per_datum(fit.variational, fit.posterior), kl, rtol=1e-9, atol=1e-10)
    assert float(kl.max()) > 1e-3
    assert fit.elbo == pytest.approx(float(fit.elbo_per_datum.sum()), rel=1e-12)
    assert math.isfinite(fit.log_evidence) and fit.log_evidence_kind == "exact"


def _numpy_log_evidence(x: Tensor, theta: Any) -> Tensor:
    parts = [
        math.log(w) + multivariate_normal(m, c).logpdf(x.numpy())
        for w, m, c in zip(theta["weights"], theta["loc"].numpy(), theta["covariance"].numpy(), strict=True)
    ]
    return torch.tensor(logsumexp(np.stack(parts), axis=0))


def test_kl_equals_brute_force_when_guide_leaves_a_site_out(iris: Tensor) -> None:
    x = iris[:20, 0]

    def two_causes(x: Tensor) -> None:
        table = pyro.param(
            "table", torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]), constraint=constraints.simplex
        )
        loc = pyro.param("loc", torch.tensor([[4.0, 5.0], [5.5, 4.5], [6.0, 5.2]]))
        with pyro.plate("data", len(x)):
            a = pyro.sample(
                "a", dist.Categorical(torch.tensor([0.3, 0.3, 0.4])), infer={"enumerate": "parallel"}
            )
            b = pyro.sample("b", dist.Categorical(table[a]), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[a, b], 0.7), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            start = torch.linspace(0.1, 1.0, len(x) * 3).reshape(len(x), 3)
            q = pyro.param(
                "q", start / start.sum(-1, keepdim=True), constraint=constraints.simplex, event_dim=1
            )
            pyro.sample("a", dist.Categorical(q))

    fit = lvmppl.fit(two_causes, {"x": x}, algorithm="svi", guide=guide, max_steps=3)
    assert fit.variational is not None and fit.posterior is not None
    theta = {k: v.numpy() for k, v in fit.parameters.items()}
    joint = np.zeros((20, 3, 2))
    for a in range(3):
        for b in range(2):
            density = np.exp(-0.5 * ((x.numpy() - theta["loc"][a, b]) / 0.7) ** 2) / (
                0.7 * math.sqrt(2 * math.pi)
            )
            joint[:, a, b] = [0.3, 0.3, 0.4][a] * theta["table"][a, b] * density
    posterior = joint.sum(2) / joint.sum((1, 2))[:, None]
    q = fit.guide_parameters["q"].numpy()
    expected = (q * (np.log(q) - np.log(posterior))).sum(1)
    np.testing.assert_allclose(kl_per_datum(fit.variational, fit.posterior), expected, rtol=1e-9)
    np.testing.assert_allclose(fit.elbo_per_datum, np.log(joint.sum((1, 2))) - expected, rtol=1e-9)


@pytest.mark.parametrize("guide", [categorical, categorical_encoder])
def test_guide_over_two_sites_of_one_plate_meets_the_identity(iris: Tensor, guide: Any) -> None:
    x = iris[:30, :1]

    def two_causes(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([[4.6, 5.5], [6.0, 5.0], [5.2, 5.8]]))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            b = pyro.sample("b", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[a, b.long()], 0.4), obs=x[:, 0])

    fit = lvmppl.fit(two_causes, {"x": x}, algorithm="svi", guide=guide, max_steps=30, learning_rate=0.05)
    assert fit.variational is not None and fit.posterior is not None and fit.elbo_per_datum is not None
    q = fit.variational.probabilities("a")[:, :, None] * fit.variational.probabilities("b")[:, None, :]
    p = fit.posterior.pair_marginal("a", "b")
    kl = (q * (q / p).log()).sum((1, 2))
    torch.testing.assert_close(
        fit.elbo_per_datum + kl, fit.posterior.log_evidence_per_datum, rtol=0, atol=1e-8
    )
    assert float(kl.max()) > 1e-3


def test_conjugate_normal_svi_recovers_the_posterior() -> None:
    x = torch.tensor([1.3, 0.2, 2.1, 0.7, 1.9], dtype=torch.float64)

    def normal(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("q_loc", torch.tensor(0.0))
        scale = pyro.param("q_scale", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale))

    fit = lvmppl.fit(
        normal, {"x": x}, algorithm="svi", guide=guide, max_steps=3000, learning_rate=0.03, num_particles=4
    )
    precision = 1 / 4 + 5
    assert float(fit.guide_parameters["q_loc"]) == pytest.approx(float(x.sum()) / precision, abs=0.03)
    assert float(fit.guide_parameters["q_scale"]) == pytest.approx(precision**-0.5, abs=0.03)
    covariance = torch.eye(5, dtype=torch.float64) + 4.0
    evidence = float(
        torch.distributions.MultivariateNormal(torch.zeros(5, dtype=torch.float64), covariance).log_prob(x)
    )
    assert fit.log_evidence_kind == "exact"
    assert fit.log_evidence == pytest.approx(evidence, abs=1e-9)
    assert 0 < fit.elbo_error < 0.1
    assert abs(fit.elbo - evidence) < 5 * fit.elbo_error + 0.01


def test_fit_comes_back_from_disk(iris: Tensor, tmp_path: Path) -> None:
    fit = lvmppl.fit(model, {"x": iris}, algorithm="vem", guide=categorical, max_steps=3)
    fit.save(tmp_path / "fit.safetensors")
    again = lvmppl.load_fit(tmp_path / "fit.safetensors")
    assert again.status == fit.status and again.elbo == fit.elbo and again.guide == "categorical"
    assert again.history.equals(fit.history)
    assert again.posterior is not None and again.variational is not None and fit.posterior is not None
    torch.testing.assert_close(
        again.posterior.probabilities("z"), fit.posterior.probabilities("z"), rtol=0, atol=0
    )
    torch.testing.assert_close(
        again.guide_parameters["z_probs"], fit.guide_parameters["z_probs"], rtol=0, atol=0
    )
    with pytest.raises(InputError, match=r"a fit saved by Fit\.save"):
        lvmppl.load_fit(tmp_path / "nothing.safetensors")


def test_freeze_and_start_from_hold_parameters_still(iris: Tensor) -> None:
    first = lvmppl.fit(model, {"x": iris}, algorithm="em", max_steps=3)
    guided = lvmppl.fit(
        model,
        {"x": iris},
        algorithm="svi",
        guide=categorical,
        max_steps=5,
        start_from=first,
        freeze=["weights", "loc"],
    )
    for name in ("weights", "loc"):
        torch.testing.assert_close(guided.parameters[name], first.parameters[name], rtol=0, atol=0)
    assert not torch.equal(guided.parameters["covariance"], first.parameters["covariance"])
    with pytest.raises(InputError, match=r"freeze: expected parameters .* got 'lok'; did you mean 'loc'"):
        lvmppl.fit(model, {"x": iris}, algorithm="em", freeze=["lok"])


def test_exact_algorithms_refuse_latents_that_are_not_enumerated() -> None:
    def poisson(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(3.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(IntractableError, match=r"z \(Poisson\).*or use svi"):
        lvmppl.fit(poisson, {"x": torch.zeros(4)}, algorithm="em")


def test_svi_returns_the_tail_average_of_a_table_by_row() -> None:
    from lvmppl.algorithms.tables import Average
    from lvmppl.density import ParameterSpec

    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    average = Average({"t": table}, {"t": ParameterSpec("t", constraints.real, table, row_axis=-2)})
    average.begin({"t": table})
    seen = []
    for _ in range(9):
        rows = torch.randperm(7, generator=generator)[:3]
        average.before_rows("t", table, rows)
        table[rows] += torch.randn(3, 2, generator=generator, dtype=torch.float64)
        average.after_step({"t": table})
        seen.append(table.clone())
    torch.testing.assert_close(
        average.mean({"t": table})["t"], torch.stack(seen).mean(0), rtol=1e-12, atol=1e-12
    )


def test_same_seed_gives_the_same_fit(iris: Tensor) -> None:
    options: dict[str, Any] = {
        "algorithm": "svi",
        "guide": categorical_encoder,
        "batch_size": 40,
        "max_steps": 15,
    }
    first = lvmppl.fit(model, {"x": iris}, seed=4, **options)
    second = lvmppl.fit(model, {"x": iris}, seed=4, **options)
    other = lvmppl.fit(model, {"x": iris}, seed=5, **options)
    assert first.history["objective"].tolist() == second.history["objective"].tolist()
    assert first.history["objective"].tolist() != other.history["objective"].tolist()
