from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from iris_tables import iris_tables, posterior_rows

from lvmppl import align, tables


def simplex(rng: np.random.Generator, num_rows: int, num_states: int) -> np.ndarray:
    return rng.dirichlet(np.full(num_states, 0.3), size=num_rows)


def brute_force(p_ref: np.ndarray, p_fit: np.ndarray) -> tuple[int, ...]:
    """The permutation of the fit's states with the largest overlap, by trying all."""
    overlap = p_ref.T @ p_fit
    states = range(p_fit.shape[1])
    return max(itertools.permutations(states), key=lambda labels: sum(overlap[labels[j], j] for j in states))


def test_labels_equal_brute_force_assignment() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        p_ref, p_fit = simplex(rng, 7, 4), simplex(rng, 7, 4)
        frame = pd.concat(
            [posterior_rows("a", "exact", p_ref), posterior_rows("b", "exact", p_fit)], ignore_index=True
        )
        permutations = align.align_labels(frame, "a")
        assert permutations["a", "exact", "z"].tolist() == [0, 1, 2, 3]
        assert tuple(permutations["b", "exact", "z"].tolist()) == brute_force(p_ref, p_fit)


def test_aligned_iris_equals_reference_responsibilities() -> None:
    frames = iris_tables()
    frame, note = align.aligned_posterior(frames)
    assert note == "" and len(frame) == len(frames["posterior"])
    sites = align.discrete_sites(frame)
    reference = align.responsibilities(sites["em", "exact", "z"], "state")
    for fit in ("enumeration", "local", "amortized"):
        aligned = align.responsibilities(sites[fit, "exact", "z"], "label")
        np.testing.assert_allclose(aligned.to_numpy(), reference.to_numpy(), rtol=0, atol=1e-15)
        own = align.responsibilities(sites[fit, "exact", "z"], "state")
        assert np.abs(own.to_numpy() - reference.to_numpy()).max() > 0.5


def test_guide_that_swapped_two_states_keeps_the_exact_labels() -> None:
    p = simplex(np.random.default_rng(1), 9, 3)
    swapped = posterior_rows("a", "variational", p[:, [1, 0, 2]])
    frame = pd.concat(
        [swapped, posterior_rows("a", "exact", p), posterior_rows("r", "exact", p[:, [2, 0, 1]])],
        ignore_index=True,
    )
    permutations = align.align_labels(frame, "r")
    assert (
        permutations["a", "variational", "z"].tolist()
        == permutations["a", "exact", "z"].tolist()
        == [1, 2, 0]
    )


@pytest.mark.parametrize("num_ref, num_fit", [(3, 5), (5, 3)])
def test_different_numbers_of_states_give_distinct_labels(num_ref: int, num_fit: int) -> None:
    states = np.arange(30) % min(num_ref, num_fit)
    p_ref, p_fit = np.eye(num_ref)[states], np.eye(num_fit)[num_fit - 1 - states]
    frame = pd.concat(
        [posterior_rows("r", "exact", p_ref), posterior_rows("b", "exact", p_fit)], ignore_index=True
    )
    labels = align.align_labels(frame, "r")["b", "exact", "z"].tolist()
    assert len(set(labels)) == num_fit
    assert [labels[num_fit - 1 - k] for k in range(3)] == [0, 1, 2]
    if num_fit > num_ref:
        assert sorted(labels) == [0, 1, 2, 3, 4] and labels[:2] == [3, 4]


def test_single_row_and_missing_site_keep_their_states() -> None:
    one = pd.concat(
        [
            posterior_rows("r", "exact", np.array([[0.9, 0.1]])),
            posterior_rows("b", "exact", np.array([[0.1, 0.9]])),
        ]
    )
    other = posterior_rows("b", "exact", np.eye(3), site="w")
    frame = pd.concat([one, other], ignore_index=True)
    labelled = align.with_labels(frame, align.align_labels(frame, "r"))
    assert (labelled["label"] == labelled["state"]).all()
    assert align.align_labels(tables.empty("posterior"), "r") == {}


def test_label_is_empty_for_continuous_sites_and_nan_rows_do_not_count() -> None:
    p = np.array([[0.9, 0.1], [0.2, 0.8], [np.nan, np.nan]])
    frame = pd.concat(
        [posterior_rows("r", "exact", p), posterior_rows("b", "exact", p[:, ::-1])], ignore_index=True
    )
    frame.loc[len(frame)] = ["b", "exact", "h", 0, "", None, None, 1.0, 2.0]
    frame = tables.validate("posterior", frame)
    labelled = align.with_labels(frame, align.align_labels(frame, "r"))
    assert list(labelled.columns)[5:7] == ["state", "label"] and str(labelled["label"].dtype) == "Int64"
    assert labelled["label"].tolist()[:-1] == [0, 1] * 3 + [1, 0] * 3
    assert labelled["label"].isna().tolist()[-1]


def test_rows_of_a_sequence_are_in_numerical_order() -> None:
    positions = ["0", "10", "2", "1,3"]
    frame = pd.concat(
        [posterior_rows("r", "exact", np.eye(2)[::-1]).assign(position=p) for p in positions],
        ignore_index=True,
    )
    matrix = align.responsibilities(frame)
    assert list(matrix.index) == [(n, p) for n in (0, 1) for p in ("0", "1,3", "2", "10")]
    assert matrix.to_numpy().tolist() == [[0.0, 1.0]] * 4 + [[1.0, 0.0]] * 4


def test_reference_fit_is_best_exact_then_best_then_first() -> None:
    summary = tables.empty("summary").reindex(range(4))
    summary["fit"] = ["a", "b", "c", "d"]
    assert align.reference_fit(summary.assign(log_evidence_kind="none")) == "a"
    summary["log_evidence"] = [-3.0, -2.0, np.nan, -1.0]
    assert align.reference_fit(summary.assign(log_evidence_kind="estimate")) == "d"
    assert (
        align.reference_fit(summary.assign(log_evidence_kind=["exact", "exact", "exact", "estimate"])) == "b"
    )
    assert align.reference_fit(tables.empty("summary")) is None
