"""Paper and pens of the pictures: the figure that knows its caption, the style, the palette, and where
labels fit.

Nothing here touches pyplot, and matplotlib's settings are as before after every call.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

Reals = NDArray[np.float64]

INK, MUTED, FAINT = "#222222", "#6b6b6b", "#d9d9d9"
BLUE, VERMILLION = "#0072B2", "#D55E00"

# Okabe & Ito's colours, which stay apart for colour-blind readers; their yellow is too faint on white.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

KIND_NAMES = {"exact": "exact", "mcmc": "MCMC", "variational": "variational"}

PANELS = 12  # small multiples of one picture, and pictures of one sort

WIDTH = 10.0  # inches: at a report's 1000 px a 10-point letter has the size of body text

STYLE: dict[str, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "text.usetex": False,
    "axes.facecolor": "white",
    "axes.edgecolor": "#8a8a8a",
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.use_mathtext": True,
    "figure.facecolor": "white",
    "figure.titlesize": 12.0,
    "figure.titleweight": "bold",
    "grid.color": "#e9e9e9",
    "legend.fontsize": 8.5,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.facecolor": "white",
    "lines.linestyle": "-",
    "savefig.facecolor": "white",
    "savefig.bbox": None,
    "savefig.transparent": False,
    "xtick.color": "#8a8a8a",
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": "#8a8a8a",
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8.5,
}

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def style() -> Iterator[None]:
    """Draws in the house style whatever the user's settings are, and puts those back."""
    with matplotlib.rc_context(cast(Any, STYLE)):  # the stubs want literal keys
        yield


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """The drawing function inside `style()`."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with style():
            return draw(*args, **kwargs)

    return inside


class Picture(Figure):
    """A figure with a heading and a caption, which a PNG keeps as its `Title` and `Description`."""

    def __init__(self, heading: str, width: float = WIDTH, height: float = 4.0) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        self.heading, self.caption = heading, ""
        lines = textwrap.wrap(heading, width=int(width * 9.5), max_lines=3)
        self.suptitle(plain("\n".join(lines)), x=0.01, ha="left")
        engine = self.get_layout_engine()
        assert engine is not None
        engine.set(w_pad=0.1, h_pad=0.08, wspace=0.02, hspace=0.04)  # type: ignore[call-arg]

    def say(self, *sentences: str | bool) -> None:
        """Sets the caption; empty sentences and those that do not apply (False) fall out."""
        self.caption = " ".join(s for s in sentences if isinstance(s, str) and s)

    def save(self, path: Path) -> Path:
        """Writes the PNG; equal pictures are equal bytes."""
        with style():
            self.savefig(path, dpi=150, metadata={"Title": self.heading, "Description": self.caption})
        return path


def grid(
    picture: Picture, count: int, columns: int, *, sharex: bool = False, sharey: bool = False
) -> list[Axes]:
    """`count` panels in reading order, at most `columns` a row; the cells left over stay blank."""
    columns = min(columns, max(1, count))
    rows = -(-max(1, count) // columns)
    panels = picture.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).ravel().tolist()
    for axes in panels[count:]:
        axes.set_axis_off()
    return list(panels[:count])


def plain(text: str) -> str:
    """The text as it stands: dollar signs of names do not start a formula."""
    return text.replace("$", r"\$")


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def component_colours(count: int) -> Reals:
    """[K, 3] colours in RGB; past the seven that colour-blind readers can tell apart, evenly along a colour
    map.
    """
    if count <= len(OKABE_ITO):
        return np.array([matplotlib.colors.to_rgb(c) for c in OKABE_ITO[:count]]).reshape(count, 3)
    return np.asarray(matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, count)))[:, :3]


def mixed_colours(probs: Reals, colours: Reals) -> Reals:
    """[N, 3]: Σ_k p(n, k) colour_k; rows without probabilities are grey."""
    known = np.isfinite(probs).all(1) & (probs.sum(1) > 0)
    weights = np.where(known[:, None], probs, 0.0)
    total = np.where(known, weights.sum(1), 1.0)[:, None]
    return np.where(known[:, None], np.clip(weights / total @ colours, 0.0, 1.0), 0.7)


def spread(values: Sequence[float], distance: float) -> list[float]:
    """The values moved apart, in their order, until neighbours are at least `distance` away, around where
    they were.
    """
    order = np.argsort(values, kind="stable")
    placed = np.asarray(values, dtype=float)[order]
    for _ in range(100):
        overlap = np.clip(distance - np.diff(placed), 0.0, None)
        if not (overlap > 1e-9 * distance).any():
            break
        placed[:-1] -= overlap / 2
        placed[1:] += overlap / 2
    result = np.empty(len(placed))
    result[order] = placed
    return result.tolist()


def label_points(axes: Axes, points: Reals, names: Sequence[str], crowd: Reals) -> None:
    """Names beside ringed points, each joined by a hair line, off one another, off the rings and off the
    crowd.

    Each name takes the cheapest place of several rings of places around its point: outside the axes, over
    other names, rings and hair lines is forbidden, over points of the crowd dear, far away a little dear.
    Sizes are those of an axes of three to four inches.
    """
    corner = np.array([axes.get_xlim()[0], axes.get_ylim()[0]])
    scale = np.array([axes.get_xlim()[1], axes.get_ylim()[1]]) - corner
    spots = (points - corner) / scale
    others = np.unique(
        np.round((crowd - corner) / scale, 2), axis=0
    )  # what counts is the area that is covered
    places = [r * np.array([np.cos(a), np.sin(a)]) for r in RADII for a in ANGLES]
    boxes: list[tuple[Reals, Reals]] = []  # centre, half of the size
    for point, name in zip(spots, names, strict=True):
        half = np.array([0.013 * len(name) + 0.006, 0.025])
        costs = [_place_cost(point, point + offset, half, boxes, spots, others) for offset in places]
        centre = point + places[int(np.argmin(costs))]
        boxes.append((centre, half))
        others = np.concatenate([others, np.repeat(_hair(point, centre), 10, axis=0)])
        hair = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        (px, py), (tx, ty) = corner + point * scale, corner + centre * scale
        axes.annotate(
            name, (px, py), (tx, ty), ha="center", va="center", fontsize=8.5, arrowprops=hair, zorder=6
        )


RADII = (0.06, 0.09, 0.13, 0.18, 0.24, 0.3, 0.37, 0.45)
ANGLES = np.linspace(0, 2 * np.pi, 32, endpoint=False) + 0.1


def _hair(start: Reals, stop: Reals) -> Reals:
    return start + np.linspace(0.2, 1.0, 12)[:, None] * (stop - start)


def _place_cost(
    point: Reals, centre: Reals, half: Reals, boxes: Sequence[tuple[Reals, Reals]], spots: Reals, crowd: Reals
) -> float:
    """What it costs to write a name at `centre`, in fractions of the axes."""
    forbidden = bool((np.abs(centre - 0.5) + half > 0.5).any())
    forbidden |= any(bool((np.abs(centre - c) < half + h).all()) for c, h in boxes)
    hair = _hair(point, centre)
    forbidden |= any(bool((np.abs(hair - c) < h).all(1).any()) for c, h in boxes)
    rings = int((np.abs(spots - centre) < half + 0.022).all(1).sum())
    covered = int((np.abs(crowd - centre) < half + 0.008).all(1).sum())
    (x, y), (hair_x, hair_y) = crowd.T, hair[2:-2, :, None].transpose(1, 0, 2)
    crossed = int(((np.abs(x - hair_x) < 0.011) & (np.abs(y - hair_y) < 0.011)).any(0).sum())
    away = float(np.hypot(*(centre - point)))
    return 1e6 * forbidden + 1e3 * rings + 10.0 * min(covered, 90) + 3.0 * min(crossed, 30) + 30.0 * away
