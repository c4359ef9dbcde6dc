"""What a fit does when its objective or gradient is not finite: back to the last good state at half the rate.

Three failures in a row end the fit as diverged; the message names the site whose term went bad first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lvmppl.algorithms.problem import Problem
from lvmppl.density import Factor
from lvmppl.elbo import GuideWeights, expectation
from lvmppl.errors import ModelError
from lvmppl.exact.named import Named

LIMIT = 3  # failures in a row that end a fit


class NotFinite(Exception):
    """A step's objective or gradient is not finite. what: `ELBO` or `gradient`; site: where first, if known."""

    def __init__(self, what: str, site: str = "") -> None:
        super().__init__(what)
        self.what, self.site = what, site

    def __str__(self) -> str:
        return f"the {self.what} was not finite{f', first in {self.site}' if self.site else ''}"


class Recovery:
    """Counts failures in a row: a step has gone well once an evaluation after it is finite."""

    def __init__(self) -> None:
        self.count, self.total, self.restored = 0, 0, False
        self.last = ""

    def fine(self) -> None:
        """A finite evaluation; the one right after going back only repeats what was known."""
        if self.restored:
            self.restored = False
        else:
            self.count = 0

    def failed(self, step: int, problem: NotFinite | ModelError, rate: float) -> bool:
        """Note a failure at `step`, `rate` being the halved rate; True when the fit must end."""
        self.count += 1
        self.total += 1
        self.restored = True
        self.last = f"step {step}: {problem}"
        if self.count < LIMIT:
            self.last += f"; went back to the last good state, learning rate halved to {rate:g}"
        return self.count >= LIMIT

    @property
    def message(self) -> str:
        """What a fit that went on says of its failures."""
        if not self.total:
            return ""
        earlier = f" ({self.total} such steps)" if self.total > 1 else ""
        return f"{self.last}{earlier}"

    @property
    def ending(self) -> str:
        """Why the fit ended, if it did."""
        return f"{LIMIT} steps in a row failed, the last at {self.last}"


def first_bad_site(problem: Problem, values: Mapping[str, Tensor], indices: Tensor | None) -> str:
    """The first site, in the order of guide and model, whose term of the ELBO (or its gradient) is not finite.

    values: constrained, as the failed step used them. Empty when no single term is to blame.
    """
    assert problem.guided is not None
    data, rows = problem.rows(indices)
    leaves = {n: v.detach().clone().requires_grad_(v.is_floating_point()) for n, v in values.items()}
    bad = [n for n, v in leaves.items() if not bool(torch.isfinite(v.detach()).all())]
    try:
        evaluation = problem.guided.evaluate(data, leaves, rows)
    except ModelError as error:
        return error.where
    weights = GuideWeights(evaluation.guide_factors, evaluation.variables, evaluation.guide_variables)
    own = [(factor, "") for factor in evaluation.guide_factors]
    words = ", which θ makes impossible where q is not 0"
    moving = [v for v in leaves.values() if v.requires_grad]
    for factor, why in [*own, *((factor, words) for factor in evaluation.factors)]:
        term = _term(factor, weights, evaluation.plate_sizes)
        value = float(term.detach())
        if not math.isfinite(value) or not _finite_gradient(term, moving):
            return f"site '{factor.site}'{why if value == -math.inf else ''}"
    return f"parameter '{bad[0]}'" if bad else ""


def _term(factor: Factor, weights: GuideWeights, plate_sizes: Mapping[str, int]) -> Tensor:
    """The site's own part of the ELBO; over states that the model alone enumerates, its finite entries and any NaN."""
    term = expectation(Named(factor.log_prob, factor.dims), weights, plate_sizes).tensor
    outside = any(d not in weights.names and d not in plate_sizes for d in factor.dims)
    return term[~torch.isneginf(term)].sum() if outside else term.sum()


def _finite_gradient(term: Tensor, leaves: Sequence[Tensor]) -> bool:
    if not term.requires_grad:
        return True
    gradients = torch.autograd.grad(term, list(leaves), retain_graph=True, allow_unused=True)
    return all(g is None or bool(torch.isfinite(g).all()) for g in gradients)
