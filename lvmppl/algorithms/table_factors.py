"""Factors and expected statistics of sites as products with one design matrix: H T one way, q Tᵀ the other.

Shapes: R restarts, `·t` statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from lvmppl.algorithms.closed_form import ClosedSite
from lvmppl.algorithms.statistics import (
    PACKED,
    RESTART,
    Labels,
    Statistics,
    contract,
)
from lvmppl.bilinear import LOG_2PI, mvn_natural, normal_natural, packed_outer, whitener_of
from lvmppl.density import Values, time_axis
from lvmppl.exact import named as named_tensors
from lvmppl.exact.named import Named, align, union
from lvmppl.exponential import CATEGORY, COLUMN, ROW, Reading
from lvmppl.families import safe_log

STATISTIC = "·t"


def events_of(reading: Reading) -> tuple[str, ...]:
    """Axes of one value: of its event, then of its categories or coordinates."""
    core = (CATEGORY,) if reading.kind == "simplex" else (ROW,) if reading.kind == "mvn" else ()
    return tuple(f"·{i}" for i in range(reading.event_rank, 0, -1)) + core


def design_of(reading: Reading, reference: Named | None, dtype: torch.dtype) -> Named:
    """T [·t, *batch]: a row of ones, x − r, (x − r)² for normals; a and b, or counts, for the others."""
    events = events_of(reading)
    parts = reading.statistics(dtype)
    dims = union(p.dims for p in parts)
    batch = tuple(d for d in dims if d not in events)
    inner = tuple(d for d in events if d in dims)
    sizes = {d: s for p in parts for d, s in zip(p.dims, p.tensor.shape, strict=True)}
    shape = [sizes[d] for d in inner] + [sizes[d] for d in batch]
    width = prod(sizes[d] for d in inner)
    rows = [sizes[d] for d in batch]
    if reading.kind in ("normal", "mvn"):
        assert reference is not None
        x = align(parts[0], (*inner, *batch)).expand(shape)
        centre = align(reference, (*inner, *batch))
        squares = width * (width + 1) // 2 if reading.kind == "mvn" else width
        design = x.new_empty(1 + width + squares, *rows)
        design[0] = 1.0
        y = design[1 : 1 + width]
        torch.sub(x, centre, out=y.view(shape))
        if reading.kind == "normal":
            torch.mul(y, y, out=design[1 + width :])
        else:
            packed_outer(y, design[1 + width :])
        return Named(design, (STATISTIC, *batch))
    flat = [align(p, (*inner, *batch)).expand(shape).reshape(width, *rows) for p in parts]
    return Named(torch.cat(flat) if len(flat) > 1 else flat[0], (STATISTIC, *batch))


def times_design(natural: Named, design: Named) -> Named:
    """Σ_t H T over the axes of both; 0 · (−∞) = 0."""
    h, t = natural.tensor, design.tensor
    shared = set(natural.dims) & set(design.dims) - {STATISTIC}
    impossible = h == -torch.inf
    if bool(impossible.any()):
        plain = times_design(Named(torch.where(impossible, 0.0, h), natural.dims), design)
        counted = Named(t.abs(), design.dims)
        hit = times_design(Named(impossible.to(h.dtype), natural.dims), counted)
        return Named(torch.where(hit.tensor > 0, -torch.inf, plain.tensor), plain.dims)
    if shared:
        keep = (*natural.dims[:-1], *(d for d in design.dims[1:] if d not in shared))
        return contract(natural, design, tuple(d for d in keep if d != RESTART))
    result = h.reshape(-1, h.shape[-1]) @ t.reshape(len(t), -1)
    return Named(result.reshape([*h.shape[:-1], *t.shape[1:]]), (*natural.dims[:-1], *design.dims[1:]))


class _Fields:
    """The fields of a site [R, *batch of the fields, width], in the order of a value's flattened events."""

    def __init__(
        self, site: ClosedSite, reading: Reading, inner_sizes: Mapping[str, int], values: Values
    ) -> None:
        events, sizes = events_of(reading), {**site.sizes, **inner_sizes}
        inner = tuple(d for d in events if d in sizes)
        self.batch = tuple(d for d in site.keep if d not in events)
        self.dims = (RESTART, *self.batch, *inner)
        restarts = len(next(iter(values.values())))
        self._shape = [restarts, *(sizes[d] for d in (*self.batch, *inner))]
        self._site, self._values = site, values

    def flat(self, key: str) -> Tensor:
        return self._flat(self._site.field(key, self._values))

    def shift(self) -> Tensor:
        """Locations less the reference."""
        assert self._site.reference is not None
        return self.flat("loc") - self._flat(self._site.reference)

    def root(self) -> Tensor:
        """L of Σ = L Lᵀ [R, *batch, width, width]."""
        covariance = align(self._site.field("covariance", self._values), (*self.dims, COLUMN))
        root: Tensor = torch.linalg.cholesky(covariance)
        return root

    def _flat(self, named: Named) -> Tensor:
        return align(named, self.dims).expand(self._shape).reshape(*self._shape[: 1 + len(self.batch)], -1)


def natural_of(
    site: ClosedSite, reading: Reading, inner_sizes: Mapping[str, int], values: Values
) -> tuple[Named, Tensor | None]:
    """H [R, *batch of the fields, ·t], in the order of the design's rows, and of locations the precisions (of a matrix
    its diagonal) that the squares of x − r meet, [R, *batch, width]."""
    fields = _Fields(site, reading, inner_sizes, values)
    sharpness = None
    if reading.kind == "normal":
        sharpness = fields.flat("precision")
        rows = normal_natural(fields.shift(), sharpness)
    elif reading.kind == "mvn":
        rows, whitener = mvn_natural(fields.shift(), fields.root())
        sharpness = whitener.square().sum(-2)
    elif reading.kind == "beta":
        p = fields.flat("probs")
        rows = [safe_log(p), safe_log(1 - p)]
    elif reading.kind == "gamma":
        rate = fields.flat("rate")
        rows = [safe_log(rate), -rate]
    else:
        rows = [safe_log(fields.flat("probs"))]
    return Named(torch.cat(rows, -1), (RESTART, *fields.batch, STATISTIC)), sharpness


def by_distances(
    site: ClosedSite, reading: Reading, inner_sizes: Mapping[str, int], values: Values, design: Named
) -> Named:
    """The factor of a location by −½ |L⁻¹ (x − r) − L⁻¹ (μ − r)|²: only the digits of x, not of its square, are lost.

    For that it takes R × K × D numbers a row, where H T takes R × K.
    """
    fields = _Fields(site, reading, inner_sizes, values)
    m, data = fields.shift(), design.dims[1:]
    width = m.shape[-1]
    lone = tuple(d for d in data if d not in fields.batch)
    dims = (RESTART, *fields.batch, ROW, *lone)

    def at(tensor: Tensor) -> Tensor:
        return align(Named(tensor, (RESTART, *fields.batch, ROW)), dims)

    y = Named(design.tensor[1 : 1 + width], (ROW, *data))
    if reading.kind == "normal":
        precision = fields.flat("precision")
        constant = (precision.log() - LOG_2PI).sum(-1, keepdim=True)
        square = (align(y, dims) - at(m)).square() * at(precision)
    else:
        root = fields.root()
        whitener = whitener_of(root)
        own = Named(whitener, (RESTART, *fields.batch, ROW, COLUMN))
        white = named_tensors.contract((own, Named(y.tensor, (COLUMN, *data))), dims)
        constant = -2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True) - width * LOG_2PI
        square = (white - at((whitener @ m.unsqueeze(-1)).squeeze(-1))).square()
    axis = 1 + len(fields.batch)
    return Named((at(constant).squeeze(axis) - square.sum(axis)) / 2, tuple(d for d in dims if d != ROW))


def looked_up(site: ClosedSite, reading: Reading, labels: Labels, values: Values, led: bool) -> Named:
    """log p of category labels: a renamed table where the labels are all states, else the picked entries."""
    named = site.field("probs", values)
    table = Named(safe_log(named.tensor), named.dims)
    if not led:
        table = unled(table)
    if labels.state is not None and labels.state not in table.dims:
        return Named(table.tensor, (*table.dims[:-1], labels.state))
    events = events_of(reading)
    shared = tuple(d for d in table.dims if d in labels.named.dims)
    rest = tuple(d for d in table.dims[:-1] if d not in shared)
    lone = tuple(d for d in labels.named.dims if d not in shared)
    if shared:
        return _summed_over(_picked(table, labels.named, rest, shared, lone), events)
    # The steps of a chain first and its states last, which is how its sweeps work through memory.
    if any(_is_time(d) for d in lone):
        lone = tuple(sorted(lone, key=lambda d: not _is_time(d)))
        rows = align(table, (CATEGORY, *rest)).reshape(table.tensor.shape[-1], -1).contiguous()
        tensor = rows.index_select(0, labels.index(lone).flatten())
        dims = (*lone, *rest)
    else:
        grid = align(table, (*rest, CATEGORY))
        tensor = grid.index_select(-1, labels.index(lone).flatten())
        dims = (*rest, *lone)
    sizes = {**site.sizes, **dict(zip(labels.named.dims, labels.named.tensor.shape, strict=True))}
    sizes.update(zip(table.dims, table.tensor.shape, strict=True))
    return _summed_over(Named(tensor.reshape([sizes[d] for d in dims]), dims), events)


def _picked(
    table: Named, labels: Named, rest: Sequence[str], shared: Sequence[str], lone: Sequence[str]
) -> Named:
    """Entries of a table that has axes of its own along some of the labels' axes."""
    grid = align(table, (*rest, *shared, CATEGORY))
    index = align(Named(labels.tensor.long(), labels.dims), (*shared, *lone))
    where: list[Tensor] = []
    for axis in range(len(shared)):
        view = [1] * index.dim()
        view[axis] = index.shape[axis]
        where.append(torch.arange(index.shape[axis]).reshape(view))
    slots: list[slice | Tensor] = [slice(None)] * len(rest)
    return Named(grid[(*slots, *where, index)], (*rest, *shared, *lone))


def _is_time(dim: str) -> bool:
    return dim.startswith(time_axis(0)[:-1])


def _summed_over(named: Named, events: Sequence[str]) -> Named:
    axes = [i for i, d in enumerate(named.dims) if d in events]
    if not axes:
        return named
    return Named(named.tensor.sum(axes), tuple(d for d in named.dims if d not in events))


def sums_of(site: ClosedSite, reading: Reading, q: Named, design: Named) -> Named:
    """q Tᵀ."""
    batch = tuple(d for d in site.keep if d not in events_of(reading))
    lone = tuple(d for d in design.dims[1:] if d not in batch)
    rest = tuple(d for d in q.dims if d not in lone)
    if set(design.dims[1:]) == set(lone) <= set(q.dims) and all(d == RESTART or d in batch for d in rest):
        t = align(design, (STATISTIC, *lone)).reshape(len(design.tensor), -1)
        left = align(q, (*rest, *lone))
        product = left.reshape(-1, t.shape[1]) @ t.T
        return Named(product.reshape(*left.shape[: len(rest)], len(t)), (*rest, STATISTIC))
    return contract(q, design, (*batch, STATISTIC))


def as_statistics(site: ClosedSite, reading: Reading, sizes: Mapping[str, int], sums: Named) -> Statistics:
    """The sums of the design's rows, taken apart by statistic."""
    inner = tuple(d for d in events_of(reading) if d in sizes)
    width, lead = prod(sizes[d] for d in inner), sums.dims[:-1]
    s = sums.tensor
    gone = [d for d in inner if d not in site.keep and d not in (ROW, CATEGORY)]

    def shaped(tensor: Tensor) -> Named:
        shape = [*tensor.shape[:-1], *(sizes[d] for d in inner)]
        named = Named(tensor.reshape(shape), (*lead, *inner))
        if gone:
            axes = [named.dims.index(d) for d in gone]
            named = Named(named.tensor.sum(axes), tuple(d for d in named.dims if d not in gone))
        return named

    if reading.kind in ("beta", "gamma"):
        return {"a": shaped(s[..., :width]), "b": shaped(s[..., width:])}
    if reading.kind == "simplex":
        return {"counts": shaped(s)}
    n = Named(s[..., 0] * prod(sizes[d] for d in gone), lead)
    first = shaped(s[..., 1 : 1 + width])
    second = (
        Named(s[..., 1 + width :], (*lead, PACKED)) if reading.kind == "mvn" else shaped(s[..., 1 + width :])
    )
    return {"n": n, "first": first, "second": second}


def unled(named: Named) -> Named:
    """Of a single restart, without its axis."""
    if RESTART not in named.dims:
        return named
    return Named(named.tensor.squeeze(0), named.dims[1:])
