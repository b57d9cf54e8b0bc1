"""A client of the service: cells of an AnnData go to a model that runs elsewhere, answers come back into it.

::

    from geneformer_ray.client import Client

    with Client("http://127.0.0.1:8000", api_key=KEY) as client:
        client.classify(adata)                              # obs["predicted_labels"], obs["conf_score"]
        client.embed(adata)                                 # obsm["X_geneformer"]
        table = client.perturb(adata, "cell7", ["GCG", "INS"], goal="beta")

It needs httpx, and what AnnData brings along; neither torch nor Ray.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from geneformer_ray.client_cells import CountRows
from geneformer_ray.client_connection import Connection, ServiceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

__all__ = ["Client", "ServiceError"]

RUNS = 3  # of all cells, where the service got another model in between
EVERY_LABEL = 2**31 - 1  # as many as there are


class Client:
    """Asks one service.

    Parameters
    ----------
    url
        Where it is: ``http://127.0.0.1:8000``.
    api_key
        One of its keys, where it asks for them.
    timeout
        Seconds that one request may take.
    retries
        How often a request is sent again to a service that is busy (429, 503), after the pause that it asks for.
    requests_at_once
        Requests of one call that are under way together.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 8,
        requests_at_once: int = 4,
    ) -> None:
        self._service = Connection(url, api_key, timeout=timeout, retries=retries, at_once=requests_at_once)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._service.close()

    # ------------------------------------------------------------------ asking

    def model(self) -> dict[str, Any]:
        """Say what is being served, and what one request may hold."""
        answer: dict[str, Any] = self._service.ask("GET", "/v1/model")
        return answer

    def classify(
        self,
        adata: AnnData,
        counts: str = "X",
        gene_column: str | None = None,
        key_added: str | None = None,
        *,
        probabilities: bool = False,
        allow_non_integer: bool = False,
    ) -> None:
        """Classify all cells of an AnnData, in place.

        Writes ``obs["predicted_labels"]`` and ``obs["conf_score"]``, as celltypist does, and which model answered into
        ``uns["geneformer_ray"]``. A cell without any count has no label, and NaN as its score.

        Of a model with several tasks that is the first, and each task, the first included, has columns with its name
        behind: ``obs["predicted_labels_TASK"]`` and ``obs["conf_score_TASK"]``.

        Parameters
        ----------
        adata
            Cells x genes.
        counts
            Where its raw counts are: ``X``, ``raw.X`` or ``layers/NAME``.
        gene_column
            Column of var with gene names, or ``index``; by default ``ensembl_id``, ``gene_ids``, the index.
        key_added
            Put in front of the columns' names, with an underscore.
        probabilities
            Also write ``obsm["class_probabilities"]``, a column a label; ``class_probabilities_TASK`` likewise.
        allow_non_integer
            Accept corrected counts.

        Raises
        ------
        InputError
            If the AnnData has no such counts or names.
        ServiceError
            If the service refuses them.
        """
        before = f"{key_added}_" if key_added else ""
        rows = CountRows.of(adata, counts, gene_column, whole=not allow_non_integer)
        options = {"top": EVERY_LABEL if probabilities else 1}
        cells, model, served = self._all_cells("/v1/classify", rows, options, described=probabilities)
        _write_classes(adata, before, "", cells, served["labels"] if probabilities else None)
        for task in next(iter(cells.values()), served).get("tasks", {}):
            answers = {row: cell["tasks"][task] for row, cell in cells.items()}
            labels = served["tasks"][task]["labels"] if probabilities else None
            _write_classes(adata, before, f"_{task}", answers, labels)
        _note(adata, f"{before}predicted_labels", model)

    def embed(
        self,
        adata: AnnData,
        counts: str = "X",
        gene_column: str | None = None,
        key_added: str = "X_geneformer",
        *,
        embedding: str = "mean",
        allow_non_integer: bool = False,
    ) -> None:
        """Embed all cells of an AnnData, in place: ``obsm["X_geneformer"]``, float32; NaN for a cell without any count.

        Parameters
        ----------
        adata, counts, gene_column, allow_non_integer
            As :meth:`classify` takes them.
        key_added
            The name in obsm.
        embedding
            ``mean`` of the genes' hidden states, or ``cls``.
        """
        rows = CountRows.of(adata, counts, gene_column, whole=not allow_non_integer)
        cells, model, _ = self._all_cells("/v1/embed", rows, {"embedding": embedding})
        adata.obsm[key_added] = _vectors(cells, rows.number)
        _note(adata, key_added, {**model, "embedding": embedding})

    def perturb(
        self,
        adata: AnnData,
        cell: str,
        genes: Sequence[str],
        perturbation: str = "delete",
        *,
        rank_shift: int | None = None,
        together: bool = False,
        goal: str | None = None,
        affected_genes: int = 5,
        counts: str = "X",
        gene_column: str | None = None,
        allow_non_integer: bool = False,
    ) -> pd.DataFrame:
        """Perturb genes of one cell; one row an event, in the service's ranking.

        Parameters
        ----------
        adata, counts, gene_column, allow_non_integer
            As :meth:`classify` takes them.
        cell
            Its name in the AnnData.
        genes
            Ensembl ids or symbols; each is one event.
        perturbation, rank_shift
            ``delete``, ``overexpress``, or ``inhibit`` or ``activate`` by quartiles of rank.
        together
            Perturb all genes in one event.
        goal
            Rank by the shift to this state; by default by how far the other genes moved.
        affected_genes
            How many of the most affected genes to give with each event.

        Returns
        -------
        Columns ``gene``, ``symbol`` (several joined with "+"), ``similarity``, ``shift_to_STATE``, ``change_LABEL`` (of
        its probability), ``affected_genes`` (gene -> similarity). In its ``attrs``: ``model``, ``probabilities`` of the
        unperturbed cell, ``skipped`` events with their reasons. Of a model with several tasks, these are the first's,
        and there are ``change_TASK: LABEL`` for each task, and ``tasks`` with each one's ``probabilities``.
        """
        import pandas as pd

        rows = CountRows.of(adata, counts, gene_column, whole=not allow_non_integer)
        body: dict[str, Any] = {
            "cell": rows.named(cell),
            "genes": list(genes),
            "perturbation": perturbation,
            "together": together,
            "affected_genes": affected_genes,
        }
        body |= {name: value for name, value in (("goal", goal), ("rank_shift", rank_shift)) if value is not None}
        answer = self._service.ask("POST", "/v1/perturb", json.dumps(body, allow_nan=False).encode())
        table = pd.DataFrame([_event(event) for event in answer["events"]])
        table.attrs = {name: answer[name] for name in ("model", "probabilities", "skipped", "tasks") if name in answer}
        return table

    # ------------------------------------------------------------------ requests

    def _all_cells(
        self, path: str, rows: CountRows, options: dict[str, Any], *, described: bool = False
    ) -> tuple[dict[int, dict[str, Any]], dict[str, Any], dict[str, Any]]:
        """Ask for all cells that express something: row -> answer, which model gave them, and what was said to serve.

        A service may get another model while it answers. Answers of two are not mixed: all are asked for again. So they
        are where what serves must be `described`, as its labels are, and another one has answered.
        """
        for _ in range(RUNS):
            served = self.model()
            models = [{name: served[name] for name in ("name", "version", "digest")}] if described else []
            cells: dict[int, dict[str, Any]] = {}
            for places, answer in self._service.ask_each(path, rows.bodies(options, served["limits"])):
                cells |= dict(zip(places, answer["cells"], strict=True))
                models.append(answer["model"])
            if all(model == models[0] for model in models):
                return cells, models[0] if models else {}, served
        raise ServiceError(None, "model", f"another one in each of {RUNS} runs", "a service whose model stays")


# ---------------------------------------------------------------------- answers


def _write_classes(
    adata: AnnData, before: str, end: str, cells: Mapping[int, Mapping[str, Any]], labels: list[str] | None
) -> None:
    """Write the answers of one task, between a beginning and an end of the names; with labels all probabilities too."""
    import numpy as np
    import pandas as pd

    names = np.array([None] * adata.n_obs, dtype=object)
    score = np.full(adata.n_obs, np.nan)
    for row, cell in cells.items():
        names[row], score[row] = cell["label"], cell["probability"]
    adata.obs[f"{before}predicted_labels{end}"] = pd.Categorical(names)
    adata.obs[f"{before}conf_score{end}"] = score
    if labels is None:
        return
    place = {label: at for at, label in enumerate(labels)}
    odds = np.full((adata.n_obs, len(labels)), np.nan)
    for row, cell in cells.items():
        for item in cell["top"]:
            odds[row, place[item["label"]]] = item["probability"]
    adata.obsm[f"{before}class_probabilities{end}"] = pd.DataFrame(odds, index=adata.obs_names, columns=labels)


def _vectors(cells: dict[int, dict[str, Any]], number: int) -> NDArray[Any]:
    import numpy as np

    width = len(next(iter(cells.values()))["embedding"]) if cells else 0
    vectors = np.full((number, width), np.nan, dtype=np.float32)
    for row, cell in cells.items():
        vectors[row] = cell["embedding"]
    return vectors


def _event(event: dict[str, Any]) -> dict[str, Any]:
    return {
        "gene": "+".join(event["genes"]),
        "symbol": "+".join(event["symbols"]),
        "similarity": event["similarity"],
        **{f"shift_to_{state}": value for state, value in event["shifts"].items()},
        **{f"change_{label}": value for label, value in event["probability_change"].items()},
        **{
            f"change_{task}: {label}": value
            for task, changes in event.get("tasks", {}).items()
            for label, value in changes["probability_change"].items()
        },
        "affected_genes": {item["gene"]: item["similarity"] for item in event["affected_genes"]},
    }


def _note(adata: AnnData, key: str, model: dict[str, Any]) -> None:
    """Write down which model gave what; a missing version is left out, for h5ad files hold no None."""
    about = adata.uns.setdefault("geneformer_ray", {})
    about[key] = {name: value for name, value in model.items() if value is not None}
