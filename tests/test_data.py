"""Sources, files, sequences, the split and standardisation, against the libraries they come from."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from sklearn import datasets

from lvmppl.data import SOURCES, Dataset, load
from lvmppl.data.shipped import READERS, read_shipped


@dataclass(frozen=True)
class Spec:
    """What an experiment says of its data, without the file that says it."""

    source: str
    columns: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    standardize: bool = False
    test_fraction: float = 0.0
    sequence: str | None = None
    time: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)


def read(source: str, base: Path = Path(), dtype: torch.dtype = torch.float64, **options: Any) -> Dataset:
    return load(Spec(source, **options), base, dtype, seed=3)


def assert_holds(tensor: torch.Tensor, expected: npt.ArrayLike) -> None:
    """Same shape, kind and values, exactly."""
    wanted = np.asarray(expected)
    assert tensor.shape == wanted.shape
    assert tensor.dtype == torch.from_numpy(np.zeros(0, wanted.dtype)).dtype
    np.testing.assert_array_equal(tensor.numpy(), wanted)


# The shipped sources


@pytest.mark.parametrize(
    ("name", "block", "target"),
    [
        ("iris", "measurements", "species"),
        ("wine", "measurements", "cultivar"),
        ("breast_cancer", "measurements", "benign"),
        ("diabetes", "measurements", "progression"),
        ("digits", "pixels", "digit"),
    ],
)
def test_shipped_features_and_target_equal_sklearn(name: str, block: str, target: str) -> None:
    features, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    data = read(name, columns={"x": block, "y": target})
    assert_holds(data.tensors["x"], features)
    assert_holds(data.tensors["y"], labels)
    assert data.num_rows == len(features)
    assert len(data.columns["x"]) == features.shape[1]
    assert all(column.isidentifier() and column == column.lower() for column in data.columns["x"])


@pytest.mark.parametrize(("name", "column"), [("nile", "volume"), ("sunspots", "activity")])
def test_shipped_series_equals_statsmodels(name: str, column: str) -> None:
    import statsmodels.api as sm

    frame = getattr(sm.datasets, name).load_pandas().data
    data = read(name, columns={"x": column, "when": "year"})
    assert_holds(data.tensors["x"], frame.iloc[:, 1].to_numpy())
    assert_holds(data.tensors["when"], frame.iloc[:, 0].to_numpy(np.int64))


def test_shipped_names_equal_catalogue() -> None:
    assert set(SOURCES) == set(READERS)


@pytest.mark.parametrize("name", SOURCES)
def test_listed_columns_of_a_shipped_source_are_all_its_numbers(name: str) -> None:
    """Each can be had by its name, and a column that is not listed is part of one that is."""
    _, listed = SOURCES[name]
    data = read(name, columns={column: column for column in listed})
    covered = {inner for column in listed for inner in (column, *data.columns[column])}
    table = read_shipped(name, {})
    assert set(table.columns) | set(table.blocks) <= covered


def test_columns_by_list_name_block_and_pattern_equal_sklearn() -> None:
    features = datasets.load_iris().data
    chosen = {
        "one": "petal_width",
        "column": ["petal_width"],
        "pair": ["petal_width", "sepal_length"],
        "pattern": "petal_*",
        "block": ["measurements"],
        "mixed": ["species", "sepal_width"],
    }
    data = read("iris", columns=chosen)
    assert_holds(data.tensors["one"], features[:, 3])
    assert_holds(data.tensors["column"], features[:, [3]])
    assert_holds(data.tensors["pair"], features[:, [3, 0]])
    assert_holds(data.tensors["pattern"], features[:, 2:])
    assert_holds(data.tensors["block"], features)
    assert_holds(data.tensors["mixed"], np.c_[datasets.load_iris().target, features[:, 1]])
    assert data.columns["one"] == ("petal_width",)
    assert data.columns["pattern"] == ("petal_length", "petal_width")


def lee_words() -> list[list[str]]:
    from gensim.test.utils import datapath
    from gensim.utils import simple_preprocess

    lines = Path(datapath("lee_background.cor")).read_text(encoding="utf-8").splitlines()
    return [simple_preprocess(line) for line in lines]


def test_lee_counts_equal_gensim_dictionary() -> None:
    from gensim.corpora import Dictionary

    texts = lee_words()
    dictionary = Dictionary(texts)
    data = read("lee_background", args={"form": "counts", "min_count": 5})
    words = data.columns["counts"]
    assert set(words) == {dictionary[i] for i, total in dictionary.cfs.items() if total >= 5}
    totals = [dictionary.cfs[dictionary.token2id[word]] for word in words]
    assert totals == sorted(totals, reverse=True)
    expected = np.zeros((len(texts), len(words)), np.int64)
    position = {dictionary.token2id[word]: i for i, word in enumerate(words)}
    for row, text in enumerate(texts):
        for word, count in dictionary.doc2bow(text):
            if word in position:
                expected[row, position[word]] = count
    assert_holds(data.tensors["counts"], expected)


def test_lee_tokens_spell_the_texts() -> None:
    args = {"min_count": 3, "max_vocab": 700}
    data = read("lee_background", args=args, columns={"x": "tokens", "n": "lengths"})
    words = read("lee_background", args={"form": "counts", **args}).columns["counts"]
    assert len(words) == len(set(words)) == 700
    tokens, lengths = data.tensors["x"], data.tensors["n"]
    assert tokens.shape == (300, int(lengths.max()))
    for row, text in enumerate(lee_words()):
        spelled = [words[i] for i in tokens[row, : lengths[row]].tolist()]
        assert spelled == [word for word in text if word in words]
        assert not tokens[row, lengths[row] :].any()


# Files


FRAME = pd.DataFrame(
    {
        "a": [0.1, -2.5, 1e-300, 3.0],
        "n": [3, -1, 2**40, 0],
        "flag": [True, False, True, True],
        "who": list("wxyz"),
    }
)


def write_table(path: Path) -> None:
    FRAME.to_csv(path, index=False) if path.suffix == ".csv" else FRAME.to_parquet(path)


@pytest.mark.parametrize("name", ["table.csv", "table.parquet", "TABLE.CSV"])
def test_table_file_round_trips(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / name) if name.islower() else FRAME.to_csv(tmp_path / name, index=False)
    data = read(name, tmp_path, columns={"x": ["a"], "n": "n", "flag": "flag", "mixed": ["n", "a"]})
    assert_holds(data.tensors["x"], FRAME[["a"]].to_numpy())
    assert_holds(data.tensors["n"], FRAME["n"].to_numpy())
    assert_holds(data.tensors["flag"], FRAME["flag"].to_numpy())
    assert_holds(data.tensors["mixed"], FRAME[["n", "a"]].to_numpy(np.float64))
    assert data.name == name
    assert data.test == {}
    assert_holds(data.rows, np.arange(4))


def test_csv_with_mark_blanks_and_quotes_equals_values(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('\ufeff"x, y", z\n1.5, 2\n\n-3.5, 4\n'.encode())
    data = read("a.csv", tmp_path, columns={"x": "x, y", "z": "z"})
    assert_holds(data.tensors["x"], [1.5, -3.5])
    assert_holds(data.tensors["z"], [2, 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_get_the_dtype_and_integers_stay(tmp_path: Path, dtype: torch.dtype) -> None:
    write_table(tmp_path / "t.parquet")
    data = read("t.parquet", tmp_path, dtype, columns={"x": "a", "n": "n", "flag": "flag"})
    assert [data.tensors[k].dtype for k in ("x", "n", "flag")] == [dtype, torch.int64, torch.bool]


def test_parquet_categories_become_codes_or_their_numbers(tmp_path: Path) -> None:
    names = pd.Categorical(["b", "a", "b"], categories=["b", "a", "c"])
    years = pd.Categorical([1990, 2010, 1990])
    whole = pd.array([4, 5, 6], dtype="Int64")
    pd.DataFrame({"name": names, "year": years, "whole": whole}).to_parquet(tmp_path / "t.parquet")
    data = read("t.parquet", tmp_path, columns={"k": "name", "y": "year", "w": "whole"})
    assert_holds(data.tensors["k"], [0, 1, 0])
    assert_holds(data.tensors["y"], [1990, 2010, 1990])
    assert_holds(data.tensors["w"], [4, 5, 6])


@pytest.mark.parametrize("kind", ["<f8", ">f8", "<f4", "<f2", "longdouble", "<i4", ">i8", "u1", "<u8", "?"])
def test_npy_round_trips(tmp_path: Path, kind: str) -> None:
    array = np.arange(15).reshape(5, 3).astype(kind)
    np.save(tmp_path / "a.npy", array)
    data = read("a.npy", tmp_path, columns={"x": "*", "first": "0", "two": ["2", "0"]})
    final = {"f": np.float64, "b": np.bool_}.get(array.dtype.kind, np.int64)
    assert_holds(data.tensors["x"], array.astype(final))
    assert_holds(data.tensors["first"], array[:, 0].astype(final))
    assert_holds(data.tensors["two"], array[:, [2, 0]].astype(final))


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 3, 2)])
def test_npy_whole_keeps_its_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.asfortranarray(np.random.default_rng(0).normal(size=shape))
    np.save(tmp_path / "a.npy", array)
    assert_holds(read("a.npy", tmp_path, columns={"x": "*"}).tensors["x"], array)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the maps of a process are read from /proc")
@pytest.mark.parametrize("columns", [{"x": "*"}, {"x": "1"}, {"x": ["*"]}, {"x": ["0", "1", "2"]}])
def test_npy_stays_mapped_to_its_file(tmp_path: Path, columns: dict[str, Any]) -> None:
    np.save(tmp_path / "big.npy", np.ones((700, 3)))
    data = read("big.npy", tmp_path, columns=columns)
    address = data.tensors["x"].data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    bounds = [[int(end, 16) for end in m[0].split("-")] for m in maps if m[-1] == str(tmp_path / "big.npy")]
    assert any(low <= address < high for low, high in bounds)


def test_npy_file_survives_a_write_to_its_tensor(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((5, 3)))
    read("a.npy", tmp_path, columns={"x": "*"}).tensors["x"].zero_()
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.ones((5, 3)))


def test_npz_arrays_round_trip_by_name(tmp_path: Path) -> None:
    x, n = np.random.default_rng(0).normal(size=(4, 3)), np.arange(4)
    np.savez(tmp_path / "a.npz", x=x, n=n)
    for data in (read("a.npz", tmp_path), read("a.npz", tmp_path, columns={"x": "x", "n": "n"})):
        assert list(data.tensors) == ["x", "n"]
        assert_holds(data.tensors["x"], x)
        assert_holds(data.tensors["n"], n)


def test_txt_equals_loadtxt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# two columns\n 1.5  -2\n3e-8\t4 # the last\n")
    expected = np.loadtxt(tmp_path / "a.txt")
    data = read("a.txt", tmp_path, columns={"x": "*", "n": "1"})
    assert_holds(data.tensors["x"], expected)
    assert_holds(data.tensors["n"], expected[:, 1].astype(np.int64))


# Sequences

LONG = pd.DataFrame(
    {
        "who": ["s", "r", "s", "t", "r", "s"],
        "when": [3, 20, 1, 5, 10, 2],
        "x": [0.3, 2.0, 0.1, 9.0, 1.0, 0.2],
        "k": [33, 22, 31, 99, 21, 32],
    }
)


def write_long(path: Path, **columns: Any) -> None:
    LONG.assign(**columns).to_csv(path, index=False)


def test_sequences_equal_a_hand_built_case(tmp_path: Path) -> None:
    write_long(tmp_path / "long.csv")
    columns = {"x": "x", "k": "k", "pair": ["k", "x"]}
    data = read("long.csv", tmp_path, columns=columns, sequence="who", time="when")
    assert_holds(data.tensors["x"], [[0.1, 0.2, 0.3], [1.0, 2.0, 0.0], [9.0, 0.0, 0.0]])
    assert_holds(data.tensors["k"], [[31, 32, 33], [21, 22, 0], [99, 0, 0]])
    pairs: Any = [[[31, 0.1], [32, 0.2], [33, 0.3]], [[21, 1], [22, 2], [0, 0]], [[99, 9], [0, 0], [0, 0]]]
    assert_holds(data.tensors["pair"], pairs)
    assert_holds(data.tensors["lengths"], [3, 2, 1])
    assert_holds(data.rows, [0, 1, 2])
    assert data.columns == {"x": ("x",), "k": ("k",), "pair": ("k", "x"), "lengths": ()}


def test_sequences_without_time_keep_the_order_of_rows(tmp_path: Path) -> None:
    write_long(tmp_path / "long.csv")
    data = read("long.csv", tmp_path, columns={"k": "k"}, sequence="who")
    assert_holds(data.tensors["k"], [[33, 31, 32], [22, 21, 0], [99, 0, 0]])


def test_time_alone_makes_one_sequence(tmp_path: Path) -> None:
    write_long(tmp_path / "long.csv")
    data = read("long.csv", tmp_path, columns={"k": "k"}, time="when")
    assert_holds(data.tensors["k"], [[31, 32, 33, 99, 21, 22]])
    assert_holds(data.tensors["lengths"], [6])


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_dates_sort_as_dates(tmp_path: Path, suffix: str) -> None:
    when = ["2024-03-01", "1066-10-14", "2024-01-31", "2024-01-01", "2024-02-01T10:00", "2024-02-01T09:00"]
    table = LONG.assign(when=when if suffix == "csv" else pd.to_datetime(pd.Series(when), format="ISO8601"))
    path = tmp_path / f"long.{suffix}"
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    data = read(path.name, tmp_path, columns={"k": "k"}, time="when")
    assert_holds(data.tensors["k"], [[22, 99, 31, 32, 21, 33]])


def test_pattern_leaves_out_the_keys_of_sequences(tmp_path: Path) -> None:
    write_long(tmp_path / "long.csv")
    data = read("long.csv", tmp_path, columns={"x": "*"}, sequence="who", time="when")
    assert data.columns["x"] == ("x", "k")


# The split and standardisation


def test_split_is_disjoint_complete_ordered_and_seeded() -> None:
    spec = Spec("iris", {"x": "measurements", "y": "species"}, test_fraction=0.3)
    first, again, other = (load(spec, Path(), torch.float64, seed) for seed in (5, 5, 6))
    assert (first.num_rows, len(first.test_rows)) == (105, 45)
    np.testing.assert_array_equal(np.union1d(first.rows, first.test_rows), np.arange(150))
    assert (first.rows.diff() > 0).all() and (first.test_rows.diff() > 0).all()
    assert torch.equal(first.test_rows, again.test_rows)
    assert not torch.equal(first.test_rows, other.test_rows)
    features, labels = datasets.load_iris(return_X_y=True)
    assert_holds(first.tensors["x"], features[first.rows])
    assert_holds(first.test["x"], features[first.test_rows])
    assert_holds(first.test["y"], labels[first.test_rows])


def test_split_takes_whole_sequences(tmp_path: Path) -> None:
    write_long(tmp_path / "long.csv")
    options: dict[str, Any] = {"columns": {"k": "k"}, "sequence": "who", "time": "when"}
    whole = read("long.csv", tmp_path, **options)
    split = read("long.csv", tmp_path, **options, test_fraction=0.34)
    assert (split.num_rows, len(split.test_rows)) == (2, 1)
    for name in ("k", "lengths"):
        assert_holds(split.tensors[name], whole.tensors[name][split.rows])
        assert_holds(split.test[name], whole.tensors[name][split.test_rows])


def test_standardized_rows_equal_standard_scaler_of_training_rows() -> None:
    from sklearn.preprocessing import StandardScaler

    columns = {"x": "measurements", "one": "hue", "y": "cultivar"}
    data = read("wine", columns=columns, standardize=True, test_fraction=0.25)
    features, labels = datasets.load_wine(return_X_y=True)
    scaler = StandardScaler().fit(features[data.rows])
    np.testing.assert_allclose(data.tensors["x"], scaler.transform(features[data.rows]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(data.test["x"], scaler.transform(features[data.test_rows]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(data.tensors["one"], data.tensors["x"][:, 10], rtol=0, atol=1e-12)
    assert_holds(data.tensors["y"], labels[data.rows])


def test_standardized_sequences_leave_padding_out(tmp_path: Path) -> None:
    write_long(tmp_path / "long.csv")
    columns = {"x": "x", "pair": ["k", "x"]}
    data = read("long.csv", tmp_path, columns=columns, sequence="who", time="when", standardize=True)
    expected = (LONG["x"] - LONG["x"].mean()) / LONG["x"].std(ddof=0)
    mask = torch.arange(3) < data.tensors["lengths"][:, None]
    got = data.tensors["x"][mask].numpy()
    np.testing.assert_allclose(got, expected[[2, 5, 0, 4, 1, 3]], rtol=1e-12)
    np.testing.assert_allclose(data.tensors["pair"][mask][:, 1], got, rtol=1e-12)
    assert not data.tensors["x"][~mask].any() and not data.tensors["pair"][~mask].any()


def test_loading_leaves_global_random_state_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    read("iris", columns={"x": "measurements"}, test_fraction=0.5)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
