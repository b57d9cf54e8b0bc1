"""The states that a screen measures towards: from a file, or the mean embeddings of their cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geneformer_ray.compute.cell_states import check_states, states_file, states_in_file
from geneformer_ray.data import storage
from geneformer_ray.data.digests import digest_of
from geneformer_ray.distribute.embed import embed_states
from ray_jobs.command_line import place

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from geneformer_ray.data.cells import CellTable
    from geneformer_ray.distribute.fan_out import Pool
    from ray_jobs.model_argument import OpenedModel
    from ray_jobs.screen_flags import ScreenConfig

__all__ = ["screen_states", "states_of", "states_path", "what_states_are_made_of"]

FLAG = "--state-embeddings"


def states_of(config: ScreenConfig) -> list[str]:
    """Name the states that shifts are measured towards, start and goal first; none in a screen of similarities."""
    if config.state_column is None or config.start is None or config.goal is None:
        return []
    return list(dict.fromkeys([config.start, config.goal, *config.alternatives]))


def states_path(config: ScreenConfig) -> str | None:
    """Give the path of ``--state-embeddings``, None without it."""
    return None if config.state_embeddings is None else place(config.state_embeddings, FLAG)


def what_states_are_made_of(config: ScreenConfig, table: CellTable) -> str | None:
    """Hash what decides the states' embeddings: the file's content, or each cell's state."""
    path = states_path(config)
    if path is not None:
        return digest_of(storage.read_json(path, FLAG))
    if config.state_column is None:
        return None
    names, codes = table.categories(config.state_column, "--state-column")
    return digest_of(names.tolist(), codes)


def screen_states(
    config: ScreenConfig, table: CellTable, model: OpenedModel, runner: dict[str, Any], pool: Pool, file: str
) -> dict[str, NDArray[np.float32]]:
    """Read the states' embeddings, or compute them over all cells of each state; keep them in `file`, of the output."""
    wanted = states_of(config)
    if config.state_column is None or not wanted:
        return {}
    made_with = model.made_with(config.embedding, config.layer)
    path = states_path(config)
    if storage.exists(file):  # of an earlier run of this plan: the same to the last bit
        return check_states(states_in_file(storage.read_json(file), made_with), model.width, wanted)
    if path is not None:
        states = check_states(states_in_file(storage.read_json(path, FLAG), made_with), model.width, wanted)
    else:
        column = config.state_column
        rows = table.select({column: wanted})
        rows = rows[table.lengths[rows] <= model.config.max_position_embeddings]  # the screen sets the others aside
        states = embed_states(table.path, rows, runner, embedding=config.embedding, state_column=column, pool=pool)
    storage.write_json(file, states_file(states, made_with))
    return states
