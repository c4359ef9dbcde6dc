"""The evidence lower bound on named factors.

ELBO(θ, λ; x) = E_q[log p(x, z; θ) − log q(z; λ)] (Kim, Wiseman & Rush 2018, §4). Expectations over the guide's
enumerated sites are exact sums, Σ ⟨q, f⟩ at each factor's own shape; sites that only the model enumerates are summed
exactly first; continuous sites stand at one drawn value. 0 · (−∞) = 0 throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor

from lvmppl.density import PARTICLES, Evaluation, Factor, Variable, chain_axes, time_axis
from lvmppl.errors import IntractableError
from lvmppl.exact.chain_marginals import marginals_of_probabilities
from lvmppl.exact.elimination import Term, eliminate
from lvmppl.exact.named import Named, add, align, contract, union
from lvmppl.exact.scales import UNIT, scale_of, times

MOVES = "·transition"  # what the name of a chain's transition factor ends in


@dataclass(frozen=True)
class Bound:
    """An ELBO: the part of each row of the data plate [B] (scales applied) and the part outside the data plate."""

    per_datum: Tensor | None
    constant: Tensor

    @property
    def total(self) -> Tensor:
        return self.constant if self.per_datum is None else self.constant + self.per_datum.sum()


@dataclass(frozen=True)
class Part:
    """One term of log p − log q, scaled, in expectation over the guide's enumerated sites.

    mean: [particles (if it depends on the draw), *plates]; plates: those it stands in, with or without an axis. site: whose
    factor it is, empty for what is left when the model's own enumerated sites are summed. rank: the guide's factors in
    the order of drawing, None for the model's.
    """

    mean: Named
    plates: frozenset[str]
    site: str = ""
    rank: int | None = None

    def reduced(self, keep: Sequence[str], plate_sizes: Mapping[str, int]) -> Tensor:
        """The sum over all plates but those to keep [*keep], an axis along which it is constant of size 1."""
        named = summed(self.mean, [d for d in self.mean.dims if d not in keep])
        absent = prod(plate_sizes[p] for p in self.plates if p not in keep and p not in self.mean.dims)
        return align(named, keep) * absent if absent != 1 else align(named, keep)


class GuideWeights:
    """q's marginals over any few of its enumerated sites, from its log-factors.

    A chain z is independent of the other sites under q; its marginals are those of each step, u_t, and of each
    neighbouring pair, u_{t,t+1}, by one forward pass.
    """

    def __init__(
        self, factors: Sequence[Factor], variables: Mapping[str, Variable], names: frozenset[str]
    ) -> None:
        self.chains = {n: variables[n] for n in sorted(names) if variables[n].steps is not None}
        self.own = {f.site: f for f in factors if f.site.removesuffix(MOVES) in names}
        self.given: dict[str, Named] = {}
        self.variables = {n: variables[n] for n in names if n not in self.chains}
        self.every, self.names = names, names - self.chains.keys()
        self._known: dict[frozenset[str], Named] = {}
        self._steps: dict[str, tuple[Named, Named]] = {}

    def log_weights(self, names: frozenset[str], plate_sizes: Mapping[str, int]) -> Named:
        """log q over `names`, [names…, plates…]."""
        if names not in self._known:
            self._known[names] = self._compute(names, plate_sizes)
        return self._known[names]

    def _compute(self, names: frozenset[str], plate_sizes: Mapping[str, int]) -> Named:
        needed, frontier = set(names), list(names)
        while frontier:
            for dim in self._factor(frontier.pop()).dims:
                if dim in self.names and dim not in needed:
                    needed.add(dim)
                    frontier.append(dim)
        factors = [self._factor(n) for n in sorted(needed)]
        plates = frozenset(plate_sizes)
        if needed == names:
            return add([Named(f.log_prob, f.dims) for f in factors], plates)
        plain = [Factor(f.site, f.log_prob, f.dims, f.plates) for f in factors]
        kept = eliminate(plain, self.variables, plate_sizes, keep=names).kept
        return add([t.named for t in kept], plates)

    def _factor(self, name: str) -> Factor:
        if name in self.own:
            return self.own[name]
        probs, plates = self.given[name], self.variables[name].plates
        return Factor(name, probs.tensor.log(), probs.dims, frozenset(plates))

    def chain(self, name: str) -> tuple[Named, Named]:
        """(u_t [time, z, plates…], u_{t,t+1} [step, from, to, plates…]) of a chain, 0 beyond its lengths."""
        if name not in self._steps:
            self._steps[name] = chain_marginals(self.own[name], self.own[f"{name}{MOVES}"], self.chains[name])
        return self._steps[name]

    def over(self, dims: Sequence[str], plate_sizes: Mapping[str, int]) -> list[Named]:
        """q of what a log-factor with these axes depends on, as factors of a product whose axes are to be summed."""
        parts: list[Named] = []
        names = frozenset(d for d in dims if d in self.names)
        if names and names <= self.given.keys():
            parts.extend(self.given[n] for n in sorted(names))
        elif names:
            log_q = self.log_weights(names, plate_sizes)
            parts.append(Named(log_q.tensor.exp(), log_q.dims))
        for name, variable in self.chains.items():
            assert variable.steps is not None
            step, before, _ = chain_axes(name, variable.steps)
            if before in dims:
                pairs = self.chain(name)[1]
                parts.append(pairs if step in dims or step not in pairs.dims else summed(pairs, (step,)))
            elif name in dims:
                time, steps = time_axis(variable.steps), self.chain(name)[0]
                parts.append(steps if time in dims else Named(steps.tensor[0], steps.dims[1:]))
        return parts

    def without(self, name: str) -> GuideWeights:
        """q of the sites but one; of what was computed, the chains' marginals are kept."""
        return self._changed(name, (), self.every - {name})

    def with_site(self, name: str, factors: Sequence[Factor]) -> GuideWeights:
        """The same with other log-factors for one site; marginals of the other chains are kept."""
        return self._changed(name, factors, self.every)

    def with_marginal(self, name: str, marginal: Named) -> GuideWeights:
        """The same with one site independent of the others, of these probabilities [name, plates… in any order]."""
        new = self._changed(name, (), self.every)
        new.given[name] = marginal
        return new

    def _changed(self, name: str, factors: Sequence[Factor], every: frozenset[str]) -> GuideWeights:
        kept = [f for f in self.own.values() if f.site.removesuffix(MOVES) != name]
        new = GuideWeights((*kept, *factors), self.variables | self.chains, every)
        new._steps.update({n: found for n, found in self._steps.items() if n != name})
        new.given.update({n: found for n, found in self.given.items() if n != name})
        return new

    def is_summed(self, dim: str) -> bool:
        """Whether an axis belongs to q's sites (their states, the steps of a chain) rather than to a plate."""
        if dim in self.names or dim in self.chains:
            return True
        return any(
            dim in (*chain_axes(n, v.steps), time_axis(v.steps))
            for n, v in self.chains.items()
            if v.steps is not None
        )


def summed(named: Named, names: Sequence[str]) -> Named:
    """The sum over the axes of these names."""
    axes = [i for i, d in enumerate(named.dims) if d in names]
    return Named(named.tensor.sum(axes), tuple(d for d in named.dims if d not in names)) if axes else named


def chain_marginals(initial: Factor, moves: Factor, variable: Variable) -> tuple[Named, Named]:
    """u_1 = π, u_{t,t+1} = diag(u_t) P_t, u_{t+1} = u_{t,t+1}ᵀ 1 (0 beyond the lengths)."""
    steps, name = variable.steps, variable.name
    assert steps is not None
    step, before, after = chain_axes(name, steps)
    plates = tuple(
        d
        for d in union((initial.dims, moves.dims, variable.lengths_dims))
        if d not in (name, step, before, after)
    )
    u = align(Named(initial.log_prob, initial.dims), (*plates, name)).exp()
    table = align(Named(moves.log_prob, moves.dims), (*plates, step, before, after)).exp()
    if variable.lengths is not None:
        lengths = align(Named(variable.lengths, variable.lengths_dims), plates)
        running = lengths.unsqueeze(-1) > torch.arange(1, steps, device=lengths.device)  # [*plates, T-1]
        table = table * running[..., None, None]
    shape, size = broadcast_shape(u.shape[:-1], table.shape[:-3]), variable.size
    table = (
        table.expand(*shape, steps - 1, size, size).movedim(-3, 0).reshape(steps - 1, prod(shape), size, size)
    )
    unary, pairs = marginals_of_probabilities(u.expand(*shape, size).reshape(-1, size), table)
    time = time_axis(steps)
    return (
        Named(unary.reshape(steps, *shape, size), (time, *plates, name)),
        Named(pairs.reshape(steps - 1, *shape, size, size), (step, *plates, before, after)),
    )


def model_terms(evaluation: Evaluation, data_plate: str | None, scaled: bool = True) -> list[Term]:
    """log p as terms over the guide's enumerated sites, the model's other enumerated sites summed out.

    scaled: scales are applied; else a term that is a factor of one site carries its own.
    """
    extra = set(evaluation.variables) - evaluation.guide_variables
    own = _scaled if scaled else _unscaled
    if not extra:
        return [own(f) for f in evaluation.factors]
    chains = {n for n in evaluation.guide_variables if evaluation.variables[n].steps is not None}
    variables = {n: v for n, v in evaluation.variables.items() if n not in chains}
    touched = [f for f in evaluation.factors if _depends_on(f, extra, evaluation.variables)]
    terms = [own(f) for f in evaluation.factors if not any(f is t for t in touched)]
    _check_apart(touched, chains, evaluation.variables)
    done = eliminate(
        touched,
        variables,
        evaluation.plate_sizes,
        data_plate,
        keep=evaluation.guide_variables - chains,
    )
    terms.extend(done.kept)
    if done.per_datum is not None and data_plate is not None:
        terms.append(Term(Named(done.per_datum, (data_plate,)), frozenset({data_plate}), UNIT, message=True))
    terms.append(Term(Named(done.constant, ()), frozenset(), UNIT, message=True))
    return terms


def _axes(names: Iterable[str], variables: Mapping[str, Variable]) -> set[str]:
    """The axes that sites of these names give a factor."""
    found = set(names)
    for name in names:
        steps = variables[name].steps
        if steps is not None:
            found.update(chain_axes(name, steps)[1:])
    return found


def _depends_on(factor: Factor, names: Iterable[str], variables: Mapping[str, Variable]) -> bool:
    return bool(_axes(names, variables) & set(factor.dims))


def _check_apart(touched: Sequence[Factor], chains: set[str], variables: Mapping[str, Variable]) -> None:
    for factor in touched:
        if chains and _depends_on(factor, chains, variables):
            raise IntractableError(
                f"site '{factor.site}'",
                "the guide's chains apart from the sites that it leaves out",
                f"a factor over both ({', '.join(factor.dims)})",
                "give the guide every site of this factor",
            )


def guide_terms(evaluation: Evaluation) -> list[Term]:
    """log q as terms, scales applied."""
    return [_scaled(f) for f in evaluation.guide_factors]


def bound_parts(
    evaluation: Evaluation, data_plate: str | None, model: Sequence[Term] | None = None
) -> list[Part]:
    """The terms of log p − log q, each in expectation over the guide's enumerated sites.

    model: `model_terms` computed before (when θ has not moved since).
    """
    weights = GuideWeights(evaluation.guide_factors, evaluation.variables, evaluation.guide_variables)
    positive = model_terms(evaluation, data_plate) if model is None else model
    found = []
    for term in positive:
        found.append(_part(term, 1.0, weights, evaluation.plate_sizes, None))
    for rank, term in enumerate(guide_terms(evaluation)):
        found.append(_part(term, -1.0, weights, evaluation.plate_sizes, rank))
    return found


def _part(
    term: Term, sign: float, weights: GuideWeights, plate_sizes: Mapping[str, int], rank: int | None
) -> Part:
    mean = expectation(term.named, weights, plate_sizes)
    plates = term.plates | {d for d in mean.dims if d in plate_sizes and d != PARTICLES}
    signed = mean if sign > 0 else Named(-mean.tensor, mean.dims)
    return Part(signed, plates, term.site, rank)


def elbo(evaluation: Evaluation, data_plate: str | None, model: Sequence[Term] | None = None) -> Bound:
    """The ELBO of one evaluation, the mean over its particles; `model` as for `bound_parts`."""
    parts = bound_parts(evaluation, data_plate, model)
    rows, constant = rows_and_constant(parts, data_plate, evaluation.plate_sizes)
    return Bound(None if rows is None else rows.mean(0), constant.mean())


def rows_and_constant(
    parts: Sequence[Part], data_plate: str | None, plate_sizes: Mapping[str, int]
) -> tuple[Tensor | None, Tensor]:
    """Sums of parts by particle: those in the data plate by row [J, B], None if there are none, and the others [J].

    J is 1 where nothing depends on the draw.
    """
    rows: Tensor | None = None
    constant = torch.zeros(1, dtype=parts[0].mean.tensor.dtype, device=parts[0].mean.tensor.device)
    for part in parts:
        if data_plate is not None and data_plate in part.plates:
            own = part.reduced((PARTICLES, data_plate), plate_sizes)
            own = own.expand(len(own), plate_sizes[data_plate])
            rows = own if rows is None else rows + own
        else:
            constant = constant + part.reduced((PARTICLES,), plate_sizes)
    return rows, constant


def expected_log_joint(evaluation: Evaluation, weights: GuideWeights, data_plate: str | None) -> Tensor:
    """E_q log p(x, z; θ) of the evaluation's factors, over all rows, scales applied."""
    sizes = evaluation.plate_sizes
    parts = [_part(term, 1.0, weights, sizes, None) for term in model_terms(evaluation, data_plate)]
    rows, constant = rows_and_constant(parts, data_plate, sizes)
    return constant.mean() if rows is None else constant.mean() + rows.mean(0).sum()


def factor_weights(factor: Factor, weights: GuideWeights, plate_sizes: Mapping[str, int]) -> Tensor:
    """∂ E_q[log p(x, z; θ)]/∂f of a log-factor over q's sites and plates, at its own shape: its scale times q."""
    parts = [*weights.over(factor.dims, plate_sizes), scale_of(factor)]
    absent = factor.plates - set(union((factor.dims, *(p.dims for p in parts))))
    repeats = prod(plate_sizes[p] for p in absent)
    total = contract(parts, factor.dims).to(factor.log_prob.dtype)
    return (total * repeats if repeats != 1 else total).expand(factor.log_prob.shape)


def expectation(
    term: Named,
    weights: GuideWeights,
    plate_sizes: Mapping[str, int],
    keep: frozenset[str] = frozenset(),
) -> Named:
    """E_q of a log-factor: Σ over the guide's enumerated sites (and the steps of its chains) in its axes but `keep`."""
    parts = weights.over(term.dims, plate_sizes)
    if not parts:
        return term
    own = union((*(p.dims for p in parts), term.dims))
    inner = tuple(d for d in own if weights.is_summed(d) and d not in keep)
    dims = (*inner, *(d for d in own if d not in inner))
    q = align(parts[0], dims)
    for part in parts[1:]:
        q = q * align(part, dims)
    value = align(term, dims)
    product = q * torch.where(q == 0, torch.zeros((), dtype=value.dtype, device=value.device), value)
    return Named(product.sum(tuple(range(len(inner)))) if inner else product, dims[len(inner) :])


def _unscaled(factor: Factor) -> Term:
    named = Named(factor.log_prob, factor.dims)
    return Term(named, factor.plates, scale_of(factor), site=factor.site.removesuffix(MOVES))


def _scaled(factor: Factor) -> Term:
    scaled = times(Named(factor.log_prob, factor.dims), scale_of(factor))
    return Term(scaled, factor.plates, UNIT, message=True, site=factor.site.removesuffix(MOVES))
