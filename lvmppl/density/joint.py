"""A model, and perhaps a guide, bound to their structures: one pass at given parameters and rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from pyro import poutine

from lvmppl.density.discovery import check_plates, num_rows
from lvmppl.density.enumeration import Enumeration
from lvmppl.density.factors import build_evaluation, build_views
from lvmppl.density.handlers import Draw, EnumerateChains, EnumerateFinite, Hold, LeaveToGuide, Parameters
from lvmppl.density.programs import Program, swapped_modules
from lvmppl.density.structure import (
    PARTICLES,
    POINTS,
    Drawing,
    Evaluation,
    ParameterSpec,
    Rows,
    SiteView,
    Structure,
    Values,
)
from lvmppl.errors import ModelError


class Joint:
    """A model, and perhaps a guide, bound to their structures: (θ, λ, rows) → factors."""

    def __init__(
        self,
        model: Program,
        structure: Structure,
        guide: Program | None = None,
        guide_structure: Structure | None = None,
    ) -> None:
        self.model, self.structure = model, structure
        self.guide, self.guide_structure = guide, guide_structure
        nesting = max(structure.nesting, guide_structure.nesting if guide_structure else 0)
        self.first_available_dim = -1 - nesting
        self.extra: Mapping[int, str] = {}  # names of batch axes that are neither plates nor enumerated here
        self.specs: dict[str, ParameterSpec] = dict(structure.parameters)
        if guide_structure is not None:
            self.specs.update(guide_structure.parameters)

    @contextmanager
    def _enumeration(self) -> Iterator[None]:
        with Enumeration(first_available_dim=self.first_available_dim), EnumerateChains():
            yield

    @contextmanager
    def _replayed(self, guide_trace: Any) -> Iterator[None]:
        """The model at the guide's values, its other enumerated sites enumerated.

        Enumeration sees every site before its value is replayed, as in Pyro's TraceEnum_ELBO: it notes on which
        enumerated sites a drawn one depends. The outer `EnumerateChains` serves chains that the guide enumerates.
        """
        replay, left = poutine.replay(trace=guide_trace), LeaveToGuide(guide_trace)
        with EnumerateChains(), replay, poutine.enum(), EnumerateChains(), left:
            yield

    @contextmanager
    def _drawing(self, drawing: Drawing) -> Iterator[None]:
        """How a guide runs: its finite sites summed, the others drawn, particles on the axis left of all plates."""
        left = self.first_available_dim - (drawing.particles > 1)
        draw, enumeration = Draw(drawing, self.first_available_dim), Enumeration(first_available_dim=left)
        with draw, enumeration, EnumerateChains(), EnumerateFinite(drawing):
            yield

    @contextmanager
    def _at(self, values: Values, rows: Rows) -> Iterator[None]:
        """Parameters and networks at `values`, of a table the entries of the rows."""
        with Parameters(values, self.specs, rows, self.structure.data_plate), swapped_modules(values):
            yield

    def evaluate(
        self, data: Values, values: Values, rows: Rows | None = None, drawing: Drawing | None = None
    ) -> Evaluation:
        """The log-factors at `values` on the rows handed in; the guide (if any) runs first and the model replays it."""
        rows, drawing = rows or Rows(num_rows(data)), drawing or Drawing()
        with self._at(values, rows):
            if self.guide is None:
                return self.evaluation_of(_traced(self.model, data, values, self._enumeration()), rows)
            guide_trace = _traced(self.guide, data, values, self._drawing(drawing))
            sizes = check_plates("guide", guide_trace, rows.size, self.structure.data_plate)
            model_trace = _traced(self.model, data, values, self._replayed(guide_trace))
        found = check_plates("model", model_trace, rows.size, self.structure.data_plate)
        for plate in [p for p, size in sizes.items() if found.get(p, size) != size]:
            raise ModelError(
                f"plate '{plate}'", f"the model's size in the guide, {found[plate]}", f"{sizes[plate]}"
            )
        extra = self._extra(drawing)
        return build_evaluation(model_trace, guide_trace, rows, self.structure, {}, extra, drawing)

    def evaluation_of(self, trace: Any, rows: Rows) -> Evaluation:
        """The log-factors of a run of the model alone, its enumerated sites enumerated."""
        check_plates("model", trace, rows.size, self.structure.data_plate)
        return build_evaluation(trace, None, rows, self.structure, {}, self.extra)

    def _extra(self, drawing: Drawing) -> dict[int, str]:
        return {self.first_available_dim: PARTICLES} if drawing.particles > 1 else {}

    def held(self, points: Values, configurations: Mapping[int, str] | None = None) -> HeldJoint:
        """The model with its continuous sites held at given points, the enumerated ones enumerated.

        points: by site, [S, *batch, *event], where batch has all `nesting` plate axes (size 1 where it has none). Factors
        that depend on the points have a leading axis named `POINTS`. Points that differ between states of enumerated
        sites have axes left of S, named by `configurations` (batch axis → site). A single point may stand without S and
        all axes left of its own, as the model would draw it.
        """
        return HeldJoint(self, points, configurations or {})

    def to(self, dtype: torch.dtype) -> Joint:
        """The same with points at which sites are held, if any are, in another dtype."""
        return self

    def view(
        self, data: Values, values: Values, rows: Rows | None = None
    ) -> tuple[dict[str, SiteView], Evaluation]:
        """The model's sites before any log-density is computed; the evaluation holds variables and sizes, no factors."""
        rows = rows or Rows(num_rows(data))
        with self._at(values, rows):
            trace = _traced(self.model, data, values, self._enumeration())
        return build_views(trace, rows, self.structure, self.extra)

    @contextmanager
    def settled(self, data: Values, values: Values, rows: Rows) -> Iterator[None]:
        """A block of evaluations at the same rows and values, for a joint that does something before them."""
        yield

    def evaluate_guide(
        self, data: Values, values: Values, rows: Rows | None = None, drawing: Drawing | None = None
    ) -> Evaluation:
        """The guide's log-factors alone; the model is not run."""
        assert self.guide is not None
        rows, drawing = rows or Rows(num_rows(data)), drawing or Drawing()
        with self._at(values, rows):
            trace = _traced(self.guide, data, values, self._drawing(drawing))
        return build_evaluation(None, trace, rows, self.structure, {}, self._extra(drawing), drawing)

    def view_guide(
        self, data: Values, values: Values, rows: Rows | None = None
    ) -> tuple[dict[str, SiteView], Evaluation]:
        """The guide's sites with their distributions, before any log-density is computed; the model is not run."""
        assert self.guide is not None
        rows = rows or Rows(num_rows(data))
        with self._at(values, rows):
            trace = _traced(self.guide, data, values, self._enumeration(), EnumerateFinite())
        return build_views(trace, rows, self.structure, {})


def _traced(
    program: Program, data: Values, values: Values, *handlers: AbstractContextManager[Any]
) -> poutine.Trace:
    """The trace of a run under some handlers, the first of them outermost."""
    with ExitStack() as stack:
        tracer = stack.enter_context(poutine.trace())
        for handler in handlers:
            stack.enter_context(handler)
        program(data, values)
    return tracer.trace


class HeldJoint(Joint):
    """A model whose continuous sites stand at given points: what an expectation over them is an average of."""

    def __init__(self, joint: Joint, points: Values, configurations: Mapping[int, str]) -> None:
        super().__init__(joint.model, joint.structure)
        self.points, self.apart = points, bool(configurations)
        self.extra = {self.first_available_dim: POINTS, **configurations}
        self.first_available_dim -= 1

    @contextmanager
    def _enumeration(self) -> Iterator[None]:
        held = Draw(Drawing(held=self.points), self.first_available_dim)
        with held, super()._enumeration(), Hold(self.points, self.apart):
            yield

    def to(self, dtype: torch.dtype) -> HeldJoint:
        points = {n: v.to(dtype) for n, v in self.points.items()}
        base = Joint(self.model, self.structure)
        first = base.first_available_dim
        return HeldJoint(base, points, {a: n for a, n in self.extra.items() if a != first})
