"""Lookups that the data choose (`table[group]`) for every row, where a proposal came from some rows only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from lvmppl.algorithms.evidence import chunks
from lvmppl.algorithms.probing import PROBE_SEED, Lookup, Matcher, Proposal, probe_values
from lvmppl.algorithms.problem import Problem
from lvmppl.density import isolated, unvalidated
from lvmppl.exponential import read_factors

_MAX_ENTRIES = 5e7  # of a site's fields, rows × states × events, up to which they are looked up


def over_all_rows(problem: Problem, proposal: Proposal) -> Proposal:
    """The proposal with lookups that the data choose (`table[group]`) for every row, where the model was probed on some.

    The model is probed again piece by piece. A site stays as it is where a field is none on some piece, where it is not
    known what goes with a location, or where rows × entries would be too many.
    """
    plate, total = problem.data_plate, problem.num_rows
    wanted: dict[str, dict[str, list[Lookup | None]]] = {}
    for name, use in proposal.uses.items():
        own = {k: f for k, f in use.lookups.items() if f is not None and plate in f.dims}
        others = {k for k, f in use.lookups.items() if f is None} - {"loc"}
        short = [f for f in own.values() if f.index.shape[f.dims.index(str(plate))] < total]
        entries = sum(f.index.numel() / f.index.shape[f.dims.index(str(plate))] for f in short) * total
        if any(f.names for f in short) and not others and entries <= _MAX_ENTRIES:
            wanted[name] = {k: [] for k in own}
    if not wanted or problem.integrates:
        return proposal
    for lookups in _looked_up_by_piece(problem, wanted):
        for name, own_fields in wanted.items():
            for key, found in own_fields.items():
                found.append(lookups.get((name, key)))
    uses = dict(proposal.uses)
    for name, own_fields in wanted.items():
        first = uses[name].lookups
        joined = {k: _joined(problem, str(plate), first[k], parts) for k, parts in own_fields.items()}
        if all(f is not None for f in joined.values()):
            uses[name] = replace(uses[name], lookups={**first, **joined})
    return replace(proposal, uses=uses)


def _looked_up_by_piece(
    problem: Problem, wanted: Mapping[str, Iterable[str]]
) -> Iterator[dict[tuple[str, str], Lookup]]:
    """Piece by piece of the data, the fields of these sites that are lookups."""
    problem = replace(problem, model=problem.model.to(torch.float64))
    with isolated(seed=PROBE_SEED, dtype=torch.float64), unvalidated(), torch.no_grad():
        first, second = probe_values(problem, 0), probe_values(problem, 1)
        match = Matcher(problem, first, second)
        for data, rows in chunks(problem):
            data = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
            ones, twos = (
                {
                    n: r
                    for v in problem.model.view(data, p, rows)[0].values()
                    for n, r in read_factors(v).items()
                }
                for p in (first, second)
            )
            found = {}
            for name, keys in wanted.items():
                one, two = ones.get(name), twos.get(name)
                if one is None or two is None:
                    continue
                for key in keys:
                    a, b = one.fields[key], two.fields[key]
                    lookup = match.field(one.kind, key, a, b) if a.dims == b.dims else None
                    if lookup is not None:
                        found[name, key] = lookup
            yield found


def _joined(
    problem: Problem, plate: str, first: Lookup | None, parts: Sequence[Lookup | None]
) -> Lookup | None:
    """Lookups of consecutive pieces as one, in the way of the first; None where they do not go together."""
    assert first is not None
    starts, begin = {}, 0
    for name in first.names:
        starts[name], begin = begin, begin + problem.initial[name].numel()
    indices, constants = [], []
    for part in parts:
        if part is None or part.dims != first.dims or not set(part.names) <= set(first.names):
            return None
        if part.names and part.spelling != first.spelling:
            return None
        index, begin = torch.full_like(part.index, -1), 0
        for name in part.names:
            size = problem.initial[name].numel()
            here = (part.index >= begin) & (part.index < begin + size)
            index = torch.where(here, part.index - begin + starts[name], index)
            begin += size
        indices.append(index)
        constants.append(part.constant)
    axis = first.dims.index(plate)
    return replace(first, index=torch.cat(indices, axis), constant=torch.cat(constants, axis), direct=False)


__all__ = ["over_all_rows"]
