"""Forward and backward sweeps over Markov chains in the scaled domain, certified to have lost nothing.

    α_t = (α_{t-1} Ã_{t-1}) ∘ ℓ̃_t / c_t,    u_t = ℓ̃_t ∘ β_t / c_t,    β_{t-1} = Ã_{t-1} u_t,

where Ã and ℓ̃ are the factors divided by their largest entry and c_t = 1 at steps that are not normalised. Then
Σ_k α_t β_t = 1, the marginals are γ_t = α_t ∘ β_t and ξ_t = α_t Ã_t u_{t+1}, and log Z = Σ_t log c_t + the logs of
what was divided out (Rabiner 1989, section V.A: the backward pass shares the normaliser of the forward one).

Shapes: B sequences, T steps, K states; time is the first axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvmppl.exact.chain_factors import Chain, columns, pick
from lvmppl.exact.chain_steps import arithmetic, step_by_step

_LONGEST_STRIDE = 32  # steps between two normalisations, however safe
_BLOCK = 1 << 16  # entries of consecutive steps worked on together: half of a core's cache, in float64


class Run(NamedTuple):
    """Consecutive steps `start` … `stop` − 1 during which the first `rows` sequences run."""

    start: int
    stop: int
    rows: int


class Scaled:
    """The sweeps of a batch sorted by falling length; `uncertified` [B] marks those not to be trusted.

    A number below the smallest float becomes 0, and later evidence might have made it matter. Two certificates
    exclude that.

    - *Dense.* If no entry of Ã is below a, then from any state every other is reached with weight in [a, 1], so
      a state of relative weight δ weighs at most δ/a relative to the other paths later on. If a^(M+1) exceeds
      1000 K² T tiny/ε, all that M steps without normalisation can lose is a thousandth of a rounding error.
    - *Bracket.* Otherwise every step is normalised, and a second forward sweep adds a floor φ to every predicted
      state, which is more than the first can have lost (as long as c_t > tiny^(1/3)), even if it forgets states
      below φ/4K. The truth lies between the two, so they must agree to rounding. The backward sweep does forget
      states of α < φ/4K, which bounds β.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        batch, steps, states = chain.log_likelihood.shape
        self.valid = chain.valid()
        self.active = [batch] * steps if self.valid is None else [n for n in self.valid.sum(1).tolist() if n]
        self.runs = _runs(self.active, max(1, min(64, _BLOCK // (batch * states))))
        self.tiny = torch.finfo(chain.log_likelihood.dtype).tiny
        self.arithmetic = arithmetic(chain.log_likelihood, chain.shared)
        self.floor = 64.0 * states**2 * self.tiny ** (2.0 / 3.0)
        self._exponentiate_transition()
        self._exponentiate_likelihood()
        stride = self._dense_stride()
        self.stride = max(1, stride)
        self._sweep_forward()
        self.uncertified = torch.zeros_like(self.impossible)
        if not stride:
            self.uncertified = ~self._bracketed() & ~self.impossible
        self._finish(forgetful=not stride)
        self.log_evidence = self._sum_evidence()

    # -------------------------------------------------------------------------------------------- preparation

    def _exponentiate_transition(self) -> None:
        """Ã and the logs divided out of it, [B|1, T-1|1]."""
        log_transition = self.chain.log_transition
        peak = log_transition.amax((-2, -1))
        self.transition_peak = peak.masked_fill(peak == -torch.inf, 0.0)
        self.transition = (log_transition - self.transition_peak[..., None, None]).exp_()

    def _exponentiate_likelihood(self) -> None:
        """ℓ̃ [T, B, K] with the initial factor in its first step, and the logs divided out of it, [B, T]."""
        log_likelihood = self.chain.log_likelihood
        batch, steps, states = log_likelihood.shape
        first = log_likelihood[:, 0] + self.chain.log_initial
        self.peak = log_likelihood.amax(-1)
        self.peak[:, 0] = first.amax(-1)
        nowhere = self.peak == -torch.inf
        self.impossible = nowhere.any(1)
        if bool(self.impossible.any()):
            self.peak.masked_fill_(nowhere, 0.0)
        self.likelihood = log_likelihood.new_empty(steps, batch, states)
        torch.sub(log_likelihood.transpose(0, 1), self.peak.T.unsqueeze(-1), out=self.likelihood)
        self.likelihood[0] = first - self.peak[:, :1]
        self.likelihood.exp_()

    def _dense_stride(self) -> int:
        """M of the dense certificate, 0 when it cannot be given."""
        steps, _, states = self.likelihood.shape
        if steps == 1:
            return 1
        least = float(self.transition.min())
        if not least > 0.0:
            return 0
        epsilon = torch.finfo(self.likelihood.dtype).eps
        budget = -math.log(1e3 * states**2 * steps * self.tiny / epsilon)
        by_loss = budget / -math.log(least) - 1.0 if least < 1.0 else math.inf
        by_growth = -0.5 * math.log(self.tiny) / math.log(states) if states > 1 else math.inf
        return int(max(0.0, min(by_loss, by_growth, _LONGEST_STRIDE)))

    # ------------------------------------------------------------------------------------------------ forward

    def _sweep_forward(self) -> None:
        """α [T, B, K] (0 beyond the lengths), c [T, B, 1] and Σ_k α at each last step, [B]."""
        self.forward = self._fresh()
        self.forward[0] = self.likelihood[0]
        self.norm = self.likelihood.new_ones(*self.likelihood.shape[:2], 1)
        on, stride = self.arithmetic, self.stride
        with self._loop():
            for run in self.runs:
                steps = zip(
                    range(run.start, run.stop),
                    self._before(self.forward, run),
                    self._matrices(self.transition, run),
                    self._during(self.forward, run),
                    self._during(self.likelihood, run),
                    self._during(self.norm, run),
                    strict=True,
                )
                for t, source, matrix, target, likelihood, norm in steps:
                    on.product(source, matrix, out=target)
                    on.multiply(target, likelihood, out=target)
                    if t % stride == 0:
                        on.total(target, norm)
                        on.divide(target, norm, out=target)
        self.last = (
            self._at_last(self.forward.sum(-1)) if self.valid is not None else self.forward[-1].sum(-1)
        )

    def _bracketed(self) -> Tensor:
        """Whether the sweep with floors agrees with the one without, [B]."""
        possible = self.chain.log_likelihood.transpose(0, 1) > -torch.inf
        upper = self.likelihood.clamp_min(self.tiny).mul_(possible)
        upper[0].mul_(self.chain.log_initial > -torch.inf)
        norms = torch.ones_like(self.norm)
        torch.sum(upper[0], -1, keepdim=True, out=norms[0])
        upper[0].div_(norms[0])
        on, floor = self.arithmetic, self.floor
        scratch = torch.empty_like(upper[:1])
        with self._loop():
            for run in self.runs:
                (target,) = self._during(scratch, Run(0, 1, run.rows))
                steps = zip(
                    self._before(upper, run),
                    self._matrices(self.transition, run),
                    self._during(upper, run),
                    self._during(norms, run),
                    strict=True,
                )
                for source, matrix, likelihood, norm in steps:
                    on.product(source, matrix, out=target)
                    on.add(target, floor, out=target)
                    on.multiply(target, likelihood, out=likelihood)
                    on.total(likelihood, norm)
                    on.divide(likelihood, norm, out=likelihood)
        above = norms.double().log().sum((0, 2))
        below = self.norm.double().log().sum((0, 2)) + self.last.double().log()
        tolerance = torch.finfo(self.likelihood.dtype).eps * (len(self.active) + 16)
        agree = (above - below).abs() <= tolerance
        certified: Tensor = agree & (self.norm.amin((0, 2)) > self.tiny ** (1.0 / 3.0))
        return certified

    def _finish(self, forgetful: bool) -> None:
        """Fold c into ℓ̃, and leave nothing of sequences that are impossible or uncertified."""
        normalised = slice(self.stride, None, self.stride)
        self.likelihood[normalised] /= self.norm[normalised]
        if forgetful:
            self.likelihood.masked_fill_(self.forward < self.floor / (4 * self.forward.shape[-1]), 0.0)
        void = self.impossible | self.uncertified
        if bool(void.any()):
            self.forward[:, void] = 0.0
            self.likelihood[:, void] = 0.0
            self.norm[:, void] = 1.0
            self.last.masked_fill_(void, 1.0)

    def _sum_evidence(self) -> Tensor:
        """log Z [B], summed in float64."""
        norms = self.norm[self.stride :: self.stride].double()
        peak = self.peak if self.valid is None else self.peak.masked_fill(~self.valid.T, 0.0)
        total = norms.log().sum((0, 2)) + self.last.double().log() + peak.sum(1, dtype=torch.float64)
        count = len(self.likelihood) - 1
        if count:
            sums = self.transition_peak.double().expand(-1, count).cumsum(1)
            sums = torch.cat([sums.new_zeros(len(sums), 1), sums], 1)
            total += self._at_last(sums.T.expand(-1, len(total)))
        return total.masked_fill_(self.impossible, -torch.inf).to(self.likelihood.dtype)

    # ----------------------------------------------------------------------------------------------- backward

    def run_backward(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """γ [T, B, K], and Σ w_b ξ_t over what log_transition shares, in its shape; weights [B].

        u and β live for a block of steps only, while the pairs of the block are added to the counts.
        """
        start = self.last.reciprocal().unsqueeze(-1).expand(-1, self.forward.shape[-1])
        transposed = self.transition.mT
        if self.chain.shared and self.chain.homogeneous:
            transposed = transposed.contiguous()
        unary, counts = self._fresh(), torch.zeros_like(self.transition)
        final = len(self.active) - 1
        torch.mul(self.forward[final], start, out=unary[final])
        longest = max((run.stop - run.start for run in self.runs), default=0)
        beta, weighted = self.forward.new_zeros(2, longest, *self.forward.shape[1:])
        after = start.clone()
        on = self.arithmetic
        with self._loop():
            for run in reversed(self.runs):
                size = run.stop - run.start
                here = Run(0, size, run.rows)
                (running,) = self._during(after.unsqueeze(0), Run(0, 1, run.rows))
                steps = zip(
                    reversed(self._during(self.likelihood, run)),
                    reversed(self._during(weighted, here)),
                    reversed(self._matrices(transposed, run)),
                    reversed(self._during(beta, here)),
                    strict=True,
                )
                for likelihood, u, matrix, before in steps:
                    on.multiply(likelihood, running, out=u)
                    on.product(u, matrix, out=before)
                    running = before
                after[: run.rows] = beta[0, : run.rows]
                beta[0] = after  # also of the sequences that end here, which start with this step
                span = slice(run.start - 1, run.stop - 1)
                self._collect(counts, span, weighted[:size, : run.rows], weights)
                torch.mul(self.forward[span], beta[:size], out=unary[span])
        return unary, counts.mul_(self.transition)

    def _collect(self, counts: Tensor, span: slice, u: Tensor, weights: Tensor | None) -> None:
        """Add α_t ⊗ u_{t+1} of the steps in `span` to the counts; for a shared transition as a matrix product."""
        rows, states = u.shape[1:]
        before = self.forward[span, :rows]
        if weights is not None:
            before = before * weights[:rows].unsqueeze(-1)
        if self.chain.homogeneous:
            if self.chain.shared:
                counts[0, 0].addmm_(before.reshape(-1, states).mT, u.reshape(-1, states))
            else:
                counts[:rows, 0].baddbmm_(before.permute(1, 2, 0), u.transpose(0, 1))
        elif self.chain.shared:
            counts[0, span] = torch.bmm(before.mT, u)
        else:
            counts[:rows, span] = (before.unsqueeze(-1) * u.unsqueeze(-2)).transpose(0, 1)

    def pairwise(self, unary: Tensor, t: int) -> Tensor:
        """ξ_t = p(z_t | z_{t+1}, x up to t) γ_{t+1}: [B, K, K]."""
        pair = self.forward[t].unsqueeze(-1) * self.chain.at_step(self.transition, t)
        predicted = pair.sum(-2, keepdim=True)
        return pair * (unary[t + 1].unsqueeze(-2) / predicted.masked_fill(predicted == 0.0, 1.0))

    def draw(self, t: int, uniform: Tensor, following: Tensor) -> Tensor:
        """z_t ~ p(z_t | z_{t+1} = following, x) from `uniform`, [S, B] each; z_t ~ α_t at a last step."""
        running = self.active[t + 1] if t + 1 < len(self.active) else 0
        weights = self.forward[t].expand(len(uniform), -1, -1)
        if running:
            matrix = self.chain.at_step(self.transition, t)
            conditional = self.forward[t] * columns(matrix, following)
            weights = torch.cat([conditional[:, :running], weights[:, running:]], 1)
        return pick(weights, uniform)

    # ------------------------------------------------------------------------------------------ steps as views

    # With a transition of its own for every sequence, a step multiplies rows [n, 1, K] with matrices [n, K, K].

    def _with_row(self, tensor: Tensor) -> Tensor:
        return tensor if self.chain.shared else tensor.unsqueeze(-2)

    def _during(self, tensor: Tensor, run: Run) -> Sequence[Any]:
        """tensor[t] of the sequences that run, for every t of the run; quicker than indexing in the loop."""
        return self.arithmetic.views(self._with_row(tensor[run.start : run.stop, : run.rows]))

    def _before(self, tensor: Tensor, run: Run) -> Sequence[Any]:
        """tensor[t - 1] of the sequences that run, for every t of the run."""
        return self._during(tensor, Run(run.start - 1, run.stop - 1, run.rows))

    def _matrices(self, transition: Tensor, run: Run) -> Sequence[Any]:
        """The matrix, or matrices, from t - 1 to t for every t of the run."""
        span = slice(0, 1) if self.chain.homogeneous else slice(run.start - 1, run.stop - 1)
        matrices = (
            transition[:1, span].squeeze(0)
            if self.chain.shared
            else transition[: run.rows, span].transpose(0, 1)
        )
        steps = self.arithmetic.views(matrices)
        return [steps[0]] * (run.stop - run.start) if self.chain.homogeneous else steps

    def _fresh(self) -> Tensor:
        """A tensor like ℓ̃ to be filled, 0 where padding will not be."""
        return torch.empty_like(self.likelihood) if self.valid is None else torch.zeros_like(self.likelihood)

    def _at_last(self, steps: Tensor) -> Tensor:
        """steps[length - 1, b] for each sequence: [B] from [T, B]."""
        if self.chain.lengths is None:
            return steps[-1]
        return steps.gather(0, (self.chain.lengths - 1).unsqueeze(0)).squeeze(0)

    def _loop(self) -> AbstractContextManager[None]:
        return step_by_step(self.active[0] * self.likelihood.shape[-1] ** 2)


def _runs(active: Sequence[int], longest: int) -> list[Run]:
    """Steps 1, 2, … in runs of at most `longest` with equal numbers of active sequences."""
    runs, start = [], 1
    for stop in range(2, len(active) + 1):
        if stop == len(active) or stop - start == longest or active[stop] != active[start]:
            runs.append(Run(start, stop, active[start]))
            start = stop
    return runs
