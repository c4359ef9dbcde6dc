"""The recorded eliminations read backwards: p(z | x) = Π p(z_v | later ones)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lvmppl.exact.elimination import Step
from lvmppl.exact.named import Named


def conditional(step: Step) -> Tensor:
    """log p(z_v | the clique's other variables): −∞ rows (impossible) stay −∞."""
    clique, norm = step.clique.tensor.detach(), step.reduced.detach()
    finite = torch.isfinite(norm)
    if bool(finite.all()):
        return clique - norm
    return torch.where(finite, clique - torch.where(finite, norm, 0.0), -torch.inf)


def gather(clique: Named, variable: str, states: Mapping[str, Tensor], order: Sequence[str]) -> Tensor:
    """The clique at chosen states of its other variables: [K of `variable`, S, *plates]."""
    rank = 2 + len(order)
    index: list[Tensor] = []
    for dim, size in zip(clique.dims, clique.tensor.shape, strict=True):
        if dim != variable and dim in states:
            index.append(states[dim].unsqueeze(0))
            continue
        shape = [1] * rank
        shape[0 if dim == variable else 2 + list(order).index(dim)] = size
        index.append(torch.arange(size, device=clique.tensor.device).reshape(shape))
    result: Tensor = clique.tensor[tuple(index)]
    return result
