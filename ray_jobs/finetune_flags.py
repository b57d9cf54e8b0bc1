"""The flags of fine-tuning, and which of them go together."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from geneformer_ray.compute.classifier import check_pooling
from geneformer_ray.compute.multitask import check_task_weights
from geneformer_ray.errors import InputError
from ray_jobs.gene_task import check_gene_flags
from ray_jobs.lora_flags import LoraFlags
from ray_jobs.splitting_flags import SplittingConfig

__all__ = ["HOW", "FinetuneConfig", "check_flags"]

# Flags beside the options of every training that determine a trial.
HOW = "class_weights label_smoothing attention_dropout freeze_layers freeze_embeddings patience examples".split()
# Flags that only one of the tasks has a use for.
OF_CELLS = ("label", "group", "train_groups", "choose_groups", "report_groups", "pooling", "task_weights", "examples")
OF_GENES = ("gene_classes", "token_predictions")


class FinetuneConfig(SplittingConfig, LoraFlags):
    """Flags of ``python -m ray_jobs.finetune``."""

    task: Literal["cells", "genes"] = Field("cells", description="what is classified: cells, or the genes in them")
    cells: str = Field(description="table of tokenised cells")
    model: str = Field(description="pretrained model: directory, hub id, or models:/NAME@ALIAS")
    output: str = Field(description="directory for models and predictions")
    vocabulary: str | None = Field(None, description="the model's vocabulary, where it does not carry one")
    gene_classes: str | None = Field(
        None, description="with --task genes: class -> genes, as JSON, GMT, or a CSV or TSV table of gene and class"
    )
    token_predictions: bool = Field(
        False, description="with --task genes: write what is predicted of each reporting gene in each cell"
    )
    folds: int | None = Field(
        None,
        ge=2,
        description="cross-validate in so many folds: over groups, or with --task genes over genes (there 3 or more; 5 "
        "unless given)",
    )
    min_cells: int = Field(
        10, ge=1, description="labels with fewer cells in some role, or genes in fewer cells, are dropped, and listed"
    )
    pooling: tuple[str, ...] = Field(("mean",), description="first_gene, cls, mean: one or several, comma-separated")
    seeds: tuple[int, ...] = Field((0,), description="of weights and order, comma-separated")
    task_weights: dict[str, float] = Field(
        {}, description="of several labels, in the loss", json_schema_extra={"metavar": "COLUMN=W,COLUMN=W"}
    )
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: every class counts the same")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    gene_dropout: float = Field(0.0, ge=0, lt=1, description="share of a cell's genes left out of a training step")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="of attention weights; on CPU it dominates a step")
    freeze_layers: int = Field(0, ge=0, description="the first layers of the encoder stay as they are")
    freeze_embeddings: bool = Field(False, description="those of genes and ranks stay; a new <cls> is learned")
    patience: int | None = Field(
        None, ge=1, description="epochs without a better choosing score after which a trial stops"
    )
    examples: bool = Field(True, description="models carry one test cell a class; --no-examples: no model holds a cell")
    registered_model: str | None = Field(None, description="name in the registry; without it, models stay on disk")

    def how(self) -> dict[str, Any]:
        """Give what determines a trial beside the options of every training; adapters only where there are some."""
        lora = self.lora()
        return {name: getattr(self, name) for name in HOW} | ({} if lora is None else {"lora": lora})

    def weights(self) -> dict[str, float]:
        """Give the weight of every label column in the loss."""
        weights = check_task_weights(self.task_weights, self.label)
        return dict(zip(self.label, weights.tolist(), strict=True))

    def labels_in_plan(self) -> dict[str, Any]:
        """Give what a run's plan says of the label columns: weights only where there are several to weigh."""
        if len(self.label) == 1:
            return {"label": self.label[0]}
        return {"label": [*self.label], "task_weights": self.weights()}


def check_flags(config: FinetuneConfig) -> None:
    """Refuse flags that do not go together, as far as can be told without the cells."""
    needed, useless = (("gene_classes",), OF_CELLS) if config.task == "genes" else (("label", "group"), OF_GENES)
    for name in needed:
        if not getattr(config, name):
            raise InputError(_flag(name), "nothing", f"a value: --task {config.task} requires it")
    for name in useless:
        if name in config.model_fields_set and getattr(config, name):
            raise InputError(
                _flag(name), f"a value beside --task {config.task}", "nothing: that task has no use for it"
            )
    for pooling in config.pooling:
        check_pooling(pooling)
    for name in ("label", "pooling", "seeds"):
        values = getattr(config, name)
        if len(set(values)) < len(values) or (not values and name != "label"):
            raise InputError(_flag(name), ",".join(map(str, values)) or "nothing", "one or several, each once")
    if min(config.seeds) < 0:
        raise InputError("--seeds", min(config.seeds), "seeds from 0 on")
    if config.lora() is not None:
        for name in ("freeze_layers", "freeze_embeddings"):
            if getattr(config, name):
                takes = "nothing beside --lora-rank: with adapters, the whole trunk stays as it is"
                raise InputError(_flag(name), getattr(config, name), takes)
    if config.task == "genes":
        check_gene_flags(config)
    else:
        _check_task_weights(config)


def _check_task_weights(config: FinetuneConfig) -> None:
    if config.task_weights and len(config.label) == 1:
        got = ", ".join(f"{task}={weight:g}" for task, weight in config.task_weights.items())
        raise InputError("--task-weights", got, "nothing beside one --label: they weigh several against each other")
    config.weights()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
