"""Expectation maximisation: exact E-step, M-step on Q(θ, θ⁽ⁱ⁾) = E_{p(z|x;θ⁽ⁱ⁾)}[log p(x, z; θ)].

Parameters that a site of an exponential family looks up are solved in closed form (found by `m_step`, never declared);
the others take a few L-BFGS steps on the exact Q (generalized EM). Either way log p(x; θ⁽ⁱ⁺¹⁾) ≥ log p(x; θ⁽ⁱ⁾); a fall
beyond rounding ends the fit as `diverged`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lvmppl.algorithms.ascent import Stopping, Trajectory, best_of, detached, run_restarts
from lvmppl.algorithms.batched_step import BatchedStep
from lvmppl.algorithms.closed_form import Solution, start_above_floors
from lvmppl.algorithms.compilation import not_compiled
from lvmppl.algorithms.evidence import exact_posterior, require_exact
from lvmppl.algorithms.expected import Weights, e_step, gradient_m_step
from lvmppl.algorithms.m_step import plan_m_step, solve_closed, verified
from lvmppl.algorithms.outcome import finish
from lvmppl.algorithms.plan import Plan, working_dtype
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.remarks import remarks
from lvmppl.algorithms.rounding import RELATIVE, rounding
from lvmppl.algorithms.squarem import Expected, Squarem
from lvmppl.algorithms.start import start_together, start_values
from lvmppl.algorithms.stationarity import are_looked_up
from lvmppl.algorithms.statistics import Statistics
from lvmppl.algorithms.tabulated import Tabulated
from lvmppl.algorithms.tabulation import tabulate
from lvmppl.algorithms.uncertainty import with_standard_errors
from lvmppl.density import Values, unvalidated
from lvmppl.fitted import Fit
from lvmppl.options import EMOptions
from lvmppl.wording import listed

_ELSEWHERE = "the model computes something else at the θ it came to than where it was probed"
_SAME = 1e-6  # relative difference of log evidences up to which two restarts found one optimum
_PATIENCE = 32  # steps with needless copies that cost about what a step of another size costs to record


def infer(problem: Problem, options: EMOptions) -> Fit:
    """Fit θ by EM, the best restart kept; all restarts at once where every parameter has a closed form.

    Raises:
        IntractableError: the posterior of a latent site is not to be had exactly.
    """
    require_exact(problem, "em")
    with unvalidated():
        run = _Run(problem, options, plan_m_step(problem))
        done = run.together() if options.restarts > 1 and options.acceleration == "none" else None
        if done is None:
            done = run_restarts(problem, options.restarts, options.max_steps, run.restart)
        best = _best_of(done)
        notes = [best.message, _higher(done, best), *remarks(run.plan, best.values)]
        best.message = "; ".join(dict.fromkeys(note for note in notes if note))
    fit = replace(finish(problem, options, done, best), m_step=run.plan.steps, compiled=run.compiled)
    return with_standard_errors(fit, problem) if options.standard_errors else fit


class _Run:
    """All restarts of a fit: what one restart learns about the plan holds for the next."""

    def __init__(self, problem: Problem, options: EMOptions, plan: Plan) -> None:
        self.problem, self.options, self.plan = problem, options, plan
        found = tabulate(problem, plan) if options.compile != "never" else "compile: never"
        self.tables = found if isinstance(found, Tabulated) else None
        self.why = found if isinstance(found, str) else ""  # there are none
        if self.tables is None:
            self._without_tables(self.why)
        # By how much the log evidence may fall because it is an approximation: twice the quadrature's error.
        error = exact_posterior(problem, problem.initial).log_evidence_error if problem.integrates else 0.0
        self.slack = 2 * error if math.isfinite(error) else 0.0

    def _e_step(self, values: Mapping[str, Tensor]) -> Expected:
        """From tables where the whole model is in them, else by running the model."""
        if self.tables is not None:
            total, statistics = self.tables.e_step({n: v.unsqueeze(0) for n, v in values.items()})
            return float(total), [], statistics
        return e_step(self.problem, values, self.plan.sites, keep_weights=self.plan.needs_weights)

    def _without_tables(self, why: str) -> None:
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
            with contextlib.suppress(_NotTheModel):
                return self._restart(number)
            self._without_tables(_ELSEWHERE)

    def together(self) -> list[Trajectory] | None:
        """All restarts in one tensor program; None where the model is not in tables, or turns out not to be, or
        its M-step takes rounds, each restart its own number."""
        if self.tables is None or self.plan.cycles > 1:
            return None
        with contextlib.suppress(_NotTheModel):
            done = _Batch(self, self.tables).run()
            return done if self._is_verified(_best_of(done).values) else None
        self._without_tables(_ELSEWHERE)
        return None

    def _restart(self, number: int) -> Trajectory:
        trajectory = Trajectory(number, self.problem.objective_kind)
        values = start_values(self.problem, self.options.init, number, self.options.restarts, self.plan)
        values, raised = self._above_floors(values)
        _note_floor(trajectory, raised)
        stopping = Stopping(self.options.tolerance)
        squarem = Squarem(self.problem, lambda farther: self._above_floors(farther)[0])
        expected: Expected | None = None
        for step in range(self.options.max_steps + 1):
            self._check_tables(step, values)
            objective, weights, statistics = expected or self._e_step(values)
            expected = None
            while self._falls(trajectory, objective, values) and not self._still_holds(trajectory.values):
                objective, weights, statistics = self._e_step(trajectory.values)
                values = self._m_step(trajectory, trajectory.values, weights, statistics)
                objective, weights, statistics = self._e_step(values)
            trajectory.record(step, objective)
            self.problem.progress.update(step, objective)
            if self._falls(trajectory, objective, values):
                return self._diverged(trajectory, values, objective)
            if objective > trajectory.objective or not trajectory.values:
                trajectory.objective, trajectory.values = objective, detached(values)
            stopped = stopping.met(objective)
            if (
                (stopped or step == self.options.max_steps)
                and self._still_holds(trajectory.values)
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
        return _picked(solution.values, 0), solution.floored()

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
        _note_floor(trajectory, floored)
        return new

    def _falls(
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

    def _diverged(self, trajectory: Trajectory, values: Mapping[str, Tensor], objective: float) -> Trajectory:
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
        found = (n for n, own in alone.items() if self._falls(trajectory, self._e_step(own)[0], own))
        return tuple(found) or updated

    def _check_tables(self, step: int, values: Mapping[str, Tensor]) -> None:
        """That the model still computes what the tables hold: at the start, at steps 4, 16, 64, … (a run of the model
        costs more than a small step), and wherever a fit ends."""
        if self.tables is None or step == 1 or step & (step - 1) or (step and not step.bit_length() % 2):
            return
        if not are_looked_up(self.problem, self.tables.sites, values):
            raise _NotTheModel

    def _still_holds(self, values: Mapping[str, Tensor]) -> bool:
        """Verify the plan where the fit ends; a parameter that fails goes to the gradient and the fit goes on."""
        if not values:
            return True
        self._check_tables(0, values)
        return self._is_verified(values)

    def _is_verified(self, values: Mapping[str, Tensor]) -> bool:
        checked = verified(self.problem, self.plan, values)
        same = checked.steps == self.plan.steps
        if not same:
            self.plan = checked
            self._without_tables(
                f"M-steps by gradient of {listed(checked.by_gradient)} from where the fit came to"
            )
        return same


class _Batch:
    """Restarts that step together: R leads every tensor, and those that stop leave it.

    Each has its own history, stopping and status, the same as alone up to rounding.
    """

    def __init__(self, run: _Run, tables: Tabulated) -> None:
        self.run_one, self.tables = run, tables
        self.step = BatchedStep(run.problem, run.plan, tables, run.options.compile == "always")
        self.problem, self.options = run.problem, run.options
        self.done = [Trajectory(r, run.problem.objective_kind) for r in range(self.options.restarts)]
        self.stopping = [Stopping(self.options.tolerance) for _ in self.done]
        self.best: list[tuple[Mapping[str, Tensor], int]] = [({}, 0) for _ in self.done]
        self.active = list(range(len(self.done)))
        self.ends: list[float] = []  # log evidence of the optima at which the tables were looked at
        self.few_for = 0  # steps during which three in four places were held by copies

    def run(self) -> list[Trajectory]:
        options, progress = self.options, self.problem.progress
        progress.start(self.problem.name, 0, options.max_steps)
        values: Mapping[str, Tensor] = start_together(
            self.problem, options.init, options.restarts, self.run_one.plan, self.tables
        )
        plan = self.run_one.plan
        raised = start_above_floors(plan.sites, self.problem.model.specs, plan.closed, values)
        values = raised.values
        for restart, trajectory in enumerate(self.done):
            _note_floor(trajectory, raised.floored(restart))
        for step in range(options.max_steps + 1):
            self.run_one._check_tables(step, _picked(values, 0))
            advanced = self.step(values)
            keep = self._judge(step, values, advanced.objectives)
            progress.update(step, max(t.objective for t in self.done))
            if not keep or step == options.max_steps:
                break
            values = self._kept(keep, advanced.solution)
        for restart in self.active:
            self._leave(restart)
        progress.finish(_best_of(self.done).status)
        return self.done

    def _judge(self, step: int, values: Mapping[str, Tensor], objectives: list[float]) -> list[int]:
        """Record the step of every active restart; positions of those that go on."""
        keep = []
        for position, restart in enumerate(self.active):
            trajectory, objective = self.done[restart], objectives[position]
            trajectory.record(step, objective)
            if self._falls(trajectory, objective, values, position):
                self._leave(restart)
                if trajectory.values and not self.run_one._still_holds(trajectory.values):
                    raise _NotTheModel
                self.run_one._diverged(trajectory, _picked(values, position), objective)
                continue
            if not trajectory.values or objective > trajectory.objective:
                trajectory.values = trajectory.values or _picked(values, position)
                trajectory.objective, self.best[restart] = objective, (values, position)
            if self.stopping[restart].met(objective):
                trajectory.status = "converged"
                self._leave(restart)
                continue
            keep.append(position)
        return keep

    def _falls(
        self, trajectory: Trajectory, objective: float, values: Mapping[str, Tensor], position: int
    ) -> bool:
        if (
            trajectory.values and trajectory.objective <= objective < math.inf
        ):  # as nearly always: nothing to look up
            return False
        best = _picked(*self.best[trajectory.restart])
        return self.run_one._falls(trajectory, objective, _picked(values, position), best)

    def _leave(self, restart: int) -> None:
        """A restart is over: its best iterate, at which the model must still be what the tables say.

        Looked at once for every optimum: restarts that end at the same log evidence are taken to end at the same one.
        """
        values, position = self.best[restart]
        trajectory = self.done[restart]
        if trajectory.values:
            trajectory.values = detached(_picked(values, position))
            if not any(math.isclose(trajectory.objective, end, rel_tol=_SAME) for end in self.ends):
                self.run_one._check_tables(0, trajectory.values)
                self.ends.append(trajectory.objective)

    def _kept(self, keep: list[int], solution: Solution) -> Mapping[str, Tensor]:
        """θ of the restarts that go on. Where their number is costly to change, copies of one hold the places of those
        that left, until three in four have been gone for as many steps as a change costs."""
        held = any(bool(h.any()) for h in solution.held.values())
        if held or any(self.done[restart].at_floor for restart in self.active):
            for position in keep:
                _note_floor(self.done[self.active[position]], solution.floored(position))
        places = len(next(iter(solution.values.values())))
        wanted = len(keep)
        if self.step.is_recorded(places):
            self.few_for = self.few_for + 1 if 4 * len(keep) <= places else 0
            wanted = places if self.few_for < _PATIENCE else len(keep)
        if len(keep) == len(self.active) and wanted == places:
            return solution.values
        if wanted < places:
            self.few_for = 0
        self.active = [self.active[i] for i in keep]
        index = torch.tensor(keep + keep[:1] * (wanted - len(keep)))
        return {n: v.index_select(0, index) for n, v in solution.values.items()}


def _best_of(done: Sequence[Trajectory]) -> Trajectory:
    """The restart with the highest log evidence; one that ends at a floor only where all do.

    Without the floor the likelihood would rise for ever there, so its height says how low the floor is, not how good the
    fit (McLachlan & Peel 2000 choose among the maxima in the interior likewise).
    """
    return best_of([t for t in done if not t.at_floor and t.status != "diverged"] or done)


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


def _note_floor(trajectory: Trajectory, floored: Collection[str]) -> None:
    trajectory.at_floor = bool(floored)
    if floored:
        trajectory.message = f"the variance in {', '.join(sorted(floored))} is held at its floor"


def _picked(values: Mapping[str, Tensor], restart: int) -> dict[str, Tensor]:
    """The parameters of one restart."""
    return {n: v[restart] for n, v in values.items()}


class _NotTheModel(Exception):
    """The model computes something else at these parameters than what was looked up at the probe's."""
