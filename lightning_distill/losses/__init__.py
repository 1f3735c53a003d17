"""Losses: small modules with checked settings, called with the student's tensor, then the teacher's."""

from lightning_distill.losses.base import DistillationLoss
from lightning_distill.losses.divergences import GeneralizedJSDLoss, ReverseKLLoss, SkewKLLoss, TotalVariationLoss
from lightning_distill.losses.features import AttentionTransferLoss, FeatureDistance
from lightning_distill.losses.logits import LogitMSELoss, SoftCrossEntropyLoss, SoftTargetLoss

__all__ = [
    "AttentionTransferLoss",
    "DistillationLoss",
    "FeatureDistance",
    "GeneralizedJSDLoss",
    "LogitMSELoss",
    "ReverseKLLoss",
    "SkewKLLoss",
    "SoftCrossEntropyLoss",
    "SoftTargetLoss",
    "TotalVariationLoss",
]
