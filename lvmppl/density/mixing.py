"""Where a model puts the values of enumerated sites together over all of their states, which no enumeration can read.

An enumerated value has an axis of its states left of all plates, and what is computed from it is right as long as this axis
is carried along. `z.flatten()`, `z.sum()` or `z.mean()` lose it, and Pyro takes what comes out for a number that does not
depend on z. Honest models lose it too at times (a reshape before a matrix product, a look at the largest value), so what
is noted here is a suspicion; `check_states` has the last word.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from math import prod
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_READS = frozenset({"numpy", "tolist", "item", "__array__", "__float__", "__int__", "__index__", "__iter__"})
_SILENT = frozenset({"__get__", "dim", "size", "all", "__bool__"})
_ORDERED = frozenset({"cumsum", "cumprod", "flip", "roll", "sort", "flipud", "logcumsumexp"})
_LISTED = 3  # places that a message names at most
_OTHERS = ("/torch/", "/pyro/", "/lvmppl/density/")


class Mixing(TorchFunctionMode):
    """Notes the operations whose result has another number of joint states than what they were given.

    right: how many axes stand right of those of enumerated sites. places: what was noted, by function, file and line.
    """

    def __init__(self, right: int, places: list[str]) -> None:
        super().__init__()
        self.right, self.places = right, places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if len(self.places) < _LISTED and getattr(func, "__name__", "") not in _SILENT:
            self._look(func, args, kwargs, result)
        return result

    def _look(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = [a for a in _tensors((args, kwargs)) if a.dim() > self.right and a.dtype != torch.bool]
        if not given:
            return
        try:
            states = prod(broadcast_shape(*(self._left(a) for a in given)))
        except ValueError:  # axes of events among them
            states = max(prod(self._left(a)) for a in given)
        if states == 1:
            return
        name = func.__name__
        found = [prod(self._left(r)) for r in _tensors(result) if r.dtype != torch.bool]
        if name in _READS or name in _ORDERED or any(f != states for f in found):
            self._note(name)

    def _left(self, tensor: Tensor) -> torch.Size:
        return tensor.shape[: max(0, tensor.dim() - self.right)]

    def _note(self, name: str) -> None:
        frame = sys._getframe(1)
        while frame.f_back is not None and any(part in frame.f_code.co_filename for part in _OTHERS):
            frame = frame.f_back
        place = f"{name} at {frame.f_code.co_filename}:{frame.f_lineno}"
        if place not in self.places:
            self.places.append(place)


class MixingFrom:
    """`Mixing` from the first enumerated site on: a mode costs some microseconds an operation, most of them before it.

    It must end before what the model itself enters around it (`with torch.device(…)`). Within such a block nothing is
    watched, and the model is suspected without a look.
    """

    def __init__(self, right: int, places: list[str]) -> None:
        self.mode = Mixing(right, places)
        self.depth = torch._C._len_torch_function_stack()
        self.begun = False

    def begin(self, stack: ExitStack) -> None:
        """Watch until `stack` closes."""
        if self.begun:
            return
        self.begun = True
        if torch._C._len_torch_function_stack() == self.depth:
            stack.enter_context(self.mode)
        else:
            self.mode.places.append("what it computes within a torch mode of its own")


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors among arguments or results, which most often are no nested ones."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


__all__ = ["Mixing", "MixingFrom"]
