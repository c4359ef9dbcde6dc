"""From the best trajectory to a `Fit`: its exact log evidence, its ELBO, both posteriors, everything detached."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lvmppl.algorithms.ascent import Trajectory
from lvmppl.algorithms.evidence import deferred_posterior
from lvmppl.algorithms.points import point_message
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.reported import reported_bound
from lvmppl.continuous_posteriors import ContinuousPosterior
from lvmppl.density import Values
from lvmppl.errors import IntractableError, ModelError
from lvmppl.exact.evaluation import ImproperPosterior
from lvmppl.fitted import Fit, history_frame
from lvmppl.options import Options
from lvmppl.posteriors import Posterior


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
    unbounded = point_message(problem) if problem.guided else ""
    history = history_frame([row for t in trajectories for row in t.rows])
    seconds = _elapsed(trajectories) + time.perf_counter() - started
    return Fit(
        algorithm=options.algorithm,
        status=best.status,
        message="; ".join(m for m in (best.message, unbounded, options.unrecorded) if m),
        steps=best.steps,
        seconds=seconds,
        parameters={n: best.values[n].detach().clone() for n in problem.theta},
        guide_parameters={n: best.values[n].detach().clone() for n in problem.lambda_},
        guide_buffers=_buffers(problem),
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


def _elapsed(trajectories: Sequence[Trajectory]) -> float:
    """Seconds during which at least one restart ran: several may have stepped together."""
    total, end = 0.0, -math.inf
    for started, seconds in sorted((t.started, t.rows[-1]["seconds"]) for t in trajectories if t.rows):
        stop = max(end, started + seconds)
        total, end = total + stop - max(started, end), stop
    return total


def _buffers(problem: Problem) -> dict[str, Tensor]:
    """What a guide that is a module holds besides its parameters, such as the mean of an encoder's inputs."""
    module = None if problem.guided is None or problem.guided.guide is None else problem.guided.guide.module
    return {} if module is None else {n: b.detach().clone() for n, b in module.named_buffers()}


def evaluate(problem: Problem, values: Values) -> Score:
    """The exact posterior and log evidence where there is an engine for them; ELBO and q where there is a guide."""
    posterior = None
    try:
        posterior = deferred_posterior(problem, values)
    except (IntractableError, ImproperPosterior, ModelError):
        if problem.guided is None:
            raise
    exact = (math.nan, "none", math.nan)
    if posterior is not None:
        exact = (posterior.log_evidence, posterior.kind, posterior.log_evidence_error)
    if problem.guided is None:
        return Score(posterior, *exact, math.nan, math.nan, None, None, {})
    found = reported_bound(problem, values)
    return Score(
        posterior, *exact, found.elbo, found.error, found.per_datum, found.variational, found.moments
    )
