"""The OpenAPI document against the application: whatever it allows or forbids, answers are those it describes."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from fastapi import FastAPI
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_schema_conformance,
    status_code_conformance,
)

from geneformer_ray.data.vocabulary import GeneVocabulary
from serve.api import create_api
from serve.keys import ApiKeys
from serve.metrics import NoMetrics
from serve.settings import ServeSettings
from tests.unit.served import Direct, make_multitask, serve_directory

pytestmark = pytest.mark.integration

KEY = "a-key-of-this-test-0123456789"
HEADERS = {"Authorization": f"Bearer {KEY}"}
MODEL = "islets"
EXAMPLES = 20
# It has no screen to show, and no versions.
WITHOUT_ANSWER = {"/v1/screen"} | {f"/v2/models/{{name}}/versions/{{number}}{end}" for end in ("", "/ready", "/infer")}
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    ignored_auth,
]


@pytest.fixture(scope="module")
def api(
    model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FastAPI, Counter[tuple[str, int]]]:
    """An application that asks for a key, and how often each route gave each status."""
    directory = tmp_path_factory.mktemp("openapi") / MODEL
    make_multitask(model_directory, vocabulary, directory)  # its answers have all that those of one task have, and more
    settings = ServeSettings(max_cells=4, max_genes=64, max_candidate_genes=4, max_body_bytes=65_536)
    statuses: Counter[tuple[str, int]] = Counter()

    class Statuses(NoMetrics):
        def request(self, route: str, status: int, seconds: float) -> None:
            statuses[route, status] += 1

    return create_api(Direct(serve_directory(directory), settings), keys=ApiKeys(KEY), metrics=Statuses()), statuses


def known(document: dict[str, Any], vocabulary: GeneVocabulary) -> dict[str, Any]:
    """Narrow the document to what this model knows: among arbitrary names of genes none would ever be answered."""
    document = copy.deepcopy(document)
    for methods in document["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path" and parameter["name"] == "name":
                    parameter["schema"] = {"enum": [MODEL]}
    gene = {"enum": vocabulary.genes[:9]}
    ids = {"type": "array", "items": {"enum": list(range(2, 12))}, "uniqueItems": True, "minItems": 1, "maxItems": 9}
    counts = {
        "type": "object",
        "propertyNames": gene,
        "additionalProperties": {"type": "integer", "minimum": 1, "maximum": 9},
        "minProperties": 1,
    }
    schemas = document["components"]["schemas"]
    for name in ("Cell", "ListedCell"):
        schemas[name] = {
            "oneOf": [
                {"type": "object", "properties": {kind: of}, "required": [kind], "additionalProperties": False}
                for kind, of in (("counts", counts), ("input_ids", ids))
            ]
        }
    for name in ("ClassifyRequest", "EmbedRequest"):
        schemas[name]["properties"]["cells"]["maxItems"] = 4
        del schemas[name]["properties"]["genes"]
    schemas["EmbedRequest"]["properties"]["embedding"] = {"enum": ["mean"]}
    schemas["PerturbRequest"]["properties"] |= {
        "genes": {"type": "array", "items": gene, "minItems": 1, "maxItems": 4},
        "rank_shift": {"type": "null"},
        "goal": {"type": "null"},
    }
    schemas["InputTensor"]["properties"] |= {
        "name": {"enum": ["input_ids"]},
        "datatype": {"enum": ["INT64"]},
        "shape": {"enum": [[1, 2]]},
        "data": ids | {"minItems": 2, "maxItems": 2},
    }
    schemas["InferRequest"]["properties"] |= {"outputs": {"type": "null"}}
    schemas["InferRequest"]["properties"]["inputs"]["maxItems"] = 1
    return document


@pytest.mark.parametrize("requests", ["allowed", "forbidden", "known"])
def test_answers_are_those_of_the_document(
    api: tuple[FastAPI, Counter[tuple[str, int]]], vocabulary: GeneVocabulary, requests: str
) -> None:
    """Requests as the document allows them, as it does not, and such as this model can answer."""
    application, statuses = api
    content = application.openapi()
    document = schemathesis.openapi.from_dict(known(content, vocabulary) if requests == "known" else content)
    document.app = application
    mode = schemathesis.GenerationMode.NEGATIVE if requests == "forbidden" else schemathesis.GenerationMode.POSITIVE
    operations = [result.ok() for result in document.get_all_operations()]
    assert {"/v1/classify", "/v1/perturb", "/v2/health/live"} <= {operation.path for operation in operations}
    statuses.clear()
    faults = {}
    for operation in operations:

        @hypothesis.settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=HEADERS, checks=CHECKS)

        try:
            ask()
        except hypothesis.errors.Unsatisfiable:  # nothing about it can be wrong
            assert requests == "forbidden", operation.label
        except FailureGroup as error:
            faults[operation.label] = str(error)
    assert not faults, "\n\n".join(f"{label}: {fault}" for label, fault in faults.items())
    if requests == "known":
        unanswered = {operation.path for operation in operations} - {
            route for route, status in statuses if status == 200
        }
        assert unanswered <= WITHOUT_ANSWER, statuses


def test_a_fault_of_the_document_would_be_found(api: tuple[FastAPI, Counter[tuple[str, int]]]) -> None:
    """The same checks, with a document that leaves out a status and calls a number text."""
    application, _ = api
    content = copy.deepcopy(application.openapi())
    del content["paths"]["/v1/classify"]["post"]["responses"]["422"]
    content["components"]["schemas"]["ModelAnswer"]["properties"]["max_length"] = {"type": "string"}
    document = schemathesis.openapi.from_dict(content)
    document.app = application
    for method, path, body in (("POST", "/v1/classify", {"cells": []}), ("GET", "/v1/model", None)):
        options = {"body": body, "media_type": "application/json"} if body else {}
        case = document[path][method].Case(**options)
        with pytest.raises(FailureGroup):
            case.call_and_validate(headers=HEADERS, checks=CHECKS)
