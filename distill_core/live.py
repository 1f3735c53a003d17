"""Progress of a distillation: a curve that is drawn again while it grows, and a few lines at the end."""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Mapping
from typing import Any

from distill_core.checks import Checks

_CHECKS = Checks()


class Curve:
    """The losses of a training as a figure in a notebook, which is replaced in its place.

    Outside of a notebook, and without matplotlib, nothing is drawn; one warning says so.

    Args:
        every: Number of steps between two drawings.

    Raises:
        TypeError: If ``every`` is not an integer.
        ValueError: If it is not greater than 0.

    Attributes:
        points: The values by name, each with its step.

    Example:
        >>> curve = Curve(every=2)
        >>> curve.add(0, {"task_loss": 1.0})
        >>> curve.add(2, {"task_loss": 0.5})
        >>> curve.points
        {'task_loss': [(0, 1.0), (2, 0.5)]}
    """

    def __init__(self, every: int) -> None:
        _CHECKS.integer("every", every)
        _CHECKS.positive("every", every)
        self.every = every
        self.points: dict[str, list[tuple[int, float]]] = {}
        self._handle: Any = None
        self._warned = False

    def begin(self) -> None:
        """Start a new figure."""
        self.points, self._handle = {}, None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve; numbers that are not finite leave a gap."""
        for name, value in values.items():
            self.points.setdefault(name, []).append((step, float(value)))

    def draw(self) -> None:
        """Show the figure; after the first time, in the place of the figure before."""
        if not self.points or not self._can_draw():
            return
        figures, display = importlib.import_module("matplotlib.figure"), importlib.import_module("IPython.display")
        figure = figures.Figure(figsize=(6.4, 3.6), layout="constrained")  # not of pyplot, which would keep it open
        axes = figure.subplots()
        for name, points in self.points.items():
            axes.plot(*zip(*points, strict=True), label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        if all(value > 0 for points in self.points.values() for _, value in points if math.isfinite(value)):
            axes.set_yscale("log")
        axes.legend(loc="upper right", fontsize="small")
        if self._handle is None:
            self._handle = display.display(figure, display_id=True)
        else:
            self._handle.update(figure)

    def _can_draw(self) -> bool:
        problem = None if in_notebook() else "this is not a notebook"
        if problem is None and importlib.util.find_spec("matplotlib") is None:
            problem = "matplotlib is not installed"
        if problem is not None and not self._warned:
            self._warned = True
            warnings.warn(f"LiveCurve draws nothing, since {problem}.", stacklevel=3)
        return problem is None


def in_notebook() -> bool:
    """Whether the code runs in a notebook, which can replace what a cell shows."""
    if importlib.util.find_spec("IPython") is None:
        return False
    shell = importlib.import_module("IPython").get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def summary(steps: int, seconds: float, values: Mapping[str, float], weights: Mapping[str, float]) -> str:
    """The lines at the end of a training.

    Args:
        steps: Number of optimizer steps.
        seconds: Seconds that they took, with validation.
        values: The last value of each loss and metric, by name.
        weights: The weight of each term, by its name.

    Example:
        >>> print(summary(20, 2.5, {"task_loss": 0.25, "logits_loss": 1.5}, {"logits": 0.5}))
        Distillation: 20 steps in 2.5 s
          task_loss    0.25
          logits_loss  1.5, weight 0.5
    """
    width = max((len(name) for name in values), default=0)
    lines = [f"Distillation: {steps:,} steps in {seconds:,.1f} s"]
    for name, value in values.items():
        weight = weights.get(name.removeprefix("val_").removesuffix("_loss"))
        lines.append(f"  {name:<{width}}  {value:.4g}" + ("" if weight is None else f", weight {weight:.4g}"))
    return "\n".join(lines)
