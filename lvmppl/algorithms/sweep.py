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

from lvmppl.algorithms.conjugate import Member, Natural, is_proper
from lvmppl.algorithms.guide_fields import CONTINUOUS, STEPS, Block
from lvmppl.algorithms.integrated import Design, IntegratedJoint, points_of, scale_of
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.site_updates import SiteUpdate
from lvmppl.density import Evaluation, Factor, SiteView, chain_axes
from lvmppl.elbo import MOVES, GuideWeights, expected_log_joint, model_terms
from lvmppl.exact.elimination import Term
from lvmppl.fitted import EStep


@dataclass(frozen=True)
class CoordinatePlan:
    """How the E-step of each site of q goes. problem: its guide integrated where no site needs to be drawn.

    blocks: the sites with a closed form, the continuous ones first.
    """

    problem: Problem
    blocks: tuple[Block, ...] = ()
    steps: tuple[EStep, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """The λ that closed forms write."""
        return frozenset(n for b in self.blocks for n in b.names)

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
            self.own = self.joint.evaluate_guide(self.data, self.values, self.rows)
        self.sites = frozenset(self.own.guide_variables)
        self.weights = GuideWeights(self.own.guide_factors, self.own.variables, self.sites)
        self._frame: Evaluation | None = None
        self._factors: dict[str, list[Factor]] = {}  # E log p of the model's sites over the continuous sites
        self._terms: dict[str, list[Term]] = {}
        self._views: Mapping[str, SiteView] | None = None
        self._scales: dict[str, Factor] = {}

    def run(self, sweeps: int) -> dict[str, Tensor]:
        """The values after one sweep over the global blocks and this many over the local ones (Beal 2003, §2.4: VBEM).

        Without local blocks, after this many sweeps over the global ones.
        """
        local, outer = self.plan.local, self.plan.outer
        with torch.no_grad():
            for _ in range(1 if local or self.plan.is_exact(outer) else sweeps):
                self._over(outer)
            for _ in range(1 if self.plan.is_exact(local) else sweeps):
                self._over(local)
        return dict(self.values)

    def _over(self, blocks: Sequence[Block]) -> None:
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
        factor = next(f for f in self._factors[block.site] if f.site == block.site)
        scale = scale_of(factor, block.plates)
        update = SiteUpdate(block, variable, touching, self.weights, frame.plate_sizes, scale)
        fields = update.fields()
        self.values = {**self.values, **block.write(fields, self.values)}
        self.weights = self.weights.with_site(block.site, update.factors(fields))

    def _update_continuous(self, block: Block) -> None:
        natural = self.natural(block.site)
        fields = natural.optimum(self.scale(block.site, self.members()[block.site]))
        if not is_proper(fields):
            return
        self.values = {**self.values, **block.write(fields, self.values)}
        self._views = None
        for site in self._design.holders[block.site]:
            self._factors.pop(site, None)
            self._terms.pop(site, None)

    def _expected(self) -> tuple[Evaluation, list[Term]]:
        """The model's variables and sizes, and E log p over the continuous sites as terms over q's enumerated ones."""
        structure, plate = self.plan.problem.model.structure, self.plan.problem.data_plate
        missing = [n for n in structure.sites if n not in self._factors]
        if missing:
            joint = self.joint
            if isinstance(joint, IntegratedJoint) and self._frame is not None:
                found = joint.expected_factors(self.data, self.values, self.rows, missing)
            else:
                found = joint.evaluate(self.data, self.values, self.rows)
            self._frame = self._frame or found
            self._factors.update({n: [f for f in found.factors if _site(f) == n] for n in missing})
            part = replace(self._frame, factors=found.factors)
            for term in model_terms(part, plate):
                self._terms.setdefault(term.site, []).append(term)
        assert self._frame is not None
        return self._frame, [t for terms in self._terms.values() for t in terms]

    @property
    def _design(self) -> Design:
        assert isinstance(self.joint, IntegratedJoint)
        return self.joint.design

    def _guide_views(self) -> Mapping[str, SiteView]:
        if self._views is None:
            self._views = self.joint.view_guide(self.data, self.values, self.rows)[0]
        return self._views

    def members(self) -> dict[str, Member]:
        """q of the continuous sites."""
        with torch.no_grad():
            return self._design.members(self._guide_views())

    def natural(self, site: str) -> Natural:
        """∂F/∂z of F(z) = E_{q_-z} log p, as a function of z."""
        member = self.members()[site]
        points = member.probes()
        return member.solve(points, self.gradients(site, points))

    def gradients(self, site: str, points: Tensor) -> Tensor:
        """∂F/∂z at each point, [P, *batch, *event].

        F is linear in the log-factors that hold the site: their weights ∂F/∂f are the same at all points.
        """
        assert isinstance(self.joint, IntegratedJoint)
        others = points_of(self._design.points(self.members(), leave=site))
        leaf = points.detach().requires_grad_()
        result = torch.zeros_like(points)
        weights: Sequence[Tensor] | None = None
        with torch.enable_grad():
            for i in range(len(points)):
                for held in others:
                    at = {**held, site: leaf[i]}
                    found = self.joint.factors_at(
                        at, self.data, self.values, self.rows, self._design.holders[site]
                    )
                    self._scales[site] = next(f for f in found.factors if f.site == site)
                    moving = [f for f in found.factors if f.log_prob.requires_grad]
                    if weights is None:
                        weights = self._weights(replace(found, factors=tuple(moving)))
                    result += torch.autograd.grad([f.log_prob for f in moving], leaf, weights)[0]
        return result / len(others)

    def _weights(self, evaluation: Evaluation) -> tuple[Tensor, ...]:
        """∂ E_q log p / ∂f of each log-factor: its scale times q, at its own shape."""
        factors = tuple(
            replace(f, log_prob=torch.zeros_like(f.log_prob).requires_grad_()) for f in evaluation.factors
        )
        evaluation = replace(evaluation, factors=factors, guide_variables=self.sites)
        total = expected_log_joint(evaluation, self.weights, self.plan.problem.data_plate)
        return torch.autograd.grad(total, [f.log_prob for f in factors])

    def scale(self, site: str, member: Member) -> Tensor:
        """What the model repeats the site by, with the axes of its batch and event; known once `gradients` was called."""
        factor, event = self._scales[site], [1] * len(member.event)
        axes = {name: axis for axis, name in self._guide_views()[site].axis_names.items()}
        across = tuple(d for d, _ in sorted(axes.items(), key=lambda pair: pair[1]))
        shape = [1] * len(member.batch)
        for dim, size in zip(factor.scale_dims, getattr(factor.scale, "shape", ()), strict=True):
            shape[axes[dim]] = size
        return scale_of(factor, across).reshape([*shape, *event])


def _site(factor: Factor) -> str:
    return factor.site.removesuffix(MOVES)


__all__ = ["CoordinatePlan", "Sweep"]
