"""The installed wheel, away from the checkout: all of it imports, and every shipped experiment runs by name.

python -I tests/wheel_smoke.py FOLDER        FOLDER: what `pip install --target` made of the wheel
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

COMMAND = "import sys; sys.path.insert(0, sys.argv.pop(1)); from lvmppl.cli import main; main()"
WRITTEN = ["experiment.yaml", "environment.json", "report.html"]
TABLES = ["summary", "history", "parameters", "posterior", "gaps"]


def lvmppl(target: Path, *arguments: str) -> str:
    """Run the program from the wheel, isolated, in the current folder; returns what it printed."""
    command = [sys.executable, "-I", "-c", COMMAND, str(target), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (
        f"lvmppl {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done.stdout


def check_imports(target: Path) -> int:
    """Import every module of the wheel and see that it came from there; returns their number."""
    sys.path.insert(0, str(target))
    package = importlib.import_module("lvmppl")
    names = ["lvmppl"] + [found.name for found in pkgutil.walk_packages(package.__path__, "lvmppl.")]
    names = [name for name in names if name != "lvmppl.__main__"]
    for name in names:
        source = Path(str(importlib.import_module(name).__file__))
        assert source.is_relative_to(target), f"{name} was imported from {source}, not from the wheel"
    for expected in ("lvmppl.models.mixture", "lvmppl.guides.categorical", "lvmppl.exact.elimination"):
        assert expected in names, f"{expected} is not in the wheel"
    return len(names)


def check_metadata(target: Path) -> None:
    """The wheel has its type marker and its program."""
    assert (target / "lvmppl" / "py.typed").is_file(), "py.typed is not in the wheel"
    found = next(
        d for d in importlib.metadata.distributions(path=[str(target)]) if d.metadata["Name"] == "lvmppl"
    )
    programs = {point.name: point.value for point in found.entry_points if point.group == "console_scripts"}
    assert programs == {"lvmppl": "lvmppl.cli:main"}, programs


def shipped(target: Path) -> list[str]:
    """The names of the experiments that the wheel lists."""
    words = [line.split() for line in lvmppl(target, "list").splitlines()]
    names = [line[1] for line in words if line[0] == "experiment"]
    assert "iris_mixture" in names, names
    return names


def check_run(target: Path, experiment: str) -> None:
    """A shipped experiment runs by name, and writes all that it should."""
    out = Path(f"out_{experiment}")
    printed = lvmppl(target, "run", experiment, "--smoke", "--out", str(out))
    assert "report.html" in printed, printed
    expected = WRITTEN + [f"{table}.{kind}" for table in TABLES for kind in ("csv", "parquet")]
    missing = [name for name in expected if not (out / name).is_file()]
    assert not missing, f"{experiment} did not write {', '.join(missing)}"
    assert list((out / "plots").glob("*.png")), f"{experiment} drew no picture"


def main() -> None:
    target = Path(sys.argv[1]).resolve()
    checkout = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as elsewhere:
        os.chdir(elsewhere)
        assert str(checkout) not in sys.path, "run this with python -I"
        count = check_imports(target)
        check_metadata(target)
        names = shipped(target)
        lvmppl(target, "check", names[0])
        for name in names:
            check_run(target, name)
        os.chdir(checkout)
    print(f"wheel: {count} modules import from {target.name}, and {', '.join(names)} run by name")


if __name__ == "__main__":
    main()
