"""From an experiment file to fits, tables, pictures and a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lvmppl import tables
from lvmppl.algorithms.problem import Problem, Progress, Silent
from lvmppl.density import derive_seed, isolated
from lvmppl.errors import InputError
from lvmppl.fitted import Fit
from lvmppl.running.checking import check
from lvmppl.running.fitting import run_fits
from lvmppl.running.folder import publish, require_ours, staged
from lvmppl.running.pages import write_pages
from lvmppl.running.preparation import Plan, build_all, fit_order, prepare, torch_dtype
from lvmppl.running.record import MARKS, RUNS
from lvmppl.running.results import Run, collect
from lvmppl.running.writing import make_record, patient, write_record
from lvmppl.spec import open_experiment, to_yaml

__all__ = ["Interrupted", "Run", "check", "run"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; `message` says what was kept."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def run(
    experiment: str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Run an experiment and write its folder (default `runs/<name>`).

    A fit that fails leaves a row in the summary and does not stop the others. The folder appears when everything in it
    is written; an earlier run of the same folder is replaced.

    Raises:
        InputError: the experiment, its data, model or guides are wrong; nothing has been written.
        Interrupted: Ctrl-C; the fits that had finished are written, and its message says so.
    """
    loaded, base, document = open_experiment(experiment, overrides)
    directory = Path(out) if out is not None else RUNS / loaded.name
    require_ours(directory, MARKS)
    with isolated(derive_seed(loaded.seed, "run"), torch_dtype(loaded)):
        with document.located():
            plan = prepare(loaded, base, smoke)
            order = fit_order(plan.options)
            build_all(plan, order)
        with staged(directory) as staging:
            fits, failures, at = run_fits(plan, order, progress or Silent())
            if at is not None and not fits:
                raise Interrupted(f"interrupted during fit '{at}': no fit had finished; nothing is kept")
            return _deliver(plan, fits, failures, None if at is None else f"fit '{at}'", directory, staging)


def _deliver(
    plan: Plan,
    fits: Mapping[str, tuple[Problem, Fit]],
    failures: Mapping[str, str],
    at: str | None,
    directory: Path,
    staging: Path,
) -> Run:
    """Write what the fits gave and move it into place: tables first, for which even Ctrl-C waits.

    at: where the run has been interrupted already, if it has.

    Raises:
        Interrupted: it has been interrupted; says what is kept.
        InputError: the folder cannot be written.
    """
    without = ""
    try:
        with patient() as pressed:
            result = collect(plan, fits, failures, directory)
            frames = {name: getattr(result, name) for name in tables.SCHEMAS}
            record = make_record(frames, plan.dataset, to_yaml(plan.experiment))
            write_record(staging, record, result.fits)
        at = "the writing of the tables" if pressed else at
        problems, cut = write_pages(staging, record)
        if cut:
            at, without = at or "the drawing of the pictures", ", without the pictures"
        with patient():
            publish(staging, directory)
    except KeyboardInterrupt:
        raise Interrupted("interrupted before the tables were written: nothing is kept") from None
    except OSError as error:
        got = f"{error.strerror or error}"
        raise InputError(f"output folder {directory}", "a folder that can be written", got) from error
    if at is not None:
        kept = f"the results of {', '.join(fits)} are in {directory}{without}"
        raise Interrupted(f"interrupted during {at}: {kept}")
    return replace(result, messages=tuple(problems))
