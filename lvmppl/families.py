"""Log-densities in which zeros are data, not accidents.

torch's Categorical and Bernoulli clamp probabilities away from 0 (log 0 becomes −36 in float64); here log 0 is −∞ and
its gradient is 0. Every other family keeps its own `log_prob`. Axes along which a distribution was merely expanded
(stride 0, as a plate does) are left at size 1: the caller broadcasts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor


def safe_log(values: Tensor) -> Tensor:
    """log x with log 0 = −∞ and gradient 0 there (torch's is ∞, which turns into NaN in a product with 0)."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).log(), -torch.inf)


def log_density(fn: Any, value: Tensor) -> Tensor:
    """log p(value) of a Pyro distribution, broadcastable to its batch shape, summed over its event axes (nats)."""
    if isinstance(fn, dist.MaskedDistribution):
        base = log_density(fn.base_dist, value)
        return torch.where(
            torch.as_tensor(fn._mask), base, torch.zeros((), dtype=base.dtype, device=base.device)
        )
    if isinstance(fn, dist.Independent) or type(fn).__name__ == "Independent":
        base = log_density(fn.base_dist, value)
        event = fn.reinterpreted_batch_ndims
        if event == 0:
            return base
        shape = broadcast_shape(base.shape, fn.base_dist.batch_shape)
        return base.expand(shape).sum(tuple(range(-event, 0)))
    if isinstance(fn, torch.distributions.OneHotCategorical):
        return log_density(fn._categorical, value.argmax(-1))
    if isinstance(fn, torch.distributions.Categorical):
        return _categorical(fn, value)
    if isinstance(fn, torch.distributions.Bernoulli):
        return _bernoulli(fn, value)
    result: Tensor = fn.log_prob(value)
    return result


def _categorical(fn: torch.distributions.Categorical, value: Tensor) -> Tensor:
    """log p(value): the logarithm of the table, or of what is looked up in it if that is less."""
    if "probs" in fn.__dict__:
        probs = unexpanded(fn.probs, 1)
        if math.prod(broadcast_shape(probs.shape[:-1], value.shape)) < probs.numel():
            return safe_log(_lookup(probs, value))
    return _lookup(log_table(fn), value)


def relaxed_density(fn: Any, value: Tensor) -> Tensor:
    """log p of a Bernoulli or OneHotCategorical, extended linearly to relaxed states: Σ_k y_k log p_k.

    It is log p itself at a state. 0 · (−∞) = 0.
    """
    if isinstance(fn, dist.MaskedDistribution):
        base = relaxed_density(fn.base_dist, value)
        return torch.where(torch.as_tensor(fn._mask), base, torch.zeros((), dtype=base.dtype))
    if isinstance(fn, dist.Independent):
        base = relaxed_density(fn.base_dist, value)
        return (
            base.sum(tuple(range(-fn.reinterpreted_batch_ndims, 0))) if fn.reinterpreted_batch_ndims else base
        )
    if isinstance(fn, torch.distributions.OneHotCategorical):
        weights, table = value, log_table(fn._categorical)
    elif isinstance(fn, torch.distributions.Bernoulli):
        weights = torch.stack([1 - value, value], -1)
        states = torch.tensor([0.0, 1.0], dtype=value.dtype, device=value.device)
        table = torch.stack([_bernoulli(fn, state) for state in states], -1)
    else:
        result: Tensor = fn.log_prob(value)
        return result
    possible = torch.isfinite(table)
    total = (weights * torch.where(possible, table, 0.0)).sum(-1)
    return torch.where(((weights > 0) & ~possible).any(-1), -torch.inf, total)


def is_zero_safe_discrete(fn: Any) -> bool:
    """Whether `log_density` gives −∞ (and no clamp) for values of probability zero under `fn`."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    kinds = (
        torch.distributions.Categorical
        | torch.distributions.OneHotCategorical
        | torch.distributions.Bernoulli
    )
    return isinstance(fn, kinds)


def log_table(fn: torch.distributions.Categorical) -> Tensor:
    """Log-probabilities [*batch, V]; narrowed before the logarithm, so that a plate costs nothing."""
    return safe_log(unexpanded(fn.probs, 1)) if "probs" in fn.__dict__ else unexpanded(fn.logits, 1)


def unexpanded(tensor: Tensor, event_dim: int = 0) -> Tensor:
    """Narrow batch axes of stride 0 to size 1: a plate repeats a distribution, it does not make new ones."""
    axes = [a for a in range(tensor.dim() - event_dim) if tensor.shape[a] > 1 and tensor.stride(a) == 0]
    if not axes:
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        if _is_plain_view(tensor):
            sizes = [1 if a in axes else size for a, size in enumerate(tensor.shape)]
            return tensor._base.as_strided(sizes, tensor.stride(), tensor.storage_offset())  # type: ignore[union-attr]
        narrow: Tensor = _Narrowed.apply(tensor, axes)  # type: ignore[no-untyped-call]
        return narrow
    return _first_of(tensor, axes)


_VIEWS = frozenset(
    f"{name}Backward0"
    for name in ("Expand", "View", "Unsqueeze", "Squeeze", "Permute", "Transpose", "Slice", "Select")
)


def _is_plain_view(tensor: Tensor) -> bool:
    """Whether a tensor came from what it is a view of by torch's own views alone.

    Its entries can then be read there: the gradient of `expand` would sum over the whole broadcast. A view that a function
    of the user's made (one that reverses gradients) is no plain one.
    """
    base, node = tensor._base, tensor.grad_fn
    if base is None or base.dtype != tensor.dtype:
        return False
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
        if node is not None and (node is base.grad_fn or getattr(node, "variable", None) is base):
            return True
    return False


def _first_of(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in axes:
        tensor = tensor.narrow(axis, 0, 1)
    return tensor


class _Narrowed(torch.autograd.Function):
    """The first entry of repeated axes. Its gradient is spread evenly over them, and never takes their size: the plain
    gradient of `narrow` fills the whole broadcast with zeros."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axes: Sequence[int]) -> Tensor:
        ctx.shape = tensor.shape
        return _first_of(tensor, axes).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        repeats = math.prod(ctx.shape) // max(grad.numel(), 1)
        return (grad / repeats).expand(ctx.shape), None


_CACHE_LINE = 8  # entries in one


def _lookup(table: Tensor, value: Tensor) -> Tensor:
    """table[..., value]: log-probabilities [*batch] of `value` under the rows of `table` [*batch', V]."""
    size = table.shape[-1]
    if (
        getattr(value, "_pyro_categorical_support", None) is not None
        and value.numel() == size == value.shape[0]
    ):
        table = table.reshape((1,) * (1 + value.dim() - table.dim()) + table.shape)
        return table.transpose(-1 - value.dim(), -1).squeeze(-1)
    value = value.long()
    rank = max(table.dim() - 1, value.dim())
    table = table.reshape((1,) * (rank + 1 - table.dim()) + table.shape)
    value = value.reshape((1,) * (rank - value.dim()) + value.shape)
    if all(a == 1 or b == 1 for a, b in zip(table.shape[:-1], value.shape, strict=True)):
        # Axes of the two are disjoint: one index_select, whose gradient never takes the size of the broadcast.
        rows = table.reshape(-1, size)
        if len(rows) >= _CACHE_LINE:  # whole columns are copied, and stay together in memory
            picked = rows.T.contiguous().index_select(0, value.reshape(-1)).T
        else:
            picked = rows.index_select(-1, value.reshape(-1))
        picked = picked.reshape(table.shape[:-1] + value.shape)
        order = [axis for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for axis in pair]
        shape = [max(a, b) for a, b in zip(table.shape[:-1], value.shape, strict=True)]
        return picked.permute(order).reshape(shape)
    index = [_axis_index(table, axis, rank) for axis in range(rank)]
    return table[(*index, value)]


def _axis_index(table: Tensor, axis: int, rank: int) -> Tensor:
    shape = [1] * rank
    shape[axis] = table.shape[axis]
    return torch.arange(table.shape[axis], device=table.device).reshape(shape)


def _bernoulli(fn: torch.distributions.Bernoulli, value: Tensor) -> Tensor:
    if "probs" in fn.__dict__:
        probs = unexpanded(fn.probs, 0)
        return torch.where(value > 0.5, safe_log(probs), safe_log(1 - probs))
    logits = unexpanded(fn.logits, 0)
    return torch.where(
        value > 0.5, torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    )
