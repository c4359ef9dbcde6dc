"""Tensors with named axes and the few operations that exact inference needs on them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Named(NamedTuple):
    """A tensor whose axes carry names."""

    tensor: Tensor
    dims: tuple[str, ...]

    def over(self, dims: Sequence[str]) -> Named:
        """The mean over the axes that are not among `dims`."""
        axes = [i for i, d in enumerate(self.dims) if d not in dims]
        kept = tuple(d for d in self.dims if d in dims)
        return Named(self.tensor.mean(axes) if axes else self.tensor, kept)


def align(named: Named, dims: Sequence[str]) -> Tensor:
    """The tensor with its axes in the order of `dims`, size 1 where it has none of that name."""
    if named.dims == tuple(dims):
        return named.tensor
    order = [named.dims.index(d) for d in dims if d in named.dims]
    tensor = named.tensor.permute(order)
    return tensor[tuple(slice(None) if d in named.dims else None for d in dims)]


def union(groups: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """All names of the groups, each once, in order of first appearance."""
    return tuple(dict.fromkeys(name for group in groups for name in group))


def add(terms: Sequence[Named], plates: frozenset[str] = frozenset(), first: str | None = None) -> Named:
    """The sum of the terms, broadcast; `first` leads the axes and the plates come last."""
    names = union(t.dims for t in terms)
    dims = tuple(sorted(names, key=lambda d: (d != first, d in plates)))
    total = align(terms[0], dims)
    for term in terms[1:]:
        total = total + align(term, dims)
    return Named(total, dims)


def contract(factors: Sequence[Named], dims: Sequence[str]) -> Tensor:
    """Σ of the product over every axis that is not among `dims`; the axes of `dims` in order, size 1 if in no factor."""
    names = union(f.dims for f in factors)
    if set(names) <= set(dims):
        return functools.reduce(torch.mul, [align(f, dims) for f in factors])
    kept = [i for i, d in enumerate(names) if d in dims]
    dtype = functools.reduce(torch.promote_types, (f.tensor.dtype for f in factors))
    operands: list[Any] = []
    for factor in factors:
        operands += [factor.tensor.to(dtype), [names.index(d) for d in factor.dims]]
    total: Tensor = torch.einsum(*operands, kept)
    return align(Named(total, tuple(names[i] for i in kept)), dims)


def exp_(values: Tensor) -> Tensor:
    """exp in place; a result below e⁻⁶⁵⁰ (single precision: e⁻⁸⁰) is 0. Closer to the underflow exp takes fifty times as
    long."""
    least = _LEAST.get(values.dtype)
    if least is None:
        return values.exp_()
    low, result = least
    return torch.threshold_(values.clamp_(min=low).exp_(), result, 0.0)


_LEAST = {torch.float64: (-650.0, math.exp(-649.9)), torch.float32: (-80.0, math.exp(-79.9))}


class _LogSumExp(torch.autograd.Function):
    """log Σ exp along one axis; −∞ where all is −∞, with gradient 0 there (torch's is NaN). Twice differentiable."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, axis: int) -> Tensor:
        top = values.amax(axis, keepdim=True)
        top = torch.where(torch.isfinite(top), top, torch.zeros((), dtype=top.dtype, device=top.device))
        out = exp_(values - top).sum(axis).log_().add_(top.squeeze(axis))
        ctx.save_for_backward(values, out)
        ctx.axis = axis
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        values, out = ctx.saved_tensors
        out = out.unsqueeze(ctx.axis)
        finite = torch.isfinite(out)
        weights = torch.where(
            finite, (values - torch.where(finite, out, 0.0)), -torch.inf
        ).exp()  # differentiable
        return weights * grads[0].unsqueeze(ctx.axis), None


def log_sum_exp(values: Tensor, axis: int = 0) -> Tensor:
    """log Σ exp(values) along `axis`, exact at −∞."""
    result: Tensor = _LogSumExp.apply(values, axis)  # type: ignore[no-untyped-call]
    return result


def sizes_of(terms: Iterable[Named]) -> dict[str, int]:
    """The size of every axis that occurs."""
    return {d: s for t in terms for d, s in zip(t.dims, t.tensor.shape, strict=True)}


def pick(
    named: Named, values: Mapping[str, Tensor], plates: Sequence[str], plate_sizes: Mapping[str, int]
) -> Tensor:
    """`named` at given states of its variables: an array with a leading sample axis, then `plates` in order.

    values: state indices [S, *plates of that variable in the order of `plates`, size 1 where it has none].
    """
    index: list[Tensor] = []
    rank = len(plates)
    for dim, size in zip(named.dims, named.tensor.shape, strict=True):
        if dim in values:
            index.append(values[dim])
        else:
            shape = [1] * (rank + 1)
            shape[1 + plates.index(dim)] = size
            index.append(torch.arange(size, device=named.tensor.device).reshape(shape))
    if not index:
        return named.tensor.reshape([1] * (rank + 1))
    return named.tensor[tuple(index)]
