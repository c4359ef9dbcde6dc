"""A model and a guide whose continuous sites are integrated exactly, not drawn.

Where log p(x, z) is linear in the statistics of each continuous site under q, E_q of a log-factor is its mean over a few
points (`conjugate`), at each of which the model is run as it would be at a draw. Sites that meet in a factor take all
combinations of theirs; sites that never meet move together. What comes out is an evaluation without draws: an ELBO of
it has no noise.

Shapes: P points of a design.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm, prod

from torch import Tensor

from lvmppl.algorithms.conjugate import Member, member_of
from lvmppl.density import (
    Drawing,
    Evaluation,
    Factor,
    HeldJoint,
    Joint,
    Rows,
    SiteView,
    Values,
    with_scales,
)
from lvmppl.exact.named import Named, align

MAX_POINTS = 256  # points at which a model is run for one expectation


@dataclass(frozen=True)
class Design:
    """How the points of the continuous sites are combined.

    meets: by site, the others that some factor holds beside it. coupled: Gaussian sites whose elements meet. holders: by
    site, the model's sites whose factors hold it.
    """

    meets: Mapping[str, frozenset[str]]
    coupled: frozenset[str] = frozenset()
    holders: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def members(self, views: Mapping[str, SiteView]) -> dict[str, Member]:
        """q of each continuous site."""
        found = {n: member_of(views[n].fn, n in self.coupled) for n in self.meets}
        assert all(found.values()), "a guide's families do not change between steps"
        return {n: m for n, m in found.items() if m is not None}

    @property
    def colours(self) -> dict[str, int]:
        """Which coordinate of the design each site moves along: the least that no site it meets has."""
        found: dict[str, int] = {}
        for site, others in self.meets.items():
            taken = {found[o] for o in others if o in found}
            found[site] = next(c for c in range(len(self.meets)) if c not in taken)
        return found

    def points(self, members: Mapping[str, Member], leave: str | None = None) -> dict[str, Tensor]:
        """Points of every site but one, [P, *batch, *event], all of the same weight; one of a site that never meets it."""
        own = {n: m.points for n, m in members.items() if n != leave}
        if leave is not None:
            own = {n: p if n in self.meets[leave] else p[:1] for n, p in own.items()}
        sizes: dict[int, int] = {}
        colours = self.colours
        for name, values in own.items():
            colour = colours[name]
            sizes[colour] = lcm(sizes.get(colour, 1), len(values))
        order = sorted(sizes)
        result = {}
        for name, values in own.items():
            at = order.index(colours[name])
            inner, outer = prod(sizes[c] for c in order[at + 1 :]), prod(sizes[c] for c in order[:at])
            tiled = values.repeat(sizes[order[at]] // len(values), *[1] * (values.dim() - 1))
            spread = tiled.repeat_interleave(inner, 0)
            result[name] = spread.repeat(outer, *[1] * (values.dim() - 1))
        return result


class IntegratedJoint(Joint):
    """`evaluate` with E_q of every factor over the continuous sites in the place of the factor at a draw.

    drawn: continuous sites outside of the design, each held at some value: their factors mean nothing, and what shares
    no factor with them has its expectations all the same.
    """

    def __init__(self, base: Joint, design: Design, drawn: Values | None = None) -> None:
        super().__init__(base.model, base.structure, base.guide, base.guide_structure)
        self.base, self.design, self.drawn = base, design, drawn or {}

    def evaluate(
        self, data: Values, values: Values, rows: Rows | None = None, drawing: Drawing | None = None
    ) -> Evaluation:
        own = self.evaluate_guide(data, values, rows)
        expected = self.expected_factors(data, values, rows)
        return replace(
            own,
            factors=expected.factors,
            guide_factors=tuple(with_scales(own.guide_factors, expected.factors)),
            variables={**own.variables, **expected.variables},
            plate_sizes={**own.plate_sizes, **expected.plate_sizes},
        )

    def evaluate_guide(
        self, data: Values, values: Values, rows: Rows | None = None, drawing: Drawing | None = None
    ) -> Evaluation:
        """log q of the enumerated sites; of a continuous one E_q log q, minus its entropy. Nothing is drawn."""
        views, evaluation = self.view_guide(data, values, rows)
        members = self.design.members(views)
        factors: list[Factor] = []
        for name, view in views.items():
            if name in members:
                factors.append(_negative_entropy(view, members[name]))
            else:
                factors.extend(view.factors())
        moments = {n: m.moments().detach() for n, m in members.items()}
        axes = {n: views[n].axis_names for n in members}
        return replace(
            evaluation,
            guide_factors=tuple(factors),
            guide_variables=frozenset(evaluation.variables),
            moments=moments,
            sample_axes=axes,
        )

    def expected_factors(
        self,
        data: Values,
        values: Values,
        rows: Rows | None = None,
        sites: Iterable[str] | None = None,
        members: Mapping[str, Member] | None = None,
    ) -> Evaluation:
        """E_q of the model's log-factors over the continuous sites; of these sites alone, where some are named.

        members: q of the continuous sites, where it is known without a run of the guide.
        """
        members = members or self.design.members(self.view_guide(data, values, rows)[0])
        return self.expected_at(self.design.points(members), data, values, rows, sites)

    def expected_at(
        self,
        points: Mapping[str, Tensor],
        data: Values,
        values: Values,
        rows: Rows | None = None,
        sites: Iterable[str] | None = None,
    ) -> Evaluation:
        """The mean of the model's log-factors over the points of a design."""
        each = [self.factors_at(held, data, values, rows, sites) for held in points_of(points)]
        factors = [_mean(own) for own in zip(*(e.factors for e in each), strict=True)]
        return replace(each[0], factors=tuple(factors))

    def all_points(self, data: Values, values: Values, rows: Rows | None = None) -> dict[str, Tensor]:
        """The points of the design for q at λ, [P, *batch, *event] by site."""
        return self.design.points(self.design.members(self.view_guide(data, values, rows)[0]))

    def at_all_points(self, data: Values, values: Values, rows: Rows | None = None) -> HeldJoint:
        """The model with its continuous sites at every point of the design at once, along an axis `POINTS`."""
        nesting, sites = self.structure.nesting, self.structure.sites
        points = {}
        for name, own in self.all_points(data, values, rows).items():
            missing = nesting - (own.dim() - 1 - len(sites[name].event_shape))
            points[name] = own.reshape([len(own), *[1] * missing, *own.shape[1:]])
        return Joint(self.model, self.structure).held(points)

    def factors_at(
        self,
        held: Values,
        data: Values,
        values: Values,
        rows: Rows | None = None,
        sites: Iterable[str] | None = None,
    ) -> Evaluation:
        """The model's log-factors with the continuous sites held at a point; of these sites alone, where some are named."""
        joint = self.held({**self.drawn, **held})
        if sites is None:
            return joint.evaluate(data, values, rows)
        views, frame = joint.view(data, values, rows)
        return replace(frame, factors=tuple(f for n in views if n in sites for f in views[n].factors()))


def points_of(points: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """A design point by point; one without sites has a single, empty one."""
    count = len(next(iter(points.values()))) if points else 1
    return [{n: p[i] for n, p in points.items()} for i in range(count)]


def _mean(factors: Sequence[Factor]) -> Factor:
    """The mean of a site's factors over the points."""
    first = factors[0]
    total = first.log_prob
    for factor in factors[1:]:
        total = total + align(Named(factor.log_prob, factor.dims), first.dims)
    return replace(first, log_prob=total / len(factors))


def _negative_entropy(view: SiteView, member: Member) -> Factor:
    entropy = member.entropy()
    keep = [a for a in range(-entropy.dim(), 0) if entropy.shape[a] != 1]
    dims = tuple(view.axis_names[a] for a in keep)
    shape = [entropy.shape[a] for a in keep]
    return Factor(view.name, -entropy.reshape(shape), dims, view.plates, view.scale, view.scale_dims)


__all__ = ["MAX_POINTS", "Design", "IntegratedJoint", "points_of"]
