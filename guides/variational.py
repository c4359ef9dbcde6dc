"""Variational families by head and source; the sites and their supports are read from the model.

`head`: a name for every site or by site ({z: normal}, {z: {use: low_rank, rank: 3}}); what is not named has the default of
its support. `source`: where the λ of sites in the data plate come from. The table of pairs is in docs/guides.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lvmppl.sources import SourceSettings
from lvmppl.variational import Heads, Variational, widths

Model = Callable[..., Any]


def variational(
    model: Model,
    head: Heads = None,
    source: str = "table",
    hidden: Sequence[int] = (32,),
    inputs: Sequence[str] = (),
    vocabulary: int | None = None,
) -> Variational:
    """Any head with any source.

    hidden: widths of the encoder's layers. inputs: the data tensors it reads. vocabulary: number of tokens V.
    """
    settings = SourceSettings(widths(hidden), tuple(inputs), vocabulary)
    return Variational(model, head, source, settings)


def mean_field(model: Model, head: Heads = None) -> Variational:
    """A table with a λ⁽ⁿ⁾ per datum."""
    return variational(model, head)


def amortized(
    model: Model,
    head: Heads = None,
    source: str = "mlp",
    hidden: Sequence[int] = (32,),
    inputs: Sequence[str] = (),
    vocabulary: int | None = None,
) -> Variational:
    """λ⁽ⁿ⁾ from an encoder network of x⁽ⁿ⁾."""
    return variational(model, head, source, hidden, inputs, vocabulary)


def semi_amortized(
    model: Model,
    head: Heads = None,
    source: str = "mlp",
    hidden: Sequence[int] = (32,),
    steps: int = 5,
    rate: float = 0.1,
    through: bool = True,
    inputs: Sequence[str] = (),
    vocabulary: int | None = None,
) -> Variational:
    """An encoder, then a few steps of ascent on each datum's own ELBO (Kim et al. 2018).

    steps, rate: their number and size in unconstrained coordinates. through: whether the gradient of the encoder runs
    through the steps.
    """
    settings = SourceSettings(widths(hidden), tuple(inputs), vocabulary)
    return Variational(model, head, source, settings, refine_steps=steps, refine_rate=rate, through=through)


def point(model: Model) -> Variational:
    """One value a continuous site (MAP); enumerated sites are summed exactly."""
    return Variational(model, "point", only=lambda site: site.kind == "latent")


def flow(
    model: Model,
    source: str = "table",
    hidden: Sequence[int] = (32,),
    inputs: Sequence[str] = (),
    vocabulary: int | None = None,
) -> Variational:
    """A normalizing flow a continuous site, given a context from the source; enumerated sites are summed exactly."""
    settings = SourceSettings(widths(hidden), tuple(inputs), vocabulary)
    return Variational(model, "flow", source, settings, only=lambda site: site.kind == "latent")
