"""Pairs of layers: printed as a table, drawn as a map, written as code, and made into terms."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import NDArray

from distill_core.guidance.assignment import Layer
from distill_core.installed import unusable

_SHOWN = 40  # names along a side of the map


@dataclass(frozen=True)
class LayerPair:
    """A layer of the student and a layer of the teacher.

    Attributes:
        student: The student's layer.
        teacher: The teacher's layer.
        similarity: Their linear CKA, 1 for equal features up to rotation and scale; ``None`` for pairs by depth.
    """

    student: Layer
    teacher: Layer
    similarity: float | None = None


class LayerPairs(Sequence[LayerPair]):
    """The pairs of layers that :func:`pair_layers` has chosen, in order.

    Args:
        pairs: The pairs.
        student_layers: All layers of the student that were compared, in the order in which they run.
        teacher_layers: All layers of the teacher.
        similarity: Linear CKA of each layer of the student with each of the teacher, shape ``(S, T)``; ``None`` for
            pairs by depth.
        note: A sentence on how they were found.
    """

    package: ClassVar[str]
    term_class: ClassVar[Callable[..., Any]]
    tap_class: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        pairs: Sequence[LayerPair],
        student_layers: Sequence[Layer],
        teacher_layers: Sequence[Layer],
        similarity: NDArray[np.float64] | None,
        note: str,
    ) -> None:
        self._pairs = list(pairs)
        self.student_layers, self.teacher_layers = list(student_layers), list(teacher_layers)
        self.similarity, self.note = similarity, note

    @overload
    def __getitem__(self, index: int) -> LayerPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerPair]: ...
    def __getitem__(self, index: int | slice) -> LayerPair | list[LayerPair]:
        """A pair by its number."""
        return self._pairs[index]

    def __len__(self) -> int:
        return len(self._pairs)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """A table with a line for each pair."""
        rows = [("student layer", "teacher layer", "similarity", "student shape", "teacher shape")]
        for pair in self:
            known = "" if pair.similarity is None else f"{pair.similarity:.3f}"
            rows.append((pair.student.label, pair.teacher.label, known, pair.student.size, pair.teacher.size))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, self.note])

    def terms(self, loss: Any = "mse", *, weight: Any = 1.0) -> list[Any]:
        """A term for each pair.

        Args:
            loss: The loss of each term, as in ``FeatureDistillation``.
            weight: The weight of each term.

        Returns:
            The terms. A vector and a map are compared with ``adapter="pool"``, all others with ``"auto"``.
        """
        return [
            self.term_class(self._tap(pair.student), self._tap(pair.teacher), loss, weight=weight, **settings)
            for pair, settings in zip(self, self._settings(), strict=True)
        ]

    def code(self, loss: str = "mse", *, weight: float = 1.0) -> str:
        """The terms as Python code to paste.

        Args:
            loss: The name of the loss: ``"mse"``, ``"l1"``, ``"smooth_l1"``, ``"cosine"`` or ``"kl"``.
            weight: The weight of each term, a number.

        Returns:
            Code that makes a list ``terms``.

        Raises:
            TypeError: If ``loss`` is not a name, or ``weight`` not a number.
        """
        if not isinstance(loss, str):
            raise TypeError(f"Expected `loss` to be a name, but got loss={loss!r}. Use terms(loss) for an object.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"Expected `weight` to be a number, but got weight={weight!r}. Use terms(weight=...).")
        self.terms(loss, weight=weight)  # raises what the code would raise
        lines = []
        for pair, settings in zip(self, self._settings(), strict=True):
            settings = {**({} if weight == 1 else {"weight": weight}), **settings}
            places = [_tap_code(pair.student), _tap_code(pair.teacher), _quoted(loss)]
            arguments = [*places, *(f"{name}={_quoted(value)}" for name, value in settings.items())]
            known = "" if pair.similarity is None else f"similarity {pair.similarity:.3f}, "
            note = f"  # {known}{pair.student.size} and {pair.teacher.size}"
            lines.append(f"    FeatureDistillation({', '.join(arguments)}),{note}")
        names = "FeatureDistillation, Tap" if any("Tap(" in line for line in lines) else "FeatureDistillation"
        return "\n".join([f"from {self.package} import {names}", "", "terms = [", *lines, "]", ""])

    def save(self, folder: str | Path) -> Path:
        """Write the similarities into the folder of a comparison, whose report then shows them as a map.

        A layer whose feature is the same for all examples has no similarity, and gets 0.

        Args:
            folder: The folder, which exists.

        Returns:
            The file, ``pairs.json``.

        Raises:
            ValueError: If the pairs were made by depth, without similarities.
        """
        similarity = self._similarities()
        content = {
            "student_layers": [layer.label for layer in self.student_layers],
            "teacher_layers": [layer.label for layer in self.teacher_layers],
            "similarity": np.nan_to_num(similarity).round(6).tolist(),
        }
        path = Path(folder) / "pairs.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    def draw(self, path: str | Path | None = None) -> Any:
        """The similarities as a map: the student's layers from left to right, the teacher's upwards, the pairs marked.

        Args:
            path: A file to write, such as ``"map.png"``; the format follows from its ending.

        Returns:
            The figure of matplotlib.

        Raises:
            ValueError: If the pairs were made by depth, without similarities.
            ImportError: If matplotlib is not installed.
        """
        similarity = self._similarities()
        if problem := unusable("The map of similarities", "matplotlib"):
            raise problem
        from matplotlib.figure import Figure  # without pyplot: no window, no global state

        size = [min(14.0, 3.0 + 0.22 * len(layers)) for layers in (self.student_layers, self.teacher_layers)]
        figure = Figure(figsize=(size[0] + 1.5, size[1]), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(similarity.T, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis")
        columns = [self.student_layers.index(pair.student) for pair in self]
        rows = [self.teacher_layers.index(pair.teacher) for pair in self]
        axes.plot(columns, rows, "o-", color="white", markeredgecolor="black", linewidth=1)
        for axis, layers in ((axes.xaxis, self.student_layers), (axes.yaxis, self.teacher_layers)):
            step = -(-len(layers) // _SHOWN)
            axis.set_ticks(range(0, len(layers), step), [layer.label for layer in layers[::step]], fontsize=7)
        axes.tick_params(axis="x", rotation=90)
        axes.set(xlabel="student", ylabel="teacher", title="similarity of layers (linear CKA)")
        figure.colorbar(image)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _similarities(self) -> NDArray[np.float64]:
        if self.similarity is None:
            raise ValueError("Expected pairs with similarities, but got pairs by depth. Call pair_layers(by='cka').")
        return self.similarity

    def _tap(self, layer: Layer) -> Any:
        arguments = _tap_arguments(layer)
        return self.tap_class(layer.name, **arguments) if arguments else layer.name

    def _settings(self) -> list[dict[str, Any]]:
        """Further arguments of each pair's term."""
        names = [pair.student.name for pair in self]
        settings: list[dict[str, Any]] = []
        for pair in self:
            own: dict[str, Any] = {}
            if _is_vector(pair.student) != _is_vector(pair.teacher):
                own["adapter"] = "pool"
            if names.count(pair.student.name) > 1:  # several calls or outputs of one layer
                own["name"] = "_".join(
                    str(part)
                    for part in (pair.student.name, pair.student.call, pair.student.output)
                    if part is not None
                )
            settings.append(own)
        return settings


def _is_vector(layer: Layer) -> bool:
    return all(size == 1 for size in layer.positions)


def _tap_arguments(layer: Layer) -> dict[str, Any]:
    arguments = {"output": layer.output, "call": layer.call, "layout": layer.layout}
    return {name: value for name, value in arguments.items() if value is not None}


def _tap_code(layer: Layer) -> str:
    arguments = _tap_arguments(layer)
    if not arguments:
        return _quoted(layer.name)
    return (
        f"Tap({', '.join([_quoted(layer.name), *(f'{name}={_quoted(value)}' for name, value in arguments.items())])})"
    )


def _quoted(value: Any) -> str:
    """A value as Python code, strings in double quotes."""
    return f'"{value}"' if isinstance(value, str) and repr(value) == f"'{value}'" else repr(value)
