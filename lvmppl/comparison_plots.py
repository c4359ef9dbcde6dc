"""The picture of a comparison: what each fit reaches, and what kind of number that is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lvmppl.canvas import FAINT, INK, MUTED, VERMILLION, Picture, grid, plain, shorten, styled
from lvmppl.tables import nats

ROWS = 40
NAME = 36  # letters of a fit
_A_NAT = 1.0  # up to which a fit below the others is kept on the scale

# per kind of log evidence: its words and its mark; a triangle points to where the truth is
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("exact log evidence", {"marker": "o", "mfc": INK}),
    "quadrature": ("log evidence by quadrature", {"marker": "D", "mfc": INK, "ms": 5}),
    "lower_bound": ("lower bound of the log evidence", {"marker": ">", "mfc": "white"}),
    "estimate": ("estimated log evidence", {"marker": "o", "mfc": "white"}),
}
ELBO: dict[str, Any] = {"marker": "|", "color": VERMILLION, "ms": 13, "mew": 2}


@styled
def evidence_levels(summary: pd.DataFrame) -> Picture | None:
    """A row per fit: its log evidence, by a mark that tells the kind, its ELBO, and between them a bar of the gap.

    Estimates have their standard errors. A number far below the others is off the scale and said so. None where no fit
    has either number.
    """
    finite = np.isfinite(summary[["log_evidence", "elbo"]].to_numpy(dtype=float)).any(axis=1)
    rows = summary[finite]
    if not len(rows):
        return None
    shown = rows.head(ROWS)
    picture = Picture("What each fit reaches", 10.0, 1.75 + 0.36 * len(shown))
    axes = grid(picture, 1, 1)[0]
    low, high = _scale(shown)
    room = 0.05 * (high - low) if high - low > 1e-9 * abs(high) else 1.0  # not the width of rounding
    for place, (_, row) in enumerate(shown.iterrows()):
        _row(axes, place, row, low, low - room)
    axes.set(xlim=(low - room, high + room), ylim=(len(shown) - 0.4, -0.6))
    axes.set_yticks(range(len(shown)), [plain(shorten(str(fit), NAME)) for fit in shown["fit"]])
    axes.set_xlabel("nats")
    axes.grid(axis="x", color=FAINT)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=6)
    _legend(picture, shown)
    below = (_lowest(shown) < low).any()
    drawn = (shown[["log_evidence_error", "elbo_error"]] > 0).any(axis=None)
    picture.say(
        "Further to the right is better, at each fit's own parameters. Only an exact log evidence is the number itself: "
        "the truth is not below a lower bound, and an ELBO is one.",
        bool(shown["gap"].notna().any()) and "The bar is the gap between a fit's ELBO and its log evidence.",
        bool(drawn) and "Thin lines are two standard errors of an estimate.",
        bool(below) and "An arrow at the left edge: a number is below the scale, and stands beside it.",
        len(rows) > len(shown) and f"Only {len(shown)} of {len(rows)} fits are drawn.",
    )
    return picture


def _lowest(rows: pd.DataFrame) -> pd.Series:
    """The lower of the two numbers of each fit."""
    return rows[["log_evidence", "elbo"]].replace([np.inf, -np.inf], np.nan).min(axis=1)


def _scale(rows: pd.DataFrame) -> tuple[float, float]:
    """From the lowest number worth seeing to the highest: a few far below the median do not hide the others."""
    numbers = rows[["log_evidence", "elbo"]].to_numpy(dtype=float)
    errors = rows[["log_evidence_error", "elbo_error"]].to_numpy(dtype=float)
    ends = numbers + 2 * np.where(np.isfinite(errors), errors, 0.0)
    high = float(ends[np.isfinite(ends)].max())
    lowest = _lowest(rows)
    usual = max(4.0 * (high - float(lowest.median())), _A_NAT)
    return float(lowest[lowest >= high - usual].min()), high


def _row(axes: Axes, place: int, row: pd.Series, low: float, edge: float) -> None:
    """One fit. Numbers below `low` are an arrow at the edge and their text."""
    evidence, elbo = float(row["log_evidence"]), float(row["elbo"])
    if not math.isnan(evidence + elbo) and evidence > elbo:
        start = elbo if elbo >= low else edge
        axes.barh(
            place, max(evidence, start) - start, left=start, height=0.42, color=VERMILLION, alpha=0.25, lw=0
        )
    if elbo >= low:
        _whisker(axes, place + 0.12, elbo, float(row["elbo_error"]), VERMILLION)
        axes.plot([elbo], [place], zorder=4, **ELBO)
    if evidence >= low:
        _whisker(axes, place - 0.12, evidence, float(row["log_evidence_error"]), INK)
        _, mark = KINDS[str(row["log_evidence_kind"])]
        axes.plot([evidence], [place], color=INK, zorder=5, **{"ms": 6.5, **mark})
    off = [(word, v) for word, v in (("log evidence", evidence), ("ELBO", elbo)) if v < low]
    if off:
        said = "← " + ", ".join(f"{word} {nats(value)}" for word, value in off)
        axes.annotate(
            said, (0.005, place), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=MUTED
        )


def _whisker(axes: Axes, height: float, value: float, error: float, colour: str) -> None:
    if 0 < error < math.inf:
        axes.plot([value - 2 * error, value + 2 * error], [height, height], color=colour, lw=1.0, zorder=3)


def _legend(picture: Picture, rows: pd.DataFrame) -> None:
    """The marks that occur."""
    present = set(rows.loc[np.isfinite(rows["log_evidence"]), "log_evidence_kind"])
    handles = [
        Line2D([], [], color=INK, linestyle="", label=words, **{"ms": 6.5, **mark})
        for kind, (words, mark) in KINDS.items()
        if kind in present
    ]
    if np.isfinite(rows["elbo"]).any():
        handles.append(Line2D([], [], linestyle="", label="ELBO, a lower bound", **ELBO))
    picture.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)


__all__ = ["evidence_levels"]
