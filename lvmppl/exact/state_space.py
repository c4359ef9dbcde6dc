"""The exact posterior of linear-Gaussian state-space models: a Gaussian whose precision is block-tridiagonal
in time.

    log p(x, z) = c + Σ_t l_tᵀ z_t − ½ Σ_t z_tᵀ D_t z_t − Σ_t z_{t+1}ᵀ O_t z_t        z_t − centre_t for z_t
    if a centre is given

by block cyclic reduction: every second time step is integrated out at once, so T steps take log2 T batched
levels and O(T d³) work, with no loop over time; the way back gives the conditionals, hence all marginals and
exact samples. It is a Cholesky elimination in nested-dissection order, so it is as stable as the Kalman
smoother in square-root form.

Shapes: ``B`` sequences (any shape ``rows``), ``T`` steps, ``d`` dims of the state, ``S`` points. Everything
is in nats. Source: Golub & Van Loan, *Matrix Computations*, 4th ed., section 4.5.4 (cyclic reduction).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lvmppl.exact.evaluation import (
    CHUNK,
    ImproperPosterior,
    LogJoint,
    Rows,
    evaluate,
    row_shape,
    value_and_gradient,
    with_gradient,
)
from lvmppl.exact.gaussian import LOG_2PI, STEP, refuse_above_one, unwhiten

_CHECK_RADII = (0.5, 30.0, 1e3)


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
class _Level:
    """One level of the elimination: z_e = shift + before·z_{e−1} + after·z_{e+1} + L⁻ᵀε for the E eliminated
    steps e.
    """

    cholesky: Tensor  # [B, E, d, d], lower L of the precision of z_e given its neighbours
    before: Tensor  # [B, E, d, d], zero where there is no neighbour before
    after: Tensor  # [B, E, d, d]
    shift: Tensor  # [B, E, d]


@dataclass(frozen=True)
class StateSpacePosterior:
    """p(z_1..T | x) of every sequence.

    ``log_evidence [B]`` is differentiable; ``mean [B, T, d]``, ``covariance [B, T, d, d]`` (marginal),
    ``cross_covariance [B, T-1, d, d]`` (Cov(z_{t+1}, z_t)) and ``entropy [B]`` are detached.
    """

    log_evidence: Tensor
    mean: Tensor
    covariance: Tensor
    cross_covariance: Tensor
    entropy: Tensor
    quadratic: BlockTridiagonal = field(repr=False)
    _levels: tuple[_Level, ...] = field(repr=False)

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
        q, w = self.quadratic, z - self.mean
        along = (w[..., 1:, :] * (q.off @ w[..., :-1, :].unsqueeze(-1)).squeeze(-1)).sum((-2, -1))
        within = (w * (q.diag @ w.unsqueeze(-1)).squeeze(-1)).sum((-2, -1))
        size = self.mean.shape[-2] * self.mean.shape[-1]
        return 0.5 * size - self.entropy - 0.5 * within - along


def block_tridiagonal_posterior(
    diag: Tensor, off: Tensor, linear: Tensor, const: Tensor, centre: Tensor | None = None
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
        levels, log_evidence, half_log_det = _eliminate(quadratic)
        white, covariance, cross = _marginals(levels, linear.shape)
        size = linear.shape[-2] * linear.shape[-1]
        entropy = 0.5 * size * (1.0 + LOG_2PI) - half_log_det
    if torch.is_grad_enabled() and any(v.requires_grad for v in (diag, off, linear, const)):
        expected = _expected(given, white, covariance, cross)
        log_evidence = log_evidence + (expected - expected.detach())
    return StateSpacePosterior(
        log_evidence, white + quadratic.centre, covariance, cross, entropy, quadratic, levels
    )


def tridiagonal_from_log_joint(
    log_joint: LogJoint,
    num_rows: Rows,
    num_steps: int,
    dim: int,
    *,
    rtol: float | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    chunk: int = CHUNK,
) -> BlockTridiagonal:
    """The block-tridiagonal quadratic of a log joint of ``z [S, B, T, d]``, with result ``[S, B]`` or
    per-step terms ``[S, B, T]``.

    Every third time step is moved at once, so 3d + 1 gradients give all blocks whatever T is; they are taken
    twice, the second time at the mode and with each step's own scale. Gradient and value are then checked at
    random points: a log joint that is not quadratic, or couples steps further apart than one, raises
    ``NotQuadratic``. The result is detached and centred at the mode.
    """
    rows = row_shape(num_rows)
    total, chunk = _flat(log_joint, num_steps, dim), max(1, chunk // max(1, num_steps))
    centre = torch.zeros(*rows, num_steps, dim, dtype=dtype, device=device)
    scale = torch.ones_like(centre)
    first = _coloured(total, centre, scale, chunk)
    try:
        posterior = block_tridiagonal_posterior(first.diag, first.off, first.linear, first.const)
    except ImproperPosterior:
        _check_tridiagonal(total, first, scale, rtol, chunk)
        raise
    scale = posterior.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    quadratic = _coloured(total, posterior.mean, STEP * scale, chunk)
    _check_tridiagonal(total, quadratic, scale, rtol, chunk)
    return quadratic


def state_space_posterior(
    log_joint: LogJoint,
    num_rows: Rows,
    num_steps: int,
    dim: int,
    *,
    rtol: float | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    chunk: int = CHUNK,
) -> StateSpacePosterior:
    """The posterior of ``log_joint`` as in ``tridiagonal_from_log_joint``, its log evidence differentiable in
    θ.

    ∇_θ log Z = E_post[∇_θ log p] is averaged over 3d + 1 paths which have exactly the posterior's mean,
    marginal and consecutive covariances, so that it is exact for every quadratic of this form.
    """
    fitted = tridiagonal_from_log_joint(
        log_joint, num_rows, num_steps, dim, rtol=rtol, dtype=dtype, device=device, chunk=chunk
    )
    posterior = block_tridiagonal_posterior(
        fitted.diag, fitted.off, fitted.linear, fitted.const, fitted.centre
    )
    if not torch.is_grad_enabled():
        return posterior
    paths, weights = posterior.nodes()
    paths = paths.flatten(-2)
    total, chunk = _flat(log_joint, num_steps, dim), max(1, chunk // max(1, num_steps))
    return replace(
        posterior, log_evidence=with_gradient(posterior.log_evidence, total, paths, weights, chunk)
    )


def _flat(log_joint: LogJoint, num_steps: int, dim: int) -> LogJoint:
    """The log joint as a function of ``z [S, *rows, T·d]`` with result ``[S, *rows]``: per-step terms are
    summed.
    """

    def total(z: Tensor) -> Tensor:
        value = log_joint(z.reshape(*z.shape[:-1], num_steps, dim))
        return value.sum(-1) if value.dim() == z.dim() else value

    return total


def _eliminate(quadratic: BlockTridiagonal) -> tuple[tuple[_Level, ...], Tensor, Tensor]:
    """Integrate out steps 0, 2, 4, … of what is left until nothing is: the levels, log Z and ½ log|Λ|,
    ``[B]``.
    """
    diag, off, linear = quadratic.diag, quadratic.off, quadratic.linear.unsqueeze(-1)
    levels, squares, half_log_det = [], torch.zeros_like(quadratic.const), torch.zeros_like(quadratic.const)
    while diag.shape[-3] > 0:
        cholesky = _cholesky(diag[..., 0::2, :, :])
        eliminated, kept = cholesky.shape[-3], diag.shape[-3] - cholesky.shape[-3]
        couplings = torch.cat(
            [
                _padded(off[..., 1::2, :, :], 1, eliminated),
                _padded(off[..., 0::2, :, :].mT, 0, eliminated),
                linear[..., 0::2, :, :],
            ],
            -1,
        )
        half = torch.linalg.solve_triangular(cholesky, couplings, upper=False)
        full = torch.linalg.solve_triangular(cholesky.mT, half, upper=True)
        before, after, shift = half.split([*diag.shape[-2:], 1], -1)
        minus_before, minus_after, centred = full.split([*diag.shape[-2:], 1], -1)
        levels.append(_Level(cholesky, -minus_before, -minus_after, centred.squeeze(-1)))
        squares = squares + 0.5 * shift.square().sum((-3, -2, -1))
        half_log_det = half_log_det + cholesky.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
        # Step 2j + 1 stays: it is the neighbour after step 2j and, if there is one, before step 2j + 2.
        next_before = _padded(before, 0, kept + 1)[..., 1:, :, :]
        next_shift = _padded(shift, 0, kept + 1)[..., 1:, :, :]
        after, shift = after[..., :kept, :, :], shift[..., :kept, :, :]
        diag = diag[..., 1::2, :, :] - after.mT @ after - next_before.mT @ next_before
        linear = linear[..., 1::2, :, :] - after.mT @ shift - next_before.mT @ next_shift
        off = -(after[..., 1:, :, :].mT @ before[..., 1:kept, :, :])
    size = quadratic.linear.shape[-2] * quadratic.linear.shape[-1]
    return tuple(levels), quadratic.const + squares - half_log_det + 0.5 * LOG_2PI * size, half_log_det


def _marginals(levels: tuple[_Level, ...], shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
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


def _path(level: _Level, kept: Tensor, offset: Tensor) -> Tensor:
    """The path of a level from the steps kept ``[..., K, d]`` and the eliminated steps' own ``offset [..., E,
    d]``.
    """
    neighbours = _padded(kept.unsqueeze(-1), 1, offset.shape[-2] + 1)
    own = level.before @ neighbours[..., :-1, :, :] + level.after @ neighbours[..., 1:, :, :]
    return _interleaved(own + offset.unsqueeze(-1), kept.unsqueeze(-1)).squeeze(-1)


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


def _coloured(total: LogJoint, centre: Tensor, step: Tensor, chunk: int) -> BlockTridiagonal:
    """All blocks of −Hessian from 3d + 1 gradients: moving steps t ≡ k (mod 3) reaches each block row through
    one of them only.
    """
    *rows, steps, dim = centre.shape
    time = torch.arange(steps, device=centre.device)
    colours = (time % 3 == torch.arange(3, device=centre.device)[:, None]).to(centre)  # [3, T]
    moves = torch.einsum("kt,ij->kitj", colours, torch.eye(dim).to(centre)).reshape(
        3 * dim, *[1] * len(rows), steps, dim
    )
    z = torch.cat([centre.unsqueeze(0), centre + moves * step])
    value, flat = value_and_gradient(total, z.flatten(-2), chunk)
    gradient = flat.reshape(z.shape)
    change = (gradient[0] - gradient[1:]).reshape(3, dim, *centre.shape).movedim(-2, 0)  # [T, 3, i, *rows, j]

    def block(row: Tensor, column: Tensor) -> Tensor:
        picked = change[row, column % 3].movedim(1, -1).movedim(0, -3)  # [*rows, ·, j, i]
        scaled: Tensor = picked / step[..., column, :].unsqueeze(-2)
        return scaled

    own, below, above = block(time, time), block(time[1:], time[:-1]), block(time[:-1], time[1:])
    dead = value[0] == -torch.inf  # density 0 everywhere: log Z = −∞ and a placeholder posterior
    diag = torch.where(dead[..., None, None, None], torch.eye(dim).to(centre), 0.5 * (own + own.mT))
    off = (0.5 * (below + above.mT)).masked_fill(dead[..., None, None, None], 0.0)
    return BlockTridiagonal(diag, off, gradient[0].masked_fill(dead[..., None, None], 0.0), value[0], centre)


def _check_tridiagonal(
    total: LogJoint, quadratic: BlockTridiagonal, scale: Tensor, rtol: float | None, chunk: int
) -> None:
    """Compare gradient and value with the quadratic at random paths on both sides, near and far."""
    epsilon = torch.finfo(scale.dtype).eps
    rtol = 4.0 * epsilon ** (2.0 / 3.0) if rtol is None else rtol
    generator = torch.Generator(device=scale.device).manual_seed(0)
    shape, lead = (len(_CHECK_RADII), *scale.shape), (-1, *[1] * scale.dim())
    white = torch.randn(shape, generator=generator, dtype=scale.dtype, device=scale.device)
    white = white * torch.tensor(_CHECK_RADII).to(scale).view(lead)
    w = torch.cat([white, -white]) * scale
    value, flat = value_and_gradient(total, (quadratic.centre + w).flatten(-2), chunk)
    found = flat.reshape(w.shape)
    expected_value, expected = _predicted(quadratic, w)
    size = (scale * (found.abs() + expected.abs())).amax((-2, -1)) + 1.0
    ratio = ((found - expected).abs() * scale).amax((-2, -1)) / (64.0 * epsilon**0.5 * size)
    still = torch.tensor([-3.0, -1.0, 1.0, 3.0]).to(scale).view(lead) * epsilon**0.5 * scale
    noise = (evaluate(total, (quadratic.centre + still).flatten(-2), chunk) - quadratic.const).abs().amax(0)
    noise = noise.nan_to_num(nan=0.0, posinf=0.0).clamp(max=epsilon**0.25)
    tolerance = rtol * (value.abs() + quadratic.const.abs() + 1.0) + 30.0 * noise * size
    ratio = torch.maximum(ratio, (value - expected_value).abs() / tolerance).nan_to_num(nan=torch.inf).amax(0)
    dead = (quadratic.const == -torch.inf) & (value == -torch.inf).all(0)
    refuse_above_one(
        ratio.masked_fill(dead, 0.0), "it is no quadratic whose steps are tied to their neighbours alone"
    )


def _predicted(quadratic: BlockTridiagonal, w: Tensor) -> tuple[Tensor, Tensor]:
    """Value ``[S, B]`` and gradient ``[S, B, T, d]`` of the quadratic at ``w [S, B, T, d]`` from its
    centre.
    """
    diagonal = (quadratic.diag @ w.unsqueeze(-1)).squeeze(-1)
    lower = (quadratic.off @ w[..., :-1, :].unsqueeze(-1)).squeeze(-1)
    upper = (quadratic.off.mT @ w[..., 1:, :].unsqueeze(-1)).squeeze(-1)
    zero = torch.zeros_like(w[..., :1, :])
    gradient = quadratic.linear - diagonal - torch.cat([zero, lower], -2) - torch.cat([upper, zero], -2)
    return quadratic.const + 0.5 * (w * (quadratic.linear + gradient)).sum((-2, -1)), gradient


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
