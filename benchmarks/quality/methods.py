"""The losses of the table, each as a method: the same recipe for all, and one loss for each.

Every method is the task's loss plus one term. Its weight is ``"balanced"``: at the student's output, or at the feature
that it compares, its gradient is as large as the task's. So no loss gains from a weight that somebody has tuned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_distill import FeatureDistillation, LogitsDistillation, ReusedClassifierDistillation, losses

Weight = float | str
Terms = Callable[[], list[Any]]

ON_LOGITS: dict[str, Callable[[], Any]] = {
    "SoftTargetLoss": losses.SoftTargetLoss,
    "SoftTargetLoss, standardized": partial(losses.SoftTargetLoss, 2.0, standardize=True),
    "SoftCrossEntropyLoss": partial(losses.SoftCrossEntropyLoss, 4.0),
    "HardTargetLoss": losses.HardTargetLoss,
    "LogitMSELoss": losses.LogitMSELoss,
    "BinarySoftTargetLoss": losses.BinarySoftTargetLoss,
    "ReverseKLLoss": losses.ReverseKLLoss,
    "GeneralizedJSDLoss": losses.GeneralizedJSDLoss,
    "SkewKLLoss": losses.SkewKLLoss,
    "TotalVariationLoss": losses.TotalVariationLoss,
    "UniversalLogitLoss": losses.UniversalLogitLoss,
    "TAIDLoss": losses.TAIDLoss,
    "AlphaBetaLoss": losses.AlphaBetaLoss,
    "DecoupledKDLoss": losses.DecoupledKDLoss,
    "NormalizedKDLoss": losses.NormalizedKDLoss,
    "WeightedSoftLabelLoss": losses.WeightedSoftLabelLoss,
    "MinifinetuningLoss": losses.MinifinetuningLoss,
    "DISTLoss": losses.DISTLoss,
    "MultiLevelLogitLoss": losses.MultiLevelLogitLoss,
}
ON_MAPS: dict[str, Any] = {
    "mse": lambda: "mse",
    "cosine": lambda: "cosine",
    "ChannelWiseLoss": losses.ChannelWiseLoss,
    "AttentionTransferLoss": losses.AttentionTransferLoss,
    "PixelRelationLoss": losses.PixelRelationLoss,
    "HierarchicalContextLoss": losses.HierarchicalContextLoss,
    "PearsonFeatureLoss": losses.PearsonFeatureLoss,
    "NeuronSelectivityLoss": losses.NeuronSelectivityLoss,
    "CKALoss": losses.CKALoss,
    "FeatureMapTransferLoss": losses.FeatureMapTransferLoss,
    "VariationalInformationLoss": losses.VariationalInformationLoss,
    "MaskedGenerativeLoss": losses.MaskedGenerativeLoss,
    "SimpleRecipeLoss": losses.SimpleRecipeLoss,
    "SoftmaxRegressionLoss": losses.SoftmaxRegressionLoss,
    "FactorTransferLoss": losses.FactorTransferLoss,
    "SimilarityPreservingLoss": losses.SimilarityPreservingLoss,
    "InterChannelCorrelationLoss": losses.InterChannelCorrelationLoss,
}
ON_VECTORS: dict[str, Any] = {
    "PatientLoss": losses.PatientLoss,
    "QueueSimilarityLoss": partial(losses.QueueSimilarityLoss, size=1000),
    "RelationalLoss": losses.RelationalLoss,
    "ProbabilisticTransferLoss": losses.ProbabilisticTransferLoss,
    "CorrelationCongruenceLoss": losses.CorrelationCongruenceLoss,
}
LEFT_OUT = {
    "ActivationBoundaryLoss": "its paper trains with it before the task's loss, not beside it",
    "SolutionFlowLoss": "its paper trains with it before the task's loss, not beside it",
    "AttentionMapLoss": "these networks have no attention",
    "AttentionRelationLoss": "these networks have no attention",
    "FocalGlobalLoss": "it needs boxes",
    "LocalizationLoss": "it needs boxes",
    "QualityFocalLoss": "it is for the scores of detectors",
    "ListwiseKLLoss": "it needs queries with candidates",
    "MarginMSELoss": "it needs queries with candidates",
}


def table(weight: Weight) -> dict[str, Terms]:
    """The terms of each loss, for networks with the layers of :class:`~benchmarks.quality.networks.Convolutional`."""

    def features(layer: str, loss: Callable[[], Any]) -> list[Any]:
        return [FeatureDistillation(layer, layer, loss(), weight=weight)]

    methods: dict[str, Terms] = {}
    for name, loss in ON_LOGITS.items():
        methods[name] = lambda loss=loss: [LogitsDistillation(loss(), weight=weight)]
    for name, loss in ON_MAPS.items():
        methods[name] = partial(features, "deep", loss)
    for name, loss in ON_VECTORS.items():
        methods[name] = partial(features, "pooled", loss)
    methods["MarginReLULoss"] = lambda: [
        FeatureDistillation("deep.0.1", "deep.1.1", losses.MarginReLULoss(), weight=weight)  # before the ReLU
    ]
    methods["ReusedClassifierDistillation"] = lambda: [ReusedClassifierDistillation("deep", "deep", weight=weight)]
    return methods
