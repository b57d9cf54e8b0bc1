"""What the library computes in batches, written out slowly: one cell at a time, stock transformers, Python loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import BertModel

from geneformer_ray.data.vocabulary import GeneVocabulary

Cell = np.ndarray


class StockTrunk:
    """Stock ``BertModel`` with eager attention, asked for one unpadded cell at a time."""

    def __init__(self, directory: Path) -> None:
        self.bert = BertModel.from_pretrained(directory, add_pooling_layer=False, attn_implementation="eager").eval()

    @torch.inference_mode()
    def hidden(self, input_ids: Cell, layer: int = 0) -> np.ndarray:
        """Hidden states of one cell, shape (length, width), of the last layer (0) or the one before it (-1)."""
        ids_BL = torch.from_numpy(np.asarray(input_ids, dtype=np.int64))[None]
        states = self.bert(input_ids=ids_BL, output_hidden_states=True).hidden_states
        return states[len(self.bert.encoder.layer) + layer][0].numpy().astype(np.float64)


def gene_positions(input_ids: Cell, vocabulary: GeneVocabulary) -> list[int]:
    """Positions that hold genes, not special tokens."""
    genes = {vocabulary.tokens[gene] for gene in vocabulary.genes}
    return [position for position, token in enumerate(input_ids) if int(token) in genes]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
