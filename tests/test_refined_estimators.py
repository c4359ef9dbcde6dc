"""Semi-amortized guides under every estimator and bound: mean gradients against sums over states and quadratures.

λ_K = λ_0 + Σ rate · ∇ ELBO by an exact sum (states) or at a draw of its own (a line), then a bound at fresh draws of q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import lvmppl
from lvmppl.algorithms.objective import Objective
from lvmppl.algorithms.problem import Problem, build_problem
from lvmppl.density import isolated
from lvmppl.guides.variational import semi_amortized
from lvmppl.options import SVIOptions

F64 = torch.float64
X = torch.tensor([0.3, -1.2, 2.0], dtype=F64)
STANDARD = ((X - X.mean()) / X.std(unbiased=False)).unsqueeze(-1)
LOC = torch.tensor([-1.0, 0.5, 2.0], dtype=F64)
PRIOR = torch.tensor([0.5, 0.2, 0.3], dtype=F64)
STEPS = 2
RATE, LINE_RATE = 0.3, 0.08  # the noise of a step at a draw has heavy tails at a large rate


def states(x: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(0.9, dtype=F64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(PRIOR), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z @ LOC, scale), obs=x)


def line(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor(0.2, dtype=F64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def problem_of(model: Callable[..., None], steps: int, through: bool) -> Problem:
    args = {"hidden": [], "steps": steps, "rate": LINE_RATE if model is line else RATE, "through": through}
    problem = build_problem(
        "fit", model, {"x": X}, guide=semi_amortized, guide_takes_model=True, guide_args=args
    )
    generator = torch.Generator().manual_seed(3)
    for name in problem.initial:  # an encoder that starts at 0 would hide its slope
        if name.startswith("guide."):
            noise = torch.randn(problem.initial[name].shape, generator=generator, dtype=F64)
            problem.initial[name].add_(0.3 * noise)  # type: ignore[attr-defined]
    return problem


def encoded(values: Mapping[str, Tensor], output: str) -> Tensor:
    """λ_0 in unconstrained coordinates, [N, size]."""
    weight, bias = (values[f"guide.encoder.readouts.z_{output}.{n}"] for n in ("weight", "bias"))
    return STANDARD @ weight.T + bias


def states_bound(values: Mapping[str, Tensor], through: bool, samples: int) -> Tensor:
    """Two steps by the sum over the states, then E log (1/K) Σ_k w_k over all K-tuples of them."""

    def joint(scale: Tensor) -> Tensor:
        return PRIOR.log() + dist.Normal(LOC, scale).log_prob(X.unsqueeze(-1))  # [N, 3]

    logits = encoded(values, "probs")
    for _ in range(STEPS):
        at = logits if through else logits.detach().requires_grad_()
        q = torch.softmax(at, -1)
        scale = values["scale"] if through else values["scale"].detach()
        bound = (q * (joint(scale) - q.log())).sum()
        logits = logits + RATE * torch.autograd.grad(bound, at, create_graph=through)[0]
    log_q = torch.log_softmax(logits, -1)
    log_w = joint(values["scale"]) - log_q
    if samples == 1:
        return (log_q.exp() * log_w).sum()
    pairs = torch.logaddexp(log_w.unsqueeze(-1), log_w.unsqueeze(-2)) - math.log(2)
    return ((log_q.unsqueeze(-1) + log_q.unsqueeze(-2)).exp() * pairs).sum()


def nodes(count: int) -> tuple[Tensor, Tensor]:
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(points, dtype=F64), torch.tensor(weights / weights.sum(), dtype=F64)


def grid(count: int) -> tuple[Tensor, Tensor]:
    """For what is no smooth function of ε: a step that is taken at some and halved at others."""
    points = torch.linspace(-5.5, 5.5, count, dtype=F64)
    weights = torch.exp(-0.5 * points**2)
    return points, weights / weights.sum()


def line_bound(values: Mapping[str, Tensor], through: bool, samples: int) -> Tensor:
    """One step at a draw z = m + s ε, halved until the ELBO at another falls by a nat at most; the bound at others yet."""
    e, p = grid(81)
    loc, log_scale = (encoded(values, n).unsqueeze(-1).expand(-1, len(e), len(e)) for n in ("loc", "scale"))
    x = X[:, None, None]  # [N, S, S'], and Z in the end

    def at_draw(own: Sequence[Tensor], still: Sequence[Tensor], e: Tensor) -> Tensor:
        z = own[0] + own[1].exp() * e
        log_q = dist.Normal(still[0], still[1].exp()).log_prob(z)
        return dist.Normal(mu, 1.0).log_prob(z) + dist.Normal(z, 0.7).log_prob(x) - log_q

    at = [t if through else t.detach().requires_grad_() for t in (loc, log_scale)]
    mu = values["mu"] if through else values["mu"].detach()
    moving = [t.clone() for t in at]  # λ is held in log q
    moves = torch.autograd.grad(at_draw(moving, at, e.unsqueeze(-1)).sum(), moving, create_graph=through)
    with torch.no_grad():
        size = (1.0 / torch.hypot(*moves)).clamp(max=LINE_RATE)
        before = at_draw(at, at, e)
        for halvings in range(11):
            moved = [a + size * m for a, m in zip(at, moves, strict=True)]
            after = at_draw(moved, moved, e)
            size = torch.where(after < before - 1.0, size / 2 if halvings < 10 else 0.0, size)
    assert bool((size < LINE_RATE).any())
    loc, scale = loc + size * moves[0], (log_scale + size * moves[1]).exp()
    own, weights = nodes(16)
    z = loc.unsqueeze(-1) + scale.unsqueeze(-1) * own  # [N, S, S', Z]
    log_w = dist.Normal(values["mu"], 1.0).log_prob(z) + dist.Normal(z, 0.7).log_prob(x.unsqueeze(-1))
    log_w = log_w - dist.Normal(loc.unsqueeze(-1), scale.unsqueeze(-1)).log_prob(z)
    if samples == 2:
        pairs = torch.logaddexp(log_w.unsqueeze(-1), log_w.unsqueeze(-2)) - math.log(2)
        mean = ((pairs * weights).sum(-1) * weights).sum(-1)
    else:
        mean = (log_w * weights).sum(-1)
    return ((mean * p).sum(-1) * p).sum()


# model, its bound, steps, estimator, K, calls, draws a call
Case = tuple[Callable[..., None], Callable[..., Tensor], int, str, int, int, int]
CASES: dict[str, Case] = {
    "states, score": (states, states_bound, STEPS, "score_function", 1, 60, 600),
    "states, score, K = 2": (states, states_bound, STEPS, "score_function", 2, 60, 600),
    "line, score": (line, line_bound, 1, "score_function", 1, 250, 150),
    "line, pathwise": (line, line_bound, 1, "pathwise", 1, 250, 10),
    "line, score, K = 2": (line, line_bound, 1, "score_function", 2, 250, 60),
    "line, pathwise, K = 2": (line, line_bound, 1, "pathwise", 2, 250, 10),
}


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_mean_gradient_of_a_refined_guide_equals_its_sum_or_quadrature(name: str, through: bool) -> None:
    model, exact, steps, estimator, samples, calls, particles = CASES[name]
    options: dict[str, Any] = {"estimator": estimator, "num_particles": particles}
    if samples > 1:
        options["objective"] = {"use": "importance_weighted", "num_samples": samples}
    with isolated(1, F64):
        problem = problem_of(model, steps, through)
        objective = Objective(problem, SVIOptions(**options))
        leaves = {n: v.clone().requires_grad_() for n, v in problem.initial.items()}
        drawn = []
        for _ in range(calls):
            estimate = objective(leaves, None, 0)
            found = torch.autograd.grad(estimate.surrogate, list(leaves.values()))
            drawn.append(torch.cat([estimate.bound.reshape(1), *(g.reshape(-1) for g in found)]))
        assert not objective.looped
        value = exact(leaves, through, samples)
        gradient = torch.autograd.grad(value, list(leaves.values()))
    expected = torch.cat([value.detach().reshape(1), *(g.reshape(-1) for g in gradient)])
    rows = torch.stack(drawn)
    error = rows.std(0) / calls**0.5
    assert bool((error < 0.1 * (1 + expected.abs())).all())
    assert bool(((rows.mean(0) - expected).abs() <= 4 * error + 1e-9).all()), (rows.mean(0), expected, error)


@pytest.mark.parametrize("estimator", ["gumbel_softmax", "straight_through"])
def test_relaxed_bound_of_a_refined_guide_is_reported_at_states_of_the_refined_q(estimator: str) -> None:
    with isolated(2, F64):
        problem = problem_of(states, STEPS, True)
        schedule = {"start": 0.5, "end": 0.5}
        options: dict[str, Any] = {"estimator": {"use": estimator, "temperature": schedule}}
        objective = Objective(problem, SVIOptions(**options, num_particles=500))
        leaves = {n: v.clone().requires_grad_() for n, v in problem.initial.items()}
        estimates = [objective(leaves, None, 0) for _ in range(40)]
        value = states_bound(leaves, True, 1)
        exact = torch.autograd.grad(value, list(leaves.values()))
        found = [torch.autograd.grad(e.surrogate, list(leaves.values())) for e in estimates]
    bounds = torch.stack([e.bound for e in estimates])
    assert abs(float(bounds.mean() - value.detach())) <= 4 * float(bounds.std()) / 40**0.5
    mean = torch.cat([torch.stack(own).mean(0).reshape(-1) for own in zip(*found, strict=True)])
    target = torch.cat([g.reshape(-1) for g in exact])
    assert float(torch.nn.functional.cosine_similarity(mean, target, dim=0)) > 0.9


def test_importance_weighted_fit_of_a_refined_guide_lies_below_the_log_evidence() -> None:
    fit = lvmppl.fit(
        line,
        {"x": X},
        "svi",
        guide=semi_amortized,
        max_steps=10,
        objective="importance_weighted",
        num_particles=4,
    )
    assert fit.elbo - 4 * fit.elbo_error < fit.log_evidence
    assert set(fit.history["objective_kind"]) == {"importance_weighted_5"}
