"""The README's own example: the commands accept its files, and its Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.datasets import load_iris
from typer.testing import CliRunner

import lvmppl
from lvmppl import cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block(language: str, word: str) -> str:
    """The one fenced block of a language that holds a word."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    (found,) = [text for kind, text in blocks if kind == language and word in text]
    return str(found)


def commands() -> list[str]:
    """The lines of the README's second shell block, without their comments."""
    return [line.partition("#")[0].strip() for line in block("sh", "lvmppl check").splitlines()]


@pytest.mark.parametrize("command", commands())
def test_command_of_the_readme_runs_as_it_stands(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two_causes.py").write_text(block("python", "def two_causes"))
    (tmp_path / "two_causes.yaml").write_text(block("yaml", "two-causes"))
    monkeypatch.chdir(tmp_path)
    program, *arguments = command.split()
    result = CliRunner().invoke(cli.app, arguments, prog_name=program)
    assert program == "lvmppl" and result.exit_code == 0, result.output
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else "runs/two-causes"
    assert (tmp_path / out / "report.html").exists() == (arguments[0] == "run")
    assert (tmp_path / "NAME.py").exists() == (arguments[0] == "new")


def test_runs_of_the_readme_are_reported_and_compared_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two_causes.py").write_text(block("python", "def two_causes"))
    (tmp_path / "two_causes.yaml").write_text(block("yaml", "two-causes"))
    monkeypatch.chdir(tmp_path)
    runs = [f"{command} --smoke" for command in commands() if command.startswith("lvmppl run")]
    again = [line.partition("#")[0].strip() for line in block("sh", "lvmppl report").splitlines()]
    assert [command.split()[1] for command in again] == ["report", "compare"]
    for command in runs + again:
        result = CliRunner().invoke(cli.app, command.split()[1:], prog_name="lvmppl")
        assert result.exit_code == 0, result.output
    table = pd.read_csv("runs/comparison/comparison.csv")
    assert list(table["run"]) == ["two-causes"] * 2 + ["more"] * 2 and set(table["data"]) == {"A"}


def test_shipped_experiment_prints_what_the_readme_shows_and_reaches_the_best_known_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experiment of `make demo` as it is shipped, whole. Its stochastic fit may differ a little between machines."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["run", "iris_mixture"], prog_name="lvmppl")
    assert result.exit_code == 0, result.output
    assert not re.search(r"\bnan\b|-0\.0000", result.stdout)
    shown = [line.split() for line in block("", "iris_mixture/report.html").strip().splitlines()]
    printed = [line.split() for line in result.stdout.strip().splitlines()]
    assert [len(line) for line in printed] == [len(line) for line in shown]
    assert printed[0] == shown[0] and printed[-1] == shown[-1]
    assert [line[0] for line in shown[1:-1]] == ["em", "gradient", "local", "amortized"]
    for line, expected in zip(printed[1:-1], shown[1:-1], strict=True):
        numbers = [word for word in expected if re.fullmatch(r"-?\d+\.\d{4}", word)]
        found = [word for word in line if re.fullmatch(r"-?\d+\.\d{4}", word)]
        near = 0.1 if line[0] == "amortized" else 2e-4
        np.testing.assert_allclose([*map(float, found)], [*map(float, numbers)], rtol=0, atol=near)
        words = [word for word in expected if not re.fullmatch(r"-?\d+\.\d+", word)]
        assert [word for word in line if not re.fullmatch(r"-?\d+\.\d+", word)][:-1] == words[:-1]
    summary = pd.read_csv("runs/iris_mixture/summary.csv").set_index("fit")
    np.testing.assert_allclose(summary.loc[["em", "gradient", "local"], "log_evidence"], -180.1855, atol=0.01)
    assert list(summary["status"]) == ["converged", "converged", "converged", "max_steps"]
    assert 0 <= summary.loc["local", "gap"] < 1e-6 < summary.loc["amortized", "gap"]
    gaps = pd.read_csv("runs/iris_mixture/gaps.csv")
    np.testing.assert_allclose(gaps["elbo"] + gaps["gap"], gaps["log_evidence"], rtol=0, atol=1e-6)


def test_two_gaps_of_the_readme_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one θ, what the network loses is the distance of the two bounds; the table of the same family loses nothing."""
    (tmp_path / "gaps.yaml").write_text(block("yaml", "two-gaps"))
    monkeypatch.chdir(tmp_path)
    rows = lvmppl.run("gaps.yaml").summary.set_index("fit")
    network, table = rows.loc["amortized"], rows.loc["best_q"]
    assert network["log_evidence"] == pytest.approx(table["log_evidence"], abs=1e-9)
    assert abs(table["gap"]) < 1e-6 < 1 < network["gap"]
    assert network["gap"] - table["gap"] == pytest.approx(table["elbo"] - network["elbo"], abs=1e-6)


def test_python_of_the_readme_gives_the_posterior_of_its_model() -> None:
    x = torch.tensor(load_iris().data[:, 0])
    names: dict[str, object] = {"x": x}
    exec(block("python", "def two_causes"), names)
    exec(block("python", "import lvmppl"), names)
    exec(block("python", "lvmppl.posterior"), names)
    fit, post = names["fit"], names["post"]
    theta = {name: value.numpy() for name, value in fit.parameters.items()}  # type: ignore[attr-defined]
    joint = np.log(theta["weights"])[:, None] + np.log(theta["table"])
    joint = joint + norm(theta["loc"], 0.3).logpdf(x.numpy()[:, None, None])
    evidence = logsumexp(joint, axis=(1, 2))
    assert post.log_evidence == pytest.approx(evidence.sum(), rel=1e-10)  # type: ignore[attr-defined]
    pairs = np.exp(joint - evidence[:, None, None])
    found = post.pair_marginal("a", "b").numpy()  # type: ignore[attr-defined]
    np.testing.assert_allclose(found, pairs, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(post.marginal("a").probs, pairs.sum(2), rtol=1e-8, atol=1e-12)  # type: ignore[attr-defined]
