"""Whether a model opens: it is found, its files are whole, and its vocabulary is the one that it was made with."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from geneformer_ray.compute.model_directory import find_model, model_vocabulary, read_config
from geneformer_ray.errors import InputError, RegistryUnavailable
from geneformer_ray.finding import Finding, fault, ok
from geneformer_ray.manage.registry import find_registered, is_registry_uri, reaching_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["check_model"]

NAME = "model.opens"
EMBEDDINGS = "embeddings.word_embeddings.weight"


def check_model(model: str, vocabulary: str | None) -> Iterator[Finding]:
    """Open a model as a job would, without computing with it.

    Parameters
    ----------
    model
        A directory, a URI, a hub id, or a registered model of the store in use.
    vocabulary
        Its vocabulary, where it carries none.
    """
    with tempfile.TemporaryDirectory() as own:
        try:
            if is_registry_uri(model):
                with reaching_store(""):
                    directory = find_registered(model, into=own)
            else:
                directory = find_model(model)
            config = read_config(directory)
            genes = model_vocabulary(directory, vocabulary, config)
        except InputError as error:
            yield fault(NAME, f"{error.field}: {error.got}", f"give {error.takes}")
            return
        except RegistryUnavailable as error:
            yield fault(NAME, f"{model}: {error.why}", "first mend the store")
            return
        rows, why = _rows_of_embeddings(directory)
    if why:
        yield fault(NAME, f"{model}: {why}", "copy it again: its weights are not whole")
    elif rows is not None and rows != config.vocab_size:
        found = f"{model}: weights of {rows} tokens, config.json of {config.vocab_size}"
        yield fault(NAME, found, "copy it again: its files belong to two models")
    else:
        layers = f"{config.num_hidden_layers} layers, {config.hidden_size} wide"
        yield ok(NAME, f"{model}: {layers}, a vocabulary of {len(genes.tokens):,} tokens that fits")


def _rows_of_embeddings(directory: Path) -> tuple[int | None, str]:
    """Read the headers of the weights, which tell whether the files have their whole length."""
    rows = None
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as weights:
                for key in weights.keys():
                    if key.endswith(EMBEDDINGS):
                        rows = int(weights.get_slice(key).get_shape()[0])
        except (SafetensorError, OSError) as error:
            return None, f"{file.name} cannot be read ({str(error).splitlines()[0]})"
    return rows, ""
