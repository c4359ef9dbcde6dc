"""The result every algorithm returns: frozen, detached, and able to go to disk and come back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from lvmppl.continuous_posteriors import ContinuousPosterior
from lvmppl.density import Factor, Variable
from lvmppl.errors import InputError
from lvmppl.posteriors import Posterior
from lvmppl.sampled_posterior import SampledPosterior

HISTORY_COLUMNS = ("restart", "step", "seconds", "objective", "objective_kind")
_FORMAT = "lvmppl-fit-1"


class EStep(NamedTuple):
    """How variational EM updates q of a site: `closed-form`, `gradient` or `fixed`, and why."""

    site: str
    how: str
    why: str


class MStep(NamedTuple):
    """How EM updates a parameter: `closed-form`, `gradient` or `fixed`, and why."""

    parameter: str
    how: str
    why: str


@dataclass(frozen=True, eq=False, repr=False)
class Fit:
    """What a fit found. Numbers are in nats, summed over the data.

    algorithm, guide: what ran. status: `converged` (its criterion was met), `max_steps`, `diverged` or `failed`.
    parameters, guide_parameters: θ and λ, constrained. all_history: a row per restart and step; `history` is the best
    restart's. log_evidence: log p(x; θ) of `log_evidence_kind` (`exact`, …, `none`) with its error; elbo: of a fit with
    a guide, else NaN. posterior: the exact one at θ where it exists. restart: the one that was kept.
    sampled: draws from the posterior at θ, by the algorithm `mcmc` or as the reference of a run.
    """

    algorithm: str
    status: str
    message: str
    steps: int
    seconds: float
    parameters: Mapping[str, Tensor]
    guide_parameters: Mapping[str, Tensor]
    all_history: pd.DataFrame
    restart: int = 0
    guide: str | None = None
    log_evidence: float = float("nan")
    log_evidence_kind: str = "none"
    log_evidence_error: float = float("nan")
    elbo: float = float("nan")
    elbo_error: float = float("nan")
    elbo_per_datum: Tensor | None = None
    test_log_evidence: float = float("nan")  # of rows held out of the fit, at its θ
    test_elbo: float = float("nan")
    posterior: Posterior | ContinuousPosterior | None = None
    variational: Posterior | None = None  # q over its enumerated sites, in the same form
    moments: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # of q's continuous sites: [2, *shape], mean and sd
    m_step: tuple[MStep, ...] = ()  # EM and variational EM
    e_step: tuple[EStep, ...] = ()  # variational EM
    standard_errors: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # of θ, on request; NaN: there is none
    guide_buffers: Mapping[str, Tensor] = field(default_factory=dict)  # what a guide module holds besides λ
    sampled: SampledPosterior | None = None  # draws of the posterior at θ: of mcmc, or a run's reference
    compiled: str = ""  # of EM and variational EM: whether steps run the model function
    estimators: str = ""  # of a fit with a guide: how the gradient of λ came about, site by site

    def __repr__(self) -> str:
        """A line: what was fitted how, and how it ended."""
        bound = "" if math.isnan(self.elbo) else f", ELBO {self.elbo:.4f}"
        evidence = f"log evidence {self.log_evidence:.4f} ({self.log_evidence_kind})"
        names = ", ".join(self.parameters) or "none"
        return f"Fit({self.algorithm}: {self.status} after {self.steps} steps, {evidence}{bound}; parameters {names})"

    @property
    def history(self) -> pd.DataFrame:
        """The best restart's rows of `all_history`."""
        rows = self.all_history[self.all_history["restart"] == self.restart]
        return rows.reset_index(drop=True)

    @property
    def draws(self) -> Mapping[str, Tensor]:
        """Draws of each continuous site by Markov chains, [chains, samples, *plates, *event]; empty without any."""
        return {} if self.sampled is None else self.sampled.draws

    def save(self, path: str | Path) -> None:
        """Write the fit to one safetensors file; `load_fit` reads it back.

        The posterior of continuous sites is not written: `lvmppl.posterior(model, data, parameters=fit.parameters)`
        gives it again.
        """
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for group, values in (
            ("theta", self.parameters),
            ("lambda", self.guide_parameters),
            ("buffer", self.guide_buffers),
            ("q", self.moments),
            ("standard_error", self.standard_errors),
        ):
            tensors.update({f"{group}/{k}": v.detach().contiguous().clone() for k, v in values.items()})
        if self.elbo_per_datum is not None:
            tensors["elbo_per_datum"] = self.elbo_per_datum.contiguous().clone()
        meta: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "algorithm", "status", "message", "steps", "seconds", "restart", "guide", "log_evidence",
                "log_evidence_kind", "log_evidence_error", "elbo", "elbo_error", "test_log_evidence", "test_elbo",
            )
        }  # fmt: skip
        meta["m_step"] = [list(step) for step in self.m_step]
        meta["e_step"] = [list(step) for step in self.e_step]
        meta["history"] = {c: self.all_history[c].tolist() for c in self.all_history.columns}
        meta["posterior"] = _pack_posterior(self.posterior, "posterior", tensors)
        meta["variational"] = _pack_posterior(self.variational, "variational", tensors)
        meta["sampled"] = _pack_sampled(self.sampled, tensors)
        save_file(tensors, str(path), metadata={"format": _FORMAT, "fit": json.dumps(meta)})


def load_fit(path: str | Path) -> Fit:
    """Read a fit that `Fit.save` wrote.

    Raises:
        InputError: the file is missing or is not a fit.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            meta_text = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(str(path), "a fit saved by Fit.save", str(error)) from error
    if meta_text.get("format") != _FORMAT:
        raise InputError(str(path), f"a file of format {_FORMAT}", str(meta_text.get("format")))
    meta = json.loads(meta_text["fit"])
    history = pd.DataFrame(meta.pop("history"))
    m_step = tuple(MStep(*step) for step in meta.pop("m_step", ()))
    e_step = tuple(EStep(*step) for step in meta.pop("e_step", ()))
    posterior = _unpack_posterior(meta.pop("posterior"), "posterior", tensors)
    variational = _unpack_posterior(meta.pop("variational"), "variational", tensors)
    sampled = _unpack_sampled(meta.pop("sampled", None), tensors)
    groups = {g: _group(f"{g}/", tensors) for g in ("theta", "lambda", "buffer", "q", "standard_error")}
    return Fit(
        **meta,
        parameters=groups["theta"],
        guide_parameters=groups["lambda"],
        guide_buffers=groups["buffer"],
        moments=groups["q"],
        standard_errors=groups["standard_error"],
        variational=variational,
        all_history=history,
        m_step=m_step,
        sampled=sampled,
        e_step=e_step,
        elbo_per_datum=tensors.get("elbo_per_datum"),
        posterior=posterior,
    )


def _pack_posterior(
    posterior: Posterior | ContinuousPosterior | None, key: str, tensors: dict[str, Tensor]
) -> Any:
    if not isinstance(
        posterior, Posterior
    ):  # a continuous one holds the model itself and is had again from θ
        return None
    factors = []
    for i, f in enumerate(posterior.factors):
        tensors[f"{key}/factor/{i}"] = f.log_prob.contiguous().clone()
        if isinstance(f.scale, Tensor):
            tensors[f"{key}/scale/{i}"] = f.scale.contiguous().clone()
        factors.append(
            {
                "site": f.site,
                "dims": f.dims,
                "plates": sorted(f.plates),
                "scale": None if isinstance(f.scale, Tensor) else f.scale,
                "scale_dims": f.scale_dims,
                "observed": f.observed,
            }
        )
    for v in posterior.variables.values():
        tensors[f"{key}/support/{v.name}"] = v.support.contiguous().clone()
    return {
        "factors": factors,
        "variables": [{"name": v.name, "plates": v.plates} for v in posterior.variables.values()],
        "plate_sizes": dict(posterior.plate_sizes),
        "data_plate": posterior.data_plate,
        "engine": posterior.engine,
    }


def _unpack_posterior(meta: Any, key: str, tensors: Mapping[str, Tensor]) -> Posterior | None:
    if meta is None:
        return None
    factors = tuple(
        Factor(
            m["site"],
            tensors[f"{key}/factor/{i}"],
            tuple(m["dims"]),
            frozenset(m["plates"]),
            tensors[f"{key}/scale/{i}"] if m["scale"] is None else m["scale"],
            tuple(m["scale_dims"]),
            m["observed"],
        )
        for i, m in enumerate(meta["factors"])
    )
    variables = {
        v["name"]: Variable(v["name"], tuple(v["plates"]), tensors[f"{key}/support/{v['name']}"])
        for v in meta["variables"]
    }
    return Posterior(factors, variables, meta["plate_sizes"], meta["data_plate"], meta["engine"])


def _pack_sampled(sampled: SampledPosterior | None, tensors: dict[str, Tensor]) -> Any:
    if sampled is None:
        return None
    for group, values in (("draws", sampled.draws), ("states", sampled.state_probabilities)):
        tensors.update({f"sampled/{group}/{k}": v.contiguous().clone() for k, v in values.items()})
    plates = {name: list(names) for name, names in sampled.plates.items()}
    return {"plates": plates, "data_plate": sampled.data_plate, "divergences": sampled.divergences}


def _unpack_sampled(meta: Any, tensors: Mapping[str, Tensor]) -> SampledPosterior | None:
    if meta is None:
        return None
    draws, states = (_group(f"sampled/{group}/", tensors) for group in ("draws", "states"))
    plates = {name: tuple(names) for name, names in meta["plates"].items()}
    return SampledPosterior(draws, states, plates, meta["data_plate"], meta["divergences"])


def _group(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def history_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows with at least `HISTORY_COLUMNS`, in that order first."""
    frame = pd.DataFrame(rows)
    for column in HISTORY_COLUMNS:
        if column not in frame:
            frame[column] = pd.Series(dtype="object")
    return frame[[*HISTORY_COLUMNS, *(c for c in frame.columns if c not in HISTORY_COLUMNS)]]


def non_finite(values: Mapping[str, Tensor]) -> list[str]:
    """Names of parameters that hold a NaN or an infinity."""
    return [k for k, v in values.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
