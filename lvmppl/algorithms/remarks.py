"""What a fitted θ has that a reader should know of: a maximum at infinity, a component close to collapsing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lvmppl.algorithms.closed_form import ClosedSite
from lvmppl.algorithms.plan import Plan
from lvmppl.density import Values
from lvmppl.exact.named import align

NARROW = 1e-4  # smallest variance over that of the data, below which a component is nearly collapsed


def remarks(plan: Plan, values: Values) -> list[str]:
    """Sentences about θ, none where all is well.

    A likelihood has no maximum where a component shrinks onto few rows: of several restarts the best is then one that
    came closest to that, which a higher log evidence alone does not tell.
    """
    found = []
    infinite = [n for n in plan.closed if not bool(torch.isfinite(values[n]).all())]
    if infinite:
        found.append(f"the maximum of {', '.join(infinite)} lies at infinity (a probability of 0 or 1)")
    for site in plan.sites:
        for name, ratio in _narrowest(site, values):
            if ratio < NARROW:
                found.append(
                    f"{name} has a component whose smallest variance is {ratio:.1e} of the data's: nearly collapsed"
                )
    return found


def _narrowest(site: ClosedSite, values: Values) -> Iterator[tuple[str, float]]:
    """(parameters, smallest variance in any direction over that of the data) of a normal or multivariate site."""
    if site.variance is None:
        return
    led = {n: v.unsqueeze(0) for n, v in values.items()}
    for field in ("precision", "covariance"):
        lookup = site.lookups.get(field)
        if lookup is None or not lookup.names:
            continue
        named, spread = site.field(field, led), site.variance
        if not bool((spread.tensor > 0).all()):
            continue
        least: Tensor
        if field == "precision":
            dims = (*named.dims, *(d for d in spread.dims if d not in named.dims))
            least = 1 / (align(named, dims) * align(spread, dims))
        else:
            scale = spread.tensor.sqrt()
            if scale.dim() > 1:
                continue
            least = torch.linalg.eigvalsh(named.tensor / (scale.unsqueeze(-1) * scale))
        yield ", ".join(lookup.names), float(least.min())


__all__ = ["NARROW", "remarks"]
