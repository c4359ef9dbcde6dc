"""What a head wants of a source: parameters λ of q, each with its shape and the set it lives in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.constraints import Constraint


@dataclass(frozen=True)
class Output:
    """One parameter of q: its shape for one element of the site's plates, and the set it lives in.

    spread: sd of its unconstrained start, where starting at 0 would be a saddle. stepwise: the first axis is time.
    """

    name: str
    shape: tuple[int, ...]
    constraint: Constraint = constraints.real
    spread: float = 0.0
    stepwise: bool = False

    @property
    def free_shape(self) -> tuple[int, ...]:
        """The shape in unconstrained coordinates."""
        return tuple(transform_to(self.constraint).inverse_shape(torch.Size(self.shape)))

    def constrained(self, free: Tensor) -> Tensor:
        result: Tensor = transform_to(self.constraint)(free)
        return result

    def start(self, batch: Sequence[int]) -> Tensor:
        """The start [*batch, *shape]."""
        free = torch.zeros((*batch, *self.free_shape))
        if self.spread:
            free = self.spread * torch.randn_like(free)
        return self.constrained(free)
