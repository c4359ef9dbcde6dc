"""Random graphs of discrete sites over random plates, as Pyro models and as the table of every joint assignment.

The table knows nothing of the library: it has an axis for each latent site in each element of its plates. A scale weighs
the log evidence of a plate's element once its own sites are summed out, so log Z goes from the innermost plates outwards,
and p(z | x) is the product of the conditionals met on the way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor

Array = NDArray[np.float64]
Key = tuple[str, tuple[int, ...]]  # a site and the element of its plates

# nested, sibling inside the data plate, sibling of the data plate; each has its own dim
PARENT: dict[str, str | None] = {
    "data": None,
    "inner": "data",
    "deep": "inner",
    "beside": "data",
    "other": None,
}
DIM = {"data": -5, "inner": -4, "deep": -3, "beside": -2, "other": -1}
LEVELS: tuple[tuple[str, ...], ...] = (
    (),
    ("data",),
    ("data", "inner"),
    ("data", "beside"),
    ("other",),
    ("data", "inner", "deep"),
)
LARGEST = 3000  # joint assignments


@dataclass(frozen=True)
class Site:
    """A discrete site: its plates, the latent sites it depends on and a table [*parents, K]."""

    name: str
    plates: tuple[str, ...]
    parents: tuple[str, ...]
    table: Array
    value: NDArray[np.int64] | None = None  # [*plates] of an observed site
    mask: NDArray[np.bool_] | None = None  # [*plates]; acts on observed sites only


@dataclass(frozen=True)
class Graph:
    sites: tuple[Site, ...]
    sizes: dict[str, int]
    scales: dict[str, Array] = field(
        default_factory=dict
    )  # by plate: a number, or one a row of the data plate

    @property
    def latent(self) -> list[Site]:
        return [s for s in self.sites if s.value is None]

    def elements(self, site: Site) -> Iterator[tuple[int, ...]]:
        return itertools.product(*(range(self.sizes[p]) for p in site.plates))

    @property
    def rows(self) -> dict[str, Tensor]:
        return {"rows": torch.zeros(self.sizes["data"], dtype=torch.float64)}


@st.composite
def graphs(draw: Any, scaled: bool = True, zeros: bool = True) -> Graph:
    """One to four latent sites of 2 to 5 states and one to three observed ones, at random levels."""
    sizes = {
        "data": draw(st.integers(1, 3)),
        "inner": draw(st.integers(1, 3)),
        "deep": 2,
        "beside": draw(st.integers(1, 2)),
        "other": draw(st.integers(1, 2)),
    }
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    latent: list[Site] = []
    assignments = 1
    for i in range(draw(st.integers(1, 4))):
        plates, states = draw(st.sampled_from(LEVELS)), draw(st.integers(2, 5))
        more = states ** int(np.prod([sizes[p] for p in plates]))
        if assignments * more > LARGEST:
            plates, states, more = (), 2, 2
        assignments *= more
        latent.append(_site(draw, rng, f"z{i}", plates, latent, states, sizes, zeros))
    observed = []
    for i in range(draw(st.integers(1, 3))):
        site = _site(draw, rng, f"x{i}", draw(st.sampled_from(LEVELS)), latent, 3, sizes, zeros)
        shape = [sizes[p] for p in site.plates]
        observed.append(
            Site(site.name, site.plates, site.parents, site.table, rng.integers(0, 3, shape), site.mask)
        )
    scales: dict[str, Array] = {}
    for plate in PARENT if scaled else ():
        kind = draw(st.sampled_from(["none", "none", "number", "rows"]))
        if kind == "number" or (kind == "rows" and plate != "data"):
            scales[plate] = np.asarray(draw(st.sampled_from([0.5, 2.0, 3.0])))
        elif kind == "rows":
            scales[plate] = rng.uniform(0.3, 3.0, sizes["data"])
    return Graph((*latent, *observed), sizes, scales)


def _site(
    draw: Any,
    rng: np.random.Generator,
    name: str,
    plates: tuple[str, ...],
    latent: list[Site],
    states: int,
    sizes: dict[str, int],
    zeros: bool,
) -> Site:
    allowed = [s.name for s in latent if set(s.plates) <= set(plates)]
    parents = draw(st.lists(st.sampled_from(allowed), unique=True, max_size=3)) if allowed else []
    cards = {s.name: s.table.shape[-1] for s in latent}
    table = rng.gamma(0.7, size=(*(cards[p] for p in parents), states)) + 1e-3
    if zeros and draw(st.sampled_from([False, False, False, True])):
        table[..., 0] = 0.0
    masked = draw(st.sampled_from([False, False, True]))
    mask = rng.random([sizes[p] for p in plates]) < 0.7 if masked else None
    return Site(name, plates, tuple(parents), table / table.sum(-1, keepdims=True), None, mask)


# ------------------------------------------------------------------------------------------------------ as a Pyro model


def placed(array: Any, plates: tuple[str, ...], trimmed: bool = False) -> Tensor:
    """[*plates] with every plate at its own dim; `trimmed` of the axes left of them all."""
    tensor = torch.as_tensor(array)
    shape = [1] * 5
    for plate, size in zip(plates, tensor.shape, strict=True):
        shape[DIM[plate]] = size
    order = sorted(range(len(plates)), key=lambda i: DIM[plates[i]])
    rank = max((-DIM[p] for p in plates), default=0) if trimmed else 5
    return tensor.permute(order).reshape(shape[5 - rank :])


def model_of(graph: Graph) -> Callable[..., None]:
    """The graph as a Pyro model; θ is every table."""

    def model(rows: Tensor) -> None:
        plates = {p: pyro.plate(p, len(rows) if p == "data" else graph.sizes[p], dim=DIM[p]) for p in PARENT}
        values: dict[str, Tensor] = {}
        for site in graph.sites:
            table = pyro.param(f"table_{site.name}", torch.tensor(site.table))
            with ExitStack() as stack:
                for plate in site.plates:
                    stack.enter_context(plates[plate])
                    if plate in graph.scales:
                        scale = graph.scales[plate]
                        weight = placed(scale, ("data",)) if scale.ndim else float(scale)
                        stack.enter_context(poutine.scale(scale=weight))
                if site.mask is not None:
                    stack.enter_context(poutine.mask(mask=placed(site.mask, site.plates)))
                parents = tuple(values[p] for p in site.parents)
                fn = dist.Categorical(Vindex(table)[parents] if parents else table, validate_args=False)
                if site.value is None:
                    values[site.name] = pyro.sample(site.name, fn, infer={"enumerate": "parallel"})
                else:
                    pyro.sample(site.name, fn, obs=placed(site.value, site.plates))

    return model


# ---------------------------------------------------------------------------------------------------------- as a table


def log_sum_exp(array: Array, axes: tuple[int, ...]) -> Array:
    top = array.max(axis=axes, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(array - top).sum(axis=axes, keepdims=True)) + top


@dataclass(frozen=True)
class Table:
    """log p(x) (scales applied) and p(z | x) of every assignment, an axis for each of `axes`."""

    axes: dict[Key, int]
    evidence: float
    posterior: Array
    log_joint: Array  # the plain sum of all log-factors, no scale

    def marginal(self, keys: list[Key]) -> Array:
        """p(of these | x), axes in their order."""
        own = [self.axes[k] for k in keys]
        table = self.posterior.sum(axis=tuple(i for i in range(self.posterior.ndim) if i not in own))
        ranks = [sorted(own).index(a) for a in own]
        return np.transpose(table, ranks)


def table_of(graph: Graph) -> Table:
    axes = {(s.name, at): 0 for s in graph.latent for at in graph.elements(s)}
    axes = {key: i for i, key in enumerate(axes)}
    by_name = {s.name: s for s in graph.sites}
    shape = [by_name[name].table.shape[-1] for name, _ in axes]

    def along(key: Key) -> NDArray[np.int64]:
        place = [1] * len(axes)
        place[axes[key]] = shape[axes[key]]
        return np.arange(shape[axes[key]]).reshape(place)

    def log_factor(site: Site, at: tuple[int, ...]) -> Array:
        if site.value is not None and site.mask is not None and not site.mask[at]:
            return np.zeros([1] * len(axes))
        element = dict(zip(site.plates, at, strict=True))
        index: list[Any] = [along((p, tuple(element[q] for q in by_name[p].plates))) for p in site.parents]
        index.append(along((site.name, at)) if site.value is None else site.value[at])
        with np.errstate(divide="ignore"):
            found = np.log(site.table[tuple(index)])
        return found.reshape([1] * len(axes)) if found.ndim == 0 else found

    conditionals: list[Array] = []

    def log_z(plates: tuple[str, ...], at: tuple[int, ...]) -> Array:
        """Σ over the sites of one element of a plate, and of all plates inside it; axes kept."""
        total = np.zeros([1] * len(axes))
        for site in graph.sites:
            if site.plates == plates:
                total = total + log_factor(site, at)
        for child, parent in PARENT.items():
            if parent == (plates[-1] if plates else None):
                for i in range(graph.sizes[child]):
                    scale = graph.scales.get(child, np.ones(()))
                    total = total + float(scale[i] if scale.ndim else scale) * log_z(
                        (*plates, child), (*at, i)
                    )
        local = tuple(axes[s.name, at] for s in graph.latent if s.plates == plates)
        norm = log_sum_exp(total, local) if local else total
        if local:
            possible = np.isfinite(norm)
            conditionals.append(np.where(possible, total - np.where(possible, norm, 0.0), -np.inf))
        return norm

    evidence = float(log_z((), ()).reshape(()))
    posterior = np.exp(sum(conditionals) + np.zeros(shape))
    plain = sum(log_factor(s, at) for s in graph.sites for at in graph.elements(s)) + np.zeros(shape)
    return Table(axes, evidence, posterior, plain)


def weight_of(graph: Graph, site: Site, at: tuple[int, ...]) -> float:
    """The product of the scales around one element of a site."""
    result = 1.0
    for plate, i in zip(site.plates, at, strict=True):
        scale = graph.scales.get(plate, np.ones(()))
        result *= float(scale[i] if scale.ndim else scale)
    return result


__all__ = ["Graph", "Site", "Table", "graphs", "log_sum_exp", "model_of", "placed", "table_of", "weight_of"]
