"""The coordinate update of one enumerated site of q, the others held: q(z) ∝ exp E_{q_-z}[log p(x, z, …)].

E_q log p is multilinear in the marginals of q's sites, so what multiplies q(z) is a table over the states of z: a
softmax of it is the optimum. Of a chain it is a table for the start, one for each move and one for each step, and the
optimum is the chain that forward-backward makes of them. Steps that are independent under q are updated every other one
at a time, since a step's optimum depends on its neighbours alone.

Shapes: B elements of the site's plates, T steps, K states.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from lvmppl.algorithms.guide_fields import BINARY, CHAIN, STEPS, Block
from lvmppl.density import Factor, Variable, chain_axes, time_axis
from lvmppl.elbo import MOVES, GuideWeights, expectation
from lvmppl.exact import chain as kernel
from lvmppl.exact.elimination import Term
from lvmppl.exact.named import Named, align
from lvmppl.exact.scales import ratio, times


class SiteUpdate:
    """One update: the terms of E_q log p that hold the site, q of the others, and the scale of the site.

    The scale is what the model repeats the site by: q ∝ exp(potential / scale), so a term counts by the ratio of its
    own to it.
    """

    def __init__(
        self,
        block: Block,
        variable: Variable,
        terms: Sequence[Term],
        weights: GuideWeights,
        plate_sizes: Mapping[str, int],
        scale: Named,
    ) -> None:
        self.block, self.variable, self.sizes = block, variable, plate_sizes
        self.terms, self.rest, self.weights = terms, weights.without(block.site), weights
        self.scale = scale
        self.shape = [plate_sizes[p] for p in block.plates]

    def fields(self) -> dict[str, Tensor]:
        """What the site's distribution becomes, by the fields of its block."""
        if self.variable.steps is None:
            probs = self._table()
            return {"probability": probs[..., 1]} if self.block.kind == BINARY else {"probs": probs}
        return self._chain() if self.block.kind == CHAIN else self._steps()

    def _table(self) -> Tensor:
        """[*plates, K]; the states are the slowest axis in memory, as they are in the terms."""
        parts = [self._expected(t) for t in self.terms]
        potential = self._sum(parts, (self.block.site, *self.block.plates))
        return _softmax(potential.expand(self.variable.size, *self.shape), 0).movedim(0, -1)

    def _expected(self, term: Term, own: tuple[str, ...] = ()) -> Named:
        """E of a term over the other sites, by its scale, summed over the plates that the site does not stand in."""
        scaled = times(term.named, ratio(term.scale, self.scale))
        mean = expectation(scaled, self.rest, self.sizes, frozenset(own))
        plates = set(self.sizes) & (term.plates | set(mean.dims)) - set(own)
        outside = [p for p in plates if p not in self.block.plates]
        axes = [i for i, d in enumerate(mean.dims) if d in outside]
        tensor = mean.tensor.sum(axes) if axes else mean.tensor
        repeats = prod(self.sizes[p] for p in outside if p not in mean.dims)
        return Named(
            tensor * repeats if repeats != 1 else tensor, tuple(d for d in mean.dims if d not in outside)
        )

    def _sum(self, parts: Sequence[Named], dims: tuple[str, ...]) -> Tensor:
        """The sum of the terms [*dims]."""
        if not parts:
            return torch.zeros([1] * len(dims), dtype=self.scale.tensor.dtype)
        return functools.reduce(torch.add, [align(part, dims) for part in parts])

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-factors of the chain that q becomes: start [B, K], moves [B, T−1, K, K], steps [B, T, K]."""
        name, states, steps = self.block.site, self.variable.size, self.variable.steps or 0
        step, before, after = chain_axes(name, steps)
        time = time_axis(steps)
        start: list[Named] = []
        moves: list[Named] = []
        each: list[Named] = []
        for term in self.terms:
            part = self._expected(term, (name, step, before, after, time))
            kind = moves if before in part.dims else each if time in part.dims else start
            kind.append(part)
        plates = self.block.plates
        a = self._sum(start, (*plates, name)).expand(*self.shape, states)
        A = self._sum(moves, (*plates, step, before, after))
        A = A.expand(*self.shape, max(steps - 1, 1), states, states)
        each_step = self._sum(each, (*plates, time, name)).expand(*self.shape, steps, states)
        return (
            a.reshape(-1, states),
            A.reshape(-1, max(steps - 1, 1), states, states),
            each_step.reshape(-1, steps, states),
        )

    def _lengths(self) -> Tensor | None:
        if self.variable.lengths is None:
            return None
        named = Named(self.variable.lengths, self.variable.lengths_dims)
        return align(named, self.block.plates).expand(self.shape).reshape(-1)

    def _chain(self) -> dict[str, Tensor]:
        start, moves, each = self._factors()
        found = kernel.marginals(start, moves, each, self._lengths())
        states = self.variable.size
        pairs = found.all_pairwise()
        if not pairs.shape[1]:
            pairs = torch.ones_like(moves)
        rows = pairs.sum(-1, keepdim=True)
        transition = torch.where(rows > 0, pairs / torch.where(rows > 0, rows, 1.0), 1.0 / states)
        initial = _normalised(found.unary[:, 0])
        return {
            "initial": initial.reshape(*self.shape, states),
            "transition": transition.reshape(*self.shape, *transition.shape[1:]),
        }

    def _steps(self) -> dict[str, Tensor]:
        """Odd steps given the even ones, then the even ones given the odd."""
        start, moves, each = self._factors()
        each = each.clone()
        each[:, 0] += start
        unary, _ = self.weights.chain(self.block.site)
        steps, states = each.shape[1:]
        q = align(unary, (*self.block.plates, time_axis(steps), self.block.site))
        q = q.expand(*self.shape, steps, states).reshape(each.shape).clone()
        lengths = self._lengths()
        running = torch.ones(len(each), steps, dtype=torch.bool)
        if lengths is not None:
            running = torch.arange(steps) < lengths.unsqueeze(-1)
        moves = torch.where(running[:, 1:, None, None], moves[:, : steps - 1], 0.0)
        q = torch.where(running.unsqueeze(-1), q, 1.0 / states)
        for parity in (1, 0):
            from_left = _weighted(q[:, :-1].unsqueeze(-1), moves).sum(-2)
            from_right = _weighted(q[:, 1:].unsqueeze(-2), moves).sum(-1)
            potential = each.clone()
            potential[:, 1:] += from_left
            potential[:, :-1] += from_right
            q[:, parity::2] = _softmax(potential)[:, parity::2]
            q = torch.where(running.unsqueeze(-1), q, 1.0 / states)
        return {"probs": q.reshape(*self.shape, steps, states)}

    def weights_after(self, fields: Mapping[str, Tensor]) -> GuideWeights:
        """q with these fields of the site."""
        name, plates = self.block.site, self.block.plates
        if self.variable.steps is None:
            probs = fields["probs"] if "probs" in fields else _both(fields["probability"])
            return self.weights.with_marginal(name, Named(probs, (*plates, name)))
        return self.weights.with_site(name, self._chain_factors(fields, self.variable.steps))

    def _chain_factors(self, fields: Mapping[str, Tensor], steps: int) -> list[Factor]:
        name, plates = self.block.site, self.block.plates
        step, before, after = chain_axes(name, steps)
        if self.block.kind == STEPS:
            probs = fields["probs"]
            later = probs[..., 1:, :] if steps > 1 else probs
            initial = probs[..., 0, :]
            moves = later.unsqueeze(-2).expand(*later.shape[:-1], self.variable.size, self.variable.size)
        else:
            initial, moves = fields["initial"], fields["transition"]
        return [
            _factor(name, initial, (*plates, name)),
            _factor(name + MOVES, moves, (*plates, step, before, after)),
        ]


def _factor(site: str, probs: Tensor, dims: tuple[str, ...]) -> Factor:
    return Factor(site, probs.log(), dims, frozenset())


def _both(probability: Tensor) -> Tensor:
    return torch.stack([1 - probability, probability], -1)


def _softmax(potential: Tensor, axis: int = -1) -> Tensor:
    """exp(potential)/Σ along an axis; uniform where every state is impossible."""
    probs = torch.softmax(potential, axis)
    if bool(torch.isfinite(probs.sum())):
        return probs
    return torch.where(torch.isnan(probs), 1.0 / potential.shape[axis], probs)


def _normalised(probs: Tensor) -> Tensor:
    total = probs.sum(-1, keepdim=True)
    return torch.where(total > 0, probs / torch.where(total > 0, total, 1.0), 1.0 / probs.shape[-1])


def _weighted(q: Tensor, values: Tensor) -> Tensor:
    """q · values with 0 · (−∞) = 0."""
    return q * torch.where(q == 0, 0.0, values)


__all__ = ["SiteUpdate"]
