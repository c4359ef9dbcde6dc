"""Steps up each datum's own ELBO: halved where they do not raise it, so that no rate and no draw throws λ away."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_iris, load_wine
from test_guide_pairs import built
from torch import Tensor
from torch.distributions import constraints, transform_to

from lvmppl.algorithms.objective import Objective
from lvmppl.algorithms.problem import Problem, build_problem
from lvmppl.density import isolated
from lvmppl.elbo import elbo
from lvmppl.guides.variational import semi_amortized
from lvmppl.options import SVIOptions

F64 = torch.float64
LOADINGS = torch.tensor([[0.8, -0.3, 1.1, 0.5], [0.2, 0.9, -0.4, 0.1]], dtype=F64)


def factors(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADINGS, 0.5).to_event(1), obs=x)


def positive(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(torch.tensor(2.0, dtype=F64), 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 0.3).expand([*z.shape, 2]).to_event(1), obs=x[:, :2])


def states(x: Tensor) -> None:
    loc = torch.tensor([[-1.0], [0.0], [2.0]], dtype=F64)
    with pyro.plate("data", len(x)):
        z = pyro.sample(
            "z", dist.Categorical(torch.tensor([0.2, 0.3, 0.5], dtype=F64)), infer={"enumerate": "parallel"}
        )
        pyro.sample("x", dist.Normal(loc[z], 0.3).to_event(1), obs=x[:, :1])


def irises(standardised: bool) -> Tensor:
    x = torch.tensor(load_iris().data, dtype=F64)
    return (x - x.mean(0)) / x.std(0) if standardised else x


def refined(model: Any, x: Tensor, seed: int = 0, **args: Any) -> Problem:
    problem = build_problem(
        "fit",
        model,
        {"x": x},
        guide=semi_amortized,
        guide_takes_model=True,
        guide_args={"hidden": [8], **args},
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    for name, value in problem.initial.items():  # an encoder in the middle of its training
        if name.startswith("guide."):
            value.add_(0.5 * torch.randn(value.shape, generator=generator, dtype=value.dtype))  # type: ignore[attr-defined]
    return problem


def mean_bounds(problem: Problem, draws: int) -> tuple[Tensor, Tensor]:
    """ELBO of every datum at the encoder's λ and at the refined one, each the mean over draws."""
    assert problem.guided is not None and problem.guided.guide is not None
    guide: Any = problem.guided.guide.function
    steps, found = guide.refine_steps, []
    data, rows = problem.rows()
    with torch.no_grad():
        for own in (0, steps):
            guide.refine_steps = own
            each = []
            for _ in range(draws):
                bound = elbo(problem.guided.evaluate(data, problem.initial, rows), problem.data_plate)
                assert bound.per_datum is not None
                each.append(bound.per_datum)
            found.append(torch.stack(each).mean(0))
    return found[0], found[1]


@pytest.mark.parametrize("rate", [0.1, 1e3])
@pytest.mark.parametrize("standardised", [True, False])
def test_exact_bound_of_no_datum_falls_under_refinement(standardised: bool, rate: float) -> None:
    """Sums over states have no noise: every datum's ELBO is what it was or higher."""
    x = irises(standardised)
    with isolated(0, F64):
        before, after = mean_bounds(refined(states, x, steps=5, rate=rate), 1)
    assert bool((after >= before - 1e-12 * before.abs()).all())
    assert float((after > before + 1e-6).double().mean()) > 0.9


@pytest.mark.parametrize("data", ["standardised irises", "irises", "wine"])
@pytest.mark.parametrize("model", [factors, positive])
def test_refinement_at_the_default_rate_raises_the_bound(model: Any, data: str) -> None:
    """A fixed step of 0.1 overshoots on these."""
    x = (
        irises(data.startswith("standard"))
        if "iris" in data
        else torch.tensor(load_wine().data[:, :4], dtype=F64)
    )
    with isolated(0, F64):
        args: dict[str, Any] = {} if model is factors else {"head": "gamma", "through": False}
        before, after = mean_bounds(refined(model, x, steps=10, **args), 20)
    assert bool(torch.isfinite(after).all())
    assert float(after.sum()) > float(before.sum())
    if model is factors:  # the other's bound is too noisy to be told a datum at a time
        assert float((after > before - 1.0).double().mean()) > 0.97


@pytest.mark.parametrize("seed", [5372, *range(16)])
def test_draws_in_a_tail_leave_gradients_finite(seed: int) -> None:
    """q = LogNormal: with fixed steps a draw of 59 moved λ to where the next one overflowed (seed 5372)."""
    with isolated(seed, torch.get_default_dtype()):
        problem = built("lognormal", "positive", "mlp", steps=2, through=False)
        objective = Objective(problem, SVIOptions(estimator="pathwise"))
        leaves = {n: v.clone().requires_grad_() for n, v in problem.initial.items()}
        surrogate = objective(leaves, None, 0).surrogate
    every = torch.autograd.grad(surrogate, list(leaves.values()), allow_unused=True)
    assert all(bool(torch.isfinite(g).all()) for g in every if g is not None)


def test_long_steps_from_near_a_sharp_posterior_are_halved() -> None:
    """A likelihood of scale 0.01 and λ two of these off: a step of length 1 would cost 5000 nats a datum."""

    def sharp(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.01), obs=x[:, 0])

    x = irises(True)
    with isolated(0, F64):
        problem = refined(sharp, x, steps=5, rate=0.5)
        assert problem.guided is not None and problem.guided.guide is not None
        guide: Any = problem.guided.guide.function
        data, rows = problem.rows()
        with torch.no_grad():
            problem.guided.evaluate_guide(data, problem.initial, rows)
        (loc,) = (n for n in guide.local if n.endswith("loc"))
        (scale,) = (n for n in guide.local if n != loc)
        start = {loc: x[:, 0] + 0.02, scale: torch.full_like(x[:, 0], -4.6)}
        start = {n: v.reshape(guide.local[n].shape) for n, v in start.items()}
        guide._encoded = lambda data: start
        before, after = mean_bounds(problem, 20)
    assert float((after - before).min()) > -5.0
    assert float(after.sum()) > float(before.sum())


def test_refinement_leaves_the_exact_posterior_where_it_is() -> None:
    """At q = p the path derivative is 0 at every draw; the total one took 0.4 nats a datum off a good encoder."""
    precision = LOADINGS @ LOADINGS.T / 0.25 + torch.eye(2, dtype=F64)
    covariance = torch.linalg.inv(precision)
    x = irises(True)
    mean = x @ LOADINGS.T @ covariance / 0.25
    with isolated(0, F64):
        problem = refined(factors, x, head="full", steps=3)
        assert problem.guided is not None and problem.guided.guide is not None
        guide: Any = problem.guided.guide.function
        data, rows = problem.rows()
        with torch.no_grad():
            problem.guided.evaluate_guide(data, problem.initial, rows)
            local = {n: v.clone() for n, v in guide.local.items()}
        (loc,) = (n for n in local if n.endswith("loc"))
        (tril,) = (n for n in local if n != loc)
        cholesky = transform_to(constraints.lower_cholesky)
        start = {
            loc: mean,
            tril: cholesky.inv(torch.linalg.cholesky(covariance)).expand_as(local[tril]).clone(),
        }
        guide._encoded = lambda data: start
        ends = problem.guided._refined(data, problem.initial, rows)  # type: ignore[attr-defined]
    for name, value in start.items():
        torch.testing.assert_close(ends[name], value, rtol=0.0, atol=1e-10)


def test_draws_outside_go_on_as_if_there_were_no_comparison() -> None:
    """Of two runs from one seed both refine alike, and the stream of draws is left the same."""
    ends = []
    for _ in range(2):
        with isolated(3, F64):
            problem = refined(factors, irises(True)[:10], steps=2)
            data, rows = problem.rows()
            assert problem.guided is not None
            with torch.no_grad():
                problem.guided.evaluate(data, problem.initial, rows)
            ends.append(torch.rand(3))
    assert torch.equal(*ends)
