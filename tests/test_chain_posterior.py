"""Markov chains as sites of ordinary models, against sums over every state sequence and against hmmlearn."""

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
from allocations import Allocations
from hmmlearn import hmm
from pyro import poutine
from scipy.stats import norm
from torch import Tensor

import lvmppl
import lvmppl.exact.pieces
from lvmppl.distributions import MarkovChain
from lvmppl.errors import ModelError
from lvmppl.models.hmm import hidden_markov
from lvmppl.posteriors import Posterior

K, T, B, C = 3, 4, 2, 2
GENERATOR = torch.Generator().manual_seed(7)


def table(*shape: int) -> Tensor:
    raw = torch.rand(*shape, generator=GENERATOR, dtype=torch.float64) + 0.05
    return raw / raw.sum(-1, keepdim=True)


PI, A, CLASS = table(C, K), table(C, 1, K, K), torch.tensor([0.4, 0.6], dtype=torch.float64)
MU = torch.randn(C, K, generator=GENERATOR, dtype=torch.float64)
X = torch.randn(B, T, generator=GENERATOR, dtype=torch.float64)
LENGTHS = torch.tensor([4, 2])


def mixture_of_chains(x: Tensor, lengths: Tensor) -> None:
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(CLASS), infer={"enumerate": "parallel"})
        z = pyro.sample("z", MarkovChain(PI[c], A[c], T, lengths), infer={"enumerate": "parallel"})
        mask = torch.arange(T) < lengths.unsqueeze(-1)
        pyro.sample("x", dist.Normal(MU[c.unsqueeze(-1), z], 1.0).mask(mask).to_event(1), obs=x)


def joint_table(row: int) -> dict[tuple[int, tuple[int, ...]], float]:
    """log p(x, c, z) of every assignment of one sequence."""
    steps = int(LENGTHS[row])
    result = {}
    for c in range(C):
        for z in itertools.product(range(K), repeat=steps):
            value = math.log(CLASS[c]) + math.log(PI[c, z[0]])
            value += sum(math.log(A[c, 0, i, j]) for i, j in itertools.pairwise(z))
            value += sum(
                -0.5 * float(X[row, t] - MU[c, k]) ** 2 - 0.5 * math.log(2 * math.pi) for t, k in enumerate(z)
            )
            result[c, z] = value
    return result


@pytest.fixture(scope="module")
def post() -> Posterior:
    found = lvmppl.posterior(mixture_of_chains, {"x": X, "lengths": LENGTHS})
    assert isinstance(found, Posterior)
    return found


@pytest.mark.parametrize("row", range(B))
def test_chain_beside_an_enumerated_site_equals_brute_force(post: Posterior, row: int) -> None:
    joint = joint_table(row)
    values = np.array(list(joint.values()))
    evidence = np.logaddexp.reduce(values)
    weights = dict(zip(joint, np.exp(values - evidence), strict=True))
    unary, classes, pairs, mixed = np.zeros((T, K)), np.zeros(C), np.zeros((T - 1, K, K)), np.zeros((T, C, K))
    for (c, z), w in weights.items():
        classes[c] += w
        for t, k in enumerate(z):
            unary[t, k] += w
            mixed[t, c, k] += w
        for t, (i, j) in enumerate(itertools.pairwise(z)):
            pairs[t, i, j] += w
    assert post.log_evidence_per_datum is not None
    assert float(post.log_evidence_per_datum[row]) == pytest.approx(evidence, rel=1e-12)
    np.testing.assert_allclose(post.probabilities("z")[row], unary, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(post.probabilities("c")[row], classes, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(post.pair_marginal("z")[row], pairs, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(post.pair_marginal("c", "z")[row], mixed, rtol=1e-10, atol=1e-12)
    entropy = -sum(w * math.log(w) for w in weights.values())
    assert float(post.entropy()[row]) == pytest.approx(entropy, rel=1e-10)
    best_c, best_z = max(joint, key=lambda key: joint[key])
    mode = post.mode()
    assert int(mode.states["c"][row]) == best_c
    assert tuple(mode.states["z"][row, : len(best_z)].tolist()) == best_z
    assert float(mode.log_prob[row]) == pytest.approx(max(values) - evidence, rel=1e-10)


def test_expected_transitions_equal_brute_force_over_all_sequences(post: Posterior) -> None:
    counts = np.zeros((K, K))
    for row in range(B):
        joint = joint_table(row)
        evidence = np.logaddexp.reduce(list(joint.values()))
        for (_, z), value in joint.items():
            for i, j in itertools.pairwise(z):
                counts[i, j] += math.exp(value - evidence)
    np.testing.assert_allclose(post.expected_transitions("z"), counts, rtol=1e-10)
    with pytest.raises(lvmppl.InputError, match="Markov chain"):
        post.expected_transitions("c")


def test_log_prob_of_every_assignment_sums_to_one(post: Posterior) -> None:
    total = 0.0
    for (c, z), value in joint_table(0).items():
        states = {"c": torch.tensor([c, 0]), "z": torch.tensor([list(z), [0, 0, 0, 0]])}
        found = float(post.log_prob(states)[0])
        assert found == pytest.approx(value - float(post.log_evidence_per_datum[0]), rel=1e-9, abs=1e-10)  # type: ignore[index]
        total += math.exp(found)
    assert total == pytest.approx(1.0, rel=1e-10)


def test_samples_have_the_posterior_frequencies(post: Posterior) -> None:
    draws = post.sample(20_000, seed=3)
    counts = torch.zeros(C, *[K] * T, dtype=torch.float64)
    index = (draws["c"][:, 0], *draws["z"][:, 0].unbind(-1))
    counts.index_put_(index, torch.ones(20_000, dtype=torch.float64), accumulate=True)
    joint = joint_table(0)
    expected = torch.zeros_like(counts)
    for (c, z), value in joint.items():
        expected[(c, *z)] = math.exp(value - float(post.log_evidence_per_datum[0]))  # type: ignore[index]
    expected = expected * 20_000
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.numel() - 1
    assert abs(float(chi) - freedom) < 5 * math.sqrt(2 * freedom)
    assert draws["z"].shape == (20_000, B, T)
    assert bool((draws["z"][:, 1, 2:] == 0).all())


def test_frame_leaves_out_steps_beyond_a_length(post: Posterior) -> None:
    frame = post.to_frame()
    z = frame[frame["site"] == "z"]
    assert len(z) == int(LENGTHS.sum()) * K
    assert set(z[z["datum"] == 1]["position"]) == {"0", "1"}
    assert z["probability"].sum() == pytest.approx(float(LENGTHS.sum()))


PI2, A2 = table(2), table(2, 2)


def factorial(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", MarkovChain(PI[0], A[0, 0], x.shape[1]), infer={"enumerate": "parallel"})
        b = pyro.sample("b", MarkovChain(PI2, A2, x.shape[1]), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(1.0 * a - 0.7 * b, 0.8).to_event(1), obs=x)


def test_entropy_of_rows_in_pieces_equals_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a piece take their own lengths and weights along."""
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def weighted(x: Tensor, lengths: Tensor, weight: Tensor) -> None:
        with poutine.scale(scale=weight):
            mixture_of_chains(x, lengths)

    for module in (lvmppl.posteriors, lvmppl.exact.pieces):
        monkeypatch.setattr(module, "PIECE", 1)
    for model, data in ((mixture_of_chains, {}), (weighted, {"weight": weight})):
        found = lvmppl.posterior(model, {"x": X, "lengths": LENGTHS, **data}).entropy()
        for row in range(B):
            values = np.array(list(joint_table(row).values()))
            log_given = values - np.logaddexp.reduce(values)
            assert float(found[row]) == pytest.approx(-(np.exp(log_given) * log_given).sum(), rel=1e-9)


def test_factorial_chains_equal_brute_force() -> None:
    post = lvmppl.posterior(factorial, {"x": X})
    assert isinstance(post, Posterior)
    mode = post.mode()
    for row in range(B):
        joint = {}
        for a in itertools.product(range(K), repeat=T):
            for b in itertools.product(range(2), repeat=T):
                value = math.log(PI[0, a[0]]) + math.log(PI2[b[0]])
                value += sum(math.log(A[0, 0, i, j]) for i, j in itertools.pairwise(a))
                value += sum(math.log(A2[i, j]) for i, j in itertools.pairwise(b))
                for t in range(T):
                    error = (float(X[row, t]) - a[t] + 0.7 * b[t]) / 0.8
                    value += -0.5 * error**2 - 0.5 * math.log(2 * math.pi) - math.log(0.8)
                joint[a, b] = value
        values = np.array(list(joint.values()))
        evidence = np.logaddexp.reduce(values)
        assert float(post.log_evidence_per_datum[row]) == pytest.approx(evidence, rel=1e-12)  # type: ignore[index]
        unary = np.zeros((T, 2))
        for (_, b), value in joint.items():
            for t, k in enumerate(b):
                unary[t, k] += math.exp(value - evidence)
        np.testing.assert_allclose(post.probabilities("b")[row], unary, rtol=1e-10, atol=1e-12)
        best = max(joint, key=lambda key: joint[key])
        assert (tuple(mode.states["a"][row].tolist()), tuple(mode.states["b"][row].tolist())) == best
        assert float(mode.log_prob[row]) == pytest.approx(values.max() - evidence, rel=1e-9)
        entropy = -(np.exp(values - evidence) * (values - evidence)).sum()
        assert float(post.entropy()[row]) == pytest.approx(entropy, rel=1e-9)


def seven_chains(x: Tensor, moved: Any = lambda z: z) -> None:
    initial, transition = torch.tensor([0.3, 0.7]), torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    with pyro.plate("data", len(x)):
        loc: Any = 0.0
        for i in range(7):
            chain = MarkovChain(initial.to(x), transition.to(x), x.shape[1])
            z = pyro.sample(f"z{i}", chain, infer={"enumerate": "parallel"})
            loc = loc + (1.0 + i) * (moved(z) if i == 6 else z)
        pyro.sample("x", dist.Normal(loc, 2.0).to_event(1), obs=x)


def test_evidence_of_many_chains_equals_their_product_and_takes_little_memory() -> None:
    x = torch.tensor([[3.0, 20.0, 11.0, 7.0], [0.0, 28.0, 14.0, 5.0]], dtype=torch.float64)
    with Allocations() as made:
        post = lvmppl.posterior(seven_chains, {"x": x})
    move = functools.reduce(np.kron, [np.array([[0.8, 0.2], [0.4, 0.6]])] * 7)
    level = functools.reduce(np.add.outer, [np.array([0.0, 1.0 + i]) for i in range(7)]).reshape(-1)
    for row, evidence in zip(x.numpy(), post.log_evidence_per_datum, strict=True):  # type: ignore[arg-type]
        weight = functools.reduce(np.kron, [np.array([0.3, 0.7])] * 7) * norm.pdf(row[0], level, 2.0)
        for value in row[1:]:
            weight = (weight @ move) * norm.pdf(value, level, 2.0)
        assert float(evidence) == pytest.approx(math.log(weight.sum()), rel=1e-12)
    assert made.largest < 2**20  # 128 joint states, a matrix of them 128 KiB


def test_observation_of_another_step_of_one_of_many_chains_is_refused() -> None:
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match="a dependence on its states at other steps"):
        lvmppl.posterior(lambda x: seven_chains(x, lambda z: z.roll(1, -1)), {"x": x})


@pytest.mark.parametrize("emission", ["categorical", "poisson", "gaussian"])
def test_hidden_markov_model_equals_hmmlearn(emission: Any) -> None:
    rng = np.random.default_rng(5)
    start, moves = PI[0].numpy(), A[0, 0].numpy()
    lengths = [9, 5, 7]
    if emission == "categorical":
        reference: Any = hmm.CategoricalHMM(K, init_params="", implementation="log")
        reference.emissionprob_ = table(K, 6).numpy()
        data: Any = rng.integers(0, 6, (21, 1))
        theta = {"emission": torch.tensor(reference.emissionprob_)}
    elif emission == "poisson":
        reference = hmm.PoissonHMM(K, init_params="", implementation="log")
        reference.lambdas_ = np.array([[1.5], [4.0], [9.0]])
        data = rng.poisson(4.0, (21, 1))
        theta = {"rate": torch.tensor(reference.lambdas_[:, 0])}
    else:
        reference = hmm.GaussianHMM(K, covariance_type="diag", init_params="", implementation="log")
        reference.means_, reference.covars_ = (
            np.array([[-1.0], [0.5], [2.0]]),
            np.array([[0.5], [1.0], [2.0]]),
        )
        data = rng.normal(size=(21, 1))
        theta = {"loc": torch.tensor(reference.means_[:, 0])}
    reference.startprob_, reference.transmat_ = start, moves
    padded = torch.zeros(3, 9, dtype=torch.float64 if emission == "gaussian" else torch.long)
    for row, (begin, size) in enumerate(zip((0, 9, 14), lengths, strict=True)):
        padded[row, :size] = torch.as_tensor(data[begin : begin + size, 0])
    model = functools.partial(hidden_markov, num_states=K, emission=emission)
    if emission == "gaussian":
        spread = _spread_name(model, padded)
        theta[spread] = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).pow(
            0.5 if spread == "scale" else 1.0
        )
    theta |= {"initial": torch.tensor(start), "transition": torch.tensor(moves)}
    torch.set_default_dtype(torch.float64)
    try:
        post = lvmppl.posterior(model, {"x": padded, "lengths": torch.tensor(lengths)}, parameters=theta)
        mode = post.mode()
        probs = post.probabilities("z")
    finally:
        torch.set_default_dtype(torch.float32)
    assert post.log_evidence == pytest.approx(reference.score(data, lengths), rel=1e-10)
    expected = reference.predict_proba(data, lengths)
    score, path = reference.decode(data, lengths)
    found = np.concatenate([probs[i, :n].numpy() for i, n in enumerate(lengths)])
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)
    states = np.concatenate([mode.states["z"][i, :n].numpy() for i, n in enumerate(lengths)])
    np.testing.assert_array_equal(states, path)
    assert float(mode.log_prob.sum()) + post.log_evidence == pytest.approx(score, rel=1e-9)


def _spread_name(model: Any, x: Tensor) -> str:
    fit = lvmppl.fit(model, {"x": x}, algorithm="enumeration", max_steps=1)
    return next(n for n in fit.parameters if n in ("scale", "variance"))


def test_observation_of_a_whole_sequence_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", MarkovChain(PI[0], A[0, 0], T), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(1.0 * z.sum(-1), 1.0), obs=x[:, 0])

    with pytest.raises(ModelError, match=r"site 'x': expected to depend on the chain z step by step"):
        lvmppl.posterior(model, {"x": X})


@pytest.mark.parametrize(
    "moved",
    [
        lambda z: z.roll(1, -1),
        lambda z: z.flip(-1),
        lambda z: z.cumsum(-1) % 2,
        lambda z: torch.diff(z, dim=-1, prepend=z[..., :1]).abs().clamp(max=1),
        lambda z: (z.sum(-1, keepdim=True) > 2).long().expand(z.shape),
    ],
    ids=["roll", "flip", "cumsum", "diff", "sum"],
)
@pytest.mark.parametrize("steps", [2, 3, 9])
def test_observation_of_other_steps_than_its_own_is_refused(moved: Any, steps: int) -> None:
    x = torch.randn(11, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(steps))
    loc, state = (
        torch.tensor([-1.0, 1.5, 0.3], dtype=torch.float64),
        (torch.full((3,), 1 / 3), torch.full((3, 3), 1 / 3)),
    )

    def model(x: Tensor, moved: Any = moved) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", MarkovChain(*state, steps), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[moved(z)], 1.0).to_event(1), obs=x)

    with pytest.raises(
        ModelError, match=r"site 'x': expected to depend at step t on the state of the chain z"
    ):
        lvmppl.posterior(model, {"x": x})
    lvmppl.posterior(functools.partial(model, moved=lambda z: z), {"x": x})


def test_gradient_ascent_and_em_agree_on_a_hidden_markov_model() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 4, (12, 8), generator=generator)
    model = functools.partial(hidden_markov, num_states=2, emission="categorical")
    torch.set_default_dtype(torch.float64)
    try:
        gradient = lvmppl.fit(model, {"x": x}, algorithm="enumeration", max_steps=300, tolerance=1e-11)
        em = lvmppl.fit(model, {"x": x}, algorithm="em", start_from=gradient, max_steps=3, tolerance=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert gradient.status == "converged"
    assert np.diff(em.history["objective"]).min() > -1e-9 * abs(em.log_evidence)
    assert em.log_evidence == pytest.approx(gradient.log_evidence, abs=1e-4)


def test_observation_beyond_a_length_is_refused() -> None:
    def model(x: Tensor, lengths: Tensor, masked: bool = False) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", MarkovChain(PI[0], A[0, 0], T, lengths), infer={"enumerate": "parallel"})
            fn = dist.Normal(1.0 * z, 1.0)
            if masked:
                fn = fn.expand(torch.broadcast_shapes(fn.batch_shape, x.shape))
                fn = fn.mask(torch.arange(T) < lengths.unsqueeze(-1))
            pyro.sample("x", fn.to_event(1), obs=x)

    data = {"x": X, "lengths": LENGTHS}
    with pytest.raises(
        ModelError, match=r"site 'x': expected to be masked beyond the lengths of the chain z"
    ):
        lvmppl.posterior(model, data)
    lvmppl.posterior(functools.partial(model, masked=True), data)


def test_a_single_sequence_without_its_axis_is_told_how_to_be_one() -> None:
    told = r"got \(9,\); one sequence is x.unsqueeze\(0\); in a YAML, .*`data: \{sequence: COLUMN, time: COLUMN\}`"
    with pytest.raises(ModelError, match=told):
        lvmppl.posterior(functools.partial(hidden_markov, num_states=2), {"x": torch.zeros(9).long()})
