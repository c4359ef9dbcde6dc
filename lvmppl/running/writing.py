"""What a run writes into its folder before its pictures: the tables, and what they were made from."""

from __future__ import annotations

import platform
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lvmppl import data
from lvmppl.align import drawn_data
from lvmppl.data.fingerprint import fingerprint
from lvmppl.fitted import Fit
from lvmppl.running.record import Record

LARGE_PARAMETER = 10_000  # entries beyond which a tensor goes to parameters.safetensors


@contextmanager
def patient() -> Iterator[list[int]]:
    """Within the block the first Ctrl-C is only noted, in the list that is yielded; a second one interrupts."""
    noted: list[int] = []
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not default or threading.current_thread() is not threading.main_thread():
        yield noted  # the signal is not ours to handle
        return

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def write_record(directory: Path, record: Record, fits: Mapping[str, Fit]) -> None:
    """Everything but pictures and report."""
    record.write(directory)
    large = {
        f"{name}/{p}": v.contiguous().clone()
        for name, fit in fits.items()
        for p, v in fit.parameters.items()
        if v.numel() > LARGE_PARAMETER
    }
    if large:
        from safetensors.torch import save_file

        save_file(large, str(directory / "parameters.safetensors"))


def make_record(frames: Mapping[str, pd.DataFrame], dataset: data.Dataset, experiment: str) -> Record:
    """The tables of a run with what is recorded of experiment, machine and data."""
    about = {
        "source": dataset.name,
        "rows": dataset.num_rows,
        "test_rows": len(dataset.test_rows),
        "sha256": fingerprint(dataset),
        "vocabulary": list(dataset.vocabulary),
    }
    return Record(frames, experiment, _environment(), about, shown_features(dataset, drawn_data(frames)))


def shown_features(dataset: data.Dataset, rows: Sequence[int]) -> pd.DataFrame:
    """The numeric features of some training rows, one column each, for scatter plots; indexed by datum."""
    columns: dict[str, Any] = {}
    index = torch.as_tensor(rows, dtype=torch.int64)
    for name, tensor in dataset.tensors.items() if len(rows) else ():
        if not tensor.is_floating_point() or tensor.dim() > 2:
            continue
        names, values = dataset.columns.get(name, ()), tensor[index].numpy()
        if values.ndim == 1:
            columns[f"{name}.{names[0]}" if names else name] = values
        else:
            for i, column in enumerate(values.T):
                columns[f"{name}.{names[i] if i < len(names) else i}"] = column
    return pd.DataFrame(columns, index=pd.Index(index.numpy(), name="datum"))


def _environment() -> dict[str, Any]:
    packages = ("lvmppl", "torch", "pyro-ppl", "pandas", "numpy", "scikit-learn", "matplotlib")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "packages": versions,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
