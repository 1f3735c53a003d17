"""Rows of ``cases.py`` for the further losses on the models' outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import oracle_outputs as oracle
import torch
from loss_case import Arrays, Golden, LossCase, softened, unmasked_tokens
from torch import Tensor

from lightning_distill import losses


def _answers(student: Tensor, teacher: Tensor, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """The rows that predict the first answer tokens of both sides, so often that each sample weighs the same."""
    answers = [(arrays[f"{side}_labels"] != -100) for side in ("student", "teacher")]
    lengths = [
        int(min(student_row.sum(), teacher_row.sum())) for student_row, teacher_row in zip(*answers, strict=True)
    ]
    pairs = []
    for logits, counts in zip((student, teacher), answers, strict=True):
        first = [int(row.argmax()) - 1 for row in counts]
        rows = [logits[sample, place : place + lengths[sample]] for sample, place in enumerate(first)]
        pairs.append(torch.cat([row.repeat(math.lcm(*lengths) // len(row), 1) for row in rows]))
    return pairs[0], pairs[1]


def _alpha_beta(reference: Mapping[str, Any]) -> dict[str, Any]:
    return {"alpha": reference["alpha"], "beta": reference["beta"], "temperature": reference.get("temperature", 1.0)}


def _alpha_beta_factor(reference: Mapping[str, Any], shape: tuple[int, ...]) -> float:
    """Where an exponent or their sum is 0, the reference is the limit times the other exponent."""
    alpha, beta = reference["alpha"], reference["beta"]
    at_limit = 0 in (alpha, beta, alpha + beta) and (alpha, beta) != (0, 0)
    return (alpha or beta) if at_limit else 1.0


DIVERGENCES = [
    LossCase(
        "reverse_kl",
        losses.ReverseKLLoss,
        oracle.reverse_kl,
        (4, 5),
        settings={"temperature": 2.0},
        golden=(Golden("reverse_kl", arrange=unmasked_tokens),),
        on_logits=True,
    ),
    LossCase(
        "generalized_jsd",
        losses.GeneralizedJSDLoss,
        oracle.generalized_jsd,
        (2, 3, 4),
        settings={"beta": 0.3, "temperature": 2.0},
        golden=(
            Golden(
                "generalized_jsd",
                settings=lambda ref: {"beta": ref["beta"], "temperature": ref["temperature"]},
                cases=("s1", "s2", "s3", "s5"),
                arrange=unmasked_tokens,
            ),
            # Without labels the reference divides by the examples and not by their tokens.
            Golden(
                "generalized_jsd",
                factor=lambda settings, shape: shape[1],
                settings=lambda ref: {"beta": ref["beta"], "temperature": ref["temperature"]},
                cases=("s4",),
            ),
        ),
        on_logits=True,
    ),
    LossCase(
        "generalized_jsd_forward",
        losses.GeneralizedJSDLoss,
        oracle.generalized_jsd,
        (2, 3, 2, 3),
        settings={"beta": 0.0},
        on_logits=True,
    ),
    LossCase(
        "generalized_jsd_reverse",
        losses.GeneralizedJSDLoss,
        oracle.generalized_jsd,
        (4, 5),
        settings={"beta": 1.0},
        on_logits=True,
    ),
    LossCase(
        "skew_kl",
        losses.SkewKLLoss,
        oracle.skew_kl,
        (4, 5),
        settings={"skew": 0.2},
        # The reference's own value is a cross entropy; the divergence is stored beside it.
        golden=(
            Golden("skew_kl", settings=lambda ref: {"skew": ref["lam"]}, value="loss_true_kl", arrange=unmasked_tokens),
        ),
        on_logits=True,
    ),
    LossCase("skew_kl_without_skew", losses.SkewKLLoss, oracle.skew_kl, (4, 5), settings={"skew": 0.0}, on_logits=True),
    LossCase(
        "skew_reverse_kl",
        losses.SkewKLLoss,
        oracle.skew_kl,
        (2, 3, 4),
        settings={"skew": 0.1, "reverse": True},
        golden=(
            Golden(
                "skew_reverse_kl",
                settings=lambda ref: {"skew": ref["lam"], "reverse": True},
                arrange=unmasked_tokens,
            ),
        ),
        on_logits=True,
    ),
    LossCase(
        "total_variation",
        losses.TotalVariationLoss,
        oracle.total_variation,
        (4, 5),
        settings={"temperature": 2.0},
        golden=(
            Golden(
                "tvd",
                factor=lambda settings, shape: settings["temperature"] ** 2,
                settings=softened,
                arrange=unmasked_tokens,
            ),
        ),
        on_logits=True,
    ),
    LossCase(
        "alpha_beta",
        losses.AlphaBetaLoss,
        oracle.alpha_beta,
        (2, 3, 4),
        settings={"alpha": 0.3, "beta": 0.9, "temperature": 2.0},
        golden=(
            Golden("alpha_beta", factor=_alpha_beta_factor, settings=_alpha_beta, arrange=unmasked_tokens),
            Golden("alpha_beta_paper", settings=_alpha_beta, arrange=unmasked_tokens),
        ),
        on_logits=True,
    ),
    LossCase(
        "alpha_beta_negative",
        losses.AlphaBetaLoss,
        oracle.alpha_beta,
        (4, 5),
        settings={"alpha": 1.2, "beta": -0.4},
        on_logits=True,
    ),
    LossCase(
        "alpha_beta_opposite",
        losses.AlphaBetaLoss,
        oracle.alpha_beta,
        (4, 5),
        settings={"alpha": 0.5, "beta": -0.5},
        on_logits=True,
    ),
]


MOVING = [
    LossCase(
        "taid",
        losses.TAIDLoss,
        oracle.interpolated_kl,
        (2, 3, 4),
        # More than half, so that models that disagree entirely differ from the target. In steps: a training that ends
        # earlier has another ramp over its fraction.
        settings={"start": 0.6, "end": 0.9, "duration": 4.0, "over": "steps"},
        on_logits=True,
        detached=True,
    ),
    LossCase(
        "taid_at_the_teacher",
        losses.TAIDLoss,
        oracle.interpolated_kl,
        (4, 5),
        settings={"start": 1.0, "end": 1.0},
        on_logits=True,
        detached=True,
    ),
]


TARGETS = [
    LossCase(
        "minifinetuning",
        losses.MinifinetuningLoss,
        oracle.minifinetuning,
        (4, 5),
        settings={"threshold": 0.3, "temperature": 2.0},
        zero_at_identity=False,
        on_logits=True,
    ),
    LossCase(
        "hard_target",
        losses.HardTargetLoss,
        oracle.hard_target,
        (4, 5),
        zero_at_identity=False,
        on_logits=True,
    ),
    LossCase(
        "decoupled_kd",
        losses.DecoupledKDLoss,
        oracle.decoupled_kd,
        (4, 5),
        settings={"target_weight": 0.5, "nontarget_weight": 2.0, "temperature": 3.0},
        golden=(
            Golden(
                "dkd",
                settings=lambda ref: {
                    "target_weight": ref["alpha"],
                    "nontarget_weight": ref["beta"],
                    "temperature": ref["temperature"],
                },
            ),
        ),
        on_logits=True,
    ),
    LossCase(
        "decoupled_kd_pixels",
        losses.DecoupledKDLoss,
        oracle.decoupled_kd,
        (2, 3, 2, 3),
        on_logits=True,
    ),
    LossCase(
        "normalized_kd",
        losses.NormalizedKDLoss,
        oracle.normalized_kd,
        (4, 5),
        settings={"nontarget_weight": 1.5, "temperature": 2.0},
        golden=(Golden("nkd", settings=lambda ref: {"nontarget_weight": ref["gamma"], "temperature": ref["temp"]}),),
        zero_at_identity=False,
        on_logits=True,
    ),
    LossCase(
        "weighted_soft_labels",
        losses.WeightedSoftLabelLoss,
        oracle.weighted_soft_labels,
        (4, 5),
        settings={"temperature": 3.0},
        golden=(
            Golden(
                "wsld",
                factor=lambda settings, shape: settings["loss_weight"],
                settings=lambda ref: {"temperature": ref["tau"]},
            ),
        ),
        zero_at_identity=False,
        on_logits=True,
        detached=True,
    ),
    LossCase(
        "binary_soft_target",
        losses.BinarySoftTargetLoss,
        oracle.binary_soft_target,
        (4, 5),
        settings={"temperature": 2.0},
        golden=(Golden("bce_soft", settings=softened),),
        zero_at_identity=False,
        on_logits=True,
        shift_invariant=False,
    ),
    LossCase(
        "quality_focal",
        losses.QualityFocalLoss,
        oracle.quality_focal,
        (4, 5),
        # Case s2 has weights: test_losses_dense.py has it.
        golden=(Golden("cross_kd", settings=lambda ref: {"power": ref["beta"]}, cases=("s1",)),),
        on_logits=True,
        shift_invariant=False,
    ),
    LossCase(
        "quality_focal_maps",
        losses.QualityFocalLoss,
        oracle.quality_focal,
        (2, 3, 2, 2),
        settings={"power": 2.0},
        on_logits=True,
        shift_invariant=False,
    ),
]

MAPS = [
    LossCase(
        "channel_wise",
        losses.ChannelWiseLoss,
        oracle.channel_wise_kl,
        (2, 3, 2, 3),
        over="examples",
        settings={"temperature": 2.0},
        golden=(Golden("cwd", settings=softened),),
    ),
    LossCase("channel_wise_tokens", losses.ChannelWiseLoss, oracle.channel_wise_kl, (2, 4, 3), over="examples"),
]

RELATIONS = [
    LossCase(
        "dist",
        losses.DISTLoss,
        oracle.dist,
        (4, 5),
        settings={"inter_weight": 0.5, "intra_weight": 2.0, "temperature": 2.0},
        golden=(
            Golden(
                "dist",
                settings=lambda ref: {
                    "inter_weight": ref["beta"],
                    "intra_weight": ref["gamma"],
                    "temperature": ref["tau"],
                },
                cases=("s1", "s2"),
            ),
            Golden("dist", cases=("s3",)),
        ),
        zero_at_identity=False,  # up to the 1e-8 beside the norms
        on_logits=True,
        per_example=False,
    ),
    LossCase(
        "multi_level_logits",
        losses.MultiLevelLogitLoss,
        oracle.multi_level_logits,
        (4, 5),
        settings={"temperatures": (1.0, 3.0)},
        on_logits=True,
        per_example=False,
    ),
    LossCase(
        "multi_level_logits_pixels",
        losses.MultiLevelLogitLoss,
        oracle.multi_level_logits,
        (2, 3, 2, 3),
        on_logits=True,
        per_example=False,
    ),
]

VOCABULARIES = [
    LossCase(
        "universal_logit",
        losses.UniversalLogitLoss,
        oracle.universal_logit,
        (4, 5),
        (4, 7),
        settings={"temperature": 2.0},
        # s2 has two temperatures and a cross entropy beside it: test_universal_logit.py
        golden=(Golden("uld", settings=lambda ref: {"temperature": 1.0}, cases=("s1",), arrange=_answers),),
        on_logits=True,
        knows_classes=False,
    ),
    LossCase(
        "universal_logit_of_more_classes",
        losses.UniversalLogitLoss,
        oracle.universal_logit,
        (2, 6, 2, 3),
        (2, 4, 2, 3),
        on_logits=True,
        knows_classes=False,
    ),
]

CANDIDATES = [
    LossCase("margin_mse", losses.MarginMSELoss, oracle.margin_mse, (4, 5)),
    LossCase(
        "listwise_kl",
        losses.ListwiseKLLoss,
        oracle.listwise_kl,
        (4, 5),
        settings={"student_temperature": 2.0, "teacher_temperature": 2.0},
    ),
    LossCase(
        "listwise_kl_of_two_temperatures",
        losses.ListwiseKLLoss,
        oracle.listwise_kl,
        (3, 4),
        settings={"student_temperature": 0.5, "teacher_temperature": 3.0},
        zero_at_identity=False,
    ),
]

OUTPUT_CASES: list[LossCase] = [*DIVERGENCES, *MOVING, *TARGETS, *MAPS, *RELATIONS, *VOCABULARIES, *CANDIDATES]
