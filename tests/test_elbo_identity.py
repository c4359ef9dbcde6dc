"""log p(x) = ELBO + KL[q ‖ p(z | x)] datum by datum, away from the optimum, for every family and every exact engine.

KL is taken from densities of q written here and from the posterior's own density: over all states of the enumerated sites,
and over the very draws that the ELBO is a mean over for the others (an estimate, and the identity holds for every draw:
log p(x, z) − log q(z) + log q(z) − log p(z | x) = log p(x)).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
import torch.distributions as dist
from torch import Tensor
from torch.distributions import biject_to, constraints

import lvmppl
from lvmppl.algorithms.problem import Problem, build_problem
from lvmppl.algorithms.reported import reported_bound
from lvmppl.compare import kl_per_datum
from lvmppl.density import Coordinates, Drawing, isolated
from lvmppl.distributions import MarkovChain
from lvmppl.elbo import elbo
from lvmppl.guides.variational import variational
from lvmppl.heads import HEADS

F64 = torch.float64
DRAWS = 3
ENUMERATE: dict[str, Any] = {"enumerate": "parallel"}
X = torch.tensor([[0.3, -1.2, 2.0, 0.7], [1.5, 0.1, -0.4, 0.0], [-0.6, 0.9, 0.2, 1.1]], dtype=F64)
N, T = X.shape
P3 = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
MOVES = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], dtype=F64)
LOADINGS = torch.tensor([[1.0, 0.4, -0.3, 0.2], [0.1, -1.1, 0.5, 0.7]], dtype=F64)

# ------------------------------------------------------------------------------------------------------ models


def finite(x: Tensor) -> None:
    """A state, a flag below it, and a one-hot state."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", pyro_dist.Categorical(P3), infer=ENUMERATE)
        b = pyro.sample("b", pyro_dist.Bernoulli(torch.tensor([0.2, 0.6, 0.9])[a]), infer=ENUMERATE)
        c = pyro.sample("c", pyro_dist.OneHotCategorical(P3[:2] / P3[:2].sum()), infer=ENUMERATE)
        loc = (a + 2.0 * b + c @ torch.tensor([0.5, -0.5])).unsqueeze(-1)
        pyro.sample("x", pyro_dist.Normal(loc, torch.ones(T)).to_event(1), obs=x)


def sequence(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", MarkovChain(P3, MOVES, T), infer=ENUMERATE)
        pyro.sample("x", pyro_dist.Normal(1.5 * z, 0.8).to_event(1), obs=x)


def gaussian(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", pyro_dist.Normal(torch.zeros(2), 1.3).to_event(1))
        pyro.sample("x", pyro_dist.Normal(z @ LOADINGS, 0.7).to_event(1), obs=x)


def continuous(prior: Callable[[], Any], loc: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    """One continuous z a datum, x_t ~ Normal(loc(z)_t, 0.7)."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", pyro_dist.Normal(loc(z), 0.7).to_event(1), obs=x)

    return model


def _along(z: Tensor) -> Tensor:
    return z.unsqueeze(-1) * torch.linspace(0.5, 1.5, T)


POSITIVE = continuous(lambda: pyro_dist.Gamma(2.0, 1.5), _along)
UNIT = continuous(lambda: pyro_dist.Beta(2.0, 3.0), _along)
BENT = continuous(
    lambda: pyro_dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda z: torch.tanh(z) @ LOADINGS
)


TOKENS = torch.tensor([[0, 2, 2, 1, 2], [1, 1, 0, 1, 2], [2, 0, 0, 0, 0]])
SMOOTHING = torch.tensor([1.5, 2.0, 0.5], dtype=F64)


def tokens(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", pyro_dist.Dirichlet(SMOOTHING))
        repeated = z.unsqueeze(-2).expand(*z.shape[:-1], 5, 3)
        pyro.sample("w", pyro_dist.Categorical(repeated).to_event(1), obs=TOKENS)


class DirichletPosterior:
    """That of `tokens` in closed form: no engine integrates over a simplex."""

    engine = "by hand"

    def __init__(self) -> None:
        self.concentration = SMOOTHING + torch.nn.functional.one_hot(TOKENS, 3).sum(1)
        self.log_evidence_per_datum = self._log_beta(self.concentration) - self._log_beta(SMOOTHING)

    def _log_beta(self, concentration: Tensor) -> Tensor:
        return torch.lgamma(concentration).sum(-1) - torch.lgamma(concentration.sum(-1))

    def log_prob(self, assignment: Mapping[str, Tensor]) -> Tensor:
        z = assignment["z"]
        return ((self.concentration - 1) * z.log()).sum(-1) - self._log_beta(self.concentration)


def mixed(prior: Callable[[Tensor], Any]) -> Callable[..., None]:
    """A state and a continuous z whose prior depends on it."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", pyro_dist.Categorical(P3), infer=ENUMERATE)
            z = pyro.sample("z", prior(a))
            pyro.sample("x", pyro_dist.Normal(_along(z), 0.7).to_event(1), obs=x)

    return model


MIXED_NORMAL = mixed(lambda a: pyro_dist.Normal(torch.tensor([-1.0, 0.5, 2.0])[a], 0.6))
MIXED_GAMMA = mixed(lambda a: pyro_dist.Gamma(torch.tensor([1.5, 3.0, 6.0])[a], 2.0))

# ------------------------------------------------------------------------- densities of q by torch alone


def _pushed(support: Any) -> Callable[..., Any]:
    """Independent normals through the bijection to a set."""

    def build(loc: Tensor, scale: Tensor) -> Any:
        return dist.TransformedDistribution(dist.Normal(loc, scale), [biject_to(support)])

    return build


def _vector(loc: Tensor, scale: Tensor) -> Any:
    return dist.Independent(dist.Normal(loc, scale), 1)


def _pushed_vector(support: Any) -> Callable[..., Any]:
    def build(loc: Tensor, scale: Tensor) -> Any:
        return dist.TransformedDistribution(_vector(loc, scale), [biject_to(support)])

    return build


def _low_rank(loc: Tensor, factor: Tensor, diagonal: Tensor) -> Any:
    return dist.MultivariateNormal(loc, factor @ factor.mT + diagonal.diag_embed())


DENSITIES: dict[str, Callable[..., Any]] = {
    "normal": dist.Normal,
    "normal vector": _vector,
    "normal positive": _pushed(constraints.positive),
    "normal unit": _pushed(constraints.unit_interval),
    "normal simplex": _pushed_vector(constraints.simplex),
    "low_rank": _low_rank,
    "full": dist.MultivariateNormal,
    "lognormal": dist.LogNormal,
    "gamma": dist.Gamma,
    "beta": dist.Beta,
    "dirichlet": dist.Dirichlet,
}


def log_states(head: str, outputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
    """log q of one value of an enumerated site for every datum [N]."""
    if head == "bernoulli":
        return torch.where(value > 0, outputs["probs"], 1 - outputs["probs"]).log()
    if head == "categorical":
        index = int(value.argmax()) if value.dim() else int(value)
        return outputs["probs"][:, index].log()
    path = value.tolist()
    if head == "independent_categoricals":
        return sum((outputs["probs"][:, t, k].log() for t, k in enumerate(path)), torch.zeros(N, dtype=F64))
    steps = enumerate(itertools.pairwise(path))
    moves = (outputs["transition"][:, t, j, k].log() for t, (j, k) in steps)
    return sum(moves, outputs["initial"][:, path[0]].log())


# ------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """heads: of each site; `states`: of each enumerated site (its values, one an entry); density: of the drawn site."""

    model: Callable[..., None]
    heads: dict[str, Any]
    engine: str
    states: dict[str, Tensor] = field(default_factory=dict)
    density: str = ""


A = {"a": torch.arange(3)}
FINITE = {**A, "b": torch.tensor([0.0, 1.0], dtype=F64), "c": torch.eye(2, dtype=F64)}
PATHS = {"z": torch.tensor(list(itertools.product(range(3), repeat=T)))}
FLOW = {"use": "flow", "flow": "maf", "transforms": 1, "context": 2, "flow_hidden": [4]}

CASES = {
    "categorical, bernoulli": Case(
        finite, {"a": "categorical", "b": "bernoulli", "c": "categorical"}, "enumeration", FINITE
    ),
    "binary categorical, summed": Case(
        finite, {"a": "categorical", "b": "categorical", "c": "summed"}, "enumeration", FINITE
    ),
    "chain": Case(sequence, {"z": "chain"}, "forward-backward", PATHS),
    "independent categoricals": Case(sequence, {"z": "independent_categoricals"}, "forward-backward", PATHS),
    "normal, gaussian": Case(gaussian, {"z": "normal"}, "Gaussian", density="normal vector"),
    "low rank, gaussian": Case(gaussian, {"z": "low_rank"}, "Gaussian", density="low_rank"),
    "full, gaussian": Case(gaussian, {"z": "full"}, "Gaussian", density="full"),
    "flow, gaussian": Case(gaussian, {"z": FLOW}, "Gaussian", density="flow"),
    "normal, quadrature": Case(BENT, {"z": "normal"}, "quadrature", density="normal vector"),
    "low rank, quadrature": Case(BENT, {"z": "low_rank"}, "quadrature", density="low_rank"),
    "full, quadrature": Case(BENT, {"z": "full"}, "quadrature", density="full"),
    "flow, quadrature": Case(BENT, {"z": FLOW}, "quadrature", density="flow"),
    "lognormal": Case(POSITIVE, {"z": "lognormal"}, "quadrature", density="lognormal"),
    "gamma": Case(POSITIVE, {"z": "gamma"}, "quadrature", density="gamma"),
    "normal of a positive site": Case(POSITIVE, {"z": "normal"}, "quadrature", density="normal positive"),
    "beta": Case(UNIT, {"z": "beta"}, "quadrature", density="beta"),
    "normal of a unit interval": Case(UNIT, {"z": "normal"}, "quadrature", density="normal unit"),
    "dirichlet": Case(tokens, {"z": "dirichlet"}, "by hand", density="dirichlet"),
    "normal of a simplex": Case(tokens, {"z": "normal"}, "by hand", density="normal simplex"),
    "categorical and normal, mixed": Case(
        MIXED_NORMAL, {"a": "categorical", "z": "normal"}, "Gaussian", A, "normal"
    ),
    "summed and normal, mixed": Case(MIXED_NORMAL, {"a": "summed", "z": "normal"}, "Gaussian", A, "normal"),
    "categorical and gamma, mixed": Case(
        MIXED_GAMMA, {"a": "categorical", "z": "gamma"}, "quadrature", A, "gamma"
    ),
    "summed and lognormal, mixed": Case(
        MIXED_GAMMA, {"a": "summed", "z": "lognormal"}, "quadrature", A, "lognormal"
    ),
}


def head_name(spec: Any) -> str:
    return spec if isinstance(spec, str) else str(spec["use"])


def scattered(problem: Problem) -> dict[str, Tensor]:
    """λ away from its start: in unconstrained coordinates, with a different sd for every datum."""
    assert problem.guided is not None
    coordinates = Coordinates(problem.guided.specs, problem.free_lambda)
    generator = torch.Generator().manual_seed(5)
    free = coordinates.unconstrain(problem.initial)
    moved = {n: v + 0.4 * torch.randn(v.shape, generator=generator, dtype=F64) for n, v in free.items()}
    return {**problem.initial, **coordinates.constrain(moved)}


def kl_by_hand(
    case: Case, values: Mapping[str, Tensor], draws: Tensor | None, log_q: Tensor, posterior: Any
) -> Tensor:
    """KL[q ‖ p(z | x)] [J, N]: summed over the states of q's enumerated sites, at each draw [J, N, …] of the others.

    log_q: log q of the draws [J, N]. Sites that q leaves out are summed under the posterior.
    """
    own = {s: v for s, v in case.states.items() if case.heads[s] != "summed"}
    left = {s: v for s, v in case.states.items() if s not in own}
    drawn: list[dict[str, Tensor]] = [{}] if draws is None else [{"z": z} for z in draws]
    total = torch.zeros(len(drawn), N, dtype=F64)
    for states in itertools.product(*own.values()):
        log_c = torch.zeros(N, dtype=F64)
        for site, value in zip(own, states, strict=True):
            prefix = f"{site}_"
            outputs = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
            log_c = log_c + log_states(head_name(case.heads[site]), outputs, value)
        for j, held in enumerate(drawn):
            terms = []
            for others in itertools.product(*left.values()):
                known = dict(zip((*own, *left), (*states, *others), strict=True))
                known = {s: v.expand(N, *v.shape) for s, v in known.items()}
                terms.append(posterior.log_prob({**known, **held}))
            log_p = torch.logsumexp(torch.stack(terms), 0)
            total[j] += log_c.exp() * (log_c + log_q[j] - log_p)
    return total


def log_density(case: Case, values: Mapping[str, Tensor], evaluation: Any, draws: Tensor | None) -> Tensor:
    """log q of the draws [J, N]; of a flow as the guide itself says it."""
    if draws is None:
        return torch.zeros(1, N, dtype=F64)
    if case.density == "flow":
        (factor,) = [f for f in evaluation.guide_factors if f.site == "z"]
        found: Tensor = factor.log_prob
        return found
    outputs = {n.removeprefix("z_"): v for n, v in values.items() if n.startswith("z_")}
    result: Tensor = DENSITIES[case.density](**outputs).log_prob(draws)
    return result


@pytest.mark.parametrize("name", CASES)
def test_elbo_and_kl_add_up_to_the_log_evidence_of_every_datum(name: str) -> None:
    case = CASES[name]
    if case.density == "flow":
        pytest.importorskip("zuko")
    with isolated(0, F64):
        problem = build_problem(
            "fit",
            case.model,
            {"x": X},
            guide=variational,
            guide_takes_model=True,
            guide_args={"head": case.heads},
        )
        values = scattered(problem)
        assert problem.guided is not None
        drawing = Drawing(particles=DRAWS) if case.density else Drawing()
        with torch.no_grad():
            evaluation = problem.guided.evaluate(problem.data, values, None, drawing)
            bound = elbo(evaluation, problem.data_plate).per_datum
            draws = evaluation.samples.get("z")
            log_q = log_density(case, values, evaluation, draws)
        posterior: Any = DirichletPosterior()
        if case.model is not tokens:
            posterior = lvmppl.posterior(case.model, {"x": X}, parameters={})
        kl = kl_by_hand(case, values, draws, log_q, posterior).mean(0)
        evidence = posterior.log_evidence_per_datum
        assert posterior.engine.startswith(case.engine), posterior.engine
        assert bound is not None and evidence is not None and float(kl.abs().min()) > 1e-3
        torch.testing.assert_close(bound + kl, evidence, rtol=0, atol=1e-6)
        if not case.density and "summed" not in case.heads.values():  # what a run reports is this very KL
            reported = reported_bound(problem, values).variational
            assert reported is not None and float(kl.min()) > 0
            torch.testing.assert_close(kl_per_datum(reported, posterior), kl, rtol=1e-9, atol=1e-12)


def test_every_family_of_the_table_has_a_case() -> None:
    tested = {head_name(h) for case in CASES.values() for h in case.heads.values()}
    assert tested == set(HEADS) - {"point"}  # a point is no distribution: it has no ELBO


QUADRATURE: dict[str, tuple[Callable[..., None], Any, int]] = {
    "two dimensions": (BENT, constraints.real_vector, 2),
    "positive": (POSITIVE, constraints.positive, 1),
    "unit interval": (UNIT, constraints.unit_interval, 1),
    "mixed": (MIXED_GAMMA, constraints.positive, 1),
}


@pytest.mark.parametrize("name", QUADRATURE)
def test_posterior_density_by_quadrature_integrates_to_one_by_the_trapezoidal_rule(name: str) -> None:
    """Its normaliser is the log evidence, which the identity alone would take at its word."""
    model, support, dim = QUADRATURE[name]
    axis = torch.linspace(-12.0, 12.0, 20001 if dim == 1 else 301, dtype=F64)
    free = axis if dim == 1 else torch.cartesian_prod(axis, axis)
    transform = biject_to(support)
    z = transform(free)
    log_weight = dim * (axis[1] - axis[0]).log()
    if dim == 1:
        log_weight = log_weight + transform.log_abs_det_jacobian(free, z)
    with isolated(0, F64):
        posterior = lvmppl.posterior(model, {"x": X}, parameters={})
        inside = (z > 0) & (z < 1) if name == "unit interval" else torch.ones(len(z), dtype=torch.bool)
        held = z[inside].unsqueeze(1).expand(-1, N, *z.shape[1:])
        states = range(3) if name == "mixed" else (0,)
        parts = [posterior.log_prob({"z": held, "a": torch.full(held.shape[:2], a)}) for a in states]
        log_weight = log_weight.expand(len(z))[inside].unsqueeze(1)
        total = torch.logsumexp(torch.stack(parts) + log_weight, (0, 1))
        stated = posterior.log_evidence_error_per_datum
        assert bool((total.abs() <= stated + 1e-12).all()), (total, stated)
        assert float(stated.max()) < 1e-6
