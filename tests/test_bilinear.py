"""Log-densities as matrix products, beside torch's own element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from allocations import Allocations
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from lvmppl import bilinear
from lvmppl.bilinear import log_density
from lvmppl.exact.named import exp_

Make = Callable[[tuple[int, ...], tuple[int, ...], torch.Generator], tuple[dict[str, Tensor], Any, Tensor]]
"""(shape of parameters, shape of values, generator) -> parameters, distribution of them, values."""

SIZE = 3  # of a vector or a table of categories


def positive(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) + 0.2


def normal(left, right, g):  # type: ignore[no-untyped-def]
    p = {"loc": torch.randn(left, generator=g), "scale": positive(*left, generator=g)}
    return p, lambda q: dist.Normal(q["loc"], q["scale"]), torch.randn(right, generator=g)


def log_normal(left, right, g):  # type: ignore[no-untyped-def]
    p, _, x = normal(left, right, g)
    return p, lambda q: dist.LogNormal(q["loc"], q["scale"]), x.exp()


def multivariate(left, right, g):  # type: ignore[no-untyped-def]
    root = torch.randn(*left, SIZE, SIZE, generator=g)
    covariance = root @ root.mT + torch.eye(SIZE)
    p = {"loc": torch.randn(*left, SIZE, generator=g), "covariance": covariance}
    x = torch.randn(*right, SIZE, generator=g)
    return p, lambda q: dist.MultivariateNormal(q["loc"], q["covariance"]), x


def bernoulli(left, right, g):  # type: ignore[no-untyped-def]
    p = {"logits": 3 * torch.randn(left, generator=g)}
    return p, lambda q: dist.Bernoulli(logits=q["logits"]), torch.rand(right, generator=g).round()


def bernoulli_probs(left, right, g):  # type: ignore[no-untyped-def]
    p = {"probs": 0.1 + 0.8 * torch.rand(left, generator=g)}
    return p, lambda q: dist.Bernoulli(q["probs"]), torch.rand(right, generator=g).round()


def binomial(left, right, g):  # type: ignore[no-untyped-def]
    p = {"probs": 0.1 + 0.8 * torch.rand(left, generator=g)}
    return p, lambda q: dist.Binomial(7, q["probs"]), torch.randint(8, right, generator=g).double()


def negative_binomial(left, right, g):  # type: ignore[no-untyped-def]
    p = {"probs": 0.1 + 0.8 * torch.rand(left, generator=g)}
    x = torch.randint(8, right, generator=g).double()
    return p, lambda q: dist.NegativeBinomial(4.0, q["probs"]), x


def geometric(left, right, g):  # type: ignore[no-untyped-def]
    p = {"probs": 0.1 + 0.8 * torch.rand(left, generator=g)}
    return p, lambda q: dist.Geometric(q["probs"]), torch.randint(9, right, generator=g).double()


def poisson(left, right, g):  # type: ignore[no-untyped-def]
    p = {"rate": 5 * positive(*left, generator=g)}
    return p, lambda q: dist.Poisson(q["rate"]), torch.randint(12, right, generator=g).double()


def exponential(left, right, g):  # type: ignore[no-untyped-def]
    p = {"rate": 5 * positive(*left, generator=g)}
    return p, lambda q: dist.Exponential(q["rate"]), positive(*right, generator=g)


def gamma(left, right, g):  # type: ignore[no-untyped-def]
    p = {"rate": 5 * positive(*left, generator=g)}
    return p, lambda q: dist.Gamma(2.5, q["rate"]), positive(*right, generator=g)


def categorical(left, right, g):  # type: ignore[no-untyped-def]
    p = {"logits": torch.randn(*left, SIZE, generator=g)}
    return p, lambda q: dist.Categorical(logits=q["logits"]), torch.randint(SIZE, right, generator=g)


def one_hot(left, right, g):  # type: ignore[no-untyped-def]
    p = {"probs": torch.randn(*left, SIZE, generator=g).softmax(-1)}
    x = torch.nn.functional.one_hot(torch.randint(SIZE, right, generator=g), SIZE).double()
    return p, lambda q: dist.OneHotCategorical(q["probs"]), x


def multinomial(left, right, g):  # type: ignore[no-untyped-def]
    p = {"probs": torch.randn(*left, SIZE, generator=g).softmax(-1)}
    x = torch.nn.functional.one_hot(torch.randint(SIZE, (*right, 6), generator=g), SIZE).sum(-2).double()
    return p, lambda q: dist.Multinomial(6, q["probs"]), x


EVENTLESS = {"multivariate": multivariate, "multinomial": multinomial}
SCALARS = {
    f.__name__: f
    for f in (
        normal,
        log_normal,
        bernoulli,
        bernoulli_probs,
        binomial,
        negative_binomial,
        geometric,
        poisson,
        exponential,
        gamma,
        categorical,
        one_hot,
    )
}
FAMILIES: dict[str, Any] = {**EVENTLESS, **SCALARS}


@pytest.fixture(autouse=True)
def _float64(monkeypatch):  # type: ignore[no-untyped-def]
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(bilinear, "SMALLEST", 1)  # small shapes take the product too
    yield
    torch.set_default_dtype(previous)


def build(name: str, sides: list[tuple[int, bool]], events: int, seed: int):  # type: ignore[no-untyped-def]
    """Parameters with the axes marked True, values with the others; perhaps an event axis of 5."""
    tail = (5,) * events
    left = tuple(size if own else 1 for size, own in sides) + tail
    right = tuple(1 if own else size for size, own in sides) + tail
    parameters, make, x = FAMILIES[name](left, right, torch.Generator().manual_seed(seed))
    full = torch.broadcast_shapes(left, right)

    def distribution(p: dict[str, Tensor]) -> Any:
        fn = make(p).expand(full)
        return fn.to_event(events) if events else fn

    return parameters, distribution, x


axes = st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12)
@given(sides=axes, events=st.integers(0, 1), seed=st.integers(0, 999))
def test_log_density_and_gradients_equal_torch(name: str, sides, events: int, seed: int) -> None:  # type: ignore[no-untyped-def]
    parameters, distribution, x = build(name, sides, 0 if name in EVENTLESS else events, seed)
    ours = {k: v.clone().requires_grad_() for k, v in parameters.items()}
    theirs = {k: v.clone().requires_grad_() for k, v in parameters.items()}
    expected = distribution(theirs).log_prob(x)
    actual = log_density(distribution(ours), x).expand(expected.shape)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed + 1))
    gradients = torch.autograd.grad((weight * actual).sum(), list(ours.values()))
    wanted = torch.autograd.grad((weight * expected).sum(), list(theirs.values()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("categorical", "one_hot")])
def test_every_family_takes_the_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events = 0 if name in EVENTLESS else 1
    parameters, distribution, x = build(name, [(4, True), (7, False)], events, 0)
    monkeypatch.setattr(bilinear.families, "log_density", lambda *_: pytest.fail("element by element"))
    assert log_density(distribution(parameters), x).shape == (4, 7)


@pytest.mark.parametrize(
    "family",
    [
        lambda p: dist.Laplace(p, 1 + p),
        lambda p: dist.HalfNormal(p),
        lambda p: dist.Pareto(p / 10, p),
        lambda p: dist.InverseGamma(p, 1 + p),
    ],
)
def test_density_of_families_without_a_product_equals_torch(family: Callable[[Tensor], Any]) -> None:
    fn = family(torch.tensor([[0.5], [1.5], [2.5]]))
    x = 1 + torch.rand(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_density(fn.expand((3, 7)), x), fn.log_prob(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["normal", "multivariate", "poisson", "bernoulli"])
def test_second_derivatives_equal_torch(name: str) -> None:
    parameters, distribution, x = build(name, [(4, True), (6, False)], 0 if name in EVENTLESS else 1, 3)
    first = next(iter(parameters))
    results = []
    for density in (log_density, lambda fn, value: fn.log_prob(value)):
        own = {k: v.clone().requires_grad_() for k, v in parameters.items()}
        total = density(distribution(own), x).logsumexp(0).sum()
        (slope,) = torch.autograd.grad(total, own[first], create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), own[first])[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("spread", [1.0, 30.0, 3000.0])
@pytest.mark.parametrize("name", ["normal", "multivariate"])
def test_density_of_ill_placed_data_equals_torch(name: str, offset: float, spread: float) -> None:
    parameters, distribution, x = build(name, [(5, True), (40, False)], 0 if name in EVENTLESS else 1, 1)
    parameters["loc"] = spread * parameters["loc"] + offset
    x = parameters["loc"][torch.arange(40) % 5, 0].unsqueeze(0) + x
    fn = distribution(parameters)
    torch.testing.assert_close(log_density(fn, x), fn.log_prob(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("correlation", [0.9, 0.9999, 0.99999999])
def test_density_with_nearly_singular_covariance_equals_torch(correlation: float) -> None:
    covariance = torch.full((SIZE, SIZE), correlation) + (1 - correlation) * torch.eye(SIZE)
    x = torch.linalg.cholesky(covariance) @ torch.randn(
        50, SIZE, 1, generator=torch.Generator().manual_seed(0)
    )
    fn = dist.MultivariateNormal(torch.zeros(4, 1, SIZE), covariance)
    torch.testing.assert_close(
        log_density(fn, x.squeeze(-1)), fn.log_prob(x.squeeze(-1)), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("name", ["normal", "multivariate", "poisson", "binomial"])
def test_density_in_float32_equals_float64(name: str) -> None:
    parameters, distribution, x = build(name, [(5, True), (40, False)], 0 if name in EVENTLESS else 1, 2)
    single = {k: v.float() for k, v in parameters.items()}
    exact = distribution({k: v.double() for k, v in single.items()}).log_prob(x.float().double())
    actual = log_density(distribution(single), x.float())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=1e-5)


def test_probability_zero_is_minus_infinity_with_finite_gradients() -> None:
    probs = torch.tensor([[0.0, 0.5], [0.3, 1.0]]).reshape(2, 1, 2).requires_grad_()
    x = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    result = log_density(dist.Bernoulli(probs).to_event(1), x)
    half, rest = torch.tensor(0.5).log(), torch.tensor([0.3, 0.7]).log()
    expected = torch.stack(
        [torch.stack([-half / 0, half, half]), torch.stack([rest[0], -half / 0 * -1, rest[1]])]
    )
    expected[0, 0] = expected[1, 1] = -torch.inf
    torch.testing.assert_close(result, expected)
    (gradient,) = torch.autograd.grad(result[result > -torch.inf].sum(), probs)
    assert bool(torch.isfinite(gradient).all())


def test_mask_leaves_zero_where_it_is_false() -> None:
    parameters, distribution, x = build("normal", [(4, True), (6, False)], 1, 5)
    mask = torch.arange(6) % 2 == 0
    fn = distribution(parameters).mask(mask)
    torch.testing.assert_close(log_density(fn, x), fn.log_prob(x), rtol=1e-10, atol=1e-12)


def test_value_outside_the_support_is_refused() -> None:
    fn = dist.Poisson(torch.ones(3, 1, 2), validate_args=True).to_event(1)
    with pytest.raises(ValueError, match="support"):
        log_density(fn, torch.tensor([[1.0, -2.0]] * 5))


@pytest.mark.parametrize("name", ["normal", "multivariate", "poisson", "categorical"])
def test_no_tensor_takes_the_size_of_the_broadcast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bilinear, "PIECE", 1 << 10)
    states, rows = 50, 400
    parameters, distribution, x = build(
        name, [(states, True), (rows, False)], 0 if name in EVENTLESS else 1, 0
    )
    own = {k: v.requires_grad_() for k, v in parameters.items()}
    with Allocations() as seen:
        log_density(distribution(own), x).sum().backward()
    assert states * rows <= seen.largest / x.element_size() < 2 * states * rows


def test_log_density_of_sharp_matrices_equals_that_of_scipy() -> None:
    """Covariances of condition 10⁶ ten thousand standard deviations from the data's mean: squares are not expanded."""
    rng = np.random.default_rng(5)
    size, dims, components = 700, 5, 3
    root = rng.normal(size=(components, dims, dims)) * 0.3 + np.diag([1.0, 0.3, 0.1, 0.01, 0.001])
    covariance = root @ root.transpose(0, 2, 1)
    loc = rng.normal(size=(components, dims)) * 10
    x = loc[rng.integers(components, size=size)] + rng.normal(size=(size, dims))
    fn = dist.MultivariateNormal(torch.as_tensor(loc).unsqueeze(1), torch.as_tensor(covariance).unsqueeze(1))
    with torch.no_grad():
        found = log_density(fn, torch.as_tensor(x))
    for k in range(components):
        expected = stats.multivariate_normal(loc[k], covariance[k], allow_singular=True).logpdf(x)
        np.testing.assert_allclose(found[k], expected, rtol=1e-8)


def test_exp_in_place_equals_exp_and_is_zero_far_below() -> None:
    values = torch.tensor(
        [0.0, -1.0, -50.0, -640.0, -660.0, -5000.0, -torch.inf, torch.nan], dtype=torch.float64
    )
    found = exp_(values.clone())
    torch.testing.assert_close(found[:4], values[:4].exp(), rtol=1e-15, atol=0)
    assert found[4:7].tolist() == [0.0, 0.0, 0.0] and found[7].isnan()
