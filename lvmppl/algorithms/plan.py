"""What an M-step does with each parameter, as found for a model: `rules` makes such a plan, `m_step` carries it out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lvmppl.algorithms.closed_form import ClosedSite
from lvmppl.algorithms.least_squares import Affine
from lvmppl.algorithms.priors import Parts
from lvmppl.algorithms.problem import Problem
from lvmppl.fitted import MStep


@dataclass(frozen=True)
class Plan:
    """The M-step of a model: the sites whose statistics are wanted, and how each parameter is updated, and why."""

    sites: tuple[ClosedSite, ...]
    steps: tuple[MStep, ...]
    complete: bool = False  # every field of every site is looked up: the model need not be run
    affine: Affine | None = None  # parameters of locations, solved by least squares
    priors: Mapping[str, Parts] = field(default_factory=dict)  # pseudo-statistics of conjugate priors
    cycles: int = 1  # at most so many rounds over locations and spreads, each at its maximum given the others

    @property
    def closed(self) -> tuple[str, ...]:
        return tuple(s.parameter for s in self.steps if s.how == "closed-form")

    @property
    def by_gradient(self) -> tuple[str, ...]:
        return tuple(s.parameter for s in self.steps if s.how == "gradient")

    @property
    def needs_weights(self) -> bool:
        """Whether the M-step runs the model again: statistics alone do not settle it."""
        return bool(self.by_gradient) or self.affine is not None or any(s.residual for s in self.sites)

    def demote(self, names: Iterable[str], why: str) -> Plan:
        """The plan with these parameters left to the gradient."""
        moved = set(names)
        if not moved:
            return self
        steps = tuple(MStep(s.parameter, "gradient", why) if s.parameter in moved else s for s in self.steps)
        keep = {s.parameter for s in steps if s.how == "closed-form"}
        sites = tuple(s for s in self.sites if any(set(f.names) & keep for f in s.lookups.values()))
        affine = None if self.affine is None else self.affine.without(moved)
        return Plan(sites, steps, affine=affine, priors=self.priors, cycles=self.cycles)

    def at_rows(self, rows: Tensor) -> Plan:
        """The plan on some rows of the data."""
        return replace(self, sites=tuple(s.at_rows(rows) for s in self.sites))

    def in_turn(self, names: Iterable[str], cycles: int) -> Plan:
        """The plan with `cycles` rounds, which these parameters need."""
        moved = set(names)
        steps = tuple(
            MStep(s.parameter, s.how, f"{s.why}; conditional maximisation, in turn with the spread")
            if s.parameter in moved
            else s
            for s in self.steps
        )
        return replace(self, steps=steps, cycles=cycles)


def working_dtype(problem: Problem) -> torch.dtype:
    """The widest dtype of the parameters."""
    result = torch.float32
    for value in problem.initial.values():
        result = torch.promote_types(result, value.dtype)
    return result
