"""One trace of a program on all rows, to learn its parameters, sites and plates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.constraints import Constraint

from lvmppl.density.enumeration import Enumeration
from lvmppl.density.handlers import Answer, Discovery, EnumerateChains, EnumeratedChain, EnumerateFinite
from lvmppl.density.moving import MovingPriors
from lvmppl.density.observed import check_observed
from lvmppl.density.programs import Program
from lvmppl.density.structure import ParameterSpec, SiteInfo, Structure, Values, shared_continuous
from lvmppl.distributions import MarkovChain
from lvmppl.errors import InputError, ModelError

_START_DRAWS = 15  # as in Pyro's init_to_median
_SPARE_NESTING = 12  # plate axes reserved in the first trace, before the real nesting is known


def num_rows(data: Values) -> int:
    """N, the size of the first axis that all data tensors share."""
    sizes = {name: tensor.shape[0] if tensor.dim() else None for name, tensor in data.items()}
    distinct = set(sizes.values())
    if len(distinct) != 1 or None in distinct:
        listing = (
            ", ".join(f"{k}: {'a scalar' if v is None else v}" for k, v in sizes.items()) or "no tensors"
        )
        raise InputError(
            "data", "tensors that share their first axis", listing, "give every tensor a row per datum"
        )
    size = distinct.pop()
    assert size is not None
    if size == 0:
        raise InputError("data", "at least one row", "0 rows")
    return size


def discover(
    program: Program,
    data: Values,
    data_plate: str | None = None,
    model: Structure | None = None,
    lift: bool | Collection[str] = False,
    answer: Answer | None = None,
    frozen: Collection[str] = (),
) -> tuple[Structure, Any]:
    """Run `program` once on all rows and learn its parameters, sites and plates: (structure, trace of the run).

    lift: whether continuous latent sites outside of the data plate become parameters with a prior: those named, or all but
    those that `MovingPriors` wants integrated out, which stay latent. What is in `frozen` is held.
    answer: where parameters of a `pyro.param` statement stand in this run, from name, constraint and start; at their
    start if None.

    Enumerated sites are enumerated already here, so that `loc[z]` never takes the size of the data. For a guide,
    `model` is the model's structure: the data plate's name is taken from it.
    """
    total = num_rows(data)
    if program.module is not None:
        # modules may build themselves at the first call, as autoguides do
        with poutine.block(), torch.no_grad(), pyro.get_param_store().scope():
            program(data, {})
    weights = {name: w.detach() for name, w in program.weights().items()}
    found = Discovery(weights, answer)
    mixed: list[str] = []
    watched = mixed if program.role == "model" else None
    enumeration = Enumeration(first_available_dim=-1 - _SPARE_NESTING, limited=True, mixed=watched)
    finite = EnumerateFinite() if program.role == "guide" else nullcontext()
    with found, poutine.trace() as tracer, enumeration, EnumerateChains(), finite:
        program(data, weights)
    sites, sizes, axes = _read_sites(tracer.trace)
    check_observed({n: s for n, s in tracer.trace.nodes.items() if is_sample(s)})
    plate = (
        model.data_plate if model is not None else _find_data_plate(tracer.trace, total, data_plate, sizes)
    )
    if plate is not None and plate in sizes:
        check_plate(program.role, plate, sizes[plate], total)
    nesting = max((-axis for axis in axes.values()), default=0)
    if model is not None:
        nesting = max(nesting, model.nesting)
    parameters = {name: ParameterSpec(name, constraints.real, w.clone()) for name, w in weights.items()}
    for name, (constraint, event_dim, start, frames) in found.found.items():
        parameters.setdefault(name, _parameter_spec(name, constraint, event_dim, start, frames, plate, total))
    liftable = shared_continuous(sites, plate) if lift is not False else []
    if lift is True:
        fitted = _under_fitted_priors(program, data, weights, found, frozen, liftable)
        lift = [n for n in liftable if n not in fitted]
    for name in liftable:
        if lift is not False and name in lift:
            fn: Any = tracer.trace.nodes[name]["fn"]
            parameters[name] = ParameterSpec(name, _domain(fn), _median(fn), is_site=True)
            sites[name] = replace(sites[name], kind="parameter")
    return Structure(parameters, sites, sizes, axes, nesting, plate, total, tuple(mixed)), tracer.trace


def check_plate(role: str, plate: str, size: int, rows: int) -> None:
    """The data plate has the size of the rows handed in, in model and guide alike."""
    if size != rows:
        raise ModelError(
            f"{role}: plate '{plate}'",
            f"the size of the data, {rows}",
            f"{size}",
            f"write pyro.plate('{plate}', len(x)) so that the plate has the size of the rows it is handed",
        )


def check_plates(role: str, trace: Any, rows: int, data_plate: str | None) -> dict[str, int]:
    """Sizes of the plates of one pass, as the program states them; the data plate's is that of the rows handed in.

    A replayed model takes its plates' indices from the guide, and with them a scale for what it did not draw: the size it
    states itself is the only sign of rows that differ.

    Raises:
        ModelError: the data plate has another size.
    """
    sizes: dict[str, int] = {}
    for site in trace.nodes.values():
        if is_sample(site):
            frames = [f for f in site["cond_indep_stack"] if f.vectorized]
            sizes.update({f.name: f.size if f.full_size is None else f.full_size for f in frames})
            for frame in frames:
                if frame.name == data_plate:
                    check_plate(role, frame.name, frame.size, rows)
    if data_plate in sizes:
        check_plate(role, str(data_plate), sizes[str(data_plate)], rows)
    return sizes


def _under_fitted_priors(
    program: Program,
    data: Values,
    weights: Values,
    found: Discovery,
    frozen: Collection[str],
    sites: Sequence[str],
) -> list[str]:
    """Those of the sites that are to be integrated out, see `MovingPriors`."""
    if not sites:
        return []
    priors = MovingPriors(sites, frozen)
    again = Discovery(weights, lambda name, *_: priors.moved(name, found.answered(name)))
    enumeration = Enumeration(first_available_dim=-1 - _SPARE_NESTING, limited=True)
    with torch.enable_grad(), again, priors, enumeration, EnumerateChains():
        program(data, {n: priors.moved(n, w) for n, w in weights.items()})
    return priors.integrated


def _domain(fn: Any) -> Constraint:
    """Where the density of a prior is not 0: its support, of a Uniform without the upper bound (as torch has it)."""
    if isinstance(fn, dist.Independent):
        return constraints.independent(_domain(fn.base_dist), fn.reinterpreted_batch_ndims)
    support: Any = fn.support
    if isinstance(fn, dist.Uniform):
        return constraints.half_open_interval(support.lower_bound, support.upper_bound)
    return support  # type: ignore[no-any-return]


def _median(fn: Any) -> Tensor:
    """The median of a few draws, in unconstrained coordinates: near the middle of a prior, and no two entries alike."""
    transform = transform_to(fn.support)
    with torch.no_grad():
        start: Tensor = transform(transform.inv(fn.sample((_START_DRAWS,))).median(0).values)
    return start


def describe(model: Callable[..., Any], data: Values) -> Structure:
    """The structure of a model for a guide that is built from it, hidden from the handlers around this call."""
    with poutine.block(), torch.no_grad():
        return discover(Program(model, "model"), data)[0]


def _parameter_spec(
    name: str,
    constraint: Constraint,
    event_dim: int | None,
    start: Tensor,
    frames: Sequence[Any],
    plate: str | None,
    total: int,
) -> ParameterSpec:
    frame = next((f for f in frames if f.name == plate and f.vectorized), None)
    if frame is None:
        return ParameterSpec(name, constraint, start)
    if event_dim is None:
        raise ModelError(
            f"pyro.param('{name}') inside plate '{plate}'",
            "event_dim, the number of right-most axes that belong to one datum",
            "none",
            f"write pyro.param('{name}', init, event_dim=…), or move a shared parameter out of the plate",
        )
    axis = frame.dim - event_dim
    if start.dim() < -axis or start.shape[axis] == 1 != total:
        return ParameterSpec(name, constraint, start)
    return ParameterSpec(name, constraint, start, row_axis=axis)


def is_sample(site: Any) -> bool:
    return bool(
        site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic", False)
    )


def _read_sites(trace: Any) -> tuple[dict[str, SiteInfo], dict[str, int], dict[str, int]]:
    sites: dict[str, SiteInfo] = {}
    sizes: dict[str, int] = {}
    axes: dict[str, int] = {}
    for name, site in trace.nodes.items():
        if not is_sample(site):
            continue
        frames = [f for f in site["cond_indep_stack"] if f.vectorized]
        for frame in frames:
            sizes[frame.name] = frame.size
            axes[frame.name] = frame.dim
        kind = (
            "observed"
            if site["is_observed"]
            else "enumerated"
            if "_enumerate_dim" in site["infer"]
            else "latent"
        )
        fn = site["fn"]
        sites[name] = SiteInfo(
            name,
            kind,
            tuple(f.name for f in frames),
            family_name(fn),
            tuple(fn.event_shape),
            bool(getattr(fn.support, "is_discrete", False)),
            bool(fn.has_rsample),
            bool(site["infer"].get("is_auxiliary")),
            fn.support,
            bool(getattr(fn, "has_enumerate_support", False)) or isinstance(fn, MarkovChain),
            _is_circular(fn),
        )
    return sites, sizes, axes


def _is_circular(fn: Any) -> bool:
    """Whether a distribution is of angles, or a mixture of such."""
    inner = getattr(fn, "base_dist", getattr(fn, "component_distribution", None))
    return isinstance(fn, torch.distributions.VonMises) if inner is None else _is_circular(inner)


def family_name(fn: Any) -> str:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return "MarkovChain" if isinstance(fn, EnumeratedChain) else type(fn).__name__


def _find_data_plate(trace: Any, total: int, wanted: str | None, sizes: Mapping[str, int]) -> str | None:
    if wanted is not None:
        if wanted not in sizes:
            raise ModelError(
                "data_plate", f"one of the model's plates ({', '.join(sizes) or 'it has none'})", wanted
            )
        return wanted
    if "data" in sizes:
        return "data"
    outer: dict[str, bool] = {}
    for site in trace.nodes.values():
        if is_sample(site):
            for depth, frame in enumerate(f for f in site["cond_indep_stack"] if f.vectorized):
                outer[frame.name] = outer.get(frame.name, True) and depth == 0
    candidates = [name for name, is_outer in outer.items() if is_outer and sizes[name] == total]
    if len(candidates) > 1:
        raise ModelError(
            "the model's data plate",
            f"one outermost plate of the data's size {total}",
            ", ".join(sorted(candidates)),
            "name it 'data', or say `data_plate: NAME`",
        )
    return candidates[0] if candidates else None
