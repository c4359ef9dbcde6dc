"""EM step by step beside the hand-derived EM of hmmlearn and scikit-learn, from the same start."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hmmlearn import hmm
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

import lvmppl
from lvmppl.algorithms.m_step import plan_m_step
from lvmppl.algorithms.problem import build_problem
from lvmppl.algorithms.start import start_values
from lvmppl.density import isolated, unvalidated
from lvmppl.models.hmm import hidden_markov
from lvmppl.models.mixture import gaussian_mixture

STEPS = 8
LENGTHS = [9, 4, 7, 1, 9, 6]
EMISSIONS = ("categorical", "poisson", "gaussian")


def sequences(emission: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    if emission == "categorical":
        return rng.integers(0, 4, (6, 9))
    if emission == "poisson":
        return rng.poisson(rng.choice([1.0, 8.0], (6, 9))).astype(float)
    return rng.normal(size=(6, 9, 2)) + 3.0 * rng.integers(0, 2, (6, 9, 1))


def peer(emission: str, start: Mapping[str, np.ndarray]) -> Any:
    options = {"n_components": 3, "n_iter": STEPS + 1, "tol": -np.inf, "init_params": ""}
    if emission == "categorical":
        model = hmm.CategoricalHMM(**options)
        model.emissionprob_ = start["emission"]
    elif emission == "poisson":
        model = hmm.PoissonHMM(**options, lambdas_prior=0.0, lambdas_weight=0.0)
        model.lambdas_ = start["rate"][:, None]
    else:
        model = hmm.GaussianHMM(
            **options, covariance_type="diag", covars_prior=0.0, covars_weight=0.0, min_covar=0.0
        )
        model.means_, model.covars_ = start["loc"], start["variance"]
    model.startprob_, model.transmat_ = start["initial"], start["transition"]
    return model


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("emission", EMISSIONS)
def test_trajectory_of_chains_equals_hmmlearn(emission: str, ragged: bool) -> None:
    x = sequences(emission)
    lengths = LENGTHS if ragged else [9] * 6
    data = {"x": torch.as_tensor(x)}
    if ragged:
        data["lengths"] = torch.tensor(lengths)
    model = functools.partial(hidden_markov, num_states=3, emission=emission)
    with isolated(dtype=torch.float64):
        start = {k: v.detach().numpy() for k, v in build_problem("start", model, data).initial.items()}
        fit = lvmppl.fit(model, data, algorithm="em", max_steps=STEPS, tolerance=0)
    rows = np.concatenate([s[:n].reshape(n, -1) for s, n in zip(x, lengths, strict=True)])
    theirs = peer(emission, start).fit(rows, lengths)
    assert {s.how for s in fit.m_step} == {"closed-form"}
    np.testing.assert_allclose(fit.history["objective"], theirs.monitor_.history, rtol=0, atol=1e-8)
    assert fit.history["objective"].diff().max() > 0.5


PRECISION = {
    "full": lambda s: np.linalg.inv(s["covariance"]),
    "tied": lambda s: np.linalg.inv(s["covariance"]),
    "diag": lambda s: 1 / s["variance"],
    "spherical": lambda s: 1 / s["variance"],
}


@pytest.mark.parametrize("covariance", PRECISION)
def test_trajectory_of_a_gaussian_mixture_equals_scikit_learn(covariance: str) -> None:
    x = load_iris().data
    data = {"x": torch.as_tensor(x)}
    model = functools.partial(gaussian_mixture, num_components=3, covariance=covariance)
    start = {k: v.detach().numpy() for k, v in build_problem("start", model, data).initial.items()}
    fit = lvmppl.fit(model, data, algorithm="em", max_steps=STEPS, tolerance=0)
    theirs = []
    for steps in range(1, STEPS + 1):
        peer = GaussianMixture(
            3, covariance_type=covariance, reg_covar=0.0, tol=0.0, max_iter=steps, weights_init=start["weights"],
            means_init=start["loc"], precisions_init=PRECISION[covariance](start),
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            peer.fit(x)
        theirs.append(peer.score(x) * len(x))
    assert {s.how for s in fit.m_step} == {"closed-form"}
    np.testing.assert_allclose(fit.history["objective"][1:], theirs, rtol=0, atol=1e-8)
    assert fit.history["objective"].diff().max() > 0.5


@pytest.mark.parametrize(("components", "optimum", "bic"), [(2, -214.3547, 574.018), (3, -180.1855, 580.839)])
def test_log_evidence_of_iris_equals_the_published_optimum(
    components: int, optimum: float, bic: float
) -> None:
    data = {"x": torch.as_tensor(load_iris().data)}
    model = functools.partial(gaussian_mixture, num_components=components, covariance="full")
    fit = lvmppl.fit(model, data, algorithm="em", init="kmeans", restarts=3, tolerance=1e-10)
    count = (components - 1) + components * 4 + components * 10
    assert fit.status == "converged"
    assert fit.log_evidence == pytest.approx(optimum, abs=1e-3)
    assert count * np.log(150) - 2 * fit.log_evidence == pytest.approx(bic, abs=2e-3)


def test_kmeans_start_of_a_chain_equals_the_means_of_its_clusters() -> None:
    x = np.where(np.arange(9) % 4 < 2, 0.0, 7.0) + np.random.default_rng(1).normal(size=(6, 9))
    x[:, 6:] = np.where(
        np.arange(6)[:, None] % 2, x[:, 6:], 99.0
    )  # beyond the length of every other sequence
    data = {"x": torch.as_tensor(x), "lengths": torch.tensor([6, 9] * 3)}
    model = functools.partial(hidden_markov, num_states=2, emission="gaussian")
    problem = build_problem("start", model, data)
    with isolated(dtype=torch.float64), unvalidated():
        values = start_values(problem, "kmeans", 0, 1, plan_m_step(problem))
    valid = np.arange(9) < np.array([6, 9] * 3)[:, None]
    high = x > 3.5
    r = 0.95 * high + 0.025  # of the upper cluster
    means = sorted([(s * valid * np.where(valid, x, 0)).sum() / (s * valid).sum() for s in (1 - r, r)])
    np.testing.assert_allclose(values["loc"].sort().values, means, rtol=1e-12)
    first = [(1 - r[:, 0]).mean(), r[:, 0].mean()]
    order = values["loc"].argsort()
    np.testing.assert_allclose(values["initial"][order], first, rtol=1e-12)
    s = np.stack([1 - r, r], -1)
    pairs = np.einsum("nti,ntj,nt->ij", s[:, :-1], s[:, 1:], valid[:, 1:].astype(float))
    expected = pairs / pairs.sum(1, keepdims=True)
    np.testing.assert_allclose(values["transition"][order][:, order], expected, rtol=1e-12)
