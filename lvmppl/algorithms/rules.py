"""From a proposal (`probing`) to a plan: rules about conflicts send a parameter to the gradient, each with its reason."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from lvmppl.algorithms.closed_form import ClosedSite
from lvmppl.algorithms.guided_step import planning_e_step
from lvmppl.algorithms.least_squares import FEW_ROWS, MAX_ENTRIES, Affine, bent, couplings
from lvmppl.algorithms.plan import Plan, working_dtype
from lvmppl.algorithms.priors import Parts, is_quadratic, pseudo_statistics
from lvmppl.algorithms.probing import Lookup, Proposal, Use, probe_rows
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.spellings import is_real
from lvmppl.algorithms.statistics import keep_dims, reference_of
from lvmppl.exact.named import Named, align, union
from lvmppl.exponential import ROW, read_factor
from lvmppl.fitted import MStep

_GROUP = {"precision": "gamma", "rate": "gamma", "covariance": "covariance", "loc": "loc"}


class Way(NamedTuple):
    """One use of a parameter: where, in what role, spelled how."""

    site: str
    field: str
    group: str
    spelling: str


def step_of(problem: Problem, name: str, how: str, why: str) -> MStep:
    return MStep(name, "fixed", "frozen") if name in problem.frozen else MStep(name, how, why)


class Rules:
    """From a proposal to a plan: conflicts send a parameter to the gradient, each with its reason."""

    def __init__(self, problem: Problem, probed: Problem, proposal: Proposal) -> None:
        self.problem, self.probed, self.proposal = problem, probed, proposal
        data, rows = probe_rows(probed)
        with torch.no_grad():
            self.views, _ = probed.model.view(data, problem.initial, rows)
        self.why: dict[str, str] = {}
        self.ways: dict[str, list[Way]] = {n: [] for n in problem.theta}
        self.computed: dict[str, list[str]] = {}  # parameter → sites whose location is computed from it
        self.weighted: set[str] = set()
        self.affine: Affine | None = None
        self.priors: dict[str, Parts] = {}

    def plan(self) -> Plan:
        self._collect()
        self._check_priors()
        self._check_computed()
        for name, ways in self.ways.items():
            self._check_ways(name, ways)
        self._check_locations()
        self.affine = self._affine()
        sites = tuple(
            self._site(name, use) for name, use in self.proposal.uses.items() if self._is_wanted(use)
        )
        looked_up = all(use.is_looked_up for use in self.proposal.uses.values()) and not self.proposal.opaque
        complete = looked_up and not self.why and not self.problem.integrates
        # A prior is opaque (its value is no datum), which is why a model with one is never complete.
        if complete:
            sites = tuple(self._site(name, use) for name, use in self.proposal.uses.items())
        steps = tuple(self._describe(n) for n in self.problem.theta)
        return Plan(sites, steps, complete, self.affine, self.priors)

    def _collect(self) -> None:
        for site, (family, names) in self.proposal.opaque.items():
            own = site in self.problem.lifted
            for name in names - {site} if own else names:
                self._refuse(name, f"enters '{site}' ({family}), which has no closed form")
        for site, use in self.proposal.uses.items():
            for key, lookup in use.lookups.items():
                if (
                    lookup is None
                    or self._is_by_row(lookup)
                    or (key == "loc" and self._is_weighed_by_row(use))
                ):
                    for name in use.depends[key]:
                        if key == "loc":
                            self.computed.setdefault(name, []).append(site)
                            continue
                        reason = (
                            "is computed from it, not looked up"
                            if lookup is None
                            else "is chosen by the data"
                        )
                        self._refuse(name, f"{key} of '{site}' {reason}")
                    continue
                for name in lookup.names:
                    assert lookup.spelling is not None
                    group = _GROUP.get(key, use.reading.kind)
                    self.ways[name].append(Way(site, key, group, lookup.spelling.name))

    def _check_priors(self) -> None:
        """A prior keeps a closed form if it is conjugate, or quadratic in a location."""
        for name in self.problem.lifted:
            fn, ways = self.views[name].fn, self.ways[name]
            alone = self.proposal.opaque[name][1] <= {name, *self.problem.frozen}
            value, parts = self.problem.initial[name], None
            if ways and alone and name not in self.computed:
                parts = pseudo_statistics(fn, ways[0].group, ways[0].spelling, value)
            located = name in self.computed or (ways and all(w.group == "loc" for w in ways))
            if located and alone and is_quadratic(fn):
                if parts is None or not all(self._is_weighed_by_lookup(w.site) for w in ways):
                    self.computed.setdefault(name, []).extend(w.site for w in ways)
                    continue
                self.weighted.add(name)
            if parts is None:
                family = self.proposal.opaque[name][0]
                self._refuse(
                    name, f"its prior ({family}) is not conjugate" if alone else "its prior is fitted too"
                )
            else:
                self.priors[name] = parts

    def _check_computed(self) -> None:
        """A parameter that locations are computed from is solved by least squares where these are affine in it."""
        names = [n for n in self.computed if n not in self.why and n not in self.problem.frozen]
        for name in list(names):
            sites = " and ".join(f"'{s}'" for s in dict.fromkeys(self.computed[name]))
            other = next((w for w in self.ways[name] if w.group != "loc"), None)
            if self.problem.model.specs[name].is_table:
                self._refuse(name, "has a row for every datum")
            elif not is_real(self.problem.model.specs[name].constraint):
                self._refuse(name, f"loc of {sites} is computed from it, and it is constrained")
            elif other is not None:
                self._refuse(name, f"enters the loc of {sites} and is {other.spelling} of '{other.site}'")
        names = [n for n in names if n not in self.why]
        kinds = {s: self.proposal.uses[s].reading.kind for n in names for s in self.computed[n]}
        for name, site in bent(self.probed, names, self.computed, kinds).items():
            self._refuse(name, f"loc of '{site}' is not affine in it")
        left = [n for n in names if n not in self.why]
        if sum(self.problem.initial[n].numel() for n in left) > MAX_ENTRIES:
            for name in left:
                self._refuse(name, f"more than {MAX_ENTRIES} entries for least squares")

    def _affine(self) -> Affine | None:
        names = [n for n in self.computed if self._how(n) == "closed-form"]
        if not names:
            return None
        few = replace(self.problem, data=probe_rows(self.problem, FEW_ROWS)[0])
        weights, _ = planning_e_step(few, self.problem.initial)
        sizes = {n: self.problem.initial[n].numel() for n in names}
        return Affine(sizes, couplings(few, names, self.problem.initial, weights))

    def _is_by_row(self, lookup: Lookup) -> bool:
        """Entries that vary along the data: known only for the rows probed."""
        plate = self.problem.data_plate
        return plate in lookup.dims and lookup.index.shape[lookup.dims.index(plate)] < self.problem.num_rows

    def _is_weighed_by_row(self, use: Use) -> bool:
        """Whether a known spread varies along the data (errors of measurement): least squares weighs rows by theirs."""
        spread = use.lookups.get("precision" if use.reading.kind == "normal" else "covariance")
        return spread is not None and not spread.names and self._is_by_row(spread)

    def _is_weighed_by_lookup(self, site: str) -> bool:
        """Whether the precisions that go with a location are at hand as sums are added up."""
        spread = self.proposal.uses[site].lookups.get("precision")
        return spread is not None and not self._is_by_row(spread)

    def _refuse(self, name: str, why: str) -> None:
        self.why.setdefault(name, why)

    def _check_ways(self, name: str, ways: list[Way]) -> None:
        if self.problem.model.specs[name].is_table:
            self._refuse(name, "has a row for every datum")
        kinds = {(w.group, w.spelling) for w in ways}
        if len(kinds) > 1 and name not in self.computed:
            listing = " and ".join(dict.fromkeys(f"{w.field} of '{w.site}' ({w.spelling})" for w in ways))
            self._refuse(name, f"is used in two ways: {listing}")

    def _check_locations(self) -> None:
        """A location has a closed form if its precision is one number over its uses, or known."""
        seen: dict[str, dict[int, set[object]]] = {}
        for site, use in self.proposal.uses.items():
            lookup = use.lookups.get("loc")
            if lookup is None or not lookup.names:
                continue
            key = "precision" if use.reading.kind == "normal" else "covariance"
            for name, entries in _precisions_by_entry(site, use, lookup, key, self.problem).items():
                own = seen.setdefault(name, {})
                for entry, found in entries.items():
                    own.setdefault(entry, set()).update(found)
        for name, by_entry in seen.items():
            if name in self.computed:
                continue
            several = {i for found in by_entry.values() if len(found) > 1 for i in found}
            if not several:
                continue
            fitted = sorted({str(i[0]) for i in several if isinstance(i, tuple) and not self._is_fixed(i[0])})
            if fitted or any(
                w.group == "loc" and self.proposal.uses[w.site].reading.kind == "mvn" for w in self.ways[name]
            ):
                self._refuse(name, f"its uses differ in their scale ({', '.join(fitted) or 'matrices'})")
            else:
                self.weighted.add(name)

    def _is_fixed(self, name: object) -> bool:
        return name in self.problem.frozen

    def _is_wanted(self, use: Use) -> bool:
        names = {n for f in use.lookups.values() if f is not None for n in f.names}
        return any(self._how(n) == "closed-form" for n in names)

    def _site(self, name: str, use: Use) -> ClosedSite:
        lookups = {k: f for k, f in use.lookups.items() if f is not None and not self._is_by_row(f)}
        lookups = {k: self._with_own_constants(name, use, k, f) for k, f in lookups.items()}
        sizes = {d for f in lookups.values() for d in f.dims}
        keep = tuple(d for d in keep_dims(use.reading) if d in sizes)
        located = use.reading.kind in ("normal", "mvn")
        dtype = working_dtype(self.problem)
        moments = reference_of(use.reading) if located else (None, None)
        reference, variance = (m and Named(m.tensor.to(dtype), m.dims) for m in moments)
        names = lookups["loc"].names if "loc" in lookups else ()
        weighted = any(n in self.weighted for n in names)
        residual = located and "loc" not in lookups
        if residual:
            reference, variance = (m and m.over((*keep, ROW)) for m in (reference, variance))
        by_row = self.problem.data_plate if self.problem.data_plate in keep else None
        return ClosedSite(
            name, use.reading.kind, lookups, keep, reference, variance, weighted, residual, by_row
        )

    def _with_own_constants(self, site: str, use: Use, field: str, lookup: Lookup) -> Lookup:
        """Constants as the model makes them in its own dtype; the probe ran in float64."""
        reading = read_factor(self.views, site, use.reading.kind)
        if reading is None or reading.fields[field].tensor.shape != lookup.index.shape:
            return lookup
        return replace(lookup, constant=reading.fields[field].tensor.to(working_dtype(self.problem)))

    def _how(self, name: str) -> str:
        used = self.ways[name] or name in self.computed or name in self.why
        if name in self.problem.frozen or not used:
            return "fixed"
        return "gradient" if name in self.why else "closed-form"

    def _describe(self, name: str) -> MStep:
        how = self._how(name)
        if how == "gradient":
            return MStep(name, how, self.why[name])
        if how == "fixed":
            return MStep(name, how, "frozen" if name in self.problem.frozen else "no site depends on it")
        if name in self.computed:
            sites = " and ".join(f"'{s}'" for s in dict.fromkeys(self.computed[name]))
            return MStep(name, how, f"least squares: loc of {sites} is affine in it")
        prior = f", with a prior ({self.proposal.opaque[name][0]})" if name in self.priors else ""
        return MStep(name, how, _in_words(self.ways[name]) + prior)


def _in_words(ways: list[Way]) -> str:
    """What a parameter is of which sites: `variance of 'x'`; a long list of sites by its first and last."""
    first = ways[0]
    rate, _, precision = first.spelling.partition(" or ")
    what = precision if precision and first.field == "precision" else rate
    sites = list(dict.fromkeys(f"'{w.site}'" for w in ways))
    if len(sites) > 3:
        return f"{what} of {len(sites)} sites, {sites[0]} … {sites[-1]}"
    return f"{what} of {' and '.join(sites)}"


def _precisions_by_entry(
    site: str, use: Use, lookup: Lookup, key: str, problem: Problem
) -> dict[str, dict[int, set[object]]]:
    """For each location entry of each parameter: the identities of the precisions it meets at this site."""
    other, named = use.lookups[key], use.reading.fields[key]
    core = 1 if key == "covariance" else 0
    if other is None:
        ids, dims = torch.arange(named.tensor.numel()).reshape(named.tensor.shape), named.dims
    else:
        ids, dims = other.index, other.dims
    if core:
        ids, dims = ids[..., 0, 0], dims[:-2]
    own, own_dims = (lookup.index[..., 0], lookup.dims[:-1]) if core else (lookup.index, lookup.dims)
    every = union((own_dims, dims))
    pairs = torch.broadcast_tensors(align(Named(own, own_dims), every), align(Named(ids, dims), every))
    constant = torch.zeros(()) if other is None else other.constant[..., 0, 0] if core else other.constant
    levels = torch.broadcast_to(align(Named(constant, dims if constant.dim() else ()), every), pairs[0].shape)
    flat = torch.stack(
        [pairs[0].flatten().double(), pairs[1].flatten().double(), levels.flatten().double()], 1
    ).unique(dim=0)
    sizes = [problem.initial[n].numel() for n in lookup.names]
    result: dict[str, dict[int, set[object]]] = {n: {} for n in lookup.names}
    for entry, identity, level in flat.tolist():
        if entry < 0:
            continue
        name, offset = _owner(lookup.names, sizes, int(entry))
        if other is None:
            label: object = (f"{key} of '{site}'", int(identity))
        elif identity < 0:
            label = level
        else:
            spread = [problem.initial[n].numel() for n in other.names]
            label = _owner(other.names, spread, int(identity))
        result[name].setdefault(offset, set()).add(label)
    return result


def _owner(names: tuple[str, ...], sizes: list[int], entry: int) -> tuple[str, int]:
    for name, size in zip(names, sizes, strict=True):
        if entry < size:
            return name, entry
        entry -= size
    raise AssertionError("an index points into its parameters")
