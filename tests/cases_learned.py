"""Rows of ``cases.py`` for the losses with parameters of their own, whose tests fix the parameters."""

from __future__ import annotations

import numpy as np
import oracle_learned as oracle
from loss_case import LossCase
from oracle import Array, channel_axis

from lightning_distill import losses


def _drawn(shapes: dict[str, tuple[int, ...]], scale: float) -> dict[str, Array]:
    generator = np.random.default_rng(7)
    return {name: scale * generator.standard_normal(shape) for name, shape in shapes.items()}


def _variational(
    name: str, student: tuple[int, ...], teacher: tuple[int, ...], kernel: tuple[int, ...] = ()
) -> LossCase:
    narrow, wide = (shape[channel_axis(np.empty(shape))] for shape in (student, teacher))
    shapes = {f"mean.{index}.weight": (wide, width, *kernel) for index, width in ((0, narrow), (2, wide), (4, wide))}
    # Variances above 1, so that the loss is positive, as the generic tests expect of all losses.
    parameters = {**_drawn(shapes, 0.7), "rho": 2 + _drawn({"rho": (wide,)}, 0.3)["rho"]}
    settings = {"initial_variance": 2.0}
    return LossCase(
        name,
        losses.VariationalInformationLoss,
        oracle.variational_information,
        student,
        teacher,
        settings=settings,
        zero_at_identity=False,
        parameters=parameters,
    )


def _generative(name: str, shape: tuple[int, ...], mask: str, kernel: tuple[int, ...] = ()) -> LossCase:
    channels = shape[channel_axis(np.empty(shape))]
    weights = {f"generator.{index}.weight": (channels, channels, *kernel) for index in (0, 2)}
    biases = {f"generator.{index}.bias": (channels,) for index in (0, 2)}
    return LossCase(
        name,
        losses.MaskedGenerativeLoss,
        oracle.masked_generative,
        shape,
        settings={"mask_ratio": 0.0, "mask": mask},  # what is drawn has tests of its own
        zero_at_identity=False,
        over="neighbourhood" if len(shape) > 2 else "positions",
        parameters=_drawn({**weights, **biases}, 0.2),
    )


def _simple_recipe(name: str, student: tuple[int, ...], teacher: tuple[int, ...], **settings: float) -> LossCase:
    narrow, wide = (shape[channel_axis(np.empty(shape))] for shape in (student, teacher))
    return LossCase(
        name,
        losses.SimpleRecipeLoss,
        oracle.log_sum_distance,
        student,
        teacher,
        settings=settings,
        zero_at_identity=False,
        over="batch",
        per_example=False,
        parameters=_drawn({"projection.weight": (wide, narrow)}, 0.7),
    )


def _factors(name: str, student: tuple[int, ...], teacher: tuple[int, ...], **settings: float) -> LossCase:
    narrow, wide = (shape[channel_axis(np.empty(shape))] for shape in (student, teacher))
    factor = int(settings.get("rate", 0.5) * wide)
    kernel = (3,) * (len(student) - 2)
    shapes = {}
    for network, channels in (
        ("translator", (narrow, narrow, factor, factor)),
        ("paraphraser", (wide, wide, factor, factor)),
        ("restorer", (factor, factor, wide, wide)),
    ):
        for index in range(3):
            shapes[f"{network}.{2 * index}.weight"] = (channels[index + 1], channels[index], *kernel)
            shapes[f"{network}.{2 * index}.bias"] = (channels[index + 1],)
    return LossCase(
        name,
        losses.FactorTransferLoss,
        oracle.factor_transfer,
        student,
        teacher,
        settings=settings,
        zero_at_identity=False,
        over="neighbourhood" if len(student) > 2 else "positions",
        parameters=_drawn(shapes, 0.3),
    )


def _focal_global(name: str, shape: tuple[int, ...], **settings: float) -> LossCase:
    channels, narrow = shape[1], max(shape[1] // 2, 1)
    shapes: dict[str, tuple[int, ...]] = {}
    for who in ("student_context", "teacher_context"):
        for layer, kernel in (
            ("attention", (1, channels)),
            ("reduce", (narrow, channels)),
            ("expand", (channels, narrow)),
        ):
            shapes[f"{who}.{layer}.weight"] = (*kernel, 1, 1)
            shapes[f"{who}.{layer}.bias"] = kernel[:1]
        shapes[f"{who}.norm.weight"] = shapes[f"{who}.norm.bias"] = (narrow, 1, 1)
    return LossCase(
        name,
        losses.FocalGlobalLoss,
        oracle.focal_global,
        shape,
        settings=settings,
        zero_at_identity=False,
        over="examples",
        parameters=_drawn(shapes, 0.7),
    )


def _softmax_regression(name: str, student: tuple[int, ...], teacher: tuple[int, ...], **settings: float) -> LossCase:
    narrow, wide = (shape[channel_axis(np.empty(shape))] for shape in (student, teacher))
    drawn = _drawn(
        {"connector.weight": (wide, narrow), "scale": (wide,), "shift": (wide,), "classifier": (5, wide)}, 0.7
    )
    return LossCase(
        name,
        losses.SoftmaxRegressionLoss,
        oracle.softmax_regression,
        student,
        teacher,
        settings=settings,
        zero_at_identity=False,
        over="batch",
        per_example=False,
        classifier=drawn.pop("classifier"),
        parameters=drawn,
    )


def _contrastive(name: str, student: tuple[int, ...], teacher: tuple[int, ...], **settings: float) -> LossCase:
    narrow, wide = (shape[channel_axis(np.empty(shape))] for shape in (student, teacher))
    settings = {"size": 6, "width": 4, "temperature": 0.5, "normalizer": 3.0, **settings}
    return LossCase(
        name,
        losses.ContrastiveRepresentationLoss,
        oracle.contrastive_representation,
        student,
        teacher,
        settings=settings,
        zero_at_identity=False,
        over="examples",
        parameters={
            **_drawn(
                {
                    "student_embedding.weight": (4, narrow),
                    "student_embedding.bias": (4,),
                    "teacher_embedding.weight": (4, wide),
                    "teacher_embedding.bias": (4,),
                    "student_memory": (6, 4),
                    "teacher_memory": (6, 4),
                },
                1.0,
            )
        },
    )


LEARNED_CASES = [
    _contrastive("contrastive_representation", (4, 5), (4, 3)),
    _contrastive("contrastive_representation_maps", (2, 3, 2, 3), (2, 4, 2, 3), temperature=0.2, normalizer=1.0),
    _softmax_regression("softmax_regression", (5, 3, 2, 3), (5, 4, 2, 3)),
    _softmax_regression("softmax_regression_vectors", (5, 3), (5, 4), feature_weight=0.5, regression_weight=2.0),
    _factors("factor_transfer", (2, 3, 2, 3), (2, 4, 2, 3)),
    _factors("factor_transfer_tokens", (2, 4, 3), (2, 4, 2), rate=1.5, power=2.0),
    _factors("factor_transfer_vectors", (3, 4), (3, 5), factor_weight=2.0, reconstruction_weight=0.5),
    _focal_global("focal_global", (2, 4, 2, 3)),
    _focal_global(
        "focal_global_weights",
        (2, 5, 3, 2),
        temperature=0.9,
        foreground_weight=0.3,
        background_weight=0.2,
        attention_weight=0.1,
        context_weight=0.05,
    ),
    LossCase(
        "queue_similarity",
        losses.QueueSimilarityLoss,
        oracle.queue_similarity,
        (4, 5),
        settings={"size": 10, "student_temperature": 0.5, "teacher_temperature": 0.3},
        zero_at_identity=False,
        parameters=_drawn({"queue": (10, 5)}, 1.0),
    ),
    # Variances far above eps, so that the loss is positive, as the generic tests expect of all losses.
    _simple_recipe("simple_recipe", (5, 3, 2, 3), (5, 4, 2, 3), eps=1e-8),
    _simple_recipe("simple_recipe_vectors", (5, 4), (5, 3), power=3.0, eps=1e-7),
    _variational("variational_information", (2, 3, 2, 3), (2, 4, 2, 3), (1, 1)),
    _variational("variational_information_tokens", (2, 4, 3), (2, 4, 2), (1,)),
    _variational("variational_information_vectors", (3, 4), (3, 5)),
    _generative("masked_generative", (2, 3, 2, 3), "spatial", (3, 3)),
    _generative("masked_generative_tokens", (2, 4, 3), "spatial", (3,)),
    _generative("masked_generative_vectors", (3, 4), "channel"),
]
