"""Several outputs, layers with several tensors, and features of other shapes (K13, K14)."""

from __future__ import annotations

from typing import Any

import keras
import keras_nets as nets
import numpy as np
import pytest
from keras import layers

from keras_distill import DecoupledKDLoss, DistillModel, DistillTargets, FeatureDistillation, LogitsDistillation, Tap

X, Y = nets.table(16)
BATCH = {"batch_size": 16, "verbose": 0}


def evaluated(model: DistillModel, *data: Any) -> dict[str, float]:
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    return model.evaluate(*data, **BATCH, return_dict=True)


# Outputs (K13) --------------------------------------------------------------------------------------------------------


def heads(form: str, names: tuple[str, ...], name: str = "student") -> keras.Model:
    """A model with an output of 3 classes for each name."""
    inputs = keras.Input((6,))
    outputs = {name: layers.Dense(3, name=name)(inputs) for name in names}
    return keras.Model(inputs, outputs if form == "dict" else list(outputs.values()), name=name)


def test_k13_outputs_in_a_dict_are_paired_by_name() -> None:
    """K13: whatever their order in the two models."""
    student, teacher = heads("dict", ("a", "b")), heads("dict", ("b", "a"), "teacher")
    student_value, teacher_value = (network.predict(X, verbose=0) for network in (student, teacher))
    expected = sum(nets.kl64(student_value[key], teacher_value[key]).mean() for key in ("a", "b"))
    assert evaluated(DistillModel(student, teacher), X)["logits_loss"] == pytest.approx(expected, rel=1e-4)


def test_k13_outputs_in_a_list_are_paired_by_place() -> None:
    """K13: whatever their names."""
    student, teacher = heads("list", ("z", "a")), heads("list", ("a", "z"), "teacher")
    student_value, teacher_value = (network.predict(X, verbose=0) for network in (student, teacher))
    expected = sum(nets.kl64(*pair).mean() for pair in zip(student_value, teacher_value, strict=True))
    assert evaluated(DistillModel(student, teacher), X)["logits_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("forms", [("dict", "list"), ("list", "dict")])
def test_k13_outputs_by_name_are_not_paired_with_outputs_by_place(forms: tuple[str, str]) -> None:
    """K13: outputs are not paired in alphabetical order."""
    student, teacher = heads(forms[0], ("z", "a")), heads(forms[1], ("z", "a"), "teacher")
    with pytest.raises(ValueError, match=r"^Expected both models .* Received: a (dict and a list|list and a dict)$"):
        DistillModel(student, teacher)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a", "c"), r"^Expected both models to have the same outputs\. .* Received: \['a', 'b'\] and \['a', 'c'\]$"),
        (("a",), r"^Expected both models to have the same outputs\. .* Received: \['a', 'b'\] and \['a'\]$"),
    ],
)
def test_k13_outputs_of_other_names_raise(names: tuple[str, ...], words: str) -> None:
    """K13: both sets of names are in the message, unless one output is chosen."""
    student, teacher = heads("dict", ("a", "b")), heads("dict", names, "teacher")
    with pytest.raises(ValueError, match=words):
        DistillModel(student, teacher)
    DistillModel(student, teacher, LogitsDistillation(output="a"))


# Layers with several tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["cls", None])
def test_k13_labels_of_an_output_reach_a_loss_that_needs_them(output: str | None) -> None:
    """K13: each output is compared with the labels that are given for it."""
    student, teacher = (heads("dict", ("cls", "two"), name) for name in ("student", "teacher"))
    loss = DecoupledKDLoss()
    model = DistillModel(student, teacher, LogitsDistillation(loss, output=output))
    model.compile("sgd", nets.cross_entropy(), run_eagerly=True)
    x = np.random.default_rng(0).standard_normal((6, *student.input_shape[1:])).astype("float32")
    labels = {"cls": np.arange(6) % 3, "two": (np.arange(6) + 1) % 3}
    student_value, teacher_value = (network.predict(x, verbose=0) for network in (student, teacher))
    expected = sum(
        float(loss((teacher_value[name], labels[name]), student_value[name]))
        for name in ([output] if output else ["cls", "two"])
    )
    logs = model.evaluate(x, labels, verbose=0, return_dict=True)
    assert logs["logits_loss"] == pytest.approx(expected, rel=1e-5)


def recurrent(width: int, name: str) -> keras.Model:
    """A model whose layer "lstm" returns an output and two states."""
    inputs = keras.Input((5, 2))
    output, _state, _memory = layers.LSTM(width, return_state=True, name="lstm")(inputs)
    return keras.Model(inputs, layers.Dense(3)(output), name=name)


def test_k14_a_layer_with_several_tensors_raises_unless_one_is_picked() -> None:
    """K14: the message lists their shapes; the choice is that tensor."""
    student, teacher = recurrent(4, "student"), recurrent(4, "teacher")
    words = (
        r"^Expected `output` to pick one tensor of the output of student layer 'lstm'\. Pass output=\.\.\. Received:"
    )
    with pytest.raises(ValueError, match=words + r" output=None, with tensors of shapes \(\(None, 4\), \(None, 4\), "):
        DistillModel(student, teacher, FeatureDistillation("lstm", "lstm"))
    data = np.random.default_rng(0).normal(size=(16, 5, 2)).astype("float32")
    student_value, teacher_value = (nets.numpy_of(network.get_layer("lstm")(data)[2]) for network in (student, teacher))
    term = FeatureDistillation(Tap("lstm", output=2), Tap("lstm", output=2))
    logs = evaluated(DistillModel(student, teacher, term), data)
    assert logs["lstm_loss"] == pytest.approx(((student_value - teacher_value) ** 2).mean(), rel=1e-4)


# Features of other shapes (K14) ---------------------------------------------------------------------------------------


def maps(channels: int, stride: int, name: str) -> keras.Model:
    """A model of images 8 x 8 whose layer "maps" returns maps of 8 / stride pixels a side."""
    inputs = keras.Input((8, 8, 2))
    feature = layers.Conv2D(channels, 3, stride, padding="same", name="maps")(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(feature)), name=name)


def tokens(length: int, width: int, name: str) -> keras.Model:
    """A model of 6 values a token whose layer "tokens" returns some of 6 tokens."""
    inputs = keras.Input((6, 2))
    feature = layers.Dense(width, name="tokens")(layers.AveragePooling1D(6 // length)(inputs))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(feature)), name=name)


def test_k14_a_larger_map_of_the_teacher_is_averaged() -> None:
    """K14: each pixel of the student's map is compared with the mean of the four that it covers."""
    student, teacher = maps(3, 2, "student"), maps(3, 1, "teacher")
    images = np.random.default_rng(0).normal(size=(16, 8, 8, 2)).astype("float32")
    student_value, teacher_value = (nets.numpy_of(network.get_layer("maps")(images)) for network in (student, teacher))
    pooled = teacher_value.reshape(16, 4, 2, 4, 2, 3).mean((2, 4))
    model = DistillModel(student, teacher, FeatureDistillation("maps", "maps"))
    assert model.terms[0].adapters == [None]
    assert evaluated(model, images)["maps_loss"] == pytest.approx(((student_value - pooled) ** 2).mean(), rel=1e-4)


def test_k14_a_smaller_map_of_the_teacher_is_interpolated() -> None:
    """K14: linearly along each side between the centres of its pixels, and level beyond the outermost."""
    student, teacher = maps(3, 1, "student"), maps(3, 4, "teacher")
    images = np.random.default_rng(0).normal(size=(16, 8, 8, 2)).astype("float32")
    student_value, teacher_value = (nets.numpy_of(network.get_layer("maps")(images)) for network in (student, teacher))
    places = np.clip((np.arange(8) + 0.5) / 4 - 0.5, 0, 1)  # of the 8 pixels, between the two
    matrix = np.stack([1 - places, places], axis=1)
    grown = np.einsum("ah,bw,nhwc->nabc", matrix, matrix, teacher_value)
    model = DistillModel(student, teacher, FeatureDistillation("maps", "maps"))
    assert evaluated(model, images)["maps_loss"] == pytest.approx(((student_value - grown) ** 2).mean(), rel=1e-4)


def test_k14_an_adapter_and_a_resized_map_train_together() -> None:
    """K14: channels by the 1x1 convolution, pixels by the resizing; the distance falls."""
    terms = [FeatureDistillation("maps", "maps", weight=5.0), LogitsDistillation(weight=1e-20)]
    model = DistillModel(maps(3, 1, "student"), maps(5, 2, "teacher"), terms)
    (adapter,) = model.terms[0].adapters
    assert tuple(adapter.kernel.shape) == (1, 1, 3, 5)
    before = nets.numpy_of(adapter.kernel)
    images = np.random.default_rng(0).normal(size=(16, 8, 8, 2)).astype("float32")
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    distances = model.fit(images, epochs=4, **BATCH).history["maps_loss"]
    assert distances == sorted(distances, reverse=True)
    assert not np.array_equal(nets.numpy_of(adapter.kernel), before)


@pytest.mark.parametrize(
    ("student", "teacher", "layer", "shapes"),
    [
        ((6, 4), (1, 4), "tokens", r"\(None, 6, 4\) and \(None, 1, 4\)"),
        ((1, 4), (6, 4), "tokens", r"\(None, 1, 4\) and \(None, 6, 4\)"),
        ((6, 4), (3, 5), "tokens", r"\(None, 6, 5\) and \(None, 3, 5\)"),
        ((1, 1), (4, 1), "maps", r"\(None, 8, 8, 1\) and \(None, 8, 8, 4\)"),
        ((4, 1), (1, 1), "maps", r"\(None, 8, 8, 4\) and \(None, 8, 8, 1\)"),
    ],
)
def test_k14_sizes_that_differ_raise_and_name_both_layers(student: Any, teacher: Any, layer: str, shapes: str) -> None:
    """K14: a size of 1 too, of tokens (which no adapter changes) and of channels (without an adapter)."""
    network = maps if layer == "maps" else tokens
    adapter = None if layer == "maps" else "auto"
    words = f"^Expected student feature '{layer}' and teacher feature '{layer}' to have equal shapes.*{shapes}$"
    with pytest.raises(ValueError, match=words):
        DistillModel(
            network(*student, "student"),
            network(*teacher, "teacher"),
            FeatureDistillation(layer, layer, adapter=adapter),
        )


@pytest.mark.tensorflow
@pytest.mark.parametrize("carried", ["output", "feature"])
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_k14_one_row_of_the_teacher_is_refused_also_if_sizes_are_unknown(carried: str) -> None:
    """K14: a graph traced for batches of any size compares the sizes when it runs; nothing is broadcast."""
    import tensorflow as tf

    rows = {"output": 8, "feature": 8, carried: 1}
    targets = {"output": np.ones((rows["output"], 3), "float32"), "feature": np.ones((rows["feature"], 8), "float32")}
    sizes = (
        tf.TensorSpec((None, 6)),
        tf.TensorSpec((None,), "int32"),
        tf.TensorSpec((None, 3)),
        tf.TensorSpec((None, 8)),
    )
    batch = (X[:8], Y[:8], targets["output"], targets["feature"])
    data = tf.data.Dataset.from_generator(lambda: iter([batch]), output_signature=sizes)

    def packed(x: Any, y: Any, output: Any, feature: Any) -> Any:
        return x, DistillTargets(y, {"output": output, "features": {"hidden": feature}})

    term = LogitsDistillation() if carried == "output" else FeatureDistillation("hidden", "hidden")
    model = DistillModel(nets.mlp(), None, term, teacher_metrics=[])
    model.compile(keras.optimizers.SGD(0.1), nets.cross_entropy())
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=r"\b8\b"):
        model.fit(data.map(packed), verbose=0, steps_per_epoch=1)
