"""The expected complete-data log-likelihood Q(θ) = Σ_s ⟨q_s, f_s(θ)⟩ and its maximisation by gradient.

The E-step gives q_s = ∂ log Z/∂ f_s, posterior probabilities at each factor's own shape (scales included); 0 · (−∞) = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lvmppl.algorithms.ascent import Stopping, detached, maximise_lbfgs
from lvmppl.algorithms.closed_form import ClosedSite
from lvmppl.algorithms.evidence import chunks, log_prior
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.statistics import Statistics, accumulate, add_statistics
from lvmppl.continuous_posteriors import ContinuousPosterior
from lvmppl.density import POINTS, Coordinates, Evaluation, Factor, Joint, Rows, SiteView, Values
from lvmppl.exact.continuous import held_at, takes_one, values_at
from lvmppl.exact.elimination import eliminate
from lvmppl.exact.engine import continuous_posterior
from lvmppl.exact.layout import Layout, is_constant
from lvmppl.exact.named import Named, align
from lvmppl.exact.scales import relative_to, scale_of, times
from lvmppl.exact.summed import by_row, log_joint_at
from lvmppl.exponential import TRANSITION, read_factor
from lvmppl.posterior_marginals import with_gradient


class Piece(NamedTuple):
    """The E-step of one piece of the data: q_s by site, and the model at the points of continuous sites that q_s weighs.

    For finitely many states q_s = ∂ log Z/∂ f_s; a continuous posterior comes as points z_i and weights w_i with
    E_post[f] = Σ_i w_i f(z_i), and q_s is w summed to the axes of f_s(z; θ).
    """

    q: dict[str, Tensor]
    model: Joint
    data: Values
    rows: Rows


Weights = list[Piece]
"""A piece of the data each."""


def e_step(
    problem: Problem, values: Values, sites: Sequence[ClosedSite] = (), keep_weights: bool = True
) -> tuple[float, Weights, dict[str, Statistics]]:
    """log p(x; θ) (times the priors of θ), the weights q_s of every factor, and the expected statistics of `sites`."""
    total: float = 0.0
    weights: Weights = []
    statistics: dict[str, Statistics] = {}
    for data, rows in chunks(problem):
        posterior = None
        if problem.integrates:
            with torch.no_grad():
                posterior = continuous_posterior(problem.model, data, values)
            total += posterior.log_evidence
        for number, (model, w) in enumerate(_held(problem.model, posterior)):
            with torch.no_grad():
                views, evaluation = model.view(data, values, rows)
                factors = tuple(f for v in views.values() for f in v.factors())
                evaluation = replace(evaluation, factors=factors)
            if posterior is None:
                value, q = factor_weights(evaluation, problem.data_plate)
                total += value
            else:
                q = point_weights(evaluation, w)
                if posterior.layout.summed:
                    q.update(summed_weights(problem.model, evaluation, posterior.layout, w))
                total += 0.0 if number else float(log_prior(problem, factors))
            if keep_weights:
                weights.append(Piece(q, model, data, rows))
            add_up(views, evaluation, q, sites, statistics, same_rows=number > 0)
    return total, weights, statistics


def _held(model: Joint, posterior: ContinuousPosterior | None) -> Iterator[tuple[Joint, Named]]:
    """The model at the points of its continuous sites, with their weights: at all of them along an axis `POINTS`, or at one
    after the other where it takes no more at once.
    """
    if posterior is None:
        yield model, Named(torch.ones(()), ())
        return
    z, w = posterior.nodes()
    layout, dims = posterior.layout, (POINTS, *posterior.row_dims)
    w = w.reshape(w.shape[: len(dims)])
    if not posterior.singly:
        yield held_at(model, layout, z), Named(w, dims)
        return
    if layout.discrete:
        raise takes_one(layout, "enumerated sites beside them")
    for point, weight in zip(z, w, strict=True):
        yield model.held(values_at(model, layout, point)), Named(weight, dims[1:])


def point_weights(evaluation: Evaluation, weights: Named) -> dict[str, Tensor]:
    """Weights of points summed to the axes of each factor, plates that a factor does not vary along multiplied out."""
    result = {}
    for factor in evaluation.factors:
        scaled = times(weights, scale_of(factor))
        own = [i for i, d in enumerate(scaled.dims) if d not in factor.dims]
        kept = tuple(d for d in scaled.dims if d in factor.dims)
        outside = [d for d in weights.dims if d in evaluation.plate_sizes and d not in factor.plates]
        summed = Named(scaled.tensor.sum(own) if own else scaled.tensor, kept)
        repeats = [p for p in factor.plates if p not in factor.dims and p not in scaled.dims]
        number: float = math.prod(evaluation.plate_sizes[p] for p in repeats)
        number /= math.prod(evaluation.plate_sizes[p] for p in outside)
        result[factor.site] = number * align(summed, factor.dims).expand(factor.log_prob.shape)
    return result


def summed_weights(model: Joint, evaluation: Evaluation, layout: Layout, weights: Named) -> dict[str, Tensor]:
    """w_sn ∂ log p(x, z_sn)/∂ f, enumerated sites summed out at the points z_sn of weights [S, *rows], of every factor f
    that belongs to rows; weights [*rows] of the one point at which the model is held."""
    own = [with_gradient(f) for f in evaluation.factors if not is_constant(f, model, layout)]
    home = layout.home(model.structure.data_plate)
    points = len(weights.tensor) if POINTS in weights.dims else 1
    table = Named(weights.tensor.reshape(points, -1), (POINTS, *(home or ("",))))
    scaled = times(table, layout.scale).tensor.flatten()
    with torch.enable_grad():
        total = log_joint_at(by_row(evaluation, relative_to(layout.scale, own), home, points))
        counted = torch.where(scaled > 0, scaled * total, torch.zeros_like(total))
        grads = torch.autograd.grad(counted.sum(), [f.log_prob for f in own])
    return {f.site: g for f, g in zip(own, grads, strict=True)}


def add_up(
    views: Mapping[str, SiteView],
    evaluation: Evaluation,
    weights: Mapping[str, Tensor],
    sites: Sequence[ClosedSite],
    statistics: dict[str, Statistics],
    same_rows: bool = False,
) -> None:
    """Add the statistics of one piece of the data to `statistics`, those about a computed location aside.

    same_rows: the piece is of the rows of the one before, at another point of the continuous sites.
    """
    dims = {f.site: f.dims for f in evaluation.factors}
    with torch.no_grad():
        for site in (s for s in sites if not s.residual):
            reading = read_factor(views, site.name, site.kind)
            assert reading is not None, "a site's family does not change between steps"
            part = accumulate(reading, Named(weights[site.name], dims[site.name]), site.keep, site.reference)
            by_row = None if same_rows else site.by_row
            statistics[site.name] = add_statistics(statistics.get(site.name), part, by_row)


def residual_statistics(
    problem: Problem, values: Values, weights: Weights, sites: Sequence[ClosedSite]
) -> dict[str, Statistics]:
    """Expected squares about locations that are computed from θ, the data or continuous sites, at `values`."""
    statistics: dict[str, Statistics] = {}
    before: Values | None = None
    for piece in weights:
        same_rows, before = piece.data is before, piece.data
        with torch.no_grad():
            views, _ = piece.model.view(piece.data, values, piece.rows)
            for site in sites:
                reading = read_factor(views, site.name, site.kind)
                assert reading is not None, "a site's family does not change between steps"
                view = views[site.name] if site.name in views else views[site.name.removesuffix(TRANSITION)]
                dims = next(f.dims for f in view.factors() if f.site == site.name)
                part = accumulate(reading, Named(piece.q[site.name], dims), site.keep, None)
                by_row = None if same_rows else site.by_row
                statistics[site.name] = add_statistics(statistics.get(site.name), part, by_row)
    return statistics


def factor_weights(evaluation: Evaluation, data_plate: str | None) -> tuple[float, dict[str, Tensor]]:
    """(log Z, {site: ∂ log Z/∂ f_site})."""
    leaves = [f.log_prob.detach().requires_grad_() for f in evaluation.factors]
    factors = [
        Factor(f.site, leaf, f.dims, f.plates, f.scale, f.scale_dims, f.observed)
        for f, leaf in zip(evaluation.factors, leaves, strict=True)
    ]
    with torch.enable_grad():
        total = eliminate(factors, evaluation.variables, evaluation.plate_sizes, data_plate).total
        grads = torch.autograd.grad(total, leaves)
    return float(total.detach()), {f.site: g for f, g in zip(factors, grads, strict=True)}


def weighted(factors: Sequence[Factor], weights: Mapping[str, Tensor]) -> Tensor:
    """Σ_s ⟨q_s, f_s⟩ with 0 · (−∞) = 0."""
    total: Tensor | None = None
    for factor in factors:
        q = weights[factor.site]
        value = torch.where(q == 0, torch.zeros((), dtype=q.dtype, device=q.device), factor.log_prob)
        part = (q * value).sum()
        total = part if total is None else total + part
    assert total is not None
    return total


def expected_log_joint(problem: Problem, values: Values, weights: Weights) -> Tensor:
    """Q(θ) = Σ_s ⟨q_s, f_s(θ)⟩ over all data."""
    total: Tensor | None = None
    for piece in weights:
        part = weighted(piece.model.evaluate(piece.data, values, piece.rows).factors, piece.q)
        total = part if total is None else total + part
    assert total is not None
    return total


def gradient_m_step(
    problem: Problem,
    values: Values,
    weights: Weights,
    steps: int,
    tolerance: float = 0.0,
    names: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """θ that raises Q by at most `steps` L-BFGS iterations from `values` (generalized EM); never lower than the start.

    names: the parameters that move, all that are not frozen by default.
    """
    moving = problem.free_theta if names is None else tuple(names)
    coordinates = Coordinates(problem.model.specs, moving)
    fixed = {n: values[n] for n in problem.theta if n not in moving}
    best: dict[str, Tensor] = detached({n: values[n] for n in problem.theta})
    top = [-torch.inf]
    stopping = Stopping(tolerance)

    def objective(unconstrained: Mapping[str, Tensor]) -> Tensor:
        return expected_log_joint(problem, {**fixed, **coordinates.constrain(unconstrained)}, weights)

    def on_step(step: int, value: float, unconstrained: Mapping[str, Tensor]) -> bool:
        if value > top[0]:
            top[0] = value
            if step:
                with torch.no_grad():
                    best.update(detached(coordinates.constrain(unconstrained)))
        return stopping.met(value) or not value > -torch.inf

    maximise_lbfgs(objective, coordinates.unconstrain(values), steps, on_step)
    return best
