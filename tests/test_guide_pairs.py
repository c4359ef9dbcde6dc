"""The table of heads and sources: every pair in it is checked and fitted, and the page shows this very table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import lvmppl
from lvmppl.errors import InputError
from lvmppl.estimators import ESTIMATORS
from lvmppl.guides.variational import variational
from lvmppl.heads import HEADS
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


@pytest.mark.parametrize("head", [h for h in HEADS if h not in ("summed", "flow")])
def test_every_estimator_that_is_not_in_the_table_is_refused_with_a_reason(head: str, tmp_path: Path) -> None:
    valid = head_estimators(head)
    for estimator in ESTIMATORS:
        kind = KINDS.get(head, "real")
        if estimator in valid and kind in valid[estimator]:
            continue
        experiment = write_experiment(tmp_path, head, kind, estimator)
        with pytest.raises(InputError, match=f"estimator of site 'z': expected .* got {estimator}: .*; use "):
            check(experiment)


def test_page_shows_the_table_of_the_code() -> None:
    page = (ROOT / "docs" / "guides.md").read_text(encoding="utf-8")
    assert triples_table() in page
    assert all(f"| `{name}` | {text} |\n" in page for name, text in SOURCES.items())
