"""All restarts of EM in one tensor program, of a model in tables; and which of several restarts is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lvmppl.algorithms.ascent import Stopping, Trajectory, best_of, detached
from lvmppl.algorithms.batched_step import BatchedStep
from lvmppl.algorithms.closed_form import Solution, start_above_floors
from lvmppl.algorithms.em_run import NotTheModel, Run, note_floor, picked
from lvmppl.algorithms.start import start_together
from lvmppl.algorithms.tabulated import Tabulated

_SAME = 1e-6  # relative difference of log evidences up to which two restarts found one optimum
_PATIENCE = 32  # steps with needless copies that cost about what a step of another size costs to record


class Together:
    """Restarts that step together: R leads every tensor, and those that stop leave it.

    Each has its own history, stopping and status, the same as alone up to rounding.
    """

    def __init__(self, run: Run, tables: Tabulated) -> None:
        self.run_one, self.tables = run, tables
        self.step = BatchedStep(run.problem, run.plan, tables, run.options.compile == "always")
        self.problem, self.options = run.problem, run.options
        self.done = [Trajectory(r, run.problem.objective_kind) for r in range(self.options.restarts)]
        self.stopping = [Stopping(self.options.tolerance) for _ in self.done]
        self.best: list[tuple[Mapping[str, Tensor], int]] = [({}, 0) for _ in self.done]
        self.active = list(range(len(self.done)))
        self.ends: list[float] = []  # log evidence of the optima at which the tables were looked at
        self.few_for = 0  # steps during which three in four places were held by copies

    def run(self) -> list[Trajectory]:
        options, progress = self.options, self.problem.progress
        progress.start(self.problem.name, 0, options.max_steps)
        values: Mapping[str, Tensor] = start_together(
            self.problem, options.init, options.restarts, self.run_one.plan, self.tables
        )
        plan = self.run_one.plan
        raised = start_above_floors(plan.sites, self.problem.model.specs, plan.closed, values)
        values = raised.values
        for restart, trajectory in enumerate(self.done):
            note_floor(trajectory, raised.floored(restart))
        for step in range(options.max_steps + 1):
            self.run_one.check_tables(step, picked(values, 0))
            advanced = self.step(values)
            keep = self._judge(step, values, advanced.objectives)
            progress.update(step, max(t.objective for t in self.done))
            if not keep or step == options.max_steps:
                break
            values = self._kept(keep, advanced.solution)
        for restart in self.active:
            self._leave(restart)
        progress.finish(best_restart(self.done).status)
        return self.done

    def _judge(self, step: int, values: Mapping[str, Tensor], objectives: list[float]) -> list[int]:
        """Record the step of every active restart; positions of those that go on."""
        keep = []
        for position, restart in enumerate(self.active):
            trajectory, objective = self.done[restart], objectives[position]
            trajectory.record(step, objective)
            if self._falls(trajectory, objective, values, position):
                self._leave(restart)
                if trajectory.values and not self.run_one.still_holds(trajectory.values):
                    raise NotTheModel
                self.run_one.diverged(trajectory, picked(values, position), objective)
                continue
            if not trajectory.values or objective > trajectory.objective:
                trajectory.values = trajectory.values or picked(values, position)
                trajectory.objective, self.best[restart] = objective, (values, position)
            if self.stopping[restart].met(objective):
                trajectory.status = "converged"
                self._leave(restart)
                continue
            keep.append(position)
        return keep

    def _falls(
        self, trajectory: Trajectory, objective: float, values: Mapping[str, Tensor], position: int
    ) -> bool:
        if (
            trajectory.values and trajectory.objective <= objective < math.inf
        ):  # as nearly always: nothing to look up
            return False
        best = picked(*self.best[trajectory.restart])
        return self.run_one.falls(trajectory, objective, picked(values, position), best)

    def _leave(self, restart: int) -> None:
        """A restart is over: its best iterate, at which the model must still be what the tables say.

        Looked at once for every optimum: restarts that end at the same log evidence are taken to end at the same one.
        """
        values, position = self.best[restart]
        trajectory = self.done[restart]
        if trajectory.values:
            trajectory.values = detached(picked(values, position))
            if not any(math.isclose(trajectory.objective, end, rel_tol=_SAME) for end in self.ends):
                self.run_one.check_tables(0, trajectory.values)
                self.ends.append(trajectory.objective)

    def _kept(self, keep: list[int], solution: Solution) -> Mapping[str, Tensor]:
        """θ of the restarts that go on. Where their number is costly to change, copies of one hold the places of those
        that left, until three in four have been gone for as many steps as a change costs."""
        held = any(bool(h.any()) for h in solution.held.values())
        if held or any(self.done[restart].at_floor for restart in self.active):
            for position in keep:
                note_floor(self.done[self.active[position]], solution.floored(position))
        places = len(next(iter(solution.values.values())))
        wanted = len(keep)
        if self.step.is_recorded(places):
            self.few_for = self.few_for + 1 if 4 * len(keep) <= places else 0
            wanted = places if self.few_for < _PATIENCE else len(keep)
        if len(keep) == len(self.active) and wanted == places:
            return solution.values
        if wanted < places:
            self.few_for = 0
        self.active = [self.active[i] for i in keep]
        index = torch.tensor(keep + keep[:1] * (wanted - len(keep)))
        return {n: v.index_select(0, index) for n, v in solution.values.items()}


def best_restart(done: Sequence[Trajectory]) -> Trajectory:
    """The restart with the highest log evidence; one that ends at a floor only where all do.

    Without the floor the likelihood would rise for ever there, so its height says how low the floor is, not how good the
    fit (McLachlan & Peel 2000 choose among the maxima in the interior likewise).
    """
    return best_of([t for t in done if not t.at_floor and t.status != "diverged"] or done)


__all__ = ["Together", "best_restart"]
