"""Files as tables: .csv and .parquet with named columns, .npy, .npz and .txt with numbers.

The columns of a .npy array [N, D] and of a .txt are called by their positions, "0", "1", …; a .npy as a
whole is "*" and stays memory-mapped. The arrays of a .npz go by their own names.
"""

from __future__ import annotations

import csv
import difflib
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lvmppl.data.table import Array, Block, Column, Table, shortened
from lvmppl.errors import InputError


def read_file(source: str, base: Path) -> Table:
    """The table in a file.

    source: the path as the user wrote it, relative to base.
    Raises InputError when there is no such file, it cannot be read as its suffix says, it holds no rows, or
    two of its columns share a name.
    """
    path = base / Path(source).expanduser()
    if not path.is_file():
        got = f"{source}, which is {'a folder' if path.is_dir() else f'not in {base}'}"
        raise InputError("data.source", "a file relative to the experiment's folder", got, _similar(path))
    try:
        return READERS[path.suffix.lower()](source, path)
    except OSError as error:
        raise InputError("data.source", f"a readable file {source}", error.strerror or str(error)) from error


def _similar(path: Path) -> str:
    neighbours = (
        [entry.name for entry in path.parent.iterdir() if entry.is_file()] if path.parent.is_dir() else []
    )
    alike = difflib.get_close_matches(path.name, neighbours, n=1)
    return f"did you mean '{alike[0]}'?" if alike else "check the path"


def _broken(source: str, expected: str, error: BaseException) -> InputError:
    got = " ".join(str(error).split())
    return InputError(
        "data.source", f"{source} to hold {expected}", got or type(error).__name__, "write it again"
    )


def _refuse_duplicates(names: Iterable[str], source: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1 and name]
    if repeated:
        expected = f"every column of {source} to have a name of its own"
        raise InputError(
            "data.source", expected, f"{shortened(repeated)} more than once", "rename or remove one"
        )


def _read_frame(source: str, path: Path, expected: str, **options: Any) -> Table:
    import pandas as pd

    try:
        with warnings.catch_warnings():
            # Too many fields in a row would otherwise be cut off with no more than this warning.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(path, encoding="utf-8-sig", low_memory=False, index_col=False, **options)
    except pd.errors.EmptyDataError:
        raise InputError("data.source", f"at least one row of data in {source}", "an empty file") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, UnicodeDecodeError) as error:
        raise _broken(source, expected, error) from error
    return Table(source, {str(name).strip(): frame[name] for name in frame.columns})


def _read_csv(source: str, path: Path) -> Table:
    expected = "comma-separated values in UTF-8 under a line of column names, as many in each row"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next((row for row in csv.reader(file, skipinitialspace=True) if row), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise _broken(source, expected, error) from error
    other = next((mark for mark in ";\t" if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        got = f"{'semicolons' if other == ';' else 'tabs'} in its first line"
        fix = "write it with commas, and numbers with a point"
        raise InputError("data.source", f"commas between the columns of {source}", got, fix)
    # pandas renames the second of two equal names without a word.
    _refuse_duplicates((name.strip() for name in header), source)
    return _read_frame(source, path, expected, skipinitialspace=True)


def _read_txt(source: str, path: Path) -> Table:
    options: dict[str, Any] = {"sep": r"\s+", "header": None, "comment": "#", "quoting": csv.QUOTE_NONE}
    return _read_frame(source, path, "numbers separated by blanks, as many in each row", **options)


def _read_parquet(source: str, path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _refuse_duplicates(file.schema_arrow.names, source)
            frame = file.read().to_pandas(ignore_metadata=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise _broken(source, "a parquet table", error) from error
    return Table(source, {str(name): frame[name] for name in frame.columns})


def _read_npy(source: str, path: Path) -> Table:
    try:
        # "c" maps copy-on-write: the file is never written, and torch is content with memory that it may
        # write.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _broken(source, "one array of numbers", error) from error
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        got = "a single number" if isinstance(array, np.ndarray) else "several arrays"
        raise InputError(
            "data.source", f"{source} to hold one array with rows", got, "save it with numpy.save"
        )
    columns: dict[str, Column] = {}
    if array.ndim <= 2:
        table = array[:, None] if array.ndim == 1 else array
        columns = {str(i): table[:, i] for i in range(table.shape[1])}
    return Table(source, columns, {"*": Block(array, tuple(columns))})


def _read_npz(source: str, path: Path) -> Table:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays: dict[str, Array] = {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise _broken(source, "named arrays of numbers", error) from error
    flat = [name for name, array in arrays.items() if array.ndim == 0]
    if flat or not arrays:
        got = f"a single number '{flat[0]}'" if flat else "no array"
        raise InputError("data.source", f"{source} to hold arrays with rows", got, "save it with numpy.savez")
    columns: dict[str, Column] = {name: array for name, array in arrays.items() if array.ndim == 1}
    blocks = {name: Block(array) for name, array in arrays.items() if array.ndim > 1}
    return Table(source, columns, blocks, tuple(arrays))


READERS: dict[str, Callable[[str, Path], Table]] = {
    ".csv": _read_csv,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
