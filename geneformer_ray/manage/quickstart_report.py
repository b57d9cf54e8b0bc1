"""The quickstart's report: what a person looks at after the first run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.manage import plots
from geneformer_ray.manage.demo import GROUPS
from geneformer_ray.manage.report import KeyFigure, Picture, Section, Table, write_report
from geneformer_ray.manage.shift_plots import Measure, ranked_bars, volcano
from geneformer_ray.manage.training_curves import training_curves
from geneformer_ray.manage.trial_records import curve_of
from geneformer_ray.manage.trials import Trial, read_predictions

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["read_embeddings", "write_quickstart_report"]

# Textbook markers: their deletion from an alpha cell has an expected sign in biology, if not in a toy model.
MARKERS = {"alpha": ("ARX", "IRX2", "GCG"), "beta": ("PDX1", "MAFA", "NKX6-1", "INS")}
TO_BETA = Measure.shift_to("beta")
NOT_BIOLOGY = (
    "The ranking of a toy model is not biology. This model has two layers, was pretrained for seconds on 740 cells of "
    "one donor, and reads the top 256 genes of a cell. The table shows that the machinery works; for findings, screen "
    "with a model pretrained on millions of cells, cells of several donors, and a test in the laboratory."
)


def read_embeddings(output: str) -> tuple[list[str], NDArray[np.float32]]:
    """Read what the embed job wrote: cell ids, and embeddings of shape (cells, width)."""
    filesystem, inside = storage.locate(storage.join(output, "embeddings"))
    table = pq.read_table(inside, filesystem=filesystem)
    values = table["embedding"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    return table["cell_id"].to_pylist(), values


def write_quickstart_report(
    output: str, summaries: dict[str, dict[str, Any]], cell_map: NDArray[np.float32]
) -> dict[str, Any]:
    """Write ``report.html`` and its pictures.

    Parameters
    ----------
    output
        The quickstart's output.
    summaries
        Stage -> the summary of its job.
    cell_map
        Two-dimensional coordinates of the embedded cells, shape (cells, 2).
    """
    tuned, champion = summaries["finetune"], summaries["promote"]
    statistics = pd.read_csv(storage.join(output, "statistics", "statistics.csv"))
    path = storage.join(output, "report.html")
    write_report(
        path,
        title="Geneformer on Ray: quickstart",
        lead=(
            f"{summaries['data']['cells']:,} human pancreas cells (Baron et al. 2016, donor 1), encoded as rank value "
            "encodings; a small BERT pretrained on them, fine-tuned with three poolings, and used to screen gene "
            "deletions in alpha cells."
        ),
        summary=_key_figures(tuned, champion, summaries),
        sections=[
            _poolings(tuned, champion),
            _confusion(output, tuned, champion),
            _curves(output, tuned),
            _cells(output, cell_map),
            _screen(statistics, summaries),
            _genes(statistics),
            _how(output, summaries),
        ],
        pictures=storage.join(output, "pictures"),
    )
    return {"report": path}


def _key_figures(
    tuned: dict[str, Any], champion: dict[str, Any], summaries: dict[str, dict[str, Any]]
) -> list[KeyFigure]:
    served = summaries["serve"]
    screened = summaries["screen"]
    return [
        KeyFigure(
            "Champion's macro F1", f"{champion['macro_f1']:.3f}", f"{champion['pooling']} pooling, unseen library"
        ),
        KeyFigure("Baseline's macro F1", f"{tuned['baseline']['macro_f1']:.3f}", "PCA + logistic regression"),
        KeyFigure("Deletions screened", f"{screened['events']:,}", f"in {screened['cells']} alpha cells"),
        KeyFigure("Served equals offline", "yes" if served["equal"] else "NO", f"{served['cells']} cells over HTTP"),
    ]


def _poolings(tuned: dict[str, Any], champion: dict[str, Any]) -> Section:
    scored = {**tuned["pooling"], plots.BASELINE: tuned["baseline"]}
    shown = ("macro_f1", "accuracy")
    table = pd.DataFrame([{"pooling": name} | {key: scores[key] for key in shown} for name, scores in scored.items()])
    best = max(tuned["pooling"], key=lambda name: tuned["pooling"][name]["macro_f1"])
    counts = tuned["cells"]
    return Section(
        "Which pooling?",
        (
            "Geneformer V1 has no CLS token, so stock BERT classification reads the first gene of the cell. Here the "
            "same head reads the first gene, a CLS token that is added and learned, or the mean over all genes. The "
            f"champion, {champion['pooling']}, is the best by macro F1 on the choosing library; the figures are those "
            f"of the reporting library, which nothing was chosen on (there, {best} is best).\n\n"
            f"{len(tuned['labels'])} cell types; {counts['train']} cells of library {GROUPS['train']} train, "
            f"{counts['choose']} of {GROUPS['choose']} choose, {counts['report']} of {GROUPS['report']} report. "
            f"Dropped for too few cells: {', '.join(tuned['dropped_labels']) or 'none'}."
        ),
        figure=Picture(
            plots.pooling_comparison(table), "Bars of macro F1 and accuracy by pooling and for the baseline"
        ),
        table=Table(table, "Reporting library", {"pooling": "Pooling", "macro_f1": "Macro F1", "accuracy": "Accuracy"}),
        note=(
            "The three libraries are technical replicates of one donor: this split tests technical, not donor, "
            "generalisation. One seed: differences of a few hundredths between poolings are within chance."
        ),
    )


def _confusion(output: str, tuned: dict[str, Any], champion: dict[str, Any]) -> Section:
    trial = next(t for t in tuned["trials"] if t["pooling"] == champion["pooling"])
    directory = Trial(trial["pooling"], trial["seed"]).directory(storage.join(output, "classifiers"))
    _, targets, logits = read_predictions(directory, "report")
    classes = len(tuned["labels"])
    matrix = np.zeros((classes, classes), dtype=int)
    np.add.at(matrix, (targets, logits.argmax(axis=1)), 1)
    figure = plots.confusion_matrix(
        matrix, tuned["labels"], f"{champion['pooling']} pooling, library {GROUPS['report']}"
    )
    return Section(
        "What the champion confuses",
        figure=Picture(figure, "Confusion matrix of the champion on the reporting library"),
    )


def _curves(output: str, tuned: dict[str, Any]) -> Section:
    curves = []
    for trial in tuned["trials"]:
        directory = Trial(trial["pooling"], trial["seed"]).directory(storage.join(output, "classifiers"))
        curves.append(curve_of(trial["pooling"], storage.read_json(storage.join(directory, "history.json"))))
    return Section("Training", figure=Picture(training_curves(curves), "Loss and macro F1 by epoch and pooling"))


def _cells(output: str, cell_map: NDArray[np.float32]) -> Section:
    ids, _ = read_embeddings(storage.join(output, "embeddings"))
    table = CellTable(storage.join(output, "cells"))
    row_of = {cell_id: row for row, cell_id in enumerate(table.cell_ids.tolist())}
    rows = [row_of[cell_id] for cell_id in ids]
    types = table.column("cell_type", "cell_type").astype(str)[rows].tolist()
    libraries = table.column("library", "library").astype(str)[rows].tolist()
    figure = plots.embedding_umap(cell_map, types, "Cells by type", ("Cells by library", libraries))
    return Section(
        "The cells as the champion sees them",
        "UMAP of the mean of each cell's genes, at the layer before the last. Distances between clusters mean little.",
        figure=Picture(figure, "UMAP of cell embeddings, coloured by cell type and by library"),
    )


def _screen(statistics: pd.DataFrame, summaries: dict[str, dict[str, Any]]) -> Section:
    screened = summaries["screen"]
    return Section(
        "Deleting genes from alpha cells",
        (
            "Every gene that at least 30 alpha cells hold among their top 256 was deleted from each of them: "
            f"{screened['events']:,} deletions in {screened['cells']} cells. A shift is the change of the cosine "
            "between the mean of the cell's other genes and the mean beta cell: the effect on context, not the loss of "
            f"the gene's own term. {int(statistics['significant'].sum())} of {len(statistics)} genes differ from the "
            "pool of all genes (rank-sum test, FDR below 0.05)."
        ),
        figure=Picture(volcano(statistics, TO_BETA), "Volcano plot of shift towards beta against FDR"),
        note=NOT_BIOLOGY,
    )


def _genes(statistics: pd.DataFrame) -> Section:
    columns = ["symbol", "shift_to_beta", "fdr_beta", "effect", "ci_low", "ci_high", "cells"]
    ranked = statistics.sort_values("shift_to_beta", ascending=False)
    markers = [gene for genes in MARKERS.values() for gene in genes]
    there = ranked[ranked["symbol"].isin(markers)]["symbol"].tolist()
    found = f"Among the screened genes: {', '.join(there)}." if there else "None of them is among the screened genes."
    return Section(
        "Genes by shift",
        (
            "The ten genes whose deletion moves alpha cells furthest towards beta, and the ten that move them furthest "
            f"away. Markers to look for: {', '.join(MARKERS['alpha'])} (alpha), {', '.join(MARKERS['beta'])} (beta). "
            + found
        ),
        figure=Picture(ranked_bars(statistics, TO_BETA), "Bars of the strongest shifts to and from beta"),
        table=Table(
            pd.concat([ranked.head(10), ranked.tail(10)])[columns],
            "Effect: the gene's mean shift less the pool's, in standard deviations of the pool, with its 95 % interval "
            "over cells",
            {
                "symbol": "Gene", "shift_to_beta": "Shift to beta", "fdr_beta": "FDR", "effect": "Effect",
                "ci_low": "Low", "ci_high": "High", "cells": "Cells",
            },
        ),
    )  # fmt: skip


def _frequency_loss(output: str) -> float:
    """Give the cross entropy of guessing genes by how often the training cells hold them, in nats."""
    table = CellTable(storage.join(output, "cells"))
    rows = table.select({"library": [GROUPS["train"]]})
    counts = np.bincount(np.concatenate(table.read(rows).input_ids))
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _how(output: str, summaries: dict[str, dict[str, Any]]) -> Section:
    pretrained = summaries["pretrain"]
    return Section(
        "How it was made",
        (
            f"Vocabulary: {summaries['data']['vocabulary_size']:,} tokens, medians from library {GROUPS['train']} "
            f"alone. Pretraining: masked-gene loss {pretrained['validation_loss']:.2f} on held-out cells; a uniform "
            f"guess would be {np.log(summaries['data']['vocabulary_size']):.2f}, guessing by gene frequency alone "
            f"{_frequency_loss(output):.2f}. Of these cells' hidden genes it names {pretrained['masked_accuracy']:.2%} "
            f"first and {pretrained['masked_top10_accuracy']:.2%} among ten, a ranking by frequency "
            f"{pretrained['baseline_accuracy']:.2%} and {pretrained['baseline_top10_accuracy']:.2%}: these few epochs "
            f"teach little. Runs, figures and models are in MLflow: {summaries['finetune']['mlflow']}."
        ),
    )
