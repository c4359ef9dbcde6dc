"""Data that comes with installed packages: nothing is downloaded.

Column names are in snake_case. The features of a scikit-learn set also go by one name, `measurements` or
`pixels`.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lvmppl.data.table import Block, Column, Table
from lvmppl.errors import InputError
from lvmppl.wording import nearest, shown


def read_shipped(name: str, args: Mapping[str, Any]) -> Table:
    """The table of a shipped source; raises InputError for arguments that it does not take."""
    return READERS[name](name, args)


def refuse_arguments(name: str, args: Mapping[str, Any], known: tuple[str, ...] = ()) -> None:
    """Raises InputError for the first argument that is not known."""
    for key in args:
        if key not in known:
            expected = f"an argument of {name} ({', '.join(known)})" if known else f"no arguments for {name}"
            raise InputError(
                f"data.args.{key}", expected, shown(args[key]), nearest(key, known) or "leave it out"
            )


def _snake_case(name: str) -> str:
    return re.sub(r"\W+", "_", re.sub(r"\(.*\)", "", name).strip()).lower()


def _read_sklearn(name: str, args: Mapping[str, Any], features: str, target: str) -> Table:
    from sklearn import datasets

    refuse_arguments(name, args)
    bunch = getattr(datasets, f"load_{name}")()
    names = tuple(_snake_case(str(feature)) for feature in bunch.feature_names)
    columns: dict[str, Column] = {column: bunch.data[:, i] for i, column in enumerate(names)}
    return Table(name, {**columns, target: bunch.target}, {features: Block(bunch.data, names)})


def _read_statsmodels(name: str, args: Mapping[str, Any], value: str) -> Table:
    refuse_arguments(name, args)
    frame = importlib.import_module(f"statsmodels.datasets.{name}").load_pandas().data
    year, series = (frame[column].to_numpy() for column in frame.columns)
    return Table(name, {"year": year.astype(np.int64), value: series})


def _read_lee(name: str, args: Mapping[str, Any]) -> Table:
    """300 news texts of the Australian Broadcasting Corporation (Lee, Pincombe & Welsh 2005), lower-cased
    words.

    args: `form: tokens` gives `tokens` [N, L], word numbers padded with 0, and `lengths` [N]; `form: counts`
    gives `counts` [N, V], whose columns are the words; `form: terms` gives `terms` [N, U], the distinct words of each
    text padded with 0, and `counts` [N, U], how often each occurs there (0 for padding). Word 0 is the most frequent,
    ties by alphabet.
    `min_count` drops
    words that occur less often in all texts together; `max_vocab` keeps the most frequent.
    """
    refuse_arguments(name, args, ("form", "min_count", "max_vocab"))
    form = args.get("form", "tokens")
    forms = ("tokens", "counts", "terms")
    if form not in forms:
        raise InputError("data.args.form", "tokens, counts or terms", shown(form), nearest(form, forms))
    min_count, max_vocab = _whole(args, "min_count", 2), _whole(args, "max_vocab", None)
    texts = _lee_texts()
    totals = Counter(word for text in texts for word in text)
    ranked = sorted(
        (word for word in totals if totals[word] >= (min_count or 1)), key=lambda w: (-totals[w], w)
    )
    vocabulary = {word: number for number, word in enumerate(ranked[:max_vocab])}
    rows = [[vocabulary[word] for word in text if word in vocabulary] for text in texts]
    for number, row in enumerate(rows):
        if not row:
            fix = "lower min_count or raise max_vocab"
            raise InputError(
                "data.args", f"a word left in every text of {name}", f"none in text {number + 1}", fix
            )
    if form == "counts":
        counts = np.stack([np.bincount(row, minlength=len(vocabulary)) for row in rows])  # [N, V]
        words: dict[str, Column] = {word: counts[:, number] for word, number in vocabulary.items()}
        return Table(
            name, words, {"counts": Block(counts, tuple(vocabulary))}, ("counts",), tuple(vocabulary)
        )
    if form == "terms":
        distinct = [np.unique(row, return_counts=True) for row in rows]
        width = max(len(words) for words, _ in distinct)
        terms, counts = (
            np.stack([np.pad(pair[i], (0, width - len(pair[i]))) for pair in distinct]) for i in (0, 1)
        )
        blocks = {"terms": Block(terms), "counts": Block(counts)}
        return Table(name, {}, blocks, ("terms", "counts"), tuple(vocabulary))
    lengths = np.array([len(row) for row in rows])
    tokens = np.stack([np.pad(row, (0, int(lengths.max()) - len(row))) for row in rows])  # [N, L]
    columns: dict[str, Column] = {"lengths": lengths}
    return Table(name, columns, {"tokens": Block(tokens)}, ("tokens", "lengths"), tuple(vocabulary))


def _lee_texts() -> list[list[str]]:
    try:
        from gensim.test.utils import datapath
        from gensim.utils import simple_preprocess
    except ImportError:
        fix = "pip install 'lvmppl[text]'"
        raise InputError(
            "data.source", "gensim, which lee_background comes with", "none installed", fix
        ) from None
    lines = Path(datapath("lee_background.cor")).read_text(encoding="utf-8").splitlines()
    return [simple_preprocess(line) for line in lines]


def _whole(args: Mapping[str, Any], key: str, default: int | None) -> int | None:
    value = args.get(key, default)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise InputError(f"data.args.{key}", "a whole number of at least 1", shown(value), "")
    return value


READERS: dict[str, Callable[[str, Mapping[str, Any]], Table]] = {
    "breast_cancer": partial(_read_sklearn, features="measurements", target="benign"),
    "diabetes": partial(_read_sklearn, features="measurements", target="progression"),
    "digits": partial(_read_sklearn, features="pixels", target="digit"),
    "iris": partial(_read_sklearn, features="measurements", target="species"),
    "lee_background": _read_lee,
    "nile": partial(_read_statsmodels, value="volume"),
    "sunspots": partial(_read_statsmodels, value="activity"),
    "wine": partial(_read_sklearn, features="measurements", target="cultivar"),
}
