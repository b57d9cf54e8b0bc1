"""The flags of a hyper-parameter search, and those of each of its trials."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args, get_origin

import yaml
from pydantic import Field

from geneformer_ray.compute.classifier import check_pooling
from geneformer_ray.compute.freezing import check_frozen_layers
from geneformer_ray.compute.lora import LoraOptions
from geneformer_ray.compute.search_space import SearchSpace
from geneformer_ray.data import storage
from geneformer_ray.distribute.search import Halving
from geneformer_ray.errors import InputError
from ray_jobs import finetune_flags
from ray_jobs.command_line import build, place
from ray_jobs.finetune_flags import FinetuneConfig

if TYPE_CHECKING:
    from transformers import BertConfig

__all__ = ["SEARCHED", "SearchConfig", "check_flags", "final_flags", "read_space", "shown", "trial_flags"]

ADAPTERS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_projections", "lora_layers")
# What tells trials apart; not the seed, for a lucky one is no better setting.
SEARCHED = (
    "learning_rate", "warmup_fraction", "weight_decay", "schedule", "tokens_per_batch", "accumulate",
    "class_weights", "label_smoothing", "gene_dropout", "attention_dropout", "freeze_layers", "freeze_embeddings",
    "pooling", *ADAPTERS,
)  # fmt: skip


class SearchConfig(FinetuneConfig):
    """Flags of ``python -m ray_jobs.search``: those of finetune, and a few of its own."""

    output: str = Field(description="directory for the search, its table and figure, and the best model")
    space: str = Field(description="YAML file: flag -> {low: A, high: B, log: true} or {choices: [A, B]}")
    trials: int = Field(20, ge=1, description="settings to try; the first one is that of the flags as given")
    draw_seed: int = Field(0, ge=0, description="of what is drawn from the space")
    epochs: int = Field(10, ge=1, description="passes over the training cells, at most: of a trial, and of the best")
    grace_epochs: int = Field(1, ge=1, description="no trial is stopped before so many")
    reduction: float = Field(3, gt=1, description="of so many trials, about one goes on from each rung to the next")
    final_seeds: tuple[int, ...] = Field((0,), description="with which the best is trained again, comma-separated")

    def halving(self) -> Halving:
        """Give when trials are stopped."""
        return Halving(self.epochs, self.grace_epochs, self.reduction)


def check_flags(config: SearchConfig) -> None:
    """Refuse flags that do not go with a search, as far as can be told without its space and the cells."""
    if config.task != "cells":
        takes = "cells: over folds of genes, one trial chooses on what another one reports"
        raise InputError("--task", config.task, takes)
    finetune_flags.check_flags(config)
    if config.folds is not None:
        raise InputError("--folds", config.folds, "nothing: a search chooses on one split, and reports on its rest")
    for flag, values in (("--pooling", config.pooling), ("--seeds", config.seeds)):
        if len(values) > 1:
            takes = "one: the space may hold poolings, and --final-seeds those of the best"
            raise InputError(flag, ",".join(map(str, values)), takes)
    if config.grace_epochs > config.epochs:
        raise InputError("--grace-epochs", config.grace_epochs, f"at most --epochs, {config.epochs}")
    seeds = config.final_seeds
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError("--final-seeds", ",".join(map(str, seeds)) or "nothing", "seeds from 0 on, each once")


def read_space(config: SearchConfig) -> SearchSpace:
    """Read the declared space, and check every value in it as the flag that it is, drawn or not."""
    file = place(config.space, "--space")
    try:
        content = yaml.safe_load(storage.read_bytes(file))
    except FileNotFoundError as error:
        raise InputError("--space", file, "a file that exists") from error
    except (OSError, yaml.YAMLError) as error:
        raise InputError("--space", file, f"a readable YAML file ({' '.join(str(error).split())})") from error
    space = SearchSpace.of(content, {name: _number_in(name) for name in SEARCHED})
    for name, entry in space.entries.items():
        for end, value in entry.given.items():
            try:
                flags = build(FinetuneConfig, _given(config) | _as_flags({name: value}))
                for pooling in flags.pooling:
                    check_pooling(pooling)
                if len(flags.pooling) > 1:
                    raise InputError("--pooling", shown(value), "one pooling a choice: [mean, cls], not [[mean, cls]]")
            except InputError as error:
                raise InputError("--space", f"{name} with {end}, {shown(value)}", error.takes) from error
    return space


def trial_flags(
    config: SearchConfig, space: SearchSpace, model: BertConfig
) -> list[tuple[dict[str, Any], FinetuneConfig]]:
    """Give each trial's values of the space, and its flags; all of them are checked.

    What is the adapters' own is left out of a trial without adapters.

    Parameters
    ----------
    config, space
        The search.
    model
        Of the pretrained model, which has so many layers.
    """
    defaults = {name: getattr(config, name) for name in space.entries}
    if "pooling" in defaults:
        (defaults["pooling"],) = config.pooling
    _check_with_model(config, space, model)
    if "lora_rank" not in space.entries and config.lora_rank is None:
        for name in ADAPTERS[1:]:
            if name in space.entries:
                raise InputError("--space", f"{name} without lora_rank", "lora_rank beside it, or --lora-rank")

    def meant(values: dict[str, Any]) -> dict[str, Any]:
        without = values.get("lora_rank", config.lora_rank) is None
        return {
            name: value
            for name, value in values.items()
            if name not in ADAPTERS[1:] or not (without or value in (None, ()))
        }

    found: list[tuple[dict[str, Any], FinetuneConfig]] = []
    for number, values in enumerate(space.draws(config.trials, config.draw_seed, defaults, meant)):
        flags = build(FinetuneConfig, _given(config) | _as_flags(values))
        try:
            _check_with(flags, model)
        except InputError as error:
            settings = ", ".join(f"{name}={shown(value)}" for name, value in values.items())
            got = f"{error.field} {error.got} in trial {number} ({settings})"
            raise InputError("--space", got, error.takes) from error
        found.append((values, flags))
    return found


def _check_with_model(config: SearchConfig, space: SearchSpace, model: BertConfig) -> None:
    """Refuse values, drawn or not, that the model has no place for."""
    for name in space.entries.keys() & {"freeze_layers", "lora_projections", "lora_layers"}:
        for end, value in space.entries[name].given.items():
            flags = build(FinetuneConfig, _given(config) | _as_flags({name: value}))
            try:
                check_frozen_layers(flags.freeze_layers, model)
                LoraOptions(projections=flags.lora_projections, layers=flags.lora_layers or None).check(model)
            except InputError as error:
                raise InputError("--space", f"{name} with {end}", error.takes) from error


def _check_with(flags: FinetuneConfig, model: BertConfig) -> None:
    finetune_flags.check_flags(flags)
    check_frozen_layers(flags.freeze_layers, model)
    if (lora := flags.lora()) is not None:
        LoraOptions(**lora).check(model)


def final_flags(config: SearchConfig, values: dict[str, Any], output: str) -> FinetuneConfig:
    """Give the flags with which the best setting is trained again."""
    own = {"seeds": config.final_seeds, "output": output, "registered_model": config.registered_model}
    return build(FinetuneConfig, _given(config) | _as_flags(values) | own)


def shown(value: Any) -> str:
    """Write a value as a flag has it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _given(config: SearchConfig) -> dict[str, Any]:
    """Give finetune's flags as they were given to the search; what goes to a place of its own is left out."""
    own = SearchConfig.model_fields.keys() - FinetuneConfig.model_fields.keys() | {"overwrite", "registered_model"}
    return {name: getattr(config, name) for name in config.model_fields_set - own}


def _as_flags(values: dict[str, Any]) -> dict[str, Any]:
    """Give drawn values as finetune's flags take them: one of a list is a list."""
    lists = {name for name in values if get_origin(FinetuneConfig.model_fields[name].annotation) is tuple}
    return {
        name: (value,) if name in lists and not isinstance(value, tuple) else value for name, value in values.items()
    }


def _number_in(name: str) -> type | None:
    """Say whether a flag takes whole numbers, numbers, or no numbers."""
    annotation: Any = FinetuneConfig.model_fields[name].annotation
    kinds = get_args(annotation) or (annotation,)  # of `int | None`
    return next((kind for kind in (int, float) if kind in kinds), None)
