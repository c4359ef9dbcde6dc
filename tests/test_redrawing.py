"""`lvmppl report`: pictures and report again from a run's folder, the same bytes, and the old ones kept in trouble."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner, Result

from lvmppl import align, cli, plots, tables
from lvmppl.data import Dataset
from lvmppl.data.fingerprint import fingerprint
from lvmppl.running.record import read_record

EXPERIMENT = """\
name: twice
dtype: float32
data: {source: rows.csv, columns: {x: [a, b, c]}, standardize: true, test_fraction: 0.2}
model: {use: gaussian_mixture, args: {num_components: 2, covariance: diag}}
fits:
  em: {algorithm: em, max_steps: 3, restarts: 2}
  drawn: {algorithm: svi, max_steps: 4, guide: {use: categorical_encoder, args: {hidden: []}}}
"""


def lvmppl(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="lvmppl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose experiment and rows are gone."""
    folder = tmp_path_factory.mktemp("finished")
    rows = np.random.default_rng(3).normal(size=(40, 3)) + np.arange(40)[:, None] % 2 * [3.0, 0.0, 1.0]
    pd.DataFrame(rows, columns=list("abc")).to_csv(folder / "rows.csv", index=False)
    (folder / "twice.yaml").write_text(EXPERIMENT)
    result = lvmppl("run", str(folder / "twice.yaml"), "--out", str(folder / "run"))
    assert result.exit_code == 0, result.output
    (folder / "rows.csv").unlink()
    (folder / "twice.yaml").unlink()
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, `run`, in the current folder."""
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; nothing hidden is left out."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------- the same again


def test_redrawn_pictures_and_report_equal_those_of_the_run_byte_for_byte(run: Path) -> None:
    before = contents(run)
    pictures = {name for name in before if name.endswith(".png")}
    assert {"plots/components_z.png", "plots/gaps.png", "plots/responsibilities_drawn_z.png"} <= pictures
    shutil.rmtree(run / "plots")
    (run / "report.html").unlink()
    result = lvmppl("report", "run")
    assert result.exit_code == 0, result.output
    assert contents(run) == before
    first, last = result.stdout.splitlines()
    assert first == f"drawn: {', '.join(sorted(Path(name).stem for name in pictures))}"
    assert last == "report: run/report.html"


def test_redrawing_replaces_old_pictures_and_leaves_other_files_alone(run: Path) -> None:
    before = contents(run)
    (run / "plots" / "gaps.png").write_bytes(b"an old picture")
    (run / "report.html").write_text("an old page")
    (run / "plots" / "mine.svg").write_text("mine")
    assert lvmppl("report", "run").exit_code == 0
    assert contents(run) == {**before, "plots/mine.svg": b"mine"}


def test_redrawn_picture_shows_the_table_on_disk(run: Path) -> None:
    """A table changed by hand changes its picture and the page, and nothing else."""
    before = contents(run)
    gaps = pd.read_parquet(run / "gaps.parquet")
    gaps.assign(gap=gaps["gap"] + 1.0).to_parquet(run / "gaps.parquet", index=False)
    assert lvmppl("report", "run").exit_code == 0
    changed = {name for name, content in contents(run).items() if content != before[name]}
    assert {"plots/gaps.png", "report.html", "gaps.parquet"} <= changed
    assert not {"plots/objective.png", "plots/components_z.png"} & changed


def test_words_of_the_data_come_back_from_disk(run: Path) -> None:
    """The weights [2] are a table over a vocabulary of two words."""
    data = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**data, "vocabulary": ["aardvark", "zebra"]}))
    assert lvmppl("report", "run").exit_code == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "aardvark" in page and "zebra" in page


def test_report_loads_no_torch(run: Path) -> None:
    code = (
        "import sys\nfrom lvmppl.cli import main\nsys.argv = ['lvmppl', 'report', 'run']\n"
        "try:\n    main()\nfinally:\n    print('LOADED', sorted({'torch', 'pyro', 'sklearn'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("report: run/report.html\nLOADED []\n") and done.stderr == ""


def test_record_read_equals_record_written(run: Path, tmp_path: Path) -> None:
    record = read_record(run)
    (tmp_path / "copy").mkdir()
    record.write(tmp_path / "copy")
    again = read_record(tmp_path / "copy")
    assert (again.experiment, again.environment, again.data) == (
        record.experiment,
        record.environment,
        record.data,
    )
    for name in tables.SCHEMAS:
        pd.testing.assert_frame_equal(again.tables[name], record.tables[name])
    pd.testing.assert_frame_equal(again.shown, record.shown)
    assert record.shown.index.name == "datum" and list(record.shown) == ["x.a", "x.b", "x.c"]
    assert (record.data["rows"], record.data["test_rows"], len(record.shown)) == (32, 8, 32)


def test_picture_of_the_data_kept_equals_that_of_all_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    probs = rng.dirichlet(np.ones(2), size=5100)
    posterior = pd.DataFrame(
        {"fit": "em", "kind": "exact", "site": "z", "datum": np.repeat(np.arange(5100), 2), "position": ""}
    ).assign(state=np.tile([0, 1], 5100), probability=probs.ravel(), mean=np.nan, sd=np.nan)
    frames = {
        **{name: tables.empty(name) for name in tables.SCHEMAS},
        "posterior": tables.validate("posterior", posterior),
    }
    data = pd.DataFrame(rng.normal(size=(5100, 2)), columns=["x", "y"])
    kept = align.drawn_data(frames)
    assert len(kept) == 5000
    shown, note = align.aligned_posterior(frames)
    pictures = [plots.component_scatter(shown, rows, "z", note) for rows in (data, data.loc[kept])]
    first, second = (p.save(tmp_path / f"{i}.png").read_bytes() for i, p in enumerate(pictures) if p)
    assert first == second


# ------------------------------------------------------------------------------------------- in trouble


def _broken(*_: object) -> None:
    raise RuntimeError("no such colour")


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("part", ["lvmppl.plots.gap_curves", "lvmppl.report.write_report"])
@pytest.mark.parametrize(("raise_", "status"), [(_broken, 1), (_interrupted, 130)])
def test_redrawing_that_fails_leaves_everything_as_it_was(
    part: str, raise_: Callable[..., None], status: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run)
    monkeypatch.setattr(part, raise_)
    result = lvmppl("report", "run")
    assert result.exit_code == status and result.stdout == ""
    said = {1: "RuntimeError: no such colour\nnothing was replaced: ", 130: "interrupted: "}[status]
    assert result.stderr.endswith(f"{said}pictures and report are as they were\n")
    assert contents(run) == before


def _without(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(content) and None


def _drop_column(run: Path) -> None:
    pd.read_parquet(run / "gaps.parquet").drop(columns="elbo").to_parquet(run / "gaps.parquet", index=False)


def _reword(run: Path) -> None:
    frame = pd.read_parquet(run / "summary.parquet").assign(status="great")
    frame.to_parquet(run / "summary.parquet", index=False)


WRONG = {
    "no such folder": (shutil.rmtree, "run: expected the folder of a run, got nothing of that name; "),
    "not a run": (_without("experiment.yaml"), "run: .*, got a folder without experiment.yaml; "),
    "cut short": (_without("posterior.parquet"), "run/posterior.parquet: .*, got no such file; "),
    "half a table": (
        _write("history.parquet", b"PAR1"),
        "run/history.parquet: expected the history table, got ",
    ),
    "a column less": (_drop_column, "run/gaps.parquet: expected the gaps table, got .*missing .'elbo'"),
    "a word of nobody's": (_reword, "run/summary.parquet: expected the summary table, got .*'great'"),
    "half a record": (_write("environment.json", b"{"), "run/environment.json: expected JSON, got "),
    "another record": (_write("data.json", b"[]"), "run/data.json: expected a JSON object, got list; "),
    "no data": (_without("data.parquet"), "run/data.parquet: expected .*, got nothing: .*; "),
    "half of the data": (_write("data.parquet", b"PAR1"), "run/data.parquet: expected .*, got "),
    "bytes": (_write("experiment.yaml", b"\xff\xfe"), "run/experiment.yaml: expected a file of text, got "),
}


@pytest.mark.parametrize("case", WRONG)
def test_folder_that_is_no_run_is_refused_in_one_line_and_nothing_is_written(case: str, run: Path) -> None:
    spoil, message = WRONG[case]
    spoil(run)
    before = contents(Path())
    result = lvmppl("report", "run")
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert re.match(message, result.stderr), result.stderr
    assert contents(Path()) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("run/report.html", "got a file; give run\n"),
        (".", "got a folder of runs; give one of them, such as run\n"),
        ("mine", "got nothing of that name; did you mean runs/mine?\n"),
    ],
)
def test_neighbour_of_a_run_is_refused_with_the_run(given: str, message: str, run: Path) -> None:
    shutil.copytree(run, "runs/mine")
    result = lvmppl("report", given)
    assert result.exit_code == 2 and result.stderr.endswith(message)


def test_run_that_cannot_be_written_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    result = lvmppl("report", "run")
    assert result.exit_code == 2
    assert result.stderr == "run: expected a folder that can be written, got No space left on device\n"


# ------------------------------------------------------------------------------------------- the data


def dataset(test: torch.Tensor | None = None, **tensors: torch.Tensor) -> Dataset:
    rows = torch.arange(len(next(iter(tensors.values()))))
    return Dataset("rows", tensors, {} if test is None else {"x": test}, rows, rows[:0], {})


def test_fingerprint_is_that_of_values_and_not_of_names_or_precision() -> None:
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    n = torch.arange(7)
    first = fingerprint(dataset(x=x, n=n))
    assert first == fingerprint(dataset(count=n, y=x.float())) and len(first) == 64
    assert fingerprint(dataset(x=torch.zeros(2))) == fingerprint(dataset(x=-torch.zeros(2)))
    others = {
        "order": dataset(x=x.flip(0), n=n),
        "value": dataset(x=x.index_fill(0, torch.tensor([6]), 9.0), n=n),
        "shape": dataset(x=x.reshape(7, 1, 3), n=n),
        "fewer": dataset(x=x[:6], n=n[:6]),
        "transposed": dataset(x=x.T.reshape(7, 3), n=n),
        "one tensor": dataset(x=x),
        "floats": dataset(x=x, n=n.double()),
        "held out": dataset(x=x, n=n, test=x[:1]),
    }
    assert len({first, *map(fingerprint, others.values())}) == 1 + len(others)


def test_fingerprint_of_chunks_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dataset(x=torch.arange(35.0).reshape(7, 5))
    whole = fingerprint(rows)
    monkeypatch.setattr("lvmppl.data.fingerprint._CHUNK", 11)
    assert fingerprint(rows) == whole
