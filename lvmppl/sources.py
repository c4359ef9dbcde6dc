"""Where λ comes from: a table with a row per datum, or an encoder network of the datum (amortized).

An encoder is a trunk that turns the data rows into features, and a linear readout for every output of every head.
Statistics and sizes (centre, spread, vocabulary) are those of the first rows seen.

Shapes: B rows, F features, H hidden units, T steps, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lvmppl.errors import InputError
from lvmppl.outputs import Output

Data = Mapping[str, Tensor]


@dataclass(frozen=True)
class Features:
    """What a trunk says of each row [B, H] and, if it reads sequences, of each step [B, T, H']."""

    rows: Tensor
    steps: Tensor | None = None


@dataclass(frozen=True)
class SourceSettings:
    """hidden: layer widths. inputs: names of the data tensors read (empty: the trunk's own choice). vocabulary: V."""

    hidden: tuple[int, ...] = (32,)
    inputs: tuple[str, ...] = ()
    vocabulary: int | None = None


class MLP(nn.Module):
    """tanh layers of the standardised rows, flattened: of the tensors that are named, else of all that are floating,
    else (data of counts or states) of all there are.
    """

    def __init__(self, data: Data, settings: SourceSettings) -> None:
        super().__init__()
        self.inputs = settings.inputs
        features = self.flat(data)
        self.register_buffer("centre", features.mean(0))
        self.register_buffer("spread", features.std(0, unbiased=False).clamp_min(1e-8))
        self.layers, self.width = _layers(features.shape[1], settings.hidden)

    def flat(self, data: Data) -> Tensor:
        """The inputs [B, F]."""
        floating = any(t.is_floating_point() for t in data.values())
        parts = chosen(data, self.inputs, lambda t: t.is_floating_point() or not floating, "a tensor")
        return torch.cat([_as_float(t).reshape(len(t), -1) for t in parts], -1)

    def forward(self, data: Data) -> Features:
        inputs = (self.flat(data) - self.get_buffer("centre")) / self.get_buffer("spread")
        return Features(self.layers(inputs))


class BagOfWords(nn.Module):
    """tanh layers of log(1 + counts) of integer tokens [B, T], V of them; steps beyond `lengths` are not counted."""

    def __init__(self, data: Data, settings: SourceSettings) -> None:
        super().__init__()
        self.inputs = settings.inputs
        tokens = self.tokens(data)
        self.vocabulary = settings.vocabulary or int(tokens.max()) + 1
        self.layers, self.width = _layers(self.vocabulary, settings.hidden)

    def tokens(self, data: Data) -> Tensor:
        return _one_sequence(
            data, self.inputs, lambda t: t.dim() == 2 and _is_integer(t), "integer tokens [N, T]"
        )

    def forward(self, data: Data) -> Features:
        tokens, lengths = self.tokens(data).long(), data.get("lengths")
        known = (tokens >= 0) & (tokens < self.vocabulary)
        if lengths is not None:
            known = known & (torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(-1))
        counts = torch.zeros(len(tokens), self.vocabulary, device=tokens.device)
        counts.scatter_add_(1, tokens.clamp(0, self.vocabulary - 1), known.to(counts))
        return Features(self.layers(counts.log1p()))


class GRU(nn.Module):
    """A bidirectional gated recurrent unit over sequences [B, T] or [B, T, D]; integers are embedded.

    Both directions end where `lengths` says. The row's features are the two last states, a step's the two states there.
    """

    def __init__(self, data: Data, settings: SourceSettings) -> None:
        super().__init__()
        self.inputs = settings.inputs
        x = self.sequence(data)
        size = settings.hidden[0] if settings.hidden else 32
        self.embedding: nn.Embedding | None = None
        if _is_integer(x):
            self.vocabulary = settings.vocabulary or int(x.max()) + 1
            self.embedding = nn.Embedding(self.vocabulary, size)
        else:
            flat = x.reshape(len(x) * x.shape[1], -1)
            self.register_buffer("centre", flat.mean(0))
            self.register_buffer("spread", flat.std(0, unbiased=False).clamp_min(1e-8))
        inputs = size if self.embedding is not None else math.prod(x.shape[2:])
        self.cell = nn.GRU(inputs, size, batch_first=True, bidirectional=True)
        self.width = self.step_width = 2 * size

    def sequence(self, data: Data) -> Tensor:
        return _one_sequence(
            data, self.inputs, lambda t: t.dim() >= 2, "a tensor of sequences [N, T] or [N, T, D]"
        )

    def forward(self, data: Data) -> Features:
        x, lengths = self.sequence(data), data.get("lengths")
        if self.embedding is not None:
            x = self.embedding(x.long().clamp(0, self.vocabulary - 1))
        else:
            x = (x.reshape(*x.shape[:2], -1) - self.get_buffer("centre")) / self.get_buffer("spread")
        count = torch.full((len(x),), x.shape[1]) if lengths is None else lengths.cpu().long()
        packed = pack_padded_sequence(x, count, batch_first=True, enforce_sorted=False)
        # nn.GRU caches its weights; reading them by name makes it follow tensors that are put in their place
        weights = [getattr(self.cell, name) for name in self.cell._flat_weights_names]
        start = x.new_zeros(2, len(x), self.cell.hidden_size)
        out, last = torch.gru(packed.data, packed.batch_sizes, start, weights, True, 1, 0.0, False, True)
        steps, _ = pad_packed_sequence(packed._replace(data=out), batch_first=True, total_length=x.shape[1])
        if packed.unsorted_indices is not None:
            last = last.index_select(1, packed.unsorted_indices)
        return Features(last.transpose(0, 1).reshape(len(x), -1), steps)


TRUNKS: dict[str, Callable[[Data, SourceSettings], nn.Module]] = {
    "mlp": MLP,
    "gru": GRU,
    "bag_of_words": BagOfWords,
}

SOURCES: dict[str, str] = {
    "table": "one λ a datum, in a table of which a minibatch touches only its rows",
    "mlp": "an encoder: tanh layers of the datum's standardised numbers (its counts or states where none is floating)",
    "gru": "an encoder: a bidirectional GRU over a sequence, with `lengths`",
    "bag_of_words": "an encoder: tanh layers of the log counts of a datum's tokens",
}


class Encoder(nn.Module):
    """λ⁽ⁿ⁾ = readout(trunk(x⁽ⁿ⁾)), in unconstrained coordinates, for any number of outputs."""

    def __init__(self, name: str, data: Data, settings: SourceSettings) -> None:
        super().__init__()
        self.trunk = TRUNKS[name](data, settings)
        self.readouts = nn.ModuleDict()

    def add(self, key: str, output: Output, inner: Sequence[int], data: Data) -> None:
        """A readout for one output; inner: sizes of the plates inside the data plate."""
        numel = math.prod(inner) * math.prod(output.free_shape)
        if self._stepwise(output, inner, data):
            numel //= output.free_shape[0]
            self.readouts[key] = _readout(int(self.trunk.step_width), numel)  # type: ignore[arg-type]
        else:
            self.readouts[key] = _readout(int(self.trunk.width), numel)  # type: ignore[arg-type]

    def _stepwise(self, output: Output, inner: Sequence[int], data: Data) -> bool:
        """Whether the first axis of the output is read step by step off a trunk that reads sequences."""
        if not output.stepwise or math.prod(inner) != 1 or not isinstance(self.trunk, GRU):
            return False
        steps = self.trunk.sequence(data).shape[1]
        return output.free_shape[0] in (steps, steps - 1)

    def forward(self, data: Data, outputs: Mapping[str, tuple[Output, Sequence[int]]]) -> dict[str, Tensor]:
        """Unconstrained outputs [B, *inner, *free shape] by key."""
        features: Features = self.trunk(data)
        result = {}
        for key, (output, inner) in outputs.items():
            shape = (len(features.rows), *inner, *output.free_shape)
            if features.steps is not None and self._stepwise(output, inner, data):
                own = features.steps[:, -output.free_shape[0] :]
                result[key] = self.readouts[key](own).reshape(shape)
            else:
                result[key] = self.readouts[key](features.rows).reshape(shape)
        return result


def chosen(data: Data, inputs: Sequence[str], wanted: Callable[[Tensor], bool], words: str) -> list[Tensor]:
    """The data tensors that an encoder reads: those named, else all that are `wanted`."""
    unknown = [n for n in inputs if n not in data]
    found = list(inputs) or [n for n, t in data.items() if n != "lengths" and wanted(t)]
    if unknown or not found:
        listing = ", ".join(f"{n} {list(t.shape)} {str(t.dtype)[6:]}" for n, t in data.items())
        raise InputError(
            "guide, inputs of the encoder",
            words,
            f"no {', '.join(unknown)} in {listing}" if unknown else listing,
            "name the tensors to read with inputs: […]",
        )
    return [data[n] for n in found]


def _one_sequence(data: Data, inputs: Sequence[str], wanted: Callable[[Tensor], bool], words: str) -> Tensor:
    found = chosen(data, inputs, wanted, words)
    if len(found) != 1 or not wanted(found[0]):
        raise InputError(
            "guide, inputs of the encoder",
            f"one tensor, {words}",
            ", ".join(str(list(t.shape)) for t in found),
            "name it with inputs: [NAME]",
        )
    return found[0]


def _layers(width: int, hidden: Sequence[int]) -> tuple[nn.Sequential, int]:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((width, *hidden)):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers), (width, *hidden)[-1]


def _readout(width: int, numel: int) -> nn.Linear:
    """A linear layer that starts near λ = 0, where a table starts: q is broad, and no datum is claimed by chance."""
    layer = nn.Linear(width, numel)
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.bias.zero_()
    return layer


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.dtype != torch.bool


def _as_float(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
