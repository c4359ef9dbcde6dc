"""A small step recorded once and repeated: the same arithmetic on the same memory, without what decides it.

A step of EM on little data is some two hundred operations of a microsecond, and as long again to choose and prepare each:
which axes align, what is a view of what, whether anything is at its floor. For tensors of fixed shapes all that comes
out the same at every step. `Recorded` runs a function once under a `TorchDispatchMode`, keeps every tensor it made, and
then repeats only the operations that depend on the inputs, each writing to the memory it wrote to before; views
of that memory stay as they are. On the CPU numpy does so with less ado than torch.

Where the function looked at a number (`bool(x.any())`), the number is looked at again: if it differs, the recording does
not hold at these inputs and the function must be run itself. A part that is expected to branch is recorded `as_one`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload

from lvmppl.density.dispatch import EagerMode

Step = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
Call = Callable[[], Any]


class _OtherBranch(Exception):
    """A number that the function looked at is not what it was."""


class _Tape(EagerMode):
    """The operations that run, in order: (operation, arguments, keywords, result)."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result


_tapes: list[_Tape] = []  # that run now


def as_one(function: Callable[..., tuple[Tensor, ...]], *args: Tensor) -> tuple[Tensor, ...]:
    """`function(*args)`, new tensors, which a recording repeats as a whole: it may branch otherwise every time."""
    if not _tapes:
        return function(*args)
    with torch._C._DisableTorchDispatch():
        result = function(*args)
    _tapes[-1].operations.append((function, args, {}, result))
    return result


class Recorded:
    """`function` at inputs of these shapes: called with others of the same shapes it repeats what it did.

    The function must do all its work by torch operations, and depend on nothing that changes but its inputs.
    """

    def __init__(self, function: Step, inputs: Mapping[str, Tensor]) -> None:
        self._inputs = {n: v.detach().clone() for n, v in inputs.items()}
        tape = _Tape()
        _tapes.append(tape)
        try:
            with torch.no_grad(), tape:
                self._outputs = function(self._inputs)
        finally:
            _tapes.pop()
        repeated = list(_repeated(tape.operations, self._inputs.values()))
        made = (t.numel() for *_, result in repeated for t in _tensors(result))
        self.largest = max(made, default=0)
        """Entries of the largest tensor that is written anew at every call."""
        self._calls = [_call(*operation) for operation in repeated]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The outputs; None where the function would have branched otherwise."""
        with torch.no_grad(), np.errstate(all="ignore"):
            for name, value in inputs.items():
                self._inputs[name].copy_(value)
            try:
                for call in self._calls:
                    call()
            except _OtherBranch:
                return None
            return self.outputs()

    def outputs(self) -> dict[str, Tensor]:
        """Of the last call, or of the recording; copies, since the memory is written to again."""
        return {n: v.clone() for n, v in self._outputs.items()}


def _repeated(operations: Sequence[tuple[Any, ...]], inputs: Iterable[Tensor]) -> Iterator[tuple[Any, ...]]:
    """The operations that depend on the inputs, or write to memory that is written to twice."""
    rewritten = {_memory(args[0]) for func, args, _, _ in operations if _writes_first(func)}
    changing = {_memory(t) for t in inputs}
    for func, args, kwargs, result in operations:
        read = {_memory(t) for t in _tensors((args, tuple(kwargs.values())))}
        made = {_memory(t) for t in _tensors(result)}
        if not (read & changing or made & rewritten):
            continue
        changing |= made
        if _writes_first(func) or not made or not made <= read:
            yield func, args, kwargs, result


def _writes_first(func: Any) -> bool:
    return isinstance(func, OpOverload) and bool(func._schema.is_mutable)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Call:
    """The operation again, into the memory of its result."""
    name = str(func.overloadpacket).removeprefix("aten.").rstrip("_") if isinstance(func, OpOverload) else ""
    if isinstance(result, Tensor) and not kwargs and name in _NUMPY:
        arrays = [_array(a) for a in args]
        if all(a is not NotImplemented for a in arrays) and _same_dtype(args, result):
            call = _NUMPY[name](_array(result), *arrays)
            if call is not None:
                return call
    if _writes_first(func):
        return partial(func, *args, **kwargs)
    return partial(_repeat, func, args, kwargs, result)


def _repeat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    new = func(*args, **kwargs)
    olds, news = list(_tensors(result)), list(_tensors(new))
    if not olds and new != result:
        raise _OtherBranch
    for old, own in zip(olds, news, strict=True):
        if old.shape != own.shape:
            raise _OtherBranch
        old.copy_(own)


# ------------------------------------------------------------------------------------------------ operations in numpy


def _array(value: Any) -> Any:
    """What numpy works on in the place of an argument; NotImplemented where it cannot."""
    if isinstance(value, Tensor):
        on_host = value.device.type == "cpu" and value.dtype in (
            torch.float32,
            torch.float64,
            torch.bool,
            torch.int64,
        )
        return value.detach().numpy() if on_host else NotImplemented
    if isinstance(value, tuple | list):
        own = [_array(v) for v in value]
        return NotImplemented if any(v is NotImplemented for v in own) else own
    return value


def _same_dtype(args: tuple[Any, ...], result: Tensor) -> bool:
    """Whether floats are of one dtype throughout, so that numpy rounds as torch does."""
    floats = {t.dtype for t in _tensors((args, result)) if t.is_floating_point() and t.dim()}
    return len(floats) <= 1


def _plain(ufunc: Any) -> Callable[..., Call]:
    return lambda out, *arrays: partial(ufunc, *arrays, out=out)


def _truth(ufunc: Any) -> Callable[..., Call | None]:
    """A logical operation, where torch's is bitwise."""
    return lambda out, *arrays: partial(ufunc, *arrays, out=out) if out.dtype == bool else None


def _reduced(ufunc: Any) -> Callable[..., Call | None]:
    def build(out: Any, array: Any, axes: Any = (), keep: bool = False) -> Call | None:
        if ufunc is not np.logical_or and array.dtype != out.dtype:
            return None
        axis = (axes,) if isinstance(axes, int) else tuple(axes or ()) or None
        return partial(ufunc.reduce, array, axis, None, out, keep)

    return build


def _where(out: Any, condition: Any, chosen: Any, other: Any) -> Call:
    def run() -> None:
        np.copyto(out, other)
        np.copyto(out, chosen, where=condition)

    return run


def _power(out: Any, array: Any, exponent: Any) -> Call | None:
    return partial(np.square, array, out) if isinstance(exponent, int | float) and exponent == 2 else None


def _taken(out: Any, array: Any, axis: int, index: Any) -> Call:
    return partial(np.take, array, index, axis, out, "clip")  # in range: torch has looked


def _joined(out: Any, arrays: Any, axis: int = 0) -> Call | None:
    if any(a.ndim != out.ndim for a in arrays):  # torch leaves out empty vectors, numpy refuses them
        return None
    return partial(np.concatenate, arrays, axis, out)


def _copied(out: Any, array: Any) -> Call:
    return partial(np.copyto, out, array)


_NUMPY: dict[str, Callable[..., Call | None]] = {
    **{
        n: _plain(getattr(np, n))
        for n in ("exp", "log", "sqrt", "square", "reciprocal", "maximum", "minimum")
    },
    "add": _plain(np.add),
    "sub": _plain(np.subtract),
    "mul": _plain(np.multiply),
    "div": _plain(np.true_divide),
    "neg": _plain(np.negative),
    "abs": _plain(np.absolute),
    "mm": _plain(np.matmul),
    "bmm": _plain(np.matmul),
    "clamp_min": _plain(np.maximum),
    "gt": _plain(np.greater),
    "ge": _plain(np.greater_equal),
    "lt": _plain(np.less),
    "le": _plain(np.less_equal),
    "eq": _plain(np.equal),
    "ne": _plain(np.not_equal),
    "bitwise_not": _truth(np.logical_not),
    "bitwise_and": _truth(np.logical_and),
    "bitwise_or": _truth(np.logical_or),
    "sum": _reduced(np.add),
    "amax": _reduced(np.maximum),
    "amin": _reduced(np.minimum),
    "any": _reduced(np.logical_or),
    "where": _where,
    "pow": _power,
    "index_select": _taken,
    "cat": _joined,
    "clone": _copied,
}
"""By torch's name: (array of the result, arrays of the arguments) → the call, or None where torch must do it."""
