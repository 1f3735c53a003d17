"""Knowledge distillation for Keras: train a small student to match a large teacher with ``compile`` and ``fit``.

===================================  ========================  ==================================================
paper                                class                     function
===================================  ========================  ==================================================
Hinton 2015, arXiv:1503.02531        SoftTargetLoss            functional.soft_target_kl
Sun 2024, arXiv:2403.01427           SoftTargetLoss            functional.soft_target_kl(standardize=True)
Hinton 2015, arXiv:1503.02531        SoftCrossEntropyLoss      functional.soft_cross_entropy
Ba & Caruana 2014, arXiv:1312.6184   LogitMSELoss              functional.logit_mse
Zagoruyko 2017, arXiv:1612.03928     AttentionTransferLoss     functional.attention_transfer
Romero 2015, arXiv:1412.6550         FeatureDistance("mse")    functional.feature_mse, feature_l1, feature_smooth_l1
Sanh 2019, arXiv:1910.01108          FeatureDistance("cosine") functional.feature_cosine
softmax over channels                FeatureDistance("kl")     functional.feature_kl
===================================  ========================  ==================================================
"""

import importlib.util

if importlib.util.find_spec("keras") is None:
    raise ModuleNotFoundError('keras_distill needs Keras: pip install "lightning-distill[keras]".', name="keras")

from keras_distill import functional, losses, metrics, schedules
from keras_distill.callbacks import DistillationScheduler, StudentCheckpoint
from keras_distill.losses import (
    AttentionTransferLoss,
    DistillationLoss,
    FeatureDistance,
    LogitMSELoss,
    SoftCrossEntropyLoss,
    SoftTargetLoss,
)
from keras_distill.metrics import TeacherAgreement, TeacherDivergence
from keras_distill.model import DistillModel
from keras_distill.taps import Call, Tap
from keras_distill.targets import DistillTargets
from keras_distill.term import DistillationTerm
from keras_distill.terms import FeatureDistillation, LogitsDistillation

__version__ = "0.1.0"

__all__ = [
    "AttentionTransferLoss",
    "Call",
    "DistillModel",
    "DistillTargets",
    "DistillationLoss",
    "DistillationScheduler",
    "DistillationTerm",
    "FeatureDistance",
    "FeatureDistillation",
    "LogitMSELoss",
    "LogitsDistillation",
    "SoftCrossEntropyLoss",
    "SoftTargetLoss",
    "StudentCheckpoint",
    "Tap",
    "TeacherAgreement",
    "TeacherDivergence",
    "functional",
    "losses",
    "metrics",
    "schedules",
]
