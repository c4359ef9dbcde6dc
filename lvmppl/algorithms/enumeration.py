"""Gradient ascent on the exact log evidence: θ⁽ⁱ⁺¹⁾ = θ⁽ⁱ⁾ + η ∇θ log p(x; θ⁽ⁱ⁾), by L-BFGS unless told otherwise.

∇θ log p(x; θ) = E_{p(z|x;θ)}[∇θ log p(x, z; θ)] comes out of automatic differentiation through the elimination.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lvmppl.algorithms.ascent import (
    Stopping,
    Trajectory,
    best_of,
    detached,
    make_optimizer,
    maximise_lbfgs,
    run_restarts,
    set_rate,
)
from lvmppl.algorithms.evidence import log_evidence, require_exact
from lvmppl.algorithms.outcome import finish
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.stalled import stalled_at_bounds
from lvmppl.algorithms.start import start_values
from lvmppl.algorithms.uncertainty import with_standard_errors
from lvmppl.density import Coordinates, unvalidated
from lvmppl.errors import IntractableError
from lvmppl.exact.evaluation import ImproperPosterior
from lvmppl.fitted import Fit
from lvmppl.options import EnumerationOptions


def infer(problem: Problem, options: EnumerationOptions) -> Fit:
    """Maximise Σₙ log p(x⁽ⁿ⁾; θ) over θ by its exact gradient.

    Raises:
        IntractableError: the posterior of a latent site is not to be had exactly.
    """
    require_exact(problem, "enumeration")
    with unvalidated():
        done = run_restarts(
            problem, options.restarts, options.max_steps, lambda r: _ascend(problem, options, r)
        )
        best = best_of(done)
        note = stalled_at_bounds(problem, best.values) if best.status == "converged" else ""
        best.message = "; ".join(m for m in (best.message, note) if m)
    fit = finish(problem, options, done, best)
    return with_standard_errors(fit, problem) if options.standard_errors else fit


def _ascend(problem: Problem, options: EnumerationOptions, restart: int) -> Trajectory:
    trajectory = Trajectory(restart, problem.objective_kind)
    start = start_values(problem, options.init, restart, options.restarts)
    coordinates = Coordinates(problem.model.specs, problem.free_theta)
    fixed = {n: start[n] for n in problem.theta if n not in problem.free_theta}
    stopping = Stopping(options.tolerance)

    def objective(unconstrained: Mapping[str, Tensor]) -> Tensor:
        try:
            return log_evidence(problem, {**fixed, **coordinates.constrain(unconstrained)})
        except (IntractableError, ImproperPosterior):
            # A line search may try θ so far out that rounding hides what an engine checks: no place to go to.
            if not trajectory.rows:
                raise
            return torch.tensor(-math.inf, dtype=next(iter(unconstrained.values())).dtype)

    def on_step(step: int, value: float, unconstrained: Mapping[str, Tensor]) -> bool:
        trajectory.record(step, value)
        problem.progress.update(step, value)
        if not math.isfinite(value):
            trajectory.status = "diverged"
            trajectory.message = (
                f"{problem.objective_name} became {value} at step {step}; the best before it is kept"
            )
            if not trajectory.values:
                trajectory.values = detached(start)
            return True
        if value > trajectory.objective or not trajectory.values:
            with torch.no_grad():
                trajectory.values = detached({**fixed, **coordinates.constrain(unconstrained)})
            trajectory.objective = value
        if stopping.met(value):
            trajectory.status = "converged"
            return True
        return False

    begin = coordinates.unconstrain(start)
    if options.optimizer == "lbfgs":
        rate = 1.0 if options.learning_rate is None else options.learning_rate
        maximise_lbfgs(objective, begin, options.max_steps, on_step, rate)
    else:
        _first_order(objective, begin, options, on_step)
    return trajectory


def _first_order(objective, begin, options: EnumerationOptions, on_step) -> None:  # type: ignore[no-untyped-def]
    leaves = {k: v.requires_grad_() for k, v in begin.items()}
    rate = 0.01 if options.learning_rate is None else options.learning_rate
    optimizer = make_optimizer(options.optimizer, list(leaves.values()), rate)
    for step in range(options.max_steps + 1):
        value = objective(leaves)
        if on_step(step, float(value.detach()), leaves) or step == options.max_steps:
            return
        set_rate(optimizer, rate * (1 - step / options.max_steps))
        optimizer.zero_grad()
        (-value).backward()
        if options.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(leaves.values()), options.clip_norm)
        optimizer.step()
