"""How a screen measures its cells: exactly or by first order, as they are or taken apart into gene and ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.compute.decomposition import decomposed_rows, shift_decomposed
from geneformer_ray.compute.first_order import FirstOrder, FirstOrderShifts, first_order_cells
from geneformer_ray.compute.shift_tables import cell_shift_rows
from geneformer_ray.compute.shifts import CellShifts, shift_cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa
    from numpy.typing import NDArray

    from geneformer_ray.compute.encoder import Encoder
    from geneformer_ray.compute.perturbation import PerturbationPlan
    from geneformer_ray.compute.reading import Reading
    from geneformer_ray.compute.token_budget import TokenBudget
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["ScreenMethod", "ScreenedCell"]

# What a sequence around which the model is made linear costs about, in passes of it: on the way forward, and back for
# each state.
FORWARD_OF_A_POINT, BACK_OF_A_POINT = 2.5, 1.5


@dataclass(frozen=True)
class ScreenedCell:
    """What was found of one cell.

    Parameters
    ----------
    measured
        The shifts; where deletions are taken apart, those of the same events with all ranks held as well.
    estimates
        Of a first-order screen: how each of these came about.
    """

    measured: tuple[CellShifts, ...]
    estimates: tuple[FirstOrderShifts, ...] = ()

    @property
    def shifts(self) -> CellShifts:
        """The shifts as they were asked for."""
        return self.measured[0]

    def __len__(self) -> int:
        return len(self.shifts)

    @property
    def exact_passes(self) -> int:
        """What the exact engine takes for it, in forward passes."""
        return len(self.measured) * (len(self) + 1)

    @property
    def passes(self) -> float:
        """What it took, in forward passes."""
        return sum(one.passes for one in self.estimates) if self.estimates else float(self.exact_passes)

    @property
    def events_measured(self) -> int:
        """How many perturbed sequences that is the work of."""
        return round(self.passes) if self.estimates else len(self.measured) * len(self)

    @property
    def estimated(self) -> bool:
        """Whether one of its values is not the exact engine's."""
        return not all(one.exact_E.all() for one in self.estimates)

    def not_finite(self) -> int:
        """Count the events with a value that is not a finite number."""
        values_EX = np.concatenate([one.values_ES for one in self.measured], axis=1)
        return replace(self.shifts, values_ES=values_EX).not_finite()


@dataclass(frozen=True)
class ScreenMethod:
    """How the numbers are made.

    Parameters
    ----------
    decompose
        Measure deletions with all ranks held as well: what the genes themselves make of the shifts.
    first_order
        Settings of the estimate; None for the exact engine.
    """

    decompose: bool = False
    first_order: FirstOrder | None = None

    @property
    def times(self) -> int:
        """How many times each event is measured."""
        return 2 if self.decompose else 1

    @property
    def cuts_cells(self) -> bool:
        """Whether a part of a cell's events can be measured without the others: an estimate goes over all of them."""
        return self.first_order is None

    def most_passes(self, events_C: NDArray[np.int64], plan: PerturbationPlan, states: int) -> NDArray[np.float64]:
        """Say how many forward passes cells of so many events cost, about and at most, shape (cells,)."""
        exact_C: NDArray[np.float64] = self.times * (events_C.astype(np.float64) + 1)
        if self.first_order is None:
            return exact_C
        settings, point = self.first_order, FORWARD_OF_A_POINT + BACK_OF_A_POINT * states
        beside = settings.held_out + 2.0
        held_C, moved_C = (
            np.maximum(beside + points * point, settings.most_cost * events_C) for points in (1, settings.anchors)
        )
        cost_C = held_C if plan.ranks == "hold" else moved_C + (held_C if self.decompose else 0)
        most_C: NDArray[np.float64] = np.minimum(cost_C, exact_C)
        return most_C

    def screen(
        self,
        encoder: Encoder,
        sequences: Sequence[NDArray[np.integer]],
        plan: PerturbationPlan,
        reading: Reading,
        vocabulary: GeneVocabulary,
        *,
        budget: TokenBudget | None = None,
        parts: Sequence[range | None] | None = None,
    ) -> list[ScreenedCell]:
        """Measure cells.

        Parameters
        ----------
        encoder, sequences, plan, reading, vocabulary, budget, parts
            As for :func:`geneformer_ray.compute.shifts.shift_cells`; of an estimate there are no parts.
        """
        options: dict[str, Any] = {"budget": budget}
        if self.first_order is not None:
            if parts is not None and any(part is not None for part in parts):
                raise ValueError(f"parts of cells for a first-order screen: {parts}")
            plans = [plan, *([replace(plan, ranks="hold")] if self.decompose else [])]
            found = [
                first_order_cells(encoder, sequences, one, reading, vocabulary, self.first_order, **options)
                for one in plans
            ]
            cells = list(zip(*found, strict=True))
            return [ScreenedCell(tuple(one.shifts for one in cell), cell) for cell in cells]
        options["parts"] = parts
        if self.decompose:
            both = shift_decomposed(encoder, sequences, plan, reading, vocabulary, **options)
            return [ScreenedCell(cell) for cell in zip(*both, strict=True)]
        return [ScreenedCell((cell,)) for cell in shift_cells(encoder, sequences, plan, reading, vocabulary, **options)]

    def rows(
        self,
        cell_ids: Sequence[str],
        cells: Sequence[ScreenedCell],
        states: Sequence[str],
        names: NDArray[np.object_],
    ) -> pa.Table:
        """Give the rows of cell shifts; of a first-order screen with a column that says which are exact.

        Parameters
        ----------
        cell_ids, cells
            Of the same cells.
        states, names
            As for :func:`geneformer_ray.compute.shift_tables.cell_shift_rows`.
        """
        shifts = [[cell.measured[number] for cell in cells] for number in range(self.times)]
        exact = [[cell.estimates[number].exact_E for cell in cells if cell.estimates] for number in range(self.times)]
        has_estimates = self.first_order is not None
        if self.decompose:
            both = (exact[0], exact[1]) if has_estimates else None
            return decomposed_rows(cell_ids, shifts[0], shifts[1], states, names, exact=both)
        return cell_shift_rows(cell_ids, shifts[0], states, names, exact=exact[0] if has_estimates else None)
