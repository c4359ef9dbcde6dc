"""Modes that see every operation of torch, without the compiler."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class EagerMode(TorchDispatchMode):
    """A `TorchDispatchMode` that never meets torch.compile.

    Torch guards the others against it, for which the first operation imports the compiler (two seconds) and each one
    costs ten microseconds.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


__all__ = ["EagerMode"]
