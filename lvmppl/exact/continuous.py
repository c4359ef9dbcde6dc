"""Exact posteriors of models with continuous latent sites: Gaussian where the log joint is quadratic, else quadrature.

The continuous sites of one row are stacked into a vector z⁽ⁿ⁾ ∈ ℝᵈ; the model is evaluated at many points of it at once
(an extra axis `POINTS` left of the plates) and enumerated sites are kept as an axis of configurations, so that
log p(x, z, c) comes as a table [S, C, N] and log p(x) = log Σ_c ∫ p(x, z, c) dz.

Rows: a row per datum where every latent site lies in the data plate; one row for everything otherwise.
Shapes: S points, C = (C₁, …) enumerated sites, N data, d dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lvmppl.density import POINTS, Evaluation, Factor, HeldJoint, Joint, Values
from lvmppl.errors import IntractableError, ModelError
from lvmppl.exact.layout import Block, Layout, is_constant, is_prior
from lvmppl.exact.named import Named, align
from lvmppl.exact.scales import ratio, relative_to, scale_of, times
from lvmppl.exact.summed import ByRow, by_row, entries_at_a_point, log_joint_at, pieces_of

MAX_DENSE = 400  # dimensions of a dense Gaussian row
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


def values_at(joint: Joint, layout: Layout, point: Tensor) -> dict[str, Tensor]:
    """The sites' values at one point [N?, d] of one configuration, with the axes that their own plates give them."""
    plain = replace(layout, discrete=(), discrete_sizes=())
    axes, found = joint.structure.plate_axes, {}
    for block in layout.blocks:
        placed = _placed(joint, plain, block, point.unsqueeze(0))
        own = [-axes[p] for p in joint.structure.sites[block.name].plates]
        rank = max(own, default=0) + len(block.event_shape)
        found[block.name] = placed.reshape(placed.shape[placed.dim() - rank :])
    return found


def takes_one(layout: Layout, got: str) -> IntractableError:
    """What is said of a model that runs with one value of its continuous sites at a time, where that is too few."""
    names = ", ".join(b.name for b in layout.blocks)
    return IntractableError(
        "exact posterior",
        f"a model that takes many values of {names} at once",
        f"one that runs with one at a time only, and {got}",
        "write products so that axes to the left are carried along: (x * w).sum(-1) for x @ w, a[..., g] for a[g]",
    )


@dataclass
class _Manner:
    """How a model is run at many points (None: not yet known), and the points it was run at one by one.

    entries: of the largest summed site of one row at one point, None if not yet known.
    singly: as it is written it takes one point at a time. mapped: torch.vmap takes it to many all the same.
    """

    singly: bool | None
    mapped: bool | None = None
    evaluated: int = 0
    entries: int | None = None


class LogJointOfModel:
    """log p(x, z, c; θ) as a function of z [S, *rows, d] in the support of the sites: [S, *rows].

    Factors outside of the data plate depend on no row's z where rows are data: `constant_part` has them.

    A model that does not take many points at once (`x @ w` reads a second axis of w as a matrix) is found at the first
    call, by comparison with a single point, and then runs once a point and configuration.
    """

    def __init__(
        self, joint: Joint, data: Values, values: Values, layout: Layout, manner: _Manner | None = None
    ) -> None:
        self.joint, self.data, self.values, self.layout = joint, data, values, layout
        self.plate = joint.structure.data_plate
        self._manner = manner or _Manner(None)

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

    @property
    def singly(self) -> bool:
        """Whether the model was found to take one point at a time."""
        return bool(self._manner.singly)

    def evaluation(self, z: Tensor) -> Evaluation:
        """The factors with the sites held at z."""
        return self._stacked(z) if self._runs_singly(z) else self._together(z)

    def _together(self, z: Tensor) -> Evaluation:
        return held_at(self.joint, self.layout, z).evaluate(self.data, self.values)

    def __call__(self, z: Tensor) -> Tensor:
        if not self.layout.summed:
            return self._value(self.evaluation(z), z)
        parts = [self._value(self.evaluation(part), part) for part in pieces_of(z, self.entries)]
        return torch.cat(parts)

    def _runs_singly(self, z: Tensor) -> bool:
        if self._manner.singly is None:
            self._manner.singly = not self._takes_many(z)
        return self._manner.singly

    def _value(self, evaluation: Evaluation, z: Tensor) -> Tensor:
        """The log joint at z [S, *rows, d] from its factors there: [S, *rows]."""
        if self.layout.summed:
            return log_joint_at(self._by_row(evaluation, len(z))).reshape(z.shape[:-1])
        lead = (*self.layout.discrete, POINTS)
        tail = (self.plate,) if self.layout.local and self.plate is not None else ()
        rows = (self.layout.plate_sizes[tail[0]],) if tail else ()
        total = self._total(evaluation, (*lead, *tail))
        target = (*self.layout.discrete_sizes, z.shape[0], *rows)
        return total.expand(target).movedim(len(lead) - 1, 0).reshape(z.shape[:-1])

    def _total(self, evaluation: Evaluation, dims: tuple[str, ...]) -> Tensor:
        """Σ of the factors that depend on rows, over `dims`."""
        total: Tensor | None = None
        for factor in evaluation.factors:
            if is_constant(factor, self.joint, self.layout):
                continue
            part = self.row_table(factor, dims)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _takes_many(self, z: Tensor) -> bool:
        """Whether the model at three points at once is, at the second, what it is there alone.

        Raises:
            ModelError: it runs neither way.
        """
        # between the points, as at these themselves sums over all of them may vanish
        shares = torch.rand(3, len(z), generator=torch.Generator().manual_seed(0)).to(z)
        three = torch.tensordot(shares / shares.sum(1, keepdim=True), z.detach(), 1)
        with torch.no_grad():
            try:
                together = self._value(self._together(three), three)[1]
            except ModelError as error:
                try:
                    self._last_alone(three[1])
                except ModelError:
                    raise error from None
                return False
            try:
                alone = self._last_alone(three[1])
            except (ModelError, IntractableError):
                return True
        tolerance = 1e-3 if z.dtype == torch.float32 else 1e-6
        last = together.reshape(math.prod(self.layout.discrete_sizes), -1)[-1]
        return torch.allclose(last, alone, rtol=tolerance, atol=tolerance, equal_nan=True)

    def _last_alone(self, point: Tensor) -> Tensor:
        """The log joint at one point [*rows, d] and the last configuration, as the model itself would draw them: [N] or
        [1].
        """
        (evaluation,) = self._alone(point, [math.prod(self.layout.discrete_sizes) - 1])
        if self.layout.summed:
            return log_joint_at(self._by_row(evaluation, 1))
        tail = (self.plate,) if self.layout.local and self.plate is not None else ()
        return self._total(evaluation, tail).expand([self.layout.plate_sizes[p] for p in tail]).reshape(-1)

    def _alone(self, point: Tensor, configurations: Sequence[int]) -> list[Evaluation]:
        """A pass for each of these configurations, with the values that it has at one point [*rows, d]."""
        sizes = self.layout.discrete_sizes
        flat = point.reshape(math.prod(sizes), *point.shape[len(sizes) :])
        found = []
        for number in configurations:
            held = values_at(self.joint, self.layout, flat[number])
            evaluation = self.joint.held(held).evaluate(self.data, self.values)
            states = torch.unravel_index(torch.tensor(number), sizes) if sizes else ()
            chosen = {n: int(k) for n, k in zip(self.layout.discrete, states, strict=True)}
            found.append(replace(evaluation, factors=tuple(_at(f, chosen) for f in evaluation.factors)))
        return found

    def _stacked(self, z: Tensor) -> Evaluation:
        """The factors at z [S, *rows, d] from a pass for every point and configuration."""
        sizes = self.layout.discrete_sizes
        mapped = self._mapped(z)
        if mapped is not None:
            return mapped
        self._manner.evaluated += len(z) * math.prod(sizes)
        if self._manner.evaluated > _MAX_SINGLE:
            raise takes_one(self.layout, f"more than {_MAX_SINGLE:,} points to run it at")
        every = [e for point in z for e in self._alone(point, range(math.prod(sizes)))]
        factors = []
        for parts in zip(*(e.factors for e in every), strict=True):
            table = torch.stack([f.log_prob for f in parts])
            table = table.reshape(len(z), *sizes, *table.shape[1:])
            dims = (POINTS, *self.layout.discrete, *parts[0].dims)
            factors.append(replace(parts[0], log_prob=table, dims=dims))
        return replace(every[0], factors=tuple(factors))

    def _mapped(self, z: Tensor) -> Evaluation | None:
        """The same from one run of the model as torch.vmap maps it; None where the model does not go through that."""
        if self._manner.mapped is False:
            return None
        first: list[Evaluation] = []

        def tables(point: Tensor) -> list[list[Tensor]]:
            first[:] = self._alone(point, range(math.prod(self.layout.discrete_sizes)))
            return [[f.log_prob for f in e.factors] for e in first]

        try:
            found = torch.vmap(tables, randomness="different")(z)
        except (ModelError, RuntimeError):  # reads a value, say
            if self._manner.mapped:
                raise
            self._manner.mapped = False
            return None
        self._manner.mapped = True
        factors = []
        for own, parts in zip(first[0].factors, zip(*found, strict=True), strict=True):
            table = torch.stack(parts, 1)
            table = table.reshape(len(z), *self.layout.discrete_sizes, *table.shape[2:])
            factors.append(replace(own, log_prob=table, dims=(POINTS, *self.layout.discrete, *own.dims)))
        return replace(first[0], factors=tuple(factors))

    def dependent(self, z: Tensor) -> dict[str, list[str]]:
        """The sites whose log-density depends on the continuous ones, by evaluation at z [S, *rows, d], S > 1; and which
        of the sites that are summed out it depends on too."""
        factors = [f for f in self.evaluation(z).factors if POINTS in f.dims]
        if self._runs_singly(z):
            factors = [
                f for f in factors if not torch.equal(f.log_prob, f.log_prob[:1].expand_as(f.log_prob))
            ]
        return {f.site: [n for n in self.layout.summed if n in f.dims] for f in factors}

    def factors(self, z: Tensor) -> tuple[Evaluation, list[Factor]]:
        """One pass with the sites held at z, and those of its factors that belong to rows."""
        evaluation = self.evaluation(z)
        return evaluation, self._of_rows(evaluation)

    def _of_rows(self, evaluation: Evaluation) -> list[Factor]:
        own = (f for f in evaluation.factors if not is_constant(f, self.joint, self.layout))
        return list(relative_to(self.layout.scale, own))

    def _by_row(self, evaluation: Evaluation, points: int) -> ByRow:
        return by_row(evaluation, self._of_rows(evaluation), self.layout.home(self.plate), points)

    @property
    def entries(self) -> int:
        """Of the largest summed site at one point of all rows."""
        sizes = self.layout.plate_sizes
        rows = math.prod(sizes[p] for p in self.layout.home(self.plate))
        if self._manner.entries is None:
            with torch.no_grad():
                variables = self.joint.evaluate(self.data, self.values).variables
            self._manner.entries = entries_at_a_point(variables, sizes) // rows
        return self._manner.entries * rows

    def row_table(self, factor: Factor, dims: tuple[str, ...]) -> Tensor:
        """A factor's log-probabilities over `dims`, its other plates multiplied out."""
        named = times(Named(factor.log_prob, factor.dims), ratio(scale_of(factor), self.layout.scale))
        out = [i for i, d in enumerate(named.dims) if d not in dims]
        tensor = named.tensor.sum(out) if out else named.tensor
        for plate in factor.plates:
            if plate not in named.dims and plate not in dims:
                tensor = tensor * self.layout.plate_sizes[plate]
        return align(Named(tensor, tuple(d for d in named.dims if d in dims)), dims)


def _at(factor: Factor, states: Mapping[str, int]) -> Factor:
    """A factor with enumerated sites at these states."""
    table, dims = factor.log_prob, factor.dims
    for name, state in states.items():
        if name in dims:
            table = table.select(dims.index(name), state)
            dims = tuple(d for d in dims if d != name)
    return replace(factor, log_prob=table, dims=dims)


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
