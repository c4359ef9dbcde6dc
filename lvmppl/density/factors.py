"""A trace as log-factors with named axes: the name of each enumerated site and of each plate an axis belongs to."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import kl_divergence

from lvmppl.bilinear import log_density
from lvmppl.density.discovery import family_name, is_sample
from lvmppl.density.enumeration import check_table
from lvmppl.density.handlers import EnumeratedChain
from lvmppl.density.observed import first_entry, place_of, visible_entries, with_visible
from lvmppl.density.structure import (
    PARTICLES,
    Drawing,
    Evaluation,
    Factor,
    Rows,
    SiteView,
    Structure,
    Variable,
    chain_axes,
    time_axis,
)
from lvmppl.distributions import GaussianChain
from lvmppl.errors import InputError, ModelError
from lvmppl.families import relaxed_density


def build_evaluation(
    model_trace: Any | None,
    guide_trace: Any | None,
    rows: Rows,
    structure: Structure,
    names: dict[int, str],
    extra_axes: Mapping[int, str] | None = None,
    drawing: Drawing | None = None,
) -> Evaluation:
    extra, drawing = extra_axes or {}, drawing or Drawing()
    variables: dict[str, Variable] = {}
    sizes: dict[str, int] = {}
    guide_factors: list[Factor] = []
    score_factors: list[Factor] = []
    samples: dict[str, Tensor] = {}
    sample_axes: dict[str, dict[int, str]] = {}
    guide_variables: set[str] = set()
    plate = structure.data_plate
    if guide_trace is not None:
        for name, site in guide_trace.nodes.items():
            if not is_sample(site) or site["is_observed"]:
                continue
            _register(name, site, variables, sizes, names)
            if name in variables:
                guide_variables.add(name)
        for name, site in guide_trace.nodes.items():
            if not is_sample(site) or site["is_observed"]:
                continue
            relaxed = name in drawing.temperatures
            site = {**site, "relaxed": True} if relaxed else site
            if name in drawing.analytic:
                samples[name], sample_axes[name] = site["value"], _axis_names(site, names, extra)
                continue
            own = _factors(name, site, rows, plate, names, extra, variables)
            guide_factors.extend(own)
            if name not in variables:
                samples[name] = site["value"]
                sample_axes[name] = _axis_names(site, names, extra)
                if name in drawing.scores or not (site["fn"].has_rsample or _is_delta(site["fn"]) or relaxed):
                    score_factors.extend(own)
    if drawing.particles > 1:
        sizes[PARTICLES] = drawing.particles
    nodes = {} if model_trace is None else model_trace.nodes
    model_sites = {n: with_visible(s) for n, s in nodes.items() if is_sample(s)}
    for name, site in model_sites.items():
        _register(name, site, variables, sizes, names)
    factors: list[Factor] = []
    for name, site in model_sites.items():
        if name in drawing.analytic and guide_trace is not None:
            site = {**site, "kl": -kl_divergence(guide_trace.nodes[name]["fn"], site["fn"])}
        if name in drawing.temperatures:
            site = {**site, "relaxed": True}
        factors.extend(_factors(name, site, rows, plate, names, extra, variables))
    if plate is not None:
        sizes.setdefault(plate, rows.size)
    return Evaluation(
        tuple(factors),
        tuple(with_scales(guide_factors, factors)),
        variables,
        frozenset(guide_variables),
        sizes,
        samples,
        tuple(with_scales(score_factors, factors)),
        sample_axes,
    )


def with_scales(guide_factors: Sequence[Factor], factors: Sequence[Factor]) -> Iterator[Factor]:
    """log q of each site at the scale that log p of the site has: a scale repeats the whole plate, its latents too."""
    own = {f.site: f for f in factors}
    for factor in guide_factors:
        like = own.get(factor.site)
        yield factor if like is None else replace(factor, scale=like.scale, scale_dims=like.scale_dims)


def with_densities(evaluation: Evaluation, density: Evaluation) -> Evaluation:
    """The evaluation with log q of its drawn sites from another pass of the guide, in which λ is held, say."""
    own = {f.site: f for f in density.guide_factors if f.site in evaluation.samples}
    factors = [own.get(f.site, f) for f in evaluation.guide_factors]
    return replace(evaluation, guide_factors=tuple(with_scales(factors, evaluation.factors)))


def _is_delta(fn: Any) -> bool:
    return family_name(fn) == "Delta"


def _register(
    name: str, site: Any, variables: dict[str, Variable], sizes: dict[str, int], names: dict[int, str]
) -> None:
    frames = [f for f in site["cond_indep_stack"] if f.vectorized]
    for frame in frames:
        sizes[frame.name] = frame.size
    axis = site["infer"].get("_enumerate_dim")
    if axis is None or name in variables or site["is_observed"]:
        return
    names[site["infer"]["_dim_to_id"][axis]] = name
    plates = tuple(f.name for f in frames)
    if isinstance(site["fn"], EnumeratedChain):
        chain = site["fn"].chain
        sizes[time_axis(chain.num_steps)] = chain.num_steps
        lengths: Tensor | None = None
        dims: tuple[str, ...] = ()
        if chain.lengths is not None:
            lengths, dims = _name_axes(chain.lengths, _axis_names(site, names), name)
        states = torch.arange(chain.states, device=chain.log_initial.device)
        variables[name] = Variable(name, plates, states, chain.num_steps, lengths, dims)
        return
    value, event_dim = site["value"], site["fn"].event_dim
    position = value.dim() + axis - event_dim
    support = value if position < 0 else value.movedim(position, 0)
    support = support.reshape(
        support.shape[0] if position >= 0 else 1, -1, *value.shape[value.dim() - event_dim :]
    )[:, 0]
    variables[name] = Variable(name, plates, support.detach())


def _axis_names(
    site: Any, names: Mapping[int, str], extra: Mapping[int, str] | None = None
) -> dict[int, str]:
    """What each batch axis of a site stands for: a plate, an enumerated site, or what `extra` says."""
    result = {**(extra or {}), **{f.dim: f.name for f in site["cond_indep_stack"] if f.vectorized}}
    result.update({axis: names[i] for axis, i in site["infer"].get("_dim_to_id", {}).items() if i in names})
    return result


def _factors(
    name: str,
    site: Any,
    rows: Rows,
    plate: str | None,
    names: Mapping[int, str],
    extra: Mapping[int, str],
    variables: Mapping[str, Variable],
) -> list[Factor]:
    """The log-factors of one site: one, or the initial and the transition factor of a chain."""
    plates = frozenset(f.name for f in site["cond_indep_stack"] if f.vectorized)
    axis_names = _axis_names(site, names, extra)
    scale: float | Tensor = site["scale"]
    scale_dims: tuple[str, ...] = ()
    if isinstance(scale, Tensor):
        scale, scale_dims = _name_axes(scale, axis_names, name)
    if plate in plates:
        scale = scale * rows.scale
    observed = bool(site["is_observed"])

    def factor(key: str, tensor: Tensor, dims: tuple[str, ...]) -> Factor:
        return Factor(key, tensor, dims, plates, scale, scale_dims, observed)

    if isinstance(site["fn"], EnumeratedChain):
        return [factor(*part) for part in _chain_factors(name, site["fn"].chain, axis_names)]
    if isinstance(site["fn"], GaussianChain):
        parts = gaussian_chain_parts(name, site["fn"], site["value"])
        return [
            factor(key, *_name_axes(_masked(log_density(fn, value), site), axis_names, name))
            for key, fn, value in parts
        ]
    _check_size(name, site, axis_names, variables)
    with _naming(name, site):
        return [factor(name, *_site_density(name, site, axis_names, variables))]


def _site_density(
    name: str, site: Any, axis_names: Mapping[int, str], variables: Mapping[str, Variable]
) -> tuple[Tensor, tuple[str, ...]]:
    """log p(value), its steps kept apart where it depends on a chain step by step."""
    steps = _chain_steps(variables, axis_names)
    stepwise = _by_step(site["fn"], site["value"]) if steps and site["is_observed"] else None
    if stepwise is not None and stepwise.shape[-1] in steps:
        tensor, dims = _name_axes(
            _masked(stepwise, site, trailing=1), axis_names, name, (time_axis(stepwise.shape[-1]),)
        )
        if any(variables[d].steps for d in dims if d in variables):
            return tensor, dims
    return _name_axes(_masked(_own_density(site), site), axis_names, name)


def _own_density(site: Any) -> Tensor:
    """log p(value); −KL[q ‖ p] where the site has it in closed form, and extended linearly at a relaxed state."""
    if "kl" in site:
        return site["kl"]  # type: ignore[no-any-return]
    return (relaxed_density if "relaxed" in site else log_density)(site["fn"], site["value"])


def _check_size(
    name: str, site: Any, axis_names: Mapping[int, str], variables: Mapping[str, Variable]
) -> None:
    fn, value = site["fn"], site["value"]
    batch = value.shape[: value.dim() - fn.event_dim]
    sizes: dict[int, int] = {}
    for shape in (fn.batch_shape, batch):
        for i, size in enumerate(reversed(shape), 1):
            sizes[-i] = max(size, sizes.get(-i, 1))
    own = {axis_names[a]: s for a, s in sizes.items() if s > 1 and axis_names.get(a) in variables}
    check_table(name, _plates_of(site), own, prod(sizes.values()))


def _plates_of(site: Any) -> str:
    return ", ".join(f.name for f in site["cond_indep_stack"] if f.vectorized)


@contextmanager
def _naming(name: str, site: Any) -> Iterator[None]:
    """A distribution that cannot score its value is the user's mistake: most often an axis that no plate declares."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, RuntimeError, IndexError) as error:
        fn, where = site["fn"], place_of(site, name)
        if "within the support" in str(error):
            support = getattr(fn.support, "base_constraint", fn.support)  # of one entry of an event
            wrong = ~torch.as_tensor(support.check(site["value"]))
            expected = f"values in the support of {family_name(fn)}, {support}"
            got = f"numbers such as {first_entry(site['value'], wrong)}"
            fix = "change the data (their columns, their scale) or the distribution"
            raise ModelError(where, expected, got, fix) from error
        detail = " ".join(str(error).split())[:300]
        raise ModelError(
            where,
            "a value that its distribution can score, and batch axes that all belong to plates",
            f"value shape {tuple(site['value'].shape)}, batch shape {tuple(fn.batch_shape)}, "
            f"event shape {tuple(fn.event_shape)} ({type(error).__name__}: {detail})",
            "declare every batch axis with pyro.plate, or make it part of the event with .to_event(1)",
        ) from error


def _chain_steps(variables: Mapping[str, Variable], axis_names: Mapping[int, str]) -> frozenset[int]:
    """Numbers of steps of the chains among the axes of a site."""
    chains = (v for v in variables.values() if v.name in axis_names.values())
    return frozenset(v.steps for v in chains if v.steps is not None)


def _masked(log_prob: Tensor, site: Any, trailing: int = 0) -> Tensor:
    """poutine.mask, on observed and drawn sites (the handlers take it off those that are summed or integrated out)."""
    if site["mask"] is None:
        return log_prob
    mask = torch.as_tensor(site["mask"])
    mask = mask.reshape(*mask.shape, *[1] * trailing) if mask.dim() else mask
    return torch.where(mask, log_prob, torch.zeros((), dtype=log_prob.dtype, device=log_prob.device))


def _by_step(fn: Any, value: Tensor) -> Tensor | None:
    """log p(value) with the first event axis left unsummed [*batch, T]; None for a family that ties its event together."""
    if isinstance(fn, dist.MaskedDistribution):
        base = _by_step(fn.base_dist, value)
        if base is None:
            return None
        mask = torch.as_tensor(fn._mask)
        mask = mask.unsqueeze(-1) if mask.dim() else mask
        return torch.where(mask, base, torch.zeros((), dtype=base.dtype, device=base.device))
    if not isinstance(fn, torch.distributions.Independent) or fn.reinterpreted_batch_ndims < 1:
        return None
    base = log_density(fn.base_dist, value)
    events = fn.reinterpreted_batch_ndims
    shape = broadcast_shape(base.shape, fn.base_dist.batch_shape[len(fn.base_dist.batch_shape) - events :])
    base = base.expand(shape)
    return base.sum(tuple(range(1 - events, 0))) if events > 1 else base


def _chain_factors(
    name: str, chain: Any, axis_names: Mapping[int, str]
) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
    """(key, tensor, dims) of log p(z₁) and of log p(z_{t+1} | z_t)."""
    yield (name, *_name_axes(chain.log_initial, axis_names, name, (name,)))
    step, before, after = chain_axes(name, chain.num_steps)
    yield (f"{name}·transition", *_name_axes(chain.log_transition, axis_names, name, (step, before, after)))


def gaussian_chain_parts(name: str, chain: GaussianChain, value: Tensor) -> Iterator[tuple[str, Any, Tensor]]:
    """(key, distribution, value) of the first state and of the steps."""
    yield name, chain.initial, value[..., 0, :]
    if chain.num_steps > 1:
        yield f"{name}·transition", chain.steps(value), value[..., 1:, :]


def build_views(
    trace: Any, rows: Rows, structure: Structure, extra: Mapping[int, str]
) -> tuple[dict[str, SiteView], Evaluation]:
    variables: dict[str, Variable] = {}
    sizes: dict[str, int] = {}
    names: dict[int, str] = {}
    plate = structure.data_plate
    nodes = {n: s for n, s in trace.nodes.items() if is_sample(s)}
    for name, site in nodes.items():
        _register(name, site, variables, sizes, names)
    if plate is not None:
        sizes.setdefault(plate, rows.size)
    views = {}
    for name, given in nodes.items():
        site = with_visible(given)
        axis_names = _axis_names(site, names, extra)
        plates = frozenset(f.name for f in site["cond_indep_stack"] if f.vectorized)
        scale: float | Tensor = site["scale"]
        scale_dims: tuple[str, ...] = ()
        if isinstance(scale, Tensor):
            scale, scale_dims = _name_axes(scale, axis_names, name)
        if plate in plates:
            scale = scale * rows.scale
        observed = bool(site["is_observed"])
        compute = functools.partial(_factors, name, site, rows, plate, names, extra, variables)
        views[name] = SiteView(
            name, site["fn"], site["value"], observed, site["mask"], scale, scale_dims, axis_names, plates, compute,
            _chain_steps(variables, axis_names), given["value"], visible_entries(given) if observed else None,
        )  # fmt: skip
    return views, Evaluation((), (), variables, frozenset(), sizes)


def _name_axes(
    tensor: Tensor, axis_names: Mapping[int, str], site: str, trailing: tuple[str, ...] = ()
) -> tuple[Tensor, tuple[str, ...]]:
    """Drop axes of size 1 and name the others; an axis that nothing declares is the user's mistake.

    trailing: names of the right-most axes, which are not batch axes. An axis of steps stays even if there is a single
    one: it says that a chain was seen step by step.
    """
    count = len(trailing)
    axis_names = {
        **{a - count: n for a, n in axis_names.items()},
        **{i - count: n for i, n in enumerate(trailing)},
    }
    shape = tensor.shape
    keep = [a for a in range(-len(shape), 0) if shape[a] != 1 or axis_names.get(a) == time_axis(1)]
    for axis in keep:
        if axis not in axis_names:
            raise ModelError(
                f"site '{site}'",
                "batch axes that belong to plates",
                f"a batch axis of size {shape[axis]} at dim {axis + count} "
                f"(batch shape {tuple(shape[: len(shape) - count])}) that no plate declares",
                "declare it with pyro.plate, or make it part of the event with .to_event(1)",
            )
    return tensor.reshape([shape[axis] for axis in keep]), tuple(axis_names[axis] for axis in keep)
