"""A model opened for inference: its trunk up to the layer that is read, and its vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.model_directory import find_model, model_vocabulary, read_config
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ModelRunner"]


class ModelRunner:
    """What an actor or a notebook holds of a model.

    Parameters
    ----------
    model
        A model directory, a filesystem URI, or a hub id.
    vocabulary
        Its vocabulary, where the model does not carry one.
    layer
        ``-1``: the layer before the last; ``0``: the last.
    precision
        ``fp32``, ``bf16`` or ``auto``.
    cpus, gpu
        What this process was given.
    """

    def __init__(
        self,
        model: str,
        *,
        vocabulary: str | None = None,
        layer: int = -1,
        precision: str = "fp32",
        cpus: float | None = None,
        gpu: bool | None = None,
    ) -> None:
        self._directory, self._layer = find_model(model), layer
        self.vocabulary = model_vocabulary(self._directory, vocabulary, read_config(self._directory))
        execution = choose_execution(precision, cpus=cpus, gpu=gpu)
        self.encoder = Encoder.load(self._directory, layer=layer, execution=execution)

    def exact_encoder(self) -> Encoder:
        """Load the trunk once more, in float32 on the same device: what a lower precision is measured against."""
        execution = replace(self.encoder.execution, dtype=torch.float32)
        return Encoder.load(self._directory, layer=self._layer, execution=execution)

    def sequences(self, input_ids: Sequence[NDArray[np.integer]], cells_digest: str | None) -> list[NDArray[np.int32]]:
        """Re-encode cells for this model where its vocabulary extends theirs; refuse what it cannot take.

        Raises
        ------
        InputError
            If a cell is longer than the model's input size: it is never cut silently.
        """
        adapted = [self.vocabulary.adapt(ids, cells_digest) for ids in input_ids]
        longest = max((len(ids) for ids in adapted), default=0)
        if longest > self.encoder.max_length:
            got = f"a cell of {longest} tokens"
            raise InputError("--cells", got, f"cells of up to {self.encoder.max_length}, the model's input size")
        return adapted
