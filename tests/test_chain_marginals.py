"""Marginals of a variational chain and their first two derivatives against the sum over every sequence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lvmppl.density import Factor, Variable
from lvmppl.elbo import MOVES, chain_marginals
from lvmppl.exact.chain_marginals import affine_recursion

F64 = torch.float64
STATES, STEPS = 3, 4


def factors(initial: Tensor, moves: Tensor, lengths: Tensor | None) -> tuple[Factor, Factor, Variable]:
    """Initial logits [N|1, K] and moves' [N|1, T-1|1, K, K] as log-factors of a chain; axes of size 1 are dropped."""
    rows = ("data",) if len(initial) > 1 else ()
    step = ("·step4",) if moves.shape[1] > 1 else ()
    initial, moves = initial.log_softmax(-1), moves.log_softmax(-1)
    return (
        Factor("z", initial if rows else initial[0], (*rows, "z"), frozenset({"data"})),
        Factor(
            f"z{MOVES}",
            moves.reshape([s for s in moves.shape[:2] if s > 1] + [STATES, STATES]),
            ((*("data",) * (len(moves) > 1), *step, "z·from", "z·to")),
            frozenset({"data"}),
        ),
        Variable("z", ("data",), torch.arange(STATES), STEPS, lengths, () if lengths is None else ("data",)),
    )


def functional(initial: Tensor, moves: Tensor, lengths: Tensor | None, g: Tensor, h: Tensor) -> Tensor:
    """Σ g·u + Σ h·ξ by `chain_marginals`, with u [T, N, K] and ξ [T-1, N, K, K]."""
    u, pairs = chain_marginals(*factors(initial, moves, lengths))
    assert u.dims[0] == "·time4" and pairs.dims[0] == "·step4"
    total = (g * u.tensor.reshape(STEPS, -1, STATES)).sum()
    return total + (h * pairs.tensor.reshape(STEPS - 1, -1, STATES, STATES)).sum()


def by_brute_force(initial: Tensor, moves: Tensor, lengths: Sequence[int], g: Tensor, h: Tensor) -> Tensor:
    """The same as a sum over the K^T sequences, one by one."""
    total = torch.zeros((), dtype=F64)
    for n, length in enumerate(lengths):
        start = initial[min(n, len(initial) - 1)].softmax(-1)
        own = moves[min(n, len(moves) - 1)].softmax(-1).expand(STEPS - 1, STATES, STATES)
        for z in itertools.product(range(STATES), repeat=length):
            probability, value = start[z[0]], g[0, n, z[0]]
            for t, (j, k) in enumerate(itertools.pairwise(z)):
                probability = probability * own[t, j, k]
                value = value + g[t + 1, n, k] + h[t, n, j, k]
            total = total + probability * value
    return total


@pytest.mark.parametrize(
    ("starts", "rows", "own_steps", "lengths"),
    [
        (2, 2, 3, None),
        (2, 2, 3, [4, 2]),
        (1, 2, 1, [3, 1]),
        (2, 1, 3, None),
        (1, 1, 3, None),
        (1, 1, 1, None),
    ],
)
def test_chain_marginals_and_two_derivatives_equal_brute_force(
    starts: int, rows: int, own_steps: int, lengths: list[int] | None
) -> None:
    generator = torch.Generator().manual_seed(3)
    count = max(starts, rows) if lengths is None else len(lengths)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    at = [draw(starts, STATES), draw(rows, own_steps, STATES, STATES)]
    direction = [draw(*t.shape) for t in at]
    g, h = draw(STEPS, count, STATES), draw(STEPS - 1, count, STATES, STATES)
    found = []
    for way in (
        lambda a, m: functional(a, m, None if lengths is None else torch.tensor(lengths), g, h),
        lambda a, m: by_brute_force(a, m, lengths or [STEPS] * count, g, h),
    ):
        leaves = [t.clone().requires_grad_() for t in at]
        value = way(*leaves)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        slope = sum((a * b).sum() for a, b in zip(first, direction, strict=True))
        assert isinstance(slope, Tensor)
        found.append([value, *first, *torch.autograd.grad(slope, leaves)])
    assert all(float(t.detach().abs().amax()) > 0.01 for t in found[1])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_derivatives_of_affine_recursion_equal_finite_differences(batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, batch, 3), (4, batch, 3, 3))
    leaves = [torch.randn(*s, generator=generator, dtype=F64).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(affine_recursion, leaves)
    assert torch.autograd.gradgradcheck(affine_recursion, leaves)


def test_chain_of_one_step_has_its_start_as_marginal() -> None:
    logits = torch.tensor([[0.3, -1.0, 0.2], [1.0, 0.0, -2.0]], dtype=F64).log_softmax(-1)
    start = Factor("z", logits, ("data", "z"), frozenset({"data"}))
    moves = Factor(f"z{MOVES}", torch.zeros(3, 3, dtype=F64), ("z·from", "z·to"), frozenset({"data"}))
    u, pairs = chain_marginals(start, moves, Variable("z", ("data",), torch.arange(3), 1))
    torch.testing.assert_close(u.tensor, logits.exp().unsqueeze(0), rtol=1e-14, atol=0.0)
    assert pairs.tensor.shape == (0, 2, 3, 3)
