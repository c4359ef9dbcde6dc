"""How a name becomes a function, and how its arguments are checked before anything runs."""

from __future__ import annotations

import importlib
import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from lvmppl.catalogue import GUIDES, MODELS, Kind, check_arguments, resolve
from lvmppl.errors import InputError


@pytest.mark.parametrize(
    ("kind", "name"), [*(("model", name) for name in MODELS), *(("guide", name) for name in GUIDES)]
)
def test_catalogue_name_resolves_to_what_its_entry_says(kind: Kind, name: str, tmp_path: Path) -> None:
    module, _, attribute = {"model": MODELS, "guide": GUIDES}[kind][name][0].partition(":")
    assert resolve(name, "use", tmp_path, kind) is getattr(importlib.import_module(module), attribute)


def test_module_and_name_resolve_to_an_installed_function(tmp_path: Path) -> None:
    assert resolve("os.path:join", "use", tmp_path, "model") is __import__("os").path.join


FILES = {
    "good.py": "import dataclasses\n\nLIMIT = 3\n\n@dataclasses.dataclass\nclass Box:\n    size: int\n\n"
    "def model(x, k: int):\n    raise RuntimeError('deep inside')\n",
    "syntax.py": "def f():\n    return (\n",
    "missing.py": "import os\nimport nowhere_to_be_found\n",
    "raises.py": "def f():\n    return 1 / 0\n\nf()\n",
    "library.py": "import json\njson.loads('{')\n",
    "exits.py": "raise SystemExit(3)\n",
    "nulls.py": "a = 1\0\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_file_function_keeps_its_source_its_place_and_its_pickle(folder: Path) -> None:
    model = resolve("good.py:model", "use", folder, "model")
    assert "deep inside" in inspect.getsource(model)
    with pytest.raises(RuntimeError) as caught:
        model(x=1, k=2)
    assert caught.traceback[-1].path == folder / "good.py" and caught.traceback[-1].lineno + 1 == 10
    box = resolve("good.py:Box", "use", folder, "model")
    assert pickle.loads(pickle.dumps(box(4))) == box(4)
    assert pickle.loads(pickle.dumps(model)) is model


def test_file_module_is_shared_within_a_run_and_new_when_the_file_changes(folder: Path) -> None:
    first = resolve("good.py:model", "use", folder, "model")
    assert resolve("./good.py:model", "use", folder, "guide") is first
    (folder / "good.py").write_text(FILES["good.py"] + "# changed\n")
    assert resolve("good.py:model", "use", folder, "model") is not first


def test_loading_a_file_leaves_nothing_behind(folder: Path) -> None:
    before = (sorted(folder.iterdir()), list(sys.path))
    resolve("good.py:model", "use", folder, "model")
    assert (sorted(folder.iterdir()), list(sys.path)) == before
    assert "good" not in sys.modules
    with pytest.raises(InputError):
        resolve("raises.py:f", "use", folder, "model")
    assert not [name for name in sys.modules if "raises" in name and name.startswith("lvmppl_file")]


UNRESOLVED: dict[str, tuple[str, str]] = {
    "misspelt name": (
        "gaussian_mixtur",
        r"a model of the catalogue .*got 'gaussian_mixtur'; did you mean 'gaussian_mixture'\?",
    ),
    "a guide for a model": ("categorical", ".*'categorical' is a guide"),
    "file without a name": ("good.py", ".*file.py:name, got 'good.py'.*"),
    "no such file": (
        "nope.py:f",
        r"a Python file, got .*nope.py \(No such file or directory\); .*relative to the experiment",
    ),
    "a folder": ("folder.py:f", r"a Python file, got .*folder.py \(Is a directory\); .*"),
    "no such function": (
        "good.py:modle",
        "a function or class in good.py, got 'modle'; did you mean 'model'.*",
    ),
    "not a function": (
        "good.py:LIMIT",
        "a function or class called LIMIT in good.py, got a value of type int",
    ),
    "syntax error": (
        "syntax.py:f",
        r"syntax.py to import without error, got SyntaxError: .*syntax.py:\d\).*",
    ),
    "missing import": ("missing.py:f", r".*got ModuleNotFoundError: .*nowhere.*missing.py:2\).*"),
    "raises": (
        "raises.py:f",
        r".*got ZeroDivisionError: division by zero \(.*raises.py:2\); correct it there",
    ),
    "raises in a library": ("library.py:f", r".*got JSONDecodeError: .*library.py:2\); correct it there"),
    "exits": ("exits.py:f", r".*got SystemExit: 3 \(.*exits.py:1\); correct it there"),
    "null bytes": ("nulls.py:f", r"nulls.py to import without error, got .*null bytes.*"),
    "no such package": (
        "nowhere_at_all.models:f",
        "a module .*, got no module named nowhere_at_all; .*file.py:name.*",
    ),
    "no such module": ("lvmppl.nowhere:f", "a module .*, got no module named lvmppl.nowhere; .*"),
    "no such module function": ("lvmppl.models.mixture:gaussian", ".*did you mean 'gaussian_mixture'.*"),
    "no module": (":f", ".*got ':f'.*"),
    "not a name": ("json:loads()", r".*got 'json:loads\(\)'.*"),
    "relative module": (".mixture:f", ".*got '.mixture:f'.*"),
}


@pytest.mark.parametrize("case", UNRESOLVED)
def test_wrong_use_is_refused_with_a_message(case: str, folder: Path) -> None:
    (folder / "folder.py").mkdir()
    use, pattern = UNRESOLVED[case]
    with pytest.raises(InputError) as caught:
        resolve(use, "model.use", folder, "model")
    assert re.fullmatch(f"model.use: expected {pattern}", str(caught.value)), str(caught.value)


def test_failed_import_inside_a_package_shows_the_packages_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("\n\nimport also_nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"No module named 'also_nowhere' \(.*broken_package.py:3\)"):
        resolve("broken_package:f", "use", tmp_path, "model")


def mixture(
    x: Any,
    num_components: int,
    covariance: Literal["full", "tied"] = "full",
    scale: float = 1.0,
    hidden: Sequence[int] = (),
    start: float | None = None,
    fixed: bool = False,
    act: Callable[..., Any] | str = "tanh",
) -> None: ...


class Network:
    def __init__(self, width: int, depth: int = 2) -> None: ...

    def __call__(self, x: Any) -> None: ...


def guide_factory(model: Any, rank: int = 1) -> None: ...


def anything(x: Any, **args: Any) -> None: ...


def vague(x: Any, a: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


ACCEPTED: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (mixture, {"num_components": 3}),
    (mixture, {"num_components": 3, "covariance": "tied", "scale": 2, "hidden": [1, 2], "start": None}),
    (mixture, {"num_components": 3, "start": 0.5, "fixed": True, "act": "relu"}),
    (mixture, {"num_components": 3, "hidden": ()}),
    (Network, {"width": 3}),
    (guide_factory, {"rank": 2}),
    (anything, {"whatever": [1]}),
    (vague, {"a": "any"}),
]


@pytest.mark.parametrize(("function", "args"), ACCEPTED)
def test_right_arguments_pass(function: Callable[..., Any], args: dict[str, Any]) -> None:
    check_arguments(function, args, ("x",), "model.args")


WRONG: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (mixture, {}, "num_components: expected a value, got nothing; add it here, or to data.columns"),
    (
        mixture,
        {"num_components": 3, "covarance": "full"},
        "covarance: expected one of .*; did you mean 'covariance'.*",
    ),
    (mixture, {"num_components": "3"}, "num_components: expected a whole number, got '3'"),
    (mixture, {"num_components": 3.0}, "num_components: expected a whole number, got 3.0; write 3"),
    (mixture, {"num_components": True}, "num_components: expected a whole number, got true"),
    (mixture, {"num_components": None}, "num_components: expected a whole number, got nothing"),
    (
        mixture,
        {"num_components": 3, "covariance": "ful"},
        "covariance: expected full or tied, got 'ful'; did .* 'full'.*",
    ),
    (mixture, {"num_components": 3, "scale": "x"}, "scale: expected a number, got 'x'"),
    (mixture, {"num_components": 3, "hidden": 3}, "hidden: expected a list, got 3"),
    (
        mixture,
        {"num_components": 3, "hidden": [1, "a"]},
        r"hidden: expected a whole number in it, got the list .*",
    ),
    (mixture, {"num_components": 3, "start": "x"}, "start: expected a number, got 'x'"),
    (mixture, {"num_components": 3, "fixed": 1}, "fixed: expected true or false, got 1"),
    (
        mixture,
        {"num_components": 3, "x": [1]},
        "x: expected the tensor x of data.columns alone, got .*; leave it out",
    ),
    (Network, {}, "width: expected a value, got nothing; add it here"),
    (
        Network,
        {"width": 3, "with": 4},
        "with: expected one of width, depth, got 'with'; did you mean 'width'.*",
    ),
    (guide_factory, {"model": 3}, "model: expected the experiment's model alone, got 3; leave it out"),
    (guide_factory, {"rnak": 3}, "rnak: expected one of rank, got 'rnak'; did you mean 'rank'.*"),
]


@pytest.mark.parametrize(("function", "args", "pattern"), WRONG)
def test_wrong_arguments_are_refused(
    function: Callable[..., Any], args: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(InputError) as caught:
        check_arguments(function, args, ("x",), "model.args")
    assert re.fullmatch(f"model.args.{pattern}", str(caught.value)), str(caught.value)


def test_all_wrong_arguments_come_in_one_message() -> None:
    with pytest.raises(InputError) as caught:
        check_arguments(mixture, {"colour": 1, "scale": "x"}, ("x",), "args")
    fields = sorted(line.partition(":")[0] for line in str(caught.value).splitlines())
    assert fields == ["args.colour", "args.num_components", "args.scale"]


def test_catalogue_is_read_without_torch() -> None:
    code = (
        "import sys, lvmppl.catalogue, lvmppl.spec; sys.exit(bool({'torch', 'pandas'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
