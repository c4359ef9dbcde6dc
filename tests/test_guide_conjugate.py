"""Conjugate models: at the posterior in closed form, log p(x, z) − log q(z) is log p(x) whatever z is drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import lvmppl
from lvmppl.algorithms.problem import build_problem
from lvmppl.density import isolated
from lvmppl.elbo import elbo
from lvmppl.guides.variational import variational

F64 = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def global_model(prior: Callable[[], object], likelihood: Callable[..., object]) -> Callable[..., None]:
    """One latent z of all rows; the observations may depend on other data."""

    def model(y: Tensor, **other: Tensor) -> None:
        z = pyro.sample("z", prior())
        with pyro.plate("data", len(y)):
            pyro.sample("y", likelihood(z, **other), obs=y)

    return model


NORMAL_Y = tensor(0.3, 1.9, 2.2, 0.7)
BINARY_Y = tensor(1, 0, 1, 1, 0, 1, 1)
STATE_Y = torch.tensor([0, 2, 2, 1, 2])
COUNT_Y = tensor(3, 0, 2, 4, 1, 1)
DESIGN = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
LINE_Y = torch.randn(6, dtype=F64, generator=torch.Generator().manual_seed(2))
LINE_PRECISION = torch.eye(3, dtype=F64) / 4 + DESIGN.T @ DESIGN / 0.25
LINE_COVARIANCE = torch.linalg.inv(LINE_PRECISION)
NORMAL_PRECISION = 1 / 9 + len(NORMAL_Y) / 0.49


def line_evidence() -> Tensor:
    """log N(y; 0, X Σ₀ Xᵀ + σ² I)."""
    covariance = 4 * DESIGN @ DESIGN.T + 0.25 * torch.eye(6, dtype=F64)
    return dist.MultivariateNormal(torch.zeros(6, dtype=F64), covariance).log_prob(LINE_Y)


def normal_evidence() -> Tensor:
    """log N(y; 0, 9 · 1 1ᵀ + 0.49 I)."""
    size = len(NORMAL_Y)
    covariance = 9 * torch.ones(size, size, dtype=F64) + 0.49 * torch.eye(size, dtype=F64)
    return dist.MultivariateNormal(torch.zeros(size, dtype=F64), covariance).log_prob(NORMAL_Y)


def beta_evidence() -> Tensor:
    """log B(a + Σy, b + Σ(1 − y)) − log B(a, b)."""
    return _log_beta(tensor(2 + 5, 3 + 2)) - _log_beta(tensor(2, 3))


def dirichlet_evidence() -> Tensor:
    return _log_beta(tensor(1.5 + 1, 2 + 1, 0.5 + 3)) - _log_beta(tensor(1.5, 2, 0.5))


def gamma_evidence() -> Tensor:
    """Γ(a + Σy) / Γ(a) · b^a / (b + N)^(a + Σy) / Π y!"""
    a, b, total, size = tensor(2.5)[0], tensor(1.5)[0], COUNT_Y.sum(), len(COUNT_Y)
    counts = torch.lgamma(COUNT_Y + 1).sum()
    return torch.lgamma(a + total) - torch.lgamma(a) + a * b.log() - (a + total) * (b + size).log() - counts


def _log_beta(concentration: Tensor) -> Tensor:
    return torch.lgamma(concentration).sum() - torch.lgamma(concentration.sum())


CASES: dict[
    str, tuple[Callable[..., None], dict[str, Tensor], str, dict[str, Tensor], Callable[[], Tensor]]
] = {
    "normal mean": (
        global_model(lambda: dist.Normal(tensor(0)[0], 3.0), lambda z: dist.Normal(z, 0.7)),
        {"y": NORMAL_Y},
        "normal",
        {
            "z_loc": NORMAL_Y.sum() / 0.49 / NORMAL_PRECISION,
            "z_scale": torch.tensor(NORMAL_PRECISION**-0.5, dtype=F64),
        },
        normal_evidence,
    ),
    "beta-bernoulli": (
        global_model(lambda: dist.Beta(tensor(2)[0], tensor(3)[0]), lambda z: dist.Bernoulli(z)),
        {"y": BINARY_Y},
        "beta",
        {"z_concentration1": tensor(7)[0], "z_concentration0": tensor(5)[0]},
        beta_evidence,
    ),
    "dirichlet-categorical": (
        global_model(lambda: dist.Dirichlet(tensor(1.5, 2, 0.5)), lambda z: dist.Categorical(z)),
        {"y": STATE_Y},
        "dirichlet",
        {"z_concentration": tensor(2.5, 3, 3.5)},
        dirichlet_evidence,
    ),
    "gamma-poisson": (
        global_model(lambda: dist.Gamma(tensor(2.5)[0], tensor(1.5)[0]), lambda z: dist.Poisson(z)),
        {"y": COUNT_Y},
        "gamma",
        {"z_concentration": 2.5 + COUNT_Y.sum(), "z_rate": tensor(1.5 + 6)[0]},
        gamma_evidence,
    ),
    "linear regression": (
        global_model(
            lambda: dist.Normal(torch.zeros(3, dtype=F64), 2.0).to_event(1),
            lambda z, x: dist.Normal(x @ z, 0.5),
        ),
        {"y": LINE_Y, "x": DESIGN},
        "full",
        {
            "z_loc": LINE_COVARIANCE @ DESIGN.T @ LINE_Y / 0.25,
            "z_scale_tril": torch.linalg.cholesky(LINE_COVARIANCE),
        },
        line_evidence,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_draw_of_the_bound_is_the_evidence_at_the_exact_posterior(case: str) -> None:
    model, data, head, posterior, evidence = CASES[case]
    with isolated(0, F64):
        problem = build_problem(
            "fit", model, data, guide=variational, guide_takes_model=True, guide_args={"head": head}
        )
        assert problem.guided is not None and set(problem.lambda_) == set(posterior)
        assert not any(problem.guided.specs[name].is_table for name in problem.lambda_)
        for _ in range(5):
            bound = elbo(problem.guided.evaluate(data, posterior), problem.data_plate).total
            torch.testing.assert_close(bound, evidence(), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_coordinate_update_recovers_the_exact_posterior(case: str) -> None:
    model, data, head, posterior, evidence = CASES[case]
    guide = functools.partial(variational, head=head)
    with isolated(0, F64):
        fit = lvmppl.fit(model, data, algorithm="vem", guide=guide, max_steps=3)
    assert [(s.site, s.how) for s in fit.e_step] == [("z", "closed-form")]
    for name, value in posterior.items():
        torch.testing.assert_close(fit.guide_parameters[name], torch.as_tensor(value), rtol=1e-9, atol=1e-12)
    assert fit.elbo == pytest.approx(float(evidence()), abs=1e-9) and fit.elbo_error == 0.0
    mean, sd = fit.moments["z"]
    if case == "linear regression":
        torch.testing.assert_close(mean, posterior["z_loc"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(sd, LINE_COVARIANCE.diagonal().sqrt(), rtol=1e-9, atol=1e-12)
    if case == "gamma-poisson":
        shape, rate = float(posterior["z_concentration"]), float(posterior["z_rate"])
        assert [float(mean), float(sd)] == pytest.approx([shape / rate, shape**0.5 / rate], rel=1e-9)
