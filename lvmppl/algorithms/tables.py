"""Optimizer and tail average of a λ table of which a minibatch touches a few rows: no dense gradient, no dense step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lvmppl.density import ParameterSpec
from lvmppl.errors import InputError

ROW_OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop", "adagrad")
_DECAY = 0.01  # weight decay of AdamW, as in torch


class RowOptimizer:
    """Adam, AdamW, RMSprop, Adagrad or SGD on the rows that a batch touches, with torch's constants.

    Moments exist per row and steps are counted per row, so that a row's first update is bias-corrected as its first
    (Kingma & Ba 2015).
    """

    def __init__(self, name: str, table: Tensor, spec: ParameterSpec) -> None:
        if name not in ROW_OPTIMIZERS:
            raise InputError(
                f"optimizer of the table '{spec.name}' under minibatches",
                f"one that can move some rows alone ({', '.join(ROW_OPTIMIZERS)})",
                name,
                "choose one of these, or leave batch_size out",
            )
        assert spec.row_axis is not None
        self.name, self.table, self.axis = name, table, spec.row_axis % table.dim()
        shape = [1] * table.dim()
        shape[self.axis] = table.shape[self.axis]
        self.state = {"count": torch.zeros(shape, dtype=table.dtype, device=table.device)}
        if name in ("adam", "adamw"):
            self.state["first"] = torch.zeros_like(table)
        if name != "sgd":
            self.state["second"] = torch.zeros_like(table)

    def select(self, indices: Tensor) -> Tensor:
        return self.table.index_select(self.axis, indices)

    def snapshot(self, indices: Tensor) -> dict[str, Tensor]:
        """Rows of the table and of its state, as copies."""
        return {n: t.index_select(self.axis, indices) for n, t in {"table": self.table, **self.state}.items()}

    def restore(self, saved: Mapping[str, Tensor], indices: Tensor) -> None:
        """What `snapshot(indices)` gave, put back."""
        with torch.no_grad():
            for name, tensor in {"table": self.table, **self.state}.items():
                tensor.index_copy_(self.axis, indices, saved[name])

    def step(self, grad: Tensor, indices: Tensor, rate: float) -> None:
        """One descent step of the rows along their gradient."""
        with torch.no_grad():
            own = {n: t.index_select(self.axis, indices) for n, t in self.state.items()}
            own["count"] += 1
            move = self._move(grad, own)
            if self.name == "adamw":
                move = move + _DECAY * self.select(indices)
            self.table.index_add_(self.axis, indices, move, alpha=-rate)
            for name, tensor in self.state.items():
                tensor.index_copy_(self.axis, indices, own[name])

    def _move(self, grad: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        if self.name == "sgd":
            return grad
        second = own["second"]
        if self.name == "adagrad":
            return grad / (second.addcmul_(grad, grad).sqrt() + 1e-10)
        if self.name == "rmsprop":
            return grad / (second.mul_(0.99).addcmul_(grad, grad, value=0.01).sqrt() + 1e-8)
        count = own["count"]
        first = own["first"].mul_(0.9).add_(grad, alpha=0.1)
        second.mul_(0.999).addcmul_(grad, grad, value=0.001)
        return (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)


class Average:
    """The running mean of iterates; for tables by row: a row stands still between the steps that touch it."""

    def __init__(self, leaves: Mapping[str, Tensor], tables: Mapping[str, ParameterSpec]) -> None:
        self.tables = tables
        self.sums: dict[str, Tensor] = {}
        self.since: dict[str, Tensor] = {}
        self.count = 0
        self.axes = {n: s.row_axis % leaves[n].dim() for n, s in tables.items() if s.row_axis is not None}

    def begin(self, leaves: Mapping[str, Tensor]) -> None:
        """Forget what was averaged so far."""
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
        """Count the present iterate."""
        if not self.active:
            return
        self.count += 1
        dense = [n for n in leaves if n not in self.axes]
        if dense:
            with torch.no_grad():
                torch._foreach_add_([self.sums[n] for n in dense], [leaves[n] for n in dense])

    def mean(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean iterate, the present one before any was counted."""
        if not self.active or self.count == 0:
            return {n: v.detach() for n, v in leaves.items()}
        result = {}
        for name, leaf in leaves.items():
            total = self.sums[name]
            if name in self.axes:
                total = total + leaf.detach() * (self.count - self.since[name])
            result[name] = total / self.count
        return result
