"""A run's folder: the same twice, right numbers in its tables, held-out rows scored, nothing lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_iris
from sklearn.mixture import GaussianMixture

import lvmppl
from lvmppl.errors import InputError

SHORT = ("fits.amortized.max_steps=60", "fits.local.max_steps=8", "fits.em.restarts=1")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> lvmppl.Run:
    return lvmppl.run("iris_mixture", tmp_path_factory.mktemp("runs") / "first", SHORT)


def test_same_file_and_seed_gives_the_same_csv_byte_for_byte(first: lvmppl.Run, tmp_path: Path) -> None:
    second = lvmppl.run("iris_mixture", tmp_path / "second", SHORT)
    for name in ("parameters", "posterior", "gaps"):
        a, b = ((r.directory / f"{name}.csv").read_bytes() for r in (first, second))
        assert a == b, name
        assert len(a) > 1000
    for name in ("summary", "history"):
        a, b = (
            pd.read_csv(r.directory / f"{name}.csv", dtype=str).drop(columns="seconds")
            for r in (first, second)
        )
        pd.testing.assert_frame_equal(a, b)


def test_another_seed_gives_another_stochastic_fit(first: lvmppl.Run, tmp_path: Path) -> None:
    other = lvmppl.run("iris_mixture", tmp_path / "other", (*SHORT, "seed=1"))
    elbo = [r.summary.set_index("fit").loc["amortized", "elbo"] for r in (first, other)]
    assert elbo[0] != elbo[1]


def test_exact_fits_reach_what_sklearn_reaches(first: lvmppl.Run) -> None:
    rows = load_iris().data
    mixture = GaussianMixture(3, reg_covar=0, n_init=10, tol=1e-9, max_iter=1000, random_state=0).fit(rows)
    summary = first.summary.set_index("fit")
    for fit in ("em", "gradient"):
        assert summary.loc[fit, "log_evidence"] == pytest.approx(mixture.score(rows) * 150, abs=0.01)
        assert summary.loc[fit, "log_evidence"] == pytest.approx(-180.1855, abs=0.01)
        assert summary.loc[fit, "log_evidence_kind"] == "exact"
        assert summary.loc[fit, "status"] == "converged"


@pytest.mark.parametrize("fit", ["local", "amortized"])
def test_elbo_plus_kl_of_the_posterior_table_is_the_log_evidence(first: lvmppl.Run, fit: str) -> None:
    table = first.posterior[first.posterior["fit"] == fit]
    wide = {
        kind: rows.pivot(index="datum", columns="state", values="probability").to_numpy(dtype=float)
        for kind, rows in table.groupby("kind")
    }
    q, p = wide["variational"], wide["exact"]
    kl = np.where(q > 0, q * (np.log(np.maximum(q, 1e-300)) - np.log(p)), 0.0).sum(1)
    gaps = first.gaps[first.gaps["fit"] == fit].set_index("datum")
    np.testing.assert_allclose(gaps["elbo"] + kl, gaps["log_evidence"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(gaps["gap"], kl, rtol=1e-7, atol=1e-9)
    row = first.summary.set_index("fit").loc[fit]
    assert row["elbo"] + row["gap"] == pytest.approx(row["log_evidence"], abs=1e-6)
    assert (kl.max() > 1e-4) == (fit == "amortized")  # a table holds the posterior, and closed forms find it


def test_history_has_a_row_for_the_start_and_each_step(first: lvmppl.Run) -> None:
    history = first.history
    assert history[history["fit"] == "amortized"]["step"].tolist() == list(range(61))
    for (_, _), rows in history.groupby(["fit", "restart"]):
        assert rows["step"].tolist() == list(range(len(rows)))
    kinds = history.groupby("fit")["objective_kind"].unique().map(list).to_dict()
    assert kinds == {
        "em": ["log_evidence"],
        "gradient": ["log_evidence"],
        "local": ["elbo"],
        "amortized": ["elbo"],
    }


def test_folder_holds_what_the_contract_lists(first: lvmppl.Run) -> None:
    names = {p.name for p in first.directory.iterdir()}
    tables = {
        f"{t}.{end}"
        for t in ("summary", "history", "parameters", "posterior", "gaps")
        for end in ("csv", "parquet")
    }
    assert names == tables | {"experiment.yaml", "environment.json", "report.html", "plots"} | {
        "data.json",
        "data.parquet",
    }
    assert len(list((first.directory / "plots").glob("*.png"))) >= 4


def test_held_out_rows_are_scored_at_the_fits_own_parameters(tmp_path: Path) -> None:
    run = lvmppl.run(
        "iris_mixture",
        tmp_path / "run",
        (*SHORT, "data.test_fraction=0.2", "fits.local.guide.use=categorical"),
    )
    summary = run.summary.set_index("fit")
    rows = load_iris().data
    train = run.posterior[(run.posterior["fit"] == "em")]["datum"].nunique()
    assert train == 120
    for fit in run.fits:
        assert np.isfinite(summary.loc[fit, "test_log_evidence"])
    for fit in ("local", "amortized"):
        assert summary.loc[fit, "test_elbo"] < summary.loc[fit, "test_log_evidence"] + 1e-9
    # λ of the held-out rows is optimised, so a table's bound is tight there whatever it was in training
    local = summary.loc["local"]
    assert local["test_log_evidence"] - local["test_elbo"] < 0.5
    theta = run.fits["em"].parameters
    everything = lvmppl.posterior(_iris_model(), {"x": np.asarray(rows)}, parameters=theta)
    total = summary.loc["em", "log_evidence"] + summary.loc["em", "test_log_evidence"]
    assert everything.log_evidence == pytest.approx(total, rel=1e-9)


def _iris_model():  # type: ignore[no-untyped-def]
    import functools

    from lvmppl.models.mixture import gaussian_mixture

    return functools.partial(gaussian_mixture, num_components=3)


def test_run_of_an_earlier_run_is_replaced_and_a_foreign_folder_is_not(
    first: lvmppl.Run, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="a folder with other files"):
        lvmppl.run("iris_mixture", foreign, smoke=True)
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    again = lvmppl.run("iris_mixture", tmp_path / "again", smoke=True)
    before = (again.directory / "summary.csv").read_text()
    lvmppl.run("iris_mixture", tmp_path / "again", ("fits.em.restarts=2", "seed=3"), smoke=True)
    assert (again.directory / "summary.csv").read_text() != before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
