"""Labels that are known for some of the data: a latent discrete site clamped where its state is known."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from lvmppl.distributions import MarkovChain
from lvmppl.errors import InputError


def partly_observed(name: str, fn: Any, labels: Tensor) -> Tensor:
    """An enumerated latent site z ~ fn whose states are known where `labels` says so: the model's density is

        p(x, z) Π_{n: label_n ≥ 0} [z_n = label_n],

    so that the log evidence is log p(x, known labels) in nats, and the posterior of a known state is a point mass. The site
    keeps its name whatever is known; the labels are an observed site `<name>_label`. In a `pyro.plate`, use it in place of
    ``pyro.sample(name, fn, infer={"enumerate": "parallel"})``.

    labels: integers of the site's shape (of a `MarkovChain` [*b, T]), the state where it is known, −1 where it is not.

    Raises:
        InputError: labels that are no integers, or below −1 or beyond the states of `fn`.
    """
    where = f"labels of site '{name}'"
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(where, "integers, -1 where the state is unknown", str(labels.dtype))
    states = fn.states if isinstance(fn, MarkovChain) else len(fn.enumerate_support(expand=False))
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= states:
        raise InputError(where, f"states from 0 to {states - 1}, or -1 for unknown", f"from {low} to {high}")
    z: Tensor = pyro.sample(name, fn, infer={"enumerate": "parallel"})
    known = torch.where(labels >= 0, labels, 0)
    match = dist.Delta(z.to(known.dtype)).mask(labels >= 0)
    pyro.sample(f"{name}_label", match.to_event(fn.event_dim), obs=known)
    return z
