"""Categorical variational families over the enumerated discrete sites of a model.

Both read the sites and their supports from the model they are given, so the same guide serves every model. Sites are
independent of one another under q: q(z; λ) = Π_sites Π_n Categorical(z⁽ⁿ⁾ | λ⁽ⁿ⁾).

Shapes: N rows handed in, K states.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import constraints

Model = Callable[..., Any]


def _discrete_sites(model: Model, data: dict[str, Tensor]) -> dict[str, Any]:
    """The finite discrete latent sites of one trace of the model, hidden from any handler around this call."""
    with poutine.block(), poutine.trace() as tracer:
        model(**data)
    sites = {}
    for name, site in tracer.trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            continue
        if getattr(site["fn"], "has_enumerate_support", False):
            sites[name] = site
    if not sites:
        raise ValueError("the model has no discrete latent site with a finite support")
    return sites


def _frames(site: Any) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def _num_states(site: Any) -> int:
    return len(site["fn"].enumerate_support(expand=False))


def _sample(name: str, site: Any, logits: Tensor) -> None:
    """q's site with the support of the model's: states of a family other than Categorical are looked up."""
    infer: Any = {"enumerate": "parallel"}
    if isinstance(site["fn"], dist.Categorical):
        pyro.sample(name, dist.Categorical(logits=logits), infer=infer)
    elif isinstance(site["fn"], dist.Bernoulli):
        pyro.sample(name, dist.Bernoulli(logits=logits[..., 1] - logits[..., 0]), infer=infer)
    else:
        raise ValueError(
            f"site '{name}' is {type(site['fn']).__name__}; this guide serves Categorical and Bernoulli sites"
        )


def categorical(model: Model) -> Callable[..., None]:
    """A table of probabilities λ⁽ⁿ⁾ per datum (and per element of inner plates): `<site>_probs` [*plates, K].

    This family holds the exact posterior of a model with one discrete site per datum, so its ELBO can reach log p(x).
    """
    sites: dict[str, Any] = {}

    first_rows: dict[str, int] = {}

    def guide(**data: Tensor) -> None:
        if not sites:
            sites.update(_discrete_sites(model, data))
        rows = len(next(iter(data.values())))
        total = first_rows.setdefault("rows", rows)
        plates: dict[str, Any] = {}
        for name, site in sites.items():
            with ExitStack() as stack:
                shape = [1] * max((-f.dim for f in _frames(site)), default=0)
                for frame in _frames(site):
                    plate = _plate(plates, frame, site, rows, total)
                    stack.enter_context(plate)
                    shape[frame.dim] = plate.size
                states = _num_states(site)
                start = torch.full((*shape, states), 1.0 / states)
                probs = pyro.param(f"{name}_probs", start, constraint=constraints.simplex, event_dim=1)
                _sample(name, site, probs.clamp_min(torch.finfo(probs.dtype).tiny).log())

    return guide


def _plate(plates: dict[str, Any], frame: Any, site: Any, rows: int, total: int) -> Any:
    """One plate a name; the plate that had the size of all rows takes the size of those handed in now."""
    if frame.name not in plates:
        size = rows if _is_data(frame, _frames(site), total) else frame.size
        plates[frame.name] = pyro.plate(frame.name, size, dim=frame.dim)
    return plates[frame.name]


def _is_data(frame: Any, frames: Sequence[Any], total: int) -> bool:
    """Whether a plate follows the rows: the one named `data`, else the outermost one of their number."""
    names = [f.name for f in frames]
    return bool(frame.name == "data" if "data" in names else frame is frames[0] and frame.size == total)


class categorical_encoder(nn.Module):
    """An amortized table: λ⁽ⁿ⁾ = MLP(x⁽ⁿ⁾), for discrete sites that stand in the data plate alone.

    hidden: widths of the hidden layers (tanh). Inputs are all floating data tensors, flattened per row and standardised
    with the statistics of the first rows seen.
    """

    def __init__(self, model: Model, hidden: Sequence[int] = (32,)) -> None:
        super().__init__()
        if any(not isinstance(width, int) or isinstance(width, bool) or width < 1 for width in hidden):
            raise ValueError(f"hidden must list positive layer widths, got {list(hidden)}")
        self._model: list[Model] = [
            model
        ]  # in a list, so that a module model does not become part of the guide
        self._hidden = tuple(hidden)
        self._sites: dict[str, Any] = {}
        self.networks = nn.ModuleDict()

    def prepare(self, **data: Tensor) -> None:
        """Read the model's sites and build one network a site; `forward` calls it on the first rows."""
        self._sites = _discrete_sites(self._model[0], data)
        features = _features(data)
        self.register_buffer("centre", features.mean(0))
        self.register_buffer("spread", features.std(0, unbiased=False).clamp_min(1e-8))
        for name, site in self._sites.items():
            frames = _frames(site)
            if len(frames) != 1 or not _is_data(frames[0], frames, len(features)):
                raise ValueError(f"categorical_encoder needs sites in the data plate alone; '{name}' is not")
            widths = [features.shape[1], *self._hidden, _num_states(site)]
            layers: list[nn.Module] = []
            for i, (a, b) in enumerate(itertools.pairwise(widths)):
                layers += [nn.Linear(a, b, dtype=features.dtype)] + (
                    [nn.Tanh()] if i < len(widths) - 2 else []
                )
            self.networks[name] = nn.Sequential(*layers)

    def forward(self, **data: Tensor) -> None:
        if not self._sites:
            self.prepare(**data)
        inputs = (_features(data) - self.get_buffer("centre")) / self.get_buffer("spread")
        plates: dict[str, Any] = {}
        for name, site in self._sites.items():
            frame = _frames(site)[0]
            with _plate(plates, frame, site, len(inputs), len(inputs)):
                logits = self.networks[name](inputs)  # [N, K]
                shape = [len(inputs), *[1] * (-frame.dim - 1), logits.shape[-1]]
                _sample(name, site, logits.reshape(shape))


def _features(data: dict[str, Tensor]) -> Tensor:
    parts = [t.reshape(len(t), -1) for t in data.values() if t.is_floating_point()]
    if not parts:
        raise ValueError("categorical_encoder needs at least one floating data tensor")
    return torch.cat(parts, -1)
