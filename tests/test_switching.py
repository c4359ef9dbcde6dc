"""Switching linear-Gaussian chains in `pyro.markov` loops beside a sum over every discrete sequence."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import lvmppl
from lvmppl.errors import IntractableError

ENUMERATED = {"enumerate": "parallel"}
FIRST = np.array([0.6, 0.3, 0.1])
MOVE = np.array([[0.8, 0.15, 0.05], [0.3, 0.5, 0.2], [0.25, 0.25, 0.5]])
PULL = np.array([0.9, -0.4, 0.2])
SPREAD = np.array([0.3, 1.5, 0.8])
NOISE = 0.5


def tables(states: int) -> tuple[np.ndarray, np.ndarray]:
    first, move = FIRST[:states], MOVE[:states, :states]
    return first / first.sum(), move / move.sum(-1, keepdims=True)


def tensor(value: Any) -> Tensor:
    return torch.as_tensor(np.asarray(value, dtype=float))


def model(x: Tensor, states: int) -> None:
    """x [N, T]: s_t → z_t ~ N(pull[s_t] z_{t−1}, spread[s_t]²), x_t ~ N(z_t, noise²)."""
    first, move = tables(states)
    with pyro.plate("data", len(x)):
        s, z = None, torch.zeros(())
        for t in pyro.markov(range(x.shape[1])):
            row = tensor(first) if s is None else tensor(move)[s]
            s = pyro.sample(f"s{t}", dist.Categorical(row), infer=ENUMERATED)
            z = pyro.sample(f"z{t}", dist.Normal(tensor(PULL)[s] * z, tensor(SPREAD)[s]))
            pyro.sample(f"x{t}", dist.Normal(z, NOISE), obs=x[:, t])


class Table:
    """Of one sequence x [T]: log p(s, x) by sequence s, and E[z | s, x], by dense Gaussians."""

    def __init__(self, x: np.ndarray, states: int) -> None:
        steps, (first, move) = len(x), tables(states)
        self.sequences = np.array(list(itertools.product(range(states), repeat=steps)))
        log_joint, mean = [], []
        for s in self.sequences:
            back = np.eye(steps)  # noise = back @ z
            for t in range(1, steps):
                back[t, t - 1] = -PULL[s[t]]
            path = np.linalg.inv(back)
            prior = path @ np.diag(SPREAD[s] ** 2) @ path.T
            total = prior + NOISE**2 * np.eye(steps)
            log_prior = np.log(first[s[0]]) + np.log(move[s[:-1], s[1:]]).sum()
            log_joint.append(log_prior + stats.multivariate_normal(np.zeros(steps), total).logpdf(x))
            mean.append(prior @ np.linalg.solve(total, x))
        self.log_joint, self.mean = np.array(log_joint), np.array(mean)
        self.log_evidence = np.logaddexp.reduce(self.log_joint)
        self.weights = np.exp(self.log_joint - self.log_evidence)

    def states(self, t: int, states: int) -> np.ndarray:
        return np.array([self.weights[self.sequences[:, t] == k].sum() for k in range(states)])


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 3), steps=st.integers(1, 5), states=st.integers(1, 3), seed=st.integers(0, 999))
def test_posterior_of_a_switching_chain_equals_the_sum_over_sequences(
    rows: int, steps: int, states: int, seed: int
) -> None:
    x = np.random.default_rng(seed).normal(size=(rows, steps)).cumsum(1)
    post = lvmppl.posterior(lambda x: model(x, states), {"x": tensor(x)})
    expected = [Table(row, states) for row in x]
    assert post.kind == "exact"
    np.testing.assert_allclose(post.log_evidence_per_datum, [e.log_evidence for e in expected], rtol=1e-9)
    for t in range(steps):
        probs = [e.states(t, states) for e in expected]
        np.testing.assert_allclose(post.probabilities(f"s{t}"), probs, rtol=1e-7, atol=1e-12)
        means = [e.weights @ e.mean[:, t] for e in expected]
        np.testing.assert_allclose(post.moments(f"z{t}")[0], means, rtol=1e-7, atol=1e-10)


def test_long_switching_chain_is_a_path_given_each_sequence() -> None:
    """Eight steps: 256 sequences, each with a posterior in O(T); pairs of states and samples are of one joint."""
    x = np.random.default_rng(3).normal(size=(2, 8)).cumsum(1)
    post = lvmppl.posterior(lambda x: model(x, 2), {"x": tensor(x)})
    expected = [Table(row, 2) for row in x]
    assert "path over 8 steps" in post.engine
    np.testing.assert_allclose(post.log_evidence_per_datum, [e.log_evidence for e in expected], rtol=1e-9)
    pair = np.zeros((2, 2, 2))
    for n, e in enumerate(expected):
        np.add.at(pair[n], (e.sequences[:, 1], e.sequences[:, 6]), e.weights)
    np.testing.assert_allclose(post.pair_marginal("s1", "s6"), pair, rtol=1e-8)
    draws = post.sample(3000, seed=5)
    counts = np.bincount((2 * draws["s1"] + draws["s6"])[:, 0].numpy(), minlength=4)
    assert stats.chisquare(counts, 3000 * pair[0].flatten()).pvalue > 1e-3


def test_two_histories_reach_further_back() -> None:
    """A loop of history 2, its state two steps back read, equals the same model as a plain loop."""

    def second(x: Tensor, loop: Any) -> None:
        states: list[Tensor] = []
        z = torch.zeros(())
        for t in loop(range(x.shape[0])):
            row = tensor(MOVE)[states[t - 2]] if t > 1 else tensor(FIRST)
            states.append(pyro.sample(f"s{t}", dist.Categorical(row), infer=ENUMERATED))
            z = pyro.sample(f"z{t}", dist.Normal(tensor(PULL)[states[t]] * z, 1.0))
            pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[t])

    x = tensor([2.0, 0.3, -1.1])
    markov = lvmppl.posterior(lambda x: second(x, lambda r: pyro.markov(r, history=2)), {"x": x})
    plain = lvmppl.posterior(lambda x: second(x, iter), {"x": x})
    assert markov.log_evidence == pytest.approx(plain.log_evidence, rel=1e-12)
    np.testing.assert_allclose(markov.probabilities("s2"), plain.probabilities("s2"), rtol=1e-10)


def test_states_in_a_plate_of_each_step_are_summed_at_every_point() -> None:
    """z_t outside of the plate whose elements have a state each: loop and markov loop have one posterior."""

    def shared_path(x: Tensor, loop: Any) -> None:
        z, crowd = torch.zeros(()), pyro.plate("data", x.shape[0])
        for t in loop(range(x.shape[1])):
            z = pyro.sample(f"z{t}", dist.Normal(0.8 * z, 1.0))
            with crowd:
                s = pyro.sample(f"s{t}", dist.Categorical(tensor(FIRST)), infer=ENUMERATED)
                pyro.sample(f"x{t}", dist.Normal(z + tensor(PULL)[s], 0.6), obs=x[:, t])

    x = tensor([[0.4, 1.2], [-0.3, 2.0], [1.0, 0.7]])
    markov, plain = (
        lvmppl.posterior(lambda x, f=f: shared_path(x, f), {"x": x}) for f in (pyro.markov, iter)
    )
    assert markov.log_evidence == pytest.approx(plain.log_evidence, rel=1e-10)
    np.testing.assert_allclose(markov.probabilities("s1"), plain.probabilities("s1"), rtol=1e-7)


def test_too_many_sequences_are_refused_with_their_number() -> None:
    with pytest.raises(
        IntractableError,
        match=r"s0 \(Categorical\), …, s12.*8,192 configurations \(at most 4,096\) beside more than 3 dim",
    ):
        lvmppl.posterior(lambda x: model(x, 2), {"x": torch.zeros(2, 13, dtype=torch.float64)})
