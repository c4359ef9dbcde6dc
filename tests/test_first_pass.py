"""The run that learns a model's structure is also the one that its posterior is read from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.distributions import MarkovChain
from lvmppl.errors import InputError

X = torch.tensor([-1.3, 0.2, 0.9, 2.4, 3.1], dtype=torch.float64)
ENUMERATE = {"enumerate": "parallel"}


def mixture(x: Tensor) -> None:
    weights = pyro.param("weights", torch.full((3,), 1 / 3, dtype=x.dtype), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.tensor([-1.0, 0.5, 2.0], dtype=x.dtype))
    scale = pyro.param("scale", torch.ones((), dtype=x.dtype), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z], scale), obs=x)


def coupled(x: Tensor) -> None:
    shift = pyro.sample("shift", dist.Categorical(torch.tensor([0.4, 0.6], dtype=x.dtype)), infer=ENUMERATE)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=x.dtype)), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(z + 1.5 * shift, 1.0), obs=x)


def chain(x: Tensor) -> None:
    start, moves = torch.tensor([0.7, 0.3]), torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    z = pyro.sample("z", MarkovChain(start.to(x), moves.to(x), len(x)), infer=ENUMERATE)
    pyro.sample("x", dist.Normal(2.0 * z, 1.0).to_event(1), obs=x)


def counted(model: Callable[..., None]) -> tuple[Callable[..., None], list[int]]:
    rows: list[int] = []

    def program(x: Tensor) -> None:
        rows.append(len(x))
        model(x)

    return program, rows


@pytest.mark.parametrize(("model", "runs"), [(mixture, 1), (coupled, 1), (chain, 2)])
def test_discrete_model_runs_once_whatever_is_asked(model: Callable[..., None], runs: int) -> None:
    """A chain's observations are looked at once more, on a few rows: whether they depend on their own step alone."""
    program, rows = counted(model)
    post: Any = lvmppl.posterior(program, {"x": X})
    post.marginal("z"), post.mode(), post.sample(3), post.entropy(), post.log_prob(post.mode().states)
    post.to_frame(), post.log_evidence_per_datum
    assert len(rows) == runs


def test_values_handed_in_equal_mixture_in_scipy() -> None:
    theta = {"weights": torch.tensor([0.2, 0.5, 0.3]), "loc": torch.tensor([0.0, 1.0, 4.0])}
    program, rows = counted(mixture)
    post = lvmppl.posterior(program, {"x": X}, parameters={**theta, "scale": torch.tensor(0.7)})
    each = (
        stats.norm(theta["loc"].numpy(), np.float32(0.7)).pdf(X.numpy()[:, None]) * theta["weights"].numpy()
    )
    assert post.log_evidence == pytest.approx(np.log(each.sum(1)).sum(), rel=1e-6)
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([1.0, 2.0]), r"value of parameter 'loc': expected shape \(3,\), got shape \(2,\)"),
        (torch.tensor([1.0, float("nan"), 0.0]), "value of parameter 'loc': expected finite numbers"),
    ],
)
def test_wrong_value_is_refused_before_the_model_meets_it(value: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lvmppl.posterior(mixture, {"x": X}, parameters={"loc": value})


def test_lifted_site_and_module_stand_at_values_handed_in() -> None:
    net = torch.nn.Linear(1, 1).double()

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5], dtype=x.dtype)), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(net(loc[z].unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    values = {
        "loc": torch.tensor([-1.0, 1.0], dtype=torch.float64),
        "net$$$weight": torch.tensor([[2.0]], dtype=torch.float64),
        "net$$$bias": torch.tensor([0.5], dtype=torch.float64),
    }
    post = lvmppl.posterior(model, {"x": X}, parameters=values)
    each = 0.5 * stats.norm(np.array([-1.5, 2.5]), 1.0).pdf(X.numpy()[:, None])
    assert post.log_evidence == pytest.approx(np.log(each.sum(1)).sum(), rel=1e-12)
