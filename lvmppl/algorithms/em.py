"""Expectation maximisation: exact E-step, M-step on Q(θ, θ⁽ⁱ⁾) = E_{p(z|x;θ⁽ⁱ⁾)}[log p(x, z; θ)].

The M-step is by L-BFGS on the exact Q (generalized EM when it stops early). Either way
log p(x; θ⁽ⁱ⁺¹⁾) ≥ log p(x; θ⁽ⁱ⁾); a fall beyond rounding ends the fit as `diverged`.
"""

from __future__ import annotations

import math

from lvmppl.algorithms.ascent import Stopping, Trajectory, best_of, detached, run_restarts
from lvmppl.algorithms.expected import e_step, gradient_m_step
from lvmppl.algorithms.outcome import finish
from lvmppl.algorithms.problem import Problem, require_enumerated
from lvmppl.algorithms.start import start_values
from lvmppl.density import unvalidated
from lvmppl.fitted import Fit
from lvmppl.options import EMOptions

ROUNDING = 1e-9  # relative fall of the log evidence that rounding may cause


def infer(problem: Problem, options: EMOptions) -> Fit:
    """Fit θ by EM; restarts one after the other, the best kept.

    Raises:
        IntractableError: a latent site is not enumerated, so the E-step is not exact.
    """
    require_enumerated(problem, "em")
    with unvalidated():
        done = run_restarts(problem, options.restarts, options.max_steps, lambda r: _run(problem, options, r))
    return finish(problem, options, done, best_of(done))


def _run(problem: Problem, options: EMOptions, restart: int) -> Trajectory:
    trajectory = Trajectory(restart, "log_evidence")
    values = start_values(problem, options.init, restart, options.restarts)
    stopping = Stopping(options.tolerance)
    for step in range(options.max_steps + 1):
        objective, weights = e_step(problem, values)
        trajectory.record(step, objective)
        problem.progress.update(step, objective)
        if not math.isfinite(objective) or objective < trajectory.objective - ROUNDING * abs(trajectory.objective):
            trajectory.status = "diverged"
            trajectory.message = f"log evidence went from {trajectory.objective:.6f} to {objective:.6f} at step {step}"
            trajectory.values = trajectory.values or detached(values)
            return trajectory
        if objective > trajectory.objective or not trajectory.values:
            trajectory.objective, trajectory.values = objective, detached(values)
        if stopping.met(objective):
            trajectory.status = "converged"
            return trajectory
        if step < options.max_steps:
            values = {**values, **gradient_m_step(problem, values, weights, options.m_steps, options.tolerance)}
    return trajectory
