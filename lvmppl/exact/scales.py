"""The weight that `poutine.scale` or a minibatch gives to a plate: it multiplies after the latent is summed out.

Within one plate a scale is common to all factors that meet; a plate inside may carry one more, relative to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lvmppl.density import Factor
from lvmppl.errors import ModelError
from lvmppl.exact.named import Named, align, union


def scale_of(factor: Factor) -> Named:
    """A factor's scale with its axes."""
    scale = factor.scale
    if not isinstance(scale, Tensor):
        scale = torch.tensor(float(scale), device=factor.log_prob.device)
    return Named(scale, factor.scale_dims)


def common_scale(scales: Iterable[Named], sites: Iterable[str]) -> Named:
    """The one scale of factors that meet.

    Raises:
        ModelError: they differ; names the `sites`.
    """
    first, *others = scales
    for other in others:
        if not same_scale(other, first):
            raise ModelError(
                f"factors that meet in {', '.join(sorted(set(sites)))}",
                "one common scale (poutine.scale multiplies after an enumerated site is summed out)",
                "different scales",
                "put poutine.scale around the enumerated site and everything that depends on it",
            )
    return first


def same_scale(one: Named, other: Named) -> bool:
    """Whether two scales are equal along the same axes."""
    return one.tensor is other.tensor or (one.dims == other.dims and torch.equal(one.tensor, other.tensor))


def is_one(scale: Named) -> bool:
    """Whether the scale is the plain number 1."""
    return not scale.dims and scale.tensor.numel() == 1 and float(scale.tensor) == 1.0


def times(named: Named, scale: Named, straight_through: bool = False) -> Named:
    """A log-factor times the scale of its plate; 0 · (−∞) = 0.

    straight_through: the gradient is that of the log-factor itself, whatever weight the plate carries.
    """
    if is_one(scale):
        return named
    dims = union((named.dims, scale.dims))
    plain = align(named, dims)
    factor = align(scale, dims).to(plain.dtype)
    scaled = torch.where(factor == 0, plain.new_zeros(()), plain * factor)
    if straight_through:
        difference = torch.where(torch.isfinite(plain), (scaled - plain).detach(), 0.0)
        scaled = plain + difference
    return Named(scaled, dims)


def ratio(inner: Named, outer: Named) -> Named:
    """The scale that a plate carries beyond that of a plate around it; 1 where both are 0."""
    if is_one(outer):
        return inner
    if same_scale(inner, outer):
        return UNIT
    dims = union((inner.dims, outer.dims))
    own, around = align(inner, dims), align(outer, dims)
    return Named(torch.where(around == 0, 1.0, own / torch.where(around == 0, 1.0, around)), dims)


def relative_to(scale: Named, factors: Iterable[Factor]) -> list[Factor]:
    """The factors with the scales that they carry beyond `scale`."""
    if is_one(scale):
        return list(factors)
    parts = ((f, ratio(scale_of(f), scale)) for f in factors)
    return [replace(f, scale=own.tensor, scale_dims=own.dims) for f, own in parts]


UNIT = Named(torch.ones(()), ())  # a scalar of the CPU goes with tensors of any device
