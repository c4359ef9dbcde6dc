"""Scores of rows that were held out of a fit, at its own θ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lvmppl.algorithms import vem
from lvmppl.algorithms.ascent import Trajectory
from lvmppl.algorithms.closed_phases import closed_phases
from lvmppl.algorithms.outcome import evaluate
from lvmppl.algorithms.problem import Problem, build_problem
from lvmppl.density import spans_rows, unvalidated
from lvmppl.errors import InputError, IntractableError
from lvmppl.fitted import Fit
from lvmppl.options import VEMOptions

_TEST_STEPS = 100  # E phases spent on the λ of held-out rows


def score_rows(
    problem: Problem, fit: Fit, model: Callable[..., Any], rows: Mapping[str, Tensor]
) -> tuple[float, float]:
    """(log evidence, ELBO) of new rows at the fit's θ, NaN where there is none.

    An encoder's λ applies to new rows as it is; a λ table is optimised for them with θ held.
    """
    fresh = build_problem(
        problem.name,
        model,
        rows,
        **(problem.rebuild_guide or {}),
        data_plate=problem.data_plate,
        start=fit.parameters,
        seed=problem.seed,
        lift=problem.lifted,
    )
    if fresh.guided is None:
        try:
            return evaluate(fresh, fresh.initial).log_evidence, math.nan
        except IntractableError:
            return math.nan, math.nan
    score = evaluate(fresh, serve(fresh, fit).values)
    return score.log_evidence, score.elbo


def serve(fresh: Problem, fit: Fit) -> Trajectory:
    """λ of new rows at the fit's θ, which is held: an encoder's applies as it is, a table is optimised for these rows.

    fresh: the problem of the new rows, its θ the fit's.

    Raises:
        InputError: the fit lacks a parameter of the guide that does not belong to single rows, or has it in another shape.
    """
    assert fresh.guided is not None and fresh.guided.guide is not None
    guide = fresh.guided.guide
    if guide.module is not None:
        for name, buffer in guide.module.named_buffers():
            if name in fit.guide_buffers:  # what an encoder read off its first rows, such as their mean
                buffer.copy_(fit.guide_buffers[name])
    own = {}
    local = spans_rows(guide.function, fresh.model.structure)
    for name in fresh.lambda_:
        if not local and not fresh.guided.specs[name].is_table:
            own[name] = _checked(name, fit.guide_parameters.get(name), fresh.initial[name])
    fresh = replace(fresh, initial={**fresh.initial, **own}, frozen=(*fresh.theta, *own))
    if not fresh.free_lambda:
        return Trajectory(0, "elbo", values=dict(fresh.initial), status="converged")
    options = VEMOptions(max_steps=_TEST_STEPS, e_steps=20, learning_rate=0.1, freeze=fresh.frozen)
    with unvalidated():
        return vem.ascend(closed_phases(fresh, options), options)[0]


def _checked(name: str, value: Tensor | None, like: Tensor) -> Tensor:
    where = f"guide parameter '{name}'"
    if value is None:
        raise InputError(where, "a value in the fit", "none", "pass the guide that the fit was made with")
    if value.shape != like.shape:
        fix = "build the guide with the sizes of its training rows, such as `vocabulary`"
        raise InputError(where, f"the fit's shape {tuple(value.shape)}", f"{tuple(like.shape)}", fix)
    return value


__all__ = ["score_rows", "serve"]
