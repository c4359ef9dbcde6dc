"""The picture of the components: the data coloured by responsibility, an ellipse for every component.

Shapes: N data, K components (labels), D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
RINGED = 0.01  # total variation from the exact posterior beyond which a datum has a ring
PRINCIPAL = 6  # of more columns than this principal components are drawn

Cell = tuple[str, str]  # fit, kind


@styled
def component_scatter(
    posterior: pd.DataFrame, data: pd.DataFrame, site: str, note: str = ""
) -> Picture | None:
    """The data coloured by responsibility with the components' ellipses, a panel per fit, on equal axes.

    A fit with a guide shows what the guide says, with the ellipses of its exact (or MCMC) posterior dashed and a ring
    around each datum of which the two differ. An ellipse is the responsibility-weighted mean and the contour, two
    standard deviations away, of the responsibility-weighted covariance. None where the picture does not apply: a
    site without one state a datum, or data of fewer than two columns that vary.
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
    cells = _cells(list(tables))[:PANELS]
    columns = _num_columns(len(cells))
    num_rows = -(-len(cells) // columns)
    several = posterior["site"].nunique() > 1
    heading = "The data and the components found" + (f": site {site}" if several else "")
    width, height = (10.0, 3.0) if columns > 2 else (1.2 + 4.4 * columns, 3.6)
    picture = Picture(heading, width, 1.1 + height * num_rows)
    panels = picture.subplots(num_rows, columns, squeeze=False, sharex=True, sharey=True)
    colours = component_colours(count)
    compared = _fill(panels.ravel().tolist(), cells, columns, tables, plane, colours)
    _legend(picture, colours, compared)
    left_out = len({fit for fit, _ in tables}) - len(cells)
    picture.say(
        *_caption(compared, bool(compared) and any(kind == "mcmc" for _, kind in tables)),
        plane.reason,
        left_out > 0 and f"{left_out} more fits are not drawn.",
        note,
    )
    return picture


def _caption(compared: bool, mcmc: bool) -> list[str | bool]:
    trusted = "exact (or MCMC)" if mcmc else "exact"
    return [
        "Every point is a datum, in the colour of its component; a datum between components has a mixed colour, "
        "and one of unknown probabilities is grey. A number stands at the responsibility-weighted mean of a "
        "component, and the ellipse around it lies two standard deviations away (responsibility-weighted "
        "covariance). Components are numbered alike in all fits.",
        compared
        and "A fit with a guide shows the guide's probabilities; dashed are the ellipses of its "
        f"{trusted} posterior, and a ring marks a datum whose probabilities differ from those by more than "
        f"{RINGED:g} (total variation): the wider the ring, the more.",
    ]


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


def _cells(keys: Sequence[Cell]) -> list[Cell]:
    """What each fit shows, in the order of the fits: its guide's posterior, or the only one it has."""
    shown = {fit: kind for fit, kind in sorted(keys, key=lambda key: KINDS.index(key[1]))}  # the last stays
    return [(fit, shown[fit]) for fit in dict.fromkeys(fit for fit, _ in keys)]


def _num_columns(count: int) -> int:
    """As many panels a row as leave the fewest places blank."""
    return min(count, 3) if count <= 3 else 2 if count == 4 else 3 if count <= 6 else COLUMNS


def _fill(
    panels: Sequence[Axes],
    cells: Sequence[Cell],
    columns: int,
    tables: Mapping[Cell, Reals],
    plane: Plane,
    colours: Reals,
) -> bool:
    """Draws the panels; whether any compares two posteriors."""
    width = 26 if columns > 2 else 40
    compared = False
    for axes in panels[len(cells) :]:
        axes.set_axis_off()
    for index, (axes, cell) in enumerate(zip(panels, cells, strict=False)):
        fit, kind = cell
        trusted = next((tables[fit, k] for k in KINDS if k != kind and (fit, k) in tables), None)
        compared = compared or trusted is not None
        _panel(axes, plane.points, tables[cell], trusted, colours)
        axes.set_title(plain(f"{shorten(fit, width - 14)}: {KIND_NAMES[kind]}"), fontweight="bold")
        axes.tick_params(labelleft=True, labelbottom=True)
        if index % columns == 0:
            axes.set_ylabel(plain(shorten(plane.names[1], width + 10)))
        if index + columns >= len(cells):
            axes.set_xlabel(plain(shorten(plane.names[0], width + 10)))
    return compared


def _panel(axes: Axes, points: Reals, probs: Reals, trusted: Reals | None, colours: Reals) -> None:
    """One fit: points [N, 2] coloured by probs [N, K], rings and dashed ellipses where `trusted` says otherwise."""
    size = float(np.clip(3000 / len(points), 4, 22))
    axes.scatter(
        points[:, 0], points[:, 1], s=size, c=mixed_colours(probs, colours), alpha=0.75, lw=0, zorder=2
    )
    if trusted is not None:
        _rings(axes, points, np.nan_to_num(np.abs(probs - trusted).sum(1) / 2), size)
        _ellipses(axes, points, trusted, colours, dashed=True)
    _ellipses(axes, points, probs, colours, dashed=False)
    axes.grid(color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)


def _rings(axes: Axes, points: Reals, distance: Reals, size: float) -> None:
    """Rings around the data whose total variation distance [N] is worth seeing."""
    moved = np.flatnonzero(distance > RINGED)
    lw, alpha = (0.9, 1.0) if len(moved) <= 60 else (0.5, 0.3)  # a crowd of rings would hide the data
    area = size * (2.5 + 20 * distance[moved])
    style: dict[str, Any] = {"facecolors": "none", "edgecolors": INK, "lw": lw, "alpha": alpha}
    axes.scatter(points[moved, 0], points[moved, 1], s=area, zorder=3, **style)


def _ellipses(axes: Axes, points: Reals, probs: Reals, colours: Reals, dashed: bool) -> None:
    usable = np.isfinite(probs).all(1) & np.isfinite(points).all(1)
    for label, weights in enumerate(probs[usable].T):
        if weights.sum() > 1e-6:
            _ellipse(axes, points[usable], weights, colours[label], str(label), dashed)


def _ellipse(axes: Axes, points: Reals, weights: Reals, colour: Reals, name: str, dashed: bool) -> None:
    mean = weights @ points / weights.sum()
    centred = points - mean
    covariance = (weights[:, None] * centred).T @ centred / weights.sum()
    variances, directions = np.linalg.eigh(covariance)  # ascending
    height, width = 4 * np.sqrt(np.maximum(variances, 0.0))
    angle = float(np.degrees(np.arctan2(directions[1, 1], directions[0, 1])))
    pen: dict[str, Any] = {"ec": INK, "lw": 1.0, "ls": (0, (4, 3)), "zorder": 5} if dashed else {}
    pen = pen or {"ec": tuple(colour), "lw": 1.8, "zorder": 4}
    axes.add_patch(Ellipse((mean[0], mean[1]), width, height, angle=angle, fill=False, **pen))
    if dashed:
        return
    halo = [withStroke(linewidth=2.5, foreground="white")]
    text = axes.text(mean[0], mean[1], name, color=tuple(colour), fontsize=11, fontweight="bold", zorder=5)
    text.set(horizontalalignment="center", verticalalignment="center", path_effects=halo)


def _legend(picture: Picture, colours: Reals, compared: bool) -> None:
    handles = []
    if 1 < len(colours) <= 10:  # one component needs none, and of many the numbers are read, not the colours
        for label, colour in enumerate(colours):
            dot: dict[str, Any] = {"marker": "o", "linestyle": "", "color": tuple(colour), "markersize": 6}
            handles.append(Line2D([], [], label=f"component {label}", **dot))
    if compared:
        ring: dict[str, Any] = {"marker": "o", "linestyle": "", "mfc": "none", "mec": INK, "markersize": 8}
        handles.append(Line2D([], [], color=INK, lw=1.0, ls=(0, (4, 3)), label="exact ellipse"))
        handles.append(Line2D([], [], label="differs from exact", **ring))
    if handles:
        picture.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
