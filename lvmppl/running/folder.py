"""The folder of a run: refused early if it is not ours, filled beside its place, moved into it when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lvmppl.errors import InputError


def require_ours(directory: Path, marks: Sequence[str], sort: str = "run") -> None:
    """Refuse a folder that is not ours to replace, or not ours to write; nothing is created.

    marks: the files that an earlier one of its sort has.

    Raises:
        InputError: it is a file, lies below one, holds other files, or may not be written.
    """
    if directory.is_file():
        raise _refused(directory, "a folder", "a file")
    if directory.exists():
        entries = list(directory.iterdir())
        if entries and not all((directory / mark).exists() for mark in marks):
            raise _refused(
                directory, f"a new folder or one of an earlier {sort}", "a folder with other files"
            )
    above = _existing(directory.absolute().parent)
    if not above.is_dir():
        raise _refused(directory, "a folder that can be made", f"a path below the file {above}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise _refused(directory, "a folder that can be written", f"no write permission in {above}")


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _refused(directory: Path, expected: str, got: str) -> InputError:
    return InputError(f"output folder {directory}", expected, got, "give another --out")


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A hidden folder beside `directory` to write a run into; what is left of it at the end is removed.

    Raises:
        InputError: it cannot be made.
    """
    above = _existing(directory.absolute().parent)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        staging.chmod(0o755)
    except OSError as error:
        _remove_empty(directory.absolute().parent, above)
        got = f"{error.strerror or error} in {directory.parent}"
        raise _refused(directory, "a folder that can be written", got) from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(directory.absolute().parent, above)


def _remove_empty(path: Path, above: Path) -> None:
    """Remove the folders made for a run that was not written."""
    with contextlib.suppress(OSError):  # one that is not empty stays, with all above it
        while path != above:
            path.rmdir()
            path = path.parent


def publish(staging: Path, directory: Path) -> None:
    """Move a filled folder into its place. An earlier run is put aside first: at every moment one of the two is whole."""
    if not directory.exists():
        staging.rename(directory)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-earlier-", dir=directory.parent))
    directory.rename(aside / directory.name)
    try:
        staging.rename(directory)
    except OSError:
        (aside / directory.name).rename(directory)
        raise
    finally:
        if directory.exists():
            shutil.rmtree(aside, ignore_errors=True)
