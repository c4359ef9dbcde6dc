"""The words of the highest probability, in the report of a run over a vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lvmppl import tables
from lvmppl.data import load
from lvmppl.report import write_report
from lvmppl.spec import DataSpec
from lvmppl.top_words import top_words

WORDS = ("a", "b", "c", "d", "e")
TOPICS = np.array([[0.1, 0.5, 0.05, 0.05, 0.3], [0.3, 0.02, 0.4, 0.2, 0.08], [0.2, 0.2, 0.2, 0.2, 0.2]])


def frames(topics: np.ndarray, site: bool) -> dict[str, pd.DataFrame]:
    """A run with one table of probabilities, as a parameter or as the posterior mean of a global site, rows shuffled."""
    entries = [(f"{k},{v}", topics[k, v]) for k in range(len(topics)) for v in range(topics.shape[1])]
    position, values = zip(*entries, strict=True)
    made = {name: tables.empty(name) for name in tables.SCHEMAS}
    if site:
        rows = pd.DataFrame({"fit": "f", "kind": "variational", "site": "topics", "position": position})
        rows["mean"] = values
        rows = rows.assign(datum=pd.NA, state=pd.NA, probability=np.nan, sd=0.1)
        made["posterior"] = tables.validate("posterior", rows.sample(frac=1.0, random_state=0))
    else:
        rows = pd.DataFrame({"fit": "f", "parameter": "topics", "position": position, "value": values})
        made["parameters"] = tables.validate("parameters", rows)
    return made


def by_hand(scores: np.ndarray, count: int) -> list[list[tuple[str, float]]]:
    """The words of each row in the order of their scores, with their probabilities."""
    ranked = [sorted(range(len(WORDS)), key=lambda v, row=row: -row[v]) for row in scores.tolist()]
    return [[(WORDS[v], TOPICS[k, v]) for v in row[:count]] for k, row in enumerate(ranked)]


def test_top_words_of_a_parameter_and_of_a_posterior_mean_equal_a_sort_of_each_row() -> None:
    score = TOPICS * np.log(TOPICS / np.prod(TOPICS, axis=0) ** (1 / len(TOPICS)))
    for site, name in ((False, "f: topics"), (True, "f: topics (variational mean)")):
        ((found, rows),) = top_words(frames(TOPICS, site), WORDS, 3)
        assert found == name and sorted(row.row for row in rows) == ["0", "1", "2"]
        for row in rows:
            assert row.probable == by_hand(TOPICS, 3)[int(row.row)]
            assert row.apart == by_hand(score, 3)[int(row.row)]
    assert by_hand(TOPICS, 3) != by_hand(score, 3)


def test_table_that_is_not_over_the_vocabulary_has_no_words() -> None:
    for topics, words in ((TOPICS[:, :4], WORDS), (3 * TOPICS, WORDS), (TOPICS, WORDS[:4]), (TOPICS, ())):
        assert top_words(frames(topics, True), words) == []


def test_words_of_a_text_source_reach_the_report(tmp_path: Path) -> None:
    """Word v of the vocabulary is the v-th most frequent one: the columns of the counts, added up, fall."""
    data = [
        load(
            DataSpec(source="lee_background", args={"form": form, "max_vocab": 5}), tmp_path, torch.float64, 0
        )
        for form in ("counts", "terms", "tokens")
    ]
    assert len({d.vocabulary for d in data}) == 1 and len(data[0].vocabulary) == 5
    assert data[0].vocabulary == data[0].columns["counts"]
    assert bool((data[0].tensors["counts"].sum(0).diff() <= 0).all())
    page = write_report(tmp_path, frames(TOPICS, True), [], {}, "", data[1].vocabulary).read_text("utf-8")
    assert f"{data[1].vocabulary[1]} <small" in page and ">50.0</small>" in page and 'href="#words"' in page
