"""Expected sufficient statistics of a site: ⟨q, t(x)⟩ summed down to the shape of the distribution's parameters.

A statistic keeps the axes of the site's fields (`keep`: a few states, an event axis) and sums over all others, the data
first, as a matrix product; nothing of the size data × states × features is built. Locations are subtracted from a
reference value first: sums of squares cancel badly otherwise.

Shapes: `RESTART` may lead the axes of q, and then leads those of the statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from lvmppl.density import time_axis
from lvmppl.exact import named as named_tensors
from lvmppl.exact.named import Named, align, union
from lvmppl.exponential import CATEGORY, COLUMN, ROW, Reading

RESTART = "·restart"
PACKED = "·p"
"""The axis of the entries of a symmetric matrix on and above its diagonal."""

_FEW = 32  # tables of labels that are added up one by one

Statistics = dict[str, Named]


def keep_dims(reading: Reading) -> tuple[str, ...]:
    """Batch axes of the fields."""
    core = (CATEGORY, ROW, COLUMN)
    return tuple(d for d in union(n.dims for n in reading.fields.values()) if d not in core)


def accumulate(reading: Reading, q: Named, keep: Sequence[str], reference: Named | None) -> Statistics:
    """The statistics of one site on the rows at hand, by kind.

    simplex: `counts` [keep, ·v]. beta, gamma: `a`, `b` [keep]. normal: `n`, `first`, `second` about `reference`, or where
    that is None about the site's own location. mvn: the same, with `·i` and packed `·p` axes.
    """
    mask = reading.mask()
    if mask is not None:
        q = _times(q, mask)
    value_dims = reading.named(reading.value, reading.core_rank).dims
    if reading.kind == "simplex":
        return {"counts": _counts(reading, q, keep)}
    parts = reading.statistics(q.tensor.dtype)
    if reading.kind in ("beta", "gamma"):
        return {key: contract(q, t, keep, value_dims, parts) for key, t in zip("ab", parts, strict=True)}
    centred = _minus(parts[0], reading.fields["loc"] if reference is None else reference)
    one = Named(torch.ones((), dtype=q.tensor.dtype), ())
    n = contract(q, one, keep, tuple(d for d in value_dims if d != ROW), parts)
    if reading.kind == "normal":
        first = contract(q, centred, keep, value_dims, parts)
        squares = Named(centred.tensor.square(), centred.dims)
        return {"n": n, "first": first, "second": contract(q, squares, keep, value_dims, parts)}
    first = contract(q, centred, (*keep, ROW), value_dims, parts)
    second = contract(
        q, Named(packed(centred.tensor), (*centred.dims[:-1], PACKED)), (*keep, PACKED), value_dims, parts
    )
    return {"n": n, "first": first, "second": second}


def contract(
    q: Named, t: Named, keep: Sequence[str], value_dims: Sequence[str] = (), parts: Sequence[Named] = ()
) -> Named:
    """Σ q t over all axes but `keep` (and `RESTART`).

    An event axis of the value that neither q, nor t, nor `keep` has multiplies the sum by its size.
    """
    keep, summed = (RESTART, *keep), set(q.dims) | set(t.dims)
    q = _sum_to(q, {*t.dims, *keep})
    t = _sum_to(t, {*q.dims, *keep})
    dims = tuple(d for d in keep if d in q.dims or d in t.dims)
    tensor = named_tensors.contract((q, t), dims)
    sizes = {d: s for p in parts for d, s in zip(p.dims, p.tensor.shape, strict=True)}
    lost = prod(sizes.get(d, 1) for d in value_dims if d not in keep and d not in summed and _is_event(d))
    return Named(tensor * lost if lost != 1 else tensor, dims)


def _is_event(dim: str) -> bool:
    """Whether an axis is one of the event: numbered, or the steps of a chain."""
    return dim[:1] == "·" and (dim[1:].isdigit() or dim.startswith(time_axis(0)[:-1]))


def _sum_to(named: Named, dims: set[str]) -> Named:
    axes = [i for i, d in enumerate(named.dims) if d not in dims]
    if not axes:
        return named
    return Named(named.tensor.sum(axes), tuple(d for d in named.dims if d in dims))


def _times(a: Named, b: Named) -> Named:
    dims = union((a.dims, b.dims))
    return Named(align(a, dims) * align(b, dims).to(a.tensor.dtype), dims)


def _minus(a: Named, b: Named) -> Named:
    every = union((a.dims, b.dims))
    dims = tuple(d for d in every if d != ROW) + ((ROW,) if ROW in every else ())
    return Named(align(a, dims) - align(b, dims), dims)


def packed(y: Tensor) -> Tensor:
    """y_i y_j for i ≤ j: [..., D] → [..., D (D + 1)/2]."""
    size = y.shape[-1]
    i, j = torch.triu_indices(size, size)
    return y.index_select(-1, i).mul_(y.index_select(-1, j))


def unpacked(p: Tensor) -> Tensor:
    """The symmetric matrix of packed entries: [..., P] → [..., D, D]."""
    size = int(((8 * p.shape[-1] + 1) ** 0.5 - 1) / 2 + 0.5)
    return p.index_select(-1, _packed_positions(size)).reshape(*p.shape[:-1], size, size)


@functools.lru_cache(maxsize=64)
def _packed_positions(size: int) -> Tensor:
    """Where the packed entries have that of each row and column, [D · D]."""
    i, j = torch.triu_indices(size, size)
    where = torch.zeros(size, size, dtype=torch.long)
    where[i, j] = where[j, i] = torch.arange(len(i))
    return where.flatten()


def _counts(reading: Reading, q: Named, keep: Sequence[str]) -> Named:
    """Expected counts of each category [keep, V]."""
    if not reading.labels:
        (t,) = reading.statistics(q.tensor.dtype)
        return contract(q, t, (*keep, CATEGORY), t.dims, (t,))
    return label_sums(reading, keep).counts(q)


class Labels:
    """The labels of some rows, and what sums weights over the rows of each label: made once, for any weights.

    state: the enumerated site whose states the labels are, in order, if they are.
    """

    def __init__(self, labels: Named, size: int, keep: Sequence[str]) -> None:
        self.named, self.size, self.keep = labels, size, tuple(keep)
        self.state: str | None = None
        if len(labels.dims) == 1 and labels.dims[0] not in keep and len(labels.tensor) == size:
            own = labels.tensor.long()
            self.state = labels.dims[0] if bool(torch.equal(own, torch.arange(size))) else None
        self.shared = tuple(d for d in keep if d in labels.dims)
        self.lone = tuple(d for d in labels.dims if d not in keep)
        self._index: dict[tuple[str, ...], Tensor] = {}

    def index(self, lone: Sequence[str]) -> Tensor:
        """The labels [*shared, *lone flat], the axes that are summed in any order."""
        key = tuple(lone)
        if key not in self._index:
            tensor = align(Named(self.named.tensor.long(), self.named.dims), (*self.shared, *key))
            lead = prod(tensor.shape[: len(self.shared)])
            self._index[key] = tensor.reshape(lead, -1).contiguous()
        return self._index[key]

    def counts(self, q: Named) -> Named:
        """Expected counts of each category [keep, V]."""
        if self.state is not None and self.state in q.dims:
            return self._of_states(q)
        shared = self.shared
        q = _sum_to(q, {RESTART, *self.keep, *self.named.dims})
        # Axes in the order of memory, so that rows of weights are added up without a copy.
        strides = dict(zip(q.dims, q.tensor.stride(), strict=True))
        lone = tuple(sorted(self.lone, key=lambda d: -strides.get(d, 0)))
        rest = tuple(d for d in (RESTART, *self.keep) if d in q.dims and d not in shared)
        sizes = dict(zip(self.named.dims, self.named.tensor.shape, strict=True))
        sizes.update(zip(q.dims, q.tensor.shape, strict=True))
        weight = align(q, (*shared, *lone, *rest))
        weight = weight.expand([sizes[d] for d in (*shared, *lone, *rest)])
        index = self.index(lone)
        weight = weight.reshape(*index.shape, -1)
        result = weight.new_zeros(len(index), self.size, weight.shape[-1])
        if len(index) > _FEW:
            result.scatter_add_(1, index.unsqueeze(-1).expand(weight.shape), weight)
        else:  # several times as fast, one at a time
            for row in range(len(index)):
                result[row].index_add_(0, index[row], weight[row])
        named = Named(
            result.reshape([*(sizes[d] for d in shared), self.size, *(sizes[d] for d in rest)]),
            (*shared, CATEGORY, *rest),
        )
        final = (*(d for d in (RESTART, *self.keep) if d in named.dims), CATEGORY)
        return Named(align(named, final), final)

    def _of_states(self, q: Named) -> Named:
        renamed = Named(q.tensor, tuple(CATEGORY if d == self.state else d for d in q.dims))
        dims = (*(d for d in (RESTART, *self.keep) if d in q.dims), CATEGORY)
        return Named(align(_sum_to(renamed, set(dims)), dims), dims)


def label_sums(reading: Reading, keep: Sequence[str]) -> Labels:
    """The labels of a reading of categories."""
    return Labels(reading.named(reading.value), reading.fields["probs"].tensor.shape[-1], keep)


def add_statistics(total: Statistics | None, part: Statistics, by_row: str | None = None) -> Statistics:
    """Sums of two pieces of the data; what keeps the axis `by_row` of the rows, one after the other."""
    if total is None:
        return part
    result = {}
    for key, one in total.items():
        both = one.tensor, align(part[key], one.dims)
        if by_row is not None and by_row in one.dims:
            result[key] = Named(torch.cat(both, one.dims.index(by_row)), one.dims)
        else:
            result[key] = Named(both[0] + both[1], one.dims)
    return result


def stacked(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of one site, a restart each, as those of several restarts."""
    result = {}
    for key, first in parts[0].items():
        dims = (RESTART, *(d for d in first.dims if d != RESTART))
        result[key] = Named(torch.cat([align(p[key], dims) for p in parts]), dims)
    return result


def of_restarts(statistics: Statistics, index: Tensor) -> Statistics:
    """Those of some restarts."""
    return {
        k: Named(n.tensor.index_select(0, index), n.dims) if n.dims[:1] == (RESTART,) else n
        for k, n in statistics.items()
    }


def reference_of(reading: Reading) -> tuple[Named, Named]:
    """(mean, variance) of the data of a normal or mvn site, over all but the event axes along which its fields vary.

    Of those that count: what a mask hides may be any number (a code for missing ones) and must not set their scale.
    """
    (x,) = reading.statistics()
    varying = keep_dims(reading)
    dims = tuple(d for d in x.dims if (d in varying and _is_event(d)) or d == ROW)
    axes = [i for i, d in enumerate(x.dims) if d not in dims]
    mean, variance = (
        _moments(x.tensor, axes, entries_that_count(reading, x))
        if axes
        else (x.tensor, torch.zeros_like(x.tensor))
    )
    kept = tuple(d for d in x.dims if d in dims)
    return Named(mean, kept), Named(variance, kept)


def entries_that_count(reading: Reading, x: Named) -> Tensor | None:
    """Which entries of x count, in some state or repetition at least: of the rank of x."""
    mask = reading.mask()
    if mask is None:
        return None
    others = [i for i, d in enumerate(mask.dims) if d not in x.dims]
    kept = tuple(d for d in mask.dims if d in x.dims)
    return align(Named(mask.tensor.amax(others) if others else mask.tensor, kept), x.dims) > 0


def _moments(x: Tensor, axes: list[int], counting: Tensor | None) -> tuple[Tensor, Tensor]:
    if counting is None:
        return x.mean(axes), x.var(axes, correction=0)
    counting = counting.expand(x.shape)
    number = counting.sum(axes, keepdim=True).clamp_min(1)
    mean = torch.where(counting, x, 0.0).sum(axes, keepdim=True) / number
    squares = torch.where(counting, x - mean, 0.0).square().sum(axes, keepdim=True)
    kept = [size for i, size in enumerate(x.shape) if i not in axes]
    return mean.reshape(kept), (squares / number).reshape(kept)


def sizes_of(parts: Mapping[str, Named]) -> dict[str, int]:
    return {d: s for n in parts.values() for d, s in zip(n.dims, n.tensor.shape, strict=True)}
