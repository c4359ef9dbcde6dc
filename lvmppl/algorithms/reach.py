"""What a draw reaches: terms that stand outside of a plate and yet depend on a site inside of it.

The model's own sums make some (a global state left out of q depends on every row's z), and a model that carries a draw
out of its plate makes others (an observation of Σ_n z⁽ⁿ⁾). A score must meet them, and log-weights that meet in one are
those of all rows together. They are told by their axes: drawn several times at once, a term that depends on a draw has
the draws' axis, whatever the numbers are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lvmppl.algorithms.surrogate import Draws, at_draws
from lvmppl.density import PARTICLES, Drawing, Evaluation, Values
from lvmppl.elbo import Part, rows_and_constant

Evaluate = Callable[[Drawing], Evaluation]


def terms_reached(
    evaluate: Evaluate, drawing: Drawing, site: str, plates: frozenset[str], samples: Values
) -> frozenset[str]:
    """The sites whose terms stand outside of a plate of `site` and depend on its draw.

    samples: one draw of every site of the guide; all but `site` are held at theirs, so that its axis is the draws' alone.
    """
    held = {n: z for n, z in samples.items() if n != site}
    found = at_draws(evaluate(replace(drawing, particles=2, held=held)), None)
    return frozenset(p.site for p in found.parts if not plates <= p.plates and _is_drawn(p)) - {"", site}


def all_terms_outside(draws: Draws, plates: frozenset[str]) -> frozenset[str]:
    """The sites of all terms outside of some of these plates: what may be reached where it cannot be told."""
    return frozenset(p.site for p in draws.parts if not plates <= p.plates) - {""}


def ties_rows(evaluate: Evaluate, drawing: Drawing, data_plate: str | None, at_once: bool) -> bool:
    """Whether a term outside of the data plate depends on what is drawn.

    at_once: several draws can be taken at once, else two are taken and their terms compared.
    """
    if at_once:
        parts = at_draws(evaluate(replace(drawing, particles=2)), data_plate).parts
        return any(data_plate not in p.plates and _is_drawn(p) for p in parts)
    first, second = (
        _outside(at_draws(evaluate(replace(drawing, particles=1)), data_plate), data_plate) for _ in range(2)
    )
    return not torch.allclose(first, second, rtol=1e-5, equal_nan=True)


def _outside(draws: Draws, data_plate: str | None) -> Tensor:
    return rows_and_constant(draws.parts, data_plate, draws.plate_sizes)[1]


def _is_drawn(part: Part) -> bool:
    return PARTICLES in part.mean.dims


__all__ = ["all_terms_outside", "terms_reached", "ties_rows"]
