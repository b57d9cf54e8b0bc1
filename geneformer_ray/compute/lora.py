"""LoRA: low-rank adapters beside some of a trunk's projections, learned instead of the trunk (Hu et al. 2021).

An adapted projection computes ``W x + b + (alpha / rank) B A x``. ``W`` stays, ``A`` and ``B`` are learned with the
head; at the end ``W + (alpha / rank) B A`` is a plain matrix again, and the model an ordinary one. The layers are
peft's.

Adapters alone lie in a folder of two files::

    adapter_model.safetensors    all that was learned: A and B, the head, the rows of new tokens; in its metadata what
                                 the adapters are, and the digest of the base that they belong to
    adapter_config.json          the same options for peft's own loader; not read here

The folder is no model directory. It must not lie in one either: transformers would put the adapters on it unasked.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from geneformer_ray.compute.classifier import new_classifier
from geneformer_ray.compute.freezing import freeze
from geneformer_ray.compute.gene_classifier import new_gene_classifier
from geneformer_ray.compute.model_directory import weights_digest
from geneformer_ray.compute.multitask import MultiTaskClassifier, new_multitask_classifier
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn
    from transformers import BertConfig, PreTrainedModel

    from geneformer_ray.compute.classifier import CellClassifier
    from geneformer_ray.compute.gene_classifier import GeneClassifier
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["PROJECTIONS", "Adapters", "LoraOptions", "adapted_classifier"]

# Name -> where it lies in a layer of the encoder.
PROJECTIONS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
WEIGHTS_FILE = "adapter_model.safetensors"
# The key in the metadata of the weights.
RECORD = "geneformer_ray"
# What peft puts in front of a parameter's name in a file, and the adapter's own name, which it leaves out there.
FRONT, NAME = "base_model.model.", "default"
NEW_TOKENS = "new_tokens"


@dataclass(frozen=True)
class LoraOptions:
    """Which adapters.

    Parameters
    ----------
    rank
        Of ``B A``.
    alpha
        Adapters are scaled by ``alpha / rank``.
    dropout
        Of what enters them in training.
    projections
        Of :data:`PROJECTIONS`.
    layers
        Numbers of the encoder's layers, from 0; None adapts all.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    projections: tuple[str, ...] = ("query", "value")
    layers: tuple[int, ...] | None = None

    def check(self, config: BertConfig) -> None:
        """Refuse what no adapter can be, or the model has no place for."""
        if self.rank < 1:
            raise InputError("--lora-rank", self.rank, "1 or more")
        if not 0 < self.alpha < float("inf"):
            raise InputError("--lora-alpha", self.alpha, "a number above 0")
        if not 0 <= self.dropout < 1:
            raise InputError("--lora-dropout", self.dropout, "0 or more, below 1")
        if not self.projections or len(set(self.projections) & set(PROJECTIONS)) < len(self.projections):
            got = ",".join(self.projections) or "nothing"
            raise InputError("--lora-projections", got, f"some of {', '.join(PROJECTIONS)}, each once")
        if self.layers is not None:
            there = range(config.num_hidden_layers)
            if not self.layers or len(set(self.layers) & set(there)) < len(self.layers):
                got = ",".join(map(str, self.layers)) or "nothing"
                raise InputError("--lora-layers", got, f"some of 0 to {len(there) - 1}, each once")

    def modules(self, config: BertConfig) -> list[str]:
        """Name the modules that are adapted."""
        layers = range(config.num_hidden_layers) if self.layers is None else sorted(self.layers)
        places = [place for name, place in PROJECTIONS.items() if name in self.projections]
        return [f"bert.encoder.layer.{layer}.{place}" for layer in layers for place in places]


class Adapters:
    """A model with adapters, of which these and the head are learned, and nothing else.

    Parameters
    ----------
    model
        A classifier or a masked-gene model on the CPU, before it is wrapped for data-parallel training. It is changed
        in place and keeps its class. Its parameters have other names from here on: a checkpoint of it goes into a
        model that was adapted by the same options.
    options
        Which adapters.
    new_tokens
        How many of the last tokens start with random values: their rows are learned as well.

    Attributes
    ----------
    undecayed
        Parameters learned in part, which the optimiser must not let decay (see :mod:`geneformer_ray.compute.freezing`).
    """

    def __init__(self, model: PreTrainedModel, options: LoraOptions, *, new_tokens: int = 0) -> None:
        # Imported where it is needed: half a second that no worker without adapters should pay.
        from peft import LoraConfig, LoraModel

        options.check(model.config)
        self.model, self.options, self.new_tokens = model, options, new_tokens
        self._config = LoraConfig(
            r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout,  # type: ignore[arg-type]
            target_modules=options.modules(model.config),
        )  # fmt: skip
        # It freezes all but the adapters, and keeps hold of what it has put where.
        self._lora = LoraModel(model, self._config, NAME)
        self.undecayed: list[nn.Parameter] = freeze(model, embeddings=True, new_tokens=new_tokens)
        for name, parameter in model.named_parameters():
            if _of_head(name):
                parameter.requires_grad_(True)

    def merged(self) -> PreTrainedModel:
        """Give a plain model of the same class that computes the same, in evaluation mode; this one stays as it is.

        Raises
        ------
        ValueError
            If the training has diverged: a weight is no finite number.
        """
        # A copy, for adding a product to a matrix and taking it away again does not give the same matrix.
        plain: PreTrainedModel = copy.deepcopy(self._lora).merge_and_unload(safe_merge=True)
        for parameter in plain.parameters():
            parameter.requires_grad_(True)
        return plain.eval()

    # ------------------------------------------------------------------ files

    def save(self, directory: Path, base: str) -> None:
        """Write the adapters alone: with the base, all that the adapted model is.

        Parameters
        ----------
        directory
            A folder of their own.
        base
            The digest of the model directory that `model` was loaded from.
        """
        record = {
            "base": base,
            "options": asdict(self.options),
            "new_tokens": self.new_tokens,
            **_head_of(self.model),
        }
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._learned().items()}
        save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt", RECORD: json.dumps(record)})
        config = copy.copy(self._config)
        config.inference_mode = True
        config.save_pretrained(str(directory))

    @classmethod
    def load(cls, model: PreTrainedModel, directory: Path, base: str, flag: str = "--adapters") -> Adapters:
        """Put saved adapters on the base that they belong to.

        Parameters
        ----------
        model
            A fresh one on `base`, with a head like the one that was learned.
        directory
            What :meth:`save` wrote.
        base
            The digest of the model directory that `model` was loaded from.
        flag
            Named in errors.

        Raises
        ------
        InputError
            If they belong to another base or to another head, or the folder holds no adapters.
        """
        record, tensors = _read(directory, base, flag)
        head = {key: record[key] for key in _head_of(model)}
        if head != _head_of(model):
            raise InputError(flag, f"adapters in {directory} of a model with {head}", f"some for {_head_of(model)}")
        adapters = cls(model, record["options"], new_tokens=record["new_tokens"])
        places = adapters._learned()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != {name: tuple(place.shape) for name, place in places.items()}:
            raise InputError(
                flag, f"{directory}, whose weights do not fit the model", "adapters as finetune saved them"
            )
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(tensors[name])
        return adapters

    def _learned(self) -> dict[str, torch.Tensor]:
        """Give what is learned, by its name in a file; the new tokens' rows are a view of their matrix."""
        learned: dict[str, torch.Tensor] = {}
        partly = {id(parameter) for parameter in self.undecayed}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in partly:
                learned[NEW_TOKENS] = parameter[-self.new_tokens :]
            elif parameter.requires_grad:
                learned[FRONT + name.replace(f".{NAME}.", ".")] = parameter
        return learned


def adapted_classifier(
    base: Path, directory: Path, vocabulary: GeneVocabulary, flag: str = "--adapters"
) -> tuple[CellClassifier | GeneClassifier, GeneVocabulary]:
    """Make the classifier that saved adapters and their base are together, of cells or of genes.

    Parameters
    ----------
    base
        The model directory that the adapters were learned on.
    directory
        What :meth:`Adapters.save` wrote.
    vocabulary
        The base's.
    flag
        Named in errors.

    Returns
    -------
    classifier, vocabulary
        Merged, in evaluation mode, and the vocabulary that it uses.
    """
    digest = weights_digest(base)
    record, _ = _read(directory, digest, flag)
    tasks, labels, pooling = record["tasks"], record["labels"], record["pooling"]
    if labels is None:
        raise InputError(flag, f"{directory}, adapters of a masked-gene model", "adapters of a classifier")
    model: PreTrainedModel
    own = vocabulary
    if pooling is None:  # each gene enters the head as it is
        model = new_gene_classifier(base, labels)
    elif tasks is None:
        model, own = new_classifier(base, vocabulary, labels, pooling)
    else:
        every = {task["name"]: task["labels"] for task in tasks}
        model, own = new_multitask_classifier(base, vocabulary, every, pooling)
    merged: Any = Adapters.load(model, directory, digest, flag).merged()
    return merged, own


def _of_head(name: str) -> bool:
    """Whether a parameter is of the head: what lies on the trunk, and the pooler, which a trunk comes without."""
    return not name.startswith("bert.") or name.startswith("bert.pooler.")


def _head_of(model: PreTrainedModel) -> dict[str, Any]:
    """Describe a head: numbers learned for one mean nothing in another of the same shape."""
    config = model.config
    labels = [config.id2label[number] for number in range(config.num_labels)] if hasattr(model, "classifier") else None
    return {
        "labels": labels,
        "pooling": getattr(config, "pooling", None) if labels else None,
        "tasks": config.tasks if isinstance(model, MultiTaskClassifier) else None,
    }


def _read(directory: Path, base: str, flag: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read adapters, and check that they belong to a base."""
    path, takes = directory / WEIGHTS_FILE, "a folder of adapters that finetune saved"
    if not path.exists():
        raise InputError(flag, f"{directory} without {WEIGHTS_FILE}", takes)
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})[RECORD])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        named = {name: record[name] for name in ("base", "labels", "pooling", "tasks")}
        record = {**named, "options": _options(record["options"]), "new_tokens": int(record["new_tokens"])}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(flag, f"{path}, which does not say what it is ({error})", takes) from error
    if record["base"] != base:
        raise InputError(flag, f"adapters of the base {record['base']}", f"adapters of {base}, the base that is there")
    return record, tensors


def _options(given: Mapping[str, Any]) -> LoraOptions:
    layers = given["layers"]
    return LoraOptions(
        int(given["rank"]), float(given["alpha"]), float(given["dropout"]), tuple(given["projections"]),
        None if layers is None else tuple(int(layer) for layer in layers),
    )  # fmt: skip
