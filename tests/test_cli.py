"""The commands, through the program itself: what they print, write, exit with and refuse."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner, Result

from lvmppl import cli
from lvmppl.catalogue import GUIDES, MODELS, SOURCES
from lvmppl.progress import Bars, progress_bars, progress_columns
from lvmppl.spec import shipped_experiments
from lvmppl.terminal import WIDTH, summary_table

ROWS = "a,b,label\n" + "".join(f"{i * 0.7 % 3:.3f},{(i * i) % 5 + i / 9:.3f},n{i}\n" for i in range(12))
EXPERIMENT = """\
name: small
data: {source: rows.csv, columns: {x: [a, b]}}
model: {use: gaussian_mixture, args: {num_components: 2, covariance: diag}}
fits:
  em: {algorithm: em, max_steps: 3}
"""
VARIATIONAL = EXPERIMENT.replace(
    "{algorithm: em, max_steps: 3}", "{algorithm: vem, max_steps: 2, guide: {use: categorical}}"
)
SOURCE = """\
import os, signal
import pyro, torch
import pyro.distributions as dist
from torch.distributions import constraints

ENUMERATE = {"enumerate": "parallel"}

def mixture(x, k: int = 2):
    loc = pyro.param("loc", torch.arange(float(k)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(k) / k), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z].unsqueeze(-1).expand(*z.shape, 2), 1.0).to_event(1), obs=x)

def continuous(x):
    loc = pyro.param("loc", torch.zeros(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0).expand([4]).to_event(1))
        mean = loc + z.sum(-1, keepdim=True)
        pyro.sample("x", dist.StudentT(3.0, mean, 1.0).to_event(1), obs=x)

def no_plate(x):
    loc = pyro.param("loc", torch.zeros(2))
    z = pyro.sample("z", dist.Bernoulli(0.5), infer=ENUMERATE)
    mean = (loc + z[..., None])[..., None, :].expand(*z.shape, *x.shape)
    pyro.sample("x", dist.Normal(mean, 1.0).to_event(2), obs=x)

def raises(x):
    raise RuntimeError("the model's own words")

def wrong_shape(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

class Odd(dist.Normal):
    def log_prob(self, value):
        raise KeyError("the density's own words")

def uncomputable(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", Odd(torch.zeros(2), torch.ones(2)).to_event(1), obs=x)

def twice(x):
    mixture(x)
    mixture(x)

def interrupting_guide(x, at: int = 40):
    interrupting_guide.calls = getattr(interrupting_guide, "calls", 0) + 1
    if interrupting_guide.calls == at:  # long after the guide has been looked at, long before its fit is done
        os.kill(os.getpid(), signal.SIGINT)
    with pyro.plate("data", len(x)):
        probs = pyro.param("q", torch.ones(len(x), 2) / 2, constraint=constraints.simplex, event_dim=1)
        pyro.sample("z", dist.Categorical(probs), infer=ENUMERATE)

def raises_late(x):
    raises_late.calls = getattr(raises_late, "calls", 0) + 1
    if raises_late.calls > 40:
        raise RuntimeError("too late")
    with pyro.plate("data", len(x)):
        probs = pyro.param("q", torch.ones(len(x), 2) / 2, constraint=constraints.simplex, event_dim=1)
        pyro.sample("z", dist.Categorical(probs), infer=ENUMERATE)

def empty_guide(x):
    pass

def stranger_guide(x):
    with pyro.plate("data", len(x)):
        probs = pyro.param("q", torch.ones(len(x), 2) / 2, constraint=constraints.simplex, event_dim=1)
        pyro.sample("zz", dist.Categorical(probs), infer=ENUMERATE)

def raising_guide(x):
    raise RuntimeError("the guide's own words")

def other_states_guide(x, k: int):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(torch.ones(k)))

def other_family_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))

def real_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))

def built_guide(model):
    raise RuntimeError("the factory's own words")

def leaves(x):
    raise SystemExit(3)

class Leaves:
    def __init__(self):
        raise SystemExit(3)

class Width(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        raise ValueError("the class's own words")

    def forward(self, x):
        mixture(x)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with an experiment, its rows and a file of models."""
    (tmp_path / "rows.csv").write_text(ROWS)
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    (tmp_path / "own.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lvmppl(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="lvmppl")


# ------------------------------------------------------------------------------------------ starting


def run_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def test_help_starts_in_under_a_second_without_torch() -> None:
    code = (
        "import sys\nfrom lvmppl.cli import main\nsys.argv = ['lvmppl', '--help']\n"
        "try:\n    main()\nfinally:\n"
        "    print('LOADED', sorted({'torch', 'pandas', 'pyro'} & sys.modules.keys()))"
    )
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        printed = run_python("-c", code)
        seconds.append(time.perf_counter() - began)
        assert printed.endswith("LOADED []\n")
        assert all(command in printed for command in ("run", "check", "list", "new"))
    assert min(seconds) < 1.0


def test_python_m_is_the_same_program() -> None:
    assert run_python("-m", "lvmppl", "list") == lvmppl("list").stdout


@pytest.mark.parametrize(
    "arguments", [["--nonsense"], ["fly"], ["run"], ["run", "a", "b"], ["new", "cat", "x"], ["new", "model"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = lvmppl(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_list_has_a_line_for_each_name() -> None:
    words = [line.split()[:2] for line in lvmppl("list").stdout.splitlines()]
    expected = (
        [["model", n] for n in MODELS] + [["guide", n] for n in GUIDES] + [["source", n] for n in SOURCES]
    )
    assert words == expected + [["experiment", n] for n in shipped_experiments()]


def test_list_names_the_columns_of_a_source() -> None:
    (line,) = [line for line in lvmppl("list").stdout.splitlines() if line.startswith("source      nile ")]
    assert line.endswith("; columns year, volume")


@pytest.mark.parametrize("width", [80, 120])
def test_list_on_a_terminal_says_the_same_in_lines_that_fit(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped = lvmppl("list").stdout
    monkeypatch.setattr("lvmppl.cli.sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setenv("COLUMNS", str(width))
    shown = lvmppl("list").stdout
    assert max(map(len, piped.splitlines())) > 120 >= width >= max(map(len, shown.splitlines()))
    assert shown.split() == piped.split()


# ------------------------------------------------------------------------------------------ new


@pytest.mark.parametrize("folders", [[], ["models", "guides", "experiments"]])
@pytest.mark.parametrize("kind", ["model", "guide", "experiment"])
def test_new_file_is_accepted_by_check(
    kind: str, folders: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in folders:
        Path(name).mkdir()
    result = lvmppl("new", kind, "mine")
    assert result.exit_code == 0, result.output
    written = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    below = {f"{k}s": f"{k}s/" if folders else "" for k in ("model", "guide", "experiment")}
    source = [] if kind == "experiment" else [f"{below[f'{kind}s']}mine.py"]
    experiment = f"{below['experiments']}mine.yaml"
    assert written == sorted([*source, experiment])
    assert result.stdout.endswith(f"next: lvmppl check {experiment}\n")
    checked = lvmppl("check", experiment)
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize("kind", ["model", "guide", "experiment"])
def test_new_file_runs_and_its_gap_equals_evidence_less_bound(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lvmppl("new", kind, "mine").exit_code == 0
    result = lvmppl("run", "mine.yaml", "--smoke", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("report: runs/mine/report.html\n")
    rows = pd.read_csv("runs/mine/summary.csv").set_index("fit")
    assert list(rows.index) == ["em", "local"] and list(rows["log_evidence_kind"]) == ["exact"] * 2
    bound = rows.loc["local"]
    assert bound["elbo"] <= bound["log_evidence"] + 1e-9
    assert bound["gap"] == pytest.approx(bound["log_evidence"] - bound["elbo"], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "taken"), [("model", "mine.py"), ("guide", "mine.yaml"), ("experiment", "mine.yaml")]
)
def test_new_overwrites_nothing_and_writes_nothing_then(
    kind: str, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(taken).write_text("precious")
    result = lvmppl("new", kind, "mine")
    assert result.exit_code == 2
    assert (
        result.stderr == f"new {kind}: expected a name that is not taken, got {taken}; choose another name\n"
    )
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(taken, "precious")]


@pytest.mark.parametrize("name", ["a-b", "3d", "", "a/b", "class", "../up"])
def test_new_refuses_a_name_that_python_does_not_accept(name: str, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    result = lvmppl("new", "model", name)
    assert result.exit_code == 2 and "expected a name that Python accepts" in result.stderr
    assert sorted(folder.rglob("*")) == before


def test_new_experiment_points_at_a_model_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/mine.py").write_text("")
    lvmppl("new", "experiment", "mine")
    assert "use: models/mine.py:mine" in Path("mine.yaml").read_text()


# ------------------------------------------------------------------------------------------ run and check


def test_run_writes_a_folder_and_prints_a_summary_that_fits(folder: Path) -> None:
    result = lvmppl("run", "small.yaml")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split() == [
        "fit",
        "algorithm",
        "guide",
        "status",
        "steps",
        "seconds",
        "log",
        "evidence",
    ]
    assert re.match(r"em\s+em\s+max_steps\s+3\s+\d+\.\d\s+-\d+\.\d{4}", result.stdout.splitlines()[1])
    assert result.stdout.splitlines()[-1] == "report: runs/small/report.html"
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert result.stderr == ""
    assert (folder / "runs" / "small" / "summary.csv").is_file()


def test_override_reaches_the_run_and_its_folder(folder: Path) -> None:
    result = lvmppl(
        "run", "small.yaml", "--set", "fits.em.max_steps=2", "--set", "seed=5", "--out", "there", "--quiet"
    )
    assert result.exit_code == 0, result.output
    summary = pd.read_csv(folder / "there" / "summary.csv")
    assert list(summary["steps"]) == [2]
    assert "seed: 5" in (folder / "there" / "experiment.yaml").read_text()


def test_resolved_experiment_runs_again_to_the_same_summary(folder: Path) -> None:
    assert lvmppl("run", "small.yaml", "--out", "first").exit_code == 0
    (folder / "again.yaml").write_text((folder / "first" / "experiment.yaml").read_text())
    assert lvmppl("run", "again.yaml", "--out", "second").exit_code == 0
    first, second = (
        pd.read_csv(folder / out / "summary.csv").drop(columns="seconds") for out in ("first", "second")
    )
    pd.testing.assert_frame_equal(first, second)


def test_check_prints_what_it_found_and_writes_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    result = lvmppl("check", "small.yaml")
    assert result.exit_code == 0, result.output
    assert re.search(r"ok\s+data\s+rows.csv: x \[12, 2\]", result.stdout)
    assert re.search(r"ok\s+fit em\s+em: one step done", result.stdout)
    assert sorted(folder.rglob("*")) == before


def test_check_names_the_columns_that_do_not_vary(folder: Path) -> None:
    rows = pd.read_csv("rows.csv").assign(school=1.0)
    rows.to_csv("rows.csv", index=False)
    shown = lvmppl("check", "small.yaml", "--set", "data.columns={x: [a, school, b]}").stdout
    assert re.search(r"rows.csv: x \[12, 3\] float64; the same number in every row of school\s+\n", shown)
    assert "same number" not in lvmppl("check", "small.yaml").stdout


def test_failed_fit_leaves_the_others_and_exits_with_1(folder: Path) -> None:
    guide = "{use: 'own.py:raises_late'}"
    fits = f"  broken: {{algorithm: vem, guide: {guide}, e_step: gradient, max_steps: 400}}\n"
    (folder / "small.yaml").write_text(EXPERIMENT + fits)
    result = lvmppl("run", "small.yaml")
    assert result.exit_code == 1, result.output
    summary = pd.read_csv(folder / "runs" / "small" / "summary.csv").set_index("fit")
    assert dict(summary["status"]) == {"em": "max_steps", "broken": "failed"}
    assert "too late" in summary.loc["broken", "message"] and "too late" in result.stdout


@pytest.mark.usefixtures("interruptible")
def test_interrupt_keeps_the_fits_that_had_finished_and_exits_with_130(folder: Path) -> None:
    fits = "  second: {algorithm: svi, guide: {use: 'own.py:interrupting_guide'}, max_steps: 400}\n"
    (folder / "small.yaml").write_text(EXPERIMENT + fits)
    result = lvmppl("run", "small.yaml")
    assert result.exit_code == 130, result.output
    assert re.fullmatch(
        r"interrupted during fit 'second': the results of em are in runs/small\n", result.stderr
    )
    summary = pd.read_csv(folder / "runs" / "small" / "summary.csv")
    assert list(summary["fit"]) == ["em"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a terminal's program gets it; a shell's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_while_tables_are_written_waits_for_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lvmppl import runner

    collect = runner.collect

    def interrupted(*args: Any) -> runner.Run:
        os.kill(os.getpid(), signal.SIGINT)
        return collect(*args)

    monkeypatch.setattr(runner, "collect", interrupted)
    result = lvmppl("run", "small.yaml")
    assert result.exit_code == 130, result.output
    assert result.stderr == (
        "interrupted during the writing of the tables: the results of em are in runs/small\n"
    )
    assert list(pd.read_csv("runs/small/summary.csv")["fit"]) == ["em"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_second_interrupt_while_tables_are_written_ends_the_run_and_says_that_nothing_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(folder.rglob("*"))

    def interrupted(*args: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("lvmppl.runner.collect", interrupted)
    result = lvmppl("run", "small.yaml")
    assert result.exit_code == 130, result.output
    assert result.stderr == "interrupted before the tables were written: nothing is kept\n"
    assert sorted(folder.rglob("*")) == before


def test_interrupt_while_pictures_are_drawn_keeps_tables_and_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lvmppl.plots.objective_curves", interrupted)
    result = lvmppl("run", "small.yaml")
    assert result.exit_code == 130, result.output
    assert result.stderr == (
        "interrupted during the drawing of the pictures: the results of em are in runs/small, "
        "without the pictures\n"
    )
    assert list(pd.read_csv("runs/small/summary.csv")["fit"]) == ["em"]
    assert Path("runs/small/report.html").is_file() and not Path("runs/small/plots").exists()


def test_picture_or_report_that_fails_costs_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no such colour")

    monkeypatch.setattr("lvmppl.plots.objective_curves", broken)
    result = lvmppl("run", "small.yaml")
    assert result.exit_code == 0, result.output
    assert "picture objective: RuntimeError: no such colour\n" in result.stdout
    written = {p.name for p in Path("runs/small").rglob("*")}
    assert {"components_z.png", "report.html", "summary.csv"} <= written and "objective.png" not in written
    monkeypatch.setattr("lvmppl.report.write_report", broken)
    result = lvmppl("run", "small.yaml")
    assert result.exit_code == 0 and "report.html: RuntimeError: no such colour\n" in result.stdout
    assert Path("runs/small/summary.csv").is_file()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SystemExit()])
def test_earlier_run_is_whole_until_the_new_one_stands_in_its_place(
    error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SystemExit stands for a kill: nothing runs that would put things right."""
    assert lvmppl("run", "small.yaml").exit_code == 0
    before = Path("runs/small/summary.csv").read_bytes()
    rename = Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if Path(target) == Path("runs/small") and "-earlier-" not in str(self):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    result = lvmppl("run", "small.yaml")
    (kept,) = Path("runs").rglob("summary.csv")
    assert kept.read_bytes() == before
    if isinstance(error, OSError):
        assert result.exit_code == 2 and "No space left on device" in result.stderr
        assert kept == Path("runs/small/summary.csv")


def test_rows_of_whole_numbers_are_fitted_as_the_same_rows_with_a_point(folder: Path) -> None:
    whole = "a,b\n" + "".join(f"{i},{(i * i) % 7}\n" for i in range(12))
    summaries = []
    for text in (whole, re.sub(r"(\d+)", r"\1.0", whole)):
        (folder / "rows.csv").write_text(text)
        assert lvmppl("run", "small.yaml").exit_code == 0
        summaries.append(pd.read_csv("runs/small/summary.csv").drop(columns="seconds"))
    pd.testing.assert_frame_equal(*summaries)


# ------------------------------------------------------------------------------------------ wrong input


@dataclass(frozen=True)
class Wrong:
    """An input with one thing wrong: what replaces what in which text, and the message it must give."""

    message: str
    replace: tuple[str, str] = ("", "")
    base: str = EXPERIMENT
    files: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


def own(function: str, args: str = "", base: str = EXPERIMENT) -> str:
    """The experiment with a model of own.py."""
    given = "gaussian_mixture, args: {num_components: 2, covariance: diag}"
    assert given in base
    return base.replace(given, f"'own.py:{function}', args: {{{args}}}")


def guided(guide: str, base: str = VARIATIONAL, args: str = "") -> str:
    """The variational experiment with another guide."""
    assert "{use: categorical}" in base
    return base.replace("{use: categorical}", f"{{use: '{guide}', args: {{{args}}}}}")


WRONG: dict[str, Wrong] = {
    # the file
    "not YAML": Wrong("small.yaml:4: expected YAML, .*", ("args: {", "args: {{")),
    "empty file": Wrong("small.yaml: expected a mapping .*, got nothing", base=""),
    "key twice": Wrong("small.yaml:2: name: expected each key once, .*", ("name: small", "name: a\nname: b")),
    "unknown section": Wrong("small.yaml:1: nmae: .*; did you mean 'name'.*", ("name:", "nmae:")),
    "unknown option": Wrong(
        ".*: fits.em.max_step: .*; did you mean 'max_steps'.*", ("max_steps", "max_step")
    ),
    "text for a number": Wrong(
        ".*: fits.em.max_steps: expected a whole number, got 'few'", ("max_steps: 3", "max_steps: few")
    ),
    "no steps": Wrong(
        ".*: fits.em.max_steps: expected a number above 0, got 0", ("max_steps: 3", "max_steps: 0")
    ),
    "unknown dtype": Wrong(".*: dtype: expected float32 or float64, .*", ("name: small", "dtype: half")),
    "unknown algorithm": Wrong(
        ".*: fits.em.algorithm: .*, got 'emm'; did you mean 'em'.*", ("algorithm: em", "algorithm: emm")
    ),
    "em with a guide": Wrong(
        ".*guide is an option of vem, svi only", ("max_steps: 3", "guide: {use: categorical}")
    ),
    "vem without a guide": Wrong(
        ".*: fits.em.guide: expected a guide, .*", ("algorithm: em", "algorithm: vem")
    ),
    "starts from nothing": Wrong(
        ".*: fits.em.start_from: expected another fit .*", ("max_steps: 3", "start_from: fit")
    ),
    "no such experiment": Wrong("nope.yaml: expected an experiment file, .*", arguments=("nope.yaml",)),
    "misspelt experiment": Wrong(
        "iris_mixtures: .*; did you mean 'iris_mixture'.*", arguments=("iris_mixtures",)
    ),
    "a folder": Wrong(".: expected an experiment file, .*, got a folder", arguments=(".",)),
    "wrong override": Wrong(
        "--set fits.em.max_steps=x: .*", arguments=("small.yaml", "--set", "fits.em.max_steps=x")
    ),
    "override of a fit that is not there": Wrong(
        "--set fits.emm.restarts=3: fits.emm: expected a fit of the file .em., or a new one with an algorithm, "
        "got 'emm'; did you mean 'em'.",
        arguments=("small.yaml", "--set", "fits.emm.restarts=3"),
    ),
    "override of an argument": Wrong(
        "small.yaml:3: model: .*got .*13; .*",
        arguments=("small.yaml", "--set", "model.args.num_components=13"),
    ),
    "override through text": Wrong(
        "--set name.x=1: expected a mapping at name, .*", arguments=("small.yaml", "--set", "name.x=1")
    ),
    # the model and the guide by name
    "unknown model": Wrong(
        "small.yaml:3: model.use: .*; did you mean 'gaussian_mixture'.*",
        ("gaussian_mixture", "gauss_mixture"),
    ),
    "guide as a model": Wrong(
        "small.yaml:3: model.use: .*'categorical' is a guide", ("gaussian_mixture", "categorical")
    ),
    "unknown guide": Wrong(
        "small.yaml:5: fits.em.guide.use: .*; did you mean 'categorical'.*", base=guided("categorial")
    ),
    "no model file": Wrong(
        "small.yaml:3: model.use: expected a Python file, got .*nope.py .*",
        base=own("f").replace("own.py", "nope.py"),
    ),
    "no such function": Wrong(
        "small.yaml:3: model.use: .* in own.py, got 'mixtur'; did you mean 'mixture'.*", base=own("mixtur")
    ),
    "file that does not import": Wrong(
        r"small.yaml:3: model.use: expected bad.py to import .*ModuleNotFoundError: .*bad.py:2\).*",
        base=own("f").replace("own.py", "bad.py"),
        files={"bad.py": "\nimport nowhere_at_all\n"},
    ),
    "file with a syntax error": Wrong(
        r"small.yaml:3: model.use: .*SyntaxError: .*bad.py:1\).*",
        base=own("f").replace("own.py", "bad.py"),
        files={"bad.py": "def f(:\n"},
    ),
    "no such package": Wrong(
        "small.yaml:3: model.use: .*no module named nowhere; .*", ("gaussian_mixture", "'nowhere.models:f'")
    ),
    "unknown argument": Wrong(
        "small.yaml:3: model.args.covarance: .*; did you mean 'covariance'.*", ("covariance", "covarance")
    ),
    "missing argument": Wrong(
        "small.yaml:3: model.args.num_components: expected a value, got nothing; .*",
        ("num_components: 2, ", ""),
    ),
    "argument of a wrong type": Wrong(
        "small.yaml:3: model.args.num_components: expected a whole number, got 'two'",
        ("num_components: 2", "num_components: two"),
    ),
    "argument beyond its choices": Wrong(
        "small.yaml:3: model.args.covariance: .*did you mean 'diag'.*", ("diag", "diagonal")
    ),
    "unknown guide argument": Wrong(
        "small.yaml:5: fits.em.guide.args.hiden: expected one of hidden, .*",
        base=VARIATIONAL.replace("use: categorical", "use: categorical_encoder, args: {hiden: [3]}"),
    ),
    # the data
    "unknown source": Wrong(
        "small.yaml:2: data.source: .*, got 'irsi'; did you mean 'iris'.*", ("rows.csv", "irsi")
    ),
    "no data file": Wrong(
        "small.yaml:2: data.source: .*got row.csv, .*did you mean 'rows.csv'.*", ("rows.csv", "row.csv")
    ),
    "unknown kind of file": Wrong(
        "small.yaml:2: data.source: .*, got 'rows.xls'", ("rows.csv", "rows.xls"), files={"rows.xls": "a"}
    ),
    "missing column": Wrong(
        "small.yaml:2: data.columns.x: expected a column of rows.csv .*, got 'c'", ("[a, b]", "[a, c]")
    ),
    "no columns": Wrong(
        "small.yaml:2: data.columns: expected the columns of each tensor, .*", (", columns: {x: [a, b]}", "")
    ),
    "text column": Wrong(
        "small.yaml:2: data.columns.x: expected numbers in column 'label' .*", ("[a, b]", "[a, label]")
    ),
    "no rows": Wrong("small.yaml:2: data.source: expected at least one row .*", files={"rows.csv": "a,b\n"}),
    "empty data file": Wrong(
        "small.yaml:2: data.source: expected at least one row .*, got an empty file", files={"rows.csv": ""}
    ),
    "NaN": Wrong(
        "small.yaml:2: data.columns.x: .* column 'a' .* missing value in data row 13.*",
        files={"rows.csv": ROWS + "nan,3,n\n"},
    ),
    "gap": Wrong(
        "small.yaml:2: data.columns.x: .* column 'b' .* missing value in data row 13.*",
        files={"rows.csv": ROWS + "3,,n\n"},
    ),
    "infinity": Wrong(
        "small.yaml:2: data.columns.x: expected finite .*inf in data row 13.*",
        files={"rows.csv": ROWS + "inf,3,n\n"},
    ),
    "no sequence column": Wrong(
        "small.yaml:2: data.sequence: expected a column of rows.csv .*", ("rows.csv", "rows.csv, sequence: s")
    ),
    "argument for a file": Wrong(
        "small.yaml:2: data.args.k: expected no arguments for a file.*",
        ("rows.csv", "rows.csv, args: {k: 1}"),
    ),
    "all rows held out": Wrong(
        "small.yaml:2: data.test_fraction: .*", ("rows.csv", "rows.csv, test_fraction: 0.99")
    ),
    # model, guide and data together
    "more components than rows": Wrong(
        "small.yaml:3: model: model 'gaussian_mixture': expected arguments and data that it accepts, "
        "got num_components must lie between 1 and the number of rows, 12, got 13; change .*",
        ("components: 2", "components: 13"),
    ),
    "no components": Wrong(
        "small.yaml:3: model: model 'gaussian_mixture': .*num_components must lie .*, got 0; change .*",
        ("components: 2", "components: 0"),
    ),
    "tensor the model lacks": Wrong(
        "small.yaml:2: data.columns.y: expected a tensor that gaussian_mixture takes .x., got 'y'; .*",
        ("{x: [a, b]}", "{x: [a, b], y: a}"),
    ),
    "tensor the data lack": Wrong(
        "small.yaml:2: data.columns.y: expected a tensor that gaussian_mixture takes .x., got 'y'; .*",
        ("{x: [a, b]}", "{y: [a, b]}"),
    ),
    "tensor a class lacks": Wrong(
        "small.yaml:2: data.columns.y: expected a tensor that own.py:Width takes .x., got 'y'; .*",
        ("{x: [a, b]}", "{y: [a, b]}"),
        base=own("Width", "width: 3"),
    ),
    "sequences for a model of rows": Wrong(
        "small.yaml:2: data.columns.lengths: expected a tensor that gaussian_mixture takes .x., .*",
        ("rows.csv", "rows.csv, sequence: label"),
    ),
    "shapes that do not match": Wrong(
        r"small.yaml:3: model: model site 'x': expected an observed value of shape \[12\] \+ \[3\], .*, "
        r"got \[12, 2\]; .*",
        base=own("wrong_shape"),
    ),
    "log-densities that cannot be computed": Wrong(
        "small.yaml:3: model: model 'uncomputable': expected log-densities that can be computed at the start .*, "
        "got KeyError: .*own words.*",
        base=own("uncomputable"),
    ),
    "model that raises": Wrong(
        "small.yaml:3: model: model 'raises' at .*own.py:28: .*RuntimeError: the model's own words.*",
        base=own("raises"),
    ),
    "class that raises": Wrong(
        "small.yaml:3: model: expected a class .*the class's own words", base=own("Width", "width: 3")
    ),
    "model that ends the program": Wrong(
        "small.yaml:3: model: model 'leaves' at .*own.py:.*SystemExit: 3.*", base=own("leaves")
    ),
    "class that ends the program": Wrong(
        "small.yaml:3: model: expected a class .*SystemExit: 3", base=own("Leaves")
    ),
    "site twice": Wrong("small.yaml:3: model: .*own.py:.*Multiple sample sites named .*", base=own("twice")),
    "continuous site under em": Wrong(
        "small.yaml:5: fits.em: .*, algorithm em: expected a log joint .*, got z .*", base=own("continuous")
    ),
    "guide without a site": Wrong(
        "small.yaml:5: fits.em: .*site 'z': .*",
        base=guided("own.py:empty_guide", own("continuous", base=VARIATIONAL)),
    ),
    "guide with a strange site": Wrong(
        "small.yaml:5: fits.em: guide site 'zz': .*", base=guided("own.py:stranger_guide")
    ),
    "guide that raises": Wrong(
        "small.yaml:5: fits.em: .*own.py:.*the guide's own words.*", base=guided("own.py:raising_guide")
    ),
    "guide of a family that is continuous": Wrong(
        "small.yaml:5: fits.em: guide site 'z': expected a discrete family, .*, got Normal, .*",
        base=guided("own.py:other_family_guide"),
    ),
    "guide of a family with another support": Wrong(
        "small.yaml:5: fits.em: guide site 'z': expected values in the support .*GreaterThan.*, got values from -.*",
        base=guided("own.py:real_guide", own("continuous", base=VARIATIONAL)),
    ),
    "guide with more states": Wrong(
        "small.yaml:5: fits.em: guide site 'z': expected the 2 states it has in the model, got 5; .*",
        base=guided("own.py:other_states_guide", args="k: 5"),
    ),
    "guide with fewer states": Wrong(
        "small.yaml:5: fits.em: guide site 'z': expected the 2 states it has in the model, got 1; .*",
        base=guided("own.py:other_states_guide", args="k: 1"),
    ),
    "guide factory that raises": Wrong(
        "small.yaml:5: fits.em: guide 'built_guide' at .*own.py:.*the factory's own words.*",
        base=guided("own.py:built_guide"),
    ),
    "autoguide of a discrete model": Wrong(
        "small.yaml:5: fits.em: guide AutoNormal: .*continuous.*", base=guided("auto_normal")
    ),
    "frozen parameter the model lacks": Wrong(
        "small.yaml:5: fits.em.freeze: .*weights, .*got 'wieghts'; did you mean 'weights'.",
        ("max_steps: 3", "freeze: [wieghts]"),
    ),
    "no such plate": Wrong(
        "small.yaml:3: model.data_plate: .*got rows", ("model: {", "model: {data_plate: rows, ")
    ),
    "batches without a plate": Wrong(
        "small.yaml:5: fits.em.batch_size: expected a model with a data plate, .*",
        base=own("no_plate", base=VARIATIONAL.replace("max_steps: 2", "batch_size: 5")),
    ),
    "test rows without a plate": Wrong(
        "small.yaml:2: data.test_fraction: expected a model with a data plate, .*",
        base=own("no_plate").replace("rows.csv", "rows.csv, test_fraction: 0.25"),
    ),
    # the output
    "folder of other files": Wrong(
        "output folder runs/small: .*folder with other files.*", files={"runs/small/precious": "x"}
    ),
    "file as a folder": Wrong(
        "output folder rows.csv: .*got a file.*", arguments=("small.yaml", "--out", "rows.csv")
    ),
    "folder below a file": Wrong(
        "output folder rows.csv/x: expected a folder that can be made, got a path below the file .*rows.csv; .*",
        arguments=("small.yaml", "--out", "rows.csv/x"),
    ),
    "folder that nobody can make": Wrong(
        "output folder /proc/made/here: expected a folder that can be written, got .*",
        arguments=("small.yaml", "--out", "/proc/made/here"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_exits_with_2_and_one_message_and_writes_nothing(case: str, folder: Path) -> None:
    wrong = WRONG[case]
    assert wrong.replace[0] in wrong.base
    (folder / "small.yaml").write_text(wrong.base.replace(*wrong.replace, 1))
    for name, text in wrong.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = lvmppl("run", *(wrong.arguments or ("small.yaml",)))
    assert result.exit_code == 2, result.output
    assert re.fullmatch(wrong.message + "\n", result.stderr), result.stderr
    assert all(re.search(": expected .+, got .+", line) for line in result.stderr.splitlines())
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    "case", ["unknown option", "unknown model", "missing column", "model that raises", "NaN"]
)
def test_check_refuses_wrong_input_as_run_does(case: str, folder: Path) -> None:
    wrong = WRONG[case]
    (folder / "small.yaml").write_text(wrong.base.replace(*wrong.replace, 1))
    for name, text in wrong.files.items():
        (folder / name).write_text(text)
    run, check = (lvmppl(command, "small.yaml") for command in ("run", "check"))
    assert (check.exit_code, check.stderr) == (2, run.stderr)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_folder_that_cannot_be_written_is_refused(folder: Path) -> None:
    (folder / "locked").mkdir(mode=0o500)
    result = lvmppl("run", "small.yaml", "--out", "locked/out")
    assert result.exit_code == 2 and "expected a folder that can be written" in result.stderr


@pytest.mark.parametrize("at", ["os.access", "tempfile.mkdtemp"])
def test_folder_that_cannot_be_written_is_refused_before_any_fit_whoever_runs_it(
    at: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(at, forbidden if at.startswith("tempfile") else lambda path, mode: False)
    monkeypatch.setattr("lvmppl.runner.run_fits", lambda *args: pytest.fail("a fit has begun"))
    before = sorted(folder.rglob("*"))
    result = lvmppl("run", "small.yaml")
    assert result.exit_code == 2
    assert re.fullmatch(
        "output folder runs/small: expected a folder that can be written, got .*\n", result.stderr
    )
    assert "ermission" in result.stderr and sorted(folder.rglob("*")) == before


# ------------------------------------------------------------------------------------------ what is shown


def test_summary_table_fits_100_columns_and_leaves_out_empty_ones() -> None:
    row = {
        "fit": "a_fit_with_a_rather_long_name",
        "algorithm": "enumeration",
        "guide": "auto_low_rank_multivariate_normal",
        "status": "max_steps",
        "steps": 20000,
        "seconds": 1234.5,
        "log_evidence": -1234567.12345,
        "log_evidence_kind": "lower_bound",
        "elbo": -1234568.12345,
        "gap": 1.0,
        "test_log_evidence": float("nan"),
        "test_elbo": float("nan"),
    }
    lines = printed(pd.DataFrame([row]))
    assert max(map(len, lines)) <= 100
    assert "≥ -1234567.1235" in "\n".join(lines) and "test" not in lines[0]
    tested = printed(pd.DataFrame([{**row, "test_log_evidence": -5.0, "test_elbo": -6.0}]))
    assert max(map(len, tested)) <= 100 and "-5.0000" in "\n".join(tested)


def test_bound_that_is_a_mean_over_draws_is_marked_and_so_is_its_gap() -> None:
    """A sampled ELBO may come out above the log evidence: a negative gap without a mark would look like an error."""
    row = {"algorithm": "svi", "guide": "g", "status": "max_steps", "steps": 9, "seconds": 1.0}
    row |= {"log_evidence": -2.0, "log_evidence_kind": "exact", "test_log_evidence": float("nan")}
    row["test_elbo"] = float("nan")
    exact = {**row, "fit": "exact", "elbo": -2.5, "gap": 0.5, "elbo_error": 0.0}
    drawn = {**row, "fit": "drawn", "elbo": -1.9, "gap": -0.1, "elbo_error": 0.2}
    lines = {line.split()[0]: line.split() for line in printed(pd.DataFrame([exact, drawn])) if line.strip()}
    assert lines["exact"][-2:] == ["-2.5000", "0.5000"]
    assert lines["drawn"][-4:] == ["≈", "-1.9000", "≈", "-0.1000"]


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("tested", [False, True])
def test_summary_table_breaks_names_between_their_words_only(tested: bool, width: int) -> None:
    columns = ["log_evidence", "elbo", "gap", *(["test_log_evidence", "test_elbo"] if tested else [])]
    names = {"fit": "em_with_a_long_name", "algorithm": "enumeration", "guide": "categorical_encoder"}
    row = {**names, "status": "max_steps", "steps": 3000, "seconds": 64.6, "log_evidence_kind": "exact"}
    row |= {
        "test_log_evidence": float("nan"),
        "test_elbo": float("nan"),
        **dict.fromkeys(columns, -12345.6789),
    }
    lines = printed(pd.DataFrame([row]), width)
    assert max(map(len, lines)) <= width
    words = set(re.findall(r"[a-z]{3,}", " ".join(lines).lower()))
    assert {"with", "long", "name", "enumeration", "categorical", "encoder"} <= words
    assert ("test" in words) == tested and sum(line.count("-12345.6789") for line in lines) == len(columns)


def printed(summary: pd.DataFrame, width: int = WIDTH) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(summary_table(summary, width))
    return stream.getvalue().splitlines()


def bars(stream: io.StringIO) -> tuple[Progress, Bars]:
    console = Console(file=stream, force_terminal=True, width=100, _environ={})
    progress = progress_columns(console)
    return progress, Bars(progress)


def test_bars_show_fit_step_objective_rate_and_status() -> None:
    stream = io.StringIO()
    progress, shown = bars(stream)
    with progress:
        shown.start("em", 0, 500)
        shown.update(1, -200.5)
        shown.update(7, -180.1855)
        shown.finish("converged")
        shown.finish("failed")  # of a fit that never began: says nothing
        shown.start("em", 2, 500)
        shown.update(4, -190.0)
        shown.finish("max_steps")
        shown.done("em", 7, -180.1855, "converged")
        shown.done("none", 1, 0.0, "converged")  # of a fit without a bar
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "1/500" in text and "-200.5000" in text
    assert re.search(r"em .*7/500.*-180\.1855.* \d+/s.*converged", text)
    assert "failed" not in text
    assert "em (restart 2)" in text and "-190.0000" in text
    (task,) = (
        progress.tasks
    )  # the restart that the fit keeps: its bar is full, its count is of all it might have done
    assert (task.description, task.completed, task.total) == ("em", 7, 7)
    assert task.fields["count"] == "7/500"
    assert task.fields["objective"] == "-180.1855" and task.fields["status"] == "converged"


@pytest.mark.parametrize(("status", "total"), [("converged", 7), ("max_steps", 500), ("diverged", 500)])
def test_bar_is_full_where_nothing_is_left_to_do(status: str, total: int) -> None:
    progress, shown = bars(io.StringIO())
    with progress:
        shown.start("em", 0, 500)
        shown.update(7, -180.1855)
        shown.finish(status)
        shown.done("em", 7, -180.1855, status)
    assert progress.tasks[0].total == total


def test_something_is_shown_before_the_first_fit_and_goes_with_it() -> None:
    stream = io.StringIO()
    progress, shown = bars(stream)
    with progress:
        shown.loading()
        assert "loading" in stream.getvalue() and "None" not in stream.getvalue()
        shown.start("em", 0, 500)
        assert [task.description for task in progress.tasks] == ["em"]


def test_bars_are_drawn_at_most_ten_times_a_second() -> None:
    stream = io.StringIO()
    progress, shown = bars(stream)
    with progress:
        shown.start("svi", 0, 100_000)
        began = time.perf_counter()
        for step in range(100_000):
            shown.update(step, -1.0)
        seconds = time.perf_counter() - began
        drawn = stream.getvalue().count("/100000")
    assert 1 <= drawn <= seconds * 10 + 3  # the first step, and the frames of beginning and ending


def test_no_bars_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with progress_bars(quiet=False) as shown:
        assert shown is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bars(quiet=True) as shown:
        assert shown is None
    with progress_bars(quiet=False) as shown:
        assert isinstance(shown, Bars)
