"""Model directories: weights as safetensors, ``config.json``, and the vocabulary, in one self-contained folder."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from transformers import BertConfig

from geneformer_ray.data import storage
from geneformer_ray.data.hub import HubId
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.data.vocabulary_files import bring_dictionaries, carries_vocabulary, dictionary_patterns
from geneformer_ray.errors import InputError, VocabularyMismatch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

__all__ = ["find_model", "load_weights", "model_vocabulary", "read_config", "save_model", "weights_digest"]

ModelT = TypeVar("ModelT", bound="PreTrainedModel")

# Not "*.safetensors": on the hub an asterisk matches slashes too, and would bring every model of the repository.
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
_MODEL_FILES = ("config.json", *_WEIGHTS, "vocabulary.json", "states.json", "examples.json")


def find_model(model: str, flag: str = "--model") -> Path:
    """Give the local directory of a model: a directory or URI in ``save_pretrained`` form, or a hub id.

    Parameters
    ----------
    model
        A directory, a filesystem URI, or ``ORG/REPO[/SUBFOLDER][@REVISION]``. (``models:/`` URIs are the registry's.)
    flag
        Named in errors.
    """
    if hub_id := HubId.parse(model):
        below = f"{hub_id.folder}/" if hub_id.folder else ""
        patterns = [*(below + name for name in _MODEL_FILES), *dictionary_patterns(hub_id.folder)]
        # Upstream's models are subfolders of one repository: their dictionaries lie at its root.
        directory = hub_id.fetch([*patterns, *dictionary_patterns()], flag)
    elif storage.exists(model):
        directory = storage.local_copy(model)
        if storage.is_uri(model) and not carries_vocabulary(model):
            bring_dictionaries(model, directory)
    else:
        raise InputError(flag, model, "a model directory that exists, a hub id ORG/REPO, or models:/NAME@ALIAS")
    if not (directory / "config.json").exists():
        raise InputError(flag, f"{model} without config.json", "a directory in save_pretrained form")
    if not any(directory.glob("*.safetensors")):
        raise InputError(flag, f"{model} without safetensors weights", "weights as safetensors (pickles are not read)")
    return directory


def read_config(directory: Path, flag: str = "--model") -> BertConfig:
    """Read a model's ``config.json`` and check that it is a BERT."""
    content = storage.read_json(str(directory / "config.json"), flag)
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != "bert":
        raise InputError(flag, f"a {kind} model in {directory}", "a BERT model (Geneformer's kind)")
    return BertConfig.from_pretrained(directory)


def load_weights(kind: type[ModelT], directory: Path, *, fresh: Sequence[str] = (), **options: Any) -> ModelT:
    """Load a model class from a directory: safetensors, float32, SDPA attention.

    Parameters
    ----------
    kind
        The model class. A head of the directory that the class lacks is left.
    directory
        In ``save_pretrained`` form.
    fresh
        Beginnings of the names of parameters that may start with random values where the directory lacks them, or holds
        them in another shape: a new head.
    options
        Passed on.

    Raises
    ------
    InputError
        If any other parameter is missing: transformers would fill it with random values and only log it. If adapters
        lie in the directory.
    """
    if (directory / "adapter_config.json").exists():
        # Where peft is installed, transformers would put them on unasked; a trunk's own reading would not have them.
        got = f"{directory}, with adapters beside its weights"
        raise InputError("--model", got, "a model with its adapters merged")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # a bar for a fraction of a second, in every worker
    try:
        loaded, info = kind.from_pretrained(
            directory,
            attn_implementation="sdpa",
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(fresh),
            **options,
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    absent = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    random = sorted(name for name in absent if not name.startswith(tuple(fresh)))
    if random:
        got = f"{directory}, whose weights lack {random[0]}" + (f" and {len(random) - 1} more" if random[1:] else "")
        raise InputError(
            "--model", got, "a directory with all of the model's weights, in the shapes of its config.json"
        )
    model: ModelT = loaded
    return model


def model_vocabulary(directory: Path, given: str | None, config: BertConfig) -> GeneVocabulary:
    """Give a model's vocabulary: its own, the given one, or the one of its size in the snapshot that it lies in.

    Own and given are checked against each other, and all against the model's size.

    Parameters
    ----------
    directory
        The model's local directory.
    given
        ``--vocabulary``; optional where the model carries one.
    config
        The model's configuration.
    """
    size, place = int(config.vocab_size), str(directory)
    own = GeneVocabulary.load(place, "--model", size=size) if GeneVocabulary.present_in(place) else None
    other = GeneVocabulary.load(given, size=size) if given else None
    vocabulary = own or other or GeneVocabulary.load_beside(directory, size)
    if vocabulary is None:
        raise InputError("--vocabulary", "nothing", f"a vocabulary, for {directory} does not carry one")
    if own is not None and other is not None and other.digest not in (own.digest, own.parent_digest):
        takes = f"{own.digest}, the model's own, or nothing"
        raise VocabularyMismatch("--vocabulary", f"vocabulary {other.digest}", takes)
    recorded = getattr(config, "vocabulary_digest", None)
    if recorded is not None and recorded != vocabulary.digest:
        raise VocabularyMismatch(
            "--vocabulary", f"vocabulary {vocabulary.digest}", f"{recorded}, which the model was made with"
        )
    if vocabulary.max_length > config.max_position_embeddings:
        # A dictionary without a stored length: the model's own size is what its cells are cut to.
        vocabulary = replace(vocabulary, max_length=config.max_position_embeddings)
    if config.vocab_size != len(vocabulary):
        got = f"a vocabulary of {len(vocabulary)} tokens"
        raise VocabularyMismatch("--vocabulary", got, f"one of {config.vocab_size}, the model's size")
    return vocabulary


def weights_digest(directory: Path) -> str:
    """Hash a model's weights and configuration: two directories with the same digest give the same numbers."""
    sha = hashlib.sha256()
    for file in [*sorted(directory.glob("*.safetensors")), directory / "config.json"]:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                sha.update(block)
    return sha.hexdigest()[:16]


def save_model(model: PreTrainedModel, vocabulary: GeneVocabulary, directory: Path) -> None:
    """Write a self-contained model directory."""
    model.config.vocabulary_digest = vocabulary.digest
    model.save_pretrained(directory)
    vocabulary.save(str(directory))
