"""Integrals that diverge, or nearly so, where floating point does not show it: at the ends of a support and at poles."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

import lvmppl
from lvmppl.exact.quadrature import quadrature

POSITIVE, UNIT = biject_to(constraints.positive), biject_to(constraints.unit_interval)
Case = tuple[Callable[[Tensor], Tensor], int, Transform | None]


def first(z: Tensor) -> Tensor:
    return z[..., 0]


def radius(z: Tensor, *pole: float) -> Tensor:
    return torch.linalg.vector_norm(z - torch.tensor(pole, dtype=z.dtype), dim=-1)


def power_times_normal(exponent: float, *pole: float) -> Callable[[Tensor], Tensor]:
    """log of |z − c|⁻ᵖ exp(−|z − c|²/2)."""
    return lambda z: -exponent * radius(z, *pole).log() - 0.5 * radius(z, *pole).square()


def beta(a: float, b: float) -> Callable[[Tensor], Tensor]:
    return lambda p: (a - 1.0) * first(p).log() + (b - 1.0) * torch.log1p(-first(p))


def gamma(a: float) -> Callable[[Tensor], Tensor]:
    return lambda s: (a - 1.0) * first(s).log() - first(s)


DIVERGENT: dict[str, Case] = {
    "1/s at 0": (gamma(0.0), 1, POSITIVE),
    "s⁻² at 0": (gamma(-1.0), 1, POSITIVE),
    "1/s at infinity": (lambda s: -torch.log1p(first(s)), 1, POSITIVE),
    "1/|z| at infinity": (lambda z: -torch.log1p(first(z).abs()), 1, None),
    "1/r² at infinity": (lambda z: -torch.log1p(radius(z, 0.0, 0.0).square()), 2, None),
    "1/p at 0": (beta(0.0, 1.0), 1, UNIT),
    "1/(1 − p) at 1": (beta(1.0, 0.0), 1, UNIT),
    "1/|z| within": (power_times_normal(1.0, 0.0), 1, None),
    "1/|z − 0.3| within": (power_times_normal(1.0, 0.3), 1, None),
    "|z − 0.3|^(−1.5) within": (power_times_normal(1.5, 0.3), 1, None),
    "1/r² within": (power_times_normal(2.0, 0.0, 0.0), 2, None),
    "1/|z₁| within": (lambda z: -z[..., 0].abs().log() - 0.5 * z.square().sum(-1), 2, None),
}


@pytest.mark.parametrize("case", DIVERGENT)
def test_error_of_a_divergent_integral_is_infinite(case: str) -> None:
    function, dim, transform = DIVERGENT[case]
    found = quadrature(function, 1, dim, transform=transform)
    assert float(found.log_evidence_error) == math.inf


def log_power_times_normal(exponent: float) -> float:
    """log ∫ |z|⁻ᵖ exp(−z²/2) dz = log(2^((1−p)/2) Γ((1−p)/2))."""
    half = 0.5 * (1.0 - exponent)
    return half * math.log(2.0) + math.lgamma(half)


# The closed form of the integral, and the largest error that may be stated of it.
CONVERGENT: dict[str, tuple[Case, float, float]] = {
    "|z|^(−1/2)": ((power_times_normal(0.5, 0.0), 1, None), log_power_times_normal(0.5), 1e-6),
    "|z − 0.3|^(−1/2)": ((power_times_normal(0.5, 0.3), 1, None), log_power_times_normal(0.5), 0.6),
    "|z|^(−0.9)": ((power_times_normal(0.9, 0.0), 1, None), log_power_times_normal(0.9), 0.02),
    "1/r": (
        (power_times_normal(1.0, 0.3, 0.2), 2, None),
        math.log(2.0 * math.pi) + 0.5 * math.log(math.pi / 2.0),
        1e-6,
    ),
    "r⁻³ at infinity": (
        (lambda z: -1.5 * torch.log1p(radius(z, 0.0, 0.0).square()), 2, None),
        math.log(2.0 * math.pi),
        1e-6,
    ),
    "Γ(0.05)": ((gamma(0.05), 1, POSITIVE), math.lgamma(0.05), 1e-6),
    "Γ(0.01)": ((gamma(0.01), 1, POSITIVE), math.lgamma(0.01), 1e-2),
    "Γ(0.002)": ((gamma(0.002), 1, POSITIVE), math.lgamma(0.002), math.inf),
    "B(0.5, 0.5)": ((beta(0.5, 0.5), 1, UNIT), math.log(math.pi), 1e-6),
    "B(0.1, 0.1)": ((beta(0.1, 0.1), 1, UNIT), 2 * math.lgamma(0.1) - math.lgamma(0.2), 0.1),
    "Student's t of 0.1": (
        (lambda z: -0.55 * torch.log1p(first(z).square()), 1, None),
        0.5 * math.log(math.pi) + math.lgamma(0.05) - math.lgamma(0.55),
        1e-6,
    ),
    "1/(s log² s) at infinity": (
        (lambda s: -torch.log1p(first(s)) - 2.0 * torch.log1p(torch.log1p(first(s))), 1, POSITIVE),
        0.0,
        0.01,
    ),
}


@pytest.mark.parametrize("case", CONVERGENT)
def test_error_of_an_integral_that_nearly_diverges_covers_its_closed_form(case: str) -> None:
    (function, dim, transform), truth, most = CONVERGENT[case]
    found = quadrature(function, 1, dim, transform=transform)
    assert abs(float(found.log_evidence) - truth) <= float(found.log_evidence_error) <= most


def scales(prior: Callable[[Tensor], dist.Distribution]) -> Callable[[Tensor], None]:
    """A scale for every observation: p(x = 0 | s) ∝ 1/s."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", prior(torch.ones_like(x)))
            pyro.sample("x", dist.Normal(torch.zeros_like(s), s), obs=x)

    return model


def test_evidence_of_a_scale_at_an_observation_of_zero_is_an_estimate_of_infinite_error() -> None:
    x = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    post = lvmppl.posterior(scales(dist.HalfCauchy), {"x": x})
    assert post.kind == "estimate" and post.log_evidence_error == math.inf
    own = post.log_evidence_error_per_datum
    assert own[0] == math.inf and bool((own[1:] < 1e-6).all())


def test_evidence_of_a_gamma_scale_at_an_observation_of_zero_equals_its_closed_form() -> None:
    """E[1/s] = Γ(a − 1)/Γ(a) is finite if a > 1."""
    x = torch.zeros(1, dtype=torch.float64)
    post = lvmppl.posterior(scales(lambda one: dist.Gamma(1.2 * one, one)), {"x": x})
    truth = math.lgamma(0.2) - math.lgamma(1.2) - 0.5 * math.log(2.0 * math.pi)
    assert post.kind == "quadrature"
    assert abs(post.log_evidence - truth) <= post.log_evidence_error < 1e-6


def test_error_of_two_smooth_modes_of_unlike_height_stays_small() -> None:
    """The way up from the lower one leads to no pole."""

    def function(z: Tensor) -> Tensor:
        a, b = -12.5 * (first(z) + 1.0).square() - 4.0, -12.5 * (first(z) - 1.0).square()
        return torch.logaddexp(a, b)

    found = quadrature(function, 1, 1)
    truth = math.log1p(math.exp(-4.0)) + 0.5 * math.log(2.0 * math.pi / 25.0)
    assert abs(float(found.log_evidence) - truth) <= float(found.log_evidence_error) < 1e-6


def test_work_on_a_thin_ring_is_bounded_and_its_error_infinite() -> None:
    """Every piece of a ring of width 0.001 has a chart of its own; each alone could be refined for minutes."""
    width, points = 0.001, 0

    def model(x: Tensor) -> None:
        nonlocal points
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 3.0).to_event(1))
            points += z.numel() // 2
            pyro.factor("ring", -((z.norm(dim=-1) - 1.0) ** 2) / (2 * width**2))
            pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0), obs=x)

    post = lvmppl.posterior(model, {"x": torch.tensor([0.3], dtype=torch.float64)})
    radius = np.linspace(1.0 - 12.0 * width, 1.0 + 12.0 * width, 20001)
    density = radius * np.exp(-((radius - 1.0) ** 2) / (2 * width**2) - radius**2 / 18.0) / 9.0
    expected = np.log(np.trapezoid(density, radius)) + stats.norm.logpdf(0.3)
    assert post.kind == "estimate" and post.log_evidence_error == math.inf
    assert post.log_evidence == pytest.approx(expected, abs=0.05)
    assert points < 1.4e7
