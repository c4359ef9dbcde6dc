"""The table of heads and sources: every pair in it is checked and fitted, and the page shows this very table."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lvmppl
from lvmppl.algorithms.choices import choose, site_kind
from lvmppl.algorithms.objective import Objective
from lvmppl.algorithms.problem import Problem, build_problem
from lvmppl.density import isolated
from lvmppl.errors import InputError
from lvmppl.estimators import ESTIMATORS, estimators_table, why_not
from lvmppl.guides.variational import semi_amortized, variational
from lvmppl.heads import DEFAULT_HEADS, HEADS
from lvmppl.options import SVIOptions
from lvmppl.runner import check
from lvmppl.sources import SOURCES
from lvmppl.variational import head_estimators, triples, triples_table

ROOT = Path(__file__).parent.parent

# One latent a datum with a support of each kind; `w` are tokens, for the encoder that reads them.
MODEL = """
import pyro, torch
import pyro.distributions as dist
from lvmppl.distributions import MarkovChain

P = torch.tensor([0.2, 0.5, 0.3])
PRIORS = {
    "binary": lambda: dist.Bernoulli(0.4),
    "finite": lambda: dist.Categorical(P),
    "one_hot": lambda: dist.OneHotCategorical(P),
    "chain": lambda: MarkovChain(P, torch.full((3, 3), 1 / 3), 4),
    "real": lambda: dist.Normal(torch.zeros(5), 1.0).to_event(1),
    "positive": lambda: dist.Gamma(2.0, torch.ones(5)).to_event(1),
    "unit_interval": lambda: dist.Beta(2.0, 3.0 * torch.ones(5)).to_event(1),
    "simplex": lambda: dist.Dirichlet(2.0 * torch.ones(5)),
    "other": lambda: dist.Uniform(-1.0, 2.0).expand([5]).to_event(1),
}

def model(x, w, kind):
    with pyro.plate("data", len(x)):
        discrete = kind in ("binary", "finite", "one_hot", "chain")
        z = pyro.sample("z", PRIORS[kind](), infer={"enumerate": "parallel"} if discrete else {})
        if kind == "chain":
            pyro.sample("x", dist.Normal(P.to(x)[z.long()], 1.0).expand([*z.shape[:-1], 4]).to_event(1), obs=x)
            return
        if kind in ("binary", "one_hot"):
            loc = z if kind == "binary" else z @ P.to(x)
        else:
            loc = P.to(x)[z] if discrete else z.sum(-1)
        pyro.sample("x", dist.Normal(loc.unsqueeze(-1), torch.ones(4).to(x)).to_event(1), obs=x)
"""

KINDS = {
    "chain": "chain",
    "independent_categoricals": "chain",
    "categorical": "finite",
    "bernoulli": "binary",
}
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
SMALL_FLOW = {"use": "flow", "flow": "maf", "transforms": 1, "context": 2, "flow_hidden": [4]}
KINDS |= {"lognormal": "positive", "gamma": "positive", "beta": "unit_interval", "dirichlet": "simplex"}


def write_experiment(folder: Path, head: object, kind: str, estimator: str) -> Path:
    random = np.random.default_rng(0)
    np.savez(folder / "rows.npz", x=random.normal(size=(3, 4)), w=random.integers(0, 6, size=(3, 4)))
    (folder / "own.py").write_text(MODEL, encoding="utf-8")
    reads = {"table": "", "mlp": ", inputs: [x]", "gru": ", inputs: [x]", "bag_of_words": ", inputs: [w]"}
    fits = "\n".join(
        f"  {source}: {{algorithm: svi, max_steps: 20, estimator: {estimator}, guide: {{use: variational, "
        f"args: {{head: {json.dumps(head)}, source: {source}, hidden: [2]{reads[source]}}}}}}}"
        for source in SOURCES
    )
    path = folder / "pairs.yaml"
    path.write_text(
        f"name: pairs\ndata: {{source: rows.npz, columns: {{x: x, w: w}}}}\n"
        f"model: {{use: 'own.py:model', args: {{kind: {kind}}}}}\nfits:\n{fits}\n",
        encoding="utf-8",
    )
    return path


def data_of(rows: Path) -> dict[str, torch.Tensor]:
    with np.load(rows) as found:
        return {name: torch.as_tensor(found[name]) for name in ("x", "w")}


@pytest.mark.parametrize("head", [h for h in HEADS if h != "summed"])
def test_every_head_source_and_estimator_of_the_table_is_checked_and_fitted(
    head: str, tmp_path: Path
) -> None:
    if head == "flow":
        pytest.importorskip("zuko")
    spec = SMALL_FLOW if head == "flow" else head
    supports = head_estimators(head)
    assert [(s, e) for h, s, e in triples() if h == head] == [(s, e) for s in SOURCES for e in supports]
    for estimator, served in supports.items():
        usual = KINDS.get(head, "real")
        kind = usual if usual in served else sorted(served)[0]
        experiment = write_experiment(tmp_path, spec, kind, estimator)
        lines = {subject: (ok, text) for subject, ok, text in check(experiment)}
        data = data_of(tmp_path / "rows.npz")
        own: dict[str, object] = {}
        exec(MODEL, own)
        model = own["model"]
        assert callable(model)
        for source in SOURCES:
            ok, text = lines[f"fit {source}"]
            assert ok and f"z: {estimator}" in text
            fit = lvmppl.fit(
                lambda x, w, model=model, kind=kind: model(x, w, kind),
                data,
                algorithm="svi",
                guide=lambda model, source=source: variational(
                    model,
                    spec,
                    source,
                    hidden=[2],
                    inputs=[] if source == "table" else ["wx"[source != "bag_of_words"]],
                ),
                max_steps=20,
                estimator=estimator,
            )
            assert fit.status == "max_steps" and math.isfinite(fit.elbo) != (head == "point")
            if fit.log_evidence_kind == "exact" and head != "point":
                assert fit.elbo <= fit.log_evidence + 4 * (fit.elbo_error or 0.0) + 1e-9


def built(head: object, kind: str, source: str = "table", steps: int = 0, through: bool = True) -> Problem:
    own: dict[str, Any] = {}
    exec(MODEL, own)
    data = {"x": X, "w": torch.arange(12).reshape(3, 4) % 6}

    def guide(model: Any) -> Any:
        if steps:
            return semi_amortized(model, head, source, hidden=[2], steps=steps, rate=0.001, through=through)
        return variational(model, head, source, hidden=[2])

    return build_problem(
        "fit", lambda x, w: own["model"](x, w, kind), data, guide=guide, guide_takes_model=True
    )


def needs_flow(head: str) -> Any:
    if head == "flow":
        pytest.importorskip("zuko")
    return SMALL_FLOW if head == "flow" else head


@pytest.mark.parametrize("head", HEADS)
def test_every_estimator_outside_of_the_table_is_refused_with_its_reason(head: str) -> None:
    """Every support of a head with every estimator: served as the table says, else refused for the reason it gives."""
    spec, valid = needs_flow(head), head_estimators(head)
    for kind in sorted(HEADS[head].supports):
        if head == "summed":
            with pytest.raises(
                InputError, match="expected a site with a λ, got z alone, summed: left out of q"
            ):
                built(spec, kind)
            continue
        problem = built(spec, kind)
        assert problem.guided is not None and problem.guided.guide_structure is not None
        site = site_kind(problem.guided.guide_structure.sites["z"])
        for estimator in ESTIMATORS:
            options = SVIOptions(estimator=estimator)
            if kind in valid.get(estimator, ()):
                assert [c.estimator for c in choose(problem, options)] == [estimator]
                continue
            why = re.escape(f"got {estimator}: {why_not(estimator, site)}; use ")
            with pytest.raises(InputError, match=f"estimator of site 'z': expected .* {why}"):
                choose(problem, options)


@pytest.mark.parametrize("head", HEADS)
def test_every_support_that_a_head_does_not_serve_is_refused(head: str) -> None:
    spec = needs_flow(head)
    for kind in sorted(set(DEFAULT_HEADS) - HEADS[head].supports):
        with pytest.raises(InputError, match=re.escape(f", got {head}, which is for ")):
            built(spec, kind)


@pytest.mark.parametrize("head", [h for h in HEADS if h != "summed"])
def test_every_head_and_estimator_goes_with_a_refined_encoder(head: str) -> None:
    spec = needs_flow(head)
    for estimator, served in head_estimators(head).items():
        usual = KINDS.get(head, "real")
        kind = usual if usual in served else sorted(served)[0]
        for through in (False, True):
            if through and head in ("gamma", "beta", "dirichlet"):
                with pytest.raises(InputError, match=f"got {head}, whose draw torch differentiates once"):
                    built(spec, kind, "mlp", steps=2, through=through)
                continue
            with isolated(0, torch.get_default_dtype()):  # a draw far in a tail overflows
                problem = built(spec, kind, "mlp", steps=2, through=through)
                objective = Objective(problem, SVIOptions(estimator=estimator))
                leaves = {n: v.clone().requires_grad_() for n, v in problem.initial.items()}
                surrogate = objective(leaves, None, 0).surrogate
            every = torch.autograd.grad(surrogate, list(leaves.values()), allow_unused=True)
            found = [g for g in every if g is not None]  # the masks of a flow have none
            assert f"z: {estimator}" in objective.report()
            assert all(bool(torch.isfinite(g).all()) for g in found)
            assert any(bool((g != 0).any()) for g in found)


def test_objectives_that_do_not_go_with_a_guide_or_an_estimator_are_refused() -> None:
    weighted = {"use": "importance_weighted", "num_samples": 2}
    refused = [
        (built("point", "real"), {"objective": weighted}, "a point at z, which has none"),
        *(
            (built("categorical", "one_hot"), {"objective": weighted, "estimator": e}, "have none under q")
            for e in ("gumbel_softmax", "straight_through")
        ),
        *(
            (built("normal", "real"), {"objective": weighted, **bent}, "no weight on a KL")
            for bent in ({"free_bits": 0.1}, {"kl_weight": 0.5})
        ),
    ]
    for problem, options, words in refused:
        with pytest.raises(InputError, match=words):
            choose(problem, SVIOptions(**options))
    with pytest.raises(InputError, match="an encoder whose λ is refined, got source table"):
        built("normal", "real", "table", steps=2)


def test_page_of_estimators_shows_the_table_of_the_code() -> None:
    assert estimators_table() in (ROOT / "docs" / "estimators.md").read_text(encoding="utf-8")


def test_page_shows_the_table_of_the_code() -> None:
    page = (ROOT / "docs" / "guides.md").read_text(encoding="utf-8")
    assert triples_table() in page
    assert all(f"| `{name}` | {text} |\n" in page for name, text in SOURCES.items())
