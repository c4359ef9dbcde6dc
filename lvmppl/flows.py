"""Normalizing flows of zuko as Pyro distributions (the extra `flows`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from lvmppl.errors import InputError


def build_flow(name: str, size: int, context: int, transforms: int, hidden: Sequence[int]) -> nn.Module:
    """A flow over vectors [D] given a context [C]: `nsf` (rational-quadratic splines) or `maf` (affine).

    Raises:
        InputError: no flow of that name, or zuko is not installed.
    """
    try:
        import zuko
    except ModuleNotFoundError:
        raise InputError(
            "guide head flow", "the package zuko", "an environment without it", "pip install 'lvmppl[flows]'"
        ) from None
    kinds = {"nsf": zuko.flows.NSF, "maf": zuko.flows.MAF}
    if name not in kinds:
        raise InputError("guide head flow: flow", f"one of {', '.join(kinds)}", repr(name))
    module: nn.Module = kinds[name](size, context, transforms=transforms, hidden_features=tuple(hidden))
    return module


class FlowDistribution(dist.TorchDistribution):
    """A flow as Pyro sees it: drawn with gradient; the draw's own density is kept, since the way back costs D passes."""

    arg_constraints: dict[str, Constraint] = {}  # noqa: RUF012 - torch's own protocol
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, flow: Any) -> None:
        self.flow = flow
        self._draw: tuple[Tensor, Tensor] | None = None
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        value, log_prob = self.flow.rsample_and_log_prob(torch.Size(sample_shape))
        # drawn without gradient (a score function's draw), its density would have none either
        self._draw = (value, log_prob) if torch.is_grad_enabled() else None
        result: Tensor = value
        return result

    def log_prob(self, value: Tensor) -> Tensor:
        if self._draw is not None and value is self._draw[0]:
            return self._draw[1]
        result: Tensor = self.flow.log_prob(value)
        return result

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        return FlowDistribution(self.flow.expand(torch.Size(batch_shape)))
