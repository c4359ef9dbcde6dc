"""When a variational fit stops: relative change of the (smoothed) objective, or patience with it or with held-out rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lvmppl.algorithms.ascent import Stopping, make_optimizer, set_rate
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.stepper import batch_elbo
from lvmppl.density import Coordinates, Rows, derive_seed
from lvmppl.errors import InputError
from lvmppl.options import VariationalOptions

WINDOW = 50  # steps over which a noisy objective is averaged before a rule looks at it
TABLE_STEPS, TABLE_RATE = 100, 0.1  # Adam on the λ of held-out rows, the rate decayed to zero


class Averaging(Protocol):
    """What keeps a running mean of its iterates."""

    def averaged_values(self) -> dict[str, Tensor]: ...


class Watch:
    """Looks at the objective and says when to stop.

    `tolerance` compares an objective (the mean of a window where it is noisy) with the one before. With `patience` a fit
    also stops after that many windows without a new best mean, of the objective or, with `validation_fraction`, of the
    ELBO of rows that no step sees; it then returns the mean iterate of the best window. λ of a table is optimised for those
    rows at each look, with all else held.
    """

    def __init__(self, problem: Problem, options: VariationalOptions, window: int = WINDOW) -> None:
        self.problem, self.options, self.window = problem, options, window
        self.stopping = Stopping(options.tolerance)
        self.recent: list[float] = []
        self.best, self.waited = -math.inf, 0
        self.best_values: dict[str, Tensor] | None = None
        self.training, self.held_out = _split(problem, options)
        self.reached: dict[
            str, Tensor
        ] = {}  # λ of the held-out rows at the last look, where the next one starts

    def opens(self, step: int, tail: int) -> bool:
        """Whether a window begins at this step whose mean iterate may be wanted."""
        wanted = self.options.patience is not None
        return step % self.window == 0 and (wanted or (self.options.tolerance > 0 and step < tail))

    def met(self, step: int, objective: float, noisy: bool, stepper: Averaging) -> bool:
        """Whether to stop after this step's objective."""
        self.recent.append(objective)
        stop = not noisy and self.stopping.met(objective)
        if (step + 1) % self.window:
            return stop
        mean, self.recent = math.fsum(self.recent) / len(self.recent), []
        if noisy:
            stop = self.stopping.met(mean)
        return self._out_of_patience(mean, stepper) or stop

    def _out_of_patience(self, mean: float, stepper: Averaging) -> bool:
        if self.options.patience is None:
            return False
        score, values = mean, stepper.averaged_values()
        if self.held_out is not None:
            values = self.completed(values)
            with torch.no_grad():
                score = self._held_out_elbo(values)
        if score > self.best:
            self.best, self.waited, self.best_values = score, 0, values
            return False
        self.waited += 1
        return self.waited >= self.options.patience

    def completed(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values with λ of the held-out rows, which no step has moved, up their own ELBO; all else is held."""
        problem = self.problem
        assert problem.guided is not None
        specs = problem.guided.specs
        tables = [n for n in problem.free_lambda if specs[n].is_table]
        if self.held_out is None or not tables:
            return values
        rows = Rows(problem.num_rows, self.held_out)
        coordinates = Coordinates(specs, tables)
        start = self.reached or {n: specs[n].rows_of(values[n], rows) for n in tables}
        leaves = coordinates.unconstrain(start)
        optimizer = make_optimizer("adam", [v.requires_grad_() for v in leaves.values()], TABLE_RATE)
        with torch.enable_grad(), self._same_draws():
            for step in range(TABLE_STEPS):
                set_rate(optimizer, TABLE_RATE * (1 - step / TABLE_STEPS))
                optimizer.zero_grad()
                own = coordinates.constrain(leaves)
                (-batch_elbo(problem, problem.guided, {**values, **own}, self.held_out)).backward()
                optimizer.step()
        self.reached = {n: v.detach() for n, v in coordinates.constrain(leaves).items()}
        result = dict(values)
        for name, found in self.reached.items():
            axis = specs[name].row_axis
            assert axis is not None
            result[name] = values[name].index_copy(axis, self.held_out, found)
        return result

    @contextmanager
    def _same_draws(self) -> Iterator[None]:
        """Within the block draws are those of every other look; those of the steps go on after it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.problem.seed, self.problem.name, "validation"))
            yield

    def _held_out_elbo(self, values: dict[str, Tensor]) -> float:
        assert self.problem.guided is not None
        with self._same_draws():
            return float(batch_elbo(self.problem, self.problem.guided, values, self.held_out, 8))

    def forget(self) -> None:
        """The last step was undone: its objective will come again."""
        self.stopping.forget()


def _split(problem: Problem, options: VariationalOptions) -> tuple[Tensor | None, Tensor | None]:
    """(rows that steps see, rows held out), None for all and none; drawn by the seed."""
    if options.validation_fraction == 0:
        return None, None
    where = f"fit '{problem.name}': validation_fraction"
    if options.patience is None:
        raise InputError(where, "patience beside it", "none", "say after how many windows to stop")
    if problem.data_plate is None:
        raise InputError(where, "a model with a data plate", "none", "leave it out")
    generator = torch.Generator().manual_seed(derive_seed(problem.seed, problem.name, "held out"))
    order = torch.randperm(problem.num_rows, generator=generator)
    count = min(max(1, round(options.validation_fraction * problem.num_rows)), problem.num_rows - 1)
    return order[count:].sort().values, order[:count].sort().values


def check_line_search(problem: Problem, options: VariationalOptions, noisy: bool) -> None:
    """L-BFGS compares objectives along a line: they must not be estimates."""
    if options.optimizer == "lbfgs" and noisy:
        raise InputError(
            f"fit '{problem.name}': optimizer lbfgs",
            "an objective without noise (all rows, every site of the guide summed exactly)",
            "minibatches or drawn sites",
            "use adam, or leave batch_size out",
        )


__all__ = ["WINDOW", "Watch", "check_line_search"]
