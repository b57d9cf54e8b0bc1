"""The ranking of the latest screen and the example cells, over HTTP without a socket."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from geneformer_ray.data import storage
from geneformer_ray.data.shards import write_shard
from geneformer_ray.data.vocabulary import GeneVocabulary
from serve.model import ServedModel
from serve.settings import ServeSettings
from tests.unit.served import Direct, ask, make_islets, serve_directory

SCREEN = {
    "job": "screen", "cells": "aa", "model": "bb", "vocabulary": "cc", "filter": {"cell_type": ["alpha"]},
    "perturbation": "delete", "genes": "/data/secret_genes.txt", "gene_sets": "/data/secret.gmt", "together": False,
    "start": "alpha", "goal": "beta", "alternatives": ["delta"], "embedding": "mean", "layer": -1,
    "state_embeddings": "/data/secret/states.json", "rank_shift": None,
}  # fmt: skip
PLAN = {
    "job": "statistics",
    "screen": SCREEN,
    "other_screen": None,
    "test": "goal_shift",
    "cells": "/data/secret/cells",
}
TABLE = pd.DataFrame(
    {
        "gene": ["ENSG01", "ENSG02", "ENSG03", "ENSG04", "ENSG05"],
        "symbol": ["GCG", "INS", "INSM1", "TTR", "CHGB"],
        "shift_to_beta": [0.5, 0.25, np.nan, -0.5, 0.25],
        "cells": [9, 3, 1, 7, 8],
        "significant": [True, True, False, False, False],
    }
)


def write_ranking(output: Path, table: pd.DataFrame, plan: dict[str, Any] | None = None) -> None:
    """As the statistics job does."""
    plan = plan or PLAN
    storage.claim_output(str(output), plan, overwrite=True)
    write_shard(str(output), "statistics", 0, pa.Table.from_pandas(table, preserve_index=False), vocabulary="cc")
    storage.finish_output(str(output), plan, {"output": str(output)})


@pytest.fixture(scope="module")
def model(model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    directory = tmp_path_factory.mktemp("served") / "islets"
    make_islets(model_directory, vocabulary, directory, "cls")
    return serve_directory(directory)


@pytest.fixture
def service(model: ServedModel, tmp_path: Path) -> Direct:
    write_ranking(tmp_path / "statistics", TABLE)
    settings = ServeSettings.read({"model": str(model.directory), "screen_results": str(tmp_path / "statistics")})
    return Direct(model, settings)


def genes(service: Direct, query: str) -> list[str]:
    answer = ask(service, "GET", f"/v1/screen?{query}")
    assert answer.status_code == 200, answer.text
    return [row["gene"][-1] for row in answer.json()["rows"]]


def test_the_ranking_comes_as_it_was_written(service: Direct) -> None:
    answer = ask(service, "GET", "/v1/screen").json()
    assert answer["columns"] == list(TABLE.columns)
    assert (answer["total"], answer["offset"]) == (5, 0)
    assert answer["rows"] == json.loads(TABLE.to_json(orient="records", double_precision=15))
    assert answer["rows"][2]["shift_to_beta"] is None  # JSON has no NaN


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("sort=shift_to_beta", "42513"),  # equal ones in the ranking's order, what could not be computed last
        ("sort=shift_to_beta&descending=true", "12543"),
        ("sort=symbol", "51234"),
        ("sort=cells&descending=true&limit=2", "15"),
        ("sort=significant&descending=true", "12345"),
        ("sort=significant", "34512"),
        ("offset=3", "45"),
        ("offset=9", ""),
        ("search=ins", "23"),
        ("search=%20ENSG04%20", "4"),
        ("search=nosuch", ""),
        ("search=.", ""),  # text, not a pattern
        ("search=ins&sort=cells", "32"),
        ("search=ins&offset=1", "3"),
    ],
)
def test_rows_are_sorted_searched_and_paged(service: Direct, query: str, expected: str) -> None:
    assert "".join(genes(service, query)) == expected


def test_the_total_is_of_the_search(service: Direct) -> None:
    assert ask(service, "GET", "/v1/screen?search=ins&limit=1").json()["total"] == 2


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("sort=effect", "query.sort"),
        ("descend=true", "query.descend"),
        ("limit=501", "query.limit"),
        ("limit=0", "query.limit"),
        ("offset=-1", "query.offset"),
        (f"search={'x' * 101}", "query.search"),
        ("descending=up", "query.descending"),
    ],
)
def test_a_bad_question_is_refused(service: Direct, query: str, field: str) -> None:
    answer = ask(service, "GET", f"/v1/screen?{query}")
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, field), answer.text


def test_it_says_what_the_screen_was_and_no_path(service: Direct, tmp_path: Path) -> None:
    answer = ask(service, "GET", "/v1/screen")
    about = answer.json()["screen"]
    assert about["test"] == "goal_shift"
    assert (about["screen"]["start"], about["screen"]["goal"], about["screen"]["model"]) == ("alpha", "beta", "bb")
    assert "secret" not in answer.text and str(tmp_path) not in answer.text


def test_a_newer_ranking_is_read_and_an_unfinished_one_is_not_shown(service: Direct) -> None:
    from serve.screen_results import NoScreenError, ScreenQuery, ScreenResults

    output = Path(service.settings.screen_results or "")
    results = ScreenResults(str(output))
    first = results.table()
    assert results.table() is first  # read once
    write_ranking(output, TABLE.iloc[::-1])
    os.utime(output / "_manifest.json", ns=(1, 1))  # a clock that stands still would hide that it is another file
    assert results.table().page(ScreenQuery(limit=1)).rows[0]["gene"] == "ENSG05"
    storage.claim_output(str(output), PLAN, overwrite=True)
    with pytest.raises(NoScreenError, match="being computed"):
        results.table()


@pytest.mark.parametrize(
    ("screen_results", "got"),
    [(None, "without screen_results"), ("nothing", "no ranking yet"), ("other", "another job")],
)
def test_without_a_ranking_the_answer_says_so(
    model: ServedModel, tmp_path: Path, screen_results: str | None, got: str
) -> None:
    write_ranking(tmp_path / "other", TABLE, {"job": "screen"})
    path = None if screen_results is None else str(tmp_path / screen_results)
    settings = ServeSettings.read({"model": str(model.directory), "screen_results": path})
    answer = ask(Direct(model, settings), "GET", "/v1/screen")
    error = answer.json()["error"]
    assert (answer.status_code, error["field"]) == (404, "screen_results")
    assert got in error["got"] and "ray_jobs.statistics" in error["takes"]
    assert str(tmp_path) not in answer.text


# ---------------------------------------------------------------------- genes and examples


def test_the_genes_are_told_by_token_id(service: Direct) -> None:
    answer = ask(service, "GET", "/v1/genes").json()
    assert answer["names"] == service.model.vocabulary.names
    assert answer["symbols"] == [service.model.vocabulary.symbol(name) for name in answer["names"]]


def test_example_cells_are_those_of_the_model(service: Direct, model: ServedModel) -> None:
    file = model.directory / "examples.json"
    assert ask(service, "GET", "/v1/examples").json() == {"cells": []}
    ids = [model.vocabulary.cls_id, 9, 4, 21]
    file.write_text(json.dumps([{"cell_id": "c1", "label": "beta", "input_ids": ids}]))
    try:
        (cell,) = ask(service, "GET", "/v1/examples").json()["cells"]
        names = [model.vocabulary.names[token] for token in ids[1:]]
        assert cell == {"cell_id": "c1", "label": "beta", "input_ids": ids, "genes": names, "symbols": names}
        answer = ask(service, "POST", "/v1/classify", json={"cells": [{"input_ids": cell["input_ids"]}]})
        assert answer.status_code == 200
        file.write_text('[{"cell_id": "c1"}]')
        broken = ask(service, "GET", "/v1/examples")
        assert (broken.status_code, str(model.directory) in broken.text) == (500, False)
    finally:
        file.unlink()
