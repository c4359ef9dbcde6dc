"""Mean-field bound of latent Dirichlet allocation per word: coordinate ascent here against scikit-learn, at equal time.

scikit-learn's fit runs first (batch variational Bayes, the same α, η and number of topics); its topics and documents are
then scored under the bound of this library, q(z) at its optimum. Ours runs for as long as scikit-learn took.

    python benchmarks/lda.py [ITERATIONS]
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from sklearn.decomposition import LatentDirichletAllocation
from torch import Tensor

from lvmppl.algorithms.closed_phases import ClosedPhases, closed_phases
from lvmppl.algorithms.problem import build_problem
from lvmppl.algorithms.stepper import batch_elbo
from lvmppl.algorithms.sweep import Sweep
from lvmppl.data.shipped import read_shipped
from lvmppl.density import isolated, unvalidated
from lvmppl.guides.variational import mean_field
from lvmppl.models.lda import lda
from lvmppl.options import VEMOptions

TOPICS, ALPHA, ETA = 10, 0.1, 0.1


def bound(closed: ClosedPhases, values: Mapping[str, Tensor], words: float) -> float:
    """The ELBO per word in nats."""
    guided = closed.problem.guided
    assert guided is not None
    with torch.no_grad():
        return float(batch_elbo(closed.problem, guided, values, None)) / words


def main() -> None:
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    table = read_shipped("lee_background", {"form": "terms", "min_count": 3})
    terms, counts = (torch.as_tensor(table.blocks[n].array) for n in ("terms", "counts"))
    size, words = int(terms.max()) + 1, float(counts.sum())
    dense = torch.zeros(len(terms), size, dtype=torch.float64).scatter_add_(1, terms, counts.double())
    peer = LatentDirichletAllocation(
        TOPICS,
        doc_topic_prior=ALPHA,
        topic_word_prior=ETA,
        learning_method="batch",
        max_iter=iterations,
        random_state=0,
    )
    begin = time.perf_counter()
    peer.fit(dense.numpy())
    budget = time.perf_counter() - begin
    documents = peer._e_step(dense.numpy(), cal_sstats=False, random_init=False)[0]
    with isolated(0, torch.float64), unvalidated():
        model = functools.partial(lda, num_topics=TOPICS, num_terms=size, alpha=ALPHA, eta=ETA)
        data = {"terms": terms, "counts": counts}
        problem = build_problem("lda", model, data, guide=mean_field, guide_takes_model=True)
        closed = closed_phases(problem, VEMOptions(e_steps=5))
        begin, sweeps = time.perf_counter(), 0
        values = {**closed.problem.initial, **closed.scattered(0)}
        while time.perf_counter() - begin < budget:
            values.update(closed.e_phase(values))
            sweeps += 1
        own = bound(closed, values, words)
        theirs = dict(closed.problem.initial)
        theirs["topics_concentration"] = torch.as_tensor(peer.components_).reshape(
            theirs["topics_concentration"].shape
        )
        theirs["proportions_concentration"] = torch.as_tensor(documents).reshape(
            theirs["proportions_concentration"].shape
        )
        last = replace(closed.e, blocks=tuple(b for b in closed.e.blocks if b.site == "z"))
        other = bound(closed, Sweep(last, theirs).run(1), words)
    print(f"{len(terms)} documents, {size} terms, {words:.0f} words, {TOPICS} topics, {budget:.1f} s each")
    print(f"scikit-learn, {iterations} iterations: {other:.4f} nats a word")
    print(f"lvmppl, {sweeps} rounds:              {own:.4f} nats a word")


if __name__ == "__main__":
    main()
