"""Observed values: which of their entries count, what stands in the place of those that a mask hides, and wrong ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from lvmppl.errors import ModelError

_OPAQUE = ("Delta", "Unit")


def visible_entries(site: Any) -> Tensor | None:
    """Where an observed value counts, in some state at least: broadcast to its shape; None where no mask hides any."""
    fn, value = site["fn"], site["value"]
    masks = [] if site["mask"] is None else [torch.as_tensor(site["mask"])]
    while True:
        if isinstance(fn, dist.Independent | td.Independent):
            masks = [_lifted(m, fn.reinterpreted_batch_ndims) for m in masks]
        elif isinstance(fn, dist.MaskedDistribution):
            masks.append(torch.as_tensor(fn._mask))
        elif not isinstance(fn, dist.ExpandedDistribution):
            break
        fn = fn.base_dist
    masks = [_lifted(m, fn.event_dim) for m in masks if m.dtype == torch.bool]
    if not masks or not isinstance(value, Tensor):
        return None
    seen = masks[0]
    for mask in masks[1:]:
        seen = seen & mask
    lead = seen.dim() - value.dim()
    if lead > 0:
        seen = seen.flatten(0, lead - 1).any(0) if lead > 1 else seen.any(0)
    for axis in range(-seen.dim(), 0):
        if value.shape[axis] == 1 != seen.shape[axis]:
            seen = seen.any(axis, keepdim=True)
    return seen


def _lifted(mask: Tensor, ranks: int) -> Tensor:
    return mask.reshape(mask.shape + (1,) * ranks) if mask.dim() else mask


def with_visible(site: Any) -> Any:
    """The site with the first entry that counts, along its rows, in the place of those that are hidden.

    A hidden number may be a code, infinite, or beyond the support: 0 times what comes of it need not be 0, it would move
    the centre of the data, and its gradient may be NaN.
    """
    if not site["is_observed"]:
        return site
    seen, value = visible_entries(site), site["value"]
    axis = next((i for i, size in enumerate(value.shape) if size > 1), None) if seen is not None else None
    if seen is None or axis is None:
        return site
    seen = seen.expand(value.shape)
    first = value.gather(axis, seen.long().argmax(axis, keepdim=True))
    return {**site, "value": torch.where(seen | ~seen.any(axis, keepdim=True), value, first)}


def place_of(site: Any, name: str) -> str:
    """The site and its plates, for messages."""
    plates = ", ".join(f.name for f in site["cond_indep_stack"] if f.vectorized)
    return f"site '{name}'{f' in plate {plates}' if plates else ''}"


def first_entry(value: Tensor, wrong: Tensor) -> str:
    """The first wrong number and where it stands."""
    index = [int(i) for i in torch.nonzero(wrong.expand(value.shape))[0]]
    number = f"{float(value[tuple(index)]):g}"
    at = [i for i, size in zip(index, value.shape, strict=True) if size > 1]
    if not at:
        return number
    return f"{number} in row {at[0]}" + (f", entry {', '.join(map(str, at[1:]))}" if at[1:] else "")


def check_observed(sites: Mapping[str, Any]) -> None:
    """Numbers that no density can score, where no mask hides them.

    Raises:
        ModelError: names the site, the number and its row.
    """
    for name, site in sites.items():
        value, fn = site["value"], site["fn"]
        while isinstance(
            fn, dist.Independent | td.Independent | dist.MaskedDistribution | dist.ExpandedDistribution
        ):
            fn = fn.base_dist
        if not site["is_observed"] or not isinstance(value, Tensor) or not value.numel():
            continue
        if type(fn).__name__ in _OPAQUE:
            continue
        expected, fix = "finite numbers", "leave such rows out, or hide the entries by .mask(seen)"
        wrong = None
        if value.is_floating_point() and not bool(value.sum().isfinite()):
            wrong = ~value.isfinite()
        elif type(fn) is dist.Categorical:
            states = fn._num_events
            expected = f"categories from 0 to {states - 1}"
            fix = (
                "count categories from 0, give its probabilities more columns, or hide entries by .mask(seen)"
            )
            whole = not value.is_floating_point() or bool((value == value.floor()).all())
            if not whole or int(value.min()) < 0 or int(value.max()) >= states:
                wrong = (value < 0) | (value >= states) | (value != value.floor())
        if wrong is None:
            continue
        seen = visible_entries(site)
        wrong = wrong if seen is None else wrong & seen
        if bool(wrong.any()):
            raise ModelError(place_of(site, name), expected, first_entry(value, wrong), fix)


__all__ = ["check_observed", "first_entry", "place_of", "visible_entries", "with_visible"]
