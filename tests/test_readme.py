"""The README's own example: the commands accept its files, and its Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.datasets import load_iris
from typer.testing import CliRunner

from lvmppl import cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block(language: str, word: str) -> str:
    """The one fenced block of a language that holds a word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (found,) = [text for text in blocks if word in text]
    return str(found)


@pytest.mark.parametrize("command", ["check", "run"])
def test_example_of_the_readme_passes_the_commands(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two_causes.py").write_text(block("python", "def two_causes"))
    (tmp_path / "two_causes.yaml").write_text(block("yaml", "two-causes"))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, [command, "two_causes.yaml"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "two-causes" / "report.html").exists() == (command == "run")


def test_python_of_the_readme_gives_the_posterior_of_its_model() -> None:
    x = torch.tensor(load_iris().data[:, 0])
    names: dict[str, object] = {"x": x}
    exec(block("python", "def two_causes"), names)
    exec(block("python", "import lvmppl"), names)
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
