"""Mean-field bound of latent Dirichlet allocation per word: coordinate ascent here against scikit-learn, at equal time.

scikit-learn's fit runs first (batch variational Bayes, the same α, η and number of topics); its topics and documents are
then scored under the bound of this library, q(z) at its optimum. Ours runs for as long as scikit-learn took. Either ends
in whichever optimum is near its start, so that one start says little: both begin at the same random topics, of several.

    python benchmarks/lda.py [ITERATIONS] [STARTS]
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
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
    iterations, starts = (int(a) for a in [*sys.argv[1:], *("20", "5")[len(sys.argv) - 1 :]])
    table = read_shipped("lee_background", {"form": "terms", "min_count": 3})
    terms, counts = (torch.as_tensor(table.blocks[n].array) for n in ("terms", "counts"))
    size, words = int(terms.max()) + 1, float(counts.sum())
    dense = torch.zeros(len(terms), size, dtype=torch.float64).scatter_add_(1, terms, counts.double())
    found: list[tuple[float, float, float, int]] = []
    with isolated(0, torch.float64), unvalidated():
        model = functools.partial(lda, num_topics=TOPICS, num_terms=size, alpha=ALPHA, eta=ETA)
        data = {"terms": terms, "counts": counts}
        problem = build_problem("lda", model, data, guide=mean_field, guide_takes_model=True)
        closed = closed_phases(problem, VEMOptions(e_steps=5))
        closed.e_phase({**closed.problem.initial, **closed.scattered(0)})
        for start in range(starts):
            found.append(_race(closed, dense, words, iterations, start))
    print(f"{len(terms)} documents, {size} terms, {words:.0f} words, {TOPICS} topics")
    print("start   seconds each   scikit-learn        lvmppl (nats a word)")
    for start, (budget, peer, own, sweeps) in enumerate(found):
        print(f"{start:5d} {budget:14.2f} {peer:14.4f} {own:13.4f} in {sweeps} rounds")
    budget, peer, own, _ = (statistics.mean(column) for column in zip(*found, strict=True))
    print(f" mean {budget:14.2f} {peer:14.4f} {own:13.4f}")


def _race(
    closed: ClosedPhases, dense: Tensor, words: float, iterations: int, start: int
) -> tuple[float, float, float, int]:
    """(seconds of each, scikit-learn's bound, ours, our rounds) from one random start."""
    peer = LatentDirichletAllocation(
        TOPICS,
        doc_topic_prior=ALPHA,
        topic_word_prior=ETA,
        learning_method="batch",
        max_iter=iterations,
        random_state=start,
    )
    begin = time.perf_counter()
    peer.fit(dense.numpy())
    budget = time.perf_counter() - begin
    documents = peer._e_step(dense.numpy(), cal_sstats=False, random_init=False)[0]
    # as scikit-learn's fit begins
    topics = np.random.RandomState(start).gamma(100.0, 0.01, peer.components_.shape)
    begin, sweeps = time.perf_counter(), 0
    values = dict(closed.problem.initial)
    values["topics_concentration"] = torch.as_tensor(topics).reshape(values["topics_concentration"].shape)
    local = replace(closed.e, blocks=closed.e.local)
    values.update({n: v for n, v in Sweep(local, values).run(5).items() if n in local.names})
    while time.perf_counter() - begin < budget:
        values.update(closed.e_phase(values))
        sweeps += 1
    theirs = dict(closed.problem.initial)
    for name, table in (
        ("topics_concentration", peer.components_),
        ("proportions_concentration", documents),
    ):
        theirs[name] = torch.as_tensor(table).reshape(theirs[name].shape)
    last = replace(closed.e, blocks=tuple(b for b in closed.e.blocks if b.site == "z"))
    other = bound(closed, Sweep(last, theirs).run(1), words)
    return budget, other, bound(closed, values, words), sweeps


if __name__ == "__main__":
    main()
