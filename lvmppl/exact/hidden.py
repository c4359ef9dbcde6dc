"""Modes that no search from a distance sees, found from the sums that hide them.

    log p(x, z) = log Σ_k exp f_k(z)

follows its broadest term everywhere but in a small basin around the mode of a narrow one. Where a model computes such a
sum (`torch.logsumexp`, `torch.logaddexp`: a mixture as distribution, or by hand in a `pyro.factor`), its terms are seen
while it runs, and the log joint with one term in the place of the sum is climbed by itself. The modes of these, one for
every choice of terms, are where the search for those of the log joint starts.

Shapes: S points, ``rows``, d dims, K terms of a sum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lvmppl.exact.evaluation import CHUNK, LogJoint
from lvmppl.exact.modes import ascend

MAX_CHOICES = 256  # of terms, whose modes are sought
_SUMS = (torch.logsumexp, torch.Tensor.logsumexp, torch.special.logsumexp)
_PAIRS = (torch.logaddexp, torch.Tensor.logaddexp)


@dataclass(frozen=True)
class Sums:
    """The log-sums over z that one pass of a model computes: their numbers of terms, in order.

    several: some row has more than one of the same sum, such as a likelihood of many data under a global z.
    """

    sizes: tuple[int, ...]
    several: bool

    @property
    def choices(self) -> list[tuple[int, ...]]:
        """A term of every sum: all choices, or as many as are tried."""
        return list(itertools.islice(itertools.product(*map(range, self.sizes)), MAX_CHOICES))

    @property
    def all_tried(self) -> bool:
        """Whether log p(x, z) is the sum over `choices`, each of which was climbed."""
        return not self.several and math.prod(self.sizes) <= MAX_CHOICES


def sums_of(log_joint: LogJoint, z: Tensor) -> Sums:
    """What the log joint sums at z [S, *rows, d]."""
    points = z.detach().clone().requires_grad_()
    with torch.enable_grad(), _Recording(points[..., 0].numel()) as met:
        log_joint(points)
    return Sums(tuple(met.sizes), met.several)


def modes_of_terms(log_joint: LogJoint, sums: Sums, starts: Tensor, chunk: int = CHUNK) -> Tensor:
    """Where a climb from starts [S, *rows, d] leads with every choice of terms: [S · choices, *rows, d]."""
    found = []
    for choice in sums.choices:

        def one(z: Tensor, choice: tuple[int, ...] = choice) -> Tensor:
            with _Choosing(choice):
                return log_joint(z)

        rows = starts.shape[1:-1]
        flat = starts.reshape(len(starts), -1, starts.shape[-1])
        points, _ = ascend(_flattened(one, rows), flat, chunk)
        found.append(points.reshape(starts.shape))
    return torch.cat(found)


def _flattened(log_joint: LogJoint, rows: Sequence[int]) -> LogJoint:
    def flat(z: Tensor) -> Tensor:
        return log_joint(z.reshape(len(z), *rows, z.shape[-1])).reshape(len(z), -1)

    return flat


def _terms(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The terms [..., K] of a log-sum that depends on z; None of any other function."""
    if function in _PAIRS:
        terms = torch.stack(
            torch.broadcast_tensors(args[0], args[1] if len(args) > 1 else kwargs["other"]), -1
        )
        return terms if terms.requires_grad else None
    if function not in _SUMS:
        return None
    values = args[0] if args else kwargs["input"]
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    dim = dim if isinstance(dim, int) else dim[0] if len(dim) == 1 else None
    return values.movedim(dim, -1) if dim is not None and values.requires_grad else None


@dataclass
class _Recording(TorchFunctionMode):
    """Notes the sizes of sums over what depends on z; elements: points of all rows."""

    elements: int
    sizes: list[int] = field(default_factory=list)
    several: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        terms = _terms(func, args, kwargs or {})
        if terms is not None:
            self.sizes.append(terms.shape[-1])
            self.several |= terms[..., 0].numel() > self.elements
        return func(*args, **(kwargs or {}))


class _Choosing(TorchFunctionMode):
    """Answers the i-th of the sums over what depends on z by its term `choice[i]`."""

    def __init__(self, choice: tuple[int, ...]) -> None:
        super().__init__()
        self.choice, self.met = choice, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        terms = _terms(func, args, kwargs or {})
        if terms is None:
            return func(*args, **(kwargs or {}))
        k = self.choice[self.met % len(self.choice)]
        self.met += 1
        if func in _SUMS and (args[2] if len(args) > 2 else (kwargs or {}).get("keepdim", False)):
            dim = args[1] if len(args) > 1 else (kwargs or {})["dim"]
            return terms[..., k : k + 1].movedim(-1, dim if isinstance(dim, int) else dim[0])
        return terms[..., k]


__all__ = ["Sums", "modes_of_terms", "sums_of"]
