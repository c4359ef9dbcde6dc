"""Which λ are the parameters of q: found by running the guide at two probe values, as θ is found in a model.

A coordinate update says what distribution q of a site becomes. To write it down, each field of that distribution (a
table of probabilities, a location, a rate) must be g(λ) for one whole parameter λ and a known spelling g: a table with a
row per datum, or one parameter of a global site. What an encoder computes is not.

Shapes: K states, T steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import transform_to

from lvmppl.algorithms.conjugate import member_of
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.spellings import LOCATION, MATRIX, POSITIVE, PROBABILITY, SIMPLEX, Spelling
from lvmppl.density import Factor, SiteView, Values, chain_axes, isolated
from lvmppl.elbo import MOVES
from lvmppl.exact.named import Named, align

TABLE, BINARY, CHAIN, STEPS, CONTINUOUS = "table", "binary table", "chain", "steps", "continuous"

_SPELLINGS: dict[str, tuple[Spelling, ...]] = {
    "probs": SIMPLEX,
    "initial": SIMPLEX,
    "transition": SIMPLEX,
    "probability": PROBABILITY,
    "loc": LOCATION,
    "covariance": MATRIX,
}


@dataclass(frozen=True)
class Held:
    """A field of q that is g(λ): the name of λ and g."""

    name: str
    spelling: Spelling

    def write(self, field: Tensor, values: Values) -> Tensor:
        """λ at which the field is this one."""
        old = values[self.name]
        return self.spelling.invert(field.reshape(self.spelling.apply(old).shape), old).detach()


@dataclass(frozen=True)
class Block:
    """A site of q with an optimum to write down: how its distribution is stored, and in which λ."""

    site: str
    kind: str
    held: Mapping[str, Held]
    plates: tuple[str, ...]  # with an axis in q, in the order of its axes

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(h.name for h in self.held.values())

    def write(self, fields: Mapping[str, Tensor], values: Values) -> dict[str, Tensor]:
        """The λ that hold these fields."""
        return {h.name: h.write(fields[k], values) for k, h in self.held.items()}


class Unfit(Exception):
    """Why a site of q has no closed form."""


def find_blocks(problem: Problem) -> tuple[dict[str, Block], dict[str, str]]:
    """(blocks by site, reasons of the sites that are none)."""
    assert problem.guided is not None and problem.guided.guide_structure is not None
    with isolated(seed=20_021, dtype=torch.get_default_dtype()), torch.no_grad():
        probes = [_probe(problem, i) for i in range(2)]
        readings = [_read(problem, values) for values in probes]
    blocks: dict[str, Block] = {}
    reasons: dict[str, str] = {}
    for name in problem.guided.guide_structure.sites:
        try:
            own = [r[name] for r in readings]
            for reading in own:
                if isinstance(reading, str):
                    raise Unfit(reading)
            blocks[name] = _block(problem, name, own, probes)  # type: ignore[arg-type]
        except Unfit as why:
            reasons[name] = str(why)
    return blocks, reasons


def _probe(problem: Problem, seed: int) -> dict[str, Tensor]:
    """θ as it is, λ at random."""
    assert problem.guided is not None
    generator = torch.Generator().manual_seed(6271 * (seed + 1))
    values = dict(problem.initial)
    for name in problem.lambda_:
        transform = transform_to(problem.guided.specs[name].constraint)
        free = transform.inv(values[name])
        noise = torch.randn(free.shape, generator=generator, dtype=torch.float64).to(free.dtype)
        values[name] = transform(0.5 * noise).detach()
    return values


@dataclass(frozen=True)
class _Reading:
    """q of one site at probe values: its kind, its fields and its plates."""

    kind: str
    fields: dict[str, Tensor]
    plates: tuple[str, ...]


def _read(problem: Problem, values: Values) -> dict[str, _Reading | str]:
    """Each site's reading, or why there is none."""
    assert problem.guided is not None
    views, evaluation = problem.guided.view_guide(problem.data, values, problem.rows()[1])
    result: dict[str, _Reading | str] = {}
    for name, view in views.items():
        try:
            if name not in problem.model.structure.sites:
                raise Unfit("is no site of the model")
            if name in evaluation.variables:
                own = _enumerated(view, evaluation.variables[name].steps, problem)
            else:
                own = _continuous(view)
            sizes = {p: s for p, s in evaluation.plate_sizes.items() if p in view.plates and s > 1}
            missing = [p for p in sizes if p not in own.plates]
            if missing:
                raise Unfit(f"is one distribution for all elements of plate '{missing[0]}'")
            result[name] = own
        except Unfit as why:
            result[name] = str(why)
    return result


def _enumerated(view: SiteView, steps: int | None, problem: Problem) -> _Reading:
    name = view.name
    if problem.model.structure.sites[name].kind != "enumerated":
        raise Unfit("is not marked infer={'enumerate': 'parallel'} in the model")
    factors = {f.site: f for f in view.factors()}
    own = {name} if steps is None else {name, *chain_axes(name, steps)}
    across = [view.axis_names[axis] for axis in sorted(view.axis_names)]
    plates = tuple(p for p in across if p in view.plates and any(p in f.dims for f in factors.values()))
    for factor in factors.values():
        others = [d for d in factor.dims if d not in own and d not in view.plates]
        if others:
            raise Unfit(f"depends on '{others[0]}' under q")
    if steps is None:
        probs = _table(factors[name], (*plates, name))
        if probs.shape[-1] == 2:
            return _Reading(BINARY, {"probs": probs, "probability": probs[..., 1]}, plates)
        return _Reading(TABLE, {"probs": probs}, plates)
    initial = _table(factors[name], (*plates, name))
    moves = _table(factors[name + MOVES], (*plates, *chain_axes(name, steps)))
    fields = {"initial": initial, "transition": moves}
    if moves.shape[-3] == max(steps - 1, 1) and torch.equal(moves, moves[..., :1, :].expand(moves.shape)):
        batch = broadcast_shape(initial.shape[:-1], moves.shape[:-3])
        first = initial.unsqueeze(-2).expand(*batch, 1, -1)
        later = moves[..., 0, :].expand(*batch, -1, -1)[..., : steps - 1, :]
        fields["probs"] = torch.cat([first, later], -2)
    return _Reading(CHAIN, fields, plates)


def _table(factor: Factor, dims: Sequence[str]) -> Tensor:
    return align(Named(factor.log_prob, factor.dims), dims).exp()


def _continuous(view: SiteView) -> _Reading:
    member = member_of(view.fn)
    if member is None:
        raise Unfit(f"{_family(view)} is in no family with a closed form")
    batch = member.batch
    plates = tuple(
        view.axis_names[a] for a in range(-len(batch), 0) if a in view.axis_names and batch[a] != 1
    )
    for tensor in member.fields.values():
        if any(tensor.stride(a) == 0 and tensor.shape[a] > 1 for a in range(len(batch))):
            raise Unfit("is one distribution for all elements of a plate")
    return _Reading(CONTINUOUS, member.fields, plates)


def _family(view: SiteView) -> str:
    fn = view.fn
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    inner = type(fn).__name__
    return inner if type(view.fn).__name__ != "TransformedDistribution" else f"a transformed {inner}"


def _block(problem: Problem, site: str, readings: Sequence[_Reading], probes: Sequence[Values]) -> Block:
    first = readings[0]
    for kind, keys in _layouts(first):
        held: dict[str, Held] = {}
        for key in keys:
            found = _holder(problem, key, [r.fields[key] for r in readings], probes)
            if found is not None:
                held[key] = found
        names = [h.name for h in held.values()]
        if len(held) == len(keys) and len(set(names)) == len(names):
            return Block(site, kind, held, first.plates)
    raise Unfit("its distribution is computed from λ, not λ itself")


def _layouts(reading: _Reading) -> list[tuple[str, tuple[str, ...]]]:
    """Ways in which q of a site may be stored: (kind, fields)."""
    if reading.kind == CHAIN:
        return [(CHAIN, ("initial", "transition")), (STEPS, ("probs",))][
            :: -1 if "probs" in reading.fields else 1
        ]
    if reading.kind == BINARY:
        return [(TABLE, ("probs",)), (BINARY, ("probability",))]
    return [(reading.kind, tuple(reading.fields))]


def _holder(problem: Problem, key: str, fields: Sequence[Tensor], probes: Sequence[Values]) -> Held | None:
    """The λ and the spelling of which a field is the value, at both probes."""
    assert problem.guided is not None
    for name in problem.lambda_:
        constraint = problem.guided.specs[name].constraint
        for spelling in _SPELLINGS.get(key, POSITIVE):
            if not spelling.applies(constraint) or probes[0][name].dim() < spelling.unit:
                continue
            pairs = [(spelling.apply(p[name]), f) for p, f in zip(probes, fields, strict=True)]
            if all(_equal(a, b, spelling.unit) for a, b in pairs):
                return Held(name, spelling)
    return None


def _equal(a: Tensor, b: Tensor, unit: int) -> bool:
    same = a.numel() == b.numel() and a.shape[a.dim() - unit :] == b.shape[b.dim() - unit :]
    return same and torch.allclose(a.flatten(), b.flatten(), rtol=1e-6, atol=0.0)


__all__ = ["BINARY", "CHAIN", "CONTINUOUS", "STEPS", "TABLE", "Block", "Unfit", "find_blocks"]
