"""The formulas: tensors in, one loss per example out. The student's tensor always comes first, channels are last."""

from keras_distill.functional.attention import (
    attention_kl,
    attention_mse,
    attention_relation,
)
from keras_distill.functional.divergences import (
    generalized_jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from keras_distill.functional.features import (
    attention_transfer,
    channel_wise_kl,
    feature_cosine,
    feature_kl,
    feature_l1,
    feature_mse,
    feature_smooth_l1,
)
from keras_distill.functional.learned import masked_generative, variational_information
from keras_distill.functional.logit_relations import (
    batch_correlation,
    class_correlation,
    inter_class_relation,
    intra_class_relation,
    multi_level_logits,
)
from keras_distill.functional.logits import logit_mse, soft_cross_entropy, soft_target_kl
from keras_distill.functional.normalized import (
    centered_kernel_alignment,
    feature_map_transfer,
    neuron_selectivity,
    normalized_mse,
    pearson_feature,
)
from keras_distill.functional.relations import (
    correlation_congruence,
    inter_channel_correlation,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from keras_distill.functional.targets import (
    binary_soft_target,
    decoupled_kd,
    normalized_kd,
    weighted_soft_labels,
)

__all__ = [
    "attention_kl",
    "attention_mse",
    "attention_relation",
    "attention_transfer",
    "batch_correlation",
    "binary_soft_target",
    "centered_kernel_alignment",
    "channel_wise_kl",
    "class_correlation",
    "correlation_congruence",
    "decoupled_kd",
    "feature_cosine",
    "feature_kl",
    "feature_l1",
    "feature_map_transfer",
    "feature_mse",
    "feature_smooth_l1",
    "generalized_jsd",
    "inter_channel_correlation",
    "inter_class_relation",
    "intra_class_relation",
    "logit_mse",
    "masked_generative",
    "multi_level_logits",
    "neuron_selectivity",
    "normalized_kd",
    "normalized_mse",
    "pearson_feature",
    "probabilistic_transfer",
    "relational_angle",
    "relational_distance",
    "reverse_kl",
    "similarity_preserving",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "soft_target_kl",
    "total_variation",
    "variational_information",
    "weighted_soft_labels",
]
