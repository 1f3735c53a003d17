"""The launcher: distillation from a YAML file, a configuration object, or hooks in a training function of your own."""

from __future__ import annotations

from keras_distill.launcher.compression import (
    CompressionManager,
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    prepare_compression,
)
from keras_distill.launcher.conf import DistillationConf
from keras_distill.launcher.criteria import IntermediateLayersKnowledgeDistillationLoss, KnowledgeDistillationLoss
from keras_distill.launcher.distillation import Distillation

__all__ = [
    "CompressionManager",
    "Distillation",
    "DistillationConf",
    "DistillationConfig",
    "IntermediateLayersKnowledgeDistillationLoss",
    "IntermediateLayersKnowledgeDistillationLossConfig",
    "KnowledgeDistillationLoss",
    "KnowledgeDistillationLossConfig",
    "prepare_compression",
]
