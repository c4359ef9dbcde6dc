"""The commands. Nothing heavy is imported before a command needs it, so that `lvmppl --help` is quick."""

from __future__ import annotations

import enum
import itertools
import math
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.progress import Progress

app = typer.Typer(
    name="lvmppl",
    help="Latent-variable models on Pyro: fit them, and see how far each posterior is from the exact one.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

WIDTH = 100
FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130

Experiment = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped experiment.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override an entry, e.g. fits.em.restarts=3."),
]


class Kind(str, enum.Enum):
    """What `new` can write."""

    model = "model"
    guide = "guide"
    experiment = "experiment"


def main() -> None:
    """The program `lvmppl`."""
    app(prog_name="lvmppl")


@app.command()
def run(
    experiment: Experiment,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where to write.  [default: runs/NAME]")
    ] = None,
    overrides: Overrides = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Cut every fit to a few steps.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Run an experiment: fit, compare, write tables, pictures and a report.

    Exit status: 0 all fits finished, 1 some fit failed, 2 the input is wrong, 130 interrupted.
    """
    with _exit_status():
        with _progress(quiet) as progress:
            from lvmppl import runner

            result = runner.run(experiment, out, overrides or [], smoke, progress)
        console = _console()
        console.print(summary_table(result.summary, console.width))
        for fit, message in zip(result.summary["fit"], result.summary["message"], strict=True):
            if isinstance(message, str) and message:
                typer.echo(f"{fit}: {message}")
        for message in result.messages:
            typer.echo(message)
        typer.echo(f"report: {result.directory / 'report.html'}")
    if result.failed:
        raise typer.Exit(FAILED)


@app.command()
def check(experiment: Experiment, overrides: Overrides = None) -> None:
    """Find what is wrong with an experiment before a long run; fit nothing."""
    with _exit_status():
        with _progress(quiet=False):
            from lvmppl import runner

            lines = runner.check(experiment, overrides or [])
        _console().print(check_table(lines))
    if not all(ok for _, ok, _ in lines):
        raise typer.Exit(WRONG_INPUT)


@app.command(name="list")
def list_() -> None:
    """List models, guides, data sources with their columns, and shipped experiments, a line each."""
    from lvmppl.catalogue import GUIDES, MODELS, SOURCES
    from lvmppl.spec import shipped_experiments

    parts = {
        "model": {name: text for name, (_, text) in MODELS.items()},
        "guide": {name: text for name, (_, text) in GUIDES.items()},
        "source": {
            name: f"{text}; columns {', '.join(columns)}" for name, (text, columns) in SOURCES.items()
        },
        "experiment": {
            name: _first_clause(path.read_text(encoding="utf-8"))
            for name, path in shipped_experiments().items()
        },
    }
    for kind, entries in parts.items():
        width = max(map(len, entries))
        for name, text in entries.items():
            typer.echo(_hanging(f"{kind:<10}  {name:<{width}}  ", text))


def _hanging(head: str, text: str) -> str:
    """One line; on a terminal, where that is too long for it, more of them below the text."""
    if not sys.stdout.isatty():
        return head + text
    width, indent = shutil.get_terminal_size().columns, " " * len(head)
    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False)


def _first_clause(text: str) -> str:
    """The first clause of the comment a file opens with."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    joined = " ".join(line.lstrip("# ") for line in comment)
    return re.split(r"[.:;](?:\s|$)", joined, maxsplit=1)[0]


@app.command()
def new(
    kind: Annotated[Kind, typer.Argument(help="What to write.")],
    name: Annotated[str, typer.Argument(help="Its name, a Python identifier.")],
) -> None:
    """Write a commented starting point that `lvmppl check` accepts."""
    with _exit_status():
        from lvmppl import scaffold

        written = scaffold.new(kind.value, name, Path())
    for path in written:
        typer.echo(f"wrote {path}")
    typer.echo(f"next: lvmppl check {written[-1]}")


@contextmanager
def _exit_status() -> Iterator[None]:
    """Turn wrong input and Ctrl-C into one message on stderr and the exit status of the contract."""
    from lvmppl.errors import InputError

    try:
        yield
    except InputError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(WRONG_INPUT) from None
    except KeyboardInterrupt as interrupt:
        typer.echo(
            getattr(interrupt, "message", "interrupted: nothing had been started, nothing is kept"), err=True
        )
        raise typer.Exit(INTERRUPTED) from None


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return Console(highlight=False, width=min(WIDTH, console.width) if console.is_terminal else WIDTH)


# ------------------------------------------------------------------------------------------------- tables


def summary_table(summary: pd.DataFrame, width: int = WIDTH) -> Any:
    """The summary as a rich table, without the columns that say nothing in this run.

    Held-out rows have a table below; so have the numbers where all does not fit into the width.
    """
    from rich.console import Group

    what = {"fit": "fit", "algorithm": "algorithm", "guide": "guide", "status": "status"}
    what |= {"steps": "steps", "seconds": "seconds"}
    train = {"log_evidence": "log evidence", "elbo": "ELBO", "gap": "gap"}
    test = {"test_log_evidence": "test log evidence", "test_elbo": "test ELBO"}
    whole, size = _columns(summary, what, train, width)
    parts = [whole]
    if size > width:
        parts = [_columns(summary, *part, width)[0] for part in ((what, {}), ({"fit": "fit"}, train))]
    if summary[[*test]].notna().any(axis=None):
        parts.append(_columns(summary, {"fit": "fit"}, test, width)[0])
    return Group(parts[0], *(line for part in parts[1:] for line in ("", part)))


def _columns(
    summary: pd.DataFrame, what: dict[str, str], numbers: dict[str, str], width: int
) -> tuple[Any, int]:
    """Some columns of the summary, of the numbers those that are there in any row; and how wide they are."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    numbers = {column: title for column, title in numbers.items() if summary[column].notna().any()}
    titles = {**what, **numbers}
    names = [column for column in what if column in ("fit", "algorithm", "guide")]
    rows = summary.to_dict("records")
    cells = {c: [_number(r[c], r, c) if c in numbers else _plain(r[c]) for r in rows] for c in titles}
    for longest in (40, 20, 12):  # names break between their words, as late as the line allows
        broken = {**cells, **{c: [_in_pieces(cell, longest) for cell in cells[c]] for c in names}}
        lines = {c: [titles[c], *(line for cell in broken[c] for line in cell.split("\n"))] for c in titles}
        size = sum(max(map(len, found)) + 1 for found in lines.values())
        if size <= width:
            break
    for column, title in titles.items():
        left = column in names or column == "status"
        fold: Any = {"overflow": "fold"} if column in names else {"no_wrap": True}
        table.add_column(title, justify="left" if left else "right", **fold)
    for row in zip(*broken.values(), strict=True):
        table.add_row(*row)
    return table, size


def _plain(value: Any) -> str:
    """A name, a status, a count of steps, or seconds."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.1f}"
    return str(value)


def _in_pieces(name: str, width: int) -> str:
    """A name over several lines, broken between its words, where it is longer than `width`."""
    pieces = re.split(r"(?<=[^_-])(?=[_-])", name)
    lines = pieces[:1]
    for piece in pieces[1:]:
        if len(lines[-1]) + len(piece) <= width:
            lines[-1] += piece
        else:
            lines.append(piece)
    return "\n".join(lines)


def _number(value: Any, row: Any, column: str) -> str:
    """Four decimals; evidence that is not exact, and a bound that is a mean over draws, are marked by what they are."""
    if value is None or not isinstance(value, float | int) or math.isnan(value):
        return ""
    mark = ""
    if column == "log_evidence":
        mark = {"lower_bound": "≥ ", "estimate": "≈ ", "quadrature": "≈ "}.get(row["log_evidence_kind"], "")
    elif column in ("elbo", "gap") and row.get("elbo_error", 0.0) > 0:
        mark = "≈ "  # a gap may then be below 0
    return f"{mark}{round(value, 4) + 0.0:.4f}"


def check_table(lines: list[tuple[str, bool, str]]) -> Any:
    """What was checked, a row each, with a mark."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=28)
    table.add_column(overflow="fold")
    for subject, ok, text in lines:
        table.add_row("ok" if ok else "wrong", Text(subject), Text(text))
    return table


# ------------------------------------------------------------------------------------------------- progress


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
def _progress(quiet: bool) -> Iterator[Bars | None]:
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
