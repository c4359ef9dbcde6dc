"""A bound at J draws of the guide, and the function whose gradient estimates the gradient of its expectation.

For the ELBO with f = log p(x, z) − log q(z; λ) and draws z_j,

    (1/J) Σ_j [ f(z_j) + Σ_s log q_s(z_j) · stop(R_s(z_j) − b_s) ]

where s runs over the sites whose value carries no gradient (score function; Williams 1992), R_s is the sum of the terms of
f that z_s can reach, and b_s a baseline that does not depend on z_j. The first term carries the exact sums, the pathwise
derivatives and those of θ; E ∇ log q = 0 takes care of log q in f. R_s is taken at the plates of its site, so that a row's
score meets that row's terms only, and those terms outside of the plates that the draw reaches (`reach`); log q of sites
drawn before s is left out (Rao-Blackwellisation: Ranganath et al. 2014, §3; Schulman et al. 2015).

Shapes: J particles, K samples of an importance-weighted bound, B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor

from lvmppl.density import PARTICLES, Evaluation, Factor
from lvmppl.elbo import Part, bound_parts, rows_and_constant
from lvmppl.errors import ModelError
from lvmppl.exact.elimination import Term
from lvmppl.exact.named import Named, align, log_sum_exp

Baseline = Callable[[str, Tensor, Sequence[str]], Tensor]
"""(site, learning signal [J, *plates], plates) → a baseline that broadcasts with it."""


@dataclass(frozen=True)
class Estimate:
    """bound: what is reported, detached; surrogate: what is differentiated; climbed: the weighted bound, if another."""

    bound: Tensor
    surrogate: Tensor
    climbed: Tensor | None = None


@dataclass(frozen=True)
class Draws:
    """The terms of a bound at J draws: `parts` of f; `scores`: log q of sites that need one, and its rank in the guide."""

    parts: list[Part]
    scores: list[tuple[Factor, int]]
    plate_sizes: Mapping[str, int]
    particles: int


def at_draws(evaluation: Evaluation, data_plate: str | None, model: Sequence[Term] | None = None) -> Draws:
    """The terms of one evaluation.

    Raises:
        ModelError: log q of a drawn site differs between the states of a site that is summed.
    """
    ranks = {f.site: i for i, f in enumerate(evaluation.guide_factors)}
    for factor in evaluation.score_factors:
        summed = [d for d in factor.dims if d in evaluation.guide_variables]
        if summed:
            raise ModelError(
                f"guide site '{factor.site}'",
                "a score-function site that depends on no site that is summed",
                f"one that depends on {', '.join(summed)}",
                f"estimate {', '.join(summed)} by score_function too",
            )
    particles = evaluation.plate_sizes.get(PARTICLES, 1)
    scores = [(f, ranks[f.site]) for f in evaluation.score_factors]
    return Draws(bound_parts(evaluation, data_plate, model), scores, evaluation.plate_sizes, particles)


def stacked(draws: Sequence[Draws]) -> Draws:
    """Single draws as particles of one."""
    if len(draws) == 1:
        return draws[0]

    def together(named: Sequence[Named]) -> Named:
        shape = broadcast_shape(*(n.tensor.shape for n in named))
        return Named(torch.stack([n.tensor.expand(shape) for n in named]), (PARTICLES, *named[0].dims))

    first = draws[0]
    parts = [
        Part(together([d.parts[i].mean for d in draws]), p.plates, p.site, p.rank)
        for i, p in enumerate(first.parts)
    ]
    scores = []
    for i, (factor, rank) in enumerate(first.scores):
        named = together([Named(d.scores[i][0].log_prob, d.scores[i][0].dims) for d in draws])
        scores.append((Factor(factor.site, named.tensor, named.dims, factor.plates), rank))
    return Draws(parts, scores, {**first.plate_sizes, PARTICLES: len(draws)}, len(draws))


def elbo_estimate(
    draws: Draws,
    data_plate: str | None,
    weights: Mapping[str, float],
    baseline: Baseline,
    reached: Mapping[str, frozenset[str]] = MappingProxyType({}),
) -> Estimate:
    """The ELBO and its surrogate.

    weights: of the terms of latent sites in the gradient, 1 where not given. reached: by score-function site, the sites
    whose terms its draw reaches outside of its plates.
    """
    bound = _total(draws.parts, data_plate, draws.plate_sizes)
    parts, weighted = draws.parts, bound
    if any(w != 1.0 for w in weights.values()):
        parts = [_times(p, weights.get(p.site, 1.0)) for p in parts]
        weighted = _total(parts, data_plate, draws.plate_sizes)
    surrogate = weighted
    for factor, rank in draws.scores if torch.is_grad_enabled() else ():
        plates = sorted(factor.plates)
        signal = _signal(parts, factor, rank, draws, reached.get(factor.site, frozenset()))
        advantage = signal - baseline(factor.site, signal, plates)
        log_q = align(Named(factor.log_prob, factor.dims), (PARTICLES, *plates))
        surrogate = surrogate + (log_q * advantage.detach()).sum() / draws.particles
    return Estimate(bound.detach(), surrogate, None if weighted is bound else weighted.detach())


def _times(part: Part, weight: float) -> Part:
    return Part(Named(part.mean.tensor * weight, part.mean.dims), part.plates, part.site, part.rank)


def _total(parts: Sequence[Part], data_plate: str | None, plate_sizes: Mapping[str, int]) -> Tensor:
    rows, constant = rows_and_constant(parts, data_plate, plate_sizes)
    return constant.mean() if rows is None else constant.mean() + rows.mean(0).sum()


def _signal(
    parts: Sequence[Part], factor: Factor, rank: int, draws: Draws, reached: frozenset[str]
) -> Tensor:
    """R_s [J, *plates], detached.

    What is left of sites that the model summed has lost its inner plates: it counts at the plates that it still has, as
    do the terms of `reached`.
    """
    plates = sorted(factor.plates)
    keep = (PARTICLES, *plates)
    shape = (draws.particles, *(draws.plate_sizes[p] for p in plates))
    total = factor.log_prob.new_zeros(shape)
    for part in parts:
        if part.rank is not None and part.rank < rank:
            continue
        if factor.plates <= part.plates:
            total = total + part.reduced(keep, draws.plate_sizes).detach()
        elif not part.site or part.site in reached:
            common = (PARTICLES, *(p for p in plates if p in part.plates))
            total = total + align(Named(part.reduced(common, draws.plate_sizes).detach(), common), keep)
    return total


def importance_estimate(
    draws: Draws,
    data_plate: str | None,
    num_samples: int,
    scale: float,
    whole: bool,
    baselines: Mapping[str, str],
    baseline: Baseline,
    paths: Sequence[tuple[Tensor, Tensor]] = (),
) -> Estimate:
    """Σ_n log (1/K) Σ_k w_kn, log w = log p(x⁽ⁿ⁾, z_k) − log q(z_k), and its surrogate (Burda et al. 2016).

    scale: N/B. whole: all rows are one datum, because a site outside the data plate is drawn. baselines: by site;
    `leave_one_out` replaces log w_k by the mean of the others' (Mnih & Rezende 2016). paths: (z as a leaf at which w was
    evaluated with λ held in log q, z as drawn) of every pathwise site; their gradient is then doubly reparameterised,
    Σ_k w̃_k² ∂ log w_k/∂z ∂z/∂λ with w̃ the normalised weights (Tucker et al. 2019, eq. 8), else Σ_k w̃_k ∇ log w_k.
    """
    rows, constant = rows_and_constant(draws.parts, data_plate, draws.plate_sizes)
    total, outside, unit = draws.particles, constant.mean(), scale
    if whole or rows is None:
        log_w = constant if rows is None else constant + rows.sum(-1)
        log_w, outside, unit = log_w.unsqueeze(-1), torch.zeros_like(outside), 1.0
    else:
        log_w = rows / scale
    log_w = log_w.expand(total, -1).reshape(-1, num_samples, log_w.shape[-1])  # [J, K, B]
    outer = len(log_w)
    local = log_sum_exp(log_w, 1) - math.log(num_samples)  # [J, B]
    bound = outside + unit * local.sum() / outer
    if not torch.is_grad_enabled():
        return Estimate(bound.detach(), bound)
    surrogate = bound
    if paths:
        share = torch.softmax(log_w.detach(), 1)
        weighted = (share.square() * log_w).sum() * unit / outer
        leaves = [leaf for leaf, _ in paths]
        gradients = torch.autograd.grad(weighted, leaves, retain_graph=True, allow_unused=True)
        for gradient, (_, drawn) in zip(gradients, paths, strict=True):
            if gradient is not None and drawn.requires_grad:
                surrogate = surrogate + (gradient.detach() * (drawn - drawn.detach())).sum()
    plates = [] if whole or rows is None else [str(data_plate)]
    for factor, _ in draws.scores:
        part = Part(Named(factor.log_prob, factor.dims), factor.plates)
        log_q = part.reduced((PARTICLES, *plates), draws.plate_sizes).reshape(log_w.shape)
        signal = (unit * local.detach()).unsqueeze(1).expand(log_w.shape)
        if baselines.get(factor.site) == "leave_one_out":
            off = unit * _without_each(log_w.detach())
        else:
            off = baseline(factor.site, signal.reshape(total, *log_w.shape[2:] if plates else ()), plates)
            off = off.expand(total, *log_w.shape[2:] if plates else ()).reshape(log_w.shape)
        surrogate = surrogate + (log_q * (signal - off).detach()).sum() / outer
    return Estimate(bound.detach(), surrogate)


def _without_each(log_w: Tensor) -> Tensor:
    """log (1/K) Σ_i w_i with log w_k replaced by the mean of the other log w, for each k [J, K, B]."""
    count = log_w.shape[1]
    others = (log_w.sum(1, keepdim=True) - log_w) / (count - 1)
    eye = torch.eye(count, dtype=torch.bool, device=log_w.device).reshape(1, count, count, 1)
    replaced = torch.where(eye, others.unsqueeze(2), log_w.unsqueeze(1))  # [J, K, K, B]
    return log_sum_exp(replaced, 2) - math.log(count)
