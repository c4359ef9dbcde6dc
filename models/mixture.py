"""Finite mixtures.

    π ─→ z⁽ⁿ⁾ ─→ x⁽ⁿ⁾ ←─ μ, Σ        n = 1 … N
    p(x, z; θ) = Π_n π_{z_n} N(x_n | μ_{z_n}, Σ_{z_n})

Shapes: N data, K components, D features.
"""

from __future__ import annotations

from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

Covariance = Literal["full", "tied", "diag", "spherical"]


def gaussian_mixture(x: Tensor, num_components: int, covariance: Covariance = "full") -> None:
    """A mixture of K Gaussians on data x [N, D] (a vector [N] is taken as [N, 1]).

    θ: `weights` [K]; `loc` [K, D]; and by `covariance`: `full` a `covariance` [K, D, D], `tied` one `covariance` [D, D],
    `diag` a `variance` [K, D], `spherical` a `variance` [K].

    The start is a function of the data alone: centres spread over them (each next one far from those before), and the
    covariance of the rows nearest to each centre. From identity covariances gradient ascent can stick in a poor optimum.

    Latent: `z` [N], enumerated. Observed: `x`.
    """
    if covariance not in ("full", "tied", "diag", "spherical"):
        raise ValueError(f"covariance must be full, tied, diag or spherical, got {covariance!r}")
    x = x.unsqueeze(-1) if x.dim() == 1 else x
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())  # a file of whole numbers
    size = len(x)
    if not 1 <= num_components <= size:
        raise ValueError(
            f"num_components must lie between 1 and the number of rows, {size}, got {num_components}"
        )
    start: dict[str, Tensor] = {}

    def begin(name: str) -> Any:
        def value() -> Tensor:
            if not start:
                start.update(_start(x, num_components, covariance))
            return start[name]

        return value

    weights = pyro.param("weights", begin("weights"), constraint=constraints.simplex)
    loc = pyro.param("loc", begin("loc"))
    if covariance in ("full", "tied"):
        spread = pyro.param("covariance", begin("spread"), constraint=constraints.positive_definite)
    else:
        spread = pyro.param("variance", begin("spread"), constraint=constraints.positive)
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        if covariance in ("full", "tied"):
            own = spread[z] if covariance == "full" else spread
            component: Any = dist.MultivariateNormal(loc[z], covariance_matrix=own)
        elif covariance == "diag":
            component = dist.Normal(loc[z], spread[z].sqrt()).to_event(1)
        else:
            component = dist.Normal(loc[z], spread[z].sqrt().unsqueeze(-1)).to_event(1)
        pyro.sample("x", component, obs=x)


def _start(x: Tensor, num_components: int, covariance: Covariance) -> dict[str, Tensor]:
    """Spread centres, then the weights and covariances of the rows nearest to each."""
    rows = x.detach()
    if len(rows) > 10_000:  # a start needs no more than a sample, evenly spaced over the rows
        rows = rows[torch.linspace(0, len(rows) - 1, 10_000).long()]
    size = len(rows)
    overall = rows.var(0, unbiased=False).clamp_min(1e-12)
    scaled = (rows - rows.mean(0)) / overall.sqrt()
    centres = _spread_centres(scaled, num_components)
    for _ in range(10):  # a few rounds of k-means
        nearest = torch.cdist(scaled, centres).argmin(1)
        hot = torch.nn.functional.one_hot(nearest, num_components).to(rows.dtype)  # [N, K]
        counts = hot.sum(0)
        means = hot.T @ scaled / counts.clamp_min(1).unsqueeze(-1)
        centres = torch.where(counts.unsqueeze(-1) > 0, means, centres)
    loc = centres * overall.sqrt() + rows.mean(0)
    within = _within_covariances(rows, loc, hot, overall)  # [K, D, D]
    share = (counts + 1) / (size + num_components)
    spread = {
        "full": within,
        "tied": (share[:, None, None] * within).sum(0),
        "diag": within.diagonal(dim1=-2, dim2=-1).clone(),
        "spherical": within.diagonal(dim1=-2, dim2=-1).mean(-1),
    }[covariance]
    return {"weights": share, "loc": loc, "spread": spread}


def _spread_centres(scaled: Tensor, num_components: int) -> Tensor:
    """The row nearest the mean, then each time the row farthest from all centres so far."""
    chosen = [int(scaled.square().sum(1).argmin())]
    distance = torch.full((len(scaled),), torch.inf, dtype=scaled.dtype, device=scaled.device)
    for _ in range(num_components - 1):
        distance = torch.minimum(distance, (scaled - scaled[chosen[-1]]).square().sum(1))
        chosen.append(int(distance.argmax()))
    return scaled[chosen]


def _within_covariances(rows: Tensor, loc: Tensor, hot: Tensor, overall: Tensor) -> Tensor:
    """Covariance of the rows of each cluster, shrunk towards the overall variances by D + 1 pseudo-rows."""
    features = rows.shape[1]
    counts = hot.sum(0)
    prior = float(features + 1)
    centred = rows - loc[hot.argmax(1)]
    scatter = torch.einsum("nk,nd,ne->kde", hot, centred, centred)
    pooled = scatter.sum(0) / len(rows) + 1e-6 * torch.diag(overall)
    result: Tensor = (scatter + prior * pooled) / (counts + prior)[:, None, None]
    return result
