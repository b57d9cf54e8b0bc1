"""A model opened for inference: its trunk up to the layer that is read, and its vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        directory = find_model(model)
        self.vocabulary = model_vocabulary(directory, vocabulary, read_config(directory))
        self.encoder = Encoder.load(directory, layer=layer, execution=choose_execution(precision, cpus=cpus, gpu=gpu))

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
