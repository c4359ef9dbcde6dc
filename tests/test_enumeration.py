"""Random models with discrete sites in nested plates, against the table of every joint assignment."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor

import lvmppl

N, M = 2, 2
PLATES = {"data": N, "inner": M}
LEVELS: tuple[tuple[str, ...], ...] = ((), ("data",), ("data", "inner"))
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@dataclass(frozen=True)
class Site:
    """A discrete site: its plates, the latent sites it depends on and a table [*parents, K]."""

    name: str
    plates: tuple[str, ...]
    parents: tuple[str, ...]
    table: NDArray[np.float64]
    value: NDArray[np.int64] | None = None  # [*plates] of an observed site
    mask: NDArray[np.bool_] | None = None

    @property
    def instances(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*(range(PLATES[p]) for p in self.plates)))


def random_sites(seed: int) -> list[Site]:
    """One to four latent sites and one to three observed ones; at most 20 000 joint assignments."""
    rng = np.random.default_rng(seed)
    while True:
        latent: list[Site] = []
        for i in range(int(rng.integers(1, 5))):
            latent.append(
                _random_site(rng, f"z{i}", LEVELS[int(rng.integers(3))], latent, int(rng.integers(2, 6)))
            )
        sizes = [site.table.shape[-1] ** len(site.instances) for site in latent]
        if np.prod([float(size) for size in sizes]) <= 20_000:
            break
    observed = []
    for i in range(int(rng.integers(1, 4))):
        plates = LEVELS[int(rng.integers(1, 3))]
        site = _random_site(rng, f"x{i}", plates, latent, 3)
        shape = [PLATES[p] for p in plates]
        mask = rng.random(shape) < 0.7 if rng.random() < 0.4 else None
        observed.append(Site(site.name, plates, site.parents, site.table, rng.integers(0, 3, shape), mask))
    return [*latent, *observed]


def _random_site(
    rng: np.random.Generator, name: str, plates: tuple[str, ...], latent: list[Site], states: int
) -> Site:
    allowed = [site for site in latent if set(site.plates) <= set(plates)]
    parents = [site for site in allowed if rng.random() < 0.6][:3]
    table = rng.gamma(0.7, size=(*(p.table.shape[-1] for p in parents), states)) + 1e-3
    if rng.random() < 0.2:
        table[..., 0] = 0.0
    return Site(name, plates, tuple(p.name for p in parents), table / table.sum(-1, keepdims=True))


def model_of(sites: list[Site]) -> Callable[..., None]:
    """The same as a Pyro model; θ is every table."""

    def model(rows: Tensor) -> None:
        data = pyro.plate("data", len(rows), dim=-2)
        inner = pyro.plate("inner", M, dim=-1)
        values: dict[str, Tensor] = {}
        for site in sites:
            table = pyro.param(f"table_{site.name}", torch.tensor(site.table))
            with ExitStack() as stack:
                for plate in (data, inner)[: len(site.plates)]:
                    stack.enter_context(plate)
                if site.mask is not None:
                    mask = torch.tensor(site.mask).reshape([*site.mask.shape, 1, 1][:2])
                    stack.enter_context(poutine.mask(mask=mask))
                parents = tuple(values[p] for p in site.parents)
                fn = dist.Categorical(Vindex(table)[parents] if parents else table, validate_args=False)
                if site.value is None:
                    values[site.name] = pyro.sample(site.name, fn, infer={"enumerate": "parallel"})
                else:
                    seen = torch.tensor(site.value)
                    pyro.sample(site.name, fn, obs=seen.reshape([*seen.shape, 1, 1][:2]))

    return model


@dataclass(frozen=True)
class Joint:
    """Every joint assignment [S, instances] and its log p(x, z)."""

    columns: dict[tuple[str, tuple[int, ...]], int]
    states: NDArray[np.int64]
    log_joint: NDArray[np.float64]

    @property
    def evidence(self) -> float:
        return float(np.logaddexp.reduce(self.log_joint))

    @property
    def posterior(self) -> NDArray[np.float64]:
        return np.exp(self.log_joint - self.evidence)


def joint_of(sites: list[Site]) -> Joint:
    """Brute force: the product of all tables at all assignments."""
    latent = [site for site in sites if site.value is None]
    keys = [(site.name, at) for site in latent for at in site.instances]
    sizes = {site.name: site.table.shape[-1] for site in latent}
    columns = {key: i for i, key in enumerate(keys)}
    states = np.array(list(itertools.product(*(range(sizes[name]) for name, _ in keys))))
    plates = {site.name: len(site.plates) for site in latent}
    total = np.zeros(len(states))
    with np.errstate(divide="ignore"):
        for site in sites:
            for at in site.instances:
                if site.mask is not None and not site.mask[at]:
                    continue
                parents = [states[:, columns[p, at[: plates[p]]]] for p in site.parents]
                own: Any = states[:, columns[site.name, at]] if site.value is None else site.value[at]
                total = total + np.log(site.table[(*parents, own)])
    return Joint(columns, states, total)


def marginal(joint: Joint, sites: list[Site], names: tuple[str, ...]) -> NDArray[np.float64]:
    """p(of some sites | x), [*plates of all of them, *states]."""
    chosen = [next(s for s in sites if s.name == name) for name in names]
    plates = max((site.plates for site in chosen), key=len)
    shape = [PLATES[p] for p in plates]
    result = np.zeros((*shape, *(site.table.shape[-1] for site in chosen)))
    for at in itertools.product(*map(range, shape)):
        index = tuple(joint.states[:, joint.columns[s.name, at[: len(s.plates)]]] for s in chosen)
        np.add.at(result[at], index, joint.posterior)
    return result


ROWS = torch.zeros(N, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:log evidence is -inf")
@pytest.mark.parametrize("block", range(40))
def test_posterior_of_random_models_equals_the_joint_table(block: int) -> None:
    for seed in range(10 * block, 10 * block + 10):
        sites = random_sites(seed)
        latent = [site for site in sites if site.value is None]
        joint = joint_of(sites)
        found = lvmppl.posterior(model_of(sites), {"rows": ROWS})
        if joint.evidence == -np.inf:
            assert found.log_evidence == -np.inf
            continue
        np.testing.assert_allclose(found.log_evidence, joint.evidence, **CLOSE)
        for site in latent:
            shape = [PLATES[p] for p in site.plates]
            probs = found.marginal(site.name).probs.reshape(*shape, -1)
            np.testing.assert_allclose(probs, marginal(joint, sites, (site.name,)), **CLOSE)
        for a, b in itertools.combinations(latent, 2):
            expected = marginal(joint, sites, (a.name, b.name))
            pair = found.pair_marginal(a.name, b.name).reshape(expected.shape)
            np.testing.assert_allclose(pair, expected, **CLOSE)
        positive = joint.posterior[joint.posterior > 0]
        entropy = -(positive * np.log(positive)).sum()
        np.testing.assert_allclose(found.entropy().sum(), entropy, **CLOSE)
        mode = found.mode()
        np.testing.assert_allclose(mode.log_prob.sum(), np.log(joint.posterior.max()), **CLOSE)
        np.testing.assert_allclose(found.log_prob(mode.states).sum(), mode.log_prob.sum(), **CLOSE)
