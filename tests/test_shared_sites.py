"""Enumerated sites outside of the data plate over continuous sites within it, beside sums over their states."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from scipy import integrate, stats
from torch import Tensor

import lvmppl

ENUMERATED = {"enumerate": "parallel"}
PICK = np.array([0.2, 0.5, 0.3])
KIND = np.array([[0.9, 0.1], [0.4, 0.6], [0.25, 0.75]])  # [pick, kind]
OWN = np.array([[0.3, 0.7], [0.8, 0.2]])  # [kind, c]
SHIFT = np.array([-0.8, 0.3, 1.2])
LOC = np.array([-0.5, 0.9])
X = np.array([0.0, 3.0, 1.0, 5.0])


def tensor(value: Any) -> Tensor:
    return torch.as_tensor(np.asarray(value, dtype=float))


def categorical(name: str, table: Any) -> Tensor:
    found: Tensor = pyro.sample(name, dist.Categorical(tensor(table)), infer=ENUMERATED)
    return found


def model(x: Tensor, likelihood: str, scale: float = 1.0) -> None:
    """pick → kind → c_n; z_n ~ N(loc[c_n] · slope, 0.7²); x_n around z_n + shift[pick]; y seen once, of kind."""
    slope = pyro.param("slope", torch.tensor(1.0))
    pick = categorical("pick", PICK)
    kind = pyro.sample("kind", dist.Categorical(tensor(KIND)[pick]), infer=ENUMERATED)
    pyro.sample("y", dist.Normal(tensor(LOC)[kind], 1.5), obs=torch.tensor(0.4))
    with pyro.plate("data", len(x)), poutine.scale(scale=scale):
        c = pyro.sample("c", dist.Categorical(tensor(OWN)[kind]), infer=ENUMERATED)
        z = pyro.sample("z", dist.Normal(tensor(LOC)[c] * slope, 0.7))
        if likelihood == "poisson":
            pyro.sample("x", dist.Poisson((z + tensor(SHIFT)[pick]).exp()), obs=x)
        else:
            pyro.sample("x", dist.Normal(z + tensor(SHIFT)[pick], 0.6), obs=x)


class Table:
    """p(pick, kind) and p(c_n, z_n | pick, kind, x_n) by quadrature over each z_n, one configuration at a time."""

    def __init__(self, x: np.ndarray, likelihood: str, scale: float = 1.0) -> None:
        self.x, self.likelihood = x, likelihood
        z = np.linspace(-6.0, 6.0, 4001)  # the trapezoidal rule is exact to rounding for analytic densities
        evidence = np.zeros((3, 2, len(x), 2))
        mean, log_joint = np.zeros_like(evidence), np.zeros_like(evidence)
        for g in itertools.product(range(3), range(2), range(len(x)), range(2)):
            values = np.maximum(self.joint(*g, z), 1e-300)
            evidence[g] = integrate.trapezoid(values, z)
            mean[g] = integrate.trapezoid(z * values, z) / evidence[g]
            log_joint[g] = integrate.trapezoid(values * np.log(values), z) / evidence[g]
        rows = np.log(evidence.sum(-1))
        seen = stats.norm(LOC, 1.5).logpdf(0.4)
        table = np.log(PICK)[:, None] + np.log(KIND) + seen + scale * rows.sum(-1)
        self.log_evidence = float(np.logaddexp.reduce(table, axis=None))
        self.shared = np.exp(table - self.log_evidence)
        self.given = evidence / evidence.sum(-1, keepdims=True)  # [pick, kind, N, c]
        self.mean, self.rows = mean, rows
        self.inner = np.log(evidence) - log_joint  # entropy of z_n given all else

    def joint(self, pick: int, kind: int, n: int, c: int, z: Any) -> Any:
        """p(x_n, z_n, c_n | pick, kind)."""
        own = OWN[kind, c] * stats.norm(LOC[c], 0.7).pdf(z)
        if self.likelihood == "poisson":
            return own * stats.poisson(np.exp(z + SHIFT[pick])).pmf(self.x[n])
        return own * stats.norm(z + SHIFT[pick], 0.6).pdf(self.x[n])

    def log_prob(self, draw: Mapping[str, Any]) -> float:
        """log p(pick, kind, c, z | x) without a scale, of one draw."""
        g = int(draw["pick"]), int(draw["kind"])
        total = math.log(self.shared[g])
        for n in range(len(self.x)):
            given = self.joint(*g, n, int(draw["c"][n]), float(draw["z"][n]))
            total += math.log(given) - self.rows[(*g, n)]
        return total


@functools.lru_cache
def table(likelihood: str, scale: float = 1.0) -> Table:
    return Table(X, likelihood, scale)


@pytest.mark.parametrize("likelihood", ["normal", "poisson"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_evidence_and_marginals_equal_sums_over_shared_states(likelihood: str, scale: float) -> None:
    expected = table(likelihood, scale)
    post = lvmppl.posterior(lambda x: model(x, likelihood, scale), {"x": tensor(X)})
    assert post.kind == ("exact" if likelihood == "normal" else "quadrature")
    assert post.log_evidence == pytest.approx(expected.log_evidence, rel=1e-8)
    assert abs(post.log_evidence - expected.log_evidence) <= post.log_evidence_error + 1e-10
    assert post.log_evidence_per_datum is None
    shared, close = expected.shared, functools.partial(np.testing.assert_allclose, rtol=1e-6)
    close(post.probabilities("pick"), shared.sum(1))
    close(post.marginal("kind").probs, shared.sum(0))
    close(post.pair_marginal("pick", "kind"), shared)
    joint = shared[:, :, None, None] * expected.given  # [pick, kind, N, c]
    close(post.probabilities("c"), joint.sum((0, 1)))
    close(post.pair_marginal("kind", "c"), joint.sum(0).transpose(1, 0, 2))
    close(post.moments("z")[0], (joint * expected.mean).sum((0, 1, 3)))
    close(post.marginal("z").mean.reshape(-1), (joint * expected.mean).sum((0, 1, 3)))
    weights = joint.sum((1, 3))  # [pick, N]
    given_pick = (joint * expected.mean).sum((1, 3)) / weights
    close(post.pair_marginal("pick", "z").mean.reshape(4, 3), given_pick.T)
    states = -(expected.given * np.log(expected.given)).sum(-1).sum(-1)
    inner = (expected.given * expected.inner).sum((-1, -2))
    assert float(post.entropy()) == pytest.approx(
        (shared * (states + inner - np.log(shared))).sum(), rel=1e-6
    )
    frame = post.to_frame()
    assert frame.query("site == 'pick'")["datum"].isna().all() and len(frame) == 3 + 2 + 4 * 2 + 4


@pytest.mark.parametrize("likelihood", ["normal", "poisson"])
def test_samples_mode_and_log_prob_agree_with_sums_over_shared_states(likelihood: str) -> None:
    expected = table(likelihood)
    post = lvmppl.posterior(lambda x: model(x, likelihood), {"x": tensor(X)})
    draws = post.sample(4000, seed=1)
    assert draws["z"].shape == (4000, 4) and draws["pick"].shape == (4000,)
    counts = np.bincount((draws["pick"] * 2 + draws["kind"]).numpy(), minlength=6)
    assert stats.chisquare(counts, 4000 * expected.shared.flatten()).pvalue > 1e-3
    together = np.bincount(
        (draws["pick"] * 2 + draws["c"][:, 1]).numpy(), minlength=6
    )  # one draw is one joint state
    joint = (expected.shared[:, :, None] * expected.given[:, :, 1]).sum(1)
    assert stats.chisquare(together, 4000 * joint.flatten()).pvalue > 1e-3
    few = {k: v[:6] for k, v in draws.items()}
    each = [expected.log_prob({k: v[i] for k, v in few.items()}) for i in range(6)]
    np.testing.assert_allclose(post.log_prob(few), each, rtol=1e-6)
    best = post.mode()
    assert float(best.log_prob) == pytest.approx(expected.log_prob(best.states), rel=1e-6)
    assert bool((best.log_prob >= post.log_prob(draws) - 1e-9).all())
    np.testing.assert_allclose(post.log_prob(best.states), best.log_prob, rtol=1e-6)


@pytest.mark.parametrize(
    ("likelihood", "algorithm"), [("normal", "em"), ("normal", "enumeration"), ("poisson", "enumeration")]
)
def test_fit_stands_where_the_difference_quotient_of_log_evidence_vanishes(
    likelihood: str, algorithm: str
) -> None:
    run: Callable[..., Any] = functools.partial(model, likelihood=likelihood)
    fit = lvmppl.fit(run, {"x": tensor(X)}, algorithm=algorithm, tolerance=1e-9, max_steps=100)
    lower, here, upper = (
        lvmppl.posterior(run, {"x": tensor(X)}, {"slope": fit.parameters["slope"] + h}).log_evidence
        for h in (-1e-2, 0.0, 1e-2)
    )
    assert here > max(lower, upper)
    assert abs(upper - lower) < 2e-2 * abs(lower + upper - 2 * here)  # within 0.01 of a step of 0.01


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), states=st.integers(1, 4), sd=st.floats(0.2, 3.0), seed=st.integers(0, 999))
def test_log_evidence_of_gaussian_rows_equals_the_normals_sum(
    rows: int, states: int, sd: float, seed: int
) -> None:
    """log Σ_k p(k) Π_n N(x_n; m_k, s_k² + sd²), also of one row and of one state."""
    rng = np.random.default_rng(seed)
    weights, loc, spread = (
        rng.dirichlet(np.ones(states)),
        rng.normal(size=states),
        rng.uniform(0.3, 2, states),
    )
    x = rng.normal(size=rows)

    def own(x: Tensor) -> None:
        k = categorical("k", weights)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(tensor(loc)[k], tensor(spread)[k]))
            pyro.sample("x", dist.Normal(z, sd), obs=x)

    terms = [
        math.log(w) + stats.norm(m, math.hypot(s, sd)).logpdf(x).sum()
        for w, m, s in zip(weights, loc, spread, strict=True)
    ]
    post = lvmppl.posterior(own, {"x": tensor(x)})
    assert post.kind == "exact"
    assert post.log_evidence == pytest.approx(float(np.logaddexp.reduce(terms)), rel=1e-10, abs=1e-10)
    np.testing.assert_allclose(
        post.probabilities("k"), np.exp(terms - np.logaddexp.reduce(terms)), rtol=1e-8, atol=1e-12
    )


def test_impossible_rows_beneath_shared_sites_are_named() -> None:
    def own(x: Tensor) -> None:
        k = categorical("k", [0.4, 0.6])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(tensor([2.0, 3.0])[k], 2.0))
            pyro.sample("x", dist.Binomial(3, z), obs=x)

    with pytest.warns(UserWarning, match=r"probability 0 to datum 1"):
        post = lvmppl.posterior(own, {"x": tensor([1.0, 4.0, 2.0])})
    assert post.log_evidence == -math.inf
