"""One restart of EM: E-step from tables or by running the model, M-step by the plan, and what is looked at on the way.

What is learnt about the plan holds for the restarts that follow.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping

from torch import Tensor

from lvmppl.algorithms.ascent import Stopping, Trajectory, detached
from lvmppl.algorithms.closed_form import start_above_floors
from lvmppl.algorithms.compilation import not_compiled
from lvmppl.algorithms.evidence import exact_posterior
from lvmppl.algorithms.expected import Weights, e_step, gradient_m_step
from lvmppl.algorithms.m_step import solve_closed, verified
from lvmppl.algorithms.plan import Plan, working_dtype
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.rounding import RELATIVE, rounding
from lvmppl.algorithms.squarem import Expected, Squarem
from lvmppl.algorithms.start import start_values
from lvmppl.algorithms.stationarity import are_looked_up
from lvmppl.algorithms.statistics import Statistics
from lvmppl.algorithms.tabulated import Tabulated
from lvmppl.algorithms.tabulation import tabulate
from lvmppl.density import Values
from lvmppl.options import EMOptions
from lvmppl.wording import listed

ELSEWHERE = "the model computes something else at the θ it came to than where it was probed"


class Run:
    """All restarts of a fit: what one restart learns about the plan holds for the next."""

    def __init__(self, problem: Problem, options: EMOptions, plan: Plan) -> None:
        self.problem, self.options, self.plan = problem, options, plan
        found = tabulate(problem, plan) if options.compile != "never" else "compile: never"
        self.tables = found if isinstance(found, Tabulated) else None
        self.why = found if isinstance(found, str) else ""  # there are none
        if self.tables is None:
            self.without_tables(self.why)
        # By how much the log evidence may fall because it is an approximation: twice the quadrature's error.
        error = exact_posterior(problem, problem.initial).log_evidence_error if problem.integrates else 0.0
        self.slack = 2 * error if math.isfinite(error) else 0.0

    def _e_step(self, values: Mapping[str, Tensor]) -> Expected:
        """From tables where the whole model is in them, else by running the model."""
        if self.tables is not None:
            total, statistics = self.tables.e_step({n: v.unsqueeze(0) for n, v in values.items()})
            return float(total), [], statistics
        return e_step(self.problem, values, self.plan.sites, keep_weights=self.plan.needs_weights)

    def without_tables(self, why: str) -> None:
        """From here on the model is run."""
        if self.options.compile == "always":
            raise not_compiled(self.problem, why)
        self.tables, self.why = None, why

    @property
    def compiled(self) -> str:
        return f"run the model ({self.why})" if self.tables is None else "are made from tables"

    def restart(self, number: int) -> Trajectory:
        """One restart; again from its start without the tables where they turn out not to be the model."""
        while True:
            with contextlib.suppress(NotTheModel):
                return self._restart(number)
            self.without_tables(ELSEWHERE)

    def _restart(self, number: int) -> Trajectory:
        trajectory = Trajectory(number, self.problem.objective_kind)
        values = start_values(self.problem, self.options.init, number, self.options.restarts, self.plan)
        values, raised = self._above_floors(values)
        note_floor(trajectory, raised)
        stopping = Stopping(self.options.tolerance)
        squarem = Squarem(self.problem, lambda farther: self._above_floors(farther)[0])
        expected: Expected | None = None
        for step in range(self.options.max_steps + 1):
            self.check_tables(step, values)
            objective, weights, statistics = expected or self._e_step(values)
            expected = None
            while self.falls(trajectory, objective, values) and not self.still_holds(trajectory.values):
                objective, weights, statistics = self._e_step(trajectory.values)
                values = self._m_step(trajectory, trajectory.values, weights, statistics)
                objective, weights, statistics = self._e_step(values)
            trajectory.record(step, objective)
            self.problem.progress.update(step, objective)
            if self.falls(trajectory, objective, values):
                return self.diverged(trajectory, values, objective)
            if objective > trajectory.objective or not trajectory.values:
                trajectory.objective, trajectory.values = objective, detached(values)
            stopped = stopping.met(objective)
            if (
                (stopped or step == self.options.max_steps)
                and self.still_holds(trajectory.values)
                and stopped
            ):
                trajectory.status = "converged"
                return trajectory
            if step < self.options.max_steps:
                if self.plan.needs_weights and not weights:  # the plan has just changed
                    objective, weights, statistics = self._e_step(values)
                before, values = values, self._m_step(trajectory, values, weights, statistics)
                if self.options.acceleration == "squarem":
                    values, expected = squarem.step(before, values, objective, self._e_step)
        return trajectory

    def _above_floors(self, values: Values) -> tuple[dict[str, Tensor], frozenset[str]]:
        """θ within the set over which M-steps maximise, and the spreads that were raised to their floor for it."""
        plan, led = self.plan, {n: v.unsqueeze(0) for n, v in values.items()}
        solution = start_above_floors(plan.sites, self.problem.model.specs, plan.closed, led)
        return picked(solution.values, 0), solution.floored()

    def _m_step(
        self,
        trajectory: Trajectory,
        values: Mapping[str, Tensor],
        weights: Weights,
        statistics: Mapping[str, Statistics],
    ) -> dict[str, Tensor]:
        """Closed forms, then gradient steps on the rest, then closed forms again: none lowers Q."""
        new, floored = solve_closed(self.problem, self.plan, values, statistics, weights)
        names = self.plan.by_gradient
        if names:
            options = self.options
            new = {
                **new,
                **gradient_m_step(self.problem, new, weights, options.m_steps, options.tolerance, names),
            }
            new, floored = solve_closed(self.problem, self.plan, new, statistics, weights)
        note_floor(trajectory, floored)
        return new

    def falls(
        self, trajectory: Trajectory, objective: float, values: Values, best: Values | None = None
    ) -> bool:
        """Whether the log evidence is lower than at the best θ so far, by more than rounding (or not a number).

        best: that θ, where the trajectory does not hold it itself.
        """
        before = trajectory.objective
        if not trajectory.values or not math.isfinite(objective):
            return not math.isfinite(objective)
        slack = self.slack + RELATIVE.get(working_dtype(self.problem), 1e-5) * abs(before)
        if objective >= before - slack:
            return False
        for at in (best or trajectory.values, values):
            slack += rounding(self.problem, self.plan, self.tables, at)
        return not objective >= before - slack

    def diverged(self, trajectory: Trajectory, values: Mapping[str, Tensor], objective: float) -> Trajectory:
        if not trajectory.values:
            trajectory.status, trajectory.values = "diverged", detached(values)
            trajectory.message = f"{self.problem.objective_name} is {objective} at the start"
            return trajectory
        step = len(trajectory.rows) - 1
        moved = ", ".join(self._lowering(trajectory, values)) or "no parameter"
        trajectory.status = "diverged"
        trajectory.message = (
            f"{self.problem.objective_name} went from {trajectory.objective:.6f} to {objective:.6f} "
            f"({objective - trajectory.objective:.1e}) at step {step}, which updated {moved}"
        )
        return trajectory

    def _lowering(self, trajectory: Trajectory, values: Mapping[str, Tensor]) -> tuple[str, ...]:
        """The updated parameters that lower the log evidence by their own update alone; all where no single one does."""
        updated = self.plan.closed + self.plan.by_gradient
        alone = {n: {**trajectory.values, n: values[n]} for n in updated}
        found = (n for n, own in alone.items() if self.falls(trajectory, self._e_step(own)[0], own))
        return tuple(found) or updated

    def check_tables(self, step: int, values: Mapping[str, Tensor]) -> None:
        """That the model still computes what the tables hold: at the start, at steps 4, 16, 64, … (a run of the model
        costs more than a small step), and wherever a fit ends."""
        if self.tables is None or step == 1 or step & (step - 1) or (step and not step.bit_length() % 2):
            return
        if not are_looked_up(self.problem, self.tables.sites, values):
            raise NotTheModel

    def still_holds(self, values: Mapping[str, Tensor]) -> bool:
        """Verify the plan where the fit ends; a parameter that fails goes to the gradient and the fit goes on."""
        if not values:
            return True
        self.check_tables(0, values)
        return self.is_verified(values)

    def is_verified(self, values: Mapping[str, Tensor]) -> bool:
        checked = verified(self.problem, self.plan, values)
        same = checked.steps == self.plan.steps
        if not same:
            self.plan = checked
            self.without_tables(
                f"M-steps by gradient of {listed(checked.by_gradient)} from where the fit came to"
            )
        return same


def note_floor(trajectory: Trajectory, floored: Collection[str]) -> None:
    trajectory.at_floor = bool(floored)
    if floored:
        trajectory.message = f"the variance in {', '.join(sorted(floored))} is held at its floor"


def picked(values: Mapping[str, Tensor], restart: int) -> dict[str, Tensor]:
    """The parameters of one restart."""
    return {n: v[restart] for n, v in values.items()}


class NotTheModel(Exception):
    """The model computes something else at these parameters than what was looked up at the probe's."""


__all__ = ["ELSEWHERE", "NotTheModel", "Run", "note_floor", "picked"]
