"""Rows of ``cases.py`` for the losses on normalised features, relations and attention."""

from __future__ import annotations

import math

import oracle_features as oracle
import oracle_outputs
import torch.nn.functional as F
from loss_case import Arrays, Golden, LossCase
from torch import Tensor

from lightning_distill import losses


def larger_map_pooled(student: Tensor, teacher: Tensor, arrays: Arrays) -> tuple[Tensor, Tensor]:
    # The reference pools whichever map is larger, in case s2 the student's. Our terms resize the teacher's, always, and
    # our function takes equal sizes only: here the maps are made equal the reference's way.
    height = min(student.shape[2], teacher.shape[2])
    return F.adaptive_avg_pool2d(student, height), F.adaptive_avg_pool2d(teacher, height)


def _student_resized(student: Tensor, teacher: Tensor, arrays: Arrays) -> tuple[Tensor, Tensor]:
    return F.interpolate(student, teacher.shape[2:], mode="bilinear", align_corners=False), teacher


def _first_token(student: Tensor, teacher: Tensor, arrays: Arrays) -> tuple[Tensor, Tensor]:
    return (student[:, 0], teacher[:, 0]) if student.ndim == 3 else (student, teacher)


FEATURE_CASES = [
    LossCase(
        "pearson_feature",
        losses.PearsonFeatureLoss,
        oracle.pearson_feature,
        (3, 3, 2, 3),
        golden=(
            Golden("pkd_pearson", factor=lambda settings, shape: settings["loss_weight"], arrange=_student_resized),
        ),
        per_example=False,
    ),
    LossCase("pearson_tokens", losses.PearsonFeatureLoss, oracle.pearson_feature, (2, 4, 3), per_example=False),
    LossCase(
        "neuron_selectivity",
        losses.NeuronSelectivityLoss,
        oracle.neuron_selectivity,
        (2, 3, 2, 3),
        (2, 5, 2, 3),
        over="examples",
        golden=(Golden("nst", arrange=larger_map_pooled),),
    ),
    LossCase(
        "neuron_selectivity_tokens",
        losses.NeuronSelectivityLoss,
        oracle.neuron_selectivity,
        (2, 3, 5),
        (2, 3, 4),
        over="examples",
    ),
    LossCase(
        "cka",
        losses.CKALoss,
        oracle.cka,
        (4, 3, 2, 3),
        (4, 5),
        over="batch",
        golden=(Golden("cka"),),
        per_example=False,
    ),
    LossCase(
        "patient",
        losses.PatientLoss,
        oracle.normalized_mse,
        (2, 4, 5),
        golden=(
            # Case s2 switches the normalisation off: a row of "mse" has it.
            Golden("patient_kd", cases=("s1",)),
            # The reference sums over the channels.
            Golden("patient_kd_tb", factor=lambda settings, shape: shape[-1], arrange=_first_token),
        ),
    ),
    LossCase("patient_map", losses.PatientLoss, oracle.normalized_mse, (2, 3, 2, 3)),
    LossCase(
        "feature_map_transfer",
        losses.FeatureMapTransferLoss,
        oracle.feature_map_transfer,
        (2, 4, 5),
        settings={"eps": 1e-6},
        golden=(Golden("mobilebert_fmt", settings=lambda reference: {"eps": reference["eps"]}),),
    ),
    LossCase("feature_map_transfer_map", losses.FeatureMapTransferLoss, oracle.feature_map_transfer, (2, 5, 2, 3)),
    LossCase(
        "similarity_preserving",
        losses.SimilarityPreservingLoss,
        oracle.similarity_preserving,
        (4, 3, 2, 3),
        (4, 5),
        over="batch",
        golden=(Golden("similarity_preserving"),),
        per_example=False,
    ),
    LossCase(
        "relational",
        losses.RelationalLoss,
        oracle.relational,
        (4, 3, 2),
        (4, 5),
        over="batch",
        settings={"distance_weight": 2.0, "angle_weight": 3.0},
        golden=(
            Golden("rkd_distance", settings=lambda reference: {"distance_weight": 1.0, "angle_weight": 0.0}),
            Golden("rkd_angle", settings=lambda reference: {"distance_weight": 0.0, "angle_weight": 1.0}),
        ),
        per_example=False,
    ),
    LossCase(
        "probabilistic_transfer",
        losses.ProbabilisticTransferLoss,
        oracle.probabilistic_transfer,
        (4, 3, 2),
        (4, 5),
        over="batch",
        golden=(Golden("pkt"),),
        zero_at_identity=False,  # the eps in the logarithm leaves a gradient of 1e-9: a test of its own
        per_example=False,
    ),
    LossCase(
        "correlation_congruence",
        losses.CorrelationCongruenceLoss,
        oracle.correlation_congruence,
        (4, 3, 2),
        (4, 5),
        over="batch",
        settings={"gamma": 0.6, "order": 3},
        per_example=False,
    ),
    LossCase(
        "correlation_congruence_neighbours",
        losses.CorrelationCongruenceLoss,
        oracle.correlation_congruence,
        (4, 5),
        over="batch",
        settings={"kernel": "neighbour"},
        golden=(Golden("correlation_congruence", settings=lambda reference: {"kernel": "neighbour"}),),
        per_example=False,
    ),
    LossCase(
        "inter_channel_correlation",
        losses.InterChannelCorrelationLoss,
        oracle.inter_channel_correlation,
        (2, 3, 2, 3),
        (2, 3, 3, 1),
        over="examples",
        # The reference divides by the examples twice and by the channels once.
        golden=(Golden("ickd", factor=lambda settings, shape: shape[1] / shape[0]),),
    ),
    LossCase(
        "attention_kl",
        losses.AttentionMapLoss,
        oracle.attention_kl,
        (2, 2, 3, 4),
        over="examples",
        settings={"kind": "kl"},
        golden=(Golden("mobilebert_attention_kl"),),
    ),
    LossCase(
        "attention_mse",
        losses.AttentionMapLoss,
        oracle.attention_mse,
        (2, 2, 3, 4),
        over="examples",
        settings={"kind": "mse"},
    ),
    LossCase(
        "attention_relation",
        losses.AttentionRelationLoss,
        oracle.attention_relation,
        (2, 3, 4),
        (2, 3, 6),
        over="examples",
        settings={"relation_heads": 2},
    ),
]


def _boxes(student: Tensor, teacher: Tensor, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """Rows of single edges as boxes of four."""
    return student.view(-1, 4, student.shape[-1]), teacher.view(-1, 4, teacher.shape[-1])


FEATURE_CASES += [
    LossCase(
        "localization",
        losses.LocalizationLoss,
        oracle_outputs.localization,
        (3, 4, 5),
        over="neighbourhood",  # the four edges of a box stay together
        settings={"temperature": 3.0},
        golden=(
            # The reference's mean is over the bins too. Case s2 has weights: test_losses_dense.py has it.
            Golden(
                "localization_kd",
                factor=lambda settings, shape: settings["loss_weight"] / shape[-1],
                settings=lambda reference: {"temperature": float(reference["T"])},
                cases=("s1",),
                arrange=_boxes,
            ),
            Golden(
                "localization_kd_paper",
                settings=lambda reference: {"temperature": float(reference["T"])},
                cases=("s1",),
                arrange=_boxes,
            ),
        ),
    ),
    LossCase(
        "pixel_relation",
        losses.PixelRelationLoss,
        oracle.pixel_relation,
        (3, 3, 2, 2),
        (3, 4, 2, 2),
        over="batch",
        settings={"temperature": 0.5},
        golden=(Golden("cirkd_pixel", settings=lambda reference: {"temperature": reference["temperature"]}),),
        per_example=False,
    ),
    LossCase(
        "pixel_relation_tokens",
        losses.PixelRelationLoss,
        oracle.pixel_relation,
        (2, 4, 3),
        over="batch",
        settings={"temperature": 1.0},
        per_example=False,
    ),
    LossCase(
        "activation_boundary",
        losses.ActivationBoundaryLoss,
        oracle.activation_boundary,
        (2, 3, 2, 3),
        settings={"margin": 1.5},
        golden=(
            # The reference adds over the units, and multiplies by 3 / 1000. Case s2 has two layers.
            Golden("ab", factor=lambda settings, shape: 3e-3 * math.prod(shape[1:]), cases=("s1",)),
        ),
        zero_at_identity=False,
    ),
    LossCase(
        "activation_boundary_tokens",
        losses.ActivationBoundaryLoss,
        oracle.activation_boundary,
        (2, 4, 3),
        zero_at_identity=False,
    ),
    LossCase(
        "margin_relu",
        losses.MarginReLULoss,
        oracle.margin_relu,
        (2, 3, 2, 3),
        settings={"margins": (-0.5, -1.5, 0.0)},
    ),
    LossCase(
        "margin_relu_tokens", losses.MarginReLULoss, oracle.margin_relu, (2, 4, 3), settings={"margins": (-1.0,) * 3}
    ),
    LossCase(
        "hierarchical_context",
        losses.HierarchicalContextLoss,
        oracle.hierarchical_context,
        (2, 3, 3, 5),
        over="neighbourhood",
    ),
    LossCase(
        "hierarchical_context_tokens",
        losses.HierarchicalContextLoss,
        oracle.hierarchical_context,
        (2, 7, 3),
        settings={"levels": (3, 1)},
        over="neighbourhood",
    ),
    LossCase(
        "solution_flow",
        losses.SolutionFlowLoss,
        oracle.solution_flow,
        (2, 5, 2, 3),
        over="examples",
        steep=True,
    ),
    LossCase(
        "solution_flow_tokens",
        losses.SolutionFlowLoss,
        oracle.solution_flow,
        (2, 4, 5),
        over="examples",
        steep=True,
    ),
]
