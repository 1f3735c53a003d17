"""The term on inner layers of the student alone."""

from __future__ import annotations

from typing import Any

import keras

from keras_distill.recording import Call, Tap
from keras_distill.terms.features import FeatureDistillation


@keras.saving.register_keras_serializable(package="keras_distill")
class SelfDistillation(FeatureDistillation):
    """A loss between shallow layers of the student and a deep layer of the student, for a network with several exits.

    The shallow layers learn from the deep layer, whose feature has no gradient. It needs no teacher: pass
    ``teacher=None`` if it is the only term.

    Args:
        student_layer: The shallow layer, or several.
        teacher_layer: The deep layer of the same network, one for all shallow layers or one for each.
        loss: As for :class:`FeatureDistillation`. For exits that return logits use a loss on logits.
        weight: Factor of the term in the total loss, a number or a schedule.
        adapter: As for :class:`FeatureDistillation`.
        use_sample_weight: Whether the batch's sample weights are applied to the term.
        name: Name in logs and files; ``None`` takes the shallow layers' names.
        **kwargs: ``mask`` and ``ignore_index`` of :class:`FeatureDistillation`, and further settings of
            :class:`DistillationTerm`.

    Raises:
        ValueError: As for :class:`FeatureDistillation`.
        TypeError: If ``loss`` cannot be called.

    Example:
        >>> from keras_distill import SoftTargetLoss
        >>> SelfDistillation(["exit1", "exit2"], "exit3", SoftTargetLoss(temperature=3.0), weight=0.5).name
        'exit1_exit2'

    References:
        Zhang et al. (2019). Be Your Own Teacher, arXiv:1905.08094.
    """

    needs_teacher = False

    @property
    def pairs(self) -> list[tuple[Tap, Tap]]:
        """The pairs of taps that are compared, a shallow and a deep one of the student."""
        number = len(self.student_taps) // 2
        return list(zip(self.student_taps[:number], self.student_taps[number:], strict=True))

    def build_from_calls(self, student: Call, teacher: Call) -> None:
        """Make the adapters from the shapes of the student's features."""
        super().build_from_calls(student, student)

    def compute(self, student: Call, teacher: Call, labels: Any = None, sample_weight: Any = None) -> Any:
        """The loss without its weight, a scalar."""
        return super().compute(student, student, labels, sample_weight)

    def _paired_taps(self, student_taps: list[Tap], teacher_taps: list[Tap]) -> tuple[list[Tap], list[Tap]]:
        """The taps in the order of pairs; a single deep layer is the target of every shallow one."""
        return student_taps, teacher_taps * len(student_taps) if len(teacher_taps) == 1 else teacher_taps

    def _store_taps(self, student_taps: list[Tap], teacher_taps: list[Tap]) -> None:
        """Set the taps, all of the student."""
        self.student_taps, self.teacher_taps = [*student_taps, *teacher_taps], []
