"""Cell, gene and state embeddings over a pool of actors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geneformer_ray.compute.cell_states import state_embeddings, sum_by_state
from geneformer_ray.compute.embedding import cell_embeddings, gene_embedding_sums
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.digests import code_digest
from geneformer_ray.data.shards import mark_finished, write_shard
from geneformer_ray.distribute.fan_out import Pool, fan_out
from geneformer_ray.distribute.worker_model import open_runner
from geneformer_ray.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = [
    "EmbedWorker",
    "cells_per_item",
    "discard_gene_sums",
    "embed_code",
    "embed_states",
    "embedded_blocks",
    "merge_gene_sums",
    "row_items",
    "states_of_output",
]

# Cells of one item: many enough that starting it costs nothing beside it.
CELLS_PER_ITEM = 256
# Sums of gene embeddings take as much space for few cells as for many, a vector for each gene: so many shards at most.
GENE_SUM_SHARDS = 256
GENE_SUMS = "gene_sums"


# The modules whose code decides the numbers.
EMBED_CODE = (
    *("attention", "cell_states", "embedding", "encoder", "execution", "model_directory", "model_runner"),
    *("shared_attention", "trunk"),
)


def embed_code() -> str:
    """Hash the code that decides embeddings."""
    return code_digest(*(f"compute/{name}.py" for name in EMBED_CODE), "distribute/embed.py")


def cells_per_item(cells: int, embedding: str) -> int:
    """Say how many cells an item has."""
    return max(CELLS_PER_ITEM, -(-cells // GENE_SUM_SHARDS)) if embedding == "gene" else CELLS_PER_ITEM


def row_items(rows: NDArray[np.integer], cells_per_item: int = CELLS_PER_ITEM) -> list[dict[str, Any]]:
    """Cut row numbers into items."""
    starts = range(0, len(rows), cells_per_item)
    return [{"item": n, "rows": rows[start : start + cells_per_item].tolist()} for n, start in enumerate(starts)]


class EmbedWorker:
    """Embeds cells of a table.

    Parameters
    ----------
    cells
        The table's path.
    runner
        Options of :func:`open_runner`.
    embedding
        ``mean``, ``cls`` or ``gene``; ``states`` sums cell embeddings by state instead of writing them.
    output
        The output directory; unused for ``states``.
    state_column
        The column of states, for ``states``.
    """

    def __init__(
        self, cells: str, runner: dict[str, Any], embedding: str, output: str = "", state_column: str | None = None,
        state_embedding: str = "mean",
    ) -> None:  # fmt: skip
        self.table = CellTable(cells)
        self.runner = open_runner(runner)
        self.embedding, self.output = embedding, output
        self.state_column, self.state_embedding = state_column, state_embedding

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Embed one item's cells."""
        rows = np.array(item["rows"])
        cells = self.table.read(rows, [self.state_column] if self.state_column else [])
        sequences = self.runner.sequences(cells.input_ids, self.table.vocabulary_digest)
        done = {"cells": len(rows), "tokens": sum(map(len, sequences))}
        if self.embedding == "gene":
            self._genes(item["item"], sequences)
            return mark_finished(self.output, item["item"], done)
        kind = self.state_embedding if self.embedding == "states" else self.embedding
        values = cell_embeddings(self.runner.encoder, sequences, self.runner.vocabulary, embedding=kind)
        if self.embedding == "states":
            sums = sum_by_state(values, cells.columns[self.state_column or ""])
            lists = {state: [count, total.tolist()] for state, (count, total) in sums.items()}
            return {"item": item["item"], **done, "sums": lists}
        lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        table = pa.table({"cell_id": cells.cell_ids, "embedding": lists})
        write_shard(self.output, "embeddings", item["item"], table, vocabulary=self.runner.vocabulary.digest)
        return mark_finished(self.output, item["item"], done)

    def _genes(self, number: int, sequences: list[NDArray[np.int32]]) -> None:
        sums, cells = gene_embedding_sums(self.runner.encoder, sequences, self.runner.vocabulary)
        there = np.flatnonzero(cells)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(sums[there].ravel()), sums.shape[1])
        table = pa.table({"token": there, "cells": cells[there], "sum": lists})
        write_shard(self.output, GENE_SUMS, number, table)


def embed_states(
    cells: str,
    rows: NDArray[np.integer],
    runner: dict[str, Any],
    *,
    embedding: str,
    state_column: str,
    pool: Pool,
) -> dict[str, NDArray[np.float32]]:
    """Average the embeddings of all cells of each state; float32 of shape (width,) a state.

    Parameters
    ----------
    rows
        The cells whose states count.
    """
    options = {
        "cells": cells,
        "runner": runner,
        "embedding": "states",
        "state_column": state_column,
        "state_embedding": embedding,
    }
    parts: dict[int, dict[str, list[Any]]] = {}
    with Progress("state embeddings", len(rows), "cells") as progress:
        for done in fan_out(EmbedWorker, options, row_items(rows), pool):
            parts[done["item"]] = done["sums"]
            progress.advance(done["cells"])
    return state_embeddings(
        {state: (count, np.array(total)) for state, (count, total) in parts[number].items()} for number in sorted(parts)
    )


def embedded_blocks(output: str) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Read the cell embeddings that a finished run wrote, a shard at a time.

    Yields
    ------
    tuple of slice and array
        Which of the run's cells, in the order of its rows, and their embeddings, float32 of shape (cells, width).
    """
    start = 0
    for file in storage.list_files(storage.join(output, "embeddings"), ".parquet"):
        filesystem, inside = storage.locate(file)
        column = pq.read_table(inside, filesystem=filesystem, columns=["embedding"])["embedding"]
        values = column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)
        yield slice(start, start + len(values)), values
        start += len(values)


def states_of_output(output: str, states: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
    """Average the embeddings that a finished run wrote, by state; float32 of shape (width,) a state.

    Parameters
    ----------
    output
        The run's output.
    states
        Of the cells that it embedded, in its order, shape (cells,). A cell without a state belongs to none.
    """
    return state_embeddings(sum_by_state(values, states[part]) for part, values in embedded_blocks(output))


def merge_gene_sums(output: str, vocabulary: GeneVocabulary) -> int:
    """Turn the shards' sums into ``OUTPUT/embeddings``: gene, cells, embedding; give the number of genes.

    The sums stay: were some of them gone when a job is broken off, the rest would be taken for all.
    """
    sums: NDArray[np.float64] | None = None
    cells = np.zeros(len(vocabulary), dtype=np.int64)
    for file in storage.list_files(storage.join(output, GENE_SUMS), ".parquet"):
        filesystem, inside = storage.locate(file)
        table = pq.read_table(inside, filesystem=filesystem)
        tokens = table["token"].to_numpy()
        values = table["sum"].combine_chunks().flatten().to_numpy().reshape(len(tokens), -1)
        sums = np.zeros((len(vocabulary), values.shape[1])) if sums is None else sums
        sums[tokens] += values
        cells[tokens] += table["cells"].to_numpy()
    if sums is None:
        return 0
    cells[list(vocabulary.special_ids)] = 0  # no genes
    there = np.flatnonzero(cells)
    means = (sums[there] / cells[there, None]).astype(np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(means.ravel()), means.shape[1])
    names = vocabulary.names
    table = pa.table({"gene": [names[token] for token in there], "cells": cells[there], "embedding": lists})
    write_shard(output, "embeddings", 0, table, vocabulary=vocabulary.digest)
    return len(there)


def discard_gene_sums(output: str) -> None:
    """Delete what :func:`merge_gene_sums` read; not before the output is finished."""
    storage.remove(storage.join(output, GENE_SUMS))
