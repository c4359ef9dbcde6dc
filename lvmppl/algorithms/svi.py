"""Stochastic variational inference: θ and λ move together up the ELBO (Kim, Wiseman & Rush 2018, §4.2).

The rate decays linearly to zero over `max_steps`. Where the objective is an estimate (minibatches, drawn sites) the
mean of the last quarter's iterates is returned, else the best iterate.
"""

from __future__ import annotations

import math

from lvmppl.algorithms.ascent import TAIL, Stopping, Trajectory
from lvmppl.algorithms.outcome import finish
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.start import start_values
from lvmppl.algorithms.stepper import Batches, Stepper, StepSeeds, batch_elbo, draws
from lvmppl.density import unvalidated
from lvmppl.fitted import Fit
from lvmppl.options import SVIOptions

WINDOW = 50  # steps over which a noisy objective is averaged before the stopping rule looks at it


def infer(problem: Problem, options: SVIOptions) -> Fit:
    """Maximise the ELBO over θ and λ jointly, on minibatches if `batch_size` says so."""
    assert problem.guided is not None
    with unvalidated():
        problem.progress.start(problem.name, 0, options.max_steps)
        trajectory = ascend(problem, options)
        problem.progress.finish(trajectory.status)
    return finish(problem, options, [trajectory], trajectory)


def ascend(problem: Problem, options: SVIOptions) -> Trajectory:
    """The steps of one fit."""
    trajectory, seeds = Trajectory(0, "elbo"), StepSeeds(problem, 0)
    batches = Batches(problem, options.batch_size, 0)
    start = start_values(problem, options.init, 0, 1)
    names = (*problem.free_theta, *problem.free_lambda)
    stepper = Stepper(
        problem, start, names, options.optimizer, options.rate, options.clip_norm, batches.size is not None
    )
    noisy = batches.size is not None or draws(problem)
    stopping, recent = Stopping(options.tolerance), 0.0
    tail = int((1 - TAIL) * options.max_steps)
    assert problem.guided is not None
    for step in range(options.max_steps + 1):
        seeds.use(step)
        indices = batches.next()
        values, rows = stepper.values(indices)
        value = batch_elbo(problem, problem.guided, values, indices, options.num_particles)
        objective = float(value.detach())
        trajectory.record(step, objective)
        problem.progress.update(step, objective)
        if not math.isfinite(objective):
            trajectory.status = "diverged"
            trajectory.message = f"the ELBO became {objective} at step {step}"
            trajectory.values = trajectory.values or dict(start)
            return trajectory
        if not noisy and (objective > trajectory.objective or not trajectory.values):
            trajectory.objective, trajectory.values = objective, stepper.full_values()
        recent += objective
        if not noisy and stopping.met(objective):
            trajectory.status = "converged"
            return trajectory
        if noisy and (step + 1) % WINDOW == 0:
            mean, recent = recent / WINDOW, 0.0
            if stopping.met(mean):
                trajectory.status = "converged"
                break
        if step == options.max_steps:
            break
        if noisy and step == tail:
            stepper.average.begin(stepper.leaves)
        stepper.update(value, rows, indices, 1 - step / options.max_steps)
        stepper.average.after_step(stepper.leaves)
    if noisy:
        trajectory.values, trajectory.objective = stepper.averaged_values(), objective
    return trajectory
