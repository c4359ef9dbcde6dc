"""log Z of plated discrete factors by variable elimination.

log Z(θ) = log Σ_z Π_s exp f_s(z): variables are summed out one at a time in the plates they stand in, deepest first; a
plate is then multiplied out (its log-factors added up) into the plates around it, which is where a scale acts
(Obermeyer et al. 2019, *Tensor Variable Elimination for Plated Factor Graphs*). The joint table is never built. The
same pass with max in place of Σ gives the mode; recorded (`tape`) it gives every conditional p(z_v | later ones), from
which samples, entropy and log-probabilities follow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lvmppl.density import MAX_TABLE, Factor, Variable
from lvmppl.errors import IntractableError, ModelError
from lvmppl.exact.chains import has_chains, sum_out
from lvmppl.exact.named import Named, add, align, log_sum_exp, sizes_of, union
from lvmppl.exact.scales import UNIT, common_scale, ratio, scale_of, times

MAX_CLIQUE = MAX_TABLE  # entries of the largest table that elimination may build


class Term(NamedTuple):
    """A log-factor on its way; `message` when it comes out of a plate inside, whose scale may be another."""

    named: Named
    plates: frozenset[str]
    scale: Named
    message: bool = False
    site: str = ""  # whose factor it is, where it is the factor of one site


@dataclass(frozen=True)
class Step:
    """One elimination: `clique` is the sum of all log-factors that held `variable` (its first axis).

    reduced: the clique with the variable summed (or maximised) out.
    """

    variable: str
    clique: Named
    plates: frozenset[str]
    reduced: Tensor


@dataclass
class Elimination:
    """What is left when the variables are gone.

    per_datum: contributions of each row of the data plate [N], its scale applied; constant: those outside the data
    plate; kept: log-factors over the variables that were to stay, or with an axis that is no plate's; tape: the
    eliminations in order.
    """

    per_datum: Tensor | None
    constant: Tensor
    kept: list[Term] = field(default_factory=list)
    tape: list[Step] = field(default_factory=list)

    @property
    def total(self) -> Tensor:
        return self.constant if self.per_datum is None else self.constant + self.per_datum.sum()


class _Eliminator:
    def __init__(
        self,
        variables: Mapping[str, Variable],
        plate_sizes: Mapping[str, int],
        data_plate: str | None,
        keep: Collection[str],
        first: Collection[str],
        maximise: bool,
        straight_through: bool,
    ) -> None:
        self.variables, self.plate_sizes, self.data_plate = variables, plate_sizes, data_plate
        self.keep, self.first = frozenset(keep), frozenset(first)
        self.maximise, self.straight_through = maximise, straight_through
        self.plates = {name: frozenset(v.plates) for name, v in variables.items()}
        self.all_plates = frozenset(plate_sizes)

    def run(self, factors: Sequence[Factor]) -> Elimination:
        assert factors, "a model without factors has no log Z"
        terms = [Term(Named(f.log_prob, f.dims), f.plates, scale_of(f)) for f in factors]
        like = factors[0].log_prob
        result = Elimination(None, torch.zeros((), dtype=like.dtype, device=like.device))
        while terms:
            leaf = max((t.plates for t in terms), key=lambda p: (len(p), sorted(p)))
            here = [t for t in terms if t.plates == leaf]
            terms = [t for t in terms if t.plates != leaf]
            for component in self._components(here, leaf):
                scale = _common_scale(component)
                for message in self._eliminate_component(component, scale, leaf, result):
                    terms.extend(self._move_up(message, scale, leaf, result))
        return result

    def _is_local(self, name: str, leaf: frozenset[str]) -> bool:
        return name in self.plates and name not in self.keep and self.plates[name] == leaf

    def _components(self, terms: Sequence[Term], leaf: frozenset[str]) -> list[list[Term]]:
        """Terms connected through variables that are local to `leaf`."""
        groups: list[tuple[set[str], list[Term]]] = []
        for term in terms:
            local = {d for d in term.named.dims if self._is_local(d, leaf)}
            joined = [g for g in groups if g[0] & local]
            groups = [g for g in groups if not (g[0] & local)]
            names = local.union(*(g[0] for g in joined))
            groups.append((names, [t for g in joined for t in g[1]] + [term]))
        return [members for _, members in groups]

    def _eliminate_component(
        self, component: list[Term], scale: Named, leaf: frozenset[str], result: Elimination
    ) -> list[Named]:
        """Sum the local variables out of one copy of a component; what remains has its scale yet to come."""
        pool = [
            times(t.named, ratio(t.scale, scale), self.straight_through) if t.message else t.named
            for t in component
        ]
        local = {d for n in pool for d in n.dims if self._is_local(d, leaf)}
        sizes = sizes_of(pool)
        costs = {name: self._cost(name, pool, sizes) for name in local}
        while costs:
            variable = min(costs, key=costs.__getitem__)
            del costs[variable]
            bucket = [n for n in pool if variable in n.dims]
            self._check_size(variable, bucket, pool)
            clique = add(bucket, self.all_plates, first=variable)
            reduced = clique.tensor.amax(0) if self.maximise else log_sum_exp(clique.tensor, 0)
            result.tape.append(Step(variable, clique, leaf, reduced))
            pool = [n for n in pool if variable not in n.dims] + [Named(reduced, clique.dims[1:])]
            for name in costs.keys() & set(clique.dims):  # what the others would build is as it was
                costs[name] = self._cost(name, pool, sizes)
        return pool

    def _cost(self, name: str, pool: Sequence[Named], sizes: Mapping[str, int]) -> tuple[bool, int, str]:
        """The entries of the table that eliminating a variable now would build: the least is next (greedy min-size)."""
        dims = union(n.dims for n in pool if name in n.dims)
        return (bool(self.first) and name not in self.first, prod(sizes[d] for d in dims), name)

    def _check_size(self, variable: str, bucket: Sequence[Named], pool: Sequence[Named]) -> None:
        sizes = sizes_of(bucket)
        entries = prod(sizes.values())
        if entries > MAX_CLIQUE:
            coupled = ", ".join(f"{d} ({s})" for d, s in sizes.items())
            raise IntractableError(
                f"exact elimination of site '{variable}'",
                f"a table of at most {MAX_CLIQUE:,} entries",
                f"{entries:,} in the cheapest order found, over {coupled}",
                "use fewer states, or a variational fit (vem, svi)",
            )

    def _move_up(self, message: Named, scale: Named, leaf: frozenset[str], result: Elimination) -> list[Term]:
        names = [d for d in message.dims if d in self.plates]
        several = any(d not in self.plates and d not in leaf for d in message.dims)  # an axis of particles
        waiting = [d for d in names if d not in self.keep]
        if waiting:
            parent = frozenset().union(*(self.plates[d] for d in names))
            if parent == leaf:
                raise IntractableError(
                    f"sites {', '.join(sorted(names))} in plates {', '.join(sorted(leaf))}",
                    "plates nested like a tree",
                    "sites of sibling plates that meet in one factor",
                    "write the smaller plate as a Python loop",
                )
            if set(scale.dims) - parent:  # it goes with a plate that is multiplied out here
                message, scale = times(message, scale, self.straight_through), UNIT
            return [Term(self._multiply_out(message, leaf - parent), parent, scale, message=True)]
        message = times(message, scale, self.straight_through)
        if names or several:
            result.kept.append(Term(message, leaf, UNIT, message=True))
            return []
        if self.data_plate in leaf:
            rows = self._multiply_out(message, leaf - {self.data_plate})
            per_datum = align(rows, (self.data_plate,)).expand(self.plate_sizes[self.data_plate])
            result.per_datum = per_datum if result.per_datum is None else result.per_datum + per_datum
        else:
            result.constant = result.constant + self._multiply_out(message, leaf).tensor
        return []

    def _multiply_out(self, message: Named, plates: frozenset[str]) -> Named:
        """Π over plates: log-factors add up; a factor that is constant along a plate counts once per element."""
        axes = [i for i, d in enumerate(message.dims) if d in plates]
        tensor = message.tensor.sum(axes) if axes else message.tensor
        absent = prod(self.plate_sizes[p] for p in plates if p not in message.dims)
        if absent != 1:
            tensor = tensor * absent
        return Named(tensor, tuple(d for d in message.dims if d not in plates))


def _common_scale(component: Sequence[Term]) -> Named:
    own = [t.scale for t in component if not t.message]
    return common_scale(own, (d for t in component for d in t.named.dims)) if own else UNIT


def _check_reach(factors: Sequence[Factor], variables: Mapping[str, Variable]) -> None:
    """A factor holds sites of its own plates and of those around it alone: of a plate outside of it, which element?"""
    for factor in factors:
        for name in factor.dims:
            beyond = set(variables[name].plates) - factor.plates if name in variables else None
            if beyond:
                own = (
                    f"in plate {', '.join(sorted(factor.plates))}"
                    if factor.plates
                    else "outside of all plates"
                )
                raise ModelError(
                    f"site '{factor.site}' {own}",
                    "to depend on sites of its own plates and of those around them",
                    f"a dependence on site '{name}' of plate {', '.join(sorted(beyond))}",
                    f"sample '{factor.site}' inside that plate too, and give sibling plates axes of their own by dim=",
                )


def eliminate(
    factors: Sequence[Factor],
    variables: Mapping[str, Variable],
    plate_sizes: Mapping[str, int],
    data_plate: str | None = None,
    *,
    keep: Collection[str] = (),
    first: Collection[str] = (),
    maximise: bool = False,
    straight_through: bool = False,
) -> Elimination:
    """Sum (or maximise) every enumerated variable but those in `keep` out of the factors; Markov chains go first, whole.

    keep: variables that stay; `Elimination.kept` then holds log-factors over them.
    first: variables to be eliminated before the others of their plates, so that the later part of the tape is the
        marginal over the others.
    straight_through: a scale acts on values but not on gradients, so that ∂ log Z/∂ f are marginals of one copy.

    Raises:
        ModelError: a factor depends on a site of a plate that it does not stand in.
        IntractableError: a table would pass `MAX_CLIQUE` entries, or plates that are not nested like a tree.
        ModelError: factors of one component carry different scales.
    """
    _check_reach(factors, variables)
    if has_chains(variables):
        factors, variables = sum_out(factors, variables, plate_sizes, maximise)
    run = _Eliminator(variables, plate_sizes, data_plate, keep, first, maximise, straight_through)
    return run.run(factors)
