"""Some rows of a reading, and how many rows make a piece that stays in the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from torch import Tensor

from lvmppl.algorithms.closed_form import ClosedSite
from lvmppl.density import Variable
from lvmppl.exponential import Reading

SMALL = 2**17  # entries of a step's largest tensors up to which preparing the operations costs what they cost
_ENTRIES = 2**20  # of the design matrix and the factors of one piece: 8 MiB in float64


def some_rows(reading: Reading, plate: str | None, begin: int, size: int, total: int) -> Reading:
    """The reading of some rows."""
    axis = next((a for a, name in reading.axes.items() if name == plate), None)
    if axis is None or size == total:
        return reading

    def cut(tensor: Tensor, core: int = 0) -> Tensor:
        at = tensor.dim() + axis - core
        return tensor.narrow(at, begin, size) if at >= 0 and tensor.shape[at] == total > 1 else tensor

    return replace(
        reading,
        value=cut(reading.value, reading.core_rank),
        known={k: cut(v) for k, v in reading.known.items()},
        masks=tuple(cut(m) for m in reading.masks),
    )


def rows_of_a_piece(
    sites: Sequence[ClosedSite],
    readings: Mapping[str, Reading],
    variables: Mapping[str, Variable],
    total: int,
    restarts: int = 1,
) -> int:
    """How many rows keep the design matrix and the factors of all restarts in the cache."""
    wide = entries_of_a_row(sites, readings, variables, total, restarts)
    return max(min(total, 256), min(total, _ENTRIES // max(1, wide), 1 << 14))


def entries_of_a_row(
    sites: Sequence[ClosedSite],
    readings: Mapping[str, Reading],
    variables: Mapping[str, Variable],
    total: int,
    restarts: int,
) -> int:
    """Of the design matrix and the factors, for one row of the data."""
    wide = 0
    for site in sites:
        reading = readings[site.name]
        states = prod(variables[d].size for d in site.keep if d in variables)
        value = reading.value.numel() // total if reading.value.numel() >= total else 1
        squares = value * (value + 1) // 2 if site.kind == "mvn" else value
        steps = max((variables[d].steps or 1 for d in site.keep if d in variables), default=1)
        wide += restarts * states * steps + (1 if reading.labels else 1 + value + squares)
    return wide
