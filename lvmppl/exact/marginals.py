"""Marginals of any group of enumerated sites: ∂ log Z / ∂ (a log-factor of zeros over the group)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvmppl.density import Factor, Variable, chain_axes, time_axis
from lvmppl.errors import IntractableError
from lvmppl.exact.elimination import eliminate
from lvmppl.exact.named import Named, align


@dataclass(frozen=True, eq=False)
class Marginals:
    """Marginals of the model whose log-factors these are; a scale weighs the evidence, a marginal is of one copy."""

    factors: Sequence[Factor]
    variables: Mapping[str, Variable]
    plate_sizes: Mapping[str, int]

    def _total(self, extra: Sequence[Factor]) -> Tensor:
        return eliminate(
            (*self.factors, *extra), self.variables, self.plate_sizes, straight_through=True
        ).total

    def pair(self, first: str, second: str) -> Tensor:
        """p(first = j, second = k | x), [*plates of both, (T,) J, K]."""
        own, other = (set(self.variables[n].plates) for n in (first, second))
        if not (own <= other or other <= own):
            return self._pair_across(first, second, frozenset(own & other))
        (table,) = self.tables([(first, second)])
        return table.movedim(0, -1).movedim(0, -1)

    def _pair_across(self, first: str, second: str, common: frozenset[str]) -> Tensor:
        """The pair of sites of sibling plates, which are independent given the sites g around both that they meet:

        p(a, b | x) = Σ_g p(g | x) p(a | g_a, x) p(b | g_b, x).
        """
        reach = [self._reach(name, common) for name in (first, second)]
        if reach[0][0] & reach[1][0]:
            raise IntractableError(
                f"pair_marginal of '{first}' and '{second}'",
                "sites of sibling plates that are independent given the sites around both",
                "sites that meet in a factor inside these plates",
                "write the smaller plate as a Python loop",
            )
        around = tuple(dict.fromkeys((*reach[0][1], *reach[1][1])))
        groups = [(name, *outer) for name, (_, outer) in zip((first, second), reach, strict=True)]
        dims = (*around, *self.plates_of((first, second)), *self._times_of((first, second)), first, second)
        result = self.factors[0].log_prob.new_ones([1] * len(dims))
        if around:
            (weight,) = self.tables([around])
            result = align(Named(weight, self.dims_of(around)), dims)
        for group, table in zip(groups, self.tables(groups), strict=True):
            norm = table.sum(0, keepdim=True)
            given = torch.where(norm > 0, table / norm, 0.0)
            result = result * align(Named(given, self.dims_of(group)), dims)
        return result.sum(tuple(range(len(around)))) if around else result

    def _reach(self, name: str, common: frozenset[str]) -> tuple[frozenset[str], tuple[str, ...]]:
        """Sites that `name` is tied to inside the plates beyond `common`, and those around them that they meet."""
        outer = {n for n, v in self.variables.items() if set(v.plates) <= common}
        groups = [{d for d in f.dims if d in self.variables} for f in self.factors]
        inside, size = {name}, 0
        while len(inside) > size:
            size = len(inside)
            inside = inside.union(*(g - outer for g in groups if g & inside))
        met = set().union(*(g & outer for g in groups if g & inside))
        return frozenset(inside), tuple(n for n in self.variables if n in met)

    def consecutive(self, chain: str) -> Tensor:
        """p(z_t = j, z_{t+1} = k | x) of every sequence and step, [*plates, T − 1, K, K]."""
        variable = self.variables[chain]
        plates, steps = variable.plates, variable.steps or 1
        lead = [self.plate_sizes[p] for p in plates]
        if steps == 1:
            return self._like.new_zeros(*lead, 0, variable.size, variable.size)
        return self._transitions(chain, (*plates, *chain_axes(chain, steps)), (*lead, steps - 1))

    def expected_transitions(self, chain: str) -> Tensor:
        """Σ p(z_t = j, z_{t+1} = k | x) over sequences and steps, [K, K]; nothing is held by sequence or step."""
        variable = self.variables[chain]
        if variable.steps == 1:
            return self._like.new_zeros(variable.size, variable.size)
        return self._transitions(chain, chain_axes(chain, variable.steps or 1)[1:], ())

    def _transitions(self, chain: str, dims: tuple[str, ...], lead: tuple[int, ...]) -> Tensor:
        """∂ log Z / ∂ (a transition factor of zeros over `dims`, shared along the plates and steps it does not name)."""
        variable, like = self.variables[chain], self._like
        size = variable.size
        zero = torch.zeros(*lead, size, size, dtype=like.dtype, device=like.device, requires_grad=True)
        scale, scale_dims = self._scale_of(chain)
        extra = Factor(f"{chain}·transition", zero, dims, frozenset(variable.plates), scale, scale_dims)
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(self._total([extra]), [zero])
        return grad

    @property
    def _like(self) -> Tensor:
        return self.factors[0].log_prob

    def tables(self, groups: Sequence[tuple[str, ...]]) -> list[Tensor]:
        """Joint marginals of each group: ∂ log Z / ∂ (a zero log-factor over the group), variables leading."""
        zeros = [self._zero_factor(group) for group in groups]
        with torch.enable_grad():
            total = self._total(zeros)
            grads = torch.autograd.grad(total, [z.log_prob for z in zeros], allow_unused=True)
        tables = []
        for zero, grad in zip(zeros, grads, strict=True):
            tables.append((torch.zeros_like(zero.log_prob) if grad is None else grad).detach())
        return tables

    def _zero_factor(self, group: tuple[str, ...]) -> Factor:
        dims = self.dims_of(group)
        like = self.factors[0].log_prob
        shape = [self.variables[d].size if d in self.variables else self.plate_sizes[d] for d in dims]
        zero = torch.zeros(shape, dtype=like.dtype, device=like.device, requires_grad=True)
        deepest = max(group, key=lambda n: len(self.variables[n].plates))
        scale, scale_dims = self._scale_of(deepest)
        return Factor("", zero, dims, frozenset(self.plates_of(group)), scale, scale_dims)

    def dims_of(self, group: Sequence[str]) -> tuple[str, ...]:
        """The axes of a group's marginal: the sites, their plates, the steps of chains."""
        return (*group, *self.plates_of(group), *self._times_of(group))

    def _times_of(self, group: Sequence[str]) -> tuple[str, ...]:
        steps = dict.fromkeys(self.variables[n].steps for n in group)
        return tuple(time_axis(t) for t in steps if t is not None)

    def _scale_of(self, site: str) -> tuple[float | Tensor, tuple[str, ...]]:
        own = next(f for f in self.factors if f.site == site)
        return own.scale, own.scale_dims

    def plates_of(self, group: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(p for name in group for p in self.variables[name].plates))
