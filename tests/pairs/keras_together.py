"""Features of the Keras half that were made apart and meet in one model: further rows of the table."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops
from pairs.keras_table import BATCH, EPOCHS, FEATURES, Feature, inner, kl

from keras_distill import (
    CallableTeacher,
    FeatureDistillation,
    LogitsDistillation,
    PCAProjection,
    QueueSimilarityLoss,
    ReviewDistillation,
    VariationalInformationLoss,
)
from keras_distill.schedules import Balanced

__all__ = ["BATCH", "EPOCHS", "FEATURES"]
SITUATIONS = ("steps_per_execution", "load_model", "second compile", "exception and second fit")
LAYERS = ("map", "deep", "tokens", "pool")
COMPONENTS = np.random.default_rng(2).normal(size=(9, 4)).astype("float32")


@keras.saving.register_keras_serializable(package="pairs")
class ClassToken(keras.layers.Layer):
    """Puts a token before the patches."""

    def build(self, shape: Any) -> None:
        self.token = self.add_weight(name="token", shape=(1, 1, shape[-1]))

    def call(self, patches: Any) -> Any:
        first = ops.repeat(self.token, ops.shape(patches)[0], axis=0)
        return ops.concatenate([first, patches], axis=1)


def picture(width: int, name: str, dtype: str | None = None) -> keras.Model:
    """Images to maps, to tokens of the patches, to three logits. The second teacher has four times as many patches."""
    side, stride = (4, 1) if name == "teacher1" else (2, 2)
    inputs = keras.Input((4, 4, 2), name="image")
    first = keras.layers.Conv2D(width, 2, stride, padding="same", activation="tanh", name="map")(inputs)
    deep = keras.layers.AveragePooling2D(2, name="deep")(first)
    patches = ClassToken()(keras.layers.Reshape((side * side, width))(first))
    tokens = keras.layers.Dense(width, "tanh", name="tokens")(patches)
    pool = keras.layers.GlobalAveragePooling1D(name="pool")(tokens)
    both = keras.layers.Add()([pool, keras.layers.GlobalAveragePooling2D()(deep)])
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(both), name=name)


def of(model: keras.Model, x: Any) -> dict[str, Any]:
    return dict(zip((*LAYERS, "logits"), inner(model, x, *LAYERS), strict=True))


def patches_of(model: keras.Model, x: Any) -> Any:
    """The tokens without the class token, as a map of two by two."""
    import tensorflow as tf

    tokens = of(model, x)["tokens"][:, 1:]
    side = int(tokens.shape[1] ** 0.5)
    return tf.image.resize(ops.reshape(tokens, (-1, side, side, tokens.shape[-1])), (2, 2), antialias=True)


def gap(first: Any, second: Any) -> Any:
    """The mean square of each example."""
    return ops.mean(ops.square(first - ops.stop_gradient(second)), axis=tuple(range(1, len(first.shape))))


def queue_loss(mapped: Any, target: Any, queue: keras.Variable) -> Any:
    """The loss to a queue, which then takes the batch."""
    z, d = (tensor / ops.sqrt(ops.sum(tensor**2, axis=-1, keepdims=True)) for tensor in (mapped, target))
    held = queue / ops.sqrt(ops.sum(queue**2, axis=-1, keepdims=True))
    scores = [
        ops.concatenate([ops.sum(tensor * d, axis=-1, keepdims=True), tensor @ ops.transpose(held)], axis=-1) / heat
        for tensor, heat in ((z, 0.2), (d, 0.1))
    ]
    queue.assign(ops.concatenate([d, queue], axis=0)[: queue.shape[0]])
    return -ops.mean(ops.sum(ops.softmax(scores[1]) * ops.log_softmax(scores[0]), axis=-1))


def by_patches(twin: Any, x: Any, y: Any, step: float) -> Any:
    """A learned loss between the student's map and the patches of each teacher, 0.75 and 0.25 of the sum."""
    own, total = of(twin.student, x)["map"], 0.0
    for share, loss, model in zip((0.75, 0.25), twin.terms[0].learned, twin.held.models, strict=True):
        variance = ops.softplus(loss.layer.rho) + 1e-5
        error = ops.square(loss.layer(own) - patches_of(model, x)) / variance
        total = total + share * 0.5 * ops.mean(error + ops.log(variance))
    return total


def pooled_by_route(twin: Any, x: Any, y: Any, step: float) -> Any:
    own, second = of(twin.student, x), x[:, 0, 0, 0] > 0
    values, logits = [], []
    for adapter, model in zip(twin.terms[0].adapters, twin.held.models, strict=True):
        values.append(gap(adapter(ops.mean(own["map"], axis=(1, 2))), ops.mean(of(model, x)["tokens"][:, 1:], axis=1)))
        logits.append(kl(own["logits"], of(model, x)["logits"]))
    return ops.mean(ops.where(second, values[1], values[0])) + ops.mean(ops.where(second, logits[1], logits[0]))


def reviewed(twin: Any, x: Any, y: Any, step: float) -> Any:
    """Half of the review of each teacher, whose parts are the model's own."""
    import tensorflow as tf

    own, total = of(twin.student, x), 0.0
    for review, model in zip(twin.terms[0].adapters, twin.held.models, strict=True):
        for fused, name in zip(review([own["map"], own["deep"]]), ("map", "deep"), strict=True):
            target = of(model, x)[name]
            target = (
                tf.nn.avg_pool2d(target, target.shape[1] // fused.shape[1], 2, "VALID")
                if (target.shape[1] > fused.shape[1])
                else target
            )
            total = total + ops.mean(gap(fused, target)) / 2
    return total


def queued(twin: Any, x: Any, y: Any, step: float) -> Any:
    own, total = of(twin.student, x)["pool"], 0.0
    adapters = [*twin.terms[0].adapters, None][:2]
    for adapter, loss, model in zip(adapters, twin.terms[0].learned, twin.held.models, strict=False):
        mapped = own if adapter is None else adapter(own)
        total = total + queue_loss(mapped, of(model, x)["pool"], loss.layer.queue) / len(twin.held.models)
    return total


def projected(twin: Any, x: Any, y: Any, step: float) -> Any:
    own, target = of(twin.student, x), of(twin.held.models[0], x)
    [adapter] = twin.terms[1].adapters
    pooled = gap(ops.mean(own["map"], axis=(1, 2)), ops.mean(target["tokens"][:, 1:], axis=1))
    return ops.mean(pooled) + ops.mean(gap(adapter(own["pool"]), target["pool"]))


@keras.saving.register_keras_serializable(package="pairs")
def brighter(images: Any) -> Any:
    return 1.0 + 0.5 * images


@keras.saving.register_keras_serializable(package="pairs")
def by_corner(images: Any) -> Any:
    return ops.cast(images[:, 0, 0, 0] > 0, "int32")


def sums(images: Any) -> Any:
    return images.reshape(len(images), -1)[:, :3] * 2.0


def beside_a_function(twin: Any, x: Any, y: Any, step: float) -> Any:
    seen, own = 1.0 + 0.5 * x, of(twin.student, x)["logits"]
    function = 2.0 * ops.reshape(seen, (-1, 32))[:, :3]
    first = ops.mean(kl(own, of(twin.held.models[0], seen)["logits"]))
    return 0.75 * first + 0.25 * ops.mean(kl(own, function))


class BalancedByHand:
    """The ratios of the gradients' norms in the first steps, in closed form, and the weights from their medians."""

    def __init__(self) -> None:
        self.ratios: list[list[float]] = [[], []]
        self.weights = [0.0, 0.0]

    def measure(self, twin: Any, x: Any, y: Any) -> None:
        (deep, z), (target, expected) = (
            [ops.convert_to_numpy(part) for part in inner(net, x, "hidden", "deep")[1:]]
            for net in (twin.student, twin.held.models[0])
        )
        soft = lambda logits: ops.convert_to_numpy(ops.softmax(logits))  # noqa: E731
        task = (soft(z) - np.eye(3)[y]) / len(x)
        heat = 4.0 * (soft(z / 4.0) - soft(expected / 4.0)) / len(x)
        kernel, bias = (ops.convert_to_numpy(weight) for weight in twin.terms[1].adapters[0].weights)
        gap = 2 * (deep @ kernel + bias - target) @ kernel.T / target.size
        at_deep = task @ ops.convert_to_numpy(twin.student.get_layer("logits").kernel).T
        pairs = ((task, heat), (at_deep, gap))
        for index, (share, steps) in enumerate(((0.5, 2), (2.0, 3))):
            if len(self.ratios[index]) < steps:
                self.ratios[index].append(float(np.linalg.norm(pairs[index][0]) / np.linalg.norm(pairs[index][1])))
            self.weights[index] = share * float(np.exp(np.median(np.log(self.ratios[index]))))

    def __call__(self, twin: Any, x: Any, y: Any, step: float) -> Any:
        (deep, z), (target, expected) = (
            inner(net, x, "hidden", "deep")[1:] for net in (twin.student, twin.held.models[0])
        )
        [adapter] = twin.terms[1].adapters
        squared = ops.mean(ops.square(adapter(deep) - target))
        return self.weights[0] * ops.mean(kl(z, expected)) + self.weights[1] * squared


def queue() -> QueueSimilarityLoss:
    return QueueSimilarityLoss(size=12, teacher_temperature=0.1)


ONE_REPLICA = {"replicas": "Expected one replica for QueueSimilarityLoss, whose queue cannot be shared"}
PICTURES: dict[str, Any] = {"kind": picture, "situations": SITUATIONS}
TOGETHER = {
    "learned losses on the patches of two teachers": Feature(
        lambda: [FeatureDistillation("map", "tokens", VariationalInformationLoss())],
        by_patches, teachers=2, widths=(6, 5), settings={"teacher_weights": [3.0, 1.0]}, **PICTURES,
    ),
    "pooled patches and a route between teachers of other numbers of patches": Feature(
        lambda: [FeatureDistillation("map", "tokens", adapter="pool"), LogitsDistillation()],
        pooled_by_route, teachers=2, settings={"route": by_corner}, **PICTURES,
    ),
    "a review of two teachers": Feature(
        lambda: [ReviewDistillation(["map", "deep"], ["map", "deep"], "mse", channels=3)],
        reviewed, teachers=2, widths=(6, 5), **PICTURES,
    ),
    "queues of two teachers": Feature(
        lambda: [FeatureDistillation("pool", "pool", queue())], queued, teachers=2, words=ONE_REPLICA, **PICTURES
    ),
    "a queue of the average": Feature(
        lambda: [FeatureDistillation("pool", "pool", queue(), adapter="pool")],
        queued, moving=True, words=ONE_REPLICA, **PICTURES,
    ),
    "pooled patches and components of the average": Feature(
        lambda: [
            FeatureDistillation("map", "tokens", adapter="pool"),
            FeatureDistillation("pool", "pool", adapter=PCAProjection(COMPONENTS)),
        ],
        projected, moving=True, **PICTURES,
    ),
    "a function beside a teacher with inputs of their own": Feature(
        lambda: [LogitsDistillation()],
        beside_a_function, teacher=lambda held: [held[0], CallableTeacher(sums, (3,))],
        settings={"teacher_weights": [3.0, 1.0], "teacher_inputs": brighter}, **PICTURES,
    ),
    "balanced weights": Feature(
        lambda: [
            LogitsDistillation(weight=Balanced(0.5, steps=2)),
            FeatureDistillation("deep", "deep", weight=Balanced(2.0, steps=3)),
        ],
        BalancedByHand,
        situations=("jit_compile", *SITUATIONS, "train_on_batch", "pickle", "generator"),
        words={"jax": "Expected the weight of term 'logits' to be a number or a schedule on JAX"},
    ),
}  # fmt: skip
FEATURES.update(TOGETHER)  # the loop by hand finds the rows in one table
