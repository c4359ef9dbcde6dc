"""Where a fit starts: the model's own parameters, or one M-step from k-means or random responsibilities.

`init: params` uses θ as the model (or `start_from`) gives it. `kmeans` and `random` give every enumerated site
responsibilities r and maximise Σ_s ⟨r, f_s(θ)⟩ once. Restart 0 starts as `init` says, the others at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lvmppl.algorithms.evidence import chunks
from lvmppl.algorithms.expected import Weights, add_up, gradient_m_step
from lvmppl.algorithms.m_step import Plan, solve_closed
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.statistics import Statistics
from lvmppl.density import Evaluation, Rows, derive_seed
from lvmppl.errors import InputError
from lvmppl.exact.named import Named, align

_START_STEPS = 50  # L-BFGS iterations of the M-step that turns responsibilities into parameters


def start_values(
    problem: Problem, init: str, restart: int, restarts: int, plan: Plan | None = None
) -> dict[str, Tensor]:
    """The start of one restart, constrained. plan: of the M-step; without it the M-step is by gradient throughout."""
    values = dict(problem.initial)
    how = init if restart == 0 else "random"
    if how == "params":
        return values
    sites = problem.model.structure.enumerated
    if not sites:
        if restart > 0 or init == "random":
            raise InputError(
                f"fit '{problem.name}'",
                "a model with enumerated sites for random or k-means starts",
                "none",
                "use init: params and restarts: 1",
            )
        return values
    weights = _responsibility_weights(problem, how, restart)
    if plan is not None and plan.closed:
        statistics = _statistics_of(problem, plan, weights)
        values, _ = solve_closed(problem, plan, values, statistics)
    names = problem.free_theta if plan is None else plan.by_gradient
    if names:
        values.update(gradient_m_step(problem, values, weights, _START_STEPS, tolerance=1e-6, names=names))
    return values


def _statistics_of(problem: Problem, plan: Plan, weights: Weights) -> dict[str, Statistics]:
    statistics: dict[str, Statistics] = {}
    for (data, rows), own in zip(chunks(problem), weights, strict=True):
        with torch.no_grad():
            views, evaluation = problem.model.view(data, problem.initial, rows)
            evaluation = replace(evaluation, factors=tuple(f for v in views.values() for f in v.factors()))
        add_up(views, evaluation, own, plan.sites, statistics)
    return statistics


def _responsibility_weights(problem: Problem, how: str, restart: int) -> Weights:
    generator = torch.Generator().manual_seed(derive_seed(problem.seed, problem.name, restart, "start"))
    labels = _kmeans_labels(problem, generator) if how == "kmeans" else None
    result, begin = [], 0
    for data, rows in chunks(problem):
        with torch.no_grad():
            evaluation = problem.model.evaluate(data, problem.initial, rows)
        result.append(_weights_of(evaluation, problem, rows, labels, begin, generator))
        begin += rows.size
    return result


def _weights_of(
    evaluation: Evaluation,
    problem: Problem,
    rows: Rows,
    labels: dict[int, Tensor] | None,
    begin: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    tables: dict[str, Named] = {}
    like = evaluation.factors[0].log_prob
    for name, variable in evaluation.variables.items():
        dims = (name, *variable.plates)
        shape = [variable.size, *(evaluation.plate_sizes[p] for p in variable.plates)]
        if labels is not None and variable.plates == (problem.data_plate,):
            hot = torch.nn.functional.one_hot(
                labels[variable.size][begin : begin + rows.size], variable.size
            ).T
            table = 0.95 * hot.to(like) + 0.05 / variable.size
        else:
            # A random datum is attached to each state by a nearly one-hot draw; a flat Dirichlet would start all equal.
            gamma = -torch.log(torch.rand(shape, generator=generator, dtype=torch.float64)).to(like)
            gamma = gamma.pow(4)
            table = gamma / gamma.sum(0)
        tables[name] = Named(table, dims)
    weights = {}
    for factor in evaluation.factors:
        weight = torch.ones_like(factor.log_prob)
        for dim in factor.dims:
            if dim in tables:
                weight = weight * align(_summed_to(tables[dim], factor.dims), factor.dims)
        weights[factor.site] = weight
    return weights


def _summed_to(named: Named, dims: Sequence[str]) -> Named:
    """The table summed over its axes that are not among `dims`."""
    axes = [i for i, d in enumerate(named.dims) if d not in dims]
    if not axes:
        return named
    return Named(named.tensor.sum(axes), tuple(d for d in named.dims if d in dims))


def _kmeans_labels(problem: Problem, generator: torch.Generator) -> dict[int, Tensor]:
    """k-means labels of the rows for every number of states that occurs, on all floating data, standardised."""
    from sklearn.cluster import KMeans

    parts = [t.reshape(len(t), -1).double() for t in problem.data.values() if t.is_floating_point()]
    if not parts:
        parts = [t.reshape(len(t), -1).double() for t in problem.data.values()]
    features = torch.cat(parts, 1)
    features = (features - features.mean(0)) / features.std(0, unbiased=False).clamp_min(1e-12)
    structure = problem.model.structure
    sizes: dict[int, Tensor] = {}
    evaluation = (
        problem.model.evaluate(problem.data, problem.initial, Rows(problem.num_rows))
        if structure.enumerated
        else None
    )
    for variable in evaluation.variables.values() if evaluation else ():
        if variable.size in sizes or variable.size > problem.num_rows:
            continue
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        labels = KMeans(variable.size, n_init=1, random_state=seed).fit_predict(features.numpy())
        sizes[variable.size] = torch.as_tensor(labels, dtype=torch.long)
    return sizes
