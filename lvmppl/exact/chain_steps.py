"""The arithmetic of one step of a sweep: a product with the transition and a few operations on [B, K].

A step of a common size takes microseconds, of which the call is a part worth having. On the CPU numpy calls its BLAS
with less ado than torch does (a product [100, 32] × [32, 32] in float64 took 4.4 µs against 9.7 µs), and works on the
same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SMALL_STEP = 1 << 20  # multiplications in a step below which a second thread costs torch more than it saves


@dataclass(frozen=True)
class Arithmetic:
    """Operations with `out=` on the steps of a tensor, which `views` gives."""

    views: Callable[[Tensor], Sequence[Any]]
    product: Callable[..., Any]
    add: Callable[..., Any]
    multiply: Callable[..., Any]
    divide: Callable[..., Any]
    total: Callable[[Any, Any], Any]  # the sum over the last axis, kept, into the second argument


def _numpy_total(values: Any, out: Any) -> Any:
    return np.add.reduce(values, axis=-1, keepdims=True, out=out)


def _torch_total(values: Any, out: Any) -> Any:
    return torch.sum(values, -1, keepdim=True, out=out)


_NUMPY = Arithmetic(lambda t: list(t.numpy()), np.dot, np.add, np.multiply, np.divide, _numpy_total)
_TORCH = Arithmetic(lambda t: t.unbind(0), torch.mm, torch.add, torch.mul, torch.div, _torch_total)
_TORCH_OWN = Arithmetic(lambda t: t.unbind(0), torch.bmm, torch.add, torch.mul, torch.div, _torch_total)


def arithmetic(like: Tensor, shared: bool) -> Arithmetic:
    """numpy's for one transition on the CPU, else torch's; `shared`: all sequences have the same transition."""
    if not shared:  # rows [n, 1, K] times matrices [n, K, K]
        return _TORCH_OWN
    numpy = like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)
    return _NUMPY if numpy else _TORCH


@contextmanager
def step_by_step(multiplications: int) -> Iterator[None]:
    """A loop over steps runs on one torch thread when a step is small; zeros may be divided without a warning.

    Starting threads for a small product costs as much as the product, and a hundred times as much when other
    processes share the cores. What is restored is the calling thread's own number.
    """
    threads = torch.get_num_threads()
    few = threads > 1 and multiplications <= _SMALL_STEP
    if few:
        torch.set_num_threads(1)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        if few:
            torch.set_num_threads(threads)


__all__ = ["Arithmetic", "arithmetic", "step_by_step"]
