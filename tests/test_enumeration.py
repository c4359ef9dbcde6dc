"""Random models with discrete sites in nested and sibling plates, against the table of every joint assignment."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from discrete_models import Graph, Site, Table, graphs, model_of, placed, table_of, weight_of
from hypothesis import given, settings
from pyro import poutine
from scipy.stats import chi2
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms.evidence import log_evidence
from lvmppl.algorithms.problem import build_problem
from lvmppl.density import isolated
from lvmppl.posteriors import Posterior

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
EXAMPLES = {"derandomize": True, "deadline": None, "database": None}


def posterior_of(graph: Graph) -> Posterior:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "log evidence is -inf")
        found = lvmppl.posterior(model_of(graph), graph.rows)
    assert isinstance(found, Posterior)
    return found


def marginal_of(graph: Graph, table: Table, chosen: list[Site]) -> Any:
    """p(of some sites | x), [*plates of all of them, *states]."""
    plates = list(dict.fromkeys(p for s in chosen for p in s.plates))
    shape = [graph.sizes[p] for p in plates]
    result = np.zeros((*shape, *(s.table.shape[-1] for s in chosen)))
    for at in itertools.product(*map(range, shape)):
        element = dict(zip(plates, at, strict=True))
        result[at] = table.marginal([(s.name, tuple(element[p] for p in s.plates)) for s in chosen])
    return result


def flat_states(graph: Graph, table: Table, states: dict[str, torch.Tensor]) -> Any:
    """The position in the table of joint states, [S, *plates] by site: [S]."""
    index = [states[name][(slice(None), *at)].numpy() for name, at in table.axes]
    return np.ravel_multi_index(tuple(index), table.posterior.shape)


@settings(max_examples=340, **EXAMPLES)
@given(graphs())
def test_posterior_of_random_models_equals_the_joint_table(graph: Graph) -> None:
    table, found = table_of(graph), posterior_of(graph)
    if table.evidence == -np.inf:
        assert found.log_evidence == -np.inf
        return
    np.testing.assert_allclose(found.log_evidence, table.evidence, **CLOSE)
    if found.log_evidence_per_datum is not None and all("data" in s.plates for s in graph.sites):
        np.testing.assert_allclose(found.log_evidence_per_datum.sum(), table.evidence, **CLOSE)
    for site in graph.latent:
        np.testing.assert_allclose(
            found.marginal(site.name).probs, marginal_of(graph, table, [site]), **CLOSE
        )
    for i, pair in enumerate(itertools.combinations(graph.latent, 2)):
        a, b = pair if i % 2 else pair[::-1]
        np.testing.assert_allclose(
            found.pair_marginal(a.name, b.name), marginal_of(graph, table, [a, b]), **CLOSE
        )
    positive = table.posterior[table.posterior > 0]
    np.testing.assert_allclose(found.entropy().sum(), -(positive * np.log(positive)).sum(), **CLOSE)
    mode = found.mode()
    best = np.log(table.posterior.max())
    at = flat_states(graph, table, {n: v.unsqueeze(0) for n, v in mode.states.items()})
    np.testing.assert_allclose(mode.log_prob.sum(), best, **CLOSE)
    np.testing.assert_allclose(np.log(table.posterior.reshape(-1)[at]), best, **CLOSE)
    np.testing.assert_allclose(found.log_prob(mode.states).sum(), best, **CLOSE)


@settings(max_examples=60, **EXAMPLES)
@given(graphs(scaled=False, zeros=False))
def test_joint_table_equals_pyro_log_prob(graph: Graph) -> None:
    """The oracle itself: its entries are what a plain trace of the model scores, and its evidence their sum."""
    unmasked = tuple(replace(s, mask=None) if s.value is None else s for s in graph.sites)
    graph = replace(graph, sites=unmasked)  # Pyro takes a masked latent's prior away, the contract keeps it
    table, rng = table_of(graph), np.random.default_rng(0)
    np.testing.assert_allclose(table.evidence, np.logaddexp.reduce(table.log_joint, axis=None), **CLOSE)
    np.testing.assert_allclose(np.exp(table.log_joint - table.evidence), table.posterior, **CLOSE)
    for flat in rng.integers(0, table.posterior.size, 3):
        states = np.unravel_index(flat, table.posterior.shape)
        values = {}
        for site in graph.latent:
            shape = [graph.sizes[p] for p in site.plates]
            own = np.array([states[table.axes[site.name, at]] for at in graph.elements(site)])
            values[site.name] = placed(own.reshape(shape), site.plates, trimmed=True)
        with isolated(0):
            trace = poutine.trace(poutine.condition(model_of(graph), values)).get_trace(**graph.rows)
            found = float(trace.log_prob_sum().detach())
        np.testing.assert_allclose(found, table.log_joint.reshape(-1)[flat], rtol=1e-9)


@settings(max_examples=60, **EXAMPLES)
@given(graphs(zeros=False))
def test_gradient_of_log_evidence_equals_expected_gradient_and_finite_differences(graph: Graph) -> None:
    """∇ log Z = E_post[∇ log p(x, z)]: by expected counts in the table, and by differences of the table's evidence."""
    table, rng = table_of(graph), np.random.default_rng(1)
    with isolated(0, torch.float64):
        problem = build_problem("gradient", model_of(graph), graph.rows)
        values = {n: v.clone().requires_grad_() for n, v in problem.initial.items()}
        total = log_evidence(problem, values)
        grads = torch.autograd.grad(total, list(values.values()), allow_unused=True, materialize_grads=True)
    np.testing.assert_allclose(float(total.detach()), table.evidence, **CLOSE)
    for site, found in zip(graph.sites, grads, strict=True):
        counts = np.zeros_like(site.table)
        for at in graph.elements(site):
            if site.value is None or site.mask is None or site.mask[at]:
                counts += weight_of(graph, site, at) * _expected(graph, table, site, at)
        expected = counts / site.table - counts.sum(-1, keepdims=True)  # a row of weights is normalised
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)
    site = graph.sites[int(rng.integers(len(graph.sites)))]
    entry = tuple(int(rng.integers(n)) for n in site.table.shape)
    step = 1e-5 * site.table[entry]
    ends = [table_of(_moved(graph, site, entry, sign * step)).evidence for sign in (1, -1)]
    difference = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(grads[graph.sites.index(site)][entry], difference, rtol=1e-5, atol=1e-5)


def _expected(graph: Graph, table: Table, site: Site, at: tuple[int, ...]) -> Any:
    """p(parents, own state | x) of one element of a site, in the shape of its table."""
    by_name = {s.name: s for s in graph.sites}
    element = dict(zip(site.plates, at, strict=True))
    keys = [(p, tuple(element[q] for q in by_name[p].plates)) for p in site.parents]
    if site.value is None:
        return table.marginal([*keys, (site.name, at)])
    result = np.zeros_like(site.table)
    result[..., site.value[at]] = table.marginal(keys)
    return result


def _moved(graph: Graph, site: Site, entry: tuple[int, ...], by: float) -> Graph:
    changed = site.table.copy()
    changed[entry] += by
    changed /= changed.sum(-1, keepdims=True)
    return replace(graph, sites=tuple(replace(s, table=changed) if s is site else s for s in graph.sites))


@settings(max_examples=50, **EXAMPLES)
@given(graphs())
def test_sample_frequencies_equal_the_joint_table(graph: Graph) -> None:
    table, found = table_of(graph), posterior_of(graph)
    if table.evidence == -np.inf:
        return
    size = 4000
    draws = found.sample(size, seed=5)
    counts = np.bincount(flat_states(graph, table, draws), minlength=table.posterior.size)
    expected = size * table.posterior.reshape(-1)
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    pools = [(counts[~rare], expected[~rare])]
    if expected[rare].sum() >= 5:
        pools.append((counts[rare].sum(keepdims=True), expected[rare].sum(keepdims=True)))
    seen, wanted = (np.concatenate(part) for part in zip(*pools, strict=True))
    if len(seen) > 1:
        assert chi2.sf(((seen - wanted) ** 2 / wanted).sum(), len(seen) - 1) > 1e-6


def weighed(start: float) -> Any:
    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.tensor([1 - start, start]), constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor([-2.0, 2.0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    return model


def test_stop_at_a_bound_from_which_log_evidence_rises_is_told_from_a_maximum_there() -> None:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(70, generator=generator, dtype=torch.float64)
    both = torch.where(torch.arange(70) < 40, -2.0, 2.0) + noise
    stuck = lvmppl.fit(weighed(1e-12), {"x": both}, algorithm="enumeration")
    onward = lvmppl.fit(weighed(1e-12), {"x": both}, algorithm="em")
    assert onward.log_evidence > stuck.log_evidence + 10
    # d log p / d w₂ at w₂ = 0, weight taken from the other component: Σ (p₂/p₁ − 1)
    first, second = stuck.parameters["loc"]
    ratio = torch.exp(((both - first).square() - (both - second).square()) / 2)
    rise = float((ratio - 1).sum())
    assert f"from which log evidence rises, in weights ({rise:.2g} nats for its whole range" in stuck.message
    one = -2.0 + 0.2 * noise  # the maximum is on the bound
    options = {"algorithm": "enumeration", "tolerance": 1e-13, "freeze": ["loc"]}
    fit = lvmppl.fit(weighed(0.5), {"x": one}, **options)
    assert float(fit.parameters["weights"][1]) < 1e-6 and fit.message == ""
