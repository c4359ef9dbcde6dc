"""EM with continuous latents beside scikit-learn, closed forms and the textbook update."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_wine
from sklearn.decomposition import FactorAnalysis
from torch import Tensor

import lvmppl
from lvmppl.algorithms.problem import build_problem
from lvmppl.models.factor_analysis import factor_analysis


def wine() -> Tensor:
    x = load_wine().data
    return torch.as_tensor((x - x.mean(0)) / x.std(0))


@pytest.mark.parametrize(("algorithm", "tolerance"), [("em", 1e-10), ("enumeration", 1e-12)])
def test_factor_analysis_optimum_equals_scikit_learn(algorithm: str, tolerance: float) -> None:
    x = wine()
    peer = FactorAnalysis(2, tol=1e-8, max_iter=5000, svd_method="lapack").fit(x.numpy())
    model = functools.partial(factor_analysis, num_factors=2)
    fit = lvmppl.fit(model, {"x": x}, algorithm=algorithm, tolerance=tolerance)
    assert fit.status == "converged"
    assert fit.log_evidence == pytest.approx(peer.score(x.numpy()) * len(x), abs=1e-4)
    ours = fit.parameters["loadings"] @ fit.parameters["loadings"].T
    np.testing.assert_allclose(ours, peer.components_.T @ peer.components_, atol=5e-3)


def test_probabilistic_pca_optimum_equals_its_closed_form() -> None:
    """Tipping & Bishop (1999), eq. 7 and 8: σ² is the mean of the discarded eigenvalues."""
    x, factors = wine(), 2
    values = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[::-1]
    noise = values[factors:].mean()
    determinant = np.log(values[:factors]).sum() + (x.shape[1] - factors) * np.log(noise)
    optimum = -0.5 * len(x) * (x.shape[1] * np.log(2 * np.pi) + determinant + x.shape[1])
    model = functools.partial(factor_analysis, num_factors=factors, noise="spherical")
    fit = lvmppl.fit(model, {"x": x}, algorithm="em", tolerance=1e-12, max_steps=1000)
    assert {s.how for s in fit.m_step} == {"closed-form"}
    assert fit.log_evidence == pytest.approx(optimum, abs=1e-5)
    assert float(fit.parameters["variance"]) == pytest.approx(noise, rel=1e-4)


def test_em_step_of_factor_analysis_equals_rubin_and_thayer() -> None:
    x = wine().numpy() + 0.3
    data = {"x": torch.as_tensor(x)}
    model = functools.partial(factor_analysis, num_factors=2)
    start = {k: v.detach().numpy() for k, v in build_problem("start", model, data).initial.items()}
    w, psi = start["loadings"], start["variance"]
    precision = np.linalg.inv(w @ w.T + np.diag(psi))
    mean = (x - start["loc"]) @ precision @ w  # [N, L]
    design = np.concatenate([mean, np.ones((len(x), 1))], 1)
    gram = design.T @ design
    gram[:2, :2] += len(x) * (np.eye(2) - w.T @ precision @ w)
    solved = np.linalg.solve(gram, design.T @ x).T  # [D, L + 1]
    residual = (x**2).mean(0) - (solved * (x.T @ design)).sum(1) / len(x)
    fit = lvmppl.fit(model, data, algorithm="em", max_steps=1, tolerance=0)
    np.testing.assert_allclose(fit.parameters["loadings"], solved[:, :2], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(fit.parameters["loc"], solved[:, 2], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(fit.parameters["variance"], residual, rtol=1e-9)
    assert not np.allclose(solved[:, :2], w, rtol=1e-2)
