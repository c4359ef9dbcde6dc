"""Responsibilities that follow the data: which of K means is nearest to every row, for the starts of a fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lvmppl.algorithms.problem import Problem
from lvmppl.density import Evaluation, SiteView, Variable

_FEW = 2**16  # rows that the means are found on, evenly spaced; all rows are then assigned to them
_ROUNDS = 10  # of k-means that follow a random start


@dataclass
class Labels:
    """States by nearest mean, of every site with a state a row and every chain with a state a row and step.

    On all floating data, standardised (on all data where none is, for k-means); of a chain on what has an axis of its
    steps. By k-means to its end; or at random: from the rows that k-means++ draws as its first means (Arthur &
    Vassilvitskii 2007) a few rounds of k-means, which dissolve clusters of so few rows that their covariance would
    collapse. Fully random responsibilities start every component at the mean of all data and often end with two of
    them sharing a cluster.

    What a mask hides does not count: rows without any other entry have no part in it, and a hidden entry lies at the mean
    of its column. views: of the model's run on these data, whose observed values are the data or parts of them.
    """

    problem: Problem
    views: Mapping[str, SiteView]
    clouds: dict[tuple[int, int | None], Cloud | None] = field(default_factory=dict)

    def __call__(self, how: str, evaluation: Evaluation, generator: torch.Generator) -> dict[str, Tensor]:
        labels: dict[str, Tensor] = {}
        means: dict[tuple[int, int | None], Tensor] = {}
        for name, variable in evaluation.variables.items():
            if variable.plates != (self.problem.data_plate,):
                continue
            key = (variable.size, variable.steps)
            if key not in self.clouds:
                self.clouds[key] = _cloud(self.problem, self.views, variable)
            cloud = self.clouds[key]
            if cloud is None or (how == "random" and not cloud.is_floating):
                continue
            if (
                key not in means or how == "random"
            ):  # sites that start alike by k-means part by what is seen of each
                means[key] = cloud.means(how, variable.size, generator)
            labels[name] = cloud.nearest(means[key])
        return labels


@dataclass(frozen=True)
class Cloud:
    """What is clustered: data with a row a state, those rows that count, and some of them standardised [n, D]."""

    flat: Sequence[Columns]
    kept: Tensor
    shape: torch.Size
    few: Tensor
    mean: Tensor
    deviation: Tensor
    is_floating: bool

    @property
    def few_are_all(self) -> bool:
        return len(self.few) == len(self.kept)

    def means(self, how: str, size: int, generator: torch.Generator) -> Tensor:
        """[K, D], standardised."""
        if how == "random":
            return _moved(self.few, _spread(self.few, size, generator))
        from sklearn.cluster import KMeans

        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        return torch.as_tensor(
            KMeans(size, n_init=1, random_state=seed).fit(self.few.numpy()).cluster_centers_
        )

    def nearest(self, means: Tensor) -> Tensor:
        """The nearest mean of every row (0 of those that do not count), in the shape of the states."""
        labels = torch.zeros(self.shape.numel(), dtype=torch.long)
        for part in self.kept.split(_FEW):
            rows = self.few if self.few_are_all else self.standardised(part)
            labels[part] = _nearest(rows, means)
        return labels.reshape(self.shape)

    def standardised(self, rows: Tensor) -> Tensor:
        return _standardised(self.flat, rows, self.mean, self.deviation)


@dataclass(frozen=True)
class Columns:
    """One tensor of the data, a row a state, and which of its entries no mask hides (None: all)."""

    values: Tensor
    visible: Tensor | None

    @property
    def shown(self) -> Tensor:
        """With 0 in the place of what is hidden."""
        return self.values if self.visible is None else torch.where(self.visible, self.values, 0)


def _cloud(problem: Problem, views: Mapping[str, SiteView], variable: Variable) -> Cloud | None:
    """None where the data have no row a state ([N], or [N, T] of a chain), too few, or such as are no numbers."""
    axes = 1 if variable.steps is None else 2
    fitting = [
        t for t in problem.data.values() if axes == 1 or (t.dim() > 1 and t.shape[1] == variable.steps)
    ]
    floating = [t for t in fitting if t.is_floating_point()]
    fitting = floating or fitting
    if not fitting:
        return None
    shape_of_states = fitting[0].shape[:axes]
    valid = torch.ones(shape_of_states, dtype=torch.bool)
    if variable.steps is not None and variable.lengths is not None:
        valid &= torch.arange(variable.steps) < variable.lengths.reshape(-1, 1)
    flat = []
    for tensor in fitting:
        seen = _visible(tensor, views.values())
        shape = (valid.numel(), -1)
        flat.append(Columns(tensor.reshape(shape), None if seen is None else seen.reshape(shape)))
    valid = valid.flatten()
    if all(c.visible is not None for c in flat):
        valid = valid & torch.stack([c.visible.any(-1) for c in flat if c.visible is not None]).any(0)
    kept = torch.nonzero(valid).flatten()
    if variable.size > len(kept):
        return None
    few = kept
    if len(kept) > _FEW:
        few = kept[torch.linspace(0, len(kept) - 1, _FEW).long()]
    if not all(bool(c.shown.isfinite().all()) for c in flat):
        return None
    mean, deviation = _moments(flat, few)
    rows = _standardised(flat, few, mean, deviation)
    return Cloud(flat, kept, shape_of_states, rows, mean, deviation, bool(floating))


def _visible(tensor: Tensor, views: Iterable[SiteView]) -> Tensor | None:
    """Which entries of a data tensor are not hidden at every site that observes them; None where all count."""
    place, size = tensor.untyped_storage(), tensor.untyped_storage().nbytes() // tensor.element_size()
    sites = [v for v in views if v.observed and isinstance(v.given, Tensor) and v.given.dtype == tensor.dtype]
    sites = [v for v in sites if v.given.untyped_storage().data_ptr() == place.data_ptr()]
    if all(v.visible is None for v in sites):
        return None
    hidden, shown = torch.zeros(2, size, dtype=torch.bool)
    where = torch.arange(size)
    for view in sites:
        given = view.given
        at = where.as_strided(given.shape, given.stride(), given.storage_offset())
        seen = (
            torch.ones_like(at, dtype=torch.bool) if view.visible is None else view.visible.expand(at.shape)
        )
        shown[at[seen]] = True
        hidden[at[~seen]] = True
    visible: Tensor = ~(hidden & ~shown).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return visible


def _spread(rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Rows drawn one after another, each the best of a few that have a chance in proportion to their squared distance from
    those before: the one that leaves the rows nearest to some mean (greedy k-means++, as in scikit-learn)."""
    n, trials = len(rows), 2 + int(math.log(size))
    uniform = torch.rand(size, trials, generator=generator, dtype=torch.float64)
    picked = [int(uniform[0, 0] * n)]
    distance = (rows - rows[picked[0]]).square_().sum(-1)
    for u in uniform[1:]:
        mass = distance.cumsum(0)
        candidates = torch.searchsorted(mass, u * mass[-1], right=True).clamp_max(n - 1)
        left = torch.minimum(distance, torch.cdist(rows[candidates], rows).square_())
        best = int(left.sum(1).argmin())
        picked.append(int(candidates[best]))
        distance = left[best]
    return rows[picked]


def _moved(rows: Tensor, means: Tensor) -> Tensor:
    """The means after a few rounds of k-means."""
    labels = _nearest(rows, means)
    for _ in range(_ROUNDS):
        near = one_hot(labels, len(means)).to(means)
        means = near.T @ rows / near.sum(0).clamp_min(1.0).unsqueeze(-1)
        before, labels = labels, _nearest(rows, means)
        if torch.equal(before, labels):
            break
    return means


def _nearest(rows: Tensor, means: Tensor) -> Tensor:
    """argmin ‖x − m‖² = argmin ‖m‖²/2 − ⟨x, m⟩."""
    return (means.square().sum(-1) / 2 - rows @ means.T).argmin(-1)


def _moments(flat: Sequence[Columns], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the columns over the visible entries of some rows."""
    x, counting = _features(flat, rows), _counting(flat, rows)
    if counting is None:
        return x.mean(0), x.std(0, unbiased=False).clamp_min(1e-12)
    number = counting.sum(0).clamp_min(1)
    mean = x.sum(0) / number
    variance = torch.where(counting, x - mean, 0.0).square().sum(0) / number
    return mean, variance.sqrt().clamp_min(1e-12)


def _standardised(flat: Sequence[Columns], rows: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Rows in standard units; 0 where an entry is hidden."""
    x, counting = (_features(flat, rows) - mean) / deviation, _counting(flat, rows)
    return x if counting is None else torch.where(counting, x, 0.0)


def _features(flat: Sequence[Columns], rows: Tensor) -> Tensor:
    return torch.cat([c.shown.index_select(0, rows).double() for c in flat], -1)


def _counting(flat: Sequence[Columns], rows: Tensor) -> Tensor | None:
    """Which entries of the features count; None: all."""
    if all(c.visible is None for c in flat):
        return None
    parts = (torch.ones_like(c.values, dtype=torch.bool) if c.visible is None else c.visible for c in flat)
    return torch.cat([p.index_select(0, rows) for p in parts], -1)
