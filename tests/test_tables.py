from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lvmppl import tables
from lvmppl.errors import InputError


def posterior_frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "fit": ["NA", "NA", 'ü,"x"', "b"],
            "kind": ["exact", "exact", "variational", "mcmc"],
            "site": ["z", "z", "h", "w"],
            "datum": [0, 1, 7, None],
            "position": ["", "0,1", None, "3"],
            "state": [0, 2, None, None],
            "probability": [0.1 + 0.2, 5e-324, np.nan, np.nan],
            "mean": [np.nan, np.nan, -np.inf, math.pi],
            "sd": [np.nan, np.nan, 1e300, 1 / 3],
        }
    )


def history_frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "fit": "svi",
            "restart": [0, 0, 1],
            "step": [0, 1, 0],
            "seconds": [0.0, 0.25, 0.0],
            "objective": [-np.inf, np.nan, -1.5],
            "objective_kind": "elbo",
            "learning_rate": np.array([0.1, 0.2, 0.3], dtype=np.float32),
            "kept": [True, False, True],
        }
    )


def test_validated_dtypes_equal_contract() -> None:
    frame = tables.validate("posterior", posterior_frame().iloc[:, ::-1])
    assert list(frame.columns) == [
        "fit",
        "kind",
        "site",
        "datum",
        "position",
        "state",
        "probability",
        "mean",
        "sd",
    ]
    assert {c: str(d) for c, d in frame.dtypes.items()} == dict(tables.SCHEMAS["posterior"])
    assert frame["datum"].isna().tolist() == [False, False, False, True]
    assert frame["position"].tolist() == ["", "0,1", "", "3"]


@pytest.mark.parametrize("name", list(tables.SCHEMAS))
def test_missing_or_extra_column_is_refused(name: str) -> None:
    frame = tables.empty(name)
    for column in frame.columns:
        with pytest.raises(AssertionError, match=f"missing .'{column}'"):
            tables.validate(name, frame.drop(columns=column))
    if name in ("history", "gaps"):
        assert list(tables.validate(name, frame.assign(extra=1.0)))[-1] == "extra"
    else:
        with pytest.raises(AssertionError, match="extra"):
            tables.validate(name, frame.assign(extra=1.0))


@pytest.mark.parametrize(
    "column, value", [("datum", 0.5), ("datum", "a"), ("mean", "a"), ("fit", 3), ("kind", "guess")]
)
def test_value_of_another_dtype_is_refused(column: str, value: object) -> None:
    frame = posterior_frame().astype(object)
    frame.loc[1, column] = value  # type: ignore[call-overload]
    with pytest.raises(AssertionError, match=rf"posterior\.{column}"):
        tables.validate("posterior", frame)


def test_read_tables_equal_written(tmp_path: Path) -> None:
    written = {"posterior": posterior_frame(), "history": history_frame()}
    tables.write_tables(tmp_path, written)
    back = tables.read_tables(tmp_path)
    assert set(back) == set(tables.SCHEMAS)
    for name in tables.SCHEMAS:
        expected = tables.validate(name, written[name]) if name in written else tables.empty(name)
        pd.testing.assert_frame_equal(back[name], expected, check_exact=True)


def test_csv_floats_equal_written_bit_for_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=1000) * 10.0 ** np.random.default_rng(1).integers(
        -300, 300, 1000
    )
    frame = pd.DataFrame({"fit": "NA", "parameter": "p", "position": "", "value": values})
    tables.write_tables(tmp_path, {"parameters": frame})
    lines = (tmp_path / "parameters.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "fit,parameter,position,value"
    assert [float(line.split(",")[3]) for line in lines[1:]] == values.tolist()
    assert lines[1].startswith("NA,p,,")


def test_csv_nullable_cells_are_empty(tmp_path: Path) -> None:
    tables.write_tables(tmp_path, {"posterior": posterior_frame()})
    lines = (tmp_path / "posterior.csv").read_bytes().decode().split("\n")
    assert lines[1] == "NA,exact,z,0,,0,0.30000000000000004,,"
    assert lines[3] == '"ü,""x""",variational,h,7,,,,-inf,1e+300'
    assert lines[4] == "b,mcmc,w,,3,,,3.141592653589793,0.3333333333333333"


def test_tables_written_twice_equal_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        tables.write_tables(tmp_path / folder, {"posterior": posterior_frame(), "history": history_frame()})
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(f"{n}.{e}" for n in tables.SCHEMAS for e in ("csv", "parquet"))
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_long_table_has_parquet_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.write_tables(tmp_path, {"history": history_frame()})
    monkeypatch.setattr(tables, "CSV_ROWS", 2)
    summary = tables.empty("summary").reindex(range(3)).assign(status="failed", log_evidence_kind="none")
    tables.write_tables(tmp_path, {"history": history_frame(), "summary": summary})
    assert not (tmp_path / "history.csv").exists()
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 4
    assert len(tables.read_tables(tmp_path)["history"]) == 3


def test_missing_or_foreign_table_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        tables.read_tables(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"summary\.parquet: expected a table"):
        tables.read_tables(tmp_path)
    tables.write_tables(tmp_path, {})
    (tmp_path / "gaps.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"gaps\.parquet"):
        tables.read_tables(tmp_path)
    posterior_frame().to_parquet(tmp_path / "gaps.parquet")
    with pytest.raises(InputError, match="missing"):
        tables.read_tables(tmp_path)


def test_worst_data_are_largest_gaps() -> None:
    gap = [0.5, np.nan, 2.0, 0.5, 9.0, 0.1]
    frame = pd.DataFrame(
        {"fit": list("aaaaba"), "datum": [5, 1, 2, 3, 4, 9], "log_evidence": 0.0, "elbo": 0.0, "gap": gap}
    )
    worst = tables.worst_data(tables.validate("gaps", frame), "a", count=3)
    assert worst["datum"].tolist() == [2, 3, 5]


def test_thin_out_keeps_the_same_rows_in_every_fit() -> None:
    num_data, positions = 60, [""] + [str(t) for t in range(7)]
    index = pd.MultiIndex.from_product(
        [["a", "b"], ["exact", "variational"], range(num_data), positions, [0, 1]]
    )
    frame = index.to_frame(index=False, name=["fit", "kind", "datum", "position", "state"])
    frame["site"] = np.where(frame["position"] == "", "z", "h")
    untouched, silence = tables.thin_out(frame, limit=60 * 8)
    assert untouched is frame and silence == ""
    shown, note = tables.thin_out(frame, keep=[59, 1, 1000], limit=20)
    drawn = shown["datum"].nunique()
    assert 20 <= drawn <= 22
    assert note == f"Shown are {drawn} of 60 data and 1 of 7 positions, drawn at random with a fixed seed."
    pairs = {
        key: set(zip(g["datum"], g["position"], strict=True)) for key, g in shown.groupby(["fit", "kind"])
    }
    first = pairs["a", "exact"]
    assert all(other == first for other in pairs.values())
    assert {1, 59} <= set(shown["datum"]) and set(shown["site"]) == {"z", "h"}
    pd.testing.assert_frame_equal(tables.thin_out(frame, keep=[59, 1], limit=20)[0], shown)


def test_columns_of_chains_follow_the_contracts_in_the_summary() -> None:
    frame = tables.empty("summary").assign(divergences=pd.Series(dtype="Int64"), rhat=pd.Series(dtype=float))
    found = tables.validate("summary", frame)
    assert list(found) == [*tables.SCHEMAS["summary"], "rhat", "divergences"]
