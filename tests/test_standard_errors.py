"""Standard errors from the observed information beside closed forms, statsmodels and automatic Hessians."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import statsmodels.api as sm
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import constraints

import lvmppl

ENUMERATE = {"enumerate": "parallel"}


def real(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def families(x: Tensor, flag: Tensor, kind: Tensor) -> None:
    loc, scale = pyro.param("loc", real(0.0)), pyro.param("scale", real(1.0), constraint=constraints.positive)
    chance = pyro.param("chance", real(0.5), constraint=constraints.unit_interval)
    shares = pyro.param("shares", torch.ones(3).double() / 3, constraint=constraints.simplex)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)
        pyro.sample("flag", dist.Bernoulli(chance), obs=flag)
        pyro.sample("kind", dist.Categorical(shares), obs=kind)


def rows(size: int = 41) -> dict[str, Tensor]:
    rng = np.random.default_rng(2)
    data = {
        "x": 100.0 + 3.0 * rng.normal(size=size),
        "flag": (rng.random(size) < 0.3).astype(float),
        "kind": rng.choice(3, size, p=[0.5, 0.3, 0.2]),
    }
    return {k: torch.as_tensor(v) for k, v in data.items()}


@pytest.mark.parametrize("algorithm", ["em", "enumeration"])
def test_standard_errors_of_exponential_families_equal_closed_forms(algorithm: str) -> None:
    data = rows()
    size = len(data["x"])
    fit = lvmppl.fit(families, data, algorithm=algorithm, tolerance=1e-14, standard_errors=True)
    scale, chance, shares = (fit.parameters[n].numpy() for n in ("scale", "chance", "shares"))
    expected = {
        "loc": scale / np.sqrt(size),
        "scale": scale / np.sqrt(2 * size),
        "chance": np.sqrt(chance * (1 - chance) / size),
        "shares": np.sqrt(shares * (1 - shares) / size),
    }
    tolerance = 1e-6 if algorithm == "em" else 1e-3
    for name, value in expected.items():
        np.testing.assert_allclose(fit.standard_errors[name], value, rtol=tolerance, err_msg=name)
    assert fit.message == ""


def test_standard_errors_of_a_poisson_regression_equal_statsmodels() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(60, 2))
    y = rng.poisson(np.exp(0.4 + x @ [0.7, -0.3])).astype(float)

    def model(x: Tensor, y: Tensor) -> None:
        slope, offset = pyro.param("slope", torch.zeros(2).double()), pyro.param("offset", real(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson((x @ slope + offset).exp()), obs=y)

    data = {"x": torch.as_tensor(x), "y": torch.as_tensor(y)}
    fit = lvmppl.fit(model, data, algorithm="enumeration", tolerance=1e-14, standard_errors=True)
    found = sm.GLM(y, sm.add_constant(x), family=sm.families.Poisson()).fit(tol=1e-12)
    ours = np.array([float(fit.standard_errors["offset"]), *fit.standard_errors["slope"].tolist()])
    np.testing.assert_allclose(ours, found.bse, rtol=1e-5)


def mixture(x: Tensor) -> None:
    weights = pyro.param("weights", torch.tensor([0.4, 0.6]).double(), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 2.0]).double())
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def test_standard_errors_of_a_mixture_equal_the_hessian_of_its_log_evidence() -> None:
    rng = np.random.default_rng(9)
    x = torch.as_tensor(np.concatenate([rng.normal(-1.5, 1, 30), rng.normal(2, 1, 50)]))
    fit = lvmppl.fit(mixture, {"x": x}, algorithm="em", tolerance=1e-14, max_steps=2000, standard_errors=True)

    def log_evidence(free: Tensor) -> Tensor:
        parts = [free[0].log(), (1 - free[0]).log()]
        joint = [p - 0.5 * (x - m) ** 2 for p, m in zip(parts, free[1:], strict=True)]
        return torch.logaddexp(*joint).sum()

    best = torch.cat([fit.parameters["weights"][:1], fit.parameters["loc"]])
    hessian = torch.autograd.functional.hessian(log_evidence, best)
    expected = torch.linalg.inv(-hessian).diagonal().sqrt().numpy()
    ours = torch.cat([fit.standard_errors["weights"], fit.standard_errors["loc"]]).numpy()
    np.testing.assert_allclose(ours, expected[[0, 0, 1, 2]], rtol=1e-5)


def test_standard_errors_beside_continuous_latents_equal_those_of_the_marginal() -> None:
    """x ~ N(level, spread² + 1) once z is integrated out."""

    def model(x: Tensor) -> None:
        level = pyro.param("level", real(0.0))
        spread = pyro.param("spread", real(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(level, spread))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.as_tensor(np.random.default_rng(3).normal(0.5, 2.0, 50))
    fit = lvmppl.fit(model, {"x": x}, algorithm="enumeration", tolerance=1e-15, standard_errors=True)
    spread, total = float(fit.parameters["spread"]), float(fit.parameters["spread"]) ** 2 + 1
    assert float(fit.standard_errors["level"]) == pytest.approx(np.sqrt(total / 50), rel=1e-4)
    expected = np.sqrt(2 * total**2 / 50) / (2 * spread)
    assert float(fit.standard_errors["spread"]) == pytest.approx(expected, rel=1e-3)


def test_standard_error_has_the_unit_of_the_data() -> None:
    x = rows()["x"]
    found = []
    for unit in (1.0, 1e6, 1e-6):

        def model(x: Tensor) -> None:
            loc = pyro.param("loc", x[0] * 0)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc, 3.0 * unit), obs=x)  # noqa: B023 (called at once)

        fit = lvmppl.fit(model, {"x": (x - x.mean()) * unit}, algorithm="em", standard_errors=True)
        found.append(float(fit.standard_errors["loc"]) / unit)
    np.testing.assert_allclose(found, 3.0 / np.sqrt(41), rtol=1e-6)


def test_entries_without_information_have_none_and_the_message_names_them() -> None:
    def model(x: Tensor, flag: Tensor) -> None:
        first, second = pyro.param("first", real(0.2)), pyro.param("second", real(0.3))
        logits = pyro.param("logits", torch.zeros(2).double())
        always = pyro.param("always", real(0.5), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(first + second, 1.0), obs=x)
            pyro.sample("flag", dist.Categorical(logits=logits), obs=flag)
            pyro.sample("same", dist.Bernoulli(always), obs=torch.ones_like(x))

    data = {"x": rows()["x"], "flag": rows()["flag"].long()}
    fit = lvmppl.fit(model, data, algorithm="em", tolerance=1e-13, standard_errors=True)
    assert all(bool(v.isnan().all()) for v in fit.standard_errors.values())
    for name in ("first", "second", "logits", "always"):
        assert f"no standard error for {name}: " in fit.message
    held = lvmppl.fit(
        model, data, algorithm="em", tolerance=1e-13, standard_errors=True, freeze=["second", "logits"]
    )
    assert float(held.standard_errors["first"]) == pytest.approx(1 / np.sqrt(41), rel=1e-6)
    assert bool(held.standard_errors["second"].isnan()) and "second" not in held.message


def test_standard_errors_are_a_column_of_parameters_on_request_only(tmp_path: Path) -> None:
    text = """
name: errors
data: {source: iris, columns: {x: [sepal_length, sepal_width]}}
model: {use: factor_analysis, args: {num_factors: 1}}
fits:
  with: {algorithm: enumeration, standard_errors: true, max_steps: 5}
  without: {algorithm: enumeration, max_steps: 5}
"""
    path = tmp_path / "errors.yaml"
    path.write_text(text, encoding="utf-8")
    run = lvmppl.run(path, out=tmp_path / "one")
    table = run.parameters
    assert list(table.columns) == ["fit", "parameter", "position", "value", "standard_error"]
    assert table.loc[table["fit"] == "without", "standard_error"].isna().all()
    loc = table[(table["fit"] == "with") & (table["parameter"] == "loc")]
    assert (loc["standard_error"] > 0).all()
    assert "standard_error" in pd.read_csv(tmp_path / "one" / "parameters.csv").columns
    path.write_text(text.replace("standard_errors: true, ", ""), encoding="utf-8")
    plain = lvmppl.run(path, out=tmp_path / "two")
    assert list(plain.parameters.columns) == ["fit", "parameter", "position", "value"]


def test_standard_errors_of_a_map_fit_are_those_of_the_log_posterior(tmp_path: Path) -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(real(0.0), 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 2.0), obs=x)

    x = torch.as_tensor(stats.norm(1, 2).rvs(19, random_state=1))
    fit = lvmppl.fit(model, {"x": x}, algorithm="em", standard_errors=True)
    assert float(fit.standard_errors["loc"]) == pytest.approx((19 / 4 + 4) ** -0.5, rel=1e-7)
    fit.save(tmp_path / "fit.safetensors")
    again = lvmppl.load_fit(tmp_path / "fit.safetensors")
    assert float(again.standard_errors["loc"]) == float(fit.standard_errors["loc"])
