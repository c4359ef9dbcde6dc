"""`lvmppl compare`: runs side by side from their folders, with the kind of every number and whose data they are of."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from iris_tables import iris_data, iris_tables, summary_row
from test_report import Page
from typer.testing import CliRunner, Result

from lvmppl import cli, tables
from lvmppl.comparison import run_names
from lvmppl.comparison_plots import evidence_levels
from lvmppl.errors import InputError
from lvmppl.running.comparing import differing
from lvmppl.running.record import Record

YAML = """\
name: iris
model: {use: gaussian_mixture, args: {num_components: 3}}
fits:
  em: {algorithm: em, restarts: 3}
  local: {algorithm: vem}
"""
IRIS = {"source": "iris", "rows": 150, "test_rows": 0, "sha256": "1" * 64, "vocabulary": []}
NILE = {**IRIS, "source": "nile", "rows": 1, "sha256": "2" * 64}


def lvmppl(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="lvmppl")


def write_run(
    directory: Path,
    fits: tuple[str, ...] = ("em", "local"),
    shift: float = 0.0,
    data: Mapping[str, object] = IRIS,
    text: str = YAML,
    **columns: object,
) -> None:
    """A run's folder: some fits of the irises, log evidence and ELBO moved by `shift`, columns of the summary replaced."""
    frames = {name: frame[frame["fit"].isin(fits)] for name, frame in iris_tables().items()}
    summary = frames["summary"]
    moved = {column: summary[column] + shift for column in ("log_evidence", "elbo")}
    frames["summary"] = summary.assign(**{**moved, **columns})
    frames["history"] = frames["history"][frames["history"]["step"] < 40]
    directory.mkdir(parents=True)
    Record(frames, text, {"python": "3"}, data, iris_data()).write(directory)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with runs `first` and `second` of the same data and `other` of others."""
    monkeypatch.chdir(tmp_path)
    write_run(Path("first"))
    write_run(Path("second"), shift=-2.0, text=YAML.replace("restarts: 3", "restarts: 5"))
    write_run(Path("other"), ("em",), shift=-460.0, data=NILE)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------- the table


def test_table_equals_the_summaries_of_the_runs(folder: Path) -> None:
    result = lvmppl("compare", "first", "second", "--out", "out")
    assert result.exit_code == 0, result.output
    table = pd.read_csv("out/comparison.csv")
    for name in ("first", "second"):
        mine = table[table["run"] == name].reset_index(drop=True)
        summary = pd.read_csv(f"{name}/summary.csv")
        pd.testing.assert_frame_equal(mine[list(summary.columns)], summary)
    assert list(table.columns[:3]) == ["run", "data", "fit"] and list(table["data"]) == ["A"] * 4
    assert list(table["elbo_kind"]) == ["none", "lower_bound"] * 2
    assert list(table["gap_kind"]) == ["none", "exact"] * 2


def test_kinds_tell_an_estimated_bound_and_its_gap_from_exact_ones() -> None:
    rows = [
        {**summary_row("em", -5.0, -6.0, 3), "elbo_error": 0.0},
        {**summary_row("em", -5.0, -6.0, 3), "elbo_error": 0.3},
        {**summary_row("em", -5.0, -6.0, 3), "log_evidence_kind": "lower_bound"},
        {**summary_row("em", np.nan, np.nan, 3), "log_evidence_kind": "none"},
    ]
    found = tables.with_kinds(tables.validate("summary", pd.DataFrame(rows)))
    assert list(found["elbo_kind"]) == ["lower_bound", "estimate", "lower_bound", "none"]
    assert list(found["gap_kind"]) == ["exact", "estimate", "lower_bound", "none"]
    assert list(found.columns[9:13]) == ["elbo", "elbo_kind", "elbo_error", "gap"]


def test_runs_of_the_same_data_are_one_group_and_others_are_said_to_be_others(folder: Path) -> None:
    same = lvmppl("compare", "first", "second", "--out", "out").stdout
    assert "data" not in same
    said = lvmppl("compare", "first", "other", "second", "--out", "out").stdout.splitlines()
    assert "data A: iris, 150 rows, in first and second" in said
    assert "data B: nile, 1 row, in other" in said
    assert "log evidences and ELBOs are comparable only between runs of the same data" in said
    table = pd.read_csv("out/comparison.csv")
    assert dict(zip(table["run"], table["data"], strict=True)) == {"first": "A", "other": "B", "second": "A"}
    pictures = {path.name for path in Path("out/plots").iterdir()}
    assert pictures == {
        "evidence_1.png",
        "evidence_2.png",
        "objective_1.png",
        "objective_2.png",
        "gaps_1.png",
    }


def test_data_of_a_run_without_fingerprint_are_unknown(folder: Path) -> None:
    for name in ("first", "second"):
        Path(name, "data.json").unlink()
    said = lvmppl("compare", "first", "second", "--out", "out").stdout
    assert said.count("data unknown: in ") == 2
    assert "of those marked unknown it cannot be known (they kept no fingerprint)" in said
    assert set(pd.read_csv("out/comparison.csv")["data"]) == {"unknown"}


def test_one_run_is_compared_with_itself_as_its_own_summary(folder: Path) -> None:
    said = lvmppl("compare", "first", "--out", "out").stdout.splitlines()
    assert said[0].split()[:2] == ["fit", "algorithm"] and said[-1] == "report: out/comparison.html"
    page = Page(Path("out/comparison.html").read_text(encoding="utf-8"))
    assert page.texts["h1"] == ["The fits of first"]
    assert [row[0] for row in page.tables[0]] == ["fit", "em", "local"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a"], ["a"]),
        (["a", "x/b"], ["a", "b"]),
        (["x/a", "y/a"], ["x/a", "y/a"]),
        (["x/y/a", "z/y/a", "b"], ["x/y/a", "z/y/a", None]),
        (["a/"], ["a"]),
    ],
)
def test_run_names_are_the_shortest_ends_that_differ(paths: list[str], names: list[str | None]) -> None:
    found = run_names([Path(path) for path in paths])
    assert len(set(found)) == len(paths)
    assert all(name is None or name == other for name, other in zip(names, found, strict=True))


def test_marks_of_bounds_and_estimates_are_explained_where_they_occur(folder: Path) -> None:
    assert not {"≥", "≈"} & set(lvmppl("compare", "first", "--out", "out").stdout)
    write_run(Path("bound"), log_evidence_kind="lower_bound", test_log_evidence=-7.0)
    write_run(Path("drawn"), elbo_error=0.5)
    said = lvmppl("compare", "first", "bound", "drawn", "--out", "out").stdout
    assert "≥ a lower bound; ≈ an estimate, or within a stated error\n" in said
    words = [line.split() for line in said.splitlines()]
    numbers = {
        (*line[:2], len(line)): line[-5:] for line in words if line and line[0] in ("first", "bound", "drawn")
    }
    assert numbers["first", "local", 10][2:] == ["-180.1855", "-180.1866", "0.0011"]
    assert numbers["bound", "local", 12] == ["≥", "-180.1855", "-180.1866", "≥", "0.0011"]
    assert numbers["drawn", "local", 12] == ["-180.1855", "≈", "-180.1866", "≈", "0.0011"]
    assert numbers["bound", "em", 4] == ["bound", "em", "≥", "-7.0000"]
    assert max(map(len, said.splitlines())) <= 100


# ------------------------------------------------------------------------------------------- the picture


def levels() -> pd.DataFrame:
    rows = [
        ("exact", -100.0, "exact", np.nan, -102.5, np.nan),
        ("bound", -101.0, "lower_bound", np.nan, np.nan, np.nan),
        ("estimate", -103.0, "estimate", 0.5, -104.0, 0.25),
        ("far", -900.0, "quadrature", 1e-6, -1000.0, 0.0),
        ("nothing", np.nan, "none", np.nan, np.nan, np.nan),
    ]
    names = ["fit", "log_evidence", "log_evidence_kind", "log_evidence_error", "elbo", "elbo_error"]
    frame = pd.DataFrame(rows, columns=names)
    return frame.assign(gap=frame["log_evidence"] - frame["elbo"])


def test_levels_show_each_number_at_its_place_with_the_mark_of_its_kind() -> None:
    picture = evidence_levels(levels())
    assert picture is not None
    (axes,) = picture.axes
    marked = {
        (line.get_marker(), line.get_markerfacecolor() != "white", *line.get_xydata()[0])
        for line in axes.lines
        if line.get_marker() not in ("None", "")
    }
    assert marked == {
        ("o", True, -100.0, 0.0),
        ("|", True, -102.5, 0.0),
        (">", False, -101.0, 1.0),
        ("o", False, -103.0, 2.0),
        ("|", True, -104.0, 2.0),
    }
    whiskers = {tuple(line.get_xdata()) for line in axes.lines if line.get_marker() in ("None", "")}
    assert whiskers == {(-104.0, -102.0), (-104.5, -103.5)}
    bars = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    assert bars[:2] == [(-102.5, -100.0), (-104.0, -103.0)]
    assert [text.get_text() for text in axes.texts] == ["← log evidence −900.0000, ELBO −1,000.0000"]
    assert axes.get_xlim()[0] > -110 and [t.get_text() for t in axes.get_yticklabels()][3] == "far"
    shown = [text.get_text() for text in picture.legends[0].get_texts()]
    assert shown[:2] == ["exact log evidence", "log evidence by quadrature"] and len(shown) == 5


def test_levels_of_fits_without_numbers_are_no_picture() -> None:
    assert evidence_levels(levels().tail(1)) is None


@pytest.mark.parametrize("gap", [0.0, 1e-10, np.inf])
def test_levels_that_are_all_alike_have_a_scale_of_nats(gap: float, tmp_path: Path) -> None:
    picture = evidence_levels(levels().head(1).assign(log_evidence=-300.0, elbo=-300.0 - gap))
    assert picture is not None and picture.save(tmp_path / "p.png").stat().st_size > 5000
    assert picture.axes[0].get_xlim() == pytest.approx((-301.0, -299.0))


def test_level_half_a_nat_below_equal_others_is_on_the_scale() -> None:
    """The others differ by rounding, which is no measure of what is far."""
    apart = [0.0, 1e-7, 1.5e-6, 0.47]
    rows = pd.concat([levels().head(1)] * 4).assign(log_evidence=[-180.0 - a for a in apart], elbo=np.nan)
    picture = evidence_levels(rows)
    assert picture is not None and not picture.axes[0].texts
    assert -181.0 < picture.axes[0].get_xlim()[0] < -180.47


# ------------------------------------------------------------------------------------------- the page


def test_page_has_a_row_a_fit_with_its_kinds_and_what_differs(folder: Path) -> None:
    assert lvmppl("compare", "first", "second", "--out", "out").exit_code == 0
    page = Page(Path("out/comparison.html").read_text(encoding="utf-8"))
    assert page.open == []
    header, *rows = page.tables[0]
    assert header[:2] == ["run", "fit"] and [row[:2] for row in rows] == [
        [run, fit] for run in ("first", "second") for fit in ("em", "local")
    ]
    assert rows[0][7] == "−180.1855 exact" and rows[2][7] == "−182.1855 exact"
    assert rows[1][8].endswith("lower bound") and rows[1][9].endswith("exact")
    assert page.tables[-1] == [["entry", "first", "second"], ["fits.em.restarts", "3", "5"]]
    assert page.texts["li"][0].endswith("is that of the fit ‘first: em’.")
    assert len([source for source in page.sources if source.startswith("data:")]) == 3


def test_differing_entries_are_those_of_the_files() -> None:
    first = {"seed": 0, "data": {"columns": {"x": ["a", "b"]}}, "fits": {"em": {"algorithm": "em", "m": 1}}}
    second = {**first, "seed": 1, "fits": {"em": {"algorithm": "em", "m": 2}, "q": {"algorithm": "svi"}}}
    assert differing(["one", "two"], [first, second]) == [
        ["entry", "one", "two"],
        ["seed", "0", "1"],
        ["fits.em.m", "1", "2"],
        ["fits.q", "–", "svi"],
    ]
    assert differing(["one", "two"], [first, first]) == []


def test_compare_loads_no_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom lvmppl.cli import main\nsys.argv = ['lvmppl', 'compare', 'first', 'other']\n"
        "try:\n    main()\nfinally:\n    print('LOADED', sorted({'torch', 'pyro', 'sklearn'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("report: runs/comparison/comparison.html\nLOADED []\n") and done.stderr == ""
    assert Path("runs/comparison/comparison.csv").is_file()


# ------------------------------------------------------------------------------------------- in trouble


def test_earlier_comparison_is_replaced_and_a_run_is_not(folder: Path) -> None:
    assert lvmppl("compare", "first", "other", "--out", "out").exit_code == 0
    assert lvmppl("compare", "first", "--out", "out").exit_code == 0
    assert set(pd.read_csv("out/comparison.csv")["run"]) == {"first"}
    assert {path.name for path in Path("out/plots").iterdir()} == {
        "evidence.png",
        "objective.png",
        "gaps.png",
    }
    before = contents(folder)
    result = lvmppl("compare", "first", "--out", "second")
    assert result.exit_code == 2 and "a new folder or one of an earlier comparison" in result.stderr
    assert contents(folder) == before and not list(folder.glob(".*"))


def _broken(*_: object) -> None:
    raise KeyboardInterrupt


def test_interrupted_comparison_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lvmppl("compare", "first", "other", "--out", "out").exit_code == 0
    before = contents(folder)
    monkeypatch.setattr("lvmppl.running.comparing.write_comparison_page", _broken)
    result = lvmppl("compare", "first", "--out", "out")
    assert (result.exit_code, result.stderr) == (130, "interrupted: nothing was written\n")
    assert contents(folder) == before and not list(folder.glob(".*"))


def test_tables_that_cannot_be_drawn_cost_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)

    def broken(*_: object) -> None:
        raise KeyError("no such fit")

    monkeypatch.setattr("lvmppl.comparison_report.objective_curves", broken)
    result = lvmppl("compare", "first", "other", "--out", "out")
    assert (result.exit_code, result.stderr) == (1, "KeyError: 'no such fit'\nnothing was written\n")
    assert contents(folder) == before and not list(folder.glob(".*"))


def test_run_whose_fits_all_failed_is_compared(folder: Path) -> None:
    nothing = dict.fromkeys(["log_evidence", "elbo", "gap"], np.nan)
    write_run(Path("failed"), status="failed", log_evidence_kind="none", message="too late", **nothing)
    for name in ("history", "gaps"):
        tables.empty(name).to_parquet(f"failed/{name}.parquet", index=False)
    for runs in (["failed"], ["first", "failed"]):
        result = lvmppl("compare", *runs, "--out", "out")
        assert result.exit_code == 0, result.output
    assert "Failed: failed: em, failed: local." in Path("out/comparison.html").read_text(encoding="utf-8")


def _drop(name: str, column: str) -> Callable[[], None]:
    def spoil() -> None:
        path = Path("second", f"{name}.parquet")
        pd.read_parquet(path).drop(columns=column).to_parquet(path, index=False)

    return spoil


def _write(name: str, text: str) -> Callable[[], None]:
    return lambda: Path("second", name).write_text(text) and None


WRONG: dict[str, tuple[Callable[[], object], list[str], str]] = {
    "nothing": (
        lambda: None,
        ["nowhere"],
        "nowhere: expected the folder of a run, got nothing of that name; ",
    ),
    "twice": (
        lambda: None,
        ["first/../first"],
        "first/../first: expected each run once, got a second time; ",
    ),
    "a table": (
        lambda: None,
        ["second/summary.csv"],
        "second/summary.csv: expected the folder of a run, got a file; ",
    ),
    "cut short": (
        lambda: Path("second/gaps.parquet").unlink(),
        ["second"],
        "second/gaps.parquet: expected a table ",
    ),
    "column": (
        _drop("summary", "gap"),
        ["second"],
        "second/summary.parquet: expected the summary table, got ",
    ),
    "no record": (_write("data.json", "{}"), ["second"], "second/data.json: expected entries source, rows, "),
    "no experiment": (
        _write("experiment.yaml", "3"),
        ["second"],
        "second/experiment.yaml: expected a mapping ",
    ),
    "no YAML": (_write("experiment.yaml", "a: [\n"), ["second"], "second/experiment.yaml:"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_folder_is_refused_in_one_line_and_nothing_is_written(case: str, folder: Path) -> None:
    spoil, given, message = WRONG[case]
    spoil()
    before = contents(folder)
    result = lvmppl("compare", "first", *given, "--out", "out")
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(message), result.stderr
    assert contents(folder) == before


def test_second_naming_of_a_folder_is_an_input_error() -> None:
    with pytest.raises(InputError, match="a second time"):
        run_names([Path("a"), Path("b"), Path("a")])
