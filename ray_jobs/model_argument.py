"""The ``--model`` that several jobs take: a directory, a hub id or a registered model, opened on the driver."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geneformer_ray.compute.model_directory import find_model, model_vocabulary, read_config, weights_digest
from geneformer_ray.data import storage
from geneformer_ray.data.hub import HubId, named
from geneformer_ray.data.vocabulary_files import pinned_vocabulary
from geneformer_ray.errors import InputError
from geneformer_ray.manage.registry import is_registry_uri, local_source, open_store, pinned_uri
from geneformer_ray.settings import Settings
from ray_jobs.command_line import in_submitted_copy, place, store_directory

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import BertConfig

    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["OpenedModel", "open_model", "place_vocabulary"]


@dataclass(frozen=True)
class OpenedModel:
    """A model that was found and checked.

    Parameters
    ----------
    source
        What workers open: the same as was given where every node can reach it, a hub id at the commit that was found.
    directory, config
        Where it lies on this machine, and its ``config.json``.
    vocabulary
        Its vocabulary.
    vocabulary_source
        ``--vocabulary``, made absolute or pinned; None where the model carries its own or brings it along.
    tracking_uri
        The store of a registered model.
    """

    source: str
    directory: Path
    config: BertConfig
    vocabulary: GeneVocabulary
    vocabulary_source: str | None
    tracking_uri: str | None

    @property
    def digest(self) -> str:
        """A hash of the weights and the configuration."""
        return weights_digest(self.directory)

    @property
    def width(self) -> int:
        """The width of the hidden states."""
        return int(self.config.hidden_size)

    def check_lengths(self, longest: int) -> None:
        """Refuse cells that the model cannot take whole."""
        limit = int(self.config.max_position_embeddings)
        if longest > limit:
            raise InputError(
                "--cells", f"a cell of {longest} tokens", f"cells of up to {limit}, the model's input size"
            )

    def check_layer(self, layer: int) -> None:
        """Refuse the layer before the last of a model that has but one."""
        if int(self.config.num_hidden_layers) + layer < 1:
            raise InputError("--layer", layer, f"0 for a model of {self.config.num_hidden_layers} layers")

    def made_with(self, embedding: str, layer: int) -> dict[str, Any]:
        """Say what decides embeddings made with it, as files of state embeddings record it."""
        return {"model": self.digest, "embedding": embedding, "layer": layer}

    def runner(self, **options: Any) -> dict[str, Any]:
        """Give the options with which a worker opens the model."""
        return {**self.reference(), **options}

    def reference(self) -> dict[str, Any]:
        """Give what a worker needs to find the model: a registered one by its version and store."""
        return {"model": self.source, "vocabulary": self.vocabulary_source, "tracking_uri": self.tracking_uri}


def open_model(model: str, vocabulary: str | None) -> OpenedModel:
    """Find a model and its vocabulary, and check that they belong together."""
    tracking_uri = None
    if is_registry_uri(model):
        tracking_uri = open_store(store_directory())
        source = pinned_uri(model)
    elif storage.exists(place_if_path(model)):
        source = place_if_path(model)
    else:
        source = model
    vocabulary_source = place_vocabulary(vocabulary) if vocabulary else None
    directory = find_model(local_source(source, tracking_uri))
    if HubId.parse(source):
        source = named(directory)
    if tracking_uri is not None and "RAY_ADDRESS" not in os.environ:
        source, tracking_uri = str(directory), None  # one machine: its workers need not ask the registry again
    config = read_config(directory)
    vocabulary_found = model_vocabulary(directory, vocabulary_source, config)
    return OpenedModel(source, directory, config, vocabulary_found, vocabulary_source, tracking_uri)


def place_vocabulary(vocabulary: str) -> str:
    """Make the path of a vocabulary absolute, as `place` does, and pin a hub id to the commit that is found now."""
    below = Settings.read().below_storage(vocabulary)
    pinned = pinned_vocabulary(below if storage.exists(below) else vocabulary, "--vocabulary")
    return pinned if HubId.parse(pinned) else place(pinned, "--vocabulary")


def place_if_path(model: str) -> str:
    """Make a path absolute; a hub id looks like a relative path, so it is left to be looked up."""
    model = Settings.read().below_storage(model)
    if in_submitted_copy() and model.startswith("."):
        return place(model, "--model")
    return storage.absolute(model)
