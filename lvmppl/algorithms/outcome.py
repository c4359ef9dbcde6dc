"""From the best trajectory to a `Fit`: its exact log evidence, its ELBO, both posteriors, everything detached."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvmppl.algorithms.ascent import Trajectory
from lvmppl.algorithms.evidence import exact_posterior
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.stepper import StepSeeds
from lvmppl.continuous_posteriors import ContinuousPosterior
from lvmppl.density import Values
from lvmppl.elbo import MOVES, elbo
from lvmppl.errors import IntractableError, ModelError
from lvmppl.exact.evaluation import ImproperPosterior
from lvmppl.fitted import Fit, history_frame
from lvmppl.options import Options
from lvmppl.posteriors import Posterior

ELBO_DRAWS = 200  # draws of the guide for the reported ELBO and its standard error, where sites are drawn


@dataclass(frozen=True)
class Score:
    """The reported numbers at given θ and λ."""

    posterior: Posterior | ContinuousPosterior | None
    log_evidence: float
    kind: str
    log_evidence_error: float
    elbo: float
    elbo_error: float
    elbo_per_datum: Tensor | None
    variational: Posterior | None
    moments: Mapping[str, Tensor]


def finish(problem: Problem, options: Options, trajectories: Sequence[Trajectory], best: Trajectory) -> Fit:
    """The Fit of the best trajectory."""
    started = time.perf_counter()
    score = evaluate(problem, best.values)
    history = history_frame([row for t in trajectories for row in t.rows])
    seconds = sum(t.rows[-1]["seconds"] for t in trajectories if t.rows) + time.perf_counter() - started
    return Fit(
        algorithm=options.algorithm,
        status=best.status,
        message=best.message,
        steps=best.steps,
        seconds=seconds,
        parameters={n: best.values[n].detach().clone() for n in problem.theta},
        guide_parameters={n: best.values[n].detach().clone() for n in problem.lambda_},
        all_history=history,
        restart=best.restart,
        guide=problem.guide_name,
        log_evidence=score.log_evidence,
        log_evidence_kind=score.kind,
        log_evidence_error=score.log_evidence_error,
        elbo=score.elbo,
        elbo_error=score.elbo_error,
        elbo_per_datum=score.elbo_per_datum,
        posterior=score.posterior,
        variational=score.variational,
        moments=score.moments,
    )


def evaluate(problem: Problem, values: Values) -> Score:
    """The exact posterior and log evidence where there is an engine for them; ELBO and q where there is a guide."""
    posterior = None
    try:
        posterior = exact_posterior(problem, values)
    except (IntractableError, ImproperPosterior, ModelError):
        if problem.guided is None:
            raise
    exact = (math.nan, "none", math.nan)
    if posterior is not None:
        exact = (posterior.log_evidence, posterior.kind, posterior.log_evidence_error)
    if problem.guided is None:
        return Score(posterior, *exact, math.nan, math.nan, None, None, {})
    bound, error, per_datum, variational, moments = _bound(problem, values)
    return Score(posterior, *exact, bound, error, per_datum, variational, moments)


def _bound(
    problem: Problem, values: Values
) -> tuple[float, float, Tensor | None, Posterior | None, dict[str, Tensor]]:
    """(ELBO, its standard error, ELBO per datum, q over enumerated sites, mean and sd of drawn sites)."""
    assert problem.guided is not None
    data, rows = problem.rows()
    totals: list[float] = []
    seeds = StepSeeds(problem, -1)
    per_datum: Tensor | None = None
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    with torch.no_grad():
        for draw in range(ELBO_DRAWS):
            seeds.use(draw)
            evaluation = problem.guided.evaluate(data, values, rows)
            bound = elbo(evaluation, problem.data_plate)
            totals.append(float(bound.total))
            if bound.per_datum is not None:
                per_datum = bound.per_datum if per_datum is None else per_datum + bound.per_datum
            for name, value in evaluation.samples.items():
                if name not in problem.model.structure.sites:
                    continue
                first[name] = first.get(name, torch.zeros_like(value)) + value
                second[name] = second.get(name, torch.zeros_like(value)) + value.square()
            if not evaluation.samples:
                break
    draws = len(totals)
    mean = math.fsum(totals) / draws
    error = math.nan if draws == 1 else math.sqrt(sum((t - mean) ** 2 for t in totals) / (draws - 1) / draws)
    names = evaluation.guide_variables
    variational = None
    if names:
        own = tuple(f for f in evaluation.guide_factors if f.site.removesuffix(MOVES) in names)
        variables = {n: v for n, v in evaluation.variables.items() if n in names}
        variational = Posterior(own, variables, evaluation.plate_sizes, problem.data_plate, "the guide")
    moments = {}
    for name, total in first.items():
        centre = total / draws
        spread = (second[name] / draws - centre.square()).clamp_min(0).sqrt()
        moments[name] = torch.stack([centre, spread])
    per_datum = None if per_datum is None else per_datum / draws
    return mean, 0.0 if draws == 1 else error, per_datum, variational, moments
