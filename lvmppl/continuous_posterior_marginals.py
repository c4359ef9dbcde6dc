"""Marginals of a continuous posterior over any elements of its stacked vector, given an enumerated site or not.

Shapes: C = (C₁, …) configurations of the enumerated sites, N data, d stacked dimensions, K states, M mixed components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lvmppl.errors import InputError
from lvmppl.exact.block_tridiagonal import StateSpacePosterior
from lvmppl.exact.gaussian import GaussianPosterior
from lvmppl.exact.quadrature import QuadraturePosterior
from lvmppl.posterior_frames import categorical_of


class Path:
    """A state-space posterior over [*rows, T, d] as one over stacked vectors [*rows, T·d]."""

    def __init__(self, posterior: StateSpacePosterior) -> None:
        self.posterior = posterior
        self.shape = posterior.mean.shape[-2:]

    @property
    def log_evidence(self) -> Tensor:
        return self.posterior.log_evidence

    @property
    def log_evidence_error(self) -> Tensor:
        return self.posterior.log_evidence_error

    @property
    def mean(self) -> Tensor:
        return self.posterior.mean.flatten(-2)

    @property
    def variance(self) -> Tensor:
        return self.posterior.covariance.diagonal(dim1=-2, dim2=-1).flatten(-2)

    @property
    def entropy(self) -> Tensor:
        return self.posterior.entropy

    def nodes(self) -> tuple[Tensor, Tensor]:
        paths, weights = self.posterior.nodes()
        return paths.flatten(-2), weights

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.posterior.sample(n, generator).flatten(-2)

    def log_prob(self, z: Tensor) -> Tensor:
        return self.posterior.log_prob(z.unflatten(-1, self.shape))

    def covariance_over(self, columns: Sequence[int]) -> Tensor:
        """Covariance [*rows, m, m] of elements that lie in one step or in two neighbouring ones."""
        size = self.shape[-1]
        step = min(columns) // size
        if max(columns) // size > step + 1:
            raise InputError(
                "pair_marginal", "sites of one step or of two neighbouring ones of a path", "others"
            )
        whole = self.posterior.covariance[..., step, :, :]
        if step + 1 < self.shape[0]:
            across = self.posterior.cross_covariance[..., step, :, :]
            after = self.posterior.covariance[..., step + 1, :, :]
            whole = torch.cat([torch.cat([whole, across.mT], -1), torch.cat([across, after], -1)], -2)
        index = torch.tensor([c - step * size for c in columns], device=whole.device)
        return whole[..., index, :][..., index]


Kernel = GaussianPosterior | QuadraturePosterior | Path


def marginal_over(
    kernel: Kernel, weights: Tensor, discrete: Sequence[str], columns: Sequence[int], given: int | None = None
) -> torch.distributions.Distribution:
    """The marginal over some elements of the stacked vector [N], or [N, K] given the states of an enumerated site.

    weights: p(c | x) [*C, N], its axes C the sites `discrete`. given: the axis of the site that is conditioned on.
    """
    index, axes = torch.tensor(list(columns), device=weights.device), len(discrete)
    configurations = weights
    weights = _mixing(configurations, axes, given)  # [N, K?, M]
    if isinstance(kernel, QuadraturePosterior):
        points = _mixing(kernel.points[..., index].movedim(0, axes), axes + 1, given, tail=1)
        logs = _mixing((kernel.log_weights + configurations.log()).movedim(0, axes), axes + 1, given)
        return weighted_points(points, logs)
    path = isinstance(kernel, Path)
    covariance = kernel.covariance_over(columns) if path else kernel.covariance[..., index, :][..., index]  # type: ignore[union-attr]
    means = _mixing(kernel.mean[..., index], axes, given, tail=1)
    components = torch.distributions.MultivariateNormal(means, _mixing(covariance, axes, given, tail=2))
    if weights.shape[-1] == 1:
        only: torch.distributions.Distribution = torch.distributions.MultivariateNormal(
            components.loc.squeeze(weights.dim() - 1), components.covariance_matrix.squeeze(weights.dim() - 1)
        )
        return only
    total = weights.sum(-1, keepdim=True)
    shares = torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), 0.0)
    return torch.distributions.MixtureSameFamily(categorical_of(shares), components)


def weighted_points(points: Tensor, log_weights: Tensor) -> torch.distributions.Distribution:
    """Points [*batch, S, m] of log-weights [*batch, S]; NaN where none has weight, as given a state of probability 0."""
    from pyro.distributions import Empirical

    met = (log_weights > -torch.inf).any(-1, keepdim=True)
    if not bool(met.all()):
        points = torch.where(met.unsqueeze(-1), points, torch.nan)
        log_weights = torch.where(met, log_weights, 0.0)
    found: torch.distributions.Distribution = Empirical(points, log_weights)
    return found


def _mixing(table: Tensor, axes: int, given: int | None, tail: int = 0) -> Tensor:
    """[*C, N, *tail] → [N, M, *tail], or [N, K, M, *tail] with the axis `given` kept; M the other configurations."""
    if given is None:
        flat = table.reshape(math.prod(table.shape[:axes]), *table.shape[axes:])
        return flat.movedim(0, flat.dim() - 1 - tail)
    kept = table.movedim(given, 0)
    flat = kept.reshape(kept.shape[0], math.prod(kept.shape[1:axes]), *kept.shape[axes:])
    return flat.movedim((0, 1), (flat.dim() - 2 - tail, flat.dim() - 1 - tail))


def neighbours(kernel: Path) -> torch.distributions.Distribution:
    """Each step of a path with the next: MultivariateNormal over the stacked pair [N, T − 1, 2d]."""
    found = kernel.posterior
    mean = torch.cat([found.mean[..., :-1, :], found.mean[..., 1:, :]], -1)
    across = found.cross_covariance
    top = torch.cat([found.covariance[..., :-1, :, :], across.mT], -1)
    bottom = torch.cat([across, found.covariance[..., 1:, :, :]], -1)
    return torch.distributions.MultivariateNormal(mean, torch.cat([top, bottom], -2))
