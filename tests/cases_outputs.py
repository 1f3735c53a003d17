"""Rows of ``cases.py`` for the further losses on the models' outputs."""

from __future__ import annotations

import oracle_outputs as oracle
from loss_case import Golden, LossCase, softened, unmasked_tokens

from lightning_distill import losses

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
]


TARGETS = [
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

OUTPUT_CASES: list[LossCase] = [*DIVERGENCES, *TARGETS, *MAPS, *RELATIONS]
