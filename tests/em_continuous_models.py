"""Models with continuous latents, or with locations that are computed, made up for the tests of EM beside `em_models`."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from em_models import CASES, ENUMERATE, blobs, case, generator, line, normal, weights
from torch import Tensor
from torch.distributions import constraints

from lvmppl.distributions import GaussianChain

__all__ = ["CASES"]


def positive(name: str, *shape: int, seed: int) -> Tensor:
    result: Tensor = pyro.param(
        name, lambda: (0.3 * normal(*shape, seed=seed)).exp(), constraint=constraints.positive
    )
    return result


@case(blobs, "loadings loc variance")
def factor_analysis(x: Tensor) -> None:
    loadings, loc = (
        pyro.param("loadings", lambda: normal(3, 1, seed=40)),
        pyro.param("loc", lambda: normal(3, seed=41)),
    )
    variance = positive("variance", 3, seed=42)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loadings.T + loc, variance.sqrt()).to_event(1), obs=x)


@case(blobs, "loadings scale")
def probabilistic_pca_without_offset(x: Tensor) -> None:
    loadings = pyro.param("loadings", lambda: normal(2, 3, seed=43))
    scale = positive("scale", seed=44)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double()))
        covariance = torch.eye(3).double() * scale**2
        pyro.sample("x", dist.MultivariateNormal(z @ loadings, covariance), obs=x)


@case(blobs, "weights loadings loc variance", steps=8)
def mixture_of_factor_analysers(x: Tensor) -> None:
    loadings, loc = (
        pyro.param("loadings", lambda: normal(2, 3, seed=45)),
        pyro.param("loc", lambda: normal(2, 3, seed=46)),
    )
    variance = positive("variance", 3, seed=47)
    mixing = weights(2)
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(mixing), infer=ENUMERATE)
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        centre = loc[c] + z.unsqueeze(-1) * loadings[c]
        pyro.sample("x", dist.Normal(centre, variance.sqrt()).to_event(1), obs=x)


@case(blobs, "offset level spread scale")
def random_effect_of_every_row(x: Tensor) -> None:
    """The latent's own location and scale are looked up, with expected squares of the latent as statistics."""
    offset = pyro.param("offset", lambda: normal(2, seed=48))
    level, spread = pyro.param("level", lambda: normal(seed=49)), positive("spread", seed=50)
    scale = positive("scale", 3, seed=51)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(level, spread))
        shift = torch.cat([torch.zeros(1).double(), offset])
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) + shift, scale).to_event(1), obs=x)


@case(blobs, "slope loc covariance")
def regression_with_a_full_covariance(x: Tensor) -> None:
    """Nothing latent but z; locations from the data, one covariance matrix about them."""
    slope, loc = (
        pyro.param("slope", lambda: normal(2, seed=52)),
        pyro.param("loc", lambda: normal(2, seed=53)),
    )
    start = torch.tensor([[1.5, 0.2], [0.2, 1.0]], dtype=torch.float64)
    covariance = pyro.param("covariance", start, constraint=constraints.positive_definite)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7]).double()), infer=ENUMERATE)
        centre = x[:, :1] * slope + z.unsqueeze(-1) * loc
        pyro.sample("x", dist.MultivariateNormal(centre, covariance), obs=x[:, 1:])


@case(blobs, "loc variance", "gain")
def gain_that_must_be_positive(x: Tensor) -> None:
    """An affine location in a parameter that least squares might make negative."""
    gain, loc = positive("gain", 3, seed=54), pyro.param("loc", lambda: normal(3, seed=55))
    variance = positive("variance", 3, seed=56)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) * gain + loc, variance.sqrt()).to_event(1), obs=x)


@case(blobs, "variance", "left right")
def product_of_two_loadings(x: Tensor) -> None:
    """Affine in each of two parameters, not in both together."""
    left, right = pyro.param("left", lambda: normal(seed=57)), pyro.param("right", lambda: normal(3, seed=58))
    variance = positive("variance", 3, seed=59)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", dist.Normal((z * left).unsqueeze(-1) * right, variance.sqrt()).to_event(1), obs=x)


@case(line, "scale", "slope")
def slope_in_a_factor(x: Tensor) -> None:
    slope, scale = pyro.param("slope", lambda: normal(seed=60)), positive("scale", seed=61)
    pyro.factor("penalty", -((slope - 1.0) ** 4))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", dist.Normal(slope * z, scale), obs=x)


def sequences() -> dict[str, Tensor]:
    return {"x": normal(4, 9, 3, seed=65).cumsum(1)}


def events() -> dict[str, Tensor]:
    rate = torch.exp(0.8 * normal(2 * 13, seed=62) + 0.5)
    return {"x": torch.poisson(rate, generator=generator(63)).double()}


@case(events, "level spread", steps=4)
def overdispersed_counts(x: Tensor) -> None:
    """By quadrature: the Gaussian of the latent has a closed form all the same."""
    level, spread = pyro.param("level", torch.tensor(0.1).double()), positive("spread", seed=64)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(level, spread))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


@case(sequences, "initial transition emission noise variance", steps=5)
def chain_with_a_full_noise_covariance(x: Tensor) -> None:
    """A linear-Gaussian state space of which everything is fitted."""
    initial = pyro.param("initial", lambda: normal(2, seed=66))
    start = torch.tensor([[0.8, 0.2], [-0.1, 0.6]], dtype=torch.float64)
    transition = pyro.param("transition", start)
    eye = torch.eye(2).double()
    noise = pyro.param("noise", eye, constraint=constraints.positive_definite)
    emission, variance = (
        pyro.param("emission", lambda: normal(3, 2, seed=67)),
        positive("variance", 3, seed=68),
    )
    first = dist.Normal(initial, 1.0).to_event(1)
    step = dist.MultivariateNormal(torch.zeros(2).double(), noise)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", GaussianChain(first, transition, step, x.shape[1]))
        pyro.sample("x", dist.Normal(z @ emission.T, variance.sqrt()).to_event(2), obs=x)
