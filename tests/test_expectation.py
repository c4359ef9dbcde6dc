"""Recorded expectations of a model's log-factors: what running the model gives, whatever the model does on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from lvmppl.algorithms.closed_phases import closed_phases
from lvmppl.algorithms.expectation import Expectations
from lvmppl.algorithms.integrated import IntegratedJoint
from lvmppl.algorithms.problem import Problem, build_problem
from lvmppl.algorithms.recorded import Recorded
from lvmppl.density import isolated, unvalidated
from lvmppl.errors import InputError
from lvmppl.guides.variational import variational
from lvmppl.options import VEMOptions

ENUMERATE = {"enumerate": "parallel"}
X = torch.tensor([1, 0, 2, 2, 1, 2])


def mixture(weigh: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0], dtype=torch.float64)))
        table = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]], dtype=torch.float64)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weigh(weights)), infer=ENUMERATE)
            pyro.sample("x", dist.Categorical(table[z]), obs=x)

    return model


def plain(weights: Tensor) -> Tensor:
    return weights


def branches(weights: Tensor) -> Tensor:
    return weights if bool(weights[0] < 0.55) else weights.clone()


def through_numpy(weights: Tensor) -> Tensor:
    return torch.as_tensor(np.array(weights.detach().numpy()))  # which no recording sees


CONCENTRATION = "weights_concentration"


def integrated() -> tuple[Problem, IntegratedJoint]:
    problem = build_problem("fit", mixture(plain), {"x": X}, guide=variational, guide_takes_model=True)
    joint = closed_phases(problem, VEMOptions()).e.problem.guided
    assert isinstance(joint, IntegratedJoint)
    return problem, joint


def concentration(step: int) -> Tensor:
    return torch.tensor([1.0 + step, 4.0 - step / 3], dtype=torch.float64)


@pytest.mark.parametrize("weigh", [plain, branches, through_numpy])
def test_recorded_expectations_equal_those_of_the_model(
    weigh: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, replays = [0], [0]
    model, replay = mixture(weigh), Recorded.__call__

    def counted(x: Tensor) -> None:
        runs[0] += 1
        model(x)

    def repeated(self: Recorded, inputs: Any) -> Any:
        replays[0] += (found := replay(self, inputs)) is not None
        return found

    monkeypatch.setattr(Recorded, "__call__", repeated)
    with isolated(0, torch.float64), unvalidated(), torch.no_grad():
        problem, joint = integrated()
        data, rows = problem.rows()
        joint.model.function = counted
        expected = Expectations(problem, joint, "auto")
        values = dict(problem.initial)
        for step in range(8):
            values[CONCENTRATION] = concentration(step)
            members = joint.design.members(joint.view_guide(data, values, rows)[0])
            before = runs[0]
            found = expected(values, ["z"], members)
            if step > 3 and weigh is plain:
                assert runs[0] == before
            own = joint.expected_factors(data, values, rows, ["z"], members)
            (one,), (other,) = found.factors, own.factors
            assert one.dims == other.dims
            torch.testing.assert_close(one.log_prob, other.log_prob, rtol=1e-12, atol=1e-12)
            alpha = values[CONCENTRATION]
            torch.testing.assert_close(
                other.log_prob.flatten()[:2],
                torch.digamma(alpha) - torch.digamma(alpha.sum()),
                rtol=1e-9,
                atol=0.0,
            )
    assert replays[0] > 0


@pytest.mark.parametrize(
    ("weigh", "why"), [(branches, "branches otherwise"), (through_numpy, "something else than")]
)
def test_what_cannot_be_recorded_is_refused_if_it_always_must(
    weigh: Callable[[Tensor], Tensor], why: str
) -> None:
    with isolated(0, torch.float64), unvalidated(), torch.no_grad():
        problem, joint = integrated()
        joint.model.function = mixture(weigh)
        expected = Expectations(problem, joint, "always")
        values = dict(problem.initial)
        with pytest.raises(InputError, match=f"fit 'fit': compile: .*must run the model function: .*{why}"):
            for step in range(8):
                values[CONCENTRATION] = concentration(step)
                members = joint.design.members(joint.view_guide(*problem.rows()[:1], values)[0])
                expected(values, ["z"], members)
