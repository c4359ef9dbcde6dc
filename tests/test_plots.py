from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from iris_tables import COLUMNS, history_rows, iris_data, iris_tables, posterior_rows, summary_row
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.image import AxesImage
from matplotlib.patches import Ellipse
from matplotlib.text import Text
from PIL import Image

from lvmppl import align, canvas, plots, tables

Frames = dict[str, pd.DataFrame]


@pytest.fixture(scope="module")
def frames() -> Frames:
    return iris_tables()


@pytest.fixture(scope="module")
def aligned(frames: Frames) -> pd.DataFrame:
    return align.aligned_posterior(frames)[0]


SOLID = ("-", "solid")


def panel(picture: plots.Picture, start: str) -> Axes:
    return next(axes for axes in picture.axes if axes.get_title(loc="left").startswith(start))


def points(axes: Axes, label: str) -> np.ndarray:
    found = [c for c in axes.collections if isinstance(c, PathCollection) and c.get_label() == label]
    return np.asarray(found[0].get_offsets())


def labels(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def matrix(frames: Frames, fit: str, kind: str) -> np.ndarray:
    """[N, K] of one fit and kind in the fit's own numbering, by pandas alone."""
    rows = frames["posterior"]
    rows = rows[(rows["fit"] == fit) & (rows["kind"] == kind)]
    return rows.pivot(index="datum", columns="state", values="probability").to_numpy(dtype=float)


# ------------------------------------------------------------------------------- objective


def test_best_restart_is_bold_and_equals_history(frames: Frames) -> None:
    picture = plots.objective_curves(frames["history"], frames["summary"])
    axes = panel(picture, "em")
    history = frames["history"][frames["history"]["fit"] == "em"]
    best = max((rows for _, rows in history.groupby("restart")), key=lambda rows: rows["objective"].max())
    bold = max(axes.lines, key=lambda line: line.get_linewidth())
    np.testing.assert_array_equal(bold.get_ydata(), best["objective"].to_numpy())
    np.testing.assert_array_equal(bold.get_xdata(), best["step"].to_numpy(dtype=float))
    faint = [
        line for line in axes.lines if len(np.asarray(line.get_ydata())) == len(best) and line is not bold
    ]
    assert len(faint) == 3 and all(line.get_linewidth() < 1 for line in faint)


def test_panels_of_many_fits_have_room(frames: Frames) -> None:
    """Five fits with guides, which have the most to say below each panel."""
    history = frames["history"][frames["history"]["fit"] == "amortized"]
    row = frames["summary"][frames["summary"]["fit"] == "amortized"]
    names = [f"amortized {i}" for i in range(5)]
    picture = plots.objective_curves(
        pd.concat([history.assign(fit=name) for name in names]),
        pd.concat([row.assign(fit=name) for name in names]),
    )
    picture.draw_without_rendering()
    sizes = [axes.get_position() for axes in picture.axes if axes.lines]
    assert (
        len(sizes) == 5
        and min(size.width for size in sizes) > 0.3
        and min(size.height for size in sizes) > 0.1
    )


def test_evidence_line_and_gap_equal_summary(frames: Frames) -> None:
    picture = plots.objective_curves(frames["history"], frames["summary"])
    for fit, row in frames["summary"].set_index("fit").iterrows():
        axes = panel(picture, str(fit))
        levels = [line.get_ydata() for line in axes.lines if len(np.asarray(line.get_ydata())) == 2]
        assert levels == [[row["log_evidence"]] * 2]
        said = [text for text in labels(axes) if text.startswith("gap")]
        assert said == ([f"gap, at the end {row['gap']:.4f}"] if fit in ("local", "amortized") else [])
        assert axes.get_ylim()[0] < row["log_evidence"] < axes.get_ylim()[1]
        assert axes.get_ylabel().endswith("(nats)")


def test_estimates_are_a_running_mean_in_a_band_of_half_of_them_up_to_the_elbo_of_all_rows(
    frames: Frames,
) -> None:
    picture = plots.objective_curves(frames["history"], frames["summary"])
    history = frames["history"]
    raw = history.loc[history["fit"] == "amortized", "objective"].to_numpy()
    axes = panel(picture, "amortized")
    bold = next(line for line in axes.lines if str(line.get_label()).startswith("mean over"))
    window = int(str(bold.get_label()).split()[2])
    weights = np.sin(np.pi * np.arange(1, window + 1) / (window + 1)) ** 2
    steps, mean = np.asarray(bold.get_xdata()), np.asarray(bold.get_ydata())
    for step in (window, 1000):
        around = raw[step - window // 2 :][:window]
        expected = (weights * around).sum() / weights.sum()
        assert mean[steps == step].item() == pytest.approx(expected, rel=1e-3)
    elbo = frames["summary"].set_index("fit").loc["amortized", "elbo"]
    assert (steps[-1], mean[-1]) == (len(raw) - 1, elbo)
    assert not any(len(np.asarray(line.get_ydata())) == len(raw) for line in axes.lines)
    band = next(c for c in axes.collections if c.get_label() == "half of the steps")
    corners = np.asarray(band.get_paths()[0].vertices)
    at = np.sort(np.unique(corners[corners[:, 0] == 1000, 1]))
    np.testing.assert_allclose(at, np.quantile(raw[1000 - window : 1000 + window], [0.25, 0.75]), rtol=1e-12)


def test_estimates_of_equal_batches_make_no_ripple_in_the_mean() -> None:
    """Three batches an epoch that differ by hundreds of nats and always sum to the same: the mean is flat."""
    raw = -200.0 + np.tile([300.0, -250.0, -50.0], 200)
    history = tables.validate("history", history_rows("local", 0, raw, "elbo"))
    summary = tables.validate("summary", pd.DataFrame([summary_row("local", -190.0, -200.0, 599)]))
    picture = plots.objective_curves(history, summary)
    bold = next(line for line in picture.axes[0].lines if str(line.get_label()).startswith("mean over"))
    np.testing.assert_allclose(np.asarray(bold.get_ydata()), -200.0, rtol=0, atol=0.5)
    low, high = picture.axes[0].get_ylim()
    assert -202 < low < -200 and -190 < high < -188


def test_scale_leaves_out_a_terrible_start_and_is_shared() -> None:
    climb = -100 - 50 * np.exp(-np.arange(40) / 5)
    history = pd.concat(
        [history_rows("em", 0, [-1e9, *climb], "log_evidence"), history_rows("local", 0, climb - 1, "elbo")]
    )
    summary = pd.DataFrame([summary_row("em", -100.0, np.nan, 40), summary_row("local", -100.0, -101.0, 39)])
    picture = plots.objective_curves(tables.validate("history", history), tables.validate("summary", summary))
    low, high = panel(picture, "em").get_ylim()
    assert -180 < low < -105 and -100 < high < -80
    assert panel(picture, "local").get_ylim() == (low, high)
    assert "starts at −1,000,000,000 (below)" in labels(panel(picture, "em"))


def test_scales_differ_where_fits_end_far_apart() -> None:
    climb = -50 * np.exp(-np.arange(40) / 5)
    history = pd.concat(
        [history_rows("em", 0, climb - 100, "log_evidence"), history_rows("local", 0, climb - 9e4, "elbo")]
    )
    summary = pd.DataFrame([summary_row("em", -100.0, np.nan, 40), summary_row("local", -9e4, -9e4, 39)])
    picture = plots.objective_curves(tables.validate("history", history), tables.validate("summary", summary))
    heights = [np.ptp(axes.get_ylim()) for axes in picture.axes]
    assert max(heights) < 200


# ------------------------------------------------------------------------ responsibilities


def test_agreement_points_equal_probabilities_by_aligned_component(
    frames: Frames, aligned: pd.DataFrame
) -> None:
    picture = plots.responsibility_comparison(aligned, frames["gaps"], "amortized", "z")
    assert picture.heading == "Exact against variational responsibilities: fit 'amortized'"
    reference = matrix(frames, "em", "exact")
    exact, variational = (matrix(frames, "amortized", kind) for kind in ("exact", "variational"))
    for label in range(3):
        state = int(np.argmin(np.abs(exact - reference[:, [label]]).sum(0)))  # of this fit's own numbering
        drawn = points(picture.axes[0], f"component {label}")
        np.testing.assert_array_equal(drawn, np.column_stack([exact[:, state], variational[:, state]]))


def test_worst_data_carry_their_numbers(frames: Frames, aligned: pd.DataFrame) -> None:
    picture = plots.responsibility_comparison(aligned, frames["gaps"], "amortized", "z")
    exact, variational = (matrix(frames, "amortized", kind) for kind in ("exact", "variational"))
    worst = np.argsort(-np.abs(exact - variational).sum(1), kind="stable")[:5].tolist()
    assert [text.get_text() for text in picture.axes[0].texts] == [str(n) for n in worst]
    state = np.abs(exact - variational)[worst].argmax(1)
    expected = np.column_stack([exact[worst, state], variational[worst, state]])
    np.testing.assert_array_equal(points(picture.axes[0], "differ most"), expected)


def test_names_of_worst_data_overlap_nothing(frames: Frames, aligned: pd.DataFrame) -> None:
    for fit in ("local", "amortized"):
        picture = plots.responsibility_comparison(aligned, frames["gaps"], fit, "z")
        renderer = FigureCanvasAgg(picture).get_renderer()
        picture.draw(renderer)
        for axes in picture.axes[:1] + picture.axes[2:3]:
            boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]  # without the hair line
            hits = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.padded(-1).overlaps(b)]
            assert len(boxes) == 5 and not hits


def test_heat_maps_show_rows_sorted_by_component_and_certainty(frames: Frames, aligned: pd.DataFrame) -> None:
    picture = plots.responsibility_comparison(aligned, frames["gaps"], "amortized", "z")
    images = [axes.images[0] for axes in picture.axes if any(isinstance(i, AxesImage) for i in axes.images)]
    exact, variational = (np.asarray(image.get_array()) for image in images[:2])
    component, certainty = exact.argmax(1), exact.max(1)
    assert exact.shape == (150, 3) and (np.diff(component) >= 0).all()
    assert all((np.diff(certainty[component == k]) <= 0).all() for k in range(3))
    reference = matrix(frames, "em", "exact")
    p, q = (matrix(frames, "amortized", kind) for kind in ("exact", "variational"))
    order = [int(np.argmin(np.abs(p - reference[:, [k]]).sum(0))) for k in range(3)]
    both = np.hstack([p[:, order], q[:, order]])  # each row of the one stands beside its row of the other
    drawn = np.hstack([exact, variational])
    np.testing.assert_array_equal(drawn[np.lexsort(drawn.T)], both[np.lexsort(both.T)])


def test_many_points_become_counts_of_all() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(3), size=2000), rng.dirichlet(np.ones(3), size=2000)
    frame = pd.concat(
        [posterior_rows("a", "exact", p), posterior_rows("a", "variational", q)], ignore_index=True
    )
    frame = tables.validate("posterior", frame)
    frame["label"] = frame["state"]
    picture = plots.responsibility_comparison(frame, tables.empty("gaps"), "a", "z")
    mesh = next(c for c in picture.axes[0].collections if not isinstance(c, PathCollection))
    counts = np.ma.filled(mesh.get_array(), 0)
    assert counts.sum() == 6000
    assert (
        counts[45:, :5].sum() == ((p < 0.1) & (q >= 0.9)).sum()
    )  # the guide gives too much: above the diagonal


def test_heat_maps_of_one_sequence_keep_its_order() -> None:
    rng, steps = np.random.default_rng(4), 12
    p, q = rng.dirichlet(np.ones(3), size=steps), rng.dirichlet(np.ones(3), size=steps)
    order = rng.permutation(steps)  # of the rows in the table, which need not be that of the positions
    frames = [posterior_rows("a", kind, table[order]) for kind, table in (("exact", p), ("variational", q))]
    for frame in frames:
        frame["position"] = [str(order[datum]) for datum in frame["datum"]]
        frame["datum"] = 0
    frame = tables.validate("posterior", pd.concat(frames, ignore_index=True))
    frame["label"] = frame["state"]
    picture = plots.responsibility_comparison(frame, tables.empty("gaps"), "a", "z")
    images = [axes.images[0] for axes in picture.axes if any(isinstance(i, AxesImage) for i in axes.images)]
    np.testing.assert_array_equal(np.asarray(images[0].get_array()), p)
    np.testing.assert_array_equal(np.asarray(images[1].get_array()), q)


def test_sequences_are_rows_of_datum_and_position() -> None:
    rng = np.random.default_rng(1)
    rows = []
    for position in ("0", "1", "10"):
        p, q = rng.dirichlet(np.ones(2), size=4), rng.dirichlet(np.ones(2), size=4)
        rows += [posterior_rows("a", "exact", p), posterior_rows("a", "variational", q)]
        rows[-2]["position"] = rows[-1]["position"] = position
    frame = tables.validate("posterior", pd.concat(rows))
    frame["label"] = frame["state"]
    picture = plots.responsibility_comparison(frame, tables.empty("gaps"), "a", "z")
    assert points(picture.axes[0], "component 1").shape == (12, 2)
    assert all("[" in text.get_text() for text in picture.axes[0].texts)
    assert "position 12 of datum 7" in picture.caption


# ------------------------------------------------------------------------------ components


def test_ellipse_equals_weighted_mean_and_covariance() -> None:
    rng = np.random.default_rng(2)
    angle = 0.5
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    x = rng.normal(size=(400, 2)) * [3.0, 1.0] @ rotation.T + [5.0, -2.0]
    probs = rng.dirichlet([1.0, 2.0], size=400)
    frame = tables.validate("posterior", posterior_rows("a", "exact", probs))
    frame["label"] = frame["state"]
    picture = plots.component_scatter(frame, pd.DataFrame(x, columns=["u", "v"]), "z")
    assert picture is not None
    ellipses = [patch for patch in picture.axes[0].patches if isinstance(patch, Ellipse)]
    for k, ellipse in enumerate(ellipses):
        covariance = np.cov(x.T, aweights=probs[:, k], ddof=0)
        np.testing.assert_allclose(
            ellipse.get_center(), np.average(x, axis=0, weights=probs[:, k]), rtol=1e-12
        )
        # every point of the contour is two standard deviations away: (y − m)ᵀ Σ⁻¹ (y − m) = 4
        turn = np.radians(ellipse.angle)
        axes = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        contour = axes @ (np.diag([ellipse.width, ellipse.height]) / 2) @ [[1, 0, 0.6], [0, 1, 0.8]]
        np.testing.assert_allclose((contour * np.linalg.solve(covariance, contour)).sum(0), 4.0, rtol=1e-9)
        assert picture.axes[0].texts[k].get_text() == str(k)


def test_components_have_one_colour_in_all_fits(frames: Frames, aligned: pd.DataFrame) -> None:
    picture = plots.component_scatter(aligned, iris_data(), "z")
    assert picture is not None
    panels = [axes for axes in picture.axes if axes.patches]
    titles = [axes.get_title(loc="left") for axes in panels]  # in the order of the file, none blank
    kinds = {"local": "variational", "amortized": "variational"}
    assert titles == [f"{fit}: {kinds.get(fit, 'exact')}" for fit in frames["summary"]["fit"]]
    assert len(panels) == len(picture.axes)
    for axes in panels:
        ellipses = [e for e in axes.patches if isinstance(e, Ellipse) and e.get_linestyle() in SOLID]
        dashed = [e for e in axes.patches if isinstance(e, Ellipse) and e.get_linestyle() not in SOLID]
        assert len(dashed) == (3 if "variational" in axes.get_title(loc="left") else 0)
        labelled = [label.get_text() for label in axes.get_xticklabels() if label.get_visible()]
        assert axes.xaxis.get_tick_params()["labelbottom"] and labelled
        heights = [float(e.get_center()[1]) for e in ellipses]
        assert [to_rgb(e.get_edgecolor()) for e in ellipses] == [to_rgb(c) for c in canvas.OKABE_ITO[:3]]
        np.testing.assert_allclose(heights, [0.246, 1.30, 2.02], rtol=0, atol=0.05)
    limits = {(axes.get_xlim(), axes.get_ylim()) for axes in panels}
    assert len(limits) == 1


def test_columns_of_largest_spread_between_components_are_drawn(aligned: pd.DataFrame) -> None:
    data = iris_data() * [1.0, 1.0, 0.001, 1.0]  # units must not matter
    picture = plots.component_scatter(aligned, data.assign(name="a", constant=1.0), "z")
    assert picture is not None
    named = [(axes.get_xlabel(), axes.get_ylabel()) for axes in picture.axes]
    assert ("", COLUMNS[3]) in named and (COLUMNS[2], "") in named
    assert "Of the 4 columns" in picture.caption


def test_many_columns_become_principal_components(aligned: pd.DataFrame) -> None:
    rng = np.random.default_rng(3)
    data = pd.DataFrame(rng.normal(size=(150, 8)) * np.arange(1, 9), columns=list("abcdefgh"))
    data["b"] = 7.0 * data["a"]
    picture = plots.component_scatter(aligned, data, "z")
    assert picture is not None and "principal components of the 8 standardised columns" in picture.caption
    z = (data - data.mean()) / data.std(ddof=0)
    variances = np.linalg.eigvalsh(z.T @ z / 150)[::-1]
    drawn = np.asarray(picture.axes[0].collections[0].get_offsets())
    np.testing.assert_allclose(drawn.var(0), variances[:2], rtol=1e-9)
    assert f"1 ({100 * variances[0] / 8:.0f} %)" in picture.axes[-1].get_xlabel()


def test_rings_grow_with_the_total_variation_from_the_exact_posterior() -> None:
    p = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    q = np.array([[0.8, 0.2], [0.6, 0.4], [0.205, 0.795]])
    frame = pd.concat([posterior_rows("a", "exact", p), posterior_rows("a", "variational", q)])
    frame = tables.validate("posterior", frame)
    frame["label"] = frame["state"]
    data = pd.DataFrame({"u": [0.0, 1.0, 2.0], "v": [3.0, 5.0, 4.0]})
    picture = plots.component_scatter(frame, data, "z")
    assert picture is not None
    (axes,) = picture.axes
    assert axes.get_title(loc="left") == "a: variational"
    rings = axes.collections[1]
    assert np.asarray(rings.get_offsets()).tolist() == [[0.0, 3.0], [1.0, 5.0]]  # 0.005 is not worth a ring
    small, large = rings.get_sizes()
    assert large > small
    assert "differs from exact" in [text.get_text() for text in picture.legends[0].get_texts()]


def test_colours_are_mixed_by_probability() -> None:
    colours = canvas.component_colours(3)
    probs = np.array([[0.0, 1.0, 0.0], [0.25, 0.0, 0.75], [np.nan, np.nan, np.nan]])
    mixed = canvas.mixed_colours(probs, colours)
    np.testing.assert_allclose(mixed[0], colours[1], rtol=1e-15)
    np.testing.assert_allclose(mixed[1], 0.25 * colours[0] + 0.75 * colours[2], rtol=1e-15)
    assert np.ptp(mixed[2]) == 0
    assert len(np.unique(canvas.component_colours(20), axis=0)) == 20


# ------------------------------------------------------------------------ gaps and moments


def test_gap_curve_equals_empirical_distribution(frames: Frames) -> None:
    picture = plots.gap_curves(frames["gaps"])
    curve = picture.axes[0].lines[0]
    gap = frames["gaps"].loc[frames["gaps"]["fit"] == "local", "gap"].to_numpy()
    assert curve.get_drawstyle() == "steps-post"  # the share jumps at a datum's gap, not before
    x, y = np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())
    for level in (1e-8, 1e-5, 5e-5):
        assert y[x <= level].max() == pytest.approx((gap <= level).mean(), abs=1e-12)
    zeros = int((gap < 1e-9).sum())
    assert zeros > 0 and (x[1 : zeros + 1] == 1e-9).all() and f"{zeros} of 150 for 'local'" in picture.caption
    assert labels(picture.axes[0])[0].startswith(f"local: total {gap.sum():.4f}")


@pytest.mark.parametrize("gap", [[0.0, 0.0], [-1e-12, 3.0], [0.5], [1e-30, 1e-30]])
def test_degenerate_gaps_are_drawn(gap: list[float], tmp_path: Path) -> None:
    frame = pd.DataFrame({"fit": "a", "datum": range(len(gap)), "log_evidence": 0.0, "elbo": 0.0, "gap": gap})
    picture = plots.gap_curves(tables.validate("gaps", frame))
    assert np.asarray(picture.axes[0].lines[0].get_ydata())[-1] == 1.0
    picture.save(tmp_path / "gaps.png")


@pytest.mark.parametrize("parts", [{}, {"approximation": [0.5, 2.0], "amortization": [0.0, 1.5]}])
def test_bars_of_a_single_datum_span_its_elbo_and_log_evidence(parts: dict[str, list[float]]) -> None:
    columns = {"log_evidence": [-7.5, -6.5], "elbo": [-8.0, -10.0], "gap": [0.5, 3.5], **parts}
    frame = pd.DataFrame({"fit": ["a", "b"], "datum": 0, **columns, "gap_error": 0.1})
    picture = plots.gap_bars(tables.validate("gaps", frame))
    bars = [(b.get_y() + b.get_height() / 2, b.get_x(), b.get_width()) for b in picture.axes[0].patches]
    if parts:
        expected = [(0, -8.0, 0.5), (0, -7.5, 0.0), (1, -10.0, 2.0), (1, -8.0, 1.5)]
    else:
        expected = [(0, -8.0, 0.5), (1, -10.0, 3.5)]
    np.testing.assert_allclose(bars, expected, rtol=1e-12, atol=1e-12)
    said = " ".join(text.get_text() for text in picture.axes[0].texts)
    assert "gap 3.5000" in said and "ELBO\n−8.0000" in said and ("amortization 1.5000" in said) == bool(parts)
    assert ("divided into approximation and amortization" in picture.caption) == bool(parts)


@pytest.mark.parametrize("gap", [[0.0], [-0.3, 1e-14], [np.inf]])
def test_degenerate_gaps_of_a_single_datum_are_drawn(gap: list[float], tmp_path: Path) -> None:
    fits = [f"fit {i}" for i in range(len(gap))]
    frame = pd.DataFrame({"fit": fits, "datum": 0, "log_evidence": -1.0, "elbo": -1.0 - np.array(gap)})
    picture = plots.gap_bars(tables.validate("gaps", frame.assign(gap=gap)))
    assert ("sampled ELBO" in picture.caption) == (min(gap) < 0)
    picture.save(tmp_path / "gaps.png")


def test_distances_along_a_sequence_equal_total_variation() -> None:
    rng, steps = np.random.default_rng(0), 12
    rows, expected = [], {}
    for fit in ("a", "b"):
        probs = rng.dirichlet(np.ones(5), size=(2, steps))
        expected[fit] = 0.5 * np.abs(probs[0] - probs[1]).sum(-1)
        for kind, table in zip(("exact", "variational"), probs, strict=True):
            frame = posterior_rows(fit, kind, table)
            rows.append(frame.assign(datum=0, position=frame["datum"].astype(str)))
    frame = tables.validate("posterior", pd.concat(rows, ignore_index=True).sample(frac=1.0, random_state=1))
    frame = frame.assign(label=frame["state"])
    lines = plots.sequence_distances(frame, [("a", "z"), ("b", "z")]).axes[0].lines
    for line, fit in zip(lines, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(line.get_xdata()), np.arange(steps))
        np.testing.assert_allclose(np.asarray(line.get_ydata()), expected[fit], rtol=1e-12)
        assert str(line.get_label()).startswith(f"{fit}: mean {expected[fit].mean():.3f}")


def moments(num_data: int) -> pd.DataFrame:
    rng = np.random.default_rng(4)
    rows = [
        pd.DataFrame(
            {
                "fit": "a",
                "kind": kind,
                "site": "h",
                "datum": range(num_data),
                "position": position,
                "state": None,
            }
        )
        for kind in ("exact", "variational")
        for position in ("0", "1")
    ]
    frame = pd.concat(rows).assign(probability=np.nan)
    frame["mean"], frame["sd"] = rng.normal(size=len(frame)), rng.random(len(frame))
    return tables.validate("posterior", frame)


def test_moments_equal_posterior_rows() -> None:
    frame = moments(7).sample(frac=1.0, random_state=0)
    picture = plots.continuous_comparison(frame, tables.empty("gaps"), "a", "h")
    key = ["datum", "position"]
    exact, variational = (frame[frame["kind"] == k].sort_values(key) for k in ("exact", "variational"))
    for axes, quantity in zip(picture.axes, ("mean", "sd"), strict=True):
        drawn = np.asarray(next(c for c in axes.collections if isinstance(c, PathCollection)).get_offsets())
        expected = np.column_stack([exact[quantity], variational[quantity]])
        np.testing.assert_array_equal(drawn[np.argsort(drawn[:, 0])], expected[np.argsort(expected[:, 0])])


# ------------------------------------------------------------------------------- the whole


def test_all_pictures_are_drawn_the_same_twice(frames: Frames, tmp_path: Path) -> None:
    first = plots.draw_all(frames, iris_data(), tmp_path / "a")
    second = plots.draw_all(frames, iris_data(), tmp_path / "b")
    assert [path.name for path in first] == [
        "objective.png",
        "components_z.png",
        "responsibilities_local_z.png",
        "responsibilities_amortized_z.png",
        "gaps.png",
    ]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))
    assert {key: matplotlib.rcParams[key] for key in canvas.STYLE} == {
        key: matplotlib.rcParamsOrig[key] for key in canvas.STYLE
    }
    with Image.open(first[2]) as image:
        assert image.info["Title"] == "Exact against variational responsibilities: fit 'local'"
        assert "ring" in image.info["Description"] and image.width == 1500


def test_pictures_ignore_the_users_style(frames: Frames, tmp_path: Path) -> None:
    plain = plots.gap_curves(frames["gaps"]).save(tmp_path / "plain.png")
    with matplotlib.rc_context(
        {"figure.facecolor": "black", "axes.facecolor": "black", "font.size": 20, "text.color": "w"}
    ):
        dark = plots.gap_curves(frames["gaps"]).save(tmp_path / "dark.png")
    assert plain.read_bytes() == dark.read_bytes()


def test_plots_import_neither_pyplot_nor_torch() -> None:
    unwanted = ("matplotlib.pyplot", "torch", "pyro")
    code = f"import sys, lvmppl.plots, lvmppl.report; print([m for m in {unwanted} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def small_run(probs: np.ndarray, objective: list[float], log_evidence: float, name: str = "local") -> Frames:
    gaps = pd.DataFrame(
        {"fit": name, "datum": range(len(probs)), "log_evidence": -1.0, "elbo": -1.5, "gap": 0.5}
    )
    posterior = pd.concat([posterior_rows(name, kind, probs) for kind in ("exact", "variational")])
    row = {**summary_row("local", log_evidence, log_evidence - 1, len(objective) - 1), "fit": name}
    frames = {
        "summary": pd.DataFrame([row]),
        "history": history_rows(name, 0, objective, "elbo"),
        "posterior": posterior,
        "gaps": gaps,
    }
    return {n: tables.validate(n, frames[n]) if n in frames else tables.empty(n) for n in tables.SCHEMAS}


HALVES = np.array([[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]])


@pytest.mark.parametrize(
    "frames, data, names",
    [
        (
            small_run(HALVES, [-9.0, -8.0], -7.0),
            pd.DataFrame({"x": [1.0, 2.0, 4.0]}),
            "objective responsibilities gaps",
        ),
        (
            small_run(HALVES[:1], [-9.0], -7.0),
            pd.DataFrame({"x": [1.0], "y": [2.0]}),
            "objective responsibilities gaps",
        ),
        (
            small_run(np.ones((3, 1)), [-9.0] * 5, -9.0),
            iris_data()[:3],
            "objective components responsibilities gaps",
        ),
        (
            small_run(HALVES, [-np.inf, np.nan, -3.0, np.inf], np.nan),
            pd.DataFrame(),
            "objective responsibilities gaps",
        ),
        (small_run(HALVES, [np.nan, -np.inf], -np.inf), pd.DataFrame(), "responsibilities gaps"),
        (
            small_run(HALVES * np.nan, [-1.0, 0.0], 1.0),
            iris_data()[:3],
            "objective components responsibilities gaps",
        ),
        (
            small_run(HALVES, [-2.0, -1.0], -1.0, "$a_{1}/b$ ü"),
            iris_data()[:3],
            "objective components responsibilities gaps",
        ),
        ({n: tables.empty(n) for n in tables.SCHEMAS}, iris_data(), ""),
    ],
    ids=["1-D", "one datum", "one component", "infinite", "failed", "nan", "odd name", "empty"],
)
def test_corner_cases_are_drawn(frames: Frames, data: pd.DataFrame, names: str, tmp_path: Path) -> None:
    paths = plots.draw_all(frames, data, tmp_path)
    assert [path.name.partition("_")[0].removesuffix(".png") for path in paths] == names.split()
    assert all(path.parent == tmp_path and path.stat().st_size > 5000 for path in paths)


def test_large_runs_are_thinned_out_and_say_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    num_data = 5100
    frames = small_run(rng.dirichlet(np.ones(2), size=num_data), [-9.0, -8.0], -7.0)
    frames["gaps"].loc[4321, "gap"] = 8.0
    frame, note = align.aligned_posterior(frames)
    assert 5000 <= frame["datum"].nunique() <= 5005 and 4321 in set(frame["datum"])
    data = pd.DataFrame(rng.normal(size=(num_data, 2)), columns=["x", "y"])
    picture = plots.component_scatter(frame, data, "z", note)
    assert picture is not None and f"of {num_data:,} data" in picture.caption
    drawn = np.asarray(picture.axes[0].collections[0].get_offsets())
    assert len(drawn) == frame["datum"].nunique()
    np.testing.assert_array_equal(drawn, data.loc[np.sort(frame["datum"].unique())].to_numpy())


def test_spread_keeps_order_and_distance() -> None:
    values = [5.0, 1.0, 1.1, 0.9, 30.0]
    placed = np.array(canvas.spread(values, 2.0))
    assert np.argsort(placed).tolist() == np.argsort(values).tolist()
    assert np.diff(np.sort(placed)).min() >= 2.0 - 1e-6
    assert canvas.spread([1.0, 9.0], 2.0) == [1.0, 9.0] and canvas.spread([], 2.0) == []


@pytest.mark.parametrize(
    "value, error, text",
    [
        (-180.18548, np.nan, "−180.1855"),
        (3.24e-7, np.nan, "3.2e−7"),
        (-1234567.891, np.nan, "−1,234,567.9"),
        (0.0, np.nan, "0.0000"),
        (-3.4e-16, np.nan, "0.0000"),
        (np.nan, 1.0, "–"),
        (-np.inf, np.nan, "−∞"),
        (-181.2345, 0.137, "−181.23 ± 0.14"),
        (-181.2345, 12.3, "−181 ± 12"),
    ],
)
def test_nats_are_rounded_for_reading(value: float, error: float, text: str) -> None:
    assert tables.nats(value, error) == text
