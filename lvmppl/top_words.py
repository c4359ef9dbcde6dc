"""The most probable words in every row of a table over the vocabulary of the data: topics in a form to be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from lvmppl.align import KINDS

WORDS = 8


class Words(NamedTuple):
    """A row of a table over words: its index, its most probable words, and those that set it apart from the others."""

    row: str
    probable: list[tuple[str, float]]  # with their probabilities
    apart: list[tuple[str, float]]


def top_words(
    tables: Mapping[str, pd.DataFrame], vocabulary: Sequence[str], count: int = WORDS
) -> list[tuple[str, list[Words]]]:
    """Per table over the vocabulary ("fit: name", rows): the `count` first words of every row, in two orders.

    A table is a parameter of θ, or the posterior mean of a global site, whose last axis is as long as the vocabulary and
    whose rows β_k are probabilities. Words that set a row apart have the highest β_kv log(β_kv / (Π_j β_jv)^(1/K)) (the
    term score of Blei & Lafferty 2009, eq. 4.3).
    """
    found = []
    for name, rows in _candidates(tables) if vocabulary else ():
        table = _over_words(rows, len(vocabulary))
        if table is not None:
            beta = table.to_numpy()
            logs = np.log(np.maximum(beta, np.finfo(float).tiny))
            orders = [
                np.argsort(-by, axis=1, kind="stable")[:, :count]
                for by in (beta, beta * (logs - logs.mean(0)))
            ]
            shown = []
            for k, index in enumerate(table.index):
                probable, apart = ([(vocabulary[v], float(beta[k, v])) for v in order[k]] for order in orders)
                shown.append(Words(str(index), probable, apart))
            found.append((name, shown))
    return found


def _candidates(tables: Mapping[str, pd.DataFrame]) -> Iterator[tuple[str, pd.DataFrame]]:
    """(what it is, rows with `position` and `value`) of every parameter and of every global site's most trusted mean."""
    for (fit, name), rows in tables["parameters"].groupby(["fit", "parameter"], sort=False):
        yield f"{fit}: {name}", rows
    posterior = tables["posterior"]
    local = posterior["datum"].notna() | posterior["mean"].isna()
    for (fit, site), rows in posterior[~local].groupby(["fit", "site"], sort=False):
        kind = next(k for k in KINDS if k in set(rows["kind"]))
        yield f"{fit}: {site} ({kind} mean)", rows[rows["kind"] == kind].rename(columns={"mean": "value"})


def _over_words(rows: pd.DataFrame, size: int) -> pd.DataFrame | None:
    """[rows, V] of a table of probabilities over V words, None if it is none."""
    parts = rows["position"].str.rpartition(",")
    words = pd.to_numeric(parts[2], errors="coerce")
    if words.isna().any() or words.nunique() != size or words.max() != size - 1:
        return None
    frame = pd.DataFrame(
        {"row": parts[0].to_numpy(), "word": words.to_numpy(), "value": rows["value"].to_numpy()}
    )
    order = list(dict.fromkeys(frame["row"]))
    table = frame.pivot(index="row", columns="word", values="value").loc[order]
    values = table.to_numpy(dtype=float)
    ones = np.isclose(values.sum(axis=1), 1.0, rtol=0, atol=1e-3).all()
    return table if ones and bool((values >= 0).all()) else None


__all__ = ["top_words"]
