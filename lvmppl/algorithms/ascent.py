"""The loop that all gradient algorithms share: records, stopping rule, restarts, the best iterate or the tail's mean."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lvmppl.algorithms.problem import Problem
from lvmppl.density import Values

TAIL = 0.25  # the share of a stochastic fit's steps whose iterates are averaged
LAST_RATE = 0.01  # what an exponential schedule leaves of the learning rate at the last step

_EQUAL = 1e-13  # relative difference of objectives that rounding makes of one


@dataclass
class Trajectory:
    """One restart: what it logged, where it ended and why."""

    restart: int
    objective_kind: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    objective: float = -math.inf
    status: str = "max_steps"
    message: str = ""
    at_floor: bool = (
        False  # whether a variance of the last θ is held where the likelihood has no maximum beyond
    )
    started: float = field(default_factory=time.perf_counter)
    estimators: Callable[[], str] = str  # what there is to say of the gradient's estimators

    @property
    def steps(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    def record(self, step: int, objective: float, **extra: float) -> None:
        seconds = time.perf_counter() - self.started
        self.rows.append(
            {
                "restart": self.restart,
                "step": step,
                "seconds": seconds,
                "objective": objective,
                "objective_kind": self.objective_kind,
                **extra,
            }
        )

    def tail_mean(self) -> float:
        """The mean objective of the tail's steps: what restarts are compared by where each step's is an estimate."""
        tail = self.rows[int((1 - TAIL) * len(self.rows)) :]
        finite = [r["objective"] for r in tail if math.isfinite(r["objective"])]
        return math.fsum(finite) / len(finite) if finite else -math.inf


class Stopping:
    """Relative change of the objective, strictly below the tolerance; 0 never stops."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.previous: float | None = None

    def met(self, objective: float) -> bool:
        previous, self.previous = self.previous, objective
        if previous is None or not math.isfinite(objective) or not math.isfinite(previous):
            return False
        return abs(objective - previous) < self.tolerance * max(abs(previous), 1e-300)

    def forget(self) -> None:
        """Start anew: the next objective is compared with none before it."""
        self.previous = None


class RestartOptions(Protocol):
    @property
    def max_steps(self) -> int: ...


def run_restarts(
    problem: Problem, restarts: int, max_steps: int, one: Callable[[int], Trajectory]
) -> list[Trajectory]:
    """Run each restart in turn; the caller keeps the best."""
    done = []
    for restart in range(restarts):
        problem.progress.start(problem.name, restart, max_steps)
        trajectory = one(restart)
        problem.progress.finish(trajectory.status)
        done.append(trajectory)
    return done


def best_of(trajectories: Sequence[Trajectory]) -> Trajectory:
    """The restart with the highest objective, the first of those equal to rounding; one that diverged only if all did."""
    sound = [t for t in trajectories if t.status != "diverged"] or trajectories
    top = max(t.objective for t in sound)
    slack = _EQUAL * abs(top) if math.isfinite(top) else 0.0
    return next(t for t in sound if t.objective >= top - slack)


def make_optimizer(name: str, leaves: Sequence[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    """An optimizer of torch.optim by its name in any case; of L-BFGS one iteration a step, with a line search."""
    kinds = {n.lower(): k for n, k in vars(torch.optim).items() if isinstance(k, type)}
    if name == "lbfgs":
        settings: dict[str, Any] = {"max_iter": 1, "max_eval": 25, "line_search_fn": "strong_wolfe"}
        settings.update(history_size=20, tolerance_grad=0.0, tolerance_change=0.0)
        return torch.optim.LBFGS(list(leaves), lr=learning_rate, **settings)
    return kinds[name](list(leaves), lr=learning_rate)  # type: ignore[no-any-return]


def rate_factor(schedule: str, progress: float) -> float:
    """What the learning rate is multiplied by when a share `progress` (0 … 1) of the steps is done."""
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "exponential":
        return float(LAST_RATE**progress)
    return 1.0 - progress


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def maximise_lbfgs(
    objective: Callable[[Mapping[str, Tensor]], Tensor],
    start: Mapping[str, Tensor],
    max_steps: int,
    on_step: Callable[[int, float, Mapping[str, Tensor]], bool],
    learning_rate: float = 1.0,
    history: int = 20,
) -> None:
    """L-BFGS with a strong-Wolfe line search, one iteration a step.

    objective: unconstrained values → a scalar to maximise (it may itself call backward on parts: see `Summed`).
    on_step(t, objective after t updates, values): returns True to stop.
    """
    leaves = {k: v.detach().clone().requires_grad_() for k, v in start.items()}
    flat = list(leaves.values())
    if not flat:
        with torch.no_grad():
            on_step(0, float(objective(leaves)), leaves)
        return
    optimizer = torch.optim.LBFGS(
        flat,
        lr=learning_rate,
        max_iter=1,
        max_eval=25,
        history_size=history,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    seen: list[
        tuple[list[Tensor], Tensor, list[Tensor]]
    ] = []  # the last evaluations: a step starts where one ended

    def closure() -> Tensor:
        for at, loss, grads in seen:
            if all(torch.equal(a, b) for a, b in zip(at, flat, strict=True)):
                for leaf, grad in zip(flat, grads, strict=True):
                    leaf.grad = grad.clone()
                return loss
        optimizer.zero_grad()
        loss = -objective(leaves)
        if loss.requires_grad:
            loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in flat]
        for leaf, grad in zip(flat, grads, strict=True):
            leaf.grad = grad.clone()
        seen.append(([p.detach().clone() for p in flat], loss.detach(), grads))
        del seen[:-8]
        return loss.detach()

    if on_step(0, -float(closure()), leaves):
        return
    for step in range(1, max_steps + 1):
        optimizer.step(closure)
        if on_step(step, -float(closure()), leaves):
            return


def detached(values: Values) -> dict[str, Tensor]:
    """A copy that no later step will move."""
    return {k: v.detach().clone() for k, v in values.items()}
