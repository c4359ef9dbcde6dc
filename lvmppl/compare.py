"""How far a variational posterior is from the exact one, as tables."""

from __future__ import annotations

import math

import pandas as pd
import torch
from torch import Tensor

from lvmppl.continuous_posteriors import ContinuousPosterior, moment_frame
from lvmppl.density import Evaluation
from lvmppl.elbo import GuideWeights, elbo, expectation
from lvmppl.exact.named import Named
from lvmppl.fitted import Fit
from lvmppl.posteriors import Posterior


def kl_per_datum(variational: Posterior, exact: Posterior) -> Tensor:
    """KL[q(z; λ⁽ⁿ⁾) ‖ p(z | x⁽ⁿ⁾; θ)] [N] (a scalar for coupled data), from the two posteriors' own tables.

    −H[q] − Σ_v E_q log p(z_v | x, later sites): no log evidence and no ELBO enters, so that
    log p(x) = ELBO + KL is a check and not a definition. Sites that q leaves out are summed out of p first.
    """
    names = frozenset(variational.variables)
    if any(v.steps is not None for v in exact.variables.values()):
        return _kl_of_chains(variational, exact)
    weights = GuideWeights(variational.factors, variational.variables, names)
    total = -variational.entropy()
    left_out = [n for n in exact.variables if n not in names]
    for variable, table, plates in exact.conditionals(first=left_out):
        if variable not in names:
            continue
        mean = expectation(table, weights, exact.plate_sizes)
        total = total - _spread(mean, plates, exact, total)
    return _not_negative(total)


def _kl_of_chains(variational: Posterior, exact: Posterior) -> Tensor:
    """log Z − E_q log p̃(z) − H[q]: a chain is summed out whole, and leaves no table of conditionals."""
    names = frozenset(variational.variables)
    own = Evaluation(exact.factors, variational.factors, exact.variables, names, exact.plate_sizes)
    bound, evidence = elbo(own, exact.data_plate), exact.log_evidence_per_datum
    if evidence is None or bound.per_datum is None:
        return _not_negative(torch.tensor(exact.log_evidence) - bound.total)
    # what stands outside of the data plate is part of the totals, of evidence and bound alike
    return _not_negative(evidence - bound.per_datum)


def _not_negative(kl: Tensor) -> Tensor:
    """No divergence is negative; what is so by rounding alone is 0, and anything more stays to be seen."""
    return torch.where(kl > -1e3 * torch.finfo(kl.dtype).eps, kl.clamp_min(0), kl)


def _spread(mean: Named, plates: frozenset[str], exact: Posterior, like: Tensor) -> Tensor:
    """Sum over every plate but the data plate; all plates when the data are coupled."""
    keep = exact.data_plate if like.dim() else None
    axes = [i for i, d in enumerate(mean.dims) if d != keep]
    tensor = mean.tensor.sum(axes) if axes else mean.tensor
    for plate in plates:
        if plate not in mean.dims and plate != keep:
            tensor = tensor * exact.plate_sizes[plate]
    return tensor.expand(like.shape)


def gaps(name: str, fit: Fit) -> pd.DataFrame:
    """A row per datum of a fit with a guide: log_evidence, elbo and their gap, KL[q ‖ p(z | x)].

    Between enumerated sites the gap is that KL, from the two posteriors' tables; with continuous sites it is
    log p(x) − ELBO, an estimate as the ELBO is one, and `log_evidence_error` bounds the error of a quadrature. Where the
    exact posterior does not exist, log_evidence and gap are empty.
    """
    if fit.elbo_per_datum is None:
        return pd.DataFrame(columns=["fit", "datum", "log_evidence", "elbo", "gap"])
    size = len(fit.elbo_per_datum)
    frame = pd.DataFrame(
        {"fit": pd.Series([name] * size, dtype="string"), "datum": pd.array(range(size), dtype="Int64")}
    )
    exact = fit.posterior
    evidence = exact.log_evidence_per_datum if exact is not None else None
    nothing = torch.full((size,), math.nan)
    frame["log_evidence"] = (nothing if evidence is None else evidence).double().cpu().numpy()
    frame["elbo"] = fit.elbo_per_datum.double().cpu().numpy()
    gap = nothing
    if (
        isinstance(exact, Posterior)
        and evidence is not None
        and fit.variational is not None
        and not fit.moments
    ):
        gap = kl_per_datum(fit.variational, exact)
    elif evidence is not None:
        gap = evidence - fit.elbo_per_datum
    frame["gap"] = gap.double().cpu().numpy()
    if isinstance(exact, ContinuousPosterior) and evidence is not None and exact.kind != "exact":
        frame["log_evidence_error"] = exact.log_evidence_error_per_datum.double().cpu().numpy()
    if exact is None and fit.sampled is not None:
        table = agreement(fit)
        local = table[table["datum"].notna()].groupby("datum")
        frame["mean_error"] = frame["datum"].map(local["mean_error"].max())
    return frame


def agreement(fit: Fit) -> pd.DataFrame:
    """How far q is from the draws of the posterior, a row per entry of a continuous site that q draws.

    Columns site, datum, position; mean_error: |E_q z − E_p z| in standard deviations of p; sd_ratio: sd of q over sd of p.
    """
    sampled, empty = fit.sampled, ["site", "datum", "position", "mean_error", "sd_ratio"]
    if sampled is None:
        return pd.DataFrame(columns=empty)
    frames = []
    for site, (mean, sd) in fit.moments.items():
        trusted = sampled.moments(site)
        local = sampled.data_plate in sampled.plates[site]
        error = (mean - trusted[0]).abs() / trusted[1]
        frames.append(moment_frame(site, error, sd / trusted[1], local))
    if not frames:
        return pd.DataFrame(columns=empty)
    table = pd.concat(frames, ignore_index=True).rename(columns={"mean": "mean_error", "sd": "sd_ratio"})
    return table[empty]


def total_gap(fit: Fit) -> float:
    """KL[q ‖ p(z | x)] over all data; log p(x) − ELBO where sites are drawn; NaN without an exact log evidence."""
    if fit.posterior is None:
        return math.nan
    if isinstance(fit.posterior, Posterior) and fit.variational is not None and not fit.moments:
        return float(kl_per_datum(fit.variational, fit.posterior).sum())
    return fit.log_evidence - fit.elbo


__all__ = ["agreement", "gaps", "kl_per_datum", "total_gap"]
