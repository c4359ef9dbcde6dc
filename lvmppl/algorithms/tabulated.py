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
from lvmppl.algorithms.statistics import (
    RESTART,
    Labels,
    Statistics,
    add_statistics,
    label_sums,
    of_restarts,
    stacked,
)
from lvmppl.algorithms.table_factors import (
    as_statistics,
    by_distances,
    design_of,
    looked_up,
    natural_of,
    sums_of,
    times_design,
    unled,
)
from lvmppl.algorithms.table_rows import SMALL, entries_of_a_row, rows_of_a_piece, some_rows
from lvmppl.density import Factor, Values, Variable
from lvmppl.exact.elimination import eliminate
from lvmppl.exact.named import Named, add, align, exp_, union
from lvmppl.exponential import Reading

_PRECISE = 1e6  # largest squared distance from the reference, in variances, at which squares may be expanded


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

        Where expanding squares would lose digits, because a variance is small against the distances between locations,
        and on little data, where it saves nothing, squares of distances are taken instead.
        """
        restarts = len(next(iter(values.values())))
        if restarts > 1 and self.has_chains:  # a chain's kernel wants one transition for all sequences
            return _joined([self.e_step(one_of(values, r)) for r in range(restarts)])
        if self.is_one_piece and self.distances(restarts) <= SMALL:
            return self._pass(values, self._naturals(values, expanded=False)[0], restarts)
        natural, coarse = self._naturals(values)
        if coarse is None or not bool(coarse.any()):
            return self._pass(values, natural, restarts)
        parts = []
        fine, alone = (torch.nonzero(where).flatten() for where in (~coarse, coarse))
        if len(fine):
            parts.append(self.e_step({n: v.index_select(0, fine) for n, v in values.items()}))
        for restart in alone.tolist():
            own = one_of(values, restart)
            parts.append(self._pass(own, self._naturals(own, expanded=False)[0], 1))
        total, statistics = _joined(parts)
        back = torch.cat([fine, alone]).argsort()
        return total[back], {n: of_restarts(s, back) for n, s in statistics.items()}

    def _pass(
        self, values: Values, natural: Mapping[str, Named], restarts: int
    ) -> tuple[Tensor, dict[str, Statistics]]:
        """Over the data, piece by piece; sites whose natural parameters are wanting by distances."""
        statistics: dict[str, Statistics] = {}
        total: Tensor | None = None
        wide = max([1, *(self._width(s) for s in self.sites if s.name not in natural)])
        for piece in self.pieces(restarts * wide):
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
        return self.total * entries_of_a_row(self.sites, self.readings, self.variables, self.total, restarts)

    def distances(self, restarts: int) -> int:
        """Numbers that squared distances of the whole data from all locations are the sums of."""
        states = (prod(self.variables[d].size for d in s.keep if d in self.variables) for s in self.sites)
        wide = (self._width(s) * k for s, k in zip(self.sites, states, strict=True))
        return self.total * restarts * max(wide, default=0)

    def _width(self, site: ClosedSite) -> int:
        """Entries of a value with a location, 0 of another."""
        return 0 if site.reference is None else prod(self.inner[site.name].values())

    def _step(self, restarts: int) -> int:
        """Rows of a piece."""
        if not self.chunkable:
            return self.total
        return rows_of_a_piece(self.sites, self.readings, self.variables, self.total, restarts)

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
            s.name: some_rows(self.readings[s.name], self.data_plate, begin, size, self.total)
            for s in self.sites
        }
        designed = [s for s in self.sites if self._is_designed(s)]
        designs = {s.name: design_of(readings[s.name], s.reference, self.dtype) for s in designed}
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

    def _naturals(self, values: Values, expanded: bool = True) -> tuple[dict[str, Named], Tensor | None]:
        """H of every site with a design matrix, and which restarts [R] it is too coarse for.

        expanded: whether to have those of locations too.
        """
        result = {}
        coarse: Tensor | None = None
        for site in self.sites:
            if not self._is_designed(site) or not (expanded or site.reference is None):
                continue
            named, sharpness = natural_of(site, self.readings[site.name], self.inner[site.name], values)
            if sharpness is not None:
                own = ~(self._lost(site, sharpness) <= _PRECISE)
                coarse = own if coarse is None else coarse | own
            result[site.name] = self._led(named)
        return result, coarse

    def _led(self, named: Named) -> Named:
        """Of one restart, without its axis."""
        return unled(named) if len(named.tensor) == 1 else named

    def _lost(self, site: ClosedSite, sharpness: Tensor) -> Tensor:
        return (sharpness * self.farthest[site.name]).sum(-1).reshape(len(sharpness), -1).amax(1)

    def lost(self, values: Values) -> Tensor:
        """The largest squared distance from the reference, in variances, of each restart [R]: ε of it is lost."""
        result = torch.zeros(len(next(iter(values.values()))))
        for site in (s for s in self.sites if self._is_designed(s)):
            _, sharpness = natural_of(site, self.readings[site.name], self.inner[site.name], values)
            if sharpness is not None:
                result = torch.maximum(result.to(sharpness.dtype), self._lost(site, sharpness))
        return result.clamp_max(_PRECISE)  # beyond that, squares are not expanded

    def _visit(
        self, values: Values, natural: Mapping[str, Named], piece: Piece, restarts: int
    ) -> tuple[Tensor, dict[str, Statistics]]:
        factors: dict[str, Named] = {}
        for site in self.sites:
            name = site.name
            if name in natural:
                factor = times_design(natural[name], piece.designs[name])
            elif name in piece.designs:
                reading, inner = piece.readings[name], self.inner[name]
                factor = self._led(by_distances(site, reading, inner, values, piece.designs[name]))
            else:
                factor = looked_up(site, piece.readings[name], piece.labels[name], values, restarts > 1)
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
                sums = sums_of(site, piece.readings[name], weight, piece.designs[name])
                result[name] = as_statistics(site, piece.readings[name], self.inner[name], sums)
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
    weights = exp_(joint - top)
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


def _joined(
    parts: Sequence[tuple[Tensor, Mapping[str, Statistics]]],
) -> tuple[Tensor, dict[str, Statistics]]:
    """The E-steps of some restarts after those of others."""
    totals = torch.cat([t for t, _ in parts])
    return totals, {n: stacked([own[n] for _, own in parts]) for n in parts[0][1]}


def one_of(values: Values, restart: int) -> dict[str, Tensor]:
    """The parameters of one restart, its axis kept."""
    return {n: v[restart : restart + 1] for n, v in values.items()}
