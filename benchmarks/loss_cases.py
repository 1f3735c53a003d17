"""The losses without parts of their own that the benchmarks measure, each with shapes for both halves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]
MAPS, TOKENS, SCORES, LOGITS = (256, 512, 8, 8), (256, 64, 512), (256, 8, 64, 64), (256, 1000)
VECTORS, FEW_MAPS = (256, 512), (16, 64, 8, 8)
SMALL = {MAPS: (32, 64, 8, 8), FEW_MAPS: (4, 16, 4, 4), TOKENS: (8, 64, 64), SCORES: (8, 8, 32, 32), LOGITS: (64, 100)}


@dataclass(frozen=True)
class Case:
    """One loss.

    Attributes:
        loss: Class in either half's ``losses``.
        formula: Function in ``loss_formulas``.
        settings: Of the loss.
        shape: Shape of the inputs when memory is measured.
        timed: Shape when time is measured, smaller if the paper's formula does not fit into memory; None for ``shape``.
        squared: Whether the formula has a number for each pair of pixels, so that memory grows with their square.
    """

    loss: str
    formula: str
    settings: dict[str, Any] = field(default_factory=dict)
    shape: Shape = MAPS
    timed: Shape | None = None
    squared: bool = False

    @property
    def gated(self) -> bool:
        """Whether memory has a gate: only losses on features have one, since logits are small."""
        return self.shape != LOGITS and not self.squared


CASES = {
    "similarity preserving": Case("SimilarityPreservingLoss", "similarity_preserving"),
    "relational, distances": Case("RelationalLoss", "relational_distance", {"angle_weight": 0.0}),
    "relational": Case("RelationalLoss", "relational", timed=VECTORS),
    "probabilistic transfer": Case("ProbabilisticTransferLoss", "probabilistic_transfer"),
    "congruence, gaussian": Case("CorrelationCongruenceLoss", "gaussian_congruence"),
    "congruence, neighbour": Case("CorrelationCongruenceLoss", "neighbour_congruence", {"kernel": "neighbour"}),
    "inter-channel correlation": Case("InterChannelCorrelationLoss", "inter_channel_correlation"),
    "neuron selectivity": Case("NeuronSelectivityLoss", "neuron_selectivity", timed=FEW_MAPS),
    "CKA": Case("CKALoss", "centered_kernel_alignment", timed=VECTORS),
    "Pearson": Case("PearsonFeatureLoss", "pearson_feature"),
    "Patient": Case("PatientLoss", "normalized_mse"),
    "attention transfer": Case("AttentionTransferLoss", "attention_transfer"),
    "attention relation": Case("AttentionRelationLoss", "attention_relation", {"relation_heads": 8}, TOKENS),
    "attention map": Case("AttentionMapLoss", "attention_kl", shape=SCORES),
    "pixel relation": Case("PixelRelationLoss", "pixel_relation", shape=FEW_MAPS, squared=True),
    "channel-wise": Case("ChannelWiseLoss", "channel_wise"),
    "hierarchical context": Case("HierarchicalContextLoss", "hierarchical_context"),
    "feature map transfer": Case("FeatureMapTransferLoss", "feature_map_transfer"),
    "soft targets": Case("SoftTargetLoss", "soft_targets", shape=LOGITS),
    "reverse KL": Case("ReverseKLLoss", "reverse_kl", shape=LOGITS),
    "Jensen-Shannon": Case("GeneralizedJSDLoss", "jensen_shannon", shape=LOGITS),
    "skew KL": Case("SkewKLLoss", "skew_kl", shape=LOGITS),
    "total variation": Case("TotalVariationLoss", "total_variation", shape=LOGITS),
    "alpha-beta": Case("AlphaBetaLoss", "alpha_beta", shape=LOGITS),
    "universal logits": Case("UniversalLogitLoss", "universal_logits", shape=LOGITS),
    "DIST": Case("DISTLoss", "dist", shape=LOGITS),
    "multi-level logits": Case("MultiLevelLogitLoss", "multi_level", shape=LOGITS),
}
