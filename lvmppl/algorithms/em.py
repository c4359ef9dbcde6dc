"""Expectation maximisation: exact E-step, M-step on Q(θ, θ⁽ⁱ⁾) = E_{p(z|x;θ⁽ⁱ⁾)}[log p(x, z; θ)].

Parameters that a site of an exponential family looks up are solved in closed form (found by `m_step`, never declared);
the others take a few L-BFGS steps on the exact Q (generalized EM). Either way log p(x; θ⁽ⁱ⁺¹⁾) ≥ log p(x; θ⁽ⁱ⁾); a fall
beyond rounding ends the fit as `diverged`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from lvmppl.algorithms.ascent import Trajectory, best_of, run_restarts
from lvmppl.algorithms.em_run import ELSEWHERE, NotTheModel, Run
from lvmppl.algorithms.em_together import Together, best_restart
from lvmppl.algorithms.evidence import require_exact
from lvmppl.algorithms.m_step import plan_m_step
from lvmppl.algorithms.outcome import finish
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.remarks import remarks
from lvmppl.algorithms.uncertainty import with_standard_errors
from lvmppl.density import unvalidated
from lvmppl.fitted import Fit
from lvmppl.options import EMOptions


def infer(problem: Problem, options: EMOptions) -> Fit:
    """Fit θ by EM, the best restart kept; all restarts at once where every parameter has a closed form.

    Raises:
        IntractableError: the posterior of a latent site is not to be had exactly.
    """
    require_exact(problem, "em")
    with unvalidated():
        run = Run(problem, options, plan_m_step(problem))
        done = _together(run) if options.restarts > 1 and options.acceleration == "none" else None
        if done is None:
            done = run_restarts(problem, options.restarts, options.max_steps, run.restart)
        best = best_restart(done)
        notes = [best.message, _higher(done, best), *remarks(run.plan, best.values)]
        best.message = "; ".join(dict.fromkeys(note for note in notes if note))
    fit = replace(finish(problem, options, done, best), m_step=run.plan.steps, compiled=run.compiled)
    return with_standard_errors(fit, problem) if options.standard_errors else fit


def _together(run: Run) -> list[Trajectory] | None:
    """All restarts in one tensor program; None where the model is not in tables, or turns out not to be, or
    its M-step takes rounds, each restart its own number."""
    if run.tables is None or run.plan.cycles > 1:
        return None
    with contextlib.suppress(NotTheModel):
        done = Together(run, run.tables).run()
        return done if run.is_verified(best_restart(done).values) else None
    run.without_tables(ELSEWHERE)
    return None


def _higher(done: Sequence[Trajectory], best: Trajectory) -> str:
    """What there is to say of restarts that ended higher than the one that is kept."""
    passed = [t for t in done if t.at_floor and t.status != "diverged" and t.objective > best.objective]
    if best.at_floor or not passed:
        return ""
    top = best_of(passed)
    return (
        f"restart {top.restart} ended higher ({top.objective:.4f}) with a variance at its floor, where the likelihood has "
        "no maximum, and is not kept"
    )
