"""Models that do not take many values of their continuous sites at once are run at one after the other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

import lvmppl
from lvmppl.errors import IntractableError

GENERATOR = torch.Generator().manual_seed(7)
X = torch.randn(7, 3, dtype=torch.float64, generator=GENERATOR)
Y = torch.randn(7, dtype=torch.float64, generator=GENERATOR)


def normal(scale: float, *shape: int) -> dist.Normal:
    return dist.Normal(torch.zeros(shape, dtype=torch.float64), scale)


def plate_of_weights(x: Tensor, y: Tensor) -> None:
    with pyro.plate("features", x.shape[1]):
        w = pyro.sample("w", normal(1.0))
    b = pyro.sample("b", normal(2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + b, 0.5), obs=y)


def vector_of_weights(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", normal(1.0, 3).to_event(1))
    b = pyro.sample("b", normal(2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + b, 0.5), obs=y)


@pytest.mark.parametrize("model", [plate_of_weights, vector_of_weights])
def test_evidence_of_a_matrix_product_equals_multivariate_normal(model: Callable[..., None]) -> None:
    design = np.concatenate([X.numpy(), np.ones((7, 1))], 1)
    covariance = design @ np.diag([1.0, 1.0, 1.0, 4.0]) @ design.T + 0.25 * np.eye(7)
    post = lvmppl.posterior(model, {"x": X, "y": Y})
    expected = stats.multivariate_normal(np.zeros(7), covariance).logpdf(Y.numpy())
    assert post.log_evidence == pytest.approx(expected, abs=1e-9)
    assert post.kind == "exact"


def test_sum_over_all_that_is_held_equals_multivariate_normal() -> None:
    """Such a model runs at many points at once, and wrongly: the sum would take them in."""

    def model(y: Tensor) -> None:
        w = pyro.sample("w", normal(1.0, 3).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(w.sum(), 0.5), obs=y)

    expected = stats.multivariate_normal(np.zeros(7), 3.0 * np.ones((7, 7)) + 0.25 * np.eye(7)).logpdf(
        Y.numpy()
    )
    assert lvmppl.posterior(model, {"y": Y}).log_evidence == pytest.approx(expected, abs=1e-9)


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", normal(1.0, x.shape[1]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def test_logistic_regression_of_a_matrix_product_equals_scipy_quadrature() -> None:
    x, y = X[:, :1], (Y > 0).double()

    def joint(w: float) -> float:
        signs = 2.0 * y.numpy() - 1.0
        return float(stats.norm.pdf(w) * (1.0 / (1.0 + np.exp(-signs * x.numpy()[:, 0] * w))).prod())

    post = lvmppl.posterior(logistic, {"x": x, "y": y})
    expected = np.log(integrate.quad(joint, -12.0, 12.0, epsabs=0, epsrel=1e-11)[0])
    assert post.log_evidence == pytest.approx(expected, abs=1e-6)


def test_three_weights_of_a_logistic_regression_equal_gauss_hermite() -> None:
    """More points than could be run one by one: the model is mapped over them."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    grid = np.stack(np.meshgrid(nodes, nodes, nodes), -1).reshape(-1, 3)
    mass = np.prod(np.stack(np.meshgrid(weights, weights, weights), -1).reshape(-1, 3), -1)
    signs = 2.0 * (Y > 0).double().numpy() - 1.0
    likelihood = (1.0 / (1.0 + np.exp(-signs * (grid @ X.numpy().T)))).prod(-1)
    expected = np.log((likelihood * mass).sum() / (2.0 * np.pi) ** 1.5)
    post = lvmppl.posterior(logistic, {"x": X, "y": (Y > 0).double()})
    assert post.log_evidence == pytest.approx(expected, abs=1e-6)


def test_too_many_single_points_are_refused() -> None:
    """What is mapped over points cannot be read as a number."""

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", normal(1.0, x.shape[1]).to_event(1))
        assert np.isfinite(float(w.detach().reshape(-1)[0]))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    with pytest.raises(IntractableError, match=r"takes many values of w at once.*\(x \* w\).sum\(-1\)"):
        lvmppl.posterior(model, {"x": X, "y": (Y > 0).double()})


def test_how_a_model_is_run_is_found_once_for_all_rows() -> None:
    """Rows are worked on in blocks, of which none tries again whether many points can be taken at once."""
    single: list[int] = []

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(1.0))
            single.append(z.dim() == 1)
            pyro.sample("x", dist.StudentT(3.0, z, 0.5), obs=x)

    x = torch.linspace(-6.0, 6.0, 1500, dtype=torch.float64)
    post = lvmppl.posterior(model, {"x": x})
    assert (
        sum(single) == 3
    )  # for the structure, for the variables, and at a point beside the same among others
    each = [
        integrate.quad(lambda z, v=v: stats.norm.pdf(z) * stats.t.pdf((v - z) / 0.5, 3) / 0.5, -12, 12)[0]
        for v in (-6.0, 6.0)
    ]
    assert post.log_evidence_per_datum is not None
    np.testing.assert_allclose(post.log_evidence_per_datum[[0, -1]], np.log(each), atol=1e-6)


LABELS = torch.tensor([0.3, 0.7], dtype=torch.float64)
ENUMERATE = {"enumerate": "parallel"}


def labelled_rows(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", normal(1.0, x.shape[1]).to_event(1))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(LABELS), infer=ENUMERATE)
        pyro.sample("y", dist.Normal(x @ w + c, 0.5), obs=y)


def label_of_all(x: Tensor, y: Tensor) -> None:
    c = pyro.sample("c", dist.Categorical(LABELS), infer=ENUMERATE)
    w = pyro.sample("w", normal(1.0, x.shape[1]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + c, 0.5), obs=y)


def labelled_sum(x: Tensor, y: Tensor) -> None:
    """Runs at many points at once, and wrongly."""
    w = pyro.sample("w", normal(1.0, x.shape[1]).to_event(1))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(LABELS), infer=ENUMERATE)
        pyro.sample("y", dist.Normal(w.sum() + c, 0.5), obs=y)


def test_single_points_with_an_enumerated_site_equal_the_sum_over_its_states() -> None:
    """Given the label everything is Gaussian."""
    design, y = X.numpy()[:4], Y[:4]
    covariance = design @ design.T + 0.25 * np.eye(4)
    logs = [
        stats.multivariate_normal(np.zeros(4), covariance).logpdf(y.numpy() - c) + np.log(LABELS[c].item())
        for c in range(2)
    ]
    post = lvmppl.posterior(label_of_all, {"x": X[:4], "y": y})
    assert post.log_evidence == pytest.approx(np.logaddexp(*logs), abs=1e-9)
    assert post.kind == "exact"


@pytest.mark.parametrize("model", [labelled_rows, labelled_sum])
def test_labels_summed_at_single_points_equal_scipy_quadrature(model: Callable[..., None]) -> None:
    x, y = X[:4, :1], Y[:4]
    slope = x.numpy()[:, 0] if model is labelled_rows else np.ones(4)

    def joint(w: float) -> float:
        each = stats.norm.pdf(y.numpy()[:, None], slope[:, None] * w + np.arange(2), 0.5) * LABELS.numpy()
        return float(stats.norm.pdf(w) * each.sum(1).prod())

    expected = np.log(integrate.quad(joint, -12.0, 12.0, epsabs=0, epsrel=1e-11)[0])
    post = lvmppl.posterior(model, {"x": x, "y": y})
    assert post.log_evidence == pytest.approx(expected, abs=1e-6)
