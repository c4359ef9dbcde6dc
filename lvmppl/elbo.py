"""The evidence lower bound on named factors.

ELBO(θ, λ; x) = E_q[log p(x, z; θ) − log q(z; λ)] (Kim, Wiseman & Rush 2018, §4). Expectations over the guide's
enumerated sites are exact sums, Σ ⟨q, f⟩ at each factor's own shape; sites that only the model enumerates are summed
exactly first; continuous sites stand at one drawn value. 0 · (−∞) = 0 throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvmppl.density import Evaluation, Factor, Variable
from lvmppl.exact.elimination import Term, eliminate, times
from lvmppl.exact.named import Named, add, align, union


@dataclass(frozen=True)
class Bound:
    """An ELBO: the part of each row of the data plate [B] (scales applied) and the part outside the data plate."""

    per_datum: Tensor | None
    constant: Tensor

    @property
    def total(self) -> Tensor:
        return self.constant if self.per_datum is None else self.constant + self.per_datum.sum()


class GuideWeights:
    """q's marginals over any few of its enumerated sites, from its log-factors."""

    def __init__(
        self, factors: Sequence[Factor], variables: Mapping[str, Variable], names: frozenset[str]
    ) -> None:
        self.own = {f.site: f for f in factors if f.site in names}
        self.variables = {n: variables[n] for n in names}
        self.names = names
        self._known: dict[frozenset[str], Named] = {}

    def log_weights(self, names: frozenset[str], plate_sizes: Mapping[str, int]) -> Named:
        """log q over `names`, [names…, plates…]."""
        if names not in self._known:
            self._known[names] = self._compute(names, plate_sizes)
        return self._known[names]

    def _compute(self, names: frozenset[str], plate_sizes: Mapping[str, int]) -> Named:
        needed, frontier = set(names), list(names)
        while frontier:
            for dim in self.own[frontier.pop()].dims:
                if dim in self.names and dim not in needed:
                    needed.add(dim)
                    frontier.append(dim)
        factors = [self.own[n] for n in sorted(needed)]
        plates = frozenset(plate_sizes)
        if needed == names:
            return add([Named(f.log_prob, f.dims) for f in factors], plates)
        plain = [Factor(f.site, f.log_prob, f.dims, f.plates) for f in factors]
        kept = eliminate(plain, self.variables, plate_sizes, keep=names).kept
        return add([t.named for t in kept], plates)


def model_terms(evaluation: Evaluation, data_plate: str | None) -> list[Term]:
    """log p as terms over the guide's enumerated sites, the model's other enumerated sites summed out, scales applied."""
    extra = set(evaluation.variables) - evaluation.guide_variables
    if not extra:
        return [_scaled(f) for f in evaluation.factors]
    done = eliminate(
        evaluation.factors,
        evaluation.variables,
        evaluation.plate_sizes,
        data_plate,
        keep=evaluation.guide_variables,
    )
    terms = list(done.kept)
    one = Named(torch.ones(()), ())
    if done.per_datum is not None and data_plate is not None:
        terms.append(Term(Named(done.per_datum, (data_plate,)), frozenset({data_plate}), one, absolute=True))
    terms.append(Term(Named(done.constant, ()), frozenset(), one, absolute=True))
    return terms


def guide_terms(evaluation: Evaluation) -> list[Term]:
    """log q as terms, scales applied."""
    return [_scaled(f) for f in evaluation.guide_factors]


def elbo(evaluation: Evaluation, data_plate: str | None, model: Sequence[Term] | None = None) -> Bound:
    """The ELBO of one evaluation; `model` may hold `model_terms` computed before (when θ has not moved since)."""
    weights = GuideWeights(evaluation.guide_factors, evaluation.variables, evaluation.guide_variables)
    positive = model_terms(evaluation, data_plate) if model is None else model
    like = (
        evaluation.guide_factors[0].log_prob if evaluation.guide_factors else evaluation.factors[0].log_prob
    )
    bound = Bound(None, torch.zeros((), dtype=like.dtype, device=like.device))
    for sign, terms in ((1.0, positive), (-1.0, guide_terms(evaluation))):
        for term in terms:
            bound = _accumulate(bound, term, sign, weights, evaluation.plate_sizes, data_plate)
    return bound


def expectation(term: Named, weights: GuideWeights, plate_sizes: Mapping[str, int]) -> Named:
    """E_q of a log-factor: Σ over the guide's enumerated sites in its axes."""
    names = frozenset(d for d in term.dims if d in weights.names)
    if not names:
        return term
    log_q = weights.log_weights(names, plate_sizes)
    dims = union((sorted(names), term.dims, log_q.dims))
    q, value = align(log_q, dims).exp(), align(term, dims)
    product = q * torch.where(q == 0, torch.zeros((), dtype=value.dtype, device=value.device), value)
    return Named(product.sum(tuple(range(len(names)))), dims[len(names) :])


def _accumulate(
    bound: Bound,
    term: Term,
    sign: float,
    weights: GuideWeights,
    plate_sizes: Mapping[str, int],
    data_plate: str | None,
) -> Bound:
    mean = expectation(term.named, weights, plate_sizes)
    plates = term.plates | {d for d in mean.dims if d in plate_sizes}
    local = data_plate is not None and data_plate in plates
    keep = {data_plate} if local else set()
    axes = [i for i, d in enumerate(mean.dims) if d not in keep]
    tensor = mean.tensor.sum(axes) if axes else mean.tensor
    for plate in plates - keep:
        if plate not in mean.dims:
            tensor = tensor * plate_sizes[plate]
    if not local:
        return Bound(bound.per_datum, bound.constant + sign * tensor)
    assert data_plate is not None
    tensor = sign * tensor.expand(plate_sizes[data_plate])
    return Bound(tensor if bound.per_datum is None else bound.per_datum + tensor, bound.constant)


def _scaled(factor: Factor) -> Term:
    scale = factor.scale
    named = Named(scale if isinstance(scale, Tensor) else torch.tensor(float(scale)), factor.scale_dims)
    return Term(times(Named(factor.log_prob, factor.dims), named), factor.plates, named, absolute=True)
