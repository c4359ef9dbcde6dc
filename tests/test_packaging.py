"""setup.cfg says what the checkout holds: nothing is found by scanning, so nothing may be forgotten."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

import lvmppl

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "lvmppl": "lvmppl",
    "models": "lvmppl.models",
    "guides": "lvmppl.guides",
    "experiments": "lvmppl.experiments",
}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_packages_are_the_folders_that_hold_modules(setup: configparser.ConfigParser) -> None:
    found = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(lines(setup["options"]["packages"])) == found


def test_every_package_has_an_init() -> None:
    folders = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_package_folders_are_mapped(setup: configparser.ConfigParser) -> None:
    mapped = dict(re.split(r"\s*=\s*", line) for line in lines(setup["options"]["package_dir"]))
    assert mapped == {package: folder for folder, package in FOLDERS.items()}


def test_every_data_file_is_shipped(setup: configparser.ConfigParser) -> None:
    wanted = {
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    shipped = {
        path
        for package, patterns in setup["options.package_data"].items()
        for pattern in patterns.replace(",", " ").split()
        for folder, name in FOLDERS.items()
        if package == name or package.startswith(f"{name}.")
        for path in (ROOT / folder / package.removeprefix(name).strip(".").replace(".", "/")).glob(pattern)
    }
    assert wanted - shipped == set()
    assert ROOT / "lvmppl" / "py.typed" in shipped


def test_imported_packages_are_required(setup: configparser.ConfigParser) -> None:
    """Every distribution that a module imports at its top is in install_requires."""
    required = {
        re.split(r"[<>=!~;\[]", line)[0].lower() for line in lines(setup["options"]["install_requires"])
    }
    providers = importlib.metadata.packages_distributions()
    imported = {
        match.group(1)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for match in re.finditer(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    outside = {name for name in imported if name not in sys.stdlib_module_names and name != "lvmppl"}
    missing = [n for n in outside if not {p.lower() for p in providers.get(n, [n])} & required]
    assert missing == []


def test_version_is_that_of_the_installed_package() -> None:
    assert importlib.metadata.version("lvmppl") == lvmppl.__version__


def test_torch_is_pinned_by_the_constraints_within_its_range(setup: configparser.ConfigParser) -> None:
    pinned = lines((ROOT / "constraints.txt").read_text())
    assert "torch==2.13.0" in pinned
    assert "torch>=2.5,<3" in lines(setup["options"]["install_requires"])
