"""Batches of rows: every row once an epoch, in an order that the seed alone decides."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from lvmppl.algorithms.problem import build_problem
from lvmppl.algorithms.stepper import Batches
from lvmppl.density import isolated
from lvmppl.models.mixture import gaussian_mixture


def epochs(rows: int, size: int, seed: int = 0, restart: int = 0, num_epochs: int = 2) -> list[list[Tensor]]:
    """The batches of the first epochs."""
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with isolated(0, torch.float64):
        model = functools.partial(gaussian_mixture, num_components=1)
        batches = Batches(build_problem("a", model, {"x": x}, seed=seed), size, restart)
    result = []
    for _ in range(num_epochs):
        epoch: list[Tensor] = []
        while sum(map(len, epoch)) < rows:
            batch = batches.next()
            assert batch is not None
            epoch.append(batch)
        result.append(epoch)
    return result


@pytest.mark.parametrize(("rows", "size"), [(10, 3), (9, 3), (7, 6), (5, 1)])
def test_epoch_gives_every_row_once_in_nearly_equal_batches(rows: int, size: int) -> None:
    for epoch in epochs(rows, size):
        lengths = [len(batch) for batch in epoch]
        assert max(lengths) <= size and max(lengths) - min(lengths) <= 1
        assert sorted(torch.cat(epoch).tolist()) == list(range(rows))


def test_order_of_rows_depends_on_seed_restart_and_epoch_alone() -> None:
    def order(seed: int, restart: int) -> list[list[int]]:
        return [torch.cat(epoch).tolist() for epoch in epochs(30, 7, seed, restart)]

    torch.manual_seed(1)
    first = order(1, 0)
    torch.manual_seed(2)
    assert order(1, 0) == first
    distinct = [*first, *order(2, 0), *order(1, 1), list(range(30))]
    assert len({tuple(one) for one in distinct}) == len(distinct)
