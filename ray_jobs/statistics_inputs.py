"""What ``python -m ray_jobs.statistics`` reads: one or two finished screens that go together, and their cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from geneformer_ray.compute.screen_output import ScreenOutput
from geneformer_ray.data.cells import CellTable
from geneformer_ray.errors import InputError
from ray_jobs.command_line import place

if TYPE_CHECKING:
    from ray_jobs.statistics_flags import StatisticsConfig

__all__ = ["StatisticsInputs", "open_inputs"]


@dataclass(frozen=True)
class StatisticsInputs:
    """What the flags name, opened and checked.

    Parameters
    ----------
    screen, other
        The screen of ``--shifts``, and that of ``--null`` or ``--against``.
    state
        The state whose shifts are tested; None for screens of similarities.
    cells
        The screened cells.
    groups
        The group of each cell.
    """

    screen: ScreenOutput
    other: ScreenOutput | None
    state: str | None
    cells: CellTable | None
    groups: dict[str, str] | None

    @property
    def paths(self) -> list[str]:
        """Where all of it lies."""
        return [item.path for item in (self.screen, self.other, self.cells) if item is not None]


def open_inputs(config: StatisticsConfig) -> StatisticsInputs:
    """Open what the flags name; refuse screens that cannot be compared, and cells that were not screened."""
    screen = ScreenOutput.open(place(config.shifts, "--shifts"), "--shifts")
    state = screen.choose_state(config.state)
    if state is None and config.test in ("goal_shift", "concordance"):
        takes = "one with --state-column, --start and --goal"
        raise InputError("--shifts", f"{screen.path}, a screen without states", takes)
    cells = groups = None
    if config.cells is not None:
        cells = CellTable(place(config.cells, "--cells"))
        # Ids that are row numbers would fit any table.
        if cells.digest != screen.plan["cells"]:
            raise InputError("--cells", f"{cells.path}, other cells than --shifts has", "the cells that were screened")
        if config.group is not None:
            column = cells.column(config.group, "--group").astype(str)
            groups = dict(zip(cells.cell_ids.tolist(), column.tolist(), strict=True))
    return StatisticsInputs(screen, _other_screen(config, screen, state), state, cells, groups)


def _other_screen(config: StatisticsConfig, screen: ScreenOutput, state: str | None) -> ScreenOutput | None:
    flag, path = ("--null", config.null) if config.null is not None else ("--against", config.against)
    if path is None:
        return None
    other = ScreenOutput.open(place(path, flag), flag)
    # A null screen may be of other cells of the table, as upstream's are; the table says how many it shares.
    screen.check_like(other, same_cells=config.test != "vs_null", same_perturbation=config.test == "combination")
    if config.test == "concordance":
        screen.check_opposite(other)
    if state is not None and state not in other.states:
        takes = f"one with {state!r} among --start, --goal and --alternatives"
        raise InputError(flag, f"{other.path}, a screen without shifts to {state!r}", takes)
    return other
