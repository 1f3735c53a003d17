"""The second version of the older API: ``prepare_compression`` and its configurations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from distill_core.launcher import compression
from distill_core.launcher.words import Words
from lightning_distill import checks
from lightning_distill.launcher.conf import DistillationConf
from lightning_distill.launcher.criteria import (
    IntermediateLayersKnowledgeDistillationLoss,
    KnowledgeDistillationLoss,
    SelfKnowledgeDistillationLoss,
)
from lightning_distill.launcher.distillation import Distillation


class KnowledgeDistillationLossConfig(compression.KnowledgeConfig):
    """Settings of :class:`KnowledgeDistillationLoss`; the arguments are the same."""

    kind = KnowledgeDistillationLoss


class IntermediateLayersKnowledgeDistillationLossConfig(compression.IntermediateLayersConfig):
    """Settings of :class:`IntermediateLayersKnowledgeDistillationLoss`; the arguments are the same."""

    kind = IntermediateLayersKnowledgeDistillationLoss


class SelfKnowledgeDistillationLossConfig(compression.SelfKnowledgeConfig):
    """Settings of :class:`SelfKnowledgeDistillationLoss`; the arguments are the same."""

    kind = SelfKnowledgeDistillationLoss


class DistillationConfig(compression.DistillationConfig):
    """The teacher and the criterion of a distillation, for :func:`prepare_compression`.

    Args:
        teacher_model: The network to match; not used by self-distillation.
        criterion: One of the ``LossConfig`` objects, a criterion, or a function of ``(student_output, teacher_output,
            student_loss)``; ``None`` is ``KnowledgeDistillationLossConfig()``.
        optimizer: For ``compression_manager.distiller.fit()``, which trains without a loop of your own: a dict like the
            YAML file's section, an optimizer, or a function of parameters.

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
        path = folder / "best_model.pt"
        torch.save(self.model.state_dict(), path)
        return path


def prepare_compression(
    model: nn.Module, confs: compression.DistillationConfig | Sequence[compression.DistillationConfig]
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
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> conf = DistillationConfig(teacher, KnowledgeDistillationLossConfig(2.0, ["CE", "KL"]))
        >>> manager = prepare_compression(student, conf)
        >>> x, labels = torch.randn(8, 4), torch.randint(3, (8,))
        >>> manager.callbacks.on_train_begin()
        >>> output = manager.model(x)
        >>> loss = nn.functional.cross_entropy(output, labels)
        >>> manager.callbacks.on_after_compute_loss(x, output, loss).backward()
        >>> manager.callbacks.on_train_end()
        >>> student.weight.grad.shape
        torch.Size([3, 4])
    """
    conf: Any = compression.only_config(confs, checks)
    return CompressionManager(Distillation(conf.conf), model, conf)
