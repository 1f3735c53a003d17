"""Features of the Keras half for dense networks: pyramids with boxes, heads of teachers. The last rows of the table."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops
from keras_dense_nets import weights_by_hand
from pairs.keras_table import BATCH, EPOCHS, FEATURES, Feature
from pairs.keras_together import TOGETHER, by_corner

from keras_distill import CrossHeadDistillation, FeatureDistillation, FocalGlobalLoss, Tap

__all__ = ["BATCH", "EPOCHS", "FEATURES", "TOGETHER"]
# two boxes for each of the three labels; rows of -1 are padding
CORNERS = np.array(
    [[[0, 0, 2, 3], [1, 1, 4, 4]], [[2, 1, 4, 2], [-1, -1, -1, -1]], [[-1, -1, -1, -1], [-1, -1, -1, -1]]], "float32"
)
HEAT, WEIGHTS = 0.5, {"foreground_weight": 0.3, "background_weight": 0.1}
OTHER_WEIGHTS = {"attention_weight": 0.05, "context_weight": 0.02}


@keras.saving.register_keras_serializable(package="pairs")
def corners_of(labels: Any) -> Any:
    """The boxes of images of these labels."""
    return ops.take(ops.convert_to_tensor(CORNERS), ops.cast(labels, "int32"), axis=0)


@keras.saving.register_keras_serializable(package="pairs")
class Levels(keras.layers.Layer):
    """Images to maps of two sizes."""

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.fine = keras.layers.Conv2D(width, 2, padding="same", dtype=self.dtype_policy)
        self.coarse = keras.layers.Conv2D(width, 2, 2, dtype=self.dtype_policy)

    def build(self, shape: Any) -> None:
        self.fine.build(shape)
        self.coarse.build((*shape[:3], self.width))
        self.built = True

    def call(self, images: Any) -> dict[str, Any]:
        fine = self.fine(images)
        return {"fine": fine, "coarse": self.coarse(ops.tanh(fine))}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable(package="pairs")
class Scores(keras.layers.Layer):
    """Scores of three classes at every position of a list of maps."""

    def build(self, shapes: Any) -> None:
        self.scores = keras.layers.Dense(3, dtype=self.dtype_policy)
        self.scores.build(shapes[0])
        self.built = True

    def call(self, maps: Any) -> list[Any]:
        return [self.scores(ops.tanh(each)) for each in maps]


def dense(width: int, name: str, dtype: str | None = None) -> keras.Model:
    """Images to the mean scores of both levels."""
    inputs = keras.Input((4, 4, 2), name="image")
    maps = Levels(width, name="neck", dtype=dtype)(inputs)
    scores = Scores(name="head", dtype=dtype)([maps["fine"], maps["coarse"]])
    pools = [keras.layers.GlobalAveragePooling2D(dtype=dtype)(each) for each in scores]
    return keras.Model(inputs, keras.layers.Add(dtype=dtype)(pools), name=name)


def maps_of(model: keras.Model, x: Any, *names: str) -> list[Any]:
    maps = model.get_layer("neck")(x)
    return [ops.cast(maps[name], "float32") for name in names]


def attention(feature: Any) -> tuple[Any, Any]:
    """Of the positions ``(N, H, W)`` and of the channels ``(N, C)``."""
    _, high, wide, channels = feature.shape
    places, kinds = ops.mean(ops.abs(feature), axis=-1), ops.mean(ops.abs(feature), axis=(1, 2))
    raised = ops.exp(places / HEAT), ops.exp(kinds / HEAT)
    first = high * wide * raised[0] / ops.sum(raised[0], axis=(1, 2), keepdims=True)
    return first, channels * raised[1] / ops.sum(raised[1], axis=-1, keepdims=True)


def focal(own: Any, other: Any, y: Any, layer: Any) -> Any:
    """Equations 2 to 11 of FGD, the mean over the images."""
    table = weights_by_hand(CORNERS, own.shape[1:3], (4, 4)).astype("float32")
    inside = ops.take(ops.convert_to_tensor(table), y, axis=0)
    outside = ops.cast(inside == 0, "float32")
    outside = outside / ops.maximum(ops.sum(outside, axis=(1, 2), keepdims=True), 1.0)
    (own_places, own_kinds), (places, kinds) = attention(own), attention(other)
    weights = places * (WEIGHTS["foreground_weight"] * inside + WEIGHTS["background_weight"] * outside)
    squares = ops.sum(ops.square(own - other) * kinds[:, None, None, :], axis=-1)
    apart = ops.sum(ops.abs(own_places - places), axis=(1, 2)) + ops.sum(ops.abs(own_kinds - kinds), axis=-1)
    contexts = ops.square(layer.student_context(own) - layer.teacher_context(other))
    values = ops.sum(weights * squares, axis=(1, 2)) + OTHER_WEIGHTS["attention_weight"] * apart
    return ops.mean(values + OTHER_WEIGHTS["context_weight"] * ops.sum(contexts, axis=(1, 2, 3)))


def in_boxes(twin: Any, x: Any, y: Any, step: float) -> Any:
    """Both levels, sorted by name."""
    term, names = twin.terms[0], ("coarse", "fine")
    own, other = maps_of(twin.student, x, *names), maps_of(twin.held.models[0], x, *names)
    parts = zip(term.adapters, term.learned, own, other, strict=True)
    return sum(focal(adapter(s), ops.stop_gradient(t), y, loss.layer) for adapter, loss, s, t in parts) / 2


def crossed(twin: Any, x: Any, adapters: Any, teacher: keras.Model) -> Any:
    """CrossKD's loss of each image, averaged over the levels."""
    head, values = teacher.get_layer("head"), 0.0
    own, other = maps_of(twin.student, x, "fine", "coarse"), maps_of(teacher, x, "fine", "coarse")
    made = head([adapter(each) for adapter, each in zip(adapters, own, strict=True)])
    for z, target in zip(made, head(other), strict=True):
        q = ops.stop_gradient(ops.sigmoid(target))
        p = ops.sigmoid(z)
        cross_entropy = q * ops.log_sigmoid(z) + (1 - q) * ops.log_sigmoid(-z)
        values = values - ops.mean(ops.abs(p - q) * cross_entropy, axis=(1, 2, 3))
    return values / 2


def through_the_head(twin: Any, x: Any, y: Any, step: float) -> Any:
    return 20.0 * ops.mean(crossed(twin, x, twin.terms[0].adapters, twin.held.models[0]))


def through_routed_heads(twin: Any, x: Any, y: Any, step: float) -> Any:
    adapters, models = twin.terms[0].adapters, twin.held.models
    values = [crossed(twin, x, adapters[2 * number : 2 * number + 2], models[number]) for number in (0, 1)]
    return 20.0 * ops.mean(ops.where(x[:, 0, 0, 0] > 0, values[1], values[0]))


def cross_head() -> list[Any]:
    return [
        CrossHeadDistillation(
            Tap("head", output="*", where="input"), Tap("head", output="*"), weight=20.0, name="cross"
        )
    ]


def focal_term() -> list[Any]:
    loss = FocalGlobalLoss(HEAT, **WEIGHTS, **OTHER_WEIGHTS)
    pyramid = Tap("neck", output="*")
    return [FeatureDistillation(pyramid, pyramid, loss, boxes=corners_of)]


MOST = ("jit_compile", "steps_per_execution", "load_model", "clone", "mixed precision", "pickle")
DENSE = {
    "boxes on a pyramid": Feature(focal_term, in_boxes, kind=dense, widths=(5, 5), situations=MOST),
    "the head of the teacher": Feature(cross_head, through_the_head, kind=dense, widths=(5, 5), situations=MOST),
    "a route between heads": Feature(
        cross_head, through_routed_heads, teachers=2, kind=dense, widths=(5, 5), settings={"route": by_corner},
        situations=("load_model", "exception and second fit"),
    ),
}  # fmt: skip
FEATURES.update(DENSE)
