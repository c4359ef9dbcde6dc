"""The phases of variational EM that need no gradient: what there is of closed forms for q and for θ.

The E phase is coordinate ascent (`coordinate`). The M phase is that of EM with the expected statistics of q in the place
of the posterior's, where no site of q is drawn: enumerated, or continuous and integrated over the points of a design. Where
q holds the posterior the two are EM. Minibatches have neither: an exact maximum over a batch is not a step towards that
over all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lvmppl.algorithms.compilation import not_compiled
from lvmppl.algorithms.coordinate import moved, plan_e_step, refusal_at, rounded_at
from lvmppl.algorithms.evidence import is_chunkable
from lvmppl.algorithms.expected import expected_log_joint as weighted_log_joint
from lvmppl.algorithms.guide_fields import CONTINUOUS, Block
from lvmppl.algorithms.guided_step import guided_e_step
from lvmppl.algorithms.integrated import IntegratedJoint
from lvmppl.algorithms.least_squares import FEW_ROWS
from lvmppl.algorithms.m_step import plan_m_step, solve_closed, verified
from lvmppl.algorithms.plan import Plan
from lvmppl.algorithms.probing import probe_rows
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.sweep import CoordinatePlan, Sweep
from lvmppl.density import Rows, derive_seed
from lvmppl.elbo import GuideWeights, expected_log_joint
from lvmppl.errors import ModelError
from lvmppl.fitted import MStep
from lvmppl.options import VEMOptions

MAX_ENTRIES = 5e7  # of a log-factor at all points of q, where rows cannot be taken apart


@dataclass(frozen=True)
class ClosedPhases:
    """Which sites of q and which parameters of θ have a closed form, and the two phases that use them."""

    e: CoordinatePlan
    m: Plan
    sweeps: int
    kept: list[Sweep] = field(default_factory=list, compare=False, repr=False)  # the last, to go on from

    @cached_property
    def problem(self) -> Problem:
        """The problem, its guide's continuous sites integrated where none need be drawn."""
        joint = self.e.problem.guided
        if isinstance(joint, IntegratedJoint) and joint.drawn:
            return replace(self.e.problem, guided=joint.base)
        return self.e.problem

    def e_phase(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The λ of closed forms after one sweep over the global ones and `e_steps` over the local."""
        if not self.e.blocks:
            return {}
        last = self.kept[-1:]
        if not (last and last[0].plan is self.e and last[0].stands_at(values)):
            last = [Sweep(self.e, values)]
        self.kept[:] = last
        done = last[0].run(self.sweeps)
        return {n: done[n] for n in self.e.names}

    def refusal_at(self, values: Mapping[str, Tensor]) -> str:
        """Why a site has no closed form after all, after one more E phase, which sees log p where q stands now."""
        return refusal_at(self.e, Sweep(self.e, values).run(self.sweeps)) if self.e.has_points else ""

    def rounded_at(self, values: Mapping[str, Tensor]) -> str:
        """Why the expectations of a closed form are lost at these values; empty where they are not."""
        return rounded_at(self.e, values) if self.e.has_points else ""

    def m_phase(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], frozenset[str]]:
        """The θ of closed forms at their maximum given q, and those that a floor holds."""
        if not self.m.closed:
            return {}, frozenset()
        weights, statistics = guided_e_step(self.problem, values, self.m.sites)
        theta = {n: values[n] for n in self.problem.theta}
        solved, floored = solve_closed(self.problem, self.m, theta, statistics, weights)
        return {n: solved[n] for n in self.m.closed}, floored

    @property
    def compiled(self) -> str:
        """How E_q log p comes about in the E-steps, where they have it."""
        if not self.e.has_points or not self.kept:
            return ""
        return "repeat recorded E_q log p" if self.kept[0].is_recorded else "run the model for E_q log p"

    def checked(self, values: Mapping[str, Tensor]) -> ClosedPhases:
        """Less what does not hold at these values."""
        return replace(self, m=verified(self.problem, self.m, values))

    def without_closed_forms(self, why: str) -> ClosedPhases:
        return replace(self, e=self.e.by_gradient(why), m=self.m.demote(self.m.closed, why))

    def scattered(self, restart: int) -> dict[str, Tensor]:
        """A random start of q, where its sites are updated from one another: equal ones would stay equal.

        Where q has global continuous sites and local ones, the global ones near their start (positive parameters within
        about a tenth, locations within about one standard deviation), and the local ones after `e_steps` sweeps given
        these. Else responsibilities at random.
        """
        tables = [b for b in self.e.blocks if b.kind != CONTINUOUS]
        if len(tables) == len(self.e.blocks):
            return {}
        seed = derive_seed(self.problem.seed, self.problem.name, restart, "λ")
        generator = torch.Generator().manual_seed(seed)
        values, result = self.problem.initial, dict[str, Tensor]()
        outer = [b for b in self.e.outer if b.kind == CONTINUOUS]
        if outer and self.e.local:
            for block in outer:
                result.update(block.write(_shaken(block, values, generator), values))
            local = replace(self.e, blocks=self.e.local)
            done = Sweep(local, {**values, **result}).run(self.sweeps)
            return result | {n: done[n] for n in local.names}
        for block in tables:
            for held in block.held.values():
                like = held.spelling.apply(values[held.name])
                uniform = torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)
                weights = torch.log(uniform).neg().pow(4)
                share = weights / weights.sum(-1, keepdim=True) if held.spelling.unit else uniform
                result[held.name] = held.write(share, values)
        return result


def _shaken(block: Block, values: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The fields of a continuous site of q, each a little beside what it is."""
    fields = {key: held.spelling.apply(values[held.name]) for key, held in block.held.items()}
    sd = fields["precision"].rsqrt().reshape(fields["loc"].shape) if "precision" in fields else 1.0
    result = {}
    for key, value in fields.items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        if key == "loc":
            result[key] = value + sd * noise
        else:
            result[key] = value if key == "covariance" else value * (0.1 * noise).exp()
    return result


def closed_phases(problem: Problem, options: VEMOptions) -> ClosedPhases:
    """Find the closed forms at the start of a fit."""
    assert problem.guided is not None and problem.guided.guide_structure is not None
    refusal = ""
    if options.batch_size is not None and options.batch_size < problem.num_rows:
        refusal = "minibatches"
    elif options.validation_fraction:
        refusal = "rows are held out"
    elif options.estimator != "auto" or options.num_samples is not None:
        refusal = "an estimator or another bound is asked for"
    elif options.kl_weight != 1.0 or options.free_bits:
        refusal = "the KL is weighted"
    e = plan_e_step(problem, refusal or ("e_step: gradient" if options.e_step == "gradient" else ""))
    if options.compile == "always" and not e.has_points:
        why = refusal or "q has no continuous site with a closed form"
        raise not_compiled(problem, f"{why}: there are no expectations to record")
    e = replace(e, compile=options.compile)
    refusal = refusal or ("m_step: gradient" if options.m_step == "gradient" else "")
    return ClosedPhases(e, _plan_m_phase(e.problem, refusal), options.e_steps)


def _plan_m_phase(problem: Problem, refusal: str) -> Plan:
    """The closed forms of θ under q. problem: its guide integrated where no site is drawn. refusal: why none is wanted."""
    assert problem.guided is not None and problem.guided.guide_structure is not None
    if problem.free_theta:
        refusal = refusal or _drawn_site(problem) or _points_in_the_way(problem)
    if refusal or not problem.free_theta:
        return Plan((), tuple(_left(problem, n, refusal) for n in problem.theta))
    shared = set(problem.guided.guide_structure.parameters) & set(problem.free_theta)
    return plan_m_step(problem).demote(shared, "q depends on it")


def _drawn_site(problem: Problem) -> str:
    """Why expectations under q are no sums, if so: a continuous site that is drawn (the first is named)."""
    joint = problem.guided
    sites = tuple(joint.drawn) if isinstance(joint, IntegratedJoint) else problem.model.structure.continuous
    return f"'{sites[0]}' is drawn from q" if sites else ""


def _points_in_the_way(problem: Problem) -> str:
    """Why the points of a design do not serve an M-step, if so: no q of a part of the rows, or not all points at once.

    E_q log p(x, z; θ) is compared with that from one point at a time, away from the start of θ and q.
    """
    joint = problem.guided
    if not isinstance(joint, IntegratedJoint):
        return ""
    refusal = f"the model does not take many values of '{next(iter(joint.design.meets))}' at once"
    values, (data, rows) = moved(problem), problem.rows()
    few, part = probe_rows(problem, FEW_ROWS)
    with torch.no_grad():
        try:
            joint.view_guide(
                few, values, rows if part.size == rows.size else Rows(part.size, torch.arange(part.size))
            )
        except ModelError:
            return "q runs on all rows only; write pyro.param(…, event_dim=…) inside the data plate"
        evaluation = joint.evaluate(data, values, rows)
        entries = max(f.log_prob.numel() for f in evaluation.factors)
        count = len(next(iter(joint.all_points(data, values, rows).values())))
        if not is_chunkable(problem) and count * entries > MAX_ENTRIES:
            return f"its factors have {entries:,} entries at each of {count} points of q"
        weights = GuideWeights(evaluation.guide_factors, evaluation.variables, evaluation.guide_variables)
        single = float(expected_log_joint(evaluation, weights, problem.data_plate))
        try:
            together = float(weighted_log_joint(problem, values, guided_e_step(problem, values)[0]))
        except Exception:  # whatever a model raises that was written for one value
            return refusal
    eps = torch.finfo(evaluation.factors[0].log_prob.dtype).eps
    return "" if abs(together - single) <= eps**0.6 * (1 + abs(single)) else refusal


def _left(problem: Problem, name: str, why: str) -> MStep:
    return MStep(name, "fixed", "frozen") if name in problem.frozen else MStep(name, "gradient", why)


__all__ = ["ClosedPhases", "closed_phases"]
