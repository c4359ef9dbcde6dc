"""Gradient fits of the ELBO: what they do when a step fails, optimizers and schedules by name, when they stop."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms.ascent import rate_factor
from lvmppl.algorithms.early import Watch
from lvmppl.algorithms.problem import build_problem
from lvmppl.algorithms.svi import ascend
from lvmppl.algorithms.tables import ROW_OPTIMIZERS
from lvmppl.density import isolated
from lvmppl.errors import InputError
from lvmppl.guides.categorical import categorical
from lvmppl.options import SVIOptions, VEMOptions

X = torch.tensor([0.4, 1.1, 2.3], dtype=torch.float64)


def point_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Delta(pyro.param("q", torch.tensor(0.5))))


def walled(x: Tensor) -> None:
    """z is pulled towards 3 by the data, but its `wall` is not a number beyond 1."""
    z = pyro.sample("z", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x + 2.0)
    pyro.factor("wall", 4.0 * (1.0 - z).sqrt())


def walled_value(q: Tensor) -> Tensor:
    normal = torch.distributions.Normal
    zero, one, ten = (torch.tensor(v, dtype=torch.float64) for v in (0.0, 1.0, 10.0))
    data = normal(q, one).log_prob(X + 2.0).sum()
    return normal(zero, ten).log_prob(q) + data + 4.0 * (1.0 - q).sqrt()


def walled_by_hand(rate: float, steps: int) -> list[float]:
    """Adam with its state saved before each step; a point beyond the wall is left again at half the rate."""
    q = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    optimizer, saved = torch.optim.Adam([q], lr=rate), None
    seen = []
    for step in range(steps + 1):
        value = walled_value(q)
        seen.append(float(value.detach()))
        if not math.isfinite(seen[-1]):
            assert saved is not None
            rate /= 2
            with torch.no_grad():
                q.copy_(saved[0])
            state = optimizer.state[q]
            state["exp_avg"], state["exp_avg_sq"], state["step"] = (t.clone() for t in saved[1:])
            continue
        optimizer.zero_grad()
        (-value).backward()
        old = optimizer.state.get(q) or {"exp_avg": torch.zeros_like(q), "exp_avg_sq": torch.zeros_like(q)}
        count = old.get("step", torch.tensor(0.0))
        saved = tuple(t.detach().clone() for t in (q, old["exp_avg"], old["exp_avg_sq"], count))
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
    return seen


def impossible(x: Tensor) -> None:
    """Three states of which the last has probability 0: a q that starts uniform has a bound of −∞."""
    with pyro.plate("data", len(x)):
        weights = torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64)
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 1.0, 5.0]).to(x)[z], 1.0), obs=x)


def test_closed_form_leaves_an_impossible_state_out_and_equals_the_posterior() -> None:
    x = torch.tensor([0.3, 1.7, 4.9], dtype=torch.float64)
    fit = lvmppl.fit(impossible, {"x": x}, algorithm="vem", guide=categorical, max_steps=5)
    joint = torch.tensor([0.4, 0.6], dtype=torch.float64).log() + dist.Normal(
        torch.tensor([0.0, 1.0]), 1.0
    ).log_prob(x.unsqueeze(-1))
    assert fit.status == "converged" and fit.history["objective"].iloc[0] == -math.inf
    assert fit.elbo == pytest.approx(float(joint.logsumexp(-1).sum()), rel=1e-12)
    q = fit.guide_parameters["z_probs"]
    torch.testing.assert_close(q[:, :2], joint.softmax(-1), rtol=1e-10, atol=0)
    assert not q[:, 2].any()


def test_gradient_from_an_impossible_state_says_that_it_is_one() -> None:
    x = torch.tensor([0.3, 1.7, 4.9], dtype=torch.float64)
    fit = lvmppl.fit(impossible, {"x": x}, algorithm="svi", guide=categorical, max_steps=5)
    assert fit.status == "diverged"
    assert fit.message.endswith("first in site 'z', which θ makes impossible where q is not 0")


def test_failed_step_is_undone_at_half_the_rate_as_by_hand() -> None:
    fit = lvmppl.fit(walled, {"x": X}, algorithm="svi", guide=point_guide, max_steps=40, learning_rate=0.2)
    expected = walled_by_hand(0.2, 40)
    history = fit.history["objective"]
    assert history.isna().any() and not history.isna().all()
    pd.testing.assert_series_equal(
        history, pd.Series(expected), check_names=False, rtol=1e-10, check_dtype=False
    )
    rates = fit.history["learning_rate"]
    failures = history.isna().shift(1, fill_value=False).cumsum()
    assert rates.tolist() == [0.2 * 0.5**k for k in failures]
    assert fit.status == "max_steps"
    assert "first in site 'wall'" in fit.message and "learning rate halved" in fit.message
    assert float(fit.guide_parameters["q"]) < 1


@pytest.mark.parametrize("algorithm", ["svi", "vem"])
def test_three_failures_in_a_row_end_the_fit_and_name_the_site(algorithm: str) -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.factor("root", (scale - 1.0).abs().sqrt())  # finite at the start, its gradient is not

    fit = lvmppl.fit(model, {"x": X}, algorithm=algorithm, guide=point_guide, max_steps=30)
    assert fit.status == "diverged"
    assert "site 'root'" in fit.message and "gradient" in fit.message and "3 steps in a row" in fit.message
    assert float(fit.parameters["scale"]) == 1.0
    assert len(fit.history) == 3
    assert fit.history["learning_rate"].tolist() == [0.01, 0.005, 0.0025]


def test_vem_undoes_a_round_that_left_the_domain() -> None:
    options: dict[str, Any] = {"max_steps": 12, "e_steps": 3, "optimizer": "sgd", "learning_rate": 0.3}
    fit = lvmppl.fit(walled, {"x": X}, algorithm="vem", guide=point_guide, tolerance=0, **options)
    objective, rate = fit.history["objective"], fit.history["learning_rate"]
    undone = objective.diff().eq(0.0) & rate.diff().lt(0.0)  # the round was undone: its start is seen again
    assert undone.any() and not undone.all()
    assert rate.iloc[-1] == 0.3 * 0.5 ** undone.sum()
    best = walled_value(fit.guide_parameters["q"])
    assert float(best) == pytest.approx(objective.max(), rel=1e-12)
    assert fit.status == "max_steps" and "'wall'" in fit.message


def table_model(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor([-1.0, 1.5]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def table_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        logits = pyro.param("logits", torch.zeros(len(x), 2), event_dim=1)
        pyro.sample("z", dist.Categorical(logits=logits))


ROWS = torch.linspace(-2.0, 2.5, 11, dtype=torch.float64)
RATES = {"sgd": 0.05, "lbfgs": 1.0, "adadelta": 20.0, "asgd": 0.05, "adagrad": 0.3}


@pytest.mark.parametrize(
    "optimizer",
    [
        "adam",
        "adamw",
        "sgd",
        "rmsprop",
        "adagrad",
        "lbfgs",
        "adadelta",
        "adamax",
        "nadam",
        "radam",
        "rprop",
        "asgd",
    ],
)
def test_every_optimizer_by_name_climbs_to_the_log_evidence(optimizer: str) -> None:
    rate = RATES.get(optimizer, 0.1)
    fit = lvmppl.fit(
        table_model,
        {"x": ROWS},
        algorithm="svi",
        guide=table_guide,
        optimizer=optimizer,
        learning_rate=rate,
        max_steps=150,
    )
    assert fit.elbo > float(fit.history["objective"].iloc[0]) + 1.0
    assert fit.elbo == pytest.approx(fit.log_evidence, abs=0.4)


@pytest.mark.parametrize("optimizer", ROW_OPTIMIZERS)
def test_rows_of_a_table_move_as_torchs_own_optimizer_moves_them(optimizer: str) -> None:
    from lvmppl.algorithms.ascent import make_optimizer
    from lvmppl.algorithms.tables import RowOptimizer
    from lvmppl.density import ParameterSpec

    generator = torch.Generator().manual_seed(1)
    table = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    rows = torch.tensor([3, 1])
    dense = table[rows].clone().requires_grad_()
    own = RowOptimizer(optimizer, table.clone(), ParameterSpec("t", constraints.real, table, row_axis=-2))
    theirs = make_optimizer(optimizer, [dense], 0.1)
    for _ in range(4):
        grad = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        dense.grad = grad.clone()
        theirs.step()
        own.step(grad, rows, 0.1)
    torch.testing.assert_close(own.table[rows], dense.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(own.table[[0, 2, 4]], table[[0, 2, 4]], rtol=0, atol=0)


def test_lbfgs_refuses_a_noisy_objective() -> None:
    with pytest.raises(InputError, match=r"lbfgs.*minibatches"):
        lvmppl.fit(
            table_model, {"x": ROWS}, algorithm="svi", guide=table_guide, optimizer="lbfgs", batch_size=4
        )


@pytest.mark.parametrize(
    ("schedule", "middle", "end"),
    [("linear", 0.5, 0.0), ("constant", 1.0, 1.0), ("cosine", 0.5, 0.0), ("exponential", 0.1, 0.01)],
)
def test_schedule_equals_its_formula_at_middle_and_end(schedule: str, middle: float, end: float) -> None:
    assert [rate_factor(schedule, t) for t in (0.0, 0.5, 1.0)] == pytest.approx([1.0, middle, end], abs=1e-12)


def test_schedule_reaches_the_optimizer() -> None:
    """SGD on a linear objective moves by the rate times its factor."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Delta(torch.tensor(0.0), log_density=0.0).expand([]))  # no pull of its own
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        pyro.factor("slope", pyro.param("a", torch.tensor(0.0)) + 0.0 * z)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Delta(torch.tensor(0.0)))

    for schedule in ("linear", "constant", "cosine", "exponential"):
        fit = lvmppl.fit(
            model,
            {"x": X},
            algorithm="svi",
            guide=guide,
            optimizer="sgd",
            learning_rate=0.1,
            max_steps=8,
            schedule=schedule,
        )
        moves = [0.1 * rate_factor(schedule, t / 8) for t in range(8)]
        assert float(fit.parameters["a"]) == pytest.approx(sum(moves), rel=1e-9)


def test_clipped_sgd_moves_by_rate_times_norm() -> None:
    options: dict[str, Any] = {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "schedule": "constant",
        "max_steps": 1,
    }
    start = lvmppl.fit(walled, {"x": X}, algorithm="svi", guide=point_guide, clip_norm=0.02, **options)
    assert float(start.guide_parameters["q"]) == pytest.approx(0.5 + 0.1 * 0.02, rel=1e-4)


def encoder_guide(x: Tensor) -> None:
    a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.tensor(0.0))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(a * x + b, s))


def latent_normal(x: Tensor) -> None:
    mean = pyro.param("mean", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


MANY = torch.randn(60, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 1.0


def test_patience_with_held_out_rows_stops_before_the_steps_run_out() -> None:
    options: dict[str, Any] = {"max_steps": 4000, "learning_rate": 0.05, "schedule": "constant"}
    fit = lvmppl.fit(
        latent_normal,
        {"x": MANY},
        algorithm="svi",
        guide=encoder_guide,
        batch_size=20,
        patience=3,
        validation_fraction=0.25,
        **options,
    )
    assert fit.status == "converged" and 200 <= fit.steps < 3000
    assert float(fit.guide_parameters["a"]) == pytest.approx(
        0.8, abs=0.1
    )  # the posterior mean is 0.8 x + 0.2 mean


def test_held_out_rows_reach_no_step() -> None:
    with isolated(0, torch.float64):
        problem = build_problem("a", latent_normal, {"x": MANY}, guide=encoder_guide)
        watch = Watch(problem, SVIOptions(patience=1, validation_fraction=0.25))
    assert watch.training is not None and watch.held_out is not None
    assert len(watch.held_out) == 15
    assert sorted([*watch.training.tolist(), *watch.held_out.tolist()]) == list(range(60))
    spoiled = MANY.clone()
    spoiled[watch.held_out] += 100.0  # would change every gradient that saw it
    options: dict[str, Any] = {"max_steps": 5, "patience": 9, "validation_fraction": 0.25}
    found = []
    for x in (MANY, spoiled):
        with isolated(0, torch.float64):
            problem = build_problem("a", latent_normal, {"x": x}, guide=encoder_guide)
            found.append(ascend(problem, SVIOptions(**options)).values)
    assert float(found[0]["mean"]) != 0
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=0)


def test_validation_fraction_without_patience_is_refused() -> None:
    with pytest.raises(InputError, match="expected patience beside it"):
        lvmppl.fit(latent_normal, {"x": MANY}, algorithm="svi", guide=encoder_guide, validation_fraction=0.2)


@pytest.mark.parametrize(("algorithm", "batch_size"), [("svi", None), ("svi", 3), ("vem", None)])
def test_table_of_held_out_rows_is_optimised_at_each_look(algorithm: str, batch_size: int | None) -> None:
    """q holds the posterior, so the held-out ELBO reaches the log evidence of these rows, by hand at the fit's θ."""
    options: dict[str, Any] = {
        "max_steps": 100,
        "learning_rate": 0.1,
        "batch_size": batch_size,
        "tolerance": 0,
    }
    watched = {"patience": 50, "validation_fraction": 0.3}
    fit = lvmppl.fit(table_model, {"x": ROWS}, algorithm=algorithm, guide=table_guide, **options, **watched)
    with isolated(0, torch.float64):
        problem = build_problem("fit", table_model, {"x": ROWS}, guide=table_guide)
        settings: Any = {"svi": SVIOptions, "vem": VEMOptions}[algorithm]
        held = Watch(problem, settings(**options, **watched)).held_out
    assert held is not None and len(held) == 3
    normals = torch.distributions.Normal(fit.parameters["loc"], torch.ones(2, dtype=torch.float64))
    joint = torch.tensor([0.3, 0.7], dtype=torch.float64).log() + normals.log_prob(ROWS[held, None])
    evidence = torch.logsumexp(joint, -1)
    assert fit.elbo_per_datum is not None
    torch.testing.assert_close(fit.elbo_per_datum[held], evidence, rtol=0, atol=1e-3)
    assert (
        (joint - evidence[:, None]).exp() - 0.5
    ).abs().max() > 0.2  # the table's own start is far from there


def two_means(x: Tensor) -> None:
    """Both means start at 0, where the responsibilities of neither can move: a start that no gradient leaves."""
    loc = pyro.param("loc", torch.zeros(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[z], 0.5), obs=x)


@pytest.mark.parametrize("batch_size", [None, 20])
def test_restarts_of_svi_keep_the_best_and_start_apart(batch_size: int | None) -> None:
    x = torch.cat([MANY - 4.0, MANY, MANY + 4.0])  # two means share three clusters in more than one way
    options: dict[str, Any] = {"max_steps": 150, "learning_rate": 0.1, "batch_size": batch_size}
    one = lvmppl.fit(two_means, {"x": x}, algorithm="svi", guide=table_guide, **options)
    fit = lvmppl.fit(two_means, {"x": x}, algorithm="svi", guide=table_guide, restarts=3, **options)
    history = fit.all_history
    assert sorted(history["restart"].unique()) == [0, 1, 2]
    first = history[history["restart"] == 0]["objective"].reset_index(drop=True)
    pd.testing.assert_series_equal(first, one.history["objective"], check_names=False, rtol=1e-12)
    tail = history[history["step"] >= 113].groupby("restart")["objective"].mean()
    assert fit.restart == tail.idxmax() != 0
    starts = history[history["step"] == 0]["objective"]
    assert starts.nunique() == 3
    assert fit.log_evidence > one.log_evidence + 20


def test_vem_on_minibatches_closes_the_gap_of_a_table() -> None:
    """q holds the posterior: what is left between ELBO and log evidence is how far the steps came."""
    options: dict[str, Any] = {"max_steps": 60, "learning_rate": 0.1, "batch_size": 4, "tolerance": 0}
    fit = lvmppl.fit(table_model, {"x": ROWS}, algorithm="vem", guide=table_guide, **options)
    start = lvmppl.fit(table_model, {"x": ROWS}, algorithm="vem", guide=table_guide, max_steps=1, m_steps=1)
    assert float(start.history["objective"].iloc[0]) < start.log_evidence - 1.0
    assert 0 <= fit.log_evidence - fit.elbo < 0.05
    assert len(fit.history) == 61
