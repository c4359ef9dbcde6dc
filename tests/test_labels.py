"""Labels known for some of the data, against the joint table and its closed form."""

from __future__ import annotations

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import lvmppl
from lvmppl.distributions import MarkovChain
from lvmppl.errors import InputError

WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
LOC = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
START = torch.tensor([0.6, 0.4], dtype=torch.float64)
MOVE = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def mixture(x: Tensor, labels: Tensor) -> None:
    weights = pyro.param("weights", WEIGHTS.clone(), constraint=dist.constraints.simplex)
    loc = pyro.param("loc", LOC.clone())
    with pyro.plate("data", len(x)):
        z = lvmppl.partly_observed("z", dist.Categorical(weights), labels)
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


LABELS = torch.tensor([-1, 2, 0, -1, 1])


def joint_table(x: Tensor) -> Tensor:
    """log p(x, z), −∞ where z contradicts a label, [N, K]."""
    joint = WEIGHTS.log() + dist.Normal(LOC, 1.0).log_prob(x[:, None])
    return torch.where((LABELS[:, None] < 0) | (LABELS[:, None] == torch.arange(3)), joint, -torch.inf)


def test_log_evidence_of_partly_labelled_mixture_equals_closed_form() -> None:
    x = X[:, 0]
    post = lvmppl.posterior(mixture, {"x": x, "labels": LABELS})
    joint = joint_table(x)
    np.testing.assert_allclose(post.log_evidence_per_datum, joint.logsumexp(1), **CLOSE)
    np.testing.assert_allclose(post.marginal("z").probs, joint.softmax(1), **CLOSE)


def test_em_step_of_partly_labelled_mixture_equals_closed_form() -> None:
    x = X[:, 0]
    fit = lvmppl.fit(mixture, {"x": x, "labels": LABELS}, algorithm="em", max_steps=1, tolerance=0)
    q = joint_table(x).softmax(1)
    np.testing.assert_allclose(fit.parameters["weights"], q.mean(0), rtol=1e-8)
    np.testing.assert_allclose(fit.parameters["loc"], (q * x[:, None]).sum(0) / q.sum(0), rtol=1e-8)


def test_posterior_of_partly_labelled_chain_equals_sum_over_paths() -> None:
    labels = torch.tensor([[-1, 1, -1, 0], [0, -1, -1, -1], [-1] * 4, [1, 1, 0, 1], [-1, -1, -1, 1]])

    def model(x: Tensor, labels: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = lvmppl.partly_observed("z", MarkovChain(START, MOVE, 4), labels)
            pyro.sample("x", dist.Normal(LOC[z], 1.0).to_event(1), obs=x)

    post = lvmppl.posterior(model, {"x": X, "labels": labels})
    paths = torch.tensor(list(itertools.product(range(2), repeat=4)))
    moves = MOVE.log()[paths[:, :-1], paths[:, 1:]].sum(1)
    joint = START.log()[paths[:, 0]] + moves + dist.Normal(LOC[paths], 1.0).log_prob(X[:, None]).sum(-1)
    agree = ((labels[:, None] == paths) | (labels[:, None] < 0)).all(-1)
    joint = torch.where(agree, joint, -torch.inf)
    np.testing.assert_allclose(post.log_evidence_per_datum, joint.logsumexp(1), **CLOSE)
    expected = torch.einsum("np,ptk->ntk", joint.softmax(1), torch.nn.functional.one_hot(paths, 2).double())
    np.testing.assert_allclose(post.marginal("z").probs, expected, **CLOSE)


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([3, 0, 0, 0, 0]), torch.tensor([-2, 0, 0, 0, 0]), torch.zeros(5, dtype=torch.float64)],
)
def test_labels_that_are_no_states_are_refused(labels: Tensor) -> None:
    with pytest.raises(InputError, match="labels of site 'z'"):
        lvmppl.posterior(mixture, {"x": X[:, 0], "labels": labels})
