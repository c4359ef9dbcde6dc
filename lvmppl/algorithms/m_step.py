"""Which parameters an M-step solves in closed form, which by gradient, and why: proposed by probing, then verified.

A proposal (`probing`) is turned into a plan by rules about conflicts; the plan is then tried on a part of the data: after
one M-step the gradient of Q(θ) = Σ_s ⟨q_s, f_s(θ)⟩, by automatic differentiation of the model itself in unconstrained
coordinates, must vanish for every parameter that was solved. What fails goes to the gradient M-step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lvmppl.algorithms.closed_form import Solution, solve
from lvmppl.algorithms.evidence import chunks
from lvmppl.algorithms.expected import Weights, residual_statistics
from lvmppl.algorithms.least_squares import solve_affine
from lvmppl.algorithms.lookups_by_row import over_all_rows
from lvmppl.algorithms.plan import Plan
from lvmppl.algorithms.probing import (
    PROBE_ROWS,
    depends_on,
    held,
    probe_indices,
    probe_rows,
    propose,
)
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.rules import Rules, step_of
from lvmppl.algorithms.statistics import Statistics
from lvmppl.density import Values, unvalidated
from lvmppl.fitted import MStep

CYCLES = 200  # rounds of conditional maximisation, which stop when nothing moves any more


def plan_m_step(problem: Problem) -> Plan:
    """Propose, then verify on a part of the data at the start values."""
    plan = _seen_by_all_rows(problem, _proposed(problem))
    return verified(problem, plan, problem.initial)


def _seen_by_all_rows(problem: Problem, plan: Plan) -> Plan:
    """The plan less what rows beyond the probed ones contradict: parameters that enter there, lookups that are others."""
    from lvmppl.algorithms.stationarity import misread_sites

    if probe_rows(problem)[1].size == problem.num_rows:
        return plan
    if not problem.integrates:
        misread = misread_sites(problem, plan.sites, problem.initial)
        lookups = (f for s in plan.sites if s.name in misread for f in s.lookups.values())
        plan = plan.demote(
            {n for f in lookups for n in f.names}, "is used otherwise in rows that were not probed"
        )
    unseen = {s.parameter for s in plan.steps if s.how == "fixed"} - set(problem.frozen)
    if not unseen:
        return plan
    found: set[str] = set()
    for data, rows in chunks(problem):
        leaves = {n: v.detach().clone().requires_grad_(n in unseen) for n, v in problem.initial.items()}
        with torch.enable_grad():
            factors = problem.model.evaluate(data, leaves, rows).factors
            found |= depends_on((f.log_prob for f in factors), {n: leaves[n] for n in unseen - found})
        if found == unseen:
            break
    return plan.demote(sorted(found), "enters rows that were not probed")


def describe_m_step(problem: Problem) -> list[tuple[str, str, str]]:
    """(parameter, `closed-form` | `gradient` | `fixed`, why) for every parameter of the model."""
    with unvalidated():
        return [tuple(step) for step in plan_m_step(problem).steps]  # type: ignore[misc]


def _proposed(problem: Problem) -> Plan:
    probed, other = held(problem)
    try:
        proposal = propose(probed, other)
    except Exception as error:  # the model may refuse values it was never meant to see
        why = f"the model does not run at probe values ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        return Plan((), tuple(step_of(problem, n, "gradient", why) for n in problem.theta))
    return Rules(problem, probed, over_all_rows(problem, proposal)).plan()


# ------------------------------------------------------------------------------------------------- carrying it out


def solve_closed(
    problem: Problem,
    plan: Plan,
    values: Values,
    statistics: Mapping[str, Statistics],
    weights: Weights | None = None,
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """θ with the closed-form parameters at their maximum, and the names of those that a floor holds.

    Where a location's maximum depends on its spread (under a prior, say) they are solved in turn, each exactly given the
    other, until neither moves: conditional maximisation (Meng & Rubin 1993), under which Q never falls.

    weights: of the E-step, wanted where the plan `needs_weights`.
    """
    if not plan.closed:
        return dict(values), frozenset()
    affine, residual = plan.affine, [s for s in plan.sites if s.residual]
    solved = set(plan.closed) - set(affine.names if affine else ())

    def between(led: dict[str, Tensor]) -> tuple[dict[str, Tensor], Mapping[str, Statistics]]:
        assert weights is not None, (
            "least squares and squares about computed locations need the E-step's weights"
        )
        now = {n: v.squeeze(0) for n, v in led.items()}
        now = now if affine is None else solve_affine(problem, affine, now, weights)
        own = residual_statistics(problem, now, weights, residual) if residual else {}
        return {n: v.unsqueeze(0) for n, v in now.items()}, own

    led = {n: v.unsqueeze(0) for n, v in values.items()}
    hook = between if affine is not None or residual else None
    for cycle in range(plan.cycles):
        done: Solution = solve(plan.sites, problem.model.specs, solved, led, statistics, plan.priors, hook)
        if cycle + 1 == plan.cycles or _settled(led, done.values):
            break
        led = done.values
    return {n: v.squeeze(0) for n, v in done.values.items()}, done.floored()


def _settled(before: Values, after: Values) -> bool:
    """Whether no parameter has moved by more than ε^(7/10) of its largest entry (1e-11 in float64)."""
    for name, new in after.items():
        old = before[name]
        move = torch.where(new == old, 0.0, (new - old).abs())
        if float(move.max()) > torch.finfo(new.dtype).eps ** 0.7 * float(new.abs().max()):
            return False
    return True


# ---------------------------------------------------------------------------------------------------- verification


def verified(problem: Problem, plan: Plan, values: Values) -> Plan:
    """The plan less the parameters whose gradient of Q does not vanish after an M-step from `values`.

    One that vanishes after several rounds over locations and spreads is solved in such rounds.
    """
    from lvmppl.algorithms.stationarity import not_stationary

    data, _ = probe_rows(problem)
    rows = len(next(iter(data.values())))
    part = replace(problem, data=data) if rows < problem.num_rows else problem

    def wrong_ones(plan: Plan) -> dict[str, str]:
        own = plan if part is problem else plan.at_rows(probe_indices(problem.num_rows, rows))
        return not_stationary(part, own, values)

    for _ in range(len(problem.theta)):
        if not plan.closed:
            return plan
        wrong = wrong_ones(plan)
        if wrong and plan.cycles == 1:
            left = wrong_ones(replace(plan, cycles=CYCLES))
            if wrong.keys() - left.keys():
                plan, wrong = plan.in_turn(wrong.keys() - left.keys(), CYCLES), left
        if not wrong:
            return plan
        for name, why in wrong.items():
            plan = plan.demote([name], why)
    return plan


__all__ = ["PROBE_ROWS", "MStep", "Plan", "describe_m_step", "plan_m_step", "solve_closed", "verified"]
