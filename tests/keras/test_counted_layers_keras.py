"""`mask=` and `ignore_index=` of terms on layers: the numbers of the PyTorch half, trainings, files, refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from counted_maps import FINE, INPUTS, MASK, STUDENT, TEACHER, marked, no_task
from keras import ops
from keras_nets import assert_same_weights

from keras_distill import (
    AttentionTransferLoss,
    CrossHeadDistillation,
    DistillModel,
    FeatureDistillation,
    LogitsDistillation,
    ReviewDistillation,
    SelfDistillation,
)
from keras_distill.recording import Call

RANDOM = np.random.default_rng(1)
TOKENS = [RANDOM.normal(size=(2, 7, 5)).astype("float32") for _ in range(2)]
TOKEN_MASK = RANDOM.integers(0, 2, (2, 7)).astype("bool")
ONE = np.array([True, False])
SHAPES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "pixels": ((STUDENT, TEACHER), {"ignore_index": 255}, {"labels": FINE}),
    "positions": ((STUDENT, TEACHER), {"mask": "mask"}, {"mask": MASK}),
    "both": ((STUDENT, TEACHER), {"mask": "mask", "ignore_index": 255}, {"mask": MASK, "labels": FINE[:, ::2, ::2]}),
    "tokens": (TOKENS, {"mask": "mask"}, {"mask": TOKEN_MASK}),
    "examples": ((STUDENT, TEACHER), {"mask": "mask"}, {"mask": ONE}),
    "labels of examples": ((STUDENT, TEACHER), {"ignore_index": 255}, {"labels": np.array([3, 255])}),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_the_value_is_that_of_the_pytorch_half(loss: str, name: str) -> None:
    torch = pytest.importorskip("torch")
    import lightning_distill
    from lightning_distill.recording import Call as TorchCall

    features, settings, data = SHAPES[name]
    batch = {key: torch.tensor(array) for key, array in data.items()}
    calls = [
        TorchCall.from_outputs(features={("a", "output"): torch.tensor(np.moveaxis(each, -1, 1))})
        if each.ndim == 4
        else TorchCall.from_outputs(features={("a", "output"): torch.tensor(each)})
        for each in features
    ]
    calls[0].batch = batch
    term = lightning_distill.FeatureDistillation("a", "a", loss, adapter=None, **settings)
    term.build(*calls[:1], calls[1:])
    expected = float(term(*calls, batch.get("labels")))

    own = FeatureDistillation("a", "a", loss, adapter=None, **settings)
    student, teacher = (Call(None, features={"a": ops.array(each)}) for each in features)
    student.inputs = {"mask": data.get("mask")}
    value = own.compute(student, teacher, labels=data.get("labels"))
    assert float(value) == pytest.approx(expected, rel=1e-5)


def network(seed: int, width: int) -> keras.Model:
    """Images to maps, then scores at each position."""
    keras.utils.set_random_seed(seed)
    images = keras.Input((4, 6, 3), name="images")
    maps = keras.layers.Conv2D(width, 1, activation="tanh", name="maps")(images)
    deep = keras.layers.Conv2D(5, 1, activation="tanh", name="deep")(maps)
    return keras.Model({"images": images}, keras.layers.Conv2D(5, 1, name="scores")(deep))


IMAGES, LABELS = INPUTS["images"], FINE[:, ::2, ::2]
TERMS: dict[str, Any] = {
    "features": lambda **counted: FeatureDistillation("maps", "maps", **counted),
    "head": lambda **counted: CrossHeadDistillation("maps", "scores", "mse", **counted),
    "exits": lambda **counted: SelfDistillation("maps", "deep", **counted),
}


def distilled(term: Any, teacher: Any = None) -> DistillModel:
    model = DistillModel(network(1, 4), network(2, 5) if teacher is None else teacher, term)
    for adapter in model.terms[0].adapters:
        adapter.set_weights([np.full(weight.shape, 0.1, "float32") for weight in adapter.get_weights()])
    model.compile(keras.optimizers.SGD(0.5), no_task, run_eagerly=True)
    return model


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("settings", [{"mask": "mask"}, {"mask": marked, "ignore_index": 255}])
def test_a_training_is_the_one_on_the_counted_pixels_alone(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """All layers are of one pixel, so that the counted pixels are a training of their own."""
    kept = MASK & (LABELS != 255) if "ignore_index" in settings else MASK
    model, alone = distilled(TERMS[name](**settings)), distilled(TERMS[name]())
    model.fit(INPUTS, LABELS, batch_size=2, epochs=2, verbose=0)
    pixels = np.tile(IMAGES[kept][:, None, None], (1, 4, 6, 1))
    alone.fit({"images": pixels}, np.zeros((len(pixels), 4, 6)), batch_size=len(pixels), epochs=2, verbose=0)
    assert_same_weights(model, alone, 1e-5)
    model.save(tmp_path / "model.keras")
    term = keras.models.load_model(tmp_path / "model.keras").terms[0]
    assert (term.mask, term.ignore_index) == (settings["mask"], settings.get("ignore_index"))


def test_a_route_between_teachers_leaves_positions_out_too() -> None:
    route = lambda inputs: ops.arange(2) % 2  # noqa: E731
    teachers = [network(2, 5), network(3, 7)]
    term = FeatureDistillation("maps", "maps", mask="mask")
    model = DistillModel(network(1, 4), teachers, term, route=route)
    model.compile("sgd", no_task, run_eagerly=True)
    value = model.evaluate(INPUTS, LABELS, batch_size=2, verbose=0, return_dict=True)["maps_loss"]
    gaps = []
    for row, (adapter, teacher) in enumerate(zip(model.terms[0].adapters, teachers, strict=True)):
        image = IMAGES[row : row + 1]
        own, other = (net.get_layer("maps")(image) for net in (model.student, teacher))
        squared = ops.convert_to_numpy(ops.mean(ops.square(adapter(own) - other), axis=-1))
        gaps.append(squared[0][MASK[row]])
    assert value == pytest.approx(np.concatenate(gaps).mean(), rel=1e-5)


def scalar_loss(student: Any, teacher: Any) -> Any:
    return ops.mean(ops.square(student - teacher))


def computed(term: Any, labels: Any = None, mask: Any = None) -> Any:
    student, teacher = (Call(None, features={"a": ops.array(each)}) for each in (STUDENT, TEACHER))
    student.inputs = {"mask": mask}
    return term.compute(student, teacher, labels=labels)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a loss of whole examples": (
        lambda: FeatureDistillation("a", "a", AttentionTransferLoss(), mask="mask"),
        ValueError,
        "Expected a loss with one value for each position, with `mask` or `ignore_index`.",
    ),
    "a function that returns the mean": (
        lambda: computed(FeatureDistillation("a", "a", scalar_loss, mask="mask", adapter=None), mask=MASK),
        ValueError,
        "Received: values of shape ()",
    ),
    "a mask of another size": (
        lambda: computed(FeatureDistillation("a", "a", mask="mask", adapter=None), mask=TOKEN_MASK),
        ValueError,
        "Expected mask='mask' to have one value for each example or position of a tensor (2, 4, 6, 5).",
    ),
    "no mask": (
        lambda: distilled(FeatureDistillation("maps", "maps", mask="other")).fit(INPUTS, LABELS, verbose=0),
        ValueError,
        "Expected the inputs to hold the mask 'other'.",
    ),
    "several labels": (
        lambda: computed(FeatureDistillation("a", "a", ignore_index=255, adapter=None), labels=[FINE, FINE]),
        ValueError,
        "Mark the positions by `mask` instead. Received: 2 tensors",
    ),
    "no labels": (
        lambda: computed(FeatureDistillation("a", "a", ignore_index=255, adapter=None)),
        ValueError,
        "Expected labels for a term with ignore_index=255.",
    ),
    "positions that the mean has lost": (
        lambda: distilled(FeatureDistillation("maps", "maps", adapter="pool", mask="mask")).fit(INPUTS, LABELS),
        ValueError,
        "Expected mask='mask' to have one value for each example or position of a tensor (2, 5).",
    ),
    "a review": (
        lambda: ReviewDistillation(["a", "b"], ["a", "b"], mask="mask"),
        TypeError,
        "Expected known settings of ReviewDistillation.",
    ),
    "outputs": (
        lambda: LogitsDistillation(mask="mask").compute(
            Call(ops.array(STUDENT[:, 0, 0]), inputs={"mask": MASK[:, 0]}), Call(ops.array(TEACHER[:, 0, 0]))
        ),
        ValueError,
        "Expected mask='mask' to have one value for each example or position of a tensor (2, 5).",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_use_that_cannot_be_right_is_refused_in_words(name: str) -> None:
    act, error, words = REFUSED[name]
    with pytest.raises(error, match=re.escape(words)):
        act()
