"""Three chains of four states over a hundred years of the Nile: two mean-field families against the exact posterior."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.datasets.nile as river

import lvmppl
from lvmppl.runner import Run

CHAINS, STATES = 3, 4


@pytest.fixture(scope="module")
def nile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return lvmppl.run("nile_factorial", out=tmp_path_factory.mktemp("nile") / "run")


def joint_chain() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The start model as one chain of 64 states, by hand: states [64, 3], transition [64, 64] and means [64]."""
    states = np.array(list(itertools.product(range(STATES), repeat=CHAINS)))
    move = np.where(np.eye(STATES, dtype=bool), 0.9, 0.1 / 3)
    transition = np.prod([move[np.ix_(states[:, i], states[:, i])] for i in range(CHAINS)], axis=0)
    means = sum((states[:, i] - 1.5) / 2.0**i for i in range(CHAINS))
    return states, transition, np.asarray(means)


def smoothed(x: np.ndarray) -> tuple[float, np.ndarray]:
    """log p(x) and p(z_t | x) [T, 64] by a forward and a backward pass over the joint states."""
    _, transition, means = joint_chain()
    likelihood = np.exp(-0.5 * ((x[:, None] - means) / 0.5) ** 2) / (0.5 * np.sqrt(2 * np.pi))
    forward, log_evidence, filtered = np.full(len(means), 1 / len(means)), 0.0, []
    for row in likelihood:
        joint = forward * row
        log_evidence += np.log(joint.sum())
        filtered.append(joint / joint.sum())
        forward = filtered[-1] @ transition
    backward, found = np.ones(len(means)), []
    for alpha, row in zip(filtered[::-1], likelihood[::-1], strict=True):
        found.append(alpha * backward / (alpha * backward).sum())
        backward = transition @ (row * backward)
        backward /= backward.sum()
    return log_evidence, np.array(found[::-1])


def test_structured_mean_field_beats_independent_steps_below_the_evidence_of_the_joint_chain(
    nile: Run,
) -> None:
    flow = river.load_pandas().data["volume"].to_numpy(dtype=float)
    evidence, posterior = smoothed((flow - flow.mean()) / flow.std())
    summary = nile.summary.set_index("fit")
    assert len(flow) == 100
    np.testing.assert_allclose(summary["log_evidence"], evidence, rtol=1e-10)
    elbo = summary["elbo"]
    assert elbo["steps"] + 1.0 < elbo["chains"] < evidence - 1.0
    np.testing.assert_allclose(summary["gap"], evidence - elbo, rtol=1e-7)
    states = joint_chain()[0]
    for chain in range(CHAINS):
        marginal = np.stack([posterior[:, states[:, chain] == k].sum(1) for k in range(STATES)], 1)
        rows = nile.posterior.query(f"fit == 'chains' and kind == 'exact' and site == 'z{chain}'")
        table = rows.assign(t=pd.to_numeric(rows["position"])).pivot(index="t", columns="state")[
            "probability"
        ]
        np.testing.assert_allclose(table.to_numpy(dtype=float), marginal, rtol=0, atol=1e-10)


def test_pictures_show_where_the_two_families_differ_from_the_exact_posterior(nile: Run) -> None:
    drawn = {path.stem for path in (Path(nile.directory) / "plots").glob("*.png")}
    expected = {f"responsibilities_{f}_z{i}" for f in ("chains", "steps") for i in range(CHAINS)}
    assert expected | {"distances", "gaps"} <= drawn
