"""The routes without Ray or a socket: every way of giving a cell gets the answer that the library gives offline."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from geneformer_ray.compute.embedding import cell_embeddings
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.perturbation import PERTURBATIONS, PerturbationPlan
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.shifts import CellShifts, shift_cell
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.vocabulary import GeneVocabulary
from serve.model import ServedModel
from serve.settings import ServeSettings
from tests.unit.served import EXECUTION, LABELS, Direct, ask, make_islets, offline_odds, serve_directory

CELL = {"counts": {"GENE01": 3, "GENE02": 9}}
# One count is so small beside the other that its share of the total is none.
VANISHING = {"counts": {"GENE01": 5e-324, "GENE02": 9e15}, "allow_non_integer": True}
PERTURB = {"cell": CELL, "genes": ["GENE01"]}


@pytest.fixture(scope="module")
def directory(model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "islets"
    make_islets(model_directory, vocabulary, path)
    return path


@pytest.fixture(scope="module")
def served(directory: Path) -> ServedModel:
    return serve_directory(directory)


@pytest.fixture(scope="module")
def service(served: ServedModel) -> Direct:
    limits = {"max_cells": 3, "max_genes": 50, "max_candidate_genes": 8, "max_body_bytes": 8192, "batch_tokens": 16}
    return Direct(served, ServeSettings(**limits))


@pytest.fixture(scope="module")
def encoder(directory: Path) -> Encoder:
    return Encoder.load(directory, layer=-1, execution=EXECUTION)


def ids_of(vocabulary: GeneVocabulary, genes: list[str], counts: list[float]) -> np.ndarray:
    """Encode a cell offline: a row of a matrix with a column for each gene."""
    row = sparse.csr_array(np.array([counts], dtype=float))
    return RankValueEncoder(vocabulary, genes).encode(row, row.sum(axis=1)).cell(0)


def answer(service: Direct, path: str, body: dict[str, Any]) -> Any:
    found = ask(service, "POST", f"/v1/{path}", json=body)
    assert found.status_code == 200, found.text
    return found.json()


def odds_of(cell: dict[str, Any]) -> list[float]:
    found = {one["label"]: one["probability"] for one in cell["top"]}
    return [found[label] for label in LABELS]


# ---------------------------------------------------------------------- cells


@st.composite
def count_rows(draw: st.DrawFn) -> tuple[list[str], list[list[int]]]:
    """Some genes, known ones and unknown ones, and up to three cells that express at least one known gene."""
    known = draw(st.lists(st.integers(0, 39), min_size=1, max_size=20, unique=True))
    genes = [f"GENE{number:02d}" for number in known] + [f"NOSUCH{i}" for i in range(draw(st.integers(0, 3)))]
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.lists(st.integers(0, 60), min_size=len(genes), max_size=len(genes)))
        row[draw(st.integers(0, len(known) - 1))] += 1
        rows.append(row)
    order = draw(st.permutations(range(len(genes))))
    return [genes[i] for i in order], [[row[i] for i in order] for row in rows]


@settings(max_examples=25)
@given(given_counts=count_rows())
def test_every_way_of_giving_a_cell_gets_the_offline_answer(
    service: Direct,
    directory: Path,
    vocabulary: GeneVocabulary,
    encoder: Encoder,
    given_counts: tuple[list[str], list[list[int]]],
) -> None:
    genes, rows = given_counts
    sequences = [ids_of(vocabulary, genes, row) for row in rows]
    unknown = [np.mean([gene.startswith("NO") for gene, n in zip(genes, row, strict=True) if n]) for row in rows]
    places = [list(np.flatnonzero(row)[::-1]) for row in rows]
    ways: dict[str, dict[str, Any]] = {
        "names": {"cells": [{"counts": dict(zip(genes, row, strict=True))} for row in rows]},
        "sparse": {
            "genes": genes,
            "cells": [
                {"indices": [int(i) for i in at], "values": [row[i] for i in at]}
                for at, row in zip(places, rows, strict=True)
            ],
        },
        "dense": {"genes": genes, "cells": [{"values": row} for row in rows]},
        "tokens": {"cells": [{"input_ids": ids.tolist()} for ids in sequences]},
    }
    offline = offline_odds(directory, vocabulary, sequences)
    embeddings = cell_embeddings(encoder, sequences, vocabulary)
    for way, body in ways.items():
        found = answer(service, "classify", body | {"top": len(LABELS), "return_input_ids": True})["cells"]
        assert [cell["input_ids"] for cell in found] == [ids.tolist() for ids in sequences], way
        np.testing.assert_allclose([odds_of(cell) for cell in found], offline, atol=1e-5)
        shares = [0] * len(rows) if way == "tokens" else unknown
        np.testing.assert_allclose([cell["unknown_share"] for cell in found], shares)
        embedded = answer(service, "embed", body)
        assert (embedded["embedding"], embedded["layer"]) == ("mean", -1)
        vectors = [cell["embedding"] for cell in embedded["cells"]]
        np.testing.assert_allclose(vectors, embeddings, atol=1e-5)


def test_kinds_of_cells_mix_in_one_request(service: Direct, directory: Path, vocabulary: GeneVocabulary) -> None:
    genes = ["GENE07", "GENE03", "GENE21"]
    cells = [
        {"values": [4, 0, 9], "cell_id": "c"},
        {"input_ids": [9, 4, 21]},
        {"counts": {"GENE03": 5, "gene09": 2}},
    ]
    found = answer(service, "classify", {"cells": cells, "genes": genes, "top": 4})
    sequences = [
        ids_of(vocabulary, genes, [4, 0, 9]),
        np.array([9, 4, 21]),
        ids_of(vocabulary, ["GENE03", "GENE09"], [5, 2]),
    ]
    assert [cell["cell_id"] for cell in found["cells"]] == ["c", "1", "2"]
    offline = offline_odds(directory, vocabulary, sequences)
    np.testing.assert_allclose([odds_of(cell) for cell in found["cells"]], offline, atol=1e-5)
    assert found["cells"][0]["input_ids"] is None
    assert found["model"] == {"name": "islets", "version": None, "digest": service.model.digest}


def test_a_list_of_genes_is_looked_up_once(service: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[int] = []
    match = GeneVocabulary.match

    def counted(vocabulary: GeneVocabulary, names: Any) -> Any:
        looked_up.append(len(names))
        return match(vocabulary, names)

    monkeypatch.setattr(GeneVocabulary, "match", counted)
    listed = {"genes": ["GENE07", "GENE03", "GENE33"], "cells": [{"values": [1, 2, 0]}] * 3}
    assert answer(service, "classify", listed) == answer(service, "classify", listed)
    answer(service, "classify", {"cells": [CELL, CELL, CELL]})
    assert looked_up == [3, 2]
    monkeypatch.undo()
    again = answer(service, "classify", listed | {"genes": ["GENE03", "GENE07", "GENE33"]})  # the same in another order
    assert again != answer(service, "classify", listed)


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("classify", {}, 422, "cells"),
        ("classify", {"cells": []}, 422, "cells"),
        ("classify", {"cells": [{}]}, 422, "cells[0]"),
        ("classify", {"cells": [CELL | {"input_ids": [3]}]}, 422, "cells[0]"),
        ("classify", {"cells": [CELL | {"values": [3]}]}, 422, "cells[0]"),
        ("classify", {"cells": [{"indices": [1]}]}, 422, "cells[0]"),
        ("classify", {"cells": [CELL | {"indices": [1]}]}, 422, "cells[0]"),
        ("classify", {"cells": [CELL], "tops": 3}, 422, "tops"),
        ("classify", {"cells": [CELL], "top": 0}, 422, "top"),
        ("classify", {"cells": [CELL], "top": "3"}, 422, "top"),
        ("classify", {"cells": [{"counts": {"GENE01": -1}}]}, 422, "cells[0].counts.GENE01"),
        ("classify", {"cells": [{"counts": {"GENE01": "3"}}]}, 422, "cells[0].counts.GENE01"),
        ("classify", {"cells": [{"counts": {"GENE01": True}}]}, 422, "cells[0].counts.GENE01"),
        ("classify", {"cells": [{"counts": {"GENE01": 1e300}}]}, 422, "cells[0].counts.GENE01"),
        ("classify", {"cells": [{"counts": {"GENE01": 0.5}}]}, 422, "cells[0].counts"),
        ("classify", {"cells": [{"counts": {}}]}, 422, "cells[0].counts"),
        ("classify", {"cells": [CELL, {"counts": {"NOSUCH": 1}}]}, 422, "cells[1].counts"),
        ("classify", {"cells": [{"counts": {"NOSUCH": 1}}]}, 422, "cells[0].counts"),
        ("classify", {"cells": [CELL | {"total": 0}]}, 422, "cells[0].total"),
        ("classify", {"cells": [CELL | {"total": 11}]}, 422, "cells[0].counts"),
        ("classify", {"cells": [CELL, VANISHING]}, 422, "cells[1].counts"),
        ("classify", {"cells": [{"input_ids": [3, -1]}]}, 422, "cells[0].input_ids[1]"),
        ("classify", {"cells": [{"input_ids": [3.5]}]}, 422, "cells[0].input_ids[0]"),
        ("classify", {"cells": [{"input_ids": [3, 4], "total": 5}]}, 422, "cells[0]"),
        ("classify", {"cells": [{"input_ids": [3, 400]}]}, 422, "cells[0].input_ids"),
        ("classify", {"cells": [{"input_ids": []}]}, 422, "cells[0].input_ids"),
        ("classify", {"cells": [CELL], "genes": ["GENE01"]}, 422, "genes"),
        ("classify", {"cells": [CELL, {"values": [1]}]}, 422, "genes"),
        ("classify", {"cells": [{"values": [1]}], "genes": ["NOSUCH"]}, 422, "genes"),
        ("classify", {"cells": [{"values": [1]}], "genes": []}, 422, "genes"),
        ("classify", {"cells": [{"values": [1]}], "genes": ["GENE01", ""]}, 422, "genes[1]"),
        ("classify", {"cells": [CELL, {"values": [1]}], "genes": ["GENE01", "GENE02"]}, 422, "cells[1].values"),
        ("classify", {"cells": [{"values": [1], "indices": [0, 1]}], "genes": ["GENE01"]}, 422, "cells[0].values"),
        ("classify", {"cells": [{"values": [1], "indices": [1]}], "genes": ["GENE01"]}, 422, "cells[0].indices[0]"),
        ("classify", {"cells": [{"values": [1], "indices": [-1]}], "genes": ["GENE01"]}, 422, "cells[0].indices[0]"),
        (
            "classify",
            {"cells": [{"values": [1, 1], "indices": [0, 0]}], "genes": ["GENE01"]},
            422,
            "cells[0].indices[1]",
        ),
        ("classify", {"cells": [{"values": [0.5]}], "genes": ["GENE01"]}, 422, "cells[0].values"),
        ("classify", {"cells": [{"values": [0]}], "genes": ["GENE01"]}, 422, "cells[0].values"),
        ("classify", {"cells": [CELL] * 4}, 413, "cells"),
        ("classify", {"cells": [{"input_ids": list(range(2, 54))}]}, 413, "cells[0].input_ids"),
        ("classify", {"cells": [{"counts": {f"G{i}": 1 for i in range(51)}}]}, 413, "cells[0].counts"),
        ("classify", {"cells": [{"values": [1] * 51}], "genes": ["GENE01"] * 51}, 413, "genes"),
        ("classify", {"cells": [{"counts": {"G" * 90: 1} | {"x" * 9000: 1}}]}, 413, "body"),
        ("embed", {"cells": [CELL], "embedding": "cls"}, 422, "embedding"),
        ("embed", {"cells": [CELL], "embedding": "gene"}, 422, "embedding"),
        ("embed", {"cells": [CELL], "top": 3}, 422, "top"),
        ("perturb", {"cell": CELL, "genes": []}, 422, "genes"),
        ("perturb", {"cell": CELL, "genes": ["GENE0X"]}, 422, "genes[0]"),
        ("perturb", {"cell": {"values": [3]}, "genes": ["GENE01"]}, 422, "cell.values"),
        ("perturb", {"cell": {"counts": {"NOSUCH": 3}}, "genes": ["GENE01"]}, 422, "cell.counts"),
        ("perturb", PERTURB | {"rank_shift": 2}, 422, "rank_shift"),
        ("perturb", PERTURB | {"perturbation": "inhibit", "rank_shift": 4}, 422, "rank_shift"),
        ("perturb", PERTURB | {"perturbation": "knit"}, 422, "perturbation"),
        ("perturb", PERTURB | {"goal": "gamma"}, 422, "goal"),
        ("perturb", PERTURB | {"affected_genes": 51}, 422, "affected_genes"),
        ("perturb", PERTURB | {"start": "alpha"}, 422, "start"),
        ("perturb", {"cell": CELL, "genes": list("ABCDEFGHI")}, 413, "genes"),
    ],
)
def test_bad_bodies_are_refused_with_the_field(
    service: Direct, path: str, body: dict[str, Any], status: int, field: str
) -> None:
    found = ask(service, "POST", f"/v1/{path}", json=body)
    error = found.json()["error"]
    assert (found.status_code, error["field"]) == (status, field), found.text
    assert set(error) == {"field", "got", "takes"}
    assert all(error.values())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"cells": [{"counts": {"GENE01": NaN}}]}', b'{"cells": [{"counts": {"\\ud800": 1}}]}'],
)
def test_hostile_bodies_are_refused(service: Direct, content: bytes) -> None:
    found = ask(service, "POST", "/v1/classify", content=content, headers={"content-type": "application/json"})
    assert found.status_code == 422, found.text
    assert set(found.json()["error"]) == {"field", "got", "takes"}


def test_query_parameters_with_json_are_refused(service: Direct) -> None:
    found = ask(service, "POST", "/v1/classify?top=2", json={"cells": [CELL]})
    assert (found.status_code, found.json()["error"]["field"]) == (422, "query.top"), found.text


def test_a_cls_model_gives_both_embeddings(
    special_model_directory: Path, special_vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    own = make_islets(special_model_directory, special_vocabulary, tmp_path / "model", "cls")
    service = Direct(serve_directory(tmp_path / "model"), ServeSettings())
    encoder = Encoder.load(tmp_path / "model", layer=-1, execution=EXECUTION)
    ids = np.array([2, 9, 14, 30, 7, 3])
    for kind in ("mean", "cls"):
        found = answer(service, "embed", {"cells": [{"input_ids": ids.tolist()}], "embedding": kind})
        offline = cell_embeddings(encoder, [ids], own, embedding=kind)
        np.testing.assert_allclose(found["cells"][0]["embedding"], offline[0], atol=1e-5)
    without = ask(service, "POST", "/v1/embed", json={"cells": [{"input_ids": [9, 14]}]})
    assert (without.status_code, without.json()["error"]["field"]) == (422, "cells[0].input_ids")


# ---------------------------------------------------------------------- perturbations


def offline_shifts(
    encoder: Encoder, served: ServedModel, ids: np.ndarray, plan: PerturbationPlan
) -> tuple[CellShifts, CellShifts]:
    """Measure as the screen does: once without states, once with them, each in a run of its own."""
    similar = shift_cell(encoder, ids, plan, Reading(gene_shifts=True), served.vocabulary)
    return similar, shift_cell(encoder, ids, plan, Reading(states=served.states), served.vocabulary)


NAMES = [f"GENE{number:02d}" for number in (21, 9, 4, 30, 17, 2)]


@pytest.mark.parametrize("goal", [None, "beta"])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_every_perturbation_is_that_of_the_screen(
    service: Direct, served: ServedModel, encoder: Encoder, perturbation: str, goal: str | None
) -> None:
    """GENE39 is not in the cell: only overexpression has an event for it."""
    ids = np.array([served.vocabulary.tokens[name] for name in NAMES], dtype=np.int32)
    asked = [*NAMES[:4], "GENE39", NAMES[0].lower()]
    body = {"cell": {"input_ids": ids.tolist(), "cell_id": "c"}, "genes": asked, "perturbation": perturbation}
    body |= {"affected_genes": 3} | ({} if goal is None else {"goal": goal})
    shift = 2 if perturbation in ("inhibit", "activate") else None
    found = answer(service, "perturb", body | ({} if shift is None else {"rank_shift": shift}))
    tokens = tuple(served.vocabulary.tokens[name] for name in asked[:5])
    plan = PerturbationPlan(perturbation, tokens, rank_shift=shift or 1)
    similar, shifted = offline_shifts(encoder, served, ids, plan)
    ranked_by = similar.values_ES[:, 0] if goal is None else -shifted.values_ES[:, list(served.states).index(goal)]
    order = np.argsort(ranked_by, kind="stable")
    names = served.vocabulary.names
    assert [event["genes"] for event in found["events"]] == [[names[similar.genes[i][0]]] for i in order]
    for event, i in zip(found["events"], order, strict=True):
        assert event["similarity"] == pytest.approx(similar.values_ES[i, 0], abs=1e-6)
        assert event["shifts"] == pytest.approx(dict(zip(served.states, shifted.values_ES[i], strict=True)), abs=1e-6)
        genes = {names[token]: value for token, value in zip(similar.affected[i], similar.gene_values[i], strict=True)}
        most = sorted(genes, key=genes.__getitem__)[:3]
        assert [one["gene"] for one in event["affected_genes"]] == most
        assert [one["similarity"] for one in event["affected_genes"]] == pytest.approx(
            [genes[gene] for gene in most], abs=1e-6
        )
    assert (found["cell_id"], found["goal"]) == ("c", goal)
    missing = [] if perturbation == "overexpress" else [{"genes": ["GENE39"], "reason": "not expressed in the cell"}]
    assert found["skipped"] == missing


def test_probabilities_change_as_the_perturbed_cells_say(
    service: Direct, directory: Path, vocabulary: GeneVocabulary
) -> None:
    ids = np.array([9, 4, 21, 30], dtype=np.int32)
    genes = [vocabulary.names[token] for token in ids]
    found = answer(service, "perturb", {"cell": {"input_ids": ids.tolist()}, "genes": genes})
    before, *after = offline_odds(directory, vocabulary, [ids, *(ids[ids != token] for token in ids)])
    assert found["probabilities"] == pytest.approx(dict(zip(LABELS, before, strict=True)), abs=1e-5)
    for event in found["events"]:
        change = after[genes.index(event["genes"][0])] - before
        assert event["probability_change"] == pytest.approx(dict(zip(LABELS, change, strict=True)), abs=1e-5)


@pytest.mark.parametrize("together", [False, True])
def test_answers_do_not_depend_on_the_pieces(served: ServedModel, together: bool) -> None:
    body = {
        "cell": {"input_ids": [9, 4, 21, 30, 17, 2, 6, 11]},
        "genes": [served.vocabulary.names[token] for token in (21, 9, 30, 2, 6)],
        "together": together,
        "affected_genes": 50,
        "goal": "alpha",
    }
    found = []
    for tokens in (8, 24, 4096):
        service = Direct(served, ServeSettings(batch_tokens=tokens))
        found.append(answer(service, "perturb", body))
        assert service.turns == (1 if together else {8: 5, 24: 2, 4096: 1}[tokens])
    for other in found[1:]:
        for one, same in zip(found[0]["events"], other["events"], strict=True):
            assert one["genes"] == same["genes"]
            for part in ("similarity", "shifts", "probability_change"):
                assert one[part] == pytest.approx(same[part], abs=1e-6)
            assert [gene["gene"] for gene in one["affected_genes"]] == [gene["gene"] for gene in same["affected_genes"]]
            assert len(one["affected_genes"]) == (3 if together else 7)


def test_genes_that_make_no_event_are_named(service: Direct) -> None:
    cell = {"input_ids": [9, 4]}
    names = [service.model.vocabulary.names[token] for token in (9, 21)]
    joint = answer(service, "perturb", {"cell": cell, "genes": names, "together": True})
    assert joint["events"] == []
    assert joint["skipped"] == [
        {"genes": [names[1]], "reason": "not expressed in the cell, so there is no joint event"}
    ]
    only = answer(service, "perturb", {"cell": {"input_ids": [9]}, "genes": [names[0]]})
    assert (only["events"], only["skipped"]) == ([], [{"genes": [names[0]], "reason": "leaves no gene to compare"}])
    nearest = ask(service, "POST", "/v1/perturb", json={"cell": cell, "genes": [names[0], "GENE0X"]}).json()["error"]
    assert nearest["field"] == "genes[1]"
    assert "nearest: GENE" in nearest["takes"]


def test_a_model_without_states_gives_similarities(
    model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    make_islets(model_directory, vocabulary, tmp_path / "model")
    (tmp_path / "model" / "states.json").unlink()
    service = Direct(serve_directory(tmp_path / "model"), ServeSettings())
    (event,) = answer(service, "perturb", PERTURB)["events"]
    assert event["shifts"] == {}
    assert -1 <= event["similarity"] < 1
    refused = ask(service, "POST", "/v1/perturb", json=PERTURB | {"goal": "beta"})
    assert "no states" in refused.json()["error"]["takes"]


def test_too_many_genes_are_told_the_screen_that_takes_them(service: Direct, served: ServedModel) -> None:
    """The words are those that the job itself accepts."""
    from ray_jobs.command_line import parse
    from ray_jobs.screen_flags import ScreenConfig

    genes = [*NAMES, "GENE05", "GENE06", "NKX6-1"]
    body = PERTURB | {"genes": genes, "perturbation": "inhibit", "rank_shift": 2, "goal": "beta", "together": True}
    found = ask(service, "POST", "/v1/perturb", json=body)
    takes = found.json()["error"]["takes"]
    assert found.status_code == 413
    words = shlex.split(takes.split("for more: ")[1])
    assert words[:3] == ["python", "-m", "ray_jobs.screen"]
    config = parse(ScreenConfig, words[3:])
    assert (config.perturbation, config.rank_shift, config.together) == ("inhibit", 2, True)
    assert (config.genes, config.goal, config.start) == (",".join(genes), "beta", "STATE")
    assert config.model == service.settings.model
    many = PERTURB | {"genes": [f"ENSG{number:011d}" for number in range(90)]}
    assert "--genes FILE" in ask(service, "POST", "/v1/perturb", json=many).json()["error"]["takes"]


# ---------------------------------------------------------------------- what is served


def test_the_model_says_what_it_takes(service: Direct, served: ServedModel) -> None:
    assert ask(service, "GET", "/v1/model").json() == {
        "name": "islets",
        "version": None,
        "digest": served.digest,
        "pooling": "mean",
        "labels": LABELS,
        "vocabulary_digest": served.vocabulary.digest,
        "encodes_counts": True,
        "max_length": 16,
        "states": ["alpha", "beta"],
        "embeddings": ["mean"],
        "perturbations": ["delete", "overexpress", "inhibit", "activate"],
        "limits": {
            "max_cells": 3,
            "max_genes": 50,
            "max_body_bytes": 8192,
            "max_upload_bytes": 256 * 1024**2,
            "max_upload_cells": 10_000,
            "max_candidate_genes": 8,
            "max_affected_genes": 50,
        },
    }


def test_paths_and_methods_that_are_not_there(service: Direct) -> None:
    missing = ask(service, "GET", "/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["field"]) == (404, "path")
    for path in ("classify", "embed", "perturb"):
        wrong = ask(service, "GET", f"/v1/{path}")
        assert (wrong.status_code, wrong.json()["error"]["field"]) == (405, "method")


def test_a_fault_shows_nothing(service: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(service.model, "logits", broken)
    fault = ask(service, "POST", "/v1/classify", json={"cells": [CELL]})
    assert fault.status_code == 500
    assert "secret" not in fault.text
    assert fault.json()["error"]["field"] == "server"


def test_the_document_says_what_each_route_takes(service: Direct) -> None:
    document = ask(service, "GET", "/openapi.json").json()
    for path, query in (
        ("/v1/classify", {"counts", "gene_column", "allow_non_integer", "top", "return_input_ids"}),
        ("/v1/embed", {"counts", "gene_column", "allow_non_integer", "embedding"}),
    ):
        operation = document["paths"][path]["post"]
        content = operation["requestBody"]["content"]
        assert set(content) == {"application/json", "application/x-hdf5", "application/octet-stream"}
        name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        assert "genes" in document["components"]["schemas"][name]["properties"]
        assert content["application/x-hdf5"]["schema"] == {"type": "string", "format": "binary"}
        assert {parameter["name"] for parameter in operation["parameters"]} == query
        assert all(parameter["in"] == "query" and not parameter["required"] for parameter in operation["parameters"])
    assert set(document["paths"]["/v1/perturb"]["post"]["requestBody"]["content"]) == {"application/json"}


# ---------------------------------------------------------------------- the Open Inference Protocol


def tensor(data: Any, shape: list[int], **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": shape, "data": data} | more]}


def test_health_and_metadata(service: Direct) -> None:
    assert ask(service, "GET", "/v2/health/live").json() == {"live": True}
    assert ask(service, "GET", "/v2/health/ready").json() == {"ready": True}
    server = ask(service, "GET", "/v2").json()
    assert (server["name"], server["extensions"]) == ("geneformer-ray", [])
    assert server["version"] == ask(service, "GET", "/openapi.json").json()["info"]["version"]
    assert ask(service, "GET", "/v2/models/islets").json() == {
        "name": "islets",
        "platform": "pytorch_safetensors",
        "inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(LABELS)]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
        ],
    }
    assert ask(service, "GET", "/v2/models/islets/ready").json() == {"name": "islets", "ready": True}


@pytest.mark.parametrize("nested", [False, True])
def test_inference_gives_the_offline_probabilities(
    service: Direct, directory: Path, vocabulary: GeneVocabulary, nested: bool
) -> None:
    cells, pad = [[9, 4, 21, 30], [11], [7, 6, 5]], vocabulary.pad_id
    rows = [cell + [pad] * (5 - len(cell)) for cell in cells]
    body = tensor(rows if nested else [token for row in rows for token in row], [3, 5]) | {"id": "42"}
    found = ask(service, "POST", "/v2/models/islets/infer", json=body)
    assert found.status_code == 200, found.text
    content = found.json()
    assert (content["model_name"], content["id"]) == ("islets", "42")
    assert content["parameters"] == {"digest": service.model.digest}
    assert "model_version" not in content
    first, second = content["outputs"]
    offline = offline_odds(directory, vocabulary, [np.array(cell) for cell in cells])
    assert (first["name"], first["datatype"], first["shape"]) == ("probabilities", "FP32", [3, len(LABELS)])
    np.testing.assert_allclose(np.reshape(first["data"], first["shape"]), offline, atol=1e-5)
    labels = [LABELS[number] for number in offline.argmax(axis=1)]
    assert second == {"name": "label", "datatype": "BYTES", "shape": [3], "data": labels}
    only = ask(service, "POST", "/v2/models/islets/infer", json=body | {"outputs": [{"name": "label"}]}).json()
    assert only["outputs"] == [second]


def test_versions_are_told_apart(served: ServedModel, service: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    body = tensor([[9, 4]], [1, 2])
    for path in ("versions/1", "versions/1/ready"):
        assert ask(service, "GET", f"/v2/models/islets/{path}").status_code == 404
    monkeypatch.setattr(served, "version", 7)
    assert ask(service, "GET", "/v2/models/islets").json()["versions"] == ["7"]
    assert ask(service, "GET", "/v2/models/islets/versions/7").json()["versions"] == ["7"]
    assert ask(service, "GET", "/v2/models/islets/versions/7/ready").json() == {"name": "islets", "ready": True}
    assert ask(service, "POST", "/v2/models/islets/versions/7/infer", json=body).json()["model_version"] == "7"
    for path in ("islets/versions/8", "islets/versions/07", "other", "other/versions/7"):
        for method, end, content in (("GET", "", None), ("GET", "/ready", None), ("POST", "/infer", body)):
            found = ask(service, method, f"/v2/models/{path}{end}", json=content)
            assert (found.status_code, found.json()["error"]["field"]) == (404, "path"), path + end


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 422, "inputs"),
        ({"inputs": []}, 422, "inputs"),
        (tensor([[9, 4]], [1, 2], name="ids"), 422, "inputs[0].name"),
        (tensor([[9, 4]], [1, 2], datatype="INT32"), 422, "inputs[0].datatype"),
        (tensor([9, 4], [2]), 422, "inputs[0].shape"),
        (tensor([9, 4], [1, 0]), 422, "inputs[0].shape[1]"),
        (tensor([9, 4], [1, 3]), 422, "inputs[0].data"),
        (tensor([[9, 4], [5]], [2, 2]), 422, "inputs[0]"),
        (tensor([[9, 4, 5], [5, 6, 7]], [3, 2]), 422, "inputs[0]"),
        (tensor([9.5, 4], [1, 2]), 422, "inputs[0].data[0]"),
        (tensor([9, True], [1, 2]), 422, "inputs[0].data[1]"),
        (tensor([9, 9], [1, 2]), 422, "inputs[0].data[0]"),
        (tensor([0, 0], [1, 2]), 422, "inputs[0].data[0]"),
        (tensor([0, 9], [1, 2]), 422, "inputs[0].data[0][0]"),
        (tensor([9, 4, 99, 4], [2, 2]), 422, "inputs[0].data[1]"),
        (tensor([-(2**63), 4], [1, 2]), 422, "inputs[0].data[0]"),
        (tensor([9, 2**63], [1, 2]), 422, "inputs[0].data[1]"),
        ({"inputs": tensor([9], [1, 1])["inputs"] * 2}, 422, "inputs"),
        (tensor([9], [1, 1]) | {"outputs": [{"name": "label"}, {"name": "odds"}]}, 422, "outputs[1].name"),
        (tensor([9] * 4, [4, 1]), 413, "inputs[0].shape"),
        (tensor([9] * 51, [1, 51]), 413, "inputs[0].shape"),
    ],
)
def test_wrong_tensors_are_refused_with_the_field(
    service: Direct, body: dict[str, Any], status: int, field: str
) -> None:
    found = ask(service, "POST", "/v2/models/islets/infer", json=body)
    assert (found.status_code, found.json()["error"]["field"]) == (status, field), found.text
    assert json.dumps(found.json())
