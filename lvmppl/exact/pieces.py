"""A run of consecutive rows of the data plate: what concerns each datum alone is had piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lvmppl.density import Factor, Variable

PIECE = 65_536  # rows: temporary tables of N × K never stand there for all rows at once


def pieces(
    factors: Sequence[Factor], variables: Mapping[str, Variable], plate_sizes: Mapping[str, int], plate: str
) -> Iterator[tuple[list[Factor], dict[str, Variable], dict[str, int]]]:
    """(factors, variables, plate sizes) of at most `PIECE` consecutive rows of `plate` at a time."""
    for begin in range(0, plate_sizes[plate], PIECE):
        size = min(PIECE, plate_sizes[plate] - begin)

        def rows(tensor: Tensor, dims: Sequence[str], begin: int = begin, size: int = size) -> Tensor:
            return tensor.narrow(list(dims).index(plate), begin, size) if plate in dims else tensor

        own = []
        for f in factors:
            scale = rows(f.scale, f.scale_dims) if isinstance(f.scale, Tensor) else f.scale
            own.append(replace(f, log_prob=rows(f.log_prob, f.dims), scale=scale))
        named = {
            n: v if v.lengths is None else replace(v, lengths=rows(v.lengths, v.lengths_dims))
            for n, v in variables.items()
        }
        yield own, named, {**plate_sizes, plate: size}
