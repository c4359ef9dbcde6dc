"""The pictures of a run, from its tables: every function takes DataFrames and returns a figure with its
caption.

Everything drawn is in nats or is a probability. States carry the labels of `align`, so that a colour means
the same component in every picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from lvmppl.agreement_plots import continuous_comparison, pair_of, responsibility_comparison
from lvmppl.align import aligned_posterior
from lvmppl.canvas import PANELS, Picture
from lvmppl.component_plots import component_scatter
from lvmppl.gap_plots import gap_curves
from lvmppl.objective_plots import objective_curves
from lvmppl.single_datum_plots import gap_bars, sequence_distances

__all__ = [
    "Picture",
    "component_scatter",
    "continuous_comparison",
    "draw_all",
    "gap_bars",
    "gap_curves",
    "gap_picture",
    "has_climb",
    "objective_curves",
    "responsibility_comparison",
    "sequence_distances",
]


def draw_all(
    tables: Mapping[str, pd.DataFrame],
    data: pd.DataFrame,
    directory: Path,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> list[Path]:
    """Draws every picture that applies to these tables into `directory` and returns the paths in reading
    order.

    `data` has a row per training datum, indexed by datum, and numeric columns; it may be empty. Of more than
    5000 data a seeded draw is shown, and the captions say so.

    on_failure: is told the name of a picture that raises, and its error; the others are drawn all the same.
    Without it the error is raised.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for name, draw in _pictures(tables, data):
        path = directory / f"{name}.png"
        if path in paths:  # two names that differ only in what no file name can hold
            path = directory / f"{name}_{len(paths)}.png"
        try:
            picture = draw()
            if picture is not None:
                paths.append(picture.save(path))
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(name, error)
            path.unlink(missing_ok=True)
    return paths


def _pictures(
    tables: Mapping[str, pd.DataFrame], data: pd.DataFrame
) -> Iterator[tuple[str, Callable[[], Picture | None]]]:
    posterior, note = aligned_posterior(tables)
    discrete = posterior[posterior["label"].notna()]
    if has_climb(tables["history"]):
        yield "objective", partial(objective_curves, tables["history"], tables["summary"])
    for site in discrete["site"].unique()[:PANELS]:
        yield f"components_{_slug(site)}", partial(component_scatter, discrete, data, str(site), note)
    pairs = _compared(posterior)
    if len(pairs) > PANELS:
        note = f"{note} Only {PANELS} of {len(pairs)} pictures of this sort are drawn.".strip()
    for fit, site in pairs[:PANELS]:
        name = f"{_slug(fit)}_{_slug(site)}"
        if site in set(discrete["site"]):
            draw = partial(responsibility_comparison, discrete, tables["gaps"], fit, site, note)
            yield f"responsibilities_{name}", draw
        else:
            yield (
                f"moments_{name}",
                partial(continuous_comparison, posterior, tables["gaps"], fit, site, note),
            )
    along = [p for p in pairs if p[1] in set(discrete["site"]) and pair_of(discrete, *p).is_sequence]
    if along:
        yield "distances", partial(sequence_distances, discrete, along)
    if tables["gaps"]["gap"].notna().any():
        yield "gaps", partial(gap_picture, tables["gaps"])


def has_climb(history: pd.DataFrame) -> bool:
    """Whether there is an objective to be drawn."""
    return bool(np.isfinite(history["objective"]).any())


def gap_picture(gaps: pd.DataFrame) -> Picture:
    """The gaps of many data as curves, those of one datum as bars."""
    return gap_bars(gaps) if gaps["datum"].nunique() == 1 else gap_curves(gaps)


def _compared(posterior: pd.DataFrame) -> list[tuple[str, str]]:
    """(fit, site) of the variational rows that have exact or MCMC rows of the same θ to be compared with."""
    keys = posterior[["fit", "site", "kind"]].drop_duplicates()
    guided = keys["kind"] == "variational"
    pairs = keys[guided].merge(keys.loc[~guided, ["fit", "site"]].drop_duplicates(), on=["fit", "site"])
    return [(str(fit), str(site)) for fit, site in zip(pairs["fit"], pairs["site"], strict=True)]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.") or "unnamed"
