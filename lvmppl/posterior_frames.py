"""A discrete marginal as a distribution, and marginals as the rows of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from lvmppl.density import Variable, time_axis
from lvmppl.exact.named import Named, align


def probability_frame(
    site: str, probs: Tensor, plates: Sequence[str], data_plate: str | None
) -> pd.DataFrame:
    """The rows of one discrete site from its marginal [*plates, K]; rows of zeros (impossible data) stay empty."""
    shape = probs.shape
    index = torch.cartesian_prod(*(torch.arange(s) for s in shape)).reshape(-1, len(shape))
    frame = pd.DataFrame({"site": pd.Series([site] * len(index), dtype="string")})
    others = [i for i, p in enumerate(plates) if p != data_plate]
    local = data_plate is not None and data_plate in plates
    datum = index[:, list(plates).index(str(data_plate))].numpy() if local else None
    frame["datum"] = (
        pd.array(datum, dtype="Int64") if datum is not None else pd.array([pd.NA] * len(index), dtype="Int64")
    )
    columns = index[:, others].tolist()
    frame["position"] = pd.Series([",".join(map(str, c)) for c in columns], dtype="string")
    frame["state"] = pd.array(index[:, -1].numpy(), dtype="Int64")
    impossible = (probs.sum(-1, keepdim=True) == 0).expand(shape)
    values = torch.where(impossible, torch.nan, probs)
    frame["probability"] = values.reshape(-1).double().cpu().numpy()
    frame["mean"] = float("nan")
    frame["sd"] = float("nan")
    return frame


def categorical_of(probs: Tensor) -> torch.distributions.Categorical:
    """A Categorical whose `.probs` are these very numbers: no clamp, and zeros for an impossible datum."""
    row = torch.distributions.Categorical(probs.new_ones(probs.shape[-1]), validate_args=False)
    # built from one row: normalising all would be another pass over them
    result: torch.distributions.Categorical = row.expand(probs.shape[:-1])
    result.probs = result._param = probs
    return result


def moment_frame(site: str, mean: Tensor, sd: Tensor, local: bool) -> pd.DataFrame:
    """The rows of one continuous site: by datum where its first axis is the data plate, `position` the other axes."""
    shape = mean.shape
    count = mean.numel()
    index = (
        torch.cartesian_prod(*(torch.arange(s) for s in shape)).reshape(count, -1).tolist() if shape else [[]]
    )
    return pd.DataFrame(
        {
            "site": pd.Series([site] * count, dtype="string"),
            "datum": pd.array([i[0] if local else pd.NA for i in index], dtype="Int64"),
            "position": pd.Series([",".join(map(str, i[1:] if local else i)) for i in index], dtype="string"),
            "state": pd.array([pd.NA] * count, dtype="Int64"),
            "probability": math.nan,
            "mean": mean.reshape(-1).double().cpu().numpy(),
            "sd": sd.reshape(-1).double().cpu().numpy(),
        }
    )


def site_frame(
    variable: Variable, table: Tensor, plate_sizes: Mapping[str, int], data_plate: str | None
) -> pd.DataFrame:
    """The rows of one enumerated site from its marginal [K, *plates, (T)]; those beyond a chain's length are left out."""
    site = variable.name
    if variable.steps is None:
        return probability_frame(site, table.movedim(0, -1), variable.plates, data_plate)
    frame = probability_frame(
        site, table.movedim(0, -1), (*variable.plates, time_axis(variable.steps)), data_plate
    )
    if variable.lengths is None:
        return frame
    shape = [plate_sizes[p] for p in variable.plates]
    lengths = align(Named(variable.lengths, variable.lengths_dims), variable.plates).expand(shape)
    steps = torch.arange(variable.steps, device=lengths.device)
    inside = steps < lengths.unsqueeze(-1)  # rows beyond a length do not exist
    kept = inside.unsqueeze(-1).expand(*shape, variable.steps, variable.size)
    return frame[kept.reshape(-1).cpu().numpy()]
