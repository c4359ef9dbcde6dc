"""Locations that are functions of z by pieces: no check at random points proves that log p(x, z) is quadratic."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

import lvmppl

X = torch.tensor([0.3, 0.5], dtype=torch.float64)
CENTRE, HALF, JUMP = 1.0, 0.02, 3.0  # of the window in which the location jumps: 0.007 nats of evidence


def jumping(x: Tensor, slopes: Tensor, matrix: bool = False) -> None:
    """x_n ~ N(u_n, 0.5²), u_n = slope_n w, but for w in the window, where it is u_n + JUMP."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
    u = slopes @ w if matrix else slopes[:, 0] * w
    inside = (w - CENTRE).abs() < HALF
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.where(inside, u + JUMP, u), 0.5), obs=x)


@pytest.mark.parametrize("matrix", [False, True], ids=["many points", "mapped"])
def test_evidence_of_a_narrow_window_equals_scipy_quadrature(matrix: bool) -> None:
    """No random point falls into it. A matrix product is mapped over the points, what is seen of it is the same."""

    def joint(w: float) -> float:
        loc = w + (JUMP if abs(w - CENTRE) < HALF else 0.0)
        return float(stats.norm.pdf(w) * stats.norm.pdf(X.numpy(), loc, 0.5).prod())

    ends = (-9.0, CENTRE - HALF, CENTRE + HALF, 9.0)
    parts = [integrate.quad(joint, a, b, epsabs=0)[0] for a, b in itertools.pairwise(ends)]
    post = lvmppl.posterior(
        lambda x, slopes: jumping(x, slopes, matrix), {"x": X, "slopes": X.new_ones(2, 1)}
    )
    assert post.kind == "quadrature" and "function by pieces (abs, lt)" in post.engine
    assert abs(post.log_evidence - math.log(sum(parts))) < post.log_evidence_error


def test_evidence_by_pieces_in_more_dimensions_is_an_estimate() -> None:
    def model(x: Tensor, by_pieces: bool = True) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
        loc = w.sum(-1, keepdim=True)
        if by_pieces:
            loc = torch.where((w[..., :1] - CENTRE).abs() < 1e-9, loc + JUMP, loc)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 0.5), obs=x)

    post = lvmppl.posterior(model, {"x": X})
    assert post.kind == "estimate" and post.log_evidence_error == math.inf and "by pieces" in post.engine
    smooth = lvmppl.posterior(lambda x: model(x, by_pieces=False), {"x": X})
    assert smooth.kind == "exact"
    covariance = 4.0 * np.ones((2, 2)) + 0.25 * np.eye(2)
    expected = stats.multivariate_normal(np.zeros(2), covariance).logpdf(X.numpy())
    assert smooth.log_evidence == pytest.approx(expected, abs=1e-9)
    assert post.log_evidence == pytest.approx(expected, abs=1e-6)
