"""Where a fit starts: the model's own parameters, or one M-step from k-means or random responsibilities.

`init: params` uses θ as the model (or `start_from`) gives it. `kmeans` and `random` give every enumerated site
responsibilities r (a chain at every step), hold every continuous site at a draw from its prior, and maximise
Σ_s ⟨r, f_s(θ)⟩ once. Restart 0 starts as `init` says, the others at random.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lvmppl.algorithms.closed_form import solve
from lvmppl.algorithms.clusters import Labels
from lvmppl.algorithms.evidence import CHUNK, chunks
from lvmppl.algorithms.expected import Piece, add_up, gradient_m_step
from lvmppl.algorithms.m_step import solve_closed
from lvmppl.algorithms.plan import Plan
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.statistics import Statistics, stacked
from lvmppl.algorithms.tabulated import Tabulated
from lvmppl.density import (
    Evaluation,
    HeldJoint,
    Rows,
    Values,
    Variable,
    chain_axes,
    derive_seed,
    time_axis,
)
from lvmppl.errors import InputError
from lvmppl.exact.named import Named, align
from lvmppl.exponential import TRANSITION

_START_STEPS = 50  # L-BFGS iterations of the M-step that turns responsibilities into parameters


def start_values(
    problem: Problem, init: str, restart: int, restarts: int, plan: Plan | None = None
) -> dict[str, Tensor]:
    """The start of one restart, constrained. plan: of the M-step; without it the M-step is by gradient throughout."""
    values = dict(problem.initial)
    how = init if restart == 0 else "random"
    if how == "params":
        return values
    if not problem.model.structure.latents:
        if restart > 0 or init == "random":
            raise InputError(
                f"fit '{problem.name}'",
                "a model with latent sites for random or k-means starts",
                "none",
                "use init: params and restarts: 1",
            )
        return values
    names = problem.free_theta if plan is None else plan.by_gradient
    weights: Iterable[Piece] = _responsibilities(problem, how, restart)
    if names or plan is None or plan.needs_weights:
        weights = list(weights)
    if plan is not None and plan.closed:
        statistics = _statistics_of(problem, plan, weights)
        kept = weights if isinstance(weights, list) else None
        values, _ = solve_closed(problem, plan, values, statistics, kept)
    if names:
        assert isinstance(weights, list)
        values.update(gradient_m_step(problem, values, weights, _START_STEPS, tolerance=1e-6, names=names))
    return values


def start_together(
    problem: Problem, init: str, restarts: int, plan: Plan, tables: Tabulated
) -> dict[str, Tensor]:
    """The starts of all restarts, [R, *shape], of a model in tables: what `start_values` gives one by one."""
    if not tables.is_one_piece or problem.num_rows > CHUNK or not problem.model.structure.enumerated:
        each = [start_values(problem, init, r, restarts, plan) for r in range(restarts)]
        return {n: torch.stack([own[n] for own in each]) for n in problem.theta}
    rows = Rows(problem.num_rows)
    with torch.no_grad():
        views, evaluation = problem.model.view(problem.data, problem.initial, rows)
        evaluation = replace(evaluation, factors=tuple(f for v in views.values() for f in v.factors()))
    labelled = Labels(problem, views)
    dims = {f.site: f.dims for f in evaluation.factors}
    (piece,) = tables.pieces()
    parts = []
    for restart in range(restarts):
        how = init if restart == 0 else "random"
        if how == "params":
            continue
        generator = _generator(problem, restart)
        labels = labelled(how, evaluation, generator)
        weights = _weights_of(evaluation, problem, rows, labels, 0, generator)
        q = {site: Named(weight, dims[site]) for site, weight in weights.items()}
        parts.append(tables.statistics(piece, q))
    statistics = {n: stacked([own[n] for own in parts]) for n in parts[0]}
    values = {n: v.expand(len(parts), *v.shape) for n, v in problem.initial.items() if n in problem.theta}
    solved = solve(plan.sites, problem.model.specs, plan.closed, values, statistics, plan.priors).values
    if len(parts) == restarts:
        return solved
    return {n: torch.cat([problem.initial[n].unsqueeze(0), v]) for n, v in solved.items()}


def _statistics_of(problem: Problem, plan: Plan, weights: Iterable[Piece]) -> dict[str, Statistics]:
    statistics: dict[str, Statistics] = {}
    for piece in weights:
        with torch.no_grad():
            views, evaluation = piece.model.view(piece.data, problem.initial, piece.rows)
            evaluation = replace(evaluation, factors=tuple(f for v in views.values() for f in v.factors()))
        add_up(views, evaluation, piece.q, plan.sites, statistics)
    return statistics


def _responsibilities(problem: Problem, how: str, restart: int) -> Iterator[Piece]:
    """The weights of every factor, chunk by chunk of the data."""
    generator = _generator(problem, restart)
    with torch.no_grad():
        views, evaluation = problem.model.view(problem.data, problem.initial)
    labels = Labels(problem, views)(how, evaluation, generator)
    begin = 0
    for data, rows in chunks(problem):
        model = _at_draws(problem, data, rows, generator) if problem.integrates else problem.model
        with torch.no_grad():
            evaluation = model.evaluate(data, problem.initial, rows)
        yield Piece(_weights_of(evaluation, problem, rows, labels, begin, generator), model, data, rows)
        begin += rows.size


def _generator(problem: Problem, restart: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(problem.seed, problem.name, restart, "start"))


def _at_draws(problem: Problem, data: Values, rows: Rows, generator: torch.Generator) -> HeldJoint:
    """The model with its continuous sites held at one draw of each from the model itself, at the start values."""
    structure, model = problem.model.structure, problem.model
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int(torch.randint(2**31 - 1, (), generator=generator)))
        views, _ = model.view(data, problem.initial, rows)
    if not structure.enumerated:
        return model.held({name: views[name].value for name in structure.continuous})
    points = {}
    for name in structure.continuous:
        value, event = views[name].value, len(structure.sites[name].event_shape)
        batch = value.dim() - event
        shape = (1,) * max(0, structure.nesting - batch) + tuple(value.shape)
        # Points have an axis of their own between the enumerated sites and the plates.
        points[name] = value.reshape(shape).unsqueeze(-1 - structure.nesting - event)
    first = model.first_available_dim
    enumerated = {first - 1 - i: name for i, name in enumerate(structure.enumerated)}
    return model.held(points, enumerated)


def _weights_of(
    evaluation: Evaluation,
    problem: Problem,
    rows: Rows,
    labels: Mapping[str, Tensor],
    begin: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    tables: dict[str, Named] = {}
    chains: dict[str, Named] = {}
    like = evaluation.factors[0].log_prob
    for name, variable in evaluation.variables.items():
        time = () if variable.steps is None else (time_axis(variable.steps),)
        dims = (name, *variable.plates, *time)
        if name in labels:
            own = labels[name][begin : begin + rows.size]
            hot = one_hot(own, variable.size).movedim(-1, 0)
            table = 0.95 * hot.to(like) + 0.05 / variable.size
        else:
            # A random datum is attached to each state by a nearly one-hot draw; a flat Dirichlet would start all equal.
            shape = [variable.size, *(evaluation.plate_sizes[d] for d in dims[1:])]
            gamma = -torch.log(torch.rand(shape, generator=generator, dtype=torch.float64)).to(like)
            gamma = gamma.pow(4)
            table = gamma / gamma.sum(0)
        tables[name] = Named(table, dims)
        if variable.steps is not None:
            tables[name] = _within_lengths(tables[name], variable)
            chains.update(_chain_weights(tables[name], variable.steps))
    weights = {}
    for factor in evaluation.factors:
        weight = torch.ones_like(factor.log_prob)
        own_axes: set[str] = set()
        if factor.site in chains:
            chain = chains[factor.site]
            own_axes = set(chain.dims)
            weight = weight * align(_summed_to(chain, factor.dims), factor.dims)
        for dim in factor.dims:
            if dim in tables and dim not in own_axes:
                weight = weight * align(_summed_to(tables[dim], factor.dims), factor.dims)
        weights[factor.site] = weight
    return weights


def _within_lengths(named: Named, variable: Variable) -> Named:
    """The responsibilities of a chain's steps, 0 beyond the lengths."""
    if variable.lengths is None or variable.steps is None:
        return named
    valid = torch.arange(variable.steps) < variable.lengths.unsqueeze(-1)
    return Named(
        named.tensor * align(Named(valid, (*variable.lengths_dims, named.dims[-1])), named.dims), named.dims
    )


def _chain_weights(table: Named, steps: int) -> dict[str, Named]:
    """Of the first state, and of consecutive pairs as if independent, from those of each step [K, *plates, T]."""
    r, name, plates = table.tensor, table.dims[0], table.dims[1:-1]
    step, before, after = chain_axes(name, steps)
    pairs = r[:, None, ..., :-1] * r[None, :, ..., 1:]
    return {
        name: Named(r[..., 0], (name, *plates)),
        name + TRANSITION: Named(pairs, (before, after, *plates, step)),
    }


def _summed_to(named: Named, dims: Sequence[str]) -> Named:
    """The table summed over its axes that are not among `dims`."""
    axes = [i for i, d in enumerate(named.dims) if d not in dims]
    if not axes:
        return named
    return Named(named.tensor.sum(axes), tuple(d for d in named.dims if d in dims))
