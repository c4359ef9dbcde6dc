"""Gradient steps on the ELBO, shared by the joint (svi) and the alternating (vem) schedule.

λ may hold tables with a row per datum. Under minibatches a step touches its own rows only: their gradient is sparse,
their optimizer state is updated lazily, and their tail average is kept per row (`tables`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lvmppl.algorithms.ascent import make_optimizer, set_rate
from lvmppl.algorithms.integrated import IntegratedJoint
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.recovery import NotFinite
from lvmppl.algorithms.tables import Average, RowOptimizer
from lvmppl.density import Coordinates, Joint, Values, derive_seed, mixed
from lvmppl.elbo import elbo


class Batches:
    """An endless stream of batches: each epoch is a fresh seeded permutation of the rows, cut into nearly equal pieces.

    pool: the rows that batches are drawn from, all when None.
    """

    def __init__(
        self, problem: Problem, batch_size: int | None, restart: int, pool: Tensor | None = None
    ) -> None:
        self.pool = pool
        self.total = problem.num_rows if pool is None else len(pool)
        self.size = None if batch_size is None or batch_size >= self.total else batch_size
        self.key = (problem.seed, problem.name, restart)
        self.epoch = 0
        self.waiting: list[Tensor] = []

    def next(self) -> Tensor | None:
        """Indices of the next batch, at most `batch_size` of them, or None for all rows."""
        if self.size is None:
            return self.pool
        if not self.waiting:
            generator = torch.Generator().manual_seed(derive_seed(*self.key, "epoch", self.epoch))
            order = torch.randperm(self.total, generator=generator)
            order = order if self.pool is None else self.pool[order]
            self.waiting = list(reversed(order.tensor_split(-(-self.total // self.size))))
            self.epoch += 1
        return self.waiting.pop()


@dataclass(frozen=True)
class _Saved:
    """A state of a stepper to go back to: copies of its dense tensors, and what moved in tables since.

    tensors: of the leaves, and of the optimizer's moments where it keeps one set a leaf. optimizer: the state of one that
    keeps a history instead (L-BFGS).
    moved: of each move of some rows, in order, the table, the rows and what stood there. However many rows a table has, a
    state costs what the steps since have touched.
    """

    tensors: list[Tensor]
    optimizer: dict[str, Any] | None
    moved: list[tuple[str, Tensor, dict[str, Tensor]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Pack:
    """Parameters of one dtype in one vector: every optimizer here works entry by entry (or on all entries as one), so a
    step, a copy and a check are an operation on one tensor however many parameters there are."""

    flat: Tensor
    shapes: Mapping[str, torch.Size]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters as parts of the vector."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {n: part.view(shape) for part, (n, shape) in zip(parts, self.shapes.items(), strict=True)}


def _packed(values: Mapping[str, Tensor]) -> list[_Pack]:
    packs = []
    for kind in dict.fromkeys((v.dtype, v.device) for v in values.values()):
        own = {n: v for n, v in values.items() if (v.dtype, v.device) == kind}
        flat = torch.cat([v.reshape(-1) for v in own.values()]).requires_grad_()
        packs.append(_Pack(flat, {n: v.shape for n, v in own.items()}))
    return packs


class Stepper:
    """Unconstrained θ and λ, their optimizer, and one update at a time."""

    def __init__(
        self,
        problem: Problem,
        start: Mapping[str, Tensor],
        names: Sequence[str],
        optimizer: str,
        learning_rate: float,
        clip_norm: float | None,
        minibatches: bool,
    ) -> None:
        assert problem.guided is not None
        self.problem, self.joint, self.rate, self.clip_norm = (
            problem,
            problem.guided,
            learning_rate,
            clip_norm,
        )
        specs = self.joint.specs
        self.coordinates = Coordinates(specs, names)
        raw = self.coordinates.unconstrain(start)
        self.fixed = {n: v for n, v in start.items() if n not in raw}
        self.tables = {n: specs[n] for n in names if minibatches and specs[n].is_table}
        self.packs = _packed({n: v for n, v in raw.items() if n not in self.tables})
        views = {n: v for pack in self.packs for n, v in pack.views(pack.flat.detach()).items()}
        self.leaves = {n: views.get(n, v) for n, v in raw.items()}
        self.dense = [pack.flat for pack in self.packs]
        self.optimizer = make_optimizer(optimizer, self.dense, learning_rate) if self.dense else None
        self.searches = optimizer == "lbfgs"
        self.sparse = {n: RowOptimizer(optimizer, self.leaves[n], spec) for n, spec in self.tables.items()}
        self.average = Average(self.leaves, self.tables)
        self.saved: _Saved | None = None
        self.moments: list[Tensor] = []  # the optimizer's own
        self.before: _Saved | None = None  # the state saved before; the next one is written over it

    def values(self, indices: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(constrained values for a batch, the batch's table rows as leaves)."""
        live = dict(self.leaves)
        for pack in self.packs:
            live.update(pack.views(pack.flat))
        if indices is None or not self.sparse:
            return {**self.fixed, **self.coordinates.constrain(live)}, {}
        rows = {n: s.select(indices).requires_grad_() for n, s in self.sparse.items()}
        return {**self.fixed, **self.coordinates.constrain({**live, **rows})}, rows

    def rows_at(self, indices: Tensor | None) -> dict[str, Tensor]:
        """The constrained rows of a batch of the tables that move here, detached."""
        if indices is None or not self.sparse:
            return {}
        with torch.no_grad():
            rows = {n: s.select(indices) for n, s in self.sparse.items()}
            return {n: self.coordinates.transforms[n](row) for n, row in rows.items()}

    def full_values(self, tables: bool = True) -> dict[str, Tensor]:
        """All constrained values (of those that move in tables only if wanted), detached.

        What does not move here is the same tensor every time.
        """
        with torch.no_grad():
            wanted = {n: v for n, v in self.leaves.items() if tables or n not in self.tables}
            moving = {n: self.coordinates.transforms[n](v).detach().clone() for n, v in wanted.items()}
        still = {n: v.detach() if v.requires_grad else v for n, v in self.fixed.items()}
        return {**still, **moving}

    def averaged_values(self) -> dict[str, Tensor]:
        """The constrained mean iterate of the tail (averaged in unconstrained coordinates)."""
        with torch.no_grad():
            values = {**self.fixed, **self.coordinates.constrain(self.average.mean(self.leaves))}
        return {n: v.detach().clone() for n, v in values.items()}

    def update(
        self,
        value: Tensor,
        rows: Mapping[str, Tensor],
        indices: Tensor | None,
        factor: float,
        again: Callable[[], Tensor] | None = None,
    ) -> None:
        """One ascent step on `value` (negated here, and only here, for the optimizer), at the rate times `factor`.

        again: the objective anew at the present values, for an optimizer that searches along a line.

        Raises:
            NotFinite: the gradient is not finite; nothing has moved.
        """
        if not value.requires_grad:  # nothing is free, or the objective does not depend on it
            return
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        (-value).backward()
        leaves = [*self.dense, *rows.values()]
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        if gradients and not _all_finite(gradients):
            raise NotFinite("gradient")
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(leaves, self.clip_norm)
        if self.optimizer is not None:
            set_rate(self.optimizer, self.rate * factor)
            self.optimizer.step(self._closure(again) if self.searches else None)  # type: ignore[arg-type]
        for name, leaf in rows.items():
            assert indices is not None
            if leaf.grad is not None:
                self.average.before_rows(name, self.leaves[name], indices)
                if self.saved is not None:
                    self.saved.moved.append((name, indices, self.sparse[name].snapshot(indices)))
                self.sparse[name].step(leaf.grad, indices, self.rate * factor)

    def _closure(self, again: Callable[[], Tensor] | None) -> Callable[[], Tensor]:
        assert again is not None, "a line search needs the objective as a function"

        def closure() -> Tensor:
            assert self.optimizer is not None
            self.optimizer.zero_grad(set_to_none=True)
            loss = -again()
            loss.backward()
            return loss.detach()

        return closure

    def save(self) -> None:
        """Keep the present state to go back to, and the one saved before for `unsave`."""
        state = None
        if self.searches and self.optimizer is not None:
            state = copy.deepcopy(self.optimizer.state_dict())
        moving, spare = self._moving(), self.before
        if spare is None or len(spare.tensors) != len(moving):
            tensors = [tensor.detach().clone() for tensor in moving]
        else:  # a copy at every step: no memory is asked for anew
            tensors = spare.tensors
            _copy(tensors, moving)
        self.before, self.saved = self.saved, _Saved(tensors, state)

    def unsave(self) -> None:
        """Forget the state last saved: what `restore` goes back to is the one before."""
        self.saved, self.before = self.before, None

    def _moving(self) -> list[Tensor]:
        """What a step changes in place, the leaves first."""
        if self.optimizer is None or self.searches or not self.optimizer.state:
            return self.dense
        if not self.moments:  # they are made in the first step and stay the same tensors
            own = (self.optimizer.state.get(leaf, {}).values() for leaf in self.dense)
            self.moments = [v for values in own for v in values if isinstance(v, Tensor)]
        return self.dense + self.moments

    def restore(self, rate_factor: float = 0.5) -> None:
        """Back to the state last saved (leaves and optimizer state); the learning rate is multiplied by `rate_factor`."""
        self.rate *= rate_factor
        if self.saved is None:
            return
        moving = self._moving()
        if self.optimizer is not None and len(moving) > len(self.saved.tensors):
            self.optimizer.state.clear()  # there were no moments yet
            self.moments, moving = [], self.dense
        _copy(moving, self.saved.tensors)
        if self.optimizer is not None and self.saved.optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(self.saved.optimizer))
        while self.saved.moved:
            name, indices, rows = self.saved.moved.pop()
            self.sparse[name].restore(rows, indices)


def _all_finite(gradients: list[Tensor]) -> bool:
    """Whether no entry is NaN or infinite: a sum with one is not finite either; where it overflows, entries decide."""
    if all(math.isfinite(g.sum().item()) for g in gradients):
        return True
    return all(bool(torch.isfinite(g).all()) for g in gradients)


def _copy(to: list[Tensor], values: list[Tensor]) -> None:
    if to:  # torch refuses empty lists
        with torch.no_grad():
            torch._foreach_copy_(to, values)


def batch_elbo(
    problem: Problem, joint: Joint, values: Values, indices: Tensor | None, particles: int = 1
) -> Tensor:
    """The ELBO of a batch, scaled to all rows: an unbiased estimate of the full ELBO (exact where nothing is sampled).

    Its gradient is that of the draws' paths, so that it has none of sites without a reparameterised draw: see `Objective`.
    """
    data, rows = problem.rows(indices)
    found: list[Tensor] = []
    for _ in range(particles):
        evaluation = joint.evaluate(data, values, rows)
        assert not (evaluation.score_factors and torch.is_grad_enabled()), "a score is needed"
        found.append(elbo(evaluation, problem.data_plate).total)
        if not evaluation.samples:
            return found[0]
    return torch.stack(found).mean()


def draws(problem: Problem) -> bool:
    """Whether the guide has sites that are drawn, so that its ELBO with the others summed is an estimate."""
    assert problem.guided is not None and problem.guided.guide_structure is not None
    return not isinstance(problem.guided, IntegratedJoint) and any(
        s.kind == "latent" and s.family != "Delta" for s in problem.guided.guide_structure.sites.values()
    )


class StepSeeds:
    """Randomness at step t derives from (seed, fit, restart, t) alone."""

    def __init__(self, problem: Problem, restart: int) -> None:
        self.base = derive_seed(problem.seed, problem.name, restart)

    def use(self, step: int) -> None:
        torch.default_generator.manual_seed(mixed(self.base + step))


__all__ = ["Batches", "StepSeeds", "Stepper", "batch_elbo", "draws"]
