"""The formulas: tensors in, one loss per example out. The student's tensor always comes first, channels are last."""

from keras_distill.functional.features import (
    attention_transfer,
    feature_cosine,
    feature_kl,
    feature_l1,
    feature_mse,
    feature_smooth_l1,
)
from keras_distill.functional.logits import logit_mse, soft_cross_entropy, soft_target_kl

__all__ = [
    "attention_transfer",
    "feature_cosine",
    "feature_kl",
    "feature_l1",
    "feature_mse",
    "feature_smooth_l1",
    "logit_mse",
    "soft_cross_entropy",
    "soft_target_kl",
]
