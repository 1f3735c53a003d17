"""`boxes=Tap(...)`: boxes of a layer of the student that resizes images, as in the PyTorch half."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_dense_nets import weights_by_hand
from keras_nets import assert_same_weights

from keras_distill import CrossHeadDistillation, DistillModel, FeatureDistillation, FocalGlobalLoss, Tap

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=(4, 16, 16, 3)).astype("float32")
BOXES = np.array([[[0, 0, 8, 12], [4, 4, 16, 16]], [[8, 4, 16, 8], [-1, -1, -1, -1]]] * 2, "float32")
INPUTS = {"images": IMAGES, "boxes": BOXES}
SCORES = np.zeros((4, 4, 4, 2), "float32")
HALF = BOXES / 2


@keras.saving.register_keras_serializable(package="boxes_of_a_layer")
class Halved(keras.layers.Layer):
    """Images of half the size with their boxes.

    Args:
        form: Form of its output.
    """

    def __init__(self, form: str = "dict", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.form = form

    def call(self, images: Any, boxes: Any) -> Any:
        images, boxes = images[:, ::2, ::2], boxes / 2
        forms = {
            "dict": {"images": images, "bounding_boxes": {"boxes": boxes, "labels": boxes[..., 0]}},
            "boxes": {"images": images, "boxes": boxes},
            "pair": (images, boxes),
            "images": {"images": images},
            "shares": (images, boxes / 8),
            "vectors": (ops.mean(images, axis=(1, 2)), boxes),
        }
        return forms[self.form]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "form": self.form}


def detector(seed: int, width: int, form: str = "dict") -> keras.Model:
    keras.utils.set_random_seed(seed)
    inputs = {"images": keras.Input((16, 16, 3), name="images"), "boxes": keras.Input((2, 4), name="boxes")}
    resized = Halved(form, name="transform")(inputs["images"], inputs["boxes"])
    small = resized["images"] if isinstance(resized, dict) else resized[0]
    if form == "vectors":
        small = keras.layers.Reshape((1, 1, 3))(small)
    maps = keras.layers.Conv2D(width, 2, 2, padding="same", activation="tanh", name="maps")(small)
    return keras.Model(inputs, keras.layers.Conv2D(2, 1, name="scores")(maps))


def distilled(term: Any, form: str = "dict", **compiled: Any) -> DistillModel:
    model = DistillModel(detector(1, 5, form), detector(2, 5, form), term)
    model.compile(keras.optimizers.SGD(0.5), "mse", **(compiled or {"run_eagerly": True}))
    return model


def in_boxes(loss: Any = "mse", place: Any = None, **settings: Any) -> FeatureDistillation:
    place = Tap("transform") if place is None else place
    return FeatureDistillation("maps", "maps", loss, boxes=place, adapter=None, name="maps", **settings)


def maps_of(model: keras.Model) -> Any:
    part = keras.Model(model.inputs, model.get_layer("maps").output)
    return np.asarray(part.predict(INPUTS, verbose=0), "float64")


@pytest.mark.parametrize("form", ["dict", "boxes", "pair"])
def test_the_positions_in_the_boxes_of_the_layer_count_alone(form: str) -> None:
    model = distilled(in_boxes(), form)
    value = model.evaluate(INPUTS, SCORES, verbose=0, return_dict=True)["maps_loss"]
    inside = weights_by_hand(HALF, (4, 4), (8, 8)) > 0
    assert 0 < inside.sum() < inside.size
    expected = ((maps_of(model.student) - maps_of(model.teacher)) ** 2).mean(-1)[inside].mean()
    assert value == pytest.approx(expected, rel=1e-5)


TERMS: dict[str, Any] = {
    "mse": lambda place=None: in_boxes(place=place),
    "FGD": lambda place=None: in_boxes(FocalGlobalLoss(), place),
    "head": lambda place=None: CrossHeadDistillation(
        "maps", "scores", "mse", boxes=Tap("transform") if place is None else place, name="maps", adapter=None
    ),
}


@pytest.mark.parametrize("way", [{"run_eagerly": True}, {"jit_compile": False}], ids=["eager", "graph"])
@pytest.mark.parametrize("name", TERMS)
def test_a_training_is_that_with_the_same_boxes_beside_the_inputs(name: str, way: dict[str, Any]) -> None:
    """Boxes in pixels of the input weigh the same positions, since the layer halves both."""
    models = [distilled(TERMS[name](place), **way) for place in (None, "boxes")]
    for model in models:
        model.fit(INPUTS, SCORES, batch_size=2, epochs=2, verbose=0, shuffle=False)
    assert_same_weights(*models, 1e-6)


def test_a_file_holds_the_place_of_the_boxes(tmp_path: Path) -> None:
    model = distilled(in_boxes())
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.terms[0].boxes == Tap("transform")
    again.teacher, again.run_eagerly = model.teacher, True
    for each in (model, again):
        each.fit(INPUTS, SCORES, batch_size=2, verbose=0, shuffle=False)
    assert_same_weights(again, model, 1e-6)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "images alone": ("images", Tap("transform"), "and their boxes. Return {'images': ..., 'boxes': ...}, or a pair"),
    "vectors": ("vectors", Tap("transform"), "to return images of a known size and their boxes"),
    "another layer": ("dict", Tap("maps"), "Expected student layer 'maps' to return images of a known size"),
    "shares": ("shares", Tap("transform"), "Received: shares of the image's size"),
    "an unknown layer": ("dict", Tap("transforms"), "transforms"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_without_boxes_of_its_images_is_refused_in_words(name: str) -> None:
    form, place, words = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        distilled(in_boxes(place=place), form).fit(INPUTS, SCORES, verbose=0)
