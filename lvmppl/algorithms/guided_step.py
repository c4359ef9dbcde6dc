"""The E-step of EM with q in the place of the posterior: expected statistics under a guide whose sites are all enumerated.

The weights q_s of each log-factor are ∂ E_q[log p(x, z; θ)]/∂ f_s, at each factor's own shape, as those of EM are
∂ log Z/∂ f_s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from lvmppl.algorithms.closed_form import ClosedSite
from lvmppl.algorithms.evidence import chunks
from lvmppl.algorithms.expected import Piece, Weights, add_up
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.statistics import Statistics
from lvmppl.density import Rows, Values
from lvmppl.elbo import GuideWeights, expected_log_joint


def guided_e_step(
    problem: Problem, values: Values, sites: Sequence[ClosedSite]
) -> tuple[Weights, dict[str, Statistics]]:
    """The weights q_s of every factor and the expected statistics of `sites`, under q in the place of the posterior."""
    assert problem.guided is not None
    pieces: Weights = []
    statistics: dict[str, Statistics] = {}
    for data, rows in _pieces(problem):
        with torch.no_grad():
            views, evaluation = problem.model.view(data, values, rows)
            own = problem.guided.evaluate_guide(data, values, rows)
            factors = tuple(f for v in views.values() for f in v.factors())
        leaves = [f.log_prob.detach().requires_grad_() for f in factors]
        evaluation = replace(
            evaluation,
            factors=tuple(replace(f, log_prob=leaf) for f, leaf in zip(factors, leaves, strict=True)),
            guide_variables=own.guide_variables,
        )
        weights = GuideWeights(own.guide_factors, evaluation.variables, own.guide_variables)
        with torch.enable_grad():
            total = expected_log_joint(evaluation, weights, problem.data_plate)
            grads = torch.autograd.grad(total, leaves)
        q = {f.site: g for f, g in zip(factors, grads, strict=True)}
        pieces.append(Piece(q, problem.model))
        add_up(views, evaluation, q, sites, statistics)
    return pieces, statistics


def _pieces(problem: Problem) -> Iterator[tuple[Values, Rows]]:
    """The chunks of the data with their indices, by which a guide finds its rows of tables."""
    begin = 0
    for data, rows in chunks(problem):
        index = torch.arange(begin, begin + rows.size)
        begin += rows.size
        yield data, rows if rows.size == problem.num_rows else Rows(rows.size, index)


__all__ = ["guided_e_step"]
