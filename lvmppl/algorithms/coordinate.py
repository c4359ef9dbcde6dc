"""Closed-form coordinate ascent on the ELBO: which sites of q it serves.

The best q of one site, the others and θ held, is q(z) ∝ exp E_{q_-z}[log p(x, z, …; θ)] (Blei, Kucukelbir & McAuliffe 2017,
eq. 17). It is had exactly for

- an enumerated site that is independent of the others under q: a table, a chain, or independent steps (`site_updates`);
- a continuous site in whose statistics log p is linear (conditional conjugacy), found by trying (`conjugate`).

Which sites these are is found, not declared; every other site says why it is left to gradient steps. `sweep` runs the
updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lvmppl.algorithms.conjugate import MAX_COUPLED, Member, is_proper
from lvmppl.algorithms.guide_fields import CONTINUOUS, Block, find_blocks
from lvmppl.algorithms.integrated import MAX_POINTS, Design, IntegratedJoint
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.refinement import RefinedJoint
from lvmppl.algorithms.sweep import CoordinatePlan, Sweep
from lvmppl.density import Coordinates
from lvmppl.elbo import MOVES
from lvmppl.fitted import EStep

_CHECKS = 2  # draws of q at which linearity is looked at
_MOVE = 0.1  # standard deviation of the values beside the start at which it is looked at too


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
    """Tries whether log p is linear in the statistics of each continuous site: at the start, and near it.

    At the start alone a term may be absent by accident, as where loadings start orthogonal or a weight starts at 0.
    """

    def __init__(self, problem: Problem, sites: Sequence[str]) -> None:
        self.problem, self.reasons = problem, dict[str, str]()
        assert problem.guided is not None
        self.starts = (problem.initial, _moved(problem))
        joint = IntegratedJoint(problem.guided, Design(dict.fromkeys(sites, frozenset())))
        self.design = Design(*_meetings(problem, joint, sites))
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
        return all(self._is_linear_at(values, site, design or self.design) for values in self.starts)

    def _is_linear_at(self, values: Mapping[str, Tensor], site: str, design: Design) -> bool:
        assert self.problem.guided is not None
        integrated = IntegratedJoint(self.problem.guided, design)
        sweep = Sweep(CoordinatePlan(replace(self.problem, guided=integrated)), values)
        members = sweep.members
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
        return found and is_proper(natural.optimum(sweep.scale(site)))


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


def _moved(problem: Problem) -> dict[str, Tensor]:
    """The start with everything that is fitted moved a little at random, in unconstrained coordinates."""
    assert problem.guided is not None
    values = dict(problem.initial)
    coordinates = Coordinates(problem.guided.specs, [*problem.free_theta, *problem.free_lambda])
    generator = torch.Generator().manual_seed(0)
    moved = {}
    for name, value in coordinates.unconstrain(values).items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        moved[name] = value + _MOVE * noise
    return {**values, **coordinates.constrain(moved)}


def _meetings(
    problem: Problem, joint: IntegratedJoint, sites: Sequence[str]
) -> tuple[dict[str, frozenset[str]], frozenset[str], dict[str, frozenset[str]]]:
    """For each site, the others that some factor depends on beside it; none is coupled; and the sites of those factors."""
    views, _ = joint.view_guide(problem.data, problem.initial)
    members = joint.design.members(views)
    meets: dict[str, set[str]] = {s: set() for s in sites}
    holders: dict[str, set[str]] = {s: set() for s in sites}
    leaves = {n: m.points[0].detach().requires_grad_() for n, m in members.items()}
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
                holders[site].add(factor.site.removesuffix(MOVES))
    return _frozen(meets), frozenset(), _frozen(holders)


def _frozen(sets: Mapping[str, set[str]]) -> dict[str, frozenset[str]]:
    return {name: frozenset(others) for name, others in sets.items()}


__all__ = ["plan_e_step"]
