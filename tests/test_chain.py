"""Forward-backward against the sum over every path, and its numerics on very long chains."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lvmppl.exact import chain, chain_scaled, chain_steps

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """Log-weights of a batch of chains, some entries −∞, and how long each is."""

    initial: Array  # [1 | B, K]
    transition: Array  # [1 | B, 1 | T - 1, K, K]
    likelihood: Array  # [B, T, K]
    lengths: NDArray[np.int64]
    ragged: bool

    def tensors(self) -> list[torch.Tensor]:
        return [torch.tensor(t) for t in (self.initial, self.transition, self.likelihood)]

    def given_lengths(self) -> torch.Tensor | None:
        return torch.tensor(self.lengths) if self.ragged else None

    def paths(self, b: int) -> dict[tuple[int, ...], float]:
        """log p̃(z, x) of every path of sequence b."""
        start = self.initial[min(b, len(self.initial) - 1)]
        moves = self.transition[min(b, len(self.transition) - 1)]
        result = {}
        for z in itertools.product(range(start.size), repeat=int(self.lengths[b])):
            steps = (moves[min(t, len(moves) - 1)][i, j] for t, (i, j) in enumerate(itertools.pairwise(z)))
            seen = (self.likelihood[b, t, k] for t, k in enumerate(z))
            result[z] = float(start[z[0]] + sum(steps) + sum(seen))
        return result


def random_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    steps, states, batch = (int(rng.integers(low, high)) for low, high in ((1, 6), (1, 5), (1, 4)))
    impossible = (0.0, 0.3)[seed % 2]

    def weights(*shape: int) -> Array:
        return np.where(rng.random(shape) < impossible, -np.inf, 3.0 * rng.normal(size=shape))

    shared = [int(size) for size in rng.choice([1, batch], 2)]
    moves = int(rng.choice([1, max(steps - 1, 1)]))
    ragged = seed % 3 > 0
    lengths = rng.integers(1, steps + 1, batch) if ragged else np.full(batch, steps)
    return Case(
        weights(shared[0], states),
        weights(shared[1], moves, states, states),
        weights(batch, steps, states),
        lengths,
        ragged,
    )


def expected(case: Case, b: int) -> tuple[float, Array, Array, float, float]:
    """log Z, unary [T, K], pairs [T - 1, K, K], entropy and the best path's log weight, by summing over paths."""
    steps, states = case.likelihood.shape[1:]
    unary, pairs = np.zeros((steps, states)), np.zeros((max(steps - 1, 0), states, states))
    paths = case.paths(b)
    values = np.array(list(paths.values()))
    evidence = float(np.logaddexp.reduce(values))
    if evidence == -np.inf:
        return evidence, unary, pairs, 0.0, evidence
    for z, value in paths.items():
        weight = np.exp(value - evidence)
        for t, k in enumerate(z):
            unary[t, k] += weight
        for t, (i, j) in enumerate(itertools.pairwise(z)):
            pairs[t, i, j] += weight
    weights = np.exp(values - evidence)
    positive = weights[weights > 0]
    return evidence, unary, pairs, float(-(positive * np.log(positive)).sum()), float(values.max())


CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("block", range(10))
def test_posterior_of_chains_equals_sum_over_paths(block: int) -> None:
    seen_impossible = 0
    for seed in range(20 * block, 20 * block + 20):
        case = random_case(seed)
        found = chain.marginals(*case.tensors(), case.given_lengths())
        best_path, best = chain.viterbi(*case.tensors(), case.given_lengths())
        counts = np.zeros_like(case.transition)
        every_pair, entropy = found.all_pairwise(), found.entropy()
        for b in range(len(case.likelihood)):
            with np.errstate(invalid="ignore"):
                evidence, unary, pairs, uncertainty, top = expected(case, b)
            seen_impossible += evidence == -np.inf
            np.testing.assert_allclose(found.log_evidence[b], evidence, **CLOSE)
            np.testing.assert_allclose(found.unary[b], unary, **CLOSE)
            np.testing.assert_allclose(every_pair[b], pairs, **CLOSE)
            np.testing.assert_allclose(entropy[b], uncertainty, **CLOSE)
            np.testing.assert_allclose(best[b], top, **CLOSE)
            if evidence > -np.inf:
                path = tuple(best_path[b, : case.lengths[b]].tolist())
                np.testing.assert_allclose(case.paths(b)[path], top, **CLOSE)
            own = counts[min(b, len(counts) - 1)]
            if len(pairs):
                own += pairs.sum(0, keepdims=True) if len(own) == 1 else pairs
        np.testing.assert_allclose(found.transition, counts, **CLOSE)
    assert seen_impossible > 0


@pytest.mark.parametrize("block", range(4))
def test_gradient_of_log_partition_is_the_marginals_and_counts_by_paths(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        case = random_case(seed)
        leaves = [t.requires_grad_() for t in case.tensors()]
        total = chain.log_partition(*leaves, case.given_lengths())
        if not bool(total.isfinite().any()):
            continue
        gradients = torch.autograd.grad(total[total.isfinite()].sum(), leaves)
        starts, moves = np.zeros_like(case.initial), np.zeros_like(case.transition)
        for b in range(len(case.likelihood)):
            with np.errstate(invalid="ignore"):
                _, unary, pairs, _, _ = expected(case, b)
            np.testing.assert_allclose(gradients[2][b], unary, **CLOSE)
            starts[min(b, len(starts) - 1)] += unary[0]
            own = moves[min(b, len(moves) - 1)]
            if len(pairs):
                own += pairs.sum(0, keepdims=True) if len(own) == 1 else pairs
        np.testing.assert_allclose(gradients[0], starts, **CLOSE)
        np.testing.assert_allclose(gradients[1], moves, **CLOSE)


def test_hundred_thousand_steps_in_float32_agree_with_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    kind = {"generator": generator, "dtype": torch.float64}
    initial = torch.rand(1, 3, **kind).log()  # type: ignore[arg-type]
    transition = torch.rand(1, 1, 3, 3, **kind).log_softmax(-1)  # type: ignore[arg-type]
    likelihood = 5 * torch.randn(1, 100_000, 3, **kind) - 400  # type: ignore[arg-type]
    wide = chain.marginals(initial, transition, likelihood)
    narrow = chain.marginals(initial.float(), transition.float(), likelihood.float())
    assert float(wide.log_evidence) < -1e7  # far below the smallest float32
    assert float(narrow.log_evidence.double() / wide.log_evidence) == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(narrow.unary.double(), wide.unary, rtol=0, atol=1e-3)


def test_steps_in_numpy_and_in_torch_are_the_same_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """One transition on the CPU goes through numpy, everything else through torch: both are the truth's own numbers."""
    generator = torch.Generator().manual_seed(7)
    initial, transition, likelihood = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((1, 5), (1, 1, 5, 5), (6, 40, 5))
    )
    transition[0, 0, 1, 2] = -torch.inf  # so that the bracket, not the dense certificate, is used
    lengths = torch.tensor([40, 3, 40, 17, 1, 39])
    first = chain.marginals(initial, transition, likelihood, lengths)
    asked = []

    def torch_only(like: torch.Tensor, shared: bool) -> chain_steps.Arithmetic:
        asked.append(shared)
        return chain_steps._TORCH

    monkeypatch.setattr(chain_scaled, "arithmetic", torch_only)
    second = chain.marginals(initial, transition, likelihood, lengths)
    assert asked == [True]
    torch.testing.assert_close(first.unary, second.unary, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(first.transition, second.transition, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(first.log_evidence, second.log_evidence, rtol=1e-13, atol=0.0)


def test_entropy_step_by_step_equals_that_of_all_pairs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    factors = [
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((1, 3), (1, 1, 3, 3), (4, 6, 3))
    ]
    lengths = torch.tensor([6, 1, 4, 2])
    at_once = chain.entropy(*factors, lengths)
    monkeypatch.setattr(chain, "_PAIRS_HELD", 0)
    torch.testing.assert_close(chain.entropy(*factors, lengths), at_once, rtol=1e-12, atol=1e-14)
