"""Parallel enumeration as Pyro does it, with its limits in words: which site, how large, and what to do."""

from __future__ import annotations

from contextlib import ExitStack
from math import prod
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lvmppl.density.dispatch import EagerMode
from lvmppl.density.mixing import MixingFrom
from lvmppl.errors import IntractableError, ModelError
from lvmppl.wording import abridged

MAX_TABLE = 2**27  # entries of the largest table over enumerated sites (1 GiB in float64)
_MAX_AXES, _SPARE_AXES = 64, 2  # of a torch tensor, and those of them that are left to events
_MAX_EVENTS = 4  # axes of events that a tensor over enumerated sites is thought to have at most
_ROWS = 8192  # more entries than these to the right of the enumerated axes are data, worked through in pieces
_FIX = (
    "use fewer states, order the sites as a chain (pyro.markov, MarkovChain), or leave them to a guide (svi)"
)


class Enumeration(EnumMessenger):
    """`poutine.enum` whose failures name the site. axes: who took each axis last: site, size and plates.

    limited: the model's own tensors are watched by `TableLimit`, from the site on with which one could be too large
    (watching costs some microseconds an operation). mixed: where to list what may mix states (see `Mixing`).
    """

    def __init__(
        self, first_available_dim: int | None = None, limited: bool = False, mixed: list[str] | None = None
    ) -> None:
        super().__init__(first_available_dim)
        self.axes: dict[int, tuple[str, int, tuple[str, ...]]] = {}
        self.states = 1  # of all enumerated sites together
        self.limited, self.watching = limited, ExitStack()
        self.mixing = None if mixed is None else MixingFrom(-1 - (first_available_dim or -1), mixed)

    def __exit__(self, *error: Any) -> Any:
        self.watching.close()
        return super().__exit__(*error)

    def _pyro_sample(self, msg: Any) -> None:
        wanted = not (msg["is_observed"] or msg["done"]) and msg["infer"].get("enumerate") == "parallel"
        if not wanted:
            super()._pyro_sample(msg)
            return
        _check_finite(msg)
        try:
            super()._pyro_sample(msg)
        except RuntimeError as error:
            if str(_MAX_AXES) not in str(error):
                raise
            raise self._too_many(msg) from error
        if self.mixing is not None:
            self.mixing.begin(self.watching)
        axis, value, event = msg["infer"]["_enumerate_dim"], msg["value"], msg["fn"].event_dim
        if value.dim() > _MAX_AXES - _SPARE_AXES:
            raise self._too_many(msg)
        size = value.shape[axis - event] if value.dim() >= event - axis else 1
        self.axes[axis] = (msg["name"], size, _plates(msg))
        self.states *= size
        if self.limited and self.states * _ROWS > MAX_TABLE:
            assert self.first_available_dim is not None
            self.watching.enter_context(TableLimit(self, self.first_available_dim))
            self.limited = False

    def _pyro_post_sample(self, msg: Any) -> None:
        """The axes of a value that torch.vmap carries are read from its shape: `.data`, where Pyro looks, has none."""
        value = msg["value"]
        if isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value):
            msg["value"] = torch.empty(value.shape, device="meta")
        super()._pyro_post_sample(msg)
        msg["value"] = value

    def _too_many(self, msg: Any) -> ModelError:
        first, size, _ = next(iter(self.axes.values()))
        return ModelError(
            f"site '{msg['name']}'{_within(msg)}",
            f"few enough enumerated sites in scope for a tensor's {_MAX_AXES} axes, one each",
            f"{len(self.axes) + 1} of them, the first being {first} ({size})",
            "loop with pyro.markov so that axes are used again, or make independent sites one site in a pyro.plate",
        )

    def events_of(self, shape: torch.Size) -> int:
        """How many axes of events a shape has on the right of its batch: with so many, most axes are those of sites."""

        def fitting(events: int) -> int:
            return sum(a - events >= -len(shape) and shape[a - events] == self.axes[a][1] for a in self.axes)

        return max(range(_MAX_EVENTS + 1), key=fitting)

    def table_over(self, shape: torch.Size, events: int) -> str:
        """The sites whose axes a shape has, their sizes and plates."""
        axes = (a for a in sorted(self.axes, reverse=True) if a - events >= -len(shape))
        own = [self.axes[a] for a in axes if shape[a - events] > 1]
        plates = dict.fromkeys(p for _, _, names in own for p in names)
        listing = abridged([f"{name} ({size})" for name, size, _ in own])
        return listing + (f" in plate {', '.join(plates)}" if plates else "")


def _plates(msg: Any) -> tuple[str, ...]:
    return tuple(f.name for f in msg["cond_indep_stack"] if f.vectorized)


def _within(msg: Any) -> str:
    plates = ", ".join(_plates(msg))
    return f" in plate {plates}" if plates else ""


def _check_finite(msg: Any) -> None:
    fn = msg["fn"]
    if getattr(fn, "has_enumerate_support", False):
        return
    base = fn
    while hasattr(base, "base_dist"):
        base = base.base_dist
    entries = (
        base is not fn and getattr(base, "has_enumerate_support", False) and fn.event_dim > base.event_dim
    )
    family = f"{type(base).__name__}{f'.to_event({fn.event_dim})' if entries else ''}"
    raise ModelError(
        f"site '{msg['name']}'{_within(msg)}, infer={{'enumerate': 'parallel'}}",
        "a distribution whose states can be listed",
        family,
        "declare its entries with pyro.plate instead of .to_event, so that each is a site of few states"
        if entries
        else "truncate it to a Categorical over the states that matter, or leave the site to a guide (svi)",
    )


class TableLimit(EagerMode):
    """Refuses, before it is computed, any tensor over enumerated axes that elimination could not hold either.

    first_axis: the right-most enumeration axis. What stands right of it counts up to the size of one piece of the data.
    """

    def __init__(self, enumeration: Enumeration, first_axis: int) -> None:
        super().__init__()
        self.enumeration, self.first_axis = enumeration, first_axis

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            self._check(_broadcast([index for index in args[1] if index is not None]))
        elif torch.Tag.pointwise in func.tags or func is torch.ops.aten.clone.default:
            self._check(_broadcast([a for a in args if isinstance(a, Tensor)]))
        elif not func.is_view:
            self._check(_result_shape(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _check(self, shape: torch.Size) -> None:
        if len(shape) < -self.first_axis or prod(shape) <= MAX_TABLE:
            return
        events = self.enumeration.events_of(shape)
        left = max(0, len(shape) + self.first_axis + 1 - events)
        states, rest = prod(shape[:left]), prod(shape[left:])
        entries = states * min(rest, _ROWS)
        if states > 1 and entries > MAX_TABLE:
            raise IntractableError(
                f"enumerated sites {self.enumeration.table_over(shape, events)}",
                f"a table of at most {MAX_TABLE:,} entries",
                f"{entries:,} (and perhaps more) where they meet in one expression of the model, in any order",
                _FIX,
            )


def _broadcast(tensors: list[Tensor]) -> torch.Size:
    return broadcast_shape(*(t.shape for t in tensors)) if tensors else torch.Size()


def _result_shape(func: Any, args: Any, kwargs: Any) -> torch.Size:
    """Of an operation that is no broadcast (stack, cat, a matrix product), without its being computed.

    Empty where it cannot be large: few operations give more entries than the product of what they are given.
    """
    leaves = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    if prod(a.numel() for a in leaves) <= MAX_TABLE:
        return torch.Size()
    try:
        result = func(*tree_map_only(Tensor, _outline, args), **tree_map_only(Tensor, _outline, kwargs))
    except (NotImplementedError, RuntimeError):  # a result whose shape depends on values: no table
        return torch.Size()
    return max(
        (t.shape for t in tree_leaves(result) if isinstance(t, Tensor)), key=prod, default=torch.Size()
    )


def _outline(tensor: Tensor) -> Tensor:
    """A tensor like this without its entries."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def check_table(site: str, plates: str, sizes: dict[str, int], entries: int) -> None:
    """A site's log-density over enumerated sites must fit a table.

    sizes: by enumerated site.
    """
    if sizes and entries > MAX_TABLE:
        coupled = abridged([f"{name} ({size})" for name, size in sizes.items()])
        raise IntractableError(
            f"site '{site}'{f' in plate {plates}' if plates else ''}",
            f"a log-density of at most {MAX_TABLE:,} entries",
            f"{entries:,} over the enumerated sites {coupled}, in any order of elimination",
            _FIX,
        )
