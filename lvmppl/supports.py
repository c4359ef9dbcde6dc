"""What the support of a site is, in the words of the table of heads: real numbers, a simplex, finitely many states, …"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributions import constraints

from lvmppl.density import SiteInfo
from lvmppl.errors import InputError

_SUPPORT_WORDS: dict[str, str] = {
    "binary": "two states",
    "finite": "finitely many states",
    "one_hot": "one-hot states",
    "chain": "state sequences of a MarkovChain",
    "real": "real numbers",
    "positive": "positive numbers",
    "unit_interval": "numbers between 0 and 1",
    "simplex": "a simplex",
    "other": "another continuous set",
    "countable": "infinitely many integers",
    "discrete_vector": "a vector of discrete values",
}


def support_words(kinds: frozenset[str] | str) -> str:
    """Supports in prose, in the order of the table."""
    chosen = {kinds} if isinstance(kinds, str) else kinds
    return ", ".join(text for kind, text in _SUPPORT_WORDS.items() if kind in chosen)


def support_kind(site: SiteInfo) -> str:
    """What a site's support is, in the words of the table: binary, finite, one_hot, chain, real, positive, …"""
    if site.family == "MarkovChain":
        return "chain"
    support = _element(site.support)
    if site.discrete:
        return _discrete_kind(site, support)
    if support is constraints.real or support is constraints.real_vector:
        return "real"
    if support is constraints.simplex:
        return "simplex"
    if _bounds(support) == (0.0, math.inf):
        return "positive"
    return "unit_interval" if _bounds(support) == (0.0, 1.0) else "other"


def _discrete_kind(site: SiteInfo, support: Any) -> str:
    if support is constraints.one_hot:
        return "one_hot" if len(site.event_shape) == 1 else "discrete_vector"
    if support is not constraints.boolean and _bounds(support) is None:
        return "countable"
    if site.event_shape:
        return "discrete_vector"
    if support is constraints.boolean:
        return "binary"
    lower, upper = _bounds(support) or (math.nan, math.inf)
    return "finite" if lower == 0 and upper < math.inf else "countable"


def _element(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _bounds(support: Any) -> tuple[float, float] | None:
    """(lower, upper) of an interval whose ends are the same for all elements."""
    ends = []
    for name, default in (("lower_bound", -math.inf), ("upper_bound", math.inf)):
        end = torch.as_tensor(getattr(support, name, default))
        if end.numel() == 0 or not bool((end == end.reshape(-1)[0]).all()):
            return None
        ends.append(float(end.reshape(-1)[0]))
    return None if ends == [-math.inf, math.inf] else (ends[0], ends[1])


def continuous_support(site: SiteInfo) -> Any:
    """The support with bounds that are numbers: those of a traced model have the axes of its batch.

    Raises:
        InputError: the bounds differ between elements.
    """
    return _with_plain_bounds(site.support, site.name)


def _with_plain_bounds(support: Any, name: str) -> Any:
    if isinstance(support, constraints.independent):
        base = _with_plain_bounds(support.base_constraint, name)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    if not hasattr(support, "lower_bound") and not hasattr(support, "upper_bound"):
        return support
    bounds = _bounds(support)
    if bounds is None:
        fix = "draw a variable with fixed bounds in the model and scale it there"
        raise InputError(f"guide, site '{name}'", "the same bounds for all elements", str(support), fix)
    lower, upper = bounds
    if lower == -math.inf:
        return constraints.less_than(upper)
    return constraints.greater_than(lower) if upper == math.inf else constraints.interval(lower, upper)


def num_states(site: SiteInfo) -> int:
    """K of a finite discrete site or of one step of a chain."""
    support = _element(site.support)
    if support is constraints.boolean:
        return 2
    if support is constraints.one_hot:
        return site.event_shape[-1]
    return int(torch.as_tensor(support.upper_bound).max()) + 1
