"""An axis that is linear near zero and logarithmic further out, so that a few large values do not hide the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.scale import AsinhScale
from matplotlib.ticker import NullLocator

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.scale import AsinhTransform
    from numpy.typing import NDArray

__all__ = ["DWARFED", "MOST", "stretch"]

# An axis on which this share of the values has less than so small a part of the room is stretched around zero.
MOST, DWARFED = 0.9, 6


def stretch(axis: Axis, linear: float, values: NDArray[np.float64]) -> AsinhTransform:
    """Stretch an axis around zero: linear up to `linear` either way, logarithmic beyond; ticks as far as values go."""
    largest = float(np.abs(values).max())
    scale = AsinhScale(axis, linear_width=linear)
    axis.axes.set(**{"xscale" if axis is axis.axes.xaxis else "yscale": scale})
    powers = 10.0 ** np.arange(np.floor(np.log10(linear)), np.ceil(np.log10(largest)) + 1)
    round_numbers = np.sort(np.concatenate([powers, 3 * powers]))
    shown = round_numbers[(round_numbers > linear) & (round_numbers < 1.2 * largest)]
    ticks = np.concatenate([-shown[::-1][shown[::-1] <= -values.min()], [0], shown])
    axis.set_ticks(ticks, [f"{tick:g}".replace("-", "\N{MINUS SIGN}", 1) for tick in ticks])
    axis.set_minor_locator(NullLocator())
    axis.set_label_text(f"{axis.get_label_text()}, stretched near 0")
    return scale.get_transform()
