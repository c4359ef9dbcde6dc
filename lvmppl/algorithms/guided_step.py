"""The E-step of EM with q in the place of the posterior: expected statistics under a guide none of whose sites is drawn.

The weights q_s of each log-factor are ∂ E_q[log p(x, z; θ)]/∂ f_s, at each factor's own shape, as those of EM are
∂ log Z/∂ f_s. Where continuous sites are integrated, log p is linear in their statistics and E_q f_s its mean over the
points of a design (`integrated`), an axis of f_s whose states are equally probable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from lvmppl.algorithms.closed_form import ClosedSite
from lvmppl.algorithms.evidence import chunks
from lvmppl.algorithms.expected import Piece, Weights, add_up, e_step
from lvmppl.algorithms.integrated import IntegratedJoint
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.statistics import Statistics
from lvmppl.density import POINTS, Evaluation, Factor, HeldJoint, Joint, Rows, Values, Variable
from lvmppl.elbo import GuideWeights, expected_log_joint


def planning_e_step(
    problem: Problem, values: Values, sites: Sequence[ClosedSite] = ()
) -> tuple[Weights, dict[str, Statistics]]:
    """Weights and statistics by which an M-step is planned: under the posterior, under q where this is integrated."""
    if isinstance(problem.guided, IntegratedJoint):
        return guided_e_step(problem, values, sites)
    return e_step(problem, values, sites)[1:]


def guided_e_step(
    problem: Problem, values: Values, sites: Sequence[ClosedSite] = ()
) -> tuple[Weights, dict[str, Statistics]]:
    """The weights q_s of every factor and the expected statistics of `sites`, under q in the place of the posterior."""
    assert problem.guided is not None
    pieces: Weights = []
    statistics: dict[str, Statistics] = {}
    for data, rows in _pieces(problem):
        with torch.no_grad():
            model: Joint = problem.model
            if isinstance(problem.guided, IntegratedJoint):
                model = problem.guided.at_all_points(data, values, rows)
            views, evaluation = model.view(data, values, rows)
            own = problem.guided.evaluate_guide(data, values, rows)
            factors = tuple(f for v in views.values() for f in v.factors())
        leaves = [f.log_prob.detach().requires_grad_() for f in factors]
        evaluation = replace(
            evaluation,
            factors=tuple(replace(f, log_prob=leaf) for f, leaf in zip(factors, leaves, strict=True)),
            guide_variables=own.guide_variables,
            guide_factors=own.guide_factors,
        )
        if isinstance(model, HeldJoint):
            evaluation = _with_points(evaluation, model)
        weights = GuideWeights(evaluation.guide_factors, evaluation.variables, evaluation.guide_variables)
        with torch.enable_grad():
            total = expected_log_joint(evaluation, weights, problem.data_plate)
            grads = torch.autograd.grad(total, leaves)
        q = {f.site: g for f, g in zip(factors, grads, strict=True)}
        pieces.append(Piece(q, model, data, rows))
        add_up(views, evaluation, q, sites, statistics)
    return pieces, statistics


def _with_points(evaluation: Evaluation, model: HeldJoint) -> Evaluation:
    """The points of a design as one more site of q, each as probable as the others."""
    count = len(next(iter(model.points.values())))
    uniform = torch.full([count], -math.log(count), dtype=evaluation.factors[0].log_prob.dtype)
    return replace(
        evaluation,
        variables={**evaluation.variables, POINTS: Variable(POINTS, (), torch.arange(count))},
        guide_variables=evaluation.guide_variables | {POINTS},
        guide_factors=(*evaluation.guide_factors, Factor(POINTS, uniform, (POINTS,), frozenset())),
    )


def _pieces(problem: Problem) -> Iterator[tuple[Values, Rows]]:
    """The chunks of the data with their indices, by which a guide finds its rows of tables."""
    begin, total = 0, problem.model.structure.num_rows
    for data, rows in chunks(problem):
        index = torch.arange(begin, begin + rows.size)
        begin += rows.size
        yield data, rows if rows.size == total else Rows(rows.size, index)


__all__ = ["guided_e_step", "planning_e_step"]
