"""What a run writes into its folder: the tables and what they were made from first, then pictures and the report."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lvmppl import data, plots, report, tables
from lvmppl.fitted import Fit

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


def write_record(
    directory: Path, frames: Mapping[str, pd.DataFrame], fits: Mapping[str, Fit], experiment_text: str
) -> dict[str, Any]:
    """Everything but pictures and report; returns what was recorded of the environment."""
    (directory / "experiment.yaml").write_text(experiment_text, encoding="utf-8")
    environment = _environment()
    (directory / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
    tables.write_tables(directory, frames)
    large = {
        f"{name}/{p}": v.contiguous().clone()
        for name, fit in fits.items()
        for p, v in fit.parameters.items()
        if v.numel() > LARGE_PARAMETER
    }
    if large:
        from safetensors.torch import save_file

        save_file(large, str(directory / "parameters.safetensors"))
    return environment


def write_pages(
    directory: Path,
    frames: Mapping[str, pd.DataFrame],
    dataset: data.Dataset,
    environment: Mapping[str, Any],
    experiment_text: str,
) -> tuple[list[str], bool]:
    """Pictures and report; (what could not be made, a line each, and whether Ctrl-C left the pictures out).

    No picture is worth the numbers: one that fails is left out.
    """
    problems: list[str] = []
    pictures: list[Path] = []
    interrupted = False

    def failed(name: str, error: Exception) -> None:
        problems.append(f"picture {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    try:
        pictures = plots.draw_all(frames, data_frame(dataset), directory / "plots", failed)
    except KeyboardInterrupt:
        interrupted = True
        shutil.rmtree(directory / "plots", ignore_errors=True)  # the last one may be half a file
    except Exception as error:
        failed("plots", error)
    try:
        report.write_report(directory, frames, pictures, environment, experiment_text, dataset.vocabulary)
    except Exception as error:
        failed("report.html", error)
    return problems, interrupted


def data_frame(dataset: data.Dataset) -> pd.DataFrame:
    """The numeric features of the training rows, one column each, for scatter plots."""
    columns: dict[str, Any] = {}
    for name, tensor in dataset.tensors.items():
        if not tensor.is_floating_point() or tensor.dim() > 2:
            continue
        names = dataset.columns.get(name, ())
        if tensor.dim() == 1:
            columns[f"{name}.{names[0]}" if names else name] = tensor.double().numpy()
        else:
            for i in range(tensor.shape[1]):
                columns[f"{name}.{names[i] if i < len(names) else i}"] = tensor[:, i].double().numpy()
    return pd.DataFrame(columns, index=pd.RangeIndex(dataset.num_rows, name="datum"))


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
