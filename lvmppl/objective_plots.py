"""The picture of the climbs: each fit's objective over its steps, under the log evidence it can reach at
most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lvmppl.canvas import BLUE, INK, PANELS, VERMILLION, Picture, Reals, grid, plain, shorten, styled
from lvmppl.tables import nats

KIND_NAMES = {"elbo": "ELBO"}
COLUMNS = 2  # of panels: a third leaves no room for what stands below them


@styled
def objective_curves(history: pd.DataFrame, summary: pd.DataFrame) -> Picture:
    """Each fit's objective (nats) over its steps, under a line at the log evidence of its final θ.

    The best restart, the one with the highest objective, is bold, the others are faint. All fits have one
    scale, where that shows the end of every climb; a start below the scale is given as a number.
    """
    finite = history[np.isfinite(history["objective"])]
    curves = {str(fit): rows for fit, rows in history.groupby("fit", sort=False) if fit in set(finite["fit"])}
    drawn = [str(fit) for fit in summary["fit"] if fit in curves][:PANELS]
    height = 0.6 + 3.9 * -(-max(1, len(drawn)) // COLUMNS)
    picture = Picture("Objective of each fit over its steps", 10.0 if len(drawn) > 1 else 7.0, height)
    bests = {fit: _best_restart(curves[fit]) for fit in drawn}
    ends = {fit: summary[summary["fit"] == fit].iloc[0] for fit in drawn}
    limits = _limits([_range(bests[fit]["objective"], float(ends[fit]["log_evidence"])) for fit in drawn])
    for axes, fit, limit in zip(grid(picture, len(drawn), COLUMNS), drawn, limits, strict=True):
        axes.set_ylim(*limit)
        _panel(axes, curves[fit], bests[fit], ends[fit])
    restarted = any(rows["restart"].nunique() > 1 for rows in curves.values())
    noisy = any(_is_noisy(best["objective"].to_numpy(dtype=float)) for best in bests.values())
    picture.say(
        *_caption(restarted, noisy, len(set(limits)) == 1 < len(drawn), set(summary["fit"]) - set(drawn))
    )
    return picture


def _caption(restarted: bool, noisy: bool, one_scale: bool, missing: set[str]) -> list[str | bool]:
    return [
        "What each fit climbs, step by step (step 0 is the start). The horizontal line is the log evidence "
        "at the fit's final parameters: where the objective is the log evidence itself, the curve ends on "
        "the line; an ELBO ends below it, and the shaded distance to it is the gap, the KL divergence from "
        "the guide to the exact posterior. All numbers are in nats.",
        one_scale and "All panels have the same vertical scale.",
        restarted and "Thin grey curves are the other restarts.",
        noisy
        and "A pale jagged curve is what single minibatches or samples estimated (an estimate may lie "
        "above the line); the bold one is its running mean.",
        bool(missing) and f"Not drawn: {', '.join(sorted(missing))}.",
    ]


def _best_restart(rows: pd.DataFrame) -> pd.DataFrame:
    restart = rows["restart"].fillna(0)
    finite = rows["objective"].where(np.isfinite(rows["objective"]))
    return rows[restart == finite.groupby(restart).max().idxmax()].sort_values("step", kind="stable")


def _range(objective: pd.Series, line: float) -> tuple[float, float, float]:
    """(lowest worth seeing, end, highest) of the curve and the line. Far lower first tenths are not worth
    it.
    """
    values = objective.to_numpy(dtype=float)
    if _is_noisy(values):  # the scale is that of the bold curve; single estimates may leave it
        values = _running_mean(values, _window(values))
    finite = values[np.isfinite(values)]
    lines = [line] if np.isfinite(line) else []
    end = float(finite[-1])
    high = max([float(finite.max()), *lines])
    low = min([float(finite.min()), *lines])
    if len(finite) > 3:
        tenth = float(np.quantile(finite, 0.1, method="higher"))
        height = max(3.0 * (high - tenth), 1e-3 * abs(high))
        low = max(low, min(high - height, end, *lines))
    return low, end, high


def _limits(ranges: Sequence[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """One scale for all panels, of the geometric mean of their heights, unless the ends of some fits are off
    it.
    """
    heights = [high - low for low, _, high in ranges if high > low]
    if not heights:
        return [(low - 1.0, high + 1.0) for low, _, high in ranges]
    common = float(np.exp(np.mean(np.log(heights))))
    top = max(high for *_, high in ranges)
    last = min(end for _, end, _ in ranges)
    bottom = max(min(low for low, *_ in ranges), min(top - common, last - 0.25 * (top - last)))
    shared = top - bottom <= 5.0 * common
    spans = [(bottom, top)] * len(ranges) if shared else [(low, high) for low, _, high in ranges]
    margins = [max(high - low, 1e-6 * max(1.0, abs(high))) for low, high in spans]
    return [(low - 0.06 * m, high + 0.1 * m) for (low, high), m in zip(spans, margins, strict=True)]


def _is_noisy(objective: Reals) -> bool:
    """Many steps of which more than a fifth fall by more than rounding: an estimate, not an ascent."""
    finite = objective[np.isfinite(objective)]
    return len(finite) > 60 and float((np.diff(finite) < -1e-6 * np.abs(finite[1:])).mean()) > 0.2


def _window(values: Reals) -> int:
    return max(5, len(values) // 15)


def _running_mean(values: Reals, window: int) -> Reals:
    """Mean over about `window` steps around each step, weighted by a Hann window; NaN for the steps nearer to an end.

    Its weights end in zero: how many batches of an epoch fall inside makes no ripple. Steps that are not finite do not
    count.
    """
    finite = np.isfinite(values)
    kernel = np.hanning(window + 2)[1:-1]
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    count = np.convolve(finite.astype(float), kernel, mode="same")
    mean = np.where(count > 1e-3 * kernel.sum(), total / np.maximum(count, 1e-300), np.nan)
    mean[: window // 2] = mean[len(mean) - window // 2 :] = np.nan
    return mean


def _quartiles(values: Reals, window: int) -> tuple[Reals, Reals]:
    """The running quartiles: half of the steps around lie between them."""
    rolling = pd.Series(values).rolling(2 * window, center=True, min_periods=window)
    return rolling.quantile(0.25).to_numpy(), rolling.quantile(0.75).to_numpy()


def _panel(axes: Axes, rows: pd.DataFrame, best: pd.DataFrame, end: pd.Series) -> None:
    kind = str(best["objective_kind"].iloc[-1])
    name = KIND_NAMES.get(kind, kind.replace("_", " "))
    others = rows[rows["restart"].fillna(0) != best["restart"].fillna(0).iloc[0]]
    for _, other in others.groupby("restart"):
        axes.plot(*_curve(other), color="#9a9a9a", linewidth=0.8, alpha=0.7, zorder=2)
    steps, values = _curve(best)
    final = float(end["elbo"]) if "elbo" in kind else np.nan
    shown = _best_curve(axes, steps, values, name, 1 + others["restart"].nunique(), final)
    _evidence_line(axes, kind, steps, shown, end)
    axes.set_xlim(0, max(1.0, float(rows["step"].max())) * 1.02)
    finite = values[np.isfinite(values)]
    if finite[0] < axes.get_ylim()[0]:
        axes.plot([], [], " ", label=f"starts at {finite[0]:,.0f} (below)".replace("-", "−"))
    how = [str(end["algorithm"])] if end["algorithm"] != end["fit"] else []
    how += [f"guide {end['guide']}"] if end["guide"] else []
    axes.set_title(
        plain(shorten(str(end["fit"]) + (f" ({', '.join(how)})" if how else ""), 48)), weight="bold"
    )
    axes.set(xlabel="step", ylabel=f"{name} (nats)")
    axes.grid(axis="y")
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0.0, -0.17),
        handlelength=1.4,
        borderaxespad=0,
    )


def _curve(rows: pd.DataFrame) -> tuple[Reals, Reals]:
    """Steps and objective, with breaks where it is not finite."""
    values = rows["objective"].to_numpy(dtype=float)
    return rows["step"].to_numpy(dtype=float, na_value=np.nan), np.where(np.isfinite(values), values, np.nan)


def _best_curve(axes: Axes, steps: Reals, values: Reals, name: str, restarts: int, end: float) -> Reals:
    """Draws the best restart, estimates as their running mean in a pale band, up to the objective at the end; returns
    the bold curve.
    """
    if not _is_noisy(values):
        several = "first of {} chains" if name == "log joint" else "best of {}"
        label = f"{name}, {several.format(restarts)}" if restarts > 1 else name
        marker = "o" if len(values) < 15 else ""
        axes.plot(steps, values, color=BLUE, lw=2.2, marker=marker, ms=3.5, zorder=3, label=label)
        return values
    window = _window(values)
    mean = _running_mean(values, window)
    low, high = _quartiles(values, window)
    band = axes.fill_between(
        steps, low, high, color=BLUE, alpha=0.13, lw=0, zorder=2, label="half of the steps"
    )
    band.set_clip_on(True)
    if np.isfinite(end):
        axes.plot(steps[-1:], [end], "o", color=BLUE, ms=5, zorder=6, label=f"{name} of all rows {nats(end)}")
        mean[-1] = end
    known = np.isfinite(mean)
    axes.plot(steps[known], mean[known], color=BLUE, lw=2.2, zorder=4, label=f"mean over {window} steps")
    return mean


def _evidence_line(axes: Axes, kind: str, steps: Reals, curve: Reals, end: pd.Series) -> None:
    """The log evidence at the fit's final θ, and for an ELBO the gap below it."""
    line, gap = float(end["log_evidence"]), float(end["gap"])
    if not np.isfinite(line) or kind == "log_joint":  # the height of one point, which no integral bounds
        return
    sort = str(end["log_evidence_kind"]).replace("_", " ")
    name = "exact log evidence" if sort == "exact" else f"log evidence ({sort})"
    dash = "-" if sort == "exact" else "--"
    axes.axhline(line, color=INK, lw=1.2, linestyle=dash, zorder=5, label=f"{name} {nats(line)}")
    if "elbo" in kind:
        said = f"gap, at the end {nats(gap)}" if np.isfinite(gap) else "gap"
        known = np.isfinite(curve)
        under = np.minimum(curve[known], line)
        axes.fill_between(steps[known], under, line, color=VERMILLION, alpha=0.15, lw=0, zorder=1, label=said)
