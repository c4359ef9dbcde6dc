"""EM where the number of rows or states matters: one of each, and parameters that vary along more rows than are probed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from em_models import ENUMERATE, normal, simplex, weights
from scipy import stats
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms.probing import PROBE_ROWS, probe_indices

SIZES = pytest.mark.parametrize("size", [61, PROBE_ROWS + 3, 2 * PROBE_ROWS + 5])
LOC = (-1.0, 2.5)


def locations() -> Tensor:
    result: Tensor = pyro.param("loc", torch.tensor(LOC, dtype=torch.float64))
    return result


def two_groups(size: int) -> Tensor:
    return normal(size, seed=3) + 4 * (torch.arange(size) % 3 == 0)


def responsibilities(x: np.ndarray, prior: Any, spread: Any) -> np.ndarray:
    """[K, N]"""
    density = np.asarray(prior) * stats.norm.pdf(x, np.array(LOC)[:, None], spread)
    result: np.ndarray = density / density.sum(0)
    return result


@pytest.mark.parametrize("components", [1, 2])
@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("restarts", [1, 3])
def test_mixture_of_one_row_or_one_component_equals_its_moments(
    components: int, size: int, restarts: int
) -> None:
    def model(x: Tensor) -> None:
        scale = pyro.param(
            "scale", torch.ones(components, dtype=torch.float64), constraint=constraints.positive
        )
        loc = pyro.param("loc", lambda: normal(components, seed=4))
        mixing = weights(components)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    x = two_groups(size)
    fit = lvmppl.fit(model, {"x": x}, algorithm="em", restarts=restarts, init="random")
    assert fit.status == "converged"
    if components == 1:
        assert float(fit.parameters["loc"]) == pytest.approx(float(x.mean()), rel=1e-9)
        spread = float(x.std(correction=0)) if size > 1 else np.finfo(float).eps ** (2 / 3) * abs(float(x))
        assert float(fit.parameters["scale"]) == pytest.approx(spread, rel=1e-9)
    elif size == 1:
        np.testing.assert_allclose(fit.parameters["loc"], [float(x)] * 2, rtol=1e-9)


@SIZES
def test_em_step_with_known_errors_equals_means_weighed_by_row(size: int) -> None:
    """Errors of measurement: a standard deviation a row, as data."""

    def model(x: Tensor, error: Tensor) -> None:
        loc, mixing = locations(), weights(2)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(loc[z], error), obs=x)

    x, error = two_groups(size), 0.5 + normal(size, seed=5).abs()
    fit = lvmppl.fit(model, {"x": x, "error": error}, algorithm="em", max_steps=1)
    q = responsibilities(x.numpy(), simplex(2).numpy()[:, None], error.numpy())
    precise = q / error.numpy() ** 2
    np.testing.assert_allclose(fit.parameters["loc"], precise @ x.numpy() / precise.sum(1), rtol=1e-9)
    np.testing.assert_allclose(fit.parameters["weights"], q.mean(1), rtol=1e-9)
    assert {s.how for s in fit.m_step} == {"closed-form"}


@SIZES
def test_em_step_with_weights_chosen_by_the_data_equals_frequencies_by_group(size: int) -> None:
    """Whether all rows are probed or not; in one piece or several."""

    def model(x: Tensor, group: Tensor) -> None:
        table = pyro.param("table", lambda: simplex(3, 2), constraint=constraints.simplex)
        loc = locations()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(table[group]), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    x, group = two_groups(size), torch.arange(size) % 3
    fit = lvmppl.fit(model, {"x": x, "group": group}, algorithm="em", max_steps=1)
    q = responsibilities(x.numpy(), simplex(3, 2).numpy()[group.numpy()].T, 1.0)
    expected = np.stack([q[:, group.numpy() == g].mean(1) for g in range(3)])
    np.testing.assert_allclose(fit.parameters["table"], expected, rtol=1e-9)
    assert {s.how for s in fit.m_step} == {"closed-form"}


@SIZES
def test_em_step_of_all_that_the_data_choose_equals_the_updates_by_group(size: int) -> None:
    """Locations, scales and labels by group; the last group where rows are not probed, if there are any."""

    def model(x: Tensor, label: Tensor, group: Tensor) -> None:
        mixing = weights(2)
        low = pyro.param("low", lambda: torch.arange(4.0).reshape(2, 2).double())
        high = pyro.param("high", lambda: torch.arange(4.0, 8.0).reshape(2, 2).double())
        loc = torch.cat([low, high])
        scale = pyro.param(
            "scale", lambda: torch.linspace(0.5, 2, 4).double(), constraint=constraints.positive
        )
        table = pyro.param("table", lambda: simplex(4, 2, 3), constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(loc[group, z], scale[group]), obs=x)
            words = dist.Categorical(table[group, z].unsqueeze(-2))  # the same for both labels of a row
            pyro.sample("label", words.to_event(1), obs=label)

    group = torch.arange(size) % 3
    if size <= PROBE_ROWS:
        group[::5] = 3
    else:
        hidden = torch.ones(size, dtype=torch.bool)
        hidden[probe_indices(size)] = False
        group[hidden] = 3
    x, label = two_groups(size) + 2 * group, torch.arange(2 * size).reshape(size, 2) // 3 % 3
    fit = lvmppl.fit(model, {"x": x, "label": label, "group": group}, algorithm="em", max_steps=1)
    assert {s.parameter: s.how for s in fit.m_step} == dict.fromkeys(
        ("weights", "low", "high", "scale", "table"), "closed-form"
    )
    xs, g, own = x.numpy(), group.numpy(), label.numpy()
    start, spread = np.arange(8.0).reshape(4, 2), np.linspace(0.5, 2, 4)[g]
    table = simplex(4, 2, 3).numpy()
    joint = (
        simplex(2).numpy()[:, None]
        * stats.norm.pdf(xs, start[g].T, spread)
        * table[g[:, None], :, own].prod(1).T
    )
    q = joint / joint.sum(0)
    for k in range(4):
        here = g == k
        loc = q[:, here] @ xs[here] / q[:, here].sum(1)
        square = (q[:, here] * (xs[here] - loc[:, None]) ** 2).sum() / here.sum()
        counts = np.stack([q[:, here] @ (own[here] == v).sum(1) for v in range(3)], -1)
        np.testing.assert_allclose(fit.parameters["high" if k > 1 else "low"][k % 2], loc, rtol=1e-9)
        np.testing.assert_allclose(fit.parameters["scale"][k], np.sqrt(square), rtol=1e-9)
        np.testing.assert_allclose(
            fit.parameters["table"][k], counts / counts.sum(-1, keepdims=True), rtol=1e-9
        )


def test_lookup_that_rows_between_the_probed_ones_contradict_is_left_to_the_gradient() -> None:
    """Where a piece of the data has an exposure the rate is another; none of the probed rows has one."""

    def model(x: Tensor, exposure: Tensor) -> None:
        rate = pyro.param("rate", torch.tensor([1.0, 4.0]).double(), constraint=constraints.positive)
        mixing = weights(2)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
            mean = rate[z] if bool((exposure == 1).all()) else rate[z] * exposure
            pyro.sample("x", dist.Poisson(mean), obs=x)

    size = 2 * PROBE_ROWS + 5
    exposure = torch.ones(size, dtype=torch.float64)
    exposure[1 : size // 3 : 2] = 5
    exposure[probe_indices(size)] = 1
    mean = torch.tensor([1.0, 6.0]).double()[torch.arange(size) % 2] * exposure
    data = {"x": torch.poisson(mean, generator=torch.Generator().manual_seed(2)), "exposure": exposure}
    fit = lvmppl.fit(model, data, algorithm="em", max_steps=40)
    assert {s.parameter: (s.how, s.why) for s in fit.m_step}["rate"] == (
        "gradient",
        "is used otherwise in rows that were not probed",
    )
    best = lvmppl.fit(model, data, algorithm="enumeration")
    assert fit.log_evidence == pytest.approx(best.log_evidence, abs=1e-2)


@pytest.mark.filterwarnings("ignore:log evidence is -inf")
def test_impossible_start_is_said_to_be_one() -> None:
    def model(x: Tensor) -> None:
        table = pyro.param("table", torch.eye(2).double(), constraint=constraints.simplex)
        mixing = pyro.param("weights", torch.tensor([1.0, 0.0]).double(), constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
            pyro.sample("x", dist.Categorical(table[z]), obs=x)

    fit = lvmppl.fit(model, {"x": torch.tensor([0, 1, 0])}, algorithm="em")
    assert (fit.status, fit.message) == ("diverged", "log evidence is -inf at the start")


@pytest.mark.parametrize("filler", [0.0, -999.0, 1e9])
def test_em_step_with_missing_values_equals_the_update_of_those_seen(filler: float) -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(0.0, 1.0, (53, 3)) + 4.0 * rng.integers(0, 2, (53, 1))
    seen = rng.random((53, 3)) < 0.7
    weights, loc = np.array([0.3, 0.7]), np.array([[0.0, 0.5, 1.0], [3.0, 3.5, 2.0]])
    variance = np.array([[1.0, 2.0, 1.5], [0.5, 1.0, 2.5]])

    def model(x: Tensor, seen: Tensor) -> None:
        w = pyro.param("weights", torch.as_tensor(weights), constraint=constraints.simplex)
        m = pyro.param("loc", torch.as_tensor(loc))
        v = pyro.param("variance", torch.as_tensor(variance), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(m[z], v[z].sqrt()).mask(seen).to_event(1), obs=x)

    data = {"x": torch.as_tensor(np.where(seen, x, filler)), "seen": torch.as_tensor(seen)}
    fit = lvmppl.fit(model, data, algorithm="em", max_steps=1)
    each = stats.norm(loc[:, None], np.sqrt(variance)[:, None]).logpdf(x) * seen  # [K, N, D]
    joint = np.log(weights)[:, None] + each.sum(-1)
    evidence = np.logaddexp(*joint)
    r = np.exp(joint - evidence)[..., None] * seen
    new_loc = (r * x).sum(1) / r.sum(1)
    new_variance = (r * (x - new_loc[:, None]) ** 2).sum(1) / r.sum(1)
    assert {s.how for s in fit.m_step} == {"closed-form"}
    assert fit.history["objective"].iloc[0] == pytest.approx(evidence.sum(), rel=1e-12)
    np.testing.assert_allclose(fit.parameters["weights"], np.exp(joint - evidence).mean(1), rtol=1e-12)
    np.testing.assert_allclose(fit.parameters["loc"], new_loc, rtol=1e-11)
    np.testing.assert_allclose(fit.parameters["variance"], new_variance, rtol=1e-11)
    assert not fit.message  # what is hidden sets neither a floor nor the scale that a component is narrow by
