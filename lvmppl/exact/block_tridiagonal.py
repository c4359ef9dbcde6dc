"""The exact posterior of linear-Gaussian state-space models: a Gaussian whose precision is block-tridiagonal
in time.

    log p(x, z) = c + Σ_t l_tᵀ z_t − ½ Σ_t z_tᵀ D_t z_t − Σ_t z_{t+1}ᵀ O_t z_t        z_t − centre_t for z_t
    if a centre is given

by block cyclic reduction: every second time step is integrated out at once, so T steps take log2 T batched
levels and O(T d³) work, with no loop over time; the way back gives the conditionals, hence all marginals and
exact samples. It is a Cholesky elimination in nested-dissection order.

A precision whose entries are far larger than what they leave of the posterior's (a level that hardly moves, seen
through much noise) has lost digits before the elimination begins: rounding 1/q² + 1/r² loses r. Whoever knows more
than the matrix can then supply the precision of what is left at each level (``measured``).

Shapes: ``B`` sequences (any shape ``rows``), ``T`` steps, ``d`` dims of the state, ``S`` points. Everything
is in nats. Source: Golub & Van Loan, *Matrix Computations*, 4th ed., section 4.5.4 (cyclic reduction).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lvmppl.exact.evaluation import ImproperPosterior
from lvmppl.exact.gaussian import LOG_2PI, rough_cholesky, unwhiten


@dataclass(frozen=True)
class BlockTridiagonal:
    """The quadratic above: ``diag [B, T, d, d]``, ``off [B, T-1, d, d]`` (rows t+1, columns t), ``linear [B,
    T, d]``, ``const [B]``, all in z − ``centre [B, T, d]``.
    """

    diag: Tensor
    off: Tensor
    linear: Tensor
    const: Tensor
    centre: Tensor


@dataclass(frozen=True)
class Level:
    """One level of the elimination: z_e = shift + before·z_{e−1} + after·z_{e+1} + L⁻ᵀε for the E eliminated
    steps e.
    """

    cholesky: Tensor  # [B, E, d, d], lower L of the precision of z_e given its neighbours
    before: Tensor  # [B, E, d, d], zero where there is no neighbour before
    after: Tensor  # [B, E, d, d]
    shift: Tensor  # [B, E, d]


_AMPLIFIED = 100.0  # how much larger than ‖E‖² the error may be: ten times was seen


class Measured(Protocol):
    """Who knows a quadratic better than its rounded matrix."""

    def left(self, levels: Sequence[Level]) -> tuple[Tensor, Tensor, Tensor]:
        """``diag``, ``off`` and ``linear`` of the steps that are left when these levels are eliminated."""

    def own(self, levels: Sequence[Level], factor: Tensor) -> Tensor:
        """F⁻¹ D F⁻ᵀ ``[B, E, d, d]`` of every second step that is left, in units of ``factor`` F, a rough one of D; I
        where it is so to the rounding of the measurement.
        """


@dataclass(frozen=True)
class StateSpacePosterior:
    """p(z_1..T | x) of every sequence.

    ``log_evidence [B]`` is differentiable; ``mean [B, T, d]``, ``covariance [B, T, d, d]`` (marginal),
    ``cross_covariance [B, T-1, d, d]`` (Cov(z_{t+1}, z_t)) and ``entropy [B]`` are detached. ``log_evidence_error [B]``:
    0, to rounding; where levels were measured, an estimate of what rounding of the matrix has left of it.
    """

    log_evidence: Tensor
    mean: Tensor
    covariance: Tensor
    cross_covariance: Tensor
    entropy: Tensor
    log_evidence_error: Tensor
    quadratic: BlockTridiagonal = field(repr=False)
    _levels: tuple[Level, ...] = field(repr=False)

    @property
    def mode(self) -> Tensor:
        """The most probable path, which is the mean: ``[B, T, d]``."""
        return self.mean

    def nodes(self) -> tuple[Tensor, Tensor]:
        """3d + 1 paths ``[3d+1, B, T, d]`` with the posterior's mean, marginal and consecutive covariances, and their
        weights ``[3d+1, B]``: E_post[f] = Σ_s w_s f(z_s) for every quadratic f that ties a step to its neighbours only.
        """
        paths = _matched_paths(self)
        return paths, torch.full_like(paths[..., 0, 0], 1.0 / len(paths))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` exact draws of the whole path: ``[n, B, T, d]``."""
        path = self.mean.new_zeros(n, *self.mean.shape[:-2], 0, self.mean.shape[-1])
        for level in reversed(self._levels):
            shape = (n, *level.shift.shape)
            noise = torch.randn(shape, generator=generator, dtype=path.dtype, device=path.device)
            path = _path(level, path, level.shift + unwhiten(level.cholesky, noise))
        return path + self.quadratic.centre

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z | x) of paths ``z [..., B, T, d]``: ``[..., B]``."""
        path = z - self.mean
        size, squares = path.shape[-2] * path.shape[-1], path.new_zeros(())
        for level in self._levels:
            own = path[..., 0::2, :] - _given(level, path[..., 1::2, :])
            squares = squares + (level.cholesky.mT @ own.unsqueeze(-1)).square().sum((-3, -2, -1))
            path = path[..., 1::2, :]
        return 0.5 * size - self.entropy - 0.5 * squares

    @property
    def cancellation(self) -> Tensor:
        """Σ |Λ_ij Σ_ji| / (T d), ``[B]``: how many times its rounding the error of an entropy a dimension is, if the
        precision Λ is rounded. Of order 1 to 10 if the observations say much about each step.
        """
        within = (self.quadratic.diag * self.covariance).abs().sum((-3, -2, -1))
        along = (self.quadratic.off * self.cross_covariance).abs().sum((-3, -2, -1))
        return (within + 2.0 * along) / (self.mean.shape[-2] * self.mean.shape[-1])


def block_tridiagonal_posterior(
    diag: Tensor,
    off: Tensor,
    linear: Tensor,
    const: Tensor,
    centre: Tensor | None = None,
    measured: Measured | None = None,
) -> StateSpacePosterior:
    """log Z and the posterior of ``diag [B, T, d, d]``, ``off [B, T-1, d, d]``, ``linear [B, T, d]``, ``const
    [B]``.

    The gradient of ``log_evidence`` is that of E_post[log p(x, z)], written with the moments, so no level is
    kept for autograd. Steps beyond the end of a shorter sequence are given D = I, O = 0, l = 0 and −(d/2) log
    2π in ``const``. Memory O(B T d²). Raises ``ImproperPosterior`` if the precision is not positive definite.
    """
    centre = torch.zeros_like(linear) if centre is None else centre
    given = BlockTridiagonal(diag, off, linear, const, centre)
    with torch.no_grad():
        quadratic = BlockTridiagonal(*(v.detach() for v in (diag, off, linear, const, centre)))
        levels, log_evidence, half_log_det, error = _eliminate(quadratic, measured)
        white, covariance, cross = _marginals(levels, linear.shape)
        size = linear.shape[-2] * linear.shape[-1]
        entropy = 0.5 * size * (1.0 + LOG_2PI) - half_log_det
    if torch.is_grad_enabled() and any(v.requires_grad for v in (diag, off, linear, const)):
        expected = _expected(given, white, covariance, cross)
        log_evidence = log_evidence + (expected - expected.detach())
    return StateSpacePosterior(
        log_evidence, white + quadratic.centre, covariance, cross, entropy, error, quadratic, levels
    )


def prolonged(levels: Sequence[Level], path: Tensor) -> Tensor:
    """All steps ``[..., T, d]`` at their most probable, from those left ``[..., K, d]``; about the posterior's mean."""
    for level in reversed(levels):
        path = _path(level, path, torch.zeros_like(level.shift))
    return path


def restricted(levels: Sequence[Level], gradient: Tensor) -> Tensor:
    """The transpose of ``prolonged``: by the steps left ``[..., K, d]`` from all steps ``[..., T, d]``."""
    for level in levels:
        own, kept = gradient[..., 0::2, :].unsqueeze(-1), gradient[..., 1::2, :].shape[-2]
        after = (level.after.mT @ own)[..., :kept, :, :]
        before = _padded(level.before.mT @ own, 0, kept + 1)[..., 1:, :, :]
        gradient = gradient[..., 1::2, :] + (after + before).squeeze(-1)
    return gradient


def _eliminate(
    quadratic: BlockTridiagonal, measured: Measured | None
) -> tuple[tuple[Level, ...], Tensor, Tensor, Tensor]:
    """Integrate out steps 0, 2, 4, … of what is left until nothing is: the levels, log Z, ½ log|Λ| and the error, ``[B]``.

    Measured blocks D' = F (I + E) Fᵀ beside the matrix's D = FFᵀ tell that the couplings, of the same rounding, are off by
    about E in units of a standard deviation: log Z by ‖E‖², the second order, as the most probable path is a maximum.
    """
    diag, off, linear = quadratic.diag, quadratic.off, quadratic.linear.unsqueeze(-1)
    levels: list[Level] = []
    zero = torch.zeros_like(quadratic.const)
    squares, half_log_det, error = zero, zero, zero
    while diag.shape[-3] > 0:
        rough, cholesky, deviation = _factors(diag[..., 0::2, :, :], levels, measured)
        error = error + deviation
        eliminated, kept = cholesky.shape[-3], diag.shape[-3] - cholesky.shape[-3]
        couplings = torch.cat(
            [
                _padded(off[..., 1::2, :, :], 1, eliminated),
                _padded(off[..., 0::2, :, :].mT, 0, eliminated),
            ],
            -1,
        )
        half = torch.linalg.solve_triangular(rough, couplings, upper=False)
        before, after = half.split(diag.shape[-1], -1)
        minus_before, minus_after = _unwhitened(rough, half).split(diag.shape[-1], -1)
        shift = torch.linalg.solve_triangular(cholesky, linear[..., 0::2, :, :], upper=False)
        centred = _unwhitened(cholesky, shift).squeeze(-1)
        levels.append(Level(cholesky, -minus_before, -minus_after, centred))
        squares = squares + 0.5 * shift.square().sum((-3, -2, -1))
        half_log_det = half_log_det + cholesky.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
        if measured is not None and kept:
            diag, off, vector = measured.left(levels)
            linear = vector.unsqueeze(-1)
            continue
        # Step 2j + 1 stays: it is the neighbour after step 2j and, if there is one, before step 2j + 2.
        next_before = _padded(before, 0, kept + 1)[..., 1:, :, :]
        next_shift = _padded(shift, 0, kept + 1)[..., 1:, :, :]
        after, shift = after[..., :kept, :, :], shift[..., :kept, :, :]
        diag = diag[..., 1::2, :, :] - after.mT @ after - next_before.mT @ next_before
        linear = linear[..., 1::2, :, :] - after.mT @ shift - next_before.mT @ next_shift
        off = -(after[..., 1:, :, :].mT @ before[..., 1:kept, :, :])
    size = quadratic.linear.shape[-2] * quadratic.linear.shape[-1]
    log_evidence = quadratic.const + squares - half_log_det + 0.5 * LOG_2PI * size
    return tuple(levels), log_evidence, half_log_det, error


def _factors(
    matrix: Tensor, levels: Sequence[Level], measured: Measured | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower Cholesky factors of the precision of the steps that are eliminated next: of the matrix F, and as measured
    F chol(I + E), and Σ ‖E‖² ``[B]``.

    What these steps are given their neighbours comes from the former, of which the couplings are rows too: an error common
    to both is then no part of it.
    """
    if measured is None:
        cholesky = _cholesky(matrix)
        return cholesky, cholesky, cholesky.new_zeros(())
    rough, identity = rough_cholesky(matrix), torch.eye(matrix.shape[-1]).to(matrix)
    found = measured.own(levels, rough)
    deviation = (found - identity).square().sum((-2, -1))
    return (
        rough,
        rough @ _cholesky(found),
        _AMPLIFIED * deviation.sum(-1),
    )


def _unwhitened(cholesky: Tensor, columns: Tensor) -> Tensor:
    solved: Tensor = torch.linalg.solve_triangular(cholesky.mT, columns, upper=True)
    return solved


def _marginals(levels: tuple[Level, ...], shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Means ``[B, T, d]``, marginal covariances ``[B, T, d, d]`` and Cov(z_{t+1}, z_t) ``[B, T-1, d, d]``,
    coarse to fine.
    """
    *rows, _, dim = shape
    mean = levels[0].shift.new_zeros(*rows, 0, dim)
    covariance = levels[0].shift.new_zeros(*rows, 0, dim, dim)
    cross = covariance
    for level in reversed(levels):
        count, kept = level.shift.shape[-2], mean.shape[-2]
        outer = _padded(covariance, 1, count + 1)
        between = _padded(cross, 1, count)
        with_before = level.before @ outer[..., :-1, :, :] + level.after @ between
        with_after = level.before @ between.mT + level.after @ outer[..., 1:, :, :]
        own = (
            torch.cholesky_inverse(level.cholesky)
            + with_before @ level.before.mT
            + with_after @ level.after.mT
        )
        mean = _path(level, mean, level.shift)
        covariance = _interleaved(own, covariance)
        cross = _interleaved(with_after[..., :kept, :, :].mT, with_before[..., 1:, :, :])
    return mean, covariance, cross


def _path(level: Level, kept: Tensor, offset: Tensor) -> Tensor:
    """The path of a level from the steps kept ``[..., K, d]`` and the eliminated steps' own ``offset [..., E,
    d]``.
    """
    own = _given(level, kept) + offset
    return _interleaved(own.unsqueeze(-1), kept.unsqueeze(-1)).squeeze(-1)


def _given(level: Level, kept: Tensor) -> Tensor:
    """What the steps kept ``[..., K, d]`` add to the mean of those eliminated between them, ``[..., E, d]``."""
    neighbours = _padded(kept.unsqueeze(-1), 1, level.shift.shape[-2] + 1)
    own = level.before @ neighbours[..., :-1, :, :] + level.after @ neighbours[..., 1:, :, :]
    return own.squeeze(-1)


def _matched_paths(posterior: StateSpacePosterior) -> Tensor:
    """3d + 1 paths ``[3d+1, B, T, d]`` whose mean, marginal and consecutive covariances are exactly the
    posterior's.

    Drawn like a sample, but with noise that over the paths is orthonormal, and orthogonal to 1 and to the
    neighbours of its step.
    """
    dim = posterior.mean.shape[-1]
    count = 3 * dim + 1
    path = posterior.mean.new_zeros(count, *posterior.mean.shape[:-2], 0, dim)
    for level in reversed(posterior._levels):
        neighbours = _padded(path.unsqueeze(-1), 1, level.shift.shape[-2] + 1).squeeze(-1).movedim(0, -2)
        one = torch.ones_like(neighbours[..., :-1, :, :1])
        taken = torch.cat([one, neighbours[..., :-1, :, :], neighbours[..., 1:, :, :]], -1)  # [B, E, S, 2d+1]
        noise = torch.linalg.qr(taken, mode="complete").Q[..., 2 * dim + 1 :].movedim(-2, 0) * count**0.5
        path = _path(level, path, unwhiten(level.cholesky, noise))
    return posterior.mean + path


def _expected(given: BlockTridiagonal, mean: Tensor, covariance: Tensor, cross: Tensor) -> Tensor:
    """E_post[log p(x, z)] as a function of the quadratic, the moments (about the centre) held fixed:
    ``[B]``.
    """
    second = covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    consecutive = cross + mean[..., 1:, :, None] * mean[..., :-1, None, :]
    linear = (given.linear * mean).sum((-2, -1)) - 0.5 * (given.diag * second).sum((-3, -2, -1))
    return given.const + linear - (given.off * consecutive).sum((-3, -2, -1))


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factors, or ``ImproperPosterior``."""
    cholesky: Tensor
    cholesky, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any():
        raise ImproperPosterior(
            "state-space log joint",
            "a positive definite precision (a proper posterior)",
            f"one that is not, in row {', '.join(str(int(i)) for i in failed.any(-1).nonzero()[0])}",
            "give the first state and every transition a finite variance",
        )
    return cholesky


def _padded(blocks: Tensor, front: int, length: int) -> Tensor:
    """Zero blocks in front of and behind ``[..., n, a, b]`` so that there are ``length``."""
    return torch.nn.functional.pad(blocks, (0, 0, 0, 0, front, length - front - blocks.shape[-3]))


def _interleaved(even: Tensor, odd: Tensor) -> Tensor:
    """Blocks 0, 2, 4, … and 1, 3, 5, … in order, along axis −3."""
    out = even.new_empty(*even.shape[:-3], even.shape[-3] + odd.shape[-3], *even.shape[-2:])
    out[..., 0::2, :, :] = even
    out[..., 1::2, :, :] = odd
    return out
