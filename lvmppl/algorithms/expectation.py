"""E_q of the model's log-factors over and over, as q moves: the model is run, then its recorded arithmetic is repeated.

A run of a Pyro model on little data is mostly handlers and shapes, which come out the same however q stands. What differs
between two runs is the points at which the continuous sites are held, and θ: they are the inputs of the recording.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lvmppl.algorithms.compilation import not_compiled
from lvmppl.algorithms.conjugate import Member
from lvmppl.algorithms.integrated import IntegratedJoint
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.recorded import Recorded
from lvmppl.algorithms.rounding import RELATIVE
from lvmppl.density import Evaluation, Values
from lvmppl.options import Compile

_LARGEST = 2**17  # entries of a tensor up to which preparing an operation costs what it costs


@dataclass
class _Known:
    """A recorded expectation, its factors' axes and plates, and whether it has been compared with the model."""

    recorded: Recorded
    frame: Evaluation
    compared: bool = False


class Expectations:
    """`IntegratedJoint.expected_factors` of some sites of the model, by name, on the same rows time and again."""

    def __init__(self, problem: Problem, joint: IntegratedJoint, compile: Compile) -> None:
        self.problem, self.joint, self.compile = problem, joint, compile
        self.data, self.rows = problem.rows()
        self._known: dict[tuple[str, ...], _Known | None] = {}  # None: seen once
        self._by_running: set[tuple[str, ...]] = set()

    def __call__(self, values: Values, sites: Iterable[str], members: Mapping[str, Member]) -> Evaluation:
        """The evaluation whose factors are E_q log p of these sites."""
        key = tuple(sites)
        points = self.joint.design.points(members)
        if key in self._by_running or self.compile == "never":
            return self._run(key, values, points)
        if key not in self._known:
            self._known[key] = None
            return self._run(key, values, points)
        known = self._known[key]
        if known is None:
            return self._record(key, values, points)
        found = known.recorded(self._inputs(values, points))
        if found is None:
            self._cannot("the model branches otherwise where q came to")
            return self._run(key, values, points)
        if not known.compared:
            known.compared, frame = True, self._run(key, values, points)
            if not all(_agree(f.log_prob, own) for f, own in zip(frame.factors, found.values(), strict=True)):
                self._cannot("the model computes something else than the operations it was seen to make")
                self._by_running.add(key)
                self._known[key] = None  # its memory is of no more use
            return frame
        return _with(known.frame, found)

    @property
    def are_recorded(self) -> bool:
        """Whether some are repeated."""
        return any(known is not None and key not in self._by_running for key, known in self._known.items())

    def _cannot(self, why: str) -> None:
        if self.compile == "always":
            raise not_compiled(self.problem, why)

    def _run(self, sites: Iterable[str], values: Values, points: Mapping[str, Tensor]) -> Evaluation:
        return self.joint.expected_at(points, self.data, values, self.rows, sites)

    def _inputs(self, values: Values, points: Mapping[str, Tensor]) -> dict[str, Tensor]:
        theta = {f"θ {n}": values[n] for n in self.joint.structure.parameters if n in values}
        return theta | {f"z {n}": z for n, z in points.items()}

    def _record(self, key: tuple[str, ...], values: Values, points: Mapping[str, Tensor]) -> Evaluation:
        frame: list[Evaluation] = []

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            theta = {n.removeprefix("θ "): v for n, v in inputs.items() if n.startswith("θ ")}
            own = {n.removeprefix("z "): v for n, v in inputs.items() if n.startswith("z ")}
            frame.append(self._run(key, {**values, **theta}, own))
            return {f"{i}": f.log_prob for i, f in enumerate(frame[0].factors)}

        recorded = Recorded(run, self._inputs(values, points))
        if recorded.largest > _LARGEST and self.compile == "auto":
            self._by_running.add(key)
        else:
            self._known[key] = _Known(recorded, frame[0])
        return _with(frame[0], recorded.outputs())


def _with(frame: Evaluation, found: Mapping[str, Tensor]) -> Evaluation:
    """An evaluation with other log-densities."""
    factors = (replace(f, log_prob=own) for f, own in zip(frame.factors, found.values(), strict=True))
    return replace(frame, factors=tuple(factors))


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether a recording differs from the model by rounding: relative, and absolute in nats."""
    trusted = RELATIVE.get(other.dtype, 1e-5)
    return torch.allclose(one, other, rtol=trusted, atol=trusted, equal_nan=True)


__all__ = ["Expectations"]
