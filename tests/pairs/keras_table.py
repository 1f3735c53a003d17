"""Features of the Keras half, each with a model to fit and the same training written by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops
from pairs.keras_networks import drawn, inner, network, tagger

from keras_distill import (
    DecoupledKDLoss,
    DistillModel,
    DistillTargets,
    EMATeacher,
    FeatureDistillation,
    LogitsDistillation,
    SelfDistillation,
    SelfTeacher,
    SoftTargetLoss,
    TeacherCache,
    VariationalInformationLoss,
)
from keras_distill.schedules import Linear
from keras_distill.targets import split_targets

RATE, EPOCHS, BATCH = 0.05, 2, 8
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(16, 6)).astype("float32"), RNG.integers(0, 3, 16).astype("int32")
IMAGES = np.random.default_rng(1).normal(size=(16, 4, 4, 2)).astype("float32")
IDS = RNG.integers(1, 9, (16, 5)).astype("int32")
IDS[::2, 3:] = 0
TAGS = RNG.integers(0, 3, (16, 5)).astype("int32")
TAGS[IDS == 0] = 0


# Formulas by hand -----------------------------------------------------------------------------------------------------


def cross_entropy(logits: Any, labels: Any) -> Any:
    return -ops.sum(ops.one_hot(labels, 3) * ops.log_softmax(ops.cast(logits, "float32")), axis=-1)


def kl(student: Any, teacher: Any, heat: float = 4.0) -> Any:
    log_s, log_t = (ops.log_softmax(ops.cast(z, "float32") / heat) for z in (student, teacher))
    return heat**2 * ops.sum(ops.exp(log_t) * (log_t - log_s), axis=-1)


def decoupled(student: Any, teacher: Any, labels: Any, beta: float, heat: float) -> Any:
    """KL of the label's class against the rest, plus beta times KL among the rest."""
    hot = ops.one_hot(labels, 3)
    parts = []
    for logits in (teacher, student):
        p = ops.softmax(logits / heat)
        own = ops.sum(p * hot, axis=-1)
        rest = ops.log_softmax(logits / heat - 1e4 * hot)
        parts.append((own, rest))
    (t, t_rest), (s, s_rest) = parts
    target = t * (ops.log(t) - ops.log(s)) + (1 - t) * (ops.log(1 - t) - ops.log(1 - s))
    others = ops.sum((1 - hot) * ops.exp(t_rest) * (t_rest - s_rest), axis=-1)
    return heat**2 * (target + beta * others)


@dataclass
class Feature:
    """One row of the table.

    Args:
        terms: Makes new terms.
        hand: Computes the weighted sum of the terms for a batch, by plain operations, from the twin, x, y and the step.
            Of a class each training makes its own object, which measures every whole batch first.
        settings: Settings of the model.
        teachers: Number of teachers.
        widths: Their widths.
        kind: Makes a network of a width, a name and a precision; None tags tokens or classifies rows.
        teacher: Makes the teachers of the model from the networks; None uses them as they are.
        moving: Whether the teacher is the average of the student.
        stored: Whether the targets hold the teacher's outputs.
        cached: Whether they hold those of the cache among the teachers.
        itself: Whether the student is a teacher too, before the networks.
        tokens: Whether the models tag tokens.
        tolerance: The smallest tolerance: a graph rounds to bfloat16 in other places than eager steps.
        words: The error of a situation that cannot work, by the situation's name.
        situations: The situations that the feature is put into; None is all of them.
    """

    terms: Callable[[], list[Any]]
    hand: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    teachers: int = 1
    widths: tuple[int, int] = (6, 6)
    kind: Callable[..., keras.Model] | None = None
    teacher: Callable[[list[keras.Model]], Any] | None = None
    moving: bool = False
    stored: bool = False
    cached: bool = False
    itself: bool = False
    tokens: bool = False
    tolerance: float = 0.0
    words: dict[str, str] = field(default_factory=dict)
    situations: tuple[str, ...] | None = None

    def model(self, **compiled: Any) -> DistillModel:
        """A new model with the same weights each time."""
        keras.utils.set_random_seed(3)
        made = self.kind or (tagger if self.tokens else network)
        widths = [self.widths[number] for number in range(max(self.teachers, 1))]
        held = [drawn(made(width, f"teacher{number}", "float32")) for number, width in enumerate(widths)]
        teacher: Any = [None, held[0], held][min(self.teachers, 2)] if self.teacher is None else self.teacher(held)
        if self.moving:
            held, teacher = [made(4, "average")], EMATeacher(0.8)
        student = drawn(made(4, "student"))
        if self.itself:
            teacher = [SelfTeacher(student), *held]
        model = DistillModel(student, None if self.stored else teacher, self.terms(), **self.settings)
        if self.moving:
            held[0].set_weights(model.student.get_weights())
        model.held = _Hidden(held)
        for term in model.terms:
            learned = [loss.layer for loss in getattr(term, "learned", ())]
            for number, layer in enumerate([*filter(None, getattr(term, "adapters", ())), *learned]):
                drawn(layer, f"{term.name}{number}")
        compile_model(model, **compiled)
        return model

    @property
    def x(self) -> Any:
        if self.kind is not None:
            return IMAGES
        return IDS if self.tokens else X

    @property
    def labels(self) -> Any:
        return TAGS if self.tokens else Y

    def targets(self, model: DistillModel) -> Any:
        """Labels, with the outputs of a teacher if they are stored."""
        if self.cached:
            [cache] = [each for each in model.teacher if isinstance(each, TeacherCache)]
            return DistillTargets(self.labels, cache.answers(np.arange(16)))
        if not self.stored:
            return self.labels
        return DistillTargets(self.labels, model.held.models[0].predict(self.x, verbose=0))

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """The batches of all epochs."""
        for _ in range(EPOCHS):
            for start in range(0, 16, BATCH):
                yield self.x[start : start + BATCH], self.labels[start : start + BATCH]


class _Hidden:
    """Holds models, so that Keras does not track them."""

    def __init__(self, models: list[keras.Model]) -> None:
        self.models = models


def compile_model(model: DistillModel, **compiled: Any) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(RATE), loss, **{"run_eagerly": not compiled, **compiled})


def teacher_logits(twin: Any, x: Any, number: int = 0) -> Any:
    return inner(twin.held.models[number], x, "hidden")[-1]


def scheduled(twin: Any, x: Any, y: Any, step: float) -> Any:
    share = min(step / 4, 1.0)
    weight, heat = 1.0 + (0.0 - 1.0) * share, 4.0 + (1.0 - 4.0) * share
    return weight * ops.mean(kl(twin.student(x), teacher_logits(twin, x), heat))


def plain(twin: Any, x: Any, y: Any, step: float) -> Any:
    return ops.mean(kl(twin.student(x), teacher_logits(twin, x)))


def several(twin: Any, x: Any, y: Any, step: float) -> Any:
    z = twin.student(x)
    return sum(ops.mean(kl(z, teacher_logits(twin, x, number))) for number in (0, 1)) / 2


def weighed(twin: Any, x: Any, y: Any, step: float) -> Any:
    weights = 1.0 + (0.0 - 1.0) * min(step / 4, 1.0), 0.5
    z = twin.student(x)
    losses = [ops.mean(kl(z, teacher_logits(twin, x, number))) for number in (0, 1)]
    return (weights[0] * losses[0] + weights[1] * losses[1]) / sum(weights)


def to_a_mixture(twin: Any, x: Any, y: Any, step: float) -> Any:
    """One divergence to 0.75 of the first teacher's softened probabilities and 0.25 of the second's."""
    first, second = (ops.softmax(teacher_logits(twin, x, number) / 4.0) for number in (0, 1))
    target = 0.75 * first + 0.25 * second
    log_s = ops.log_softmax(ops.cast(twin.student(x), "float32") / 4.0)
    return 16.0 * ops.mean(ops.sum(target * (ops.log(target) - log_s), axis=-1))


def by_confidence(twin: Any, x: Any, y: Any, step: float) -> Any:
    logits = [teacher_logits(twin, x, number) for number in (0, 1)]
    first, second = (ops.exp(ops.sum(ops.softmax(z) * ops.log_softmax(z), axis=-1)) for z in logits)
    z = twin.student(x)
    return ops.mean((first * kl(z, logits[0]) + second * kl(z, logits[1])) / (first + second))


@keras.saving.register_keras_serializable(package="pairs")
def by_sign(inputs: Any) -> Any:
    return ops.cast(inputs[:, 0] > 0, "int32")


def by_route(twin: Any, x: Any, y: Any, step: float) -> Any:
    """The logits of each example's own teacher, and adapters of each teacher, whose features differ."""
    second, z = x[:, 0] > 0, twin.student(x)
    logits = ops.where(second[:, None], teacher_logits(twin, x, 1), teacher_logits(twin, x, 0))
    feature = inner(twin.student, x, "hidden")[0]
    targets = [inner(model, x, "hidden")[0] for model in twin.held.models]
    gaps = [
        ops.mean(ops.square(adapter(feature) - target), axis=-1)
        for adapter, target in zip(twin.terms[1].adapters, targets, strict=True)
    ]
    return ops.mean(kl(z, logits)) + 2.0 * ops.mean(ops.where(second, gaps[1], gaps[0]))


def followed(twin: Any, x: Any, y: Any, step: float) -> Any:
    """The divergence to the average of the student's weights, which `by_hand` moves."""
    return ops.mean(kl(twin.student(x), twin.held.models[0](x)))


def move(twin: Any) -> None:
    """One step of the average, 0.8 of it and 0.2 of the student."""
    average = twin.held.models[0]
    pairs = zip(average.get_weights(), twin.student.get_weights(), strict=True)
    average.set_weights([0.8 * own + 0.2 * other for own, other in pairs])


def adapted(twin: Any, x: Any, y: Any, step: float) -> Any:
    [adapter], feature = twin.terms[0].adapters, inner(twin.student, x, "hidden")[0]
    return 2.0 * ops.mean(ops.square(adapter(feature) - inner(twin.held.models[0], x, "hidden")[0]))


def learned(twin: Any, x: Any, y: Any, step: float) -> Any:
    [loss], target = twin.terms[0].learned, inner(twin.held.models[0], x, "hidden")[0]
    variance = ops.softplus(loss.layer.rho) + 1e-5
    mean = loss.layer(inner(twin.student, x, "hidden")[0])
    return 0.5 * ops.mean(0.5 * (ops.square(mean - target) / variance + ops.log(variance)))


def within(twin: Any, x: Any, y: Any, step: float) -> Any:
    shallow, deep, _ = inner(twin.student, x, "hidden", "deep")
    [adapter] = twin.terms[0].adapters
    return ops.mean(ops.square(adapter(shallow) - ops.stop_gradient(deep)))


def masked(twin: Any, x: Any, y: Any, step: float) -> Any:
    kept = ops.cast(x > 0, "float32")
    student, teacher = inner(twin.student, x, "hidden")[-1], teacher_logits(twin, x)
    return ops.sum(kept * kl(student, teacher)) / ops.sum(kept)


def labelled(twin: Any, x: Any, y: Any, step: float) -> Any:
    return 0.5 * ops.mean(decoupled(ops.cast(twin.student(x), "float32"), teacher_logits(twin, x), y, 2.0, 3.0))


@functools.cache
def narrow() -> keras.Model:
    return network(6, "narrow", "mixed_bfloat16")


def in_bfloat16(twin: Any, x: Any, y: Any, step: float) -> Any:
    narrow().set_weights(twin.held.models[0].get_weights())
    return ops.mean(kl(twin.student(x), narrow()(x)))


def in_steps(start: float, end: float) -> Linear:
    return Linear(start, end, duration=4, over="steps")


FEATURES: dict[str, Feature] = {
    "schedules": Feature(
        lambda: [LogitsDistillation(SoftTargetLoss(temperature=in_steps(4.0, 1.0)), weight=in_steps(1.0, 0.0))],
        scheduled,
    ),
    "schedules over the fraction": Feature(
        lambda: [LogitsDistillation(SoftTargetLoss(temperature=Linear(4.0, 1.0)), weight=Linear(1.0, 0.0))],
        scheduled,
        words={"train_on_batch": "Expected the schedule of `logits_weight` to run over steps outside of `fit`"},
    ),
    "stored targets": Feature(lambda: [LogitsDistillation()], plain, stored=True),
    "several teachers": Feature(lambda: [LogitsDistillation()], several, teachers=2),
    "weights of teachers": Feature(
        lambda: [LogitsDistillation()], weighed, teachers=2, settings={"teacher_weights": [in_steps(1.0, 0.0), 0.5]}
    ),
    "a mixture of teachers": Feature(
        lambda: [LogitsDistillation()],
        to_a_mixture,
        teachers=2,
        settings={"teacher_weights": [3.0, 1.0], "mix": "probabilities"},
    ),
    "teachers by confidence": Feature(
        lambda: [LogitsDistillation()], by_confidence, teachers=2, settings={"teacher_weights": "entropy"}
    ),
    "a teacher for each example": Feature(
        lambda: [LogitsDistillation(), FeatureDistillation("hidden", "hidden", weight=2.0)],
        by_route,
        teachers=2,
        widths=(6, 8),
        settings={"route": by_sign},
    ),
    "a moving average": Feature(lambda: [LogitsDistillation()], followed, moving=True),
    "adapters": Feature(lambda: [FeatureDistillation("hidden", "hidden", weight=2.0)], adapted),
    "learned losses": Feature(
        lambda: [FeatureDistillation("hidden", "hidden", VariationalInformationLoss(), weight=0.5)], learned
    ),
    "self-distillation": Feature(lambda: [SelfDistillation("hidden", "deep")], within, teachers=0),
    "masks": Feature(lambda: [LogitsDistillation()], masked, tokens=True),
    "label-aware losses": Feature(
        lambda: [
            LogitsDistillation(DecoupledKDLoss(target_weight=1.0, nontarget_weight=2.0, temperature=3.0), weight=0.5)
        ],
        labelled,
    ),
    "teacher dtype": Feature(
        lambda: [LogitsDistillation()], in_bfloat16, settings={"teacher_dtype": "bfloat16"}, tolerance=2e-3
    ),
}


def task(twin: Any, x: Any, y: Any, tokens: bool) -> Any:
    values = cross_entropy(twin.student(x), y)
    kept = ops.cast(x > 0, "float32") if tokens else ops.ones_like(values)
    return ops.sum(kept * values) / ops.sum(kept)


@functools.cache
def by_hand(
    name: str,
    *,
    rounded: int = 1,
    restarts: bool = False,
    places: tuple[int, ...] | None = None,
    halves: bool = False,
    policy: str = "float32",
) -> Any:
    """The student's weights after the training, in a loop of plain operations.

    Args:
        name: Name of the feature.
        rounded: For how many steps a scheduled number stays the same.
        restarts: Whether the optimizer's steps begin at 0 in each epoch.
        places: Where schedules stand in each step, if they do not follow the steps.
        halves: Whether each half of a batch is averaged separately.
        policy: Precision policy of the student.
    """
    import tensorflow as tf

    feature, before = FEATURES[name], keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    twin = feature.model()
    if feature.cached:
        twin.step.build(feature.x, split_targets(feature.targets(twin))[1])
    keras.config.set_dtype_policy(before)
    optimizer = keras.optimizers.SGD(RATE)
    hand = feature.hand() if isinstance(feature.hand, type) else feature.hand
    for index, (x, y) in enumerate(feature.batches()):
        if isinstance(feature.hand, type):
            hand.measure(twin, x, y)
        step = index // rounded * rounded % (2 if restarts else 99) if places is None else places[index]
        parts = [(x[:4], y[:4]), (x[4:], y[4:])] if halves else [(x, y)]
        with tf.GradientTape() as tape:
            total = sum(task(twin, *part, feature.tokens) + hand(twin, *part, step) for part in parts)
            total = total / len(parts)
        variables = twin.trainable_variables
        pairs = zip(tape.gradient(total, variables), variables, strict=True)
        optimizer.apply_gradients([(gradient, variable) for gradient, variable in pairs if gradient is not None])
        if feature.moving:
            move(twin)
    return twin.student.get_weights()
