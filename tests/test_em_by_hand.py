"""One EM step beside the textbook update in numpy (latents summed out by brute force), and EM in trouble."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import em_table_models  # noqa: F401  (adds its models to CASES)
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from em_models import CASES, ENUMERATE, mixture, points
from em_updates import UPDATES as MORE
from scipy import stats
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms import em_run
from lvmppl.algorithms.problem import build_problem
from lvmppl.density import isolated
from lvmppl.models.mixture import gaussian_mixture

Values = dict[str, np.ndarray]
Update = Callable[[Values, Values], Values]


def softmax(log_joint: np.ndarray) -> np.ndarray:
    """Posterior probabilities over the first axis."""
    top = np.exp(log_joint - log_joint.max(0))
    return top / top.sum(0)


def two_causes(p: Values, d: Values) -> Values:
    x = d["x"]
    prior = np.log(p["first"])[:, None] + np.log(p["second"])
    q = prior[..., None] + stats.norm.logpdf(x, p["loc"][..., None], p["scale"])
    q = softmax(q.reshape(6, -1)).reshape(3, 2, -1)
    n = q.sum(-1)
    loc = (q @ x) / n
    spread = (q * (x - loc[..., None]) ** 2).sum() / len(x)
    return {
        "first": n.sum(1) / n.sum(),
        "second": n / n.sum(1, keepdims=True),
        "loc": loc,
        "scale": np.sqrt(spread),
    }


def poisson_and_normal(p: Values, d: Values) -> Values:
    x, y = d["x"], d["y"]
    log_joint = np.log(p["weights"])[:, None] + stats.poisson.logpmf(x, p["rate"][:, None])
    normal = stats.norm.logpdf(y, p["loc"][:, None], np.sqrt(p["variance"])[:, None, None])
    q = softmax(log_joint + normal.sum(-1))
    n = q.sum(1)
    loc = q @ y / n[:, None]
    squares = ((y - loc[:, None]) ** 2).sum(-1)
    return {
        "weights": n / len(x),
        "rate": q @ x / n,
        "loc": loc,
        "variance": (q * squares).sum(1) / n / y.shape[1],
    }


def products_of_bernoullis(p: Values, d: Values) -> Values:
    x = d["x"]
    q = softmax(np.log(p["weights"])[:, None] + stats.bernoulli.logpmf(x, p["chance"][:, None]).sum(-1))
    return {"weights": q.mean(1), "chance": q @ x / q.sum(1)[:, None]}


def bags_of_words(p: Values, d: Values) -> Values:
    counts = (d["x"][..., None] == np.arange(5)).sum(1)
    q = softmax(np.log(p["weights"])[:, None] + np.log(p["words"]) @ counts.T)
    words = q @ counts
    return {"weights": q.mean(1), "words": words / words.sum(1, keepdims=True)}


def shared_between_sites(p: Values, d: Values) -> Values:
    pair = np.stack([d["x"][:, 0], d["x"][:, 1] + 0.3])
    density = stats.norm.logpdf(pair, p["loc"][:, None, None], p["scale"][:, None, None]).sum(1)
    q = softmax(np.log(p["weights"])[:, None] + density)
    n = 2 * q.sum(1)
    loc = np.einsum("kn,sn->k", q, pair) / n
    squares = np.einsum("kn,ksn->k", q, (pair - loc[:, None, None]) ** 2)
    return {"weights": q.mean(1), "loc": loc, "scale": np.sqrt(squares / n)}


def chain_counts(
    initial: np.ndarray, transition: np.ndarray, emission: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expected first states, steps and emissions, over all paths."""
    paths = np.array(list(itertools.product(range(len(initial)), repeat=x.shape[1])))
    with np.errstate(divide="ignore"):
        log_prior = np.log(initial[paths[:, 0]]) + np.log(transition[paths[:, :-1], paths[:, 1:]]).sum(1)
        q = softmax(log_prior[:, None] + np.log(emission[paths[:, None], x[None]]).sum(-1))
    first, steps, emitted = np.zeros_like(initial), np.zeros_like(transition), np.zeros_like(emission)
    np.add.at(first, paths[:, 0], q.sum(1))
    for t in range(x.shape[1]):
        if t:
            np.add.at(steps, (paths[:, t - 1], paths[:, t]), q.sum(1))
        for n in range(len(x)):
            np.add.at(emitted, (paths[:, t], x[n, t]), q[:, n])
    return first, steps, emitted


def rows(counts: np.ndarray) -> np.ndarray:
    return counts / counts.sum(-1, keepdims=True)


def markov(p: Values, d: Values) -> Values:
    first, steps, emitted = chain_counts(p["initial"], p["transition"], p["emission"], d["x"])
    return {"initial": rows(first), "transition": rows(steps), "emission": rows(emitted)}


def symmetric_table(p: Values, d: Values) -> Values:
    transition = np.stack([p["flip"], p["flip"][::-1]])
    _, steps, emitted = chain_counts(np.array([0.5, 0.5]), transition, p["emission"], d["x"])
    return {"flip": rows(steps[0] + steps[1][::-1]), "emission": rows(emitted)}


def left_to_right(p: Values, d: Values) -> Values:
    transition = np.zeros((3, 3))
    transition[0, :2], transition[1, 1:], transition[2, 2] = *p["step"], 1.0
    initial = torch.tensor([0.6, 0.3, 0.1]).double().numpy()
    _, steps, emitted = chain_counts(initial, transition, p["emission"], d["x"])
    return {"step": rows(np.stack([steps[0, :2], steps[1, 1:]])), "emission": rows(emitted)}


UPDATES: list[Update] = [
    two_causes,
    poisson_and_normal,
    products_of_bernoullis,
    bags_of_words,
    shared_between_sites,
    markov,
    symmetric_table,
    left_to_right,
]


@pytest.mark.parametrize("update", [*UPDATES, *MORE], ids=lambda u: u.__name__)
def test_em_step_equals_the_textbook_update(update: Update) -> None:
    case = CASES[update.__name__]
    data = case.data()
    start = build_problem("start", case.model, data).initial
    expected = update(
        {k: v.detach().numpy() for k, v in start.items()}, {k: v.numpy() for k, v in data.items()}
    )
    fit = lvmppl.fit(case.model, data, algorithm="em", max_steps=1, tolerance=0)
    assert set(expected) == case.closed == {s.parameter for s in fit.m_step if s.how == "closed-form"}
    for name, value in expected.items():
        np.testing.assert_allclose(fit.parameters[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
        assert not np.allclose(start[name].detach(), value, rtol=1e-4), name


# ------------------------------------------------------------------------------------------------------ trouble


def test_emptied_component_equals_its_start_with_weight_0() -> None:
    model = functools.partial(mixture, locs=(-1.0, 1.0, 1e4), variances=(1.0, 1.0, 1.0))
    fit = lvmppl.fit(model, {"x": points()}, algorithm="em", max_steps=30, tolerance=0)
    assert fit.history["objective"].diff().min() >= -1e-9 * abs(fit.log_evidence)
    assert float(fit.parameters["weights"][2]) == 0.0
    assert float(fit.parameters["loc"][2]) == 1e4
    without = functools.partial(mixture, locs=(-1.0, 1.0), variances=(1.0, 1.0))
    two = lvmppl.fit(without, {"x": points()}, algorithm="em", max_steps=30, tolerance=0)
    torch.testing.assert_close(fit.parameters["loc"][:2], two.parameters["loc"], rtol=1e-10, atol=0)


def test_collapsing_variance_equals_its_floor() -> None:
    x = points()
    model = functools.partial(mixture, locs=(0.5, 0.6), variances=(1e-3, 3.0))
    fit = lvmppl.fit(model, {"x": x}, algorithm="em", max_steps=200, tolerance=1e-10)
    floor = torch.finfo(torch.float64).eps ** (2 / 3) * float(x.var(correction=0))
    assert float(fit.parameters["variance"][0]) == pytest.approx(floor, rel=1e-6)
    assert "variance" in fit.message and "floor" in fit.message
    assert fit.status == "converged"
    assert fit.history["objective"].diff().min() >= -1e-9 * abs(fit.log_evidence)


@pytest.mark.parametrize("last", ["sum", "still", "few"])
@pytest.mark.parametrize("seed", [0, 4, 7])
def test_singular_covariance_has_its_smallest_direction_at_the_floor(last: str, seed: int) -> None:
    """A coordinate that is the sum of two others, one that never varies, and a component of fewer rows than dimensions."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    b = torch.randn(25, 6, generator=generator, dtype=torch.float64)
    x = {
        "sum": torch.cat([a, a.sum(1, keepdim=True)], 1),
        "still": torch.cat([a, torch.ones_like(a[:, :1])], 1),
    }
    model = functools.partial(gaussian_mixture, num_components=4 if last == "few" else 2)
    options = {"algorithm": "em", "init": "random", "seed": seed, "max_steps": 60}
    fit = lvmppl.fit(model, {"x": x.get(last, b)}, **options)
    assert fit.status != "diverged", fit.message
    assert "covariance" in fit.message and "floor" in fit.message
    data = x.get(last, b)
    spread = data.var(0, correction=0)
    spread = torch.where(spread > 1e-20, spread, spread.sum() / (spread > 1e-20).sum()).sqrt()
    scaled = fit.parameters["covariance"] / (spread[:, None] * spread)
    smallest = torch.linalg.eigvalsh(scaled).min()
    assert float(smallest) == pytest.approx(torch.finfo(torch.float64).eps ** 0.5, rel=1e-4)


def test_component_close_to_collapsing_is_named_with_the_ratio_of_its_variance() -> None:
    x = points()
    model = functools.partial(mixture, locs=(0.5, 0.6), variances=(1e-3, 3.0))
    fit = lvmppl.fit(model, {"x": x}, algorithm="em", max_steps=2, tolerance=0)
    narrow = float(fit.parameters["variance"].min() / x.var(correction=0))
    assert narrow < 1e-4 and f"{narrow:.1e}" in fit.message and "nearly collapsed" in fit.message
    wide = functools.partial(mixture, locs=(-1.0, 1.0), variances=(1.0, 1.0))
    assert lvmppl.fit(wide, {"x": x}, algorithm="em", max_steps=2, tolerance=0).message == ""


def test_logit_of_a_column_of_ones_lies_at_infinity_and_says_so() -> None:
    def model(x: Tensor) -> None:
        logit = pyro.param("logit", torch.zeros(3, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=logit).to_event(1), obs=x)

    x = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    fit = lvmppl.fit(model, {"x": x}, algorithm="em")
    torch.testing.assert_close(torch.sigmoid(fit.parameters["logit"]), x.mean(0))
    assert "logit lies at infinity" in fit.message
    assert fit.log_evidence == pytest.approx(2 * (np.log(1 / 3) + 2 * np.log(2 / 3)))


def test_probability_on_its_boundary_equals_the_frequency() -> None:
    def model(x: Tensor) -> None:
        chance = pyro.param(
            "chance",
            torch.tensor([[0.6, 0.3, 0.5], [0.4, 0.8, 0.5]]).double(),
            constraint=constraints.unit_interval,
        )
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2).double() / 2), infer=ENUMERATE)
            pyro.sample("x", dist.Bernoulli(chance[z]).to_event(1), obs=x)

    x = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1]]).double()
    fit = lvmppl.fit(model, {"x": x}, algorithm="em", max_steps=20, tolerance=0)
    torch.testing.assert_close(fit.parameters["chance"][:, [0, 2]], torch.ones(2, 2).double(), rtol=0, atol=0)
    assert np.isfinite(fit.log_evidence)
    assert fit.status == "max_steps"
    assert fit.history["objective"].diff().min() >= -1e-9 * abs(fit.log_evidence)


def test_tied_components_equal_a_single_normal() -> None:
    """A start that does not tell components apart is a saddle: EM stays on it."""
    x = points()
    model = functools.partial(mixture, locs=(0.7, 0.7), variances=(2.0, 2.0))
    fit = lvmppl.fit(model, {"x": x}, algorithm="em", max_steps=20)
    single = stats.norm.logpdf(x.numpy(), x.mean(), x.std(correction=0)).sum()
    assert fit.log_evidence == pytest.approx(single, rel=1e-12)
    assert fit.status == "converged"


def test_fall_of_log_evidence_ends_the_fit_and_names_step_and_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = itertools.count(1)
    solve = em_run.solve_closed

    def faulty(*args: Any) -> Any:
        values, floored = solve(*args)
        return ({**values, "loc": values["loc"] + 5.0} if next(calls) == 3 else values), floored

    monkeypatch.setattr(em_run, "solve_closed", faulty)
    model = functools.partial(mixture, locs=(-1.0, 1.0), variances=(1.0, 1.0))
    fit = lvmppl.fit(model, {"x": points()}, algorithm="em", max_steps=9, tolerance=0)
    assert fit.status == "diverged"
    assert "at step 3" in fit.message and fit.message.endswith("which updated loc")
    assert fit.log_evidence == pytest.approx(fit.history["objective"].max(), rel=1e-12)


def test_clamp_that_acts_on_the_way_leaves_em_monotone() -> None:
    """The lookup holds at the start and is false later: the fit goes on by gradient."""

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2).double() / 2, constraint=constraints.simplex)
        rate = pyro.param("rate", torch.tensor([3.0, 5.0]).double(), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
            held = rate.clamp(max=7.0)
            pyro.sample("x", dist.Poisson(held[z]), obs=x)
            pyro.sample("y", dist.Poisson(rate[z]), obs=x + 2)

    x = torch.tensor([1, 2, 0, 9, 11, 8, 3, 10, 2, 9]).double()
    fit = lvmppl.fit(model, {"x": x}, algorithm="em", max_steps=60, tolerance=1e-11)
    assert fit.history["objective"].diff().min() >= -1e-9 * abs(fit.log_evidence)
    assert fit.history["objective"].iloc[-1] == pytest.approx(fit.log_evidence, rel=1e-12)
    assert {s.parameter: s.how for s in fit.m_step}["rate"] == "gradient"


def test_log_evidence_of_a_full_mixture_in_single_precision_equals_that_in_double() -> None:
    x = torch.as_tensor(np.random.default_rng(5).normal(size=(200, 3)))
    model = functools.partial(gaussian_mixture, num_components=2, covariance="full")
    found = [
        lvmppl.fit(model, {"x": x.to(t)}, algorithm="em", max_steps=15, tolerance=0)
        for t in (torch.float32, torch.float64)
    ]
    assert [f.status for f in found] == ["max_steps", "max_steps"]
    assert found[0].log_evidence == pytest.approx(found[1].log_evidence, rel=1e-4)


def test_start_is_a_function_of_the_seed() -> None:
    model = functools.partial(mixture, locs=(-1.0, 1.0), variances=(1.0, 1.0))
    with isolated(3):
        one, two, other = (
            lvmppl.fit(model, {"x": points()}, algorithm="em", init="random", max_steps=3, seed=s)
            for s in (4, 4, 6)
        )
    assert one.log_evidence == two.log_evidence != other.log_evidence
