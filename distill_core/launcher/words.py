"""The interface of each half's module ``checks``, and warnings that point to the user's own line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any, Protocol

from distill_core import PACKAGES


class Words(Protocol):
    """Interface of a half's module ``checks``: checks of settings, and texts of errors."""

    def message(self, expected: str, received: str, remedy: str = "") -> str:
        """The text of an error."""
        ...

    def closest(self, name: str, candidates: Iterable[str]) -> str:
        """A sentence with the candidates closest to a name."""
        ...

    def positive(self, name: str, value: Any) -> None:
        """Check that a number is greater than 0."""
        ...

    def non_negative(self, name: str, value: Any) -> None:
        """Check that a number is 0 or greater."""
        ...

    def at_least(self, name: str, value: Any, minimum: float) -> None:
        """Check that a number is at least a minimum."""
        ...

    def boolean(self, name: str, value: Any) -> None:
        """Check that a value is True or False."""
        ...

    def one_of(self, name: str, value: Any, choices: Iterable[str]) -> None:
        """Check that a value is one of a few words."""
        ...


def warn(text: str) -> None:
    """Warn at the line of the user's code that called this project.

    Args:
        text: The warning.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
