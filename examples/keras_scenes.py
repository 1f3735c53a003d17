"""A small detector written in Keras for the drawn scenes: its targets, losses, training and measure."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from drawn_scenes import KINDS, SIZE, STRIDES, Scene, average_precision, loader, positions

import keras  # isort: skip - after torch
from keras import layers, ops

Batch = tuple[Any, dict[str, Any]]


def block(x: Any, width: int, stride: int = 1) -> Any:
    """A convolution, its normalisation and a ReLU."""
    return layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, stride, "same")(x)))


def detector(width: int) -> keras.Model:
    """Scores before a sigmoid, and the logarithm of the distances to the edges of a box, at each position."""
    images = keras.Input((SIZE, SIZE, 3))
    fine = block(block(block(images, width, 2), width, 2), width)
    coarse = layers.Conv2D(width, 1)(block(block(fine, 2 * width, 2), 2 * width))
    fine = layers.add([fine, layers.UpSampling2D()(coarse)])
    neck = keras.Model(images, [fine, coarse], name="neck")
    maps = [keras.Input((SIZE // stride, SIZE // stride, width)) for stride in STRIDES.values()]
    tower, few = layers.Conv2D(width, 3, padding="same", activation="relu"), keras.initializers.Constant(-3.0)
    parts = {"scores": layers.Dense(KINDS, bias_initializer=few), "edges": layers.Dense(4)}
    rows = {
        name: layers.concatenate([layers.Reshape((-1, part.units))(part(tower(each))) for each in maps], axis=1)
        for name, part in parts.items()
    }
    return keras.Model(images, keras.Model(maps, rows, name="head")(neck(images)))


def batch_of(scenes: list[Scene]) -> Batch:
    """Images, and for each position its class and the distances to the edges of its box; boxes are padded with 0."""
    places, strides = positions()
    images = torch.stack([scene["images"] for scene in scenes]).movedim(1, -1).numpy()
    targets = {"scores": np.zeros((len(scenes), len(places), KINDS)), "edges": np.zeros((len(scenes), len(places), 4))}
    padded = np.zeros((len(scenes), 4, 4))
    for row, scene in enumerate(scenes):
        boxes = scene["boxes"]
        centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        near = (places[:, None] - centres).abs().amax(2) < 1.5 * strides[:, None]
        level = (sizes.amax(1) > 16) == (strides[:, None] > STRIDES["fine"])
        area = torch.where(near & level, sizes.prod(1), torch.inf)
        owner, owned = area.argmin(1), area.amin(1) < torch.inf
        apart = torch.cat([places - boxes[owner, :2], boxes[owner, 2:] - places], 1) / strides[:, None]
        targets["scores"][row, owned, scene["kinds"][owner][owned]] = 1
        targets["edges"][row, owned] = apart[owned]
        padded[row, : len(boxes)] = boxes
    return images, {**targets, "boxes": padded}


def focal(y: Any, z: Any) -> Any:
    """Focal loss of the scores."""
    values = ops.square(ops.abs(y - ops.sigmoid(z))) * ops.binary_crossentropy(y, z, from_logits=True)
    return ops.sum(values, (1, 2)) / ops.maximum(ops.sum(y, (1, 2)), 1)


def overlap(y: Any, z: Any) -> Any:
    """One minus the overlap of the boxes at the positions that have an object."""
    z, owned = ops.exp(ops.minimum(z, 4.0)), ops.cast(ops.any(y != 0, -1), z.dtype)
    smaller = ops.minimum(y, z)
    common, *areas = ((d[..., 0] + d[..., 2]) * (d[..., 1] + d[..., 3]) for d in (smaller, y, z))
    common = ops.maximum(common, 0.0)
    ratio = common / ops.maximum(areas[0] + areas[1] - common, 1e-6)
    return ops.sum(owned * (1 - ratio), 1) / ops.maximum(ops.sum(owned, 1), 1)


def train(model: keras.Model, data: Batch, epochs: int) -> None:
    """A training on the targets and, where a term reads them, the boxes."""
    images, targets = data
    read = {term.boxes for term in getattr(model, "terms", ()) if getattr(term, "boxes", None)}
    model.compile(keras.optimizers.AdamW(3e-3), {"scores": focal, "edges": overlap}, jit_compile=False)
    kept = {name: values for name, values in targets.items() if name != "boxes" or name in read}
    model.fit(images, kept, batch_size=16, epochs=epochs, verbose=0)


def precision(network: keras.Model, scenes: list[Scene]) -> float:
    """The average precision at an overlap of 0.5."""

    def answered(images: Any) -> dict[str, Any]:
        rows = network.predict_on_batch(images.movedim(1, -1).numpy())
        return {name: torch.from_numpy(np.array(values)) for name, values in rows.items()}

    return average_precision(answered, loader(scenes, shuffle=False))
