"""The page about a cross-validated classifier of genes: how good, beside what, on which genes, and what is left out."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from geneformer_ray.data import storage
from geneformer_ray.manage.figure_style import shortened
from geneformer_ray.manage.report import KeyFigure, Picture, Section, Table, write_report
from geneformer_ray.manage.roc_plot import roc_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from geneformer_ray.manage.gene_run import GeneRun

__all__ = ["REPORT", "ROC", "draw_roc", "write_gene_report"]

REPORT, ROC = "report.html", "roc.png"
DOTS_PER_INCH = 200
GENES_SHOWN = 50
NAMES_SHOWN = 20
ALT = "ROC curves of the reporting genes: the model's folds and their mean, and the baseline's mean"
CAPTION = (
    "Each gene is one point of its fold's curve, whatever the number of cells that hold it. The shaded band is one "
    "standard deviation of the true positive rate over folds; the diagonal is a coin."
)
NOTE = (
    "The deviation tells how far one fold's result lies from another's. It is no standard error: the folds share most "
    "of their training genes. A model that is no better than the baseline has shown nothing beyond how often a gene is "
    "found and where it ranks."
)
FACTS = (
    "folds", "split_seed", "min_cells", "max_cells", "filter", "chosen_cells", "options", "class_weights",
    "label_smoothing", "lora", "freeze_layers", "freeze_embeddings", "patience", "workers", "precision", "cells",
    "model", "vocabulary", "gene_classes",
)  # fmt: skip
HEADINGS = {
    "auc": "AUC per gene",
    "token_auc": "AUC per token",
    "baseline_auc": "baseline's AUC per gene",
    "macro_f1": "macro F1 per gene",
}


def draw_roc(run: GeneRun) -> Figure:
    """Draw the ROC of the reporting genes of all folds, per gene, with the baseline's."""
    scores = run.reporting()
    return roc_figure(scores["model"], scores["baseline"], shortened(f"Genes: {' or '.join(run.labels)}", 60))


def write_gene_report(run: GeneRun) -> None:
    """Write ``OUTPUT/report.html`` and ``OUTPUT/roc.png``."""
    scores, spread = run.reporting(), run.spread()
    figure = draw_roc(run)
    picture = io.BytesIO()
    # Without the software's name and version, the same figure is the same file.
    figure.savefig(picture, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    storage.write_bytes(storage.join(run.output, ROC), picture.getvalue())
    table, first = run.genes(), run.split(0)
    seeds = len(run.trials) // run.folds
    over = f"mean ± standard deviation over {run.folds} folds" + (f", {seeds} seeds each" if seeds > 1 else "")
    without = first["cells_without_target_gene"]
    write_report(
        storage.join(run.output, REPORT),
        title="Gene classes: " + ", ".join(run.labels),
        lead="A class is predicted for every gene in every cell that holds it, and over these cells for the gene. The "
        "folds are over genes: each gene is reported once, by a model that never saw its class.",
        summary=[
            KeyFigure("AUC of the model", _area(spread["model"]), f"per gene, {over}"),
            KeyFigure("AUC of the baseline", _area(spread["baseline"]), "frequency and mean rank of the gene"),
            KeyFigure("AUC of the model, per token", _area(spread["model_tokens"]), "a gene counts in each cell"),
            KeyFigure("Genes", f"{len(table):,}", f"in {len(run.labels)} classes"),
            KeyFigure("Cells", f"{run.plan['chosen_cells'] - without:,}", f"and {without:,} without a target gene"),
        ],
        sections=[
            Section("ROC", _compared(run, scores, spread), figure=Picture(figure, ALT, CAPTION), note=NOTE),
            Section("Folds", table=Table(_folds(run), "Reporting genes of each trial", HEADINGS)),
            Section("Classes", _left_out(run), table=Table(_classes(run, table), "Genes of each class")),
            _mistaken(table, run),
            Section("How it was made", table=Table(_facts(run), "What determines the numbers above")),
        ],
    )


def _area(spread: dict[str, Any]) -> str:
    """Give an area over folds as people read it."""
    if spread["auc"] is None:
        return "none"
    return f"{spread['auc']:.3f}" + ("" if spread["auc_std"] is None else f" ± {spread['auc_std']:.3f}")


def _compared(run: GeneRun, scores: dict[str, list[dict[str, Any]]], spread: dict[str, dict[str, Any]]) -> str:
    """Word the two areas, claiming no more than the folds show."""
    above = sum(
        one["auc"] > scores["baseline"][trial.fold or 0]["auc"]
        for trial, one in zip(run.trials, scores["model"], strict=True)
    )
    classes = (
        f"Of two classes, the curve is that of {run.labels[1]}."
        if len(run.labels) == 2
        else "Of several classes, the curve is the mean over each against all others."
    )
    return (
        f"Per gene, the model's AUC is {_area(spread['model'])}, the baseline's "
        f"{_area(spread['baseline'])}; the model is above the baseline in {above} of {len(run.trials)} trials. "
        f"Per token, where a gene counts once in each cell that holds it, the model's is "
        f"{_area(spread['model_tokens'])} and the baseline's {_area(spread['baseline_tokens'])}. {classes}"
    )


def _folds(run: GeneRun) -> pd.DataFrame:
    rows = []
    for trial in run.trials:
        fold = trial.fold or 0
        split, scores, baseline = run.split(fold), run.scores(trial)["reporting"], run.baseline(fold)["reporting"]
        rows.append(
            {
                "trial": trial.name,
                "genes": scores["genes"],
                "cells": split["cells"]["report"],
                "tokens": split["tokens"]["report"],
                "auc": scores["auc"],
                "baseline_auc": baseline["auc"],
                "token_auc": scores["tokens"]["auc"],
                "macro_f1": scores["macro_f1"],
            }
        )
    return pd.DataFrame(rows)


def _classes(run: GeneRun, table: pd.DataFrame) -> pd.DataFrame:
    classes = run.plan["classes"]
    right = table["true_class"] == table["predicted_class"]
    return pd.DataFrame(
        [
            {
                "class": label,
                "genes": count,
                "recognised": int(right[table["true_class"] == label].sum()),
                "not in the vocabulary": len(classes["unknown_genes"].get(label, [])),
                "in too few cells": len(classes["genes_in_too_few_cells"].get(label, [])),
            }
            for label, count in classes["genes_per_class"].items()
        ]
    )


def _left_out(run: GeneRun) -> str:
    """Name the genes of the file that took no part."""
    classes, parts = run.plan["classes"], []
    for what, heading in (
        ("unknown_genes", "Not in the model's vocabulary, or the name of several genes"),
        ("genes_in_too_few_cells", f"In fewer than {run.plan['min_cells']} cells"),
    ):
        for label, names in classes[what].items():
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            parts.append(f"{heading}, of {label}: {', '.join(names[:NAMES_SHOWN])}{more}.")
    return "\n\n".join(parts) or "Every gene of the file took part."


def _mistaken(table: pd.DataFrame, run: GeneRun) -> Section:
    title = "Genes taken for another class"
    wrong = table[table["true_class"] != table["predicted_class"]]
    if wrong.empty:
        return Section(title, "None.")
    odds = wrong[[f"probability_{label}" for label in run.labels]].to_numpy().max(axis=1)
    shown = wrong.assign(probability=odds).iloc[np.argsort(-odds, kind="stable")].head(GENES_SHOWN)
    same = (table["gene"] == table["symbol"]).all()
    columns = ["symbol", "fold", "cells", "frequency", "mean_rank", "true_class", "predicted_class", "probability"]
    which = f"The {len(shown)} surest of {len(wrong):,}" if len(shown) < len(wrong) else f"All {len(wrong):,}"
    caption = f"{which}, the surest first; genes.csv beside this page holds every gene"
    headings = {name: name.replace("_", " ") for name in columns}
    return Section(
        title, table=Table(shown[[*columns[:1], *([] if same else ["gene"]), *columns[1:]]], caption, headings)
    )


def _facts(run: GeneRun) -> pd.DataFrame:
    facts = {name: run.plan[name] for name in FACTS if run.plan.get(name) not in (None, {}, [])}
    if isinstance(options := facts.pop("options", None), dict):
        facts |= options
    facts["code"] = run.code_revision
    return pd.DataFrame({"what": list(facts), "value": [str(value) for value in facts.values()]})
