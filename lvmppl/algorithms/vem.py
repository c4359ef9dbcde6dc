"""Variational EM: coordinate ascent on the ELBO (Kim, Wiseman & Rush 2018, §4.1).

E: every λ⁽ⁿ⁾ up the ELBO with θ held, `e_steps` updates. M: θ up the ELBO with λ held, `m_steps` updates. Sites of q and
parameters with a closed form are set to their maximum (`closed_phases`), the others move by gradient. Where q holds the
posterior and both phases run to their maximum this is EM. A fit whose E-steps are all in closed form ends with one. A
round whose objective or gradient is not finite is undone and tried again at half the rate (`recovery`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lvmppl.algorithms.ascent import TAIL, Trajectory, best_of, rate_factor, run_restarts
from lvmppl.algorithms.closed_phases import ClosedPhases, closed_phases
from lvmppl.algorithms.early import Watch, check_line_search
from lvmppl.algorithms.objective import Objective
from lvmppl.algorithms.outcome import finish
from lvmppl.algorithms.plan import working_dtype
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.recovery import NotFinite, Recovery, first_bad_site
from lvmppl.algorithms.row_check import check_row_indices
from lvmppl.algorithms.start import start_values
from lvmppl.algorithms.stepper import Batches, Stepper, StepSeeds
from lvmppl.algorithms.surrogate import Estimate
from lvmppl.density import unvalidated, with_scales
from lvmppl.elbo import elbo, model_terms
from lvmppl.errors import ModelError
from lvmppl.fitted import Fit
from lvmppl.options import VEMOptions

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}  # relative fall of the ELBO that rounding may cause
WINDOW = 5  # rounds over which a noisy objective is averaged before the stopping rule looks at it


def infer(problem: Problem, options: VEMOptions) -> Fit:
    """Maximise the ELBO over λ and θ in turn."""
    assert problem.guided is not None
    with unvalidated():
        known = [closed_phases(problem, options)]

        def restart(number: int) -> Trajectory:
            trajectory, known[0] = ascend(known[0], options, number)
            return trajectory

        done = run_restarts(problem, options.restarts, options.max_steps, restart)
    closed = known[0]
    best = best_of(done)
    fit = finish(closed.problem, options, done, best)
    return replace(
        fit,
        e_step=closed.e.steps,
        m_step=closed.m.steps,
        compiled=closed.compiled,
        estimators=best.estimators(),
    )


class _Alternation:
    """The closed forms, and two steppers for the rest, each holding all other coordinates fixed."""

    def __init__(self, closed: ClosedPhases, options: VEMOptions, restart: int) -> None:
        problem = closed.problem
        assert problem.guided is not None
        self.closed = closed
        self.problem, self.options, self.restart, self.joint = problem, options, restart, problem.guided
        self.watch = Watch(problem, options, WINDOW)
        self.batches = Batches(problem, options.batch_size, restart, self.watch.training)
        scattered = closed.scattered(restart) if restart or options.init == "random" else {}
        start = dict(problem.initial)
        if problem.free_theta or not scattered:
            start = start_values(problem, options.init, restart, options.restarts, closed.m)
        start.update(scattered)
        self.start, self.seeds = start, StepSeeds(problem, restart)
        self.small = small = self.batches.size is not None
        if self.batches.size is not None:
            check_row_indices(problem, self.batches.size, start)
        self.bound = Objective(problem, options)
        self.noisy = small or self.bound.drawn
        enumerated = all(c.estimator == "enumeration" for c in self.bound.choices)
        self.enumerated = not self.noisy and self.bound.exact and enumerated
        check_line_search(problem, options, self.noisy)
        self.message = ""
        self._make_steppers(start)

    def _make_steppers(self, values: Mapping[str, Tensor]) -> None:
        """Steppers for what has no closed form."""
        problem, options = self.problem, self.options
        settings = (options.optimizer, options.rate, options.clip_norm, self.small)
        own = [n for n in problem.free_lambda if n not in self.closed.e.names]
        self.e_step = Stepper(problem, values, own, *settings)
        self.m_step = Stepper(
            problem, values, [n for n in problem.free_theta if n not in self.closed.m.closed], *settings
        )
        for stepper, other in self._pairs():  # a batch's rows of them are handed over instead
            for name in other.tables:
                stepper.fixed.pop(name, None)
        self.save()

    def _pairs(self) -> tuple[tuple[Stepper, Stepper], ...]:
        return (self.e_step, self.m_step), (self.m_step, self.e_step)

    def _at(self, stepper: Stepper, indices: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A stepper's values for a batch and its rows as leaves; the batch's rows of the other's tables stand still."""
        values, rows = stepper.values(indices)
        other = self.m_step if stepper is self.e_step else self.e_step
        return {**values, **other.rows_at(indices)}, rows

    def values(self) -> dict[str, Tensor]:
        own = self.e_step.full_values()
        return {**self.m_step.full_values(), **{n: own[n] for n in self.problem.lambda_}}

    def averaged_values(self) -> dict[str, Tensor]:
        own = self.e_step.averaged_values()
        return {**self.m_step.averaged_values(), **{n: own[n] for n in self.problem.lambda_}}

    def begin_average(self) -> None:
        for stepper in (self.e_step, self.m_step):
            stepper.average.begin(stepper.leaves)

    def count_iterate(self) -> None:
        for stepper in (self.e_step, self.m_step):
            stepper.average.after_step(stepper.leaves)

    def save(self) -> None:
        self.e_step.save()
        self.m_step.save()
        self.kept = dict(self.e_step.fixed), dict(self.m_step.fixed)

    def restore(self) -> None:
        self.e_step.restore()
        self.m_step.restore()
        self.e_step.fixed, self.m_step.fixed = dict(self.kept[0]), dict(self.kept[1])
        self.share()

    def share(self) -> None:
        """Each stepper sees where the other stands; rows of tables are handed over batch by batch (`_at`)."""
        own = self.e_step.full_values(tables=False)
        self.m_step.fixed.update({n: own[n] for n in self.problem.lambda_ if n in own})
        moved = self.m_step.full_values(tables=False)
        self.e_step.fixed.update({n: moved[n] for n in self.problem.theta if n in moved})

    def objective(self, step: int) -> Estimate:
        with torch.no_grad():
            indices = self.batches.next()
            values = self._at(self.m_step, indices)[0]  # where the other stepper stands, as `share` left it
            return self.bound(values, indices, step)

    def run(self, step: int, factor: float) -> None:
        """One E phase and one M phase."""
        self.close_lambda()
        if self.e_step.leaves:
            self._e_phase(step, factor)
            self.share()
        self._close_theta()
        if self.m_step.leaves:
            self._phase(self.m_step, self.options.m_steps, step, 1, factor)
            self.share()
            self._close_theta()

    def may_begin_at(self, objective: float) -> bool:
        """A bound of −∞ (q holds states that θ makes impossible) is no bad start of closed forms: they leave these out."""
        return objective == -math.inf and bool(self.closed.e.blocks) and not self.e_step.leaves

    def close_lambda(self) -> None:
        """The λ of closed forms at their maximum."""
        if self.closed.e.blocks:
            self.e_step.fixed.update(self.closed.e_phase(self.values()))
            self.share()

    def _close_theta(self) -> None:
        if not self.closed.m.closed:
            return
        solved, floored = self.closed.m_phase(self.values())
        self.m_step.fixed.update(solved)
        self.share()
        if floored:
            self.message = f"the variance in {', '.join(sorted(floored))} is held at its floor"

    def holds(self, objective: float, best: float) -> bool:
        """Whether the closed forms still are maxima after an objective that fell from `best`; if not, they are given up."""
        if not (self.closed.e.blocks or self.closed.m.closed) or self.noisy:
            return True
        rounding = ROUNDING.get(working_dtype(self.problem), 1e-5)
        if objective >= best - rounding * abs(best):
            return True
        self.restore()
        checked = self.closed.checked(self.values())
        if checked.m.steps == self.closed.m.steps:
            checked = self.closed.without_closed_forms(f"an update lowered the ELBO to {objective:.6f}")
        self._go_on_with(checked)
        return False

    def holds_points(self) -> bool:
        """Whether a closed form has not just led q to where its expectations are lost; if so it is given up before that."""
        why = self.closed.rounded_at(self.values()) if not self.noisy else ""
        if why:
            self.restore()
            self._go_on_with(self.closed.without_closed_forms(why))
        return not why

    def is_linear(self) -> bool:
        """Whether log p is linear in the statistics of the closed forms' sites where q ends; if not, they are given up."""
        why = self.closed.refusal_at(self.values()) if not self.noisy else ""
        if why:
            self._go_on_with(self.closed.without_closed_forms(why))
        return not why

    def _go_on_with(self, checked: ClosedPhases) -> None:
        """Fewer closed forms from here on."""
        values = self.values()
        self.closed = checked
        if checked.problem is not self.problem:
            self._draw_again(checked.problem)
        self._make_steppers(values)
        if self.noisy:
            self.begin_average()

    def _draw_again(self, problem: Problem) -> None:
        """Without closed forms the continuous sites of q are drawn: their bound is an estimate."""
        assert problem.guided is not None
        self.problem, self.joint = problem, problem.guided
        self.bound = Objective(problem, self.options)
        self.noisy = self.small or self.bound.drawn
        enumerated = all(c.estimator == "enumeration" for c in self.bound.choices)
        self.enumerated = not self.noisy and self.bound.exact and enumerated

    def _e_phase(self, step: int, factor: float) -> None:
        if not self.enumerated:
            self._phase(self.e_step, self.options.e_steps, step, 0, factor)
            return
        # θ stands still and the guide's sites are enumerated: the model's factors do not move during the phase.
        indices = self.watch.training
        data, rows = self.problem.rows(indices)
        plate = self.problem.data_plate
        with torch.no_grad():
            first = self.joint.evaluate(data, self.e_step.values(None)[0], rows)
            terms = model_terms(first, plate)

        def objective() -> Tensor:
            own = self.joint.evaluate_guide(data, self.e_step.values(None)[0], rows)
            guide_factors = tuple(with_scales(own.guide_factors, first.factors))
            return elbo(replace(own, guide_factors=guide_factors), plate, terms).total

        for _ in range(self.options.e_steps):
            self.e_step.update(objective(), {}, indices, factor, objective)

    def _phase(self, stepper: Stepper, updates: int, step: int, phase: int, factor: float) -> None:
        for i in range(updates):
            self.seeds.use((2 * step + phase) * 1_000_000 + i)
            indices = self.batches.next()
            values, rows = self._at(stepper, indices)
            value = self.bound(values, indices, step).surrogate

            def again(at: Tensor | None = indices) -> Tensor:
                return self.bound(self._at(stepper, at)[0], at, step).surrogate

            stepper.update(value, rows, indices, factor, None if self.noisy else again)


def ascend(closed: ClosedPhases, options: VEMOptions, restart: int = 0) -> tuple[Trajectory, ClosedPhases]:
    """One restart: E and M phases in turn until the stopping rule is met; and the closed forms that held to its end."""
    state, recovery = _Alternation(closed, options, restart), Recovery()
    trajectory = Trajectory(restart, state.bound.kind, estimators=state.bound.report)
    tail = int((1 - TAIL) * options.max_steps)
    for step in range(options.max_steps + 1):
        state.seeds.use((2 * step) * 1_000_000 + 999_999)
        if state.noisy and (step == tail or state.watch.opens(step, tail)):
            state.begin_average()
        try:
            if _round(state, trajectory, recovery, step):
                break
        except (NotFinite, ModelError) as error:
            if isinstance(error, ModelError) and step == 0:
                raise
            if _failed(state, trajectory, recovery, step, error):
                break
    diverged = trajectory.status == "diverged"
    trajectory.message = recovery.ending if diverged else recovery.message or state.message
    if state.noisy:
        found = state.watch.best_values
        trajectory.values = state.averaged_values() if found is None else found
        trajectory.objective = trajectory.tail_mean()
    trajectory.estimators = state.bound.report
    trajectory.values = state.watch.completed(trajectory.values or dict(state.start))
    if not diverged and state.closed.e.blocks:
        trajectory.values = {**trajectory.values, **state.closed.e_phase(trajectory.values)}
    return trajectory, state.closed


def _round(state: _Alternation, trajectory: Trajectory, recovery: Recovery, step: int) -> bool:
    """Look at the objective, then one E and one M phase; True when the fit is over."""
    estimate = state.objective(step)
    objective = float(estimate.bound)
    if not math.isfinite(objective) and trajectory.values and not state.holds_points():
        estimate = state.objective(step)
        objective = float(estimate.bound)
    if not math.isfinite(objective) and not (step == 0 and state.may_begin_at(objective)):
        raise NotFinite("ELBO")
    recovery.fine()
    over = step == state.options.max_steps
    if (trajectory.values and not state.holds(objective, trajectory.objective)) or (
        over and not state.is_linear()
    ):
        estimate = state.objective(step)
        objective = float(estimate.bound)
    extra = state.bound.logged(step)
    if estimate.climbed is not None:
        extra["climbed"] = float(estimate.climbed)
    trajectory.record(step, objective, learning_rate=state.m_step.rate, **extra)
    state.problem.progress.update(step, objective)
    state.count_iterate()
    if not state.noisy and (objective > trajectory.objective or not trajectory.values):
        trajectory.objective, trajectory.values = objective, state.values()
    met = state.watch.met(step, objective, state.noisy, state)
    if met and state.bound.settled(step) and state.is_linear():
        trajectory.status = "converged"
        return True
    if over:
        return True
    state.save()
    state.run(step, rate_factor(state.options.rate_schedule, step / state.options.max_steps))
    return False


def _failed(
    state: _Alternation,
    trajectory: Trajectory,
    recovery: Recovery,
    step: int,
    error: NotFinite | ModelError,
) -> bool:
    """Undo the round, halve the rates and say so; True when the fit must end."""
    if isinstance(error, NotFinite):
        state.share()
        error = NotFinite(error.what, first_bad_site(state.problem, state.values(), None))
    if not trajectory.rows or trajectory.rows[-1]["step"] != step:
        trajectory.record(step, math.nan, learning_rate=state.m_step.rate)
        state.problem.progress.update(step, math.nan)
    state.restore()
    state.watch.forget()
    if not recovery.failed(step, error, state.m_step.rate):
        return False
    trajectory.status = "diverged"
    return True


__all__ = ["ascend", "infer"]
