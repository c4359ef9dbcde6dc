"""`compile`: what runs the model in every step is the reference for tables and recordings; what cannot do so says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from em_models import CASES
from test_expectation import X, mixture, plain
from torch import Tensor

import lvmppl
from lvmppl.algorithms.recorded import Recorded
from lvmppl.density import isolated
from lvmppl.errors import InputError
from lvmppl.guides.variational import variational

EM = [
    "two_causes", "markov", "poisson_and_normal", "products_of_bernoullis", "nested_plates", "chain_of_normals",
    "partly_masked", "tied_precision_matrix", "shared_between_sites", "spelled_in_logarithms",
]  # fmt: skip


class Counted:
    """A model, and how often it has run."""

    def __init__(self, model: Any) -> None:
        self.model, self.runs = model, 0

    def __call__(self, **data: Tensor) -> None:
        self.runs += 1
        self.model(**data)


def fitted(model: Any, data: Any, algorithm: str, **options: Any) -> tuple[lvmppl.Fit, int]:
    counted = Counted(model)
    with isolated(0, torch.float64):
        return lvmppl.fit(counted, data, algorithm=algorithm, seed=2, **options), counted.runs


def assert_same(one: lvmppl.Fit, two: lvmppl.Fit, rtol: float = 1e-9) -> None:
    order = ["restart", "step"]
    first, second = (f.all_history.sort_values(order).reset_index(drop=True) for f in (one, two))
    assert first[order].equals(second[order])
    np.testing.assert_allclose(first["objective"], second["objective"], rtol=rtol)
    for name, value in two.parameters.items():
        torch.testing.assert_close(one.parameters[name], value, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("name", EM)
def test_em_in_tables_equals_em_that_runs_the_model(name: str, restarts: int) -> None:
    case = CASES[name]
    options = {"restarts": restarts, "max_steps": 12, "tolerance": 0}
    by_running, runs = fitted(case.model, case.data(), "em", compile="never", **options)
    in_tables, fewer = fitted(case.model, case.data(), "em", compile="always", **options)
    assert_same(in_tables, by_running)
    assert runs >= fewer + 9 * restarts  # of 13 E-steps each; tables are looked at now and then
    assert by_running.compiled == "run the model (compile: never)"
    assert in_tables.compiled == "are made from tables"


def test_steps_are_recorded_whatever_their_size_if_always_and_if_never_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = [0]
    begin = Recorded.__init__

    def counted(self: Recorded, *args: Any) -> None:
        made[0] += 1
        begin(self, *args)

    monkeypatch.setattr(Recorded, "__init__", counted)
    case = CASES["two_causes"]
    for size, compile, expected in [(0, "auto", 0), (0, "always", 1), (None, "auto", 1), (None, "never", 0)]:
        made[0] = 0
        with monkeypatch.context() as patch:
            if size is not None:
                patch.setattr("lvmppl.algorithms.batched_step.SMALL", size)
            fitted(case.model, case.data(), "em", compile=compile, restarts=3, max_steps=4, tolerance=0)
        assert made[0] == expected


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("neural_emission", "by gradient of hidden, head"),
        ("also_in_a_factor", "by gradient of"),
        ("mixture_of_regressions", "least squares on computed locations"),
        ("clamped_in_one_place", "by gradient of"),
        ("chosen_by_the_data", "differ by row"),
    ],
)
def test_always_says_what_keeps_em_from_tables(name: str, why: str) -> None:
    case = CASES[name]
    with pytest.raises(
        InputError,
        match=f"fit '.*': compile: expected auto or never, got always; its steps must run the model function: .*{why}",
    ):
        fitted(case.model, case.data(), "em", compile="always", max_steps=30, tolerance=0)
    fit, _ = fitted(case.model, case.data(), "em", max_steps=3)
    assert fit.compiled.startswith("run the model (")


@pytest.mark.parametrize("compile", ["auto", "always"])
def test_recorded_vem_equals_vem_that_runs_the_model(compile: str) -> None:
    options = {"guide": variational, "max_steps": 12, "tolerance": 0, "restarts": 2}
    by_running, runs = fitted(mixture(plain), {"x": X}, "vem", compile="never", **options)
    recorded, fewer = fitted(mixture(plain), {"x": X}, "vem", compile=compile, **options)
    assert_same(recorded, by_running)
    assert recorded.elbo == pytest.approx(by_running.elbo, rel=1e-10)
    for name, value in by_running.guide_parameters.items():
        torch.testing.assert_close(recorded.guide_parameters[name], value, rtol=1e-7, atol=1e-8)
    assert runs >= fewer + 30
    assert by_running.compiled == "run the model for E_q log p"
    assert recorded.compiled == "repeat recorded E_q log p"


def test_always_is_refused_where_nothing_is_recorded() -> None:
    case = CASES["two_causes"]
    with pytest.raises(
        InputError, match="must run the model function: q has no continuous site with a closed form"
    ):
        fitted(case.model, case.data(), "vem", compile="always", guide=variational, max_steps=2)


@pytest.mark.parametrize("algorithm", ["enumeration", "svi", "mcmc"])
def test_always_says_where_nothing_is_recorded(algorithm: str) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    options: dict[str, Any] = {"num_samples": 8, "warmup": 8} if algorithm == "mcmc" else {"max_steps": 2}
    if algorithm == "svi":
        options["guide"] = variational
    for compile, told in (("always", True), ("auto", False)):
        fit = lvmppl.fit(model, {"x": X}, algorithm=algorithm, compile=compile, **options)
        assert (f"{algorithm} runs the model in every step" in fit.message) == told
