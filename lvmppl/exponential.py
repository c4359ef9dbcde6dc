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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from lvmppl.density import EnumeratedChain, SiteView, chain_axes, time_axis
from lvmppl.exact.named import Named

CATEGORY, ROW, COLUMN = "·v", "·i", "·j"
TRANSITION = "·transition"
"""What the name of a chain's second factor ends in."""

Getter = Callable[[Any], dict[str, Tensor]]


class Family(NamedTuple):
    """One line of the table.

    kind: see the module. fields: the distribution's parameters in the kind's coordinates. known: what must not depend
    on θ (a number of trials, say). statistics: (x, known) → (a, b) for beta and gamma, (x,) for normal.
    """

    kind: str
    fields: Getter
    known: Getter
    statistics: Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, ...]]
    base: Callable[[Tensor, Mapping[str, Tensor]], Tensor] | None = None


def _narrowed(tensor: Tensor, core: int = 0) -> Tensor:
    """Batch axes of stride 0 (expanded, not made) at size 1, so that a plate costs nothing."""
    for axis in range(tensor.dim() - core):
        if tensor.shape[axis] > 1 and tensor.stride(axis) == 0:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _category_probs(fn: Any) -> dict[str, Tensor]:
    own = getattr(fn, "_categorical", fn)
    if "probs" in own.__dict__:
        return {"probs": _narrowed(own.probs, 1)}
    return {"probs": torch.softmax(_narrowed(own.logits, 1), -1)}


def _probs(fn: Any) -> dict[str, Tensor]:
    if "probs" in fn.__dict__:
        return {"probs": _narrowed(fn.probs)}
    return {"probs": torch.sigmoid(_narrowed(fn.logits))}


def _nothing(fn: Any) -> dict[str, Tensor]:
    return {}


def _trials(fn: Any) -> dict[str, Tensor]:
    return {"total_count": torch.as_tensor(fn.total_count, dtype=torch.get_default_dtype())}


def _one(x: Tensor) -> Tensor:
    return torch.ones((), dtype=x.dtype if x.is_floating_point() else torch.get_default_dtype())


def _value(x: Tensor, known: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return (x,)


def _precision(fn: Any) -> dict[str, Tensor]:
    return {"loc": fn.loc, "precision": _narrowed(fn.scale) ** -2}


def _choose(x: Tensor, n: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)


FAMILIES: dict[type, Family] = {
    dist.Categorical: Family("simplex", _category_probs, _nothing, _value),
    dist.OneHotCategorical: Family("simplex", _category_probs, _nothing, _value),
    dist.Multinomial: Family(
        "simplex",
        _category_probs,
        _nothing,
        _value,
        lambda x, k: torch.lgamma(x.sum(-1) + 1) - torch.lgamma(x + 1).sum(-1),
    ),
    dist.Bernoulli: Family("beta", _probs, _nothing, lambda x, k: (x, 1 - x)),
    dist.Binomial: Family(
        "beta",
        _probs,
        _trials,
        lambda x, k: (x, k["total_count"] - x),
        lambda x, k: _choose(x, k["total_count"]),
    ),
    dist.Geometric: Family("beta", _probs, _nothing, lambda x, k: (_one(x), x)),
    dist.NegativeBinomial: Family(
        "beta",
        _probs,
        _trials,
        lambda x, k: (x, k["total_count"]),
        lambda x, k: _choose(x, k["total_count"] + x - 1),
    ),
    dist.Poisson: Family(
        "gamma",
        lambda f: {"rate": f.rate},
        _nothing,
        lambda x, k: (x, _one(x)),
        lambda x, k: -torch.lgamma(x + 1),
    ),
    dist.Exponential: Family("gamma", lambda f: {"rate": f.rate}, _nothing, lambda x, k: (_one(x), x)),
    dist.Gamma: Family(
        "gamma",
        lambda f: {"rate": f.rate},
        lambda f: {"concentration": f.concentration},
        lambda x, k: (k["concentration"], x),
        lambda x, k: (k["concentration"] - 1) * x.log() - torch.lgamma(k["concentration"]),
    ),
    dist.InverseGamma: Family(
        "gamma",
        lambda f: {"rate": f.rate},
        lambda f: {"concentration": f.concentration},
        lambda x, k: (k["concentration"], 1 / x),
        lambda x, k: -(k["concentration"] + 1) * x.log() - torch.lgamma(k["concentration"]),
    ),
    dist.Laplace: Family(
        "gamma",
        lambda f: {"rate": 1 / _narrowed(f.scale)},
        lambda f: {"loc": f.loc},
        lambda x, k: (_one(x), (x - k["loc"]).abs()),
        lambda x, k: torch.full((), -0.6931471805599453, dtype=x.dtype),
    ),
    dist.HalfNormal: Family(
        "gamma",
        lambda f: {"rate": _narrowed(f.scale) ** -2},
        _nothing,
        lambda x, k: (_one(x) / 2, x.square() / 2),
        lambda x, k: torch.full((), -0.2257913526447274, dtype=x.dtype),
    ),
    dist.Pareto: Family(
        "gamma",
        lambda f: {"rate": f.alpha},
        lambda f: {"scale": f.scale},
        lambda x, k: (_one(x), (x / k["scale"]).log()),
        lambda x, k: -x.log(),
    ),
    dist.Normal: Family("normal", _precision, _nothing, _value),
    dist.LogNormal: Family("normal", _precision, _nothing, lambda x, k: (x.log(),), lambda x, k: -x.log()),
    dist.MultivariateNormal: Family(
        "mvn", lambda f: {"loc": f.loc, "covariance": _covariance(f)}, _nothing, _value
    ),
}
"""The table of exponential families."""


def _covariance(fn: Any) -> Tensor:
    """As it was given, not as rebuilt from its Cholesky factor, where it was given."""
    if "covariance_matrix" in fn.__dict__:
        return fn.covariance_matrix  # type: ignore[no-any-return]
    root = fn._unbroadcasted_scale_tril
    return root @ root.mT  # type: ignore[no-any-return]


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
        parts = self.family.statistics(self.value, self.known)
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


def read_factors(view: SiteView) -> dict[str, Reading | None]:
    """A reading for each log-factor of the site, by the factor's name: one, or a chain's start and its steps."""
    if isinstance(view.fn, EnumeratedChain):
        return {view.name: _chain_start(view), view.name + TRANSITION: _chain_steps(view)}
    return {view.name: read(view)}


def read_factor(views: Mapping[str, SiteView], name: str, kind: str) -> Reading | None:
    """The reading of the log-factor of this name, in the kind found earlier."""
    if name in views and not isinstance(views[name].fn, EnumeratedChain):
        return read(views[name], kind)
    return read_factors(views[name.removesuffix(TRANSITION)])[name]


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
        known={k: _narrowed(v) for k, v in family.known(fn).items()},
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
    covariance = _narrowed(fields["covariance"], 2)
    size = covariance.shape[-1]
    off = covariance.detach().masked_select(~torch.eye(size, dtype=torch.bool))
    if size == 1 or bool((off != 0).any()):
        return None
    return {"loc": fields["loc"], "precision": 1 / covariance.diagonal(dim1=-2, dim2=-1)}


def _named(tensor: Tensor, axes: Mapping[int, str], core: tuple[str, ...]) -> Named:
    """Name the axes, dropping those of size 1 and narrowing those of stride 0 (expanded, not made)."""
    tensor, rank = _narrowed(tensor, len(core)), tensor.dim() - len(core)
    keep = [axis for axis in range(rank) if tensor.shape[axis] != 1]
    dims = tuple(axes[axis - rank] for axis in keep)
    shape = [tensor.shape[axis] for axis in keep] + list(tensor.shape[rank:])
    return Named(tensor.reshape(shape), (*dims, *core))
