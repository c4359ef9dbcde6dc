"""Exact inference in Markov chains: log Z with its gradient, marginals, the best path, samples, entropy.

All functions take the log-factors of B chains,

    log p̃(z) = a(z_1) + Σ_t A_t(z_t, z_{t+1}) + Σ_t ℓ_t(z_t),

as `log_initial` a [B|1, K], `log_transition` A [B|1, T-1|1, K, K] (from a row's state to a column's),
`log_likelihood` ℓ [B, T, K] and `lengths` [B] in 1 … T (None: all T; what stands beyond a length is never read).
A leading 1 means "the same for all". Nothing need be normalised, −∞ may stand anywhere, +∞ nowhere.

For a hidden Markov model ℓ_t(k) = log p(x_t | z_t = k), Z = p(x), and p̃/Z = p(z | x). All in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvmppl.errors import InputError
from lvmppl.exact.chain_factors import Chain, path_factors
from lvmppl.exact.chain_sweep import Sweep
from lvmppl.exact.named import log_sum_exp

_PAIRS_HELD = 1 << 24  # entries of B·T·K² pair marginals from which entropy goes step by step
_PAIRS_AT_ONCE = 1 << 22  # entries of B·K² scores in one step of Viterbi, which bounds its memory


def log_partition(
    log_initial: Tensor, log_transition: Tensor, log_likelihood: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """log Z = log Σ_z p̃(z) of each chain, [B] nats; −∞ where no path has weight.

    The gradient is one backward sweep: with respect to ℓ the marginals p(z_t = k | x), to a and A the expected numbers
    of starts and transitions, summed to the shape the argument came in. Where Z = 0 or a factor is −∞ it is 0.
    Under `create_graph=True` the gradient is recomputed in the log domain by plain autograd, at the cost of
    O(B·T·K²) memory, so that it can be differentiated again.

    Memory: O(B·T·K), and for a transition per step or per sequence its own size once more. Time: O(B·T·K²).
    Raises InputError for shapes or lengths that do not fit.
    """
    chain = _chain(log_initial, log_transition, log_likelihood, lengths)
    result: Tensor = _LogPartition.apply(  # type: ignore[no-untyped-call]
        chain.log_initial, chain.log_transition, chain.log_likelihood, chain.lengths
    )
    return result


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *factors: Any) -> Tensor:
        ctx.save_for_backward(*factors)
        ctx.sweep = Sweep(Chain(*factors))
        log_evidence: Tensor = ctx.sweep.log_evidence
        return log_evidence.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chain = Chain(*ctx.saved_tensors)
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            return *_differentiable_gradient(chain, grads[0], ctx.needs_input_grad[:3]), None
        weights = None if bool((grads[0] == 1.0).all()) else grads[0]
        sweep: Sweep = ctx.sweep
        unary, counts = sweep.run_backward(weights)
        if weights is not None:
            unary = unary * weights.unsqueeze(-1)
        return _initial_counts(chain, unary), counts, unary.transpose(0, 1), None


def _initial_counts(chain: Chain, unary: Tensor) -> Tensor:
    """The first marginals of `unary` [T, B, K], summed to the shape of log_initial."""
    return unary[0].clone() if len(chain.log_initial) == unary.shape[1] else unary[0].sum(0, keepdim=True)


def _differentiable_gradient(chain: Chain, weights: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    tensors = (chain.log_initial, chain.log_transition, chain.log_likelihood)
    wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            _composed_log_partition(chain),
            wanted,
            weights,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return [next(found) if need else None for need in needed]


def _composed_log_partition(chain: Chain) -> Tensor:
    """log Z [B] by the forward recursion in the log domain, from differentiable operations."""
    chain, valid = chain.padded(), chain.valid()
    log_alpha = chain.log_initial + chain.log_likelihood[:, 0]
    for t in range(1, chain.log_likelihood.shape[1]):
        pairs = log_alpha.unsqueeze(-1) + chain.at_step(chain.log_transition, t - 1)
        following = log_sum_exp(pairs, -2) + chain.log_likelihood[:, t]
        log_alpha = following if valid is None else torch.where(valid[t].unsqueeze(-1), following, log_alpha)
    return log_sum_exp(log_alpha, -1)


@dataclass(frozen=True)
class ChainPosterior:
    """The posterior over state sequences of B chains (no gradients).

    log_evidence: log Z [B], nats.
    unary: p(z_t = k | x) [B, T, K]; rows beyond a length are 0, and all of an impossible sequence (log Z = −∞) is.
    initial, transition: expected numbers of starts and of transitions, in the shapes of log_initial and
    log_transition (summed over the sequences and steps that share them).
    """

    log_evidence: Tensor
    unary: Tensor
    initial: Tensor
    transition: Tensor
    chain: Chain = field(repr=False)
    sweep: Sweep = field(repr=False)

    def pairwise(self, t: int) -> Tensor:
        """p(z_t = j, z_{t+1} = k | x) for one t in 0 … T-2: [B, K, K]; 0 where t + 1 is beyond the length."""
        steps = self.unary.shape[1]
        if not 0 <= t < steps - 1:
            raise InputError("pairwise", f"a step from 0 to {steps - 2}", str(t))
        return self._pair(t)

    def _pair(self, t: int) -> Tensor:
        return self.sweep.pairwise(self.unary.transpose(0, 1), t)

    def all_pairwise(self) -> Tensor:
        """All consecutive pair marginals [B, T-1, K, K]; memory B·T·K², which nothing else here needs.

        They are the expected counts of a chain that shares no transition between sequences or steps.
        """
        batch, steps, states = self.unary.shape
        if steps == 1:
            return self.unary.new_zeros(batch, 0, states, states)
        own = self.chain.log_transition.expand(batch, steps - 1, states, states)
        return Sweep(replace(self.chain, log_transition=own)).run_backward()[1]

    def entropy(self) -> Tensor:
        """H[p(z | x)] = Σ_t H[z_t, z_{t+1}] − Σ_{1<t<T} H[z_t], [B] nats; 0 for an impossible sequence.

        Unlike log Z − E[log p̃] it does not cancel large numbers.
        """
        batch, steps, states = self.unary.shape
        single = torch.special.entr(self.unary).sum(-1).double()  # [B, T]
        if steps == 1 or batch * steps * states**2 <= _PAIRS_HELD:
            pairs = torch.special.entr(self.all_pairwise()).sum((-2, -1)).double()
        else:
            each = (torch.special.entr(self._pair(t)).sum((-2, -1)).double() for t in range(steps - 1))
            pairs = torch.stack(list(each), 1)
        changes = pairs - single[:, :-1]
        if self.chain.lengths is not None:
            valid = torch.arange(1, steps, device=changes.device) < self.chain.lengths.unsqueeze(-1)
            changes = torch.where(valid, changes, 0.0)
        total: Tensor = (single[:, 0] + changes.sum(1)).clamp_min_(0.0)
        return total.to(self.unary.dtype)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Sequences z ~ p(z | x), independent: [S, B, T]; 0 beyond a length, and meaningless where log Z = −∞."""
        return self.sweep.sample(num_samples, generator)

    def log_prob(self, states: Tensor) -> Tensor:
        """log p(z | x) of states [..., B, T]: [..., B]; −∞ for an impossible sequence."""
        joint = _log_joint(self.chain, states)
        impossible = self.log_evidence == -torch.inf
        return (joint - self.log_evidence.masked_fill(impossible, 0.0)).masked_fill(impossible, -torch.inf)

    def mode(self) -> tuple[Tensor, Tensor]:
        """The most probable sequence [B, T] and its log p(z | x) [B]."""
        states, _ = _viterbi(self.chain)
        return states, self.log_prob(states)


@torch.no_grad()
def marginals(
    log_initial: Tensor, log_transition: Tensor, log_likelihood: Tensor, lengths: Tensor | None = None
) -> ChainPosterior:
    """The posterior over the states of each chain by one forward and one backward sweep; memory O(B·T·K)."""
    chain = _chain(log_initial, log_transition, log_likelihood, lengths).detach()
    sweep = Sweep(chain)
    unary, counts = sweep.run_backward()
    return ChainPosterior(
        log_evidence=sweep.log_evidence,
        unary=unary.transpose(0, 1),
        initial=_initial_counts(chain, unary),
        transition=counts,
        chain=chain,
        sweep=sweep,
    )


@torch.no_grad()
def sample(
    log_initial: Tensor,
    log_transition: Tensor,
    log_likelihood: Tensor,
    lengths: Tensor | None = None,
    *,
    num_samples: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sequences z ~ p̃(z)/Z [S, B, T] by forward filtering and backward sampling; 0 beyond the lengths."""
    return Sweep(_chain(log_initial, log_transition, log_likelihood, lengths)).sample(num_samples, generator)


def entropy(
    log_initial: Tensor, log_transition: Tensor, log_likelihood: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """H[p(z | x)] of each chain, [B] nats."""
    return marginals(log_initial, log_transition, log_likelihood, lengths).entropy()


@torch.no_grad()
def viterbi(
    log_initial: Tensor, log_transition: Tensor, log_likelihood: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """max_z log p̃(z) and where: states [B, T] (0 beyond the lengths) and log p̃ [B], nats.

    Of equally good states the lowest is taken, from the last step backwards. Where Z = 0 the states are all 0 and the
    value is −∞. Memory O(B·T·K).
    """
    return _viterbi(_chain(log_initial, log_transition, log_likelihood, lengths).detach())


def log_joint(
    log_initial: Tensor,
    log_transition: Tensor,
    log_likelihood: Tensor,
    states: Tensor,
    lengths: Tensor | None = None,
) -> Tensor:
    """log p̃(z) of states [..., B, T] under each chain: [..., B] nats, differentiable.

    States beyond a length count for nothing.
    """
    return _log_joint(_chain(log_initial, log_transition, log_likelihood, lengths), states)


def _log_joint(chain: Chain, states: Tensor) -> Tensor:
    likelihood = chain.padded().log_likelihood
    batch, steps, _ = likelihood.shape
    if states.shape[-2:] != (batch, steps):
        raise InputError("states", f"a shape ending in {(batch, steps)}", str(tuple(states.shape)))
    valid = chain.valid()
    inside = torch.ones((), dtype=torch.bool, device=states.device) if valid is None else valid.T
    states = torch.where(inside, states, 0)
    rows = torch.arange(batch, device=states.device)
    unary = likelihood[rows.unsqueeze(-1), torch.arange(steps, device=states.device), states]
    initial, moves = path_factors(chain.log_initial, chain.log_transition, states)
    if valid is not None:
        unary = torch.where(inside, unary, 0.0)
        moves = torch.where(inside[:, 1:], moves, 0.0)
    return initial + moves.sum(-1) + unary.sum(-1)


def _viterbi(chain: Chain) -> tuple[Tensor, Tensor]:
    batch, _, states = chain.log_likelihood.shape
    size = max(1, _PAIRS_AT_ONCE // states**2)
    paths = [
        _best_paths(chain.rows(rows))
        for rows in torch.arange(batch, device=chain.log_likelihood.device).split(size)
    ]
    best = torch.cat(paths)
    value = _log_joint(chain.double(), best)
    return torch.where(value.unsqueeze(-1) > -torch.inf, best, 0), value.to(chain.log_likelihood.dtype)


def _best_paths(chain: Chain) -> Tensor:
    """[b, T] states. Scores are kept relative to the best of their step, so that float32 does not drown in long chains.

    In numpy, whose small operations cost a fraction of torch's; the state before is the last axis of a step's scores.
    """
    chain, valid = chain.padded(), chain.valid()
    batch, steps, states = chain.log_likelihood.shape
    homogeneous, running = chain.homogeneous, None if valid is None else valid.unsqueeze(-1).numpy()
    moves = chain.log_transition.mT.contiguous().numpy()  # [b|1, T-1|1, K after, K before]
    likelihood = chain.log_likelihood.transpose(0, 1).contiguous().numpy()
    came_from = np.empty((steps, batch, states), np.int16 if states <= np.iinfo(np.int16).max else np.int32)
    same, lowest = np.arange(states), np.finfo(likelihood.dtype).min
    score = chain.log_initial.numpy() + likelihood[0]
    for t in range(1, steps):
        pairs = score[:, None, :] + moves[:, 0 if homogeneous else t - 1]
        previous, best = pairs.argmax(-1), pairs.max(-1) + likelihood[t]
        best -= np.maximum(best.max(-1, keepdims=True), lowest)
        if running is not None:  # a sequence that is over keeps its score, and its state when traced back
            best, previous = np.where(running[t], best, score), np.where(running[t], previous, same)
        score, came_from[t] = best, previous
    path, rows = np.empty((steps, batch), np.int64), np.arange(batch)
    path[-1] = score.argmax(-1)
    for t in range(steps - 1, 0, -1):
        path[t - 1] = came_from[t][rows, path[t]]
    found = torch.from_numpy(path)
    return found.T if valid is None else found.masked_fill(~valid, 0).T


def _chain(initial: Tensor, transition: Tensor, likelihood: Tensor, lengths: Tensor | None) -> Chain:
    """The arguments as one checked Chain of one dtype."""
    if likelihood.dim() != 3 or 0 in likelihood.shape:
        raise InputError("log_likelihood", "shape [B, T, K], none of them 0", str(tuple(likelihood.shape)))
    batch, steps, states = likelihood.shape
    if initial.shape not in ((batch, states), (1, states)):
        expected = f"shape [{batch}, {states}] or [1, {states}]"
        raise InputError("log_initial", expected, str(tuple(initial.shape)))
    sizes = transition.shape
    if (
        len(sizes) != 4
        or sizes[2:] != (states, states)
        or sizes[0] not in (1, batch)
        or sizes[1] not in (1, steps - 1)
    ):
        expected = f"shape [{batch} or 1, {steps - 1} or 1, {states}, {states}]"
        raise InputError("log_transition", expected, str(tuple(sizes)))
    if lengths is not None:
        _check_lengths(lengths, batch, steps)
    dtype = reduce(torch.promote_types, (initial.dtype, transition.dtype, likelihood.dtype))
    if dtype not in (torch.float32, torch.float64):
        raise InputError("chain", "factors of float32 or float64", str(dtype))
    return Chain(initial.to(dtype), transition.to(dtype), likelihood.to(dtype), lengths)


def _check_lengths(lengths: Tensor, batch: int, steps: int) -> None:
    if lengths.shape != (batch,) or lengths.is_floating_point():
        got = f"{tuple(lengths.shape)} of {lengths.dtype}"
        raise InputError("lengths", f"integers of shape [{batch}]", got)
    wrong = ((lengths < 1) | (lengths > steps)).nonzero().squeeze(-1)
    if len(wrong):
        row = int(wrong[0])
        raise InputError(f"lengths[{row}]", f"a value from 1 to {steps}", str(int(lengths[row])))


__all__ = [
    "ChainPosterior",
    "entropy",
    "log_joint",
    "log_partition",
    "marginals",
    "sample",
    "viterbi",
]
