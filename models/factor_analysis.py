"""Factor analysis and probabilistic principal components.

    z⁽ⁿ⁾ ─→ x⁽ⁿ⁾ ←─ W, μ, Ψ        n = 1 … N
    p(x, z; θ) = Π_n N(z_n | 0, I) N(x_n | W z_n + μ, Ψ)

so that x_n ~ N(μ, W Wᵀ + Ψ): Ψ is diagonal (factor analysis; Rubin & Thayer 1982) or a multiple of I (probabilistic
principal components; Tipping & Bishop 1999). W is known up to a rotation of the factors.

Shapes: N data, D features, L factors.
"""

from __future__ import annotations

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

Noise = Literal["diagonal", "spherical"]


def factor_analysis(x: Tensor, num_factors: int, noise: Noise = "diagonal") -> None:
    """L Gaussian factors behind data x [N, D].

    θ: `loadings` W [D, L]; `loc` μ [D]; `variance` of the noise, [D] if `diagonal`, one number if `spherical`.

    The start is a function of the data alone: the mean, the leading principal axes, each scaled to half the standard
    deviation along it, and half the variance of each feature as noise.

    Latent: `z` [N, L], continuous; its posterior is Gaussian. Observed: `x`.
    """
    if noise not in ("diagonal", "spherical"):
        raise ValueError(f"noise must be diagonal or spherical, got {noise!r}")
    if x.dim() != 2:
        raise ValueError(f"x must have shape [N, D], got {tuple(x.shape)}")
    size, features = x.shape
    if not 1 <= num_factors <= min(size, features):
        most = min(size, features)
        raise ValueError(
            f"num_factors must lie between 1 and the smaller side of x, {most}, got {num_factors}"
        )
    loc = pyro.param("loc", lambda: x.mean(0))
    loadings = pyro.param("loadings", lambda: _principal_axes(x, num_factors))
    variance = pyro.param("variance", lambda: _half_variance(x, noise), constraint=constraints.positive)
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(x.new_zeros(num_factors), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loadings.T + loc, variance.sqrt()).to_event(1), obs=x)


def _principal_axes(x: Tensor, num_factors: int) -> Tensor:
    """[D, L], the largest entry of each axis positive."""
    centred = x - x.mean(0)
    _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:num_factors]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    scale = 0.5 * lengths[:num_factors] / len(x) ** 0.5
    loadings: Tensor = (axes * largest.sign() * scale.unsqueeze(-1)).T
    return loadings


def _half_variance(x: Tensor, noise: Noise) -> Tensor:
    variance = 0.5 * x.var(0, unbiased=False).clamp_min(1e-12)
    return variance if noise == "diagonal" else variance.mean()
