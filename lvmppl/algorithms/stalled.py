"""Bounds at which an ascent in unconstrained coordinates stalls: next to 0 a probability hardly moves, even if log p rises.

∂ log p/∂u of a logit u carries the probability itself as a factor, so that steps, and the changes of log p that a stopping
rule looks at, vanish next to a bound as they do at a maximum. What tells the two apart is the derivative in the constrained
parameter: at a maximum on the bound log p falls away from it (Karush, Kuhn & Tucker).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvmppl.algorithms.evidence import log_evidence
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.spellings import bounds, plain
from lvmppl.density import Values
from lvmppl.wording import listed

_NEXT = 1e-6  # of a parameter's range
_RISES = 1.0  # nats for the whole range, to first order, from which a rise is spoken of


def stalled_at_bounds(problem: Problem, values: Values) -> str:
    """A sentence about parameters next to a bound from which the log evidence rises; empty where there are none."""
    near = {n: where for n in problem.free_theta if (where := _near(problem, n, values[n])) is not None}
    if not near:
        return ""
    leaves = {n: values[n].detach().clone().requires_grad_() for n in near}
    with torch.enable_grad():
        total = log_evidence(problem, {**values, **leaves})
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = []
    for name, grad in zip(near, grads, strict=True):
        rise = 0.0 if grad is None else _rise(values[name], grad, near[name], _is_simplex(problem, name))
        if rise > _RISES:
            found.append(f"{name} ({rise:.2g} nats for its whole range, to first order)")
    if not found:
        return ""
    return (
        f"stopped next to a bound from which {problem.objective_name} rises, in {listed(found)}: no maximum, but steps in "
        "unconstrained coordinates vanish there; start elsewhere, or use em"
    )


def _near(problem: Problem, name: str, value: Tensor) -> Tensor | None:
    """+1 next to a lower bound, −1 next to an upper one, times the range; 0 elsewhere. None where all are 0."""
    constraint = plain(problem.model.specs[name].constraint)
    if _is_simplex(problem, name):
        side = (value < _NEXT).to(value)
    elif constraint.event_dim == 0:
        low, high = (b.to(value) for b in bounds(constraint))
        span = high - low
        side = (value - low < _NEXT * span).to(value) - (high - value < _NEXT * span).to(value)
        side = torch.where(span.isinf(), 0.0, side * span)
    else:
        return None
    return side if bool((side != 0).any()) else None


def _is_simplex(problem: Problem, name: str) -> bool:
    return type(plain(problem.model.specs[name].constraint)).__name__.lstrip("_") == "Simplex"


def _rise(value: Tensor, grad: Tensor, side: Tensor, simplex: bool) -> float:
    """The largest derivative away from the bound: within a simplex that of weight taken from all in proportion."""
    if simplex:
        inner = torch.where(value > 0, grad, 0.0)
        grad = grad - (value * inner).sum(-1, keepdim=True)
    return float(torch.where(side != 0, grad * side, 0.0).max())


__all__ = ["stalled_at_bounds"]
