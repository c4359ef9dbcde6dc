"""Gradient estimators and bounds against gradients in closed form: sums over all states, quadrature, and algebra."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
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
from lvmppl.errors import InputError
from lvmppl.guides.categorical import categorical
from lvmppl.options import SVIOptions

F64 = torch.float64
CALLS, PARTICLES = 100, 1000  # 10⁵ draws, in as many calls as the standard error of their means needs
X = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=F64)
LOC = torch.tensor([-1.0, 0.5, 2.0], dtype=F64)
PRIOR = torch.tensor([0.5, 0.2, 0.3], dtype=F64)
SHIFT = torch.tensor([0.0, 0.8], dtype=F64)


def two_causes(x: Tensor) -> None:
    """z⁽ⁿ⁾ of three states and w⁽ⁿ⁾ of two, which explain x⁽ⁿ⁾ together; θ is `scale`."""
    scale = pyro.param("scale", torch.tensor(0.9, dtype=F64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(PRIOR), infer={"enumerate": "parallel"})
        w = pyro.sample("w", dist.Bernoulli(torch.tensor(0.4, dtype=F64)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(LOC[z] + SHIFT[w.long()], scale), obs=x)


def two_tables(x: Tensor) -> None:
    a = pyro.param("a", torch.zeros(3, dtype=F64))
    b = pyro.param("b", torch.tensor(0.3, dtype=F64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=a + x.unsqueeze(-1) * LOC))
        pyro.sample("w", dist.Bernoulli(logits=b * (z - 1)))


def two_causes_bound(values: Mapping[str, Tensor], samples: int = 0) -> Tensor:
    """Σ over all states, written out: the ELBO, or E[log (1/K) Σ_k w_k] over all K-tuples of states."""
    total = torch.zeros((), dtype=F64)
    states = list(itertools.product(range(3), range(2)))
    for x in X:
        log_q, log_w = [], []
        for z, w in states:
            logits = values["a"] + x * LOC
            own = torch.log_softmax(logits, -1)[z]
            odds = values["b"] * (z - 1)
            own = own + torch.nn.functional.logsigmoid(odds if w else -odds)
            joint = PRIOR[z].log() + math.log(0.4 if w else 0.6)
            joint = joint + dist.Normal(LOC[z] + SHIFT[w], values["scale"]).log_prob(x)
            log_q.append(own)
            log_w.append(joint - own)
        for chosen in itertools.product(range(len(states)), repeat=max(1, samples)):
            q = torch.stack([log_q[i] for i in chosen]).sum().exp()
            total = total + q * (
                torch.logsumexp(torch.stack([log_w[i] for i in chosen]), 0) - math.log(len(chosen))
            )
    return total


def counts(x: Tensor) -> None:
    """A count of all rows, whose log q has no reparameterised draw and no finite sum."""
    rate = pyro.param("rate", torch.tensor(1.3, dtype=F64))
    k = pyro.sample("k", dist.Poisson(rate))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.4 * k, 1.0), obs=x)


def counts_guide(x: Tensor) -> None:
    pyro.sample("k", dist.Poisson(pyro.param("mean", torch.tensor(1.1, dtype=F64))))


def counts_bound(values: Mapping[str, Tensor]) -> Tensor:
    k = torch.arange(60, dtype=F64)
    q, p = dist.Poisson(values["mean"]).log_prob(k), dist.Poisson(values["rate"]).log_prob(k)
    likelihood = dist.Normal(0.4 * k.unsqueeze(-1), 1.0).log_prob(X).sum(-1)
    return (q.exp() * (p + likelihood - q)).sum()


def line(x: Tensor) -> None:
    """z⁽ⁿ⁾ ~ N(μ, 1), x⁽ⁿ⁾ ~ N(z⁽ⁿ⁾, 0.7²)."""
    mu = pyro.param("mu", torch.tensor(0.2, dtype=F64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def line_guide(x: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.3, dtype=F64))
    width = pyro.param("width", torch.tensor(0.8, dtype=F64), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, width))


def line_bound(values: Mapping[str, Tensor], samples: int = 0) -> Tensor:
    """Gauss–Hermite quadrature over the draws; of K = 2 samples over the square."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    e, p = torch.tensor(nodes, dtype=F64), torch.tensor(weights / weights.sum(), dtype=F64)
    z = values["slope"] * X.unsqueeze(-1) + values["width"] * e  # [N, S]
    log_w = dist.Normal(values["mu"], 1.0).log_prob(z) + dist.Normal(z, 0.7).log_prob(X.unsqueeze(-1))
    log_w = log_w - dist.Normal(values["slope"] * X.unsqueeze(-1), values["width"]).log_prob(z)
    if samples < 2:
        return (log_w * p).sum()
    assert samples == 2
    pairs = torch.logaddexp(log_w.unsqueeze(-1), log_w.unsqueeze(-2)) - math.log(2)
    return (pairs * p.unsqueeze(-1) * p).sum()


SETTINGS: dict[str, tuple[Callable[..., None], Callable[..., None], Callable[..., Tensor]]] = {
    "two_causes": (two_causes, two_tables, two_causes_bound),
    "counts": (counts, counts_guide, counts_bound),
    "line": (line, line_guide, line_bound),
}


def problem_of(name: str) -> Problem:
    model, guide, _ = SETTINGS[name]
    return build_problem("fit", model, {"x": X}, guide=guide)


def gradients(
    problem: Problem, calls: int, looped: bool = False, **options: Any
) -> tuple[list[str], Tensor, Tensor]:
    """(parameters, gradient of each call [calls, P], bound of each call)."""
    objective = Objective(problem, SVIOptions(**options))
    leaves = {n: v.clone().requires_grad_() for n, v in problem.initial.items()}
    rows, bounds = [], []
    for _ in range(calls):
        estimate = objective(leaves, None, 0)
        found = torch.autograd.grad(estimate.surrogate, list(leaves.values()))
        rows.append(torch.cat([g.reshape(-1) for g in found]))
        bounds.append(estimate.bound)
    assert bool(objective.looped) == looped
    return list(leaves), torch.stack(rows), torch.stack(bounds)


def exact(name: str, problem: Problem, *args: int) -> tuple[Tensor, Tensor]:
    leaves = {n: v.clone().requires_grad_() for n, v in problem.initial.items()}
    value = SETTINGS[name][2](leaves, *args)
    found = torch.autograd.grad(value, list(leaves.values()))
    return torch.cat([g.reshape(-1) for g in found]), value.detach()


def assert_mean(draws: Tensor, expected: Tensor) -> None:
    """Within four standard errors, entry by entry; and the standard error is small enough to tell."""
    error = draws.std(0) / len(draws) ** 0.5
    assert bool((error < 0.2 * (1 + expected.abs())).all())
    assert bool(((draws.mean(0) - expected).abs() <= 4 * error + 1e-10).all()), (
        draws.mean(0),
        expected,
        error,
    )


def score(baseline: str) -> dict[str, str]:
    return {"use": "score_function", "baseline": baseline}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{name}-{baseline}": (name, {"estimator": score(baseline)})
        for name in ("two_causes", "counts", "line")
        for baseline in ("none", "running_mean", "leave_one_out", "learned")
    },
    "one_drawn_one_summed": ("two_causes", {"estimator": {"z": "score_function", "w": "enumeration"}}),
    "line-pathwise": ("line", {"estimator": "pathwise"}),
}


@pytest.mark.parametrize("case", CASES)
def test_mean_gradient_equals_exact_gradient(case: str) -> None:
    name, options = CASES[case]
    with isolated(1, F64):
        problem = problem_of(name)
        _, found, bounds = gradients(problem, CALLS, num_particles=PARTICLES, **options)
        gradient, bound = exact(name, problem)
    assert_mean(found, gradient)
    assert_mean(bounds, bound)


def test_enumerated_gradient_equals_exact_gradient() -> None:
    with isolated(1, F64):
        problem = problem_of("two_causes")
        _, found, bounds = gradients(problem, 1)
        gradient, bound = exact("two_causes", problem)
    torch.testing.assert_close(found[0], gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bounds[0], bound, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "case", ["two_causes-running_mean", "two_causes-leave_one_out", "line-pathwise", "line-none"]
)
def test_mean_gradient_of_importance_weighted_bound_equals_exact_gradient(case: str) -> None:
    """K = 2: all pairs of states, or a quadrature over the square; the pathwise gradient is doubly reparameterised."""
    name, options = CASES[case]
    with isolated(2, F64):
        problem = problem_of(name)
        objective = {"use": "importance_weighted", "num_samples": 2}
        _, found, bounds = gradients(
            problem, CALLS, num_particles=PARTICLES // 2, objective=objective, **options
        )
        gradient, bound = exact(name, problem, 2)
    assert_mean(found, gradient)
    assert_mean(bounds, bound)


# ----------------------------------------------------------------------------------------------- relaxed states


def one_hot_cause(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(PRIOR), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z @ LOC, 1.0), obs=x)


def one_hot_table(x: Tensor) -> None:
    a = pyro.param("a", torch.tensor([0.2, -0.1, 0.4], dtype=F64))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.OneHotCategorical(logits=a))


def one_hot_bound(values: Mapping[str, Tensor]) -> Tensor:
    log_q = torch.log_softmax(values["a"], -1)
    log_p = PRIOR.log() + dist.Normal(LOC, 1.0).log_prob(X.unsqueeze(-1))  # [N, K]
    return (log_q.exp() * (log_p - log_q)).sum()


def pairs_of_flags(x: Tensor) -> None:
    """Two binary states a datum as one vector."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.4, 0.7], dtype=F64)).to_event(1))
        pyro.sample("x", dist.Normal(z @ torch.tensor([1.0, -2.0], dtype=F64), 1.0), obs=x)


def flags_table(x: Tensor) -> None:
    b = pyro.param("b", torch.tensor([0.3, -0.5], dtype=F64))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=b).to_event(1))


def flags_bound(values: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros((), dtype=F64)
    prior, weights = torch.tensor([0.4, 0.7], dtype=F64), torch.tensor([1.0, -2.0], dtype=F64)
    for state in itertools.product((0.0, 1.0), repeat=2):
        z = torch.tensor(state, dtype=F64)
        log_q = torch.nn.functional.logsigmoid((2 * z - 1) * values["b"]).sum()
        log_p = (z * prior.log() + (1 - z) * (1 - prior).log()).sum()
        total = total + log_q.exp() * (log_p - log_q + dist.Normal(z @ weights, 1.0).log_prob(X)).sum()
    return total


SETTINGS["one_hot"] = (one_hot_cause, one_hot_table, one_hot_bound)
SETTINGS["flags"] = (pairs_of_flags, flags_table, flags_bound)


def relaxed(name: str, temperature: float) -> dict[str, Any]:
    schedule = {"start": temperature, "end": temperature}
    return {"estimator": {"use": name, "temperature": schedule}, "num_particles": PARTICLES}


@pytest.mark.parametrize("setting", ["one_hot", "flags"])
def test_bias_of_gumbel_softmax_vanishes_with_the_temperature(setting: str) -> None:
    """Against the sum over all states; the bound that is reported is at states, and unbiased at any temperature."""
    with isolated(3, F64):
        problem = problem_of(setting)
        gradient, bound = exact(setting, problem)
        off = {}
        for temperature in (1.0, 0.1):
            _, found, bounds = gradients(problem, CALLS, **relaxed("gumbel_softmax", temperature))
            off[temperature] = float((found.mean(0) - gradient).norm())
            assert_mean(bounds, bound)
            error = float((found.std(0) / CALLS**0.5).norm())
    assert off[1.0] > 8 * error
    assert off[0.1] < 0.2 * off[1.0]


@pytest.mark.parametrize("setting", ["one_hot", "flags"])
def test_bound_of_straight_through_equals_exact_elbo_on_average(setting: str) -> None:
    """Its draws are draws of q; the gradient points the way of the exact one."""
    with isolated(4, F64):
        problem = problem_of(setting)
        gradient, bound = exact(setting, problem)
        _, found, bounds = gradients(problem, CALLS, **relaxed("straight_through", 0.5))
    assert_mean(bounds, bound)
    assert torch.nn.functional.cosine_similarity(found.mean(0), gradient, dim=0) > 0.9


# ------------------------------------------------------------------------------------------------------- bounds


def test_bounds_are_ordered_below_the_log_evidence() -> None:
    """ELBO ≤ IW-5 ≤ IW-50 ≤ log p(x), the last in closed form; differences by more than 4 standard errors."""
    with isolated(5, F64):
        problem = problem_of("line")
        means, errors = [], []
        for options in (
            {},
            *({"objective": {"use": "importance_weighted", "num_samples": k}} for k in (5, 50)),
        ):
            bound = Objective(problem, SVIOptions(**options, num_particles=50))
            with torch.no_grad():
                drawn = torch.stack([bound(problem.initial, None, 0).bound for _ in range(60)])
            means.append(float(drawn.mean()))
            errors.append(float(drawn.std() / 60**0.5))
        evidence = float(dist.Normal(0.2, (1 + 0.49) ** 0.5).log_prob(X).sum())
    for i in (0, 1):
        assert means[i + 1] - means[i] > 4 * (errors[i] ** 2 + errors[i + 1] ** 2) ** 0.5
    assert means[2] < evidence + 4 * errors[2]
    assert evidence - means[2] < 0.1


def test_importance_weighted_bound_of_a_global_site_is_that_of_all_rows_together() -> None:
    """K = 2 draws of one count: Σ over pairs of log ½ Σ_k p(x, k)/q(k)."""
    with isolated(6, F64):
        problem = problem_of("counts")
        objective = {"use": "importance_weighted", "num_samples": 2}
        _, found, bounds = gradients(problem, CALLS, objective=objective, num_particles=PARTICLES)
        leaves = {n: v.clone().requires_grad_() for n, v in problem.initial.items()}
        k = torch.arange(40, dtype=F64)
        log_q = dist.Poisson(leaves["mean"]).log_prob(k)
        log_w = dist.Poisson(leaves["rate"]).log_prob(k) - log_q
        log_w = log_w + dist.Normal(0.4 * k.unsqueeze(-1), 1.0).log_prob(X).sum(-1)
        pairs = torch.logaddexp(log_w.unsqueeze(-1), log_w) - math.log(2)
        bound = (log_q.exp().unsqueeze(-1) * log_q.exp() * pairs).sum()
        expected = torch.stack(torch.autograd.grad(bound, list(leaves.values())))
    assert_mean(found, expected)
    assert_mean(bounds, bound.detach())


def test_kl_weight_and_free_bits_change_the_gradient_and_not_the_bound() -> None:
    """β log-prior terms by hand on summed states; with free bits above the KL it has no gradient at all."""
    with isolated(7, F64):
        problem = problem_of("one_hot")
        _, plain, bound = gradients(problem, 1)
        _, weighted, same = gradients(problem, 1, kl_weight=0.25)
        _, free, still = gradients(problem, 1, free_bits=10.0)
        _, barely, _ = gradients(problem, 1, free_bits=1e-6)
        a = problem.initial["a"].clone().requires_grad_()
        q = torch.softmax(a, -1)
        kl = len(X) * (q * (q.log() - PRIOR.log())).sum()
        fit = (q * dist.Normal(LOC, 1.0).log_prob(X.unsqueeze(-1))).sum()
        expected = [torch.autograd.grad(fit - beta * kl, a, retain_graph=True)[0] for beta in (0.25, 0.0)]
    torch.testing.assert_close(same, bound, rtol=0, atol=0)
    torch.testing.assert_close(still, bound, rtol=0, atol=0)
    torch.testing.assert_close(weighted[0], expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(free[0], expected[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(barely, plain, rtol=1e-12, atol=0)


def state_above(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.4, dtype=F64)), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(1.5 * c - 1, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def state_above_guide(x: Tensor) -> None:
    odds = pyro.param("odds", torch.tensor(0.2, dtype=F64))
    shift = pyro.param("shift", torch.tensor(0.5, dtype=F64))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(logits=odds * x))
        pyro.sample("z", dist.Normal(0.3 * x + shift * c, 0.8))


def state_above_bound(values: Mapping[str, Tensor], samples: int) -> Tensor:
    """Quadrature over the draws below both states and over pairs of them: log w_k is E over the state."""
    assert samples == 2
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    e, p = torch.tensor(nodes, dtype=F64), torch.tensor(weights / weights.sum(), dtype=F64)
    total = torch.zeros((), dtype=F64)
    for x in X:
        own = []
        for c in (0, 1):
            log_q = torch.nn.functional.logsigmoid((2 * c - 1) * values["odds"] * x)
            mean = 0.3 * x + values["shift"] * c
            z = mean + 0.8 * e
            log_w = math.log(0.4 if c else 0.6) + dist.Normal(1.5 * c - 1.0, 1.0).log_prob(z)
            log_w = log_w + dist.Normal(z, 0.7).log_prob(x) - log_q - dist.Normal(mean, 0.8).log_prob(z)
            own.append(log_q.exp() * log_w)
        both, share = (own[0].unsqueeze(-1) + own[1]).flatten(), (p.unsqueeze(-1) * p).flatten()
        pairs = torch.logaddexp(both.unsqueeze(-1), both) - math.log(2)
        total = total + (pairs * share.unsqueeze(-1) * share).sum()
    return total


SETTINGS["state_above"] = (state_above, state_above_guide, state_above_bound)


def test_mean_importance_weighted_gradient_below_a_summed_state_equals_exact_gradient() -> None:
    with isolated(3, F64):
        problem = problem_of("state_above")
        objective = {"use": "importance_weighted", "num_samples": 2}
        _, found, bounds = gradients(problem, 40, num_particles=500, objective=objective)
        gradient, bound = exact("state_above", problem, 2)
    assert_mean(found, gradient)
    assert_mean(bounds, bound)


# -------------------------------------------------------------------------------------------------------- draws


def nested(x: Tensor) -> None:
    """A global k, a z⁽ⁿ⁾ a row and a v⁽ⁿ⁾ₜ in an inner plate."""
    k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Categorical(PRIOR))
        with pyro.plate("inner", 2, dim=-1):
            v = pyro.sample("v", dist.Bernoulli(torch.tensor(0.6, dtype=F64)))
            pyro.sample("x", dist.Normal(LOC[z] + v * SHIFT[k.long()] + v, 1.0), obs=x.unsqueeze(-1))


def nested_guide(x: Tensor) -> None:
    pyro.sample("k", dist.Bernoulli(logits=pyro.param("k0", torch.tensor(0.4, dtype=F64))))
    with pyro.plate("data", len(x), dim=-2):
        start = torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 1, 3)
        table = pyro.param("z0", start, event_dim=1)
        z = pyro.sample("z", dist.Categorical(logits=table))
        with pyro.plate("inner", 2, dim=-1):
            slope = pyro.param("v0", torch.linspace(-0.5, 0.5, 8, dtype=F64).reshape(4, 2), event_dim=0)
            pyro.sample("v", dist.Bernoulli(logits=slope * (z + 1)))


def nested_bound(values: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros((), dtype=F64)
    sign = torch.nn.functional.logsigmoid
    for k in (0, 1):
        log_k = sign((2 * k - 1) * values["k0"])
        inside = math.log(0.3 if k else 0.7) - log_k
        for n, x in enumerate(X):
            for z in range(3):
                log_z = torch.log_softmax(values["z0"][n, 0], -1)[z]
                row = PRIOR[z].log() - log_z
                for t in range(2):
                    for v in (0, 1):
                        log_v = sign((2 * v - 1) * values["v0"][n, t] * (z + 1))
                        own = math.log(0.6 if v else 0.4) - log_v
                        own = own + dist.Normal(LOC[z] + v * SHIFT[k] + v, 1.0).log_prob(x)
                        row = row + log_v.exp() * own
                inside = inside + log_z.exp() * row
        total = total + log_k.exp() * inside
    return total


SETTINGS["nested"] = (nested, nested_guide, nested_bound)


@pytest.mark.parametrize("baseline", ["leave_one_out", "learned"])
def test_mean_score_function_gradient_in_nested_plates_equals_exact_gradient(baseline: str) -> None:
    with isolated(8, F64):
        problem = problem_of("nested")
        _, found, bounds = gradients(problem, CALLS, num_particles=PARTICLES, estimator=score(baseline))
        gradient, bound = exact("nested", problem)
    assert_mean(found, gradient)
    assert_mean(bounds, bound)


def test_score_of_a_row_meets_the_terms_of_its_own_row_only() -> None:
    """The gradient of row 1's λ, draw by draw, does not move when the datum of row 2 does."""
    found = []
    for second in (2.0, -5.0):
        with isolated(9, F64):
            x = X.clone()
            x[2] = second
            problem = build_problem("fit", nested, {"x": x}, guide=nested_guide)
            objective = Objective(problem, SVIOptions(num_particles=3, estimator=score("none")))
            leaves = {n: v.clone().requires_grad_() for n, v in problem.initial.items()}
            estimate = objective(leaves, None, 0)
            found.append(torch.autograd.grad(estimate.surrogate, [leaves["z0"], leaves["v0"], leaves["k0"]]))
    for a, b in zip(found[0][:2], found[1][:2], strict=True):
        torch.testing.assert_close(a[[0, 1, 3]], b[[0, 1, 3]], rtol=0, atol=0)
        assert not torch.equal(a[2], b[2])
    assert not torch.equal(found[0][2], found[1][2])


def summed_above(x: Tensor) -> None:
    """A state that the guide leaves out chooses the prior of y, which is drawn."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(PRIOR), infer={"enumerate": "parallel"})
        y = pyro.sample("y", dist.Normal(LOC[a], 1.0))
        pyro.sample("x", dist.Normal(y, 0.5), obs=x)


def y_guide(x: Tensor) -> None:
    slope = pyro.param("m", torch.tensor(0.8, dtype=F64))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 0.4))


def chain_of_two(x: Tensor) -> None:
    """z2's prior depends on z1 through a weight that is 0 at the start."""
    weight = pyro.param("weight", torch.tensor(0.0, dtype=F64))
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
        z2 = pyro.sample("z2", dist.Normal(weight * z1, 1.0))
        pyro.sample("x", dist.Normal(z1 + z2, 1.0), obs=x)


def chain_of_two_guide(x: Tensor) -> None:
    width = pyro.param("width", torch.tensor(0.5, dtype=F64))
    with pyro.plate("data", len(x)):
        for name in ("z1", "z2"):
            pyro.sample(name, dist.Normal(0.3 * x, width))


def tried(model: Callable[..., None], guide: Callable[..., None], **options: Any) -> Objective:
    problem = build_problem("fit", model, {"x": X}, guide=guide)
    objective = Objective(problem, SVIOptions(**options))
    objective(problem.initial, None, 0)
    return objective


def test_kl_is_in_closed_form_only_where_the_prior_depends_on_no_draw_and_no_summed_site() -> None:
    with isolated(10, F64):
        assert tried(*SETTINGS["line"][:2]).analytic == {"z"}
        assert tried(chain_of_two, chain_of_two_guide).analytic == {"z1"}
        assert tried(summed_above, y_guide).analytic == set()
        assert tried(*SETTINGS["line"][:2], estimator="score_function").analytic == set()


def test_bound_of_draws_at_once_equals_that_of_draws_in_a_loop_with_a_summed_site() -> None:
    """Σ_a in closed form at each draw; the mean over draws at once and one at a time agree within their errors."""
    with isolated(11, F64):
        problem = build_problem("fit", summed_above, {"x": X}, guide=y_guide)
        found = {}
        for looped in ("", "asked for"):
            objective = Objective(problem, SVIOptions(num_particles=40))
            objective(problem.initial, None, 0)
            assert not objective.looped
            objective.looped = looped
            found[looped] = torch.stack([objective(problem.initial, None, 0).bound for _ in range(30)])
    a, b = found.values()
    assert abs(a.mean() - b.mean()) < 4 * ((a.var() + b.var()) / 30) ** 0.5


def mixes_draws(x: Tensor) -> None:
    """Takes the mean of all that it is given: right for one draw, silently wrong for several."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.2, dtype=F64), 1.0))
        pyro.sample("x", dist.Normal(z - z.mean() + 0.1 * z, 0.7), obs=x)


def takes_no_more(x: Tensor) -> None:
    """Raises for a latent with more axes than its data."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.2, dtype=F64), 1.0))
        pyro.sample("x", dist.Normal(torch.stack([z, x]).sum(0), 0.7), obs=x)


@pytest.mark.parametrize(
    ("model", "reason"), [(mixes_draws, "the terms of 'x' differ"), (takes_no_more, "with several at once")]
)
def test_draws_are_taken_in_a_loop_with_the_reason_where_a_model_cannot_take_several(
    model: Callable[..., None], reason: str
) -> None:
    with isolated(12, F64):
        objective = tried(model, line_guide, num_particles=3)
        assert reason in objective.looped and "3 draws in a loop" in objective.report()
        assert objective.analytic == set()
        many = torch.stack([objective(objective.problem.initial, None, 0).bound for _ in range(300)])
        single = Objective(objective.problem, SVIOptions())
        one = torch.stack([single(objective.problem.initial, None, 0).bound for _ in range(300)])
    assert abs(many.mean() - one.mean()) < 4 * ((many.var() + one.var()) / 300) ** 0.5
    assert many.var() < 0.6 * one.var()


def line_alone(x: Tensor) -> None:
    """`line`, that raises for a latent with more axes than its data."""
    mu = pyro.param("mu", torch.tensor(0.2, dtype=F64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(torch.stack([z, x])[0], 0.7), obs=x)


SETTINGS["line_alone"] = (line_alone, line_guide, line_bound)


@pytest.mark.parametrize("estimator", ["pathwise", score("leave_one_out")], ids=["pathwise", "score"])
def test_importance_weighted_gradient_of_draws_in_a_loop_equals_exact_gradient(estimator: Any) -> None:
    """K = 2 draws one after the other, two pairs a call, against a quadrature over the square."""
    with isolated(13, F64):
        problem = problem_of("line_alone")
        objective = {"use": "importance_weighted", "num_samples": 2}
        options: dict[str, Any] = {"objective": objective, "estimator": estimator, "num_particles": 2}
        _, found, bounds = gradients(problem, 300, looped=True, **options)
        gradient, bound = exact("line_alone", problem, 2)
    assert_mean(found, gradient)
    assert_mean(bounds, bound)


def test_report_of_an_importance_weighted_bound_says_whether_rows_are_tied() -> None:
    objective = {"use": "importance_weighted", "num_samples": 2}
    with isolated(14, F64):
        tied, free = (
            Objective(problem_of(name), SVIOptions(objective=objective)) for name in ("counts", "line")
        )
    assert tied.report().endswith("rows are tied: one weight for all of them together")
    assert "tied" not in free.report()


# --------------------------------------------------------------------------------------- choices and their errors


@pytest.mark.parametrize(
    ("setting", "options", "words"),
    [
        ("line", {"estimator": "enumeration"}, "its values cannot be enumerated"),
        ("line", {"estimator": "gumbel_softmax"}, "only discrete states are relaxed"),
        ("counts", {"estimator": "pathwise"}, "its draw has no derivative in λ"),
        ("two_causes", {"estimator": {"z": "gumbel_softmax"}}, "draw a OneHotCategorical"),
        ("two_causes", {"estimator": "pathwise"}, "the draw of a discrete state has no derivative"),
        ("two_causes", {"estimator": {"y": "score_function"}}, "sites of the guide (z, w)"),
        ("line", {"estimator": score("leave_one_out")}, "raise num_particles"),
        ("one_hot", {"estimator": "gumbel_softmax", "objective": "importance_weighted"}, "have none under q"),
        ("line", {"objective": "importance_weighted", "kl_weight": 0.5}, "no weight on a KL"),
        ("counts", {"objective": "importance_weighted", "batch_size": 2}, "k is drawn for all of them"),
    ],
)
def test_invalid_combination_is_refused_with_the_reason(
    setting: str, options: dict[str, Any], words: str
) -> None:
    model, guide, _ = SETTINGS[setting]
    with pytest.raises(InputError, match=re.escape(words)):
        lvmppl.fit(model, {"x": X}, algorithm="svi", guide=guide, max_steps=2, **options)


def test_history_is_the_elbo_whatever_the_weights_and_names_its_bound() -> None:
    """Step 0 stands at the same λ: a sum over states is the same with any β; the weighted one is logged beside it."""
    arguments: dict[str, Any] = {"algorithm": "svi", "guide": one_hot_table, "max_steps": 4}
    plain = lvmppl.fit(one_hot_cause, {"x": X}, **arguments).history
    bent = lvmppl.fit(one_hot_cause, {"x": X}, kl_weight={"start": 0.0, "steps": 4}, **arguments).history
    assert plain["objective"][0] == bent["objective"][0] and set(bent["objective_kind"]) == {"elbo"}
    assert bent["kl_weight"].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert bent["climbed"][0] > bent["objective"][0]
    arguments["guide"] = line_guide
    weighted = lvmppl.fit(
        line, {"x": X}, objective={"use": "importance_weighted", "num_samples": 3}, **arguments
    )
    assert set(weighted.history["objective_kind"]) == {"importance_weighted_3"}
    assert "3 draws at once" in weighted.estimators


@pytest.mark.parametrize("algorithm", ["svi", "vem"])
def test_score_function_fit_reaches_the_optimum_of_the_exact_elbo(algorithm: str) -> None:
    """q of one state a datum can be the posterior: the gap to the log evidence closes."""
    options: dict[str, Any] = {"max_steps": 800} if algorithm == "svi" else {"max_steps": 40}
    fit = lvmppl.fit(
        one_hot_cause,
        {"x": X},
        algorithm=algorithm,
        guide=categorical,
        estimator="score_function",
        num_particles=20,
        learning_rate=0.1,
        **options,
    )
    assert 0 <= fit.log_evidence - fit.elbo < 0.02
