"""Guides that draw a site below an enumerated one: which sites they list, in which order, and what is reported of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor

import lvmppl
from lvmppl.algorithms import evidence, reported
from lvmppl.algorithms.problem import build_problem
from lvmppl.density import Evaluation, isolated
from lvmppl.distributions import MarkovChain
from lvmppl.elbo import elbo
from lvmppl.errors import ModelError
from lvmppl.guides.variational import point, variational

F64 = torch.float64
X = torch.tensor([-1.5, 0.2, 2.4, 1.1, -0.3], dtype=F64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
LOC = torch.tensor([-2.0, 0.5, 2.0], dtype=F64)


def normal(value: Tensor, loc: Any, scale: float) -> Tensor:
    return torch.distributions.Normal(torch.as_tensor(loc, dtype=F64), scale).log_prob(value)


def chosen_mean(x: Tensor) -> None:
    """a chooses the mean of y, which is seen through noise."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        y = pyro.sample("y", dist.Normal(LOC[a], 1.0))
        pyro.sample("x", dist.Normal(y, 0.5), obs=x)


def drawn_only(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(0.8 * x, 0.4))


def drawn_first(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(0.8 * x, 0.4))
        pyro.sample("a", dist.Categorical(torch.tensor([0.1, 0.3, 0.6])))


def evaluated(
    model: Callable[..., Any], guide: Callable[..., Any], data: dict[str, Tensor], **args: Any
) -> tuple[Evaluation, Tensor]:
    """One evaluation of model and guide at their start, and its ELBO a datum."""
    with isolated(3, F64):
        built = guide is AutoNormal or guide is variational
        problem = build_problem("fit", model, data, guide=guide, guide_takes_model=built, guide_args=args)
        assert problem.guided is not None
        evaluation = problem.guided.evaluate(data, problem.initial)
        per_datum = elbo(evaluation, problem.data_plate).per_datum
    assert per_datum is not None
    return evaluation, per_datum


@pytest.mark.parametrize("guide", [drawn_only, AutoNormal, variational])
def test_elbo_without_an_enumerated_site_above_a_drawn_one_equals_its_sum_at_the_draw(guide: Any) -> None:
    """log Σ_a p(a) p(y | a) + log p(x | y) − log q(y) at the drawn y."""
    args: dict[str, Any] = {"head": {"a": "summed"}} if guide is variational else {}
    evaluation, found = evaluated(chosen_mean, guide, {"x": X}, **args)
    y = evaluation.samples["y"]
    parts = [
        f.log_prob.expand(5) for f in evaluation.guide_factors
    ]  # of an autoguide: the draw and its value
    log_q = torch.stack(parts).sum(0)
    if guide is drawn_only:
        torch.testing.assert_close(log_q, normal(y, 0.8 * X, 0.4), rtol=1e-12, atol=1e-12)
    prior = torch.logsumexp(WEIGHTS.log() + normal(y[:, None], LOC, 1.0), -1)
    torch.testing.assert_close(found, prior + normal(X, y, 0.5) - log_q, rtol=1e-10, atol=1e-12)


def test_elbo_with_an_enumerated_site_listed_after_the_drawn_one_equals_its_sum_at_the_draw() -> None:
    """Σ_a q(a) [log p(a) + log p(y | a) − log q(a)] + log p(x | y) − log q(y) at the drawn y."""
    evaluation, found = evaluated(chosen_mean, drawn_first, {"x": X})
    y, q = evaluation.samples["y"], torch.tensor([0.1, 0.3, 0.6], dtype=F64)
    inner = (q * (WEIGHTS.log() + normal(y[:, None], LOC, 1.0) - q.log())).sum(-1)
    expected = inner + normal(X, y, 0.5) - normal(y, 0.8 * X, 0.4)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


MOVES = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.25, 0.25, 0.5]], dtype=F64)


def switching(x: Tensor) -> None:
    """A regime z_t in a `pyro.markov` loop chooses the mean of y_t, which is seen through noise."""
    with pyro.plate("data", len(x)):
        z: Any = None
        for t in pyro.markov(range(x.shape[1])):
            row = WEIGHTS if z is None else MOVES[z]
            z = pyro.sample(f"z{t}", dist.Categorical(row), infer={"enumerate": "parallel"})
            y = pyro.sample(f"y{t}", dist.Normal(LOC[z], 1.0))
            pyro.sample(f"x{t}", dist.Normal(y, 0.5), obs=x[:, t])


def test_elbo_with_drawn_sites_in_a_markov_loop_equals_brute_force_at_the_draw() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                pyro.sample(f"y{t}", dist.Normal(0.8 * x[:, t], 0.4))

    x = torch.stack([X, X.flip(0), 0.5 - X, X + 1.0], -1)  # [5, 4]
    evaluation, found = evaluated(switching, guide, {"x": x})
    y = torch.stack([evaluation.samples[f"y{t}"] for t in range(4)], -1)
    paths = []
    for path in itertools.product(range(3), repeat=4):
        prior = WEIGHTS[path[0]].log() + sum(MOVES[a, b].log() for a, b in itertools.pairwise(path))
        paths.append(prior + normal(y, LOC[list(path)], 1.0).sum(-1))
    rest = (normal(x, y, 0.5) - normal(y, 0.8 * x, 0.4)).sum(-1)
    torch.testing.assert_close(found, torch.logsumexp(torch.stack(paths), 0) + rest, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------- what is reported of them


def structured(x: Tensor) -> None:
    """q(a) q(y | a) with a mean and a scale of y for every state, different in each row."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(logits=torch.stack([x, 0 * x, -x], -1)))
        pyro.sample("y", dist.Normal(x + LOC[a], 0.2 + 0.1 * a))


def test_moments_below_an_enumerated_site_equal_those_of_the_mixture() -> None:
    """E y = Σ_a q(a) m_a and E y² = Σ_a q(a) (m_a² + s_a²), within 4 standard errors of 200 draws of y given each a."""
    fit = lvmppl.fit(chosen_mean, {"x": X}, algorithm="svi", guide=structured, max_steps=1)
    q = torch.stack([X, 0 * X, -X], -1).softmax(-1)
    mean, scale = X[:, None] + LOC, torch.tensor([0.2, 0.3, 0.4], dtype=F64)
    centre = (q * mean).sum(-1)
    spread = ((q * (mean**2 + scale**2)).sum(-1) - centre**2).sqrt()
    found_mean, found_sd = fit.moments["y"]
    assert found_mean.shape == (5,)
    error = (q**2 * scale**2).sum(-1).sqrt() / 200**0.5
    assert ((found_mean - centre).abs() < 4 * error).all()
    torch.testing.assert_close(found_sd, spread, rtol=0.03, atol=0)


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_reported_piece_by_piece_equals_that_of_all_rows(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q enumerates every site: the ELBO, by datum too, and q itself are exact, lengths of sequences included."""
    x = torch.stack([X, X.flip(0), 0.5 - X, X + 1.0], -1)  # [5, 4]
    lengths = torch.tensor([4, 1, 3, 2, 4])

    def model(x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", len(x)):
            chain = MarkovChain(WEIGHTS, MOVES, x.shape[1], lengths=lengths)
            z = pyro.sample("z", chain, infer={"enumerate": "parallel"})
            steps = torch.arange(x.shape[1]) < lengths[:, None]
            pyro.sample("x", dist.Normal(LOC[z], 0.5).mask(steps).to_event(1), obs=x)

    def report() -> Any:
        return lvmppl.fit(
            model, {"x": x, "lengths": lengths}, algorithm="svi", guide=variational, max_steps=3
        )

    whole = report()
    for module in (evidence, reported):
        monkeypatch.setattr(module, "CHUNK", size)
    pieces = report()
    assert pieces.elbo == pytest.approx(whole.elbo, rel=1e-12) and pieces.elbo_error == 0.0
    torch.testing.assert_close(pieces.elbo_per_datum, whole.elbo_per_datum, rtol=1e-12, atol=1e-12)
    assert pieces.log_evidence == pytest.approx(whole.log_evidence, rel=1e-12)
    for found, expected in ((pieces.variational, whole.variational), (pieces.posterior, whole.posterior)):
        torch.testing.assert_close(found.marginal("z").probs, expected.marginal("z").probs)
        assert found.to_frame().equals(expected.to_frame())


def test_reported_pieces_of_a_model_with_a_global_drawn_site_average_to_the_elbo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """w ~ N(0, 1), z_n ~ N(w, 1), x_n ~ N(z_n, ½) under independent Normals, against the ELBO by hand."""

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.3, 0.6))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.4))

    monkeypatch.setattr(reported, "CHUNK", 2)
    fit = lvmppl.fit(model, {"x": X}, algorithm="svi", guide=guide, max_steps=1)
    log_2pi, m, v = math.log(2 * math.pi), 0.8 * X, 0.4**2
    entropies = 0.5 * (log_2pi + 1) * 6 + math.log(0.6) + 5 * math.log(0.4)
    prior = -0.5 * (log_2pi + 0.3**2 + 0.6**2)
    local = -0.5 * (log_2pi + (m - 0.3) ** 2 + v + 0.6**2)
    seen = -0.5 * (log_2pi + 2 * math.log(0.5) + ((X - m) ** 2 + v) / 0.25)
    expected = float(prior + (local + seen).sum() + entropies)
    assert 0 < fit.elbo_error < 0.2
    assert abs(fit.elbo - expected) < 4 * fit.elbo_error
    assert fit.moments["w"][0].shape == () and fit.moments["z"][0].shape == (5,)
    assert ((fit.moments["z"][0] - m).abs() < 4 * 0.4 / 200**0.5).all()


# -------------------------------------------------------------------------------------------------- what is refused


def one_hot_mixture(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(WEIGHTS), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z @ LOC, 1.0), obs=x)


@pytest.mark.parametrize(
    "family", [dist.RelaxedOneHotCategorical, dist.RelaxedOneHotCategoricalStraightThrough]
)
def test_density_in_the_guide_of_a_probability_in_the_model_is_refused(family: Any) -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", family(torch.tensor(0.5), logits=torch.zeros(len(x), 3)))

    with pytest.raises(ModelError, match=rf"'z'.*discrete family.*OneHotCategorical.*got {family.__name__}"):
        lvmppl.fit(one_hot_mixture, {"x": X}, algorithm="svi", guide=guide, max_steps=1)


def test_table_in_a_subsampled_plate_is_refused_with_the_plate() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2):
            loc = pyro.param("loc", torch.zeros(len(x)), event_dim=0)
            pyro.sample("y", dist.Normal(loc, 1.0))

    with pytest.raises(ModelError, match=r"plate 'data' around pyro.param\('loc'\).*got a subsample of 2"):
        lvmppl.fit(chosen_mean, {"x": X}, algorithm="svi", guide=guide, max_steps=1)


def tight(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.01), obs=x)


def global_scale(x: Tensor) -> None:
    z = pyro.sample("z", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, z), obs=x)


@pytest.mark.parametrize("guide", [point, AutoDelta])
@pytest.mark.parametrize("algorithm", ["svi", "vem"])
def test_point_has_no_elbo_and_its_objective_is_the_log_joint_by_hand(guide: Any, algorithm: str) -> None:
    """At the point the density is far above the evidence: it must not pass for a bound."""
    fit = lvmppl.fit(
        tight,
        {"x": X},
        algorithm=algorithm,
        guide=guide,
        max_steps=60,
        learning_rate=0.2,
        schedule="constant",
    )
    (z,) = fit.guide_parameters.values()
    joint = float((normal(z, 0.0, 1.0) + normal(X, z, 0.01)).sum())
    assert fit.history["objective"].max() == pytest.approx(joint, rel=1e-12)
    assert set(fit.history["objective_kind"]) == {"log_joint"}
    assert math.isnan(fit.elbo) and math.isnan(fit.elbo_error) and fit.elbo_per_datum is None
    assert "no ELBO: q is a point at the site z" in fit.message
    assert fit.moments["z"].shape == (2, 5) and bool((fit.moments["z"][1] == 0).all())


def test_global_point_is_said_to_be_one() -> None:
    fit = lvmppl.fit(global_scale, {"x": X}, algorithm="svi", guide=point, max_steps=2)
    assert math.isnan(fit.elbo) and "q is a point at the global site z" in fit.message


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal, variational])
def test_values_that_follow_a_draw_are_no_points(guide: Any) -> None:
    fit = lvmppl.fit(global_scale, {"x": X}, algorithm="svi", guide=guide, max_steps=2)
    assert math.isfinite(fit.elbo) and fit.message == ""
    assert set(fit.history["objective_kind"]) == {"elbo"}


@pytest.mark.parametrize("algorithm", ["svi", "vem"])
def test_sd_of_a_site_far_from_zero_is_that_of_q_in_single_precision(algorithm: str) -> None:
    x = torch.tensor([5010.0, 4900.0, 5100.0])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(5000.0, 100.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    def guide(x: Tensor) -> None:
        width = pyro.param("width", torch.tensor(0.1), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            loc = pyro.param("loc", x.clone(), event_dim=0)
            pyro.sample("z", dist.Normal(loc, width))

    fit = lvmppl.fit(model, {"x": x}, algorithm=algorithm, guide=guide, max_steps=1, freeze=["loc", "width"])
    assert fit.moments["z"].dtype == torch.float32
    torch.testing.assert_close(fit.moments["z"][1], torch.full((3,), 0.1), rtol=0.2, atol=0)
