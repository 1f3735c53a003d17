"""The losses: a ``keras.losses.Loss`` for each formula, called with the teacher's tensor, then the student's."""

from keras_distill.losses.attention import (
    AttentionMapLoss,
    AttentionRelationLoss,
)
from keras_distill.losses.base import DistillationLoss, FunctionLoss
from keras_distill.losses.divergences import GeneralizedJSDLoss, ReverseKLLoss, SkewKLLoss, TotalVariationLoss
from keras_distill.losses.features import AttentionTransferLoss, ChannelWiseLoss, FeatureDistance
from keras_distill.losses.learned import MaskedGenerativeLoss, VariationalInformationLoss
from keras_distill.losses.logit_relations import DISTLoss, MultiLevelLogitLoss
from keras_distill.losses.logits import LogitMSELoss, SoftCrossEntropyLoss, SoftTargetLoss
from keras_distill.losses.normalized import (
    CKALoss,
    FeatureMapTransferLoss,
    NeuronSelectivityLoss,
    PatientLoss,
    PearsonFeatureLoss,
)
from keras_distill.losses.relations import (
    CorrelationCongruenceLoss,
    InterChannelCorrelationLoss,
    ProbabilisticTransferLoss,
    RelationalLoss,
    SimilarityPreservingLoss,
)
from keras_distill.losses.targets import (
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
    "FunctionLoss",
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
