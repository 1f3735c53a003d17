"""A stand-in for a notebook, which notes the figures that it shows and replaces."""

from __future__ import annotations

from typing import Any

import IPython.display
import pytest

from distill_core import live


class Notebook:
    """The figures in order, each with whether it replaced the one before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.figures: list[Any] = []
        self.replaced: list[bool] = []
        monkeypatch.setattr(live, "in_notebook", lambda: True)
        monkeypatch.setattr(IPython.display, "display", self._display)

    def _display(self, figure: Any, display_id: bool) -> Notebook:
        self.figures.append(figure)
        self.replaced.append(False)
        return self

    def update(self, figure: Any) -> None:
        self.figures.append(figure)
        self.replaced.append(True)

    @property
    def curves(self) -> dict[str, list[float]]:
        """The values of each curve of the last figure."""
        lines = self.figures[-1].axes[0].get_lines()
        return {line.get_label(): list(line.get_ydata()) for line in lines}
