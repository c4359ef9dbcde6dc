"""A location under several fitted scales has no closed form (its maximum depends on them): it takes gradient M-steps."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from em_models import ENUMERATE
from torch import Tensor
from torch.distributions import constraints

import lvmppl

START = {"mu": [0.4, 3.0], "weights": [0.3, 0.7], "a": 1.3, "b": 2.5}


def two_sensors(x: Tensor, y: Tensor) -> None:
    """Both see the same location; how exact each is has to be found out."""
    weights = pyro.param("weights", torch.tensor(START["weights"]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor(START["mu"]))
    a, b = (pyro.param(n, torch.tensor(START[n]), constraint=constraints.positive) for n in "ab")
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(mu[z], a), obs=x)
        pyro.sample("y", dist.Normal(mu[z], b), obs=y)


def readings() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    centre = 4.0 * (torch.rand(57, generator=generator, dtype=torch.float64) > 0.6)
    noise = torch.randn(2, 57, generator=generator, dtype=torch.float64)
    return {"x": centre + 0.8 * noise[0], "y": centre + 2 * noise[1]}


@pytest.mark.parametrize("options", [{}, {"restarts": 3}, {"compile": "never"}])
def test_em_of_a_location_under_two_scales_ends_where_its_own_gradient_does(
    options: dict[str, object],
) -> None:
    climbed = lvmppl.fit(two_sensors, readings(), algorithm="enumeration", tolerance=1e-14)
    fit = lvmppl.fit(two_sensors, readings(), algorithm="em", tolerance=1e-14, max_steps=2000, **options)
    assert fit.log_evidence == pytest.approx(climbed.log_evidence, abs=1e-8)
    assert fit.all_history.groupby("restart")["objective"].diff().min() >= -1e-9 * abs(fit.log_evidence)
    how = {step.parameter: step for step in fit.m_step}
    assert how["mu"].how == "gradient" and how["mu"].why == "its uses differ in their scale (a, b)"
    assert how["a"].how == how["b"].how == "closed-form"
    for name in "ab":
        torch.testing.assert_close(fit.parameters[name], climbed.parameters[name], rtol=1e-5, atol=0.0)
