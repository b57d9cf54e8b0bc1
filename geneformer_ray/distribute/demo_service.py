"""The quickstart's questions to the served champion, and whether its answers equal the offline ones."""

from __future__ import annotations

import importlib
import os
from typing import Any

import anndata
import httpx
import numpy as np

from geneformer_ray.compute.model_runner import ModelRunner
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.shifts import shift_cell
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.manage.registry import find_registered
from geneformer_ray.manage.trials import Trial, read_predictions
from geneformer_ray.progress import Progress

__all__ = ["served_answers"]

TOLERANCE = 1e-5
CELLS, CELLS_PER_REQUEST, GENES = 48, 16, 5


def served_answers(output: str, champion: dict[str, Any], seed: int) -> dict[str, Any]:
    """Serve the champion, ask it over HTTP, and compare.

    Parameters
    ----------
    output
        The quickstart's output.
    champion
        The summary of ``promote``.
    seed
        Of the champion's training.

    Returns
    -------
    dict
        ``equal``: whether all answers are within 1e-5 of the offline ones; ``largest_difference``; ``cells`` and
        ``events`` asked for.
    """
    # By its import path, as a Serve configuration names it: the library does not depend on the HTTP edge.
    serving = importlib.import_module("serve.run")
    settings = importlib.import_module("serve.settings").ServeSettings.read(
        {"model": f"models:/{champion['name']}@champion", "tracking_uri": os.environ["MLFLOW_TRACKING_URI"]}
    )
    with serving.running(settings) as url, httpx.Client(base_url=url, timeout=60) as client:
        classified = _classify(client, output, champion, seed)
        perturbed = _perturb(client, output, champion)
    largest = max(*classified, *perturbed)
    return {
        "equal": bool(largest <= TOLERANCE),
        "largest_difference": float(largest),
        "cells": len(classified),
        "events": len(perturbed),
    }


def _classify(client: httpx.Client, output: str, champion: dict[str, Any], seed: int) -> list[float]:
    """Ask for the types of reporting cells, given as raw counts; the largest difference in probability of each."""
    directory = Trial(champion["pooling"], seed).directory(storage.join(output, "classifiers"))
    ids, _, logits = read_predictions(directory, "report")
    labels = storage.read_json(storage.join(output, "classifiers", "split.json"))["labels"]
    odds = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    offline = odds / odds.sum(axis=1, keepdims=True)
    chosen = np.linspace(0, len(ids) - 1, CELLS).astype(int)
    adata = anndata.read_h5ad(storage.join(output, "pancreas.h5ad"))
    differences = []
    with Progress("served cells", len(chosen), "cells") as progress:
        for start in range(0, len(chosen), CELLS_PER_REQUEST):
            part = chosen[start : start + CELLS_PER_REQUEST]
            cells = [{"cell_id": ids[i], "counts": _counts(adata, ids[i])} for i in part]
            answer = _ask(client, "/v1/classify", {"cells": cells, "top": len(labels)})
            for i, cell in zip(part, answer["cells"], strict=True):
                served = {one["label"]: one["probability"] for one in cell["top"]}
                differences.append(max(abs(served[label] - offline[i, n]) for n, label in enumerate(labels)))
            progress.advance(len(part))
    return differences


def _perturb(client: httpx.Client, output: str, champion: dict[str, Any]) -> list[float]:
    """Ask for the effect of deleting genes from one alpha cell; the difference in similarity of each."""
    table = CellTable(storage.join(output, "cells"))
    rows = table.select({"cell_type": ["alpha"], "library": ["lib2"]})[:1]
    runner = ModelRunner(str(find_registered(f"models:/{champion['name']}@champion")))
    cell = table.read(rows)
    sequence = runner.sequences(cell.input_ids, table.vocabulary_digest)[0]
    names = runner.vocabulary.names
    genes = [names[token] for token in cell.input_ids[0][:GENES]]
    plan = PerturbationPlan(genes=tuple(runner.vocabulary.tokens[gene] for gene in genes))
    offline = shift_cell(runner.encoder, sequence, plan, Reading(), runner.vocabulary)
    body = {"cell": {"input_ids": cell.input_ids[0].tolist()}, "perturbation": "delete", "genes": genes}
    served = {event["genes"][0]: event["similarity"] for event in _ask(client, "/v1/perturb", body)["events"]}
    return [
        abs(served[names[int(event[0])]] - float(value))
        for event, value in zip(offline.genes, offline.values_ES[:, 0], strict=True)
    ]


def _counts(adata: anndata.AnnData, cell_id: str) -> dict[str, float]:
    row = adata[cell_id].X
    return {adata.var_names[column]: float(value) for column, value in zip(row.indices, row.data, strict=True)}


def _ask(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(path, json=body)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer
