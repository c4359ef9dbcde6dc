"""Single cases of the exact posterior of discrete sites: chunks, impossible data, sibling plates, masks, T = 1."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from sklearn.mixture import GaussianMixture
from torch import Tensor

import lvmppl
from lvmppl.algorithms.evidence import CHUNK
from lvmppl.distributions import MarkovChain
from lvmppl.errors import InputError, IntractableError, ModelError
from lvmppl.models.hmm import hidden_markov
from lvmppl.posteriors import Posterior

ENUMERATED = {"enumerate": "parallel"}
GENERATOR = torch.Generator().manual_seed(11)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def table(*shape: int) -> Tensor:
    raw = torch.rand(*shape, generator=GENERATOR, dtype=torch.float64) + 0.05
    return raw / raw.sum(-1, keepdim=True)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


PRIOR, LOC, GLOBAL, LOCAL = table(3), normal(3), table(2), table(2, 3)


def exact(model: Any, **data: Tensor) -> Posterior:
    found = lvmppl.posterior(model, data)
    assert isinstance(found, Posterior)
    return found


# ------------------------------------------------------------------------------------------------------------ chunks


@pytest.mark.parametrize("extra", [1, 500])
def test_evidence_of_scaled_rows_beyond_a_chunk_equals_closed_form(extra: int) -> None:
    x, weight = normal(CHUNK + extra), normal(CHUNK + extra).abs()

    def model(x: Tensor, weight: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=weight):
            z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
            pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x)

    post = exact(model, x=x, weight=weight)
    joint = PRIOR.log() - 0.5 * (x[:, None] - LOC) ** 2 - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(post.log_evidence_per_datum, weight * joint.logsumexp(1), **CLOSE)
    np.testing.assert_allclose(post.marginal("z").probs, joint.softmax(1), **CLOSE)


@pytest.mark.parametrize("extra", [1, 500])
def test_evidence_of_ragged_chains_beyond_a_chunk_equals_that_of_few_rows(extra: int) -> None:
    size, few = CHUNK + extra, 20
    x = torch.randint(0, 4, (size, 3), generator=GENERATOR)
    lengths = torch.randint(1, 4, (size,), generator=GENERATOR)
    model = functools.partial(hidden_markov, num_states=2, num_symbols=4)
    theta = {"initial": table(2), "transition": table(2, 2), "emission": table(2, 4)}
    whole = lvmppl.posterior(model, {"x": x, "lengths": lengths}, parameters=theta)
    for rows in (slice(0, few), slice(size - few, size)):
        part = lvmppl.posterior(model, {"x": x[rows], "lengths": lengths[rows]}, parameters=theta)
        np.testing.assert_allclose(whole.log_evidence_per_datum[rows], part.log_evidence_per_datum, **CLOSE)
        np.testing.assert_allclose(whole.probabilities("z")[rows], part.probabilities("z"), **CLOSE)


# --------------------------------------------------------------------------------------------------- impossible data

ZEROS = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)


def test_impossible_datum_is_named_and_has_no_samples() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(GLOBAL), infer=ENUMERATED)
            pyro.sample("x", dist.Categorical(ZEROS[z]), obs=x)

    with pytest.warns(UserWarning, match=r"probability 0 to datum 1"):
        post = exact(model, x=torch.tensor([0, 2, 1]))
    assert post.log_evidence == -math.inf
    assert post.mode().log_prob[1] == -math.inf
    with pytest.raises(InputError, match=r"sample: expected .* got probability 0 for datum 1; "):
        post.sample(2)


def test_data_impossible_under_every_state_of_a_global_site_are_named() -> None:
    def model(x: Tensor) -> None:
        g = pyro.sample("g", dist.Categorical(GLOBAL), infer=ENUMERATED)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(ZEROS[g]), obs=x)

    with pytest.warns(UserWarning, match=r"probability 0 to the data, under every state of g"):
        post = exact(model, x=torch.tensor([0, 2, 1]))
    assert post.log_evidence == -math.inf
    assert float(post.mode().log_prob) == -math.inf
    with pytest.raises(InputError, match=r"probability 0 for the data, under every state of g"):
        post.sample(2)


# ---------------------------------------------------------------------------------------------------- plates and masks


def test_pair_of_sibling_plates_equals_sum_over_what_they_share() -> None:
    second, see_a, see_b = table(2, 2), table(3, 3), table(2, 2)
    xa, xb = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1])

    def model(x: Tensor) -> None:
        g = pyro.sample("g", dist.Categorical(GLOBAL), infer=ENUMERATED)
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(LOCAL[g]), infer=ENUMERATED)
            pyro.sample("x", dist.Categorical(see_a[a]), obs=x)
        with pyro.plate("other", 2):
            b = pyro.sample("b", dist.Categorical(second[g]), infer=ENUMERATED)
            pyro.sample("y", dist.Categorical(see_b[b]), obs=xb)

    a = LOCAL.unsqueeze(1) * see_a[:, xa].T  # [g, i, a]
    b = second.unsqueeze(1) * see_b[:, xb].T  # [g, j, b]
    weight = GLOBAL * a.sum(-1).prod(-1) * b.sum(-1).prod(-1)
    given_a, given_b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    expected = torch.einsum("g,gia,gjb->ijab", weight / weight.sum(), given_a, given_b)
    post = exact(model, x=xa)
    np.testing.assert_allclose(post.pair_marginal("a", "b"), expected, **CLOSE)
    np.testing.assert_allclose(post.pair_marginal("b", "a"), expected.permute(1, 0, 3, 2), **CLOSE)


@pytest.mark.parametrize("how", ["poutine", "distribution"])
@pytest.mark.parametrize("latent", ["discrete", "continuous"])
def test_masked_latent_keeps_its_prior(latent: str, how: str) -> None:
    seen = torch.tensor([True, False, True])

    def model(x: Tensor) -> None:
        discrete = latent == "discrete"
        prior: Any = dist.Categorical(PRIOR) if discrete else dist.Normal(torch.zeros(3).double(), 1.0)
        with pyro.plate("data", len(x)), poutine.mask(mask=seen if how == "poutine" else True):
            z = pyro.sample(
                "z",
                prior if how == "poutine" else prior.mask(seen),
                infer=ENUMERATED if discrete else None,
            )
            fn: Any = dist.Normal(LOC[z] if discrete else z, 1.0)
            pyro.sample("x", fn if how == "poutine" else fn.mask(seen), obs=x)

    post: Any = lvmppl.posterior(model, {"x": normal(3)})
    assert float(post.log_evidence_per_datum[1]) == pytest.approx(0.0, abs=1e-12)
    if latent == "discrete":
        np.testing.assert_allclose(post.marginal("z").probs[1], PRIOR, **CLOSE)
    else:
        mean, sd = post.moments("z")
        np.testing.assert_allclose((mean[1], sd[1]), (0.0, 1.0), atol=1e-9)


def test_pair_of_a_global_and_a_scaled_site_is_the_same_in_both_orders() -> None:
    x = normal(4)

    def model(x: Tensor) -> None:
        g = pyro.sample("g", dist.Categorical(GLOBAL), infer=ENUMERATED)
        with pyro.plate("data", len(x)), poutine.scale(scale=3.0):
            z = pyro.sample("z", dist.Categorical(LOCAL[g]), infer=ENUMERATED)
            pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x)

    joint = LOCAL.log().unsqueeze(1) + dist.Normal(LOC, 1.0).log_prob(x.unsqueeze(-1))  # [g, n, z]
    weight = (GLOBAL.log() + 3 * joint.logsumexp(-1).sum(-1)).softmax(0)
    expected = (weight[:, None, None] * joint.softmax(-1)).transpose(0, 1)
    post = exact(model, x=x)
    np.testing.assert_allclose(post.pair_marginal("g", "z"), expected, **CLOSE)
    np.testing.assert_allclose(post.pair_marginal("z", "g"), expected.mT, **CLOSE)


def test_model_without_latent_sites_has_an_empty_frame() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(LOC[0], 1.0), obs=x)

    x = normal(3)
    post = exact(model, x=x)
    assert post.log_evidence == pytest.approx(float(dist.Normal(LOC[0], 1.0).log_prob(x).sum()))
    assert post.engine.startswith("direct: no latent site")
    frame = post.to_frame()
    assert len(frame) == 0
    assert list(frame.columns) == ["site", "datum", "position", "state", "probability", "mean", "sd"]


# ------------------------------------------------------------------------------------------------------------- chains

START, MOVE, SEE = table(3), table(3, 3), table(3, 4)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("emission", ["categorical", "gaussian", "poisson", "bernoulli"])
def test_chain_of_one_step_equals_a_mixture(emission: Any, rows: int) -> None:
    x: Tensor = {
        "categorical": torch.tensor([[1], [3]]),
        "gaussian": normal(2, 1),
        "poisson": torch.tensor([[2.0], [5.0]], dtype=torch.float64),
        "bernoulli": torch.tensor([[1.0], [0.0]], dtype=torch.float64),
    }[emission][:rows]
    theta: dict[str, Tensor] = {"initial": START, "transition": MOVE}
    theta |= {
        "categorical": {"emission": SEE},
        "gaussian": {"loc": LOC, "variance": torch.ones(3, dtype=torch.float64)},
        "poisson": {"rate": LOC.exp()},
        "bernoulli": {"probs": START},
    }[emission]
    fn: Any = {
        "categorical": dist.Categorical(SEE),
        "gaussian": dist.Normal(LOC, 1.0),
        "poisson": dist.Poisson(LOC.exp()),
        "bernoulli": dist.Bernoulli(START),
    }[emission]
    model = functools.partial(hidden_markov, num_states=3, num_symbols=4, emission=emission)
    torch.set_default_dtype(torch.float64)
    try:
        post = lvmppl.posterior(model, {"x": x}, parameters=theta)
    finally:
        torch.set_default_dtype(torch.float32)
    joint = START.log() + fn.log_prob(x)  # [N, K]
    np.testing.assert_allclose(post.log_evidence_per_datum, joint.logsumexp(1), **CLOSE)
    np.testing.assert_allclose(post.probabilities("z")[:, 0], joint.softmax(1), **CLOSE)
    np.testing.assert_array_equal(post.mode().states["z"][:, 0], joint.argmax(1))
    np.testing.assert_allclose(post.entropy(), dist.Categorical(logits=joint).entropy(), **CLOSE)
    assert post.pair_marginal("z").shape == (rows, 0, 3, 3)


def test_mode_of_a_global_chain_equals_brute_force() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", MarkovChain(START, MOVE, 4), infer=ENUMERATED)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(SEE[z]).to_event(1), obs=x)

    x = torch.randint(0, 4, (3, 4), generator=GENERATOR)
    paths = list(itertools.product(range(3), repeat=4))
    joint = torch.stack(
        [
            START[z[0]].log()
            + sum(MOVE[i, j].log() for i, j in itertools.pairwise(z))
            + sum(SEE[k, x[:, t]].log().sum() for t, k in enumerate(z))
            for z in paths
        ]
    )
    post = exact(model, x=x)
    mode = post.mode()
    assert post.log_evidence == pytest.approx(float(joint.logsumexp(0)), rel=1e-12)
    assert tuple(mode.states["z"].tolist()) == paths[int(joint.argmax())]
    assert float(mode.log_prob) == pytest.approx(float(joint.log_softmax(0).max()), rel=1e-10)
    assert float(post.log_prob(mode.states)) == pytest.approx(float(mode.log_prob), rel=1e-12)


def test_emission_of_another_scale_than_its_chain_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", MarkovChain(START, MOVE, 3), infer=ENUMERATED)
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(LOC[z], 1.0).to_event(1), obs=x)

    with pytest.raises(ModelError, match=r"factors that meet in x, z: expected one common scale"):
        exact(model, x=normal(2, 3))


@pytest.mark.parametrize("which", ["initial", "transition"])
def test_chain_whose_weights_depend_on_another_chain_is_refused(which: str) -> None:
    starts, moves = table(2, 3), table(2, 1, 3, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", MarkovChain(table(2), table(2, 2), 3), infer=ENUMERATED)[..., 0]
            own = (starts[w], MOVE) if which == "initial" else (START, moves[w])
            z = pyro.sample("z", MarkovChain(*own, 3), infer=ENUMERATED)
            pyro.sample("x", dist.Normal(LOC[z], 1.0).to_event(1), obs=x)

    with pytest.raises(IntractableError, match=r"chain 'z': .* depend on no other chain, got .* on w; write"):
        exact(model, x=normal(2, 3))


def test_refusal_of_a_chain_keeps_its_message_under_plain_pyro() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Categorical(GLOBAL))
        pyro.sample("path", MarkovChain(START, MOVE[:, :2] * z, 3))

    with pytest.raises(InputError, match="MarkovChain transition: expected shape ending in"):
        poutine.trace(model).get_trace()


def test_log_prob_of_values_of_another_shape_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
            pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x)

    post = exact(model, x=normal(4))
    with pytest.raises(InputError, match=r"site 'z': expected values of shape \(4,\), .* got shape \(4, 1\)"):
        post.log_prob({"z": torch.zeros(4, 1, dtype=torch.long)})


def test_site_of_a_plate_inside_a_chain_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", MarkovChain(START, MOVE, 3), infer=ENUMERATED)
            with pyro.plate("sensors", 2, dim=-1):
                c = pyro.sample("c", dist.Categorical(GLOBAL), infer=ENUMERATED)
                pyro.sample("x", dist.Normal(LOC[z] + c.unsqueeze(-1), 1.0).to_event(1), obs=x)

    with pytest.raises(IntractableError, match=r"site 'c' in plate sensors: .* chain z .* site 'x'; write"):
        exact(model, x=normal(1, 2, 3))


# -------------------------------------------------------------------------------------------------- another library


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_posterior_of_a_mixture_equals_scikit_learn(covariance: str) -> None:
    x = torch.cat([normal(40, 2), normal(30, 2) * 0.5 + 3.0])
    fitted = GaussianMixture(3, covariance_type=covariance, random_state=0, reg_covar=1e-3).fit(x.numpy())
    weights, loc = torch.tensor(fitted.weights_), torch.tensor(fitted.means_)
    spread = torch.tensor(fitted.covariances_)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATED)
            fn: Any = (
                dist.MultivariateNormal(loc[z], spread[z])
                if covariance == "full"
                else dist.Normal(loc[z], spread[z].sqrt()).to_event(1)
            )
            pyro.sample("x", fn, obs=x)

    post = exact(model, x=x)
    np.testing.assert_allclose(post.log_evidence_per_datum, fitted.score_samples(x.numpy()), rtol=1e-10)
    np.testing.assert_allclose(
        post.marginal("z").probs, fitted.predict_proba(x.numpy()), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_array_equal(post.mode().states["z"], fitted.predict(x.numpy()))
