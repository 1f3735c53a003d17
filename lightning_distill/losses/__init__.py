"""Losses: small modules with checked settings, called with the student's tensor, then the teacher's."""

from lightning_distill.losses.attention import AttentionMapLoss, AttentionRelationLoss
from lightning_distill.losses.base import DistillationLoss
from lightning_distill.losses.divergences import GeneralizedJSDLoss, ReverseKLLoss, SkewKLLoss, TotalVariationLoss
from lightning_distill.losses.features import AttentionTransferLoss, ChannelWiseLoss, FeatureDistance
from lightning_distill.losses.learned import MaskedGenerativeLoss, VariationalInformationLoss
from lightning_distill.losses.logit_relations import DISTLoss, MultiLevelLogitLoss
from lightning_distill.losses.logits import LogitMSELoss, SoftCrossEntropyLoss, SoftTargetLoss
from lightning_distill.losses.normalized import (
    CKALoss,
    FeatureMapTransferLoss,
    NeuronSelectivityLoss,
    PatientLoss,
    PearsonFeatureLoss,
)
from lightning_distill.losses.relations import (
    CorrelationCongruenceLoss,
    InterChannelCorrelationLoss,
    ProbabilisticTransferLoss,
    RelationalLoss,
    SimilarityPreservingLoss,
)
from lightning_distill.losses.targets import (
    BinarySoftTargetLoss,
    DecoupledKDLoss,
    NormalizedKDLoss,
    WeightedSoftLabelLoss,
)

__all__ = [
    "AttentionMapLoss",
    "AttentionRelationLoss",
    "AttentionTransferLoss",
    "BinarySoftTargetLoss",
    "CKALoss",
    "ChannelWiseLoss",
    "CorrelationCongruenceLoss",
    "DISTLoss",
    "DecoupledKDLoss",
    "DistillationLoss",
    "FeatureDistance",
    "FeatureMapTransferLoss",
    "GeneralizedJSDLoss",
    "InterChannelCorrelationLoss",
    "LogitMSELoss",
    "MaskedGenerativeLoss",
    "MultiLevelLogitLoss",
    "NeuronSelectivityLoss",
    "NormalizedKDLoss",
    "PatientLoss",
    "PearsonFeatureLoss",
    "ProbabilisticTransferLoss",
    "RelationalLoss",
    "ReverseKLLoss",
    "SimilarityPreservingLoss",
    "SkewKLLoss",
    "SoftCrossEntropyLoss",
    "SoftTargetLoss",
    "TotalVariationLoss",
    "VariationalInformationLoss",
    "WeightedSoftLabelLoss",
]
