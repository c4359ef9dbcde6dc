"""Restarts in one tensor program: the same trajectories as one after the other, each with its own stopping and status."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from em_models import CASES
from scipy.stats import chisquare
from sklearn.datasets import load_iris
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms import em, em_run
from lvmppl.algorithms.clusters import _spread
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
        one = em_run.Run.restart
        patch.setattr(em_run.Run, "restart", lambda self, number: alone.append(number) or one(self, number))
        together = lvmppl.fit(model, data, algorithm="em", **options)
    assert not alone
    with monkeypatch.context() as patch:
        patch.setattr(em, "_together", lambda run: None)
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
    options = {"init": "kmeans", "restarts": 8, "max_steps": 29}
    repeated: list[bool] = []
    step = Recorded.__call__
    monkeypatch.setattr(
        Recorded, "__call__", lambda self, x: repeated.append((found := step(self, x)) is not None) or found
    )
    together, apart = both_ways(monkeypatch, model, irises, **options)
    assert (
        sum(repeated) > 18
    )  # of 29 steps: recorded once, and repeated but while a covariance is near its floor
    lengths = together.all_history.groupby("restart")["step"].max()
    assert lengths.tolist() == apart.all_history.groupby("restart")["step"].max().tolist()
    assert lengths.nunique() > 3  # they leave at different times
    assert (lengths == 29).any()  # some do not converge in time
    ends = [g["objective"].iloc[-1] for _, g in together.all_history.groupby("restart")]
    assert together.log_evidence == pytest.approx(max(ends), rel=1e-12)
    assert together.status == "converged"


def test_first_means_are_the_best_of_two_drawn_in_proportion_to_squared_distance() -> None:
    """The first is any row; of two candidates j ~ ‖x_j − x_i‖² the one that leaves less is taken (K = 2: 2 + ⌊log 2⌋)."""
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [2.5, 2.5]], dtype=torch.float64)
    squared = torch.cdist(rows, rows).square()
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for i in range(4):
        chance = squared[i] / squared[i].sum()
        left = torch.minimum(squared[i], squared).sum(1)  # by the candidate
        for j, k in itertools.product(range(4), repeat=2):
            expected[i, j if left[j] <= left[k] else k] += chance[j] * chance[k] / 4
    generator, count = torch.Generator().manual_seed(0), 5000
    drawn = torch.stack([_spread(rows, 2, generator) for _ in range(count)])
    pair = (drawn.unsqueeze(-2) == rows).all(-1).long().argmax(-1)  # which rows they are
    seen, expected = torch.bincount(pair[:, 0] * 4 + pair[:, 1], minlength=16), expected.flatten()
    possible = expected > 0
    assert not seen[~possible].any()
    assert chisquare(seen[possible].numpy(), count * expected[possible].numpy()).pvalue > 1e-3


def test_random_starts_of_separated_clusters_end_where_the_true_labels_do() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(6).repeat(25)
    centres = 12.0 * torch.tensor([[0, 0], [1, 0], [0, 1], [3, 3], [3, 4], [-2, 3]], dtype=torch.float64)
    x = centres[labels] + torch.randn(150, 2, generator=generator, dtype=torch.float64)
    model = functools.partial(gaussian_mixture, num_components=6, covariance="diag")
    fit = lvmppl.fit(model, {"x": x}, algorithm="em", init="random", restarts=20, tolerance=1e-10, seed=4)
    own = [x[labels == k] for k in range(6)]
    # The clusters are 12 standard deviations apart: responsibilities are the labels, the M-step their moments.
    joint = torch.stack(
        [torch.distributions.Normal(r.mean(0), r.std(0, unbiased=False)).log_prob(x).sum(1) for r in own]
    )
    expected = float(torch.logsumexp(joint - math.log(6), 0).sum())
    ends = fit.all_history.groupby("restart")["objective"].last()
    assert fit.log_evidence == pytest.approx(expected, abs=1e-6)
    assert (abs(ends - expected) < 1e-6).sum() >= 15


def test_a_restart_at_a_floor_is_kept_only_if_all_are() -> None:
    def model(x: torch.Tensor) -> None:
        weights = pyro.param("weights", torch.full((2,), 0.5), constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        variance = pyro.param("variance", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[z], variance[z].sqrt()), obs=x)

    x = torch.tensor([2.0, 2.0, 2.0, -1.0, 0.5, -0.3, 0.9, -1.2], dtype=torch.float64)
    options = {"algorithm": "em", "init": "random", "max_steps": 2000}
    several = lvmppl.fit(model, {"x": x}, restarts=12, seed=0, **options)
    ends = several.all_history.groupby("restart")["objective"].last()
    collapsed = ends[ends > 0]  # three equal values alone: the density has no bound
    assert 0 < len(collapsed) < 12
    assert several.log_evidence == pytest.approx(ends[ends < 0].max(), abs=1e-9)
    assert several.parameters["variance"].min() > 0.1
    assert (
        f"restart {collapsed.idxmax()} ended higher ({collapsed.max():.4f}) with a variance at its floor"
        in several.message
    )
    two_values = lvmppl.fit(model, {"x": torch.tensor([0.0, 5.0]).double().repeat(4)}, restarts=3, **options)
    assert two_values.log_evidence > 0 and "held at its floor" in two_values.message
