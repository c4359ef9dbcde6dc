"""The picture of the gaps log p(x) − ELBO(x): how many data are approximated how badly."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lvmppl.canvas import (
    BLUE,
    FAINT,
    INK,
    MUTED,
    PANELS,
    VERMILLION,
    Picture,
    Reals,
    grid,
    plain,
    shorten,
    styled,
)
from lvmppl.tables import nats

NUMERICAL_ZERO = 1e-9  # nats; a smaller gap is the rounding of two numbers of the size of a log evidence

DASHES = ("-", "--", "-.", ":")
COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", INK)


@styled
def gap_curves(gaps: pd.DataFrame) -> Picture:
    """Per variational fit the share of its data with a gap of at most so many nats (log axis).

    Gaps under 1e-9, negative ones of rounding or sampling among them, are drawn at the left edge.
    """
    known = gaps[np.isfinite(gaps["gap"])]
    fits = [str(fit) for fit in known["fit"].unique()]
    values = {
        fit: np.sort(known.loc[known["fit"] == fit, "gap"].to_numpy(dtype=float)) for fit in fits[:PANELS]
    }
    picture = Picture(
        "How far each guide is from the exact posterior, datum by datum", 8.0, 3.9 + 0.22 * len(values)
    )
    axes = grid(picture, 1, 1)[0]
    for index, (fit, gap) in enumerate(values.items()):
        _curve(axes, fit, gap, DASHES[index % 4], COLOURS[index % 6])
    low = min((float(gap[0]) for gap in values.values()), default=1.0)
    high = max((float(gap[-1]) for gap in values.values()), default=1.0)
    axes.set(
        xscale="log",
        xlim=(max(low, NUMERICAL_ZERO) / 2.5, max(high, 100 * NUMERICAL_ZERO) * 2.5),
        ylim=(0, 1.02),
    )
    axes.set_xlabel("gap of a datum: log evidence − ELBO (nats, log scale)")
    axes.set_ylabel("share of the data with at most this gap")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.grid(color=FAINT)
    if values:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), borderaxespad=0)
    zeros = {fit: int((gap < NUMERICAL_ZERO).sum()) for fit, gap in values.items()}
    if any(zeros.values()):
        axes.axvline(NUMERICAL_ZERO, color=MUTED, lw=0.8, linestyle=":")
        axes.annotate(
            "zero up to\nrounding",
            (NUMERICAL_ZERO, 0.02),
            (4, 0),
            textcoords="offset points",
            fontsize=8,
            color=MUTED,
        )
    said = ", ".join(f"{zero} of {len(values[fit])} for '{fit}'" for fit, zero in zeros.items() if zero)
    picture.say(
        "The gap of a datum is its log evidence minus its ELBO at the same parameters, which is the KL "
        "divergence from the guide's posterior to the exact one: at 0 the guide is exactly right. A curve "
        "further left is better; a long tail to the right near the top means that a few data are "
        "approximated badly. The dot is the worst datum.",
        bool(said) and f"Gaps below 1e−9 nats are rounding and are drawn at the left edge: {said}.",
        len(fits) > PANELS and f"Only {PANELS} of {len(fits)} fits are drawn.",
    )
    return picture


def _curve(axes: Axes, fit: str, gap: Reals, dash: str, colour: str) -> None:
    """The empirical distribution function of one fit's sorted gaps [N]."""
    drawn = np.maximum(gap, NUMERICAL_ZERO)
    share = np.arange(1, len(gap) + 1) / len(gap)
    median = float(np.median(gap))
    total, largest = float(gap.sum()), float(gap[-1])
    label = f"{shorten(fit, 24)}: total {nats(total)}, median {nats(median)}, largest {nats(largest)}"
    x, y = np.concatenate([drawn[:1], drawn]), np.concatenate([[0.0], share])
    axes.step(x, y, where="post", color=colour, linestyle=dash, lw=2, label=plain(label))
    axes.plot(drawn[-1:], [1.0], "o", color=colour, markersize=5, clip_on=False)
