"""The M-step of every family and spelling by itself, beside its maximum likelihood in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from em_models import ENUMERATE, generator, normal, simplex
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms.spellings import SPELLINGS, Spelling

Model = Callable[..., Any]
POSITIVE, UNIT = constraints.positive, constraints.unit_interval


def entries(constraint: Any = POSITIVE, start: tuple[float, ...] = (0.6, 0.3, 0.8)) -> Tensor:
    result: Tensor = pyro.param("entry", torch.tensor(start, dtype=torch.float64), constraint=constraint)
    return result


def positive_rows() -> np.ndarray:
    return np.random.default_rng(2).gamma(2.0, 1.5, (19, 3)) + 1.1


def whole_rows() -> np.ndarray:
    return np.random.default_rng(3).poisson([2.0, 5.0, 1.0], (19, 3)).astype(float)


FAMILIES: dict[str, tuple[Callable[[], Any], np.ndarray, Callable[[np.ndarray], np.ndarray]]] = {
    "NegativeBinomial": (
        lambda: dist.NegativeBinomial(4.0, probs=entries(UNIT)),
        whole_rows(),
        lambda x: x.mean(0) / (x.mean(0) + 4),
    ),
    "InverseGamma": (
        lambda: dist.InverseGamma(2.5, entries()),
        positive_rows(),
        lambda x: 2.5 / (1 / x).mean(0),
    ),
    "HalfNormal": (lambda: dist.HalfNormal(entries()), positive_rows(), lambda x: np.sqrt((x**2).mean(0))),
    "Pareto": (lambda: dist.Pareto(0.9, entries()), positive_rows(), lambda x: 1 / np.log(x / 0.9).mean(0)),
    "LogNormal": (
        lambda: dist.LogNormal(0.3, entries()),
        positive_rows(),
        lambda x: np.sqrt(((np.log(x) - 0.3) ** 2).mean(0)),
    ),
    "Laplace": (lambda: dist.Laplace(0.3, entries()), positive_rows(), lambda x: np.abs(x - 0.3).mean(0)),
    "Poisson, root of the rate": (
        lambda: dist.Poisson(entries() ** 2),
        whole_rows(),
        lambda x: np.sqrt(x.mean(0)),
    ),
    "Exponential": (lambda: dist.Exponential(entries()), positive_rows(), lambda x: 1 / x.mean(0)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_em_step_of_a_family_equals_its_maximum_likelihood(name: str) -> None:
    make, x, update = FAMILIES[name]

    def model(x: Tensor) -> None:
        fn = make().to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", fn, obs=x)

    fit = lvmppl.fit(model, {"x": torch.as_tensor(x)}, algorithm="em", max_steps=1, tolerance=0)
    assert {s.how for s in fit.m_step} == {"closed-form"}
    np.testing.assert_allclose(fit.parameters["entry"], update(x), rtol=1e-10)


def solved(spelling: Spelling, kind: str, field: str) -> tuple[Tensor, Tensor]:
    """(coordinates as they might be solved, a parameter of before), of a spelling [2, 3] or [2, 3, 3]."""
    root = torch.eye(3, dtype=torch.float64) + 0.3 * normal(2, 3, 3, seed=8).tril()
    before = root @ root.mT if "Cholesky" not in spelling.name else root
    if kind == "mvn" and field == "covariance":
        other = torch.eye(3, dtype=torch.float64) + 0.2 * normal(2, 3, 3, seed=9).tril()
        return other @ other.mT, before
    old = torch.rand((2, 3), generator=generator(6), dtype=torch.float64) + 0.1
    if spelling.unit == 1:
        return simplex(2, 3), old / old.sum(-1, keepdim=True) if spelling.name == "probabilities" else old
    return 0.8 * torch.rand((2, 3), generator=generator(7), dtype=torch.float64) + 0.1, old


@pytest.mark.parametrize(
    ("kind", "field", "spelling"),
    [(*key, s) for key, own in SPELLINGS.items() for s in own],
    ids=[f"{'-'.join(key)}-{s.name}" for key, own in SPELLINGS.items() for s in own],
)
def test_parameter_of_solved_coordinates_spells_them_again(kind: str, field: str, spelling: Spelling) -> None:
    coordinates, before = solved(spelling, kind, field)
    parameter = spelling.invert(coordinates, before)
    assert parameter.shape == before.shape
    torch.testing.assert_close(spelling.apply(parameter), coordinates, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(spelling.apply(before), coordinates, rtol=1e-2)
    if spelling.name in ("unnormalised weights", "logits"):  # the size that no data tell stays
        size = torch.sum if spelling.name == "unnormalised weights" else torch.logsumexp
        torch.testing.assert_close(size(parameter, -1), size(before, -1))


def test_location_of_sites_with_known_scales_equals_the_mean_weighed_by_precision() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.3, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 0.5), obs=x)
            pyro.sample("y", dist.Normal(loc, 2.0), obs=y)

    x, y = normal(13, seed=1), normal(13, seed=2) + 3
    fit = lvmppl.fit(model, {"x": x, "y": y}, algorithm="em", max_steps=1, tolerance=0)
    assert {s.how for s in fit.m_step} == {"closed-form"}
    expected = (x.sum() / 0.25 + y.sum() / 4) / (13 / 0.25 + 13 / 4)
    assert float(fit.parameters["loc"]) == pytest.approx(float(expected), rel=1e-12)


def test_entries_of_an_emptied_component_equal_their_start() -> None:
    """Every kind of parameter, of a state that no row can be in."""
    start = {
        "rate": torch.tensor([2.0, 7.0]).double(),
        "table": simplex(2, 3),
        "chance": torch.tensor([0.3, 0.8]).double(),
        "variance": torch.tensor([1.5, 0.4]).double(),
        "covariance": torch.stack([torch.eye(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])]).double(),
    }
    bounds = {
        "rate": POSITIVE,
        "table": constraints.simplex,
        "chance": UNIT,
        "variance": POSITIVE,
        "covariance": constraints.positive_definite,
    }

    def model(count: Tensor, label: Tensor, flag: Tensor, x: Tensor, pair: Tensor) -> None:
        p = {k: pyro.param(k, v.clone(), constraint=bounds[k]) for k, v in start.items()}
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([1.0, 0.0]).double()), infer=ENUMERATE)
            pyro.sample("count", dist.Poisson(p["rate"][z]), obs=count)
            pyro.sample("label", dist.Categorical(p["table"][z]), obs=label)
            pyro.sample("flag", dist.Bernoulli(p["chance"][z]), obs=flag)
            pyro.sample("x", dist.Normal(0.0, p["variance"][z].sqrt()), obs=x)
            pyro.sample(
                "pair", dist.MultivariateNormal(torch.zeros(2).double(), p["covariance"][z]), obs=pair
            )

    data = {
        "count": torch.poisson(torch.full((17,), 3.0), generator=generator(1)).double(),
        "label": torch.arange(17) % 3,
        "flag": (torch.arange(17) % 2).double(),
        "x": normal(17, seed=3),
        "pair": normal(17, 2, seed=4),
    }
    fit = lvmppl.fit(model, data, algorithm="em", max_steps=3, tolerance=0)
    assert {s.how for s in fit.m_step} == {"closed-form"}
    for name, before in start.items():
        torch.testing.assert_close(fit.parameters[name][1], before[1], rtol=1e-14, atol=0)
        assert not torch.allclose(fit.parameters[name][0], before[0], rtol=1e-3)


def test_map_under_priors_of_other_spellings_equals_their_modes() -> None:
    """A Beta on 1 − p, and an Exponential on a rate."""

    def model(flag: Tensor, wait: Tensor) -> None:
        miss = pyro.sample("miss", dist.Beta(torch.tensor(2.0).double(), 5.0))
        rate = pyro.sample("rate", dist.Exponential(torch.tensor(0.7).double()))
        with pyro.plate("data", len(flag)):
            pyro.sample("flag", dist.Bernoulli(1 - miss), obs=flag)
            pyro.sample("wait", dist.Exponential(rate), obs=wait)

    flag = (torch.arange(17) % 3 == 0).double()
    wait = normal(17, seed=5).abs()
    fit = lvmppl.fit(model, {"flag": flag, "wait": wait}, algorithm="em", max_steps=1, tolerance=0)
    assert {s.how for s in fit.m_step} == {"closed-form"}
    miss = (17 - float(flag.sum()) + 1) / (17 + 5)
    assert float(fit.parameters["miss"]) == pytest.approx(miss, rel=1e-12)
    assert float(fit.parameters["rate"]) == pytest.approx(17 / (float(wait.sum()) + 0.7), rel=1e-12)
