"""lvmppl: latent-variable models on Pyro, exact where exactness is possible and honest where it is not.

>>> fit = lvmppl.fit(model, {"x": x}, algorithm="em", restarts=10, seed=0)
>>> post = lvmppl.posterior(model, {"x": x}, parameters=fit.parameters)
>>> run = lvmppl.run("experiments/iris_mixture.yaml")

Names are imported when first used, so that `import lvmppl` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvmppl.errors import InputError, IntractableError, ModelError
    from lvmppl.fitted import Fit, load_fit
    from lvmppl.inference import fit, posterior, variational_posterior
    from lvmppl.labels import partly_observed
    from lvmppl.posteriors import Posterior
    from lvmppl.runner import Run, run

__version__ = "0.1.0"

_HOMES = {
    "Fit": "lvmppl.fitted",
    "InputError": "lvmppl.errors",
    "IntractableError": "lvmppl.errors",
    "ModelError": "lvmppl.errors",
    "Posterior": "lvmppl.posteriors",
    "Run": "lvmppl.runner",
    "fit": "lvmppl.inference",
    "load_fit": "lvmppl.fitted",
    "partly_observed": "lvmppl.labels",
    "posterior": "lvmppl.inference",
    "run": "lvmppl.runner",
    "variational_posterior": "lvmppl.inference",
}

__all__ = [
    "Fit",
    "InputError",
    "IntractableError",
    "ModelError",
    "Posterior",
    "Run",
    "fit",
    "load_fit",
    "partly_observed",
    "posterior",
    "run",
    "variational_posterior",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lvmppl' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
