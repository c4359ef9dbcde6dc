"""Gradient steps on the ELBO, shared by the joint (svi) and the alternating (vem) schedule.

λ may hold tables with a row per datum. Under minibatches a step touches its own rows only: their gradient is sparse,
their optimizer state is updated lazily, and their tail average is kept per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lvmppl.algorithms.ascent import make_optimizer, set_rate
from lvmppl.algorithms.problem import Problem
from lvmppl.density import Coordinates, Joint, ParameterSpec, derive_seed, mixed
from lvmppl.elbo import elbo
from lvmppl.errors import ModelError


class Batches:
    """An endless stream of batches: each epoch is a fresh seeded permutation of the rows, cut into nearly equal pieces."""

    def __init__(self, problem: Problem, batch_size: int | None, restart: int) -> None:
        self.total = problem.num_rows
        self.size = None if batch_size is None or batch_size >= self.total else batch_size
        self.key = (problem.seed, problem.name, restart)
        self.epoch = 0
        self.waiting: list[Tensor] = []

    def next(self) -> Tensor | None:
        """Indices of the next batch, at most `batch_size` of them, or None for all rows."""
        if self.size is None:
            return None
        if not self.waiting:
            generator = torch.Generator().manual_seed(derive_seed(*self.key, "epoch", self.epoch))
            order = torch.randperm(self.total, generator=generator)
            self.waiting = list(reversed(order.tensor_split(-(-self.total // self.size))))
            self.epoch += 1
        return self.waiting.pop()


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
        self.leaves = {n: v if n in self.tables else v.requires_grad_() for n, v in raw.items()}
        self.dense = [v for n, v in self.leaves.items() if n not in self.tables]
        self.optimizer = make_optimizer(optimizer, self.dense, learning_rate) if self.dense else None
        self.sparse = {n: _RowAdam(self.leaves[n], spec) for n, spec in self.tables.items()}
        self.average = _Average(self.leaves, self.tables)

    def values(self, indices: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(constrained values for a batch, the batch's table rows as leaves)."""
        if indices is None or not self.sparse:
            return {**self.fixed, **self.coordinates.constrain(self.leaves)}, {}
        rows = {n: s.select(indices).requires_grad_() for n, s in self.sparse.items()}
        return {**self.fixed, **self.coordinates.constrain({**self.leaves, **rows})}, rows

    def full_values(self) -> dict[str, Tensor]:
        """All constrained values, detached."""
        with torch.no_grad():
            values = {**self.fixed, **self.coordinates.constrain(self.leaves)}
        return {n: v.detach().clone() for n, v in values.items()}

    def averaged_values(self) -> dict[str, Tensor]:
        """The constrained mean iterate of the tail (averaged in unconstrained coordinates)."""
        with torch.no_grad():
            values = {**self.fixed, **self.coordinates.constrain(self.average.mean(self.leaves))}
        return {n: v.detach().clone() for n, v in values.items()}

    def update(self, value: Tensor, rows: Mapping[str, Tensor], indices: Tensor | None, decay: float) -> None:
        """One ascent step on `value` (negated here, and only here, for the optimizer)."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        (-value).backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([*self.dense, *rows.values()], self.clip_norm)
        if self.optimizer is not None:
            set_rate(self.optimizer, self.rate * decay)
            self.optimizer.step()
        for name, leaf in rows.items():
            assert indices is not None
            if leaf.grad is not None:
                self.average.before_rows(name, self.leaves[name], indices)
                self.sparse[name].step(leaf.grad, indices, self.rate * decay)


class _RowAdam:
    """Adam on the rows of a table that a batch touches (Kingma & Ba 2015); moments exist per row, steps are counted
    per row, so that a row's first update is bias-corrected as its first."""

    def __init__(self, table: Tensor, spec: ParameterSpec) -> None:
        assert spec.row_axis is not None
        self.table, self.axis = table, spec.row_axis
        self.first, self.second = torch.zeros_like(table), torch.zeros_like(table)
        shape = [1] * table.dim()
        shape[self.axis] = table.shape[self.axis]
        self.count = torch.zeros(shape, dtype=table.dtype, device=table.device)

    def select(self, indices: Tensor) -> Tensor:
        return self.table.index_select(self.axis, indices)

    def step(self, grad: Tensor, indices: Tensor, rate: float) -> None:
        axis = self.axis % self.table.dim()
        with torch.no_grad():
            count = self.count.index_select(axis, indices) + 1
            first = self.first.index_select(axis, indices).mul_(0.9).add_(grad, alpha=0.1)
            second = self.second.index_select(axis, indices).mul_(0.999).addcmul_(grad, grad, value=0.001)
            move = (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
            self.table.index_add_(axis, indices, move, alpha=-rate)
            self.count.index_copy_(axis, indices, count)
            self.first.index_copy_(axis, indices, first)
            self.second.index_copy_(axis, indices, second)


class _Average:
    """The running mean of iterates; for tables by row: a row stands still between the steps that touch it."""

    def __init__(self, leaves: Mapping[str, Tensor], tables: Mapping[str, ParameterSpec]) -> None:
        self.tables = tables
        self.sums: dict[str, Tensor] = {}
        self.since: dict[str, Tensor] = {}
        self.count = 0
        self.axes = {n: s.row_axis % leaves[n].dim() for n, s in tables.items() if s.row_axis is not None}

    def begin(self, leaves: Mapping[str, Tensor]) -> None:
        self.sums = {n: torch.zeros_like(v) for n, v in leaves.items()}
        for name, axis in self.axes.items():
            shape = [1] * leaves[name].dim()
            shape[axis] = leaves[name].shape[axis]
            self.since[name] = torch.zeros(shape, dtype=leaves[name].dtype, device=leaves[name].device)
        self.count = 0

    @property
    def active(self) -> bool:
        return bool(self.sums)

    def before_rows(self, name: str, table: Tensor, indices: Tensor) -> None:
        """Account for the steps during which these rows stood still, before they move."""
        if not self.active:
            return
        axis = self.axes[name]
        with torch.no_grad():
            waited = self.count - self.since[name].index_select(axis, indices)
            self.sums[name].index_add_(axis, indices, table.index_select(axis, indices) * waited)
            self.since[name].index_fill_(axis, indices, float(self.count))

    def after_step(self, leaves: Mapping[str, Tensor]) -> None:
        if not self.active:
            return
        self.count += 1
        dense = [n for n in leaves if n not in self.axes]
        if dense:
            with torch.no_grad():
                torch._foreach_add_([self.sums[n] for n in dense], [leaves[n] for n in dense])

    def mean(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.active or self.count == 0:
            return {n: v.detach() for n, v in leaves.items()}
        result = {}
        for name, leaf in leaves.items():
            total = self.sums[name]
            if name in self.axes:
                total = total + leaf.detach() * (self.count - self.since[name])
            result[name] = total / self.count
        return result


def batch_elbo(
    problem: Problem, joint: Joint, values: Mapping[str, Tensor], indices: Tensor | None, particles: int = 1
) -> Tensor:
    """The ELBO of a batch, scaled to all rows: an unbiased estimate of the full ELBO (exact where nothing is sampled)."""
    data, rows = problem.rows(indices)
    total: Tensor | None = None
    drawn = False
    for _ in range(particles):
        evaluation = joint.evaluate(data, values, rows)
        if evaluation.score_factors:
            sites = ", ".join(f.site for f in evaluation.score_factors)
            raise ModelError(
                f"guide site {sites}",
                "a finite support (summed exactly) or a reparameterised family",
                "a family with neither",
                "use a reparameterised family such as LogNormal, Gamma or Normal",
            )
        part = elbo(evaluation, problem.data_plate).total
        total = part if total is None else total + part
        drawn = bool(evaluation.samples)
        if not drawn:
            return total
    assert total is not None
    return total / particles


def draws(problem: Problem) -> bool:
    """Whether the guide has sites that are drawn, so that its ELBO is an estimate."""
    assert problem.guided is not None and problem.guided.guide_structure is not None
    return any(
        s.kind == "latent" and s.family != "Delta" for s in problem.guided.guide_structure.sites.values()
    )


class StepSeeds:
    """Randomness at step t derives from (seed, fit, restart, t) alone."""

    def __init__(self, problem: Problem, restart: int) -> None:
        self.base = derive_seed(problem.seed, problem.name, restart)

    def use(self, step: int) -> None:
        torch.default_generator.manual_seed(mixed(self.base + step))


__all__: list[Any] = ["Batches", "StepSeeds", "Stepper", "batch_elbo", "draws"]
