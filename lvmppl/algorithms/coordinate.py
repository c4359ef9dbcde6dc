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
from lvmppl.density import Coordinates, Factor, chain_axes, isolated
from lvmppl.elbo import MOVES
from lvmppl.fitted import EStep

_CHECKS = 2  # draws of q at which linearity is looked at
_FAR = 4  # points farther out of each of them at the end, where bends may be anywhere about q
_ROUNDED = "q of '{}' comes so near to a bound of its support that E log z is lost to rounding"
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
    if continuous:
        joint, found = _design(problem, own, reasons, continuous)
        reasons.update(found)
        if joint is not None:
            problem = replace(problem, guided=joint)
    steps = tuple(_describe(s, own, reasons, fixed) for s in sites)
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
    problem: Problem, own: Mapping[str, Block], known: Mapping[str, str], continuous: Sequence[str]
) -> tuple[IntegratedJoint | None, dict[str, str]]:
    """How the continuous sites are integrated, and the reasons of the sites (enumerated ones too) without a closed form.

    A site whose statistics log p is not linear in is drawn, and so is every continuous site that shares a factor of the
    model with a drawn one: its expectation would be that over a draw. The others keep theirs.
    """
    assert problem.guided is not None
    reasons: dict[str, str] = {}
    summed = [s for s in problem.model.structure.enumerated if s not in set(_kinds(problem))]
    if summed:
        why = f"'{summed[0]}' is summed under the model: log p is not linear in any statistics"
        return None, _all_drawn(own, known, {s: why for s in continuous if s not in known}, continuous)
    try:
        while True:
            drawn = [s for s in continuous if s in known or s in reasons]
            held = _held(problem, own, drawn)
            if isinstance(held, str):
                return None, _all_drawn(own, known, reasons, continuous, held)
            trial = _Trial(problem, [s for s in continuous if s not in drawn], held)
            new = {**_beside(problem, held, trial.design), **trial.reasons}
            new = {s: why for s, why in new.items() if s not in known and s not in reasons}
            reasons.update(new)
            if not any(s in new for s in continuous):
                break
    except Exception as error:  # a model may refuse values of q that it was never meant to see
        text = f"the model does not run at points of q ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        return None, _all_drawn(own, known, {**dict.fromkeys(continuous, text), **reasons}, continuous)
    if not any(s in own and s not in known and s not in reasons for s in _kinds(problem)):
        return None, reasons
    return IntegratedJoint(problem.guided, trial.design, held), reasons


def _all_drawn(
    own: Mapping[str, Block],
    known: Mapping[str, str],
    reasons: Mapping[str, str],
    continuous: Sequence[str],
    why: str = "",
) -> dict[str, str]:
    """The reasons where every continuous site is drawn and so no site has a closed form."""
    first = next(s for s in continuous if s in known or s in reasons)
    rest = why or f"'{first}' is drawn"
    return {**{s: rest for s in own if s not in known}, **reasons}


def _held(problem: Problem, own: Mapping[str, Block], drawn: Sequence[str]) -> dict[str, Tensor] | str:
    """A draw of q for each drawn site, or why no site has a closed form beside them: q of one that depends on draws."""
    assert problem.guided is not None
    data, rows = problem.rows()
    with isolated(seed=20_023, dtype=torch.get_default_dtype()), torch.no_grad():
        first, second = (problem.guided.view_guide(data, problem.initial, rows)[0] for _ in range(2))
        held = {s: first[s].fn.sample() for s in drawn}
        for site in [s for s in first if s not in own or s in drawn]:
            if site in held:
                same = torch.equal(*(v[site].fn.log_prob(held[site]) for v in (first, second)))
            else:
                pairs = zip(first[site].factors(), second[site].factors(), strict=True)
                same = all(torch.equal(a.log_prob, b.log_prob) for a, b in pairs)
            if not same:
                return f"q of '{site}' depends on what is drawn"
    return held


def _beside(problem: Problem, held: Mapping[str, Tensor], design: Design) -> dict[str, str]:
    """The sites that share a factor of the model with a drawn one, and which."""
    assert problem.guided is not None
    if not held:
        return {}
    views, _ = problem.guided.view_guide(problem.data, problem.initial)
    points = {n: m.points[0] for n, m in design.members(views).items()}
    leaves = {n: v.detach().requires_grad_() for n, v in {**points, **held}.items()}
    found: dict[str, str] = {}
    with torch.enable_grad():
        evaluation = problem.guided.held(leaves).evaluate(problem.data, problem.initial)
        for factor in evaluation.factors:
            here = _held_by(factor, leaves)
            drawn = [s for s in here if s in held]
            axes = {
                n: {n, *chain_axes(n, v.steps)[1:]} if v.steps else {n}
                for n, v in evaluation.variables.items()
            }
            states = [n for n, own in axes.items() if own & set(factor.dims)]
            for site in (*here, *states) if drawn else ():
                found.setdefault(site, f"shares a factor with '{drawn[0]}', which is drawn")
    return found


def _held_by(factor: Factor, leaves: Mapping[str, Tensor]) -> set[str]:
    """The continuous sites that a log-factor depends on."""
    if not factor.log_prob.requires_grad:
        return set()
    finite = torch.where(torch.isfinite(factor.log_prob), factor.log_prob, 0.0).sum()
    grads = torch.autograd.grad(finite, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {s for s, g in zip(leaves, grads, strict=True) if g is not None}


class _Trial:
    """Tries whether log p is linear in the statistics of each continuous site: at the start, and near it.

    At the start alone a term may be absent by accident, as where loadings start orthogonal or a weight starts at 0.
    """

    def __init__(self, problem: Problem, sites: Sequence[str], held: Mapping[str, Tensor]) -> None:
        self.problem, self.held, self.reasons = problem, held, dict[str, str]()
        self.starts = (problem.initial, moved(problem))
        self.design = Design(
            *_meetings(problem, self._joint(Design(dict.fromkeys(sites, frozenset()))), sites)
        )
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

    def _joint(self, design: Design) -> IntegratedJoint:
        assert self.problem.guided is not None
        return IntegratedJoint(self.problem.guided, design, self.held)

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
        sweep = Sweep(CoordinatePlan(replace(self.problem, guided=self._joint(design))), values)
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
        if not member.holds_points():
            self.reasons[site] = _ROUNDED.format(site)
            return False
        natural = sweep.natural(site)
        draws = _check_points(member)
        found = natural.fits(draws, sweep.gradients(site, draws))
        return found and is_proper(natural.optimum(sweep.scale(site)))


def rounded_at(plan: CoordinatePlan, values: Mapping[str, Tensor]) -> str:
    """Why the expectations of a closed form are lost at these values; empty where they are not."""
    members = Sweep(plan, values).members
    sites = (b.site for b in plan.blocks if b.kind == CONTINUOUS)
    return next((_ROUNDED.format(s) for s in sites if not members[s].holds_points()), "")


def refusal_at(plan: CoordinatePlan, values: Mapping[str, Tensor]) -> str:
    """Why a site has no closed form about these values after all; empty where all have theirs.

    The start says nothing of a bend that only q as it stands now reaches, a clamp or a kink far away, nor of how near q
    comes to a bound of its support.
    """
    with isolated(seed=20_029, dtype=torch.get_default_dtype()):
        sweep = Sweep(plan, values)
        for site in (b.site for b in plan.blocks if b.kind == CONTINUOUS):
            if not sweep.members[site].holds_points():
                return _ROUNDED.format(site)
            natural, draws = sweep.natural(site), _check_points(sweep.members[site], far=_FAR)
            gradients = sweep.gradients(site, draws)
            if bool(torch.isfinite(gradients).all()) and not natural.fits(draws, gradients):
                return f"log p is not linear in the statistics of '{site}' where q ends"
    return ""


def _check_points(member: Member, far: int = 1) -> Tensor:
    """Draws of q and, of each, this many points farther out, at which linearity is looked at, [P, *batch, *event]."""
    shape = (*member.batch, *member.event)
    near = [member.base.sample().reshape(shape) for _ in range(_CHECKS)]
    return torch.stack([*near, *(_far(draw, member) for draw in near for _ in range(far))])


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


def moved(problem: Problem) -> dict[str, Tensor]:
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
        held = {**joint.drawn, **leaves}
        for factor in joint.held(held).evaluate(problem.data, problem.initial).factors:
            here = _held_by(factor, leaves)
            for site in here:
                meets[site] |= here - {site}
                holders[site].add(factor.site.removesuffix(MOVES))
    return _frozen(meets), frozenset(), _frozen(holders)


def _frozen(sets: Mapping[str, set[str]]) -> dict[str, frozenset[str]]:
    return {name: frozenset(others) for name, others in sets.items()}


__all__ = ["moved", "plan_e_step", "refusal_at", "rounded_at"]
