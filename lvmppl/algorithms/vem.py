"""Variational EM: coordinate ascent on the ELBO (Kim, Wiseman & Rush 2018, §4.1).

E: every λ⁽ⁿ⁾ up the ELBO with θ held, `e_steps` updates. M: θ up the ELBO with λ held, `m_steps` updates. Where q holds
the posterior and both phases run to their maximum this is EM.
"""

from __future__ import annotations

import math

import torch

from lvmppl.algorithms.ascent import TAIL, Stopping, Trajectory, best_of, run_restarts
from lvmppl.algorithms.outcome import finish
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.start import start_values
from lvmppl.algorithms.stepper import Batches, Stepper, StepSeeds, batch_elbo, draws
from lvmppl.density import unvalidated
from lvmppl.elbo import elbo, model_terms
from lvmppl.fitted import Fit
from lvmppl.options import VEMOptions


def infer(problem: Problem, options: VEMOptions) -> Fit:
    """Maximise the ELBO over λ and θ in turn."""
    assert problem.guided is not None
    with unvalidated():
        done = run_restarts(
            problem, options.restarts, options.max_steps, lambda r: ascend(problem, options, r)
        )
    return finish(problem, options, done, best_of(done))


class _Alternation:
    """The two steppers, each holding the other's coordinates fixed."""

    def __init__(self, problem: Problem, options: VEMOptions, restart: int) -> None:
        assert problem.guided is not None
        self.problem, self.options, self.restart, self.joint = problem, options, restart, problem.guided
        self.batches = Batches(problem, options.batch_size, restart)
        start = start_values(problem, options.init, restart, options.restarts)
        small = self.batches.size is not None
        settings = (options.optimizer, options.rate, options.clip_norm, small)
        self.e_step = Stepper(problem, start, problem.free_lambda, *settings)
        self.m_step = Stepper(problem, start, problem.free_theta, *settings)
        self.noisy = small or draws(problem)
        self.start, self.seeds = start, StepSeeds(problem, restart)

    def values(self) -> dict[str, torch.Tensor]:
        return {
            **self.m_step.full_values(),
            **{n: self.e_step.full_values()[n] for n in self.problem.lambda_},
        }

    def averaged(self) -> dict[str, torch.Tensor]:
        own = self.e_step.averaged_values()
        return {**self.m_step.averaged_values(), **{n: own[n] for n in self.problem.lambda_}}

    def objective(self) -> float:
        with torch.no_grad():
            return float(
                batch_elbo(self.problem, self.joint, self.values(), None, self.options.num_particles)
            )

    def run(self, step: int, decay: float) -> None:
        """One E phase and one M phase."""
        self._e_phase(step, decay)
        self.m_step.fixed.update({n: self.e_step.full_values()[n] for n in self.problem.lambda_})
        if self.problem.free_theta:
            self._phase(self.m_step, self.options.m_steps, step, 1, decay)
        self.e_step.fixed.update({n: self.m_step.full_values()[n] for n in self.problem.theta})

    def _e_phase(self, step: int, decay: float) -> None:
        if not self.problem.free_lambda:
            return
        if self.noisy:
            self._phase(self.e_step, self.options.e_steps, step, 0, decay)
            return
        # θ stands still and the guide's sites are enumerated: the model's factors do not move during the phase.
        data, rows = self.problem.rows()
        plate = self.problem.data_plate
        with torch.no_grad():
            first = self.joint.evaluate(data, self.e_step.values(None)[0], rows)
            terms = model_terms(first, plate)
        for _ in range(self.options.e_steps):
            values, _rows = self.e_step.values(None)
            own = self.joint.evaluate_guide(data, values, rows)
            self.e_step.update(elbo(own, plate, terms).total, {}, None, decay)

    def _phase(self, stepper: Stepper, updates: int, step: int, phase: int, decay: float) -> None:
        for i in range(updates):
            self.seeds.use((2 * step + phase) * 1_000_000 + i)
            indices = self.batches.next()
            values, rows = stepper.values(indices)
            value = batch_elbo(self.problem, self.joint, values, indices, self.options.num_particles)
            stepper.update(value, rows, indices, decay)
            stepper.average.after_step(stepper.leaves)


def ascend(problem: Problem, options: VEMOptions, restart: int = 0) -> Trajectory:
    """One restart: E and M phases in turn until the stopping rule is met."""
    trajectory = Trajectory(restart, "elbo")
    state = _Alternation(problem, options, restart)
    stopping = Stopping(options.tolerance)
    tail = int((1 - TAIL) * options.max_steps)
    for step in range(options.max_steps + 1):
        state.seeds.use((2 * step) * 1_000_000 + 999_999)
        objective = state.objective()
        trajectory.record(step, objective)
        problem.progress.update(step, objective)
        if not math.isfinite(objective):
            trajectory.status, trajectory.message = "diverged", f"the ELBO became {objective} at step {step}"
            trajectory.values = trajectory.values or dict(state.start)
            return trajectory
        if not state.noisy and (objective > trajectory.objective or not trajectory.values):
            trajectory.objective, trajectory.values = objective, state.values()
        if stopping.met(objective):
            trajectory.status = "converged"
            break
        if step == options.max_steps:
            break
        if state.noisy and step == tail:
            state.e_step.average.begin(state.e_step.leaves)
            state.m_step.average.begin(state.m_step.leaves)
        state.run(step, 1 - step / options.max_steps)
    if state.noisy:
        trajectory.objective, trajectory.values = objective, state.averaged()
    return trajectory
