"""Directions by their coordinates, against cosines written out."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from geneformer_ray.compute.tangent import Tangent


def vectors(rng: np.random.Generator, number: int, width: int = 12) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=(number, width)))


@given(st.integers(0, 999), st.integers(1, 3), st.integers(0, 4), st.floats(1e-4, 1.0))
def test_a_place_is_a_direction(seed: int, states: int, changes: int, far: float) -> None:
    """Whatever lies beyond the axes: cosines come back, and no length matters."""
    rng = np.random.default_rng(seed)
    centre_D, states_SD, some_RD = vectors(rng, 1)[0], vectors(rng, states), vectors(rng, changes)
    tangent = Tangent(centre_D, states_SD, list(some_RD))
    axes_FD = tangent.axes_FD
    torch.testing.assert_close(axes_FD @ axes_FD.T, torch.eye(states + changes, dtype=torch.float64))
    assert (axes_FD @ centre_D).abs().max() < 1e-9
    read_XD = 3 * centre_D + far * vectors(rng, 5)
    exact_SX = torch.cosine_similarity(read_XD[None], states_SD[:, None], dim=2)
    for length in (1, 7):
        torch.testing.assert_close(tangent.cosines(tangent.place(length * read_XD)), exact_SX)
    # Along the axes alone there is nothing beyond them.
    along_XD = centre_D + vectors(rng, 2, states + changes) @ axes_FD
    assert tangent.place(along_XD)[-1].max() < 1e-18


@given(st.integers(0, 999))
def test_coordinates_and_their_gradients(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tangent = Tangent(vectors(rng, 1)[0], vectors(rng, 2), list(vectors(rng, 2)))
    read_D = (tangent.centre_D + 0.3 * vectors(rng, 1)[0] / 12).requires_grad_()
    place_F, gradient_FD = tangent(read_D)
    torch.testing.assert_close(place_F.detach(), tangent.place(read_D.detach()[None])[:-1, 0])
    for place, mine_D in zip(place_F, gradient_FD, strict=True):
        torch.testing.assert_close(mine_D.detach(), torch.autograd.grad(place, read_D, retain_graph=True)[0])
    for apart_D in (tangent.centre_D, tangent.centre_D + 0.1 * vectors(rng, 1)[0]):
        values_G, slope_GD = tangent.with_beyond(read_D.detach(), apart_D)
        torch.testing.assert_close(values_G, tangent.place(read_D.detach()[None])[:, 0])
        both_XD = torch.stack([read_D, apart_D])
        along_X1 = (both_XD @ tangent.centre_D)[:, None]
        seen_XD = both_XD / along_X1 - tangent.centre_D
        seen_XD = seen_XD - seen_XD @ tangent.axes_FD.T @ tangent.axes_FD
        product = 2 * (seen_XD[0] - seen_XD[1]).detach() @ seen_XD[0]
        torch.testing.assert_close(slope_GD[-1], torch.autograd.grad(product, read_D, retain_graph=True)[0])


def test_an_axis_that_adds_nothing_is_none() -> None:
    rng = np.random.default_rng(0)
    centre_D, state_D = vectors(rng, 2)
    tangent = Tangent(centre_D, torch.stack([state_D, 2 * state_D]), [centre_D, state_D - centre_D])
    assert tangent.axes_FD.norm(dim=1).round().tolist() == [1, 0, 0, 0]
    read_XD = centre_D + 0.1 * vectors(rng, 3)
    exact_X = torch.cosine_similarity(read_XD, state_D[None])
    torch.testing.assert_close(tangent.cosines(tangent.place(read_XD)), torch.stack([exact_X, exact_X]))
