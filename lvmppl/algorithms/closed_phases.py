"""The phases of variational EM that need no gradient: what there is of closed forms for q and for θ.

The E phase is coordinate ascent (`coordinate`). The M phase is that of EM with the expected statistics of q in the place
of the posterior's, where every site of q is enumerated; where q holds the posterior the two are EM. Minibatches have
neither: an exact maximum over a batch is not a step towards that over all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lvmppl.algorithms.coordinate import bent_site, plan_e_step
from lvmppl.algorithms.guide_fields import CONTINUOUS, Block
from lvmppl.algorithms.guided_step import guided_e_step
from lvmppl.algorithms.integrated import IntegratedJoint
from lvmppl.algorithms.m_step import plan_m_step, solve_closed, verified
from lvmppl.algorithms.plan import Plan
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.sweep import CoordinatePlan, Sweep
from lvmppl.density import derive_seed
from lvmppl.fitted import MStep
from lvmppl.options import VEMOptions


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

    def bent_site(self, values: Mapping[str, Tensor]) -> str:
        """A site without a closed form after all after one more E phase, which sees log p where q stands now."""
        return bent_site(self.e, Sweep(self.e, values).run(self.sweeps)) if self.e.has_points else ""

    def m_phase(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], frozenset[str]]:
        """The θ of closed forms at their maximum given q, and those that a floor holds."""
        if not self.m.closed:
            return {}, frozenset()
        weights, statistics = guided_e_step(self.problem, values, self.m.sites)
        theta = {n: values[n] for n in self.problem.theta}
        solved, floored = solve_closed(self.problem, self.m, theta, statistics, weights)
        return {n: solved[n] for n in self.m.closed}, floored

    def checked(self, values: Mapping[str, Tensor]) -> ClosedPhases:
        """Less what does not hold at these values."""
        return replace(self, m=verified(self.problem, self.m, {n: values[n] for n in self.problem.theta}))

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
    drawn = [s.name for s in problem.model.structure.sites.values() if s.kind == "latent"]
    if drawn and not refusal:
        refusal = f"'{drawn[0]}' is not enumerated in the model"
    refusal = refusal or ("m_step: gradient" if options.m_step == "gradient" else "")
    m = (
        Plan((), tuple(_left(problem, n, refusal) for n in problem.theta))
        if refusal
        else plan_m_step(problem)
    )
    return ClosedPhases(e, m, options.e_steps)


def _left(problem: Problem, name: str, why: str) -> MStep:
    return MStep(name, "fixed", "frozen") if name in problem.frozen else MStep(name, "gradient", why)


__all__ = ["ClosedPhases", "closed_phases"]
