"""Semi-amortized inference: an encoder's λ⁽ⁿ⁾, then a few steps up each datum's own ELBO (Kim et al. 2018).

    λ_0 = encoder(x⁽ⁿ⁾),   λ_{k+1} = λ_k + rate · ∇_λ ELBO(θ, λ_k; x⁽ⁿ⁾)

in unconstrained coordinates. Every evaluation of model and guide happens at the last λ, so a bound reported for new rows
is refined in the same way. θ and the encoder get the gradient of the ELBO at the last λ: through the steps, which
differentiates them twice, or as if the sum of the steps were a constant added to λ_0.

The steps' own gradient needs no score: their sums are exact and their draws reparameterised, and those draws are not the
ones of the bound. Given λ_K the bound's draws are therefore fresh ones of q, and any estimator of its gradient, and any
bound that is a function of q, goes with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lvmppl.density import Drawing, Evaluation, Joint, Rows, Values, num_rows
from lvmppl.elbo import elbo
from lvmppl.errors import ModelError


class RefinedJoint(Joint):
    """A model and a guide with `refine_steps`: λ is refined before each evaluation."""

    _settled: dict[str, Tensor] | None = None

    @contextmanager
    def settled(self, data: Values, values: Values, rows: Rows) -> Iterator[None]:
        """Within the block, which is about these rows and values, every evaluation is at one λ, refined once."""
        self._settled = self._refined(data, values, rows)
        try:
            yield
        finally:
            self._settled = None

    def evaluate(
        self, data: Values, values: Values, rows: Rows | None = None, drawing: Drawing | None = None
    ) -> Evaluation:
        rows = rows or Rows(num_rows(data))
        with self._holding(data, values, rows):
            return super().evaluate(data, values, rows, drawing)

    def evaluate_guide(
        self, data: Values, values: Values, rows: Rows | None = None, drawing: Drawing | None = None
    ) -> Evaluation:
        rows = rows or Rows(num_rows(data))
        with self._holding(data, values, rows):
            return super().evaluate_guide(data, values, rows, drawing)

    @contextmanager
    def _holding(self, data: Values, values: Values, rows: Rows) -> Iterator[None]:
        assert self.guide is not None
        guide: Any = self.guide.function
        local = self._refined(data, values, rows) if self._settled is None else self._settled
        if not any(v.requires_grad for v in values.values()):  # λ is held where what it comes from is
            local = {n: v.detach() for n, v in local.items()}
        with _held(guide, local, guide.refine_steps):
            yield

    def _refined(self, data: Values, values: Values, rows: Rows) -> dict[str, Tensor]:
        """The unconstrained λ after the steps."""
        assert self.guide is not None
        guide: Any = self.guide.function
        through = bool(guide.through) and torch.is_grad_enabled()
        super().evaluate_guide(data, values, rows)
        local: dict[str, Tensor] = dict(guide.local)
        held = values if through else {n: v.detach() for n, v in values.items()}
        with torch.enable_grad():
            for done in range(guide.refine_steps):
                at = local if through else {n: v.detach() for n, v in local.items()}
                at = {n: v if v.requires_grad else v.requires_grad_() for n, v in at.items()}
                with _held(guide, at, done):
                    bound = elbo(super().evaluate(data, held, rows), self.structure.data_plate).total
                moves = torch.autograd.grad(bound / rows.scale, list(at.values()), create_graph=through)
                rate = guide.refine_rate
                local = {n: v + rate * m for (n, v), m in zip(local.items(), moves, strict=True)}
        return local


@contextmanager
def _held(guide: Any, local: dict[str, Tensor], done: int) -> Iterator[None]:
    """Within the block an encoder's λ is this one, which so many steps have moved.

    Raises:
        ModelError: that the steps are too long, where q or the model no longer run after some of them.
    """
    try:
        with guide.holding(local):
            yield
    except ModelError as error:
        if not done:
            raise
        raise ModelError(
            f"guide, rate of {guide.refine_steps} steps",
            "steps up the ELBO from the encoder's λ that do not overshoot",
            f"{guide.refine_rate}, after {done} of which q is no distribution or the model does not run",
            "lower the guide's rate",
        ) from error
