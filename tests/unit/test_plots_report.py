"""Figures show what they are given, and names do not collide; the report is one file, safe and readable."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Annotation

from geneformer_ray.compute.projection import compute_umap
from geneformer_ray.errors import InputError
from geneformer_ray.manage import plots
from geneformer_ray.manage.figure_style import BLUE, FAINT, VERMILLION
from geneformer_ray.manage.report import KeyFigure, Picture, Section, Table, render_report, write_report
from geneformer_ray.manage.shift_plots import Measure, ranked_bars, volcano
from geneformer_ray.manage.training_curves import TrainingCurve, training_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCRIPT = "<script>alert(1)</script>"


def screen_statistics(genes: int = 60, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    shift = np.sort(rng.normal(scale=0.01, size=genes))[::-1]
    fdr = np.exp(-np.abs(shift) * 500)
    return pd.DataFrame(
        {
            "symbol": [f"GENE{i}" for i in range(genes)],
            "shift_to_beta": shift,
            "fdr_beta": fdr,
            "cells": rng.integers(2, 30, genes),
            "significant": fdr < 0.05,
        }
    )


def pooling_table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "pooling": ["baseline", "first_gene", "cls", "mean"],
            "macro_f1": [0.93, 0.86, 0.87, 0.90],
            "accuracy": [0.96, 0.91, 0.92, 0.94],
        }
    )


def texts(figure: Figure) -> set[str]:
    found: Any = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return {artist.get_text() for artist in found}


def count(dots: Any) -> int:
    return len(dots.get_offsets())


def names_on(figure: Figure) -> list[Annotation]:
    return [child for child in figure.axes[0].get_children() if isinstance(child, Annotation)]


def test_pooling_comparison_has_a_bar_for_each_score_and_the_baseline_last() -> None:
    figure = plots.pooling_comparison(pooling_table())
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["first_gene", "cls", "mean", "baseline"]
    heights = [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]
    assert heights == pytest.approx([0.86, 0.87, 0.90, 0.93, 0.91, 0.92, 0.94, 0.96])
    assert {"macro F1", "accuracy", "macro F1 of the baseline", "0.860"} <= texts(figure)


def test_pooling_comparison_shows_each_seed() -> None:
    table = pd.DataFrame({"pooling": ["cls"] * 3, "macro_f1": [0.7, 0.8, 0.9], "accuracy": [0.8, 0.9, 1.0]})
    axes = plots.pooling_comparison(table).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.8, 0.9])  # type: ignore[attr-defined]
    assert [count(dots) for dots in axes.collections] == [3, 3]


def test_confusion_matrix_colours_rows_and_writes_counts() -> None:
    figure = plots.confusion_matrix([[8, 2, 0], [0, 1000, 0], [0, 0, 0]], ["alpha", "beta", "none"], "Held out")
    axes = figure.axes[0]
    shares: Any = axes.images[0].get_array()
    # The last type has no cells: no share, and no division by zero.
    np.testing.assert_allclose(np.asarray(shares), np.array([[0.8, 0.2, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert {text.get_text() for text in axes.texts} == {"8", "2", "1,000"}
    assert {"Held out", "alpha (10)", "beta (1,000)", "none (0)", "predicted"} <= texts(figure)


def test_embedding_umap_names_every_type_and_draws_every_cell() -> None:
    rng = np.random.default_rng(0)
    labels = [f"type{i}" for i in range(9) for _ in range(i + 1)]
    figure = plots.embedding_umap(rng.normal(size=(45, 2)), labels, "By type", ("By library", ["a", "b", "c"] * 15))
    by_type, by_library = figure.axes
    for axes in figure.axes:
        assert sum(count(dots) for dots in axes.collections) == 45
    assert {"By type", "By library", "type8 (9)", "type0 (1)", "a (15)"} <= texts(figure)
    looks = set()
    for handle in by_type.get_legend().legend_handles:  # type: ignore[union-attr]
        line: Any = handle
        looks.add((line.get_color(), line.get_marker()))
    assert len(looks) == 9  # nine types, seven colours, no two alike
    assert len(by_library.collections) == 1


def test_volcano_colours_significant_genes_and_names_the_strongest() -> None:
    table = screen_statistics()
    figure = volcano(table, Measure.shift_to("beta"), top=8)
    groups: Any = figure.axes[0].collections
    drawn = {to_hex(dots.get_facecolor()[0]).upper(): count(dots) for dots in groups}
    towards = int((table["significant"] & (table["shift_to_beta"] > 0)).sum())
    away = int((table["significant"] & (table["shift_to_beta"] < 0)).sum())
    assert drawn == {BLUE: towards, VERMILLION: away, FAINT: len(table) - towards - away}
    significant = table[table["significant"]]
    strongest = significant.reindex(significant["shift_to_beta"].abs().sort_values(ascending=False).index)
    assert [name.get_text() for name in names_on(figure)] == strongest["symbol"].head(8).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_volcano_names_do_not_overlap_and_stay_inside(seed: int) -> None:
    figure = volcano(screen_statistics(seed=seed), Measure.shift_to("beta"), top=12)
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    figure.draw_without_rendering()
    frame = figure.axes[0].get_window_extent(renderer)
    # Of the text alone: an annotation's extent includes its line.
    boxes = [super(Annotation, name).get_window_extent(renderer) for name in names_on(figure)]
    assert len(boxes) == 12
    for index, box in enumerate(boxes):
        assert frame.contains(box.x0, box.y0)
        assert frame.contains(box.x1, box.y1)
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_volcano_takes_an_fdr_of_zero_and_nothing_significant() -> None:
    table = screen_statistics(5)
    table["fdr_beta"] = [0.0, 1.0, 1.0, np.nan, 1.0]
    table["significant"] = False
    figure = volcano(table, Measure.shift_to("beta"))
    (offsets,) = (np.asarray(dots.get_offsets()) for dots in figure.axes[0].collections[:1])
    assert len(offsets) == 4
    assert np.isfinite(offsets).all()


def test_ranked_bars_show_both_directions_once() -> None:
    table = screen_statistics()
    axes = ranked_bars(table, Measure.shift_to("beta"), top=5).axes[0]
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == table["symbol"].head(5).tolist() + table["symbol"].tail(5).tolist()
    few = ranked_bars(table.head(3), Measure.shift_to("beta"), top=5).axes[0]
    assert [tick.get_text() for tick in few.get_yticklabels()] == table["symbol"].head(3).tolist()


def test_training_curves_draw_one_line_a_pooling() -> None:
    curves = [TrainingCurve(name, [1, 2, 3], [2.0, 1.0, 0.5], [1, 2], [0.5, 0.8]) for name in ("cls", "mean")]
    loss, score = training_curves(curves).axes
    for axes in (loss, score):
        assert [line.get_label() for line in axes.get_lines()] == ["cls", "mean"]
    assert loss.get_lines()[0].get_color() == score.get_lines()[0].get_color()


def test_names_are_not_read_as_mathematics() -> None:
    table = screen_statistics(4).assign(symbol=["$a^", "$b_{", "c", "d"])
    for figure in (
        volcano(table, Measure.shift_to("beta")),
        ranked_bars(table, Measure.shift_to("beta")),
        plots.confusion_matrix(np.eye(2, dtype=int), ["$x^", "$y_{"], "$t^"),
        plots.embedding_umap(np.zeros((2, 2)), ["$x^", "$y_{"], "$t^"),
    ):
        figure.canvas.draw()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: volcano(screen_statistics(), Measure.shift_to("gamma")),
        lambda: ranked_bars(screen_statistics().head(0), Measure.shift_to("beta")),
        lambda: plots.pooling_comparison(pooling_table().drop(columns="accuracy")),
        lambda: plots.confusion_matrix(np.eye(3), ["a", "b"]),
        lambda: plots.embedding_umap(np.zeros((3, 2)), ["a"], "t"),
        lambda: training_curves([]),
        lambda: compute_umap(np.zeros((4, 8))),
        lambda: compute_umap(np.full((9, 8), np.nan)),
    ],
)
def test_unusable_input_is_named(draw: Any) -> None:
    with pytest.raises(InputError):
        draw()


class Page(HTMLParser):
    """What the tests ask of a page: its elements, and the text outside of tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def sections() -> list[Section]:
    genes = pd.DataFrame(
        {
            "symbol": [SCRIPT, "INS"],
            "shift": [-0.25, np.nan],
            "fdr": [1.234e-9, 0.5],
            "cells": [1200, 3],
            "significant": [True, False],
        }
    )
    return [
        Section(
            "Poolings",
            "First.\n\nSecond.",
            Picture(plots.pooling_comparison(pooling_table()), 'Bars, "mean" best'),
        ),
        Section(
            "Screen",
            table=Table(genes, "Top genes", {"fdr": "FDR"}),
            note="A toy model's ranking is not biology.",
        ),
        Section(f"Odd {SCRIPT}", SCRIPT),
    ]


def report(**options: Any) -> str:
    summary = [KeyFigure("macro F1", "0.902", "champion"), KeyFigure(SCRIPT, SCRIPT)]
    return render_report(**({"title": "Run", "summary": summary, "sections": sections()} | options))


def test_report_is_one_file_that_loads_nothing() -> None:
    html = report()
    page = Page(html)
    assert not re.search(r"https?://", html)
    for attributes in (attributes for _, attributes in page.elements):
        assert "onclick" not in attributes
        for name in ("src", "href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:image/png;base64,", "#"))
    assert not page.all("script")
    assert not page.all("link")
    assert "default-src 'none'" in html


def test_report_escapes_names() -> None:
    html = report(title=SCRIPT, lead=SCRIPT)
    assert SCRIPT not in html
    assert Page(html).words.count(SCRIPT) >= 5  # title, heading, lead, key figure, table, section: shown, not run


def test_report_is_accessible() -> None:
    page = Page(report())
    (image,) = page.all("img")
    assert image["alt"] == 'Bars, "mean" best'
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    assert len(page.all("h2")) == 3
    assert len(page.all("caption")) == 1
    assert {heading["scope"] for heading in page.all("th")} == {"col", "row"}
    anchors = {heading["id"] for heading in page.all("h2")}
    assert {str(link["href"]).removeprefix("#") for link in page.all("a")} == anchors
    assert any("width=device-width" in str(meta.get("content")) for meta in page.all("meta"))


def test_report_writes_numbers_for_reading() -> None:
    words = Page(report()).words
    for shown in (
        "\N{MINUS SIGN}0.2500",
        "1.23e-09",
        "1,200",
        "yes",
        "no",
        "\N{EN DASH}",
        "FDR",
        "0.902",
        "champion",
    ):
        assert shown in words
    assert "A toy model's ranking is not biology." in words


def test_report_and_its_pictures_are_written(tmp_path: Path) -> None:
    path, folder = tmp_path / "runs" / "report.html", tmp_path / "pictures"
    written = write_report(path, title="Run", summary=[], sections=sections(), pictures=folder)
    assert [Path(name) for name in written] == [path, folder / "poolings.png"]
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (folder / "poolings.png").read_bytes().startswith(b"\x89PNG")
    once = path.read_bytes()
    write_report(path, title="Run", summary=[], sections=sections())
    assert path.read_bytes() == once


def test_a_picture_without_words_and_a_title_twice_are_refused() -> None:
    figure = plots.pooling_comparison(pooling_table())
    with pytest.raises(InputError, match="words for the figure"):
        report(sections=[Section("One", figure=Picture(figure, " "))])
    with pytest.raises(InputError, match="a title of its own"):
        report(sections=[Section("One"), Section("one!")])
