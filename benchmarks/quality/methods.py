"""The losses of the table, each as a method: the same recipe for all, and one loss for each.

Every method is the task's loss plus one term. Its weight is ``"balanced"``: at the student's output, or at the feature
that it compares, its gradient is as large as the task's. So no loss gains from a weight that somebody has tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

Terms = Callable[[], list[Any]]
Losses = Mapping[str, Mapping[str, Any]]

# The settings of each loss, by the name of its class and, after a comma, what is special.
ON_LOGITS: Losses = {
    "SoftTargetLoss": {},
    "SoftTargetLoss, standardized": {"temperature": 2.0, "standardize": True},
    "SoftCrossEntropyLoss": {"temperature": 4.0},
    "HardTargetLoss": {},
    "LogitMSELoss": {},
    "BinarySoftTargetLoss": {},
    "ReverseKLLoss": {},
    "GeneralizedJSDLoss": {},
    "SkewKLLoss": {},
    "TotalVariationLoss": {},
    "UniversalLogitLoss": {},
    "TAIDLoss": {},
    "AlphaBetaLoss": {},
    "DecoupledKDLoss": {},
    "NormalizedKDLoss": {},
    "WeightedSoftLabelLoss": {},
    "MinifinetuningLoss": {},
    "DISTLoss": {},
    "MultiLevelLogitLoss": {},
}
ON_MAPS: Losses = {
    "mse": {},
    "cosine": {},
    "ChannelWiseLoss": {},
    "AttentionTransferLoss": {},
    "PixelRelationLoss": {},
    "HierarchicalContextLoss": {},
    "PearsonFeatureLoss": {},
    "NeuronSelectivityLoss": {},
    "CKALoss": {},
    "FeatureMapTransferLoss": {},
    "VariationalInformationLoss": {},
    "MaskedGenerativeLoss": {},
    "SimpleRecipeLoss": {},
    "SoftmaxRegressionLoss": {},
    "FactorTransferLoss": {},
    "SimilarityPreservingLoss": {},
    "InterChannelCorrelationLoss": {},
}
ON_VECTORS: Losses = {
    "PatientLoss": {},
    "QueueSimilarityLoss": {"size": 1000},
    "RelationalLoss": {},
    "ProbabilisticTransferLoss": {},
    "CorrelationCongruenceLoss": {},
}
LEFT_OUT = {
    "ActivationBoundaryLoss": "its paper trains with it before the task's loss, not beside it",
    "SolutionFlowLoss": "its paper trains with it before the task's loss, not beside it",
    "AttentionMapLoss": "these networks have no attention",
    "AttentionRelationLoss": "these networks have no attention",
    "ContrastiveRepresentationLoss": "it needs the numbers of the examples, which these batches do not hold",
    "FocalGlobalLoss": "it needs boxes",
    "LocalizationLoss": "it needs boxes",
    "QualityFocalLoss": "it is for the scores of detectors",
    "ListwiseKLLoss": "it needs queries with candidates",
    "MarginMSELoss": "it needs queries with candidates",
}


def table(package: ModuleType, weight: float | str, before_relu: tuple[str, str]) -> dict[str, Terms]:
    """The terms of each loss.

    Args:
        package: :mod:`lightning_distill` or :mod:`keras_distill`.
        weight: Of every term.
        before_relu: The layers of the student and of the teacher before the last ReLU.

    Returns:
        By name, a function that makes the terms, for networks with the layers ``deep`` and ``pooled``.
    """

    def loss(name: str, settings: Mapping[str, Any]) -> Any:
        return getattr(package.losses, name.split(",")[0])(**settings) if name[0].isupper() else name

    def on_logits(name: str, settings: Mapping[str, Any]) -> Terms:
        return lambda: [package.LogitsDistillation(loss(name, settings), weight=weight)]

    def on_layers(layers: tuple[str, str], name: str, settings: Mapping[str, Any]) -> Terms:
        return lambda: [package.FeatureDistillation(*layers, loss(name, settings), weight=weight)]

    return {
        **{name: on_logits(name, settings) for name, settings in ON_LOGITS.items()},
        **{name: on_layers(("deep", "deep"), name, settings) for name, settings in ON_MAPS.items()},
        **{name: on_layers(("pooled", "pooled"), name, settings) for name, settings in ON_VECTORS.items()},
        "MarginReLULoss": on_layers(before_relu, "MarginReLULoss", {}),
        "ReusedClassifierDistillation": lambda: [package.ReusedClassifierDistillation("deep", "deep", weight=weight)],
    }
