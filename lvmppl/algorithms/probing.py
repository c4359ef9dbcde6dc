"""Which distribution parameters are entries of which `pyro.param`s: proposed by running the model at probe values.

All parameters get random, distinct, valid values; an entry of a distribution's parameter that equals g(an entry of a
`pyro.param`), for a known spelling g, at two independent probes is taken to be a lookup. What is not a lookup is
traced by automatic differentiation to the parameters that it depends on. A proposal may be wrong (a clamp that did not
act at the probes, say): the caller verifies it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import transform_to

from lvmppl.algorithms.evidence import is_chunkable
from lvmppl.algorithms.integrated import IntegratedJoint
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.spellings import SPELLINGS, Spelling
from lvmppl.density import POINTS, Joint, Rows, SiteView, Values, isolated, unvalidated
from lvmppl.exact.continuous import held_at, values_at
from lvmppl.exact.engine import continuous_posterior
from lvmppl.exact.named import Named
from lvmppl.exponential import Reading, read_factors

PROBE_ROWS = 4096  # rows at which a model is probed and a proposal verified, evenly spaced over the data
PROBE_SEED = 20_011  # of what a model draws while it is probed
_CLOSE = 1e-10  # relative difference of two computations of the same number


@dataclass(frozen=True)
class Lookup:
    """A field of a site as g(parameters)[index]; entries with index −1 are the `constant`s.

    index: into the concatenation of g(parameter), flattened, of all `names`; its axes are `dims`.
    """

    spelling: Spelling | None
    names: tuple[str, ...]
    index: Tensor
    constant: Tensor
    dims: tuple[str, ...]
    direct: bool = False  # the index is 0, 1, 2, …: nothing to look up

    def evaluate(self, values: Values, lead: int = 0) -> Tensor:
        """The field at θ: [*lead, *index.shape]; parameters have `lead` axes in front (restarts)."""
        if self.spelling is None:
            return self.constant.to(next(iter(values.values())).dtype)
        spelled = [self.spelling.apply(values[n]) for n in self.names]
        parts = [t.reshape(*t.shape[:lead], -1) for t in spelled]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        shape = (*flat.shape[:-1], *self.index.shape)
        if self.direct:
            return flat.reshape(shape)
        found = flat.index_select(-1, self.index.clamp_min(0).flatten()).reshape(shape)
        return (
            torch.where(self.index < 0, self.constant.to(found.dtype), found)
            if bool((self.index < 0).any())
            else found
        )

    def at_rows(self, plate: str, rows: Tensor) -> Lookup:
        """On some rows of the data, if it varies along them."""
        if plate not in self.dims:
            return self
        axis = self.dims.index(plate)
        index, constant = (t.index_select(axis, rows) for t in (self.index, self.constant))
        return replace(self, index=index, constant=constant, direct=False)


@dataclass(frozen=True)
class Use:
    """A site of a known family: its fields as lookups (None where one is not), and what these depend on."""

    reading: Reading
    lookups: Mapping[str, Lookup | None]
    depends: Mapping[str, frozenset[str]]

    @property
    def is_looked_up(self) -> bool:
        return all(f is not None for f in self.lookups.values())


@dataclass(frozen=True)
class Proposal:
    """Every site: of a known family with its lookups, or opaque with the parameters that it depends on."""

    uses: Mapping[str, Use]
    opaque: Mapping[str, tuple[str, frozenset[str]]]  # site → (family, parameters)


def probe_rows(problem: Problem, limit: int = PROBE_ROWS) -> tuple[Values, Rows]:
    """At most `limit` rows, evenly spaced; all rows where they cannot be taken apart."""
    total = problem.num_rows
    if total <= limit or not is_chunkable(problem):
        return problem.data, Rows(total)
    index = probe_indices(total, limit)
    return {k: v[index] for k, v in problem.data.items()}, Rows(limit)


def probe_indices(total: int, limit: int = PROBE_ROWS) -> Tensor:
    """Which rows are probed: `limit` of them, evenly spaced."""
    return torch.linspace(0, total - 1, limit).long()


def held(problem: Problem) -> tuple[Problem, Joint | None]:
    """The problem on the rows to probe, its continuous sites at points of their posterior at the start values.

    Of q where this is integrated. Where the model takes one point at a time, at one, and the model at another besides.
    """
    data, rows = probe_rows(problem)
    if not problem.integrates:
        return replace(problem, data=data), None
    if isinstance(problem.guided, IntegratedJoint):
        index = None if rows.size == problem.num_rows else probe_indices(problem.num_rows, rows.size)
        model = problem.guided.at_all_points(data, problem.initial, Rows(rows.size, index))
        return replace(problem, data=data, model=model), None
    with torch.no_grad():
        posterior = continuous_posterior(problem.model, data, problem.initial)
    points, layout = posterior.nodes()[0], posterior.layout
    if not posterior.singly or layout.discrete:
        return replace(problem, data=data, model=held_at(problem.model, layout, points)), None
    one, other = (problem.model.held(values_at(problem.model, layout, point)) for point in points[:2])
    return replace(problem, data=data, model=one), other


def propose(problem: Problem, other: Joint | None = None) -> Proposal:
    """Probe the model twice, in float64, and match.

    problem: its model's continuous sites held at points, if it has any (`held`). other: the model for the second time, so
    that what moves with these sites is not taken for constant.

    Raises whatever the model raises at the probe values.
    """
    data, rows = probe_rows(problem)
    problem = replace(problem, model=problem.model.to(torch.float64))
    with isolated(seed=PROBE_SEED, dtype=torch.float64), unvalidated():
        data = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
        first, second = probe_values(problem, 0), probe_values(problem, 1)
        leaves = {n: v.requires_grad_() for n, v in first.items()}
        with torch.enable_grad():
            views, _ = problem.model.view(data, leaves, rows)
            readings = {n: _readings(v) for n, v in views.items()}
        with torch.no_grad():
            moved = problem.model if other is None else other.to(torch.float64)
            again = {n: read_factors(v) for n, v in moved.view(data, second, rows)[0].items()}
        match = Matcher(problem, {n: v.detach() for n, v in first.items()}, second)
        uses, opaque = {}, {}
        for name, view in views.items():
            pairs = {n: (r, again[name].get(n)) for n, r in readings[name].items()}
            if any(
                one is None or two is None or set(one.fields) != set(two.fields)
                for one, two in pairs.values()
            ):
                opaque[name] = (problem.model.structure.sites[name].family, _opaque_depends(view, leaves))
                continue
            for factor, (one, two) in pairs.items():
                assert one is not None and two is not None
                uses[factor] = _use(one, two, match, leaves)
    return Proposal(uses, opaque)


def probe_values(problem: Problem, seed: int) -> dict[str, Tensor]:
    """Random valid values of θ, in float64: the same for the same seed."""
    generator = torch.Generator().manual_seed(7919 * (seed + 1))
    values = {}
    for name in problem.theta:
        initial = problem.initial[name].detach().double()
        transform = transform_to(problem.model.specs[name].constraint)
        shape = transform.inv(initial).shape
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        values[name] = transform(0.7 * noise).detach().clone()
    return values


def _readings(view: SiteView) -> dict[str, Reading | None]:
    """None where what is taken as known depends on θ."""
    result: dict[str, Reading | None] = {}
    for name, reading in read_factors(view).items():
        extra = [] if reading is None else [reading.value, *reading.known.values(), *reading.masks]
        if isinstance(view.scale, Tensor):
            extra.append(view.scale)
        result[name] = None if any(t.requires_grad for t in extra) else reading
    return result


def _opaque_depends(view: SiteView, leaves: Values) -> frozenset[str]:
    with torch.enable_grad():
        tensors = [t for f in view.factors() for t in (f.log_prob, f.scale) if isinstance(t, Tensor)]
        return depends_on(tensors, leaves)


def depends_on(tensors: Iterable[Tensor], leaves: Values) -> frozenset[str]:
    """Names of the leaves with a gradient that is not 0 (a NaN counts)."""
    total: Tensor | None = None
    generator = torch.Generator().manual_seed(5)
    for tensor in tensors:
        if tensor.requires_grad:
            weights = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5
            part = (weights * tensor).sum()
            total = part if total is None else total + part
    if total is None:
        return frozenset()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
    found = zip(leaves, grads, strict=True)
    return frozenset(n for n, g in found if g is not None and not bool((g == 0).all()))


def _use(one: Reading, two: Reading, match: Matcher, leaves: Values) -> Use:
    lookups: dict[str, Lookup | None] = {}
    depends: dict[str, frozenset[str]] = {}
    for field, named in one.fields.items():
        other = two.fields[field]
        found = match.field(one.kind, field, named, other) if named.dims == other.dims else None
        if POINTS in named.dims:  # what depends on continuous sites moves with them: no table of it
            found = None
        lookups[field] = found
        if found is not None:
            depends[field] = frozenset(found.names)
        else:
            depends[field] = depends_on([named.tensor], leaves)
    return Use(one, lookups, depends)


class Matcher:
    """Finds entries of fields among the spelled parameters."""

    def __init__(self, problem: Problem, first: Values, second: Values) -> None:
        self.specs = problem.model.specs
        self.first, self.second = first, second
        self.names = [n for n in problem.theta if not self.specs[n].is_table]
        self.tables: dict[str, tuple[Tensor, ...]] = {}

    def field(self, kind: str, field: str, one: Named, two: Named) -> Lookup | None:
        a, b = one.tensor.detach(), two.tensor
        if a.shape != b.shape:
            return None
        for spelling in SPELLINGS[kind, field]:
            found = self._matrices(spelling, a, b) if spelling.unit == 2 else self._entries(spelling, a, b)
            if found is not None and not (spelling.unit == 1 and not _whole_rows(spelling, found, self)):
                return self._lookup(spelling, found, a, one.dims)
        if torch.equal(a, b):
            none = torch.full(a.shape, -1)
            return Lookup(None, (), none, a, one.dims)
        return None

    def _lookup(self, spelling: Spelling, found: Tensor, constant: Tensor, dims: tuple[str, ...]) -> Lookup:
        """From indices into all spelled parameters to those into the ones that occur."""
        _, _, _, starts = self._table(spelling)
        names, index, begin = [], torch.full_like(found, -1), 0
        for name, (low, high) in starts.items():
            here = (found >= low) & (found < high)
            if bool(here.any()):
                index = torch.where(here, found - low + begin, index)
                begin += high - low
                names.append(name)
        direct = bool(torch.equal(index.flatten(), torch.arange(begin)))
        return Lookup(spelling, tuple(names), index, constant, dims, direct)

    def _table(self, spelling: Spelling) -> tuple[Tensor, Tensor, Tensor, dict[str, tuple[int, int]]]:
        """Keys at probe 1 (sorted), their positions, keys at probe 2 by position, and where each parameter stands."""
        if spelling.name not in self.tables:
            self.tables[spelling.name] = self._build(spelling)  # type: ignore[assignment]
        return self.tables[spelling.name]  # type: ignore[return-value]

    def _build(self, spelling: Spelling) -> tuple[Tensor, Tensor, Tensor, dict[str, tuple[int, int]]]:
        starts: dict[str, tuple[int, int]] = {}
        firsts, seconds, begin = [], [], 0
        for name in self.names:
            value = self.first[name]
            if not spelling.applies(self.specs[name].constraint) or value.dim() < spelling.unit:
                continue
            firsts.append(spelling.apply(value).flatten())
            seconds.append(spelling.apply(self.second[name]).flatten())
            starts[name] = (begin, begin + firsts[-1].numel())
            begin = starts[name][1]
        empty = torch.zeros(0, dtype=torch.float64)
        one = torch.cat(firsts) if firsts else empty
        two = torch.cat(seconds) if seconds else empty
        keys, order = one.sort()
        return keys, order, two, starts

    def _entries(self, spelling: Spelling, a: Tensor, b: Tensor) -> Tensor | None:
        """Positions of the entries among the spelled parameters, −1 for constants; None where one is neither."""
        keys, order, second, _ = self._table(spelling)
        if not len(keys):
            return None
        right = torch.searchsorted(keys, a.contiguous()).clamp_max(len(keys) - 1)
        left = (right - 1).clamp_min(0)
        nearer = (keys[left] - a).abs() < (keys[right] - a).abs()
        position = order[torch.where(nearer, left, right)]
        gap = torch.minimum((keys[left] - a).abs(), (keys[right] - a).abs())
        match = (gap <= _CLOSE * a.abs()) & ((second[position] - b).abs() <= _CLOSE * b.abs())
        constant = (a == b) & ~match
        if not bool((match | constant).all()) or not bool(match.any()):
            return None
        return torch.where(match, position, -1)

    def _matrices(self, spelling: Spelling, a: Tensor, b: Tensor) -> Tensor | None:
        """Whole matrices only: positions of their entries."""
        *_, starts = self._table(spelling)
        size = a.shape[-1] * a.shape[-2]
        flat_a, flat_b = a.reshape(-1, size), b.reshape(-1, size)
        result = torch.full((len(flat_a), size), -1)
        for name, (low, _) in starts.items():
            one = spelling.apply(self.first[name])
            if one.shape[-2:] != a.shape[-2:]:
                continue
            one, two = one.reshape(-1, size), spelling.apply(self.second[name]).reshape(-1, size)
            for block in range(len(one)):
                same = _same(flat_a, one[block]) & _same(flat_b, two[block])
                result[same] = low + block * size + torch.arange(size)
        return None if bool((result < 0).any()) else result.reshape(a.shape)


def _same(rows: Tensor, row: Tensor) -> Tensor:
    return ((rows - row).abs().amax(-1) <= 1e-9 * row.abs().amax()).reshape(len(rows))


def _whole_rows(spelling: Spelling, found: Tensor, match: Matcher) -> bool:
    """A normalised row is only solvable as a whole; entries of a simplex may stand anywhere."""
    if spelling.name == "probabilities":
        return True
    sizes = {match.first[n].shape[-1] for n in match._table(spelling)[3]}
    whole = bool(((found - found[..., :1]) == torch.arange(found.shape[-1])).all())
    return whole and found.shape[-1] in sizes and bool((found[..., 0] % found.shape[-1] == 0).all())
