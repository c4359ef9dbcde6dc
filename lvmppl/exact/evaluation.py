"""What every continuous kernel does with a log joint: evaluate it in pieces, differentiate it, put its
gradient back.

A *log joint* is a pure function ``log_joint(z) -> log p(x, z; θ)`` of the latent values ``z  [S, *rows, d]``,
with result ``[S, *rows]`` in nats: ``S`` points a row, rows independent of one another. ``rows`` is any
shape: ``(N,)`` for N data, ``(C, N)`` for N data under each of C discrete configurations. It may return −∞
but must not raise where the density is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lvmppl.errors import InputError

LogJoint = Callable[[Tensor], Tensor]
Rows = int | Sequence[int]

# Points (S times rows) handed to the log joint at once: bounds the memory of one call, and fits the cache.
CHUNK = 1 << 18


class NotQuadratic(InputError):
    """The log joint is not quadratic in z; ``discrepancy`` is the largest deviation found, in units of its
    tolerance.
    """

    def __init__(self, where: str, got: str, discrepancy: float) -> None:
        super().__init__(
            where, "a log joint quadratic in the latent values", got, "use quadrature or a bound"
        )
        self.discrepancy = discrepancy

    def __reduce__(self) -> tuple[type[NotQuadratic], tuple[str, str, float]]:  # type: ignore[override]
        return type(self), (self.where, self.got, self.discrepancy)


class ImproperPosterior(InputError):
    """exp(log joint) has no finite integral over z, so there is no posterior."""


def row_shape(rows: Rows) -> tuple[int, ...]:
    """``N`` or ``(C, N)`` as a tuple."""
    return (rows,) if isinstance(rows, int) else tuple(rows)


def pieces(z: Tensor, rows: int, chunk: int) -> Iterator[Tensor]:
    """``z [S, ...]`` cut along S so that a piece has at most ``chunk`` points over all rows (but at least one
    a row).
    """
    yield from torch.split(z, max(1, chunk // max(1, rows)))


def checked_value(log_joint: LogJoint, z: Tensor) -> Tensor:
    """``log_joint(z)``; a result of another shape than ``[S, *rows]`` is refused, NaN counts as density 0."""
    value = log_joint(z)
    if value.shape != z.shape[:-1]:
        raise InputError(
            "log joint", f"a value of shape {tuple(z.shape[:-1])}", f"{tuple(value.shape)}", "keep rows apart"
        )
    return value


@torch.no_grad()
def evaluate(log_joint: LogJoint, z: Tensor, chunk: int = CHUNK) -> Tensor:
    """log p(x, z) at ``z [S, *rows, d]`` without gradient, in pieces: ``[S, *rows]``.

    NaN and +∞, which mark the edge of what floating point can hold or a pole of measure 0, become −∞.
    """
    rows = z[0, ..., 0].numel()
    value = torch.cat([checked_value(log_joint, part) for part in pieces(z, rows, chunk)])
    return value.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def value_and_gradient(log_joint: LogJoint, z: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """log p(x, z) and ∇_z log p(x, z) at ``z [S, *rows, d]``, both detached: ``[S, *rows]`` and ``[S, *rows,
    d]``.
    """
    rows = z[0, ..., 0].numel()
    values, gradients = [], []
    for part in pieces(z.detach(), rows, chunk):
        point = part.clone().requires_grad_()
        with torch.enable_grad():
            value = checked_value(log_joint, point)
            total = value.sum()
        gradient = torch.zeros_like(part)
        if total.requires_grad:
            (found,) = torch.autograd.grad(total, point, allow_unused=True)
            gradient = gradient if found is None else found
        values.append(value.detach())
        gradients.append(gradient)
    return torch.cat(values), torch.cat(gradients)


def with_gradient(
    log_evidence: Tensor, log_joint: LogJoint, z: Tensor, weights: Tensor, chunk: int = CHUNK
) -> Tensor:
    """``log_evidence`` unchanged in value, with ∇_θ log Z = E_post[∇_θ log p(x, z; θ)] = Σ_s w_s ∇_θ log p(x,
    z_s; θ).

    ``z [S, *rows, d]`` and ``weights [S, *rows]`` (or ``[S, 1, ...]``) are held fixed; they need only
    integrate ∇_θ log p against the posterior. More points than ``chunk`` are recomputed in the backward pass
    instead of being stored. Outside of autograd, or when the log joint depends on nothing that requires a
    gradient, nothing is evaluated twice.
    """
    if not torch.is_grad_enabled():
        return log_evidence
    rows = z[0, ..., 0].numel()
    total: Tensor | None = None
    for part, weight in zip(
        pieces(z.detach(), rows, chunk), pieces(weights.detach(), rows, chunk), strict=True
    ):
        several = len(part) < len(z)
        term = checkpoint(_weighted, log_joint, part, weight, use_reentrant=False) if several else None
        term = _weighted(log_joint, part, weight) if term is None else term
        if not term.requires_grad:
            return log_evidence
        total = term if total is None else total + term
    return log_evidence if total is None else log_evidence + (total - total.detach())


def _weighted(log_joint: LogJoint, z: Tensor, weight: Tensor) -> Tensor:
    """Σ_s w_s log p(x, z_s) over the points that carry weight and density: ``[*rows]``."""
    value = log_joint(z)
    counted = value.isfinite() & (weight > 0)
    return (weight * torch.where(counted, value, torch.zeros_like(value))).sum(0)
