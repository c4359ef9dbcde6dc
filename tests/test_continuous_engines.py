"""The continuous engines where they are hard put: many modes, edges of the support, single precision, impossible data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

import lvmppl
from lvmppl.distributions import MarkovChain
from lvmppl.exact.quadrature import quadrature

ENUMERATE = {"enumerate": "parallel"}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def density_of_normals(components: list[tuple[float, float, float]]) -> Callable[[Tensor], None]:
    """A model whose posterior is the mixture of these (weight, mean, sd), so that log p(x) = 0 for every datum."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(tensor(0.0), 100.0))
            logs = [math.log(w) + dist.Normal(tensor(m), s).log_prob(z) for w, m, s in components]
            own = dist.Normal(tensor(0.0), 100.0).log_prob(z)
            pyro.factor(
                "f",
                torch.logsumexp(torch.stack([p.squeeze(0) for p in torch.broadcast_tensors(*logs)]), 0) - own,
            )

    return model


@pytest.mark.parametrize(
    "components",
    [
        [(0.5, 0.0, 1.0), (0.5, 7.0, 0.01)],
        [(0.5, 0.0, 1.0), (0.5, 40.0, 0.01)],
        [(0.3, 0.0, 1.0), (0.7, 512.3, 1e-5)],
        [(0.1, 3.0 * i, 0.05) for i in range(10)],
        [(0.05, 7.0 * i, 1.0) for i in range(20)],
        [(0.05, 7.0 * i + 0.3, 0.005) for i in range(20)],
    ],
    ids=["narrow", "narrow and far", "needle", "ten narrow modes", "twenty modes", "twenty needles"],
)
def test_log_evidence_of_many_modes_is_zero_and_an_estimate(
    components: list[tuple[float, float, float]],
) -> None:
    """Nothing can be known of a function of the user's own between the points where it was evaluated."""
    post = lvmppl.posterior(density_of_normals(components), {"x": tensor(0.0, 1.0)})
    assert post.kind == "estimate" and (post.log_evidence_error_per_datum == math.inf).all()
    assert "'f' (Unit)" in post.engine
    assert (post.log_evidence_per_datum.abs() < 1e-7).all()


def mixture_likelihood(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 100.0))
        parts = dist.Normal(torch.stack([z, z - 40.0], -1), x.new_tensor([1.0, 0.01]))
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(x.new_tensor([0.3, 0.7])), parts), obs=x)


def mixture_prior(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        parts = dist.Normal(x.new_tensor([0.0, 500.0]), x.new_tensor([1.0, 1e-3]))
        z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(x.new_tensor([0.3, 0.7])), parts))
        pyro.sample("x", dist.Normal(z, 1000.0), obs=x)


@pytest.mark.parametrize(
    ("model", "locs", "variances"),
    [
        (mixture_likelihood, [0.0, -40.0], [1e4 + 1, 1e4 + 1e-4]),
        (mixture_prior, [0.0, 500.0], [1e6 + 1, 1e6]),
    ],
)
def test_log_evidence_of_a_mixture_with_a_narrow_component_is_within_its_error(
    model: Callable[[Tensor], None], locs: list[float], variances: list[float]
) -> None:
    x = tensor(0.0, 1.0, -30.0)
    truth = stats.norm.pdf(x.numpy()[:, None], locs, np.sqrt(variances)) @ [0.3, 0.7]
    post = lvmppl.posterior(model, {"x": x})
    assert post.kind == "quadrature" and post.log_evidence_error_per_datum.max() < 1e-6
    deviation = np.abs(post.log_evidence_per_datum.numpy() - np.log(truth))
    assert (deviation <= post.log_evidence_error_per_datum.numpy()).all()


def test_log_evidence_of_an_outlier_that_spikes_in_the_tail_of_the_prior_equals_scipy() -> None:
    """Between the prior's mode and that of the likelihood's narrow one the prior decides which way is up."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.StudentT(3.0, z, 1e-3), obs=x)

    x = tensor(7.3, 8.6)
    post = lvmppl.posterior(model, {"x": x})
    for value, found in zip(x.tolist(), post.log_evidence_per_datum.tolist(), strict=True):

        def joint(z: float, value: float = value) -> float:
            return float(stats.norm.pdf(z) * stats.t.pdf((value - z) / 1e-3, 3) / 1e-3)

        ends = [-12.0, -1.0, 1.0, 4.0, *(value + d for d in (-0.1, -0.01, -0.003, 0.003, 0.01, 0.1)), 12.0]
        area = sum(
            integrate.quad(joint, a, b, epsabs=0, epsrel=1e-11, limit=300)[0]
            for a, b in itertools.pairwise(ends)
        )
        assert found == pytest.approx(math.log(area), abs=1e-6)


def test_quadratic_factor_of_four_dimensions_is_an_estimate_equal_to_its_closed_form() -> None:
    """exp(−½ |z − x|²) is no normalised density: its integral against N(0, I) is N(x; 0, 2I) (2π)²."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4, dtype=x.dtype), 1.0).to_event(1))
            pyro.factor("f", -0.5 * (z - x).square().sum(-1))

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    post = lvmppl.posterior(model, {"x": x})
    assert post.kind == "estimate" and post.log_evidence_error == math.inf
    assert "'f' (Unit)" in post.engine
    expected = stats.multivariate_normal(np.zeros(4), 2 * np.eye(4)).logpdf(x.numpy()) + 2 * math.log(
        2 * math.pi
    )
    np.testing.assert_allclose(post.log_evidence_per_datum, expected, rtol=1e-10)


@pytest.mark.parametrize("concentration", [0.01, 0.1])
def test_mass_at_the_edge_of_the_support_is_covered_by_the_error(concentration: float) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Beta(tensor(concentration).squeeze(), tensor(concentration).squeeze()))
            pyro.sample("x", dist.Binomial(10, p), obs=x)

    x = tensor(0.0, 1.0, 5.0, 10.0)
    post = lvmppl.posterior(model, {"x": x})
    truth = stats.betabinom(10, concentration, concentration).logpmf(x.numpy())
    deviation = np.abs(post.log_evidence_per_datum.numpy() - truth)
    assert (deviation <= post.log_evidence_error_per_datum.numpy()).all()
    assert post.log_evidence_error_per_datum[1:3].max() < 1e-6


def test_funnel_equals_nested_scipy_quadrature() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(tensor(0.0).squeeze(), 1.0))
            b = pyro.sample("b", dist.Normal(0.0, (a / 2).exp()))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    x = tensor(0.5, 3.0)
    post = lvmppl.posterior(model, {"x": x})
    for value, found in zip(x.tolist(), post.log_evidence_per_datum.tolist(), strict=True):
        # b is integrated in closed form: x | a is Normal
        area, _ = integrate.quad(
            lambda a, v=value: stats.norm.pdf(a) * stats.norm.pdf(v, 0, math.sqrt(1 + math.exp(a))), -12, 12,
            epsabs=1e-14, limit=400,
        )  # fmt: skip
        assert found == pytest.approx(math.log(area), abs=2e-6)


@pytest.mark.parametrize(("dim", "narrowest"), [(1, 0.002), (2, 0.05), (3, 0.2)])
def test_modes_no_sum_is_seen_of_are_found_where_the_search_is_said_to(dim: int, narrowest: float) -> None:
    """exp and log apart, so that the terms of the sum are out of sight; widths down to what the docstring promises."""
    rows, generator = {1: 12, 2: 12, 3: 2}[dim], torch.Generator().manual_seed(5)
    away = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    radius = 10 ** (1 + 2 * torch.rand(rows, 1, generator=generator, dtype=torch.float64))
    place = radius * away / away.norm(dim=-1, keepdim=True)
    sd = narrowest ** torch.rand(rows, 1, generator=generator, dtype=torch.float64)

    def log_joint(z: Tensor) -> Tensor:
        broad = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        narrow = dist.Normal(place, sd).log_prob(z).sum(-1)
        top = torch.maximum(broad, narrow)
        return top + (0.6 * (broad - top).exp() + 0.4 * (narrow - top).exp()).log()

    found = quadrature(log_joint, rows, dim, wary=True)
    assert not found.concave.any()
    assert (found.log_evidence.abs() <= found.log_evidence_error).all()
    assert found.log_evidence_error.max() < 1e-5


def poisson_of_log_rate(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


def test_quadrature_in_single_precision_equals_double_within_its_error() -> None:
    x = tensor(0.0, 3.0, 20.0)
    double = lvmppl.posterior(poisson_of_log_rate, {"x": x})
    single = lvmppl.posterior(poisson_of_log_rate, {"x": x.float()})
    assert single.log_evidence_per_datum.dtype == torch.float32
    deviation = (single.log_evidence_per_datum.double() - double.log_evidence_per_datum).abs()
    assert (deviation <= single.log_evidence_error_per_datum.double()).all()
    assert single.log_evidence_error_per_datum.max() < 1e-4


def test_mixture_prior_equals_its_closed_form() -> None:
    weights, locs = tensor(0.3, 0.7), tensor(-2.0, 1.0)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, 1.0))
            pyro.sample("x", dist.Normal(pyro.sample("z", prior), 1.0), obs=x)

    x = tensor(0.5, 3.0, -4.0)
    expected = np.log(stats.norm.pdf(x.numpy()[:, None], locs.numpy(), math.sqrt(2)) @ weights.numpy())
    post = lvmppl.posterior(model, {"x": x})
    np.testing.assert_allclose(post.log_evidence_per_datum, expected, atol=1e-9)


def never_negative(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.factor("positive", torch.where(x > 0, x.new_zeros(()), x.new_tensor(-torch.inf)))


def test_impossible_datum_is_named_and_has_no_samples() -> None:
    with pytest.warns(UserWarning, match="probability 0 to datum 1"):
        post = lvmppl.posterior(never_negative, {"x": tensor(1.0, -1.0, 2.0)})
    assert post.log_evidence_per_datum.tolist()[1] == -math.inf
    assert math.isfinite(post.log_evidence_per_datum[0]) and not post.mode().log_prob.isnan().any()
    with pytest.raises(lvmppl.InputError, match="datum 1"):
        post.sample(3)


# ------------------------------------------------------------------------------------------------- pair marginals

PRIOR, LOC = tensor(0.2, 0.5, 0.3), tensor(-1.0, 0.5, 2.0)
SECOND = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.1, 0.9]], dtype=torch.float64)


def two_of_each(x: Tensor) -> None:
    """z | c ~ N(loc_c, 1), w | z, d ~ N(z / 2 + d, 0.8), x ~ N(z + w, 0.5)."""
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(PRIOR), infer=ENUMERATE)
        d = pyro.sample("d", dist.Categorical(SECOND[c]), infer=ENUMERATE)
        z = pyro.sample("z", dist.Normal(LOC[c], 1.0))
        w = pyro.sample("w", dist.Normal(0.5 * z + d, 0.8))
        pyro.sample("x", dist.Normal(z + w, 0.5), obs=x)


def by_hand(x: float) -> dict[tuple[int, int], tuple[float, np.ndarray, np.ndarray]]:
    """p(c, d, x), and mean and covariance of (z, w) given c, d and x."""
    found = {}
    for c in range(3):
        for d in range(2):
            mean = np.array([LOC[c].item(), 0.5 * LOC[c].item() + d])
            covariance = np.array([[1.0, 0.5], [0.5, 0.25 + 0.64]])
            total, spread = mean.sum(), covariance.sum() + 0.25
            gain = covariance.sum(1) / spread
            weight = PRIOR[c].item() * SECOND[c, d].item() * stats.norm.pdf(x, total, math.sqrt(spread))
            found[c, d] = weight, mean + gain * (x - total), covariance - np.outer(gain, gain) * spread
    return found


def test_pair_marginals_of_discrete_and_continuous_sites_equal_those_by_hand() -> None:
    x = tensor(0.3, 2.5, -1.0, 4.0)
    post = lvmppl.posterior(two_of_each, {"x": x})
    pair, z_given_c, zw = (
        post.pair_marginal("d", "c"),
        post.pair_marginal("z", "c"),
        post.pair_marginal("w", "z"),
    )
    assert pair.shape == (4, 2, 3) and z_given_c.mean.shape == (4, 3, 1) and zw.mean.shape == (4, 2)
    for n, value in enumerate(x.tolist()):
        table = by_hand(value)
        total = sum(weight for weight, _, _ in table.values())
        for (c, d), (weight, _, _) in table.items():
            assert pair[n, d, c].item() == pytest.approx(weight / total, rel=1e-9)
        for c in range(3):
            own = [table[c, d] for d in range(2)]
            mean = sum(w * m[0] for w, m, _ in own) / sum(w for w, _, _ in own)
            assert z_given_c.mean[n, c, 0].item() == pytest.approx(mean, rel=1e-9)
        centre = sum(w * m for w, m, _ in table.values()) / total
        np.testing.assert_allclose(zw.mean[n], centre[::-1], rtol=1e-9)


def test_log_prob_of_samples_equals_that_of_each_by_hand() -> None:
    x = tensor(0.3, 2.5)
    post = lvmppl.posterior(two_of_each, {"x": x})
    draws = post.sample(5, seed=3)
    found = post.log_prob(draws)
    assert found.shape == (5, 2)
    for n, value in enumerate(x.tolist()):
        table = by_hand(value)
        total = sum(weight for weight, _, _ in table.values())
        for s in range(5):
            weight, mean, covariance = table[int(draws["c"][s, n]), int(draws["d"][s, n])]
            point = [draws["z"][s, n].item(), draws["w"][s, n].item()]
            expected = math.log(weight / total) + stats.multivariate_normal(mean, covariance).logpdf(point)
            assert found[s, n].item() == pytest.approx(expected, rel=1e-8)
    first = post.log_prob({k: v[0] for k, v in draws.items()})
    torch.testing.assert_close(first, found[0])


def walk(x: Tensor) -> None:
    z = 0.0
    for t in range(len(x)):
        z = pyro.sample(f"z{t}", dist.Normal(z + x.new_zeros(()), 0.7))
        pyro.sample(f"x{t}", dist.Normal(z, 0.4), obs=x[t])


def test_pair_marginal_of_neighbouring_steps_of_a_path_equals_the_dense_posterior() -> None:
    size = 11
    x = torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    post = lvmppl.posterior(walk, {"x": x})
    assert "path" in post.engine
    sums = np.tril(np.ones((size, size)))
    prior = 0.49 * sums @ sums.T
    gain = prior @ np.linalg.inv(prior + 0.16 * np.eye(size))
    covariance, mean = prior - gain @ prior, gain @ x.numpy()
    pair = post.pair_marginal("z4", "z5")
    np.testing.assert_allclose(pair.mean.squeeze(0), mean[4:6], rtol=1e-9)
    np.testing.assert_allclose(pair.covariance_matrix.squeeze(0), covariance[4:6, 4:6], rtol=1e-9)
    backwards = post.pair_marginal("z5", "z4").covariance_matrix.squeeze(0)
    np.testing.assert_allclose(backwards, covariance[4:6, 4:6][::-1, ::-1], rtol=1e-9)
    with pytest.raises(lvmppl.InputError, match="neighbouring"):
        post.pair_marginal("z1", "z7")


# ----------------------------------------------------------- enumerated sites in plates under a global continuous one

POINTS_OF_GLOBAL = tensor(-1.4, -0.9, 0.2, 1.1, 1.9)


def mixture_of_unknown_location(x: Tensor) -> None:
    shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), 2.0))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(tensor(0.3, 0.7)), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(shift + torch.tensor([-1.0, 1.0], dtype=x.dtype)[c], 0.6), obs=x)


def test_global_location_of_a_mixture_equals_the_sum_over_all_labellings() -> None:
    """Given the labels everything is Gaussian: 2⁵ labellings, each a closed form."""
    x = POINTS_OF_GLOBAL
    post = lvmppl.posterior(mixture_of_unknown_location, {"x": x})
    logs, labels, means, variances = [], [], [], []
    for c in itertools.product(range(2), repeat=len(x)):
        residual = x.numpy() - np.array([-1.0, 1.0])[list(c)]
        spread = 4.0 * np.ones((len(x), len(x))) + 0.36 * np.eye(len(x))
        log = stats.multivariate_normal(np.zeros(len(x)), spread).logpdf(residual)
        logs.append(log + np.log(np.array([0.3, 0.7])[list(c)]).sum())
        precision = 1 / 4.0 + len(x) / 0.36
        labels.append(c), means.append(residual.sum() / 0.36 / precision), variances.append(1 / precision)
    total = np.logaddexp.reduce(logs)
    weights = np.exp(np.array(logs) - total)
    assert abs(post.log_evidence - total) <= post.log_evidence_error < 1e-5
    np.testing.assert_allclose(post.marginal("c").probs[:, 1], weights @ np.array(labels), atol=1e-6)
    mean = weights @ np.array(means)
    sd = math.sqrt(weights @ (np.array(variances) + (np.array(means) - mean) ** 2))
    found = post.moments("shift")
    assert float(found[0]) == pytest.approx(mean, abs=1e-6) and float(found[1]) == pytest.approx(sd, abs=1e-6)
    frame = post.to_frame()
    assert len(frame) == 2 * len(x) + 1


def test_global_location_of_a_hidden_markov_chain_equals_the_sum_over_all_paths() -> None:
    x, stay = POINTS_OF_GLOBAL[:4], torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    initial = tensor(0.5, 0.5)

    def model(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", MarkovChain(initial, stay, x.shape[1]), infer=ENUMERATE)
            loc = torch.tensor([-1.0, 1.0], dtype=x.dtype)[z]
            pyro.sample(
                "x", dist.Normal(shift.unsqueeze(-1) + loc, x.new_full((x.shape[1],), 0.6)).to_event(1), obs=x
            )

    post = lvmppl.posterior(model, {"x": x.unsqueeze(0)})
    logs, paths = [], list(itertools.product(range(2), repeat=len(x)))
    for z in paths:
        residual = x.numpy() - np.array([-1.0, 1.0])[list(z)]
        spread = 4.0 * np.ones((len(x), len(x))) + 0.36 * np.eye(len(x))
        log = stats.multivariate_normal(np.zeros(len(x)), spread).logpdf(residual) + math.log(0.5)
        logs.append(log + sum(math.log(stay[i, j]) for i, j in itertools.pairwise(z)))
    total = np.logaddexp.reduce(logs)
    assert abs(post.log_evidence - total) <= post.log_evidence_error < 1e-5
    expected = np.exp(np.array(logs) - total) @ np.array(paths)
    np.testing.assert_allclose(post.marginal("z").probs[0, :, 1], expected, atol=1e-6)
