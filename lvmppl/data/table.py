"""What every source is read into: named columns, and blocks of them, over the same N rows.

Shapes: N rows, D columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lvmppl.errors import InputError
from lvmppl.wording import nearest

if TYPE_CHECKING:
    import pandas as pd

Array: TypeAlias = npt.NDArray[Any]
Column: TypeAlias = "Array | pd.Series[Any]"

# Elements looked at in one piece, so that a check of a memory map needs little memory of its own.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Block:
    """An array [N, ...] that goes by one name; `names` are those of its columns, if it is [N, D]."""

    array: Array
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A source in memory (or mapped).

    label: how messages call it: a shipped name, or the path as the user wrote it.
    columns: name -> [N], of any type; whether it holds numbers is checked when it is used.
    blocks: name -> array [N, ...].
    whole: the names that stand for the source when the experiment names none, each a tensor of its own.
    vocabulary: the words that its whole numbers, or the columns of its counts, stand for, where they are words.
    """

    label: str
    columns: Mapping[str, Column]
    blocks: Mapping[str, Block] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = {name: len(values) for name, values in self._all()}
        if len(set(sizes.values())) > 1:
            rows = ", ".join(f"'{name}' {size}" for name, size in list(sizes.items())[:8])
            fix = "save arrays that share their first axis"
            raise InputError(
                "data.source", f"arrays with as many rows each in {self.label}", f"rows {rows}", fix
            )
        if not any(sizes.values()) or any(block.array.size == 0 for block in self.blocks.values()):
            raise InputError("data.source", f"at least one row of data in {self.label}", "none")

    def _all(self) -> Iterable[tuple[str, Array | Column]]:
        yield from ((name, block.array) for name, block in self.blocks.items())
        yield from self.columns.items()

    @property
    def num_rows(self) -> int:
        return len(next(iter(self._all()))[1])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.blocks, *self.columns)))

    def column(self, name: str, where: str) -> Column:
        """The column of that name; raises InputError with the nearest name."""
        if name not in self.columns:
            raise self.unknown(name, where)
        return self.columns[name]

    def unknown(self, name: str, where: str) -> InputError:
        """The error for a name that the source does not have."""
        fix = nearest(name, self.names)
        return InputError(where, f"a column of {self.label} ({shortened(self.names)})", f"'{name}'", fix)


def shortened(names: Iterable[str], most: int = 8) -> str:
    """Names in a row; of many, the first few and the last."""
    known = list(names)
    if len(known) > most:
        known[most - 1 : -1] = [f"… {len(known) - most} more …"]
    return ", ".join(known)


def numbers(
    values: Column, where: str, what: str, names: tuple[str, ...] = (), limit: float = np.inf
) -> Array:
    """A column or block as numbers: int64, bool, or floats as they are stored, so that a map stays one.

    where: the field that asks for it. what: "column 'a' of x.csv". names: of a block's columns, for messages.
    limit: the largest magnitude that the experiment's dtype holds.
    A categorical column gives its categories if they are numbers, else their codes, in the categories' order.
    Raises InputError for text, dates and other objects, missing and infinite values, and integers from 2⁶³.
    """
    array = values if isinstance(values, np.ndarray) else _from_series(values, where, what)
    if array.dtype.kind not in "biuf":
        raise _not_numbers(array, where, what)
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.max() > np.iinfo(np.int64).max:
        raise InputError(where, f"integers below 2⁶³ in {what}", str(array.max()), "write it as a float")
    if array.dtype.kind == "f":
        _refuse_not_finite(array, where, what, names, limit)
        return array
    return array.astype(bool if array.dtype.kind == "b" else np.int64, copy=False)


def refuse_missing(values: Column, where: str, what: str) -> None:
    """Raises InputError with the first row where the column, of whatever type, has no value."""
    import pandas as pd

    missing = np.flatnonzero(np.asarray(pd.isna(values)))
    if missing.size:
        raise _missing(where, what, int(missing[0]))


def _missing(where: str, what: str, row: int) -> InputError:
    fix = "fill it in or remove the row"
    return InputError(
        where, f"a number in every row of {what}", f"a missing value in data row {row + 1}", fix
    )


def _from_series(values: pd.Series[Any], where: str, what: str) -> Array:
    import pandas as pd

    if isinstance(values.dtype, pd.CategoricalDtype):
        refuse_missing(values, where, what)
        labels = values.cat.categories
        if not pd.api.types.is_numeric_dtype(labels.dtype):
            return values.cat.codes.to_numpy(np.int64)
        values = values.astype(labels.dtype)
    if not pd.api.types.is_numeric_dtype(values.dtype):
        raise _not_numbers(values.to_numpy(), where, what)
    refuse_missing(values, where, what)
    if isinstance(values.dtype, np.dtype):
        return values.to_numpy()
    kind = {"b": bool, "i": np.int64, "u": np.uint64}.get(values.dtype.kind, np.float64)
    return values.to_numpy(dtype=kind)


def _not_numbers(array: Array, where: str, what: str) -> InputError:
    """The error that shows the first entry that is no number."""
    import pandas as pd

    expected, drop = f"numbers in {what}", "leave the column out, or write its values as numbers"
    if array.dtype.names:
        fix = "save its fields as plain arrays of one .npz"
        return InputError(where, expected, f"records ({shortened(array.dtype.names)})", fix)
    entries = array if array.ndim == 1 else array[:0]
    missing = np.asarray(pd.isna(entries), bool)
    strange = [row for row in np.flatnonzero(~missing).tolist() if not _is_number(entries[row])]
    if not strange:
        gaps = np.flatnonzero(missing).tolist()
        return _missing(where, what, gaps[0]) if gaps else InputError(where, expected, f"{array.dtype}", drop)
    # One word turns a whole column of a text file into text: it is the word that the user looks for.
    row = next((row for row in strange if not _spells_number(entries[row])), strange[0])
    value = entries[row]
    if isinstance(value, int):
        return InputError(where, f"integers below 2⁶³ in {what}", f"{value} in data row {row + 1}", drop)
    kind, shown = ("text", repr(str(value)[:40])) if isinstance(value, str) else (type(value).__name__, value)
    return InputError(where, expected, f"{kind} ({shown} in data row {row + 1})", drop)


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, float | np.integer | np.floating | np.bool_)


def _spells_number(value: object) -> bool:
    try:
        return isinstance(value, str) and np.isfinite(float(value)).item()
    except ValueError:
        return False


def _refuse_not_finite(array: Array, where: str, what: str, names: tuple[str, ...], limit: float) -> None:
    """Raises InputError at the first entry that is NaN, infinite, or larger than the limit."""
    # A narrower type must not be compared with what it cannot hold itself.
    limit = min(limit, float(np.finfo(array.dtype).max))
    step = max(1, _CHUNK // max(1, array[:1].size))
    for start in range(0, len(array), step):
        piece = array[start : start + step]
        fine = np.isfinite(piece) & (np.abs(piece) <= limit)
        if fine.all():
            continue
        row, *position = (int(i) for i in np.argwhere(~fine)[0])
        value = float(piece[(row, *position)])
        if position:
            place = names[position[0]] if names else ",".join(map(str, position))
            what = f"column '{place}' of {what}"
        if np.isnan(value):
            raise _missing(where, what, start + row)
        got, fix = f"{value} in data row {start + row + 1}", "replace it or remove the row"
        if np.isfinite(value):
            expected, fix = (
                f"numbers up to ±{limit:.2g} (float32) in {what}",
                "rescale it or set dtype: float64",
            )
            raise InputError(where, expected, got, fix)
        raise InputError(where, f"finite numbers in {what}", got, fix)
