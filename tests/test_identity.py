"""The page on the identity of gradient ascent's and EM's first direction runs, and says what is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from lvmppl.density import isolated

PAGE = Path(__file__).parents[1] / "docs" / "identity.md"


def test_gradient_of_log_evidence_equals_that_of_q_and_its_posterior_mean() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    space: dict[str, Any] = {"__name__": "identity"}
    with isolated(0, torch.float64):
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), space)
    assert float(space["ascent"]["loc"].norm()) > 0.1
    torch.testing.assert_close(space["em"], space["ascent"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(space["mean"], space["ascent"], rtol=1e-10, atol=1e-12)
