"""One step of EM for several restarts at once, of a model that is in tables and closed-form throughout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lvmppl.algorithms.closed_form import Solution, solve
from lvmppl.algorithms.plan import Plan
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.recorded import Recorded
from lvmppl.algorithms.table_rows import SMALL
from lvmppl.algorithms.tabulated import Tabulated

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

    def __init__(self, problem: Problem, plan: Plan, tables: Tabulated, whatever_size: bool = False) -> None:
        self._problem, self._plan, self._tables = problem, plan, tables
        self._largest = math.inf if whatever_size else SMALL
        self._recorded: Recorded | None = None
        self._restarts = self._recordings = self._otherwise = 0

    def is_recorded(self, restarts: int) -> bool:
        """Whether steps of this many restarts are small enough, so that a change of their number costs a recording."""
        tables = self._tables
        return not tables.has_chains and tables.is_one_piece and tables.entries(restarts) <= self._largest

    def __call__(self, values: Mapping[str, Tensor]) -> Advanced:
        found = self._replayed(values) or self._whole(values)
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
        if self._recordings >= _RECORDINGS or not self.is_recorded(restarts):
            return None
        self._restarts, self._recordings, self._otherwise = restarts, self._recordings + 1, 0
        self._recorded = Recorded(self._whole, values)
        return self._recorded.outputs()

    def _whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        objectives, statistics = self._tables.e_step(values)
        plan, specs = self._plan, self._problem.model.specs
        solution = solve(plan.sites, specs, plan.closed, values, statistics, plan.priors)
        held = {_HELD + n: h for n, h in solution.held.items()}
        return {**solution.values, **held, _OBJECTIVE: objectives}


__all__ = ["Advanced", "BatchedStep"]
