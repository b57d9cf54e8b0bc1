"""The flags of pretraining, and which of them go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from geneformer_ray.data.held_out import HeldOut, hold_out_cells, hold_out_groups
from geneformer_ray.errors import InputError
from ray_jobs.lora_flags import LoraFlags
from ray_jobs.training_flags import TrainingConfig

if TYPE_CHECKING:
    from geneformer_ray.data.cells import CellTable

__all__ = ["SHAPE", "PretrainConfig", "check_flags"]

# Flags of a new model, which one to start from has settled.
SHAPE = ("layers", "width", "heads", "feed_forward", "initializer_range")


class PretrainConfig(TrainingConfig, LoraFlags):
    """Flags of ``python -m ray_jobs.pretrain``."""

    cells: str = Field(description="table of tokenised cells")
    vocabulary: str | None = Field(None, description="their vocabulary; optional with --model")
    output: str = Field(description="directory for the model")
    model: str | None = Field(None, description="a model to start from (default: random weights)")
    layers: int = Field(6, ge=1, description="of a new model")
    width: int = Field(256, ge=8, description="of a new model's hidden states")
    heads: int = Field(4, ge=1, description="attention heads of a new model")
    feed_forward: int = Field(512, ge=8, description="width of a new model's feed-forward layers")
    initializer_range: float = Field(0.02, gt=0, description="deviation of a new model's weights")
    epochs: int = Field(3, ge=1, description="passes over the cells")
    learning_rate: float = Field(1e-3, gt=0, description="the highest")
    validation_share: float = Field(0.1, gt=0, lt=1, description="share of the cells held out to measure on")
    group: str | None = Field(
        None, description="column of donors, libraries: whole groups are held out (default: single cells)"
    )
    validation_groups: tuple[str, ...] = Field(
        (), description="with --group: the ones to hold out (default: drawn, up to the share)"
    )
    seed: int = Field(0, ge=0, description="of weights, order, masks, and of what is held out")

    def held_out(self, table: CellTable) -> HeldOut:
        """Say which cells train, and which are held out."""
        rows = table.select(self.filter)
        if self.group is None:
            held = hold_out_cells(rows, self.validation_share, self.seed)
        else:
            groups = table.column(self.group, "--group")
            held = hold_out_groups(rows, self.group, groups, self.validation_share, self.seed, self.validation_groups)
        if len(held.train) < self.num_workers:
            raise InputError("--cells", f"{len(rows)} cells", "more cells than workers, and some to hold out")
        return held


def check_flags(config: PretrainConfig) -> None:
    """Refuse flags that do not go together, as far as can be told without the cells."""
    shaped = [name for name in SHAPE if name in config.model_fields_set]
    if config.model and shaped:
        flag, value = "--" + shaped[0].replace("_", "-"), getattr(config, shaped[0])
        raise InputError(flag, f"{value} beside --model", "nothing: the model that training starts from has its shape")
    if config.width % config.heads:
        raise InputError("--heads", config.heads, f"a divisor of the width {config.width}")
    if config.lora() is not None and not config.model:
        takes = "a --model beside it, which stays as it is: random weights are learned whole"
        raise InputError("--lora-rank", f"{config.lora_rank} without --model", takes)
    if config.validation_groups and config.group is None:
        got = f"{','.join(config.validation_groups)} without --group"
        raise InputError("--validation-groups", got, "a --group beside it: the column of these groups")
    if config.validation_groups and "validation_share" in config.model_fields_set:
        got = f"{config.validation_share} beside --validation-groups"
        raise InputError("--validation-share", got, "nothing: these groups are what is held out")
