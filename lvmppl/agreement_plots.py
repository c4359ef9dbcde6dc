"""The pictures of agreement: each entry of the posterior, exact against variational.

Shapes: R rows (a datum, or a position of a sequence), K components (labels).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from lvmppl.align import KINDS, responsibilities
from lvmppl.canvas import (
    BLUE,
    INK,
    KIND_NAMES,
    MUTED,
    Picture,
    Reals,
    component_colours,
    grid,
    label_points,
    spread,
    styled,
)
from lvmppl.tables import worst_data

HEAT_ROWS = 400  # rows of more data than this cannot be told apart in a heat map
SCATTER_POINTS = 4000  # more points than this hide one another
ERROR_BARS = 300
WORST = 5

Row = tuple[int, str]  # datum (−1 for a global site), position


def trusted_kind(posterior: pd.DataFrame, fit: str, site: str) -> str:
    """What a fit's variational rows of a site are compared with: its exact rows, else those of MCMC."""
    rows = posterior[(posterior["fit"] == fit) & (posterior["site"] == site)]
    return next((kind for kind in KINDS[:2] if kind in set(rows["kind"])), "exact")


class Pair(NamedTuple):
    """A site's responsibilities under the trusted and the variational posterior of one fit: [R, K], same
    rows.
    """

    kind: str
    trusted: pd.DataFrame
    variational: pd.DataFrame

    @property
    def distance(self) -> pd.Series:
        """Total variation ½ Σ_k |p − q| per row [R]."""
        return (self.trusted - self.variational).abs().sum(axis=1) / 2

    @property
    def is_sequence(self) -> bool:
        """Whether all rows are positions 0, 1, … of one datum, whose order (time, say) is worth more than a sorted one."""
        data = {datum for datum, _ in self.trusted.index}
        return len(data) == 1 and all(str(position).isdecimal() for _, position in self.trusted.index)


def pair_of(posterior: pd.DataFrame, fit: str, site: str) -> Pair:
    """A fit's variational responsibilities of a site beside the trusted ones: the rows that both know."""
    rows = posterior[(posterior["fit"] == fit) & (posterior["site"] == site) & posterior["label"].notna()]
    kind = trusted_kind(posterior, fit, site)
    tables = [responsibilities(rows[rows["kind"] == k], "label") for k in (kind, "variational")]
    shared = tables[0].index.intersection(tables[1].index, sort=False)
    labels = tables[0].columns.union(tables[1].columns)
    trusted, variational = (table.reindex(index=shared, columns=labels) for table in tables)
    known = trusted.notna().all(axis=1) & variational.notna().all(axis=1)
    return Pair(kind, trusted[known], variational[known])


@styled
def responsibility_comparison(
    posterior: pd.DataFrame, gaps: pd.DataFrame, fit: str, site: str, note: str = ""
) -> Picture:
    """Exact (across) against variational (up) probability of every datum and component, beside heat maps of
    both.

    Points become a two-dimensional histogram where they would hide one another; heat maps are drawn up to 400
    rows. The data of the largest total variation carry their numbers.
    """
    pair = pair_of(posterior, fit, site)
    labels = posterior.loc[posterior["site"] == site, "label"].dropna()
    colours = component_colours(int(labels.max()) + 1 if len(labels) else 0)
    worst = _worst_rows(pair)
    heat, crowded = 0 < len(pair.trusted) <= HEAT_ROWS, pair.trusted.size > SCATTER_POINTS
    several = posterior.loc[posterior["label"].notna(), "site"].nunique() > 1
    heading = f"{_capital(KIND_NAMES[pair.kind])} against variational responsibilities: fit '{fit}'"
    picture = Picture(
        heading + (f", site {site}" if several else ""), 10.0 if heat else 6.4, 5.2 if heat else 6.0
    )
    if heat:
        axes, *maps = picture.subplots(1, 3, width_ratios=[1.75, 0.75, 0.75])
        _heat_maps(picture, maps, pair, colours, worst)
    else:
        axes = picture.subplots()
    _agreement(picture, axes, pair, colours, worst, crowded)
    picture.say(*_caption(pair, heat, crowded, bool(worst)), note)
    return picture


def _capital(word: str) -> str:
    return word[0].upper() + word[1:]


def _worst_rows(pair: Pair) -> list[Row]:
    """Of each of the data that differ most (total variation) the row where they do; none that agree.

    Not those with the largest gaps: a gap may lie in a probability near 0, where nothing is to be seen.
    """
    rows = pair.distance.sort_values(ascending=False, kind="stable")
    differing = [(int(datum), str(position)) for datum, position in rows[rows > 1e-6].index]
    first: dict[int, Row] = {}
    for row in differing:
        first.setdefault(row[0], row)
    return list(first.values())[:WORST]


def _agreement(
    picture: Picture, axes: Axes, pair: Pair, colours: Reals, worst: Sequence[Row], crowded: bool
) -> None:
    axes.plot([0, 1], [0, 1], color=INK if crowded else MUTED, linewidth=0.9, zorder=4 if crowded else 1)
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
    axes.set(xlabel=f"{KIND_NAMES[pair.kind]} probability", ylabel="variational probability")
    p, q = pair.trusted.to_numpy(dtype=float), pair.variational.to_numpy(dtype=float)  # [R, K]
    if crowded:
        edges = np.linspace(0, 1, 51)
        inside = np.clip(np.stack([p.ravel(), q.ravel()]), 0, 1)
        counts = np.histogram2d(inside[0], inside[1], bins=edges)[0]
        norm = LogNorm(1, max(float(counts.max()), 2.0))
        shown = np.ma.masked_equal(counts.T, 0)
        image = axes.pcolormesh(edges, edges, shown, cmap="viridis_r", norm=norm, zorder=2)
        picture.colorbar(image, ax=axes, shrink=0.7, label="number of (datum, component) pairs")
    else:
        for column, label in enumerate(pair.trusted.columns):
            name = f"component {label}" if p.shape[1] <= 10 else None  # of more, no legend helps
            colour = tuple(colours[int(label)])
            axes.scatter(
                p[:, column], q[:, column], s=22, color=colour, alpha=0.6, lw=0, zorder=3, label=name
            )
    if worst:
        _mark_worst(axes, pair, worst)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, columnspacing=1.2, handletextpad=0.2
        )


def _mark_worst(axes: Axes, pair: Pair, worst: Sequence[Row]) -> None:
    """A ring and the datum's number at the component that each of the worst data gets most wrong."""
    p, q = pair.trusted.loc[list(worst)].to_numpy(), pair.variational.loc[list(worst)].to_numpy()
    k = np.abs(p - q).argmax(1)
    rows = np.arange(len(worst))
    spots = np.column_stack([p[rows, k], q[rows, k]])
    axes.scatter(
        spots[:, 0],
        spots[:, 1],
        s=70,
        facecolors="none",
        edgecolors=INK,
        lw=1.1,
        zorder=5,
        label="differ most",
    )
    diagonal = np.linspace(0, 1, 60)
    everything = np.column_stack([pair.trusted.to_numpy().ravel(), pair.variational.to_numpy().ravel()])
    crowd = np.concatenate([everything, np.column_stack([diagonal, diagonal])])
    label_points(axes, spots, [_row_name(row) for row in worst], crowd)


def _row_name(row: Row) -> str:
    datum, position = row
    return ("" if datum < 0 else str(datum)) + (f"[{position}]" if position else "")


def _heat_maps(
    picture: Picture, maps: Sequence[Axes], pair: Pair, colours: Reals, worst: Sequence[Row]
) -> None:
    """Both matrices side by side, rows by trusted component, the certain ones first; a sequence in its own order."""
    p = pair.trusted.to_numpy(dtype=float)
    group, within = p.argmax(1), -p.max(1)
    if pair.is_sequence:
        group, within = np.zeros_like(group), np.array([float(i) for _, i in pair.trusted.index])
    order = np.lexsort((within, group))
    borders = np.flatnonzero(np.diff(group[order])) + 0.5
    for axes, table, name in zip(maps, pair[1:], (KIND_NAMES[pair.kind], "variational"), strict=True):
        shown = table.to_numpy(dtype=float)[order]
        image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.hlines(borders, -0.5, p.shape[1] - 0.5, color=MUTED, linewidth=0.8)
        axes.set_title(name)
        axes.set_xlabel("component")
        axes.set_yticks([])
        axes.spines[:].set_visible(True)
        every = -(-p.shape[1] // 10)
        labels = [int(label) for label in pair.trusted.columns[::every]]
        axes.set_xticks(range(0, p.shape[1], every), [str(label) for label in labels])
        for tick, label in zip(axes.get_xticklabels(), labels, strict=True):
            tick.set(color=tuple(colours[label]), fontweight="bold")
    unit = "rows" if any(position for _, position in pair.trusted.index) else "data"
    maps[0].set_ylabel(
        f"{len(p)} positions, the first at the top"
        if pair.is_sequence
        else f"{len(p)} {unit}, by {KIND_NAMES[pair.kind]} component"
    )
    picture.colorbar(
        image, ax=maps[-1], location="right", shrink=0.5, aspect=25, pad=0.04, label="probability"
    )
    places = [float(np.flatnonzero(order == pair.trusted.index.get_loc(row))[0]) for row in worst]
    hair = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
    edge, width = p.shape[1] - 0.5, p.shape[1]
    for row, place, height in zip(worst, places, spread(places, len(p) / 26), strict=True):
        spot, text = (edge, place), (edge + 0.14 * width, height)
        maps[-1].annotate(
            _row_name(row), spot, text, va="center", fontsize=8.5, annotation_clip=False, arrowprops=hair
        )


def _caption(pair: Pair, heat: bool, crowded: bool, marked: bool) -> list[str | bool]:
    name = KIND_NAMES[pair.kind]
    if not len(pair.trusted):
        return [f"There is no row with both {name} and variational probabilities."]
    distance = pair.distance
    sequences = any(position for _, position in pair.trusted.index)
    moved = int((pair.trusted.to_numpy().argmax(1) != pair.variational.to_numpy().argmax(1)).sum())
    return [
        f"{'Each cell counts pairs of' if crowded else 'Each point is'} one datum and one component: across, "
        f"its probability under the {name} posterior; upwards, under the guide. On the diagonal the two "
        "agree, above it the guide gives the component too much.",
        marked
        and "A ring and a number mark the data that differ most, each at the component that the guide gets "
        f"most wrong{' (7[12] is position 12 of datum 7)' if sequences else ''}.",
        heat
        and "On the right the same probabilities as two maps, "
        + (
            "a row a position, in their order from the top"
            if pair.is_sequence
            else "a row a datum, sorted by component and then by certainty"
        )
        + ": where the maps look alike, the guide is right.",
        f"The most probable component differs in {moved} of {len(distance)} rows; the total variation "
        f"distance between the two posteriors is {distance.mean():.2g} on average and "
        f"{distance.max():.2g} at most.",
    ]


# ---------------------------------------------------------------------------------------- continuous sites


@styled
def continuous_comparison(
    posterior: pd.DataFrame, gaps: pd.DataFrame, fit: str, site: str, note: str = ""
) -> Picture:
    """Posterior means with standard deviations, exact (across) against variational (up), and the
    deviations.
    """
    kind = trusted_kind(posterior, fit, site)
    both = _moments(posterior, fit, site, kind)
    worst = worst_data(gaps, fit, WORST)["datum"]
    name = KIND_NAMES[kind]
    heading = f"{_capital(name)} against variational means and deviations: fit '{fit}', site {site}"
    picture = Picture(heading, 10.0, 5.2)
    panels = grid(picture, 2, 2)
    bars = len(both) <= ERROR_BARS
    for axes, quantity, word in zip(panels, ("mean", "sd"), ("mean", "standard deviation"), strict=True):
        _moment_panel(axes, both, quantity, bars)
        rings = both[both["datum"].isin(worst)]
        if len(rings):
            x, y = rings[f"{quantity}_trusted"], rings[f"{quantity}_variational"]
            axes.scatter(x, y, s=60, facecolors="none", edgecolors=INK, lw=1, zorder=5, label="worst data")
        axes.set(xlabel=f"{name} posterior {word}", ylabel=f"variational posterior {word}")
        axes.legend(loc="upper left")
    ratio = (both["sd_variational"] / both["sd_trusted"]).where(both["sd_trusted"] > 0)
    picture.say(
        "Each point is one entry of the latent variable. On the diagonal the guide has the right mean (left) "
        "and the right standard deviation (right); below it on the right the guide is too sure of itself.",
        bars
        and f"The bars on the left are one standard deviation to each side: across the {name} posterior's, "
        "upwards the guide's.",
        bool(ratio.notna().any())
        and f"The guide's standard deviation is {ratio.median():.2g} times the {name} one (median).",
        len(worst) > 0 and "Rings mark the data with the largest gaps.",
        note,
    )
    return picture


def _moments(posterior: pd.DataFrame, fit: str, site: str, kind: str) -> pd.DataFrame:
    """A row per entry that both posteriors have: datum, position, and mean and sd of each."""
    rows = posterior[(posterior["fit"] == fit) & (posterior["site"] == site) & posterior["mean"].notna()]
    keys = ["datum", "position"]
    sides = [rows.loc[rows["kind"] == k, [*keys, "mean", "sd"]] for k in (kind, "variational")]
    both = sides[0].merge(sides[1], on=keys, suffixes=("_trusted", "_variational"))
    finite = np.isfinite(both.drop(columns=keys).to_numpy(dtype=float)).all(1)
    return pd.DataFrame(both[finite])


def _moment_panel(axes: Axes, both: pd.DataFrame, quantity: str, bars: bool) -> None:
    x, y = (both[f"{quantity}_{side}"].to_numpy(dtype=float) for side in ("trusted", "variational"))
    xerr, yerr = (both[f"sd_{side}"].to_numpy(dtype=float) for side in ("trusted", "variational"))
    reach = np.concatenate([x, y])
    if bars and quantity == "mean":
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="none", ecolor=BLUE, alpha=0.25, elinewidth=1, zorder=2)
        reach = np.concatenate([x - xerr, x + xerr, y - yerr, y + yerr])
    axes.scatter(x, y, s=18 if bars else 7, color=BLUE, alpha=0.8 if bars else 0.3, lw=0, zorder=3)
    low, high = (float(reach.min()), float(reach.max())) if len(reach) else (0.0, 1.0)
    pad = 0.04 * (high - low) or 0.5
    limits = (low - pad, high + pad)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.plot(limits, limits, color=MUTED, linewidth=0.9, zorder=1, label="equal")
