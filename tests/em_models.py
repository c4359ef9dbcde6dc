"""Models made up for the tests of EM, each with data and with how its parameters ought to be updated.

Shapes differ everywhere, so that a transposed axis fails. `closed` and `gradient` name the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from lvmppl.distributions import MarkovChain
from lvmppl.models.hmm import hidden_markov
from lvmppl.models.mixture import gaussian_mixture

ENUMERATE = {"enumerate": "parallel"}


@dataclass(frozen=True)
class Case:
    model: Callable[..., Any]
    data: Callable[[], dict[str, Tensor]]
    closed: frozenset[str]
    gradient: frozenset[str] = frozenset()
    steps: int = 12


CASES: dict[str, Case] = {}


def case(data: Callable[[], dict[str, Tensor]], closed: str, gradient: str = "", steps: int = 12) -> Any:
    def add(model: Callable[..., Any]) -> Callable[..., Any]:
        CASES[model.__name__] = Case(
            model, data, frozenset(closed.split()), frozenset(gradient.split()), steps
        )
        return model

    return add


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def blobs() -> dict[str, Tensor]:
    x = normal(61, 3, seed=1)
    x[:20] += torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)
    x[40:] -= torch.tensor([2.0, 2.0, -3.0], dtype=torch.float64)
    return {"x": x}


def line() -> dict[str, Tensor]:
    return {"x": blobs()["x"][:, 0]}


def counts() -> dict[str, Tensor]:
    return {"x": torch.poisson(torch.tensor([2.0, 9.0]).repeat(23), generator=generator(2)).double()}


def symbols() -> dict[str, Tensor]:
    return {"x": torch.randint(5, (17, 6), generator=generator(3))}


def bits() -> dict[str, Tensor]:
    chance = torch.tensor([[0.9, 0.2, 0.7, 0.1], [0.2, 0.8, 0.4, 0.6]]).repeat(19, 1)
    return {"x": torch.bernoulli(chance, generator=generator(4)).double()}


def simplex(*shape: int, seed: int = 5) -> Tensor:
    return torch.softmax(normal(*shape, seed=seed), -1)


def weights(size: int, name: str = "weights") -> Tensor:
    result: Tensor = pyro.param(name, lambda: simplex(size), constraint=constraints.simplex)
    return result


# ---------------------------------------------------------------------------------------------------- closed form


def mixture(x: Tensor, locs: tuple[float, ...], variances: tuple[float, ...]) -> None:
    """Not a case: each test starts it where it wants it."""
    size = len(locs)
    weights = pyro.param(
        "weights", torch.full((size,), 1 / size, dtype=x.dtype), constraint=constraints.simplex
    )
    loc = pyro.param("loc", torch.tensor(locs, dtype=x.dtype))
    variance = pyro.param("variance", torch.tensor(variances, dtype=x.dtype), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z], variance[z].sqrt()), obs=x)


def points() -> Tensor:
    return torch.tensor([-2.0, -1.4, -0.1, 0.5, 0.5, 0.5, 1.3, 2.2, 3.1], dtype=torch.float64)


@case(line, "first second loc scale")
def two_causes(x: Tensor) -> None:
    first, second = (
        weights(3, "first"),
        pyro.param("second", lambda: simplex(3, 2), constraint=constraints.simplex),
    )
    loc = pyro.param("loc", lambda: normal(3, 2, seed=7))
    scale = pyro.param("scale", torch.tensor(1.5, dtype=torch.float64), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(first), infer=ENUMERATE)
        b = pyro.sample("b", dist.Categorical(second[a]), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[a, b], scale), obs=x)


@case(symbols, "initial transition emission")
def markov(x: Tensor) -> None:
    initial = weights(3, "initial")
    transition = pyro.param("transition", lambda: simplex(3, 3, seed=8), constraint=constraints.simplex)
    emission = pyro.param("emission", lambda: simplex(3, 5, seed=9), constraint=constraints.simplex)
    with pyro.plate("data", len(x)):
        z: Any = None
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z{t}", dist.Categorical(initial if t == 0 else transition[z]), infer=ENUMERATE)
            pyro.sample(f"x{t}", dist.Categorical(emission[z]), obs=x[:, t])


def mixed_data() -> dict[str, Tensor]:
    return {"x": counts()["x"], "y": normal(46, 3, seed=11) + 2 * torch.arange(46).remainder(2).unsqueeze(1)}


@case(mixed_data, "weights rate loc variance")
def poisson_and_normal(x: Tensor, y: Tensor) -> None:
    rate = pyro.param(
        "rate", torch.tensor([3.0, 5.0, 8.0], dtype=torch.float64), constraint=constraints.positive
    )
    loc = pyro.param("loc", lambda: normal(3, 3, seed=12))
    variance = pyro.param("variance", lambda: normal(3, seed=13).exp(), constraint=constraints.positive)
    mixing = weights(3)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.Poisson(rate[z]), obs=x)
        pyro.sample("y", dist.Normal(loc[z], variance[z].sqrt().unsqueeze(-1)).to_event(1), obs=y)


@case(bits, "weights chance")
def products_of_bernoullis(x: Tensor) -> None:
    chance = pyro.param("chance", lambda: simplex(3, 4).sqrt(), constraint=constraints.unit_interval)
    mixing = weights(3)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.Bernoulli(chance[z]).to_event(1), obs=x)


@case(symbols, "weights words")
def nested_plates(x: Tensor) -> None:
    words = pyro.param("words", lambda: simplex(3, 5, seed=14), constraint=constraints.simplex)
    mixing = weights(3)
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        with pyro.plate("words_plate", x.shape[1], dim=-1):
            pyro.sample("x", dist.Categorical(words[z]), obs=x)


@case(symbols, "weights words")
def latent_of_every_word(x: Tensor) -> None:
    words = pyro.param("words", lambda: simplex(2, 3, 5, seed=14), constraint=constraints.simplex)
    mixing = pyro.param("weights", lambda: simplex(2, 3), constraint=constraints.simplex)
    with pyro.plate("data", len(x), dim=-2):
        kind = pyro.sample("kind", dist.Bernoulli(0.4), infer=ENUMERATE).long()
        with pyro.plate("words_plate", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Categorical(mixing[kind]), infer=ENUMERATE)
            pyro.sample("x", dist.Categorical(words[kind, z]), obs=x)


@case(line, "regime mixing loc variance")
def global_site(x: Tensor) -> None:
    regime = weights(2, "regime")
    mixing = pyro.param("mixing", lambda: simplex(2, 3), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: normal(3, seed=15))
    variance = pyro.param(
        "variance", torch.tensor([1.0, 2.0], dtype=torch.float64), constraint=constraints.positive
    )
    g = pyro.sample("g", dist.Categorical(regime), infer=ENUMERATE)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing[g]), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z], 1.1), obs=x)
        pyro.sample("y", dist.Normal(0.2, variance[g].sqrt()), obs=x + 0.1)


@case(blobs, "logits loc log_variance")
def spelled_in_logarithms(x: Tensor) -> None:
    logits, loc = (
        pyro.param("logits", lambda: normal(3, seed=16)),
        pyro.param("loc", lambda: normal(3, 3, seed=17)),
    )
    log_variance = pyro.param("log_variance", lambda: normal(3, seed=18))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=logits), infer=ENUMERATE)
        scale = (0.5 * log_variance).exp()
        pyro.sample("x", dist.Normal(loc[z], scale).to_event(1), obs=x)


@case(blobs, "shares loc root")
def unnormalised_and_cholesky(x: Tensor) -> None:
    shares = pyro.param(
        "shares", torch.tensor([2.0, 5.0], dtype=torch.float64), constraint=constraints.positive
    )
    loc = pyro.param("loc", lambda: normal(2, 3, seed=19))
    root = pyro.param(
        "root", lambda: torch.eye(3).double().repeat(2, 1, 1), constraint=constraints.lower_cholesky
    )
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(shares / shares.sum()), infer=ENUMERATE)
        pyro.sample("x", dist.MultivariateNormal(loc[z], scale_tril=root[z]), obs=x)


@case(blobs, "weights loc precision")
def tied_precision_matrix(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: normal(2, 3, seed=19))
    precision = pyro.param(
        "precision", lambda: torch.eye(3).double(), constraint=constraints.positive_definite
    )
    mixing = weights(2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.MultivariateNormal(loc[z], precision_matrix=precision), obs=x)


@case(blobs, "weights loc deviations")
def diagonal_multivariate(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: normal(2, 3, seed=19))
    deviations = pyro.param(
        "deviations", lambda: normal(2, 3, seed=20).exp(), constraint=constraints.positive
    )
    mixing = weights(2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.MultivariateNormal(loc[z], scale_tril=torch.diag_embed(deviations[z])), obs=x)


def positive_data() -> dict[str, Tensor]:
    return {"x": counts()["x"], "y": normal(46, seed=21).exp(), "w": normal(46, seed=22).abs() + 0.1}


@case(positive_data, "weights p q mean rate spread")
def waiting_times(x: Tensor, y: Tensor, w: Tensor) -> None:
    p = pyro.param("p", torch.tensor([0.2, 0.5], dtype=torch.float64), constraint=constraints.unit_interval)
    q = pyro.param("q", torch.tensor([0.3, 0.6], dtype=torch.float64), constraint=constraints.unit_interval)
    mean = pyro.param("mean", torch.tensor([1.0, 3.0], dtype=torch.float64), constraint=constraints.positive)
    rate = pyro.param("rate", torch.tensor([1.0, 2.0], dtype=torch.float64), constraint=constraints.positive)
    spread = pyro.param("spread", torch.tensor(0.7, dtype=torch.float64), constraint=constraints.positive)
    mixing = weights(2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("a", dist.Geometric(p[z]), obs=x)
        pyro.sample("b", dist.Binomial(30, 1 - q[z]), obs=x)
        pyro.sample("c", dist.Exponential(1 / mean[z]), obs=y)
        pyro.sample("d", dist.Gamma(2.5, rate[z]), obs=y)
        pyro.sample("e", dist.Laplace(0.5, spread), obs=w)


@case(symbols, "weights words")
def bags_of_words(x: Tensor) -> None:
    words = pyro.param("words", lambda: simplex(3, 5, seed=14), constraint=constraints.simplex)
    bag = torch.nn.functional.one_hot(x, 5).sum(1).double()
    mixing = weights(3)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.Multinomial(int(x.shape[1]), words[z]), obs=bag)


@case(blobs, "weights loc scale")
def shared_between_sites(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: normal(2, seed=23))
    scale = pyro.param("scale", lambda: normal(2, seed=24).exp(), constraint=constraints.positive)
    mixing = weights(2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x[:, 0])
        pyro.sample("y", dist.Normal(loc[z], scale[z]), obs=x[:, 1] + 0.3)


@case(blobs, "weights loc")
def known_and_different_scales(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: normal(2, seed=23))
    mixing = weights(2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z], 0.7), obs=x[:, 0])
        pyro.sample("y", dist.Normal(loc[z], 2.1), obs=x[:, 1])


def masked_data() -> dict[str, Tensor]:
    return {**blobs(), "seen": torch.rand(61, generator=generator(25)) > 0.3}


@case(masked_data, "weights loc variance")
def partly_masked(x: Tensor, seen: Tensor) -> None:
    loc = pyro.param("loc", lambda: normal(2, 3, seed=19))
    variance = pyro.param("variance", lambda: normal(2, 3, seed=20).exp(), constraint=constraints.positive)
    mixing = weights(2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        with poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(loc[z], variance[z].sqrt()).to_event(1), obs=x)


def grouped_data() -> dict[str, Tensor]:
    return {**line(), "group": torch.arange(61).remainder(4)}


@case(grouped_data, "weights loc scale")
def chosen_by_the_data(x: Tensor, group: Tensor) -> None:
    loc = pyro.param("loc", lambda: normal(2, 4, seed=26))
    scale = pyro.param("scale", torch.tensor(1.0, dtype=torch.float64), constraint=constraints.positive)
    mixing = weights(2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z, group], scale), obs=x)


@case(symbols, "flip emission")
def symmetric_table(x: Tensor) -> None:
    flip = weights(2, "flip")
    emission = pyro.param("emission", lambda: simplex(2, 5, seed=9), constraint=constraints.simplex)
    transition = torch.stack([flip, flip.flip(0)])
    with pyro.plate("data", len(x)):
        z: Any = None
        for t in pyro.markov(range(x.shape[1])):
            probs = torch.tensor([0.5, 0.5]).double() if t == 0 else transition[z]
            z = pyro.sample(f"z{t}", dist.Categorical(probs), infer=ENUMERATE)
            pyro.sample(f"x{t}", dist.Categorical(emission[z]), obs=x[:, t])


@case(symbols, "step emission")
def left_to_right(x: Tensor) -> None:
    step = pyro.param("step", lambda: simplex(2, 2), constraint=constraints.simplex)
    emission = pyro.param("emission", lambda: simplex(3, 5, seed=9), constraint=constraints.simplex)
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    rows = [torch.cat([step[0], zero]), torch.cat([zero, step[1]]), torch.cat([zero, zero, one])]
    transition = torch.stack(rows)
    with pyro.plate("data", len(x)):
        z: Any = None
        for t in pyro.markov(range(x.shape[1])):
            probs = torch.tensor([0.6, 0.3, 0.1]).double() if t == 0 else transition[z]
            z = pyro.sample(f"z{t}", dist.Categorical(probs), infer=ENUMERATE)
            pyro.sample(f"x{t}", dist.Categorical(emission[z]), obs=x[:, t])


def ragged() -> dict[str, Tensor]:
    x = normal(7, 6, seed=33) + 4 * torch.tensor([0, 0, 1, 1, 0, 1]).double()
    return {"x": x, "lengths": torch.tensor([6, 4, 1, 5, 6, 2, 3])}


@case(ragged, "initial transition loc variance", steps=8)
def chain_of_normals(x: Tensor, lengths: Tensor) -> None:
    hidden_markov(x, lengths, num_states=3, emission="gaussian")


@case(ragged, "initial transition rate", steps=8)
def chain_of_counts(x: Tensor, lengths: Tensor) -> None:
    hidden_markov(x.abs().round(), lengths, num_states=2, emission="poisson")


@case(ragged, "start moves loc scale", steps=8)
def chain_of_logits_with_a_table_a_step(x: Tensor, lengths: Tensor) -> None:
    """Moves that change over time, from logits; one scale for all states and steps."""
    start = pyro.param("start", lambda: normal(2, seed=34))
    moves = pyro.param("moves", lambda: normal(5, 2, 2, seed=35))
    loc = pyro.param("loc", torch.tensor([0.5, 3.0], dtype=torch.float64))
    scale = pyro.param("scale", torch.tensor(1.5, dtype=torch.float64), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", MarkovChain.from_logits(start, moves, 6, lengths), infer=ENUMERATE)
        seen = torch.arange(6) < lengths.unsqueeze(-1)
        pyro.sample("x", dist.Normal(loc[z], scale).mask(seen).to_event(1), obs=x)


@case(blobs, "weights loc scale")
def one_location_for_all_features(x: Tensor) -> None:
    mixing, loc = weights(2), pyro.param("loc", lambda: normal(2, seed=36))
    scale = pyro.param("scale", torch.tensor(2.5, dtype=torch.float64), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z].unsqueeze(-1).expand(*z.shape, 3), scale).to_event(1), obs=x)


@case(blobs, "weights loc covariance")
def shipped_mixture_tied(x: Tensor) -> None:
    gaussian_mixture(x, num_components=3, covariance="tied")


@case(blobs, "weights slope scale")
def mixture_of_regressions(x: Tensor) -> None:
    slope = pyro.param("slope", lambda: normal(2, 2, seed=29))
    scale = pyro.param("scale", torch.tensor(1.0, dtype=torch.float64), constraint=constraints.positive)
    mixing = weights(2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.Normal((slope[z] * x[:, 1:]).sum(-1), scale), obs=x[:, 0])


# ------------------------------------------------------------------------------------------------------ gradient


@case(line, "weights scale", "hidden head")
def neural_emission(x: Tensor) -> None:
    hidden, head = (
        pyro.param("hidden", lambda: normal(3, 4, seed=27)),
        pyro.param("head", lambda: normal(4, seed=28)),
    )
    scale = pyro.param("scale", torch.tensor(1.0, dtype=torch.float64), constraint=constraints.positive)
    mixing = weights(3)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(torch.tanh(hidden[z]) @ head, 0.8), obs=x)
        pyro.sample("y", dist.Normal(0.0, scale), obs=x)


@case(line, "first second scale", "loc")
def location_and_scale_by_two_latents(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: normal(3, seed=30))
    scale = pyro.param("scale", lambda: normal(2, seed=31).exp(), constraint=constraints.positive)
    mixing_a = weights(3, "first")
    mixing_b = weights(2, "second")
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(mixing_a), infer=ENUMERATE)
        b = pyro.sample("b", dist.Categorical(mixing_b), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[a], scale[b]), obs=x)


@case(counts, "weights rate")
def clamped_where_q_is_flat(x: Tensor) -> None:
    """Beyond the clamp Q does not change, so the solution beyond it is a maximum too."""
    start = torch.tensor([3.0, 5.0], dtype=torch.float64)
    rate = pyro.param("rate", start, constraint=constraints.positive)
    mixing = weights(2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.Poisson(rate.clamp(max=6.0)[z]), obs=x)


@case(counts, "weights", "rate")
def clamped_in_one_place(x: Tensor) -> None:
    start = torch.tensor([3.0, 5.0], dtype=torch.float64)
    rate = pyro.param("rate", start, constraint=constraints.positive)
    mixing = weights(2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.Poisson(rate.clamp(max=6.0)[z]), obs=x)
        pyro.sample("y", dist.Poisson(rate[z]), obs=x + 1)


def rare_symbols() -> dict[str, Tensor]:
    x = symbols()["x"].flatten()
    rare = torch.where(x == 4, 0, x)
    rare[[5, 50]] = 4
    return {"x": rare}


@case(rare_symbols, "weights", "words")
def clamped_and_normalised(x: Tensor) -> None:
    start = torch.tensor([[0.3, 0.2, 0.2, 0.2, 0.1], [0.1, 0.2, 0.3, 0.1, 0.3]], dtype=torch.float64)
    words = pyro.param("words", start, constraint=constraints.simplex)
    mixing = weights(2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.Categorical(words.clamp(min=0.03)[z]), obs=x)


@case(counts, "weights", "rate")
def also_in_a_factor(x: Tensor) -> None:
    rate = pyro.param("rate", torch.tensor([3.0, 8.0], dtype=torch.float64), constraint=constraints.positive)
    pyro.factor("penalty", -(rate - 4).square().sum())
    mixing = weights(2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.Poisson(rate[z]), obs=x)


@case(counts, "weights", "rate")
def in_two_fields(x: Tensor) -> None:
    rate = pyro.param("rate", torch.tensor([3.0, 8.0], dtype=torch.float64), constraint=constraints.positive)
    mixing = weights(2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(mixing), infer=ENUMERATE)
        pyro.sample("x", dist.Poisson(rate[z]), obs=x)
        pyro.sample("y", dist.Normal(rate[z], 1.0), obs=x)


@case(symbols, "emission", "strength")
def symmetric_by_sum(x: Tensor) -> None:
    strength = pyro.param("strength", lambda: normal(2, 2, seed=32).exp(), constraint=constraints.positive)
    emission = pyro.param("emission", lambda: simplex(2, 5, seed=9), constraint=constraints.simplex)
    table = strength + strength.T
    transition = table / table.sum(-1, keepdim=True)
    with pyro.plate("data", len(x)):
        z: Any = None
        for t in pyro.markov(range(x.shape[1])):
            probs = torch.tensor([0.3, 0.7]).double() if t == 0 else transition[z]
            z = pyro.sample(f"z{t}", dist.Categorical(probs), infer=ENUMERATE)
            pyro.sample(f"x{t}", dist.Categorical(emission[z]), obs=x[:, t])
