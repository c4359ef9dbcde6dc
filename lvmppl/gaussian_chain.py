"""Linear-Gaussian state sequences: what `MarkovChain` is for discrete states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from lvmppl.errors import InputError


class GaussianChain(TorchDistribution):
    """State sequences z = (z_1, …, z_T) of a linear-Gaussian chain, one event of shape [T, d].

        p(z) = p(z_1) Π_{t<T} N(z_{t+1} | A z_t + b, Q)

    initial: the distribution of z_1, over [d]: a `Normal(...).to_event(1)` or a `MultivariateNormal`.
    transition: A [d, d].
    noise: N(b, Q) over [d], likewise a Normal with independent entries or a `MultivariateNormal`.
    num_steps: T.

    The batch shape is what those of `initial` and `noise` broadcast to. Every covariance must have full rank: p(z) is a
    density over all of z. An exact engine finds log p(x, z) quadratic in z, each step tied to its neighbours, and takes
    O(T) time; EM reads the chain as two factors, its start and its steps.

    Raises InputError for shapes and families that do not fit.
    """

    arg_constraints: dict[str, Constraint] = {}  # noqa: RUF012 (torch declares it on the class); checked below
    has_rsample = True

    def __init__(
        self, initial: Any, transition: Tensor, noise: Any, num_steps: int, validate_args: bool | None = None
    ) -> None:
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise InputError("GaussianChain num_steps", "a positive integer", repr(num_steps))
        for name, fn in (("initial", initial), ("noise", noise)):
            _check_family(name, fn)
        size = initial.event_shape[-1]
        if transition.shape != (size, size) or noise.event_shape != (size,):
            got = f"transition {tuple(transition.shape)}, noise over {tuple(noise.event_shape)}"
            raise InputError(
                "GaussianChain", f"transition ({size}, {size}) and noise over ({size},), as initial", got
            )
        self.initial, self.transition, self.noise, self.num_steps = initial, transition, noise, num_steps
        shape = broadcast_shape(initial.batch_shape, noise.batch_shape)
        super().__init__(shape, torch.Size([num_steps, size]), validate_args=validate_args)

    @property
    def support(self) -> Constraint:
        return constraints.independent(constraints.real, 2)

    def expand(self, batch_shape: Sequence[int], _instance: GaussianChain | None = None) -> GaussianChain:
        new: GaussianChain = self._get_checked_instance(GaussianChain, _instance)  # type: ignore[no-untyped-call]
        broadcast_shape(self.batch_shape, tuple(batch_shape))
        for name in ("initial", "transition", "noise", "num_steps"):
            setattr(new, name, getattr(self, name))
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def steps(self, value: Tensor) -> Any:
        """The distribution of z_2, …, z_T, each given the state before it in `value` [..., T, d]: an event [T-1, d]."""
        return _shifted(self.noise, value[..., :-1, :] @ self.transition.mT).to_event(1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Sequences [*sample_shape, *batch_shape, T, d], a step after the other; differentiable."""
        shape = self._extended_shape(torch.Size(sample_shape))[:-2]
        states = [self.initial.expand(shape).rsample()]
        for _ in range(1, self.num_steps):
            states.append(states[-1] @ self.transition.mT + self.noise.expand(shape).rsample())
        return torch.stack(states, -2)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z) of sequences [..., T, d], in nats, for all steps at once."""
        if self._validate_args:
            self._validate_sample(value)
        start: Tensor = self.initial.log_prob(value[..., 0, :])
        if self.num_steps == 1:
            return start
        moves: Tensor = self.steps(value).log_prob(value[..., 1:, :])
        return start + moves


def _check_family(name: str, fn: Any) -> None:
    base = getattr(fn, "base_dist", fn)
    normal = isinstance(base, dist.Normal) or isinstance(fn, dist.MultivariateNormal)
    if not normal or len(fn.event_shape) != 1:
        raise InputError(
            f"GaussianChain {name}",
            "a Normal(...).to_event(1) or a MultivariateNormal, over a vector",
            f"{type(base).__name__} with event shape {tuple(fn.event_shape)}",
        )


def _shifted(noise: Any, shift: Tensor) -> Any:
    """The noise about its mean plus `shift` [..., T-1, d]: batch [..., T-1]."""
    if isinstance(noise, dist.MultivariateNormal):
        root = noise._unbroadcasted_scale_tril
        root = root.unsqueeze(-3) if root.dim() > 2 else root
        return dist.MultivariateNormal(noise.loc.unsqueeze(-2) + shift, scale_tril=root, validate_args=False)
    base = noise.base_dist
    loc, scale = (p.unsqueeze(-2) if p.dim() > 1 else p for p in (base.loc, base.scale))
    return dist.Normal(loc + shift, scale, validate_args=False).to_event(1)
