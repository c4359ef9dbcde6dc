"""Imports run downward only: the table below is the architecture, and every import must stand in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# part -> (its modules, the parts it may import, packages it may not import, not even inside a function)
HEAVY = "torch pyro pandas"
PARTS: dict[str, tuple[str, str, str]] = {
    "face": ("lvmppl", "errors results distributions inference runner", ""),
    "cli": (
        "lvmppl.__main__ lvmppl.cli lvmppl.terminal lvmppl.progress",
        "errors spec catalogue scaffold runner cli",
        "torch pyro yaml",
    ),
    "scaffold": ("lvmppl.scaffold", "errors options", HEAVY),
    "runner": (
        "lvmppl.runner lvmppl.running lvmppl.running.*",
        "errors options spec catalogue data inference algorithms exact density results compare tables plots"
        " report runner",
        "yaml",
    ),
    "inference": ("lvmppl.inference", "errors options density results exact algorithms", "yaml pandas"),
    "report": (
        "lvmppl.report lvmppl.page lvmppl.comparison lvmppl.comparison_report lvmppl.top_words",
        "errors tables plots report",
        "torch pyro",
    ),
    "plots": (
        "lvmppl.plots lvmppl.*_plots lvmppl.canvas lvmppl.align",
        "errors tables plots",
        "torch pyro yaml",
    ),
    "compare": ("lvmppl.compare", "errors results exact density tables", "yaml"),
    "tables": ("lvmppl.tables", "errors", "torch pyro yaml"),
    "spec": ("lvmppl.spec lvmppl.document", "errors options spec", HEAVY),
    "catalogue": ("lvmppl.catalogue", "errors options", HEAVY + " yaml"),
    "data": ("lvmppl.data lvmppl.data.*", "errors options catalogue data", "pyro yaml"),
    "algorithms": (
        "lvmppl.algorithms lvmppl.algorithms.*",
        "errors options estimators density families exponential exact results algorithms",
        "yaml",
    ),
    "exponential": ("lvmppl.exponential", "errors density families distributions exact", "yaml pandas"),
    "results": (
        "lvmppl.fitted lvmppl.posteriors lvmppl.continuous_posteriors lvmppl.*_posterior* lvmppl.posterior_* lvmppl.elbo",
        "errors density exact results",
        "yaml",
    ),
    "exact": ("lvmppl.exact lvmppl.exact.*", "errors density families distributions results exact", "yaml"),
    "density": ("lvmppl.density lvmppl.density.*", "errors families distributions density", "yaml pandas"),
    "families": (
        "lvmppl.families lvmppl.family_table lvmppl.bilinear",
        "errors distributions families",
        "yaml pandas",
    ),
    "distributions": (
        "lvmppl.distributions lvmppl.distributions.* lvmppl.gaussian_chain lvmppl.labels",
        "errors exact distributions",
        "yaml pandas",
    ),
    # Heads, sources and what joins them to a guide: shared by the guide files, which hold a few lines each.
    "variational": (
        "lvmppl.heads lvmppl.outputs lvmppl.supports lvmppl.flows lvmppl.sources lvmppl.variational",
        "errors estimators density distributions families variational",
        "yaml pandas",
    ),
    "options": (
        "lvmppl.options lvmppl.settings lvmppl.strict",
        "errors options",
        HEAVY + " yaml",
    ),
    "estimators": ("lvmppl.estimators", "errors", HEAVY + " yaml pydantic"),
    "errors": ("lvmppl.errors lvmppl.wording", "", HEAVY + " yaml pydantic"),
    "models": ("lvmppl.models", "", HEAVY),
    "guides": ("lvmppl.guides", "", HEAVY),
    "experiments": ("lvmppl.experiments", "", HEAVY),
    # A model or guide file imports torch, pyro and the package's distributions, a guide its heads and sources too;
    # never another model or guide.
    "model": ("lvmppl.models.*", "distributions", "pandas numpy yaml sklearn scipy"),
    "guide": ("lvmppl.guides.*", "distributions variational", "pandas numpy yaml sklearn scipy"),
}

# what only one module of lvmppl/ may use
OWNED = {"lvmppl.density": ("poutine", "get_param_store", "ParamStoreDict", "param_store")}

Sources = Mapping[str, str]


def checkout() -> dict[str, str]:
    """Module name -> source of every module of the package."""
    sources = {}
    for folder, package in [(f, f"lvmppl.{f}") for f in ("models", "guides", "experiments")] + [
        ("lvmppl", "lvmppl")
    ]:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            sources[".".join([package, *parts]).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return sources


@cache
def tree(source: str) -> ast.Module:
    return ast.parse(source)


@cache
def part_of(module: str) -> str | None:
    """The part a module belongs to: of those that match, the one with the longest pattern."""
    matches = [
        (len(pattern), part)
        for part, (patterns, _, _) in PARTS.items()
        for pattern in patterns.split()
        if fnmatchcase(module, pattern)
    ]
    return max(matches)[1] if matches else None


def imports(module: str, source: str, modules: Sources) -> Iterator[str]:
    """Every module a source imports, wherever it does; `from package import module` is that module."""
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield f"relative import in {module}"
                continue
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else str(node.module)


def violations(modules: Sources) -> list[str]:
    """Every import that the table does not allow."""
    found = []
    for module, source in modules.items():
        part = part_of(module)
        if part is None:
            found.append(f"{module} belongs to no part of the table")
            continue
        _, allowed, forbidden = PARTS[part]
        for target in imports(module, source, modules):
            package = target.partition(".")[0]
            if target.startswith("relative") or package in ("models", "guides", "experiments", "tests"):
                found.append(f"{module}: {target} (imports are absolute, below lvmppl)")
            elif package == "lvmppl":
                if target != module and part_of(target) not in allowed.split():
                    found.append(f"{module} imports {target}, of part {part_of(target)}")
            elif package in forbidden.split():
                found.append(f"{module} imports {target}")
        found += owned_names(module, source)
    return found


def owned_names(module: str, source: str) -> list[str]:
    """Uses of what belongs to another module. Models and guides are Pyro programs and may use all of Pyro."""
    if module.startswith(("lvmppl.models", "lvmppl.guides")):
        return []
    names = set()
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(part for alias in node.names for part in alias.name.split("."))
            names.update((getattr(node, "module", "") or "").split("."))
    return [
        f"{module} uses {name}, which is for {owner} alone"
        for owner, owned in OWNED.items()
        for name in owned
        if name in names and module != owner and not module.startswith(f"{owner}.")
    ]


def module_level(source: str) -> str:
    """A source with only the imports that run when the module is imported."""
    body = [node for node in tree(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(map(ast.unparse, body))


def test_every_import_is_in_the_table() -> None:
    assert violations(checkout()) == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    modules = checkout()
    graph = {
        name: {t for t in imports(name, module_level(source), modules) if t in modules and t != name}
        for name, source in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports run in a circle: {' ← '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("lvmppl.algorithms.em", "from lvmppl.models.mixture import gaussian_mixture"),
        ("lvmppl.algorithms.em", "from lvmppl import spec"),
        ("lvmppl.algorithms.em", "import yaml"),
        ("lvmppl.algorithms.em", "def f():\n    import lvmppl.runner"),
        ("lvmppl.exact.elimination", "from lvmppl.guides import categorical"),
        ("lvmppl.exact.elimination", "from lvmppl.algorithms import em"),
        ("lvmppl.plots", "import torch"),
        ("lvmppl.plots", "from lvmppl.density import Joint"),
        ("lvmppl.gap_plots", "def f():\n    from pyro import sample"),
        ("lvmppl.options", "import torch"),
        ("lvmppl.spec", "import pandas as pd"),
        ("lvmppl.catalogue", "from torch import nn"),
        ("lvmppl.cli", "import torch"),
        ("lvmppl.data.files", "from lvmppl.spec import DataSpec"),
        ("lvmppl.models.mixture", "from lvmppl.guides.categorical import categorical"),
        ("lvmppl.models.mixture", "from lvmppl.models import other"),
        ("lvmppl.models.mixture", "from lvmppl.errors import InputError"),
        ("lvmppl.guides.categorical", "import numpy"),
        ("lvmppl.elbo", "from pyro import poutine"),
        ("lvmppl.elbo", "import pyro\npyro.poutine.trace(f)"),
        ("lvmppl.algorithms.svi", "import pyro\npyro.get_param_store()"),
        ("lvmppl.runner", "from models.mixture import gaussian_mixture"),
        ("lvmppl.runner", "from . import spec"),
        ("lvmppl.newcomer", "import math"),
    ],
)
def test_planted_import_is_caught(module: str, line: str) -> None:
    assert violations({"lvmppl.models.other": "", **checkout(), module: line})


def test_planted_circle_is_caught() -> None:
    planted = {"a": {"b"}, "b": {"c"}, "c": {"a"}}
    with pytest.raises(CycleError):
        TopologicalSorter(planted).prepare()


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "lvmppl", "models", "guides"])
def test_nothing_imports_the_checkouts_folders_by_their_own_names(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in (ROOT / folder).rglob("*.py")
        for target in imports(path.stem, path.read_text(encoding="utf-8"), {})
        if target.partition(".")[0] in ("models", "guides", "experiments")
    ]
    assert wrong == []
