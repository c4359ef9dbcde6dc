"""A posterior as draws of Markov chains, with what says how far the draws can be trusted.

Shapes: C chains, S samples a chain, N data, K states. A continuous site has one *entry* for each element of its value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lvmppl.continuous_posteriors import moment_frame
from lvmppl.errors import InputError
from lvmppl.posterior_frames import categorical_of, probability_frame

RHAT_LIMIT = 1.01  # Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), §4
MIN_DRAWS = 8  # a chain's halves must have four draws each before they can be compared


@dataclass(frozen=True, eq=False)
class SampledPosterior:
    """p(z, c | x; θ) of continuous sites z as draws, of enumerated sites c as probabilities averaged over draws of z.

    draws: by continuous site, [C, S, *plates, *event], the data plate first.
    state_probabilities: by enumerated site, [*plates, K]: the mean over draws of the exact p(c = k | z, x; θ).
    plates: of every site, in the order of its axes. divergences: draws at which the integrator left the energy surface.
    """

    draws: Mapping[str, Tensor]
    state_probabilities: Mapping[str, Tensor]
    plates: Mapping[str, tuple[str, ...]]
    data_plate: str | None
    divergences: int = 0
    kind: str = field(default="mcmc", init=False)

    def moments(self, site: str) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of a continuous site, each [*plates, *event]."""
        self._check(site, self.draws, "continuous")
        values = self.draws[site].flatten(0, 1)
        return values.mean(0), values.std(0, correction=1 if len(values) > 1 else 0)

    def probabilities(self, site: str) -> Tensor:
        """p(c = k | x) of an enumerated site, [*plates, K]."""
        self._check(site, self.state_probabilities, "enumerated")
        return self.state_probabilities[site]

    def marginal(self, site: str) -> Any:
        """The marginal of one site: its draws with equal weights (`pyro.distributions.Empirical`), or a Categorical."""
        if site in self.state_probabilities:
            return categorical_of(self.probabilities(site))
        from pyro.distributions import Empirical

        self._check(site, self.draws, "continuous")
        values = self.draws[site].flatten(0, 1)
        rows = len([p for p in self.plates[site] if p == self.data_plate])  # a marginal for each datum
        values = values.movedim(0, rows)
        return Empirical(values, torch.zeros(values.shape[: rows + 1], dtype=values.dtype))

    def _check(self, site: str, known: Mapping[str, Tensor], what: str) -> None:
        if site not in known:
            listing = ", ".join(known) or "it has none"
            raise InputError("sampled posterior", f"one of the {what} sites ({listing})", f"'{site}'")

    # ------------------------------------------------------------------------------------------- diagnostics

    @cached_property
    def diagnostics(self) -> pd.DataFrame:
        """A row per entry of a continuous site: site, position (in the whole value), rhat, ess, ess_tail.

        rhat: rank-normalised split R̂, the larger of bulk and tail; 1 where the chains agree. ess: effective number of
        independent draws for the centre; ess_tail: for the 5 % and 95 % quantiles (Vehtari et al. 2021, by ArviZ). A
        single chain stands as two, its halves. NaN where there are fewer than 8 draws a chain.
        """
        frames = [self._site_diagnostics(site, values) for site, values in self.draws.items()]
        return pd.concat(frames, ignore_index=True)

    def _site_diagnostics(self, site: str, values: Tensor) -> pd.DataFrame:
        from arviz_stats.base.array import BaseArray  # imports scipy.stats, which only a fit by MCMC needs

        arviz: Any = BaseArray()
        chains, samples = values.shape[:2]
        flat = values.detach().double().reshape(chains, samples, -1).permute(2, 0, 1).numpy()  # [E, C, S]
        shape = tuple(values.shape[2:])
        unknown = np.full(len(flat), np.nan)
        measured = {"rhat": unknown, "ess": unknown, "ess_tail": unknown}
        if samples >= MIN_DRAWS:
            half = samples // 2
            several = flat if chains > 1 else np.stack([flat[:, 0, :half], flat[:, 0, -half:]], axis=1)
            axes = {"chain_axis": 1, "draw_axis": 2}
            with np.errstate(invalid="ignore", divide="ignore"):  # an entry that never moves: NaN
                measured = {
                    "rhat": arviz.rhat(several, **axes),
                    "ess": arviz.ess(flat, **axes, method="bulk"),
                    "ess_tail": arviz.ess(flat, **axes, method="tail", prob=(0.05, 0.95)),
                }
        positions = [",".join(map(str, index)) for index in np.ndindex(shape)]
        return pd.DataFrame({"site": site, "position": positions, **measured})

    @property
    def rhat(self) -> float:
        """The largest split R̂ over all entries; NaN if any is unknown."""
        return float(self.diagnostics["rhat"].to_numpy().max())

    @property
    def ess(self) -> float:
        """The smallest effective sample size, of centre and tails, over all entries; NaN if any is unknown."""
        return float(self.diagnostics[["ess", "ess_tail"]].to_numpy().min())

    @property
    def trustworthy(self) -> bool:
        """Whether the chains agree (every R̂ known and at most 1.01) and none diverged."""
        return self.divergences == 0 and self.rhat <= RHAT_LIMIT

    @property
    def verdict(self) -> str:
        """R̂, effective sample size and divergences in a sentence, with what to do where the draws are not to be trusted."""
        table = self.diagnostics
        if bool(table["rhat"].isna().any()):
            stuck = table[table["rhat"].isna()].iloc[0]
            return (
                f"R-hat of {_entry(stuck)} is unknown: fewer than {MIN_DRAWS} draws a chain, or no movement"
            )
        worst = table.iloc[int(table["rhat"].to_numpy().argmax())]
        fewest = table.iloc[int(table[["ess", "ess_tail"]].to_numpy().min(axis=1).argmin())]
        parts = [
            f"R-hat at most {self.rhat:.4f} ({_entry(worst)}), ESS at least {self.ess:.0f} ({_entry(fewest)})"
        ]
        if self.rhat > RHAT_LIMIT:
            parts.append(
                f"warning: R-hat is above {RHAT_LIMIT}, the chains do not agree yet; draw more samples"
            )
        if self.divergences:
            count = f"{self.divergences} divergent transition{'s' if self.divergences > 1 else ''}"
            parts.append(f"warning: {count}, parts of the posterior may be missing; reparameterise the model")
        return "; ".join(parts)

    # ------------------------------------------------------------------------------------------------ tables

    def to_frame(self) -> pd.DataFrame:
        """A row per site, datum, position and state: columns site, datum, position, state, probability, mean, sd."""
        return pd.concat(list(self._frames()), ignore_index=True)

    def _frames(self) -> Iterator[pd.DataFrame]:
        for site in self.state_probabilities:
            yield probability_frame(site, self.probabilities(site), self.plates[site], self.data_plate)
        for site in self.draws:
            mean, sd = self.moments(site)
            yield moment_frame(site, mean, sd, self.data_plate in self.plates[site])


def _entry(row: Any) -> str:
    return f"{row['site']}[{row['position']}]" if row["position"] else str(row["site"])


__all__ = ["MIN_DRAWS", "RHAT_LIMIT", "SampledPosterior"]
