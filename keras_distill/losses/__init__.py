"""The losses: a ``keras.losses.Loss`` for each formula, called with the teacher's tensor, then the student's."""

from keras_distill.losses.base import DistillationLoss, FunctionLoss
from keras_distill.losses.features import AttentionTransferLoss, FeatureDistance
from keras_distill.losses.logits import LogitMSELoss, SoftCrossEntropyLoss, SoftTargetLoss

__all__ = [
    "AttentionTransferLoss",
    "DistillationLoss",
    "FeatureDistance",
    "FunctionLoss",
    "LogitMSELoss",
    "SoftCrossEntropyLoss",
    "SoftTargetLoss",
]
