"""Closed-form coordinate ascent on the ELBO: which sites of q it serves, and one sweep over them.

The best q of one site, the others and θ held, is q(z) ∝ exp E_{q_-z}[log p(x, z, …; θ)] (Blei, Kucukelbir & McAuliffe 2017,
eq. 17). It is had exactly for

- an enumerated site that is independent of the others under q: a table, a chain, or independent steps (`site_updates`);
- a continuous site in whose statistics log p is linear (conditional conjugacy), found by trying (`conjugate`).

Which sites these are is found, not declared; every other site says why it is left to gradient steps. Each update is the
exact maximum over its block, so a sweep never lowers the ELBO.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lvmppl.algorithms.conjugate import MAX_COUPLED, Member, Natural, is_proper
from lvmppl.algorithms.guide_fields import CONTINUOUS, STEPS, Block, find_blocks
from lvmppl.algorithms.integrated import MAX_POINTS, Design, IntegratedJoint, scale_of
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.refinement import RefinedJoint
from lvmppl.algorithms.site_updates import SiteUpdate
from lvmppl.density import Evaluation, Factor, SiteView, chain_axes
from lvmppl.elbo import GuideWeights, expected_log_joint, model_terms
from lvmppl.exact.elimination import Term
from lvmppl.fitted import EStep

_CHECKS = 2  # draws of q at which linearity is looked at


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
    def is_exact_at_once(self) -> bool:
        """Whether one sweep is the maximum over all λ."""
        return len(self.blocks) == 1 and self.blocks[0].kind != STEPS

    def by_gradient(self, why: str) -> CoordinatePlan:
        """The plan with every site left to the gradient, its continuous ones drawn again."""
        problem = self.problem
        if isinstance(problem.guided, IntegratedJoint):
            problem = replace(problem, guided=problem.guided.base)
        steps = tuple(s if s.how == "fixed" else EStep(s.site, "gradient", why) for s in self.steps)
        return CoordinatePlan(problem, (), steps)


def plan_e_step(problem: Problem, refusal: str = "") -> CoordinatePlan:
    """Find the closed forms at the start values. refusal: why none is wanted, if so."""
    assert problem.guided is not None and problem.guided.guide_structure is not None
    sites = tuple(problem.guided.guide_structure.sites)
    if isinstance(problem.guided, RefinedJoint):
        refusal = refusal or "λ comes from an encoder and is refined"
    if refusal:
        return CoordinatePlan(problem, (), tuple(EStep(s, "gradient", refusal) for s in sites))
    blocks, reasons = find_blocks(problem)
    fixed = {s for s, b in blocks.items() if set(b.names) <= set(problem.frozen)}
    for site, why in _conflicts(problem, blocks).items():
        reasons[site] = why
    own = {s: b for s, b in blocks.items() if s not in reasons}
    continuous = [s for s, k in _kinds(problem).items() if k == "latent"]
    design = None
    if continuous:
        design, found = _design(problem, own, reasons, continuous)
        reasons.update(found)
        drawn = [s for s in continuous if s in reasons]
        if drawn:
            reasons.update({s: f"'{drawn[0]}' is drawn" for s in own if s not in reasons})
    steps = tuple(_describe(s, own, reasons, fixed) for s in sites)
    if design is not None and not any(s in reasons for s in continuous):
        problem = replace(problem, guided=IntegratedJoint(problem.guided, design))
    chosen = [own[s] for s in sites if s in own and s not in reasons and s not in fixed]
    return CoordinatePlan(problem, tuple(sorted(chosen, key=lambda b: b.kind != CONTINUOUS)), steps)


def _kinds(problem: Problem) -> dict[str, str]:
    assert problem.guided is not None and problem.guided.guide_structure is not None
    return {n: s.kind for n, s in problem.guided.guide_structure.sites.items()}


def _describe(site: str, own: Mapping[str, Block], reasons: Mapping[str, str], fixed: set[str]) -> EStep:
    if site in fixed:
        return EStep(site, "fixed", "frozen")
    if site in reasons:
        return EStep(site, "gradient", reasons[site])
    return EStep(site, "closed-form", f"{own[site].kind} in {', '.join(own[site].names)}")


def _conflicts(problem: Problem, blocks: Mapping[str, Block]) -> dict[str, str]:
    """Blocks that share a λ, or of which only a part is frozen."""
    result = {}
    for site, block in blocks.items():
        frozen = [n for n in block.names if n in problem.frozen]
        if frozen and len(frozen) < len(block.names):
            result[site] = f"{frozen[0]} is frozen, the rest is not"
        for other, rival in blocks.items():
            shared = [n for n in block.names if n in rival.names]
            if other != site and shared:
                result[site] = f"shares {shared[0]} with '{other}'"
    return result


# -------------------------------------------------------------------------------------------- continuous sites


def _design(
    problem: Problem, own: Mapping[str, Block], reasons: Mapping[str, str], continuous: Sequence[str]
) -> tuple[Design | None, dict[str, str]]:
    """How the continuous sites are integrated, and the reasons of those that cannot be."""
    if any(s in reasons for s in continuous):
        return None, {}
    assert problem.guided is not None
    named = set(_kinds(problem))
    summed = [s for s in problem.model.structure.enumerated if s not in named]
    if summed:
        why = f"'{summed[0]}' is summed under the model: log p is not linear in any statistics"
        return None, dict.fromkeys(continuous, why)
    try:
        trial = _Trial(problem, continuous)
    except Exception as error:  # a model may refuse values of q that it was never meant to see
        text = f"the model does not run at points of q ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        return None, dict.fromkeys(continuous, text)
    return trial.design, trial.reasons


class _Trial:
    """Tries at the start values whether log p is linear in the statistics of each continuous site."""

    def __init__(self, problem: Problem, sites: Sequence[str]) -> None:
        self.problem, self.reasons = problem, dict[str, str]()
        assert problem.guided is not None
        joint = IntegratedJoint(problem.guided, Design(dict.fromkeys(sites, frozenset())))
        self.design = Design(_meetings(problem, joint, sites))
        coupled: set[str] = set()
        for site in sites:
            if self._is_linear(site):
                continue
            wide = replace(self.design, coupled=frozenset(coupled | {site}))
            if self._may_couple(site) and self._is_linear(site, wide):
                coupled.add(site)
                self.design = wide
            elif site not in self.reasons:
                family = type(self._members(self.design)[site].base).__name__
                self.reasons[site] = f"log p is not linear in the statistics of {family}"
        for site in sites:  # again, as the sites now move
            if site not in self.reasons and not self._is_linear(site):
                self.reasons[site] = "log p is not linear in its statistics"

    def _members(self, design: Design) -> dict[str, Member]:
        assert self.problem.guided is not None
        views, _ = self.problem.guided.view_guide(self.problem.data, self.problem.initial)
        return design.members(views)

    def _may_couple(self, site: str) -> bool:
        member = self._members(self.design)[site]
        return type(member.base).__name__ == "Normal" and 1 < member.size <= MAX_COUPLED

    def _is_linear(self, site: str, design: Design | None = None) -> bool:
        design = design or self.design
        assert self.problem.guided is not None
        sweep = Sweep(
            CoordinatePlan(
                replace(self.problem, guided=IntegratedJoint(self.problem.guided, design)),
            ),
            self.problem.initial,
        )
        members = self._members(design)
        others = design.points(members, leave=site)
        count = len(next(iter(others.values()))) if others else 1
        member = members[site]
        if member.coupled and member.size > MAX_COUPLED:
            self.reasons[site] = f"{member.size} elements meet, more than {MAX_COUPLED}"
            return False
        if max(count * len(member.probes()), len(next(iter(design.points(members).values())))) > MAX_POINTS:
            self.reasons[site] = f"its expectations take more than {MAX_POINTS} points"
            return False
        natural = sweep.natural(site)
        shape = (*member.batch, *member.event)
        near = [member.base.sample().reshape(shape) for _ in range(_CHECKS)]
        draws = torch.stack([*near, *(_far(draw, member) for draw in near)])
        found = natural.fits(draws, sweep.gradients(site, draws))
        return found and is_proper(natural.optimum(sweep.scale(site, member)))


def _far(draw: Tensor, member: Member) -> Tensor:
    """A point well away from q, however narrow it starts: what bends only there is not linear either."""
    noise = torch.randn_like(draw)
    family = type(member.base).__name__
    if family in ("Normal", "MultivariateNormal"):
        spread: Tensor = member.base.stddev.reshape(draw.shape).clamp_min(1.0)
        return draw + 3.0 * spread * noise
    if family in ("LogNormal", "Gamma"):
        return draw * noise.exp()
    if family == "Beta":
        return torch.sigmoid(2.0 * noise)
    return torch.softmax(2.0 * noise, -1) if family == "Dirichlet" else draw


def _meetings(problem: Problem, joint: IntegratedJoint, sites: Sequence[str]) -> dict[str, frozenset[str]]:
    """For each site, the others that some factor depends on beside it."""
    views, _ = joint.view_guide(problem.data, problem.initial)
    members = joint.design.members(views)
    meets: dict[str, set[str]] = {s: set() for s in sites}
    leaves = {n: m.points()[0].detach().requires_grad_() for n, m in members.items()}
    with torch.enable_grad():
        for factor in joint.held(leaves).evaluate(problem.data, problem.initial).factors:
            if not factor.log_prob.requires_grad:
                continue
            finite = torch.where(torch.isfinite(factor.log_prob), factor.log_prob, 0.0)
            grads = torch.autograd.grad(
                finite.sum(), list(leaves.values()), allow_unused=True, retain_graph=True
            )
            here = {s for s, g in zip(leaves, grads, strict=True) if g is not None}
            for site in here:
                meets[site] |= here - {site}
    return {site: frozenset(others) for site, others in meets.items()}


# ------------------------------------------------------------------------------------------------------ a sweep


@dataclass
class Sweep:
    """q and θ at the start of an E phase, and updates of q site by site."""

    plan: CoordinatePlan
    values: Mapping[str, Tensor]
    _terms: list[Term] | None = field(default=None, repr=False)
    _evaluation: Evaluation | None = field(default=None, repr=False)
    _own: dict[str, Factor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        assert self.plan.problem.guided is not None
        self.joint = self.plan.problem.guided
        self.values = dict(self.values)
        data, rows = self.plan.problem.rows()
        with torch.no_grad():
            own = self.joint.evaluate_guide(data, self.values, rows)
        self.sites = frozenset(own.guide_variables)
        self.weights = GuideWeights(own.guide_factors, own.variables, self.sites)

    def run(self, sweeps: int) -> dict[str, Tensor]:
        """The values after this many sweeps over all blocks."""
        with torch.no_grad():
            for _ in range(sweeps):
                for block in self.plan.blocks:
                    if block.kind == CONTINUOUS:
                        self._update_continuous(block)
                    else:
                        self._update_enumerated(block)
        return dict(self.values)

    def _update_enumerated(self, block: Block) -> None:
        evaluation, terms = self.evaluation, self.terms
        variable = evaluation.variables[block.site]
        own = {block.site}
        if variable.steps is not None:
            own.update(chain_axes(block.site, variable.steps)[1:])
        touching = [t for t in terms if own & set(t.named.dims)]
        factor = next(f for f in evaluation.factors if f.site == block.site)
        scale = scale_of(factor, block.plates)
        update = SiteUpdate(block, variable, touching, self.weights, evaluation.plate_sizes, scale)
        fields = update.fields()
        self.values = {**self.values, **block.write(fields, self.values)}
        self.weights = self.weights.with_site(block.site, update.factors(fields))

    def _update_continuous(self, block: Block) -> None:
        natural = self.natural(block.site)
        fields = natural.optimum(self.scale(block.site, self.members()[block.site]))
        if not is_proper(fields):
            return
        self.values = {**self.values, **block.write(fields, self.values)}
        self._terms = self._evaluation = None

    @property
    def evaluation(self) -> Evaluation:
        """The model's factors, their expectations over the continuous sites."""
        if self._evaluation is None:
            data, rows = self.plan.problem.rows()
            with torch.no_grad():
                self._evaluation = self.joint.evaluate(data, self.values, rows)
        return self._evaluation

    @property
    def terms(self) -> list[Term]:
        """E log p as terms over the enumerated sites of q."""
        if self._terms is None:
            self._terms = model_terms(self.evaluation, self.plan.problem.data_plate)
        return self._terms

    def _views(self) -> Mapping[str, SiteView]:
        data, rows = self.plan.problem.rows()
        return self.joint.view_guide(data, self.values, rows)[0]

    def members(self) -> dict[str, Member]:
        """q of the continuous sites."""
        assert isinstance(self.joint, IntegratedJoint)
        with torch.no_grad():
            return self.joint.design.members(self._views())

    def natural(self, site: str) -> Natural:
        """∂F/∂z of F(z) = E_{q_-z} log p, as a function of z."""
        member = self.members()[site]
        points = member.probes()
        return member.solve(points, self.gradients(site, points))

    def gradients(self, site: str, points: Tensor) -> Tensor:
        """∂F/∂z at each point, [P, *batch, *event]."""
        assert isinstance(self.joint, IntegratedJoint)
        members = self.members()
        others = self.joint.design.points(members, leave=site)
        count = len(next(iter(others.values()))) if others else 1
        data, rows = self.plan.problem.rows()
        leaf = points.detach().requires_grad_()
        result = torch.zeros_like(points)
        for i, j in itertools.product(range(len(points)), range(count)):
            with torch.enable_grad():
                held = {**{n: p[j] for n, p in others.items()}, site: leaf[i]}
                evaluation = self.joint.held(held).evaluate(data, self.values, rows)
                self._own[site] = next(f for f in evaluation.factors if f.site == site)
                moving = tuple(f for f in evaluation.factors if f.log_prob.requires_grad)
                evaluation = replace(evaluation, factors=moving, guide_variables=self.sites)
                total = expected_log_joint(evaluation, self.weights, self.plan.problem.data_plate)
                result += torch.autograd.grad(total / count, leaf)[0]
        return result

    def scale(self, site: str, member: Member) -> Tensor:
        """What the model repeats the site by, with the axes of its batch and event; known once `gradients` was called."""
        factor, event = self._own[site], [1] * len(member.event)
        axes = {name: axis for axis, name in self._views()[site].axis_names.items()}
        across = tuple(d for d, _ in sorted(axes.items(), key=lambda pair: pair[1]))
        shape = [1] * len(member.batch)
        for dim, size in zip(factor.scale_dims, getattr(factor.scale, "shape", ()), strict=True):
            shape[axes[dim]] = size
        return scale_of(factor, across).reshape([*shape, *event])


__all__ = ["CoordinatePlan", "Sweep", "plan_e_step"]
