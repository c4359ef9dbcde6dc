"""Categorical variational families over the enumerated discrete sites of a model.

Sites are independent of one another under q: q(z; λ) = Π_sites Π_n Categorical(z⁽ⁿ⁾ | λ⁽ⁿ⁾).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lvmppl.heads import support_kind
from lvmppl.sources import SourceSettings
from lvmppl.variational import Variational, widths

Model = Callable[..., Any]


def _finite(site: Any) -> bool:
    return support_kind(site) in ("binary", "finite", "one_hot")


def categorical(model: Model) -> Variational:
    """A table of probabilities λ⁽ⁿ⁾ per datum (and per element of inner plates): `<site>_probs` [*plates, K].

    This family holds the exact posterior of a model with one discrete site per datum, so its ELBO can reach log p(x).
    """
    return Variational(model, "categorical", only=_finite)


def categorical_encoder(
    model: Model, hidden: Sequence[int] = (32,), inputs: Sequence[str] = ()
) -> Variational:
    """An amortized table: λ⁽ⁿ⁾ = MLP(x⁽ⁿ⁾), tanh layers of widths `hidden`.

    inputs: the data tensors it reads; none named: all floating ones, or all where none is floating.
    """
    settings = SourceSettings(widths(hidden), tuple(inputs))
    return Variational(model, "categorical", "mlp", settings, only=_finite)
