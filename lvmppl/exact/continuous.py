"""Exact posteriors of models with continuous latent sites: Gaussian where the log joint is quadratic, else quadrature.

The continuous sites of one row are stacked into a vector z⁽ⁿ⁾ ∈ ℝᵈ; the model is evaluated at many points of it at once
(an extra axis `POINTS` left of the plates) and enumerated sites are kept as an axis of configurations, so that
log p(x, z, c) comes as a table [S, C, N] and log p(x) = log Σ_c ∫ p(x, z, c) dz.

Rows: a row per datum where every latent site lies in the data plate; one row for everything otherwise.
Shapes: S points, C = (C₁, …) enumerated sites, N data, d dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import CatTransform, Transform, biject_to, constraints, identity_transform

from lvmppl.density import POINTS, Evaluation, Factor, HeldJoint, Joint, Rows, SiteInfo, Values
from lvmppl.errors import IntractableError, ModelError
from lvmppl.exact.named import Named, align
from lvmppl.exact.summed import entries_at_a_point, log_joint_at, pieces_of

MAX_CONFIGURATIONS = 4096
MAX_DENSE = 400  # dimensions of a dense Gaussian row
QUADRATURE_DIMS = 3
_MAX_SINGLE = 10_000  # points of a model that takes one at a time, some milliseconds each


@dataclass(frozen=True)
class Block:
    """One continuous site's place in the stacked vector."""

    name: str
    begin: int
    size: int
    inner: tuple[str, ...]  # plates, besides the data plate of a row per datum, whose elements are stacked
    event_shape: tuple[int, ...]

    @property
    def columns(self) -> range:
        return range(self.begin, self.begin + self.size)


@dataclass(frozen=True)
class Layout:
    """How continuous sites make up z [*rows, d], and which enumerated sites index its configurations.

    discrete: in the order of the leading axes of rows. local: a row per datum. summed: enumerated sites that are summed
    out at every point instead, since they lie in plates that couple through the continuous ones.
    """

    blocks: tuple[Block, ...]
    dim: int
    discrete: tuple[str, ...]
    discrete_sizes: tuple[int, ...]
    local: bool
    plate_sizes: Mapping[str, int]
    transform: Transform | None
    summed: tuple[str, ...] = ()

    def rows(self, data_plate: str | None) -> tuple[int, ...]:
        tail = (self.plate_sizes[data_plate],) if self.local and data_plate is not None else ()
        return (*self.discrete_sizes, *tail) or (1,)


def layout_of(joint: Joint, evaluation: Evaluation) -> Layout:
    """Stack the continuous sites.

    evaluation: one pass of the model, from which sizes of plates and enumerated sites are read.

    Raises:
        IntractableError: discrete sites that are not enumerated, or plates that couple rows in a way that is not handled.
    """
    structure = joint.structure
    plate = structure.data_plate
    latents = [s for s in structure.sites.values() if s.kind == "latent"]
    unmarked = [s for s in latents if s.finite]
    if unmarked:
        raise _intractable(
            unmarked,
            "discrete sites that are not marked for enumeration in parallel",
            f"write infer={{'enumerate': 'parallel'}} in pyro.sample('{unmarked[0].name}', …)",
        )
    stuck = [s for s in latents if s.discrete]
    if stuck:
        raise _intractable(
            stuck,
            "discrete sites whose states cannot be listed",
            "truncate an unbounded one to a Categorical, declare entries by pyro.plate instead of .to_event, or use svi",
        )
    masses = [s for s in latents if s.family == "Delta"]
    if masses:
        raise _intractable(
            masses,
            "a point mass, which has no density to integrate",
            "make it a pyro.param or pyro.deterministic",
        )
    for factor in evaluation.factors:
        if isinstance(factor.scale, Tensor) or factor.scale != 1.0:
            raise _intractable(
                latents,
                f"site '{factor.site}' carries a scale, which acts after they are integrated",
                "leave it out",
            )
    enumerated = [structure.sites[n] for n in structure.enumerated]
    local = plate is not None and all(plate in s.plates for s in (*latents, *enumerated))
    home = {plate} if local else set()
    chains = [structure.sites[n] for n in structure.enumerated if evaluation.variables[n].steps is not None]
    if chains and local:
        raise _intractable(
            [*latents, *chains],
            "a discrete chain beside continuous sites of its datum, whose every sequence would be a configuration",
            "use svi with a guide over both",
        )
    summed = tuple(structure.enumerated) if chains or any(set(s.plates) - home for s in enumerated) else ()
    blocks, begin, transforms, lengths = [], 0, [], []
    for site in latents:
        inner = tuple(p for p in site.plates if p not in home)
        size = math.prod(evaluation.plate_sizes[p] for p in inner) * math.prod(site.event_shape)
        blocks.append(Block(site.name, begin, size, inner, site.event_shape))
        transforms.append(_transform(site))
        lengths.append(size)
        begin += size
    plain = all(t is identity_transform for t in transforms)
    whole = (
        None if plain else transforms[0] if len(transforms) == 1 else CatTransform(transforms, -1, lengths)
    )
    names = () if summed else tuple(reversed(structure.enumerated))  # later sites are enumerated further left
    sizes = tuple(evaluation.variables[n].size for n in names)
    if math.prod(sizes) > MAX_CONFIGURATIONS:
        raise _intractable(
            enumerated,
            f"{math.prod(sizes):,} configurations (at most {MAX_CONFIGURATIONS:,})",
            "use vem or svi",
        )
    return Layout(tuple(blocks), begin, names, sizes, local, evaluation.plate_sizes, whole, summed)


def _transform(site: SiteInfo) -> Transform:
    """ℝ → support, elementwise."""
    support = site.support
    while isinstance(support, constraints.independent | constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    if support is constraints.real or support is constraints.real_vector:
        return identity_transform
    transform: Transform = biject_to(support)
    if transform.domain.event_dim or transform.codomain.event_dim:
        raise _intractable([site], f"a support ({support}) whose coordinates are tied", "use vem or svi")
    return transform


def _intractable(sites: list[SiteInfo], what: str, fix: str) -> IntractableError:
    listing = ", ".join(f"{s.name} ({s.family})" for s in sites)
    return IntractableError(
        "exact posterior", "latent sites that can be summed or integrated", f"{listing}: {what}", fix
    )


def held_at(joint: Joint, layout: Layout, z: Tensor) -> HeldJoint:
    """The model with its continuous sites at the stacked vectors z [S, *rows, d]."""
    first = joint.first_available_dim
    configurations = {first - 1 - i: name for i, name in enumerate(reversed(layout.discrete))}
    return joint.held({b.name: _placed(joint, layout, b, z) for b in layout.blocks}, configurations)


def _placed(joint: Joint, layout: Layout, block: Block, z: Tensor) -> Tensor:
    """One site's values [*C, S, *plates, *event] from the stacked vectors."""
    plate, nesting = joint.structure.data_plate, joint.structure.nesting
    part = z[..., block.begin : block.begin + block.size]
    sizes = layout.discrete_sizes
    home = [plate] if layout.local and plate is not None else []
    rows = [layout.plate_sizes[p] for p in home]
    part = part.reshape(z.shape[0], *sizes, *rows, block.size).movedim(0, len(sizes))  # [*C, S, N?, size]
    axes = joint.structure.plate_axes
    inner = sorted(block.inner, key=lambda p: axes[p])  # left to right
    part = part.reshape(*part.shape[:-1], *(layout.plate_sizes[p] for p in inner), *block.event_shape)
    have = home + list(inner)
    order = sorted(range(len(have)), key=lambda i: axes[have[i]])
    lead = len(sizes) + 1
    events = range(lead + len(have), part.dim())
    part = part.permute(*range(lead), *(lead + i for i in order), *events)
    shape = [1] * nesting
    for i in order:
        shape[axes[have[i]]] = layout.plate_sizes[have[i]]
    return part.reshape(*part.shape[:lead], *shape, *block.event_shape)


@dataclass
class _Manner:
    """How a model is run at many points (None: not yet known), and the points it was run at one by one."""

    singly: bool | None
    evaluated: int = 0


class LogJointOfModel:
    """log p(x, z, c; θ) as a function of z [S, *rows, d] in the support of the sites: [S, *rows].

    Factors outside of the data plate depend on no row's z where rows are data: `constant_part` has them.

    A model that does not take many points at once (`x @ w` reads a second axis of w as a matrix) is found at the first
    call, by comparison with one point at a time, and then runs once a point.
    """

    def __init__(
        self, joint: Joint, data: Values, values: Values, layout: Layout, manner: _Manner | None = None
    ) -> None:
        self.joint, self.data, self.values, self.layout = joint, data, values, layout
        self.plate = joint.structure.data_plate
        self._manner = manner or _Manner(False if layout.discrete or layout.summed else None)

    def of_rows(self, index: Tensor) -> LogJointOfModel:
        """The log joint of some data only (rows of the data plate by index), for blocks of a local layout."""
        assert self.layout.local and self.plate is not None
        part = {k: v[index] for k, v in self.data.items()}
        sizes = {**self.layout.plate_sizes, self.plate: len(index)}
        layout = replace(self.layout, plate_sizes=sizes)
        return LogJointOfModel(self.joint, part, self.values, layout, self._manner)

    def evaluation(self, z: Tensor) -> Evaluation:
        """The factors with the sites held at z."""
        return held_at(self.joint, self.layout, z).evaluate(self.data, self.values)

    def __call__(self, z: Tensor) -> Tensor:
        if self.layout.summed:
            return torch.cat([self._summed(part) for part in pieces_of(z, self.entries)]).reshape(
                z.shape[:-1]
            )
        return self._one_by_one(z) if self._runs_singly(z) else self._at_once(z)

    def _runs_singly(self, z: Tensor) -> bool:
        if self._manner.singly is None:
            self._manner.singly = not self._takes_many(z)
        return self._manner.singly

    def _at_once(self, z: Tensor) -> Tensor:
        lead = (*self.layout.discrete, POINTS)
        tail = (self.plate,) if self.layout.local and self.plate is not None else ()
        rows = (self.layout.plate_sizes[tail[0]],) if tail else ()
        total = self._total(self.evaluation(z), (*lead, *tail))
        target = (*self.layout.discrete_sizes, z.shape[0], *rows)
        return total.expand(target).movedim(len(lead) - 1, 0).reshape(z.shape[:-1])

    def _total(self, evaluation: Evaluation, dims: tuple[str, ...]) -> Tensor:
        """Σ of the factors that depend on rows, over `dims`."""
        total: Tensor | None = None
        for factor in evaluation.factors:
            if is_constant(factor, self.joint, self.layout):
                continue
            part = self._table(factor, dims)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _takes_many(self, z: Tensor) -> bool:
        """Whether the model at several points at once is what it is at the first and at the last of them.

        Raises:
            ModelError: it runs neither way.
        """
        ends = z.detach()[[0, -1]]
        with torch.no_grad():
            try:
                together = self._at_once(ends)
            except ModelError as error:
                try:
                    self._one_by_one(ends)
                except ModelError:
                    raise error from None
                return False
            try:
                apart = self._one_by_one(ends)
            except (ModelError, IntractableError):
                return True
        tolerance = 1e-3 if z.dtype == torch.float32 else 1e-6
        return torch.allclose(together, apart, rtol=tolerance, atol=tolerance, equal_nan=True)

    def _one_by_one(self, z: Tensor) -> Tensor:
        """The same, each point as the model itself would draw it."""
        self._manner.evaluated += len(z)
        if self._manner.evaluated > _MAX_SINGLE:
            names = ", ".join(b.name for b in self.layout.blocks)
            raise IntractableError(
                "exact posterior",
                f"a model that takes many values of {names} at once",
                f"one that runs with one at a time only, and more than {_MAX_SINGLE:,} points to run it at",
                "write products so that axes to the left are carried along: (x * w).sum(-1) for x @ w",
            )
        tail = (self.plate,) if self.layout.local and self.plate is not None else ()
        parts = []
        for point in z:
            total = self._total(self._evaluation_at(point), tail)
            parts.append(total.expand([self.layout.plate_sizes[p] for p in tail]))
        return torch.stack(parts).reshape(z.shape[:-1])

    def _evaluation_at(self, point: Tensor) -> Evaluation:
        held = {b.name: self._drawn(b, point) for b in self.layout.blocks}
        return self.joint.held(held).evaluate(self.data, self.values)

    def dependent(self, z: Tensor) -> list[str]:
        """The sites whose log-density depends on the continuous ones, by evaluation at z [S, *rows, d], S > 1."""
        with torch.no_grad():
            if not self._runs_singly(z):
                return [f.site for f in self.evaluation(z).factors if POINTS in f.dims]
            first, *others = (self._evaluation_at(point).factors for point in z)
        return [
            f.site
            for i, f in enumerate(first)
            if not all(torch.equal(f.log_prob, other[i].log_prob) for other in others)
        ]

    def _drawn(self, block: Block, point: Tensor) -> Tensor:
        """One site's value at one point [*rows, d], with the axes that its own plates give it."""
        placed = _placed(self.joint, self.layout, block, point.unsqueeze(0))
        axes = self.joint.structure.plate_axes
        own = [-axes[p] for p in self.joint.structure.sites[block.name].plates]
        rank = max(own, default=0) + len(block.event_shape)
        return placed.reshape(placed.shape[placed.dim() - rank :])

    def _summed(self, z: Tensor) -> Tensor:
        evaluation = self.evaluation(z)
        factors = [f for f in evaluation.factors if not is_constant(f, self.joint, self.layout)]
        return log_joint_at(evaluation, factors, len(z))

    @cached_property
    def entries(self) -> int:
        """Of the largest summed site at one point."""
        with torch.no_grad():
            variables = self.joint.evaluate(self.data, self.values).variables
        return entries_at_a_point(variables, self.layout.plate_sizes)

    def _table(self, factor: Factor, dims: tuple[str, ...]) -> Tensor:
        """A factor's log-probabilities over `dims`, its other plates multiplied out."""
        named = Named(factor.log_prob, factor.dims)
        out = [i for i, d in enumerate(named.dims) if d not in dims]
        tensor = named.tensor.sum(out) if out else named.tensor
        for plate in factor.plates:
            if plate not in named.dims and plate not in dims:
                tensor = tensor * self.layout.plate_sizes[plate]
        return align(Named(tensor, tuple(d for d in named.dims if d in dims)), dims)


def is_constant(factor: Factor, joint: Joint, layout: Layout) -> bool:
    """Whether a factor belongs to no row: a prior of parameters, or outside of the data plate while every latent site is
    within."""
    return _is_prior(factor, joint) or (layout.local and joint.structure.data_plate not in factor.plates)


def _is_prior(factor: Factor, joint: Joint) -> bool:
    return (
        joint.structure.sites[factor.site].kind == "parameter"
        if factor.site in joint.structure.sites
        else False
    )


def constant_part(joint: Joint, evaluation: Evaluation, layout: Layout) -> Tensor:
    """Σ of the log-factors that belong to no row, priors of parameters aside: a scalar."""
    like = evaluation.factors[0].log_prob
    total = torch.zeros((), dtype=like.dtype, device=like.device)
    for factor in evaluation.factors:
        if is_constant(factor, joint, layout) and not _is_prior(factor, joint):
            repeats = math.prod(layout.plate_sizes[p] for p in factor.plates if p not in factor.dims)
            total = total + repeats * factor.log_prob.sum()
    return total


__all__ = ["Block", "Layout", "LogJointOfModel", "Rows", "constant_part", "held_at", "layout_of"]
