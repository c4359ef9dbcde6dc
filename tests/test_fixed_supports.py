"""Supports of continuous sites whose ends a model computes: integrated where they stand still, refused where they move."""

from __future__ import annotations

import math
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

ENUMERATE = {"enumerate": "parallel"}
X = torch.tensor([0.3, 1.2, 0.1], dtype=torch.float64)
HIGH = torch.tensor([1.0, 4.0], dtype=torch.float64)


def log_row(x: float, high: float) -> float:
    """log ∫₀^high N(x; z, 0.5²) dz / high."""
    return math.log((stats.norm.cdf((high - x) / 0.5) - stats.norm.cdf(-x / 0.5)) / high)


def uniform(high: Tensor) -> dist.Uniform:
    return dist.Uniform(torch.zeros_like(high), high)


def of_the_row(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", uniform(2.0 * torch.ones_like(x)))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_evidence_of_ends_written_row_by_row_equals_closed_form() -> None:
    post = lvmppl.posterior(of_the_row, {"x": X})
    np.testing.assert_allclose(post.log_evidence_per_datum, [log_row(x, 2.0) for x in X.tolist()], atol=1e-6)


def of_an_event(x: Tensor) -> None:
    w = pyro.sample("w", uniform(HIGH).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w.sum(-1), 0.5), obs=x)


def of_a_plate(x: Tensor) -> None:
    with pyro.plate("terms", 2):
        w = pyro.sample("w", uniform(HIGH))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w.sum(-1, keepdim=True), 0.5), obs=x)


@pytest.mark.parametrize("model", [of_an_event, of_a_plate])
def test_evidence_of_ends_that_differ_within_a_row_equals_scipy_quadrature(
    model: Callable[..., None],
) -> None:
    def joint(first: float, second: float) -> float:
        return float(stats.norm.pdf(X.numpy(), first + second, 0.5).prod() / HIGH.prod())

    post = lvmppl.posterior(model, {"x": X})
    expected = integrate.dblquad(lambda b, a: joint(a, b), 0, 1, 0, 4, epsabs=1e-11, epsrel=1e-9)[0]
    assert post.log_evidence == pytest.approx(math.log(expected), abs=1e-6)


def by_row(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", uniform(2.0 + x))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def by_state(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(x.new_tensor([0.3, 0.7])), infer=ENUMERATE)
        z = pyro.sample("z", uniform(HIGH[c]))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def by_latent(x: Tensor) -> None:
    a = pyro.sample("a", dist.Gamma(x.new_tensor(2.0), 1.0))
    z = pyro.sample("z", dist.Pareto(a, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize(
    ("model", "how"), [(by_row, "between rows"), (by_state, "or states"), (by_latent, "another latent site")]
)
def test_ends_that_move_are_refused_in_words(model: Callable[..., None], how: str) -> None:
    """The sites would be integrated over the support of one draw."""
    with pytest.raises(IntractableError, match=rf"got z, whose support .*{how}.*; .*\(high - low\) \* u"):
        lvmppl.posterior(model, {"x": X})


def test_site_rescaled_from_a_fixed_support_equals_closed_form() -> None:
    """As the refusal of `by_state` says to write it."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(x.new_tensor([0.3, 0.7])), infer=ENUMERATE)
            u = pyro.sample("u", dist.Uniform(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(HIGH[c] * u, 0.5), obs=x)

    expected = [
        np.logaddexp(*(math.log(p) + log_row(x, h) for p, h in ((0.3, 1.0), (0.7, 4.0)))) for x in X.tolist()
    ]
    np.testing.assert_allclose(lvmppl.posterior(model, {"x": X}).log_evidence_per_datum, expected, atol=1e-6)


def fitted_end(x: Tensor) -> None:
    high = pyro.param("high", x.new_tensor(2.0), constraint=dist.constraints.positive)
    scale = pyro.param("scale", x.new_tensor(0.5), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", uniform(high))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


@pytest.mark.parametrize("algorithm", ["enumeration", "em"])
def test_fit_of_an_end_is_refused_unless_the_end_is_frozen(algorithm: str) -> None:
    """The gradient would lack the term of the moving end, and the fit stop at its start."""
    with pytest.raises(IntractableError, match=r"z, whose support moves with a fitted parameter \(high\);"):
        lvmppl.fit(fitted_end, {"x": X}, algorithm=algorithm)
    held = lvmppl.fit(fitted_end, {"x": X}, algorithm=algorithm, freeze=["high", "scale"], max_steps=1)
    assert held.log_evidence == pytest.approx(sum(log_row(x, 2.0) for x in X.tolist()), abs=1e-6)


def test_posterior_at_given_parameters_has_the_ends_of_these() -> None:
    post = lvmppl.posterior(fitted_end, {"x": X}, parameters={"high": HIGH[1], "scale": X.new_tensor(0.5)})
    np.testing.assert_allclose(post.log_evidence_per_datum, [log_row(x, 4.0) for x in X.tolist()], atol=1e-6)
