"""Forms in which models, data and parameters come to the exact engine; which of equally probable states a mode names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from scipy import stats
from torch import Tensor, nn
from torch.distributions import constraints

import lvmppl
from lvmppl.distributions import MarkovChain
from lvmppl.errors import InputError

ENUMERATED = {"enumerate": "parallel"}
X = torch.tensor([0.3, -1.2, 2.0, 0.9, 1.7], dtype=torch.float64)
LOC = torch.tensor([-0.5, 1.5], dtype=torch.float64)


class Plain(nn.Module):
    """p(z) from logits, x around a row of a network's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.4, -0.3]))
        self.net = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.net.weight.copy_(LOC)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=self.logits), infer=ENUMERATED)
            pyro.sample("x", dist.Normal(self.net.weight[0, z], 1.0), obs=x)


class OfPyro(PyroModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.4, -0.3]))
        self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=self.logits), infer=ENUMERATED)
            pyro.sample("x", dist.Normal(LOC.to(x)[z], self.scale), obs=x)


def mixture(x: Tensor) -> None:
    logits = pyro.param("logits", torch.tensor([0.4, -0.3]))
    loc = pyro.param("loc", LOC.clone())
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=logits), infer=ENUMERATED)
        pyro.sample("x", dist.Normal(loc[z], scale), obs=x)


def terms(logits: Any, scale: float) -> np.ndarray:
    """log p(z = k) + log p(x_n | k), [N, K]."""
    log_weights = np.log(np.exp(logits) / np.exp(logits).sum())
    densities: np.ndarray = stats.norm(LOC.numpy(), scale).logpdf(X.numpy()[:, None])
    return log_weights + densities


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (Plain, {"logits": "model.logits"}),
        (OfPyro, {"logits": "model.logits", "scale": "scale"}),
        (lambda: mixture, {"logits": "logits", "scale": "scale"}),
    ],
)
def test_log_evidence_of_a_module_at_its_own_and_at_other_parameters_equals_the_sum(
    build: Callable[[], Any], names: dict[str, str]
) -> None:
    expected = np.logaddexp.reduce(terms([0.4, -0.3], 1.0), axis=1).sum()
    single = {"rel": 1e-6}  # a module's own parameters are in single precision
    assert lvmppl.posterior(build(), {"x": X}).log_evidence == pytest.approx(expected, **single)
    other = {"logits": torch.tensor([-1.0, 0.5]), "scale": torch.tensor(0.7)}
    given = {names[k]: v for k, v in other.items() if k in names}
    found = lvmppl.posterior(build(), {"x": X}, given)
    table = terms([-1.0, 0.5], 0.7 if "scale" in names else 1.0)
    assert found.log_evidence == pytest.approx(np.logaddexp.reduce(table, axis=1).sum(), **single)
    probs = np.exp(table - np.logaddexp.reduce(table, axis=1)[:, None])
    np.testing.assert_allclose(found.probabilities("z"), probs, rtol=1e-5)


def test_pyro_sample_of_a_module_is_a_latent_site() -> None:
    class Mean(PyroModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.mu = PyroSample(dist.Normal(torch.tensor(0.5, dtype=torch.float64), 2.0))

        def forward(self, x: Tensor) -> None:
            mu = self.mu
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    post = lvmppl.posterior(Mean(), {"x": X})
    expected = stats.multivariate_normal(np.full(5, 0.5), np.eye(5) + 4.0).logpdf(X.numpy())
    assert post.log_evidence == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"Loc": LOC, "scales": torch.tensor(1.0)},
            r"expected parameters of the model \(logits, loc, scale\), got 'Loc' \(did you mean 'loc'\?\), "
            r"'scales' \(did you mean 'scale'\?\); leave out",
        ),
        ({"loc": torch.zeros(3)}, r"parameter 'loc': expected shape \(2,\), got shape \(3,\)"),
        ({"scale": torch.tensor(-1.0)}, r"parameter 'scale': expected values within its constraint"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_by_name(parameters: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lvmppl.posterior(mixture, {"x": X}, parameters)


def bernoulli(x: Tensor) -> None:
    probs = pyro.param("probs", torch.tensor([0.2, 0.9]), constraint=constraints.unit_interval)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])), infer=ENUMERATED)
        pyro.sample("x", dist.Bernoulli(probs[z]), obs=x)


@pytest.mark.parametrize("algorithm", ["em", "enumeration"])
def test_observations_that_are_booleans_equal_zeros_and_ones(algorithm: str) -> None:
    seen = torch.tensor([True, False, True, True])
    expected = np.log([0.3 * 0.2 + 0.7 * 0.9, 0.3 * 0.8 + 0.7 * 0.1]) @ [3, 1]
    assert lvmppl.posterior(bernoulli, {"x": seen}).log_evidence == pytest.approx(expected, rel=1e-6)
    fits = [lvmppl.fit(bernoulli, {"x": x}, algorithm=algorithm, max_steps=4) for x in (seen, seen.float())]
    np.testing.assert_allclose(fits[0].parameters["probs"], fits[1].parameters["probs"], rtol=1e-6)
    assert fits[0].log_evidence == pytest.approx(fits[1].log_evidence, rel=1e-6)


def tied(x: Tensor) -> None:
    """States 1 and 2 of `a`, all of `b` given it, and paths that keep to either of two states are equally probable."""
    even, keep = x.new_ones(2) / 2, torch.tensor([[0.75, 0.25], [0.25, 0.75]]).to(x)
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(x.new_tensor([0.125, 0.375, 0.375, 0.125])), infer=ENUMERATED)
        b = pyro.sample("b", dist.Categorical(x.new_ones(4, 3)[a]), infer=ENUMERATED)
        pyro.sample("x", dist.Normal(0.0 * b, 1.0), obs=x)
        pyro.sample("chain", MarkovChain(even, keep, 4), infer=ENUMERATED)


def test_mode_among_equally_probable_states_is_the_first() -> None:
    post = lvmppl.posterior(tied, {"x": X})
    mode = post.mode()
    assert mode.states["a"].tolist() == [1] * 5
    assert mode.states["b"].tolist() == [0] * 5
    assert mode.states["chain"].tolist() == [[0] * 4] * 5
    again = post.mode()
    assert all(torch.equal(again.states[k], v) for k, v in mode.states.items())


def test_mode_among_equally_probable_configurations_is_the_first() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(x.new_tensor([0.25, 0.375, 0.375])), infer=ENUMERATED)
            z = pyro.sample("z", dist.Normal(0.0 * c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    mode = lvmppl.posterior(model, {"x": X}).mode()
    assert mode.states["c"].tolist() == [1] * 5
    np.testing.assert_allclose(mode.states["z"], X / 2, rtol=1e-12)


def test_pair_of_distant_sites_of_a_loop_equals_the_matrix_product() -> None:
    """p(s_i, s_j | x) ∝ α_i Π_{i<t≤j} A diag(b_t) β_j."""
    steps, states, first, second = 90, 3, 4, 71
    rng = np.random.default_rng(0)
    move, loc = rng.dirichlet(np.ones(states), states), rng.normal(size=states)
    x = rng.normal(size=steps)

    def model(x: Tensor) -> None:
        s = None
        for t in pyro.markov(range(steps)):
            row = torch.ones(states).to(x) / states if s is None else torch.as_tensor(move)[s]
            s = pyro.sample(f"s{t}", dist.Categorical(row), infer=ENUMERATED)
            pyro.sample(f"x{t}", dist.Normal(torch.as_tensor(loc)[s], 1.0), obs=x[t])

    seen = stats.norm(loc, 1.0).pdf(x[:, None])  # [T, K]
    before, between, after = np.ones(states) / states * seen[0], np.eye(states), np.ones(states)
    for t in range(1, first + 1):
        before = before @ move * seen[t]
    for t in range(first + 1, second + 1):
        between = between @ move * seen[t]
    for t in range(steps - 1, second, -1):
        after = move @ (seen[t] * after)
    joint = before[:, None] * between * after
    found = lvmppl.posterior(model, {"x": torch.as_tensor(x)}).pair_marginal(f"s{first}", f"s{second}")
    np.testing.assert_allclose(found, joint / joint.sum(), rtol=1e-10)
