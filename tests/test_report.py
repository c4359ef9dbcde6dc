from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from iris_tables import iris_tables, summary_row

from lvmppl import plots, report, tables

Frames = dict[str, pd.DataFrame]

YAML = "\n".join(
    [
        "name: 'iris <mixture>'",
        "seed: 7",
        "data: {columns: {x: [a, b]}, source: iris}",
        "model:",
        "  args: {num_components: 3}   # a comment",
        "  use: gaussian_mixture",
        "fits:",
        "  em: {algorithm: em}",
    ]
)

VOID = {"meta", "img", "link", "br", "hr", "input", "wbr"}


class Page(HTMLParser):
    """The parts of a page: tables as rows of cell texts, texts by tag, sources, and the tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.sources: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]
        self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += (" " if "small" in self.open else "") + data


@pytest.fixture(scope="module")
def frames() -> Frames:
    return iris_tables()


def written(
    directory: Path, frames: Frames, paths: list[Path] | None = None, text: str = YAML
) -> tuple[str, Page]:
    environment = {"python": "3.1", "packages": {"torch": "9<8"}}
    path = report.write_report(directory, frames, paths or [], environment, text)
    assert path == directory / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    return html, page


def test_summary_numbers_carry_their_kind(frames: Frames, tmp_path: Path) -> None:
    _, page = written(tmp_path, frames)
    header, *rows = page.tables[0]
    assert header == ["fit", "algorithm", "guide", "status", "steps", "time", "log evidence", "ELBO", "gap"]
    local = dict(zip(header, next(row for row in rows if row[0] == "local"), strict=True))
    row = frames["summary"].set_index("fit").loc["local"]
    assert local["log evidence"] == f"{row['log_evidence']:.4f} exact".replace("-", "−")
    assert local["ELBO"] == f"{row['elbo']:.4f} lower bound".replace("-", "−")
    assert local["gap"] == f"{row['gap']:.4f} exact"
    em = dict(zip(header, next(row for row in rows if row[0] == "em"), strict=True))
    assert em["ELBO"] == em["gap"] == "–"


def test_every_entry_of_the_summary_carries_its_columns_name_for_narrow_screens(
    frames: Frames, tmp_path: Path
) -> None:
    written(tmp_path, frames)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    table = page[page.index('id="summary"') :]
    table = table[: table.index("</table>")]
    header = re.findall(r"<th[^>]*>([^<]*)</th>", table)
    assert {"fit", "status", "log evidence", "ELBO", "gap"} <= set(header)
    rows = re.findall(r"<tr><td.*?</tr>", table)
    assert len(rows) == len(frames["summary"])
    for row in rows:
        assert re.findall(r'<td data-name="([^"]*)"', row) == header
    assert "td::before { content: attr(data-name)" in page


def test_estimates_and_bounds_are_named(tmp_path: Path) -> None:
    row = {**summary_row("local", -100.0, -101.5, 9), "log_evidence_kind": "lower_bound"}
    row["log_evidence_error"] = 0.25
    noisy = {**summary_row("em", -100.0, -101.5, 9), "elbo_error": 0.31, "test_elbo": -7.0}
    failed = {**summary_row("amortized", np.nan, np.nan, 9), "log_evidence_kind": "none", "status": "failed"}
    summary = tables.validate("summary", pd.DataFrame([row, noisy, failed]))
    _, page = written(tmp_path, {**{n: tables.empty(n) for n in tables.SCHEMAS}, "summary": summary})
    cells = page.tables[0][1:]
    assert cells[0][6:] == ["−100.00 ± 0.25 lower bound", "−101.5000 lower bound", "1.5000 lower bound"]
    noisy_elbo, noisy_gap = "−101.50 ± 0.31 bound, estimated", "1.50 ± 0.31 estimate"
    assert cells[1][6:] == ["−100.0000 exact", noisy_elbo, noisy_gap]
    assert cells[2][6:] == ["–"] * 3
    assert page.tables[1] == [["fit", "test ELBO"], ["local", "–"], ["em", "−7.0000"], ["amortized", "–"]]
    assert "Failed: amortized." in " ".join(page.texts["li"])


def test_bound_of_minus_infinity_is_said_without_a_share(tmp_path: Path) -> None:
    row = {**summary_row("em", -100.0, -np.inf, 9), "status": "diverged", "gap": np.inf}
    gaps = pd.DataFrame(
        {
            "fit": "em",
            "datum": [0, 1],
            "log_evidence": [-60.0, -40.0],
            "elbo": [-np.inf, -41.0],
            "gap": [np.inf, 1.0],
        }
    )
    frames = {n: tables.empty(n) for n in tables.SCHEMAS}
    frames["summary"] = tables.validate("summary", pd.DataFrame([row]))
    frames["gaps"] = tables.validate("gaps", gaps)
    _, page = written(tmp_path, frames)
    assert page.texts["li"][1] == (
        "The ELBO of ‘em’ is ∞ nats below the log evidence at the same parameters; ∞ of them belong to the worst datum, 0."
    )
    assert [line[4] for line in page.tables[1][1:]] == ["–", "–"]


def test_one_datum_is_not_called_the_worst(tmp_path: Path) -> None:
    summary = tables.validate("summary", pd.DataFrame([summary_row("em", -100.0, -101.5, 9)]))
    gaps = pd.DataFrame(
        {"fit": ["em"], "datum": [0], "log_evidence": [-100.0], "elbo": [-101.5], "gap": [1.5]}
    )
    frames = {**{n: tables.empty(n) for n in tables.SCHEMAS}, "summary": summary}
    _, page = written(tmp_path, {**frames, "gaps": tables.validate("gaps", gaps)})
    assert (
        page.texts["li"][1]
        == "The ELBO of ‘em’ is 1.5000 nats below the log evidence at the same parameters."
    )
    assert "(1 row);" in page.texts["p"][0]


def test_findings_say_best_fit_gaps_and_what_stopped(frames: Frames, tmp_path: Path) -> None:
    _, page = written(tmp_path, frames)
    said = page.texts["li"]
    gaps = frames["gaps"][frames["gaps"]["fit"] == "amortized"]
    worst = gaps.loc[gaps["gap"].idxmax()]
    assert said[0] == "The highest log evidence, −180.1855 nats (exact), is that of the fit ‘em’."
    assert f"‘amortized’ is {gaps['gap'].sum():.4f} nats below" in said[2]
    assert said[2].endswith(f"belong to the worst datum, {worst['datum']}.")
    assert f"({100 * worst['gap'] / gaps['gap'].sum():.0f} %)" in said[2]
    assert said[3].endswith("criterion of convergence was met: amortized.")


def test_worst_data_equal_gaps_and_posterior(frames: Frames, tmp_path: Path) -> None:
    _, page = written(tmp_path, frames)
    assert page.texts["h3"][-2:] == ["local", "amortized"]
    header, *rows = page.tables[2]
    gaps = frames["gaps"][frames["gaps"]["fit"] == "amortized"].nlargest(5, "gap")
    assert [row[0] for row in rows] == [str(n) for n in gaps["datum"]]
    posterior = frames["posterior"]
    for kind in ("exact", "variational"):
        column = header.index(f"{kind}: component")
        mine = posterior[(posterior["fit"] == "amortized") & (posterior["kind"] == kind)]
        top = mine.groupby("datum")["probability"].max()
        said = [re.fullmatch(r"(\d) \(([\d.]+) %\)", row[column]) for row in rows]
        assert [match and match[2] for match in said] == [f"{100 * top[n]:.1f}" for n in gaps["datum"]]
        # by the reference's numbers: setosa 0, versicolor 1, virginica 2
        assert {match[1] for match in said if match} == {"1", "2"}


def test_page_holds_its_pictures_and_captions(frames: Frames, tmp_path: Path) -> None:
    picture = plots.gap_curves(frames["gaps"])
    path = picture.save(tmp_path / "gaps.png")
    html, page = written(tmp_path, frames, [path])
    pictures = [source for source in page.sources if source.startswith("data:")]
    assert len(pictures) == 1
    assert base64.b64decode(pictures[0].removeprefix("data:image/png;base64,")) == path.read_bytes()
    assert page.texts["figcaption"] == [picture.caption]
    assert f'alt="{picture.heading}"' in html and 'width="800"' in html
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert "<script" not in html and "@import" not in html and "url(" not in html


def test_text_of_users_is_escaped(frames: Frames, tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    summary = frames["summary"].copy()
    summary.loc[0, "message"] = evil
    html, page = written(tmp_path, {**frames, "summary": summary}, text=YAML + f"\n# {evil}")
    assert "<script" not in html and "9&lt;8" in html
    assert page.texts["h1"] == ["iris <mixture>"] and evil in page.texts["pre"][0]
    assert evil in page.texts["dd"]


def test_description_tells_what_was_run(frames: Frames, tmp_path: Path) -> None:
    said = "4 fits of the model gaussian_mixture to the data iris (150 rows); seed 7."
    assert report.describe(YAML, frames) == said
    nothing = {name: tables.empty(name) for name in tables.SCHEMAS}
    assert report.describe("no: yaml: at all", nothing) == "0 fits of one model."
    _, page = written(tmp_path, nothing, text="")
    assert page.texts["h1"] == [tmp_path.name] and page.tables == []


def test_report_written_twice_equals_bytes(frames: Frames, tmp_path: Path) -> None:
    first = written(tmp_path, frames)[0]
    assert written(tmp_path, frames)[0] == first
