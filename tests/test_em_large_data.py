"""EM on data of many pieces, from memory maps too: the same fit, and nothing of the size of data × states is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms import evidence
from lvmppl.algorithms.problem import build_problem
from lvmppl.algorithms.start import start_values
from lvmppl.density import isolated
from lvmppl.posteriors import DeferredPosterior, Posterior

ROWS = 2 * evidence.CHUNK + 531


def two_normals(x: Tensor) -> None:
    weights = pyro.param("weights", torch.tensor([0.3, 0.7]).double(), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([[-1.0, 0.0, 1.0], [1.0, 2.0, 0.0]]).double())
    variance = pyro.param("variance", torch.ones(2, 3).double(), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[z], variance[z].sqrt()).to_event(1), obs=x)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rng = np.random.default_rng(4)
    return rng.normal(size=(ROWS, 3)) + 2.5 * rng.integers(0, 2, (ROWS, 1))


def test_fit_of_a_memory_map_equals_fit_of_the_array(rows: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    one, two = (lvmppl.fit(two_normals, {"x": x}, algorithm="em", max_steps=4) for x in (rows, mapped))
    assert one.log_evidence == pytest.approx(two.log_evidence, rel=1e-14)
    for name, value in one.parameters.items():
        torch.testing.assert_close(two.parameters[name], value, rtol=1e-12, atol=0)


def test_posterior_of_a_large_fit_equals_the_exact_one_and_waits_until_asked(
    rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    whole = evidence._enumerated_posterior

    def counted(problem: Any, values: Any) -> Posterior:
        built.append(1)
        return whole(problem, values)

    monkeypatch.setattr(evidence, "_enumerated_posterior", counted)
    data = {"x": torch.as_tensor(rows)}
    fit = lvmppl.fit(two_normals, data, algorithm="em", max_steps=3)
    found = fit.posterior
    assert isinstance(found, DeferredPosterior) and not built
    assert found.log_evidence == fit.log_evidence
    exact = lvmppl.posterior(two_normals, data, parameters=fit.parameters)
    built.clear()
    torch.testing.assert_close(found.marginal("z").probs, exact.marginal("z").probs, rtol=1e-12, atol=0)
    assert found.engine == exact.engine and found.log_evidence == pytest.approx(exact.log_evidence, rel=1e-12)
    assert len(built) == 1
    assert not hasattr(found, "nonsense")
    assert copy.deepcopy(found).log_evidence == pytest.approx(exact.log_evidence, rel=1e-12)


def test_impossible_row_of_large_data_is_named() -> None:
    def symbols(x: Tensor) -> None:
        start = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]]).double()
        words = pyro.param("words", start, constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2).double()), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Categorical(words[z]), obs=x)

    x = torch.arange(ROWS).remainder(2)
    x[ROWS - 3] = 2
    with isolated(0, torch.float64):
        problem = build_problem("test", symbols, {"x": x})
        with pytest.warns(UserWarning, match=f"datum {ROWS - 3}"):
            found = evidence.deferred_posterior(problem, problem.initial)
    assert found.log_evidence == -torch.inf


def test_kmeans_start_on_some_rows_equals_the_start_on_all(
    rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters far apart have the same means whichever rows they are found on."""
    from lvmppl.algorithms import clusters
    from lvmppl.algorithms.m_step import plan_m_step

    x = torch.as_tensor(rows[:3000] + 50.0 * (np.arange(3000) % 3 == 0)[:, None])
    with isolated(0, torch.float64):
        problem = build_problem("test", two_normals, {"x": x})
        plan = plan_m_step(problem)
        every = start_values(problem, "kmeans", 0, 1, plan)
        monkeypatch.setattr(clusters, "_FEW", 400)
        some = start_values(problem, "kmeans", 0, 1, plan)
    order = every["weights"].argsort(), some["weights"].argsort()
    for name in ("weights", "loc", "variance"):
        torch.testing.assert_close(every[name][order[0]], some[name][order[1]], rtol=1e-9, atol=1e-9)
