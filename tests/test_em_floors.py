"""Spreads at their floor: the M-step is the maximum over a set that never moves: log evidence may not fall."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from em_models import ENUMERATE, mixture, points
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms import em_run
from lvmppl.algorithms.evidence import log_evidence
from lvmppl.algorithms.m_step import plan_m_step
from lvmppl.algorithms.maxima import FLOOR, SOLVE, Sums
from lvmppl.algorithms.problem import build_problem
from lvmppl.algorithms.rounding import rounding
from lvmppl.algorithms.spellings import MATRIX
from lvmppl.density import unvalidated

EPS = torch.finfo(torch.float64).eps


LOCS = (0.5, 0.6)


def test_small_fall_of_log_evidence_at_a_floor_ends_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is planted long after the floor began to act, and moves a component that is nowhere near it."""
    calls = itertools.count(1)
    solve = em_run.solve_closed

    def faulty(*args: Any) -> Any:
        values, floored = solve(*args)
        moves = floored and next(calls) == 60
        return ({**values, "loc": values["loc"] + torch.tensor([0.0, 2e-4])} if moves else values), floored

    model = functools.partial(mixture, locs=LOCS, variances=(1e-3, 3.0))
    fine = lvmppl.fit(model, {"x": points()}, algorithm="em", max_steps=100, tolerance=0)
    assert fine.status == "max_steps" and "floor" in fine.message
    monkeypatch.setattr(em_run, "solve_closed", faulty)
    fit = lvmppl.fit(model, {"x": points()}, algorithm="em", max_steps=100, tolerance=0)
    fall = -fit.history["objective"].diff().min()
    assert 2e-8 < fall < 1e-6
    assert fit.status == "diverged" and "at step 60, which updated loc" in fit.message


def matrix_mixture(x: Tensor, least: tuple[float, float]) -> None:
    weights = pyro.param("weights", torch.full((2,), 0.5).double(), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([[0.5, 0.5], [1.0, -1.0]]).double())
    start = torch.diag_embed(torch.tensor([least, (1.0, 2.0)]).double())
    covariance = pyro.param("covariance", start, constraint=constraints.positive_definite)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
        pyro.sample("x", dist.MultivariateNormal(loc[z], covariance[z]), obs=x)


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("kind", ["precision", "covariance"])
def test_start_below_the_floor_equals_a_start_at_the_floor(kind: str, restarts: int) -> None:
    x = points()
    if kind == "precision":
        floor = float(EPS ** (2 / 3) * x.var(correction=0))
        low, at = (functools.partial(mixture, locs=LOCS, variances=(v, 3.0)) for v in (1e-15, floor))
    else:
        x = torch.stack([x, x.roll(1).sin() + x], 1)
        x[3:6] = 0.5
        floors = (EPS**0.5 * x.var(0, correction=0)).tolist()
        low, at = (functools.partial(matrix_mixture, least=v) for v in ((1e-13, 1e-14), tuple(floors)))
    one, two = (
        lvmppl.fit(m, {"x": x}, algorithm="em", max_steps=30, tolerance=0, restarts=restarts)
        for m in (low, at)
    )
    assert one.status == "max_steps", one.message
    assert "floor" in one.message
    np.testing.assert_allclose(one.history["objective"], two.history["objective"], rtol=1e-8)
    assert one.history["objective"].diff().min() >= -1e-9 * abs(one.log_evidence)


def test_floor_of_a_shared_variance_equals_the_largest_whatever_the_weights() -> None:
    """x and y share a spread, and y is seen in some rows only: how much each weighs changes from step to step."""

    def model(x: Tensor, y: Tensor, seen: Tensor) -> None:
        weights = pyro.param("weights", torch.full((2,), 0.5).double(), constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor([0.5, 0.6]).double())
        other = pyro.param("other", torch.tensor([5.0, 6.0]).double())
        variance = pyro.param("variance", torch.tensor([1e-2, 3.0]).double(), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(loc[z], variance[z].sqrt()), obs=x)
            pyro.sample("y", dist.Normal(other[z], variance[z].sqrt()).mask(seen), obs=y)

    x = points()
    y = torch.tensor([-30.0, 9.0, 40.0, 5.0, 5.0, 5.0, 2.0, -20.0, 12.0]).double()
    seen = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0]).bool()
    fit = lvmppl.fit(model, {"x": x, "y": y, "seen": seen}, algorithm="em", max_steps=100, tolerance=0)
    assert fit.status == "max_steps", fit.message
    floor = EPS ** (2 / 3) * max(float(x.var(correction=0)), float(y[seen].var(correction=0)))
    assert float(fit.parameters["variance"][0]) == pytest.approx(floor, rel=1e-9)
    assert fit.history["objective"].diff().min() >= -1e-9 * abs(fit.log_evidence)


def test_raised_covariance_equals_the_maximum_over_all_at_or_above_the_floor() -> None:
    """Of −log |Σ| − tr Σ⁻¹S, concave in Σ⁻¹: nothing on the way to any other matrix Σ ⪰ floor is better."""
    rng = np.random.default_rng(5)
    factor = rng.normal(size=(4, 2))
    scatter = torch.as_tensor(factor @ factor.T + 1e-3 * np.eye(4))
    floor = torch.diag(torch.tensor([0.1, 0.5, 0.02, 1.0], dtype=torch.float64))
    n = torch.full((1, 4, 4), 7.0, dtype=torch.float64)
    sums = Sums("covariance", MATRIX[0], {"n": n, "scatter": 7.0 * scatter[None], FLOOR: floor[None]})
    solved, held = SOLVE["covariance"](sums, torch.eye(4, dtype=torch.float64)[None])
    assert held is not None and bool(held[0])

    def q(sigma: Tensor) -> float:
        return float(-torch.logdet(sigma) - torch.trace(torch.linalg.solve(sigma, scatter)))

    best, root = solved[0], floor.sqrt()
    assert float(torch.linalg.eigvalsh(best - floor).min()) > -1e-12
    inverse = torch.linalg.inv(best)
    for scale in (0.0, 1e-3, 0.1, 1.0, 10.0) * 20:
        a = torch.as_tensor(rng.normal(size=(4, 3)))
        other = torch.linalg.inv(root @ (torch.eye(4, dtype=torch.float64) + scale * a @ a.T) @ root)
        for share in (1e-4, 0.1, 1.0):
            assert q(torch.linalg.inv((1 - share) * inverse + share * other)) <= q(best) + 1e-12


def test_error_of_log_evidence_at_a_floored_covariance_is_below_its_bound() -> None:
    """Against 60 digits at the same matrix, a coordinate being the sum of two others."""

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(3).double())
        covariance = pyro.param("covariance", torch.eye(3).double(), constraint=constraints.positive_definite)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(loc, covariance), obs=x)

    a = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([a, a.sum(1, keepdim=True)], 1)
    fit = lvmppl.fit(model, {"x": x}, algorithm="em", max_steps=5, tolerance=0)
    assert "floor" in fit.message
    with mpmath.workdps(60):
        sigma = mpmath.matrix(fit.parameters["covariance"].tolist())
        inverse, volume = sigma**-1, mpmath.log(2 * mpmath.pi) * 3 + mpmath.log(mpmath.det(sigma))
        total = mpmath.mpf(0)
        for row in x.tolist():
            d = mpmath.matrix(
                [
                    mpmath.mpf(v) - mpmath.mpf(m)
                    for v, m in zip(row, fit.parameters["loc"].tolist(), strict=True)
                ]
            )
            total -= (volume + (d.T * inverse * d)[0]) / 2
        with unvalidated():
            problem = build_problem("floor", model, {"x": x})
            values = dict(fit.parameters)
            error = float(abs(mpmath.mpf(float(log_evidence(problem, values))) - total))
            bound = rounding(problem, plan_m_step(problem), None, values)
    assert error <= bound <= 1e-5
    assert error > EPS * 64 * x.numel()  # a sum's rounding alone does not explain it
