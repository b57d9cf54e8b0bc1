"""The flags of ``python -m ray_jobs.screen``, and the perturbation plan that they spell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from geneformer_ray.compute.perturbation import PerturbationPlan, genes_in_enough_cells
from geneformer_ray.data import storage
from geneformer_ray.data.gene_lists import read_gene_list, read_gene_sets
from geneformer_ray.errors import InputError
from geneformer_ray.settings import Settings
from ray_jobs.command_line import place
from ray_jobs.first_order_flags import FirstOrderFlags
from ray_jobs.pool_flags import PoolConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["ScreenConfig", "check_flags", "perturbation_plan", "recorded_flags"]


class ScreenConfig(PoolConfig, FirstOrderFlags):
    """Flags of ``python -m ray_jobs.screen``."""

    cells: str = Field(description="table of tokenised cells")
    model: str = Field(description="model directory, hub id, or models:/NAME@ALIAS")
    output: str = Field(description="directory for the tables")
    vocabulary: str | None = Field(None, description="the model's vocabulary, where it does not carry one")
    filter: dict[str, tuple[str, ...]] = Field(
        {}, description="only cells with one of these values", json_schema_extra={"metavar": "COLUMN=A,B"}
    )
    perturbation: Literal["delete", "overexpress", "inhibit", "activate"] = Field(
        "delete", description="what is done to a gene"
    )
    genes: str = Field("all", description="all, genes G1,G2, or a file with one gene a line")
    gene_sets: str | None = Field(None, description="GMT file: each set in one event, instead of --genes")
    together: bool = Field(False, description="perturb all of --genes in one event")
    combine: int = Field(1, ge=1, description="how many of --genes are perturbed in one event: every combination")
    anchor: str | None = Field(None, description="a gene perturbed in every event as well, before the others")
    rank_shift: int | None = Field(
        None, ge=1, le=3, description="quartiles of its ranks by which a gene is inhibited or activated (default: 1)"
    )
    min_cells: int = Field(1, ge=1, description="with --genes all: only genes that this many of the cells hold")
    embedding: Literal["mean", "cls"] = Field("mean", description="mean of the unperturbed genes, or the <cls>")
    layer: Literal[-1, 0] = Field(-1, description="-1: the layer before the last; 0: the last")
    comparison: Literal["context", "upstream"] = Field(
        "context", description="leave the perturbed genes out, or as upstream does"
    )
    gene_shifts: bool = Field(False, description="also the similarity of every unperturbed gene")
    gene_shifts_summary: bool = Field(
        False, description="also count, mean and deviation of every pair of perturbed and affected gene, over the cells"
    )
    state_column: str | None = Field(None, description="column of cell states")
    start: str | None = Field(None, description="the state whose cells are perturbed")
    goal: str | None = Field(None, description="the state that shifts are measured towards")
    alternatives: tuple[str, ...] = Field((), description="other states to measure towards, comma-separated")
    state_embeddings: str | None = Field(
        None, description="JSON file of state -> floats, as embed writes (default: computed)"
    )
    precision: Literal["fp32", "bf16", "auto"] = Field("fp32", description="what matrix products are computed in")
    max_cells: int | None = Field(None, ge=1, description="a random sample of this many cells")
    seed: int = Field(0, ge=0, description="of the sample, and of what estimates are held against")
    max_rejected: float = Field(
        0.01, ge=0, le=1, description="share of cells that may be set aside (OUTPUT/_rejects) before the run fails"
    )


LONGEST_NAME = 255  # bytes, of a file

# Flags that change no row: a run may go on with others.
NOT_IN_PLAN = {"output", "cells", "model", "vocabulary", "max_rejected", *PoolConfig.model_fields}
# And those that are recorded where they change something: see FirstOrderFlags.recorded.
RECORDED_APART = {*FirstOrderFlags.model_fields} - {*PoolConfig.model_fields}


def check_flags(config: ScreenConfig) -> None:
    """Refuse flags that do not go together, and what is not written yet."""
    config.check_workers()
    config.check_method()
    if config.rank_shift is not None and config.perturbation not in ("inhibit", "activate"):
        raise InputError("--rank-shift", f"{config.rank_shift} to {config.perturbation}", "inhibit or activate")
    if config.gene_sets is not None and config.genes != "all":
        raise InputError("--gene-sets", f"{config.gene_sets} beside --genes", "one of the two")
    needed = (config.state_column, config.start, config.goal)
    if any(needed) and not all(needed):
        raise InputError("--state-column, --start, --goal", "some of them", "all three, or none")
    states = [state for state in (config.start, config.goal, *config.alternatives) if state is not None]
    if len(set(states)) < len(states):
        raise InputError("--start, --goal, --alternatives", ", ".join(states), "states that differ")
    if not config.start and (config.alternatives or config.state_embeddings):
        raise InputError(
            "--alternatives, --state-embeddings", "no states", "--state-column, --start and --goal as well"
        )


def recorded_flags(config: ScreenConfig) -> dict[str, Any]:
    """Give the flags that decide a screen's rows, as its plan records them."""
    return config.model_dump(mode="json", exclude=NOT_IN_PLAN | RECORDED_APART) | config.recorded()


def perturbation_plan(
    config: ScreenConfig, vocabulary: GeneVocabulary, sequences: Iterable[NDArray[np.int32]]
) -> PerturbationPlan:
    """Turn the flags into a plan; `sequences` are the chosen cells, read only for ``--min-cells``."""
    resolve, tokens = vocabulary.resolve, vocabulary.tokens
    if (config.genes != "all" or config.gene_sets) and config.min_cells > 1:
        raise InputError("--min-cells", config.min_cells, "1 with a list of genes: it chooses among all")
    genes = sets = None
    if config.gene_sets is not None:
        named = read_gene_sets(place(config.gene_sets, "--gene-sets"))
        sets = tuple(tuple(tokens[resolve(gene, "--gene-sets")] for gene in group) for group in named.values())
    elif config.genes != "all":
        genes = tuple(tokens[resolve(name)] for name in _listed(config.genes))
    elif config.min_cells > 1:
        genes = genes_in_enough_cells(sequences, vocabulary, config.min_cells)
    anchor = None if config.anchor is None else tokens[resolve(config.anchor, "--anchor")]
    shift = config.rank_shift or 1
    return PerturbationPlan(
        config.perturbation, genes, config.together, anchor, config.combine, sets, shift, config.ranks
    )


def _listed(genes: str) -> list[str]:
    """Give the genes of ``--genes``: of a file, where there is one of that name, else as they stand."""
    file = storage.absolute(Settings.read().below_storage(genes))
    # Asked for a name longer than names may be, a file system fails; a long list of genes is no file.
    may_be_file = max(map(len, genes.encode().split(b"/"))) <= LONGEST_NAME
    if may_be_file and storage.exists(file) and not storage.is_directory(file):
        names = read_gene_list(file)
    else:
        names = [name.strip() for name in genes.split(",") if name.strip()]
    if not names:
        raise InputError("--genes", repr(genes), "all, genes G1,G2, or a file with one gene a line")
    return names
