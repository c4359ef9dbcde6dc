"""How far a sum of concave terms may rise between two points of a scan, and when a scan overlooks no mode of it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

import lvmppl
from lvmppl.exact import modes, single_modes
from lvmppl.exact.secants import Bounds, secant_bounds, sees_all

ENUMERATE = {"enumerate": "parallel"}
Z = torch.linspace(-3.0, 3.0, 41, dtype=torch.float64).sinh()  # spacing grows from the origin


def concave_terms(z: Tensor, narrowest: float, seed: int) -> Tensor:
    """f_jk(z) [*z, J, K]: Laplace densities, Gaussians and logistic likelihoods of random places and widths."""
    generator = torch.Generator().manual_seed(seed)
    place = 4.0 * torch.randn(5, 3, generator=generator, dtype=torch.float64)
    width = narrowest + torch.rand(5, 3, generator=generator, dtype=torch.float64)
    u = (z[..., None, None] - place) / width
    kinds = torch.stack([-u.abs(), -0.5 * u.square(), torch.nn.functional.logsigmoid(u)])
    which = torch.randint(3, (1, 5, 3), generator=generator)
    return torch.gather(kinds.expand(3, *u.shape), 0, which.expand(1, *u.shape))[0] - width.log()


def log_density(z: Tensor, narrowest: float, seed: int) -> Tensor:
    return concave_terms(z, narrowest, seed).logsumexp(-1).sum(-1)


def bounds_of(narrowest: float, seed: int) -> Bounds:
    found = secant_bounds(concave_terms(Z, narrowest, seed), Z.diff().view(-1, 1, 1))
    return Bounds(found.rise.amax(-1).sum(-1), found.least.amin(-1).sum(-1), found.steepest.amax(-1).sum(-1))


@pytest.mark.parametrize("narrowest", [0.3, 0.003])
def test_bound_of_the_rise_between_points_covers_that_on_a_fine_grid(narrowest: float) -> None:
    """And is no more than what the narrowest terms may rise, 41 points of a scan against 400 between any two."""
    shares = torch.linspace(0, 1, 401, dtype=torch.float64)
    for seed in range(40):
        values, found = log_density(Z, narrowest, seed), bounds_of(narrowest, seed)
        fine = log_density(Z[:-1, None] + Z.diff()[:, None] * shares, narrowest, seed)
        rise = fine.amax(1) - torch.maximum(values[1:], values[:-1])
        assert found.rise[[0, -1]].isinf().all() and found.rise[1:-1].isfinite().all()
        assert (rise[1:-1] <= found.rise[1:-1] + 1e-9).all()
        slope = fine.diff(dim=1) / (Z.diff()[:, None] / 400)
        mean = slope.mean(1)
        assert (found.least - 1e-6 <= mean).all() and (mean <= found.steepest + 1e-6).all()


def test_bound_of_the_rise_of_a_parabola_is_half_its_curvature_times_the_spacing_squared() -> None:
    """Of −z²/2 it is h²/2 at spacing h, four times the true rise above the chord."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    rise = secant_bounds(-0.5 * z.square(), z.diff()).rise
    np.testing.assert_allclose(rise[1:-1], 0.5**2 / 2, rtol=1e-7)


def test_rise_of_a_term_that_is_not_concave_has_no_bound() -> None:
    """A narrow Student t shows by its tails, wherever the points are."""
    values = torch.as_tensor(stats.t.logpdf(Z.numpy(), 3, 0.77, 1e-4))
    assert secant_bounds(values, Z.diff()).rise.isinf().all()


def seen(terms: Tensor, z: Tensor) -> bool:
    """Of f_k(z) [S, K], one state each."""
    found = secant_bounds(terms, z.diff().unsqueeze(-1))
    bounds = Bounds(
        found.rise.amax(-1)[:, None], found.least.amin(-1)[:, None], found.steepest.amax(-1)[:, None]
    )
    return bool(sees_all(terms.logsumexp(-1, keepdim=True), bounds))


@pytest.mark.parametrize(
    ("place", "width", "sure"), [(0.7, 0.8, True), (2.1, 0.005, False), (150.0, 0.9, False)]
)
def test_scan_overlooks_a_label_that_is_narrow_or_beyond_its_end_and_no_other(
    place: float, width: float, sure: bool
) -> None:
    """Beside a label at 0 of width 1, of which the scan has 257 points to a distance of 70."""
    z = 2.0 * torch.linspace(-4.25, 4.25, 257, dtype=torch.float64).sinh()
    labels = [stats.norm.logpdf(z.numpy(), 0.0, 1.0), stats.norm.logpdf(z.numpy(), place, width)]
    assert seen(torch.as_tensor(np.stack(labels, -1)), z) == sure


def guessing(y: Tensor, weight: float = 1.0, narrow: float = 0.0) -> None:
    """ability_n ~ N(0.3, 1.2²); y_nj by guessing (a half, and right with 0.8) or by ability; a label of its own besides."""
    with pyro.plate("data", len(y), dim=-2):
        ability = pyro.sample("ability", dist.Normal(y.new_tensor(0.3), 1.2))
        with pyro.plate("items", y.shape[1], dim=-1), poutine.scale(scale=weight):
            guess = pyro.sample("guess", dist.Bernoulli(y.new_tensor(0.5)), infer=ENUMERATE)
            right = torch.where(guess > 0, 0.8, torch.sigmoid(ability - torch.arange(y.shape[1]).to(y)))
            pyro.sample("y", dist.Bernoulli(right), obs=y)
            if narrow:
                scale = torch.where(guess > 0, y.new_tensor(narrow), 3.0)
                pyro.sample("hint", dist.Normal(ability, scale), obs=0.5 + y)


ANSWERS = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.float64)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that were scanned densely."""
    found: list[int] = []

    def noted(restrict: Any, doubtful: Tensor, *args: Any) -> Any:
        found.append(len(doubtful))
        return original(restrict, doubtful, *args)

    original = single_modes.dense_peaks
    for module in (modes, single_modes):
        monkeypatch.setattr(module, "dense_peaks", noted)
    return found


def evidence(weight: float, narrow: float) -> np.ndarray:
    """log p(y_n) from a grid of 400,001 points, 1/200 of the narrowest width apart."""
    a = np.linspace(-9.0, 9.0, 400_001)
    total = np.stack([stats.norm.logpdf(a, 0.3, 1.2)] * 4)
    for n, j in np.ndindex(4, 3):
        y = float(ANSWERS[n, j])
        right = [1 / (1 + np.exp(j - a)), np.full_like(a, 0.8)]
        parts = [np.log(0.5) + np.log(p if y else 1 - p) for p in right]
        if narrow:
            parts = [p + stats.norm.logpdf(0.5 + y, a, s) for p, s in zip(parts, (3.0, narrow), strict=True)]
        total[n] += weight * np.logaddexp(*parts)
    top: np.ndarray = total.max(1)
    return top + np.log(np.exp(total - top[:, None]).sum(1) * (a[1] - a[0]))


@pytest.mark.parametrize(
    ("weight", "narrow", "scanned"), [(1.0, 0.0, False), (2.0, 0.0, False), (1.0, 1e-2, True)]
)
def test_evidence_without_and_with_a_dense_scan_equals_that_of_a_fine_grid(
    weight: float, narrow: float, scanned: bool, dense: list[int]
) -> None:
    """A label 1/100 as wide as the ability is not overlooked; without one no row is scanned densely."""
    model = functools.partial(guessing, weight=weight, narrow=narrow)
    found = lvmppl.posterior(model, {"y": ANSWERS})
    error = np.abs(found.log_evidence_per_datum.numpy() - evidence(weight, narrow))
    assert (error <= found.log_evidence_error_per_datum.numpy() + 1e-8).all()
    assert bool(dense) == scanned
