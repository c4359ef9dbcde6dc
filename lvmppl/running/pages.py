"""Pictures and report of a run, from what its folder holds: `lvmppl run` draws them so, and `lvmppl report` again."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from lvmppl import plots, report
from lvmppl.errors import InputError
from lvmppl.running.record import Record, read_record
from lvmppl.wording import one_line


class DrawingError(RuntimeError):
    """Pictures or report could not be made; the message has a line for each."""


def write_pages(directory: Path, record: Record) -> tuple[list[str], bool]:
    """Pictures and report; (what could not be made, a line each, and whether Ctrl-C left the pictures out).

    No picture is worth the numbers: one that fails is left out.
    """
    problems: list[str] = []
    pictures: list[Path] = []
    interrupted = False

    def failed(name: str, error: Exception) -> None:
        problems.append(f"picture {name}: {one_line(error)}")

    try:
        pictures = plots.draw_all(record.tables, record.shown, directory / "plots", failed)
    except KeyboardInterrupt:
        interrupted = True
        shutil.rmtree(directory / "plots", ignore_errors=True)  # the last one may be half a file
    except Exception as error:
        failed("plots", error)
    try:
        words = record.data["vocabulary"]
        report.write_report(directory, record.tables, pictures, record.environment, record.experiment, words)
    except Exception as error:
        failed("report.html", error)
    return problems, interrupted


def redraw(directory: Path) -> list[Path]:
    """Draw pictures and report of a run anew; returns their paths, the report last.

    All are drawn before the first of the old ones is replaced. Other files of the folder stay as they are.

    Raises:
        InputError: the folder is not that of a run, is incomplete, or cannot be written.
        DrawingError: something could not be drawn. Then, as after Ctrl-C, everything is as it was.
    """
    record = read_record(directory)
    try:
        with TemporaryDirectory(prefix=".redrawn-", dir=directory) as name:
            staging = Path(name)
            problems, interrupted = write_pages(staging, record)
            if interrupted:
                raise KeyboardInterrupt
            if problems:
                raise DrawingError("\n".join(problems))
            drawn = [*sorted((staging / "plots").iterdir()), staging / "report.html"]
            (directory / "plots").mkdir(exist_ok=True)
            return [path.replace(directory / path.relative_to(staging)) for path in drawn]
    except OSError as error:
        got = f"{error.strerror or error}"
        raise InputError(str(directory), "a folder that can be written", got) from error


__all__ = ["DrawingError", "redraw", "write_pages"]
