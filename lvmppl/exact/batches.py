"""Many requests for values of the log joint, answered together: one batch of evaluations instead of one each.

A search that asks for values and decides by them what to ask next is a generator that yields a request and is sent its
values; searches that know nothing of one another go forward in step.

Shapes: ``S`` points, ``M`` of the rows, ``d`` dims.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lvmppl.exact.evaluation import LogJoint, evaluate

Restrict = Callable[[Tensor], LogJoint]
"""The log joint of some of the rows, given their indices ``[M]``."""
Request = tuple[Tensor, Tensor]
"""Rows ``[M]``, and the points ``[S, M, d]`` at which their log joint is asked for."""
Ask = TypeVar("Ask")
Result = TypeVar("Result")
Search = Generator[Ask, Tensor, Result]

# Points up to which rows with fewer points are filled up to those with most without further thought.
FEW = 1 << 15


def evaluated(restrict: Restrict, requests: Sequence[Request], chunk: int) -> list[Tensor]:
    """The log joint at every request's points, ``[S, M]`` each.

    Points of a row that occurs in several requests are stacked, and rows with fewer points filled up; if that would more
    than double the points, requests are answered one by one.
    """
    asked = sum(z[..., 0].numel() for _, z in requests)
    rows, place = torch.unique(torch.cat([r for r, _ in requests]), return_inverse=True)
    places = place.split([len(r) for r, _ in requests])
    counts = torch.zeros_like(rows)
    for at, (_, z) in zip(places, requests, strict=True):
        counts[at] += len(z)
    most = int(counts.max()) if len(rows) else 0
    if len(requests) == 1 or most * len(rows) > max(FEW, 2 * asked):
        return [
            evaluate(restrict(r), z, chunk) if z.numel() else z.new_zeros(z.shape[:-1]) for r, z in requests
        ]
    full = requests[0][1].new_empty(most, len(rows), requests[0][1].shape[-1])
    for at, (_, z) in zip(places, requests, strict=True):
        full[:, at] = z[:1]  # any point of the row's own fills it up
    counts.zero_()
    slots = []
    for at, (_, z) in zip(places, requests, strict=True):
        slots.append(counts[at] + torch.arange(len(z), device=at.device).unsqueeze(-1))
        full[slots[-1], at] = z
        counts[at] += len(z)
    values = evaluate(restrict(rows), full, chunk)
    return [values[slot, at] for slot, at in zip(slots, places, strict=True)]


def in_step(
    searches: Sequence[Search[Ask, Result]], answer: Callable[[Sequence[Ask]], Sequence[Tensor]]
) -> list[Result]:
    """What the searches return, each round of what they ask answered at once."""
    results: list[Any] = [None] * len(searches)
    asked: dict[int, Ask] = {}

    def advance(i: int, value: Tensor | None) -> None:
        try:
            asked[i] = searches[i].send(value)  # type: ignore[arg-type]
        except StopIteration as end:
            asked.pop(i, None)
            results[i] = end.value

    for i in range(len(searches)):
        advance(i, None)
    while asked:
        waiting = list(asked)
        for i, value in zip(waiting, answer([asked[i] for i in waiting]), strict=True):
            advance(i, value)
    return results


__all__ = ["Request", "Restrict", "Search", "evaluated", "in_step"]
