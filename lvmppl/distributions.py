"""Distributions that Pyro lacks: whole state sequences of a Markov chain, discrete or Gaussian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from lvmppl.errors import InputError
from lvmppl.exact.chain_factors import lookup, path_factors, pick
from lvmppl.gaussian_chain import GaussianChain

__all__ = ["GaussianChain", "MarkovChain"]


class MarkovChain(TorchDistribution):
    """State sequences z = (z_1, …, z_T) of a Markov chain with K states, one event of shape [T].

        p(z) = π(z_1) Π_{t<T} P_t(z_t, z_{t+1})

    initial: π [*b, K]; a non-negative vector, normalised here.
    transition: P from a row's state to a column's; [K, K], or with a time axis [*b, T-1, K, K] (a matrix a step) or
        [*b, 1, K, K] (one for all steps). Rows are normalised here.
    num_steps: T.
    lengths: [*b] integers in 1 … T for ragged batches, None when every sequence has T steps. Steps beyond a length
        are 0 in samples and count for nothing in `log_prob`.

    The batch shape is what the *b of the arguments broadcast to. Zero probabilities are exact: a sequence that takes
    a forbidden step has log p(z) = −∞, and gradients at zeros are 0, never NaN. `from_logits` takes log-weights.

    Within an exact engine the site is summed by forward-backward: the model is run with `enumerate_states()` in the
    place of a sequence, so that `table[z]` holds what depends on z_t for each state. Plain Pyro samples and scores it.

    Raises InputError for shapes and lengths that do not fit and, with validation on, for negative weights, rows of
    zeros and values that are not finite.
    """

    arg_constraints: dict[str, Constraint] = {}  # noqa: RUF012 (torch declares it on the class); checked below
    has_enumerate_support = False

    def __init__(
        self,
        initial: Tensor,
        transition: Tensor,
        num_steps: int,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        _check_shapes(initial, transition, num_steps)
        check = self._validate_args if validate_args is None else validate_args
        if check:
            _check_weights("initial", initial)
            _check_weights("transition", transition)
        log_initial, log_transition = (_safe_log(p / p.sum(-1, keepdim=True)) for p in (initial, transition))
        self._set(log_initial, log_transition, num_steps, lengths, validate_args)

    @classmethod
    def from_logits(
        cls,
        initial_logits: Tensor,
        transition_logits: Tensor,
        num_steps: int,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> MarkovChain:
        """The same from unnormalised log-weights (−∞ for what is forbidden), in the shapes of the weights."""
        _check_shapes(initial_logits, transition_logits, num_steps)
        if cls._validate_args if validate_args is None else validate_args:
            _check_logits("initial_logits", initial_logits)
            _check_logits("transition_logits", transition_logits)
        chain = cls.__new__(cls)
        log_initial, log_transition = (torch.log_softmax(w, -1) for w in (initial_logits, transition_logits))
        chain._set(log_initial, log_transition, num_steps, lengths, validate_args)
        return chain

    def _set(
        self,
        log_initial: Tensor,
        log_transition: Tensor,
        num_steps: int,
        lengths: Tensor | None,
        validate_args: bool | None,
    ) -> None:
        if log_transition.dim() == 2:
            log_transition = log_transition.unsqueeze(0)
        shapes = [log_initial.shape[:-1], log_transition.shape[:-3]]
        if lengths is not None:
            _check_lengths(lengths, num_steps)
            shapes.append(lengths.shape)
        try:
            batch_shape = broadcast_shape(*shapes)
        except ValueError:
            listing = ", ".join(str(tuple(s)) for s in shapes)
            raise InputError(
                "MarkovChain",
                "batch axes of initial, transition and lengths that broadcast",
                listing,
                "a transition has a time axis before its matrices: [batch, 1, K, K] is one matrix a sequence",
            ) from None
        self.states: int = log_initial.shape[-1]
        self.num_steps = num_steps
        self._log_initial, self._log_transition, self._lengths = log_initial, log_transition, lengths
        super().__init__(batch_shape, torch.Size([num_steps]), validate_args=validate_args)

    # ---------------------------------------------------------------------------------- factors, for exact inference

    @property
    def log_initial(self) -> Tensor:
        """log π with the batch's axes, at least one, each of its size or 1 where all share: [*b, K], as [B|1, K]."""
        return self._aligned(self._log_initial, 1)

    @property
    def log_transition(self) -> Tensor:
        """log P likewise: [*b, T-1|1, K, K]."""
        return self._aligned(self._log_transition, 3)

    @property
    def lengths(self) -> Tensor | None:
        """The lengths likewise: [*b], or None."""
        return None if self._lengths is None else self._aligned(self._lengths, 0)

    def _aligned(self, tensor: Tensor, event: int) -> Tensor:
        missing = max(1, len(self.batch_shape)) + event - tensor.dim()
        return tensor.reshape((1,) * missing + tensor.shape)

    def flat_factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(log π [B|1, K], log P [B|1, T-1|1, K, K], lengths [B] or None) of the B = |batch shape| chains."""
        initial, transition, lengths = self.log_initial, self.log_transition, self.lengths
        flat = None if lengths is None else lengths.expand(self.batch_shape or (1,)).reshape(-1)
        return self._flat(initial, 1), self._flat(transition, 3), flat

    def _flat(self, tensor: Tensor, event: int) -> Tensor:
        batch, own = tensor.shape[: tensor.dim() - event], tensor.shape[tensor.dim() - event :]
        if all(size == 1 for size in batch):
            return tensor.reshape(1, *own)
        return tensor.expand(*self.batch_shape, *own).reshape(-1, *own)

    def enumerate_states(self) -> Tensor:
        """0 … K-1 [K, 1, …, 1]: an enumeration axis, an axis for each of the batch's, and one for time."""
        return torch.arange(self.states, device=self._log_initial.device).reshape(
            -1, *[1] * len(self.batch_shape), 1
        )

    # ------------------------------------------------------------------------------------------------ distribution

    @property
    def support(self) -> Constraint:
        return constraints.independent(constraints.integer_interval(0, self.states - 1), 1)

    def expand(self, batch_shape: Sequence[int], _instance: MarkovChain | None = None) -> MarkovChain:
        new: MarkovChain = self._get_checked_instance(MarkovChain, _instance)  # type: ignore[no-untyped-call]
        broadcast_shape(self.batch_shape, tuple(batch_shape))
        for name in ("states", "num_steps", "_log_initial", "_log_transition", "_lengths"):
            setattr(new, name, getattr(self, name))
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _valid(self) -> Tensor | None:
        """[*b, T]: the steps within their sequence."""
        if self._lengths is None:
            return None
        return torch.arange(self.num_steps, device=self._lengths.device) < self._lengths.unsqueeze(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Sequences [*sample_shape, *batch_shape, T] of state indices; 0 beyond the lengths."""
        shape = self._extended_shape(torch.Size(sample_shape))[:-1]
        device = self._log_initial.device
        uniform = torch.rand(self.num_steps, *shape, dtype=torch.float64, device=device)
        steps = [pick(self._log_initial.exp(), uniform[0])]
        moves = self._log_transition.exp()
        for t in range(1, self.num_steps):
            matrix = moves[..., 0 if moves.shape[-3] == 1 else t - 1, :, :]
            steps.append(pick(lookup(matrix, steps[-1], kept=1), uniform[t]))
        states, valid = torch.stack(steps, -1), self._valid()
        return states if valid is None else torch.where(valid, states, 0)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z) of state sequences [..., T]: what their leading axes and the batch shape broadcast to, nats."""
        if self._validate_args:
            self._validate_sample(value)
        shape = broadcast_shape(value.shape[:-1], self.batch_shape)
        value, valid = value.long().expand(*shape, self.num_steps), self._valid()
        if valid is not None:
            value = torch.where(valid, value, 0)
        initial, moves = path_factors(self._log_initial, self._log_transition, value)
        if valid is not None:
            moves = torch.where(valid[..., 1:], moves, 0.0)
        return initial + moves.sum(-1)

    def __repr__(self) -> str:
        shapes = f"batch_shape={tuple(self.batch_shape)}, num_steps={self.num_steps}, states={self.states}"
        return f"MarkovChain({shapes})"


def _safe_log(probs: Tensor) -> Tensor:
    """log p with log 0 = −∞ and gradient 0 there."""
    positive = probs > 0
    return torch.where(positive, torch.where(positive, probs, 1.0).log(), -torch.inf)


def _check_shapes(initial: Tensor, transition: Tensor, num_steps: int) -> None:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise InputError("MarkovChain num_steps", "a positive integer", repr(num_steps))
    if initial.dim() == 0 or initial.shape[-1] == 0:
        raise InputError("MarkovChain initial", "shape [..., K], K at least 1", str(tuple(initial.shape)))
    states, shape = initial.shape[-1], tuple(transition.shape)
    if len(shape) < 2 or shape[-2:] != (states, states):
        expected = f"shape ending in ({states}, {states}), as initial has {states} states"
        raise InputError("MarkovChain transition", expected, str(shape))
    if len(shape) > 2 and shape[-3] not in (1, num_steps - 1):
        raise InputError(
            "MarkovChain transition",
            f"a time axis of size {num_steps - 1} or 1 before its matrices",
            f"shape {shape}",
            "[batch, 1, K, K] is one matrix a sequence, [T-1, K, K] one a step",
        )


def _check_weights(name: str, weights: Tensor) -> None:
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise InputError(
            f"MarkovChain {name}", "non-negative finite weights", f"entries down to {float(weights.min())}"
        )
    if not bool((weights.sum(-1) > 0).all()):
        raise InputError(f"MarkovChain {name}", "a positive weight in every row", "a row of zeros")


def _check_logits(name: str, logits: Tensor) -> None:
    if not bool((logits < torch.inf).all()):
        raise InputError(f"MarkovChain {name}", "logits below infinity", "infinity or NaN")
    if not bool((logits > -torch.inf).any(-1).all()):
        raise InputError(f"MarkovChain {name}", "a finite logit in every row", "a row of −∞")


def _check_lengths(lengths: Tensor, num_steps: int) -> None:
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise InputError("MarkovChain lengths", "integers", str(lengths.dtype))
    if bool(((lengths < 1) | (lengths > num_steps)).any()):
        span = f"{int(lengths.min())} … {int(lengths.max())}"
        raise InputError("MarkovChain lengths", f"values from 1 to {num_steps}", span, "drop empty sequences")
