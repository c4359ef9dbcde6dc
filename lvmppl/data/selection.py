"""Which columns become which tensor, and how rows become padded sequences.

Shapes: N rows, D columns, B sequences, T steps of the longest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from lvmppl.data.table import Array, Block, Column, Table, numbers, refuse_missing, shortened
from lvmppl.errors import InputError


@dataclass(frozen=True)
class Selection:
    """The values of one tensor, [N, ...] or padded [B, T, ...], with the names of its columns."""

    values: Array
    names: tuple[str, ...]


def select(
    table: Table, columns: Mapping[str, str | Sequence[str]], keys: Iterable[str | None], limit: float
) -> dict[str, Selection]:
    """The values of every tensor.

    columns: tensor -> a column or block by its bare name ([N], or the block's own shape), or a list of names
    and patterns with `*` and `?` ([N, D] even for one column). A bare pattern is a list. Without any, the
    source's arrays under their own names, where it has such.
    keys: the columns that order the rows; patterns leave them out.
    limit: the largest magnitude that the experiment's dtype holds.
    """
    ordering = {key for key in keys if key is not None}
    if not columns:
        columns = {name: name for name in table.whole if name not in ordering}
    if not columns:
        example = f"the columns of each tensor, e.g. {{x: [{shortened(list(table.columns)[:2])}]}}"
        fix = f"{table.label} has {shortened(table.names)}"
        raise InputError("data.columns", example, "nothing", fix)
    return {key: _select_one(table, key, wanted, ordering, limit) for key, wanted in columns.items()}


def _select_one(
    table: Table, key: str, wanted: str | Sequence[str], ordering: set[str], limit: float
) -> Selection:
    where = f"data.columns.{key}"
    if isinstance(wanted, str) and wanted in table.blocks:
        return _from_block(table, wanted, table.blocks[wanted], where, limit)
    if isinstance(wanted, str) and (wanted in table.columns or not _is_pattern(wanted)):
        return Selection(_column(table, wanted, where, limit), (wanted,))
    names = _expand(table, [wanted] if isinstance(wanted, str) else wanted, where, ordering)
    for name, block in table.blocks.items():
        if block.names == names and block.array.ndim == 2:
            return _from_block(table, name, block, where, limit)  # as it lies in memory, no copy
    stacked = np.stack([_column(table, name, where, limit) for name in names], axis=1)  # [N, D]
    return Selection(stacked, names)


def _from_block(table: Table, name: str, block: Block, where: str, limit: float) -> Selection:
    what = table.label if name == "*" else f"'{name}' of {table.label}"
    return Selection(numbers(block.array, where, what, block.names, limit), block.names)


def _column(table: Table, name: str, where: str, limit: float) -> Array:
    return numbers(table.column(name, where), where, f"column '{name}' of {table.label}", limit=limit)


def _is_pattern(name: str) -> bool:
    return "*" in name or "?" in name


def _expand(table: Table, wanted: Sequence[str], where: str, ordering: set[str]) -> tuple[str, ...]:
    """The columns that a list of names, blocks and patterns stands for, each once."""
    names: list[str] = []
    for name in wanted:
        if name in table.columns:
            names.append(name)
        elif name in table.blocks:
            names.extend(_block_names(table, name, where))
        elif _is_pattern(name):
            literal = name.replace("[", "[[]")  # a bracket stands for itself
            found = [c for c in table.columns if fnmatchcase(c, literal) and c not in ordering]
            if not found:
                fix = f"its columns are {shortened(table.names)}"
                raise InputError(where, f"a pattern that fits a column of {table.label}", f"'{name}'", fix)
            names.extend(found)
        else:
            raise table.unknown(name, where)
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise InputError(where, "each column once", f"'{repeated[0]}' more than once", "remove one of them")
    if not names:
        expected = f"at least one column of {table.label} ({shortened(table.names)})"
        raise InputError(where, expected, "an empty list")
    return tuple(names)


def _block_names(table: Table, name: str, where: str) -> tuple[str, ...]:
    block = table.blocks[name]
    if not block.names:
        got = f"'{name}' of {table.label} with shape {list(block.array.shape)}"
        raise InputError(where, "a list of one-dimensional columns", got, f"write the bare name: '{name}'")
    return block.names


@dataclass(frozen=True)
class Sequences:
    """A long-form table in sequences: `order` [N] lists its rows by sequence, `lengths` [B] are theirs."""

    order: Array
    lengths: Array

    @property
    def mask(self) -> Array:
        """[B, T], true where there is an entry and not padding."""
        return np.arange(int(self.lengths.max())) < self.lengths[:, None]

    def pad(self, selection: Selection) -> Selection:
        """[N, ...] -> [B, T, ...], zeros after the end of a sequence."""
        mask = self.mask
        padded = np.zeros((*mask.shape, *selection.values.shape[1:]), selection.values.dtype)
        padded[mask] = selection.values[self.order]
        return replace(selection, values=padded)


def find_sequences(table: Table, sequence: str | None, time: str | None) -> Sequences | None:
    """How the rows fall into sequences; None when neither column is named.

    Sequences come in the order of their first rows, rows by `time` within, or as they are without it. `time`
    alone makes the whole table one sequence. A sequence may be called by text or number; times are numbers
    or dates. Raises InputError for missing entries, and where a sequence has the same time twice.
    """
    import pandas as pd

    if sequence is None and time is None:
        return None
    codes = np.zeros(table.num_rows, np.int64)
    if sequence is not None:
        labels = table.column(sequence, "data.sequence")
        refuse_missing(labels, "data.sequence", f"column '{sequence}' of {table.label}")
        codes = np.asarray(pd.factorize(labels)[0], np.int64)
    if time is None:
        return Sequences(np.argsort(codes, kind="stable"), np.bincount(codes))
    times = _times(table.column(time, "data.time"), f"column '{time}' of {table.label}")
    order = np.lexsort((times, codes))
    same = (np.diff(codes[order]) == 0) & (times[order][1:] == times[order][:-1])
    if same.any():
        first, second = (int(row) + 1 for row in np.sort(order[np.flatnonzero(same)[0] :][:2]))
        got = f"'{time}' {pd.Series(table.columns[time]).iloc[first - 1]} in data rows {first} and {second}"
        got += f" of '{sequence}' {pd.Series(table.columns[sequence]).iloc[first - 1]}" if sequence else ""
        fix = "remove one" if sequence else "remove one, or name the sequence column"
        raise InputError("data.time", f"each time once in a sequence of {table.label}", got, fix)
    return Sequences(order, np.bincount(codes))


def _times(column: Column, what: str) -> Array:
    """Times as numbers in the same order; dates, also in ISO 8601 text, count from an origin."""
    import pandas as pd

    series: pd.Series[Any] = pd.Series(column)
    refuse_missing(series, "data.time", what)
    if pd.api.types.is_numeric_dtype(series.dtype):
        return numbers(series, "data.time", what)
    try:
        return pd.to_datetime(series, format="ISO8601", utc=True).astype("int64").to_numpy()
    except (ValueError, TypeError):
        got, fix = f"{series.iloc[0]!r}", "write numbers, or dates like 2024-05-31"
        raise InputError("data.time", f"numbers or dates in {what}", got, fix) from None
