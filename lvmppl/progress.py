"""The progress of a run on a terminal: a bar for each fit."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_BLANK = {"count": "", "objective": "", "rate": "", "status": ""}


class Bars:
    """One bar a fit: step, objective and rate, drawn at most ten times a second on stderr."""

    INTERVAL = 0.1

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}
        self._task: Any = None
        self._total = 0
        self._loading: Any = None
        self._last = (0, math.nan)
        self._began = self._due = 0.0

    def loading(self) -> None:
        """Say that something is going on before the first fit: importing, reading, checking."""
        self._loading = self._progress.add_task("loading …", total=None, **_BLANK)
        self._progress.refresh()

    def loaded(self) -> None:
        """Take that line away."""
        if self._loading is not None:
            self._progress.remove_task(self._loading)
            self._loading = None

    def start(self, fit: str, restart: int, total: int) -> None:
        """A restart begins; those of one fit share its bar."""
        self.loaded()
        if fit not in self._tasks:
            self._tasks[fit] = self._progress.add_task(fit, total=total, **_BLANK)
        self._task, self._total = self._tasks[fit], total
        label = f"{fit} (restart {restart})" if restart else fit
        self._progress.reset(self._task, total=total, description=label, **_BLANK)
        self._began, self._due, self._last = time.perf_counter(), 0.0, (0, math.nan)

    def update(self, step: int, objective: float) -> None:
        """After every step; returns at once until the next drawing is due."""
        self._last = (step, objective)
        now = time.perf_counter()
        if now >= self._due:
            self._due = now + self.INTERVAL
            self._draw(now, "")

    def finish(self, status: str) -> None:
        """The restart, or the fit, is over; a fit that fails before its first restart has no bar."""
        if self._task is not None:
            self._draw(time.perf_counter(), status)
            self._task = None

    def done(self, fit: str, steps: int, objective: float, status: str) -> None:
        """What the fit ends with: the restart it keeps, and the bound or evidence of all rows at its parameters."""
        if fit in self._tasks:
            fields = {"status": status, "description": fit, "count": f"{steps}/{self._total}"}
            whole = (
                max(steps, 1) if status == "converged" else self._total
            )  # a full bar: nothing is left to do
            if not math.isnan(objective):  # there is no bound: the last objective stays
                fields["objective"] = f"{objective:.4f}"
            self._progress.update(self._tasks[fit], completed=steps, total=whole, refresh=True, **fields)

    def _draw(self, now: float, status: str) -> None:
        step, objective = self._last
        rate = f"{step / max(now - self._began, 1e-9):.0f}/s" if step else ""
        shown = "" if math.isnan(objective) else f"{objective:.4f}"
        fields = {"objective": shown, "rate": rate, "status": status, "count": f"{step}/{self._total}"}
        self._progress.update(self._task, completed=step, refresh=True, **fields)


def progress_columns(console: Console) -> Progress:
    """The columns of a bar: fit, bar, step, objective, rate, status."""
    from rich.progress import BarColumn, Progress, TextColumn

    words = ["{task.fields[count]}", "{task.fields[objective]}", "{task.fields[rate]}"]
    columns = [TextColumn(word, justify="right") for word in words]
    first, last = TextColumn("[bold]{task.description}"), TextColumn("{task.fields[status]}")
    return Progress(first, BarColumn(bar_width=20), *columns, last, console=console, auto_refresh=False)


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Bars | None]:
    """Bars on a terminal, else nothing."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with progress_columns(Console(stderr=True)) as progress:
        bars = Bars(progress)
        bars.loading()
        try:
            yield bars
        finally:
            bars.loaded()
