"""The flags of LoRA: which adapters are learned instead of a trunk's weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import Field

from geneformer_ray.compute.lora import PROJECTIONS, LoraOptions
from geneformer_ray.errors import InputError
from ray_jobs.command_line import JobConfig

__all__ = ["LoraFlags"]

# Flags that mean nothing without the first.
RANK, *OTHERS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_projections", "lora_layers")


class LoraFlags(JobConfig):
    """Adapters of low rank beside a trunk that stays as it is."""

    lora_rank: int | None = Field(
        None,
        ge=1,
        description="learn adapters of this rank (8, say) and the head, and leave the trunk as it is; "
        "they want a higher --learning-rate than all weights do (default: learn all weights)",
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="adapters are scaled by alpha / rank (default: twice the rank)"
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="of what enters the adapters in training")
    lora_projections: tuple[str, ...] = Field(
        ("query", "value"), description=f"what is adapted in a layer: some of {', '.join(PROJECTIONS)}"
    )
    lora_layers: tuple[int, ...] = Field(
        (), description="numbers of the layers that are adapted, from 0 (default: all)"
    )

    def lora(self) -> dict[str, Any] | None:
        """Give the fields of :class:`LoraOptions`, plain values that travel to workers; None without adapters.

        Raises
        ------
        InputError
            If a flag of adapters is given, and none are asked for.
        """
        if self.lora_rank is None:
            for name in OTHERS:
                if name in self.model_fields_set:
                    got = f"{getattr(self, name)} without --lora-rank"
                    raise InputError("--" + name.replace("_", "-"), got, "a --lora-rank beside it: the adapters' own")
            return None
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        layers = self.lora_layers if "lora_layers" in self.model_fields_set else None
        return asdict(LoraOptions(self.lora_rank, alpha, self.lora_dropout, self.lora_projections, layers))
