"""Functions of z by pieces, which may differ from a quadratic between any points at which it is checked.

`torch.where(z > 2, a, b)`, `z.clamp(0)` or `z.round()` in a model are seen while it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_COMPARED = {
    "gt",
    "ge",
    "lt",
    "le",
    "greater",
    "greater_equal",
    "less",
    "less_equal",
    "heaviside",
    "sign",
    "signbit",
}
_ROUNDED = {
    "floor",
    "ceil",
    "round",
    "trunc",
    "frac",
    "fmod",
    "remainder",
    "floor_divide",
    "bucketize",
    "searchsorted",
}
_CUT = {
    "clamp",
    "clip",
    "clamp_min",
    "clamp_max",
    "maximum",
    "minimum",
    "fmax",
    "fmin",
    "relu",
    "abs",
    "absolute",
}
_NAMES = frozenset(_COMPARED | _ROUNDED | _CUT)


class Pieces(TorchFunctionMode):
    """Notes in `names` the functions by pieces that are applied to what requires a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name in _NAMES and any(isinstance(a, Tensor) and _follows(a) for a in args):
            self.names[name] = None
        return func(*args, **(kwargs or {}))


def _follows(tensor: Tensor) -> bool:
    """Whether a tensor requires a gradient, also where `torch.vmap` carries it."""
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


__all__ = ["Pieces"]
