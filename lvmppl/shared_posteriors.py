"""The posterior of models whose rows share enumerated sites and have continuous latent sites of their own.

    p(g, c, z | x) = p(g | x) Π_n p(c_n | g, x⁽ⁿ⁾) p(z_n | c_n, g, x⁽ⁿ⁾)

g: the sites outside of the data plate, which tie the rows together; given them the rows are independent.
Shapes: G, L configurations of g and of a row's own sites, N data, S samples. Nats, detached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lvmppl.continuous_posteriors import ContinuousPosterior
from lvmppl.errors import InputError
from lvmppl.exact.evidences import by_sharing, error_of_sum, of_rows, of_shared, scaled
from lvmppl.exact.named import log_sum_exp
from lvmppl.posteriors import Mode


class SharedPosterior(ContinuousPosterior):
    """`ContinuousPosterior` of rows that share enumerated sites; log evidence is not a sum over data."""

    @property
    def _of_shared(self) -> Tensor:
        """log p(x, g) [G]."""
        table = self.kernel.log_evidence.detach()
        return of_shared(table, torch.as_tensor(self.constant).to(table), self.layout, self.data_plate)

    @property
    def _shares(self) -> Tensor:
        """p(g | x) [G]; zeros for impossible data."""
        table = self._of_shared
        total = log_sum_exp(table, 0)
        return (table - total).exp() if bool(torch.isfinite(total)) else torch.zeros_like(table)

    @property
    def _given(self) -> Tensor:
        """p(c | g, x⁽ⁿ⁾) [G, L, N]; zeros where it is impossible."""
        table = by_sharing(self.kernel.log_evidence.detach(), self.layout)
        total = log_sum_exp(table, 1).unsqueeze(1)
        return torch.where(torch.isfinite(total), (table - total.nan_to_num(neginf=0.0)).exp(), 0.0)

    @property
    def _weights(self) -> Tensor:
        table = self._shares[:, None, None] * self._given
        return table.reshape(-1, table.shape[-1])[self._numbers.argsort()].reshape(
            self.kernel.log_evidence.shape
        )

    @property
    def _numbers(self) -> Tensor:
        """The configuration number, in the order of `layout.discrete`, of each (g, c): [G · L]."""
        sizes = self.layout.discrete_sizes
        numbers = torch.arange(math.prod(sizes), device=self.kernel.mean.device).reshape(*sizes, 1)
        return by_sharing(numbers, self.layout).flatten()

    @property
    def _by_row(self) -> Tensor:
        """log p(x) [1]: the rows together."""
        return log_sum_exp(self._of_shared, 0).reshape(1)

    @property
    def _impossible(self) -> str:
        rows = of_rows(self.kernel.log_evidence.detach(), self.layout)
        never = torch.nonzero((rows == -torch.inf).all(0)).flatten().tolist()
        return f"datum {', '.join(map(str, never[:10]))}" if never else "the data"

    @property
    def log_evidence(self) -> float:
        """log p(x; θ) of all data."""
        return float(self._by_row)

    @property
    def log_evidence_per_datum(self) -> None:
        """None: shared sites couple the data."""
        return None

    @property
    def log_evidence_error_per_datum(self) -> Tensor:
        """Bound on the absolute error of log p(x), [1]."""
        if not self.proven:
            return torch.full_like(self._by_row, math.inf)
        error = by_sharing(self.kernel.log_evidence_error, self.layout)
        rows = error_of_sum(self._given.movedim(1, 0), error.movedim(1, 0))
        total = scaled(rows, self.layout, self.data_plate).sum(-1)
        return error_of_sum(self._shares, total).reshape(1)

    def probabilities(self, site: str) -> Tensor:
        """p(c = k | x) of an enumerated site: [N, K]; [K] of a shared one."""
        table = super().probabilities(site)
        return table[0] if site in self.layout.outer else table

    def pair_marginal(
        self, first: str, second: str | None = None
    ) -> Tensor | torch.distributions.Distribution:
        """As `ContinuousPosterior.pair_marginal`; of two shared sites [J, K]."""
        found = super().pair_marginal(first, second)
        shared = first in self.layout.outer and second in self.layout.outer
        return found[0] if shared and isinstance(found, Tensor) else found

    def mode(self) -> Mode:
        """The highest point of p(g, c, z | x), and its log density (a scalar)."""
        point, height = self._peaks()
        given = self._given
        tops = torch.where(given > 0, by_sharing(height, self.layout) + given.log(), -torch.inf)
        best, own = tops.max(1)  # [G, N]
        shares = self._shares
        total = torch.where(shares > 0, shares.log() + best.sum(-1), -torch.inf)
        chosen = total.argmax()
        points = by_sharing(point, self.layout)[chosen]  # [L, N, d]
        z = points.gather(0, own[chosen][None, :, None].expand(1, -1, points.shape[-1]))
        values = self._values(z, chosen.reshape(1), own[chosen][None])
        return Mode({k: v.squeeze(0) for k, v in values.items()}, total[chosen])

    def sample(self, num_samples: int, seed: int = 0) -> dict[str, Tensor]:
        """Joint samples by site, [S, N, *inner plates, *event], [S] of a shared one; exact for the Gaussian engine.

        Raises:
            InputError: the model gives probability 0 to the data.
        """
        shares, given = self._shares, self._given
        if not bool(shares.any()):
            expected = "data that the model can produce"
            raise InputError("sample", expected, f"probability 0 for {self._impossible}")
        generator = torch.Generator(device=shares.device).manual_seed(seed)
        draws = self.kernel.sample(num_samples, generator)  # [S, *C, N, d]
        shared = torch.multinomial(shares, num_samples, replacement=True, generator=generator)
        rows = given[shared].movedim(1, -1)  # [S, N, L]
        own = torch.multinomial(rows.flatten(0, 1), 1, generator=generator).reshape(rows.shape[:2])
        count = len(self.layout.discrete)
        split = by_sharing(draws.movedim(0, count), self.layout)  # [G, L, S, N, d]
        sample, row = torch.arange(len(own), device=own.device), torch.arange(own.shape[1], device=own.device)
        z = split[shared[:, None], own, sample[:, None], row]
        return self._values(z, shared, own)

    def _values(self, z: Tensor, shared: Tensor, own: Tensor) -> dict[str, Tensor]:
        """Values by site from z [S, N, d], configurations of the shared sites [S] and of the rows [S, N]."""
        number = self._numbers.reshape(len(self._shares), -1)[shared[:, None], own]
        values = self._as_sites(z, number)
        return {k: v[:, 0] if k in self.layout.outer else v for k, v in values.items()}

    def log_prob(self, assignment: Mapping[str, Tensor]) -> Tensor:
        """log p(g, c, z | x) of a value for every site, shaped as `sample` gives them, with S or without: [S?]."""
        rows = self._weights.shape[-1]
        spread = dict(assignment)
        for name in self.layout.outer:
            if name in spread:
                value = torch.as_tensor(spread[name])
                spread[name] = value.unsqueeze(-1).expand(*value.shape, rows)
        each = super().log_prob(spread)  # log p(g | x) once in every row
        number = torch.zeros(each.shape[:-1], dtype=torch.long, device=each.device)
        for name in self.layout.outer:
            state = self._state_of(name, torch.as_tensor(assignment[name]))
            number = number * self.variables[name].size + state
        log_share = self._shares.log()[number]
        total = each.sum(-1) - (rows - 1) * log_share
        return torch.where(torch.isfinite(log_share), total, -torch.inf)

    def entropy(self) -> Tensor:
        """H[g | x] + Σ_n H[c_n, z_n | g, x], a scalar."""
        each = super().entropy()
        shares = self._shares
        own = -torch.where(shares > 0, shares * shares.log(), 0.0).sum()
        return each.sum() - (len(each) - 1) * own


__all__ = ["SharedPosterior"]
