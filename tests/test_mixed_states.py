"""A model that puts the values of enumerated sites together over their states is found out, whatever it does with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

import lvmppl
from lvmppl.distributions import MarkovChain
from lvmppl.errors import ModelError

ENUMERATED = {"enumerate": "parallel"}
PRIOR = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
LOC = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
MOVE = torch.full((3, 3), 0.2, dtype=torch.float64) + 0.4 * torch.eye(3, dtype=torch.float64)
X = torch.linspace(-1.0, 1.5, 11, dtype=torch.float64)
GRID = torch.linspace(-1.0, 1.5, 55, dtype=torch.float64).reshape(11, 5)


def observing(loc: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    """One site in the data plate, the observation around a location computed from it."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
            pyro.sample("x", dist.Normal(loc(z), 1.0), obs=x)

    return model


def outer(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
        pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x)
    pyro.factor("f", -1.0 * torch.outer(z.flatten(), z.flatten()).sum())


def shared(x: Tensor) -> None:
    z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(LOC[z.sum() - 1], 1.0), obs=x)


def nested(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
        with pyro.plate("inner", x.shape[1], dim=-1):
            w = pyro.sample("w", dist.Bernoulli(PRIOR[0]), infer=ENUMERATED)
            pyro.sample("x", dist.Normal(LOC[z] + w.mean(), 1.0), obs=x)


def chain(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", MarkovChain(PRIOR, MOVE, x.shape[1]), infer=ENUMERATED)
        pyro.sample("x", dist.Normal(LOC[z] - LOC[z].mean(), 1.0).to_event(1), obs=x)


def loop(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = torch.tensor(0)
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z{t}", dist.Categorical(MOVE[z]), infer=ENUMERATED)
            pyro.sample(f"x{t}", dist.Normal(LOC[z] - LOC[z].max(), 1.0), obs=x[:, t])


def continuous(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
        y = pyro.sample("y", dist.Normal(LOC[z].sum(), 1.0))
        pyro.sample("x", dist.Normal(y, 1.0), obs=x)


MIXED: dict[str, tuple[Callable[[Tensor], None], Tensor, str]] = {
    "flattened and multiplied": (outer, X, r"site 'f': .* of z .*flatten at .*test_mixed_states"),
    "mean": (observing(lambda z: LOC[z] - LOC[z].mean()), X, r"site 'x': .*mean at"),
    "largest": (observing(lambda z: LOC[z] * z.max()), X, r"site 'x': .*max at"),
    "read": (observing(lambda z: LOC[z] + float(z.max())), X, r"site 'x': .*max at"),
    "squeezed": (observing(lambda z: LOC[z] + z.squeeze().double().std()), X, r"site 'x': .*squeeze at"),
    "running sum": (observing(lambda z: LOC[z] + z.cumsum(0)), X, r"site 'x': .*cumsum at"),
    "sum of a shared site": (shared, X, r"site 'x': .*sum at"),
    "mean within a row": (nested, GRID, r"site 'x': .*mean at"),
    "mean over a chain": (chain, GRID, r"site 'x': .*mean at"),
    "largest in a loop": (loop, GRID, r"site 'x\d': .*max at"),
    "beside a continuous site": (continuous, X, r"site 'y': .*sum at"),
}


@pytest.mark.parametrize("case", MIXED)
def test_model_that_mixes_states_is_refused(case: str) -> None:
    model, x, message = MIXED[case]
    with pytest.raises(ModelError, match=message + ".*axes to the left are carried along"):
        lvmppl.posterior(model, {"x": x})


def test_fit_of_a_model_that_mixes_states_is_refused() -> None:
    with pytest.raises(ModelError, match="axes to the left are carried along"):
        lvmppl.fit(MIXED["mean"][0], {"x": X}, algorithm="enumeration")


def noisy(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
        z.sum()
        pyro.sample("x", dist.Normal(LOC[z] + torch.rand_like(x), 1.0), obs=x)


def masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.mask(mask=x > 0), poutine.scale(scale=2.0):
        z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
        z.sum()
        pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x)


def subsampled(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
        pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x)
    with pyro.plate("some", 40, subsample_size=6) as chosen:
        w = pyro.sample("w", dist.Categorical(PRIOR), infer=ENUMERATED)
        w.sum()
        pyro.sample("y", dist.Normal(LOC[w] + chosen, 1.0), obs=torch.zeros(6, dtype=x.dtype))


def by_rows(x: Tensor) -> None:
    """Captures something of all rows, and the mean of the rows that it is handed."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
        z.sum()
        pyro.sample("x", dist.Normal(LOC[z] + X + x.mean(), 1.0), obs=x)


def ragged(x: Tensor, lengths: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", MarkovChain(PRIOR, MOVE, x.shape[1], lengths), infer=ENUMERATED)
        z.sum()
        seen = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
        pyro.sample("x", dist.Normal(LOC[z], 1.0).mask(seen).to_event(1), obs=x)


HONEST: dict[str, tuple[Callable[..., None], dict[str, Tensor]]] = {
    "draws by itself": (noisy, {"x": X}),
    "masked and scaled": (masked, {"x": X}),
    "subsampled": (subsampled, {"x": X}),
    "all rows": (by_rows, {"x": X}),
    "ragged chains": (ragged, {"x": GRID, "lengths": 1 + torch.arange(11) % 5}),
    "under a device": (observing(lambda z: LOC[z] + 0.0), {"x": X}),
}


@pytest.mark.parametrize("case", HONEST)
def test_suspected_model_that_mixes_nothing_is_served(case: str) -> None:
    model, data = HONEST[case]

    def within(**tensors: Tensor) -> None:
        with torch.device("cpu"):
            model(**tensors)

    found: Any = lvmppl.posterior(within if case == "under a device" else model, data)
    assert math.isfinite(found.log_evidence)


def test_states_reshaped_before_a_product_equal_mixture_in_scipy() -> None:
    weight = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(PRIOR), infer=ENUMERATED)
            loc = torch.mm(z.reshape(-1, 3), weight.T).reshape(z.shape[:-1])
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    each = stats.norm(weight[0].numpy(), 1.0).pdf(X.numpy()[:, None]) @ PRIOR.numpy()
    found: Any = lvmppl.posterior(model, {"x": X})
    torch.testing.assert_close(found.log_evidence_per_datum.numpy(), torch.tensor(each).log().numpy())


def test_random_stream_of_a_fit_does_not_depend_on_the_comparison() -> None:
    """A suspected model and the same without the look at its states draw alike."""
    plain = observing(lambda z: LOC[z])
    looked = observing(lambda z: LOC[z] + 0.0 * z.sum())
    draws = [lvmppl.posterior(m, {"x": X}).sample(50)["z"] for m in (plain, looked)]
    torch.testing.assert_close(draws[0], draws[1])
