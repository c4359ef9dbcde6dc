"""Any head with any source: exact where the family holds the posterior, minibatches unbiased, new rows served."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from allocations import Allocations
from torch import Tensor

import lvmppl
from lvmppl.algorithms.heldout import score_rows
from lvmppl.algorithms.problem import Problem, build_problem
from lvmppl.algorithms.stepper import Stepper, batch_elbo
from lvmppl.density import isolated
from lvmppl.elbo import elbo
from lvmppl.errors import InputError
from lvmppl.guides.categorical import categorical_encoder
from lvmppl.guides.variational import amortized, point, semi_amortized, variational
from lvmppl.heads import DEFAULT_HEADS, HEADS
from lvmppl.models.hmm import hidden_markov
from lvmppl.sources import GRU, MLP, BagOfWords, SourceSettings

F64 = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def local(prior: Callable[[], Any], likelihood: Callable[[Tensor], Any]) -> Callable[..., None]:
    """One latent z and one observation x a datum."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample(
                "z", prior(), infer={"enumerate": "parallel"} if prior().support.is_discrete else {}
            )
            pyro.sample("x", likelihood(z), obs=x)

    return model


MODELS: dict[str, Callable[..., None]] = {
    "binary": local(lambda: dist.Bernoulli(tensor(0.3)[0]), lambda z: dist.Normal(z, 1.0)),
    "finite": local(
        lambda: dist.Categorical(tensor(0.3, 0.2, 0.5)), lambda z: dist.Normal(tensor(0, 1, 2)[z], 1.0)
    ),
    "one_hot": local(
        lambda: dist.OneHotCategorical(tensor(0.3, 0.2, 0.5)), lambda z: dist.Normal(z @ tensor(0, 1, 2), 1.0)
    ),
    "real": local(lambda: dist.Normal(tensor(0, 1), 1.0).to_event(1), lambda z: dist.Normal(z.sum(-1), 1.0)),
    "positive": local(lambda: dist.Gamma(2.0, 2.0), lambda z: dist.Normal(z, 1.0)),
    "unit_interval": local(lambda: dist.Beta(2.0, 3.0), lambda z: dist.Normal(z, 1.0)),
    "simplex": local(
        lambda: dist.Dirichlet(tensor(2, 1, 1)), lambda z: dist.Normal(z @ tensor(0, 1, 2), 1.0)
    ),
    "other": local(lambda: dist.Uniform(tensor(1), tensor(4)), lambda z: dist.Normal(z, 1.0)),
}


def guided(model: Callable[..., None], data: Mapping[str, Tensor], **args: Any) -> Problem:
    """A problem whose guide is `variational` with these arguments."""
    return build_problem("fit", model, data, guide=variational, guide_takes_model=True, guide_args=args)


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [k for k in DEFAULT_HEADS if k != "chain"])
def test_default_head_of_a_support_is_one_that_serves_it(kind: str) -> None:
    with isolated(0, F64):
        problem = guided(MODELS[kind], {"x": rows(1, 5)})
    assert kind in HEADS[DEFAULT_HEADS[kind]].supports
    assert problem.guided is not None and problem.guided.guide_structure is not None
    assert list(problem.guided.guide_structure.sites) == ["z"]
    assert all(problem.guided.specs[n].is_table for n in problem.lambda_)


@pytest.mark.parametrize("kind", ["finite", "binary"])
@pytest.mark.parametrize("source", ["table", "mlp"])
def test_mean_of_minibatch_elbos_equals_full_elbo(kind: str, source: str) -> None:
    """Over all batches of a partition into equal parts; the λ of rows is the same in every batch."""
    with isolated(0, F64):
        problem = guided(MODELS[kind], {"x": rows(1, 6)}, source=source, hidden=[4])
        assert problem.guided is not None
        values = {
            n: torch.softmax(rows(3, *v.shape), -1) if source == "table" else v
            for n, v in problem.initial.items()
        }
        full = batch_elbo(problem, problem.guided, values, None)
        parts = [
            batch_elbo(problem, problem.guided, values, torch.tensor(i)) for i in ([4, 1], [0, 5], [3, 2])
        ]
    torch.testing.assert_close(torch.stack(parts).mean(), full, rtol=1e-12, atol=0)


def test_elbo_of_normal_head_equals_closed_form_on_average() -> None:
    """E_q log p(x, z) − E_q log q of z ~ N(0, 1), x ~ N(z, 1) at m, s, by hand, against the mean of 4000 draws."""
    x, m, s = rows(1, 3), tensor(0.3, -0.2, 1.0), tensor(0.7, 0.5, 1.3)
    with isolated(0, F64):
        model = local(lambda: dist.Normal(tensor(0)[0], 1.0), lambda z: dist.Normal(z, 1.0))
        problem = guided(model, {"x": x})
        assert problem.guided is not None
        values = {"z_loc": m, "z_scale": s}
        drawn = [elbo(problem.guided.evaluate({"x": x}, values), "data").total for _ in range(2000)]
    log_2pi = torch.log(torch.tensor(2 * torch.pi, dtype=F64))
    prior = -0.5 * (log_2pi + m**2 + s**2)
    likelihood = -0.5 * (log_2pi + (x - m) ** 2 + s**2)
    expected = (prior + likelihood + 0.5 * (log_2pi + 1) + s.log()).sum()
    spread = torch.stack(drawn).std() / 2000**0.5
    assert abs(torch.stack(drawn).mean() - expected) < 4 * spread


def test_point_head_finds_the_mode_in_closed_form() -> None:
    x = rows(1, 4)
    model = local(lambda: dist.Normal(tensor(1)[0], 2.0), lambda z: dist.Normal(z, 0.5))
    fit = lvmppl.fit(model, {"x": x}, algorithm="svi", guide=point, max_steps=800, learning_rate=0.1)
    mode = (1 / 4 + x / 0.25) / (1 / 4 + 1 / 0.25)
    torch.testing.assert_close(fit.guide_parameters["z_point"], mode, rtol=0, atol=1e-3)


def test_encoder_serves_rows_it_has_not_seen() -> None:
    """The score of rows under an encoder is their own ELBO at its λ, computed by hand; nothing is optimised."""
    with isolated(0, F64):
        problem = guided(MODELS["finite"], {"x": rows(1, 6)}, source="mlp", hidden=[4])
    fit = lvmppl.fit(
        MODELS["finite"],
        {"x": rows(1, 6)},
        algorithm="svi",
        guide=lambda model: variational(model, source="mlp", hidden=[4]),
        max_steps=3,
    )
    new = rows(2, 5)
    with isolated(0, F64):
        evidence, bound = score_rows(problem, fit, MODELS["finite"], {"x": new})
        weights = {n: v for n, v in fit.guide_parameters.items()}
        seen = rows(1, 6)
        hidden = torch.tanh(
            ((new - seen.mean()) / seen.std(unbiased=False)).unsqueeze(-1)
            @ weights["guide.encoder.trunk.layers.0.weight"].T
            + weights["guide.encoder.trunk.layers.0.bias"]
        )
        logits = (
            hidden @ weights["guide.encoder.readouts.z_probs.weight"].T
            + weights["guide.encoder.readouts.z_probs.bias"]
        )
        q = torch.softmax(logits, -1)
    joint = tensor(0.3, 0.2, 0.5).log() + dist.Normal(tensor(0, 1, 2), 1.0).log_prob(new.unsqueeze(-1))
    assert bound == pytest.approx(float((q * (joint - q.log())).sum()), rel=1e-10)
    assert evidence == pytest.approx(float(torch.logsumexp(joint, -1).sum()), rel=1e-10)


def test_table_is_optimised_for_new_rows_with_theta_held() -> None:
    """A table over the states holds the posterior: the score of new rows reaches their log evidence."""
    with isolated(0, F64):
        problem = guided(MODELS["finite"], {"x": rows(1, 6)})
    fit = lvmppl.fit(MODELS["finite"], {"x": rows(1, 6)}, algorithm="svi", guide=variational, max_steps=3)
    with isolated(0, F64):
        evidence, bound = score_rows(problem, fit, MODELS["finite"], {"x": rows(2, 5)})
    assert bound == pytest.approx(evidence, abs=1e-4)


def test_chain_head_reaches_the_evidence_and_independent_steps_do_not() -> None:
    """A hidden Markov model with θ held and ragged sequences: the posterior is a chain, and its steps are dependent."""
    x, lengths = torch.tensor([[0, 1, 1, 0, 2], [2, 2, 0, 1, 0], [1, 0, 0, 0, 0]]), torch.tensor([5, 4, 1])
    model = functools.partial(hidden_markov, num_states=2)
    fits = {
        head: lvmppl.fit(
            model,
            {"x": x, "lengths": lengths},
            algorithm="svi",
            guide=functools.partial(_with_head, head=head),
            freeze=["initial", "transition", "emission"],
            learning_rate=0.2,
            max_steps=300,
        )
        for head in ("chain", "independent_categoricals")
    }
    evidence = fits["chain"].log_evidence
    assert fits["chain"].log_evidence_kind == "exact"
    assert fits["chain"].elbo == pytest.approx(evidence, abs=1e-4)
    assert fits["independent_categoricals"].elbo < evidence - 0.05


def _with_head(model: Any, head: str) -> Any:
    return variational(model, head)


def refined(through: bool, steps: int, x: Tensor) -> tuple[Problem, dict[str, Tensor], Tensor]:
    """A semi-amortized problem with a linear encoder on x, its leaves and its λ_0."""
    args = {"source": "mlp", "hidden": [], "steps": steps, "rate": 0.3, "through": through}
    problem = build_problem(
        "fit", MODELS["finite"], {"x": x}, guide=semi_amortized, guide_takes_model=True, guide_args=args
    )
    values = {n: v.clone().requires_grad_() for n, v in problem.initial.items()}
    inputs = ((x - x.mean()) / x.std(unbiased=False)).unsqueeze(-1)
    weight, bias = (values[f"guide.encoder.readouts.z_probs.{n}"] for n in ("weight", "bias"))
    return problem, values, inputs @ weight.T + bias


@pytest.mark.parametrize("through", [False, True])
def test_semi_amortized_gradient_equals_steps_by_hand(through: bool) -> None:
    """Two steps on each datum's ELBO Σ_k q_k (log p(x, k) − log q_k), written out, in a batch of half the rows."""
    x = rows(1, 6)
    with isolated(0, F64):
        problem, values, start = refined(through, 2, x)
        assert problem.guided is not None
        batch = torch.tensor([4, 0, 3])
        value = batch_elbo(problem, problem.guided, values, batch)
        weights = [v for n, v in values.items() if n.endswith("weight")]
        gradient = torch.autograd.grad(value, weights, retain_graph=True)[0]
        joint = tensor(0.3, 0.2, 0.5).log() + dist.Normal(tensor(0, 1, 2), 1.0).log_prob(x.unsqueeze(-1))

        def bound(logits: Tensor) -> Tensor:
            q = torch.softmax(logits, -1)
            return (q * (joint - q.log())).sum(-1)

        logits = start
        for _ in range(2):
            at = logits if through else logits.detach().requires_grad_()
            (move,) = torch.autograd.grad(bound(at).sum(), at, create_graph=through)
            logits = logits + 0.3 * move
        expected = 2 * bound(logits)[batch].sum()
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, weights)[0], rtol=1e-8, atol=1e-12)


def test_semi_amortized_steps_raise_the_elbo_of_new_rows() -> None:
    x, new = rows(1, 6), rows(2, 5)
    bounds = []
    for steps in (0, 3):
        guide = functools.partial(_semi, steps=steps)
        fit = lvmppl.fit(MODELS["finite"], {"x": x}, algorithm="svi", guide=guide, max_steps=1)
        with isolated(0, F64):
            problem, _, _ = refined(False, steps, x)
            evidence, bound = score_rows(problem, fit, MODELS["finite"], {"x": new})
        bounds.append(bound)
    assert bounds[0] + 1e-3 < bounds[1] < evidence


def _semi(model: Any, steps: int) -> Any:
    return semi_amortized(model, hidden=[], steps=steps, rate=0.3, through=False)


def test_step_on_a_table_of_a_million_rows_makes_no_tensor_of_that_size() -> None:
    size, batch = 1_000_000, torch.tensor([5, 999_999, 17])
    model = local(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
    x = torch.zeros(size, dtype=torch.float32)
    with isolated(0, torch.float32):
        problem = guided(model, {"x": x})
        assert problem.guided is not None
        stepper = Stepper(problem, problem.initial, problem.free_lambda, "adam", 0.1, None, True)
        before = stepper.leaves["z_scale"].clone()
        with Allocations() as seen:
            values, own = stepper.values(batch)
            stepper.update(batch_elbo(problem, problem.guided, values, batch), own, batch, 1.0)
    assert 0 < seen.largest <= 100 * x.element_size()
    moved = (stepper.leaves["z_scale"] != before).nonzero().flatten()
    assert moved.tolist() == sorted(batch.tolist())


def test_round_on_a_table_is_undone_at_the_cost_of_the_rows_it_touched() -> None:
    """Batches of one round overlap: each row goes back to where it stood before the first."""
    size, batches = 1_000_000, [torch.tensor([5, 999_999]), torch.tensor([17, 5]), torch.tensor([5, 8])]
    x = torch.zeros(size, dtype=torch.float32)
    with isolated(0, torch.float32):
        problem = guided(local(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0)), {"x": x})
        assert problem.guided is not None
        stepper = Stepper(problem, problem.initial, problem.free_lambda, "adam", 0.1, None, True)
        tables = {(n, k): t for n, s in stepper.sparse.items() for k, t in {"": s.table, **s.state}.items()}
        before = {key: t.clone() for key, t in tables.items()}
        with Allocations() as seen:
            stepper.save()
            for batch in batches:
                values, own = stepper.values(batch)
                stepper.update(batch_elbo(problem, problem.guided, values, batch), own, batch, 1.0)
        moved = {key: int((t != before[key]).sum()) for key, t in tables.items()}
        stepper.restore()
    assert 0 < seen.largest <= 100 * x.element_size()
    assert set(moved.values()) == {4}
    for key, table in tables.items():
        torch.testing.assert_close(table, before[key], rtol=0, atol=0)


def test_bag_of_words_counts_tokens_within_the_lengths() -> None:
    tokens, lengths = torch.tensor([[0, 2, 2, 1], [3, 3, 0, 0]]), torch.tensor([3, 1])
    data = {"x": tokens, "lengths": lengths}
    with isolated(0, F64):
        trunk = BagOfWords(data, SourceSettings(hidden=()))
        counts = trunk(data).rows.expm1()
    torch.testing.assert_close(counts, torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 1]], dtype=F64))


def test_gru_reads_each_sequence_as_if_it_were_alone() -> None:
    """Against torch's own nn.GRU on the sequence cut to its length; what stands beyond is not read."""
    x, lengths = rows(1, 3, 5, 2), torch.tensor([4, 5, 2])
    with isolated(0, F64):
        trunk = GRU({"x": x, "lengths": lengths}, SourceSettings(hidden=(4,)))
        features = trunk({"x": x, "lengths": lengths})
        for n, length in enumerate(lengths.tolist()):
            own = (x[n : n + 1, :length] - trunk.get_buffer("centre")) / trunk.get_buffer("spread")
            steps, last = trunk.cell(own)
            torch.testing.assert_close(features.steps[n, :length], steps[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(features.rows[n], last[:, 0].reshape(-1), rtol=1e-12, atol=1e-12)


def test_gradient_reaches_every_weight_of_a_gru_encoder() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(tensor(0.4, 0.6)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(rows(2, 2, 3)[z], 1.0).to_event(1), obs=x)

    with isolated(0, F64):
        problem = guided(model, {"x": rows(1, 4, 3)}, source="gru", hidden=[3])
        assert problem.guided is not None
        values = {n: v.clone().requires_grad_() for n, v in problem.initial.items()}
        batch_elbo(problem, problem.guided, values, None).backward()
    assert len(values) == 10 and all(v.grad is not None and bool(v.grad.any()) for v in values.values())


def test_mlp_standardises_with_the_first_rows() -> None:
    with isolated(0, F64):
        trunk = MLP({"x": tensor(1, 3)}, SourceSettings(hidden=()))
        torch.testing.assert_close(trunk({"x": tensor(5)}).rows, tensor(3).reshape(1, 1))


COUNTS = torch.tensor([[0, 7], [3, 1], [9, 4], [2, 2], [5, 0]])


@pytest.mark.parametrize("guide", [categorical_encoder, amortized, semi_amortized])
def test_encoder_of_counts_equals_encoder_of_the_same_numbers(guide: Callable[..., Any]) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(tensor(0.4, 0.6)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Poisson(rows(2, 2, 2).exp()[z]).to_event(1), obs=x)

    with isolated(0, F64):  # counts alone have torch's default dtype
        weights = [
            lvmppl.fit(model, {"x": x}, algorithm="svi", guide=guide, max_steps=4).guide_parameters
            for x in (COUNTS, COUNTS.double())
        ]
    assert len(weights[0]) == 4
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("guide", [categorical_encoder, amortized, semi_amortized])
def test_encoder_reads_floating_tensors_or_those_named(guide: Callable[..., Any]) -> None:
    """The width of its first layer is that of what it reads: x has two columns, y three."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(tensor(0.4, 0.6)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Poisson(z + 1.0), obs=x.sum(-1))
            pyro.sample("y", dist.Normal(tensor(0, 1, 2), 1.0).to_event(1), obs=y)

    for inputs, width in (((), 3), (("x",), 2), (("x", "y"), 5)):
        built = functools.partial(guide, inputs=inputs)
        with isolated(0, F64):
            data = {"x": COUNTS, "y": rows(1, 5, 3)}
            problem = build_problem("fit", model, data, guide=built, guide_takes_model=True)
        assert problem.initial["guide.encoder.trunk.layers.0.weight"].shape[1] == width


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "continuous head on states": (
        "finite",
        {"head": "normal"},
        "normal, which is for real numbers.*use categ",
    ),
    "discrete head on numbers": ("real", {"head": "categorical"}, "for real numbers.*use normal, low_rank"),
    "head that does not exist": ("real", {"head": "gausian"}, "one of categorical, .*'gausian'"),
    "beta on real": ("real", {"head": {"z": "beta"}}, "beta, which is for numbers between 0 and 1"),
    "head of a stranger": ("real", {"head": {"w": "normal"}}, r"latent sites of the model \(z\), got w"),
    "unknown setting": ("real", {"head": {"use": "full", "rank": 2}}, "full: expected no settings, got rank"),
    "unknown source": ("real", {"source": "cnn"}, "one of table, mlp, gru, bag_of_words, got 'cnn'"),
    "bag of numbers": ("real", {"source": "bag_of_words"}, "integer tokens.*inputs:"),
    "no such input": ("real", {"source": "mlp", "inputs": ["y"]}, "no y in x"),
    "width": ("real", {"source": "mlp", "hidden": [0]}, "positive layer widths"),
}


@pytest.mark.parametrize("case", WRONG)
def test_pair_that_does_not_fit_says_why(case: str) -> None:
    kind, args, message = WRONG[case]
    with isolated(0, F64), pytest.raises(InputError, match=message):
        guided(MODELS[kind], {"x": rows(1, 5)}, **args)


def test_table_is_not_refined() -> None:
    with pytest.raises(InputError, match="an encoder whose λ is refined, got source table"):
        semi_amortized(MODELS["real"], source="table")


def test_encoder_without_a_site_in_the_data_plate_is_refused() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with isolated(0, F64), pytest.raises(InputError, match=r"only global sites \(z\); use source: table"):
        guided(model, {"x": rows(1, 5)}, source="mlp")
