"""A recorded step against the function itself, at inputs other than those it was recorded at."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lvmppl.algorithms.recorded import Recorded, as_one

Tensors = Mapping[str, Tensor]


def inputs(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    m = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    a = torch.rand(2, 4, 4, generator=generator, dtype=torch.float64)
    return {"m": m, "s": a @ a.mT + torch.eye(4, dtype=torch.float64)}


def softmax_and_views(x: Tensors) -> dict[str, Tensor]:
    m = x["m"].permute(2, 0, 1).reshape(4, 6)  # a copy, then views of it
    top = m.amax(0, keepdim=True)
    weights = (m - top).exp_()
    norm = weights.sum(0, keepdim=True)
    weights /= torch.where(norm > 1.5, norm, 1.0)
    return {"weights": weights.reshape(4, 2, 3), "first": weights[0], "same": x["s"]}


def accumulated(x: Tensors) -> dict[str, Tensor]:
    total = torch.zeros(2, 3, dtype=torch.float64)  # written to again: its zeros are part of the step
    total.index_add_(1, torch.tensor([0, 2, 2, 1]), x["m"].sum(1))
    picked = x["m"].index_select(-1, torch.tensor([3, 0]))
    joined = torch.cat([picked**2, picked.clamp_min(0.5), torch.minimum(picked, -picked)], -1)
    return {"total": total, "joined": joined, "any": ((joined > 0.9) & ~(joined < 0)).any(-1)}


def spelt_otherwise(x: Tensors) -> dict[str, Tensor]:
    """Powers whose exponent is a tensor, a sum over no axis in particular, an empty vector in a join."""
    m, rows = x["m"], x["s"][0]
    two = torch.full((4,), 2.0, dtype=torch.float64)
    return {
        "powers": torch.stack([m**m, 2.0**m, m**two, m ** m.sum()]),
        "total": torch.sum(m, dim=None),
        "joined": torch.cat([rows * 2, torch.empty(0, dtype=torch.float64)]),
    }


def solved(x: Tensors) -> dict[str, Tensor]:
    root = torch.linalg.cholesky(x["s"])
    white = torch.linalg.solve_triangular(root, x["m"].mT, upper=False)
    return {
        "white": white,
        "log_det": root.diagonal(dim1=-2, dim2=-1).log().sum(-1),
        "product": x["m"] @ x["s"],
    }


def differentiated(x: Tensors) -> dict[str, Tensor]:
    leaf = x["m"].detach().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(torch.logsumexp(leaf, -1).square().sum(), leaf)
    return {"grad": grad}


@pytest.mark.parametrize(
    "function", [softmax_and_views, accumulated, spelt_otherwise, solved, differentiated]
)
def test_recorded_step_equals_its_function(function: object) -> None:
    assert callable(function)
    recorded = Recorded(function, inputs(0))
    for seed in (0, 1, 2, 1):
        found, expected = recorded(inputs(seed)), function(inputs(seed))
        assert found is not None and found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-13, atol=1e-14)


def test_recorded_outputs_stay_when_the_step_is_repeated() -> None:
    recorded = Recorded(softmax_and_views, inputs(0))
    first = recorded.outputs()
    kept = {n: v.clone() for n, v in first.items()}
    assert recorded(inputs(1)) is not None
    assert all(torch.equal(first[n], kept[n]) for n in kept)


def test_recorded_step_refuses_another_branch() -> None:
    def step(x: Tensors) -> dict[str, Tensor]:
        return {"y": x["m"] * 2 if bool((x["m"] > 0.99).any()) else x["m"] + 1}

    recorded = Recorded(step, {"m": torch.full((3,), 0.5)})
    assert recorded({"m": torch.full((3,), 1.0)}) is None
    found = recorded({"m": torch.full((3,), 0.25)})
    assert found is not None
    torch.testing.assert_close(found["y"], torch.full((3,), 1.25))


def test_recorded_part_that_branches_equals_its_function_on_either_way() -> None:
    ways: list[bool] = []

    def clipped(x: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        above, result = x > most, x.clone()
        ways.append(bool(above.any()))
        if ways[-1]:
            result[above] = torch.log(x[above])  # as many as there are
        return result, above

    def step(x: Tensors) -> dict[str, Tensor]:
        most = torch.tensor(0.9, dtype=torch.float64) * x["s"].amax().clamp_max(1.0)
        y, above = as_one(clipped, x["m"] * 2.0, 2.0 * most)
        return {"y": y.sum(0), "above": above.sum((1, 2))}

    recorded = Recorded(step, {**inputs(0), "m": inputs(0)["m"] / 2})
    assert ways == [False]
    for scale in (1.0, 0.5, 1.2):
        own = {**inputs(1), "m": scale * inputs(1)["m"]}
        found = recorded(own)
        assert found is not None
        assert ways[-1] == (scale > 0.5)
        expected = step(own)
        torch.testing.assert_close(found["y"], expected["y"], rtol=1e-13, atol=1e-14)
        assert torch.equal(found["above"], expected["above"])


def test_recorded_step_raises_what_its_function_raises() -> None:
    recorded = Recorded(solved, inputs(0))
    with pytest.raises(RuntimeError, match="cholesky"):
        recorded({**inputs(0), "s": -inputs(0)["s"]})


def test_em_in_tables_does_without_the_compiler_of_torch() -> None:
    """Importing it takes two seconds, which torch does at the first operation that a guarded mode sees."""
    program = """
import sys, torch, pyro, lvmppl
import pyro.distributions as dist
from torch.distributions import constraints

def model(x):
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

fit = lvmppl.fit(model, {"x": torch.tensor([-2.0, -1.0, 0.5, 3.0])}, algorithm="em", restarts=3, max_steps=5)
assert len(fit.all_history["restart"].unique()) == 3
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
