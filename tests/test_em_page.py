"""The page on EM runs, block by block, and what it says of parameters, starts, floors, priors and dtypes holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lvmppl.density import isolated

PAGE = Path(__file__).parents[1] / "docs" / "em.md"


def test_every_block_of_the_page_on_em_holds() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 8
    space: dict[str, Any] = {"__name__": "em"}
    with isolated(0, torch.float32):
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), space)
    assert space["fit"].parameters["rate"].dtype == torch.float32
    assert space["fit"].status == "converged"
    assert sorted(space["fit"].parameters["rate"].tolist()) == pytest.approx([1.0, 8.0], abs=0.15)
