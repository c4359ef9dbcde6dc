"""Standard errors of θ̂: the inverse of the observed information −∇² log p(x; θ̂), by the delta method.

The Hessian is that of what the fit climbed (the exact log evidence, with priors the log posterior) in unconstrained
coordinates u: differences of its exact gradient, fourth order, a hundredth of a standard deviation apart, which every
exact engine allows. With J = ∂θ/∂u,

    Cov θ̂ = J (−∇²_u log p)⁻¹ Jᵀ

A direction that log p does not depend on (a softmax's constant, a rotation of factors) is left out; an entry that moves
along it has no standard error, nor has one at a boundary.

Shapes: P unconstrained coordinates. Source: Efron & Hinkley (1978), on observed information.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lvmppl.algorithms.evidence import log_evidence
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.spellings import is_real
from lvmppl.density import Coordinates, Values, unvalidated
from lvmppl.fitted import Fit

_STEP = 1e-2  # of the differences, in standard deviations
_FLAT = 1e-9  # nats by which a difference must bend log p to be told from rounding
_WIDEST = 1e12
_SINGULAR = 1e-6  # eigenvalue of the information (of unit diagonal) below which a direction counts as flat
_LEAK = 1e-3  # share of an entry's motion along flat directions above which it has no standard error

Gradient = Callable[[Tensor], Tensor]


def with_standard_errors(fit: Fit, problem: Problem) -> Fit:
    """The fit with a standard error for every parameter entry (NaN where there is none, which its message explains)."""
    with unvalidated():
        errors, missing = standard_errors(problem, fit.parameters)
    notes = [fit.message, *missing]
    return replace(fit, standard_errors=errors, message="; ".join(note for note in notes if note))


def standard_errors(problem: Problem, values: Values) -> tuple[dict[str, Tensor], list[str]]:
    """Standard errors by parameter, in its own shape, and a line for each parameter that lacks some.

    Parameters that were held (`freeze`) count as known: they have none, and no line.
    """
    names = problem.free_theta
    errors = {n: torch.full_like(values[n], torch.nan) for n in problem.theta}
    if not names:
        return errors, []
    coordinates = Coordinates(problem.model.specs, names)
    start = coordinates.unconstrain(values)
    jacobian = _jacobian(coordinates, start)  # [entries of θ, P]
    flat = _flat(start)
    active = torch.nonzero(flat.isfinite() & (jacobian != 0).any(0)).flatten()
    # An unbounded coordinate may be of any size; the others are logarithms and logits.
    wide = torch.cat(
        [
            torch.full((v.numel(),), _WIDEST if is_real(problem.model.specs[n].constraint) else 1.0)
            for n, v in start.items()
        ]
    )
    gradient = _gradient(problem, coordinates, values, start, active)
    information, bent = _information(gradient, flat[active], wide[active])
    deviations, lacking = _deviations(information, bent, jacobian[:, active])
    sizes = [values[n].numel() for n in names]
    notes = []
    for name, own, bad in zip(names, deviations.split(sizes), lacking.split(sizes), strict=True):
        errors[name] = own.reshape(values[name].shape)
        if bool(bad.any()):
            which = "" if bool(bad.all()) else f" ({int(bad.sum())} of its {len(bad)} entries)"
            notes.append(
                f"no standard error for {name}{which}: it is at a boundary, or the information is singular there"
            )
    return errors, notes


def _flat(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([v.reshape(-1) for v in parts.values()])


def _jacobian(coordinates: Coordinates, start: Values) -> Tensor:
    """∂θ/∂u, block by block; 0 where it is not finite."""
    blocks = []
    for name in coordinates.names:
        u, transform = start[name], coordinates.transforms[name]
        found = torch.autograd.functional.jacobian(transform, u)
        blocks.append(found.reshape(-1, u.numel()))
    whole: Tensor = torch.block_diag(*blocks)
    return whole.nan_to_num(0.0, 0.0, 0.0)


def _gradient(
    problem: Problem, coordinates: Coordinates, values: Values, start: Values, active: Tensor
) -> Gradient:
    """u of the active coordinates ↦ ∇_u of the objective, the others held."""
    base, sizes = _flat(start), [v.numel() for v in start.values()]
    fixed = {n: values[n] for n in problem.theta if n not in coordinates.names}

    def gradient(u: Tensor) -> Tensor:
        leaf = u.detach().clone().requires_grad_()
        with torch.enable_grad():
            whole = base.index_put((active,), leaf).split(sizes)
            free = {n: w.reshape(start[n].shape) for n, w in zip(start, whole, strict=True)}
            total = log_evidence(problem, {**fixed, **coordinates.constrain(free)})
            (found,) = torch.autograd.grad(total, leaf)
        return found

    return gradient


def _information(gradient: Gradient, u: Tensor, widest: Tensor) -> tuple[Tensor, Tensor]:
    """−∇² by fourth-order differences along each coordinate [P, P], and which coordinates bend log p at all [P]."""
    eye = torch.eye(len(u), dtype=u.dtype)
    rows, bent = [], []
    for e, start, limit in zip(eye, (1 + u.abs()).tolist(), widest.tolist(), strict=True):
        step = _step(gradient, u, e, start * torch.finfo(u.dtype).eps ** (1 / 3), limit)
        bent.append(step is not None)
        step = start * _STEP if step is None else step
        near = gradient(u - step * e) - gradient(u + step * e)
        far = gradient(u - 2 * step * e) - gradient(u + 2 * step * e)
        rows.append((8 * near - far) / (12 * step))
    matrix = torch.stack(rows).nan_to_num(0.0, 0.0, 0.0)
    return (matrix + matrix.T) / 2, torch.tensor(bent)


def _step(gradient: Gradient, u: Tensor, e: Tensor, h: float, limit: float) -> float | None:
    """A hundredth of a standard deviation, from a first difference that is widened until log p bends; None: it does not."""
    while True:
        bend = float(((gradient(u - h * e) - gradient(u + h * e)) @ e) / (2 * h))
        if bend * h * h > _FLAT:
            return float(_STEP * bend**-0.5)
        if h >= limit or not math.isfinite(bend):
            return None
        h = min(30 * h, limit)


def _deviations(information: Tensor, bent: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations of the entries of θ, NaN where there is none, and where that is so."""
    diagonal = information.diagonal()
    scale = torch.where(bent & (diagonal > 0), diagonal.clamp_min(1e-300), 1.0).rsqrt()
    scaled = scale.unsqueeze(-1) * information * scale
    scaled = torch.where(bent & bent.unsqueeze(-1), scaled, 0.0)
    values, vectors = torch.linalg.eigh(scaled)
    motion = (jacobian * scale) @ vectors  # [entries, P]
    regular = values > _SINGULAR
    variance = torch.where(regular, motion.square() / torch.where(regular, values, 1.0), 0.0).sum(-1)
    leak = torch.where(regular, 0.0, motion.square()).sum(-1)
    lacking = (leak > _LEAK**2 * motion.square().sum(-1)) | (motion == 0).all(-1)
    return torch.where(lacking, torch.nan, variance.sqrt()), lacking
