"""Knowledge distillation for PyTorch Lightning: train a small student to match a large teacher.

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

from lightning_distill import functional, losses, metrics
from lightning_distill.callback import DistillCallback
from lightning_distill.distiller import Distiller
from lightning_distill.losses import (
    AttentionTransferLoss,
    DistillationLoss,
    FeatureDistance,
    LogitMSELoss,
    SoftCrossEntropyLoss,
    SoftTargetLoss,
)
from lightning_distill.metrics import TeacherAgreement, TeacherDivergence
from lightning_distill.module import DistillModule
from lightning_distill.taps import Call, Tap
from lightning_distill.teacher import load_teacher
from lightning_distill.terms import DistillationTerm, FeatureDistillation, LogitsDistillation

__version__ = "0.1.0"

__all__ = [
    "AttentionTransferLoss",
    "Call",
    "DistillCallback",
    "DistillModule",
    "DistillationLoss",
    "DistillationTerm",
    "Distiller",
    "FeatureDistance",
    "FeatureDistillation",
    "LogitMSELoss",
    "LogitsDistillation",
    "SoftCrossEntropyLoss",
    "SoftTargetLoss",
    "Tap",
    "TeacherAgreement",
    "TeacherDivergence",
    "functional",
    "load_teacher",
    "losses",
    "metrics",
]
