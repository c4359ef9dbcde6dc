"""report.html: one self-contained page that a stranger can read, made from the tables and pictures on disk."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lvmppl.align import KINDS, aligned_posterior, discrete_sites, reference_fit, responsibilities
from lvmppl.page import figure, fit_table, heldout_table, kind_words, write_page
from lvmppl.tables import nats, worst_data
from lvmppl.top_words import top_words

WORST = 5


def write_report(
    directory: Path,
    tables: Mapping[str, pd.DataFrame],
    plots: Sequence[Path],
    environment: Mapping[str, Any],
    experiment_text: str,
    vocabulary: Sequence[str] = (),
) -> Path:
    """Writes `report.html` into `directory` and returns its path.

    `tables` are the five of a run, `plots` PNGs whose metadata hold title and caption (those of
    `plots.draw_all` do), `environment` what the run recorded of its machine and packages, `experiment_text`
    the resolved YAML, `vocabulary` the words that the data's numbers stand for.
    """
    summary, gaps = tables["summary"], tables["gaps"]
    return write_page(
        directory / "report.html",
        title=_entry(experiment_text, "name") or directory.resolve().name,
        description=describe(experiment_text, tables),
        findings=findings(summary, gaps),
        fits=fit_table(summary),
        heldout=heldout_table(summary),
        messages=[(row["fit"], row["message"]) for _, row in summary.iterrows() if row["message"]],
        figures=[figure(path) for path in plots],
        worst=worst_tables(tables),
        topics=top_words(tables, vocabulary),
        experiment=experiment_text.strip(),
        environment=[(str(key), _plain(value)) for key, value in environment.items()],
    )


# ------------------------------------------------------------------------------------------- what was run


def _entry(text: str, key: str, inner: str = "") -> str:
    """The value of a top-level key of the YAML text, or of a key inside it; empty where there is none.

    Enough for a title and a sentence: to read a YAML in earnest is not a page's business.
    """
    section = re.search(rf"^{key}:[ \t]*(.*(?:\n(?:[ \t].*)?)*)", text, re.MULTILINE)
    if section is None:
        return ""
    pattern = rf"(?:^|[\s{{,]){inner}:[ \t]*" if inner else "^"
    value = re.search(pattern + r"""("[^"\n]*"|'[^'\n]*'|[^\s,}#]+)""", section[1])
    return value[1].strip("\"'") if value else ""


def describe(experiment_text: str, tables: Mapping[str, pd.DataFrame]) -> str:
    """One sentence: the number of fits, the model, the data, seed and dtype, as far as they are known."""
    model, source = _entry(experiment_text, "model", "use"), _entry(experiment_text, "data", "source")
    count = tables["posterior"]["datum"].nunique() or tables["gaps"]["datum"].nunique()
    fits = len(tables["summary"])
    said = f"{fits} fit{'s' if fits != 1 else ''} of {f'the model {model}' if model else 'one model'}"
    said += f" to the data {source}" if source else ""
    said += f" ({count:,} row{'s' if count != 1 else ''})" if count else ""
    settings = {key: _entry(experiment_text, key) for key in ("seed", "dtype")}
    return "; ".join([said, *(f"{key} {value}" for key, value in settings.items() if value)]) + "."


def findings(summary: pd.DataFrame, gaps: pd.DataFrame) -> list[str]:
    """The results in words: the best fit, how close each guide comes, and what did not finish."""
    said = []
    best = reference_fit(summary)
    rows = summary[summary["fit"] == best]
    if len(rows) and math.isfinite(rows["log_evidence"].iloc[0]):
        kind = kind_words(rows["log_evidence_kind"].iloc[0])
        value = nats(rows["log_evidence"].iloc[0], rows["log_evidence_error"].iloc[0])
        said.append(f"The highest log evidence, {value} nats ({kind}), is that of the fit ‘{best}’.")
    for _, row in summary[summary["gap"].notna()].iterrows():
        fit, worst = row["fit"], worst_data(gaps, row["fit"], 1)
        text = f"The ELBO of ‘{fit}’ is {nats(row['gap'])} nats below the log evidence at the same parameters"
        several = gaps.loc[gaps["fit"] == fit, "datum"].nunique() > 1
        if len(worst) and several and row["gap"] > 0 and worst["gap"].iloc[0] > 1e-9:
            gap, datum = worst["gap"].iloc[0], worst["datum"].iloc[0]
            share = _share(gap, row["gap"])
            text += f"; {nats(gap)} of them{share and f' ({share})'} belong to the worst datum, {datum}"
        said.append(text + ".")
    for status, words in STATUS_WORDS.items():
        fits = summary.loc[summary["status"] == status, "fit"].tolist()
        if fits:
            said.append(f"{words}: {', '.join(fits)}.")
    return said


def _share(part: float, whole: float) -> str:
    """In percent; empty where there is none to speak of."""
    return f"{100 * part / whole:.0f} %" if 0 < whole < math.inf else ""


STATUS_WORDS = {
    "max_steps": "Stopped at the allowed number of steps, before any criterion of convergence was met",
    "diverged": "Diverged",
    "failed": "Failed",
}


# --------------------------------------------------------------------------------------------- worst data


def worst_tables(tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Per fit with gaps (fit, header, rows): its five worst data, and how each posterior classes them."""
    gaps = tables["gaps"]
    fits = [str(fit) for fit in gaps["fit"].unique()]
    sites = discrete_sites(aligned_posterior(tables)[0]) if fits else {}
    result = []
    for fit in fits:
        worst = worst_data(gaps, fit, WORST)
        total = gaps.loc[gaps["fit"] == fit, "gap"].sum()
        classed = _classed(sites, fit)
        header = ["datum", "log evidence", "ELBO", "gap", "share of the total gap", *classed]
        rows = []
        for _, row in worst.iterrows():
            share = _share(row["gap"], total) or "–"
            cells = [str(row["datum"]), *(nats(row[c]) for c in ("log_evidence", "elbo", "gap")), share]
            rows.append(cells + [said.get(int(row["datum"]), "–") for said in classed.values()])
        if rows:
            result.append((fit, header, rows))
    return result


def _classed(sites: Mapping[tuple[str, str, str], pd.DataFrame], fit: str) -> dict[str, dict[int, str]]:
    """Per kind and site of a fit with one state a datum: datum → the most probable component and its
    probability.
    """
    result: dict[str, dict[int, str]] = {}
    mine = [key for key in sites if key[0] == fit and (sites[key]["position"] == "").all()]
    mine = [key for key in mine if sites[key]["datum"].notna().all()]
    several = len({site for _, _, site in mine}) > 1
    for _, kind, site in sorted(mine, key=lambda key: (key[2], KINDS.index(key[1]))):
        table = responsibilities(sites[fit, kind, site], "label").droplevel("position").dropna(how="all")
        said = zip(table.index, table.idxmax(axis=1), table.max(axis=1), strict=True)
        name = f"{kind}{f' {site}' if several else ''}: component"
        result[name] = {int(datum): f"{label} ({100 * p:.1f} %)" for datum, label, p in said}
    return result


def _plain(value: Any) -> str:
    """A value of the YAML or the environment as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
