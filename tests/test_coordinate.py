"""Closed-form coordinate ascent on the ELBO: against EM, hand-derived variational Bayes, and gradients of the ELBO."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import betaln, digamma, gammaln
from sklearn.datasets import load_iris
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms.closed_phases import closed_phases
from lvmppl.algorithms.problem import build_problem
from lvmppl.algorithms.stepper import batch_elbo
from lvmppl.algorithms.sweep import Sweep
from lvmppl.compare import total_gap
from lvmppl.density import Coordinates, isolated
from lvmppl.distributions import MarkovChain
from lvmppl.guides.categorical import categorical
from lvmppl.guides.variational import variational
from lvmppl.models.factor_analysis import factor_analysis
from lvmppl.models.hmm import hidden_markov
from lvmppl.models.lda import lda
from lvmppl.models.mixture import gaussian_mixture
from lvmppl.options import VEMOptions

F64 = torch.float64
ENUMERATE: dict[str, Any] = {"enumerate": "parallel"}
IRIS = torch.tensor(load_iris().data, dtype=F64)
MIXTURE = functools.partial(gaussian_mixture, num_components=3, covariance="full")
COUNTS = torch.tensor([0, 3, 1, 7, 9, 2, 0, 11, 4, 8, 1], dtype=F64)
SERIES = torch.randn(4, 9, dtype=F64, generator=torch.Generator().manual_seed(0)).cumsum(1)
LENGTHS = torch.tensor([9, 6, 1, 8])


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


# ------------------------------------------------------------------------------------ where q holds the posterior

HMM = functools.partial(hidden_markov, num_states=3, emission="gaussian")
HOLDING: dict[str, tuple[Callable[..., Any], dict[str, Tensor], Callable[..., Any]]] = {
    "mixture": (MIXTURE, {"x": IRIS}, categorical),
    "chain": (HMM, {"x": SERIES, "lengths": LENGTHS}, functools.partial(variational, head="chain")),
}


@pytest.mark.parametrize("case", HOLDING)
@pytest.mark.parametrize("rounds", [1, 2, 6])
def test_parameters_after_each_round_equal_those_of_em(case: str, rounds: int) -> None:
    model, data, guide = HOLDING[case]
    options: dict[str, Any] = {"max_steps": rounds, "tolerance": 0.0}
    found = lvmppl.fit(model, data, algorithm="vem", guide=guide, **options)
    em = lvmppl.fit(model, data, algorithm="em", **options)
    assert {s.how for s in (*found.e_step, *found.m_step)} == {"closed-form"}
    for name, value in em.parameters.items():
        torch.testing.assert_close(found.parameters[name], value, rtol=1e-8, atol=1e-8)
    assert found.elbo == pytest.approx(em.log_evidence, abs=1e-8)  # the fit ends with an E-step


def test_gradient_e_steps_reach_the_fixed_point_of_em() -> None:
    model, data = (
        functools.partial(gaussian_mixture, num_components=2, covariance="diag"),
        {"x": IRIS[::3, 2:]},
    )
    em = lvmppl.fit(model, data, algorithm="em", tolerance=1e-12)
    options: dict[str, Any] = {"e_step": "gradient", "optimizer": "lbfgs", "e_steps": 10, "tolerance": 1e-9}
    found = lvmppl.fit(model, data, algorithm="vem", guide=categorical, **options)
    assert [s.how for s in found.e_step] == ["gradient"]
    assert found.log_evidence == pytest.approx(em.log_evidence, abs=1e-4)
    assert found.elbo == pytest.approx(em.log_evidence, abs=1e-4)


def guided_by_logits(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        logits = pyro.param("table", torch.zeros(len(x), 3), event_dim=1)
        pyro.sample("z", dist.Categorical(logits=logits), infer=ENUMERATE)


def test_hand_written_guide_has_a_closed_form_in_its_own_spelling() -> None:
    fit = lvmppl.fit(MIXTURE, {"x": IRIS}, algorithm="vem", guide=guided_by_logits, tolerance=1e-10)
    assert fit.posterior is not None
    probs = torch.softmax(fit.guide_parameters["table"], -1)
    torch.testing.assert_close(probs, fit.posterior.marginal("z").probs, rtol=0, atol=1e-8)


# ------------------------------------------------------------------------------------------------------ mean field


def two_chains(y: Tensor, lengths: Tensor | None = None) -> None:
    steps = y.shape[1]
    loc = torch.tensor([[-1.0, 0.2, 1.1], [0.4, 1.3, 2.2]])
    move = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    with pyro.plate("data", len(y)):
        a = pyro.sample(
            "a", MarkovChain(tensor(0.4, 0.6), torch.eye(2) * 0.6 + 0.2, steps, lengths), infer=ENUMERATE
        )
        b = pyro.sample("b", MarkovChain(torch.ones(3), move, steps, lengths), infer=ENUMERATE)
        fn = dist.Normal(loc[a, b], 0.8)
        if lengths is not None:
            fn = fn.expand(torch.broadcast_shapes(fn.batch_shape, y.shape)).mask(
                torch.arange(steps) < lengths.unsqueeze(-1)
            )
        pyro.sample("y", fn.to_event(1), obs=y)


def two_causes(x: Tensor) -> None:
    """A global binary site, and two sites a row that meet in x."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Bernoulli(0.3), infer=ENUMERATE)
        b = pyro.sample(
            "b", dist.Categorical(torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])[a.long()]), infer=ENUMERATE
        )
        pyro.sample("x", dist.Normal(2 * a + b, 1.0), obs=x)


def poisson_mixture(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(tensor(1.0, 2.0, 1.5)))
    with pyro.plate("components", 3):
        rate = pyro.sample("rate", dist.Gamma(tensor(1.0, 4.0, 16.0), tensor(1.0, 1.5, 2.0)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
        pyro.sample("x", dist.Poisson(rate[z]), obs=x)


def normal_gamma(x: Tensor) -> None:
    precision = pyro.sample("precision", dist.Gamma(tensor(2.0)[0], tensor(3.0)[0]))
    mean = pyro.sample("mean", dist.Normal(1.0, (4 * precision).rsqrt()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, precision.rsqrt()), obs=x)


def line(y: Tensor, x: Tensor) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ weight, 0.5), obs=y)


def test_elbo_of_lda_by_counts_equals_that_by_single_occurrences() -> None:
    terms, counts = (
        torch.tensor([[0, 2, 4, 0], [1, 2, 3, 5], [5, 1, 0, 4]]),
        torch.tensor([[2, 1, 3, 0], [1, 1, 2, 1], [4, 1, 1, 2]]),
    )
    model = functools.partial(lda, num_topics=2, num_terms=6, alpha=0.5, eta=0.7)
    options: dict[str, Any] = {"init": "random", "e_steps": 1, "max_steps": 300, "tolerance": 1e-13}
    once = lvmppl.fit(
        model, {"terms": terms, "counts": counts.double()}, algorithm="vem", guide=variational, **options
    )
    assert {s.how for s in once.e_step} == {"closed-form"} and once.history["objective"].diff().min() >= -1e-9
    # every cell apart into single occurrences: the same documents, q(z) equal within a cell at the optimum
    single = [
        [t for t, c in zip(*row, strict=True) for _ in range(int(c))]
        for row in zip(terms, counts, strict=True)
    ]
    width = max(map(len, single))
    apart = torch.stack([torch.tensor([*row, *[0] * (width - len(row))]) for row in single])
    ones = torch.stack(
        [torch.tensor([1.0] * len(row) + [0.0] * (width - len(row)), dtype=F64) for row in single]
    )
    start = {n: once.guide_parameters[n] for n in ("topics_concentration", "proportions_concentration")}
    with isolated(0, F64):
        problem = build_problem(
            "fit",
            model,
            {"terms": apart, "counts": ones},
            guide=variational,
            guide_takes_model=True,
            start=start,
        )
        closed = closed_phases(problem, VEMOptions(e_steps=1))
        values = Sweep(
            replace(closed.e, blocks=tuple(b for b in closed.e.blocks if b.site == "z")),
            closed.problem.initial,
        ).run(1)
        assert _elbo(closed.problem, values) == pytest.approx(once.elbo, abs=1e-7)


def heads(**by_site: str) -> Callable[..., Any]:
    return functools.partial(variational, head=by_site)


STEPS = functools.partial(variational, head="independent_categoricals")
GAMMA = heads(rate="gamma", weights="dirichlet", z="categorical")
LINE = {"y": tensor(0.1, 1.9, 4.2, 5.5), "x": torch.stack([torch.ones(4), torch.arange(4.0)], 1).double()}
ASCENTS: dict[str, tuple[Callable[..., Any], Mapping[str, Tensor], Callable[..., Any]]] = {
    "chains": (two_chains, {"y": SERIES, "lengths": LENGTHS}, variational),
    "steps": (two_chains, {"y": SERIES, "lengths": LENGTHS}, STEPS),
    "two causes": (two_causes, {"x": IRIS[:7, 0] - 3}, categorical),
    "bernoulli head": (two_causes, {"x": IRIS[:7, 0] - 3}, heads(a="bernoulli")),
    "poisson mixture": (poisson_mixture, {"x": COUNTS}, GAMMA),
    "normal-gamma": (normal_gamma, {"x": IRIS[:9, 1]}, heads(precision="gamma", mean="normal")),
    "line, diagonal": (line, LINE, heads(weight="normal")),
}


@pytest.mark.parametrize("case", ASCENTS)
def test_sweeps_never_lower_the_elbo_and_end_where_its_gradient_vanishes(case: str) -> None:
    model, data, guide = ASCENTS[case]
    options = VEMOptions(e_steps=1, max_steps=400, tolerance=1e-14, init="params")
    with isolated(0, F64):
        problem = build_problem("fit", model, data, guide=guide, guide_takes_model=True)
        closed = closed_phases(problem, options)
        assert {s.how for s in closed.e.steps} == {"closed-form"}, closed.e.steps
        values, trail = dict(closed.problem.initial), []
        while len(trail) < 3 or trail[-1] - trail[-2] > 1e-11:
            values.update(closed.e_phase(values) if trail else {})
            trail.append(_elbo(closed.problem, values))
        rises = np.diff(trail)
        assert rises.min() >= -1e-10 and rises.max() > 0.01
        coordinates = Coordinates(problem.guided.specs, problem.lambda_)  # type: ignore[union-attr]
        free = {n: v.requires_grad_() for n, v in coordinates.unconstrain(values).items()}
        total = _elbo_tensor(closed.problem, {**values, **coordinates.constrain(free)})
        for grad in torch.autograd.grad(total, list(free.values())):
            assert float(grad.abs().max()) < 1e-4


def _elbo_tensor(problem: Any, values: Mapping[str, Tensor]) -> Tensor:
    return batch_elbo(problem, problem.guided, values, None)


def _elbo(problem: Any, values: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        return float(_elbo_tensor(problem, values))


def numpy_poisson_mixture(x: np.ndarray, rounds: int) -> tuple[dict[str, np.ndarray], float]:
    """Variational Bayes by the textbook's equations: globals first, from uniform responsibilities; and its ELBO."""
    alpha0, a0, b0 = np.array([1, 2, 1.5]), np.array([1.0, 4, 16]), np.array([1, 1.5, 2.0])
    r = np.full((len(x), 3), 1 / 3)
    for _ in range(rounds):
        alpha, a, b = alpha0 + r.sum(0), a0 + r.T @ x, b0 + r.sum(0)
        log_pi, log_rate = digamma(alpha) - digamma(alpha.sum()), digamma(a) - np.log(b)
        scores = log_pi + x[:, None] * log_rate - a / b - gammaln(x + 1)[:, None]
        r = np.exp(scores - scores.max(1, keepdims=True))
        r /= r.sum(1, keepdims=True)
    bound = (r * (scores - np.log(r))).sum()
    dirichlet = gammaln(alpha0.sum()) - gammaln(alpha0).sum() - gammaln(alpha.sum()) + gammaln(alpha).sum()
    bound += dirichlet + ((alpha0 - alpha) * log_pi).sum()
    bound += (a0 * np.log(b0) - gammaln(a0) - a * np.log(b) + gammaln(a)).sum()
    bound += ((a0 - a) * log_rate - (b0 - b) * a / b).sum()
    return {"weights_concentration": alpha, "rate_concentration": a, "rate_rate": b, "z_probs": r}, float(
        bound
    )


@pytest.mark.parametrize("rounds", [1, 2])
def test_variational_bayes_of_a_poisson_mixture_equals_its_equations(rounds: int) -> None:
    options: dict[str, Any] = {"e_steps": 1, "max_steps": rounds, "tolerance": 0.0}
    fit = lvmppl.fit(poisson_mixture, {"x": COUNTS}, algorithm="vem", guide=GAMMA, **options)
    expected, bound = numpy_poisson_mixture(
        COUNTS.numpy(), rounds + 1
    )  # a fit ends with an E phase of its own
    for name, value in expected.items():
        np.testing.assert_allclose(fit.guide_parameters[name].numpy().reshape(value.shape), value, rtol=1e-9)
    assert fit.elbo == pytest.approx(bound, abs=1e-9) and fit.elbo_error == 0.0
    a, b = expected["rate_concentration"], expected["rate_rate"]
    np.testing.assert_allclose(fit.moments["rate"].numpy(), np.stack([a / b, np.sqrt(a) / b]), rtol=1e-9)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_structured_mean_field_lies_between_independent_steps_and_the_evidence(
    lengths: Tensor | None,
) -> None:
    data = {"y": SERIES} if lengths is None else {"y": SERIES, "lengths": lengths}
    options: dict[str, Any] = {"algorithm": "vem", "tolerance": 1e-10, "e_steps": 1}
    chains = lvmppl.fit(two_chains, data, guide=variational, **options)
    steps = lvmppl.fit(two_chains, data, guide=STEPS, **options)
    assert steps.elbo + 0.1 < chains.elbo < chains.log_evidence - 0.01
    for fit in (chains, steps):  # the divergence of the two posteriors is what the bound lacks
        assert total_gap(fit) == pytest.approx(fit.log_evidence - fit.elbo, abs=1e-8)


@pytest.mark.parametrize("cap", [40.0, 20.0])
def test_closed_form_is_given_up_where_log_p_bends_only_at_the_end(cap: float) -> None:
    """Below the cap, where q starts, log p is quadratic; q ends astride of it, or beyond."""

    def capped(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(50.0), 10.0))
            pyro.sample("x", dist.Normal(z.clamp(max=cap), 1.0), obs=x)

    fit = lvmppl.fit(capped, {"x": cap + tensor(1.0, 2.0)}, algorithm="vem", guide=variational, max_steps=4)
    assert [(s.how, s.why) for s in fit.e_step] == [
        ("gradient", "log p is not linear in the statistics of 'z' where q ends")
    ]
    assert fit.elbo_error > 0 and fit.elbo < fit.log_evidence + 4 * fit.elbo_error


@pytest.mark.parametrize("bend", [torch.tanh, lambda z: z.clamp(min=-0.5)], ids=["tanh", "clamp"])
def test_log_density_that_bends_away_from_a_narrow_start_has_no_closed_form(bend: Any) -> None:
    """Around a q of scale 1e-4 every smooth log p is linear in z and z² to the digits that there are."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(bend(z), 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = pyro.param("m", torch.zeros_like(x), event_dim=0)
            scale = pyro.param("s", torch.full_like(x, 1e-4), constraint=constraints.positive, event_dim=0)
            pyro.sample("z", dist.Normal(loc, scale))

    x = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    fit = lvmppl.fit(model, {"x": x}, algorithm="vem", guide=guide, max_steps=3)
    assert [step.how for step in fit.e_step] == ["gradient"] and fit.elbo_error > 0


DOCUMENTS = {
    "terms": torch.tensor([[0, 2, 4, 0], [1, 2, 3, 5], [5, 1, 0, 4]]),
    "counts": torch.tensor([[2, 1, 3, 0], [1, 1, 2, 1], [4, 1, 1, 2]]),
}
LDA = functools.partial(lda, num_topics=2, num_terms=6, alpha=0.5, eta=0.7)


@pytest.mark.parametrize("case", ["poisson mixture", "documents"])
def test_sweep_that_keeps_factors_equals_blocks_one_by_one_afresh(case: str) -> None:
    """Global blocks once, then local ones twice (a single local one is at its maximum after the first)."""
    model, data, guide = (LDA, DOCUMENTS, variational) if case == "documents" else ASCENTS[case]
    with isolated(0, F64):
        problem = build_problem("fit", model, data, guide=guide, guide_takes_model=True)
        closed = closed_phases(problem, VEMOptions(init="random"))
        start = {**closed.problem.initial, **closed.scattered(0)}
        kept, fresh = Sweep(closed.e, start), dict(start)
        for _ in range(3):
            kept.run(2)
            for block in (*closed.e.outer, *closed.e.local, *closed.e.local):
                fresh = Sweep(replace(closed.e, blocks=(block,)), fresh).run(1)
        for name in closed.e.names:
            torch.testing.assert_close(kept.values[name], fresh[name], rtol=1e-10, atol=1e-12)
            assert not torch.equal(fresh[name], start[name])


def test_elbo_of_factors_orthogonal_only_at_the_start_equals_its_closed_form() -> None:
    x = (IRIS[:40, :3] - IRIS[:40, :3].mean(0)) / IRIS[:40, :3].std(0, correction=0)
    model = functools.partial(factor_analysis, num_factors=2)
    fit = lvmppl.fit(model, {"x": x}, algorithm="vem", guide=variational, max_steps=3, tolerance=1e-12)
    theta, mean, sd = fit.parameters, *fit.moments["z"]  # [N, L]
    weights = 1 / theta["variance"]
    residual = x - theta["loc"] - mean @ theta["loadings"].T
    meeting = theta["loadings"].T @ (weights.unsqueeze(-1) * theta["loadings"])
    assert abs(meeting[0, 1]) > 1e-3  # the factors have come to meet
    likelihood = -0.5 * (
        (residual.square() * weights).sum()
        + (sd.square() * meeting.diagonal()).sum()
        + len(x) * (2 * torch.pi * theta["variance"]).log().sum()
    )
    divergence = 0.5 * (mean.square() + sd.square() - 1 - 2 * sd.log()).sum()
    assert {s.how for s in fit.e_step} == {"closed-form"}
    assert fit.elbo == pytest.approx(float(likelihood - divergence), abs=1e-9)
    assert fit.elbo < fit.log_evidence


@pytest.mark.parametrize("moved", ["shared", "prior"])
def test_kept_sweep_follows_a_moved_parameter(moved: str) -> None:
    """q(b) ∝ p(b) exp E_{q(a)}[log p(x | a, b)] at the new θ, which may be the guide's q(a) too."""

    def weights(name: str) -> Tensor:
        return pyro.param(name, tensor(0.4, 0.6), constraint=constraints.simplex)

    def model(x: Tensor) -> None:
        shared, prior = weights("shared"), weights("prior")
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(shared), infer=ENUMERATE)
            b = pyro.sample("b", dist.Categorical(prior), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(2.0 * a - 1.5 * b, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        shared = weights("shared")
        table = pyro.param(
            "q", torch.full((len(x), 2), 0.5, dtype=F64), constraint=constraints.simplex, event_dim=1
        )
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Categorical(shared), infer=ENUMERATE)
            pyro.sample("b", dist.Categorical(table), infer=ENUMERATE)

    x = tensor(0.3, -1.0, 2.0)
    with isolated(0, F64):
        closed = closed_phases(build_problem("fit", model, {"x": x}, guide=guide), VEMOptions())
        values = dict(closed.problem.initial)
        values.update(closed.e_phase(values))
        values[moved] = tensor(0.9, 0.1)
        values.update(closed.e_phase(values))
    a, b = torch.arange(2.0, dtype=F64).reshape(2, 1), torch.arange(2.0, dtype=F64)
    log_x = dist.Normal(2.0 * a - 1.5 * b, 1.0).log_prob(x.reshape(-1, 1, 1))  # [N, a, b]
    expected = (values["prior"].log() + (values["shared"].unsqueeze(-1) * log_x).sum(1)).softmax(-1)
    torch.testing.assert_close(values["q"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("coupled", [False, True], ids=["elements", "rows"])
def test_entry_that_bends_beside_one_of_a_huge_gradient_has_no_closed_form(coupled: bool) -> None:
    """log p of one entry is quadratic, with slopes of 10⁹; that of the other is not, with slopes of about 1."""
    y = tensor(0.3, 1.1)

    def model(x: Tensor) -> None:
        if coupled:  # an event of two elements that meet, one row of two straight and the other bent
            with pyro.plate("rows", 2):
                w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            total = w.sum(-1)
        else:
            total = w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y0", dist.Normal(total[..., 0], 3e-5), obs=y[0])
        pyro.sample("y1", dist.Normal(torch.tanh(total[..., 1]), 0.5), obs=y[1])
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    head = "full" if coupled else "normal"
    fit = lvmppl.fit(model, {"x": y}, "vem", guide=functools.partial(variational, head=head), max_steps=1)
    assert fit.e_step[0].how == "gradient" and "not linear" in fit.e_step[0].why


HEAVY = tensor(0.3, -1.2, 2.0, 0.7, 8.0, 1.1, -0.4, 2.2)


def heavy_tails(x: Tensor) -> None:
    """A mixing weight and a state a row, conjugate; a location of Student's t, which is not."""
    weights = pyro.sample("weights", dist.Dirichlet(tensor(1.0, 2.5)))
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    tilt = pyro.sample("tilt", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
        pyro.sample("y", dist.Normal(2.0 * z - 1.0, 0.8), obs=x)
        pyro.sample("x", dist.StudentT(3.0, loc, 1.0), obs=x)
        pyro.sample("w", dist.StudentT(3.0, loc + tilt, 1.0), obs=x)


def test_conjugate_sites_keep_their_closed_form_beside_a_drawn_one() -> None:
    """`weights` and `z` meet neither `loc` nor `tilt`: at the end they are the textbook's maxima given one another."""
    guide = heads(weights="dirichlet", loc="normal", tilt="normal")
    fit = lvmppl.fit(heavy_tails, {"x": HEAVY}, "vem", guide=guide, max_steps=12, e_steps=25)
    assert {s.site: s.how for s in fit.e_step} == {
        "weights": "closed-form",
        "z": "closed-form",
        "loc": "gradient",
        "tilt": "gradient",
    }
    probs, concentration = fit.guide_parameters["z_probs"], fit.guide_parameters["weights_concentration"]
    log_weights = torch.digamma(concentration) - torch.digamma(concentration.sum())
    scores = log_weights + dist.Normal(tensor(-1.0, 1.0), 0.8).log_prob(HEAVY.unsqueeze(-1))
    torch.testing.assert_close(probs, scores.softmax(-1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(concentration, tensor(1.0, 2.5) + probs.sum(0), rtol=1e-6, atol=0)
    assert abs(float(fit.guide_parameters["loc_loc"])) > 0.01  # the drawn site moves, from 0


def test_site_that_shares_a_factor_with_a_drawn_one_is_drawn_too() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        rate = pyro.sample("rate", dist.Gamma(tensor(2.0)[0], tensor(1.0)[0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(tensor(0.3, 0.7)), infer=ENUMERATE)
            pyro.sample("x", dist.StudentT(3.0, loc + z, 1.0), obs=x)
            pyro.sample("count", dist.Poisson(rate * (1 + loc.abs())), obs=COUNTS[:8])

    guide = heads(loc="normal", rate="gamma")
    fit = lvmppl.fit(model, {"x": HEAVY}, "vem", guide=guide, max_steps=1)
    why = {s.site: s.why for s in fit.e_step}
    assert {s.how for s in fit.e_step} == {"gradient"} and "not linear" in why["loc"]
    assert why["rate"] == why["z"] == "shares a factor with 'loc', which is drawn"


def test_closed_forms_are_given_up_where_q_of_a_drawn_site_depends_on_a_draw() -> None:
    """q(tilt | loc's draw) would add log q to what is expected under other sites."""

    def guide(x: Tensor) -> None:
        alpha = pyro.param("alpha", tensor(1.0, 1.0), constraint=constraints.positive)
        pyro.sample("weights", dist.Dirichlet(alpha))
        loc = pyro.sample("loc", dist.Normal(pyro.param("m", tensor(0.0)[0]), 0.5))
        pyro.sample("tilt", dist.Normal(pyro.param("s", tensor(0.5)[0]) * loc, 0.5))
        with pyro.plate("data", len(x)):
            table = pyro.param("t", torch.full((len(x), 2), 0.5), constraint=constraints.simplex, event_dim=1)
            pyro.sample("z", dist.Categorical(table), infer=ENUMERATE)

    fit = lvmppl.fit(heavy_tails, {"x": HEAVY}, "vem", guide=guide, max_steps=1)
    assert {s.how for s in fit.e_step} == {"gradient"}
    assert {s.why for s in fit.e_step if s.site in ("weights", "z")} == {
        "q of 'tilt' depends on what is drawn"
    }


@pytest.mark.parametrize(("family", "concentration"), [("beta", 0.1), ("beta", 0.002), ("gamma", 0.002)])
def test_closed_form_is_given_up_where_points_round_to_a_bound(family: str, concentration: float) -> None:
    """E log(1 − z) of a Beta(5 + a, a), or E log z of a Gamma(a, 6), is lost in a point that rounds to 1, or to 0."""
    a = tensor(concentration)[0]

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Beta(a, a) if family == "beta" else dist.Gamma(a, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(z) if family == "beta" else dist.Poisson(z), obs=x)

    x = torch.full((5,), float(family == "beta"), dtype=F64)
    guide = variational if family == "beta" else heads(z="gamma")
    fit = lvmppl.fit(model, {"x": x}, algorithm="vem", guide=guide, max_steps=5)
    exact = betaln(5 + concentration, concentration) - betaln(concentration, concentration)
    if family == "gamma":
        exact = -concentration * np.log(6.0)
    assert fit.e_step[0].how == "gradient" and "near to a bound" in fit.e_step[0].why
    assert fit.elbo_error > 0
    assert fit.elbo - 4 * fit.elbo_error < exact


@pytest.mark.parametrize("concentration", [0.1, 0.01])
def test_elbo_of_a_small_concentration_equals_the_evidence(concentration: float) -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Dirichlet(torch.full((4,), concentration, dtype=F64)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(z), obs=x)

    with isolated(0, F64):
        fit = lvmppl.fit(model, {"x": torch.tensor([0, 0, 2, 0, 2])}, algorithm="vem", guide=variational)
    alpha, counts = np.full(4, concentration), np.array([3, 0, 2, 0])
    found = gammaln(alpha + counts).sum() - gammaln((alpha + counts).sum())
    exact = found - gammaln(alpha).sum() + gammaln(alpha.sum())
    assert fit.e_step[0].how == "closed-form"
    assert fit.elbo == pytest.approx(exact, abs=1e-10)
