"""Exponential families of continuous q: exact expectations from a few points, and optima from a few gradients.

Let F(z) = E_{q_-z}[log p(x, z, …)] be linear in the statistics t(z) of q's family. Then

- E_q F is the mean of F over two points z⁺, z⁻ (over 2 D of a Gaussian whose elements meet): they are placed so that the
  mean of t over them is E_q t, and serve all elements of a site at once;
- the coordinate optimum q(z) ∝ exp F(z) has natural parameters that two gradients of F determine: w(z) ∂F/∂z is affine
  in u(z),

      Normal     w = 1           u = z         μ from the root, precision = − slope
      LogNormal  w = z           u = log z     the same of log z
      Gamma      w = z           u = z         concentration = intercept + 1, rate = − slope
      Beta       w = z (1 − z)   u = z         a = intercept + 1, b = 1 − slope − intercept
      Dirichlet  w = z           u = z         concentration = intercept + 1; the slope, one a row, is what a model that
                                               normalises its probabilities adds

  and where elements of a Gaussian meet, ∂F/∂z is affine with the matrix − Λ (full: Σ = Λ⁻¹; diagonal: σ_d² = 1/Λ_dd,
  the maximum over all elements at once).

Whether F is linear in t is seen at points that played no part in the solution.

Shapes: P points, D elements of an event; values are [P, *batch, *event].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import transforms

from lvmppl.algorithms.conjugate_families import FAMILIES, Elementwise, Fields

CLOSE = 1e-6  # difference of a gradient to what linearity in t says of it, relative to its terms
ROUNDING = 1000  # rounding errors of a gradient that is a sum over many data
_HELD = 1e-9  # error of E log z by the points' rounding, relative and in nats, in float64 (2e-5 in float32)
MAX_COUPLED = 128  # elements of an event whose Hessian is taken

_POSITIVE = ("precision", "rate", "concentration", "concentration1", "concentration0")


@dataclass(frozen=True)
class Member:
    """q of one site as a member of a family: its parameters and the shapes of its batch and event.

    coupled: a Gaussian whose elements meet in log p; it takes the points of a cubature rule instead of a pair.
    """

    family: str
    fields: dict[str, Tensor]
    batch: tuple[int, ...]
    event: tuple[int, ...]
    base: Any
    coupled: bool

    @property
    def size(self) -> int:
        return prod(self.event)

    def at(self, fields: Fields) -> Member:
        """The same site with other parameters."""
        shaped = {k: fields[k].reshape(old.shape) for k, old in self.fields.items()}
        family = FAMILIES.get(type(self.base))
        if family is None:
            base = dist.MultivariateNormal(shaped["loc"], covariance_matrix=shaped["covariance"])
        else:
            base = family.build(shaped)
        return replace(self, fields=shaped, base=base)

    @cached_property
    def points(self) -> Tensor:
        """Points of equal weight over which the mean of any F linear in t is E_q F, [2 or 2 D, *batch, *event]."""
        if not self.coupled:
            return FAMILIES[type(self.base)].pair(self.fields)
        loc = self.fields["loc"].reshape([*self.batch, self.size])
        steps = self._root().mT.movedim(-2, 0) * self.size**0.5  # [D, *batch, D]
        return torch.cat([loc + steps, loc - steps]).reshape([2 * self.size, *self.batch, *self.event])

    def holds_points(self) -> bool:
        """Whether the points' logarithms have the mean that q says, to rounding.

        Next to a bound of the support a point rounds to the bound (below a concentration of some 0.1 at 1, of some 0.005
        at 0), and what a model computes there is no expectation any more.
        """
        if self.coupled:
            return True
        family = FAMILIES[type(self.base)]
        relative = _HELD * (torch.finfo(self.points.dtype).eps / torch.finfo(torch.float64).eps) ** 0.5
        return all(
            bool(((found.mean(0) - mean).abs() <= relative * (1.0 + mean.abs())).all())
            for found, mean in zip(family.logs(self.points), family.mean_logs(self.fields), strict=True)
        )

    def _root(self) -> Tensor:
        """L with covariance L Lᵀ, [*batch, D, D]."""
        if "covariance" in self.fields:
            triangular: Tensor = torch.linalg.cholesky(self.fields["covariance"])
            return triangular
        variance: Tensor = 1 / self.fields["precision"].reshape([*self.batch, self.size])
        root: Tensor = variance.sqrt().diag_embed()
        return root

    def entropy(self) -> Tensor:
        """H[q], [*batch] nats."""
        own: Tensor = self.base.entropy()
        return own.sum(tuple(range(len(self.batch), own.dim()))) if own.dim() > len(self.batch) else own

    def moments(self) -> Tensor:
        """E z and E z², [2, *batch, *event]."""
        shape = (*self.batch, *self.event)
        mean, variance = self.base.mean.reshape(shape).double(), self.base.variance.reshape(shape).double()
        return torch.stack([mean, variance + mean.square()])

    def probes(self) -> Tensor:
        """Points whose gradients determine the optimum, [P, *batch, *event]."""
        if not self.coupled:
            return FAMILIES[type(self.base)].probes(self.fields)
        loc = self.fields["loc"].reshape([*self.batch, self.size])
        eye = torch.eye(self.size, dtype=loc.dtype).reshape([self.size, *[1] * len(self.batch), self.size])
        return torch.cat([loc.unsqueeze(0), loc + eye]).reshape([-1, *self.batch, *self.event])

    def solve(self, points: Tensor, gradients: Tensor) -> Natural:
        """∂F/∂z as a function of z, from its values at the probes."""
        if self.coupled:
            flat = gradients.reshape([-1, *self.batch, self.size])
            matrix = (flat[:1] - flat[1:]).movedim(0, -1)  # Λ [*batch, D, D]
            return _Quadratic(self, points[0], gradients[0], (matrix + matrix.mT) / 2)
        family = FAMILIES[type(self.base)]
        y, u = family.weight(points) * gradients, family.argument(points)
        if family.rows:
            apart = u[1] - u[0]
            slope = ((y[1] - y[0]) * apart).sum(-1, keepdim=True) / apart.square().sum(-1, keepdim=True)
        else:
            slope = (y[1] - y[0]) / (u[1] - u[0])
        return _Affine(family, y[0] - slope * u[0], slope)


class _Affine(NamedTuple):
    """w(z) ∂F/∂z = intercept + slope · u(z), element by element."""

    family: Elementwise
    intercept: Tensor
    slope: Tensor

    def fits(self, points: Tensor, gradients: Tensor) -> bool:
        y, linear = self.family.weight(points) * gradients, self.slope * self.family.argument(points)
        return _close(y, self.intercept + linear, self.intercept.abs() + linear.abs())

    def optimum(self, scale: Tensor) -> dict[str, Tensor]:
        """The parameters of q ∝ exp(F / scale)."""
        return self.family.back(self.intercept / scale, self.slope / scale)


class _Quadratic(NamedTuple):
    """∂F/∂z = gradient − Λ (z − origin)."""

    member: Member
    origin: Tensor
    gradient: Tensor
    matrix: Tensor

    def fits(self, points: Tensor, gradients: Tensor) -> bool:
        flat = (points - self.origin).reshape([len(points), *self.member.batch, self.member.size])
        bent = (self.matrix @ flat.unsqueeze(-1)).reshape(points.shape)
        size = (self.matrix.abs() @ flat.abs().unsqueeze(-1)).reshape(points.shape)
        return _close(gradients, self.gradient - bent, self.gradient.abs() + size)

    def optimum(self, scale: Tensor) -> dict[str, Tensor]:
        own = self.member
        matrix = self.matrix / scale.reshape([*scale.shape[: len(own.batch)], 1, 1])
        gradient = (self.gradient / scale).reshape([*own.batch, own.size, 1])
        root, info = torch.linalg.cholesky_ex(matrix)
        if bool((info != 0).any()):
            return {"loc": self.origin, "precision": -torch.ones_like(self.origin)}  # no proper optimum
        loc = self.origin + torch.cholesky_solve(gradient, root).reshape(self.origin.shape)
        if "covariance" in own.fields:
            return {"loc": loc.reshape(own.fields["loc"].shape), "covariance": torch.cholesky_inverse(root)}
        return {"loc": loc, "precision": matrix.diagonal(dim1=-2, dim2=-1).reshape(self.origin.shape)}


Natural = _Affine | _Quadratic


def _close(found: Tensor, expected: Tensor, size: Tensor) -> bool:
    """Whether the two agree in every entry, by the size of what adds up to it.

    Not by the largest entry, beside which a small one could be anything; of that one only the last digits are allowed,
    which a sum within the model (a prior against counts, say) may have lost before it came out small.
    """
    eps = torch.finfo(found.dtype).eps
    size = torch.maximum(found.abs(), size)
    allowed = max(CLOSE, ROUNDING * eps) * size + 8 * eps * size.amax()
    return bool(((found - expected).abs() <= allowed).all())


def is_proper(fields: Fields) -> bool:
    """Whether these are parameters of a distribution."""
    finite = all(bool(torch.isfinite(t).all()) for t in fields.values())
    return finite and all(bool((t > 0).all()) for k, t in fields.items() if k in _POSITIVE)


def member_of(fn: Any, coupled: bool = False) -> Member | None:
    """The family of a guide site's distribution, None where it is not in the table."""
    batch, event = tuple(fn.batch_shape), tuple(fn.event_shape)
    base = _plain(fn)
    if isinstance(base, dist.MultivariateNormal):
        fields = {"loc": base.loc, "covariance": base.covariance_matrix}
        return Member("MultivariateNormal", fields, batch, event, base, True)
    family = FAMILIES.get(type(base))
    if family is None:
        return None
    return Member(type(base).__name__, family.fields(base), batch, event, base, coupled)


def _plain(fn: Any) -> Any:
    """The distribution beneath what only regroups its axes."""
    wrapped = (dist.Independent, torch.distributions.Independent, dist.ExpandedDistribution)
    while isinstance(fn, wrapped) or _is_reshaped(fn):
        fn = fn.base_dist
    return fn


def _is_reshaped(fn: Any) -> bool:
    return isinstance(fn, torch.distributions.TransformedDistribution) and all(
        isinstance(t, transforms.ReshapeTransform) for t in fn.transforms
    )


__all__ = ["MAX_COUPLED", "Fields", "Member", "is_proper", "member_of"]
