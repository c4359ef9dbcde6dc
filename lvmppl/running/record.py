"""What a run leaves on disk besides pictures and report, and how it comes back: no model, guide or data are needed.

`data.json` says what the rows were, `data.parquet` holds those of their numbers that pictures show.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from lvmppl import tables
from lvmppl.errors import InputError
from lvmppl.wording import listed

R = TypeVar("R")

RUNS = Path("runs")  # where runs go unless told otherwise
MARKS = ("experiment.yaml", "environment.json")  # what makes a folder a run
DATA = ("source", "rows", "test_rows", "sha256", "vocabulary")  # the entries of data.json
AGAIN = "run the experiment again"


@dataclass(frozen=True)
class Record:
    """A run as its folder has it.

    tables: the five of the contract. experiment: the resolved YAML. environment: machine and packages.
    data: the entries `DATA`. shown: the features that a picture shows, a row a datum and a
    column each; without columns where no picture does.
    """

    tables: Mapping[str, pd.DataFrame]
    experiment: str
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    shown: pd.DataFrame

    def write(self, directory: Path) -> None:
        """Write all of it."""
        (directory / "experiment.yaml").write_text(self.experiment, encoding="utf-8")
        for name, value in (("environment", self.environment), ("data", self.data)):
            text = json.dumps(value, indent=2, ensure_ascii=False)
            (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        tables.write_tables(directory, self.tables)
        self.shown.to_parquet(directory / "data.parquet", engine="pyarrow", compression="zstd")


def read_record(directory: Path) -> Record:
    """What `Record.write` wrote there.

    Raises:
        InputError: the folder is not that of a run, or a part of it is missing or is not what a run writes.
    """
    require_run(directory)
    frames = tables.read_tables(directory)
    experiment = read_text(directory / "experiment.yaml")
    environment = _read_json(directory / "environment.json")
    shown = _read_shown(directory / "data.parquet")
    return Record(frames, experiment, environment, read_data(directory), shown)


def require_run(directory: Path) -> None:
    """Refuse a folder that no run wrote.

    Raises:
        InputError: it says what is there instead, and which runs are nearby.
    """
    if _is_run(directory):
        return
    expected, fix = "the folder of a run", "give the folder that `lvmppl run` wrote"
    if directory.is_dir():
        inside = [str(path) for path in sorted(directory.iterdir()) if _is_run(path)]
        missing = [mark for mark in MARKS if not (directory / mark).is_file()]
        got = f"a folder without {listed(missing, 'and')}"
        if inside:
            got, fix = "a folder of runs", f"give one of them, such as {inside[0]}"
    elif directory.is_file():
        got = "a file"
        fix = f"give {directory.parent}" if _is_run(directory.parent) else fix
    else:
        got = "nothing of that name"
        fix = f"did you mean {RUNS / directory}?" if _is_run(RUNS / directory) else fix
    raise InputError(str(directory), expected, got, fix)


def _is_run(directory: Path) -> bool:
    return all((directory / mark).is_file() for mark in MARKS)


def read_text(path: Path) -> str:
    """Raises InputError where there is no such file, or no text in it."""
    return _read(path, "a file of text", lambda: path.read_text(encoding="utf-8"))


def read_data(directory: Path) -> dict[str, Any]:
    """What a run recorded of its rows. Raises InputError where it did not, or something is missing."""
    path = directory / "data.json"
    data = _read_json(path)
    missing = [key for key in DATA if key not in data]
    if missing:
        raise InputError(str(path), f"entries {listed(DATA, 'and')}", f"no {listed(missing, 'and')}", AGAIN)
    return data


def _read_json(path: Path) -> dict[str, Any]:
    value: Any = _read(path, "JSON", lambda: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(value, dict):
        raise InputError(str(path), "a JSON object", type(value).__name__, AGAIN)
    return value


def _read_shown(path: Path) -> pd.DataFrame:
    return _read(path, "the rows that the pictures show", lambda: pd.read_parquet(path, engine="pyarrow"))


def _read(path: Path, expected: str, read: Callable[[], R]) -> R:
    if not path.is_file():
        got = "nothing: the run was cut short, or an earlier version of lvmppl wrote it"
        raise InputError(str(path), expected, got, AGAIN)
    try:
        return read()
    except (
        OSError,
        ValueError,
    ) as error:  # UnicodeDecodeError, JSONDecodeError and ArrowInvalid are ValueErrors
        raise InputError(str(path), expected, " ".join(str(error).split()), AGAIN) from error


__all__ = ["AGAIN", "MARKS", "RUNS", "Record", "read_data", "read_record", "read_text", "require_run"]
