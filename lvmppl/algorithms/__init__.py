"""Fits: each algorithm is a module with `infer(problem, options) -> Fit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lvmppl.algorithms import em, enumeration, mcmc, svi, vem
from lvmppl.fitted import Fit

INFER: dict[str, Callable[[Any, Any], Fit]] = {
    "enumeration": enumeration.infer,
    "em": em.infer,
    "vem": vem.infer,
    "svi": svi.infer,
    "mcmc": mcmc.infer,
}
