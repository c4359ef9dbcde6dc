"""Sources to tensors: columns chosen by name, rows held out by a seeded split.

Shapes: N rows (or B padded sequences of T steps), D columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lvmppl.catalogue import SOURCES
from lvmppl.data.files import READERS as FILE_READERS
from lvmppl.data.files import read_file
from lvmppl.data.preparation import split_rows, standardize, to_tensor
from lvmppl.data.selection import Selection, Sequences, find_sequences, select
from lvmppl.data.shipped import READERS as SHIPPED_READERS
from lvmppl.data.shipped import read_shipped, refuse_arguments
from lvmppl.data.table import Table
from lvmppl.errors import InputError
from lvmppl.wording import nearest

__all__ = ["SOURCES", "DataSpec", "Dataset", "load"]


class DataSpec(Protocol):
    """What an experiment says of its data."""

    @property
    def source(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, str | Sequence[str]]: ...
    @property
    def standardize(self) -> bool: ...
    @property
    def test_fraction(self) -> float: ...
    @property
    def sequence(self) -> str | None: ...
    @property
    def time(self) -> str | None: ...
    @property
    def args(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Dataset:
    """The rows of a source as tensors by the names that the model takes.

    tensors: the training rows, all with the same first axis. test: the rows held out, {} when there are none.
    rows, test_rows: int64, which rows of the source they are, from 0; of a long-form table, which sequences,
    in the order of their first rows.
    columns: the names of the columns in each tensor, () where they have none.
    """

    name: str
    tensors: dict[str, Tensor]
    test: dict[str, Tensor]
    rows: Tensor
    test_rows: Tensor
    columns: dict[str, tuple[str, ...]]
    vocabulary: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """N, the number of training rows (or sequences)."""
        return len(self.rows)


def load(spec: DataSpec, base: Path, dtype: torch.dtype, seed: int) -> Dataset:
    """Reads a source and makes its tensors.

    Floats get the dtype; integers become int64 and booleans stay. A .npy whose type is right already stays
    mapped to the file unless rows are held out or standardised. With `sequence` or `time`, tensors are padded
    with 0 to [B, T, ...] and `lengths` [B] is added.
    base: where relative paths start. seed: of the split, which uses no other random state.
    Raises InputError with the field, the source as the user wrote it, the column and the row (from 1).
    """
    table = _open(spec, base)
    sequences = find_sequences(table, spec.sequence, spec.time)
    chosen = select(table, spec.columns, (spec.sequence, spec.time), float(torch.finfo(dtype).max))
    if sequences is not None:
        chosen = _padded(chosen, sequences)
    total = table.num_rows if sequences is None else len(sequences.lengths)
    train, test = split_rows(total, spec.test_fraction, seed)
    if spec.standardize:
        chosen = standardize(chosen, train, sequences, table.label)
    return Dataset(
        name=spec.source,
        # Without a split the array itself, not a copy of all its rows: it may be larger than memory.
        tensors={n: to_tensor(s.values[train] if len(test) else s.values, dtype) for n, s in chosen.items()},
        test={n: to_tensor(s.values[test], dtype) for n, s in chosen.items()} if len(test) else {},
        rows=torch.from_numpy(train),
        test_rows=torch.from_numpy(test),
        columns={name: selection.names for name, selection in chosen.items()},
        vocabulary=table.vocabulary,
    )


def _open(spec: DataSpec, base: Path) -> Table:
    """The table of a shipped source or a file, whichever the name stands for."""
    if spec.source in SHIPPED_READERS:
        return read_shipped(spec.source, spec.args)
    if Path(spec.source).suffix.lower() in FILE_READERS:
        refuse_arguments("a file", spec.args)
        return read_file(spec.source, base)
    known = f"a shipped source ({', '.join(SHIPPED_READERS)}) or a file ({', '.join(FILE_READERS)})"
    raise InputError("data.source", known, f"'{spec.source}'", nearest(spec.source, SHIPPED_READERS))


def _padded(chosen: Mapping[str, Selection], sequences: Sequences) -> dict[str, Selection]:
    """Every tensor as padded sequences, and their lengths."""
    if "lengths" in chosen:
        fix = "the lengths of the sequences are called so: choose another name"
        raise InputError("data.columns.lengths", "a name other than lengths", "lengths", fix)
    padded = {name: sequences.pad(selection) for name, selection in chosen.items()}
    return {**padded, "lengths": Selection(sequences.lengths, ())}
