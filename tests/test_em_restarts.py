"""Restarts in one tensor program: the same trajectories as one after the other, each with its own stopping and status."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from em_models import CASES
from sklearn.datasets import load_iris

import lvmppl
from lvmppl.algorithms import em
from lvmppl.algorithms.recorded import Recorded
from lvmppl.models.mixture import gaussian_mixture

TOGETHER = [
    "two_causes", "markov", "poisson_and_normal", "products_of_bernoullis", "nested_plates", "chain_of_normals",
    "partly_masked", "tied_precision_matrix", "shared_between_sites", "spelled_in_logarithms",
]  # fmt: skip


def both_ways(monkeypatch: pytest.MonkeyPatch, model: Any, data: Any, **options: Any) -> list[lvmppl.Fit]:
    """The fit with its restarts together, which must not have been given up, and one after the other."""
    alone: list[int] = []
    with monkeypatch.context() as patch:
        one = em._Run.restart
        patch.setattr(em._Run, "restart", lambda self, number: alone.append(number) or one(self, number))
        together = lvmppl.fit(model, data, algorithm="em", **options)
    assert not alone
    with monkeypatch.context() as patch:
        patch.setattr(em._Run, "together", lambda self: None)
        apart = lvmppl.fit(model, data, algorithm="em", **options)
    return [together, apart]


def sorted_history(fit: lvmppl.Fit) -> pd.DataFrame:
    return fit.all_history.sort_values(["restart", "step"]).reset_index(drop=True)


@pytest.mark.parametrize("name", TOGETHER)
def test_restarts_together_equal_restarts_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    options = {"restarts": 4, "max_steps": 15, "tolerance": 1e-4, "seed": 3}
    together, apart = both_ways(monkeypatch, case.model, case.data(), **options)
    one, two = sorted_history(together), sorted_history(apart)
    pd.testing.assert_frame_equal(one[["restart", "step"]], two[["restart", "step"]])
    np.testing.assert_allclose(one["objective"], two["objective"], rtol=1e-9)
    assert (together.restart, together.status, together.message) == (
        apart.restart,
        apart.status,
        apart.message,
    )
    for parameter, value in apart.parameters.items():
        torch.testing.assert_close(together.parameters[parameter], value, rtol=1e-8, atol=1e-9)


@pytest.fixture(scope="module")
def irises() -> dict[str, torch.Tensor]:
    return {"x": torch.as_tensor(load_iris().data)}


def test_restarts_stop_each_at_its_own_step(irises: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = functools.partial(gaussian_mixture, num_components=3, covariance="full")
    options = {"init": "kmeans", "restarts": 6, "max_steps": 90}
    repeated: list[bool] = []
    step = Recorded.__call__
    monkeypatch.setattr(
        Recorded, "__call__", lambda self, x: repeated.append((found := step(self, x)) is not None) or found
    )
    together, apart = both_ways(monkeypatch, model, irises, **options)
    assert sum(repeated) > 60  # of 90 steps: recorded once for each number of restarts, and repeated
    lengths = together.all_history.groupby("restart")["step"].max()
    assert lengths.tolist() == apart.all_history.groupby("restart")["step"].max().tolist()
    assert lengths.nunique() > 3  # they leave at different times
    assert (lengths == 90).any()  # some do not converge in time
    ends = [g["objective"].iloc[-1] for _, g in together.all_history.groupby("restart")]
    assert together.log_evidence == pytest.approx(max(ends), rel=1e-12)
    assert together.status == "converged"
