"""A call of its own: parameter store, random state, default dtype and settings stay as they were; seeds by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch


@contextmanager
def isolated(seed: int | None = None, dtype: torch.dtype | None = None) -> Iterator[None]:
    """A call of its own: parameter store, random state, default dtype and settings are as before when it ends."""
    previous = torch.get_default_dtype()
    with (
        torch.random.fork_rng(devices=[]),
        pyro.get_param_store().scope(),
        pyro.settings.context(module_local_params=True),
    ):
        try:
            if dtype is not None:
                torch.set_default_dtype(dtype)
            if seed is not None:
                torch.manual_seed(seed)
            yield
        finally:
            torch.set_default_dtype(previous)


@contextmanager
def unvalidated() -> Iterator[None]:
    """Arguments were validated in the first trace; the steps of a fit skip the checks."""
    with pyro.validation_enabled(False):
        yield


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from (seed, fit, restart, step): FNV-1a over the parts, then `mixed`."""
    state = 0xCBF29CE484222325
    for byte in "\x1f".join(str(p) for p in parts).encode():
        state = ((state ^ byte) * 0x100000001B3) & _MASK
    return mixed(state)


_MASK = 0xFFFFFFFFFFFFFFFF


def mixed(state: int) -> int:
    """One output of splitmix64 (Steele, Lea & Flood 2014), 63 bits: neighbouring states give unrelated seeds."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return (state ^ (state >> 31)) >> 1
