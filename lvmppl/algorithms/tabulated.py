"""EM without running the model: every factor ⟨η, t(x)⟩ from the table of exponential families, piece by piece.

Where every field of every site is a lookup, the plan is the model. A piece of the data becomes a design matrix T of
statistics with a row per statistic; a factor is then the matrix product H T with the natural parameters H, and the
expected statistics are the matrix product q Tᵀ of the same T while it is in the cache. Restarts are one axis more of H
and q. Nothing grows with the number of rows.

Shapes: R restarts, K states, N rows of a piece, `·t` statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from lvmppl.algorithms.closed_form import ClosedSite
from lvmppl.algorithms.evidence import is_chunkable
from lvmppl.algorithms.plan import Plan, working_dtype
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.statistics import (
    PACKED,
    RESTART,
    Labels,
    Statistics,
    add_statistics,
    contract,
    label_sums,
    stacked,
)
from lvmppl.bilinear import mvn_natural, normal_natural, packed_outer
from lvmppl.density import Factor, Values, Variable, time_axis
from lvmppl.exact.elimination import eliminate
from lvmppl.exact.named import Named, add, align, union
from lvmppl.exponential import CATEGORY, ROW, Reading, read_factor, read_factors
from lvmppl.families import safe_log

STATISTIC = "·t"
_ENTRIES = 2**20  # of the design matrix and the factors of one piece: 8 MiB in float64
_PRECISE = 1e6  # largest squared distance from the reference, in variances, at which squares may be expanded


class Imprecise(Exception):
    """Expanding squares would lose too many digits at the parameters of these restarts [R]."""

    def __init__(self, restarts: Tensor) -> None:
        super().__init__()
        self.restarts = restarts


@dataclass(frozen=True)
class Piece:
    """Some rows of the data, ready for any θ: readings, design matrices, masks and labels by site."""

    size: int
    readings: Mapping[str, Reading]
    designs: Mapping[str, Named]
    masks: Mapping[str, Named | None]
    labels: Mapping[str, Labels]
    variables: Mapping[str, Variable]


@dataclass(frozen=True)
class Tabulated:
    """A model as tables: its sites with all their values, variables, plates and the constant Σ log h(x)."""

    sites: tuple[ClosedSite, ...]
    readings: Mapping[str, Reading]
    plates: Mapping[str, frozenset[str]]
    variables: Mapping[str, Variable]
    sizes: Mapping[str, int]
    data_plate: str | None
    total: int
    chunkable: bool
    constant: float
    farthest: Mapping[str, Tensor]
    inner: Mapping[str, Mapping[str, int]]
    """By site, the event axes of its value and their sizes."""
    dtype: torch.dtype = torch.float64
    kept: dict[int, Piece] = field(default_factory=dict)

    @property
    def has_chains(self) -> bool:
        return any(v.steps is not None for v in self.variables.values())

    def e_step(self, values: Values) -> tuple[Tensor, dict[str, Statistics]]:
        """log p(x; θ) of each restart [R] and the expected statistics; values: [R, *shape].

        Raises:
            Imprecise: a variance is so small against the distances between locations that digits would be lost.
        """
        restarts = len(next(iter(values.values())))
        if restarts > 1 and self.has_chains:  # a chain's kernel wants one transition for all sequences
            each = [self.e_step(one_of(values, r)) for r in range(restarts)]
            totals = torch.cat([t for t, _ in each])
            return totals, {n: stacked([own[n] for _, own in each]) for n in each[0][1]}
        natural = self._naturals(values, restarts)
        statistics: dict[str, Statistics] = {}
        total: Tensor | None = None
        for piece in self.pieces(restarts):
            part, own = self._visit(values, natural, piece, restarts)
            total = part if total is None else total + part
            for name, s in own.items():
                statistics[name] = add_statistics(statistics.get(name), s)
        assert total is not None
        return total + self.constant, statistics

    @property
    def is_one_piece(self) -> bool:
        """Whether the data fit the cache whole."""
        return self._step(1) == self.total

    def entries(self, restarts: int) -> int:
        """Of the design matrix and the factors of the whole data."""
        return self.total * _entries_of_a_row(self.sites, self.readings, self.variables, self.total, restarts)

    def _step(self, restarts: int) -> int:
        """Rows of a piece."""
        if not self.chunkable:
            return self.total
        return _rows_of_a_piece(self.sites, self.readings, self.variables, self.total, restarts)

    def pieces(self, restarts: int = 1) -> Iterator[Piece]:
        """The data in order; a single piece is made once for all steps."""
        step = self._step(restarts)
        if step == self.total:
            if not self.kept:
                self.kept[0] = self._prepared(0, self.total)
            yield self.kept[0]
            return
        for begin in range(0, self.total, step):
            yield self._prepared(begin, min(step, self.total - begin))

    def _prepared(self, begin: int, size: int) -> Piece:
        readings = {
            s.name: _slice(self.readings[s.name], self.data_plate, begin, size, self.total)
            for s in self.sites
        }
        designed = [s for s in self.sites if self._is_designed(s)]
        designs = {s.name: _design(readings[s.name], s.reference, self.dtype) for s in designed}
        masks = {n: r.mask() for n, r in readings.items()}
        labels = {s.name: label_sums(readings[s.name], s.keep) for s in self.sites if s.name not in designs}
        variables = {n: self._of_rows(v, begin, size) for n, v in self.variables.items()}
        return Piece(size, readings, designs, masks, labels, variables)

    def _of_rows(self, variable: Variable, begin: int, size: int) -> Variable:
        """A variable on some rows: chains have lengths by row."""
        if variable.lengths is None or self.data_plate not in variable.lengths_dims:
            return variable
        axis = variable.lengths_dims.index(self.data_plate)
        return replace(variable, lengths=variable.lengths.narrow(axis, begin, size))

    def _is_designed(self, site: ClosedSite) -> bool:
        """Whether the site has a design matrix; labels of categories are looked up instead."""
        return not self.readings[site.name].labels

    def _naturals(self, values: Values, restarts: int) -> dict[str, Named]:
        result = {}
        coarse: Tensor | None = None
        for site in self.sites:
            if not self._is_designed(site):
                continue
            named, sharpness = _natural(site, self.readings[site.name], self.inner[site.name], values)
            if sharpness is not None:
                lost = (sharpness * self.farthest[site.name]).sum(-1).reshape(restarts, -1).amax(1)
                own = ~(lost <= _PRECISE)
                coarse = own if coarse is None else coarse | own
            result[site.name] = named if restarts > 1 else _unled(named)
        if coarse is not None and bool(coarse.any()):
            raise Imprecise(coarse)
        return result

    def _visit(
        self, values: Values, natural: Mapping[str, Named], piece: Piece, restarts: int
    ) -> tuple[Tensor, dict[str, Statistics]]:
        factors: dict[str, Named] = {}
        for site in self.sites:
            name = site.name
            if name in natural:
                factor = _product(natural[name], piece.designs[name])
            else:
                factor = _looked_up(site, piece.readings[name], piece.labels[name], values, restarts > 1)
            mask = piece.masks[name]
            if mask is not None:
                dims = union((factor.dims, mask.dims))
                factor = Named(torch.where(align(mask, dims) > 0, align(factor, dims), 0.0), dims)
            factors[name] = factor
        log_evidence, q = self._posterior(factors, piece, restarts)
        return log_evidence, self.statistics(piece, q)

    def statistics(self, piece: Piece, q: Mapping[str, Named]) -> dict[str, Statistics]:
        """The expected statistics of every site on a piece, given the weights of its factors."""
        result = {}
        for site in self.sites:
            name, weight = site.name, q[site.name]
            mask = piece.masks[name]
            if mask is not None:
                dims = union((weight.dims, mask.dims))
                weight = Named(align(weight, dims) * align(mask, dims), dims)
            if name in piece.designs:
                sums = _sums(site, piece.readings[name], weight, piece.designs[name])
                result[name] = _cut(site, piece.readings[name], self.inner[name], sums)
            else:
                result[name] = {"counts": piece.labels[name].counts(weight)}
        return result

    def _posterior(
        self, factors: Mapping[str, Named], piece: Piece, restarts: int
    ) -> tuple[Tensor, dict[str, Named]]:
        """log Z of each restart [R], and q of each factor at its own axes."""
        if len(self.variables) == 1 and not self.has_chains:
            (variable,) = self.variables.values()
            plates = {self.plates[n] for n in factors}
            if plates == {frozenset(variable.plates)} and set(variable.plates) == {self.data_plate}:
                return _single(factors, variable.name, self.data_plate, piece.size, restarts)
        return self._eliminated(factors, piece, restarts)

    def _eliminated(
        self, factors: Mapping[str, Named], piece: Piece, restarts: int
    ) -> tuple[Tensor, dict[str, Named]]:
        extra = frozenset([RESTART])
        leaves, own = [], []
        for name, named in factors.items():
            leaf = named.tensor.detach().requires_grad_()
            leaves.append(leaf)
            own.append(Factor(name, leaf, named.dims, self.plates[name] | extra))
        sizes = {**self.sizes, RESTART: restarts}
        if self.data_plate is not None:
            sizes[self.data_plate] = piece.size
        variables = {n: replace(v, plates=(*v.plates, RESTART)) for n, v in piece.variables.items()}
        with torch.enable_grad():
            done = eliminate(own, variables, sizes, RESTART)
            assert done.per_datum is not None
            grads = torch.autograd.grad(done.per_datum.sum(), leaves)
        q = {f.site: Named(g, f.dims) for f, g in zip(own, grads, strict=True)}
        return done.per_datum.detach(), q


def _single(
    factors: Mapping[str, Named], variable: str, plate: str | None, size: int, restarts: int
) -> tuple[Tensor, dict[str, Named]]:
    """One enumerated site a datum: q is a softmax, and log Z the sum of its normalisers."""
    total = add(list(factors.values()), frozenset([RESTART]), first=variable)
    assert plate is not None
    lead = (RESTART,) if restarts > 1 else ()
    dims = (*lead, variable, plate)
    joint = align(total, dims)
    if joint.shape[-1] != size:
        joint = joint.expand(*joint.shape[:-1], size)
    top = joint.amax(-2, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = (joint - top).exp_()
    norm = weights.sum(-2, keepdim=True)
    log_evidence = (top.sum((-1, -2)) + norm.log().sum((-1, -2))).reshape(-1)
    weights /= torch.where(norm > 0, norm, 1.0)
    whole = Named(weights, dims)
    q: dict[str, Named] = {}
    for name, factor in factors.items():
        axes = [i for i, d in enumerate(dims) if d != RESTART and d not in factor.dims]
        kept = tuple(d for i, d in enumerate(dims) if i not in axes)
        q[name] = Named(weights.sum(axes), kept) if axes else whole
    return log_evidence, q


# --------------------------------------------------------------------------------------- factors and statistics


def _events(reading: Reading) -> tuple[str, ...]:
    core = (CATEGORY,) if reading.kind == "simplex" else (ROW,) if reading.kind == "mvn" else ()
    return tuple(f"·{i}" for i in range(reading.event_rank, 0, -1)) + core


def _design(reading: Reading, reference: Named | None, dtype: torch.dtype) -> Named:
    """T [·t, *batch]: a row of ones, x − r, (x − r)² for normals; a and b, or counts, for the others."""
    events = _events(reading)
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


def _product(natural: Named, design: Named) -> Named:
    """Σ_t H T over the axes of both; 0 · (−∞) = 0."""
    h, t = natural.tensor, design.tensor
    shared = set(natural.dims) & set(design.dims) - {STATISTIC}
    impossible = h == -torch.inf
    if bool(impossible.any()):
        plain = _product(Named(torch.where(impossible, 0.0, h), natural.dims), design)
        counted = Named(t.abs(), design.dims)
        hit = _product(Named(impossible.to(h.dtype), natural.dims), counted)
        return Named(torch.where(hit.tensor > 0, -torch.inf, plain.tensor), plain.dims)
    if shared:
        keep = (*natural.dims[:-1], *(d for d in design.dims[1:] if d not in shared))
        return contract(natural, design, tuple(d for d in keep if d != RESTART))
    result = h.reshape(-1, h.shape[-1]) @ t.reshape(len(t), -1)
    return Named(result.reshape([*h.shape[:-1], *t.shape[1:]]), (*natural.dims[:-1], *design.dims[1:]))


def _natural(
    site: ClosedSite, reading: Reading, inner_sizes: Mapping[str, int], values: Values
) -> tuple[Named, Tensor | None]:
    """H [R, *batch of the fields, ·t], in the order of the design's rows, and of locations the precisions (of a matrix
    its diagonal) that the squares of x − r meet, [R, *batch, width]."""
    events = _events(reading)
    restarts = len(next(iter(values.values())))
    sizes = {**site.sizes, **inner_sizes}
    inner = tuple(d for d in events if d in sizes)
    batch = tuple(d for d in site.keep if d not in events)
    dims = (RESTART, *batch, *inner)
    shape = [restarts, *(sizes[d] for d in batch), *(sizes[d] for d in inner)]

    def at(named: Named) -> Tensor:
        return align(named, dims).expand(shape)

    def flat(tensor: Tensor) -> Tensor:
        return tensor.reshape(*shape[: 1 + len(batch)], -1)

    sharpness = None
    if reading.kind == "normal":
        assert site.reference is not None
        m = at(site.field("loc", values)) - at(site.reference)
        sharpness = flat(at(site.field("precision", values)))
        rows = normal_natural(flat(m), sharpness)
    elif reading.kind == "mvn":
        assert site.reference is not None
        m = at(site.field("loc", values)) - at(site.reference)
        covariance = align(site.field("covariance", values), (*dims, "·j"))
        rows, whitener = mvn_natural(m, torch.linalg.cholesky(covariance))
        sharpness = whitener.square().sum(-2)
    elif reading.kind == "beta":
        p = at(site.field("probs", values))
        rows = [flat(safe_log(p)), flat(safe_log(1 - p))]
    elif reading.kind == "gamma":
        rate = at(site.field("rate", values))
        rows = [flat(safe_log(rate)), flat(-rate)]
    else:
        rows = [flat(safe_log(at(site.field("probs", values))))]
    return Named(torch.cat(rows, -1), (RESTART, *batch, STATISTIC)), sharpness


def _looked_up(site: ClosedSite, reading: Reading, labels: Labels, values: Values, led: bool) -> Named:
    """log p of category labels: a renamed table where the labels are all states, else the picked entries."""
    named = site.field("probs", values)
    table = Named(safe_log(named.tensor), named.dims)
    if not led:
        table = _unled(table)
    if labels.state is not None and labels.state not in table.dims:
        return Named(table.tensor, (*table.dims[:-1], labels.state))
    events = _events(reading)
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


def _sums(site: ClosedSite, reading: Reading, q: Named, design: Named) -> Named:
    """q Tᵀ."""
    batch = tuple(d for d in site.keep if d not in _events(reading))
    lone = tuple(d for d in design.dims[1:] if d not in batch)
    rest = tuple(d for d in q.dims if d not in lone)
    if set(design.dims[1:]) == set(lone) <= set(q.dims) and all(d == RESTART or d in batch for d in rest):
        t = align(design, (STATISTIC, *lone)).reshape(len(design.tensor), -1)
        left = align(q, (*rest, *lone))
        product = left.reshape(-1, t.shape[1]) @ t.T
        return Named(product.reshape(*left.shape[: len(rest)], len(t)), (*rest, STATISTIC))
    return contract(q, design, (*batch, STATISTIC))


def _cut(site: ClosedSite, reading: Reading, sizes: Mapping[str, int], sums: Named) -> Statistics:
    inner = tuple(d for d in _events(reading) if d in sizes)
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


def _unled(named: Named) -> Named:
    if RESTART not in named.dims:
        return named
    return Named(named.tensor.squeeze(0), named.dims[1:])


def _slice(reading: Reading, plate: str | None, begin: int, size: int, total: int) -> Reading:
    """The reading of some rows."""
    axis = next((a for a, name in reading.axes.items() if name == plate), None)
    if axis is None or size == total:
        return reading

    def cut(tensor: Tensor, core: int = 0) -> Tensor:
        at = tensor.dim() + axis - core
        return tensor.narrow(at, begin, size) if at >= 0 and tensor.shape[at] == total > 1 else tensor

    return replace(
        reading,
        value=cut(reading.value, reading.core_rank),
        known={k: cut(v) for k, v in reading.known.items()},
        masks=tuple(cut(m) for m in reading.masks),
    )


# --------------------------------------------------------------------------------------------------- preparation


def tabulate(problem: Problem, plan: Plan) -> Tabulated | None:
    """The model as tables, or None where something in it is not in them."""
    if not plan.complete or plan.by_gradient or plan.needs_weights or not plan.closed:
        return None
    with torch.no_grad():
        views, evaluation = problem.model.view(problem.data, problem.initial)
    factors = {n: view for view in views.values() for n in read_factors(view)}
    if {s.name for s in plan.sites} != set(factors) or any(problem.data_plate in s.keep for s in plan.sites):
        return None
    readings: dict[str, Reading] = {}
    for site in plan.sites:
        view, reading = factors[site.name], read_factor(views, site.name, site.kind)
        if reading is None or reading.kind != site.kind or set(site.lookups) != set(reading.fields):
            return None
        if isinstance(view.scale, Tensor) or view.scale != 1.0 or not _is_of_the_data(reading):
            return None
        readings[site.name] = _with_common_masks(reading, evaluation.variables)
    total = problem.num_rows
    chunkable = is_chunkable(problem)
    step = _rows_of_a_piece(plan.sites, readings, evaluation.variables, total) if chunkable else total
    plates = {n: v.plates for n, v in factors.items()}
    constant = 0.0
    for name, view in factors.items():
        if readings[name].family.base is not None:
            mask = readings[name].mask()
            if not view.observed or (mask is not None and set(mask.dims) & set(evaluation.variables)):
                return None
            constant += _base_total(readings[name], problem.data_plate, total, step)
    farthest = _farthest(plan.sites, readings, problem.data_plate, total, step)
    return Tabulated(
        plan.sites, readings, plates, evaluation.variables, evaluation.plate_sizes, problem.data_plate,
        total, chunkable, constant, farthest, {n: _inner(r, problem.data_plate, total) for n, r in readings.items()},
        working_dtype(problem),
    )  # fmt: skip


def _with_common_masks(reading: Reading, variables: Mapping[str, Variable]) -> Reading:
    """Masks without the axes of enumerated sites along which they were merely repeated."""
    masks = []
    for mask in reading.masks:
        for axis, name in reading.axes.items():
            at = mask.dim() + axis
            if name in variables and at >= 0 and bool((mask == mask.narrow(at, 0, 1)).all()):
                mask = mask.narrow(at, 0, 1)
        masks.append(mask)
    return replace(reading, masks=tuple(masks))


def _is_of_the_data(reading: Reading) -> bool:
    """Whether statistics and log h have axes of the value only (a known number may differ by state)."""
    if reading.labels:
        return True
    value = set(reading.named(reading.value, reading.core_rank).dims)
    known = {d for t in reading.known.values() for d in reading.named(t).dims}
    return known <= value


def _inner(reading: Reading, plate: str | None, total: int) -> dict[str, int]:
    """The event axes of a value and their sizes, from one row of it."""
    parts = [] if reading.labels else _slice(reading, plate, 0, 1, total).statistics()
    events = _events(reading)
    return {d: s for p in parts for d, s in zip(p.dims, p.tensor.shape, strict=True) if d in events}


def _rows_of_a_piece(
    sites: Sequence[ClosedSite],
    readings: Mapping[str, Reading],
    variables: Mapping[str, Variable],
    total: int,
    restarts: int = 1,
) -> int:
    wide = _entries_of_a_row(sites, readings, variables, total, restarts)
    return max(min(total, 256), min(total, _ENTRIES // max(1, wide), 1 << 14))


def _entries_of_a_row(
    sites: Sequence[ClosedSite],
    readings: Mapping[str, Reading],
    variables: Mapping[str, Variable],
    total: int,
    restarts: int,
) -> int:
    wide = 0
    for site in sites:
        reading = readings[site.name]
        states = prod(variables[d].size for d in site.keep if d in variables)
        value = reading.value.numel() // total if reading.value.numel() >= total else 1
        squares = value * (value + 1) // 2 if site.kind == "mvn" else value
        steps = max((variables[d].steps or 1 for d in site.keep if d in variables), default=1)
        wide += restarts * states * steps + (1 if reading.labels else 1 + value + squares)
    return wide


def _base_total(reading: Reading, plate: str | None, total: int, step: int) -> float:
    result = 0.0
    for begin in range(0, total, step):
        part = _slice(reading, plate, begin, min(step, total - begin), total)
        base, mask = part.base(), part.mask()
        assert base is not None
        value = part.named(part.value, part.core_rank)
        named = [base, value] if mask is None else [base, value, mask]
        sizes = {d: n for t in named for d, n in zip(t.dims, t.tensor.shape, strict=True)}
        dims = tuple(d for d in union(t.dims for t in named) if d not in (CATEGORY, ROW))
        tensor = align(base, dims).expand([sizes[d] for d in dims])
        result += float((tensor if mask is None else tensor * align(mask, dims)).sum())
    return result


def _farthest(
    sites: Sequence[ClosedSite], readings: Mapping[str, Reading], plate: str | None, total: int, step: int
) -> dict[str, Tensor]:
    """By site with a location: the largest squared distance of the data from the reference, by event entry [width]."""
    result: dict[str, Tensor] = {}
    for site in sites:
        if site.kind not in ("normal", "mvn"):
            continue
        assert site.reference is not None
        events = _events(readings[site.name])
        for begin in range(0, total, step):
            part = _slice(readings[site.name], plate, begin, min(step, total - begin), total)
            (x,) = part.statistics()
            inner = tuple(d for d in events if d in x.dims)
            batch = tuple(d for d in x.dims if d not in inner)
            far = align(x, (*batch, *inner)) - align(site.reference, (*batch, *inner))
            top = far.square().reshape(-1, prod(far.shape[len(batch) :])).amax(0)
            result[site.name] = torch.maximum(result[site.name], top) if site.name in result else top
    return result


def one_of(values: Values, restart: int) -> dict[str, Tensor]:
    """The parameters of one restart, its axis kept."""
    return {n: v[restart : restart + 1] for n, v in values.items()}
