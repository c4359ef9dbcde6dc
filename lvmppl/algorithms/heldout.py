"""Scores of rows that were held out of a fit, at its own θ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lvmppl.algorithms import vem
from lvmppl.algorithms.outcome import evaluate
from lvmppl.algorithms.problem import Problem, build_problem
from lvmppl.density import unvalidated
from lvmppl.errors import IntractableError
from lvmppl.fitted import Fit
from lvmppl.options import VEMOptions

_TEST_STEPS = 100  # E phases spent on the λ of held-out rows


def score_rows(
    problem: Problem, fit: Fit, model: Callable[..., Any], rows: Mapping[str, Tensor]
) -> tuple[float, float]:
    """(log evidence, ELBO) of new rows at the fit's θ, NaN where there is none.

    An encoder's λ applies to new rows as it is; a λ table is optimised for them with θ held.
    """
    guide = None if problem.guided is None or problem.guided.guide is None else problem.guided.guide.function
    start = {**fit.parameters}
    fresh = build_problem(
        problem.name,
        model,
        rows,
        guide=guide,
        data_plate=problem.data_plate,
        start=start,
        seed=problem.seed,
    )
    if fresh.guided is None:
        try:
            return evaluate(fresh, fresh.initial).log_evidence, math.nan
        except IntractableError:
            return math.nan, math.nan
    own = {
        n: v
        for n, v in fit.guide_parameters.items()
        if n in fresh.lambda_ and not fresh.guided.specs[n].is_table
    }
    fresh = replace(fresh, initial={**fresh.initial, **own}, frozen=(*fresh.theta, *own))
    values = fresh.initial
    if fresh.free_lambda:
        options = VEMOptions(max_steps=_TEST_STEPS, e_steps=20, learning_rate=0.1, freeze=fresh.frozen)
        with unvalidated():
            values = vem.ascend(fresh, options).values
    score = evaluate(fresh, values)
    return score.log_evidence, score.elbo
