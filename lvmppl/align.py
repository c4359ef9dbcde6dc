"""One numbering of the states for all fits, so that a colour means the same component in every picture.

The states of a discrete latent have no order: two fits that found the same components number them
differently. Each fit's states are matched with those of a reference fit by the Hungarian method on the
overlap of their responsibilities.

Shapes: R rows (a datum, or a position of a sequence), K states of the reference, J states of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from lvmppl.tables import thin_out, worst_data

Permutation = NDArray[np.int64]
Key = tuple[str, str, str]  # fit, kind, site

KINDS = ("exact", "mcmc", "variational")  # by trust


def reference_fit(summary: pd.DataFrame) -> str | None:
    """The fit with the highest exact log evidence; without an exact one the highest of any kind, else the
    first fit.
    """
    finite = summary[np.isfinite(summary["log_evidence"].to_numpy(dtype=float))]
    exact = finite[finite["log_evidence_kind"] == "exact"]
    best = exact if len(exact) else finite
    if len(best):
        return str(best.loc[best["log_evidence"].idxmax(), "fit"])
    return str(summary["fit"].iloc[0]) if len(summary) else None


def discrete_sites(posterior: pd.DataFrame) -> dict[Key, pd.DataFrame]:
    """The rows of every discrete site by (fit, kind, site), in the table's order."""
    discrete = posterior[posterior["state"].notna()]
    groups = discrete.groupby(["fit", "kind", "site"], sort=False, observed=True)
    return {(str(f), str(k), str(s)): rows for (f, k, s), rows in groups}


def responsibilities(rows: pd.DataFrame, column: str = "state") -> pd.DataFrame:
    """The probabilities of one (fit, kind, site) as a matrix [R, K]: indexed by (datum, position), a column
    a state.

    `column` may be `label` for the aligned numbering. Rows come in the order of datum and position (as
    numbers); a global site has the datum −1. Entries that the table lacks are NaN.
    """
    datum = rows["datum"].fillna(-1).astype(np.int64).to_numpy()
    position, places = pd.factorize(rows["position"])
    rank = np.empty(len(places), dtype=np.int64)
    rank[sorted(range(len(places)), key=lambda i: _place(str(places[i])))] = np.arange(len(places))
    states = rows[column].astype(np.int64).to_numpy()
    frame = pd.DataFrame(
        {"d": datum, "r": rank[position], "s": states, "p": rows["probability"].to_numpy(dtype=float)}
    )
    matrix = frame.set_index(["d", "r", "s"])["p"].unstack("s").sort_index()
    names = np.empty(len(places), dtype=object)
    names[rank] = [str(p) for p in places]
    data, ranks = (matrix.index.get_level_values(level).to_numpy() for level in ("d", "r"))
    matrix.index = pd.MultiIndex.from_arrays([data, names[ranks]], names=["datum", "position"])
    matrix.columns.name = column
    return matrix


def _place(position: str) -> tuple[int, ...]:
    """`0,12` as numbers, so that position 12 comes after 2."""
    return tuple(int(part) if part.isdigit() else -1 for part in position.split(","))


def align_labels(posterior: pd.DataFrame, reference_fit: str) -> dict[Key, Permutation]:
    """Per (fit, kind, site) the label of each state: `permutation[state]` is the reference's number of that
    component.

    The assignment maximises Σ_k O[k, label⁻¹(k)] with the overlap O[k, j] = Σ_n p_ref(n, k) p_fit(n, j) over
    the rows n that both have. All kinds of one fit get one permutation, from its most trusted kind (exact,
    mcmc, variational): they are posteriors of the same θ, and aligning them one by one would hide a guide
    that swapped two states. States that are left over when a fit has more than the reference are numbered
    on, after the reference's. A site of fewer than two rows keeps its states (one row's overlap says nothing
    about which is which), and a site that the reference lacks is aligned with the first fit that has it.
    """
    sites = discrete_sites(posterior)
    trusted: dict[tuple[str, str], Key] = {}
    for fit, kind, site in sorted(sites, key=lambda key: KINDS.index(key[1])):
        trusted.setdefault((fit, site), (fit, kind, site))
    tables = {pair: responsibilities(sites[key]) for pair, key in trusted.items()}
    result: dict[Key, Permutation] = {}
    for fit, kind, site in sites:
        table = tables[fit, site]
        first = next(f for f, s in tables if s == site)
        reference = tables.get((reference_fit, site), tables[first, site])
        result[fit, kind, site] = _permutation(reference, table, _num_states(sites, fit, site))
    return result


def _num_states(sites: Mapping[Key, pd.DataFrame], fit: str, site: str) -> int:
    return 1 + max(int(rows["state"].max()) for (f, _, s), rows in sites.items() if (f, s) == (fit, site))


def _permutation(reference: pd.DataFrame, table: pd.DataFrame, num_states: int) -> Permutation:
    """[J]: labels that maximise the overlap of `table`'s states with the reference's."""
    num_labels = int(reference.columns.max()) + 1
    shared = reference.index.intersection(table.index)
    if len(shared) < 2 or reference is table:
        return np.arange(num_states, dtype=np.int64)
    p_ref = reference.reindex(index=shared, columns=range(num_labels)).fillna(0.0).to_numpy()  # [R, K]
    p_fit = table.reindex(index=shared, columns=range(num_states)).fillna(0.0).to_numpy()  # [R, J]
    labels, states = linear_sum_assignment(p_ref.T @ p_fit, maximize=True)
    permutation = np.full(num_states, -1, dtype=np.int64)
    permutation[states] = labels
    left_over = permutation < 0
    permutation[left_over] = num_labels + np.arange(left_over.sum())
    return permutation


def with_labels(posterior: pd.DataFrame, permutations: Mapping[Key, Permutation]) -> pd.DataFrame:
    """The posterior with a column `label` (Int64) after `state`: the aligned state, empty where there is
    none.
    """
    label = pd.Series(pd.NA, index=posterior.index, dtype="Int64")
    for key, rows in discrete_sites(posterior).items():
        states = rows["state"].astype(np.int64).to_numpy()
        label.loc[rows.index] = permutations[key][states] if key in permutations else states
    result = posterior.copy(deep=False)
    result.insert(list(posterior.columns).index("state") + 1, "label", label)
    return result


def aligned_posterior(tables: Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame, str]:
    """What pictures and report show: the posterior thinned out around each fit's worst data, with its
    `label` column.

    Returns the frame and the sentence that says what was left out (empty if nothing was).
    """
    shown, note = _shown_posterior(tables)
    reference = reference_fit(tables["summary"]) or ""
    return with_labels(shown, align_labels(shown, reference)), note


def drawn_data(tables: Mapping[str, pd.DataFrame]) -> list[int]:
    """The data that a picture of components shows, ascending: those of sites with one state a datum."""
    shown, _ = _shown_posterior(tables)
    local = shown.loc[shown["state"].notna() & (shown["position"] == ""), "datum"]
    return sorted(int(datum) for datum in local.dropna().unique())


def _shown_posterior(tables: Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame, str]:
    fits = tables["gaps"]["fit"].unique()
    worst = (
        pd.concat([worst_data(tables["gaps"], fit)["datum"] for fit in fits])
        if len(fits)
        else pd.Series(dtype="Int64")
    )
    return thin_out(tables["posterior"], keep=worst.astype(np.int64))
