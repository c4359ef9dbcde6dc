"""Pictures of a run whose data are one datum, such as one long sequence: its bounds, and where along it they are lost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lvmppl.agreement_plots import pair_of
from lvmppl.canvas import BLUE, FAINT, INK, KIND_NAMES, MUTED, PANELS, Picture, grid, plain, shorten, styled
from lvmppl.tables import SCHEMAS, nats

PARTS = ("#D55E00", "#E69F00", "#CC79A7", "#56B4E9")  # of a gap, in the order of their columns
LINES = ((BLUE, "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"), ("#E69F00", "-"), (INK, "--"))


@styled
def gap_bars(gaps: pd.DataFrame) -> Picture:
    """Per fit, with one datum each: ELBO, log evidence, and between them a bar of the gap, or of its parts.

    The parts are the columns of `gaps` that follow the contract's and are no errors, where a fit has them.
    """
    rows = gaps[np.isfinite(gaps["gap"])].drop_duplicates("fit")
    shown = rows.head(PANELS)
    parts = [c for c in gaps.columns if c not in SCHEMAS["gaps"] and not c.endswith("_error")]
    picture = Picture("How much each guide loses on the one datum", 8.0, 1.9 + 0.62 * max(1, len(shown)))
    axes = grid(picture, 1, 1)[0]
    for place, (_, row) in enumerate(shown.iterrows()):
        _bar(axes, place, row, parts)
    ends = shown[["log_evidence", "elbo"]].to_numpy(dtype=float) if len(shown) else np.zeros((1, 2))
    low, high = float(ends.min()), float(ends.max())
    room = 0.22 * (high - low) or 1.0
    axes.set(xlim=(low - room, high + room), ylim=(len(shown) - 0.4, -0.75))
    axes.set_yticks(range(len(shown)), [plain(shorten(str(f), 24)) for f in shown["fit"]])
    axes.set_xlabel("nats")
    axes.grid(axis="x", color=FAINT)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.3), ncols=4, borderaxespad=0)
    picture.say(
        "The left end of a bar is a guide's ELBO, the right end the log evidence at the same parameters; its length is "
        "the gap, the KL divergence from the guide's posterior to the exact one. A shorter bar is better.",
        bool(parts) and f"A bar is divided into {' and '.join(parts)}.",
        bool((shown["gap"] < 0).any())
        and "A negative gap is that of a sampled ELBO: it is within its error.",
        len(rows) > len(shown) and f"Only {len(shown)} of {len(rows)} fits are drawn.",
    )
    return picture


def _bar(axes: Axes, place: int, row: pd.Series, parts: Sequence[str]) -> None:
    """One fit: the bar from its ELBO to its log evidence, and the three numbers."""
    start, stop = float(row["elbo"]), float(row["log_evidence"])
    known = [(i, p) for i, p in enumerate(parts) if np.isfinite(row[p])]
    at = start
    for index, part in known:
        label = part if part not in axes.get_legend_handles_labels()[1] else None
        axes.barh(place, row[part], left=at, height=0.42, color=PARTS[index % len(PARTS)], label=label)
        at += float(row[part])
    if not known:
        axes.barh(place, stop - start, left=start, height=0.42, color=BLUE, alpha=0.75)
    axes.vlines(stop, place - 0.3, place + 0.3, color=INK, lw=2)
    axes.vlines(start, place - 0.3, place + 0.3, color=MUTED, lw=2)
    lower, upper = sorted((start, stop))
    left, right = ("ELBO", "log evidence") if start <= stop else ("log evidence", "ELBO")
    for x, words, value, ha, shift in ((lower, left, lower, "right", -5), (upper, right, upper, "left", 5)):
        text = f"{words}\n{nats(value)}"
        axes.annotate(
            text, (x, place), (shift, 0), textcoords="offset points", ha=ha, va="center", fontsize=8
        )
    said = ", ".join(f"{part} {nats(float(row[part]))}" for _, part in known)
    text = f"gap {nats(float(row['gap']))}" + (f" = {said}" if said else "")
    axes.annotate(text, ((start + stop) / 2, place - 0.3), ha="center", va="bottom", fontsize=8.5)


@styled
def sequence_distances(posterior: pd.DataFrame, pairs: Sequence[tuple[str, str]], note: str = "") -> Picture:
    """Total variation between the variational and the trusted marginal at each position of the one sequence.

    A panel a site and a line a fit; `pairs` are the (fit, site) whose rows are positions of one datum.
    """
    sites = list(dict.fromkeys(site for _, site in pairs))
    fits = list(dict.fromkeys(fit for fit, _ in pairs))
    shown = sites[:PANELS]
    picture = Picture(
        "Where along the sequence each guide differs from the exact posterior", 10.0, 1.4 + 1.75 * len(shown)
    )
    kinds = set()
    for axes, site in zip(grid(picture, len(shown), 1, sharex=True, sharey=True), shown, strict=True):
        for index, fit in enumerate(fits):
            if (fit, site) not in pairs:
                continue
            pair = pair_of(posterior, fit, site)
            kinds.add(KIND_NAMES[pair.kind])
            colour, dash = LINES[index % len(LINES)]
            distance = pair.distance.to_numpy(dtype=float)
            label = plain(f"{shorten(fit, 24)}: mean {distance.mean():.3f}")
            places = [int(p) for _, p in pair.trusted.index]
            axes.plot(places, distance, color=colour, linestyle=dash, lw=1.6, label=label)
        axes.set_title(plain(f"site {site}"))
        axes.set(ylim=(-0.03, 1.03), ylabel="distance")
        axes.grid(color=FAINT)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0)
    picture.axes[len(shown) - 1].set_xlabel("position")
    picture.say(
        f"The distance at a position is the total variation ½ Σ_k |q(k) − p(k)| of the guide's probabilities of the "
        f"states from the {' or '.join(sorted(kinds))} ones: 0 where they agree, 1 where they exclude one another.",
        len(sites) > len(shown) and f"Only {len(shown)} of {len(sites)} sites are drawn.",
        note,
    )
    return picture


__all__ = ["gap_bars", "sequence_distances"]
