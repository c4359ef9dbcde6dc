"""The five tables of a run: their columns, how they go to disk and come back, and the questions asked of
them.

Everything is in nats. Missing numbers are NaN (floats) or <NA> (integers), missing text is the empty string,
so that a csv cell left empty means the same in every column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from lvmppl.errors import InputError

TEXT: Final = "string"
INTEGER: Final = "Int64"
REAL: Final = "float64"

SCHEMAS: Mapping[str, Mapping[str, str]] = {
    "summary": {
        "fit": TEXT,
        "algorithm": TEXT,
        "guide": TEXT,
        "status": TEXT,
        "steps": INTEGER,
        "seconds": REAL,
        "log_evidence": REAL,
        "log_evidence_kind": TEXT,
        "log_evidence_error": REAL,
        "elbo": REAL,
        "elbo_error": REAL,
        "gap": REAL,
        "test_log_evidence": REAL,
        "test_elbo": REAL,
        "message": TEXT,
    },
    "history": {
        "fit": TEXT,
        "restart": INTEGER,
        "step": INTEGER,
        "seconds": REAL,
        "objective": REAL,
        "objective_kind": TEXT,
    },
    "parameters": {"fit": TEXT, "parameter": TEXT, "position": TEXT, "value": REAL},
    "posterior": {
        "fit": TEXT,
        "kind": TEXT,
        "site": TEXT,
        "datum": INTEGER,
        "position": TEXT,
        "state": INTEGER,
        "probability": REAL,
        "mean": REAL,
        "sd": REAL,
    },
    "gaps": {"fit": TEXT, "datum": INTEGER, "log_evidence": REAL, "elbo": REAL, "gap": REAL},
}

VOCABULARIES: Mapping[tuple[str, str], frozenset[str]] = {
    ("summary", "status"): frozenset({"converged", "max_steps", "diverged", "failed"}),
    ("summary", "log_evidence_kind"): frozenset({"exact", "quadrature", "lower_bound", "estimate", "none"}),
    ("posterior", "kind"): frozenset({"exact", "variational", "mcmc"}),
}

EXTENDABLE = frozenset(
    {"history", "gaps"}
)  # what an algorithm logs, and the parts of a gap, follow the contract's columns

# columns that follow the contract's where a run has them: what Markov chains say of their draws, and standard errors of
# θ where a fit was asked for them
OPTIONAL: Mapping[str, Mapping[str, str]] = {
    "summary": {"rhat": REAL, "ess": REAL, "divergences": INTEGER},
    "parameters": {"standard_error": REAL},
}

CSV_ROWS = 10**6

POINTS = 5000  # what a picture shows of a longer table


def empty(name: str) -> pd.DataFrame:
    """Table `name` with no rows."""
    return pd.DataFrame({column: pd.Series(dtype=dtype) for column, dtype in SCHEMAS[name].items()})


def validate(name: str, frame: pd.DataFrame) -> pd.DataFrame:
    """The frame as table `name` of the contract: its columns in order with their dtypes, rows numbered from
    0.

    `history` and `gaps` may have columns of their own, which follow, and any table those of `OPTIONAL`. Raises
    AssertionError, the caller being wrong, for an unknown table, missing, extra or repeated columns, values that
    are not of a column's dtype, and unknown words.
    """
    assert name in SCHEMAS, f"tables: expected one of {', '.join(SCHEMAS)}, got {name!r}"
    optional = {c: dtype for c, dtype in OPTIONAL.get(name, {}).items() if c in frame.columns}
    schema = {**SCHEMAS[name], **optional}
    assert frame.columns.is_unique, f"{name}: expected each column once, got {list(frame.columns)}"
    missing = [c for c in schema if c not in frame.columns]
    extra = [c for c in frame.columns if c not in schema]
    assert not missing, f"{name}: expected columns {list(schema)}, missing {missing}"
    assert not extra or name in EXTENDABLE, f"{name}: expected columns {list(schema)}, got {extra} besides"
    columns = {c: _as_dtype(name, c, frame[c], dtype) for c, dtype in schema.items()}
    result = pd.DataFrame({**columns, **{c: frame[c] for c in extra}}).reset_index(drop=True)
    for column in schema:
        words = VOCABULARIES.get((name, column))
        unknown = set(result[column].unique()) - words if words else set()
        assert not unknown, f"{name}.{column}: expected one of {sorted(words or ())}, got {sorted(unknown)}"
    return result


def _as_dtype(name: str, column: str, values: pd.Series, dtype: str) -> pd.Series:
    try:
        if dtype == TEXT:
            assert values.isna().all() or pd.api.types.infer_dtype(values, skipna=True) == "string", (
                "not all text"
            )
            return values.astype("string").fillna("")
        if dtype == REAL and pd.api.types.is_extension_array_dtype(values.dtype):
            return values.astype("Float64").astype(REAL)
        return values.astype(INTEGER) if dtype == INTEGER else values.astype(REAL)
    except (TypeError, ValueError, AssertionError) as error:
        raise AssertionError(
            f"{name}.{column}: expected {dtype} values, got {values.dtype}: {error}"
        ) from error


def write_tables(directory: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Writes the five tables: `.parquet` always, `.csv` up to 10⁶ rows (the summary at any length).

    A table that is not given is written without rows. Floats in the csv are the shortest text that reads
    back as the same number, so equal tables are equal bytes.
    """
    unknown = sorted(set(tables) - set(SCHEMAS))
    assert not unknown, f"tables: expected {', '.join(SCHEMAS)}, got {', '.join(unknown)}"
    directory.mkdir(parents=True, exist_ok=True)
    frames = {name: validate(name, tables[name]) if name in tables else empty(name) for name in SCHEMAS}
    for name, frame in frames.items():
        frame.to_parquet(directory / f"{name}.parquet", engine="pyarrow", index=False)
        csv = directory / f"{name}.csv"
        if len(frame) <= CSV_ROWS or name == "summary":
            frame.to_csv(csv, index=False, lineterminator="\n", encoding="utf-8")
        else:
            csv.unlink(missing_ok=True)  # an earlier, shorter run's would contradict the parquet


def read_tables(directory: Path, names: Iterable[str] = tuple(SCHEMAS)) -> dict[str, pd.DataFrame]:
    """The tables, all five unless named, that `write_tables` wrote there. Raises InputError where one is missing
    or is no such table.
    """
    return {name: _read(directory, name) for name in names}


def _read(directory: Path, name: str) -> pd.DataFrame:
    path = directory / f"{name}.parquet"
    if not path.is_file():
        what = "no such file" if directory.is_dir() else "no such folder"
        raise InputError(str(path), "a table of a finished run", what, "name the folder that a run wrote")
    try:
        return validate(name, pd.read_parquet(path, engine="pyarrow"))
    except (OSError, ValueError, AssertionError) as error:
        raise InputError(str(path), f"the {name} table", str(error), "run the experiment again") from error


def with_kinds(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary with columns `elbo_kind` and `gap_kind` after `elbo` and `gap`, in the words of `log_evidence_kind`.

    An ELBO is a `lower_bound`, or, averaged over draws, an `estimate` of one; then the gap is an estimate too, else it
    is what the log evidence is. `none` where there is no number.
    """
    drawn = summary["elbo_error"] > 0
    elbo = pd.Series("lower_bound", index=summary.index).mask(drawn, "estimate")
    gap = summary["log_evidence_kind"].mask(drawn, "estimate")
    result = summary.copy()
    for column, kind in (("elbo", elbo), ("gap", gap)):
        place = result.columns.get_loc(column)
        assert isinstance(place, int)
        known = kind.mask(summary[column].isna(), "none").astype("string")
        result.insert(place + 1, f"{column}_kind", known)
    return result


def worst_data(gaps: pd.DataFrame, fit: str, count: int = 5) -> pd.DataFrame:
    """The rows of `gaps` with the `count` largest gaps of a fit, largest first, equal gaps by datum."""
    rows = gaps[(gaps["fit"] == fit) & gaps["gap"].notna() & gaps["datum"].notna()]
    return rows.sort_values(["gap", "datum"], ascending=[False, True]).head(count).reset_index(drop=True)


def thin_out(
    posterior: pd.DataFrame, keep: Iterable[int] = (), limit: int = POINTS
) -> tuple[pd.DataFrame, str]:
    """At most about `limit` (datum, position) pairs of a site, the same ones in every fit and kind, and a
    sentence saying so.

    Whole data are drawn first (a seeded draw without replacement, besides those to `keep`), then positions
    if the data that are left have too many. Tables within the limit come back untouched, with an empty
    sentence.
    """
    data = np.sort(posterior["datum"].dropna().unique().astype(np.int64))
    kept = np.asarray(sorted(set(keep) & set(data.tolist())), dtype=np.int64)
    said = []
    if len(data) > limit:
        drawn = np.random.default_rng(0).choice(data, size=limit, replace=False)
        shown = np.union1d(drawn, kept)
        posterior = posterior[posterior["datum"].isna() | posterior["datum"].isin(shown)]
        said.append(f"{len(shown):,} of {len(data):,} data")
        data = shown
    places = [place for place in posterior["position"].unique() if place]
    room = max(1, limit // max(1, len(data)))
    if len(places) > room:
        chosen = np.random.default_rng(1).choice(len(places), size=room, replace=False)
        posterior = posterior[posterior["position"].isin(["", *(places[i] for i in np.sort(chosen))])]
        said.append(f"{room:,} of {len(places):,} positions")
    note = f"Shown are {' and '.join(said)}, drawn at random with a fixed seed." if said else ""
    return posterior, note


def nats(value: float, error: float = float("nan")) -> str:
    """A quantity in nats as people read it: `−180.1855`, `3.2e−7`, with an error `−181.23 ± 0.14`, `–` where
    unknown.
    """
    if np.isnan(value):
        return "–"
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    if np.isfinite(error) and error > 0:
        decimals = int(np.clip(1 - np.floor(np.log10(error)), 0, 12))
        return f"{value:,.{decimals}f} ± {error:.{decimals}f}".replace("-", "−")
    if abs(value) < 1e-12:  # what rounding leaves of nothing
        return "0.0000"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    decimals = int(np.clip(8 - len(str(int(abs(value)))), 0, 4))
    return f"{value:,.{decimals}f}".replace("-", "−")
