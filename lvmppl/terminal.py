"""What the commands print: tables that fit into the width of a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

WIDTH = 100


def terminal() -> Console:
    """Standard output, as wide as the terminal is but no wider than a line that people like to read."""
    from rich.console import Console

    console = Console(highlight=False)
    return Console(highlight=False, width=min(WIDTH, console.width) if console.is_terminal else WIDTH)


def summary_table(summary: pd.DataFrame, width: int = WIDTH, leading: Sequence[str] = ()) -> Any:
    """The summary as a rich table, without the columns that say nothing in this run, below columns of `leading` words.

    Held-out rows have a table below; so have the numbers where all does not fit into the width.
    """
    from rich.console import Group

    names = {column: column for column in (*leading, "fit")}
    what = names | {c: c for c in ("algorithm", "guide", "status", "steps", "seconds")}
    train = {"log_evidence": "log evidence", "elbo": "ELBO", "gap": "gap"}
    test = {"test_log_evidence": "test log evidence", "test_elbo": "test ELBO"}
    whole, size = _columns(summary, what, train, width)
    parts = [whole]
    if size > width:
        parts = [_columns(summary, *part, width)[0] for part in ((what, {}), (names, train))]
    if summary[[*test]].notna().any(axis=None):
        parts.append(_columns(summary, names, test, width)[0])
    return Group(parts[0], *(line for part in parts[1:] for line in ("", part)))


def _columns(
    summary: pd.DataFrame, what: dict[str, str], numbers: dict[str, str], width: int
) -> tuple[Any, int]:
    """Some columns of the summary, of the numbers those that are there in any row; and how wide they are."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    numbers = {column: title for column, title in numbers.items() if summary[column].notna().any()}
    titles = {**what, **numbers}
    names = [column for column in what if column not in ("status", "steps", "seconds")]
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
    return f"{_mark(row, column)}{round(value, 4) + 0.0:.4f}"


MARKS = {"≥ ": "≥ a lower bound", "≈ ": "≈ an estimate, or within a stated error"}


def _mark(row: Any, column: str) -> str:
    """What kind of number stands in a row; an ELBO that is exact needs none, being a bound by its name."""
    if column in ("elbo", "gap", "test_elbo") and row.get("elbo_error", 0.0) > 0:
        return "≈ "  # a gap may then be below 0
    if column.endswith("elbo"):
        return ""
    # held-out rows are scored as the others are, and a gap is as good as the log evidence
    return {"lower_bound": "≥ ", "estimate": "≈ ", "quadrature": "≈ "}.get(row["log_evidence_kind"], "")


def marks_explained(summary: pd.DataFrame) -> str:
    """What the marks of the table mean, of those that occur; empty where all its numbers are exact."""
    columns = [c for c in ("log_evidence", "elbo", "gap", "test_log_evidence", "test_elbo") if c in summary]
    rows = summary.to_dict("records")
    found = {_mark(row, column) for row in rows for column in columns if not math.isnan(row[column])}
    return "; ".join(words for mark, words in MARKS.items() if mark in found)


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
