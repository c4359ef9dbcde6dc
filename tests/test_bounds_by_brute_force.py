"""Bounds and their gradients against sums over every state of every site; joint densities are those of Pyro's own trace."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import lvmppl
from lvmppl.algorithms.objective import Objective
from lvmppl.algorithms.problem import build_problem
from lvmppl.density import isolated
from lvmppl.errors import InputError
from lvmppl.options import SVIOptions

F64 = torch.float64
X = torch.tensor([0.3, -1.2, 2.0], dtype=F64)
SUMMED = {"enumerate": "parallel"}
CALLS, PARTICLES = 40, 1000
Shapes = Mapping[str, tuple[int, ...]]


def binary(name: str, probability: Any) -> Tensor:
    value = torch.as_tensor(probability, dtype=F64)
    return pyro.sample(name, dist.Bernoulli(value), infer=SUMMED)


def scale() -> Tensor:
    return pyro.param("scale", torch.tensor(0.9, dtype=F64))


def cause_of_all(x: Tensor) -> None:
    """A state of all rows tilts that of each row."""
    sd, c = scale(), binary("c", 0.4)
    with pyro.plate("data", len(x)):
        z = binary("z", 0.2 + 0.6 * c)
        pyro.sample("x", dist.Normal(2 * z - 1, sd), obs=x)


def total_observed(x: Tensor) -> None:
    """What all rows add up to is observed too."""
    sd = scale()
    with pyro.plate("data", len(x)):
        z = binary("z", 0.3)
        pyro.sample("x", dist.Normal(2 * z - 1, sd), obs=x)
    total = z.sum(-1, keepdim=True) if z.dim() > 1 else z.sum(-1)
    pyro.sample("t", dist.Normal(total, 0.5), obs=torch.tensor(2.0, dtype=F64))


def rows_and_columns(x: Tensor) -> None:
    """States of rows and of columns meet in every entry."""
    sd, columns = scale(), pyro.plate("columns", 2, dim=-1)
    with columns:
        f = binary("f", 0.4)
    with pyro.plate("data", len(x), dim=-2):
        z = binary("z", 0.3)
        with columns:
            pyro.sample("x", dist.Normal(2 * f * z - z, sd), obs=torch.stack([x, x + 0.5], -1))


def inner_states(x: Tensor) -> None:
    sd = scale()
    with pyro.plate("data", len(x), dim=-2):
        z = binary("z", 0.4)
        with pyro.plate("inner", 2, dim=-1):
            b = binary("b", 0.2 + 0.5 * z)
            pyro.sample("x", dist.Normal(2 * b - z, sd), obs=x.unsqueeze(-1))


def odds(*shape: int) -> Tensor:
    start = torch.tensor([0.5, -0.3, 0.4], dtype=F64).reshape(shape)
    return pyro.param("odds", start, event_dim=0)


def rows_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=odds(3)))


def wide_rows_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Bernoulli(logits=odds(3, 1)))


def both_guide(x: Tensor) -> None:
    pyro.sample("c", dist.Bernoulli(logits=pyro.param("c0", torch.tensor(0.3, dtype=F64))))
    rows_guide(x)


def columns_guide(x: Tensor) -> None:
    wide_rows_guide(x)
    with pyro.plate("columns", 2, dim=-1):
        start = torch.tensor([0.2, -0.6], dtype=F64)
        pyro.sample("f", dist.Bernoulli(logits=pyro.param("f0", start, event_dim=0)))


# model, guide, sites under q and sites that it leaves out (their shapes), which of q's sites are drawn
Case = tuple[Callable[..., None], Callable[..., None], Shapes, Shapes, tuple[str, ...]]
CASES: dict[str, Case] = {
    "left_out_of_all_rows": (cause_of_all, rows_guide, {"z": (3,)}, {"c": ()}, ("z",)),
    "summed_of_all_rows": (cause_of_all, both_guide, {"c": (), "z": (3,)}, {}, ("z",)),
    "drawn_of_all_rows": (cause_of_all, both_guide, {"c": (), "z": (3,)}, {}, ("c",)),
    "total_observed": (total_observed, rows_guide, {"z": (3,)}, {}, ("z",)),
    "left_out_columns": (rows_and_columns, wide_rows_guide, {"z": (3, 1)}, {"f": (2,)}, ("z",)),
    "drawn_rows_and_columns": (rows_and_columns, columns_guide, {"z": (3, 1), "f": (2,)}, {}, ("z", "f")),
    "left_out_inside": (inner_states, wide_rows_guide, {"z": (3, 1)}, {"b": (3, 2)}, ("z",)),
}
# an importance-weighted bound takes summed states by their expected log weight: here every site of q is drawn
WEIGHTED = [n for n, case in CASES.items() if len(case[2]) == len(case[4])]


def configurations(shapes: Shapes) -> Iterator[dict[str, Tensor]]:
    sizes = [math.prod(s) for s in shapes.values()]
    for flat in itertools.product((0.0, 1.0), repeat=sum(sizes)):
        parts = torch.tensor(flat, dtype=F64).split(sizes)
        yield {n: p.reshape(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}


def log_joint(
    program: Callable[..., None], values: Mapping[str, Tensor], sites: Mapping[str, Tensor]
) -> Tensor:
    own = {n: v for n, v in values.items() if n in poutine.trace(program).get_trace(X).nodes}
    held = poutine.condition(poutine.substitute(program, data=own), data=dict(sites))
    result: Tensor = poutine.trace(held).get_trace(X).log_prob_sum()
    return result


def exact_bound(case: Case, values: Mapping[str, Tensor], samples: int = 1) -> Tensor:
    """Σ over K-tuples of states of q of log (1/K) Σ_k Σ_hidden p / q."""
    model, guide, own, hidden, _ = case
    log_q, log_w = [], []
    for z in configurations(own):
        inner = [log_joint(model, values, {**z, **h}) for h in configurations(hidden)]
        log_q.append(log_joint(guide, values, z))
        log_w.append(torch.logsumexp(torch.stack(inner), 0) - log_q[-1])
    q, w = torch.stack(log_q), torch.stack(log_w)
    for _ in range(samples - 1):
        q = (q.unsqueeze(-1) + torch.stack(log_q)).flatten()
        w = torch.logaddexp(w.unsqueeze(-1), torch.stack(log_w)).flatten()
    return (q.exp() * (w - math.log(samples))).sum()


def assert_unbiased(case: Case, samples: int | None) -> None:
    """Bound and gradient within four standard errors of the sums over all states."""
    objective = {"use": "importance_weighted", "num_samples": samples} if samples else "elbo"
    with isolated(1, F64):
        problem = build_problem("fit", case[0], {"x": X}, guide=case[1])
        bound = Objective(
            problem,
            SVIOptions(
                num_particles=PARTICLES // (samples or 1),
                objective=objective,
                estimator={n: "score_function" for n in case[4]},
            ),
        )
        leaves = {n: v.clone().requires_grad_() for n, v in problem.initial.items()}
        drawn = []
        for _ in range(CALLS):
            estimate = bound(leaves, None, 0)
            found = torch.autograd.grad(estimate.surrogate, list(leaves.values()))
            drawn.append(torch.cat([estimate.bound.reshape(1), *(g.reshape(-1) for g in found)]))
        assert not bound.looped
        value = exact_bound(case, leaves, samples or 1)
        exact = torch.autograd.grad(value, list(leaves.values()))
    expected = torch.cat([value.detach().reshape(1), *(g.reshape(-1) for g in exact)])
    rows = torch.stack(drawn)
    error = rows.std(0) / CALLS**0.5
    assert bool((error < 0.1 * (1 + expected.abs())).all())
    assert bool(((rows.mean(0) - expected).abs() <= 4 * error + 1e-10).all()), (rows.mean(0), expected, error)


@pytest.mark.parametrize("case", CASES)
def test_mean_gradient_of_the_elbo_equals_brute_force(case: str) -> None:
    assert_unbiased(CASES[case], None)


@pytest.mark.parametrize("case", WEIGHTED)
def test_mean_gradient_of_the_importance_weighted_bound_equals_brute_force(case: str) -> None:
    """Where rows meet in a state that all share, or in what is observed of their sum, the weights are those of all rows."""
    assert_unbiased(CASES[case], 2)


def test_importance_weighted_bound_of_tied_rows_refuses_minibatches() -> None:
    with pytest.raises(InputError, match="all rows at every step"):
        lvmppl.fit(
            total_observed,
            {"x": X},
            algorithm="svi",
            guide=rows_guide,
            estimator="score_function",
            objective="importance_weighted",
            batch_size=2,
            max_steps=2,
        )
