"""The split into training and test rows, standardisation, and the last step to tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lvmppl.data.selection import Selection, Sequences
from lvmppl.data.table import Array
from lvmppl.errors import InputError


def split_rows(total: int, test_fraction: float, seed: int) -> tuple[Array, Array]:
    """(training rows, test rows), int64 and ascending: round(total × test_fraction) rows are held out.

    Raises InputError when a fraction above 0 leaves no training row or no test row.
    """
    if not 0 <= test_fraction < 1:
        raise InputError("data.test_fraction", "a number of at least 0 and below 1", str(test_fraction))
    held_out = round(total * test_fraction)
    if test_fraction and not 0 < held_out < total:
        expected = "a fraction that leaves at least one row to fit and one to test"
        got = f"{test_fraction}, which holds out {held_out} of {total} rows"
        raise InputError(
            "data.test_fraction", expected, got, "set it to 0" if total < 2 else "choose another one"
        )
    if not held_out:
        return np.arange(total), np.empty(0, np.int64)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator).numpy()
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def standardize(
    chosen: Mapping[str, Selection], train: Array, sequences: Sequences | None, label: str
) -> dict[str, Selection]:
    """Every floating column to (x − mean) / sd, with the mean and the sd (divisor N) of the training rows.

    Padding takes no part and stays 0; integers and booleans stay as they are.
    Raises InputError for a column without variance, and when there is no floating column at all.
    """
    if not any(selection.values.dtype.kind == "f" for selection in chosen.values()):
        got, fix = (
            f"integers only ({', '.join(chosen)})",
            "set standardize: false, or write the numbers with a point",
        )
        raise InputError("data.standardize", f"a floating column of {label}", got, fix)
    mask = None if sequences is None else sequences.mask
    return {
        name: _standardize_one(selection, name, train, mask, label)
        if selection.values.dtype.kind == "f"
        else selection
        for name, selection in chosen.items()
    }


def _standardize_one(
    selection: Selection, name: str, train: Array, mask: Array | None, label: str
) -> Selection:
    values = selection.values.astype(np.float64)
    entries = values[train] if mask is None else values[train][mask[train]]  # [entries, ...]
    mean = entries.mean(axis=0)
    with np.errstate(over="ignore"):
        sd = np.sqrt(((entries - mean) ** 2).mean(axis=0))
    # By rounding, equal values may get a tiny sd: it is their range that is exactly 0.
    sd = np.where(np.ptp(entries, axis=0) == 0, 0.0, sd)
    unusable = np.argwhere((sd == 0) | ~np.isfinite(sd))
    if len(unusable):
        position = tuple(int(i) for i in unusable[0])
        place = selection.names[sum(position[:1])] if selection.names else ",".join(map(str, position))
        got = f"column '{place}' with standard deviation {sd[position]:g} and mean {mean[position]:g}"
        expected = f"columns of {label} in '{name}' that vary over the training rows"
        raise InputError("data.standardize", expected, got, "leave it out or set standardize: false")
    values -= mean
    values /= sd
    if mask is not None:
        values[~mask] = 0.0
    return replace(selection, values=values)


def to_tensor(values: Array, dtype: torch.dtype) -> Tensor:
    """The array as a tensor: floats of this dtype, sharing the memory where it has the right type already."""
    if values.dtype.kind == "f":
        values = values.astype({torch.float32: np.float32}.get(dtype, np.float64), copy=False)
    # torch warns of memory that it must not write, such as that of a data frame.
    return torch.from_numpy(values if values.flags.writeable else values.copy())
