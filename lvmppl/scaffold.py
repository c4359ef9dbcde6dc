"""Commented starting points for a model, a guide or an experiment, which `lvmppl check` accepts."""

from __future__ import annotations

import keyword
import os
from pathlib import Path
from string import Template
from typing import Literal

from lvmppl.errors import InputError
from lvmppl.wording import shown

Kind = Literal["model", "guide", "experiment"]

_MODEL = '''"""$name: say here what the data are and what the latent variables stand for.

    weights ─→ z ─→ x ←─ loc, scale        one z for each of the N rows
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


def $name(x: Tensor, num_components: int = 3) -> None:
    """p(x, z; θ) for x [N, D]. The data tensors come as keywords, and so do the experiment's args."""
    # θ is every pyro.param; its second argument is the start: K rows spread over the data, and the data's sd.
    start = x[torch.linspace(0, len(x) - 1, num_components).long()]
    even = torch.ones(num_components) / num_components
    weights = pyro.param("weights", even, constraint=constraints.simplex)  # [K]
    loc = pyro.param("loc", start.clone())  # [K, D]
    scale = pyro.param("scale", x.std(0).expand_as(start).clone(), constraint=constraints.positive)  # [K, D]
    with pyro.plate("data", len(x)):  # the rows, or the batch of them that is handed in
        # "enumerate": summed over exactly, wherever the algorithm needs no guide for it
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})  # [N]
        pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x)
'''

_GUIDE = '''"""$name: say here what q(z; λ) can express, and what it cannot.

    λ⁽ⁿ⁾ ─→ z⁽ⁿ⁾        a row of probabilities for each of the N rows
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


def $name(x: Tensor, num_components: int = 3) -> None:
    """q(z; λ) for the model's site z. It gets the data, its args, and the model's args of the same name."""
    with pyro.plate("data", len(x)):
        # In the plate a param is a table of N rows, of which the batch's come back: this needs event_dim.
        start = torch.ones(len(x), num_components) / num_components
        probs = pyro.param("z_probs", start, constraint=constraints.simplex, event_dim=1)  # [N, K]
        pyro.sample("z", dist.Categorical(probs), infer={"enumerate": "parallel"})
'''

_EXPERIMENT = """\
# $name: say here what is compared, and why.
# Try it with `lvmppl check`, then `lvmppl run`.
name: $name
seed: 0
dtype: float64
data:
  # a source of `lvmppl list`, or a .csv .parquet .npy .npz .txt file relative to this one
  source: iris
  # the model's keyword: its columns
  columns: {x: [sepal_length, sepal_width, petal_length, petal_width]}
  standardize: false
  test_fraction: 0.0  # rows held out of every fit, scored in the summary
model:
  # a model of `lvmppl list`, package.module:name, or file.py:name relative to this file
  use: $model
  args: {num_components: 3}
fits:  # any number; the summary compares them
  em: {algorithm: em, restarts: 3}
  local: {algorithm: vem, guide: {use: $guide}, max_steps: 100}
"""


_SOURCES = {"model": _MODEL, "guide": _GUIDE}


def new(kind: Kind, name: str, folder: Path) -> list[Path]:
    """Write a starting point; returns what was written, the experiment to check and run last.

    A model goes to `models/`, a guide to `guides/`, an experiment to `experiments/`, where there is one in
    the folder, else into the folder itself. Nothing is ever overwritten.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        expected = "a name that Python accepts (letters, digits and _, no digit first, no keyword)"
        raise InputError(f"new {kind}", expected, shown(name))
    source = _place(folder, "guides" if kind == "guide" else "models") / f"{name}.py"
    experiment = _place(folder, "experiments") / f"{name}.yaml"
    written = {} if kind == "experiment" else {source: Template(_SOURCES[kind]).substitute(name=name)}
    written[experiment] = _experiment(kind, name, source, experiment)
    for path in written:
        if path.exists():
            raise InputError(f"new {kind}", "a name that is not taken", str(path), "choose another name")
    for path, text in written.items():
        try:
            with path.open("x", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            got = f"{path} ({error.strerror})"
            raise InputError(f"new {kind}", "a folder that can be written", got) from None
    return list(written)


def _place(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _experiment(kind: Kind, name: str, source: Path, experiment: Path) -> str:
    """The experiment that uses the new file; one made alone points at a model file of its own name."""
    use = f"{Path(os.path.relpath(source, experiment.parent)).as_posix()}:{name}"
    text = _EXPERIMENT
    if kind == "experiment" and source.exists():
        text = text.replace("  use: $model", f"  # your own model of this name: use: {use}\n  use: $model")
    model = use if kind == "model" else "gaussian_mixture"
    guide = use if kind == "guide" else "categorical"
    return Template(text).substitute(name=name, model=model, guide=guide)
