"""The launcher: distillation from a YAML file, a configuration object, or hooks in a training function of your own."""

from __future__ import annotations

from lightning_distill.launcher.compression import (
    CompressionManager,
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    SelfKnowledgeDistillationLossConfig,
    prepare_compression,
)
from lightning_distill.launcher.conf import DistillationConf
from lightning_distill.launcher.criteria import (
    IntermediateLayersKnowledgeDistillationLoss,
    KnowledgeDistillationLoss,
    SelfKnowledgeDistillationLoss,
)
from lightning_distill.launcher.distillation import Distillation

__all__ = [
    "CompressionManager",
    "Distillation",
    "DistillationConf",
    "DistillationConfig",
    "IntermediateLayersKnowledgeDistillationLoss",
    "IntermediateLayersKnowledgeDistillationLossConfig",
    "KnowledgeDistillationLoss",
    "KnowledgeDistillationLossConfig",
    "SelfKnowledgeDistillationLoss",
    "SelfKnowledgeDistillationLossConfig",
    "prepare_compression",
]
