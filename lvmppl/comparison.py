"""Several runs side by side: one table of all fits, and which of them are of the same data.

A log evidence or an ELBO says something beside another one of the same rows only. The fingerprint that a run keeps of
its data tells whether they are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lvmppl.errors import InputError
from lvmppl.wording import listed

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Finished:
    """A run of the comparison: its name in it, its tables (summary, history, gaps), and what it kept of its data.

    data: empty for a run that kept nothing.
    """

    name: str
    tables: Mapping[str, pd.DataFrame]
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """The fits of one data set, labelled `run: fit` where there are several runs: summary, history and gaps."""

    label: str
    words: str
    tables: Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Comparison:
    """All fits of all runs.

    table: a row a fit: `run`, `data` (a letter, the same for runs of the same rows, or `unknown`) and the columns of the
    summary. groups: the fits of each data set.
    """

    table: pd.DataFrame
    groups: tuple[Group, ...]

    @property
    def leading(self) -> tuple[str, ...]:
        """The columns before the fit that say something here: not the run of one, nor the data where they are the same."""
        several = self.table["run"].nunique() > 1
        return ("run",) * several + ("data",) * (len(self.groups) > 1)

    def sentences(self) -> list[str]:
        """What must be known of the data before two numbers of the table are compared."""
        if len(self.groups) == 1:
            return []
        said = [f"data {group.label}: {group.words}" for group in self.groups]
        warning = "log evidences and ELBOs are comparable only between runs of the same data"
        if any(group.label == UNKNOWN for group in self.groups):
            warning += f"; of those marked {UNKNOWN} it cannot be known (they kept no fingerprint)"
        return [*said, warning]


def run_names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart.

    Raises:
        InputError: a folder is given twice.
    """
    resolved = [directory.resolve() for directory in directories]
    for place, path in enumerate(resolved):
        if path in resolved[:place]:
            raise InputError(str(directories[place]), "each run once", "a second time", "leave it out")
    for length in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-length:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("paths that differ have ends that differ")


def compare(runs: Sequence[Finished]) -> Comparison:
    """The comparison of runs of different names, at least one."""
    prints = list(dict.fromkeys(run.data["sha256"] for run in runs if run.data))
    labels = [_letter(prints.index(run.data["sha256"])) if run.data else UNKNOWN for run in runs]
    parts = []
    for run, label in zip(runs, labels, strict=True):
        part = run.tables["summary"].copy()
        part.insert(0, "run", pd.Series(run.name, index=part.index, dtype="string"))
        part.insert(1, "data", pd.Series(label, index=part.index, dtype="string"))
        parts.append(part)
    return Comparison(pd.concat(parts, ignore_index=True), tuple(_groups(runs, labels)))


def _letter(number: int) -> str:
    """A … Z, AA …"""
    letter = chr(ord("A") + number % 26)
    return letter if number < 26 else _letter(number // 26 - 1) + letter


def _groups(runs: Sequence[Finished], labels: Sequence[str]) -> list[Group]:
    """The runs of each label together; those of unknown data each by itself."""
    members: dict[tuple[str, int], list[Finished]] = {}
    for place, (run, label) in enumerate(zip(runs, labels, strict=True)):
        members.setdefault((label, place if label == UNKNOWN else -1), []).append(run)
    return [
        Group(label, _words(group), _together(group, len(runs) > 1)) for (label, _), group in members.items()
    ]


def _words(runs: Sequence[Finished]) -> str:
    """Source and size of the data of some runs, and the runs."""
    names, data = listed((run.name for run in runs), "and"), runs[0].data
    if not data:
        return f"in {names}"
    held_out = f", {data['test_rows']:,} held out" if data["test_rows"] else ""
    return f"{data['source']}, {data['rows']:,} row{'s' if data['rows'] != 1 else ''}{held_out}, in {names}"


def _together(runs: Sequence[Finished], several: bool) -> dict[str, pd.DataFrame]:
    """The tables of some runs as one, each fit by the name of its run and its own."""
    result = {}
    for name in ("summary", "history", "gaps"):
        frames = [
            run.tables[name].assign(fit=run.name + ": " + run.tables[name]["fit"])
            if several
            else run.tables[name]
            for run in runs
        ]
        filled = [frame for frame in frames if len(frame)] or frames[:1]
        result[name] = pd.concat(filled, ignore_index=True)
    return result


__all__ = ["UNKNOWN", "Comparison", "Finished", "Group", "compare", "run_names"]
