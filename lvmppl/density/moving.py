"""Which global continuous latents are fitted as parameters, and which have to be integrated out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor


class MovingPriors(Messenger):
    """Tells in one run those of `sites` whose prior moves while θ is fitted: `integrated`.

    The joint density of effects a ~ N(μ, τ²) and τ has no bound as τ → 0, with a prior on τ neither. So a site is
    integrated out if its prior depends on a parameter or on a site that is itself integrated out, or if its spread does
    on a site that is fitted (a location that is fitted leaves the joint density its maximum). Names in `frozen` are held.
    """

    def __init__(self, sites: Sequence[str], frozen: Collection[str]) -> None:
        super().__init__()
        self.sites, self.frozen = sites, frozen
        self.integrated: list[str] = []
        self._moving: list[Tensor] = []  # parameters, and values of sites that are integrated out
        self._fitted: list[Tensor] = []  # values of sites that are fitted

    def moved(self, name: str, value: Tensor) -> Tensor:
        """The value of a parameter, for autograd to follow."""
        value = value.detach()
        if name not in self.frozen and value.is_floating_point():
            self._moving.append(value.requires_grad_())
        return value

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.sites:
            return
        fn: Any = msg["fn"]
        value: Tensor = msg["value"].detach()
        if _depends(fn.log_prob(value), self._moving) or _depends(_spread(fn, value), self._fitted):
            self.integrated.append(name)
            self._moving.append(value.requires_grad_())
        elif name not in self.frozen:
            self._fitted.append(value.requires_grad_())
        msg["value"] = value


def _spread(fn: Any, value: Tensor) -> Tensor:
    """A number that does not change with the location of a distribution: its entropy, where torch has it."""
    try:
        entropy: Tensor = fn.entropy()
    except NotImplementedError:
        return fn.log_prob(value)  # type: ignore[no-any-return]
    return entropy


def _depends(result: Tensor, leaves: Sequence[Tensor]) -> bool:
    if not leaves or not result.requires_grad:
        return False
    found = torch.autograd.grad(result.sum(), leaves, allow_unused=True, retain_graph=True)
    return any(g is not None for g in found)


__all__ = ["MovingPriors"]
