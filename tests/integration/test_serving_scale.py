"""A replica more comes with the queue."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest
import torch

from geneformer_ray.compute.classifier import new_classifier
from geneformer_ray.data.vocabulary import GeneVocabulary

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CLIENTS = 64


def test_a_second_replica_comes_with_the_queue(
    model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    from ray import serve as ray_serve

    from geneformer_ray.distribute.cluster import connected
    from serve.run import APPLICATION, running
    from serve.settings import ServeSettings

    torch.manual_seed(1)
    classifier, own = new_classifier(model_directory, vocabulary, ["alpha", "beta"], "mean")
    classifier.save(tmp_path / "model", own)
    settings = {"model": str(tmp_path / "model"), "max_replicas": 2, "cache_dir": str(tmp_path / "cache")}

    def replicas() -> int:
        states = ray_serve.status().applications[APPLICATION].deployments["Geneformer"].replica_states
        return int({str(getattr(state, "value", state)): count for state, count in states.items()}.get("RUNNING", 0))

    async def ask(url: str) -> set[int]:
        statuses: set[int] = set()
        end = time.monotonic() + 120
        grown = asyncio.Event()

        async def client() -> None:
            body = {"cells": [{"input_ids": list(range(2, 17))}] * 64}
            async with httpx.AsyncClient(base_url=url, timeout=60) as session:
                while not grown.is_set() and time.monotonic() < end:
                    statuses.add((await session.post("/v1/classify", json=body)).status_code)

        async def look() -> None:
            while time.monotonic() < end and await asyncio.to_thread(replicas) < 2:
                await asyncio.sleep(0.5)
            grown.set()

        await asyncio.gather(look(), *(client() for _ in range(CLIENTS)))
        return statuses

    with connected(cpus=2), running(ServeSettings.read(settings)) as url:
        assert replicas() == 1
        assert asyncio.run(ask(url)) == {200}
        assert replicas() == 2
