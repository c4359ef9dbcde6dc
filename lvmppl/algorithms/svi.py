"""Stochastic variational inference: θ and λ move together up the ELBO (Kim, Wiseman & Rush 2018, §4.2).

The rate decays to zero over `max_steps` unless `schedule` says otherwise. Where the objective is an estimate
(minibatches, drawn sites) the mean of the last quarter's iterates is returned, else the best iterate. A step whose
objective or gradient is not finite is undone and tried again at half the rate (`recovery`).
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from lvmppl.algorithms.ascent import TAIL, Trajectory, best_of, rate_factor, run_restarts
from lvmppl.algorithms.early import Watch, check_line_search
from lvmppl.algorithms.objective import Objective
from lvmppl.algorithms.outcome import finish
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.recovery import NotFinite, Recovery, first_bad_site
from lvmppl.algorithms.row_check import check_row_indices
from lvmppl.algorithms.start import start_values
from lvmppl.algorithms.stepper import Batches, Stepper, StepSeeds
from lvmppl.algorithms.surrogate import Estimate
from lvmppl.density import unvalidated
from lvmppl.errors import ModelError
from lvmppl.fitted import Fit
from lvmppl.options import SVIOptions


def infer(problem: Problem, options: SVIOptions) -> Fit:
    """Maximise the ELBO over θ and λ jointly, on minibatches if `batch_size` says so."""
    assert problem.guided is not None
    with unvalidated():
        done = run_restarts(
            problem, options.restarts, options.max_steps, lambda r: ascend(problem, options, r)
        )
    best = best_of(done)
    return replace(finish(problem, options, done, best), estimators=best.estimators())


def ascend(problem: Problem, options: SVIOptions, restart: int = 0) -> Trajectory:
    """The steps of one restart."""
    return _Ascent(problem, options, restart).run()


class _Ascent:
    """One run: the stepper, what watches it, and what undoes its failures."""

    def __init__(self, problem: Problem, options: SVIOptions, restart: int) -> None:
        assert problem.guided is not None
        self.problem, self.options, self.joint = problem, options, problem.guided
        self.objective = Objective(problem, options)
        self.trajectory = Trajectory(restart, self.objective.kind, estimators=self.objective.report)
        self.seeds = StepSeeds(problem, restart)
        self.watch = Watch(problem, options)
        self.batches = Batches(problem, options.batch_size, restart, self.watch.training)
        small = self.batches.size is not None
        self.noisy = small or self.objective.drawn
        check_line_search(problem, options, self.noisy)
        self.start = start_values(problem, options.init, restart, options.restarts)
        if self.batches.size is not None:
            check_row_indices(problem, self.batches.size, self.start)
        names = (*problem.free_theta, *problem.free_lambda)
        settings = (options.optimizer, options.rate, options.clip_norm, small)
        self.stepper = Stepper(problem, self.start, names, *settings)
        self.recovery = Recovery()

    def run(self) -> Trajectory:
        """Steps until the criterion is met, the steps run out, or three in a row have failed."""
        trajectory, options = self.trajectory, self.options
        tail = int((1 - TAIL) * options.max_steps)
        for step in range(options.max_steps + 1):
            self.seeds.use(step)
            indices = self.batches.next()
            if self.noisy and (step == tail or self.watch.opens(step, tail)):
                self.stepper.average.begin(self.stepper.leaves)
            try:
                stopped = self._step(step, indices)
            except (NotFinite, ModelError) as error:
                if isinstance(error, ModelError) and step == 0:
                    raise
                stopped = self._failed(step, error, indices)
            if stopped:
                break
        return self._ended(trajectory)

    def _step(self, step: int, indices: Tensor | None) -> bool:
        values, rows = self.stepper.values(indices)
        estimate = self.objective(values, indices, step)
        objective = float(estimate.bound)
        if not math.isfinite(objective):
            raise NotFinite("ELBO")
        self.recovery.fine()
        self._record(step, objective, estimate)
        self.stepper.average.after_step(self.stepper.leaves)
        trajectory = self.trajectory
        if not self.noisy and (objective > trajectory.objective or not trajectory.values):
            trajectory.objective, trajectory.values = objective, self.stepper.full_values()
        met = self.watch.met(step, objective, self.noisy, self.stepper)
        if met and self.objective.settled(step):
            trajectory.status = "converged"
            return True
        if step == self.options.max_steps:
            return True
        factor = rate_factor(self.options.rate_schedule, step / self.options.max_steps)
        self.stepper.save()

        def again() -> Tensor:
            return self.objective(self.stepper.values(indices)[0], indices, step).surrogate

        try:
            self.stepper.update(estimate.surrogate, rows, indices, factor, None if self.noisy else again)
        except NotFinite:
            self.stepper.unsave()  # this state is the bad one: go back to the one before
            raise
        return False

    def _record(self, step: int, objective: float, estimate: Estimate | None = None) -> None:
        extra = self.objective.logged(step)
        if estimate is not None and estimate.climbed is not None:
            extra["climbed"] = float(estimate.climbed)
        self.trajectory.record(step, objective, learning_rate=self.stepper.rate, **extra)
        self.problem.progress.update(step, objective)

    def _failed(self, step: int, error: NotFinite | ModelError, indices: Tensor | None) -> bool:
        if isinstance(error, NotFinite):
            self.seeds.use(step)
            error = NotFinite(error.what, first_bad_site(self.problem, self.stepper.values(None)[0], indices))
        if not self.trajectory.rows or self.trajectory.rows[-1]["step"] != step:
            self._record(step, math.nan)
        self.stepper.restore()
        self.watch.forget()
        if not self.recovery.failed(step, error, self.stepper.rate):
            return False
        self.trajectory.status = "diverged"
        return True

    def _ended(self, trajectory: Trajectory) -> Trajectory:
        diverged = trajectory.status == "diverged"
        trajectory.message = self.recovery.ending if diverged else self.recovery.message
        if self.noisy:
            found = self.watch.best_values
            trajectory.values = self.stepper.averaged_values() if found is None else found
            trajectory.objective = trajectory.tail_mean()
        trajectory.values = self.watch.completed(trajectory.values or dict(self.start))
        return trajectory


__all__ = ["ascend", "infer"]
