"""Runs side by side, from what their folders hold: read, put into one table, written into a folder of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lvmppl import tables
from lvmppl.comparison import Comparison, Finished, compare, run_names
from lvmppl.comparison_report import draw_groups, write_comparison_page
from lvmppl.document import read_document
from lvmppl.errors import InputError
from lvmppl.running.folder import publish, require_ours, staged
from lvmppl.running.pages import DrawingError
from lvmppl.running.record import AGAIN, read_data, read_text, require_run
from lvmppl.wording import one_line, shown

PAGE, TABLE = "comparison.html", "comparison.csv"


def compare_runs(directories: Sequence[Path], out: Path) -> Comparison:
    """Compare runs and write table, pictures and page into `out`, replacing an earlier comparison.

    Raises:
        InputError: a folder is not that of a run or is incomplete, or `out` cannot be written; nothing is written.
        DrawingError: the tables are whole but cannot be compared or drawn; nothing is written.
    """
    names = run_names(directories)
    runs = [_read(directory, name) for directory, name in zip(directories, names, strict=True)]
    settings = [_settings(directory / "experiment.yaml") for directory in directories]
    require_ours(out, (TABLE, PAGE), "comparison")
    try:
        comparison = compare(runs)
        with staged(out) as staging:
            whole = tables.with_kinds(comparison.table)
            whole.to_csv(staging / TABLE, index=False, lineterminator="\n", encoding="utf-8")
            pictures = draw_groups(comparison, staging / "plots")
            write_comparison_page(staging / PAGE, comparison, pictures, differing(names, settings))
            publish(staging, out)
    except OSError as error:
        got = f"{error.strerror or error}"
        raise InputError(f"output folder {out}", "a folder that can be written", got) from error
    except InputError:
        raise
    except Exception as error:  # tables that a run would not have written
        raise DrawingError(one_line(error)) from error
    return comparison


def _read(directory: Path, name: str) -> Finished:
    require_run(directory)
    frames = tables.read_tables(directory, ("summary", "history", "gaps"))
    kept = (directory / "data.json").is_file()  # a run of an earlier version has none
    return Finished(name, frames, read_data(directory) if kept else {})


def _settings(path: Path) -> dict[str, Any]:
    value = read_document(read_text(path), str(path)).value
    if not isinstance(value, dict):
        raise InputError(str(path), "a mapping (name, data, model, fits)", shown(value), AGAIN)
    return value


def differing(names: Sequence[str], experiments: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The entries that are not the same in all experiments, a column each, below a header; empty where there are none.

    A fit that not all have is one row, of its algorithms.
    """
    fits = [_mapping(experiment.get("fits")) for experiment in experiments]
    common = set(fits[0]).intersection(*fits[1:])
    own = dict.fromkeys(fit for each in fits for fit in each if fit not in common)
    settings = [
        dict(_flat({**experiment, "fits": {fit: each[fit] for fit in each if fit in common}}))
        for experiment, each in zip(experiments, fits, strict=True)
    ]
    keys = dict.fromkeys(key for entries in settings for key in entries)
    rows = [[key, *(entries.get(key, "–") for entries in settings)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    rows += [
        [f"fits.{fit}", *(str(_mapping(each.get(fit)).get("algorithm", "–")) for each in fits)] for fit in own
    ]
    return [["entry", *names], *rows] if rows else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every entry by its dotted name, as text."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value))
    else:
        yield name, "–" if value is None else str(value)


__all__ = ["PAGE", "DrawingError", "compare_runs", "differing"]
