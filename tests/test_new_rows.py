"""A fit serves rows it has not seen: encoders apply, tables are optimised, θ stays the same to the last bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from table_models import local_normal
from torch import Tensor

import lvmppl
from lvmppl.errors import InputError
from lvmppl.guides.categorical import categorical, categorical_encoder
from lvmppl.models.mixture import gaussian_mixture

mixture = functools.partial(gaussian_mixture, num_components=2)


def clusters(count: int, seed: int) -> Tensor:
    generator = np.random.default_rng(seed)
    return torch.tensor(generator.normal(0, 1, (count, 2)) + 3.0 * generator.integers(0, 2, (count, 1)) + 7.0)


def test_encoder_gives_rows_of_a_fit_their_own_bound_back_also_from_disk(tmp_path: Path) -> None:
    """What an encoder read off its training rows (their mean and spread) goes with the fit, not with the new rows."""
    x = clusters(40, 0)
    encoder = functools.partial(categorical_encoder, hidden=(5,))
    fit = lvmppl.fit(mixture, {"x": x}, "svi", guide=encoder, max_steps=30, batch_size=10)
    fit.save(tmp_path / "fit.safetensors")
    assert fit.elbo_per_datum is not None and fit.variational is not None
    for origin in (fit, lvmppl.load_fit(tmp_path / "fit.safetensors")):
        served = lvmppl.variational_posterior(mixture, {"x": x[5:12]}, origin, guide=encoder, seed=3)
        assert served.variational is not None
        torch.testing.assert_close(served.elbo_per_datum, fit.elbo_per_datum[5:12], rtol=1e-12, atol=0)
        torch.testing.assert_close(
            served.variational.probabilities("z"),
            fit.variational.probabilities("z")[5:12],
            rtol=1e-12,
            atol=1e-300,
        )
        for name, value in fit.parameters.items():
            assert torch.equal(served.parameters[name], value)
        for name, value in fit.guide_parameters.items():
            assert torch.equal(served.guide_parameters[name], value)


def test_table_of_new_rows_reaches_their_exact_posterior_at_the_fits_parameters() -> None:
    fit = lvmppl.fit(mixture, {"x": clusters(30, 0)}, "vem", guide=categorical, max_steps=20)
    new = clusters(7, 1)
    served = lvmppl.variational_posterior(mixture, {"x": new}, fit, guide=categorical)
    exact = lvmppl.posterior(mixture, {"x": new}, parameters=fit.parameters)
    assert served.variational is not None
    found = served.variational.probabilities("z")
    assert found.numpy() == pytest.approx(exact.marginal("z").probs.numpy(), abs=1e-3)  # type: ignore[attr-defined]
    assert served.log_evidence == pytest.approx(exact.log_evidence, rel=1e-12)
    assert served.elbo == pytest.approx(exact.log_evidence, abs=1e-2)
    for name, value in fit.parameters.items():
        assert torch.equal(served.parameters[name], value)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_autoguide_of_local_sites_is_optimised_for_new_rows(guide: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("lvmppl.algorithms.heldout._TEST_STEPS", 30)
    rows = torch.tensor(np.random.default_rng(0).normal(1.0, 1.1, 6))
    fit = lvmppl.fit(local_normal, {"x": rows}, "svi", guide=guide, max_steps=40, learning_rate=0.05)
    new = torch.tensor([4.0, -3.0, 0.5, 1.0, 2.0, 2.5], dtype=torch.float64)  # as many rows, but others
    served = lvmppl.variational_posterior(local_normal, {"x": new}, fit, guide=guide)
    mean = (float(fit.parameters["mean"]) + new / 0.25) / (1 + 1 / 0.25)
    if guide is AutoNormal:
        assert served.moments["z"][0].numpy() == pytest.approx(mean.numpy(), abs=0.15)
    assert served.log_evidence - 0.3 < served.elbo < served.log_evidence + 1e-6 + 4 * served.elbo_error


def test_test_rows_of_a_run_are_scored_under_an_autoguide(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lvmppl.algorithms.heldout._TEST_STEPS", 30)
    (tmp_path / "model.py").write_text(
        "import pyro, pyro.distributions as dist, torch\n"
        "def local(x):\n"
        "    mean = pyro.param('mean', torch.tensor(0.0))\n"
        "    with pyro.plate('data', len(x)):\n"
        "        z = pyro.sample('z', dist.Normal(mean, 1.0))\n"
        "        pyro.sample('x', dist.Normal(z, 0.5), obs=x)\n"
    )
    np.savetxt(tmp_path / "x.csv", np.random.default_rng(0).normal(1.0, 1.1, 20), header="x", comments="")
    (tmp_path / "e.yaml").write_text(
        "name: held-out\n"
        "data: {source: x.csv, columns: {x: x}, test_fraction: 0.3}\n"
        "model: {use: 'model.py:local'}\n"
        "fits:\n  auto: {algorithm: svi, guide: {use: auto_normal}, max_steps: 30}\n"
    )
    row = lvmppl.run(tmp_path / "e.yaml", out=tmp_path / "out").summary.iloc[0]
    assert row["test_log_evidence"] - 0.3 < row["test_elbo"] < row["test_log_evidence"] + 0.1


def test_guide_that_is_not_the_fits_is_refused() -> None:
    fit = lvmppl.fit(mixture, {"x": clusters(20, 0)}, "em", max_steps=2)
    with pytest.raises(InputError, match=r"guide parameter 'guide\..*expected a value in the fit"):
        lvmppl.variational_posterior(mixture, {"x": clusters(5, 1)}, fit, guide=categorical_encoder)
    small = functools.partial(categorical_encoder, hidden=(3,))
    fit = lvmppl.fit(mixture, {"x": clusters(20, 0)}, "svi", guide=small, max_steps=2)
    with pytest.raises(InputError, match="expected the fit's shape"):
        lvmppl.variational_posterior(mixture, {"x": clusters(5, 1)}, fit, guide=categorical_encoder)


@pytest.mark.parametrize("algorithm", ["svi", "vem"])
def test_guides_trained_against_a_frozen_fit_leave_its_parameters_to_the_last_bit(algorithm: str) -> None:
    x = clusters(24, 2)
    fit = lvmppl.fit(mixture, {"x": x}, "em", max_steps=5)
    names = list(fit.parameters)
    options: dict[str, Any] = {"start_from": fit, "freeze": names, "max_steps": 4, "batch_size": 6}
    for guide in (categorical, categorical_encoder):
        trained = lvmppl.fit(mixture, {"x": x}, algorithm, guide=guide, **options)
        for name in names:
            assert torch.equal(trained.parameters[name], fit.parameters[name])
        assert trained.log_evidence == fit.log_evidence
        assert trained.history["objective"].nunique() > 1
