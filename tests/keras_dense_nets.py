"""A small dense network of Keras, boxes of a batch, and features in float64 for loops by hand."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distill import DistillModel, DistillStep, Tap

SIZE, KINDS = 16, 4
NAMES = ("fine", "coarse")  # not in the order of the alphabet, in which graphs return a dict
IMAGES = np.random.default_rng(0).standard_normal((4, SIZE, SIZE, 3)).astype("float32")
# as detectors of Keras get them: the same number of rows for each image, padded with -1
BOXES = np.full((4, 3, 4), -1.0, "float32")
BOXES[0, :2] = [[1, 2, 9, 5], [3, 3, 4, 14]]
BOXES[1, :1] = [[4, 4, 8, 8]]
BOXES[2] = [[0, 0, 16, 16], [2, 2, 6, 6], [8, 1, 15, 3]]
SCORES = np.random.default_rng(1).standard_normal((4, SIZE // 2, SIZE // 2, KINDS)).astype("float32")

INTO_HEAD = Tap("head", output="*", where="input")
FROM_HEAD = Tap("head", output="*")
# the targets of both levels, and the boxes beside them
TARGETS = {"fine": SCORES, "coarse": SCORES[:, ::2, ::2], "boxes": BOXES}


@keras.saving.register_keras_serializable(package="dense")
class Neck(keras.layers.Layer):
    """Images to two maps, of strides 2 and 4."""

    def __init__(self, width: int, kind: str = "dict", names: Any = NAMES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width, self.kind, self.names = width, kind, tuple(names)
        self.convolutions = [keras.layers.Conv2D(width, 3, 2, "same", name=f"level{index}") for index in range(2)]

    def build(self, shape: Any) -> None:
        self.convolutions[0].build(shape)
        self.convolutions[1].build(self.convolutions[0].compute_output_shape(shape))
        self.built = True

    def call(self, images: Any) -> Any:
        fine = self.convolutions[0](images)
        maps = [fine, self.convolutions[1](ops.tanh(fine))]
        named = dict(zip(self.names, maps, strict=True))
        return {"dict": named, "list": maps, "tuple": tuple(maps), "nested": {"maps": named, "more": fine}}[self.kind]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width, "kind": self.kind, "names": self.names}


@keras.saving.register_keras_serializable(package="dense")
class Head(keras.layers.Layer):
    """Class scores of each map of a list, or of a dict, or of two arguments."""

    def __init__(self, width: int, named: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width, self.named = width, named
        self.tower = keras.layers.Conv2D(width, 3, padding="same", activation="tanh", name="tower")
        self.scores = keras.layers.Conv2D(KINDS, 1, name="scores")

    def build(self, *shapes: Any, **named: Any) -> None:
        for layer in (self.tower, self.scores):
            layer.build((None, SIZE, SIZE, self.width))
        self.built = True

    def call(self, maps: Any, coarse: Any = None) -> Any:
        if coarse is not None:
            maps = [maps, coarse]
        named = maps if isinstance(maps, dict) else dict(zip(NAMES, maps, strict=True))
        scores = {name: self.scores(self.tower(each)) for name, each in named.items()}
        return scores if self.named else [scores[name] for name in NAMES]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width, "named": self.named}


def net(width: int, seed: int, kind: str = "dict", *, names: Any = NAMES, named: bool = False) -> keras.Model:
    """Images (16, 16, 3) to scores of each second pixel, or with names of both levels, by "neck" and "head"."""
    keras.utils.set_random_seed(seed)
    images = keras.Input((SIZE, SIZE, 3), name="images")
    maps = Neck(width, kind, names, name="neck")(images)
    maps = maps["maps"] if kind == "nested" else maps
    pair = [maps[name] for name in names] if isinstance(maps, dict) else list(maps)
    scores = Head(width, named, name="head")(dict(zip(names, pair, strict=True)) if named else pair)
    return keras.Model(images, scores if named else scores[0], name=f"net{seed}")


def value(term: Any, student: keras.Model, teacher: Any, labels: Any = None, x: Any = IMAGES) -> tuple[float, Any]:
    """The value of a term, and its own copy."""
    step = DistillStep(student, teacher, term)
    with step.watching():
        output = student(x if not isinstance(x, dict) else x["images"], training=True)
    losses = step.losses(output, x, labels)
    return float(losses[f"{term.name}_loss"]), step.terms[0]


def maps_of(model: keras.Model, x: Any = IMAGES) -> list[np.ndarray[Any, Any]]:
    """Both maps, the fine one first, in float64."""
    maps = model.get_layer("neck")(x)
    maps = maps.get("maps", maps) if isinstance(maps, dict) else maps
    return [as_double(each) for each in (maps.values() if isinstance(maps, dict) else maps)]


def as_double(tensor: Any) -> np.ndarray[Any, Any]:
    return np.asarray(ops.convert_to_numpy(tensor), "float64")


def weights_by_hand(boxes: Any, map_size: tuple[int, int], image_size: tuple[int, int] = (SIZE, SIZE)) -> Any:
    """Cell by cell: 1 over the number of cells that a box overlaps, the largest of all boxes of an image."""
    weights = np.zeros((len(boxes), *map_size))
    high, wide = image_size[0] / map_size[0], image_size[1] / map_size[1]
    for n, rows in enumerate(boxes):
        for left, top, right, bottom in rows:
            cells = [
                (i, j)
                for i, j in np.ndindex(*map_size)
                if min(right, (j + 1) * wide) > max(left, j * wide) and min(bottom, (i + 1) * high) > max(top, i * high)
            ]
            for i, j in cells:
                weights[n, i, j] = max(weights[n, i, j], 1 / len(cells))
    return weights


def adapted(adapter: Any, feature: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A feature after a 1x1 convolution, position by position, or as it is without an adapter."""
    if adapter is None:
        return feature
    kernel, bias = (as_double(weight) for weight in adapter.weights)
    result = np.zeros((*feature.shape[:3], kernel.shape[-1]))
    for n, i, j in np.ndindex(*feature.shape[:3]):
        result[n, i, j] = feature[n, i, j] @ kernel[0, 0] + bias
    return result


def mean_square(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """The mean of all squared differences, added one by one."""
    total = 0.0
    for index in np.ndindex(*first.shape):
        total += (first[index] - second[index]) ** 2
    return total / first.size


def head_by_hand(head: Any, feature: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Scores of a map, position by position: the 3x3 tower with a tanh, then the 1x1 scores."""
    (tower, tower_bias), (scores, bias) = (
        [as_double(weight) for weight in layer.weights] for layer in (head.tower, head.scores)
    )
    return scores_by_hand(tower_by_hand(feature, tower, tower_bias), scores, bias)


def tower_by_hand(feature: np.ndarray[Any, Any], kernel: np.ndarray[Any, Any], bias: np.ndarray[Any, Any]) -> Any:
    padded, result = np.pad(feature, ((0, 0), (1, 1), (1, 1), (0, 0))), np.zeros((*feature.shape[:3], len(bias)))
    for n, i, j in np.ndindex(*feature.shape[:3]):
        result[n, i, j] = np.tanh(np.tensordot(padded[n, i : i + 3, j : j + 3], kernel, axes=3) + bias)
    return result


def scores_by_hand(feature: np.ndarray[Any, Any], kernel: np.ndarray[Any, Any], bias: np.ndarray[Any, Any]) -> Any:
    result = np.zeros((*feature.shape[:3], len(bias)))
    for n, i, j in np.ndindex(*feature.shape[:3]):
        result[n, i, j] = feature[n, i, j] @ kernel[0, 0] + bias
    return result


def mean_of_squares(student: np.ndarray[Any, Any], teacher: np.ndarray[Any, Any]) -> float:
    return float(((student - teacher) ** 2).mean())


def distilled(term: Any, teacher: Any = None, student: Any = None, **compiled: Any) -> DistillModel:
    """A compiled model that also learns scores."""
    teacher = net(5, 2) if teacher is None else teacher
    model = DistillModel(net(3, 1) if student is None else student, teacher, term)
    loss = dict.fromkeys(NAMES, task) if len(model.student.outputs) > 1 else task
    model.compile(keras.optimizers.SGD(0.05), loss, **{"jit_compile": False, **compiled})
    return model


@keras.saving.register_keras_serializable(package="dense")
def task(y_true: Any, y_pred: Any) -> Any:
    return ops.mean(ops.square(y_true - y_pred), axis=(1, 2, 3))
