"""The commands. Nothing heavy is imported before a command needs it, so that `lvmppl --help` is quick."""

from __future__ import annotations

import enum
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lvmppl.progress import progress_bars
from lvmppl.terminal import check_table, marks_explained, summary_table, terminal

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    name="lvmppl",
    help="Latent-variable models on Pyro: fit them, and see how far each posterior is from the exact one.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

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
        with progress_bars(quiet) as progress:
            from lvmppl import runner

            result = runner.run(experiment, out, overrides or [], smoke, progress)
        _print_summary(result.summary)
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
        with progress_bars(quiet=False):
            from lvmppl import runner

            lines = runner.check(experiment, overrides or [])
        terminal().print(check_table(lines))
    if not all(ok for _, ok, _ in lines):
        raise typer.Exit(WRONG_INPUT)


@app.command()
def report(directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")]) -> None:
    """Draw the pictures and report.html of a run anew from its tables; fit nothing.

    Exit status: 1 something could not be drawn and everything is as it was, 2 the folder is not that of a run.
    """
    with _exit_status("interrupted: pictures and report are as they were"):
        from lvmppl.running.pages import DrawingError, redraw

        try:
            *pictures, page = redraw(directory)
        except DrawingError as error:
            typer.echo(f"{error}\nnothing was replaced: pictures and report are as they were", err=True)
            raise typer.Exit(FAILED) from None
    typer.echo(_hanging("drawn: ", ", ".join(path.stem for path in pictures) or "no picture"))
    typer.echo(f"report: {page}")


@app.command()
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR", help="The folders of runs.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write.")] = Path("runs/comparison"),
) -> None:
    """Put runs side by side: one table of their fits, pictures and a page; fit nothing.

    Numbers of different data are told apart: they are not comparable.
    """
    with _exit_status("interrupted: nothing was written"):
        from lvmppl.running.comparing import PAGE, DrawingError, compare_runs

        try:
            comparison = compare_runs(directories, out)
        except DrawingError as error:
            typer.echo(f"{error}\nnothing was written", err=True)
            raise typer.Exit(FAILED) from None
        _print_summary(comparison.table, comparison.leading)
        for line in comparison.sentences():
            typer.echo(_hanging("", line))
    typer.echo(f"report: {out / PAGE}")


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


def _print_summary(summary: pd.DataFrame, leading: Sequence[str] = ()) -> None:
    console = terminal()
    console.print(summary_table(summary, console.width, leading))
    marks = marks_explained(summary)
    if marks:
        typer.echo(marks)


@contextmanager
def _exit_status(
    interrupted: str = "interrupted: nothing had been started, nothing is kept",
) -> Iterator[None]:
    """Turn wrong input and Ctrl-C into one message on stderr and the exit status of the contract."""
    from lvmppl.errors import InputError

    try:
        yield
    except InputError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(WRONG_INPUT) from None
    except KeyboardInterrupt as interrupt:
        typer.echo(getattr(interrupt, "message", interrupted), err=True)
        raise typer.Exit(INTERRUPTED) from None
