"""Exact posteriors of models with continuous latent sites: Gaussian where the log joint is quadratic, else quadrature.

The continuous sites of one row are stacked into a vector z⁽ⁿ⁾ ∈ ℝᵈ; the model is evaluated at many points of it at once
(an extra axis `POINTS` left of the plates) and enumerated sites are kept as an axis of configurations, so that
log p(x, z, c) comes as a table [S, C, N] and log p(x) = log Σ_c ∫ p(x, z, c) dz.

Rows: a row per datum where every latent site lies in the data plate; one row for everything otherwise.
Shapes: S points, C = (C₁, …) enumerated sites, N data, d dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lvmppl.density import POINTS, Evaluation, Factor, HeldJoint, Joint, Values
from lvmppl.errors import IntractableError, ModelError
from lvmppl.exact.layout import Block, Layout, is_constant, is_prior
from lvmppl.exact.named import Named, align
from lvmppl.exact.scales import ratio, relative_to, scale_of, times
from lvmppl.exact.summed import entries_at_a_point, log_joint_at, pieces_of

MAX_DENSE = 400  # dimensions of a dense Gaussian row
QUADRATURE_DIMS = 3
_MAX_SINGLE = 10_000  # points of a model that takes one at a time, some milliseconds each


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

    @property
    def device(self) -> torch.device:
        """Where the data are."""
        return next(iter(self.data.values())).device if self.data else torch.get_default_device()

    def of_rows(self, index: Tensor) -> LogJointOfModel:
        """The log joint of some data only (rows of the data plate by index), for blocks of a local layout."""
        assert self.layout.local and self.plate is not None
        part = {k: v[index] for k, v in self.data.items()}
        sizes = {**self.layout.plate_sizes, self.plate: len(index)}
        scale = self.layout.scale
        scale = Named(scale.tensor[index], scale.dims) if scale.dims else scale
        layout = replace(self.layout, plate_sizes=sizes, scale=scale)
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
        return log_joint_at(*self.factors(z), len(z))

    def factors(self, z: Tensor) -> tuple[Evaluation, list[Factor]]:
        """One pass with the sites held at z, and those of its factors that belong to rows."""
        evaluation = self.evaluation(z)
        own = (f for f in evaluation.factors if not is_constant(f, self.joint, self.layout))
        return evaluation, list(relative_to(self.layout.scale, own))

    @cached_property
    def entries(self) -> int:
        """Of the largest summed site at one point."""
        with torch.no_grad():
            variables = self.joint.evaluate(self.data, self.values).variables
        return entries_at_a_point(variables, self.layout.plate_sizes)

    def _table(self, factor: Factor, dims: tuple[str, ...]) -> Tensor:
        """A factor's log-probabilities over `dims`, its other plates multiplied out."""
        named = times(Named(factor.log_prob, factor.dims), ratio(scale_of(factor), self.layout.scale))
        out = [i for i, d in enumerate(named.dims) if d not in dims]
        tensor = named.tensor.sum(out) if out else named.tensor
        for plate in factor.plates:
            if plate not in named.dims and plate not in dims:
                tensor = tensor * self.layout.plate_sizes[plate]
        return align(Named(tensor, tuple(d for d in named.dims if d in dims)), dims)


def constant_part(joint: Joint, evaluation: Evaluation, layout: Layout) -> Tensor:
    """Σ of the log-factors that belong to no row, priors of parameters aside, by state of the sites that rows share."""
    sizes = dict(zip(layout.discrete, layout.discrete_sizes, strict=True))
    total = evaluation.factors[0].log_prob.new_zeros([sizes[n] for n in layout.outer])
    for factor in evaluation.factors:
        if is_constant(factor, joint, layout) and not is_prior(factor, joint):
            named = times(Named(factor.log_prob, factor.dims), scale_of(factor))
            repeats = math.prod(layout.plate_sizes[p] for p in factor.plates if p not in named.dims)
            out = [i for i, d in enumerate(named.dims) if d not in layout.outer]
            kept = Named(
                named.tensor.sum(out) if out else named.tensor,
                tuple(d for d in named.dims if d in layout.outer),
            )
            total = total + repeats * align(kept, layout.outer)
    return total
