"""Whether a model is in tables, and its tables: sites, constants and reach of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from lvmppl.algorithms.closed_form import ClosedSite
from lvmppl.algorithms.evidence import is_chunkable
from lvmppl.algorithms.plan import Plan, working_dtype
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.statistics import entries_that_count
from lvmppl.algorithms.table_factors import events_of
from lvmppl.algorithms.table_rows import rows_of_a_piece, some_rows
from lvmppl.algorithms.tabulated import Tabulated
from lvmppl.density import Variable
from lvmppl.exact.named import Named, align, union
from lvmppl.exponential import CATEGORY, ROW, Reading, read_factor, read_factors
from lvmppl.wording import listed


def tabulate(problem: Problem, plan: Plan) -> Tabulated | str:
    """The model as tables, or what in it is not in them."""
    why = _more_than_lookups(plan)
    if why:
        return why
    with torch.no_grad():
        views, evaluation = problem.model.view(problem.data, problem.initial)
    factors = {n: view for view in views.values() for n in read_factors(view)}
    if {s.name for s in plan.sites} != set(factors):
        missing = (n for n in factors if n not in {s.name for s in plan.sites})
        return f"{listed(missing)} has a density that is no lookup of parameters"
    by_row = [s.name for s in plan.sites if problem.data_plate in s.keep]
    if by_row:
        return f"the parameters of {listed(by_row)} differ by row"
    readings: dict[str, Reading] = {}
    for site in plan.sites:
        view, reading = factors[site.name], read_factor(views, site.name, site.kind)
        if reading is None or reading.kind != site.kind or set(site.lookups) != set(reading.fields):
            return f"'{site.name}' is read otherwise than where the model was probed"
        if isinstance(view.scale, Tensor) or view.scale != 1.0:
            return f"'{site.name}' is scaled"
        if not _is_of_the_data(reading):
            return f"known numbers in '{site.name}' differ by more than its value"
        mask = reading.mask()
        if mask is not None and not set(mask.dims).isdisjoint(events_of(reading)):
            # its statistics have no row that is masked as a whole
            return f"a value of '{site.name}' counts in part under its mask"
        readings[site.name] = _with_common_masks(reading, evaluation.variables)
    total = problem.num_rows
    chunkable = is_chunkable(problem)
    step = rows_of_a_piece(plan.sites, readings, evaluation.variables, total) if chunkable else total
    plates = {n: v.plates for n, v in factors.items()}
    constant = 0.0
    for name, view in factors.items():
        if readings[name].family.base is not None:
            mask = readings[name].mask()
            if not view.observed or (mask is not None and set(mask.dims) & set(evaluation.variables)):
                return f"'{name}' has a part without parameters that differs by state"
            constant += _base_total(readings[name], problem.data_plate, total, step)
    farthest = _farthest(plan.sites, readings, problem.data_plate, total, step)
    return Tabulated(
        plan.sites, readings, plates, evaluation.variables, evaluation.plate_sizes, problem.data_plate,
        total, chunkable, constant, farthest, {n: _inner(r, problem.data_plate, total) for n, r in readings.items()},
        working_dtype(problem),
    )  # fmt: skip


def _more_than_lookups(plan: Plan) -> str:
    """Why an M-step of this plan needs the model, if so."""
    if plan.by_gradient:
        return f"M-steps by gradient of {listed(plan.by_gradient)}"
    if plan.needs_weights:
        return "least squares on computed locations"
    if not plan.closed:
        return "no parameter has a closed form"
    if not plan.complete:
        return (
            "some density is more than lookups of parameters (a prior, a continuous latent, a computed part)"
        )
    return ""


def _with_common_masks(reading: Reading, variables: Mapping[str, Variable]) -> Reading:
    """Masks without the axes of enumerated sites along which they were merely repeated."""
    masks = []
    for mask in reading.masks:
        for axis, name in reading.axes.items():
            at = mask.dim() + axis
            if name in variables and at >= 0 and bool((mask == mask.narrow(at, 0, 1)).all()):
                mask = mask.narrow(at, 0, 1)
        masks.append(mask)
    return replace(reading, masks=tuple(masks))


def _is_of_the_data(reading: Reading) -> bool:
    """Whether statistics and log h have axes of the value only (a known number may differ by state)."""
    if reading.labels:
        return True
    value = set(reading.named(reading.value, reading.core_rank).dims)
    known = {d for t in reading.known.values() for d in reading.named(t).dims}
    return known <= value


def _inner(reading: Reading, plate: str | None, total: int) -> dict[str, int]:
    """The event axes of a value and their sizes, from one row of it."""
    parts = [] if reading.labels else some_rows(reading, plate, 0, 1, total).statistics()
    events = events_of(reading)
    return {d: s for p in parts for d, s in zip(p.dims, p.tensor.shape, strict=True) if d in events}


def _base_total(reading: Reading, plate: str | None, total: int, step: int) -> float:
    result = 0.0
    for begin in range(0, total, step):
        part = some_rows(reading, plate, begin, min(step, total - begin), total)
        base, mask = part.base(), part.mask()
        assert base is not None
        value = part.named(part.value, part.core_rank)
        named = [base, value] if mask is None else [base, value, mask]
        sizes = {d: n for t in named for d, n in zip(t.dims, t.tensor.shape, strict=True)}
        dims = tuple(d for d in union(t.dims for t in named) if d not in (CATEGORY, ROW))
        tensor = align(base, dims).expand([sizes[d] for d in dims])
        result += float((tensor if mask is None else tensor * align(mask, dims)).sum())
    return result


def _farthest(
    sites: Sequence[ClosedSite], readings: Mapping[str, Reading], plate: str | None, total: int, step: int
) -> dict[str, Tensor]:
    """By site with a location: the largest squared distance of the data from the reference, by event entry [width]."""
    result: dict[str, Tensor] = {}
    for site in sites:
        if site.kind not in ("normal", "mvn"):
            continue
        assert site.reference is not None
        events = events_of(readings[site.name])
        for begin in range(0, total, step):
            part = some_rows(readings[site.name], plate, begin, min(step, total - begin), total)
            (x,) = part.statistics()
            inner = tuple(d for d in events if d in x.dims)
            batch = tuple(d for d in x.dims if d not in inner)
            far = align(x, (*batch, *inner)) - align(site.reference, (*batch, *inner))
            counting = entries_that_count(part, x)
            if counting is not None:
                far = torch.where(align(Named(counting, x.dims), (*batch, *inner)), far, 0.0)
            top = far.square().reshape(-1, prod(far.shape[len(batch) :])).amax(0)
            result[site.name] = torch.maximum(result[site.name], top) if site.name in result else top
    return result
