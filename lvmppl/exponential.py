"""Exponential families among the sites of a model: their parameters, their statistics, and the way back.

Every family falls into one of five kinds, by how its log-density depends on its parameters (x data, h constant in θ):

    simplex    Σ_v t_v(x) log p_v + h                           Categorical, OneHotCategorical, Multinomial
    beta       a(x) log p + b(x) log(1 − p) + h                 Bernoulli, Binomial, Geometric, NegativeBinomial
    gamma      a(x) log τ − b(x) τ + h                          Poisson, Exponential, Gamma (fixed concentration), …
    normal     −½ τ (x − μ)² + ½ log τ + h                      Normal, LogNormal; τ is the precision
    mvn        −½ (x − μ)ᵀ Σ⁻¹ (x − μ) − ½ log |Σ| + h          MultivariateNormal

so that the parameters which maximise an expected log-density are S/ΣS, A/(A + B), A/B, weighted means and weighted
scatter matrices. `read` finds the kind of a site and brings its parameters to these coordinates.

Shapes: batch axes carry names (an enumerated site, a plate, `·1` the last event axis, `·2` the one before …); axes of
size 1 and axes along which a tensor was merely expanded are dropped. `·v` is the axis of categories, `·i`, `·j` those of
a vector or matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from lvmppl.density import EnumeratedChain, SiteView, chain_axes, gaussian_chain_parts, time_axis
from lvmppl.distributions import GaussianChain
from lvmppl.exact.named import Named
from lvmppl.families import unexpanded
from lvmppl.family_table import FAMILIES, Family

CATEGORY, ROW, COLUMN = "·v", "·i", "·j"
TRANSITION = "·transition"
"""What the name of a chain's second factor ends in."""

_CORE: dict[str, tuple[str, ...]] = {"simplex": (CATEGORY,), "mvn": (ROW,)}


@dataclass(frozen=True)
class Reading:
    """A site as a member of a family.

    kind: one of the five. fields: its parameters, named. value, known, masks: as they are, right-aligned batch axes;
    `axes` names these. labels: whether a simplex value is a category index (else counts). latent: the enumerated site
    whose support the value is, if any.
    """

    site: str
    family: Family
    kind: str
    fields: dict[str, Named]
    value: Tensor
    known: dict[str, Tensor]
    masks: tuple[Tensor, ...]
    axes: Mapping[int, str]
    event_rank: int
    core_rank: int
    labels: bool
    name: str

    def named(self, tensor: Tensor, core: int = 0) -> Named:
        """Batch axes of a value-like tensor with their names, its `core` last axes kept as `·v` or `·i`."""
        names = _CORE.get(self.kind, ())[:core]
        return _named(tensor, self.axes, names)

    def statistics(self, dtype: torch.dtype | None = None) -> tuple[Named, ...]:
        """a and b, or x: the value as the kind sees it, named."""
        value = self.value.to(self.dtype) if self.value.dtype == torch.bool else self.value
        parts = self.family.statistics(value, self.known)
        return tuple(self.named(p.to(dtype or self.dtype), self.core_rank) for p in parts)

    def base(self) -> Named | None:
        """log h(x) before event axes are summed, where it is not zero."""
        if self.family.base is None:
            return None
        return self.named(self.family.base(self.value, self.known))

    def mask(self) -> Named | None:
        """The product of all masks, 1 where the factor counts."""
        if not self.masks:
            return None
        total = self.masks[0]
        for mask in self.masks[1:]:
            total = total & mask
        return self.named(total.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.fields.values())).tensor.dtype


def read_factors(view: SiteView, kind: str | None = None) -> dict[str, Reading | None]:
    """A reading for each log-factor of the site, by the factor's name: one, or a chain's start and its steps."""
    if isinstance(view.fn, EnumeratedChain):
        return {view.name: _chain_start(view), view.name + TRANSITION: _chain_steps(view)}
    if isinstance(view.fn, GaussianChain):
        parts = gaussian_chain_parts(view.name, view.fn, view.value)
        return {key: read(replace(view, name=key, fn=fn, value=value), kind) for key, fn, value in parts}
    return {view.name: read(view, kind)}


def read_factor(views: Mapping[str, SiteView], name: str, kind: str) -> Reading | None:
    """The reading of the log-factor of this name, in the kind found earlier."""
    view = views[name] if name in views else views[name.removesuffix(TRANSITION)]
    return read_factors(view, kind)[name]


def _chain_start(view: SiteView) -> Reading:
    """log π of a chain as a table over the category that is its first state."""
    table = view.fn.chain.log_initial.exp()
    axes = {axis - 1: name for axis, name in view.axis_names.items() if name != view.name}
    probs = _named(table, {axis + 1: name for axis, name in axes.items()}, (CATEGORY,))
    return _state_reading(view, view.name, probs, view.name)


def _chain_steps(view: SiteView) -> Reading:
    """log P of a chain as a table, by the state before, over the category that is the state after."""
    chain = view.fn.chain
    step, before, after = chain_axes(view.name, chain.num_steps)
    axes = {axis - 2: name for axis, name in view.axis_names.items() if name != view.name}
    probs = _named(chain.log_transition.exp(), {**axes, -1: before, -2: step}, (CATEGORY,))
    return _state_reading(view, view.name + TRANSITION, probs, after)


def _state_reading(view: SiteView, site: str, probs: Named, state: str) -> Reading:
    value = torch.arange(view.fn.chain.states)
    family = FAMILIES[dist.Categorical]
    return Reading(
        site, family, "simplex", {"probs": probs}, value, {}, (), {-1: state}, 0, 0, True, "MarkovChain"
    )


def read(view: SiteView, kind: str | None = None) -> Reading | None:
    """The site's reading, or None where its family is not in the table (or its wrapper is unknown).

    kind: as found earlier; a multivariate normal is `normal` where its covariance is diagonal, if not told otherwise.
    """
    fn, event_rank = view.fn, 0
    masks: list[Tensor] = [] if view.mask is None else [_lift(view.mask, 0)]
    while True:
        if isinstance(fn, dist.Independent | td.Independent):
            event_rank += fn.reinterpreted_batch_ndims
            masks = [_lift(m, fn.reinterpreted_batch_ndims) for m in masks]
            fn = fn.base_dist
        elif isinstance(fn, dist.MaskedDistribution):
            masks.append(_lift(fn._mask, 0))
            fn = fn.base_dist
        elif isinstance(fn, dist.ExpandedDistribution):
            fn = fn.base_dist
        else:
            break
    if any(m.dtype != torch.bool for m in masks):
        return None
    masks = [m for m in masks if m.dim() or not bool(m)]
    family = FAMILIES.get(type(fn))
    if family is None:
        return None
    axes = {axis - event_rank: name for axis, name in view.axis_names.items()}
    axes.update({-i: f"·{i}" for i in range(1, event_rank + 1)})
    fields, value, shape = family.fields(fn), view.value, tuple(fn.batch_shape)
    if event_rank and view.observed:
        at = event_rank + len(fn.event_shape)
        first = max(shape[-event_rank], value.shape[-at] if value.dim() >= at else 1)
        if first in view.steps:  # its steps are those of a chain
            axes[-event_rank] = time_axis(first)
    wanted, kind = kind, family.kind
    if kind == "mvn" and wanted != "mvn":
        flat = _diagonal(fields)
        if flat is not None:  # a diagonal covariance: as many univariate normals, one event axis more
            family, kind, fields, event_rank = FAMILIES[dist.Normal], "normal", flat, event_rank + 1
            masks = [_lift(m, 1) for m in masks]
            axes = {axis - 1: _shift(name) for axis, name in axes.items()}
            axes[-1] = "·1"
            shape = (*shape, *fn.event_shape)
    core = _CORE.get(kind, ())
    labels = type(fn) is dist.Categorical
    named = {}
    for key, tensor in fields.items():
        names = (ROW, COLUMN) if key == "covariance" else core
        named[key] = _named(tensor, axes, names)
    reading = Reading(
        site=view.name,
        family=family,
        kind=kind,
        fields=named,
        value=value,
        known={k: unexpanded(v) for k, v in family.known(fn).items()},
        masks=tuple(masks),
        axes=axes,
        event_rank=event_rank,
        core_rank=0 if labels else len(core),
        labels=labels,
        name=type(fn).__name__,
    )
    present = {d for part in (*named.values(), reading.named(value, reading.core_rank)) for d in part.dims}
    lost = any(
        axes[-i] not in present and size > 1 for i, size in enumerate(reversed(shape), 1) if i <= event_rank
    )
    return None if lost else reading


def _shift(name: str) -> str:
    return f"·{int(name[1:]) + 1}" if name[0] == "·" and name[1:].isdigit() else name


def _lift(mask: Any, ranks: int) -> Tensor:
    tensor = torch.as_tensor(mask)
    return tensor.reshape(tensor.shape + (1,) * ranks)


def _diagonal(fields: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """loc and precision of a covariance with zeros off its diagonal, None where it has others (or one row only)."""
    covariance = unexpanded(fields["covariance"], 2)
    size = covariance.shape[-1]
    off = covariance.detach().masked_select(~torch.eye(size, dtype=torch.bool))
    if size == 1 or bool((off != 0).any()):
        return None
    return {"loc": fields["loc"], "precision": 1 / covariance.diagonal(dim1=-2, dim2=-1)}


def _named(tensor: Tensor, axes: Mapping[int, str], core: tuple[str, ...]) -> Named:
    """Name the axes, dropping those of size 1 and narrowing those of stride 0 (expanded, not made)."""
    tensor, rank = unexpanded(tensor, len(core)), tensor.dim() - len(core)
    keep = [axis for axis in range(rank) if tensor.shape[axis] != 1]
    dims = tuple(axes[axis - rank] for axis in keep)
    shape = [tensor.shape[axis] for axis in keep] + list(tensor.shape[rank:])
    return Named(tensor.reshape(shape), (*dims, *core))
