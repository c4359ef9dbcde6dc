"""log p(x; θ) of a problem as a function of θ, in pieces of the data that fit the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lvmppl.algorithms.problem import Problem
from lvmppl.continuous_posteriors import ContinuousPosterior
from lvmppl.density import Factor, Rows, Values
from lvmppl.exact.elimination import eliminate
from lvmppl.exact.engine import continuous_posterior
from lvmppl.posteriors import Posterior

CHUNK = 8192  # rows evaluated at once: N × K × D then stays within the cache


def chunks(problem: Problem) -> Iterator[tuple[Values, Rows]]:
    """The data in consecutive pieces, each weighing 1 (all rows at once when a global site couples them).

    The total in a piece's `Rows` is its own size: the pieces are parts of a sum, not estimates of it.
    """
    total = problem.num_rows
    if total <= CHUNK or not is_chunkable(problem):
        yield problem.data, Rows(total)
        return
    for begin in range(0, total, CHUNK):
        part = {k: v[begin : begin + CHUNK] for k, v in problem.data.items()}
        yield part, Rows(min(CHUNK, total - begin))


def is_chunkable(problem: Problem) -> bool:
    """Whether log p(x) is a sum over rows: every latent site lies in the data plate, and θ holds no per-datum table."""
    structure = problem.model.structure
    plate = structure.data_plate
    local = all(plate in s.plates for s in structure.sites.values())
    return plate is not None and local and not any(s.is_table for s in structure.parameters.values())


def log_evidence(problem: Problem, values: Values) -> Tensor:
    """Σₙ log p(x⁽ⁿ⁾; θ) (a scalar tensor; differentiable if `values` are)."""
    total: Tensor | None = None
    for data, rows in chunks(problem):
        evaluation = problem.model.evaluate(data, values, rows)
        part = eliminate(
            evaluation.factors, evaluation.variables, evaluation.plate_sizes, problem.data_plate
        ).total
        total = part if total is None else total + part
    assert total is not None
    return total


def exact_posterior(problem: Problem, values: Values) -> Posterior | ContinuousPosterior:
    """p(z | x; θ) over all rows, by the engine that serves the model.

    Raises:
        IntractableError: none does; names the sites in the way and what to use instead.
    """
    if any(s.kind == "latent" for s in problem.model.structure.sites.values()):
        with torch.no_grad():
            return continuous_posterior(problem.model, problem.data, values)
    return _enumerated_posterior(problem, values)


def _enumerated_posterior(problem: Problem, values: Values) -> Posterior:
    parts: list[tuple[Factor, ...]] = []
    with torch.no_grad():
        for data, rows in chunks(problem):
            last = problem.model.evaluate(data, values, rows)
            parts.append(last.factors)
    sizes = dict(last.plate_sizes)
    plate = problem.data_plate
    if plate is not None:
        sizes[plate] = problem.num_rows
    factors = parts[0] if len(parts) == 1 else tuple(_join(list(f), plate) for f in zip(*parts, strict=True))
    names = ", ".join(last.variables) or "no latent site"
    return Posterior(factors, last.variables, sizes, plate, f"enumeration of {names} by variable elimination")


def _join(pieces: list[Factor], plate: str | None) -> Factor:
    """One factor from its pieces along the data plate."""
    first = pieces[0]
    if plate not in first.dims:
        return first
    assert plate is not None
    axis = first.dims.index(plate)
    tensors = [p.log_prob if p.dims == first.dims else p.log_prob.unsqueeze(axis) for p in pieces]
    scale = first.scale
    if isinstance(scale, Tensor) and plate in first.scale_dims:
        at = first.scale_dims.index(plate)
        scale = torch.cat([p.scale for p in pieces if isinstance(p.scale, Tensor)], at)
    joined = torch.cat(tensors, axis)
    return Factor(first.site, joined, first.dims, first.plates, scale, first.scale_dims, first.observed)
