"""Linear-Gaussian state-space models.

    z_1 ─→ z_2 ─→ … ─→ z_T          sequences n = 1 … N
     ↓      ↓           ↓
    x_1    x_2         x_T

    p(x, z; θ) = Π_n N(z_1 | m, P) Π_t N(z_{t+1} | A z_t, Q) Π_t N(x_t | C z_t + d, R)

Shapes: N sequences, T steps, L states, D features.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from lvmppl.distributions import GaussianChain


def local_level(x: Tensor, lengths: Tensor | None = None, initial_scale: float = 10.0) -> None:
    """A random walk seen through noise (Durbin & Koopman, *Time Series Analysis by State Space Methods*, ch. 2); x [N, T].

        z_{t+1} = z_t + η_t,  η_t ~ N(0, level_variance)        x_t = z_t + ε_t,  ε_t ~ N(0, noise_variance)

    lengths: [N] steps of each sequence, None when all have T; what stands beyond a length is not read.
    The first level is N(mean of the first values, (initial_scale · sd of x)²): wide, so that it says little.

    θ: `level_variance`, `noise_variance`. The start, from the data: that changes are half level and half noise.

    Latent: `z` [N, T, 1], continuous; its posterior is a Gaussian path. Observed: `x`.
    """
    if x.dim() != 2 or x.shape[1] < 2:
        raise ValueError(f"x must have shape [N, T] with at least two steps, got {tuple(x.shape)}")
    valid = _valid(x, lengths)
    change = (x[:, 1:] - x[:, :-1])[valid[:, 1:]].square().mean().clamp_min(1e-12).detach()
    level = pyro.param("level_variance", lambda: change / 2, constraint=constraints.positive)
    noise = pyro.param("noise_variance", lambda: change / 4, constraint=constraints.positive)
    centre = x[:, 0].mean().detach().reshape(1)
    spread = (initial_scale * x[valid].std(unbiased=False).clamp_min(1e-6)).detach().reshape(1)
    first = dist.Normal(centre, spread).to_event(1)
    step = dist.Normal(x.new_zeros(1), level.sqrt().reshape(1)).to_event(1)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", GaussianChain(first, x.new_ones(1, 1), step, x.shape[1]))
        seen = dist.Normal(z.squeeze(-1), noise.sqrt())
        seen = seen if lengths is None else seen.mask(valid)
        pyro.sample("x", seen.to_event(1), obs=torch.where(valid, x, 0))


def linear_gaussian(x: Tensor, lengths: Tensor | None = None, *, state_dim: int) -> None:
    """L states that move by a matrix and are seen through another (a Kalman filter's model); x [N, T, D], or [N, T].

    lengths: [N] steps of each sequence, None when all have T; what stands beyond a length is not read.

    θ: `transition` A [L, L]; `emission` C [D, L]; `offset` d [D]; `variance` of the noise, R = diag [D]. Q = I and
    z_1 ~ N(0, I) fix the scale of the states, which are known up to a change of basis.

    The start, from the data: the mean, half the variance as noise, states that fade slowly (each at a pace of its own),
    an emission from the leading principal axes.

    Latent: `z` [N, T, L], continuous; its posterior is a Gaussian path. Observed: `x`.
    """
    x = x.unsqueeze(-1) if x.dim() == 2 else x
    if x.dim() != 3:
        raise ValueError(f"x must have shape [N, T, D] or [N, T], got {tuple(x.shape)}")
    if state_dim < 1:
        raise ValueError(f"state_dim must be at least 1, got {state_dim}")
    size, steps = x.shape[:2]
    valid = _valid(x, lengths)
    rows = x[valid].detach()
    pace = torch.linspace(0.9, 0.5, state_dim).to(rows)
    transition = pyro.param("transition", lambda: torch.diag(pace))
    emission = pyro.param("emission", lambda: _axes(rows, state_dim) * (1 - pace**2).sqrt())
    offset = pyro.param("offset", lambda: rows.mean(0))
    variance = pyro.param(
        "variance",
        lambda: 0.5 * rows.var(0, unbiased=False).clamp_min(1e-12),
        constraint=constraints.positive,
    )
    zero = rows.new_zeros(state_dim)
    start, step = dist.Normal(zero, 1.0).to_event(1), dist.Normal(zero, 1.0).to_event(1)
    with pyro.plate("data", size):
        z = pyro.sample("z", GaussianChain(start, transition, step, steps))
        seen = dist.Normal(z @ emission.T + offset, variance.sqrt()).to_event(1)
        seen = seen if lengths is None else seen.mask(valid)
        pyro.sample("x", seen.to_event(1), obs=torch.where(valid.unsqueeze(-1), x, 0))


def _valid(x: Tensor, lengths: Tensor | None) -> Tensor:
    """[N, T]: the steps within their sequence."""
    if lengths is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(-1)


def _axes(rows: Tensor, number: int) -> Tensor:
    """[D, L]: half a standard deviation along each principal axis, the axes over again where L exceeds D."""
    centred = rows - rows.mean(0)
    _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
    scaled: Tensor = 0.5 * (axes * lengths.unsqueeze(-1)).T / len(rows) ** 0.5
    return scaled[:, torch.arange(number) % scaled.shape[1]]
