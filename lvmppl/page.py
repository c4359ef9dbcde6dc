"""What the pages share: one self-contained file of HTML, its pictures, and the table of the fits.

Nothing is fetched when a page is opened: pictures are data URIs, the style is inline, and there are no scripts.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from lvmppl.tables import nats, with_kinds


@dataclass(frozen=True)
class Cell:
    """What a table shows in one place: the text, and the kind of number in small letters."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture of the page; `uri` holds the PNG itself, `width` is in CSS pixels."""

    title: str
    caption: str
    uri: str
    width: int


@dataclass(frozen=True)
class FitTable:
    """A row a fit; the first `texts` columns are words, the last of them the status."""

    header: tuple[str, ...]
    texts: int
    rows: list[list[Cell]]


def write_page(path: Path, **content: Any) -> Path:
    """Fills the template that is called as the file is, and returns the path."""
    pages = Environment(
        loader=PackageLoader("lvmppl", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path.write_text(pages.get_template(path.name).render(content), encoding="utf-8")
    return path


KINDS = {
    "exact": "exact",
    "quadrature": "quadrature",
    "lower_bound": "lower bound",
    "estimate": "estimate",
    "none": "",
}


def kind_words(kind: str) -> str:
    """A kind of number as people read it."""
    return KINDS.get(kind, kind.replace("_", " "))


SUMMARY = ("fit", "algorithm", "guide", "status", "steps", "time", "log evidence", "ELBO", "gap")
TEST_COLUMNS = {"test_log_evidence": "test log evidence", "test_elbo": "test ELBO"}


def fit_table(summary: pd.DataFrame, leading: Sequence[str] = ()) -> FitTable:
    """The summary rounded for reading, below columns of `leading` words; of each bound or estimate it says that it is."""
    rows = [[*(Cell(row[c]) for c in leading), *_fit_row(row)] for _, row in with_kinds(summary).iterrows()]
    return FitTable((*leading, *SUMMARY), len(leading) + 4, rows)


def heldout_table(summary: pd.DataFrame, leading: Sequence[str] = ()) -> list[list[str]]:
    """The scores of the test rows, the header first; empty where no rows were held out."""
    shown = {column: name for column, name in TEST_COLUMNS.items() if summary[column].notna().any()}
    names = [*leading, "fit"]
    rows = [
        [*(row[c] for c in names), *(nats(row[column]) for column in shown)] for _, row in summary.iterrows()
    ]
    return [[*names, *shown.values()], *rows] if shown else []


def _fit_row(row: pd.Series) -> list[Cell]:
    bounded = "bound, estimated" if row["elbo_kind"] == "estimate" else "lower bound"
    return [
        Cell(row["fit"]),
        Cell(row["algorithm"]),
        Cell(row["guide"] or "–"),
        Cell(row["status"].replace("_", " ")),
        Cell("–" if pd.isna(row["steps"]) else f"{row['steps']:,}"),
        Cell(_seconds(row["seconds"])),
        _number(row["log_evidence"], kind_words(row["log_evidence_kind"]), row["log_evidence_error"]),
        _number(row["elbo"], bounded, row["elbo_error"]),
        _number(row["gap"], kind_words(row["gap_kind"]), row["elbo_error"]),
    ]


def _number(value: float, note: str = "", error: float = math.nan) -> Cell:
    return Cell(nats(value, error), "" if math.isnan(value) else note)


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "–"
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def figure(path: Path) -> Figure:
    """The picture in a PNG whose metadata hold title and caption."""
    with Image.open(path) as image:
        title, caption = image.info.get("Title", path.stem), image.info.get("Description", "")
        # letters the size of the page's
        width = image.width * 100 // round(image.info.get("dpi", (100, 100))[0])
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
    return Figure(str(title), str(caption), uri, width)
