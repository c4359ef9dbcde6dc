"""The effect handlers that answer a program's statements: parameters, enumeration, latent chains, held sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from lvmppl.density.structure import Drawing, ParameterSpec, Rows, Values
from lvmppl.distributions import MarkovChain
from lvmppl.errors import ModelError

Answer = Callable[[str, Constraint, Tensor], Tensor]
Paths = Callable[[int, int], Tensor]


class Parameters(Messenger):
    """Answers every parameter statement from `values`; unknown names are recorded with their own start."""

    def __init__(
        self, values: Values, specs: Mapping[str, ParameterSpec], rows: Rows, data_plate: str | None
    ) -> None:
        super().__init__()
        self.values, self.specs, self.rows, self.data_plate = values, specs, rows, data_plate

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.values:
            spec = self.specs[name]
            value = self.values[name]
            axis = spec.row_axis
            if axis is not None and self.rows.indices is not None and value.shape[axis] != self.rows.size:
                value = spec.rows_of(value, self.rows)
            msg["value"] = value
            msg["done"] = True

    def _pyro_sample(self, msg: Any) -> None:
        """A site that is a parameter stands at its value; its density stays among the factors, as prior."""
        spec = self.specs.get(msg["name"])
        if spec is not None and spec.is_site and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class Discovery(Messenger):
    """Records parameters at their first statement, with the plates they stand in, and answers with their start.

    answer: what a parameter is answered with, from its name, constraint and start, if not with its start.
    """

    def __init__(self, weights: Values, answer: Answer | None = None) -> None:
        super().__init__()
        self.answer = answer
        self.own = {
            id(w) for w in weights.values()
        }  # a module's weights are announced too; they are known already
        self.found: dict[str, tuple[Constraint, int | None, Tensor, tuple[Any, ...]]] = {}

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.found:
            msg["value"], msg["done"] = self.answered(name), True
            return
        if len(msg["args"]) > 1 and id(msg["args"][1]) in self.own:
            return
        _check_not_subsampled(name, msg["cond_indep_stack"])
        constraint = msg["kwargs"].get("constraint", constraints.real)
        if len(msg["args"]) > 1:
            start = msg["args"][1]
            start = start() if callable(start) and not isinstance(start, Tensor) else start
        else:
            start = msg["fn"](*msg["args"], **msg["kwargs"])
        if not isinstance(start, Tensor):
            raise TypeError(f"pyro.param('{name}') starts from a {type(start).__name__}, not a tensor")
        start = start.detach().clone()
        _check_start(name, constraint, start)
        event_dim = msg["kwargs"].get("event_dim")
        # A PyroParam is stated wherever it is looked up; without an event_dim it is no table of the plates around.
        frames = () if len(msg["args"]) == 1 and event_dim is None else tuple(msg["cond_indep_stack"])
        self.found[name] = (constraint, event_dim, start, frames)
        msg["value"], msg["done"] = self.answered(name), True

    def answered(self, name: str) -> Tensor:
        """The value at which a parameter that was found stands."""
        constraint, _, start, _ = self.found[name]
        return start if self.answer is None else self.answer(name, constraint, start)


def _check_not_subsampled(name: str, frames: Iterable[Any]) -> None:
    for frame in frames:
        if frame.full_size is not None and frame.size != frame.full_size:
            raise ModelError(
                f"plate '{frame.name}' around pyro.param('{name}')",
                f"a plate without subsample_size, over the {frame.full_size} rows it is handed",
                f"a subsample of {frame.size}",
                f"write pyro.plate('{frame.name}', len(x)), and `batch_size` for minibatches",
            )


def _check_start(name: str, constraint: Constraint, start: Tensor) -> None:
    if start.is_floating_point() and not bool(torch.isfinite(start).all()):
        raise ValueError(f"pyro.param('{name}') starts from values that are not finite")
    if not bool(constraint.check(start).all()):
        raise ValueError(f"pyro.param('{name}') starts outside its constraint {constraint}{_extent(start)}")


def _extent(start: Tensor) -> str:
    """The range of a start, which often tells why: a scale of 0 is that of a constant column."""
    if not start.numel() or start.is_complex():
        return ""
    low, high = float(start.min()), float(start.max())
    return f", at {low:.6g}" if low == high else f", at {low:.6g} to {high:.6g}"


class EnumerateFinite(Messenger):
    """Marks the guide's finite discrete sites for exact enumeration unless the user, or the drawing, said otherwise."""

    def __init__(self, drawing: Drawing | None = None) -> None:
        super().__init__()
        self.drawing = drawing or Drawing()

    def _pyro_sample(self, msg: Any) -> None:
        if not self.drawing.sums(msg["name"]) and not site_is_subsample(msg):
            msg["infer"] = {k: v for k, v in msg["infer"].items() if k != "enumerate"}
            return
        if msg["is_observed"] or site_is_subsample(msg) or msg["infer"].get("enumerate") is not None:
            return
        if getattr(msg["fn"], "has_enumerate_support", False) and not msg["infer"].get("is_auxiliary"):
            msg["infer"]["enumerate"] = "parallel"


class LeaveToGuide(Messenger):
    """Keeps the model from enumerating sites that stand in the guide's trace."""

    def __init__(self, guide_trace: Any) -> None:
        super().__init__()
        self.sites = guide_trace.nodes

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["name"] in self.sites:
            msg["infer"].pop("enumerate", None)


class Draw(Messenger):
    """Draws the guide's sites that are not summed, as a `Drawing` says; dim is the axis of the particles.

    It must stand outside of enumeration, which notes the enumerated axes of a draw.
    """

    def __init__(self, drawing: Drawing, dim: int) -> None:
        super().__init__()
        self.drawing, self.dim = drawing, dim

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or site_is_subsample(msg):
            return
        if not isinstance(msg["fn"], dist.TorchDistribution | torch.distributions.Distribution):
            return
        name, drawing = msg["name"], self.drawing
        if name in drawing.held:
            msg["value"], msg["done"] = drawing.held[name], True
            return
        relaxed = name in drawing.temperatures
        if drawing.particles == 1 and not relaxed and name not in drawing.scores:
            return
        fn, shape = self._widened(msg["fn"])
        if relaxed:
            value = relaxed_draw(fn, shape, drawing.temperatures[name], name in drawing.hard)
        elif name in drawing.scores or not fn.has_rsample:
            with torch.no_grad():
                value = fn.sample(shape)
        else:
            value = fn.rsample(shape)
        msg["value"], msg["done"] = value, True

    def _widened(self, fn: Any) -> tuple[Any, torch.Size]:
        """(distribution, sample shape) whose draws have J at the axis of the particles."""
        particles, batch = self.drawing.particles, fn.batch_shape
        if particles == 1:
            return fn, torch.Size()
        if len(batch) < -self.dim:
            return fn, torch.Size([particles] + [1] * (-self.dim - 1 - len(batch)))
        target = broadcast_shape(batch, (particles,) + (1,) * (-self.dim - 1))
        return (fn if target == batch else fn.expand(target)), torch.Size()


def relaxed_draw(fn: Any, shape: torch.Size, temperature: float, hard: bool) -> Tensor:
    """A draw of the concrete distribution (Jang et al. 2017, Maddison et al. 2017) at a temperature.

    hard: the nearest state, with the gradient of the relaxed draw (straight-through); it is a draw of `fn` itself.
    """
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.Bernoulli):
        noise = torch.rand(shape + fn.batch_shape, dtype=fn.logits.dtype, device=fn.logits.device)
        noise = noise.clamp(torch.finfo(noise.dtype).tiny, 1 - torch.finfo(noise.dtype).eps)
        soft = torch.sigmoid((fn.logits + noise.log() - torch.log1p(-noise)) / temperature)
        state = (soft > 0.5).to(soft.dtype)
    else:
        logits = fn.logits.expand(shape + fn.batch_shape + fn.event_shape)
        gumbel = -torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_().log()
        soft = torch.softmax((logits + gumbel) / temperature, -1)
        state = torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return state + soft - soft.detach() if hard else soft


class Hold(Messenger):
    """Readies latent sites that are to be integrated out for their values, which a `Draw` around enumeration gives them.

    apart: enumerated sites of a `pyro.markov` loop each keep an axis of their own, as the values do that differ between
    all of their states; else a site that is held takes up none.
    """

    def __init__(self, points: Values, apart: bool = False) -> None:
        super().__init__()
        self.points, self.apart = points, apart

    def _pyro_sample(self, msg: Any) -> None:
        scope = msg["infer"].get("_markov_scope")
        if scope is not None and self.apart:
            del msg["infer"]["_markov_scope"]
        elif scope is not None:
            kept = {n: depth for n, depth in scope.items() if n not in self.points}
            msg["infer"]["_markov_scope"] = type(scope)(kept)
        if not msg["is_observed"] and msg["name"] in self.points:
            unmask(msg)


class EnumeratedChain(dist.TorchDistribution):
    """Stands in for a MarkovChain while sites are enumerated: the states of one step, so that z has K values, not Kᵀ.

    What depends on z step by step (`table[z]`, its steps kept apart by `.to_event`) then has an axis of states and one of
    steps, and forward-backward sums over the sequences.
    """

    arg_constraints: dict[str, Constraint] = {}  # noqa: RUF012 - torch's own protocol
    has_enumerate_support = True

    def __init__(self, chain: MarkovChain, paths: Paths | None = None) -> None:
        self.chain, self.paths = chain, paths
        super().__init__(chain.batch_shape, chain.event_shape, validate_args=False)

    @property
    def support(self) -> Constraint:
        return self.chain.support

    def enumerate_support(self, expand: bool = True) -> Tensor:
        if self.paths is None:
            states = torch.arange(self.chain.states).unsqueeze(-1)
        else:
            states = self.paths(self.chain.num_steps, self.chain.states)
        ones = [1] * len(self.batch_shape)
        return states.reshape(len(states), *ones, -1).to(self.chain.log_initial.device)


class EnumerateChains(Messenger):
    """Gives every enumerated MarkovChain site the states of one step as its value, at an enumeration axis of its own.

    An enumerated site keeps its prior whatever mask it stands under. paths: (T, K) → [M, T], state sequences in place of
    the K states, for a probe of what depends on which step.
    """

    def __init__(self, paths: Paths | None = None) -> None:
        super().__init__()
        self.paths = paths

    def _pyro_sample(self, msg: Any) -> None:
        infer = msg["infer"]
        if msg["is_observed"] or ("_enumerate_dim" not in infer and infer.get("enumerate") != "parallel"):
            return
        unmask(msg)
        if isinstance(msg["fn"], MarkovChain):
            msg["fn"] = EnumeratedChain(msg["fn"], self.paths)


def unmask(msg: Any) -> None:
    """Masks act on observed factors only: a latent site that is summed or integrated out keeps its prior."""
    msg["mask"], msg["fn"] = None, _without_mask(msg["fn"])


def _without_mask(fn: Any) -> Any:
    if isinstance(fn, dist.MaskedDistribution):
        base = _without_mask(fn.base_dist)
        return base if base.batch_shape == fn.batch_shape else base.expand(fn.batch_shape)
    if isinstance(fn, torch.distributions.Independent):
        base = _without_mask(fn.base_dist)
        return fn if base is fn.base_dist else base.to_event(fn.reinterpreted_batch_ndims)
    return fn


class CheckValues(Messenger):
    """Refuses a value that its site cannot have: a latent one outside the support, an observed one of another shape.

    It looks before the program goes on with the value, so that `table[z]` does not fail first and take the blame. A
    latent value that the model did not draw is the guide's.
    """

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        if msg["is_observed"]:
            _check_shape(msg)
            return
        try:
            support = msg["fn"].support
            inside = bool(support.check(msg["value"]).all())
        except NotImplementedError:  # a support that depends on what has not been given
            return
        if not inside:
            low, high = float(msg["value"].min()), float(msg["value"].max())
            raise ModelError(
                f"guide site '{msg['name']}'",
                f"values in the support it has in the model, {support}",
                f"values from {low:g} to {high:g}",
                "mind its family and its number of states",
            )


def _check_shape(msg: Any) -> None:
    fn, value = msg["fn"], msg["value"]
    try:
        broadcast_shape(fn.batch_shape + fn.event_shape, value.shape)
    except ValueError:
        raise ModelError(
            f"model site '{msg['name']}'",
            f"an observed value of shape {list(fn.batch_shape)} + {list(fn.event_shape)}, batch and event",
            f"{list(value.shape)}",
            "mind .to_event and the sizes of the parameters",
        ) from None
