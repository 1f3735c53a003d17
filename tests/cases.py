"""One row for every public loss: how to build it, what to feed it, its oracle and its golden cases.

The generic tests walk these rows. A loss without a row fails ``test_every_public_loss_has_a_row``.
"""

from __future__ import annotations

import oracle
import torch
import torch.nn.functional as F
from cases_features import FEATURE_CASES, larger_map_pooled
from cases_learned import LEARNED_CASES
from cases_outputs import OUTPUT_CASES
from loss_case import Arrays, Golden, LossCase, softened, unmasked_tokens
from torch import Tensor

from lightning_distill import losses


def _after_conv1x1(student: Tensor, teacher: Tensor, arrays: Arrays) -> tuple[Tensor, Tensor]:
    if "param_weight" in arrays:
        student = F.conv2d(student, torch.as_tensor(arrays["param_weight"]))
    return student, teacher


def _selected_tokens(student: Tensor, teacher: Tensor, arrays: Arrays) -> tuple[Tensor, Tensor]:
    if "mask" in arrays:
        chosen = torch.as_tensor(arrays["mask"]).bool()
        return student[chosen], teacher[chosen]
    return student, teacher


CASES = [
    LossCase(
        "soft_target",
        losses.SoftTargetLoss,
        oracle.soft_target,
        (4, 5),
        settings={"temperature": 3.0},
        golden=(
            Golden("kd_kl", settings=softened),
            Golden("token_kl", settings=softened, arrange=unmasked_tokens),
            # The reference's mean is over all elements, classes included.
            Golden("inc_kl_mean", factor=lambda settings, shape: 1 / shape[-1], settings=softened),
        ),
        on_logits=True,
    ),
    LossCase(
        "soft_target_standardized",
        losses.SoftTargetLoss,
        oracle.soft_target,
        (3, 6),
        settings={"temperature": 2.0, "standardize": True},
        golden=(Golden("logit_standardization_kd", settings=lambda ref: {**softened(ref), "standardize": True}),),
        on_logits=True,
    ),
    LossCase(
        "soft_target_pixels",
        losses.SoftTargetLoss,
        oracle.soft_target,
        (2, 3, 2, 3),
        settings={"temperature": 4.0},
        golden=(Golden("pixel_kl", settings=lambda ref: softened(ref)),),
        on_logits=True,
    ),
    LossCase(
        "soft_cross_entropy",
        losses.SoftCrossEntropyLoss,
        oracle.soft_cross_entropy,
        (2, 3, 4),
        settings={"temperature": 2.0},
        golden=(
            Golden("soft_cross_entropy", settings=softened),
            Golden("token_ce", arrange=unmasked_tokens),  # named forward_kl there, without the teacher's entropy
            # The reference takes the mean over all elements and has no T^2.
            Golden(
                "tinybert_soft_ce",
                factor=lambda settings, shape: 1 / (shape[-1] * settings["temperature"] ** 2),
                settings=softened,
            ),
        ),
        zero_at_identity=False,
        on_logits=True,
    ),
    LossCase(
        "logit_mse",
        losses.LogitMSELoss,
        oracle.logit_mse,
        (4, 5),
        golden=(Golden("logit_mse"),),
        on_logits=True,
        shift_invariant=False,
    ),
    LossCase(
        "attention_transfer",
        losses.AttentionTransferLoss,
        oracle.attention_transfer,
        (2, 3, 2, 3),
        (2, 5, 2, 3),
        over="examples",
        golden=(Golden("attention_transfer", arrange=larger_map_pooled),),
    ),
    LossCase(
        "attention_transfer_tokens",
        losses.AttentionTransferLoss,
        oracle.attention_transfer,
        (2, 4, 3),
        (2, 4, 2),
        over="examples",
        settings={"p": 3.0},
    ),
    LossCase(
        "mse",
        losses.FeatureDistance,
        oracle.mse,
        (3, 2, 2, 3),
        settings={"kind": "mse"},
        golden=(
            Golden("fitnet_mse", settings=lambda ref: {"kind": "mse"}, arrange=_after_conv1x1),
            Golden("patient_kd", settings=lambda ref: {"kind": "mse"}, cases=("s2",)),  # without normalisation
        ),
    ),
    LossCase("l1", losses.FeatureDistance, oracle.l1, (3, 2, 4), settings={"kind": "l1"}),
    LossCase("smooth_l1", losses.FeatureDistance, oracle.smooth_l1, (3, 7), settings={"kind": "smooth_l1"}),
    LossCase(
        "cosine",
        losses.FeatureDistance,
        oracle.cosine,
        (2, 3, 2, 3),
        settings={"kind": "cosine"},
        golden=(Golden("cosine", settings=lambda ref: {"kind": "cosine"}, arrange=_selected_tokens),),
    ),
    LossCase("cosine_tokens", losses.FeatureDistance, oracle.cosine, (2, 4, 3), settings={"kind": "cosine"}),
    LossCase("kl", losses.FeatureDistance, oracle.feature_kl, (2, 3, 2, 3), settings={"kind": "kl"}),
    LossCase(
        "kl_over_positions",
        losses.FeatureDistance,
        oracle.feature_kl,
        (2, 3, 4),
        settings={"kind": "kl", "channel_dim": 1},
    ),
    *OUTPUT_CASES,
    *FEATURE_CASES,
    *LEARNED_CASES,
]
