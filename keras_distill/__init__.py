"""Knowledge distillation for Keras: train a small student to match a large teacher with ``compile`` and ``fit``.

Wrap the student in a :class:`DistillModel`, then ``compile`` and ``fit``::

    model = DistillModel(student, teacher, LogitsDistillation(SoftTargetLoss(temperature=4.0)), task_weight=0.1)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(x, y)
    model.student.save("student.keras")

In your own loop use a :class:`DistillStep`. Each takes terms: :class:`LogitsDistillation` compares outputs,
:class:`SequenceDistillation` the token distributions of language models,
:class:`FeatureDistillation` inner layers, and each term has one of these losses.

==================================  =============================  ====================================================
paper                               class                          function
==================================  =============================  ====================================================
Hinton 2015, arXiv:1503.02531       SoftTargetLoss                 functional.soft_target_kl
Sun 2024, arXiv:2403.01427          SoftTargetLoss                 functional.soft_target_kl(standardize=True)
Hinton 2015, arXiv:1503.02531       SoftCrossEntropyLoss           functional.soft_cross_entropy
Touvron 2021, arXiv:2012.12877      HardTargetLoss                 functional.hard_target
Ba & Caruana 2014, arXiv:1312.6184  LogitMSELoss                   functional.logit_mse
Hinton 2015, a sigmoid per class    BinarySoftTargetLoss           functional.binary_soft_target
Gu 2023, arXiv:2306.08543           ReverseKLLoss                  functional.reverse_kl
Agarwal 2023, arXiv:2306.13649      GeneralizedJSDLoss             functional.generalized_jsd
Ko 2024, arXiv:2402.03898           SkewKLLoss                     functional.skew_kl, skew_reverse_kl
Wen 2023, arXiv:2307.15190          TotalVariationLoss             functional.total_variation
Boizard 2024, arXiv:2402.12030      UniversalLogitLoss             functional.universal_logit
Shing 2025, arXiv:2501.16937        TAIDLoss                       functional.interpolated_kl
Wang 2025, arXiv:2505.04560         AlphaBetaLoss                  functional.alpha_beta_divergence
Zhao 2022, arXiv:2203.08679         DecoupledKDLoss                functional.decoupled_kd
Yang 2023, arXiv:2303.13005         NormalizedKDLoss               functional.normalized_kd
Zhou 2021, arXiv:2102.00650         WeightedSoftLabelLoss          functional.weighted_soft_labels
Belcak 2025, arXiv:2506.15702       MinifinetuningLoss             functional.minifinetuning
Huang 2022, arXiv:2205.10536        DISTLoss                       functional.inter_class_relation, intra_class_relation
Jin 2023 (CVPR)                     MultiLevelLogitLoss            functional.multi_level_logits
Hofstaetter 2020, arXiv:2010.02666  MarginMSELoss                  functional.margin_mse
Lin 2020, arXiv:2010.11386          ListwiseKLLoss                 functional.listwise_kl
Zagoruyko 2017, arXiv:1612.03928    AttentionTransferLoss          functional.attention_transfer
Romero 2015, arXiv:1412.6550        FeatureDistance("mse")         functional.feature_mse, feature_l1, feature_smooth_l1
Sanh 2019, arXiv:1910.01108         FeatureDistance("cosine")      functional.feature_cosine
softmax over channels               FeatureDistance("kl")          functional.feature_kl
Shu 2021, arXiv:2011.13256          ChannelWiseLoss                functional.channel_wise_kl
Zheng 2022, arXiv:2102.12252        LocalizationLoss               functional.localization
Yang 2022, arXiv:2204.06986         PixelRelationLoss              functional.pixel_relation
Yang 2022, arXiv:2111.11837         FocalGlobalLoss                functional.focal_global, foreground_weights
Wang 2023, arXiv:2306.11369         QualityFocalLoss               functional.quality_focal
Heo 2019, arXiv:1811.03233          ActivationBoundaryLoss         functional.activation_boundary
Heo 2019, arXiv:1904.01866          MarginReLULoss                 functional.margin_relu_distance
Yim 2017 (CVPR)                     SolutionFlowLoss               functional.solution_flow
Chen 2021, arXiv:2104.09044         HierarchicalContextLoss        functional.hierarchical_context
Cao 2022, arXiv:2207.02039          PearsonFeatureLoss             functional.pearson_feature
Ahn 2019, arXiv:1904.05835          VariationalInformationLoss     functional.variational_information
Yang 2022, arXiv:2205.01529         MaskedGenerativeLoss           functional.masked_generative
Miles 2023, arXiv:2303.11098        SimpleRecipeLoss               functional.log_sum_distance
Yang 2021 (SRRL, ICLR)              SoftmaxRegressionLoss          functional.softmax_regression
Kim 2018, arXiv:1802.04977          FactorTransferLoss             functional.factor_transfer
Tian 2020, arXiv:1910.10699         ContrastiveRepresentationLoss  functional.contrastive_representation
Fang 2021, arXiv:2101.04731         QueueSimilarityLoss            functional.queue_similarity
Huang 2017, arXiv:1707.01219        NeuronSelectivityLoss          functional.neuron_selectivity
Kornblith 2019, arXiv:1905.00414    CKALoss                        functional.centered_kernel_alignment
Sun 2019, arXiv:1908.09355          PatientLoss                    functional.normalized_mse
Sun 2020, arXiv:2004.02984          FeatureMapTransferLoss         functional.feature_map_transfer
Tung 2019, arXiv:1907.09682         SimilarityPreservingLoss       functional.similarity_preserving
Park 2019, arXiv:1904.05068         RelationalLoss                 functional.relational_distance, relational_angle
Passalis 2018, arXiv:1803.10837     ProbabilisticTransferLoss      functional.probabilistic_transfer
Peng 2019, arXiv:1904.01802         CorrelationCongruenceLoss      functional.correlation_congruence
Liu 2021, arXiv:2202.03680          InterChannelCorrelationLoss    functional.inter_channel_correlation
Jiao 2020, arXiv:1909.10351         AttentionMapLoss("mse")        functional.attention_mse
Sun 2020, arXiv:2004.02984          AttentionMapLoss("kl")         functional.attention_kl
Wang 2021, arXiv:2012.15828         AttentionRelationLoss          functional.attention_relation
==================================  =============================  ====================================================
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from distill_core import __version__ as __version__
from distill_core.as_module import answer, is_run
from distill_core.installed import unusable

if is_run("keras_distill"):  # `python -m keras_distill --help` ends here
    answer("distill_core.cli.keras")
if _problem := unusable("keras_distill", "keras"):
    raise _problem
# Keras has imported its backend.
if _problem := unusable("keras_distill", sys.modules["keras"].config.backend()):
    raise _problem

from distill_core.store import CacheError
from keras_distill import functional, losses, metrics, schedules
from keras_distill.adapters import PCAProjection
from keras_distill.cache import TeacherCache
from keras_distill.callbacks import DistillationScheduler, StudentCheckpoint
from keras_distill.chains import assistant_chain
from keras_distill.images import Normalize
from keras_distill.live import DistillSummary, LiveCurve
from keras_distill.losses import (
    ActivationBoundaryLoss,
    AlphaBetaLoss,
    AttentionMapLoss,
    AttentionRelationLoss,
    AttentionTransferLoss,
    BinarySoftTargetLoss,
    ChannelWiseLoss,
    CKALoss,
    ContrastiveRepresentationLoss,
    CorrelationCongruenceLoss,
    DecoupledKDLoss,
    DistillationLoss,
    DISTLoss,
    FactorTransferLoss,
    FeatureDistance,
    FeatureMapTransferLoss,
    FocalGlobalLoss,
    GeneralizedJSDLoss,
    HardTargetLoss,
    HierarchicalContextLoss,
    InterChannelCorrelationLoss,
    ListwiseKLLoss,
    LocalizationLoss,
    LogitMSELoss,
    MarginMSELoss,
    MarginReLULoss,
    MaskedGenerativeLoss,
    MinifinetuningLoss,
    MultiLevelLogitLoss,
    NeuronSelectivityLoss,
    NormalizedKDLoss,
    PatientLoss,
    PearsonFeatureLoss,
    PixelRelationLoss,
    ProbabilisticTransferLoss,
    QualityFocalLoss,
    QueueSimilarityLoss,
    RelationalLoss,
    ReverseKLLoss,
    SimilarityPreservingLoss,
    SimpleRecipeLoss,
    SkewKLLoss,
    SoftCrossEntropyLoss,
    SoftmaxRegressionLoss,
    SoftTargetLoss,
    SolutionFlowLoss,
    TAIDLoss,
    TotalVariationLoss,
    UniversalLogitLoss,
    VariationalInformationLoss,
    WeightedSoftLabelLoss,
)
from keras_distill.losses.temperature import CurriculumTemperature
from keras_distill.metrics import TeacherAgreement, TeacherDivergence
from keras_distill.model import DistillModel
from keras_distill.mutual import MutualLearning
from keras_distill.recording import Call, Tap
from keras_distill.schedules import Balanced
from keras_distill.step import DistillStep
from keras_distill.targets import DistillTargets
from keras_distill.teachers import CallableTeacher, EMATeacher, SelfTeacher
from keras_distill.terms import (
    CrossHeadDistillation,
    DistillationTerm,
    FeatureDistillation,
    LogitsDistillation,
    ReusedClassifierDistillation,
    ReviewDistillation,
    SelfDistillation,
    SequenceDistillation,
)

__all__ = [
    "ActivationBoundaryLoss",
    "AlphaBetaLoss",
    "AttentionMapLoss",
    "AttentionRelationLoss",
    "AttentionTransferLoss",
    "Balanced",
    "BinarySoftTargetLoss",
    "CKALoss",
    "CacheError",
    "Call",
    "CallableTeacher",
    "ChannelWiseLoss",
    "CompressionManager",
    "ContrastiveRepresentationLoss",
    "CorrelationCongruenceLoss",
    "CrossHeadDistillation",
    "CurriculumTemperature",
    "DISTLoss",
    "DecoupledKDLoss",
    "DistillModel",
    "DistillStep",
    "DistillSummary",
    "DistillTargets",
    "Distillation",
    "DistillationConf",
    "DistillationConfig",
    "DistillationLoss",
    "DistillationScheduler",
    "DistillationTerm",
    "EMATeacher",
    "FactorTransferLoss",
    "FeatureDistance",
    "FeatureDistillation",
    "FeatureMapTransferLoss",
    "FocalGlobalLoss",
    "GeneralizedJSDLoss",
    "HardTargetLoss",
    "HierarchicalContextLoss",
    "InterChannelCorrelationLoss",
    "IntermediateLayersKnowledgeDistillationLoss",
    "IntermediateLayersKnowledgeDistillationLossConfig",
    "KnowledgeDistillationLoss",
    "KnowledgeDistillationLossConfig",
    "ListwiseKLLoss",
    "LiveCurve",
    "LocalizationLoss",
    "LogitMSELoss",
    "LogitsDistillation",
    "MarginMSELoss",
    "MarginReLULoss",
    "MaskedGenerativeLoss",
    "MinifinetuningLoss",
    "MultiLevelLogitLoss",
    "MutualLearning",
    "NeuronSelectivityLoss",
    "Normalize",
    "NormalizedKDLoss",
    "PCAProjection",
    "PatientLoss",
    "PearsonFeatureLoss",
    "PixelRelationLoss",
    "ProbabilisticTransferLoss",
    "QualityFocalLoss",
    "QueueSimilarityLoss",
    "RelationalLoss",
    "ReusedClassifierDistillation",
    "ReverseKLLoss",
    "ReviewDistillation",
    "SelfDistillation",
    "SelfTeacher",
    "SequenceDistillation",
    "SimilarityPreservingLoss",
    "SimpleRecipeLoss",
    "SkewKLLoss",
    "SoftCrossEntropyLoss",
    "SoftTargetLoss",
    "SoftmaxRegressionLoss",
    "SolutionFlowLoss",
    "StudentCheckpoint",
    "TAIDLoss",
    "Tap",
    "TeacherAgreement",
    "TeacherCache",
    "TeacherDivergence",
    "TotalVariationLoss",
    "UniversalLogitLoss",
    "VariationalInformationLoss",
    "WeightedSoftLabelLoss",
    "assistant_chain",
    "compare",
    "functional",
    "losses",
    "metrics",
    "pair_layers",
    "prepare_compression",
    "schedules",
    "write_report",
]

# Imported when they are first asked for, because a training needs none of them; pydantic takes the launcher a while.
_GUIDANCE = {
    "compare": "keras_distill.guidance",
    "pair_layers": "keras_distill.guidance",
    "write_report": "distill_core.guidance.report",
}
_LATER = {name: _GUIDANCE.get(name, "keras_distill.launcher") for name in __all__ if name not in globals()}
if find_spec("pydantic") is None or find_spec("yaml") is None:
    # `from keras_distill import *` works without them
    __all__ = [name for name in __all__ if _LATER.get(name) != "keras_distill.launcher"]


def __getattr__(name: str) -> Any:
    """A name that is imported when it is first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
