"""The M-step of variational EM under q with continuous sites: against EM, scikit-learn and gradients of the ELBO."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from em_continuous_models import (
    factor_analysis as one_factor,
)
from em_continuous_models import (
    gain_that_must_be_positive,
    mixture_of_factor_analysers,
    overdispersed_counts,
    probabilistic_pca_without_offset,
    random_effect_of_every_row,
)
from em_models import CASES, blobs
from sklearn.datasets import load_wine
from sklearn.decomposition import FactorAnalysis
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms.closed_phases import closed_phases
from lvmppl.algorithms.problem import build_problem
from lvmppl.algorithms.stepper import batch_elbo
from lvmppl.density import Coordinates, isolated
from lvmppl.guides.variational import variational
from lvmppl.models.factor_analysis import factor_analysis
from lvmppl.models.mixture import gaussian_mixture
from lvmppl.options import VEMOptions

F64 = torch.float64
WINE = load_wine().data
X = torch.as_tensor((WINE - WINE.mean(0)) / WINE.std(0))
TWO_FACTORS = functools.partial(factor_analysis, num_factors=2)
FULL = functools.partial(variational, head="full")


@pytest.mark.parametrize("noise", ["diagonal", "spherical"])
def test_vem_of_factor_analysis_with_a_full_guide_equals_em(noise: str) -> None:
    model = functools.partial(TWO_FACTORS, noise=noise)
    options: dict[str, Any] = {"max_steps": 4, "tolerance": 0.0}
    found = lvmppl.fit(model, {"x": X + 0.3}, algorithm="vem", guide=FULL, **options)
    em = lvmppl.fit(model, {"x": X + 0.3}, algorithm="em", **options)
    assert {s.how for s in (*found.e_step, *found.m_step)} == {"closed-form"}
    for name, value in em.parameters.items():
        torch.testing.assert_close(found.parameters[name], value, rtol=1e-8, atol=1e-8)
    assert found.elbo == pytest.approx(em.log_evidence, abs=1e-8)


def test_vem_of_factor_analysis_ends_at_the_log_likelihood_of_scikit_learn() -> None:
    model = functools.partial(factor_analysis, num_factors=1)
    peer = FactorAnalysis(1, tol=1e-8, max_iter=5000, svd_method="lapack").fit(X.numpy())
    fit = lvmppl.fit(model, {"x": X}, algorithm="vem", guide=FULL, tolerance=1e-10)
    assert fit.status == "converged"
    assert fit.elbo == pytest.approx(peer.score(X.numpy()) * len(X), abs=1e-4)


def regression(y: Tensor, x: Tensor) -> None:
    """A latent slope that all rows share, an offset and a slope of θ, and a scale."""
    offset = pyro.param("offset", torch.tensor([0.5, -0.3], dtype=F64))
    spread = pyro.param("spread", torch.tensor(0.7, dtype=F64), constraint=constraints.positive)
    scale = pyro.param("scale", torch.tensor(1.3, dtype=F64), constraint=constraints.positive)
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3, dtype=F64), spread).to_event(1))
    with pyro.plate("data", len(y)):
        loc = (x[:, :3] * weight).sum(-1) + offset[0] + offset[1] * x[:, 3]
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def uneven(x: Tensor) -> None:
    """Two latent sites of a row that meet in x, a scale on each side."""
    slope = pyro.param("slope", torch.tensor([0.8, -0.4, 1.5], dtype=F64))
    scale = pyro.param("scale", torch.tensor([1.0, 1.4, 0.6], dtype=F64), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=F64), 2.0))
        loc = a.unsqueeze(-1) * slope + b.unsqueeze(-1)
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


NORMAL = functools.partial(variational, head="normal")
UNDER_Q: dict[str, tuple[Callable[..., Any], Mapping[str, Tensor], Callable[..., Any]]] = {
    "two factors": (TWO_FACTORS, {"x": X}, NORMAL),
    "principal components": (probabilistic_pca_without_offset, blobs(), FULL),
    "mixture of factors": (mixture_of_factor_analysers, blobs(), variational),
    "random effect": (random_effect_of_every_row, blobs(), NORMAL),
    "global slope": (regression, {"y": X[:, 0], "x": X[:, 1:5]}, NORMAL),
    "two sites": (uneven, blobs(), NORMAL),
}


@pytest.mark.parametrize("case", UNDER_Q)
def test_m_step_under_q_is_where_the_gradient_of_the_elbo_vanishes(case: str) -> None:
    model, data, guide = UNDER_Q[case]
    with isolated(0, F64):
        problem = build_problem("fit", model, data, guide=guide, guide_takes_model=True)
        closed = closed_phases(problem, VEMOptions())
        assert {s.how for s in (*closed.e.steps, *closed.m.steps)} == {"closed-form"}
        problem, values, trail = closed.problem, dict(closed.problem.initial), list[float]()
        values.update(closed.e_phase(values))
        for _ in range(4):
            trail.append(float(_elbo(problem, values)))
            scale = max(float(g.abs().max()) for g in _gradients(problem, values).values())
            values.update(closed.m_phase(values)[0])
            trail.append(float(_elbo(problem, values)))
            after = max(float(g.abs().max()) for g in _gradients(problem, values).values())
            assert after <= 1e-8 * max(scale, 1.0)
            values.update(closed.e_phase(values))
    assert trail[1] - trail[0] > 0.1 and np.diff(trail).min() > -1e-9


def _elbo(problem: Any, values: Mapping[str, Tensor]) -> Tensor:
    return batch_elbo(problem, problem.guided, values, None)


def _gradients(problem: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the ELBO in unconstrained θ."""
    coordinates = Coordinates(problem.model.specs, problem.theta)
    free = {n: v.requires_grad_() for n, v in coordinates.unconstrain(values).items()}
    with torch.enable_grad():
        total = _elbo(problem, {**values, **coordinates.constrain(free)})
    return dict(zip(free, torch.autograd.grad(total, list(free.values())), strict=True))


def test_elbo_never_falls_where_one_parameter_is_left_to_the_gradient() -> None:
    fit = lvmppl.fit(gain_that_must_be_positive, blobs(), algorithm="vem", guide=NORMAL, max_steps=8)
    assert {s.parameter: s.how for s in fit.m_step} == {
        "gain": "gradient",
        "loc": "closed-form",
        "variance": "closed-form",
    }
    assert fit.history["objective"].diff().min() > 0


def test_pieces_of_the_data_and_their_rows_of_q_serve_the_m_step(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"algorithm": "vem", "guide": FULL, "max_steps": 3, "tolerance": 0.0}
    whole = lvmppl.fit(one_factor, {"x": X[:, :3]}, **options)
    monkeypatch.setattr("lvmppl.algorithms.evidence.CHUNK", 50)
    monkeypatch.setattr("lvmppl.algorithms.rules.FEW_ROWS", 20)
    found = lvmppl.fit(one_factor, {"x": X[:, :3]}, **options)
    assert {s.how for s in found.m_step} == {"closed-form"}
    for name, value in whole.parameters.items():
        torch.testing.assert_close(found.parameters[name], value, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------ left to the gradient


def by_matrix_product(y: Tensor, x: Tensor) -> None:
    """Reads a second axis of the weight as a matrix: it takes one value at a time."""
    scale = pyro.param("scale", torch.tensor(1.3, dtype=F64), constraint=constraints.positive)
    weight = pyro.sample("weight", dist.Normal(torch.zeros(4, dtype=F64), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ weight, scale), obs=y)


def of_all_rows(x: Tensor) -> None:
    """q whose parameters stand outside of the data plate."""
    loc = pyro.param("q_loc", torch.zeros(len(x), 1, dtype=F64))
    scale = pyro.param("q_scale", torch.ones(len(x), 1, dtype=F64), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def with_the_weights(x: Tensor) -> None:
    """q that starts from a parameter of the model."""
    weights = pyro.param("weights", torch.full((2,), 0.5, dtype=F64), constraint=constraints.simplex)
    with pyro.plate("data", len(x)):
        own = pyro.param("own", torch.zeros(len(x), 2, dtype=F64), event_dim=1)
        pyro.sample("z", dist.Categorical(logits=own + weights.log()), infer={"enumerate": "parallel"})


LEFT: dict[str, tuple[Callable[..., Any], Mapping[str, Tensor], Callable[..., Any], str]] = {
    "drawn": (overdispersed_counts, CASES["overdispersed_counts"].data(), NORMAL, "'z' is drawn from q"),
    "one at a time": (by_matrix_product, {"y": X[:, 0], "x": X[:, 1:5]}, FULL, "does not take many values"),
    "all rows": (one_factor, {"x": X[:, :3].repeat(2, 1)}, of_all_rows, "runs on all rows only"),
}


@pytest.mark.parametrize("case", LEFT)
def test_reason_why_a_parameter_is_left_to_the_gradient(case: str) -> None:
    model, data, guide, why = LEFT[case]
    fit = lvmppl.fit(model, data, algorithm="vem", guide=guide, max_steps=3, seed=1)
    assert {s.how for s in fit.m_step} == {"gradient"}
    assert all(why in s.why for s in fit.m_step)
    assert fit.status in ("max_steps", "converged")


def test_parameter_that_q_depends_on_is_left_to_the_gradient() -> None:
    model = functools.partial(gaussian_mixture, num_components=2, covariance="diag")
    fit = lvmppl.fit(model, blobs(), algorithm="vem", guide=with_the_weights, max_steps=5)
    steps = {s.parameter: s for s in fit.m_step}
    assert (steps["weights"].how, steps["weights"].why) == ("gradient", "q depends on it")
    assert steps["loc"].how == "closed-form"
    assert fit.history["objective"].diff().min() > 0
