"""How far rounding may move the log p(x; θ) that is computed: what a fall of it means is judged by this.

Three parts, each in nats, ε the precision of the dtype, N rows with V numbers in all:

- the sum: every number's log-density is rounded, ε · 64 V (a density of e^64 = 6 · 10²⁷ is the largest allowed for; one
  that is far smaller is itself a large part of log p(x), of which a share is allowed anyway)
- squares that were expanded about the mean of the data (`tabulated`), ε N max (x − r)²/σ²
- a covariance near to singular: R = Σ in units of its own scales, D × D, is stored with errors up to ε/2 an entry, which
  moves log |R|/2 by ε/4 · D tr R⁻¹; its factorisation adds as much: ε/2 · N D tr R⁻¹
"""

from __future__ import annotations

import torch

from lvmppl.algorithms.closed_form import ClosedSite
from lvmppl.algorithms.plan import Plan, working_dtype
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.tabulated import Tabulated
from lvmppl.density import Values

RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Share of |log p(x; θ)| that it may fall by: the sums of its evaluation lose no more."""
_NATS = 64.0  # log-density of a number


def rounding(problem: Problem, plan: Plan, tables: Tabulated | None, values: Values) -> float:
    """How far from log p(x; θ) a computed one may be, in nats (its share of |log p| aside)."""
    numbers = sum(v.numel() for v in problem.data.values())
    per_row = (
        0.0 if tables is None else float(tables.lost({n: v.unsqueeze(0) for n, v in values.items()}).max())
    )
    per_row += sum(_of_matrix(site, values) for site in plan.sites if "covariance" in site.lookups)
    eps: float = torch.finfo(working_dtype(problem)).eps
    return eps * (_NATS * numbers + problem.num_rows * per_row)


def _of_matrix(site: ClosedSite, values: Values) -> float:
    """D tr R⁻¹/2, the largest over the site's covariances."""
    covariance = site.lookups["covariance"].evaluate(values)
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    eigenvalues = torch.linalg.eigvalsh(covariance / (scale.unsqueeze(-1) * scale.unsqueeze(-2)))
    size = covariance.shape[-1]
    # A smaller one is not computed any more, and the log-density not a number.
    least = torch.finfo(eigenvalues.dtype).eps
    return float((size / eigenvalues.clamp_min(least)).sum(-1).max()) / 2


__all__ = ["RELATIVE", "rounding"]
