"""The M-step in closed form: parameters that maximise Σ_s ⟨q_s, f_s(θ)⟩, from expected sufficient statistics.

Statistics of every site are added up into the parameter entries that its fields look up (entries shared by states,
sites or time steps are thereby tied) and solved:

    simplex  p = S / ΣS          location    μ = Σ w x / Σ w   (w = q τ; τ cancels where it is one number)
    beta     p = A / (A + B)     precision   τ = n / Σ q (x − μ)²
    gamma    τ = A / B           covariance  Σ = Σ q (x − μ)(x − μ)ᵀ / n

What the equations do not settle: an entry without weight (an emptied component) keeps its value; a variance is held at
a floor of ε^(2/3) times the variance of the data (ε the precision of the dtype: 4 · 10⁻¹¹ in float64), a covariance in
every direction at ε^(1/2) times it (1.5 · 10⁻⁸: solving with a matrix loses as many digits as its condition number
has), since the likelihood has no maximum beyond; a solution outside the bounds of its constraint goes to the bound.
Each of these is the maximum under its restriction, which is the same at every step, so the log evidence still never
falls.

Shapes: R restarts lead every tensor (1 without); P entries of the parameters of a lookup.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lvmppl.algorithms.maxima import FLOOR, SOLVE, Sums, raised_to_floor, within
from lvmppl.algorithms.probing import Lookup
from lvmppl.algorithms.statistics import PACKED, RESTART, Statistics, unpacked
from lvmppl.density import ParameterSpec, Values
from lvmppl.exact.named import Named, align
from lvmppl.exponential import COLUMN, ROW


@dataclass(frozen=True)
class ClosedSite:
    """A site of which parameters are solved: its fields as lookups, the axes its statistics keep, its reference."""

    name: str
    kind: str
    lookups: Mapping[str, Lookup]
    keep: tuple[str, ...]
    reference: Named | None = None
    variance: Named | None = None
    weighted: bool = False  # whether locations are weighted by precisions that differ
    residual: bool = (
        False  # whether the location is computed: squares are taken about it, at the θ of the moment
    )
    by_row: str | None = None  # the data plate, where the data choose an entry: statistics keep their rows

    def at_rows(self, rows: Tensor) -> ClosedSite:
        """The site on some rows of the data."""
        if self.by_row is None:
            return self
        return replace(self, lookups={k: f.at_rows(self.by_row, rows) for k, f in self.lookups.items()})

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        return {d: s for f in self.lookups.values() for d, s in zip(f.dims, f.index.shape, strict=True)}

    @functools.cached_property
    def floor(self) -> Named:
        """What a variance, or the smallest eigenvalue of a covariance in units of these, is held at or above."""
        assert self.reference is not None and self.variance is not None
        own = _matrix_floor if self.kind == "mvn" else _floor
        return own(self.variance, self.reference)

    @functools.cached_property
    def floors(self) -> Mapping[str, Tensor]:
        """The floor at the entries of the fields of spreads [1, *index.shape]: of those that share an entry the largest.

        A number of the data alone: were it to move with the weights, θ could leave the set over which Q is maximised.
        """
        if self.reference is None:
            return {}
        core = (ROW,) if self.kind == "mvn" else ()
        found = {}
        for key in ("precision", "covariance"):
            if key not in self.lookups:
                continue
            full = self.full(self.floor, 1, core)
            both = (ROW, COLUMN) if core else ()
            found[key] = _to_field(self, key, torch.diag_embed(full) if core else full, both, largest=True)
        return found

    def full(self, named: Named, restarts: int, core: Sequence[str] = ()) -> Tensor:
        """A statistic or field at all axes: [R, *keep, *core]."""
        dims = (RESTART, *self.keep, *core)
        sizes = self.sizes
        shape = [restarts, *(sizes[d] for d in self.keep)]
        tensor = align(named, dims)
        return tensor.expand(*shape, *tensor.shape[len(shape) :])

    def field(self, name: str, values: Values) -> Named:
        lookup = self.lookups[name]
        tensor = lookup.evaluate(values, lead=1)
        if tensor.dim() == len(lookup.dims):
            return Named(tensor, lookup.dims)
        return Named(tensor, (RESTART, *lookup.dims))


Closed = tuple[ClosedSite, ...]


Priors = Mapping[str, Mapping[str, Tensor]]
Between = Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], Mapping[str, Statistics]]]


@dataclass(frozen=True)
class Solution:
    """New parameters [R, *shape], and by name of those with a floor, in which restarts it holds them [R]."""

    values: dict[str, Tensor]
    held: dict[str, Tensor]

    def floored(self, restart: int = 0) -> frozenset[str]:
        """Names of the parameters that a floor holds in one restart."""
        return frozenset(n for n, at_floor in self.held.items() if bool(at_floor[restart]))


def solve(
    sites: Closed,
    specs: Mapping[str, ParameterSpec],
    names: Collection[str],
    values: Values,
    statistics: Mapping[str, Statistics],
    priors: Priors | None = None,
    between: Between | None = None,
) -> Solution:
    """The parameters `names` that maximise Q given the statistics; others stay.

    values: [R, *shape]. priors: by parameter, pseudo-statistics of a conjugate prior to be added. between: called when
    locations are solved and spreads are not; returns θ and the statistics of sites whose squares depend on it.
    """
    result, names = dict(values), frozenset(names)
    restarts = len(next(iter(values.values())))
    held: dict[str, Tensor] = {}
    for stage in (("simplex", "beta", "gamma", "loc"), ("precision", "covariance")):
        if between is not None and "precision" in stage:
            result, own = between(result)
            statistics = {**statistics, **own}
        sums: dict[str, Sums] = {}
        for site in sites:
            _gather(site, stage, names, result, statistics.get(site.name, {}), restarts, sums)
        for name, total in sums.items():
            for key, part in (priors or {}).get(name, {}).items():
                total.add(key, part.reshape(1, -1))
            solved, at_floor = SOLVE[total.kind](total, result[name])
            result[name] = within(solved, specs[name].constraint)
            if at_floor is not None:  # a bound of the constraint above the floor holds in its place
                held[name] = at_floor & (result[name] == solved).reshape(restarts, -1).all(1)
    return Solution(result, held)


def start_above_floors(
    sites: Closed, specs: Mapping[str, ParameterSpec], names: Collection[str], values: Values
) -> Solution:
    """θ with every spread among `names` at or above its floor: the set in which each M-step then stays.

    values: [R, *shape].
    """
    sums: dict[str, Sums] = {}
    for site in sites:
        for key, floor in site.floors.items():
            lookup = site.lookups[key]
            for name, own in _scatter(lookup, floor, values, largest=True).items():
                if name in names:
                    assert lookup.spelling is not None
                    sums.setdefault(name, Sums(key, lookup.spelling)).add(FLOOR, own)
    result, held = dict(values), {}
    for name, total in sums.items():
        raised, held[name] = raised_to_floor(total, values[name])
        result[name] = within(raised, specs[name].constraint)
    return Solution(result, held)


def _gather(
    site: ClosedSite,
    stage: Iterable[str],
    names: frozenset[str],
    values: Values,
    statistics: Statistics,
    restarts: int,
    sums: dict[str, Sums],
) -> None:
    """Add the site's statistics to the sums of the parameters that belong to this stage."""
    for key, lookup in site.lookups.items():
        kind = site.kind if key in ("probs", "rate") else key
        if kind not in stage or names.isdisjoint(lookup.names):
            continue
        for part, tensor in _PARTS[kind](site, values, statistics, restarts).items():
            for name, own in _scatter(lookup, tensor, values, largest=part == FLOOR).items():
                if name in names:
                    assert lookup.spelling is not None
                    sums.setdefault(name, Sums(kind, lookup.spelling)).add(part, own)


def _scatter(lookup: Lookup, tensor: Tensor, values: Values, largest: bool = False) -> dict[str, Tensor]:
    """Statistics at the entries of a field [R, *index.shape] → added up at the entries of its parameters [R, P].

    largest: the largest of each entry instead of their sum, 0 of an entry that is not looked up.
    """
    sizes = [values[n][0].numel() for n in lookup.names]
    flat = tensor.reshape(len(tensor), -1)
    if lookup.direct:
        total = flat
    else:
        index = lookup.index.flatten()
        used = torch.nonzero(index >= 0).flatten()
        total, at = flat.new_zeros(len(flat), sum(sizes)), index[used]
        if largest:
            total.scatter_reduce_(1, at.expand(len(flat), -1), flat[:, used], "amax")
        else:
            total.index_add_(1, at, flat[:, used])
    return dict(zip(lookup.names, total.split(sizes, 1), strict=True))


def _to_field(
    site: ClosedSite, key: str, full: Tensor, core: Sequence[str] = (), largest: bool = False
) -> Tensor:
    """[R, *keep, *core] summed (or the largest taken) to the axes of one field, in its order."""
    dims = (RESTART, *site.keep, *core)
    lookup = site.lookups[key]
    axes = [i for i, d in enumerate(dims) if d != RESTART and d not in lookup.dims]
    kept = tuple(d for d in dims if d == RESTART or d in lookup.dims)
    if axes:
        full = full.amax(axes) if largest else full.sum(axes)
    return align(Named(full, kept), (RESTART, *lookup.dims))


def _counts(site: ClosedSite, values: Values, s: Statistics, restarts: int) -> dict[str, Tensor]:
    named = s["counts"]
    return {"counts": _to_field(site, "probs", site.full(named, restarts, ("·v",)), ("·v",))}


def _pair(site: ClosedSite, values: Values, s: Statistics, restarts: int) -> dict[str, Tensor]:
    (key,) = site.lookups
    return {k: _to_field(site, key, site.full(s[k], restarts)) for k in "ab"}


def _location(site: ClosedSite, values: Values, s: Statistics, restarts: int) -> dict[str, Tensor]:
    """Σ w (x − μ_old) and Σ w, with the present entries μ_old as origin."""
    core = (ROW,) if site.kind == "mvn" else ()
    assert site.reference is not None
    n = site.full(s["n"], restarts)
    n = n.unsqueeze(-1) if core else n
    first, now = site.full(s["first"], restarts, core), site.full(site.field("loc", values), restarts, core)
    moment = first + n * (site.full(site.reference, restarts, core) - now)
    n = n.expand_as(moment)
    if site.weighted:
        precision = site.full(site.field("precision", values), restarts)
        moment, n = moment * precision, n * precision
    return {"moment": _to_field(site, "loc", moment, core), "weight": _to_field(site, "loc", n, core)}


def _precision(site: ClosedSite, values: Values, s: Statistics, restarts: int) -> dict[str, Tensor]:
    """a = n/2 and b = Σ q (x − μ)²/2, and the floor of the variance."""
    n, spread = site.full(s["n"], restarts), site.full(s["second"], restarts)
    if not site.residual:
        assert site.reference is not None
        shift = site.full(site.field("loc", values), restarts) - site.full(site.reference, restarts)
        spread = spread - shift * (2 * site.full(s["first"], restarts) - n * shift)
    weight = _to_field(site, "precision", n)
    squares = _to_field(site, "precision", spread.clamp_min(0))
    return {"a": weight / 2, "b": squares / 2, FLOOR: site.floors["precision"]}


def _scatter_matrix(site: ClosedSite, values: Values, s: Statistics, restarts: int) -> dict[str, Tensor]:
    """n and Σ q (x − μ)(x − μ)ᵀ, each at the entries of the covariance, and the floor's matrix."""
    core = (ROW,)
    n = site.full(s["n"], restarts)[..., None, None]
    matrix = unpacked(site.full(s["second"], restarts, (PACKED,)))
    if not site.residual:
        assert site.reference is not None
        shift = site.full(site.field("loc", values), restarts, core) - site.full(
            site.reference, restarts, core
        )
        cross = site.full(s["first"], restarts, core).unsqueeze(-1) * shift.unsqueeze(-2)
        matrix = matrix - cross - cross.mT + n * shift.unsqueeze(-1) * shift.unsqueeze(-2)
    both = (ROW, COLUMN)
    parts = {"n": n.expand_as(matrix), "scatter": matrix}
    own = {k: _to_field(site, "covariance", v, both) for k, v in parts.items()}
    return {**own, FLOOR: site.floors["covariance"]}


def _floor(variance: Named, mean: Named) -> Named:
    """ε^(2/3) of the variance of the data; ε^(4/3) of their mean square where they do not vary."""
    tensor = variance.tensor
    eps: float = torch.finfo(tensor.dtype).eps ** (2 / 3)
    still = torch.where(mean.tensor == 0, torch.ones_like(tensor), mean.tensor.square())
    return Named(eps * torch.where(tensor > 0, tensor, eps * still), variance.dims)


def _matrix_floor(variance: Named, mean: Named) -> Named:
    """ε^(1/2) of the variance of each coordinate; of one that does not vary, of the mean variance of the others (or of
    its mean square): a far smaller entry would drown in the rounding of its covariances."""
    v, square = variance.tensor, align(mean, variance.dims).square()
    others = v.sum(-1, keepdim=True) / (v > 0).sum(-1, keepdim=True).clamp_min(1)
    still = torch.where(others > 0, others, torch.where(square > 0, square, 1.0))
    return Named(torch.finfo(v.dtype).eps ** 0.5 * torch.where(v > 0, v, still), variance.dims)


_PARTS = {
    "simplex": _counts,
    "beta": _pair,
    "gamma": _pair,
    "loc": _location,
    "precision": _precision,
    "covariance": _scatter_matrix,
}
