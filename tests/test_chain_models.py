"""Random models with latent Markov chains, against the sum over every path of every sequence."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_models import Array, log_sum_exp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyro import poutine
from pyro.ops.indexing import Vindex
from scipy.stats import chi2
from torch import Tensor

import lvmppl
from lvmppl.distributions import MarkovChain
from lvmppl.posteriors import Posterior

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
EXAMPLES = {"derandomize": True, "deadline": None, "database": None}
LARGEST = 700  # paths of one sequence
SYMBOLS, CLASSES = 3, 2


@dataclass(frozen=True)
class Chains:
    """B sequences of T steps, K states: initial [C, K], transition [C, B|1, T-1|1, K, K], emission [C, K, V].

    where: the class site c stands in the data plate (`local`), outside (`global`), or there is none. x [S, B, T]: S
    sensors see every step.
    """

    x: NDArray[np.int64]
    lengths: NDArray[np.int64] | None
    prior: Array
    initial: Array
    transition: Array
    emission: Array
    where: str
    scale: float
    mask: NDArray[np.bool_] | None

    def steps(self, row: int) -> int:
        return self.x.shape[2] if self.lengths is None else int(self.lengths[row])


@st.composite
def chains(draw: Any) -> Chains:
    states = draw(st.integers(1, 5))
    steps = draw(st.integers(1, 5))
    while states**steps > LARGEST:
        steps -= 1
    rows, sensors = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    zeros = draw(st.booleans())

    def rows_of(*shape: int) -> Array:
        table = rng.gamma(0.7, size=shape) + 1e-3
        if zeros and shape[-1] > 1:
            table[..., 0] *= rng.random(shape[:-1]) < 0.7
        return table / table.sum(-1, keepdims=True)

    by_row = rows if draw(st.booleans()) else 1
    by_step = steps - 1 if steps > 1 and draw(st.booleans()) else 1
    return Chains(
        rng.integers(0, SYMBOLS, (sensors, rows, steps)),
        rng.integers(1, steps + 1, rows) if draw(st.booleans()) else None,
        rows_of(CLASSES),
        rows_of(CLASSES, states),
        rows_of(CLASSES, by_row, by_step, states, states),
        rows_of(CLASSES, states, SYMBOLS),
        draw(st.sampled_from(["none", "local", "global"])),
        draw(st.sampled_from([1.0, 0.5, 3.0])),
        rng.random(rows) < 0.7 if draw(st.booleans()) else None,
    )


def model_of(chains: Chains) -> Callable[..., None]:
    sensors, rows, steps = chains.x.shape
    initial, transition, emission, prior = (
        torch.tensor(t) for t in (chains.initial, chains.transition, chains.emission, chains.prior)
    )
    lengths = None if chains.lengths is None else torch.tensor(chains.lengths)
    seen = torch.ones(rows, steps, dtype=torch.bool)
    if lengths is not None:
        seen = torch.arange(steps) < lengths.unsqueeze(-1)
    if chains.mask is not None:
        seen = seen & torch.tensor(chains.mask).unsqueeze(-1)

    def model(x: Tensor) -> None:
        c: Any = torch.tensor(0)
        enumerate_ = {"enumerate": "parallel"}
        if chains.where == "global":
            c = pyro.sample("c", dist.Categorical(prior), infer=enumerate_)
        with pyro.plate("data", len(x), dim=-1), poutine.scale(scale=chains.scale):
            if chains.where == "local":
                c = pyro.sample("c", dist.Categorical(prior), infer=enumerate_)
            row = torch.arange(rows) if transition.shape[1] > 1 else torch.tensor(0)
            moves = Vindex(transition)[c, row]
            z = pyro.sample("z", MarkovChain(initial[c], moves, steps, lengths), infer=enumerate_)
            with pyro.plate("sensors", sensors, dim=-2):
                fn = dist.Categorical(Vindex(emission)[c.unsqueeze(-1), z])
                pyro.sample("x", fn.mask(seen).to_event(1), obs=x.transpose(0, 1))

    return model


@dataclass(frozen=True)
class Paths:
    """log p(z, x | c) of every path of every row: by row [C, K, …, K]; log p(c | x) [C] or by row; log p(x)."""

    joint: list[Array]
    evidence: float
    classes: list[Array]

    def given(self, row: int) -> Array:
        """p(z | c, x), zero under an impossible class."""
        joint = self.joint[row]
        norm = log_sum_exp(joint, tuple(range(1, joint.ndim)))
        return np.where(np.isfinite(norm), np.exp(joint - np.where(np.isfinite(norm), norm, 0.0)), 0.0)

    def both(self, row: int) -> Array:
        """p(c, z | x) of one row."""
        weight = np.exp(self.classes[row])
        return weight.reshape(-1, *[1] * (self.joint[row].ndim - 1)) * self.given(row)


def paths_of(chains: Chains) -> Paths:
    sensors, rows, _ = chains.x.shape
    classes = CLASSES if chains.where != "none" else 1
    joints, states = [], chains.initial.shape[1]
    with np.errstate(divide="ignore"):
        initial, transition, emission, prior = (
            np.log(t) for t in (chains.initial, chains.transition, chains.emission, chains.prior)
        )
    for row in range(rows):
        steps = chains.steps(row)
        joint = np.full((classes, *[states] * steps), -np.inf)
        own = transition[:, min(row, transition.shape[1] - 1)]
        for c, *z in itertools.product(range(classes), *[range(states)] * steps):
            value = initial[c, z[0]]
            for t, (i, j) in enumerate(itertools.pairwise(z)):
                value += own[c, min(t, own.shape[1] - 1), i, j]
            if chains.mask is None or chains.mask[row]:
                value += sum(
                    emission[c, k, chains.x[s, row, t]] for t, k in enumerate(z) for s in range(sensors)
                )
            joint[(c, *z)] = value
        joints.append(joint)
    sums = np.stack([log_sum_exp(j, tuple(range(1, j.ndim))).reshape(-1) for j in joints])  # [B, C]
    weights = prior if chains.where != "none" else np.zeros(1)
    if chains.where == "global":
        total = weights + chains.scale * sums.sum(0)
        evidence = float(log_sum_exp(total, (0,)).squeeze())
        return Paths(joints, evidence, [total - evidence] * rows)
    each = log_sum_exp(weights + sums, (1,))
    return Paths(joints, chains.scale * float(each.sum()), list(weights + sums - each))


def posterior_of(chains: Chains) -> Posterior:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "log evidence is -inf")
        found = lvmppl.posterior(model_of(chains), {"x": torch.tensor(chains.x).transpose(0, 1)})
    assert isinstance(found, Posterior)
    return found


def axis_marginal(table: Array, *axes: int) -> Array:
    return table.sum(axis=tuple(i for i in range(table.ndim) if i not in axes))


@np.errstate(invalid="ignore")
@settings(max_examples=200, **EXAMPLES)
@given(chains())
def test_posterior_of_random_chains_equals_sum_over_paths(chains: Chains) -> None:
    paths, found = paths_of(chains), posterior_of(chains)
    if paths.evidence == -np.inf:
        assert found.log_evidence == -np.inf
        return
    np.testing.assert_allclose(found.log_evidence, paths.evidence, **CLOSE)
    rows, most, entropy, log_mode = chains.x.shape[1], chains.x.shape[2], 0.0, 0.0
    coupled = chains.where == "global"
    if chains.where != "none":
        classes = np.exp(np.stack(paths.classes))
        np.testing.assert_allclose(found.probabilities("c"), classes[0] if coupled else classes, **CLOSE)
    pairs = found.pair_marginal("z")
    mixed = None if chains.where == "none" else found.pair_marginal("c", "z")
    for row in range(rows):
        both, steps = paths.both(row), chains.steps(row)
        unary = found.probabilities("z")[row]
        for t in range(steps):
            np.testing.assert_allclose(unary[t], axis_marginal(both, t + 1), **CLOSE)
            if mixed is not None:
                np.testing.assert_allclose(mixed[row, t], axis_marginal(both, 0, t + 1), **CLOSE)
            if t + 1 < steps:
                np.testing.assert_allclose(pairs[row, t], axis_marginal(both, t + 1, t + 2), **CLOSE)
        assert not bool(unary[steps:].any())
        assert not bool(pairs[row, max(steps - 1, 0) :].any()) or steps == most
        given_class = paths.given(row)
        inner = -np.where(
            given_class > 0, given_class * np.log(np.where(given_class > 0, given_class, 1)), 0.0
        )
        weight = np.exp(paths.classes[row])
        entropy += float((weight * inner.reshape(len(weight), -1).sum(1)).sum())
        if not coupled or row == 0:
            entropy -= float((weight * np.where(weight > 0, paths.classes[row], 0.0)).sum())
    best = np.stack([paths.given(row).reshape(len(paths.classes[row]), -1).max(1) for row in range(rows)])
    with np.errstate(divide="ignore"):
        if coupled:
            log_mode = float((paths.classes[0] + np.log(best).sum(0)).max())
        else:
            log_mode = float((np.stack(paths.classes) + np.log(best)).max(1).sum())
    np.testing.assert_allclose(found.entropy().sum(), entropy, **CLOSE)
    mode = found.mode()
    np.testing.assert_allclose(mode.log_prob.sum(), log_mode, **CLOSE)
    np.testing.assert_allclose(found.log_prob(mode.states).sum(), log_mode, **CLOSE)
    np.testing.assert_allclose(_log_prob(chains, paths, mode.states), log_mode, **CLOSE)


def _log_prob(chains: Chains, paths: Paths, states: dict[str, Tensor]) -> float:
    """log p(c, z | x) of the states, read from the tables."""
    total, coupled = 0.0, chains.where == "global"
    for row in range(chains.x.shape[1]):
        c = 0 if chains.where == "none" else int(states["c"] if coupled else states["c"][row])
        z = states["z"][row, : chains.steps(row)].tolist()
        total += float(np.log(paths.given(row)[(c, *z)]))
        if not coupled or row == 0:
            total += float(paths.classes[row][c])
    return total


@np.errstate(invalid="ignore")
@settings(max_examples=30, **EXAMPLES)
@given(chains())
def test_samples_of_random_chains_have_the_frequencies_of_the_paths(chains: Chains) -> None:
    paths, found, size = paths_of(chains), posterior_of(chains), 3000
    if paths.evidence == -np.inf:
        return
    draws = found.sample(size, seed=3)
    for row in range(chains.x.shape[1]):
        both, z = paths.both(row), draws["z"][:, row, : chains.steps(row)].numpy()
        c = np.zeros(size, dtype=int)
        if chains.where != "none":
            c = (draws["c"] if chains.where == "global" else draws["c"][:, row]).numpy()
        flat = np.ravel_multi_index((c, *z.T), both.shape)
        counts, expected = np.bincount(flat, minlength=both.size), size * both.reshape(-1)
        assert counts[expected == 0].sum() == 0
        common = expected >= 5
        statistic = ((counts[common] - expected[common]) ** 2 / expected[common]).sum()
        rest = expected[~common].sum()
        if rest >= 5:
            statistic += (counts[~common].sum() - rest) ** 2 / rest
        freedom = int(common.sum()) + int(rest >= 5) - 1
        if freedom > 0:
            assert chi2.sf(statistic, freedom) > 1e-6


def test_probe_takes_a_chain_of_one_step_and_one_state() -> None:
    """No factor has the chain's axis of states then."""

    def model(x: torch.Tensor) -> None:
        one = torch.ones(1, dtype=torch.float64)
        z = pyro.sample("z", MarkovChain(one, one.unsqueeze(0), 1), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(2.0 * z, 1.0).to_event(1), obs=x)

    post = lvmppl.posterior(model, {"x": torch.tensor([0.3], dtype=torch.float64)})
    assert post.log_evidence == pytest.approx(-0.045 - 0.5 * math.log(2 * math.pi), rel=1e-12)
