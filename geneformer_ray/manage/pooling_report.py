"""The pooling study as it is read: tables, figure, and one or two sentences that claim no more than the numbers do."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from geneformer_ray.data import storage
from geneformer_ray.manage.pooling_plot import pooling_study_figure
from geneformer_ray.manage.pooling_study import BASELINE

if TYPE_CHECKING:
    import pandas as pd

    from geneformer_ray.manage.pooling_study import Findings

__all__ = ["markdown", "reading", "summarise", "write_findings"]

METRICS = {"macro_f1": "macro F1", "accuracy": "accuracy"}
MINUS = "\N{MINUS SIGN}"
DOTS_PER_INCH = 200


def write_findings(findings: Findings, output: str) -> dict[str, str]:
    """Write ``pooling_study.csv``, ``pooling_differences.csv`` and ``pooling_study.png``; give their paths by name."""
    picture = io.BytesIO()
    # Without the software's name and version, the same figure is the same file.
    pooling_study_figure(findings).savefig(picture, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    files = {
        "pooling_study.csv": findings.scores.to_csv(index=False).encode(),
        "pooling_differences.csv": findings.differences.to_csv(index=False).encode(),
        "pooling_study.png": picture.getvalue(),
    }
    for name, content in files.items():
        storage.write_bytes(storage.join(output, name), content)
    return {name: storage.join(output, name) for name in files}


def summarise(findings: Findings) -> dict[str, Any]:
    """Give the reporting cells' scores of every pooling and of the baseline as plain numbers, and their reading."""
    scores = _reporting(findings.scores)
    poolings: dict[str, dict[str, Any]] = {}
    for row in scores.to_dict("records"):
        # JSON has no NaN: the spread of a single trial is none.
        values = {name: None if row[name] != row[name] else row[name] for name in ("mean", "sd", "ci_low", "ci_high")}
        rounded = {name: value if value is None else round(value, 4) for name, value in values.items()}
        poolings.setdefault(row["pooling"], {})[row["metric"]] = rounded | {"n": row["n"]}
    baseline = {metric: round(_row(scores, metric=metric)["baseline"], 4) for metric in METRICS}
    return {"reading": reading(findings.differences), "pooling": poolings, "baseline": baseline}


def reading(differences: pd.DataFrame, metric: str = "macro_f1") -> str:
    """Word the differences on the reporting cells: who is above whom by how much, and who cannot be told apart."""
    chosen = differences[(differences["metric"] == metric) & (differences["role"] == "reporting")]
    rows: list[dict[str, Any]] = chosen.to_dict("records")  # type: ignore[assignment]
    poolings = "; ".join(_pair(row) for row in rows if row["other"] != BASELINE)
    baseline = "; ".join(_pair(row) for row in rows if row["other"] == BASELINE)
    first = f"In {METRICS[metric]} on the reporting cells, {poolings}." if poolings else ""
    return f"{first} Beside PCA + logistic regression, {baseline}.".strip()


def _pair(row: dict[str, Any]) -> str:
    one, other = row["pooling"], row["other"]
    mean, low, high = row["mean"], row["ci_low"], row["ci_high"]
    if not row["told_apart"]:
        why = ", and seeds disagree" if low > 0 or high < 0 else ""
        by = f"{_signed(mean)}, {_signed(low)} to {_signed(high)}{why}"
        return f"{one} and {_name(other)} cannot be told apart ({by})"
    if mean < 0 and other != BASELINE:
        one, other, mean, low, high = other, one, -mean, -high, -low
    if mean < 0:
        return f"{one} is {-mean:.3f} ({-high:.3f} to {-low:.3f}) below {_name(other)}"
    return f"{one} is {mean:.3f} ({low:.3f} to {high:.3f}) above {_name(other)}"


def _name(other: str) -> str:
    return f"the {other}" if other == BASELINE else other


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", MINUS)


def markdown(findings: Findings) -> str:
    """Lay out scores and paired differences of the reporting cells as two Markdown tables."""
    scores = _reporting(findings.scores)
    seeds, folds = findings.trials["seed"].nunique(), findings.trials["fold"].nunique()
    over = f"{seeds} seeds" + (f" and {folds} folds" if folds else "")
    lines = [
        f"Reporting cells: mean ± sd over {over} (95 % interval over cells)",
        "",
        "| pooling | macro F1 | accuracy |",
        "|---|---|---|",
    ]
    for pooling in dict.fromkeys(scores["pooling"]):
        cells = [_score(_row(scores, pooling=pooling, metric=metric)) for metric in METRICS]
        lines.append(f"| {pooling} | {' | '.join(cells)} |")
    baseline = [f"{_row(scores, metric=metric)['baseline']:.3f}" for metric in METRICS]
    lines += [f"| {BASELINE} (PCA + logistic regression) | {' | '.join(baseline)} |", ""]
    lines += ["| paired difference | macro F1 | accuracy |", "|---|---|---|"]
    differences = _reporting(findings.differences)
    for pooling, other in dict.fromkeys(zip(differences["pooling"], differences["other"], strict=True)):
        cells = [_difference(_row(differences, pooling=pooling, other=other, metric=metric)) for metric in METRICS]
        lines.append(f"| {pooling} {MINUS} {other} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "\\* told apart: the interval leaves out 0 and every seed has the same sign"])


def _reporting(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["role"] == "reporting") & table["metric"].isin(METRICS)]


def _row(table: pd.DataFrame, **values: str) -> dict[str, Any]:
    for column, value in values.items():
        table = table[table[column] == value]
    return {str(name): value for name, value in table.iloc[0].items()}


def _score(row: dict[str, Any]) -> str:
    spread = f" ± {row['sd']:.3f}" if row["n"] > 1 else ""
    return f"{row['mean']:.3f}{spread} ({row['ci_low']:.3f} to {row['ci_high']:.3f})"


def _difference(row: dict[str, Any]) -> str:
    spread = f" ± {row['sd']:.3f}" if row["n"] > 1 else ""
    star = "\\*" if row["told_apart"] else ""
    return f"{_signed(row['mean'])}{spread} ({_signed(row['ci_low'])} to {_signed(row['ci_high'])}){star}"
