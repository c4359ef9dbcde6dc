"""Runs of guided fits as a user sees them: rows of the posterior, scores of held-out rows, what fails and what stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import lvmppl

MODEL = """
import pyro, torch
import pyro.distributions as dist
from torch.distributions import constraints


def mixed(x):
    # w has as many entries as there are training rows, and is global
    w = pyro.sample("w", dist.Normal(torch.zeros(12), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
        y = pyro.sample("y", dist.Normal(torch.tensor([-1.0, 1.0])[a], 1.0))
        pyro.sample("x", dist.Normal(y + 0.0 * w.sum(), 0.5), obs=x)


def structured(x):
    pyro.sample("w", dist.Normal(pyro.param("m", torch.zeros(12)), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("y", dist.Normal(x + a, 0.5))


def normal(x):
    mean = pyro.param("mean", torch.zeros(()))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def few_rows_only(x):
    assert len(x) != 3, "three rows are too few"
    normal(x)
"""


def experiment(folder: Path, model: str, fits: str, test: float = 0.0) -> Path:
    """An experiment on twelve training rows."""
    (folder / "own.py").write_text(MODEL)
    rows = round(12 / (1 - test))
    np.save(folder / "x.npy", np.random.default_rng(0).normal(1.0, 1.1, rows))
    path = folder / "own.yaml"
    path.write_text(
        f"name: own\nseed: 1\ndtype: float64\ndata: {{source: x.npy, columns: {{x: '0'}}, test_fraction: {test}}}\n"
        f'model: {{use: "own.py:{model}"}}\nfits:\n{fits}'
    )
    return path


def test_posterior_rows_of_drawn_sites_number_the_data_of_local_ones_alone(tmp_path: Path) -> None:
    fits = '  q: {algorithm: svi, guide: {use: "own.py:structured"}, max_steps: 2}\n'
    rows = lvmppl.run(experiment(tmp_path, "mixed", fits), tmp_path / "out").posterior
    rows = rows[rows["kind"] == "variational"]
    y, w = rows[rows["site"] == "y"], rows[rows["site"] == "w"]
    assert y["datum"].tolist() == list(range(12)) and (y["position"] == "").all()
    assert w["datum"].isna().all() and w["position"].tolist() == [str(i) for i in range(12)]


def test_scores_of_held_out_rows_that_fail_leave_the_fit_and_the_others(tmp_path: Path) -> None:
    fits = "  q: {algorithm: svi, guide: {use: variational}, max_steps: 3}\n"
    run = lvmppl.run(experiment(tmp_path, "few_rows_only", fits, 0.2), tmp_path / "out")
    row = run.summary.iloc[0]
    assert row["status"] == "max_steps" and np.isfinite(row["elbo"]) and np.isnan(row["test_elbo"])
    assert "held-out rows not scored" in row["message"] and "three rows are too few" in row["message"]
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("guide", ["auto_normal", "variational"])
def test_table_of_a_guide_on_held_out_rows_reaches_their_log_evidence(tmp_path: Path, guide: str) -> None:
    """q holds the posterior of z ~ N(mean, 1), x ~ N(z, ½): λ of the held-out rows is optimised at the fit's θ."""
    fits = f"  q: {{algorithm: svi, guide: {{use: {guide}}}, max_steps: 20}}\n"
    run = lvmppl.run(experiment(tmp_path, "normal", fits, 0.2), tmp_path / "out")
    row, rows = run.summary.iloc[0], np.load(tmp_path / "x.npy")
    assert row["message"] == ""
    mean = run.fits["q"].parameters["mean"].double()
    everything = torch.distributions.Normal(mean, 1.25**0.5).log_prob(torch.from_numpy(rows)).sum()
    assert row["log_evidence"] + row["test_log_evidence"] == pytest.approx(float(everything), rel=1e-9)
    assert row["test_elbo"] == pytest.approx(row["test_log_evidence"], abs=0.1)
