"""The flags of screens that estimate, or take deletions apart: how the numbers are made, and what that may cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from geneformer_ray.compute.decomposition import check_decomposition
from geneformer_ray.compute.first_order import FirstOrder, check_first_order
from geneformer_ray.compute.screen_method import ScreenMethod
from geneformer_ray.compute.verification import Verification
from geneformer_ray.errors import InputError
from ray_jobs.command_line import JobConfig

if TYPE_CHECKING:
    from geneformer_ray.compute.perturbation import PerturbationPlan
    from geneformer_ray.compute.reading import Reading

__all__ = ["FirstOrderFlags"]

OF_ESTIMATES, OF_VERIFIED = ("tolerance", "most_cost", "held_out"), ("top", "controls", "control_cells")
# Flag -> the methods that it means something to; the others' are refused.
METHODS_OF = {
    **dict.fromkeys(OF_ESTIMATES, ("first_order", "verified")),
    **dict.fromkeys(OF_VERIFIED, ("verified",)),
}


class FirstOrderFlags(JobConfig):
    """What becomes of the others' ranks, and whether deletions are measured or estimated."""

    ranks: Literal["shift", "hold"] = Field(
        "shift",
        description="what a deletion does to the ranks of the genes behind it: shift moves them up by one, as the "
        "model's input is made; hold leaves them where they are, so that the gene alone is gone",
    )
    decompose: bool = Field(
        False,
        description="also give what a deletion's shift is made of: shift_gene (the gene is gone, all ranks held) and "
        "shift_rank (all behind it moved up); the two add up to shift",
    )
    method: Literal["exact", "first_order", "verified"] = Field(
        "exact",
        description="exact: a forward pass a gene; first_order: estimates of all deletions for a few dozen passes a "
        "cell; verified: estimates, then the strongest genes and a control exactly",
    )
    tolerance: float = Field(
        0.1,
        description="of estimates: more of a cell is computed until its error at the held-out genes is below this "
        "share of its effects' standard deviation",
    )
    most_cost: float = Field(
        0.2, description="of estimates: or until more would cost more than this share of the exact passes"
    )
    held_out: int = Field(
        8, description="of estimates: random genes of each cell that are measured exactly, to state the error"
    )
    top: int = Field(50, ge=1, description="of verified: how many genes with the largest mean shift to the goal, of "
                     "either sign, are measured exactly in every cell")  # fmt: skip
    controls: int = Field(50, ge=0, description="of verified: how many random other genes are measured as well")
    control_cells: int = Field(
        8, ge=1, description="of verified: random cells of which every gene is measured, to see how far estimates agree"
    )

    def screen_method(self, seed: int) -> ScreenMethod:
        """Give how the numbers are made, or of ``verified`` the estimates; the seed draws the held-out genes."""
        if self.method == "exact":
            return ScreenMethod(self.decompose)
        settings = {name: getattr(self, name) for name in OF_ESTIMATES}
        return ScreenMethod(self.decompose, FirstOrder(**settings, seed=seed))

    def verification(self, seed: int) -> Verification:
        """Give how much is measured exactly once all is estimated; the seed draws the controls."""
        return Verification(**{name: getattr(self, name) for name in OF_VERIFIED}, seed=seed)

    def check_method(self) -> None:
        """Refuse the flags of another method, and values that the method does not take."""
        for name, methods in METHODS_OF.items():
            if name in self.model_fields_set and self.method not in methods:
                got = f"{getattr(self, name)} with --method {self.method}"
                raise InputError("--" + name.replace("_", "-"), got, f"--method {' or '.join(methods)} beside it")
        self.screen_method(seed=0)

    def check_measurable(self, plan: PerturbationPlan, reading: Reading, *, gene_summary: bool) -> None:
        """Refuse perturbations and readings that the method cannot do.

        Parameters
        ----------
        plan, reading
            What is done, and what is compared; of the states the names are enough.
        gene_summary
            Whether gene shifts are asked for by ``--gene-shifts-summary`` alone.
        """
        if self.decompose:
            check_decomposition(plan, reading)
        if self.method == "exact":
            return
        try:
            check_first_order(plan, reading)
        except InputError as error:
            # Said as it was asked for.
            field = "--gene-shifts-summary" if gene_summary and error.field == "--gene-shifts" else error.field
            got = str(error.got).replace("--method first_order", f"--method {self.method}")
            raise InputError(field, got, error.takes) from None

    def recorded(self) -> dict[str, Any]:
        """Give what these flags say in a run's plan: nothing where they change nothing, as in runs before them."""
        fields = FirstOrderFlags.model_fields
        names = [name for name in ("ranks", "decompose", "method") if getattr(self, name) != fields[name].default]
        names += [name for name, methods in METHODS_OF.items() if self.method in methods]
        return {name: getattr(self, name) for name in names}
