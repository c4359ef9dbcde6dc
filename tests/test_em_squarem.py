"""Accelerated EM: the same optimum in fewer steps, never falling, and EM itself where an extrapolation is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from em_models import CASES
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms.problem import build_problem
from lvmppl.algorithms.squarem import Squarem
from lvmppl.models.state_space import local_level


def flow() -> dict[str, Tensor]:
    """A level that drifts little, seen through much noise: EM crawls."""
    rng = np.random.default_rng(4)
    level = np.cumsum(0.3 * rng.normal(size=60))
    return {"x": torch.as_tensor(level + rng.normal(size=60))[None]}


def test_accelerated_em_equals_the_maximum_by_gradient_in_a_fraction_of_the_steps() -> None:
    plain = lvmppl.fit(local_level, flow(), algorithm="em", max_steps=60)
    fast = lvmppl.fit(
        local_level, flow(), algorithm="em", max_steps=60, tolerance=1e-10, acceleration="squarem"
    )
    best = lvmppl.fit(local_level, flow(), algorithm="enumeration", tolerance=1e-13)
    assert fast.status == "converged"
    assert fast.log_evidence == pytest.approx(best.log_evidence, rel=1e-7)
    assert fast.history["objective"].diff().min() >= -1e-9 * abs(fast.log_evidence)
    reached = plain.history["objective"].iloc[-1]
    assert 2 * int((fast.history["objective"] < reached).sum()) < len(plain.history)


@pytest.mark.parametrize("name", ["two_causes", "markov", "poisson_and_normal", "tied_precision_matrix"])
def test_accelerated_em_never_decreases_log_evidence(name: str) -> None:
    case = CASES[name]
    fit = lvmppl.fit(
        case.model, case.data(), algorithm="em", max_steps=25, tolerance=0, acceleration="squarem", restarts=2
    )
    assert fit.status == "max_steps"
    assert fit.all_history.groupby("restart")["objective"].diff().min() >= -1e-9 * abs(fit.log_evidence)
    plain = lvmppl.fit(case.model, case.data(), algorithm="em", max_steps=1, tolerance=0)
    first = fit.all_history.query("restart == 0")["objective"].iloc[:2]
    np.testing.assert_allclose(first, plain.history["objective"], rtol=1e-12)


def test_trajectory_equals_plain_em_where_every_extrapolation_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES["two_causes"]

    def worse(self: Any, *points: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**points[-1], "loc": points[-1]["loc"] + 3.0}

    plain = lvmppl.fit(case.model, case.data(), algorithm="em", max_steps=9, tolerance=0)
    monkeypatch.setattr(Squarem, "_extrapolated", worse)
    fit = lvmppl.fit(
        case.model, case.data(), algorithm="em", max_steps=9, tolerance=0, acceleration="squarem"
    )
    np.testing.assert_allclose(fit.history["objective"], plain.history["objective"], rtol=1e-12)


def test_extrapolation_of_two_steps_of_a_linear_map_equals_its_fixed_point() -> None:
    """u ↦ c + ρ (u − c): all coordinates contract alike, and α = −1/(1 − ρ)."""

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(3).double())
        scale = pyro.param("scale", torch.tensor(1.0).double(), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    problem = build_problem("linear", model, {"x": torch.zeros(5, 3).double()})
    fixed = {"loc": torch.tensor([1.0, -2.0, 0.5]).double(), "scale": torch.tensor(2.0).double()}

    def at(k: int) -> dict[str, Tensor]:
        offset = 0.9**k
        return {"loc": fixed["loc"] + 3 * offset, "scale": fixed["scale"] * np.exp(0.7 * offset)}

    squarem = Squarem(problem, dict)
    seen: list[Any] = []

    def e_step(values: Any) -> Any:
        seen.append(values)
        return 1.0, [], {}

    _, tried = squarem.step(at(0), at(1), 0.0, e_step)
    assert tried is None and not seen
    values, tried = squarem.step(at(1), at(2), 0.0, e_step)
    assert tried is not None and len(seen) == 1
    for name, expected in fixed.items():
        torch.testing.assert_close(values[name], expected, rtol=1e-10, atol=1e-10)
