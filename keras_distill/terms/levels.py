"""The layers of a term as taps, and the levels of two feature pyramids, in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import keras

from keras_distill import checks
from keras_distill.recording import Call, Tap
from keras_distill.schedules import deserialized

Pair: TypeAlias = tuple[Tap, Tap]
Layers: TypeAlias = str | keras.layers.Layer | Tap | Sequence[str | keras.layers.Layer | Tap]


def matched(students: Sequence[Tap], teachers: Sequence[Tap]) -> bool:
    """Whether two lists of levels are equally long, and name the same levels or none.

    Args:
        students: The student's levels, sorted if they have names.
        teachers: The teacher's.
    """
    names = [[level.last for level in levels] for levels in (students, teachers)]
    # a single map has no name; the order of a dict is not known in graphs, so that a dict and a list cannot be paired
    return len(students) == len(teachers) and (None in (*names[0], *names[1]) or names[0] == names[1])


def paired_levels(student: Call, student_tap: Tap, teacher: Call, teacher_tap: Tap) -> list[Pair]:
    """The pairs of levels of two pyramids: by name if both have names, in order if neither has.

    Args:
        student: The student's call.
        student_tap: The student's pyramid, a tap with ``output="*"``, or a single place.
        teacher: The call that holds the teacher's.
        teacher_tap: The teacher's pyramid.

    Returns:
        The taps of each pair.

    Raises:
        ValueError: If the two do not have the same levels.
    """
    if not (student_tap.spreads or teacher_tap.spreads):
        return [(student_tap, teacher_tap)]
    students, teachers = student.levels(student_tap), teacher.levels(teacher_tap)
    if not matched(students, teachers):
        names = [[level.last for level in levels] for levels in (students, teachers)]
        layers = f"student layer {student_tap.name!r} and teacher layer {teacher_tap.name!r}"
        expected = f"{layers} to return the same levels for output='*'"
        remedy = f"Name the levels to compare: [Tap({student_tap.name!r}, output={names[0][0]!r}), ...]."
        raise ValueError(checks.message(expected, f"{names[0]} and {names[1]}", remedy))
    return [*zip(students, teachers, strict=True)]


def as_taps(layers: Layers) -> list[Tap]:
    """One layer or several as taps."""
    return [Tap.of(layer) for layer in (layers if isinstance(layers, (list, tuple)) else [layers])]


def taps_and_settings(config: dict[str, Any], *sides: str) -> dict[str, Any]:
    """The arguments of a term's constructor from its config, whose entries for the two sides are lists of taps."""
    taps: dict[str, Any] = {side: [Tap(**tap) for tap in config[side]] for side in sides}
    if isinstance(config.get("boxes"), dict) and "layer" in config["boxes"]:
        taps["boxes"] = Tap(**config["boxes"])
    return {**deserialized({key: value for key, value in config.items() if key not in taps}), **taps}


def check_single(adapter: Any, pairs: int) -> None:
    """Raise if one layer would be the adapter of several pairs.

    Args:
        adapter: The setting of a term.
        pairs: Number of pairs.

    Raises:
        ValueError: If so.
    """
    if isinstance(adapter, keras.layers.Layer) and pairs > 1:
        remedy = "Pass a function that makes a layer for each pair."
        raise ValueError(checks.message("`adapter` not to be one layer for several pairs", f"{adapter}", remedy))
