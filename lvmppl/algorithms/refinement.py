"""Semi-amortized inference: an encoder's λ⁽ⁿ⁾, then a few steps up each datum's own ELBO (Kim et al. 2018).

    λ_0 = encoder(x⁽ⁿ⁾),   λ_{k+1} = λ_k + rate · ∇_λ ELBO(θ, λ_k; x⁽ⁿ⁾)

in unconstrained coordinates. Every evaluation of model and guide happens at the last λ, so a bound reported for new rows
is refined in the same way. θ and the encoder get the gradient of the ELBO at the last λ: through the steps, which
differentiates them twice, or as if the sum of the steps were a constant added to λ_0.

A step that does not raise a datum's ELBO is halved, or not taken (`_Ascent`).

The steps' own gradient needs no score: their sums are exact and their draws reparameterised, and those draws are not the
ones of the bound. Given λ_K the bound's draws are therefore fresh ones of q, and any estimator of its gradient, and any
bound that is a function of q, goes with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lvmppl.density import Drawing, Evaluation, Joint, Rows, Values, num_rows, with_densities
from lvmppl.elbo import Bound, elbo
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
        with guide.holding(local):
            yield

    def _refined(self, data: Values, values: Values, rows: Rows) -> dict[str, Tensor]:
        """The unconstrained λ after the steps."""
        assert self.guide is not None
        guide: Any = self.guide.function
        through = bool(guide.through) and torch.is_grad_enabled()
        super().evaluate_guide(data, values, rows)
        local: dict[str, Tensor] = dict(guide.local)
        if not guide.refine_steps:
            return local
        held = values if through else {n: v.detach() for n, v in values.items()}

        def bound_at(moving: Mapping[str, Tensor], still: Mapping[str, Tensor], seed: int) -> Bound:
            with _drawing(seed, next(iter(still.values())).device):
                with guide.holding(moving):
                    found = super(RefinedJoint, self).evaluate(data, held, rows)
                if found.samples and moving is not still:
                    with guide.holding(still):
                        density = super(RefinedJoint, self).evaluate_guide(
                            data, held, rows, Drawing(held=found.samples)
                        )
                    found = with_densities(found, density)
            return elbo(found, self.structure.data_plate)

        return _Ascent(bound_at, guide.refine_rate, rows.scale, through).run(local, guide.refine_steps)


_HALVINGS = 10  # of a step, before it is given up
_REACH = 1.0  # length of the longest step, in unconstrained coordinates: a scale by a factor e
_NOISE = 1.0  # nats by which the ELBO of a datum at a draw may fall and be put down to the draw


class _Ascent:
    """Steps up each datum's ELBO by its own gradient, of a length that is halved where they lead down.

    The gradient is that at some draws of q; whether the ELBO fell is asked at others, the same before and after. A draw
    in a tail that would throw λ far away is thus found out by the next one, and so is a step that is too long. Of sums
    without draws no fall is taken, at draws one of `_NOISE`.
    No step is longer than `_REACH`, as rare draws are not seen by one other: what a wide LogNormal has in its tail, say.
    A datum's step that still leads down after `_HALVINGS` halvings is not taken.

    The gradient at draws is the path derivative, λ held in log q (Roeder et al. 2017): it has no noise where q is the
    posterior, which the total derivative would leave again.

    bound_at: the ELBO at (λ of the draws and sums, λ of log q at draws, seed of the draws). scale: of the rows in it, by
    which gradients are divided.
    """

    def __init__(
        self,
        bound_at: Callable[[Mapping[str, Tensor], Mapping[str, Tensor], int], Bound],
        rate: float,
        scale: float,
        through: bool,
    ) -> None:
        self.bound_at, self.rate, self.scale, self.through = bound_at, rate, scale, through
        self.is_drawn = True  # until it shows that the ELBO is the same at other draws

    def run(self, local: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
        """λ [B, …] by name, so many steps on."""
        first = next(iter(local.values()))
        sizes = torch.full_like(first.detach().reshape(len(first), -1)[:, 0], self.rate)
        with torch.enable_grad():
            at, moving = self._stand(local)
            bound: Bound | None = None
            for done in range(steps):
                bound = self.bound_at(moving, at, _seed()) if bound is None else bound
                moves, known = self._moves(bound, moving), _by_row(bound, sizes)
                at, moving, bound, sizes = self._step(at, moves, known, sizes, done == steps - 1)
                sizes = (2.0 * sizes).clamp(self.rate * 0.5**_HALVINGS, self.rate)
            return at if self.through else {n: v + (at[n] - v).detach() for n, v in local.items()}

    def _stand(self, local: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(λ, part of the graph of what it came from if that is differentiated, and the same to take a gradient in)."""
        at = dict(local) if self.through else {n: v.detach() for n, v in local.items()}
        return at, {n: v.clone() if v.requires_grad else v.clone().requires_grad_() for n, v in at.items()}

    def _moves(self, bound: Bound, moving: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """∇_λ ELBO, 0 for a datum where it is not finite."""
        found = torch.autograd.grad(
            bound.total / self.scale, list(moving.values()), create_graph=self.through
        )
        finite = torch.stack([torch.isfinite(m).reshape(len(m), -1).all(1) for m in found]).all(0)
        return {n: torch.where(_over(finite, m), m, 0.0) for n, m in zip(moving, found, strict=True)}

    def _step(
        self,
        at: Mapping[str, Tensor],
        moves: Mapping[str, Tensor],
        known: Tensor,
        sizes: Tensor,
        is_last: bool,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Bound | None, Tensor]:
        """(λ, the same to take a gradient in, the ELBO there, the lengths that were taken).

        known: the ELBO [B] at the draws of the gradient.
        """
        seed, before = _seed(), known
        if self.is_drawn:
            with torch.no_grad():
                before = _by_row(self.bound_at(at, at, seed), sizes)
            self.is_drawn = not torch.equal(before, known)
        noise = _NOISE * self.scale if self.is_drawn else 0.0
        sizes = torch.minimum(sizes, _REACH / _length(moves))
        for halvings in range(_HALVINGS + 2):
            after, moving = self._stand({n: v + _over(sizes, moves[n]) * moves[n] for n, v in at.items()})
            try:
                with torch.set_grad_enabled(not is_last):
                    bound: Bound | None = self.bound_at(moving, after, seed)
                assert bound is not None
                lower = _is_lower(_by_row(bound, sizes), before, noise)
            except ModelError:  # q is no distribution there, or the model does not run
                bound, lower = None, sizes > 0
            if not bool(lower.any()):
                break
            sizes = torch.where(lower, 0.5 * sizes if halvings < _HALVINGS else 0.0, sizes)
        return after, moving, bound, sizes


def _is_lower(after: Tensor, before: Tensor, noise: float) -> Tensor:
    """Where an ELBO fell by more than noise and rounding, or is no number any more."""
    slack = noise + 16.0 * torch.finfo(before.dtype).eps * before.abs()
    risen = (after >= before - slack) | (torch.isfinite(after) & ~torch.isfinite(before))
    return ~risen


def _by_row(bound: Bound, like: Tensor) -> Tensor:
    value = bound.constant if bound.per_datum is None else bound.per_datum
    return value.detach().expand_as(like)


def _length(moves: Mapping[str, Tensor]) -> Tensor:
    """‖m‖ of each datum [B], over all its λ."""
    length: Tensor = torch.cat([m.detach().reshape(len(m), -1) for m in moves.values()], 1).norm(dim=1)
    return length


def _over(rows: Tensor, like: Tensor) -> Tensor:
    """[B] with as many axes as a λ [B, …]."""
    return rows.reshape(-1, *[1] * (like.dim() - 1))


def _seed() -> int:
    return int(torch.randint(2**31 - 1, ()))


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block the draws are those of a seed; the stream outside goes on as if there were none."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
