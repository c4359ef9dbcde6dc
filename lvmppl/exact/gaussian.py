"""The exact Gaussian posterior of a log joint that is quadratic in its continuous latents.

    log p(x, z) = v + gᵀ(z − c) − ½ (z − c)ᵀ Λ (z − c)      ⇒
    p(z | x)    = N(z; c + Λ⁻¹g, Λ⁻¹),
    log p(x)    = v + ½ gᵀΛ⁻¹g + (d/2) log 2π − ½ log|Λ|

That it is quadratic is checked, never assumed. Shapes: ``S`` points, ``rows`` independent posteriors
(``(N,)``, or ``(C, N)`` for N data under each of C discrete configurations, whose evidence is then the
log-sum-exp over C), ``d`` latent dims. Everything is in nats. A single global z is one row. Time series with
more latents than a dense precision can hold: ``lvmppl.exact.state_space``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lvmppl.exact.evaluation import (
    CHUNK,
    ImproperPosterior,
    LogJoint,
    NotQuadratic,
    Rows,
    evaluate,
    row_shape,
    value_and_gradient,
    with_gradient,
)

LOG_2PI = math.log(2.0 * math.pi)

# Distances of the random checks from the mode, in posterior standard deviations. The far ones, taken on both
# sides, tell a quadratic from the log-sum-exp of several, which is quadratic to all digits around each of its
# modes.
CHECK_RADII = (0.5, 3.0, 30.0, 1e3, 1e5)

# Steps of the difference of gradients, in standard deviations: any step is exact for a quadratic, a long one
# divides the rounding.
STEP = 256.0


_MORE_ROUNDS = 2


@dataclass(frozen=True)
class GaussianPosterior:
    """N(z; mean, Λ⁻¹) for every row, and the log evidence.

    ``log_evidence [*rows]`` is differentiable in whatever the log joint closes over; ``mean [*rows, d]`` and
    ``precision_cholesky [*rows, d, d]`` (lower L, Λ = LLᵀ) are detached. A row whose density is 0 everywhere
    has log evidence −∞ and a placeholder posterior.
    """

    log_evidence: Tensor
    mean: Tensor
    precision_cholesky: Tensor

    @property
    def log_evidence_error(self) -> Tensor:
        """0, to rounding: ``[*rows]``."""
        return torch.zeros_like(self.log_evidence)

    @property
    def mode(self) -> Tensor:
        """The joint MAP, which is the mean: ``[*rows, d]``."""
        return self.mean

    @property
    def covariance(self) -> Tensor:
        """Λ⁻¹: ``[*rows, d, d]``."""
        return torch.cholesky_inverse(self.precision_cholesky)

    @property
    def entropy(self) -> Tensor:
        """(d/2)(1 + log 2π) − ½ log|Λ|: ``[*rows]``."""
        return 0.5 * self.mean.shape[-1] * (1.0 + LOG_2PI) - _half_log_det(self.precision_cholesky)

    def nodes(self) -> tuple[Tensor, Tensor]:
        """The d + 1 points ``[d+1, *rows, d]`` of a simplex with the posterior's mean and covariance, and their
        weights ``[d+1, *rows]``: E_post[f] = Σ_s w_s f(z_s) for every quadratic f.
        """
        dim, rows = self.mean.shape[-1], self.mean.shape[:-1]
        simplex = _simplex(dim).to(self.mean).view(dim + 1, *[1] * len(rows), dim)
        points = self.mean + unwhiten(self.precision_cholesky, simplex.expand(-1, *rows, -1))
        return points, torch.full_like(points[..., 0], 1.0 / (dim + 1))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` exact draws: ``[n, *rows, d]``."""
        noise = torch.randn(
            (n, *self.mean.shape), generator=generator, dtype=self.mean.dtype, device=self.mean.device
        )
        return self.mean + unwhiten(self.precision_cholesky, noise)

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; mean, Λ⁻¹) for ``z [..., *rows, d]``: ``[..., *rows]``."""
        white = (self.precision_cholesky.mT @ (z - self.mean).unsqueeze(-1)).squeeze(-1)
        normaliser = _half_log_det(self.precision_cholesky) - 0.5 * LOG_2PI * self.mean.shape[-1]
        return normaliser - 0.5 * white.square().sum(-1)


def gaussian_posterior(
    log_joint: LogJoint,
    num_rows: Rows,
    dim: int,
    *,
    start: Tensor | None = None,
    rtol: float | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    chunk: int = CHUNK,
) -> GaussianPosterior:
    """The posterior and log evidence of a log joint that is quadratic in ``z [S, *rows, dim]`` (see the
    module).

    Gradients at d + 1 points give Λ exactly; they are taken three times, each time centred at the mode and
    scaled to unit precision, so the last numbers are of order 1 however far from ``start`` (zeros) the data
    are. Cost: 3(d + 1) gradients, 32 values, and d + 1 values with a graph if θ requires a gradient: these
    points, a simplex with the posterior's mean and covariance, integrate the quadratic ∇_θ log p exactly.

    ``rtol`` is the allowed deviation from a quadratic relative to the log joint (default 4 ε^⅔: 1.5e-10 in
    float64). Raises ``NotQuadratic`` with the measured discrepancy, ``ImproperPosterior`` if Λ is not
    positive definite.
    """
    rows = row_shape(num_rows)
    centre = torch.zeros(*rows, dim, dtype=dtype, device=device)
    centre = centre if start is None else start.detach().to(centre).expand(*rows, dim).clone()
    factor = torch.eye(dim, dtype=dtype, device=device).expand(*rows, dim, dim)
    for step in (1.0, STEP):
        _, gradient, precision = _local_quadratic(log_joint, centre, factor, step, chunk)
        centre, factor, expected = _recentred(centre, factor, gradient, precision)
    value, gradient, precision = _local_quadratic(log_joint, centre, factor, STEP, chunk)
    for _ in range(_MORE_ROUNDS):  # rounding has hidden directions in which the posterior is wide
        definite = torch.linalg.cholesky_ex(precision.nan_to_num(0.0, 0.0, 0.0)).info == 0
        if bool(((_deviation(precision, expected) <= 1.0) & definite | (value == -torch.inf)).all()):
            break
        centre, factor, expected = _recentred(centre, factor, gradient, precision, rough=True)
        value, gradient, precision = _local_quadratic(log_joint, centre, factor, STEP, chunk)
    dead = value == -torch.inf
    _check_constant(precision, expected, dead)
    _check_quadratic(log_joint, centre, factor, (value, gradient, precision), rtol, chunk)
    inner, failed = torch.linalg.cholesky_ex(precision)
    _check_proper(failed.bool() & ~dead, precision)
    inner = torch.where(dead[..., None, None], torch.eye(dim, dtype=dtype, device=device), inner)
    white_mean = torch.where(dead[..., None], 0.0, _solve(inner, gradient))
    factor = torch.where(dead[..., None, None], inner, factor)
    mean = torch.where(dead[..., None], 0.0, centre + unwhiten(factor, white_mean))
    cholesky = factor @ inner
    log_evidence = (
        value + 0.5 * (gradient * white_mean).sum(-1) - _half_log_det(cholesky) + 0.5 * LOG_2PI * dim
    )
    found = GaussianPosterior(log_evidence, mean, cholesky)
    return replace(found, log_evidence=with_gradient(log_evidence, log_joint, *found.nodes(), chunk))


def unwhiten(factor: Tensor, white: Tensor) -> Tensor:
    """L⁻ᵀu for ``factor`` L ``[*rows, d, d]`` and ``white`` u ``[..., *rows, d]``: of covariance (LLᵀ)⁻¹ if u
    is white.
    """
    lead = white.dim() - factor.dim() + 1
    # One solve a row for all its points, so that the factor is not copied to each.
    columns = white.flatten(0, lead - 1).movedim(0, -1) if lead else white.unsqueeze(-1)  # [*rows, d, S]
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, columns, upper=True)
    return solved.movedim(-1, 0).reshape(white.shape)


def rough_cholesky(matrix: Tensor) -> Tensor:
    """A lower L with LLᵀ ≈ ``matrix [..., d, d]``, also where rounding made its least eigenvalues 0 or negative: these
    become ε times the largest. Not finite where the matrix is not.
    """
    cholesky: Tensor
    cholesky, failed = torch.linalg.cholesky_ex(matrix)
    if not failed.any():
        return cholesky
    values, vectors = torch.linalg.eigh(matrix.nan_to_num(0.0, 0.0, 0.0))
    least = torch.finfo(matrix.dtype).eps * values.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    root = vectors * torch.maximum(values.abs(), least).sqrt().unsqueeze(-2)  # matrix ≈ root rootᵀ
    upper = torch.linalg.qr(root.mT).R
    lower = upper.mT * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return torch.where((failed != 0)[..., None, None], lower, cholesky)


def _local_quadratic(
    log_joint: LogJoint, centre: Tensor, factor: Tensor, step: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and negative Hessian in u at u = 0, where z = centre + L⁻ᵀu, by differences of
    gradients.
    """
    dim = centre.shape[-1]
    steps = torch.cat([centre.new_zeros(1, dim), torch.eye(dim).to(centre) * step])
    white = steps.view(dim + 1, *[1] * (centre.dim() - 1), dim).expand(-1, *centre.shape)
    value, gradient = value_and_gradient(log_joint, centre + unwhiten(factor, white), chunk)
    gradient = torch.linalg.solve_triangular(factor, gradient.movedim(0, -1), upper=False)  # [*rows, d, S]
    precision = (gradient[..., :1] - gradient[..., 1:]) / step
    return value[0], gradient[..., 0], 0.5 * (precision + precision.mT)


def _recentred(
    centre: Tensor, factor: Tensor, gradient: Tensor, precision: Tensor, rough: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One Newton step, the Cholesky factor of the precision, and the precision in its units (I).

    A row whose precision has no such factor keeps its centre and is only rescaled; ``rough``: by a factor in which what
    rounding may have made of its least eigenvalues counts as ε of the largest.
    """
    inner, failed = torch.linalg.cholesky_ex(precision)
    finite = inner.isfinite().flatten(-2).all(-1) & gradient.isfinite().all(-1)
    newton = (failed == 0) & finite
    diagonal = precision.diagonal(dim1=-2, dim2=-1).abs().nan_to_num(1.0, 1.0, 1.0)
    fallback = torch.diag_embed(torch.where(diagonal > 0, diagonal, 1.0).sqrt())
    if rough:
        lower = rough_cholesky(precision)
        usable = lower.isfinite().flatten(-2).all(-1) & (lower.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
        fallback = torch.where(usable[..., None, None], lower, fallback)
    inner = torch.where(newton[..., None, None], inner, fallback)
    step = torch.where(newton[..., None], _solve(inner, gradient), 0.0)
    half = torch.linalg.solve_triangular(inner, precision, upper=False)
    expected = torch.linalg.solve_triangular(inner, half.mT, upper=False)
    return centre + unwhiten(factor, step), factor @ inner, expected


def _check_constant(precision: Tensor, expected: Tensor, dead: Tensor) -> None:
    """Two measurements of the precision, at different centres and steps, must agree."""
    ratio = _deviation(precision, expected).masked_fill(dead, 0.0)
    refuse_above_one(ratio, "its curvature changes from place to place")


def _deviation(precision: Tensor, expected: Tensor) -> Tensor:
    """The largest difference of two measurements of the precision, in units of its tolerance: ``[*rows]``."""
    tolerance = torch.finfo(precision.dtype).eps ** 0.25
    ratio: Tensor = (precision - expected).abs().flatten(-2).amax(-1) / tolerance
    return ratio.nan_to_num(nan=torch.inf)


def _check_quadratic(
    log_joint: LogJoint,
    centre: Tensor,
    factor: Tensor,
    quadratic: tuple[Tensor, Tensor, Tensor],
    rtol: float | None,
    chunk: int,
) -> None:
    """Compare the log joint with the quadratic at random points on both sides, near and far."""
    value, gradient, precision = quadratic
    epsilon = torch.finfo(centre.dtype).eps
    rtol = 4.0 * epsilon ** (2.0 / 3.0) if rtol is None else rtol
    generator = torch.Generator(device=centre.device).manual_seed(0)
    radii = CHECK_RADII * max(1, 16 // max(1, value.numel()))  # a few rows see more directions each
    white = torch.randn(
        (len(radii), *centre.shape), generator=generator, dtype=centre.dtype, device=centre.device
    )
    radius = torch.tensor(radii).to(centre).view(-1, *[1] * centre.dim())
    white, radius = torch.cat([white * radius, -white * radius]), torch.cat([radius, radius]).squeeze(-1)
    linear = (white * gradient).sum(-1)
    expected = value + linear - 0.5 * (white * (precision @ white.unsqueeze(-1)).squeeze(-1)).sum(-1)
    found = evaluate(log_joint, centre + unwhiten(factor, white), chunk)
    noise = _rounding(log_joint, centre, factor, value, chunk)
    tolerance = rtol * (found.abs() + value.abs() + 1.0) + 30.0 * noise * (1.0 + radius)
    dead = (value == -torch.inf) & (found == -torch.inf).all(0)
    ratio = ((found - expected).abs() / tolerance).nan_to_num(nan=torch.inf).amax(0)
    refuse_above_one(ratio.masked_fill(dead, 0.0), "it departs from its quadratic further away")


def refuse_above_one(ratio: Tensor, what: str) -> None:
    """Raise ``NotQuadratic`` naming the worst row if a deviation ``[*rows]``, in units of its tolerance, is
    above 1.
    """
    if ratio.numel() and ratio.max() > 1.0:
        row = ", ".join(str(int(i)) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
        got = f"{what}, as at row {row}"
        raise NotQuadratic("log joint", got, float(ratio.max()))


def _rounding(log_joint: LogJoint, centre: Tensor, factor: Tensor, value: Tensor, chunk: int) -> Tensor:
    """How far the log joint moves over steps in which a smooth one cannot: its rounding error ``[*rows]``,
    capped.

    Values far from 0 (x of 1e8 with noise 1) lose digits inside the callable, which no relative tolerance on
    the sum would foresee.
    """
    epsilon = torch.finfo(centre.dtype).eps
    steps = torch.tensor([-3.0, -1.0, 1.0, 3.0]).to(centre) * epsilon**0.5
    white = steps.view(-1, *[1] * centre.dim()).expand(-1, *centre.shape)
    noise = (evaluate(log_joint, centre + unwhiten(factor, white), chunk) - value).abs().amax(0)
    return noise.nan_to_num(nan=0.0, posinf=0.0).clamp(max=epsilon**0.25)


def _check_proper(failed: Tensor, precision: Tensor) -> None:
    """Refuse rows whose precision is not positive definite."""
    if not failed.any():
        return
    row = tuple(int(i) for i in failed.nonzero()[0])
    smallest = float(torch.linalg.eigvalsh(precision[row].nan_to_num())[0])
    raise ImproperPosterior(
        "log joint",
        "a quadratic with positive definite precision (a proper posterior)",
        f"smallest scaled eigenvalue {smallest:.3g} at row {', '.join(map(str, row))}",
        "give every latent direction a prior of finite variance",
    )


def _simplex(dim: int) -> Tensor:
    """The smallest rule exact for quadratics: d + 1 points ``[d+1, d]`` of mean 0 and covariance I (divisor d
    + 1).
    """
    ones, basis = torch.ones(dim + 1, 1, dtype=torch.float64), torch.eye(dim + 1, dtype=torch.float64)
    contrasts: Tensor = torch.linalg.qr(torch.cat([ones, basis[:, :dim]], -1)).Q[:, 1:]
    return contrasts * math.sqrt(dim + 1)


def _solve(cholesky: Tensor, vector: Tensor) -> Tensor:
    """(LLᵀ)⁻¹ b for ``[*rows, d]`` b."""
    return torch.cholesky_solve(vector.unsqueeze(-1), cholesky).squeeze(-1)


def _half_log_det(cholesky: Tensor) -> Tensor:
    """½ log|LLᵀ| = Σ log L_ii."""
    return cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
