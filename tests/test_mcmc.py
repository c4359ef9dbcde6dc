"""Draws by Hamiltonian Monte Carlo against closed forms, a grid and split R-hat written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms.mcmc import LogDensity, add_reference, infer
from lvmppl.algorithms.problem import build_problem
from lvmppl.compare import agreement
from lvmppl.density import isolated
from lvmppl.errors import InputError
from lvmppl.options import MCMCOptions
from lvmppl.sampled_posterior import SampledPosterior


def rows(count: int, columns: int = 0, seed: int = 0) -> Tensor:
    shape = (count, columns) if columns else (count,)
    return torch.tensor(np.random.default_rng(seed).normal(1.0, 1.5, shape))


def normal(x: Tensor) -> None:
    """Unknown mean of D features, known scales; θ is the scale of the prior."""
    spread = pyro.param("spread", torch.tensor(2.0), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, spread).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.5).to_event(1), obs=x)


def normal_posterior(x: Tensor, spread: float) -> tuple[Tensor, float]:
    precision = 1 / spread**2 + len(x) / 1.5**2
    return x.sum(0) / 1.5**2 / precision, precision**-0.5


def assert_within_errors(sampled: SampledPosterior, site: str, mean: Tensor, sd: Tensor) -> None:
    """Mean and sd within 4.5 Monte Carlo standard errors; deviations mix more slowly than the mean, as tails do."""
    found_mean, found_sd = sampled.moments(site)
    table = sampled.diagnostics[sampled.diagnostics["site"] == site]
    centre, spread = (torch.tensor(table[c].to_numpy()).reshape(mean.shape) for c in ("ess", "ess_tail"))
    assert bool((centre > 100).all())
    assert bool(((found_mean - mean).abs() < 4.5 * sd / centre.sqrt()).all())
    assert bool(((found_sd - sd).abs() < 4.5 * sd / (2 * spread).sqrt()).all())


def test_draws_of_a_conjugate_mean_have_the_posterior_moments_at_the_fits_own_parameters() -> None:
    x = rows(11, 3)
    origin = lvmppl.fit(normal, {"x": x}, "svi", guide=pyro.infer.autoguide.AutoNormal, max_steps=20)
    fit = lvmppl.fit(normal, {"x": x}, "mcmc", num_samples=400, warmup=100, chains=2, start_from=origin)
    assert float(origin.parameters["spread"]) != 2.0
    assert torch.equal(fit.parameters["spread"], origin.parameters["spread"])
    mean, sd = normal_posterior(x, float(fit.parameters["spread"]))
    assert fit.sampled is not None
    assert_within_errors(fit.sampled, "mu", mean, torch.full((3,), sd))
    assert fit.draws["mu"].shape == (2, 400, 3)
    assert fit.status == "converged"
    assert fit.log_evidence_kind == "exact"


def test_discrete_probabilities_equal_those_of_a_grid_over_the_continuous_site() -> None:
    x = torch.tensor([-1.5, 0.2, 0.6, 2.5, 1.1], dtype=torch.float64)

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.5, 0.7))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(torch.stack([-mu, mu])[z], 0.8), obs=x)

    fit = lvmppl.fit(model, {"x": x}, "mcmc", num_samples=500, warmup=200)
    grid = np.linspace(-4, 5, 4001)
    means = np.stack([-grid, grid])[:, None]  # [K, 1, G]
    terms = np.log([0.3, 0.7])[:, None, None] + stats.norm.logpdf(x.numpy()[None, :, None], means, 0.8)
    log_x = np.logaddexp(*terms)  # [N, G]
    weights = np.exp(stats.norm.logpdf(grid, 0.5, 0.7) + log_x.sum(0))
    evidence = np.log(weights.sum() * (grid[1] - grid[0]))
    weights /= weights.sum()
    expected = (np.exp(terms - log_x) @ weights).T  # [N, K]
    assert fit.sampled is not None
    assert fit.sampled.probabilities("z").numpy() == pytest.approx(expected, abs=0.02)
    assert fit.log_evidence_kind == "quadrature"  # the exact engine's
    assert fit.log_evidence == pytest.approx(evidence, abs=1e-6)
    mean, _ = fit.sampled.moments("mu")
    assert float(mean) == pytest.approx(float(grid @ weights), abs=0.05)


def test_potential_equals_the_density_in_unconstrained_coordinates() -> None:
    """Gamma by its log, Dirichlet by stick breaking: the Jacobian by finite differences of the map itself."""
    x = torch.tensor([2.0, 0.0, 3.0, 1.0], dtype=torch.float64)

    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
        weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.5, 2.0, 3.0])))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Poisson(rate * torch.tensor([0.5, 1.0, 3.0])[z]), obs=x)

    with isolated(0, torch.float64):
        problem = build_problem("fit", model, {"x": x})
        density = LogDensity(problem, problem.initial)
        u = {"rate": torch.tensor(0.4), "weights": torch.tensor([0.3, -0.7])}
        found = float(density.potential(u))
        points = density.points(u)
        to_simplex = density.transforms["weights"]
        jacobian = torch.autograd.functional.jacobian(lambda v: to_simplex(v)[:2], u["weights"])
    rate, weights = math.exp(0.4), points["weights"].numpy()
    log_x = np.log((weights * stats.poisson.pmf(x.numpy()[:, None], rate * np.array([0.5, 1.0, 3.0]))).sum(1))
    prior = stats.gamma.logpdf(rate, 2.0, scale=1 / 1.5) + stats.dirichlet.logpdf(weights, [1.5, 2.0, 3.0])
    volume = 0.4 + math.log(abs(np.linalg.det(jacobian.numpy())))
    assert -found == pytest.approx(prior + log_x.sum() + volume, abs=1e-10)


def test_draws_of_crossed_plates_stand_data_first_as_their_closed_form() -> None:
    """w [N, M, 2] in a plate of M around the data plate: every entry is conjugate on its own."""
    x = torch.tensor(np.random.default_rng(3).normal(0, 2, (5, 3, 2)))

    def model(x: Tensor) -> None:
        with pyro.plate("groups", 3), pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(w, 0.5).to_event(1), obs=x)

    fit = lvmppl.fit(model, {"x": x}, "mcmc", num_samples=250, warmup=100, data_plate="data")
    assert fit.draws["w"].shape == (1, 250, 5, 3, 2)
    assert fit.sampled is not None
    precision = 1 + 1 / 0.25
    assert_within_errors(fit.sampled, "w", x / 0.25 / precision, torch.full((5, 3, 2), precision**-0.5))
    frame = fit.sampled.to_frame()
    row = frame[(frame["datum"] == 4) & (frame["position"] == "1,0")]
    assert row["mean"].item() == pytest.approx(float(fit.draws["w"][0, :, 4, 1, 0].mean()))


def test_same_seed_gives_the_same_draws_and_chains_differ() -> None:
    x = rows(4, 2)

    def draws(seed: int) -> Tensor:
        return lvmppl.fit(normal, {"x": x}, "mcmc", num_samples=20, warmup=20, chains=2, seed=seed).draws[
            "mu"
        ]

    first = draws(5)
    assert torch.equal(first, draws(5))
    assert not torch.equal(first, draws(6))
    assert not torch.equal(first[0], first[1])


def test_history_holds_the_log_joint_of_every_draw() -> None:
    x = rows(4, 2)
    fit = lvmppl.fit(normal, {"x": x}, "mcmc", num_samples=12, warmup=9, chains=2)
    assert fit.steps == 21
    table = fit.all_history[fit.all_history["restart"] == 1]
    assert table["step"].tolist() == list(range(22))
    mu = fit.draws["mu"][1].numpy()  # [S, D]
    likelihood = stats.norm.logpdf(x.numpy(), mu[:, None], 1.5).sum((1, 2))
    expected = stats.norm.logpdf(mu, 0, 2).sum(1) + likelihood
    assert table["objective"].to_numpy()[10:] == pytest.approx(expected, abs=1e-9)
    assert set(table["objective_kind"]) == {"log_joint"}


def split_rhat(chains: np.ndarray) -> float:
    """Vehtari et al. (2021), equations 1–4, on halves of chains [C, S], ranks and folded ranks."""
    half = chains.shape[1] // 2
    split = np.concatenate([chains[:, :half], chains[:, -half:]])

    def rhat(values: np.ndarray) -> float:
        z = stats.norm.ppf((stats.rankdata(values).reshape(values.shape) - 3 / 8) / (values.size + 1 / 4))
        between = half * z.mean(1).var(ddof=1)
        within = z.var(1, ddof=1).mean()
        return float(np.sqrt((half - 1) / half + between / within / half))

    return max(rhat(split), rhat(np.abs(split - np.median(split))))


def test_rhat_equals_its_formula_and_a_single_chain_counts_as_its_halves() -> None:
    values = torch.tensor(np.random.default_rng(1).normal(0, 1, (3, 40, 2)).cumsum(1))
    several = SampledPosterior({"w": values}, {}, {"w": ()}, None).diagnostics["rhat"]
    for entry in range(2):
        assert several[entry] == pytest.approx(split_rhat(values[..., entry].numpy()), rel=1e-10)
    one = SampledPosterior({"w": values[:1]}, {}, {"w": ()}, None).diagnostics["rhat"]
    halves = values[0].reshape(2, 20, 2)
    assert one[1] == pytest.approx(split_rhat(halves[..., 1].numpy()), rel=1e-10)


def test_chains_in_different_modes_are_not_called_converged() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 4.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu.square(), 0.1), obs=x)

    x = torch.full((6,), 1.5, dtype=torch.float64)
    fit = lvmppl.fit(model, {"x": x}, "mcmc", num_samples=40, warmup=40, chains=4)
    assert fit.status == "max_steps"
    assert "warning: R-hat is above 1.01" in fit.message
    assert fit.sampled is not None and fit.sampled.rhat > 1.5


def test_divergent_transitions_are_counted_and_said() -> None:
    def funnel(x: Tensor) -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        w = pyro.sample("w", dist.Normal(0.0, (v / 2).exp()).expand([9]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w.sum(), 100.0), obs=x)

    fit = lvmppl.fit(funnel, {"x": rows(3)}, "mcmc", num_samples=100, warmup=60)
    assert fit.sampled is not None
    count = fit.sampled.divergences
    assert count > 0
    assert fit.status == "max_steps"
    assert f"warning: {count} divergent transition" in fit.message


def test_good_draws_are_trusted_unless_one_diverged() -> None:
    values = {"w": torch.tensor(np.random.default_rng(2).normal(0, 1, (4, 400)))}
    assert SampledPosterior(values, {}, {"w": ()}, None).trustworthy
    assert not SampledPosterior(values, {}, {"w": ()}, None, divergences=1).trustworthy


def discrete_only(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z.to(x.dtype), 1.0), obs=x)


def counts(x: Tensor) -> None:
    k = pyro.sample("k", dist.Poisson(3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def point(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Delta(torch.tensor(1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (discrete_only, "a model with continuous latent sites, got discrete ones only"),
        (counts, r"discrete sites that are enumerated, got k \(Poisson\)"),
        (point, r"latent sites with a density, got mu \(Delta\)"),
    ],
)
def test_model_without_continuous_densities_is_refused(model: Any, words: str) -> None:
    with pytest.raises(InputError, match=f"algorithm mcmc: expected {words}"):
        lvmppl.fit(model, {"x": rows(4)}, "mcmc")


def test_draws_come_back_from_disk(tmp_path: Path) -> None:
    fit = lvmppl.fit(normal, {"x": rows(4, 2)}, "mcmc", num_samples=20, warmup=10, chains=2)
    fit.save(tmp_path / "fit.safetensors")
    again = lvmppl.load_fit(tmp_path / "fit.safetensors")
    assert torch.equal(again.draws["mu"], fit.draws["mu"])
    assert again.sampled is not None and fit.sampled is not None
    pd.testing.assert_frame_equal(again.sampled.to_frame(), fit.sampled.to_frame())
    assert again.sampled.verdict == fit.sampled.verdict


# ------------------------------------------------------------------------------------------ reference of a run

MODEL = """
import pyro, pyro.distributions as dist, torch

def robust(x):
    spread = pyro.param("spread", torch.tensor(1.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    with pyro.plate("data", len(x)):
        w = pyro.sample("w", dist.Normal(0.0, 0.5))
        pyro.sample("x", dist.StudentT(5.0, mu.sum() + w, spread.exp()), obs=x)
"""
EXPERIMENT = """
name: referenced
data: {source: x.csv, columns: {x: x}}
model: {use: "model.py:robust"}
fits:
  one: {algorithm: svi, guide: {use: auto_normal}, max_steps: 60, learning_rate: 0.05}
  held: {algorithm: svi, guide: {use: auto_normal}, max_steps: 10, start_from: one, freeze: [spread]}
reference: {algorithm: mcmc, num_samples: 60, warmup: 40}
"""


@pytest.fixture(scope="module")
def referenced(tmp_path_factory: pytest.TempPathFactory) -> lvmppl.Run:
    folder = tmp_path_factory.mktemp("referenced")
    (folder / "model.py").write_text(MODEL)
    (folder / "e.yaml").write_text(EXPERIMENT)
    pd.DataFrame({"x": rows(6).numpy()}).to_csv(folder / "x.csv", index=False)
    return lvmppl.run(folder / "e.yaml", out=folder / "out")


def test_reference_stands_at_the_fits_own_parameters() -> None:
    x = rows(2, 2)
    with isolated(0, torch.float64):
        problem = build_problem("fit", normal, {"x": x})
        start = infer(problem, MCMCOptions(num_samples=1, warmup=0))
        moved = replace(start, sampled=None, parameters={"spread": torch.tensor(0.2)})
        found = add_reference(problem, moved, MCMCOptions(num_samples=300, warmup=100))
    assert found.sampled is not None
    mean, sd = normal_posterior(x, 0.2)
    assert_within_errors(found.sampled, "mu", mean, torch.full((2,), sd))


def test_reference_is_shared_by_fits_of_equal_parameters(
    referenced: lvmppl.Run,
) -> None:
    one, held = referenced.fits["one"], referenced.fits["held"]
    assert torch.equal(one.parameters["spread"], held.parameters["spread"])
    assert one.sampled is held.sampled and one.sampled is not None
    table = referenced.posterior[
        (referenced.posterior["fit"] == "held") & (referenced.posterior["kind"] == "mcmc")
    ]
    assert table["site"].value_counts().to_dict() == {"mu": 4, "w": 6}
    assert table.loc[table["site"] == "w", "datum"].tolist() == list(range(6))
    summary = referenced.summary.set_index("fit")
    assert summary.loc["held", "rhat"] == held.sampled.rhat
    assert summary.loc["held", "log_evidence_kind"] == "none"
    assert "reference: R-hat" in summary.loc["held", "message"]
    assert (referenced.directory / "plots" / "moments_held_w.png").exists()


def test_mean_error_of_a_datum_is_its_distance_in_reference_deviations(referenced: lvmppl.Run) -> None:
    table = referenced.posterior[
        (referenced.posterior["fit"] == "one") & (referenced.posterior["site"] == "w")
    ]
    q, p = (table[table["kind"] == kind].set_index("datum") for kind in ("variational", "mcmc"))
    expected = ((q["mean"] - p["mean"]).abs() / p["sd"]).to_numpy(dtype=float)
    gaps = referenced.gaps[referenced.gaps["fit"] == "one"]
    assert gaps["mean_error"].to_numpy(dtype=float) == pytest.approx(expected, rel=1e-9)
    ratios = agreement(referenced.fits["one"])
    ratio = ratios.loc[ratios["site"] == "w", "sd_ratio"].to_numpy(dtype=float)
    assert ratio == pytest.approx((q["sd"] / p["sd"]).to_numpy(dtype=float), rel=1e-9)


def test_support_that_moves_with_another_site_is_refused() -> None:
    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Gamma(torch.tensor(3.0), torch.tensor(1.0)))
        z = pyro.sample("z", dist.Uniform(torch.tensor(0.0), a))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(InputError, match="z, whose support moves"):
        lvmppl.fit(model, {"x": rows(4)}, "mcmc", num_samples=5, warmup=5)
