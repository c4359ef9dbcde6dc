"""Observed values: what a mask hides has no part in a fit, and what no density can score is named with site and row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms.clusters import Labels
from lvmppl.algorithms.problem import build_problem
from lvmppl.density import isolated
from lvmppl.errors import InputError, ModelError
from lvmppl.guides.variational import variational

N, D, K = 41, 3, 2
ENUMERATE = {"enumerate": "parallel"}


def draws(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    x[: N // 3] += torch.tensor([4.0, -3.0, 2.0], dtype=torch.float64)
    return x


SEEN = torch.rand(N, D, generator=torch.Generator().manual_seed(1)) > 0.2
SEEN[[5, 17, 30]] = False  # rows without any value


def parameters() -> tuple[Tensor, Tensor, Tensor]:
    weights = pyro.param("weights", torch.ones(K) / K, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([[-1.0, 0.0, 1.0], [1.0, 0.5, -1.0]]))
    return weights, loc, pyro.param("spread", torch.ones(K, D), constraint=constraints.positive)


def entries(x: Tensor, seen: Tensor) -> None:
    weights, loc, spread = parameters()
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z], spread[z].sqrt()).mask(seen).to_event(1), obs=x)


def columns(x: Tensor, seen: Tensor) -> None:
    """A site a column, each a view of the data, hidden by a handler."""
    weights, loc, spread = parameters()
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
        for d in range(D):
            with poutine.mask(mask=seen[:, d]):
                pyro.sample(f"x{d}", dist.Normal(loc[z, d], spread[z, d].sqrt()), obs=x[:, d])


def rows(x: Tensor, seen: Tensor) -> None:
    weights, loc, spread = parameters()
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
        fn = dist.MultivariateNormal(loc[z], covariance_matrix=torch.diag_embed(spread[z]))
        pyro.sample("x", fn.mask(seen.any(-1)), obs=x)


FITS: list[tuple[str, dict[str, Any]]] = [
    ("em", {"init": "kmeans", "restarts": 3}),
    ("em", {"init": "random", "compile": "never"}),
    ("enumeration", {"init": "kmeans"}),
    ("vem", {"init": "kmeans", "guide": variational}),
    ("svi", {"init": "kmeans", "guide": variational}),
]


@pytest.mark.parametrize(("algorithm", "options"), FITS)
@pytest.mark.parametrize("model", [entries, columns, rows])
def test_fit_is_the_same_bit_for_bit_whatever_a_mask_hides(
    model: Any, algorithm: str, options: dict[str, Any]
) -> None:
    hidden = ~SEEN.any(-1, keepdim=True).expand(N, D) if model is rows else ~SEEN
    fits = []
    for stands in (torch.zeros(N, D), 1e7 * draws(9), torch.full((N, D), torch.inf)):
        x = torch.where(hidden, stands, draws(0))
        fits.append(
            lvmppl.fit(model, {"x": x, "seen": SEEN}, algorithm=algorithm, max_steps=6, seed=3, **options)
        )
    for other in fits[1:]:
        assert other.all_history["objective"].equals(fits[0].all_history["objective"])
        for name, value in fits[0].parameters.items():
            assert torch.equal(other.parameters[name], value)
        assert other.log_evidence == fits[0].log_evidence


def test_clusters_of_partly_hidden_data_are_those_of_the_visible_rows() -> None:
    seen = SEEN.any(-1, keepdim=True).expand(N, D)
    x = torch.where(seen, draws(0), 50.0)
    labels, clouds = [], []
    with isolated(0, torch.float64), torch.no_grad():
        for data in ({"x": x, "seen": seen}, {"x": x[seen[:, 0]], "seen": seen[seen[:, 0]]}):
            problem = build_problem("fit", entries, data)
            views, evaluation = problem.model.view(data, problem.initial)
            labelled = Labels(problem, views)
            found = labelled("kmeans", evaluation, torch.Generator().manual_seed(5))
            labels.append(found["z"])
            clouds.extend(labelled.clouds.values())
    assert torch.equal(labels[0][seen[:, 0]], labels[1])
    assert clouds[0] is not None and clouds[1] is not None
    assert torch.equal(clouds[0].few, clouds[1].few)  # standardised rows, of which the means are found
    assert labels[1].unique().numel() == K


def categories(x: Tensor) -> None:
    table = pyro.param("table", torch.ones(K, 5) / 5, constraint=constraints.simplex)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(K) / K), infer=ENUMERATE)
        pyro.sample("x", dist.Categorical(table[z]), obs=x)


def counts(x: Tensor) -> None:
    rate = pyro.param("rate", torch.ones(K), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(K) / K), infer=ENUMERATE)
        pyro.sample("x", dist.Poisson(rate[z]), obs=x)


def vectors(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor([[-1.0, 0.0, 1.0], [1.0, 0.5, -1.0]]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(K) / K), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z], 1.0).to_event(1), obs=x)


def with_entry(x: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    x = x.clone()
    x[at] = value
    return x


LABELS = torch.arange(N) % 5
WRONG: list[tuple[Callable[..., Any], Tensor, str]] = [
    (categories, with_entry(LABELS, (6,), 7), "categories from 0 to 4, got 7 in row 6; count"),
    (categories, with_entry(LABELS, (9,), -1), "categories from 0 to 4, got -1 in row 9; count"),
    (categories, with_entry(LABELS.double(), (2,), 1.5), "categories .*, got 1.5 in row 2; count"),
    (vectors, with_entry(draws(0), (4, 1), torch.inf), "finite numbers, got inf in row 4, entry 1; leave"),
    (vectors, with_entry(draws(0), (0, 2), -torch.inf), "finite numbers, got -inf in row 0, entry 2; leave"),
    (counts, with_entry(LABELS.double(), (8,), -2), "support of Poisson.*got numbers such as -2 in row 8"),
]


@pytest.mark.parametrize("algorithm", ["em", "enumeration", "vem", "svi", "exact"])
@pytest.mark.parametrize(("model", "x", "message"), WRONG)
def test_wrong_values_are_named_with_site_and_row(
    model: Any, x: Tensor, message: str, algorithm: str
) -> None:
    guide = {"guide": variational} if algorithm in ("vem", "svi") else {}
    with pytest.raises(ModelError, match=f"^site 'x' in plate data: expected .*{message}"):
        if algorithm == "exact":
            lvmppl.posterior(model, {"x": x})
        else:
            lvmppl.fit(model, {"x": x}, algorithm=algorithm, max_steps=2, **guide)


def test_nan_is_named_with_its_row_and_what_to_do() -> None:
    message = r"data\['x'\]: expected no missing values, got NaN in row 4; .* hides by .mask\(seen\)"
    with pytest.raises(InputError, match=message):
        lvmppl.fit(vectors, {"x": with_entry(draws(0), (4, 1), torch.nan)}, algorithm="em")
