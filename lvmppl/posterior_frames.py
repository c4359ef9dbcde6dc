"""A discrete marginal as a distribution, and as the rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor


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
