"""The posterior of models with continuous latent sites, in the form `lvmppl.posteriors.Posterior` has for discrete ones.

p(z, c | x) = p(c | x) p(z | c, x): weights over the configurations c of the enumerated sites, and for each a Gaussian
(exact) or a set of quadrature nodes (with an error).

Shapes: C = (C₁, …) configurations, N data, S samples, d stacked continuous dimensions. Nats, detached.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from lvmppl.continuous_posterior_marginals import Kernel, Path, marginal_over, neighbours
from lvmppl.density import Variable
from lvmppl.errors import InputError
from lvmppl.exact.evidences import error_of_sum, scaled
from lvmppl.exact.layout import Block, Layout
from lvmppl.exact.named import log_sum_exp
from lvmppl.exact.quadrature import QuadraturePosterior
from lvmppl.posterior_frames import categorical_of, moment_frame, probability_frame
from lvmppl.posteriors import Mode

_ROUNDING = 1e-9  # error of log Z relative to it from which a Gaussian path is no longer called exact


@dataclass(frozen=True, eq=False, repr=False)
class ContinuousPosterior:
    """p(z | x; θ) by the Gaussian engine or by quadrature; `engine` says which and why.

    kind: `exact`, `quadrature`, or `estimate` where nothing bounds what may have been overlooked between the points that
    were looked at, as under a `pyro.factor` (`proven` is False; `engine` says why), or where quadrature of some datum found
    no bound. log_evidence_error bounds the absolute error of the total: 0 for the Gaussian, ∞ for an estimate; of a
    Gaussian path so stiff that rounding of its precision shows, an estimate too, the error is finite.
    constant: what factors outside of the data plate add to the log evidence, where rows are data; by the states of the
    sites that rows share. singly: the model takes one value of its continuous sites at a time.
    """

    kernel: Kernel
    layout: Layout
    variables: Mapping[str, Variable]
    data_plate: str | None
    engine: str
    constant: Tensor
    proven: bool = True
    singly: bool = False

    def __repr__(self) -> str:
        sites = ", ".join((*self.layout.discrete, *self.layout.summed, *(b.name for b in self.layout.blocks)))
        return f"Posterior of {sites}: log evidence {self.log_evidence:.4f} ({self.kind}); {self.engine}"

    def __post_init__(self) -> None:
        if bool((self._by_row == -torch.inf).any()):
            message = f"log evidence is -inf: the model gives probability 0 to {self._impossible}"
            warnings.warn(message, stacklevel=3)

    @property
    def _impossible(self) -> str:
        """What has probability 0, in words."""
        rows = torch.nonzero(self._by_row == -torch.inf).flatten().tolist()
        return "datum " + _first_few(rows) if self.layout.local else "the data"

    @property
    def kind(self) -> str:
        if not self.proven:
            return "estimate"
        if isinstance(self.kernel, QuadraturePosterior):
            return "quadrature" if math.isfinite(self.log_evidence_error) else "estimate"
        evidence = self.kernel.log_evidence.detach().nan_to_num(neginf=0.0)
        rounded = self.kernel.log_evidence_error > _ROUNDING * (1.0 + evidence.abs())
        return "estimate" if bool(rounded.any()) else "exact"

    @property
    def _lead(self) -> tuple[int, ...]:
        return tuple(range(len(self.layout.discrete)))

    @property
    def row_dims(self) -> tuple[str, ...]:
        """Names of the axes of a row: the enumerated sites, and the data plate where rows are data."""
        plate = (self.data_plate,) if self.layout.local and self.data_plate is not None else ()
        return (*self.layout.discrete, *plate)

    @property
    def _by_row(self) -> Tensor:
        """log p(x⁽ⁿ⁾) [N] or [1]."""
        table = self.kernel.log_evidence.detach()
        for _ in self._lead:
            table = log_sum_exp(table, 0)
        return table.reshape(-1)

    @property
    def log_evidence(self) -> float:
        """log p(x; θ) summed over all data."""
        return float(self._scaled(self._by_row).sum() + self.constant)

    @property
    def log_evidence_per_datum(self) -> Tensor | None:
        """log p(x⁽ⁿ⁾; θ) [N], a scale of the data plate applied; None where global sites couple the data."""
        return self._scaled(self._by_row) if self.layout.local else None

    def _scaled(self, by_row: Tensor) -> Tensor:
        """Values [N] or [1] times the scale of their rows."""
        return scaled(by_row.unsqueeze(0), self.layout, self.data_plate).squeeze(0)

    @property
    def log_evidence_error_per_datum(self) -> Tensor:
        """Bound on the absolute error of log p(x⁽ⁿ⁾) [N]: that of each configuration, weighted by its probability."""
        if not self.proven:
            return torch.full_like(self._by_row, math.inf)
        error = self.kernel.log_evidence_error
        if self._lead:
            last = self._lead[-1]
            error = error_of_sum(self._weights.flatten(0, last), error.flatten(0, last))
        return self._scaled(error.reshape(-1))

    @property
    def log_evidence_error(self) -> float:
        return float(self.log_evidence_error_per_datum.sum())

    @property
    def _weights(self) -> Tensor:
        """p(c | x) [*C, N]; zeros for an impossible datum."""
        table = self.kernel.log_evidence.detach()
        total = self._by_row.reshape(table.shape[len(self._lead) :])
        return torch.where(torch.isfinite(total), (table - total.nan_to_num(neginf=0.0)).exp(), 0.0)

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Points z [S, *C, N, d] and weights [S, *C, N]: E_post[f(z, c)] = Σ_{s, c} w_{s, c} f(z_{s, c}, c).

        Exact for every f that is quadratic in z (for paths: in neighbouring steps), or as exact as the quadrature.
        """
        points, weights = self.kernel.nodes()
        return points, weights * self._weights

    # --------------------------------------------------------------------------------------------- marginals

    def probabilities(self, site: str) -> Tensor:
        """p(c = k | x) of an enumerated site: [N, K], or [K] for a global one; of a summed one [*plates, (T,) K]."""
        axis = self._axis(site)
        others = [a for a in self._lead if a != axis]
        table = self._weights.sum(others) if others else self._weights
        table = table.movedim(0, -1)
        return table if self.layout.local else table.reshape(table.shape[-1])

    def marginal(self, site: str) -> torch.distributions.Distribution:
        """The marginal of one site: Categorical (`.probs` [N, K]) for an enumerated one; for a continuous one a (mixture
        of) MultivariateNormal over its stacked elements [N, D], or the weighted nodes of the quadrature (Empirical).
        """
        if site in self.layout.discrete:
            return categorical_of(self.probabilities(site))
        block = self._block(site)
        if isinstance(self.kernel, Path) and block.size > self.kernel.shape[-1]:
            part = slice(block.begin, block.begin + block.size)
            mean, variance = self.kernel.mean[..., part], self.kernel.variance[..., part]
            return self._mixed(torch.distributions.Normal(mean, variance.sqrt()))
        return marginal_over(self.kernel, self._weights, self.layout.discrete, block.columns)

    def _mixed(self, normal: torch.distributions.Normal) -> torch.distributions.Distribution:
        """Elementwise marginals of a path; only without enumerated sites are they Normal."""
        if self._lead:
            raise InputError(
                "marginal", "a site without enumerated sites beside a long path", "both", "use moments(site)"
            )
        return normal

    @property
    def _variance(self) -> Tensor:
        if isinstance(self.kernel, Path):
            return self.kernel.variance
        return self.kernel.covariance.diagonal(dim1=-2, dim2=-1)

    def moments(self, site: str) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of a continuous site, [N, *inner plates, *event] (global: no N)."""
        block = self._block(site)
        part = slice(block.begin, block.begin + block.size)
        mean = self.kernel.mean[..., part]
        variance = self._variance[..., part]
        weights = self._weights.unsqueeze(-1)
        total = (weights * mean).sum(self._lead) if self._lead else mean
        second = (weights * (variance + (mean - total).square())).sum(self._lead) if self._lead else variance
        inner = [self.layout.plate_sizes[p] for p in block.inner]
        lead = [total.shape[0]] if self.layout.local else []
        shape = (*lead, *inner, *block.event_shape)
        return total.reshape(shape), second.clamp_min(0).sqrt().reshape(shape)

    # ------------------------------------------------------------------------- mode, samples, log-probabilities

    def mode(self) -> Mode:
        """The highest point of p(z, c | x) over configurations (of ties the first) and values z; its log density."""
        point, height = self._peaks()
        weights = self._weights
        height = torch.where(weights > 0, height + weights.log(), -torch.inf)
        count = math.prod(self.layout.discrete_sizes)
        rows = height.shape[len(self._lead) :]
        best = height.reshape(count, *rows).argmax(0)  # [N]
        chosen = point.reshape(count, *rows, -1).gather(
            0, best[None, ..., None].expand(1, *rows, point.shape[-1])
        )[0]
        top = height.reshape(count, *rows).amax(0)
        values = self._as_sites(chosen.unsqueeze(0), best.unsqueeze(0))
        return Mode(
            {k: v.squeeze(0) for k, v in values.items()}, top if self.layout.local else top.reshape(())
        )

    def _peaks(self) -> tuple[Tensor, Tensor]:
        """The highest point of p(z | c, x) in every configuration [*C, N, d], and its log density [*C, N]."""
        if isinstance(self.kernel, QuadraturePosterior):
            point, value = self.kernel.mode()
            return point, value - self.kernel.log_evidence.detach()
        return self.kernel.mean, self.kernel.log_prob(self.kernel.mean)

    def sample(self, num_samples: int, seed: int = 0) -> dict[str, Tensor]:
        """Joint samples by site, [S, N, *inner plates, *event]; exact for the Gaussian engine.

        Raises:
            InputError: the model gives probability 0 to a datum, so that it has no posterior.
        """
        if bool((self._by_row == -torch.inf).any()):
            raise InputError(
                "sample", "data that the model can produce", f"probability 0 for {self._impossible}"
            )
        generator = torch.Generator(device=self.kernel.mean.device).manual_seed(seed)
        draws = self.kernel.sample(num_samples, generator)  # [S, *C, N, d]
        count = math.prod(self.layout.discrete_sizes)
        rows = draws.shape[1 + len(self._lead) : -1]
        weights = self._weights.reshape(count, -1).T  # [rows, C]
        picked = torch.multinomial(weights, num_samples, replacement=True, generator=generator).T  # [S, rows]
        picked = picked.reshape(num_samples, *rows)
        flat = draws.reshape(num_samples, count, *rows, -1)
        index = picked[:, None, ..., None].expand(num_samples, 1, *rows, flat.shape[-1])
        return self._as_sites(flat.gather(1, index)[:, 0], picked)

    def log_prob(self, assignment: Mapping[str, Tensor]) -> Tensor:
        """log p(z, c | x) of a value for every site, shaped as `sample` gives them, with S or without: [S?, N] (global:
        [S?])."""
        lead, rows = self._samples_of(assignment), self._weights.shape[len(self._lead) :]
        z = self._stacked(assignment)
        spread = z.reshape(len(z), *[1] * len(self._lead), *z.shape[1:])
        table = self.kernel.log_prob(spread.expand(len(z), *self._weights.shape, -1)) + self._weights.log()
        table = table.reshape(len(z), math.prod(self.layout.discrete_sizes), *rows)
        index = torch.zeros((len(z), *rows), dtype=torch.long, device=z.device)
        for name, size in zip(self.layout.discrete, self.layout.discrete_sizes, strict=True):
            index = index * size + self._state_of(name, torch.as_tensor(assignment[name])).reshape(-1, *rows)
        result = table.gather(1, index.unsqueeze(1))[:, 0]
        return result.reshape(*lead, *rows) if self.layout.local else result.reshape(lead)

    def _stacked(self, assignment: Mapping[str, Tensor]) -> Tensor:
        """z [S, *rows, d] of the continuous sites' values."""
        rows = self._weights.shape[len(self._lead) :]
        parts = [torch.as_tensor(assignment[b.name]).reshape(-1, *rows, b.size) for b in self.layout.blocks]
        return torch.cat(parts, -1)

    def _samples_of(self, assignment: Mapping[str, Tensor]) -> tuple[int, ...]:
        """(S,) where values have a leading axis of samples, () where not; a value for every site is asked for."""
        sites = (*self.layout.discrete, *self.layout.summed, *(b.name for b in self.layout.blocks))
        missing = [n for n in sites if n not in assignment]
        if missing:
            raise InputError("log_prob", "a value for every latent site", f"none for {', '.join(missing)}")
        block = self.layout.blocks[0]
        value = torch.as_tensor(assignment[block.name])
        shape = self.moments(block.name)[0].shape
        if value.shape == shape:
            return ()
        if value.shape[1:] == shape:
            return (len(value),)
        raise InputError(
            f"log_prob: site '{block.name}'",
            f"shape {tuple(shape)}, or samples of it",
            f"shape {tuple(value.shape)}",
        )

    def _state_of(self, name: str, value: Tensor) -> Tensor:
        match = self.variables[name].support.reshape(-1, *[1] * value.dim()) == value
        if not bool(match.any(0).all()):
            raise InputError(f"log_prob: site '{name}'", "values in its support", "a value outside it")
        return match.to(torch.uint8).argmax(0)

    def pair_marginal(
        self, first: str, second: str | None = None
    ) -> Tensor | torch.distributions.Distribution:
        """The joint marginal of two sites given the data.

        Of two enumerated sites p(j, k | x) [N, J, K]. Of two continuous ones, what `marginal` is of one, over their
        stacked elements (in a path: of one step, or of two neighbouring ones). Of an enumerated and a continuous site
        p(z | c, x), a batch [N, K] of such distributions, to go with `probabilities(c)`. Of a path that is one site:
        its neighbouring steps, Normals over the stacked pairs [N, T − 1, 2d].
        """
        discrete = [n for n in (first, second) if n in self.layout.discrete]
        if second is None or first == second:
            block = self._block(first)
            if not isinstance(self.kernel, Path) or block.size != self.layout.dim or self._lead:
                expected = "two different sites, or one that is a path"
                raise InputError("pair_marginal", expected, f"'{first}'", "use marginal(site)")
            return neighbours(self.kernel)
        if len(discrete) == 2:
            axes = [self._axis(n) for n in (first, second)]
            others = [a for a in self._lead if a not in axes]
            table = self._weights.sum(others) if others else self._weights
            table = table if axes[0] < axes[1] else table.transpose(0, 1)
            table = table.movedim((0, 1), (-2, -1))
            return table if self.layout.local else table.reshape(table.shape[-2:])
        blocks = [self._block(n) for n in (first, second) if n not in discrete]
        columns = [c for block in blocks for c in block.columns]
        given = self._axis(discrete[0]) if discrete else None
        return marginal_over(self.kernel, self._weights, self.layout.discrete, columns, given)

    def entropy(self) -> Tensor:
        """Differential entropy of z plus entropy of c: H[c | x] + E H[z | c, x], per datum [N] (global: scalar)."""
        weights = self._weights
        inner = torch.where(weights > 0, weights * (self.kernel.entropy - weights.log()), 0.0)
        total = inner.sum(self._lead) if self._lead else inner
        return total if self.layout.local else total.reshape(())

    def _as_sites(self, z: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Values by site from stacked z [S, N, d] and configuration numbers [S, N]."""
        lead = [z.shape[0], *([z.shape[1]] if self.layout.local else [])]
        result: dict[str, Tensor] = {}
        rest = index
        for name, size in reversed(list(zip(self.layout.discrete, self.layout.discrete_sizes, strict=True))):
            state = rest % size
            rest = torch.div(rest, size, rounding_mode="floor")
            result[name] = (
                self.variables[name].support[state].reshape(*lead, *self.variables[name].support.shape[1:])
            )
        for block in self.layout.blocks:
            inner = [self.layout.plate_sizes[p] for p in block.inner]
            part = z[..., block.begin : block.begin + block.size]
            result[block.name] = part.reshape(*lead, *inner, *block.event_shape)
        return result

    # ------------------------------------------------------------------------------------------------ tables

    def to_frame(self) -> pd.DataFrame:
        """A row per site, datum, position and state: columns site, datum, position, state, probability, mean, sd."""
        frames = []
        for name in self.layout.discrete:
            shared = name in self.layout.outer or not self.layout.local or self.data_plate is None
            plates = () if shared else (str(self.data_plate),)
            frames.append(probability_frame(name, self.probabilities(name), plates, self.data_plate))
        for block in self.layout.blocks:
            mean, sd = self.moments(block.name)
            frames.append(moment_frame(block.name, mean, sd, self.layout.local))
        return pd.concat(frames, ignore_index=True)

    def _axis(self, site: str) -> int:
        if site not in self.layout.discrete:
            listing = ", ".join(self.layout.discrete) or "it has none"
            raise InputError(
                "posterior",
                f"an enumerated site ({listing})",
                f"'{site}'",
                "use moments(site) or marginal(site)",
            )
        return self.layout.discrete.index(site)

    def _block(self, site: str) -> Block:
        for block in self.layout.blocks:
            if block.name == site:
                return block
        listing = ", ".join([*self.layout.discrete, *(b.name for b in self.layout.blocks)])
        raise InputError("posterior", f"one of the latent sites ({listing})", f"'{site}'")


def _first_few(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:10])) + (", …" if len(rows) > 10 else "")


__all__ = ["ContinuousPosterior", "moment_frame"]
