"""A change of model without a dropped request: the new one is loaded beside the old one, tried, and then takes over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import numpy as np

from geneformer_ray.compute.execution import use_threads
from geneformer_ray.data.task_splits import class_name
from geneformer_ray.errors import InputError, RegistryUnavailable
from serve.found_model import FoundModel, ModelSource
from serve.model import CellVector, ServedModel

__all__ = ["TRY_AGAIN_SECONDS", "ModelWatcher", "check_candidate", "check_computes", "first_model"]

logger = logging.getLogger(__name__)

# A version that was refused is tried again after so many seconds: its files may have been on their way.
TRY_AGAIN_SECONDS = 60.0
SMOKE_LENGTHS = (1, 16, 256)


class ModelWatcher:
    """Looks at the alias, and replaces the model when it has moved.

    Parameters
    ----------
    source
        Where the model comes from.
    open_model
        Loads one.
    serving, replace
        Give the model that serves now, and put another in its place.
    refused
        Told that a version was refused; the log has why.
    cpus
        Threads of the trial.
    """

    def __init__(
        self,
        source: ModelSource,
        open_model: Callable[[FoundModel], ServedModel],
        serving: Callable[[], ServedModel],
        replace: Callable[[ServedModel], None],
        refused: Callable[[], None],
        cpus: float,
    ) -> None:
        self._source, self._open_model = source, open_model
        self._serving, self._replace, self._refuse = serving, replace, refused
        self._cpus = cpus
        self._silent = False
        self._refused: tuple[int, float] | None = None

    async def watch(self, seconds: float) -> None:
        """Look every so many seconds, for as long as the service runs."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.look()
            except Exception:
                # Whatever went wrong here, the model that serves is not concerned, and the next look may do better.
                logger.exception("looking for a new model failed")

    async def look(self) -> None:
        """Look once. What serves goes on whatever comes of it."""
        try:
            version = await asyncio.to_thread(self._source.version)
        except RegistryUnavailable as error:
            if not self._silent:
                logger.warning("%s", error)
            self._silent = True
            return
        self._silent = False
        if version is None or version == self._serving().version:
            return
        if self._refused and self._refused[0] == version and time.monotonic() < self._refused[1]:
            return
        try:
            candidate = await asyncio.to_thread(self._try, version)
        except Exception as error:  # noqa: BLE001  (whatever a broken model raises, it is refused)
            self._refused = (version, time.monotonic() + TRY_AGAIN_SECONDS)
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            logger.error("version %d is refused, version %s serves on: %s", version, self._serving().version, why)
            self._refuse()
            return
        before = self._serving().version
        self._refused = None
        self._replace(candidate)
        logger.warning("version %s replaced version %s", candidate.version, before)

    def _try(self, version: int) -> ServedModel:
        use_threads(self._cpus)
        candidate = self._open_model(self._source.fetch(version))
        check_candidate(candidate, self._serving())
        self._source.serves(version)
        return candidate


def first_model(source: ModelSource, open_model: Callable[[FoundModel], ServedModel]) -> ServedModel:
    """Open the model that a replica starts with.

    Where what is named cannot be had or does not compute, that is what last served on this machine, and the log says
    so: a replica that is started beside others, or anew, serves what they serve.

    Parameters
    ----------
    source
        Where it comes from.
    open_model
        Loads one.

    Raises
    ------
    GeneformerRayError, OSError
        If there is neither.
    """
    try:
        model = open_model(source.find())
        check_computes(model)
    except Exception as error:
        last = source.last_served()
        if last is None:
            raise
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        logger.error("%s cannot be served, version %s, which served last, serves: %s", source.model, last.version, why)
        model = open_model(last)
        check_computes(model)
    source.serves(model.version)
    return model


def check_candidate(candidate: ServedModel, serving: ServedModel) -> None:
    """Check that a model takes what the one that serves takes, and that it computes.

    Raises
    ------
    InputError
        With what is wrong.
    """
    field = f"version {candidate.version}"
    if serving.vocabulary.medians and not candidate.vocabulary.medians:
        raise InputError(field, "a vocabulary without medians", "one that encodes counts, as the present one does")
    shared = len(set(candidate.vocabulary.genes) & set(serving.vocabulary.genes))
    if 2 * shared < len(serving.vocabulary.genes):
        got = f"a vocabulary with {shared:,} of the {len(serving.vocabulary.genes):,} genes of the present one"
        raise InputError(field, got, "one of the same genes: its callers name them")
    lost = sorted(set(serving.embeddings) - set(candidate.embeddings))
    if lost:
        raise InputError(
            field, f"a model without {', '.join(lost)} embeddings", "one that has those of the present one"
        )
    if candidate.max_length < serving.max_length:
        got = f"a model of cells of up to {candidate.max_length} tokens"
        raise InputError(field, got, f"one of at least {serving.max_length}, as the present one takes")
    gone = sorted(_labels(serving) - _labels(candidate))
    if gone:
        logger.warning("%s has no label %s any more", field, ", ".join(gone))
    check_computes(candidate)


def _labels(model: ServedModel) -> set[str]:
    """Give every name that its callers may wait for: those of the first task, and each task's."""
    return {*model.labels, *(class_name(task, label) for task, labels in model.tasks.items() for label in labels)}


def check_computes(model: ServedModel) -> None:
    """Compute cells of several lengths, in every way that requests may ask for.

    Raises
    ------
    InputError
        If what comes out is no number.
    """
    rng = np.random.default_rng(0)
    genes = np.array([model.vocabulary.tokens[gene] for gene in model.vocabulary.genes])
    front = [] if model.vocabulary.cls_id is None else [model.vocabulary.cls_id]
    room = min(model.max_length - len(front), len(genes))
    cells = [
        model.accept([*front, *rng.permutation(genes)[: min(length, room)].tolist()]).input_ids
        for length in SMOKE_LENGTHS
    ]
    kinds: tuple[CellVector, ...] = ("logits", "mean", "cls")
    for what in kinds:
        if what != "logits" and what not in model.embeddings:
            continue
        vectors = model.vectors(cells, what)
        if len(vectors) != len(cells) or not np.isfinite(vectors).all():
            got = f"{what} that are no numbers, for some cells"
            raise InputError(f"model {model.name}, version {model.version}", got, "a model that computes")
