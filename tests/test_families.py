"""Log-densities of repeated distributions: their value, their gradient, and what the gradient costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from allocations import Allocations
from torch import Tensor

from lvmppl.families import log_density

K, N, V = 3, 700, 11


def repeated(make: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The distribution of each state, repeated for every row of a plate."""
    return lambda table: make(table).expand((K, N))


CASES = {
    "categorical by probs": (lambda t: dist.Categorical(probs=t.unsqueeze(1).softmax(-1)), (K, V), V),
    "categorical by logits": (lambda t: dist.Categorical(logits=t.unsqueeze(1)), (K, V), V),
    "bernoulli by probs": (lambda t: dist.Bernoulli(probs=t.unsqueeze(1).sigmoid()), (K,), 2),
    "bernoulli by logits": (lambda t: dist.Bernoulli(logits=t.unsqueeze(1)), (K,), 2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradient_of_a_repeated_distribution_equals_torchs_and_stays_small(
    case: tuple[Callable[[Tensor], Any], tuple[int, ...], int],
) -> None:
    make, shape, values = case
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    value = torch.randint(0, values, (N,), generator=generator).to(torch.float64)
    weight = torch.randn(K, N, generator=generator, dtype=torch.float64)
    plain = repeated(make)(table).log_prob(value)
    (expected,) = torch.autograd.grad((weight * plain).sum(), table)
    with Allocations() as seen:
        found = log_density(repeated(make)(table), value)
        (gradient,) = torch.autograd.grad((weight * found).sum(), table)
    torch.testing.assert_close(found.expand(K, N), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert seen.largest <= 8 * K * N  # the log-densities themselves, and nothing of size K × N × V


class _Reversed(torch.autograd.Function):
    """The identity, as a view, with the gradient of its negative."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


def test_gradient_of_a_repeated_view_equals_that_of_the_functions_it_came_by() -> None:
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.1, 0.3]], dtype=torch.float64)
    value = torch.tensor([0, 2, 1, 1])
    for through, sign in ((lambda t: t, 1.0), (_Reversed.apply, -1.0)):
        leaf = weights.clone().requires_grad_()
        logits = through(leaf).T.T[:, None].expand(2, 4, 3)
        log_density(dist.Categorical(logits=logits, validate_args=False), value).sum().backward()
        plain = weights.clone().requires_grad_()
        plain.log_softmax(-1)[:, value].sum().backward()
        torch.testing.assert_close(leaf.grad, sign * plain.grad)
