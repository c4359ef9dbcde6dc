"""Families of q with independent elements: two points that stand for an expectation, and the way back from gradients.

A line of the table in `conjugate` each. Shapes: values are [P, *batch, *event], P points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

Fields = Mapping[str, Tensor]
"""Parameters of q, [*batch, *event] (a covariance [*batch, D, D])."""


class Elementwise(NamedTuple):
    """A family of independent elements (rows, of a Dirichlet): a line of the table above."""

    fields: Callable[[Any], dict[str, Tensor]]
    weight: Callable[[Tensor], Tensor]
    argument: Callable[[Tensor], Tensor]
    probes: Callable[[Fields], Tensor]
    pair: Callable[[Fields], Tensor]
    back: Callable[[Tensor, Tensor], dict[str, Tensor]]
    build: Callable[[Fields], Any]
    logs: Callable[[Tensor], list[Tensor]]
    mean_logs: Callable[[Fields], list[Tensor]]
    rows: bool = False


def _mean_and_precision(fn: Any) -> dict[str, Tensor]:
    return {"loc": fn.loc, "precision": fn.scale**-2}


def _gaussian_pair(q: Fields) -> Tensor:
    sd = q["precision"] ** -0.5
    return torch.stack([q["loc"] + sd, q["loc"] - sd])


def _gaussian_back(intercept: Tensor, slope: Tensor) -> dict[str, Tensor]:
    return {"loc": -intercept / slope, "precision": -slope}


def _gamma_pair(q: Fields) -> Tensor:
    """m e^{±s}: (log z⁺ + log z⁻)/2 = log m = ψ(a) − log b and (z⁺ + z⁻)/2 = m cosh s = a/b."""
    log_m = torch.digamma(q["concentration"]) - q["rate"].log()
    s = torch.acosh((q["concentration"].log() - torch.digamma(q["concentration"])).exp().clamp_min(1.0))
    return torch.stack([(log_m + s).exp(), (log_m - s).exp()])


def _unit_pair(log_zero: Tensor, log_one: Tensor) -> tuple[Tensor, Tensor]:
    """(z⁺, z⁻) and (1 − z⁺, 1 − z⁻) with Σ log z = 2 log_one, Σ log(1 − z) = 2 log_zero: two roots of a quadratic."""
    a, b = log_one.exp(), log_zero.exp()
    gap = (1 - a - b).clamp_min(0.0)  # Jensen
    root = (gap * (1 - a + b) * (1 + a - b) * (1 + a + b)).sqrt()
    tiny = torch.finfo(a.dtype).tiny
    high = (1 + a * a - b * b + root) / 2
    other = (1 - a * a + b * b + root) / 2
    low, rest = a * a / high.clamp_min(tiny), b * b / other.clamp_min(tiny)
    return torch.stack([high, low]), torch.stack([rest, other])


def _beta_pair(q: Fields) -> Tensor:
    one, zero = q["concentration1"], q["concentration0"]
    total = torch.digamma(one + zero)
    return _unit_pair(torch.digamma(zero) - total, torch.digamma(one) - total)[0]


def _dirichlet_pair(q: Fields) -> Tensor:
    """As of a Beta: the largest element of a row against the rest, which keep their proportions exp E log z."""
    alpha = q["concentration"]
    log_mean = torch.digamma(alpha) - torch.digamma(alpha.sum(-1, keepdim=True))
    top = torch.nn.functional.one_hot(alpha.argmax(-1), alpha.shape[-1]).bool()
    largest = log_mean.masked_fill(~top, -torch.inf).amax(-1, keepdim=True)
    rest = torch.logsumexp(log_mean.masked_fill(top, -torch.inf), -1, keepdim=True)
    own, others = _unit_pair(rest, largest)
    tiny = torch.finfo(alpha.dtype).tiny
    share = torch.where(top, own, others * (log_mean - rest).exp())
    return share.clamp_min(tiny)


def _simplex_probes(q: Fields) -> Tensor:
    like = q["concentration"]
    ramp = torch.linspace(1.0, 2.0, like.shape[-1], dtype=like.dtype)
    return torch.stack([(row / row.sum()).expand(like.shape) for row in (ramp, ramp.flip(0))])


def _constant_probes(*points: float) -> Callable[[Fields], Tensor]:
    def probes(q: Fields) -> Tensor:
        like = next(iter(q.values()))
        return torch.stack([torch.full_like(like, point) for point in points])

    return probes


def _gamma_probes(q: Fields) -> Tensor:
    mean = q["concentration"] / q["rate"]
    return torch.stack([mean, 2 * mean])


FAMILIES: dict[type, Elementwise] = {
    dist.Normal: Elementwise(
        _mean_and_precision,
        torch.ones_like,
        lambda z: z,
        _gaussian_pair,
        _gaussian_pair,
        _gaussian_back,
        lambda q: dist.Normal(q["loc"], q["precision"] ** -0.5),
        lambda z: [],
        lambda q: [],
    ),
    dist.LogNormal: Elementwise(
        _mean_and_precision,
        lambda z: z,
        torch.log,
        lambda q: _gaussian_pair(q).exp(),
        lambda q: _gaussian_pair(q).exp(),
        _gaussian_back,
        lambda q: dist.LogNormal(q["loc"], q["precision"] ** -0.5),
        lambda z: [z.log()],
        lambda q: [q["loc"]],
    ),
    dist.Gamma: Elementwise(
        lambda f: {"concentration": f.concentration, "rate": f.rate},
        lambda z: z,
        lambda z: z,
        _gamma_probes,
        _gamma_pair,
        lambda intercept, slope: {"concentration": intercept + 1, "rate": -slope},
        lambda q: dist.Gamma(q["concentration"], q["rate"]),
        lambda z: [z.log()],
        lambda q: [torch.digamma(q["concentration"]) - q["rate"].log()],
    ),
    dist.Beta: Elementwise(
        lambda f: {"concentration1": f.concentration1, "concentration0": f.concentration0},
        lambda z: z * (1 - z),
        lambda z: z,
        _constant_probes(0.25, 0.75),
        _beta_pair,
        lambda intercept, slope: {"concentration1": intercept + 1, "concentration0": 1 - slope - intercept},
        lambda q: dist.Beta(q["concentration1"], q["concentration0"]),
        lambda z: [z.log(), torch.log1p(-z)],
        lambda q: [
            torch.digamma(q[k]) - torch.digamma(q["concentration1"] + q["concentration0"])
            for k in ("concentration1", "concentration0")
        ],
    ),
    dist.Dirichlet: Elementwise(
        lambda f: {"concentration": f.concentration},
        lambda z: z,
        lambda z: z,
        _simplex_probes,
        _dirichlet_pair,
        lambda intercept, slope: {"concentration": intercept + 1},
        lambda q: dist.Dirichlet(q["concentration"]),
        lambda z: [z.log()],
        lambda q: [
            torch.digamma(q["concentration"]) - torch.digamma(q["concentration"].sum(-1, keepdim=True))
        ],
        rows=True,
    ),
}
"""Families of q whose elements are independent."""


__all__ = ["FAMILIES", "Elementwise", "Fields"]
