"""Sweeps of coordinate ascent over the sites of q that have a closed form (`coordinate` says which).

Each update is the exact maximum over its block, so a sweep never lowers the ELBO. An update needs the factors that hold its
site alone, and what has been computed of the others is kept until a site that they hold moves.

Shapes: P points of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lvmppl.algorithms.compilation import not_compiled
from lvmppl.algorithms.conjugate import Natural, is_proper
from lvmppl.algorithms.expectation import Expectations
from lvmppl.algorithms.guide_fields import CONTINUOUS, STEPS, Block
from lvmppl.algorithms.integrated import Design, IntegratedJoint, points_of
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.site_updates import SiteUpdate
from lvmppl.density import Evaluation, Factor, chain_axes
from lvmppl.elbo import MOVES, GuideWeights, factor_weights, model_terms
from lvmppl.exact.elimination import Term
from lvmppl.exact.named import align
from lvmppl.exact.scales import scale_of
from lvmppl.fitted import EStep
from lvmppl.options import Compile


@dataclass(frozen=True)
class CoordinatePlan:
    """How the E-step of each site of q goes. problem: its guide integrated where no site needs to be drawn.

    blocks: the sites with a closed form, the continuous ones first.
    """

    problem: Problem
    blocks: tuple[Block, ...] = ()
    steps: tuple[EStep, ...] = ()
    compile: Compile = "auto"

    @property
    def names(self) -> frozenset[str]:
        """The λ that closed forms write."""
        return frozenset(n for b in self.blocks for n in b.names)

    @property
    def has_points(self) -> bool:
        """Whether a site with a closed form is integrated over points."""
        return any(b.kind == CONTINUOUS for b in self.blocks)

    @property
    def local(self) -> tuple[Block, ...]:
        """The blocks with a row per datum."""
        return tuple(b for b in self.blocks if self.problem.data_plate in b.plates)

    @property
    def outer(self) -> tuple[Block, ...]:
        """The global blocks."""
        return tuple(b for b in self.blocks if self.problem.data_plate not in b.plates)

    @staticmethod
    def is_exact(blocks: Sequence[Block]) -> bool:
        """Whether one sweep over these blocks is the maximum over all of them."""
        return len(blocks) == 1 and blocks[0].kind != STEPS

    def by_gradient(self, why: str) -> CoordinatePlan:
        """The plan with every site left to the gradient, its continuous ones drawn again."""
        if self.compile == "always":
            raise not_compiled(self.problem, why)
        problem = self.problem
        if isinstance(problem.guided, IntegratedJoint):
            problem = replace(problem, guided=problem.guided.base)
        steps = tuple(s if s.how == "fixed" else EStep(s.site, "gradient", why) for s in self.steps)
        return CoordinatePlan(problem, (), steps)


class Sweep:
    """q and θ at the start of an E phase, and updates of q site by site."""

    def __init__(self, plan: CoordinatePlan, values: Mapping[str, Tensor]) -> None:
        assert plan.problem.guided is not None
        self.plan, self.joint = plan, plan.problem.guided
        self.values = dict(values)
        self.data, self.rows = plan.problem.rows()
        with torch.no_grad():
            self._views, self.own = self.joint.view_guide(self.data, self.values, self.rows)
            self.members = self._design.members(self._views) if self._integrated else {}
            factors = [f for n, v in self._views.items() if n in self.own.variables for f in v.factors()]
        self.sites = frozenset(self.own.variables)
        self.weights = GuideWeights(factors, self.own.variables, self.sites)
        integrated = self.joint if isinstance(self.joint, IntegratedJoint) else None
        self._expectations = Expectations(plan.problem, integrated, plan.compile) if integrated else None
        self._frame: Evaluation | None = None
        self._factors: dict[str, list[Factor]] = {}  # E log p of the model's sites over the continuous sites
        self._apart: set[str] = set()  # the model's sites without a factor over enumerated ones
        self._terms: dict[str, list[Term]] = {}
        # points, and the factors there, of sites that meet no other
        self._probed: dict[str, list[tuple[Tensor, list[Factor]]]] = {}
        self._scales: dict[str, Factor] = {}
        self._moved: dict[str, tuple[Block, Mapping[str, Tensor]]] = {}

    @property
    def is_recorded(self) -> bool:
        """Whether E_q log p is had without running the model."""
        return self._expectations is not None and self._expectations.are_recorded

    def stands_at(self, values: Mapping[str, Tensor]) -> bool:
        """Whether q is where it was left; if so the next run starts from these values, θ moved or not.

        A parameter that the guide shares with the model moves q.
        """
        problem, guide = self.plan.problem, self.joint.guide_structure
        assert guide is not None
        if any(values[n] is not self.values[n] for n in guide.parameters):
            return False
        if any(values[n] is not self.values[n] for n in problem.theta):
            for kept in (self._factors, self._terms, self._probed):
                kept.clear()
        self.values = dict(values)
        return True

    def run(self, sweeps: int) -> dict[str, Tensor]:
        """The values after one sweep over the global blocks and this many over the local ones (Beal 2003, §2.4: VBEM).

        Without local blocks, after this many sweeps over the global ones.
        """
        local, outer = self.plan.local, self.plan.outer
        with torch.no_grad():
            self._over(outer, 1 if local or self.plan.is_exact(outer) else sweeps)
            self._over(local, 1 if self.plan.is_exact(local) else sweeps)
            for block, fields in self._moved.values():
                self.values.update(block.write(fields, self.values))
        self._moved.clear()
        return dict(self.values)

    def _over(self, blocks: Sequence[Block], sweeps: int) -> None:
        for _ in range(sweeps):
            for block in blocks:
                update = self._update_continuous if block.kind == CONTINUOUS else self._update_enumerated
                update(block)

    def _update_enumerated(self, block: Block) -> None:
        frame, terms = self._expected()
        variable = frame.variables[block.site]
        own = {block.site}
        if variable.steps is not None:
            own.update(chain_axes(block.site, variable.steps)[1:])
        touching = [t for t in terms if own & set(t.named.dims)]
        scale = scale_of(next(f for f in self._factors[block.site] if f.site == block.site))
        update = SiteUpdate(block, variable, touching, self.weights, frame.plate_sizes, scale)
        fields = update.fields()
        self.weights = update.weights_after(fields)
        self._moved[block.site] = block, fields

    def _update_continuous(self, block: Block) -> None:
        site = block.site
        fields = self.natural(site).optimum(self.scale(site))
        if not is_proper(fields):
            return
        self.members[site] = self.members[site].at(fields)
        self._moved[site] = block, fields
        for holder in self._design.holders[site]:
            self._factors.pop(holder, None)
            self._terms.pop(holder, None)

    def _expected(self) -> tuple[Evaluation, list[Term]]:
        """The model's variables and sizes, and E log p over the continuous sites as terms over q's enumerated ones."""
        structure, plate = self.plan.problem.model.structure, self.plan.problem.data_plate
        missing = [n for n in structure.sites if n not in self._factors and n not in self._apart]
        if missing:
            if self._expectations is not None:
                found = self._expectations(self.values, missing, self.members)
            else:
                found = self.joint.evaluate(self.data, self.values, self.rows)
            self._frame = self._frame or replace(
                found,
                variables={**self.own.variables, **found.variables},
                guide_variables=self.sites,
                plate_sizes={**self.own.plate_sizes, **found.plate_sizes},
            )
            # states outermost
            factors = [replace(f, log_prob=f.log_prob.contiguous()) for f in found.factors]
            self._factors.update({n: [f for f in factors if _site(f) == n] for n in missing})
            plates = self._frame.plate_sizes.keys()
            self._apart |= {n for n in missing if all(plates >= set(f.dims) for f in self._factors[n])}
            for term in model_terms(replace(self._frame, factors=tuple(factors)), plate, scaled=False):
                self._terms.setdefault(term.site, []).append(term)
        assert self._frame is not None
        return self._frame, [t for terms in self._terms.values() for t in terms]

    @property
    def _integrated(self) -> bool:
        return isinstance(self.joint, IntegratedJoint)

    @property
    def _design(self) -> Design:
        assert isinstance(self.joint, IntegratedJoint)
        return self.joint.design

    def natural(self, site: str) -> Natural:
        """∂F/∂z of F(z) = E_{q_-z} log p, as a function of z."""
        member = self.members[site]
        if member.coupled or self._design.meets[site]:
            points = member.probes()
            return member.solve(points, self.gradients(site, points))
        if site not in self._probed:  # the factors do not depend on what moves: their weights alone do
            leaves = [point.detach().requires_grad_() for point in member.probes()]
            alone = points_of(self._design.points(self.members, leave=site))[0]
            self._probed[site] = [(leaf, self._moving(site, leaf, alone)) for leaf in leaves]
        probed = self._probed[site]
        weights = self._weights(probed[0][1])
        each = [_gradient(leaf, factors, weights, keep=True) for leaf, factors in probed]
        return member.solve(torch.stack([leaf.detach() for leaf, _ in probed]), torch.stack(each))

    def gradients(self, site: str, points: Tensor) -> Tensor:
        """∂F/∂z at each point, [P, *batch, *event].

        F is linear in the log-factors that hold the site: their weights ∂F/∂f are the same at all points.
        """
        others = points_of(self._design.points(self.members, leave=site))
        result = torch.zeros_like(points)
        weights: Sequence[Tensor] | None = None
        for i, point in enumerate(points):
            leaf = point.detach().requires_grad_()
            for held in others:
                factors = self._moving(site, leaf, held)
                weights = weights or self._weights(factors)
                result[i] += _gradient(leaf, factors, weights)
        return result / len(others)

    def _moving(self, site: str, leaf: Tensor, held: Mapping[str, Tensor]) -> list[Factor]:
        """The log-factors that depend on a site at a point, the other continuous sites held."""
        assert isinstance(self.joint, IntegratedJoint)
        at, holders = {**held, site: leaf}, self._design.holders[site]
        with torch.enable_grad():
            found = self.joint.factors_at(at, self.data, self.values, self.rows, holders)
        self._scales[site] = next(f for f in found.factors if f.site == site)
        self._sizes = {**self.own.plate_sizes, **found.plate_sizes}
        return [f for f in found.factors if f.log_prob.requires_grad]

    def _weights(self, factors: Sequence[Factor]) -> list[Tensor]:
        """∂ E_q log p / ∂f of each log-factor: its scale times q, at its own shape."""
        return [factor_weights(f, self.weights, self._sizes) for f in factors]

    def scale(self, site: str) -> Tensor:
        """What the model repeats the site by, with the axes of its batch and event; known once `natural` was called."""
        member, factor = self.members[site], self._scales[site]
        event = [1] * len(member.event)
        axes = {name: axis for axis, name in self._views[site].axis_names.items()}
        across = tuple(d for d, _ in sorted(axes.items(), key=lambda pair: pair[1]))
        shape = [1] * len(member.batch)
        for dim, size in zip(factor.scale_dims, getattr(factor.scale, "shape", ()), strict=True):
            shape[axes[dim]] = size
        return align(scale_of(factor), across).reshape([*shape, *event])


def _gradient(
    leaf: Tensor, factors: Sequence[Factor], weights: Sequence[Tensor], keep: bool = False
) -> Tensor:
    grad: Tensor = torch.autograd.grad([f.log_prob for f in factors], leaf, weights, retain_graph=keep)[0]
    return grad


def _site(factor: Factor) -> str:
    return factor.site.removesuffix(MOVES)


__all__ = ["CoordinatePlan", "Sweep"]
