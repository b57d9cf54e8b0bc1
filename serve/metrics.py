"""What a service counts, for whoever watches it. The counting itself is Ray's: see ``ray_metrics``."""

from __future__ import annotations

from typing import Literal, Protocol

__all__ = ["Metrics", "NoMetrics"]


class Metrics(Protocol):
    """Told of what happens in a replica."""

    def request(self, route: str, status: int, seconds: float) -> None:
        """Tell of an answered request, by its route's template."""

    def batch(self, cells: int, tokens: int, padded_tokens: int, budget: int) -> None:
        """Tell of cells computed together: their tokens, those with padding, and the budget of a batch."""

    def queued(self, seconds: float) -> None:
        """Tell how long something waited for its turn on the model's thread."""

    def waiting(self, pieces: int) -> None:
        """Tell how many pieces wait now."""

    def cells(self, kind: Literal["classify", "embed"], number: int) -> None:
        """Tell of cells that were classified or embedded."""

    def events(self, number: int) -> None:
        """Tell of perturbations that were measured."""

    def model(self, name: str, version: int | None, digest: str) -> None:
        """Tell which model serves from now on."""

    def swap(self) -> None:
        """Tell of a model that was replaced."""

    def refusal(self) -> None:
        """Tell of a candidate that was refused."""


class NoMetrics:
    """Counts nothing: for an application outside of Ray."""

    def request(self, route: str, status: int, seconds: float) -> None:
        """Do nothing."""

    def batch(self, cells: int, tokens: int, padded_tokens: int, budget: int) -> None:
        """Do nothing."""

    def queued(self, seconds: float) -> None:
        """Do nothing."""

    def waiting(self, pieces: int) -> None:
        """Do nothing."""

    def cells(self, kind: Literal["classify", "embed"], number: int) -> None:
        """Do nothing."""

    def events(self, number: int) -> None:
        """Do nothing."""

    def model(self, name: str, version: int | None, digest: str) -> None:
        """Do nothing."""

    def swap(self) -> None:
        """Do nothing."""

    def refusal(self) -> None:
        """Do nothing."""
