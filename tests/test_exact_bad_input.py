"""What the exact engine cannot do, or is handed wrongly: the message names the site, the plate and what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.distributions import MarkovChain
from lvmppl.errors import InputError, IntractableError, ModelError

ENUMERATED = {"enumerate": "parallel"}
PRIOR = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
LOC = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
MOVE = torch.full((3, 3), 1 / 3, dtype=torch.float64)
X = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64)
GRID = torch.linspace(-1.0, 1.0, 20, dtype=torch.float64).reshape(4, 5)


def joined(by: Callable[[list[Tensor]], Tensor], sites: int = 28) -> Callable[[Tensor], None]:
    """A model of binary sites whose states are spread over one another's, then put together by `by`."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            fn = dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64))
            z = [pyro.sample(f"z{i}", fn, infer=ENUMERATED) for i in range(sites)]
            pyro.sample("x", dist.Normal(by(z), 1.0), obs=x)

    return model


def product(z: list[Tensor]) -> Tensor:
    left, right = sum(z[::2]), sum(z[1::2])
    assert isinstance(left, Tensor) and isinstance(right, Tensor)
    return torch.matmul(left[..., None, None], right[..., None, None])[..., 0, 0]


# Where states are joined without broadcasting, and how many entries that gives.
JOINTS: dict[str, tuple[Callable[[list[Tensor]], Tensor], int]] = {
    "stacked last": (lambda z: torch.stack(torch.broadcast_tensors(*z), -1).sum(-1), 28 * 2**28),
    "stacked first": (lambda z: torch.stack(torch.broadcast_tensors(*z)).sum(0), 28 * 2**28),
    "concatenated": (
        lambda z: torch.cat([s.unsqueeze(-1) for s in torch.broadcast_tensors(*z)], -1).sum(-1),
        28 * 2**28,
    ),
    "multiplied as matrices": (product, 2**28),
}


def in_data_plate(fn: Any, infer: dict[str, str] | None = None) -> Callable[[Tensor], None]:
    """A model with one latent site in the data plate."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", fn, infer=infer)
            pyro.sample("x", dist.Normal(1.0 * z.sum(-1) if fn.event_dim else 1.0 * z, 1.0), obs=x)

    return model


def colliding(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
        with pyro.plate("inner", 5, dim=-1):
            pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x)


def undeclared(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
        pyro.sample("x", dist.Normal(LOC[z].unsqueeze(-1), 1.0), obs=x)


def meeting(x: Tensor) -> None:
    """12 sites of 16 states whose sum has 2⁴⁸ entries."""
    with pyro.plate("data", len(x)):
        fn = dist.Categorical(torch.full((16,), 1 / 16))
        z = [pyro.sample(f"z{i}", fn, infer=ENUMERATED) for i in range(12)]
        pyro.sample("x", dist.Normal(1.0 * sum(z), 1.0), obs=x)


def meeting_late(x: Tensor) -> None:
    """30 Bernoullis that meet nowhere but in the log-density."""
    with pyro.plate("data", len(x)):
        z = [pyro.sample(f"z{i}", dist.Bernoulli(torch.tensor(0.3)), infer=ENUMERATED) for i in range(30)]
        fn = dist.Normal(sum(z[:15]), sum(z[15:]) + 1.0, validate_args=False)
        pyro.sample("x", fn, obs=x)


def pairwise(x: Tensor) -> None:
    """Every two of 13 sites of 5 states meet: no factor is large, every order of elimination makes one."""
    with pyro.plate("data", len(x)):
        z = [
            pyro.sample(f"z{i}", dist.Categorical(torch.full((5,), 0.2)), infer=ENUMERATED) for i in range(13)
        ]
        for i, a in enumerate(z):
            for j, b in enumerate(z[:i]):
                pyro.factor(f"f{i}_{j}", 0.1 * a * b)
        pyro.sample("x", dist.Normal(1.0 * z[0], 1.0), obs=x)


def many(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        for i in range(100):
            z = pyro.sample(f"z{i}", dist.Categorical(PRIOR), infer=ENUMERATED)
            pyro.sample(f"x{i}", dist.Normal(LOC[z], 1.0), obs=x)


def two_scales(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
        with poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x)


def crossed(x: Tensor) -> None:
    rows, columns = pyro.plate("data", len(x), dim=-2), pyro.plate("columns", 5, dim=-1)
    with rows:
        r = pyro.sample("r", dist.Categorical(PRIOR), infer=ENUMERATED)
    with columns:
        c = pyro.sample("c", dist.Categorical(PRIOR), infer=ENUMERATED)
    with rows, columns:
        pyro.sample("x", dist.Normal(LOC[r] + LOC[c], 1.0), obs=x)


def untagged_chain(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", MarkovChain(PRIOR, MOVE, 5))
        pyro.sample("x", dist.Normal(LOC[z], 1.0).to_event(1), obs=x)


def elsewhere(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
    with pyro.plate("others", 3):
        pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x[:3])


def outside(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
        pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x)
    pyro.sample("y", dist.Normal(LOC[z], 1.0), obs=x[0])


CASES: dict[str, tuple[Callable[[Tensor], None], Tensor, type[InputError], str]] = {
    "two plates on one dim": (
        colliding,
        GRID,
        ModelError,
        r"model 'colliding' at .*: expected an axis of its own for every plate, got dim=-1 for both 'data' and 'inner', "
        r"which is entered inside it; write pyro\.plate\('data', …, dim=-2\)",
    ),
    "a state of another plate": (
        elsewhere,
        X,
        ModelError,
        r"site 'x' in plate others: expected .*, got a dependence on site 'z' of plate data; sample 'x' inside",
    ),
    "a state of a plate that is left": (
        outside,
        X,
        ModelError,
        r"site 'y' outside of all plates: expected .*, got a dependence on site 'z' of plate data",
    ),
    "an axis that no plate declares": (
        undeclared,
        GRID,
        ModelError,
        r"site 'x' in plate data: expected .* batch axes that all belong to plates, .*; declare every batch axis",
    ),
    "sites that meet in an expression": (
        meeting,
        X,
        IntractableError,
        r"enumerated sites z0 \(16\), .*, z6 \(16\) in plate data: expected a table of at most 134,217,728 entries, "
        r"got 268,435,456 .* in any order; use fewer states",
    ),
    "sites that meet in a log-density": (
        meeting_late,
        X,
        IntractableError,
        r"site 'x' in plate data: expected a log-density of at most 134,217,728 entries, got 4,294,967,296 over the "
        r"enumerated sites z0 \(2\), .* \(30 sites\), in any order of elimination; use fewer states",
    ),
    "sites that meet in the elimination": (
        pairwise,
        X,
        IntractableError,
        r"exact elimination of site 'z\d+'.*: expected a table of at most 134,217,728 entries, "
        r"got [\d,]+ in the cheapest order found, over .*; use fewer states",
    ),
    "more sites than a tensor has axes": (
        many,
        X,
        ModelError,
        r"site 'z50' in plate data: expected few enough .* 64 axes.*, got 51 of them.*; loop with pyro.markov",
    ),
    "an unbounded support": (
        in_data_plate(dist.Poisson(torch.tensor(3.0)), ENUMERATED),
        X,
        ModelError,
        r"site 'z' in plate data, .*: expected a distribution whose states can be listed, got Poisson; truncate it",
    ),
    "an unbounded support, not marked": (
        in_data_plate(dist.Poisson(torch.tensor(3.0))),
        X,
        IntractableError,
        r"got z \(Poisson\): discrete sites whose states cannot be listed; truncate",
    ),
    "an event of discrete entries": (
        in_data_plate(dist.Bernoulli(torch.tensor([0.2, 0.3])).to_event(1), ENUMERATED),
        X,
        ModelError,
        r"site 'z' in plate data, .*: expected .* got Bernoulli\.to_event\(1\); declare its entries with pyro\.plate",
    ),
    "a finite site that is not marked": (
        in_data_plate(dist.Categorical(PRIOR)),
        X,
        IntractableError,
        r"got z \(Categorical\): .*; write infer={'enumerate': 'parallel'} in pyro.sample\('z', …\)",
    ),
    "a finite site enumerated in sequence": (
        in_data_plate(dist.Categorical(PRIOR), {"enumerate": "sequential"}),
        X,
        IntractableError,
        r"got z \(Categorical\): .*; write infer={'enumerate': 'parallel'} in pyro.sample\('z', …\)",
    ),
    "a chain that is not marked": (
        untagged_chain,
        GRID,
        IntractableError,
        r"got z \(MarkovChain\): .*; write infer={'enumerate': 'parallel'} in pyro.sample\('z', …\)",
    ),
    "two scales": (
        two_scales,
        X,
        ModelError,
        r"factors that meet in data, z: expected one common scale .* got different scales; put poutine.scale around",
    ),
    "crossed plates": (
        crossed,
        GRID,
        IntractableError,
        r"sites c, r in plates columns, data: expected plates nested like a tree, .*; write the smaller plate as",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message_names_the_site_the_plate_and_the_fix(case: str) -> None:
    model, x, kind, message = CASES[case]
    with pytest.raises(kind, match=message):
        lvmppl.posterior(model, {"x": x})


@pytest.mark.parametrize("case", JOINTS)
def test_states_joined_without_broadcasting_are_refused_before_the_table_is_built(case: str) -> None:
    by, entries = JOINTS[case]
    message = (
        r"enumerated sites z0 \(2\), …, z27 \(2\) \(28 sites\) in plate data: expected a table of at most "
        rf"134,217,728 entries, got {entries:,} .* in any order; use fewer states"
    )
    with pytest.raises(IntractableError, match=message):
        lvmppl.posterior(joined(by), {"x": X})


@pytest.mark.parametrize("case", JOINTS)
def test_log_evidence_of_joined_states_equals_that_of_a_sum_or_product_over_the_joint_table(
    case: str,
) -> None:
    by, _ = JOINTS[case]
    sites = 15  # enough for the watch to be on
    bits = (torch.arange(2**sites).unsqueeze(-1) >> torch.arange(sites) & 1).to(torch.float64)
    loc = bits[:, ::2].sum(-1) * bits[:, 1::2].sum(-1) if by is product else bits.sum(-1)
    prior = (bits * math.log(0.3) + (1 - bits) * math.log(0.7)).sum(-1)
    table = prior + dist.Normal(loc, 1.0).log_prob(X.unsqueeze(-1))
    posterior = lvmppl.posterior(joined(by, sites), {"x": X})
    torch.testing.assert_close(
        torch.as_tensor(posterior.log_evidence_per_datum), table.logsumexp(-1), rtol=1e-12, atol=0.0
    )


def mixture(x: Tensor) -> None:
    weights = pyro.param("weights", PRIOR, constraint=constraints.simplex)
    loc = pyro.param("loc", LOC)
    scale = pyro.param("scale", torch.ones(3, dtype=torch.float64), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        shift = pyro.param("shift", torch.zeros(len(x), dtype=torch.float64), event_dim=0)
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATED)
        pyro.sample("x", dist.Normal(loc[z] + shift, scale[z]), obs=x)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loc", [0.0, 1.0], "expected shape (3,), got shape (2,); "),
        ("loc", "high", "expected a tensor or an array of numbers, got str"),
        ("loc", [0.0, float("nan"), 1.0], "expected finite numbers, got NaN or infinity; "),
        (
            "scale",
            [1.0, -2.0, 1.0],
            "expected values within its constraint, GreaterThan(lower_bound=0.0), got",
        ),
        ("weights", [1.0, 1.0, 1.0], "expected values within its constraint, Simplex(), got"),
        ("shift", [0.0], "expected shape (4,), got shape (1,); its table has a row per datum"),
    ],
)
def test_wrong_value_of_a_parameter_names_the_parameter(name: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"value of parameter '{name}': {message}")):
        lvmppl.posterior(mixture, {"x": X}, parameters={name: value})


def test_parameters_may_be_lists_and_arrays() -> None:
    loc = [0.5, 1.0, 2.0]
    expected = lvmppl.posterior(mixture, {"x": X}, parameters={"loc": torch.tensor(loc, dtype=torch.float64)})
    for given in (loc, expected.log_evidence_per_datum.new_tensor(loc).numpy()):  # type: ignore[union-attr]
        found = lvmppl.posterior(mixture, {"x": X}, parameters={"loc": given})
        assert found.log_evidence == pytest.approx(expected.log_evidence, rel=1e-14)


def test_names_in_the_place_of_functions_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"model: expected a model function, got the text 'gaussian_mixture'"
    ):
        lvmppl.posterior("gaussian_mixture", {"x": X})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"guide: expected a guide function, got the text 'normal'"):
        lvmppl.fit(mixture, {"x": X}, algorithm="vem", guide="normal")  # type: ignore[arg-type]


def test_enumerated_value_looked_up_by_group_says_what_to_do() -> None:
    group = torch.tensor([0, 1, 2, 1])

    def model(x: Tensor) -> None:
        with pyro.plate("groups", 3):
            z = pyro.sample("z", dist.Categorical(PRIOR), infer=ENUMERATED)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(LOC[z[..., group]], 1.0), obs=x)

    with pytest.raises(ModelError, match="sample the rows of a group inside the group's plate"):
        lvmppl.posterior(model, {"x": X})
