"""Rows are handed in: minibatch ELBOs, per-datum tables, modules, and nothing global left behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms.problem import Problem, build_problem
from lvmppl.algorithms.stepper import batch_elbo
from lvmppl.density import Program, discover, isolated
from lvmppl.errors import InputError, ModelError
from lvmppl.guides.categorical import categorical, categorical_encoder

N, D, K = 12, 2, 3


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, D, generator=generator, dtype=torch.float64)


def mixture(x: Tensor) -> None:
    weights = pyro.param("weights", torch.tensor([0.5, 0.3, 0.2]), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.arange(K * D).reshape(K, D).to(x) / 3)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[z], 1.0).to_event(1), obs=x)


def continuous(x: Tensor) -> None:
    centre = pyro.sample("centre", dist.Normal(0.0, 2.0).expand([D]).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(centre + z, 0.5).to_event(1), obs=x)


def table_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        start = torch.linspace(0.1, 1.0, len(x) * K).reshape(len(x), K)
        probs = pyro.param(
            "q", start / start.sum(-1, keepdim=True), constraint=constraints.simplex, event_dim=1
        )
        pyro.sample("z", dist.Categorical(probs))


def build(model: Callable[..., Any], x: Tensor, guide: Callable[..., Any], takes_model: bool) -> Problem:
    return build_problem("test", model, {"x": x}, guide=guide, guide_takes_model=takes_model)


CASES = [
    pytest.param(mixture, table_guide, False, id="hand-written table"),
    pytest.param(mixture, categorical, True, id="categorical table"),
    pytest.param(mixture, categorical_encoder, True, id="encoder"),
    pytest.param(continuous, AutoNormal, True, id="autoguide"),
]


@pytest.mark.parametrize(("model", "guide", "takes_model"), CASES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_minibatch_elbo_mean_equals_full_elbo(
    x: Tensor,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    takes_model: bool,
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with isolated(0, torch.float64):
        problem = build(model, x, guide, takes_model)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
        noise = _FixedNoise(N)
        noise.use(monkeypatch, None)
        full = float(batch_elbo(problem, problem.guided, problem.initial, None))
        parts = []
        for indices in order.split(batch_size):
            noise.use(monkeypatch, indices)
            parts.append(float(batch_elbo(problem, problem.guided, problem.initial, indices)))
    assert sum(parts) / len(parts) == pytest.approx(full, rel=1e-10)
    assert max(parts) - min(parts) > 0.1


class _FixedNoise:
    """Common random numbers: each datum draws the same standard normals whichever batch it is in."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(9)
        self.local = torch.randn(size, D, generator=generator, dtype=torch.float64)
        self.shared = torch.randn(D, generator=generator, dtype=torch.float64)

    def use(self, patch: pytest.MonkeyPatch, indices: Tensor | None) -> None:
        local = self.local if indices is None else self.local[indices]

        def rsample(fn: dist.Normal, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
            shape = fn._extended_shape(sample_shape)
            noise = local if len(shape) == 2 else self.shared
            return fn.loc + fn.scale * noise.expand(shape)

        patch.setattr(torch.distributions.Normal, "rsample", rsample)


def test_scale_of_a_batch_is_n_over_b(x: Tensor) -> None:
    with isolated(0, torch.float64):
        problem = build(mixture, x, table_guide, False)
        assert problem.guided is not None
        data, rows = problem.rows(torch.tensor([3, 7, 1]))
        evaluation = problem.guided.evaluate(data, problem.initial, rows)
    assert {f.scale for f in (*evaluation.factors, *evaluation.guide_factors)} == {N / 3}


def test_table_rows_follow_the_batch(x: Tensor) -> None:
    with isolated(0, torch.float64):
        problem = build(mixture, x, table_guide, False)
        assert problem.guided is not None
        assert problem.guided.specs["q"].row_axis == -2
        indices = torch.tensor([10, 2, 5])
        data, rows = problem.rows(indices)
        (factor,) = problem.guided.evaluate(data, problem.initial, rows).guide_factors
    expected = problem.initial["q"][indices].log().T
    torch.testing.assert_close(factor.log_prob, expected, rtol=1e-12, atol=0)
    assert factor.dims == ("z", "data")


def test_parameter_in_the_data_plate_needs_event_dim(x: Tensor) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = pyro.param("loc", torch.zeros(D))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    with pytest.raises(ModelError, match=r"pyro.param\('loc'\) inside plate 'data': expected event_dim"):
        lvmppl.posterior(model, {"x": x})


def test_data_plate_is_the_only_outermost_plate_of_size_n(x: Tensor) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("features", D, dim=-1), pyro.plate("people", len(x), dim=-2):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def nested(x: Tensor) -> None:
        with pyro.plate("people", len(x), dim=-2), pyro.plate("features", D, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with isolated(0, torch.float64):
        assert discover(Program(nested, "model"), {"x": x})[0].data_plate == "people"
        assert (
            discover(Program(model, "model"), {"x": x})[0].data_plate is None
        )  # there it is not the outermost


def test_ambiguous_data_plate_is_refused_and_can_be_named() -> None:
    square = torch.zeros(3, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 3, dim=-2):
            pyro.sample("a", dist.Normal(0.0, 1.0), obs=x[:, :1])
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("b", dist.Normal(0.0, 1.0), obs=x[0])

    with pytest.raises(ModelError, match="data_plate: NAME"):
        lvmppl.posterior(model, {"x": square})
    assert lvmppl.posterior(model, {"x": square}, data_plate="rows").data_plate == "rows"


def test_module_model_keeps_its_weights_and_names_them_by_dotted_name(x: Tensor) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(K, D, dtype=torch.float64)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.OneHotCategorical(torch.ones(K)), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

    model = Model()
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    fit = lvmppl.fit(model, {"x": x}, algorithm="enumeration", max_steps=20)
    assert set(fit.parameters) == {"model.net.weight", "model.net.bias"}
    assert fit.history["objective"].iloc[-1] > fit.history["objective"].iloc[0] + 0.1
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), before[name], rtol=0, atol=0)
    scored = lvmppl.posterior(model, {"x": x}, parameters=fit.parameters)
    assert scored.log_evidence == pytest.approx(fit.log_evidence, rel=1e-12)


def test_module_registered_by_pyro_module_is_trained_and_given_back(x: Tensor) -> None:
    net = nn.Linear(1, D, dtype=torch.float64)
    before = net.weight.detach().clone()

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(net(z.unsqueeze(-1)), 1.0).to_event(1), obs=x)

    fit = lvmppl.fit(model, {"x": x}, algorithm="enumeration", max_steps=20)
    assert set(fit.parameters) == {"net$$$weight", "net$$$bias"}
    assert fit.history["objective"].iloc[-1] > fit.history["objective"].iloc[0] + 0.1
    torch.testing.assert_close(net.weight.detach(), before, rtol=0, atol=0)


def test_nothing_global_survives_a_call(x: Tensor) -> None:
    pyro.get_param_store().clear()
    pyro.param("mine", torch.tensor(2.5))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    dtype = torch.get_default_dtype()
    lvmppl.fit(mixture, {"x": x}, algorithm="svi", guide=categorical_encoder, max_steps=3, batch_size=5)
    assert dict(pyro.get_param_store().items()).keys() == {"mine"}
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert pyro.settings.get("module_local_params") is False
    pyro.get_param_store().clear()


def test_two_fits_of_different_models_do_not_influence_each_other(x: Tensor) -> None:
    def other(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([5.0, -5.0]).to(x))  # the same name, another shape
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample(
                "x", dist.Normal(loc[z.long()].unsqueeze(-1), 1.0).expand_by([1]).to_event(1), obs=x[:, :1]
            )

    def simple(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(D).to(x))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    options: dict[str, Any] = {
        "algorithm": "svi",
        "guide": categorical,
        "max_steps": 5,
        "batch_size": 4,
        "seed": 3,
    }
    alone = lvmppl.fit(mixture, {"x": x}, **options)
    lvmppl.fit(simple, {"x": x}, algorithm="enumeration", max_steps=3)
    again = lvmppl.fit(mixture, {"x": x}, **options)
    for name, value in alone.parameters.items():
        torch.testing.assert_close(again.parameters[name], value, rtol=0, atol=0)
    assert alone.history["objective"].tolist() == again.history["objective"].tolist()


def test_autoguide_over_enumerated_model_is_blind_to_enumerated_sites(x: Tensor) -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(K), 3.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(K)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[..., z] if loc.dim() == 1 else loc[z], 1.0), obs=x[:, 0])

    fit = lvmppl.fit(model, {"x": x}, algorithm="svi", guide=AutoDiagonalNormal, max_steps=30)
    assert fit.status == "max_steps"
    assert torch.isfinite(torch.tensor(fit.elbo))
    assert set(fit.moments) == {"loc"}


BAD_GUIDES: list[Any] = []


def bad_guide(function: Callable[..., Any]) -> Callable[..., Any]:
    BAD_GUIDES.append(function)
    return function


@bad_guide
def lacks_a_site(x: Tensor) -> str:
    """model site 'centre': expected a site of the same name in the guide"""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    return ""


@bad_guide
def has_a_site_too_many(x: Tensor) -> str:
    """guide site 'extra': expected a latent site of the model"""
    pyro.sample("centre", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    pyro.sample("extra", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    return ""


@bad_guide
def samples_the_data(x: Tensor) -> str:
    """guide site 'x': expected a latent site of the model"""
    pyro.sample("x", dist.Normal(0.0, 1.0))
    return ""


@bad_guide
def forgets_the_plate(x: Tensor) -> str:
    """guide site 'z': expected the plates it has in the model"""
    pyro.sample("centre", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 1.0).to_event(2))
    return ""


@bad_guide
def raises(x: Tensor) -> str:
    """guide 'raises' at .*test_density.py:\\d+: expected a guide that runs on these data, got RuntimeError: no way"""
    raise RuntimeError("no way")


@pytest.mark.parametrize("guide", BAD_GUIDES, ids=lambda g: g.__name__)
def test_guide_that_does_not_match_is_refused_with_the_site(x: Tensor, guide: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=guide.__doc__):
        lvmppl.fit(continuous, {"x": x}, algorithm="svi", guide=guide, max_steps=2)


class _Emission(PyroModule):  # type: ignore[misc]
    """A mixture whose weights are a PyroParam, read inside the plate, and whose means come from a network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 1).double()
        self.weights = PyroParam(
            torch.tensor([0.3, 0.7], dtype=torch.float64), constraint=constraints.simplex
        )

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
            loc = self.net(torch.nn.functional.one_hot(z, 2).double()).squeeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def test_pyro_module_built_outside_gives_its_posterior_and_keeps_its_tensors(x: Tensor) -> None:
    module, rows = _Emission(), x[:, 0]
    before = {name: value.clone() for name, value in module.named_parameters()}
    found = lvmppl.posterior(module, {"x": rows})
    with torch.no_grad():
        loc = module.net(torch.eye(2, dtype=torch.float64)).squeeze(-1)
        joint = (
            dist.Normal(loc, 1.0).log_prob(rows[:, None])
            + torch.tensor([0.3, 0.7], dtype=torch.float64).log()
        )
    assert found.log_evidence == pytest.approx(float(joint.logsumexp(-1).sum()), rel=1e-10)
    torch.testing.assert_close(found.marginal("z").probs, joint.softmax(-1), rtol=1e-10, atol=1e-12)
    fit = lvmppl.fit(module, {"x": rows}, algorithm="em", max_steps=5)
    assert fit.log_evidence > found.log_evidence
    assert {"weights", "model.net.weight", "model.net.bias"} == set(fit.parameters)
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())
    assert not dict(pyro.get_param_store())


def _known_location(x: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(2.0, dtype=torch.float64), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_autoguide_serves_a_model_with_parameters(x: Tensor, guide: Callable[..., Any]) -> None:
    fit = lvmppl.fit(_known_location, {"x": x[:, 0]}, "svi", guide=guide, max_steps=3, learning_rate=0.1)
    assert float(fit.parameters["scale"]) != 2.0
    assert math.isfinite(fit.elbo)


@pytest.mark.parametrize("columns", [None, 2])
def test_value_outside_the_support_is_named_and_no_plate_is_blamed(columns: int | None) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            rate = 1.0 + z if columns is None else (1.0 + z).unsqueeze(-1).expand(*z.shape, columns)
            pyro.sample("x", dist.Poisson(rate).to_event(0 if columns is None else 1), obs=x)

    x = torch.arange(5.0) if columns is None else torch.arange(5.0).unsqueeze(-1).repeat(1, columns)
    x.view(5, -1)[3, -1] = 2.5
    with pytest.raises(ModelError) as caught:
        lvmppl.posterior(model, {"x": x})
    where = "in row 3" if columns is None else "in row 3, entry 1"
    assert str(caught.value) == (
        "site 'x' in plate data: expected values in the support of Poisson, IntegerGreaterThan(lower_bound=0), got numbers "
        f"such as 2.5 {where}; change the data (their columns, their scale) or the distribution"
    )
