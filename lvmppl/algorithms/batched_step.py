"""One step of EM for several restarts at once, of a model that is in tables and closed-form throughout."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lvmppl.algorithms.closed_form import Solution, solve
from lvmppl.algorithms.expected import e_step
from lvmppl.algorithms.plan import Plan
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.recorded import Recorded
from lvmppl.algorithms.statistics import Statistics, of_restarts, stacked
from lvmppl.algorithms.tabulated import Imprecise, Tabulated

SMALL = 2**17  # entries of a step's largest tensors up to which preparing the operations costs what they cost
_RECORDINGS = 16  # in a fit: one for every number of restarts, and anew where steps keep branching otherwise
_OTHERWISE = 4  # steps in a row that branch otherwise before the way they go is recorded
_OBJECTIVE, _HELD = "·objective", "·held·"


@dataclass(frozen=True)
class Advanced:
    """log p(x; θ) of each restart [R] at the θ it was given, and the M-step's solution."""

    objectives: list[float]
    solution: Solution


class BatchedStep:
    """θ [R, *shape] → log p(x; θ) and the next θ; on little data recorded once for each R and repeated."""

    def __init__(self, problem: Problem, plan: Plan, tables: Tabulated) -> None:
        self._problem, self._plan, self._tables = problem, plan, tables
        self._recorded: Recorded | None = None
        self._restarts = self._recordings = self._otherwise = 0
        self._coarse = False  # whether the last step was too fine for the tables: the next one may well be

    def is_recorded(self, restarts: int) -> bool:
        """Whether steps of this many restarts are small enough, so that a change of their number costs a recording."""
        tables = self._tables
        return not tables.has_chains and tables.is_one_piece and tables.entries(restarts) <= SMALL

    def __call__(self, values: Mapping[str, Tensor], distinct: int) -> Advanced:
        """values: of `distinct` restarts, and from there on copies of the first."""
        found = self._replayed(values)
        if found is None:
            objectives, statistics = self._e_step(values, distinct)
            return Advanced(objectives.tolist(), self._m_step(values, statistics))
        objectives = found.pop(_OBJECTIVE)
        held = {n.removeprefix(_HELD): found.pop(n) for n in list(found) if n.startswith(_HELD)}
        return Advanced(objectives.tolist(), Solution(found, held))

    def _replayed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The step from the recording, or while it is made; None where there is none that holds."""
        restarts = len(next(iter(values.values())))
        if self._recorded is not None and self._restarts == restarts:
            found = self._recorded(values)
            self._otherwise = 0 if found is not None else self._otherwise + 1
            if self._otherwise < _OTHERWISE:
                return found
        if self._coarse or self._recordings >= _RECORDINGS or not self.is_recorded(restarts):
            return None
        self._recorded, self._restarts = None, restarts
        self._recordings, self._otherwise = self._recordings + 1, 0
        with contextlib.suppress(Imprecise):
            self._recorded = Recorded(self._whole, values)
        return None if self._recorded is None else self._recorded.outputs()

    def _whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        objectives, statistics = self._tables.e_step(values)
        solution = self._m_step(values, statistics)
        held = {_HELD + n: h for n, h in solution.held.items()}
        return {**solution.values, **held, _OBJECTIVE: objectives}

    def _m_step(self, values: Mapping[str, Tensor], statistics: Mapping[str, Statistics]) -> Solution:
        plan = self._plan
        return solve(plan.sites, self._problem.model.specs, plan.closed, values, statistics, plan.priors)

    def _e_step(self, values: Mapping[str, Tensor], distinct: int) -> tuple[Tensor, Mapping[str, Statistics]]:
        """For all restarts; those that the tables are too coarse for by running the model."""
        try:
            found = self._tables.e_step(values)
            self._coarse = False
            return found
        except Imprecise as error:
            self._coarse, copies = True, len(error.restarts) - distinct
            coarse = error.restarts[:distinct]
        parts = []
        fine = torch.nonzero(~coarse).flatten()
        if len(fine):
            parts.append(self._tables.e_step({n: v.index_select(0, fine) for n, v in values.items()}))
        alone = torch.nonzero(coarse).flatten()
        for restart in alone.tolist():
            own_values = {n: v[restart] for n, v in values.items()}
            total, _, own = e_step(self._problem, own_values, self._plan.sites, False)
            parts.append((torch.tensor([total], dtype=torch.float64), own))
        back = torch.cat([fine, alone]).argsort()
        back = torch.cat([back, back[:1].expand(copies)])
        merged = {n: of_restarts(stacked([own[n] for _, own in parts]), back) for n in parts[0][1]}
        return torch.cat([t.double() for t, _ in parts])[back], merged


__all__ = ["SMALL", "Advanced", "BatchedStep"]
