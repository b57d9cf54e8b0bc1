"""The names of the tables in a screen's output; here alone, so that who reads them need not import the model."""

from __future__ import annotations

__all__ = ["CELL_SHIFTS", "GENE_SHIFTS", "GENE_SUMMARY", "PAIR_SUMS", "REJECTS"]

CELL_SHIFTS, GENE_SHIFTS, GENE_SUMMARY = "cell_shifts", "gene_shifts", "gene_shifts_summary"
PAIR_SUMS, REJECTS = "_pair_sums", "_rejects"
