"""Responsibilities that follow the data: which of K means is nearest to every row, for the starts of a fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lvmppl.algorithms.problem import Problem
from lvmppl.density import Evaluation, Variable

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
    """

    problem: Problem
    clouds: dict[tuple[int, int | None], Cloud | None] = field(default_factory=dict)

    def __call__(self, how: str, evaluation: Evaluation, generator: torch.Generator) -> dict[str, Tensor]:
        labels: dict[str, Tensor] = {}
        means: dict[tuple[int, int | None], Tensor] = {}
        for name, variable in evaluation.variables.items():
            if variable.plates != (self.problem.data_plate,):
                continue
            key = (variable.size, variable.steps)
            if key not in self.clouds:
                self.clouds[key] = _cloud(self.problem, variable)
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

    flat: Sequence[Tensor]
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
        return (_features(self.flat, rows) - self.mean) / self.deviation


def _cloud(problem: Problem, variable: Variable) -> Cloud | None:
    """None where the data have no row a state ([N], or [N, T] of a chain), too few, or such as are no numbers."""
    axes = 1 if variable.steps is None else 2
    fitting = [
        t for t in problem.data.values() if axes == 1 or (t.dim() > 1 and t.shape[1] == variable.steps)
    ]
    floating = [t for t in fitting if t.is_floating_point()]
    fitting = floating or fitting
    if not fitting:
        return None
    valid = torch.ones(fitting[0].shape[:axes], dtype=torch.bool)
    if variable.steps is not None and variable.lengths is not None:
        valid &= torch.arange(variable.steps) < variable.lengths.reshape(-1, 1)
    flat = [t.reshape(valid.numel(), -1) for t in fitting]
    kept = torch.nonzero(valid.flatten()).flatten()
    if variable.size > len(kept):
        return None
    few = kept
    if len(kept) > _FEW:
        few = kept[torch.linspace(0, len(kept) - 1, _FEW).long()]
    rows = _features(flat, few)
    if not all(bool(t.isfinite().all()) for t in flat):
        return None
    mean, deviation = rows.mean(0), rows.std(0, unbiased=False).clamp_min(1e-12)
    return Cloud(flat, kept, valid.shape, (rows - mean) / deviation, mean, deviation, bool(floating))


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


def _features(flat: Sequence[Tensor], rows: Tensor) -> Tensor:
    return torch.cat([t.index_select(0, rows).double() for t in flat], -1)
