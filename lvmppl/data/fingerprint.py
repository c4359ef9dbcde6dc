"""A fingerprint of the rows, by which two runs know whether their objectives are of the same data."""

from __future__ import annotations

import hashlib

import numpy as np
from torch import Tensor

from lvmppl.data import Dataset

_CHUNK = 2**22  # numbers hashed at a time: a memory map is never in memory as a whole


def fingerprint(dataset: Dataset) -> str:
    """The SHA-256 of all rows, training and test, as 64 hexadecimal digits.

    It is that of shapes and values, floats rounded to float32: the names of the tensors do not enter, and a run in
    float32 has the data of one in float64. Rows in another order, of another split, or standardised are other data.
    """
    both = ((tensor, dataset.test.get(name)) for name, tensor in dataset.tensors.items())
    parts = sorted(f"{_digest(rows)} {'' if test is None else _digest(test)}" for rows, test in both)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    dtype = "<f4" if tensor.is_floating_point() else "<i8"
    result = hashlib.sha256(f"{dtype}{list(tensor.shape)}".encode())
    step = max(1, _CHUNK // max(1, tensor[:1].numel()))
    for start in range(0, len(tensor), step):
        with np.errstate(over="ignore"):
            values = tensor[start : start + step].numpy().astype(dtype)
        result.update((values + 0).tobytes())  # −0 is 0
    return result.hexdigest()


__all__ = ["fingerprint"]
