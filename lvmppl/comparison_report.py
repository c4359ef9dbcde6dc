"""comparison.html: the page of several runs, made from their tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lvmppl.comparison import Comparison, Group
from lvmppl.comparison_plots import evidence_levels
from lvmppl.objective_plots import objective_curves
from lvmppl.page import figure, fit_table, heldout_table, write_page
from lvmppl.plots import Picture, gap_picture, has_climb
from lvmppl.report import findings


def draw_groups(comparison: Comparison, directory: Path) -> list[tuple[str, list[Path]]]:
    """What each fit reaches, its climb and its gaps, drawn for the runs of each data set by themselves.

    Returns (which data, the pictures) of each; the words are empty where all runs have the same data.
    """
    directory.mkdir()
    several, result = len(comparison.groups) > 1, []
    for place, group in enumerate(comparison.groups, 1):
        end = f"_{place}" if several else ""
        paths = [picture.save(directory / f"{name}{end}.png") for name, picture in _pictures(group)]
        result.append((f"Data {group.label}: {group.words}" if several else "", paths))
    return result


def write_comparison_page(
    path: Path,
    comparison: Comparison,
    pictures: Sequence[tuple[str, Sequence[Path]]],
    differing: Sequence[Sequence[str]],
) -> Path:
    """Writes `comparison.html` and returns its path. differing: the settings that are not the same, a header first."""
    table, leading = comparison.table, comparison.leading
    runs = table["run"].nunique()
    said = [
        f"Data {group.label}: {line[0].lower()}{line[1:]}" if len(comparison.groups) > 1 else line
        for group in comparison.groups
        for line in findings(group.tables["summary"], group.tables["gaps"])
    ]
    told = ((f"{row['run']}: {row['fit']}", row["message"]) for _, row in table.iterrows())
    return write_page(
        path,
        title="Comparison of runs" if runs > 1 else f"The fits of {table['run'].iloc[0]}",
        description=_description(comparison, runs),
        findings=said,
        fits=fit_table(table, leading),
        names=1 + len(leading),
        sentences=comparison.sentences(),
        heldout=heldout_table(table, leading),
        messages=[(name, message) for name, message in told if message],
        groups=[(name, [figure(picture) for picture in paths]) for name, paths in pictures if paths],
        differing=differing,
    )


def _description(comparison: Comparison, runs: int) -> str:
    fits, sets = len(comparison.table), len(comparison.groups)
    said = f"{runs} run{'s' if runs > 1 else ''}, {fits} fit{'s' if fits != 1 else ''}"
    return (
        f"{said}, all of the data {comparison.groups[0].words}."
        if sets == 1
        else f"{said}, {sets} sets of data."
    )


def _pictures(group: Group) -> Iterator[tuple[str, Picture]]:
    tables = group.tables
    levels = evidence_levels(tables["summary"])
    if levels is not None:
        yield "evidence", levels
    if has_climb(tables["history"]):
        yield "objective", objective_curves(tables["history"], tables["summary"])
    if tables["gaps"]["gap"].notna().any():
        yield "gaps", gap_picture(tables["gaps"])


__all__ = ["draw_groups", "write_comparison_page"]
