"""EM on many models: what is found to be closed-form, monotone ascent, fixed points, and the gradient M-step's optimum."""

from __future__ import annotations

import functools
from typing import Any

import em_table_models  # noqa: F401  (adds its models to CASES)
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from em_continuous_models import CASES
from em_models import ENUMERATE, Case
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms.evidence import log_evidence
from lvmppl.algorithms.expected import e_step, expected_log_joint, gradient_m_step
from lvmppl.algorithms.m_step import describe_m_step, plan_m_step, solve_closed
from lvmppl.algorithms.probing import PROBE_ROWS, probe_indices
from lvmppl.algorithms.problem import Problem, build_problem
from lvmppl.density import Coordinates, isolated, unvalidated

ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def problem_of(case: Case, **options: Any) -> Problem:
    return build_problem("test", case.model, case.data(), **options)


@ALL
def test_parameters_are_closed_form_exactly_where_q_has_one(case: Case) -> None:
    with isolated(0, torch.float64):
        steps = describe_m_step(problem_of(case))
    assert {name for name, how, _ in steps if how == "closed-form"} == case.closed, steps
    assert {name for name, how, _ in steps if how == "gradient"} == case.gradient, steps
    assert all(why for _, _, why in steps)


@pytest.mark.parametrize(
    ("name", "parameter", "why"),
    [
        ("markov", "transition", "probabilities of 5 sites, 'z1' … 'z5'"),
        ("poisson_and_normal", "variance", "variance of 'y'"),
        ("poisson_and_normal", "rate", "rate of 'x'"),
        ("waiting_times", "mean", "mean of 'c'"),
        ("spelled_in_logarithms", "log_variance", "log variance of 'x'"),
        ("tied_precision_matrix", "precision", "precision matrix of 'x'"),
        ("shared_between_sites", "loc", "location of 'x' and 'y'"),
        ("chain_of_normals", "transition", "probabilities of 'z·transition'"),
        ("mixture_of_regressions", "slope", "least squares: loc of 'x' is affine in it"),
        ("neural_emission", "head", "loc of 'x' is not affine in it"),
        ("product_of_two_loadings", "left", "loc of 'x' is not affine in it"),
        ("gain_that_must_be_positive", "gain", "loc of 'x' is computed from it, and it is constrained"),
        ("random_effect_of_every_row", "spread", "standard deviation of 'z'"),
        ("also_in_a_factor", "rate", "enters 'penalty' (Unit), which has no closed form"),
        (
            "in_two_fields",
            "rate",
            "is used in two ways: rate of 'x' (rate or precision) and loc of 'y' (location)",
        ),
    ],
)
def test_reason_of_an_update_equals_what_the_model_says(name: str, parameter: str, why: str) -> None:
    with isolated(0, torch.float64):
        reasons = {p: reason for p, _, reason in describe_m_step(problem_of(CASES[name]))}
    assert reasons[parameter] == why


@ALL
def test_em_never_decreases_log_evidence(case: Case) -> None:
    fit = lvmppl.fit(case.model, case.data(), algorithm="em", max_steps=case.steps, tolerance=0)
    steps = np.diff(fit.history["objective"])
    assert steps.min() >= -1e-9 * abs(fit.log_evidence)
    assert steps.max() > 1e-3
    assert fit.status == "max_steps"
    assert fit.history["objective"].iloc[-1] == pytest.approx(fit.log_evidence, rel=1e-12)


@ALL
def test_closed_form_m_step_equals_gradient_m_step_run_to_its_optimum(case: Case) -> None:
    with isolated(0, torch.float64), unvalidated():
        problem = problem_of(case)
        plan = plan_m_step(problem)
        start = dict(problem.initial)
        _, weights, statistics = e_step(problem, start, plan.sites)
        solved, floored = solve_closed(problem, plan, start, statistics, weights)
        names = [n for n in plan.closed if n not in floored]
        held = {**start, **{n: solved[n] for n in floored}}
        climbed = {**held, **gradient_m_step(problem, held, weights, 150, names=names)}
        reached = float(expected_log_joint(problem, solved, weights))
        assert reached == pytest.approx(float(expected_log_joint(problem, climbed, weights)), rel=1e-9)
        assert reached >= float(expected_log_joint(problem, start, weights))


# EM's pace is that of the information the latents lack: these take thousands of steps to arrive.
SLOW = (
    "markov",
    "global_site",
    "symmetric_table",
    "symmetric_by_sum",
    "location_and_scale_by_two_latents",
    "symmetric_rates",
    "triangular_locations",
    "factor_analysis",
    "random_effect_of_every_row",
    "product_of_two_loadings",
    "slope_in_a_factor",
)
# Five sequences do not bound this likelihood: it grows as the smallest direction of the noise shrinks, so nothing is fixed.
BOUNDED = {n: c for n, c in CASES.items() if n != "chain_with_a_full_noise_covariance"}


@pytest.mark.parametrize("case", BOUNDED.values(), ids=BOUNDED)
def test_gradient_of_log_evidence_vanishes_at_a_fixed_point_of_em(case: Case) -> None:
    """Slow models are first brought close by the gradient: EM has to stay where its own M-step puts it."""
    near: dict[str, Any] = {}
    with isolated(0, torch.float64), unvalidated():
        problem = problem_of(case)
        fit = functools.partial(lvmppl.fit, case.model, problem.data)
        if case.model.__name__ in SLOW:
            near["start_from"] = fit(algorithm="enumeration", max_steps=400, tolerance=1e-15)
        best = fit(algorithm="em", max_steps=10 if near else 350, tolerance=0 if near else 1e-15, **near)
        coordinates = Coordinates(problem.model.specs, problem.theta)

        def gradient(values: Any) -> torch.Tensor:
            free = {n: v.clamp(-30, 30).requires_grad_() for n, v in coordinates.unconstrain(values).items()}
            total = log_evidence(problem, coordinates.constrain(free))
            return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(free.values()))])

        start, end = gradient(problem.initial), gradient(best.parameters)
    assert float(end.norm()) < 1e-6 * float(start.norm())


def shifted_on_few_rows(x: Tensor, shifted: Tensor) -> None:
    weights = pyro.param("weights", torch.full((2,), 0.5, dtype=x.dtype), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0], dtype=x.dtype))
    shift = pyro.param("shift", torch.tensor(0.1, dtype=x.dtype))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z] + torch.where(shifted > 0, shift, 0.0), 1.0), obs=x)


def test_parameter_of_rows_between_the_probed_ones_equals_the_maximum_of_enumeration() -> None:
    size = 2 * PROBE_ROWS + 3
    shifted = torch.zeros(size, dtype=torch.float64)
    shifted[1:90:3] = 1
    shifted[probe_indices(size)] = 0
    x = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 5 * shifted
    data = {"x": x, "shifted": shifted}
    fit = lvmppl.fit(shifted_on_few_rows, data, algorithm="em", max_steps=60)
    assert {s.parameter: s.how for s in fit.m_step}["shift"] == "gradient"
    best = lvmppl.fit(shifted_on_few_rows, data, algorithm="enumeration")
    assert float(fit.parameters["shift"]) == pytest.approx(float(best.parameters["shift"]), abs=1e-2)
    assert float(best.parameters["shift"]) > 3
