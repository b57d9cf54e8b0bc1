"""What is read from a cell as a direction, seen from one point: coordinates that are nearly linear where cosines bend.

Near a state the gradient of the cosine with it vanishes, and what is left is its curvature. That needs no second
derivative: a cosine is known once it is known where the direction lies in the plane that touches the sphere at some
point, along the states and along the few directions into which cells go when they are perturbed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Tangent"]

# An axis that differs from those before it by less than this share of itself is rounding.
LEAST_AXIS = 1e-6
# What a state's length is at least: one of zeros has the cosine 0 with all, as torch's cosine_similarity says.
LEAST_LENGTH = 1e-8


class Tangent:
    """The plane that touches the sphere of directions at one of them.

    Parameters
    ----------
    centre_D
        That direction, of any length; shape (width,).
    states_SD
        States, whose cosines are wanted; shape (states, width).
    changes_RD
        Directions into which it may go from there: each one more axis.

    Attributes
    ----------
    axes_FD
        Orthonormal axes: states + changes; float64. One that adds nothing to those before it is zeros.
    """

    def __init__(
        self, centre_D: torch.Tensor, states_SD: torch.Tensor, changes_RD: Sequence[torch.Tensor] = ()
    ) -> None:
        self.centre_D = _unit(centre_D.double())
        self.states_SD = states_SD.double() / states_SD.double().norm(dim=1, keepdim=True).clamp(min=LEAST_LENGTH)
        axes: list[torch.Tensor] = [self.centre_D]
        for vector_D in [*self.states_SD, *(change_D.double() for change_D in changes_RD)]:
            known_XD = torch.stack(axes)
            rest_D = vector_D - (known_XD @ vector_D) @ known_XD
            rest_D = rest_D - (known_XD @ rest_D) @ known_XD  # again: what rounding left of the first time
            new = rest_D.norm() > LEAST_AXIS * vector_D.norm()
            axes.append(_unit(rest_D) if new else torch.zeros_like(rest_D))
        self.axes_FD = torch.stack(axes[1:])

    def __call__(self, read_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the coordinates of what is read, shape (axes,), and their gradients, shape (axes, width)."""
        along = self.centre_D @ read_D.double()
        place_F = self.axes_FD @ read_D.double() / along
        return place_F.to(read_D.dtype), ((self.axes_FD - place_F[:, None] * self.centre_D) / along).to(read_D.dtype)

    def with_beyond(self, read_D: torch.Tensor, apart_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the square of the distance from the axes' span behind the coordinates, and its gradient.

        The gradient is that of what is read less `apart_D`, which is in it, and whose square is known apart.
        """
        place_F, gradient_FD = self(read_D)
        read_XD = torch.stack([read_D, apart_D.to(read_D.dtype)]).double()
        along_X1 = (read_XD @ self.centre_D)[:, None]
        beyond_XD = read_XD / along_X1 - self.centre_D
        beyond_XD = beyond_XD - beyond_XD @ self.axes_FD.T @ self.axes_FD
        rest_D = beyond_XD[0] - beyond_XD[1]
        slope_D = 2 * (rest_D - (rest_D @ beyond_XD[0]) * self.centre_D) / along_X1[0]
        beyond = beyond_XD[0].square().sum()
        values_G = torch.cat([place_F, beyond[None].to(place_F.dtype)])
        return values_G, torch.cat([gradient_FD, slope_D[None].to(gradient_FD.dtype)])

    def place(self, read_XD: torch.Tensor) -> torch.Tensor:
        """Give coordinates, and behind them the square of the distance from the axes' span: shape (axes + 1, X)."""
        read_XD = read_XD.double()
        read_XD = read_XD / (read_XD @ self.centre_D)[:, None]
        place_FX = self.axes_FD @ read_XD.T
        beyond_XD = read_XD - self.centre_D - place_FX.T @ self.axes_FD
        beyond_X: torch.Tensor = beyond_XD.square().sum(dim=1)
        return torch.cat([place_FX, beyond_X[None]])

    def cosines(self, place_GX: torch.Tensor) -> torch.Tensor:
        """Give the cosine of each place with each state: shape (states, X)."""
        place_FX, beyond_X = place_GX[:-1], place_GX[-1].clamp(min=0)
        along_SX = (self.states_SD @ self.centre_D)[:, None] + self.states_SD @ self.axes_FD.T @ place_FX
        cosine_SX: torch.Tensor = along_SX / (1 + place_FX.square().sum(dim=0) + beyond_X).sqrt()
        return cosine_SX


def _unit(vector_D: torch.Tensor) -> torch.Tensor:
    unit_D: torch.Tensor = vector_D / vector_D.norm()
    return unit_D
