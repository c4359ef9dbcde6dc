"""Enumerated sites of plates within a row, and chains, beside continuous sites of that row: summed out at every point.

The oracle is scipy's quadrature over the continuous site of the brute-force sum over all joint states of the others.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import integrate, optimize, stats
from torch import Tensor

import lvmppl
from lvmppl.algorithms.evidence import log_evidence
from lvmppl.algorithms.expected import e_step, expected_log_joint
from lvmppl.algorithms.problem import build_problem
from lvmppl.distributions import MarkovChain
from lvmppl.summed_posteriors import _numbered

ENUMERATE = {"enumerate": "parallel"}
DIFFICULTY = np.array([-0.5, 0.4, 1.1, 0.2])
GUESS, HIT = 0.25, 0.8  # probability of guessing, and of a guess being right
ANSWERS = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [0, 1, 1, 0]], dtype=torch.float64)
ASKED = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)


def item_response(y: Tensor, asked: Tensor, outer: str = "data") -> None:
    """ability_n ~ N(0.3, 1.2²); guess_nj ~ Bernoulli; where guess: y_nj ~ Bernoulli(HIT), else by ability − difficulty."""
    data = pyro.plate("data", len(y), dim=-2 if outer == "data" else -1)
    items = pyro.plate("items", y.shape[1], dim=-1 if outer == "data" else -2)
    hit, difficulty = y.new_tensor(HIT), pyro.param("difficulty", torch.tensor(DIFFICULTY).to(y))
    if outer == "items":
        y, asked, difficulty = y.T, asked.T, difficulty.unsqueeze(-1)
    with data:
        ability = pyro.sample("ability", dist.Normal(y.new_tensor(0.3), 1.2))
    with data if outer == "data" else items, items if outer == "data" else data:
        guess = pyro.sample("guess", dist.Bernoulli(y.new_tensor(GUESS)), infer=ENUMERATE)
        right = torch.where(guess > 0, hit, torch.sigmoid(ability - difficulty))
        with poutine.mask(mask=asked):
            pyro.sample("y", dist.Bernoulli(right), obs=y)


def log_item(ability: float, n: int) -> np.ndarray:
    """log p(y_nj, guess_nj | ability) [J, 2]."""
    right = np.stack([1 / (1 + np.exp(DIFFICULTY - ability)), np.full(4, HIT)], 1)
    y, asked = ANSWERS.numpy()[n, :, None], ASKED.numpy()[n, :, None]
    table: np.ndarray = np.log([1 - GUESS, GUESS]) + np.where(
        asked, np.log(np.where(y > 0, right, 1 - right)), 0.0
    )
    return table


def log_ability(ability: float, n: int) -> float:
    """log p(ability, y_n), the guesses summed."""
    return float(stats.norm.logpdf(ability, 0.3, 1.2) + np.logaddexp.reduce(log_item(ability, n), 1).sum())


def expected(n: int, function: Callable[[float], float] = lambda _: 1.0) -> float:
    """∫ f(ability) p(ability, y_n) d ability."""
    return float(
        integrate.quad(
            lambda a: function(a) * math.exp(log_ability(a, n)), -13, 14, epsabs=0, epsrel=1e-12, limit=200
        )[0]
    )


@pytest.fixture(scope="module")
def post() -> Any:
    return lvmppl.posterior(item_response, {"y": ANSWERS, "asked": ASKED})


def test_evidence_and_moments_of_item_response_equal_scipy_quadrature(post: Any) -> None:
    assert post.kind == "quadrature" and "guess summed out at every point" in post.engine
    mean, sd = post.moments("ability")
    for n in range(3):
        total = expected(n)
        own = expected(n, lambda a: a) / total
        assert post.log_evidence_per_datum[n].item() == pytest.approx(math.log(total), rel=1e-8)
        assert mean[n].item() == pytest.approx(own, abs=1e-6)
        spread = math.sqrt(expected(n, lambda a, own=own: (a - own) ** 2) / total)
        assert sd[n].item() == pytest.approx(spread, abs=1e-6)
    assert float(post.log_evidence_error_per_datum.max()) < 1e-6


def test_marginals_of_guesses_equal_scipy_quadrature(post: Any) -> None:
    found, given = post.marginal("guess").probs, post.pair_marginal("ability", "guess")
    assert found.shape == (3, 4, 2) and given.mean.shape == (3, 4, 2, 1)
    for n, j, k in itertools.product(range(3), range(4), range(2)):

        def share(a: float, n: int = n, j: int = j, k: int = k) -> float:
            table = log_item(a, n)[j]
            return float(np.exp(table[k] - np.logaddexp.reduce(table)))

        weight = expected(n, share)
        assert found[n, j, k].item() == pytest.approx(weight / expected(n), abs=1e-7)
        mean = expected(n, lambda a, share=share: a * share(a)) / weight
        assert given.mean[n, j, k, 0].item() == pytest.approx(mean, abs=1e-6)


def test_mode_of_item_response_equals_the_best_of_all_guesses(post: Any) -> None:
    mode = post.mode()
    for n in range(3):
        best = (-math.inf, 0.0, ())
        for guess in itertools.product(range(2), repeat=4):

            def negative(a: float, n: int = n, guess: Any = guess) -> float:
                return -float(stats.norm.logpdf(a, 0.3, 1.2) + log_item(a, n)[range(4), guess].sum())

            found = optimize.minimize_scalar(
                negative, bounds=(-6, 6), method="bounded", options={"xatol": 1e-10}
            )
            best = max(best, (-found.fun, found.x, guess))
        assert mode.states["ability"][n].item() == pytest.approx(best[1], abs=1e-5)
        assert tuple(mode.states["guess"][n].tolist()) == best[2]
        assert mode.log_prob[n].item() == pytest.approx(best[0] - math.log(expected(n)), abs=1e-6)


def test_log_prob_of_samples_equals_that_by_hand_row_by_row(post: Any) -> None:
    draws = post.sample(5, seed=3)
    assert draws["guess"].shape == (5, 3, 4) and draws["ability"].shape == (5, 3)
    found = post.log_prob(draws)
    for s, n in itertools.product(range(5), range(3)):
        ability, guess = draws["ability"][s, n].item(), draws["guess"][s, n].long().tolist()
        joint = stats.norm.logpdf(ability, 0.3, 1.2) + log_item(ability, n)[range(4), guess].sum()
        assert found[s, n].item() == pytest.approx(joint - math.log(expected(n)), abs=1e-6)


def test_samples_have_the_joint_moments_of_scipy_quadrature_row_by_row(post: Any) -> None:
    """E[ability_n · guess_nj], which neither marginal alone would give."""
    draws = post.sample(6000, seed=1)
    for n, j in itertools.product(range(3), range(4)):

        def joint(a: float, n: int = n, j: int = j) -> float:
            table = log_item(a, n)[j]
            return float(a * np.exp(table[1] - np.logaddexp.reduce(table)))

        values = draws["ability"][:, n] * draws["guess"][:, n, j]
        error = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean()) - expected(n, joint) / expected(n)) < 4.5 * error


def test_entropy_of_each_row_equals_scipy_quadrature(post: Any) -> None:
    found = post.entropy()
    for n in range(3):
        total = math.log(expected(n))

        def terms(a: float, n: int = n, total: float = total) -> float:
            table = log_item(a, n)
            given = table - np.logaddexp.reduce(table, 1)[:, None]
            return float(total - log_ability(a, n) - (np.exp(given) * given).sum())

        assert found[n].item() == pytest.approx(expected(n, terms) / expected(n), abs=1e-6)


def test_rows_of_the_inner_plate_give_what_those_of_the_outer_one_give(post: Any) -> None:
    """Axes of the model's own plates in the other order: the items lead."""
    turned = lvmppl.posterior(functools.partial(item_response, outer="items"), {"y": ANSWERS, "asked": ASKED})
    np.testing.assert_allclose(turned.log_evidence_per_datum, post.log_evidence_per_datum, rtol=1e-10)
    plates = turned.variables["guess"].plates
    assert plates == ("items", "data") and turned.marginal("guess").probs.shape == (4, 3, 2)
    order = [plates.index("data"), plates.index("items")]
    probs = turned.marginal("guess").probs.permute(*order, 2)
    np.testing.assert_allclose(probs, post.marginal("guess").probs, atol=1e-9)
    mode = turned.mode()
    np.testing.assert_array_equal(mode.states["guess"].permute(order), post.mode().states["guess"])
    draws = turned.sample(7, seed=2)
    same = {"ability": draws["ability"], "guess": draws["guess"].permute(0, *(1 + i for i in order))}
    np.testing.assert_allclose(turned.log_prob(draws), post.log_prob(same), atol=1e-8)


def test_scales_of_rows_weigh_their_evidence_and_nothing_else(post: Any) -> None:
    weight = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)

    def model(y: Tensor, asked: Tensor, weight: Tensor) -> None:
        with poutine.scale(scale=weight.unsqueeze(-1)):
            item_response(y, asked)

    found = lvmppl.posterior(model, {"y": ANSWERS, "asked": ASKED, "weight": weight})
    each = weight * post.log_evidence_per_datum
    np.testing.assert_allclose(found.log_evidence_per_datum, each, rtol=1e-10)
    np.testing.assert_allclose(found.marginal("guess").probs, post.marginal("guess").probs, atol=1e-10)


@pytest.mark.parametrize("algorithm", ["enumeration", "em"])
def test_gradient_of_the_fit_equals_finite_differences_of_scipy_quadrature(algorithm: str) -> None:
    """∇ log p(x; θ) is that of EM's expected log joint at the θ of its E-step, too."""
    problem = build_problem("gradient", item_response, {"y": ANSWERS, "asked": ASKED})
    theta = torch.tensor(DIFFICULTY).requires_grad_()
    values = {"difficulty": theta}
    if algorithm == "enumeration":
        value = log_evidence(problem, values)
    else:
        value = expected_log_joint(problem, values, e_step(problem, {"difficulty": theta.detach()})[1])
    (found,) = torch.autograd.grad(value, theta)
    slope = []
    for j in range(4):
        ends = []
        for step in (-1e-4, 1e-4):
            DIFFICULTY[j] += step
            ends.append(sum(math.log(expected(n)) for n in range(3)))
            DIFFICULTY[j] -= step
        slope.append((ends[1] - ends[0]) / 2e-4)
    np.testing.assert_allclose(found, slope, atol=1e-6)


STAY = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
START, LEVEL = np.array([0.6, 0.4]), np.array([-1.0, 1.5])
PATHS = torch.tensor(
    [[1.0, 0.2, -0.6, 1.4], [-0.9, -1.3, 0.0, 0.0], [0.4, -0.2, -0.7, 0.0]], dtype=torch.float64
)
LENGTHS = torch.tensor([4, 2, 3])


def moving_level(x: Tensor, lengths: Tensor) -> None:
    """u_n ~ Gamma; a chain z_n of states; x_nt ~ N(u_n LEVEL_{z_nt}, 0.7), the gain u_n of the sequence's own."""
    steps = torch.arange(x.shape[1])
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Gamma(x.new_tensor(2.0), 1.5))
        chain = MarkovChain(torch.tensor(START), STAY, x.shape[1], lengths=lengths)
        z = pyro.sample("z", chain, infer=ENUMERATE)
        emission = dist.Normal(torch.tensor(LEVEL)[z] * u.unsqueeze(-1), 0.7)
        pyro.sample("x", emission.mask(steps < lengths.unsqueeze(-1)).to_event(1), obs=x)


def paths_of(n: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(2), repeat=int(LENGTHS[n])))


def log_path(u: float, n: int, path: tuple[int, ...]) -> float:
    """log p(u, z = path, x_n)."""
    moves = sum(math.log(STAY[i, j]) for i, j in itertools.pairwise(path))
    x = PATHS[n, : len(path)].numpy()
    seen = stats.norm.logpdf(x, u * LEVEL[list(path)], 0.7).sum()
    return float(math.log(START[path[0]]) + moves + seen + stats.gamma.logpdf(u, 2.0, scale=1 / 1.5))


@functools.cache
def weight_of(n: int, path: tuple[int, ...], power: int = 0) -> float:
    """∫ u^power p(u, z = path, x_n) du."""

    def function(u: float) -> float:
        return float(u**power * math.exp(log_path(u, n, path)))

    return float(
        integrate.quad(function, 0, 15, epsabs=1e-15, epsrel=1e-11, points=[0.5, 1, 2, 4], limit=200)[0]
    )


@pytest.fixture(scope="module")
def moving() -> Any:
    return lvmppl.posterior(moving_level, {"x": PATHS, "lengths": LENGTHS})


def test_chain_beside_a_gain_of_its_row_equals_the_sum_over_all_paths(moving: Any) -> None:
    found, pair, given = moving.marginal("z").probs, moving.pair_marginal("z"), moving.pair_marginal("u", "z")
    for n in range(3):
        paths, length = paths_of(n), int(LENGTHS[n])
        weights = np.array([weight_of(n, p) for p in paths])
        firsts = np.array([weight_of(n, p, 1) for p in paths])
        assert moving.log_evidence_per_datum[n].item() == pytest.approx(math.log(weights.sum()), rel=1e-8)
        mean = firsts.sum() / weights.sum()
        assert moving.moments("u")[0][n].item() == pytest.approx(mean, abs=1e-6)
        for t, k in itertools.product(range(length), range(2)):
            here = np.array([p[t] == k for p in paths])
            assert found[n, t, k].item() == pytest.approx(weights[here].sum() / weights.sum(), abs=1e-7)
            mean = firsts[here].sum() / weights[here].sum()
            assert given.mean[n, t, k, 0].item() == pytest.approx(mean, abs=1e-6)
        for t, j, k in itertools.product(range(length - 1), range(2), range(2)):
            here = np.array([p[t : t + 2] == (j, k) for p in paths])
            assert pair[n, t, j, k].item() == pytest.approx(weights[here].sum() / weights.sum(), abs=1e-7)
    assert (found[1, 2:] == 0).all() and given.mean[1, 2:].isnan().all()  # beyond the sequence's length
    assert len(moving.to_frame().query("site == 'z'")) == 2 * int(LENGTHS.sum())


def test_mode_and_samples_of_chains_beside_a_gain_have_the_density_by_hand(moving: Any) -> None:
    mode, draws = moving.mode(), moving.sample(6, seed=5)
    found = moving.log_prob(draws)
    for n in range(3):
        total, length = math.log(sum(weight_of(n, p) for p in paths_of(n))), int(LENGTHS[n])
        best = (-math.inf, 0.0, ())
        for path in paths_of(n):
            top = optimize.minimize_scalar(
                lambda u, n=n, path=path: -log_path(u, n, path), bounds=(1e-3, 6), method="bounded",
                options={"xatol": 1e-10},
            )  # fmt: skip
            best = max(best, (-top.fun, top.x, path))
        assert mode.states["u"][n].item() == pytest.approx(best[1], abs=1e-5)
        assert tuple(mode.states["z"][n, :length].tolist()) == best[2]
        assert mode.log_prob[n].item() == pytest.approx(best[0] - total, abs=1e-6)
        for s in range(6):
            path = tuple(draws["z"][s, n, :length].tolist())
            expected = log_path(draws["u"][s, n].item(), n, path) - total
            assert found[s, n].item() == pytest.approx(expected, abs=1e-6)


def test_entropy_of_chains_beside_a_gain_equals_scipy_quadrature(moving: Any) -> None:
    for n in range(3):
        total = math.log(sum(weight_of(n, p) for p in paths_of(n)))

        def term(u: float, n: int = n, total: float = total) -> float:
            logs = np.array([log_path(u, n, p) for p in paths_of(n)]) - total
            return float(-(np.exp(logs) * logs).sum())

        entropy = integrate.quad(term, 0, 15, epsabs=1e-10, epsrel=1e-10, points=[0.5, 1, 2, 4], limit=200)[0]
        assert moving.entropy()[n].item() == pytest.approx(entropy, abs=1e-6)


def test_numbers_of_assignments_count_those_of_each_row() -> None:
    """The mode is sought from the best node of each."""
    states = torch.randint(3, (40, 7, 2), generator=torch.Generator().manual_seed(0))
    states[:, 2] = states[:1, 2]
    found = _numbered(states)
    for n in range(7):
        rows, number = states[:, n].tolist(), found[:, n].tolist()
        assert len(set(number)) == len({tuple(r) for r in rows}) == max(number) + 1
        assert len({(tuple(r), k) for r, k in zip(rows, number, strict=True)}) == max(number) + 1


def test_narrow_label_far_away_is_not_taken_for_a_gaussian() -> None:
    """At random points log p(x, shift) is quadratic; the label's own mode, a thousand times narrower, is 150 away."""

    def model(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(x.new_tensor(0.0), 60.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(x.new_tensor([0.5, 0.5])), infer=ENUMERATE)
            scale = torch.tensor([0.5, 0.002], dtype=x.dtype)[c]
            pyro.sample("x", dist.Normal(shift + 150.0 * c, scale), obs=x)

    post = lvmppl.posterior(model, {"x": torch.tensor([0.1], dtype=torch.float64)})
    parts = [stats.norm.logpdf(0.1, 150.0 * c, math.hypot(60.0, s)) for c, s in enumerate((0.5, 0.002))]
    assert post.log_evidence == pytest.approx(np.logaddexp(*parts) + math.log(0.5), abs=1e-6)
    assert post.kind == "quadrature"


FLIP = np.array([[0.8, 0.2], [0.3, 0.7]])
SERIES = torch.tensor(
    [[0.3, -1.6, -0.8, 1.9, 2.2, 0.4, -0.1, -1.2, 0.9, 1.4, -2.5, 0.7, 0.2]], dtype=torch.float64
)


@pytest.mark.parametrize("steps", [3, 13])
def test_loop_of_more_states_than_can_be_listed_equals_scipy_quadrature(steps: int) -> None:
    """2¹³ sequences of states beside a level of the row's own are summed out by elimination, 2³ listed."""
    x = torch.cat([SERIES, SERIES.flip(1)])[:, :steps]

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            level, z = pyro.sample("level", dist.Normal(x.new_tensor(0.0), 0.6)), 0
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z{t}", dist.Categorical(torch.tensor(FLIP)[z]), infer=ENUMERATE)
                pyro.sample(f"x{t}", dist.StudentT(3.0, torch.tensor(LEVEL)[z] + level, 0.7), obs=x[:, t])

    def joint(level: float, n: int) -> float:
        seen = stats.t.pdf(x[n].numpy()[:, None], 3, LEVEL + level, 0.7)
        alpha = FLIP[0] * seen[0]
        for emission in seen[1:]:
            alpha = (alpha @ FLIP) * emission
        return float(alpha.sum() * stats.norm.pdf(level, 0, 0.6))

    post = lvmppl.posterior(model, {"x": x})
    assert ("summed out at every point" in post.engine) == (steps == 13)
    for n in range(2):
        total = math.log(integrate.quad(joint, -6, 6, args=(n,), epsabs=0, epsrel=1e-11)[0])
        assert post.log_evidence_per_datum[n].item() == pytest.approx(total, rel=1e-8)


def test_class_that_moves_the_ability_beside_guesses_equals_scipy_quadrature() -> None:
    """A summed site on which the continuous one's own prior depends."""

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-2):
            c = pyro.sample("c", dist.Categorical(y.new_tensor([0.3, 0.7])), infer=ENUMERATE)
            ability = pyro.sample("ability", dist.Normal(y.new_tensor([-2.0, 1.5])[c], 0.7))
            with pyro.plate("items", y.shape[1], dim=-1):
                guess = pyro.sample("guess", dist.Bernoulli(y.new_tensor(GUESS)), infer=ENUMERATE)
                right = torch.where(guess > 0, HIT, torch.sigmoid(ability - torch.tensor(DIFFICULTY)))
                pyro.sample("y", dist.Bernoulli(right), obs=y)

    def joint(ability: float, n: int, c: int) -> float:
        right = (1 - GUESS) / (1 + np.exp(DIFFICULTY - ability)) + GUESS * HIT
        likelihood = np.where(ANSWERS[n].numpy() > 0, right, 1 - right).prod()
        return float((0.3, 0.7)[c] * stats.norm.pdf(ability, (-2.0, 1.5)[c], 0.7) * likelihood)

    post = lvmppl.posterior(model, {"y": ANSWERS})
    for n in range(3):
        own = [integrate.quad(joint, -9, 9, args=(n, c), epsabs=0, epsrel=1e-11)[0] for c in range(2)]
        assert post.log_evidence_per_datum[n].item() == pytest.approx(math.log(sum(own)), rel=1e-8)
        assert post.marginal("c").probs[n, 0].item() == pytest.approx(own[0] / sum(own), abs=1e-7)


def test_impossible_sequence_is_named_and_leaves_the_others_alone() -> None:
    """From state 0, which cannot be seen as 2, on to state 1, which cannot be seen as 0; u_n: how well each is seen."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Beta(torch.tensor(2.0, dtype=torch.float64), 3.0)).unsqueeze(-1)
            start, moves = torch.tensor([1.0, 0.0]).double(), torch.tensor([[0.5, 0.5], [0.0, 1.0]]).double()
            z = pyro.sample("z", MarkovChain(start, moves, 2), infer=ENUMERATE)
            first, second = torch.stack([u, 1 - u, 0 * u], -1), torch.stack([0 * u, u, 1 - u], -1)
            seen = torch.where((z == 0).unsqueeze(-1), first, second)
            pyro.sample("x", dist.Categorical(seen).to_event(1), obs=x)

    with pytest.warns(UserWarning, match="probability 0 to datum 1"):
        post = lvmppl.posterior(model, {"x": torch.tensor([[0, 2], [2, 0], [1, 1]])})
    seen_well = 2.0 / 5.0
    product = seen_well * (1 - seen_well) - 6.0 / 150.0  # E[u (1 − u)], the variance being 6/150
    squares = 1.0 - 2.0 * product  # E[u² + (1 − u)²]
    low = squares / 2 + (2 * seen_well - 1) / 2  # E[u²]
    rest = 0.5 * (squares - low) + 0.5 * product  # 1 then 1 in state 0, or on to state 1
    expected = [math.log(0.5 * product), -math.inf, math.log(rest)]
    np.testing.assert_allclose(post.log_evidence_per_datum, expected, rtol=1e-8)
    assert post.mode().log_prob[1] == -math.inf and post.mode().log_prob[[0, 2]].isfinite().all()
    assert (post.marginal("z").probs[1] == 0).all()
