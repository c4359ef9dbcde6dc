"""The picture of the components: the data coloured by responsibility, an ellipse for every component.

Shapes: N data, K components (labels), D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse
from matplotlib.patheffects import withStroke

from lvmppl.align import KINDS, responsibilities
from lvmppl.canvas import (
    FAINT,
    INK,
    KIND_NAMES,
    PANELS,
    Picture,
    Reals,
    component_colours,
    mixed_colours,
    plain,
    shorten,
    styled,
)

COLUMNS = 4
PRINCIPAL = 6  # of more columns than this principal components are drawn

Cell = tuple[str, str]  # fit, kind


@styled
def component_scatter(
    posterior: pd.DataFrame, data: pd.DataFrame, site: str, note: str = ""
) -> Picture | None:
    """The data coloured by responsibility with the components' ellipses, a panel per fit and kind, on equal
    axes.

    An ellipse is the responsibility-weighted mean and the contour, two standard deviations away, of the
    responsibility-weighted covariance. None where the picture does not apply: a site without one state a
    datum, or data of fewer than two columns that vary.
    """
    rows = posterior[(posterior["site"] == site) & posterior["label"].notna() & (posterior["position"] == "")]
    rows = rows[rows["datum"].isin(data.index)]
    features = _varying(data[data.index.isin(rows["datum"])].sort_index())
    if features.shape[1] < 2:
        return None
    count = int(rows["label"].max()) + 1
    tables = {
        (str(fit), str(kind)): _probabilities(group, features.index, count)
        for (fit, kind), group in rows.groupby(["fit", "kind"], sort=False)
    }
    plane = choose_plane(features, np.nan_to_num(next(iter(tables.values()))))
    cells, columns = _cells(list(tables))
    num_rows = len(cells) // columns
    several = posterior["site"].nunique() > 1
    heading = "The data and the components found" + (f": site {site}" if several else "")
    width, height = (10.0, 2.9) if columns > 2 else (1.2 + 4.0 * columns, 3.6)
    picture = Picture(heading, width, 1.1 + height * num_rows)
    panels = picture.subplots(num_rows, columns, squeeze=False, sharex=True, sharey=True)
    _fill(panels.ravel().tolist(), cells, columns, tables, plane, component_colours(count))
    _legend(picture, component_colours(count))
    left_out = len(tables) - sum(cell is not None for cell in cells)
    picture.say(*CAPTION, plane.reason, left_out > 0 and f"{left_out} more panels are not drawn.", note)
    return picture


CAPTION = (
    "Every point is a datum, in the colour of its component; a datum between components has a mixed colour, "
    "and one of unknown probabilities is grey. A number stands at the responsibility-weighted mean of a "
    "component, and the ellipse around it lies two standard deviations away (responsibility-weighted "
    "covariance). Components are numbered alike in all fits.",
    "In variational panels a ring marks the data whose most probable component is not the exact one.",
)


def _probabilities(rows: pd.DataFrame, index: pd.Index, count: int) -> Reals:
    """[N, K]: 0 for a component that the fit lacks, NaN for a datum without probabilities."""
    table = responsibilities(rows, "label").droplevel("position").reindex(index=index, columns=range(count))
    known = table.notna().any(axis=1).to_numpy()
    probs = table.to_numpy(dtype=float)
    return np.where(known[:, None] & np.isnan(probs), 0.0, probs)


def _varying(data: pd.DataFrame) -> pd.DataFrame:
    """The numeric columns that vary."""
    columns = data.select_dtypes("number").astype(float)
    return columns.loc[:, columns.nunique() > 1]


class Plane(NamedTuple):
    """Two dimensions to draw the data in: points [N, 2], the names of the axes, and how they were chosen."""

    points: Reals
    names: tuple[str, str]
    reason: str


def choose_plane(data: pd.DataFrame, weights: Reals) -> Plane:
    """The two columns with the largest between-component spread, or of many columns two principal components.

    The spread of column d is η²_d = Σ_k N_k (m_kd − m_d)² / Σ_n (x_nd − m_d)², with the means m_k and sizes
    N_k of the components under the responsibilities `weights` [N, K]: the share of its variance that lies
    between components, which has no unit. Equal spreads (one component) give the first two columns. Missing
    values count as the column's mean.
    """
    x = data.to_numpy(dtype=float)  # [N, D]
    filled = np.where(np.isfinite(x), x, np.nanmean(np.where(np.isfinite(x), x, np.nan), axis=0))
    centred = (filled - filled.mean(0)) / filled.std(0)
    if x.shape[1] > PRINCIPAL:
        left, singular, _ = np.linalg.svd(centred, full_matrices=False)
        share = 100 * singular**2 / (singular**2).sum()
        first, second = (f"principal component {i + 1} ({share[i]:.0f} %)" for i in (0, 1))
        reason = (
            f"Drawn are the first two principal components of the {x.shape[1]} standardised columns, with "
        )
        reason += "their share of the variance."
        return Plane(left[:, :2] * singular[:2], (first, second), reason)
    sizes = weights.sum(0)
    means = weights.T @ centred / np.maximum(sizes, 1e-300)[:, None]  # [K, D]
    between = (sizes[:, None] * means**2).sum(0) / len(x)
    chosen = np.sort(np.argsort(-np.round(between, 9), kind="stable")[:2])
    names = (str(data.columns[chosen[0]]), str(data.columns[chosen[1]]))
    reason = f"Of the {x.shape[1]} columns the two with the most spread between components are drawn."
    return Plane(x[:, chosen], names, reason if x.shape[1] > 2 else "")


def _cells(keys: list[Cell]) -> tuple[list[Cell | None], int]:
    """Panels in reading order: a column per fit with its kinds one above the other, at most four a row.

    Fits with more kinds come first, so that what stays blank is at the right end of a row. The kinds of an
    only fit stand side by side.
    """
    counts = Counter(fit for fit, _ in keys)
    if len(counts) == 1:
        return [*keys], len(keys)
    fits = sorted(counts, key=lambda fit: -counts[fit])[:PANELS]
    columns = min(COLUMNS, len(fits))
    cells: list[Cell | None] = []
    for start in range(0, len(fits), columns):
        block = fits[start : start + columns]
        for kind in (k for k in KINDS if any((fit, k) in keys for fit in block)):
            row = [(fit, kind) if (fit, kind) in keys else None for fit in block]
            cells += [*row, *[None] * (columns - len(row))]
    return cells, columns


def _fill(
    panels: Sequence[Axes],
    cells: Sequence[Cell | None],
    columns: int,
    tables: Mapping[Cell, Reals],
    plane: Plane,
    colours: Reals,
) -> None:
    width = 26 if columns > 2 else 40
    for index, (axes, cell) in enumerate(zip(panels, cells, strict=True)):
        if cell is None:
            axes.set_axis_off()
            continue
        fit, kind = cell
        trusted = [tables[fit, k] for k in KINDS if k != kind and (fit, k) in tables]
        _panel(
            axes,
            plane.points,
            tables[cell],
            trusted[0] if kind == "variational" and trusted else None,
            colours,
        )
        axes.set_title(plain(f"{shorten(fit, width - 14)}: {KIND_NAMES[kind]}"), fontweight="bold")
        # The first panel of a row and the last of a column carry the scales.
        if index % columns == 0:
            axes.set_ylabel(plain(shorten(plane.names[1], width + 10)))
            axes.tick_params(labelleft=True)
        if index + columns >= len(cells) or cells[index + columns] is None:
            axes.set_xlabel(plain(shorten(plane.names[0], width + 10)))
            axes.tick_params(labelbottom=True)


def _panel(axes: Axes, points: Reals, probs: Reals, trusted: Reals | None, colours: Reals) -> None:
    """One fit and kind: points [N, 2] coloured by probs [N, K], rings where `trusted` has another
    component.
    """
    size = float(np.clip(3000 / len(points), 4, 22))
    axes.scatter(
        points[:, 0], points[:, 1], s=size, c=mixed_colours(probs, colours), alpha=0.75, lw=0, zorder=2
    )
    known = np.isfinite(probs).all(1)
    if trusted is not None:
        both = known & np.isfinite(trusted).all(1)
        moved = np.flatnonzero(both)[probs[both].argmax(1) != trusted[both].argmax(1)]
        rings = points[moved]
        lw, alpha = (0.9, 1.0) if len(moved) <= 60 else (0.5, 0.3)  # a crowd of rings would hide the data
        axes.scatter(
            rings[:, 0],
            rings[:, 1],
            s=3 * size,
            facecolors="none",
            edgecolors=INK,
            lw=lw,
            alpha=alpha,
            zorder=3,
        )
    usable = known & np.isfinite(points).all(1)
    for label, weights in enumerate(probs[usable].T):
        if weights.sum() > 1e-6:
            _ellipse(axes, points[usable], weights, colours[label], str(label))
    axes.grid(color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)


def _ellipse(axes: Axes, points: Reals, weights: Reals, colour: Reals, name: str) -> None:
    mean = weights @ points / weights.sum()
    centred = points - mean
    covariance = (weights[:, None] * centred).T @ centred / weights.sum()
    variances, directions = np.linalg.eigh(covariance)  # ascending
    height, width = 4 * np.sqrt(np.maximum(variances, 0.0))
    angle = float(np.degrees(np.arctan2(directions[1, 1], directions[0, 1])))
    ellipse = Ellipse(
        (mean[0], mean[1]), width, height, angle=angle, fill=False, ec=tuple(colour), lw=1.8, zorder=4
    )
    axes.add_patch(ellipse)
    halo = [withStroke(linewidth=2.5, foreground="white")]
    text = axes.text(mean[0], mean[1], name, color=tuple(colour), fontsize=11, fontweight="bold", zorder=5)
    text.set(horizontalalignment="center", verticalalignment="center", path_effects=halo)


def _legend(picture: Picture, colours: Reals) -> None:
    if (
        not 1 < len(colours) <= 10
    ):  # one component needs none, and of many the numbers are read, not the colours
        return
    handles = [
        Line2D(
            [], [], marker="o", linestyle="", color=tuple(colour), markersize=6, label=f"component {label}"
        )
        for label, colour in enumerate(colours)
    ]
    picture.legend(handles=handles, loc="outside lower center", ncols=min(5, len(colours)), frameon=False)
