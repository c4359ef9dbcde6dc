"""Wrong data is refused in one message: field, source, column, row, and what to do."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lvmppl.data import files, load
from lvmppl.errors import InputError


@dataclass(frozen=True)
class Spec:
    """What an experiment says of its data, without the file that says it."""

    source: str
    columns: Mapping[str, str | Sequence[str]] = field(default_factory=lambda: {"x": "a"})
    standardize: bool = False
    test_fraction: float = 0.0
    sequence: str | None = None
    time: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)


def text(content: str) -> Callable[[Path], None]:
    return raw(content.encode())


def raw(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def npy(array: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, np.asarray(array))


def npz(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


def parquet(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pd.DataFrame(columns).to_parquet(path)


def twice_named_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), path)


def refused(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        load(Spec(**options), folder, dtype, 0)
    return str(error.value)


def assert_says(message: str, parts: str) -> None:
    for part in parts.split(" | "):
        assert part in message


# (file, how it is written, the other fields of the spec, what the message says)
FILES: list[tuple[str, Callable[[Path], None], dict[str, Any], str]] = [
    # what a file is
    ("a.csv", text(""), {}, "data.source:  | at least one row | a.csv | empty file"),
    ("a.csv", text("a,b\n"), {}, "data.source:  | at least one row | a.csv"),
    ("a.csv", text("a,b,a\n1,2,3\n"), {}, "data.source:  | a.csv | a more than once"),
    ("a.csv", text("a,b\n1,2\n3,4,5\n"), {}, "data.source:  | a.csv | line 3 | saw 3"),
    ("a.csv", text("a;b\n1,5;2\n"), {}, "data.source:  | commas between | a.csv | semicolons | with a point"),
    (
        "a.csv",
        text("a\tb\n1\t2\n"),
        {},
        "data.source:  | commas between | a.csv | tabs | write it with commas",
    ),
    ("a.csv", text("a,b\n1,2,3\n4,5,6\n"), {}, "data.source:  | a.csv | as many in each row"),
    ("a.csv", raw(b"a,b\n1,\xff\n"), {}, "data.source:  | a.csv | UTF-8 | 0xff"),
    ("a.parquet", text("a,b\n1,2\n"), {}, "data.source:  | a.parquet to hold a parquet table"),
    ("a.parquet", twice_named_parquet, {}, "data.source:  | a.parquet | a more than once"),
    ("a.parquet", parquet(a=[]), {}, "data.source:  | at least one row | a.parquet"),
    ("a.npy", text("1 2 3"), {}, "data.source:  | a.npy to hold one array of numbers"),
    ("a.npy", text(""), {}, "data.source:  | a.npy to hold one array of numbers"),
    ("a.npy", npy(3.0), {}, "data.source:  | a.npy | a single number"),
    ("a.npy", npy(np.zeros((0, 3))), {}, "data.source:  | at least one row | a.npy"),
    ("a.npy", npy(np.zeros((3, 0))), {}, "data.source:  | at least one | a.npy"),
    ("a.npy", npy(np.array([1, None])), {}, "data.source:  | a.npy | one array of numbers"),
    ("a.npz", text("1 2 3"), {}, "data.source:  | a.npz to hold named arrays"),
    ("a.npz", npz(), {}, "data.source:  | a.npz | no array"),
    ("a.npz", npz(a=3.0), {}, "data.source:  | a.npz | a single number 'a'"),
    ("a.npz", npz(a=[1, 2], b=[[1], [2], [3]]), {}, "data.source:  | as many rows | 'b' 3 | 'a' 2"),
    ("a.txt", text("# nothing\n"), {}, "data.source:  | at least one row | a.txt"),
    ("a.txt", text("1 2\n3 4 5\n"), {}, "data.source:  | a.txt | line 2 | saw 3"),
    ("a.csv", text("a\n1\n"), {"args": {"sep": ";"}}, "data.args.sep | no arguments | leave it out"),
    # what a column is
    (
        "a.csv",
        text("alpha,b\n1,2\n"),
        {"columns": {"x": "alhpa"}},
        "data.columns.x | (alpha, b) | 'alhpa' | did you mean 'alpha'?",
    ),
    ("a.csv", text("a,b\n1,2\n"), {"columns": {"x": ["a", "Q"]}}, "data.columns.x | a.csv | 'Q'"),
    (
        "a.csv",
        text(",".join(f"c{i}" for i in range(30)) + "\n" + "1," * 29 + "1\n"),
        {},
        "c0, c1 | … 22 more …, c29",
    ),
    ("a.csv", text("a,b\n1,2\n"), {"columns": {"x": ["a", "b", "a"]}}, "data.columns.x | 'a' more than once"),
    ("a.csv", text("a,b\n1,2\n"), {"columns": {"x": "q*"}}, "data.columns.x | a pattern | 'q*' | a, b"),
    (
        "a.csv",
        text("a,b\n1,2\n"),
        {"columns": {"x": []}},
        "data.columns.x | at least one column | empty list",
    ),
    ("a.csv", text("a,b\n1,2\n"), {"columns": {}}, "data.columns:  | {x: [a, b]} | nothing | a.csv has a, b"),
    ("a.npy", npy(np.ones((4, 3))), {"columns": {"x": "3"}}, "data.columns.x | a.npy (*, 0, 1, 2) | '3'"),
    (
        "a.npz",
        npz(a=np.ones((4, 3))),
        {"columns": {"x": ["a"]}},
        "data.columns.x | shape [4, 3] | the bare name: 'a'",
    ),
    # what a column holds
    (
        "a.csv",
        text("a\n1\nfour\n"),
        {},
        "data.columns.x | numbers in column 'a' of a.csv | 'four' in data row 2 | leave the column out",
    ),
    (
        "a.csv",
        text("a,b\n1,2\n,3\n"),
        {},
        "data.columns.x | column 'a' of a.csv | missing value in data row 2 | fill it in",
    ),
    (
        "a.csv",
        text("a,b\n1,2\nNaN,3\n"),
        {"columns": {"x": "*"}},
        "column 'a' of a.csv | missing value in data row 2",
    ),
    (
        "a.csv",
        text("b,a\n1,True\n2,\n"),
        {},
        "data.columns.x | column 'a' of a.csv | missing value in data row 2",
    ),
    ("a.csv", text("b,a\n1,2\n3\n"), {}, "column 'a' of a.csv | missing value in data row 2"),
    (
        "a.csv",
        text("a\n1\n-inf\n"),
        {},
        "data.columns.x | finite numbers in column 'a' of a.csv | -inf in data row 2",
    ),
    (
        "a.csv",
        text("a\n1\n18446744073709551615\n"),
        {},
        "integers below 2⁶³ in column 'a' | 18446744073709551615",
    ),
    ("a.csv", text("a\n1\n99999999999999999999\n"), {}, "column 'a' of a.csv | 99999999999999999999"),
    ("a.parquet", parquet(a=[1.0, None]), {}, "column 'a' of a.parquet | missing value in data row 2"),
    (
        "a.parquet",
        parquet(a=pd.array([True, None], dtype="boolean")),
        {},
        "column 'a' of a.parquet | missing value in data row 2",
    ),
    (
        "a.parquet",
        parquet(a=pd.Categorical(["u", None])),
        {},
        "column 'a' of a.parquet | missing value in data row 2",
    ),
    (
        "a.parquet",
        parquet(a=pd.to_datetime(["2024-01-01"])),
        {},
        "column 'a' of a.parquet | datetime64 | 2024-01-01",
    ),
    ("a.parquet", parquet(a=[[1, 2], [3]]), {}, "column 'a' of a.parquet | ndarray | data row 1"),
    (
        "a.npy",
        npy([[1, 2], [np.nan, 3], [4, np.inf]]),
        {"columns": {"x": "*"}},
        "column '0' of a.npy | missing value in data row 2",
    ),
    (
        "a.npy",
        npy(np.where(np.arange(3_000_000) == 2_500_000, np.inf, 0.0)),
        {"columns": {"x": "*"}},
        "a.npy | inf in data row 2500001",
    ),
    (
        "a.npy",
        npy(np.where(np.arange(3_000_000) == 2_500_000, np.nan, 0.0)),
        {"columns": {"x": "*"}},
        "a.npy | missing value in data row 2500001",
    ),
    (
        "a.npy",
        npy(["p", "q"]),
        {"columns": {"x": "*"}},
        "data.columns.x | numbers in a.npy | 'p' in data row 1",
    ),
    ("a.npy", npy([1 + 2j]), {"columns": {"x": "*"}}, "data.columns.x | numbers in a.npy | complex"),
    (
        "a.npy",
        npy(np.zeros(3, [("u", float), ("v", int)])),
        {"columns": {"x": "*"}},
        "a.npy | records (u, v) | .npz",
    ),
    (
        "a.npz",
        npz(a=np.full((3, 2, 2), np.nan)),
        {},
        "column '0,0' of 'a' of a.npz | missing value in data row 1",
    ),
    ("a.txt", text("1 2\n3\n"), {"columns": {"x": "*"}}, "column '1' of a.txt | missing value in data row 2"),
    ("a.txt", text("1,2\n3,4\n"), {"columns": {"x": "*"}}, "column '0' of a.txt | '1,2' in data row 1"),
    # sequences
    (
        "a.csv",
        text("s,a\n1,2\n"),
        {"sequence": "S1"},
        "data.sequence | a.csv (s, a) | 'S1' | did you mean 's'?",
    ),
    (
        "a.csv",
        text("s,t,a\n1,2,3\n"),
        {"sequence": "s", "time": "tt"},
        "data.time | 'tt' | did you mean 't'?",
    ),
    ("a.csv", text("s,a\nu,2\n,3\n"), {"sequence": "s"}, "data.sequence | column 's' of a.csv | data row 2"),
    (
        "a.csv",
        text("s,t,a\n1,1,2\n1,,3\n"),
        {"sequence": "s", "time": "t"},
        "data.time | column 't' | data row 2",
    ),
    (
        "a.csv",
        text("s,t,a\nu,1,2\nv,1,3\nu,1,4\n"),
        {"sequence": "s", "time": "t"},
        "data.time | 't' 1 in data rows 1 and 3 of 's' u",
    ),
    (
        "a.csv",
        text("t,a\n5,2\n5,3\n"),
        {"time": "t"},
        "data.time | 't' 5 in data rows 1 and 2 | name the sequence column",
    ),
    (
        "a.csv",
        text("t,a\nnoon,2\n"),
        {"time": "t"},
        "data.time | numbers or dates in column 't' of a.csv | 'noon'",
    ),
    (
        "a.csv",
        text("s,a\n1,2\n"),
        {"sequence": "s", "columns": {"lengths": "a"}},
        "data.columns.lengths | other than lengths",
    ),
    # the split and standardisation
    (
        "a.csv",
        text("a\n1\n2\n3\n"),
        {"test_fraction": 0.1},
        "data.test_fraction | at least one row | holds out 0 of 3 rows",
    ),
    ("a.csv", text("a\n1\n2\n3\n"), {"test_fraction": 0.9}, "data.test_fraction | holds out 3 of 3 rows"),
    ("a.csv", text("a\n1\n"), {"test_fraction": 0.5}, "data.test_fraction | of 1 rows | set it to 0"),
    ("a.csv", text("a\n1\n2\n"), {"test_fraction": 1.0}, "data.test_fraction | below 1 | 1.0"),
    (
        "a.csv",
        text("a,b\n0.1,1.5\n0.1,2\n0.1,3\n"),
        {"columns": {"x": ["b", "a"]}, "standardize": True},
        "data.standardize | a.csv | column 'a' | standard deviation 0  | leave it out",
    ),
    (
        "a.csv",
        text("a\n1\n2\n"),
        {"standardize": True},
        "data.standardize | a floating column of a.csv | integers only (x)",
    ),
]


@pytest.mark.parametrize(
    ("name", "write", "options", "says"), FILES, ids=[f"{f[0]}-{f[3].rpartition(' | ')[2]}" for f in FILES]
)
def test_bad_file_message_names_what_is_wrong(
    tmp_path: Path, name: str, write: Callable[[Path], None], options: dict[str, Any], says: str
) -> None:
    write(tmp_path / name)
    message = refused(tmp_path, source=name, **options)
    assert_says(message, says)
    assert re.fullmatch(r"data\.[\w.]+: expected .+, got .+", message)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("irsi", {}, "data.source | a shipped source ( | .parquet | 'irsi' | did you mean 'iris'?"),
        ("data.xlsx", {}, "data.source | .csv, .npy, .npz, .parquet, .txt | 'data.xlsx'"),
        ("nowhere.csv", {}, "data.source | nowhere.csv, which is not in | check the path"),
        ("flowers/iris.csv", {}, "data.source | flowers/iris.csv | did you mean 'irises.csv'?"),
        ("folder.csv", {}, "data.source | folder.csv, which is a folder"),
        (
            "iris",
            {"columns": {"x": "sepal_lenght"}},
            "data.columns.x | a column of iris | 'sepal_length'?",
        ),
        ("iris", {"args": {"scaled": True}}, "data.args.scaled | no arguments for iris | leave it out"),
        (
            "digits",
            {"columns": {"x": "pixels"}, "standardize": True},
            "column 'pixel_0_0' | digits in 'x'",
        ),
        ("lee_background", {"args": {"from": "counts"}}, "data.args.from | did you mean 'form'?"),
        (
            "lee_background",
            {"args": {"form": "count"}},
            "data.args.form | tokens, counts or terms | did you mean 'counts'?",
        ),
        ("lee_background", {"args": {"min_count": 0}}, "data.args.min_count | at least 1 | got 0"),
        (
            "lee_background",
            {"args": {"max_vocab": True}},
            "data.args.max_vocab | whole number | got true",
        ),
        (
            "lee_background",
            {"columns": {}, "args": {"min_count": 100_000}},
            "data.args | a word left in every text | lower min_count",
        ),
    ],
)
def test_bad_source_message_names_what_is_wrong(
    tmp_path: Path, source: str, options: dict[str, Any], says: str
) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers" / "irises.csv").touch()
    message = refused(tmp_path, source=source, **options)
    assert_says(message, says)


def test_number_too_large_for_float32_is_refused_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n1.5\n1e39\n")
    message = refused(tmp_path, torch.float32, source="a.csv")
    assert "1e+39 in data row 2" in message and "set dtype: float64" in message


def test_lee_background_without_gensim_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("gensim", "gensim.utils", "gensim.test.utils"):
        monkeypatch.setitem(sys.modules, module, None)
    message = refused(tmp_path, source="lee_background")
    assert message.startswith("data.source: expected gensim") and "pip install 'lvmppl[text]'" in message


def test_file_that_the_system_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.csv").touch()
    monkeypatch.setitem(files.READERS, ".csv", refuse)
    assert "a readable file a.csv, got Permission denied" in refused(tmp_path, source="a.csv")
