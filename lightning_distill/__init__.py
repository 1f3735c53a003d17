"""Knowledge distillation for PyTorch Lightning: train a small student to match a large teacher.

Add a :class:`DistillCallback` to a Trainer::

    distill = DistillCallback(teacher, LogitsDistillation(SoftTargetLoss(temperature=4.0)), task_weight=0.1)
    Trainer(callbacks=[distill]).fit(module)

Or subclass :class:`DistillModule`, or use a :class:`Distiller` in your own loop. Each takes terms:
:class:`LogitsDistillation` compares outputs, :class:`FeatureDistillation` inner layers, and each term has one of these
losses.

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

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from distill_core import __version__ as __version__
from distill_core.as_module import answer, is_run
from distill_core.installed import unusable

if is_run("lightning_distill"):  # `python -m lightning_distill --help` ends here
    answer("distill_core.cli.lightning")
if _problem := unusable("lightning_distill", "torch", "lightning", "torchmetrics"):
    raise _problem

from lightning_distill import functional, losses, metrics, schedules
from lightning_distill.adapters import PCAProjection
from lightning_distill.cache import CacheError, TeacherCache, content_key
from lightning_distill.callback import DistillCallback
from lightning_distill.chain import assistant_chain
from lightning_distill.distiller import Distiller
from lightning_distill.language_module import CausalLMDistillModule
from lightning_distill.live import DistillSummary, LiveCurve
from lightning_distill.losses import *  # noqa: F403
from lightning_distill.losses.temperature import CurriculumTemperature
from lightning_distill.metrics import TeacherAgreement, TeacherDivergence
from lightning_distill.module import DistillModule
from lightning_distill.mutual import MutualLearning
from lightning_distill.on_policy import OnPolicyDistillation
from lightning_distill.recording import Call, Tap
from lightning_distill.schedules import Balanced
from lightning_distill.teachers import CallableTeacher, EMATeacher, Normalize, SelfTeacher, load_teacher
from lightning_distill.terms import (
    AttentionDistillation,
    AttentionRelationDistillation,
    CrossHeadDistillation,
    CrossTokenizerDistillation,
    DistillationTerm,
    FeatureDistillation,
    FusedLinearDistillation,
    HiddenStatesDistillation,
    LogitsDistillation,
    ReusedClassifierDistillation,
    ReviewDistillation,
    SelfDistillation,
    SequenceDistillation,
)

if TYPE_CHECKING:
    from distill_core.guidance.report import write_report
    from lightning_distill.guidance.compare import compare
    from lightning_distill.guidance.pairs import pair_layers
    from lightning_distill.launcher import (
        CompressionManager,
        Distillation,
        DistillationConf,
        DistillationConfig,
        IntermediateLayersKnowledgeDistillationLoss,
        IntermediateLayersKnowledgeDistillationLossConfig,
        KnowledgeDistillationLoss,
        KnowledgeDistillationLossConfig,
        SelfKnowledgeDistillationLoss,
        SelfKnowledgeDistillationLossConfig,
        prepare_compression,
    )

__all__ = [
    "AttentionDistillation",
    "AttentionRelationDistillation",
    "Balanced",
    "CacheError",
    "Call",
    "CallableTeacher",
    "CausalLMDistillModule",
    "CompressionManager",
    "CrossHeadDistillation",
    "CrossTokenizerDistillation",
    "CurriculumTemperature",
    "DistillCallback",
    "DistillModule",
    "DistillSummary",
    "Distillation",
    "DistillationConf",
    "DistillationConfig",
    "DistillationTerm",
    "Distiller",
    "EMATeacher",
    "FeatureDistillation",
    "FusedLinearDistillation",
    "HiddenStatesDistillation",
    "IntermediateLayersKnowledgeDistillationLoss",
    "IntermediateLayersKnowledgeDistillationLossConfig",
    "KnowledgeDistillationLoss",
    "KnowledgeDistillationLossConfig",
    "LiveCurve",
    "LogitsDistillation",
    "MutualLearning",
    "Normalize",
    "OnPolicyDistillation",
    "PCAProjection",
    "ReusedClassifierDistillation",
    "ReviewDistillation",
    "SelfDistillation",
    "SelfKnowledgeDistillationLoss",
    "SelfKnowledgeDistillationLossConfig",
    "SelfTeacher",
    "SequenceDistillation",
    "Tap",
    "TeacherAgreement",
    "TeacherCache",
    "TeacherDivergence",
    "assistant_chain",
    "compare",
    "content_key",
    "functional",
    "load_teacher",
    "losses",
    "metrics",
    "pair_layers",
    "prepare_compression",
    "schedules",
    "write_report",
]
__all__ += losses.__all__

# Imported when they are first asked for, because a training needs none of them; pydantic takes the launcher a while.
_GUIDANCE = {
    "compare": "lightning_distill.guidance",
    "pair_layers": "lightning_distill.guidance",
    "write_report": "distill_core.guidance.report",
}
_LATER = {name: _GUIDANCE.get(name, "lightning_distill.launcher") for name in __all__ if name not in globals()}
if find_spec("pydantic") is None or find_spec("yaml") is None:
    # `from lightning_distill import *` works without them
    __all__ = [name for name in __all__ if _LATER.get(name) != "lightning_distill.launcher"]


def __getattr__(name: str) -> Any:
    """A name that is imported when it is first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
