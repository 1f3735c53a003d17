"""The second version of the older API: ``prepare_compression`` and its configurations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import keras

from distill_core.launcher import compression
from distill_core.launcher.words import Words
from keras_distill import checks
from keras_distill.launcher.conf import DistillationConf
from keras_distill.launcher.criteria import (
    IntermediateLayersKnowledgeDistillationLoss,
    KnowledgeDistillationLoss,
)
from keras_distill.launcher.distillation import Distillation


class KnowledgeDistillationLossConfig(compression.KnowledgeConfig):
    """Settings of :class:`KnowledgeDistillationLoss`; the arguments are the same."""

    kind = KnowledgeDistillationLoss


class IntermediateLayersKnowledgeDistillationLossConfig(compression.IntermediateLayersConfig):
    """Settings of :class:`IntermediateLayersKnowledgeDistillationLoss`; the arguments are the same."""

    kind = IntermediateLayersKnowledgeDistillationLoss


class DistillationConfig(compression.DistillationConfig):
    """The teacher and the criterion of a distillation, for :func:`prepare_compression`.

    Args:
        teacher_model: The network to match; None if its outputs are passed in each step.
        criterion: One of the ``LossConfig`` objects, a criterion, or a function of ``(student_output, teacher_output,
            student_loss)``; ``None`` is ``KnowledgeDistillationLossConfig()``.
        optimizer: For ``compression_manager.distiller.fit()``, which trains without a loop of your own: a dict like the
            YAML file's section, or an optimizer of Keras.

    Raises:
        TypeError: If ``criterion`` is not one of these.
        ValueError: If a setting of the optimizer is wrong.
    """

    checks: ClassVar[Words] = checks
    usual = KnowledgeDistillationLossConfig
    configuration = DistillationConf


class CompressionManager(compression.CompressionManager):
    """The student and the hooks of a training, made by :func:`prepare_compression`.

    The student is recorded until ``callbacks.on_train_end()`` or :meth:`close`, so a script may leave out the hooks
    that it does not need.

    Attributes:
        distiller: The :class:`Distillation`, whose attributes may be set: ``eval_func``, ``higher_is_better``, ...
        callbacks: The hooks.
    """

    def _write(self, folder: Path) -> Path:
        path = folder / "best_model.keras"
        self.model.save(path)
        return path


def prepare_compression(
    model: keras.Model, confs: compression.DistillationConfig | Sequence[compression.DistillationConfig]
) -> CompressionManager:
    """Prepare a student for distillation in a training loop of your own.

    Args:
        model: The student.
        confs: A :class:`DistillationConfig`, or a list with one.

    Returns:
        A manager with the student, ``model``, and the hooks, ``callbacks``.

    Raises:
        TypeError: If a configuration is not a :class:`DistillationConfig`.
        ValueError: If the list does not hold exactly one configuration, a layer does not exist, or the teacher is
            missing.

    Example:
        >>> student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> conf = DistillationConfig(teacher, KnowledgeDistillationLossConfig(2.0, ["CE", "KL"], [0.5, 0.5]))
        >>> manager = prepare_compression(student, conf)
        >>> manager.callbacks.on_train_begin()
        >>> x = keras.ops.ones((8, 4))
        >>> total = manager.callbacks.on_after_compute_loss(x, manager.model(x), 1.0)
        >>> manager.callbacks.on_train_end()
        >>> tuple(total.shape)
        ()
    """
    conf: Any = compression.only_config(confs, checks)
    return CompressionManager(Distillation(conf.conf), model, conf)
