"""Terms: a loss at a place in the two networks, with a weight and perhaps an adapter."""

from lightning_distill.terms.base import DistillationTerm, as_terms, connected, teacher_inputs_of
from lightning_distill.terms.cross_head import CrossHeadDistillation
from lightning_distill.terms.cross_tokenizer import CrossTokenizerDistillation
from lightning_distill.terms.encoders import (
    AttentionDistillation,
    AttentionRelationDistillation,
    HiddenStatesDistillation,
)
from lightning_distill.terms.features import FeatureDistillation, SelfDistillation
from lightning_distill.terms.fused_linear import FusedLinearDistillation
from lightning_distill.terms.logits import LogitsDistillation
from lightning_distill.terms.reused_classifier import ReusedClassifierDistillation
from lightning_distill.terms.review import ReviewDistillation
from lightning_distill.terms.tokens import SequenceDistillation

__all__ = [
    "AttentionDistillation",
    "AttentionRelationDistillation",
    "CrossHeadDistillation",
    "CrossTokenizerDistillation",
    "DistillationTerm",
    "FeatureDistillation",
    "FusedLinearDistillation",
    "HiddenStatesDistillation",
    "LogitsDistillation",
    "ReusedClassifierDistillation",
    "ReviewDistillation",
    "SelfDistillation",
    "SequenceDistillation",
    "as_terms",
    "connected",
    "teacher_inputs_of",
]
