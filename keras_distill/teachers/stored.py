"""A teacher whose outputs come with the targets of each batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from distill_core.store import CacheError, Manifest, Reader
from keras_distill import checks
from keras_distill.recording import Tap


class StoredTeacher:
    """Base of :class:`keras_distill.TeacherCache`, which may be one of several teachers.

    Attributes:
        reader: Reads the folder.
    """

    reader: Reader

    @property
    def manifest(self) -> Manifest:
        """The manifest of the folder: arrays, layers, data and versions."""
        return self.reader.manifest

    def check(self, taps: Iterable[Tap], reads_output: bool) -> None:
        """Check that the folder holds what terms read.

        Args:
            taps: The places in the teacher.
            reads_output: Whether a term reads the teacher's output.

        Raises:
            CacheError: If it does not.
        """
        places = [place.split("|", 1) for place in self.manifest.layers.values()]
        keys = [layer + (":input" if where == "input" else "") for layer, where in places]
        for tap in taps:
            whole = replace(tap, output=tap.outer or None) if tap.spreads else tap
            if whole.key not in keys:
                held = keys or "no layers"
                raise CacheError(
                    f"Expected the cache to hold the {tap.where} of the teacher's layer {tap.name!r}, but it holds"
                    f" {held}. Build it with layers=[{tap.name!r}]."
                )
        if reads_output and "output" not in self.manifest.arrays:
            raise CacheError("Expected the cache to hold the teacher's outputs, but it was built with outputs=False.")


def check_single_cache(teachers: Iterable[Any]) -> None:
    """Raise if there are several caches, since a batch carries the outputs of one.

    Args:
        teachers: The teachers.

    Raises:
        ValueError: If so.
    """
    caches = sum(isinstance(teacher, StoredTeacher) for teacher in teachers)
    if caches > 1:
        expected = "`teacher` to hold at most one cache, since a batch carries the outputs of one"
        raise ValueError(checks.message(expected, f"{caches}", "Pass the models of the others."))
