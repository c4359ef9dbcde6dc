"""EM on every model of the catalogue, in each of its variants: monotone, every parameter reported, or refused and why."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lvmppl
from lvmppl.catalogue import MODELS
from lvmppl.errors import IntractableError


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def rows() -> dict[str, Tensor]:
    return {"x": noise(43, 4) + 1.3 * (torch.arange(43) % 3).unsqueeze(1)}


def sequences(*features: int) -> dict[str, Tensor]:
    lengths = torch.tensor([11, 3, 9, 1, 7, 11])
    levels = 4.0 * (torch.arange(11) // 3 % 2)
    x = noise(6, 11, *features) + levels.reshape(11, *(1 for _ in features))
    return {"x": x, "lengths": lengths}


def whole(kind: str) -> dict[str, Tensor]:
    """Sequences as the emission wants them."""
    data = sequences()
    x = data["x"].abs().round()
    return {
        **data,
        "x": x.clamp(max=5).long() if kind == "categorical" else x.clamp(max=1) if kind == "bernoulli" else x,
    }


# By model: (arguments, data, parameters with a closed form; None where EM has no exact posterior).
VARIANTS: dict[str, list[tuple[dict[str, Any], dict[str, Tensor], str | None]]] = {
    "factor_analysis": [
        ({"num_factors": 2, "noise": noise}, rows(), "loadings loc variance") for noise in ("diagonal", "spherical")
    ],
    "gaussian_mixture": [
        ({"num_components": 3, "covariance": "full"}, rows(), "weights loc covariance"),
        ({"num_components": 3, "covariance": "tied"}, rows(), "weights loc covariance"),
        ({"num_components": 3, "covariance": "diag"}, rows(), "weights loc variance"),
        ({"num_components": 3, "covariance": "spherical"}, rows(), "weights loc variance"),
    ],
    "hidden_markov": [
        ({"num_states": 2, "emission": "gaussian"}, sequences(2), "initial transition loc variance"),
        ({"num_states": 2, "emission": "poisson"}, whole("poisson"), "initial transition rate"),
        ({"num_states": 3, "emission": "categorical"}, whole("categorical"), "initial transition emission"),
        ({"num_states": 2, "emission": "bernoulli"}, whole("bernoulli"), "initial transition probs"),
    ],
    "factorial_hidden_markov": [
        ({"num_chains": 2, "num_states": 3}, sequences(), "transition level scale"),
    ],
    "linear_gaussian": [({"state_dim": 2}, sequences(3), "transition offset emission variance")],
    "local_level": [({}, sequences(), "level_variance noise_variance")],
    "lda": [({"num_topics": 2}, {"terms": torch.tensor([[0, 1], [2, 1], [0, 2]]), "counts": torch.ones(3, 2)}, None)],
}  # fmt: skip
EACH = [(name, *variant) for name, variants in VARIANTS.items() for variant in variants]
EACH += [(name, {}, {}, "") for name in MODELS if name not in VARIANTS]


def named(variant: tuple[str, dict[str, Any], Any, Any]) -> str:
    return "-".join([variant[0], *(str(v) for v in variant[1].values() if isinstance(v, str))])


@pytest.mark.parametrize("variant", EACH, ids=named)
def test_em_on_the_catalogue_never_decreases_its_objective_and_reports_every_parameter(variant: Any) -> None:
    name, arguments, data, closed = variant
    assert name in VARIANTS, f"add data for '{name}' to VARIANTS above"
    module, _, attribute = MODELS[name][0].partition(":")
    model = partial(getattr(importlib.import_module(module), attribute), **arguments)
    if closed is None:
        with pytest.raises(
            IntractableError,
            match=r"algorithm em: expected latent sites that can be summed or integrated, got proportions \(Dirichlet\)",
        ):
            lvmppl.fit(model, data, algorithm="em")
        return
    fit = lvmppl.fit(model, data, algorithm="em", max_steps=15, tolerance=0)
    steps = np.diff(fit.history["objective"])
    assert fit.status == "max_steps", fit.message
    assert steps.min() >= -1e-9 * abs(fit.log_evidence) and steps.max() > 1e-3
    reported = {s.parameter: s.how for s in fit.m_step}
    assert set(reported) == set(fit.parameters) and all(s.why for s in fit.m_step)
    assert {n for n, how in reported.items() if how == "closed-form"} == set(closed.split())
