"""What a person should know of a screen that has finished, beside its summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray_jobs.screen_flags import ScreenConfig

__all__ = ["notices"]


def notices(summary: Mapping[str, Any], config: ScreenConfig) -> list[str]:
    """Say which cells were set aside, where estimates missed their aim, and where they are not to be trusted."""
    lines = []
    if summary["rejected"]:
        where = summary["tables"]["rejects"]
        lines.append(f"{summary['rejected']:,} of {summary['cells']:,} cells set aside: see {where}")
    estimates = summary.get("first_order", {})
    for part, ranks in ((estimates, ""), (estimates.get("shift_gene", {}), " with ranks held")):
        if missed := part.get("over_tolerance"):
            lines.append(
                f"{missed:,} of {estimates['cells_estimated']:,} estimated cells stayed above --tolerance "
                f"{config.tolerance:g} at their held-out genes{ranks} (mean {_number(part['error_mean'])}, most "
                f"{_number(part['error_max'])}): a --most-cost above {config.most_cost:g} can take them further"
            )
    if warning := summary.get("verification", {}).get("warning"):
        lines.append(f"warning: {warning}")
    return lines


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
