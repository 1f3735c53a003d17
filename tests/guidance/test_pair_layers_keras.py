"""Pairs of layers of Keras models: known answers, settings, and models that stay as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from cka_by_hand import cka_by_hand
from keras import layers, ops
from keras_nets import assert_same_weights
from keras_vision import SIZE, cnn, mobilenet, vit

from keras_distill import CallableTeacher, DistillModel, DistillStep, Tap, pair_layers
from keras_distill.recording import recorder


def stacked(blocks: int = 4, width: int = 8, seed: int = 0, name: str = "net") -> keras.Model:
    """Residual blocks: ``stem``, then ``wide_i``, ``narrow_i``, ``out_i`` for each, and ``head``."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6,))
    x = layers.Dense(width, name="stem")(inputs)
    for number in range(blocks):
        inner = layers.Dense(2 * width, "tanh", name=f"wide_{number}")(x)
        x = layers.Add(name=f"out_{number}")([x, layers.Dense(width, name=f"narrow_{number}")(inner)])
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name=name)


class Block(layers.Layer):
    """A residual block of two layers, with a sum that Keras does not see as a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = layers.Dense(2 * width, "tanh"), layers.Dense(width)

    def call(self, x: Any) -> Any:
        return x + self.second(self.first(x))


class Subclassed(keras.Model):
    """``stem``, ``blocks`` and ``head``."""

    def __init__(self, blocks: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem, self.head = layers.Dense(width, name="stem"), layers.Dense(3, name="head")
        self.blocks = [Block(width) for _ in range(blocks)]

    def call(self, x: Any) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def rows(*sizes: int, seed: int = 0) -> list[Any]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(size, 6)).astype("float32") for size in sizes]


def images(*sizes: int) -> list[Any]:
    return [np.random.default_rng(size).normal(size=(size, SIZE, SIZE, 3)).astype("float32") for size in sizes]


def names(pairs: Any) -> list[tuple[str, str]]:
    return [(pair.student.label, pair.teacher.label) for pair in pairs]


def trains(terms: list[Any], student: keras.Model, teacher: keras.Model, batch: Any) -> bool:
    step = DistillStep(student, teacher, terms)
    with step.watching():
        output = student(batch)
    return float(ops.convert_to_numpy(step.losses(output)["distillation_loss"])) > 0


# Known answers -------------------------------------------------------------------------------------------------------


def test_the_first_blocks_of_a_teacher_are_paired_with_themselves() -> None:
    teacher, student = stacked(6), stacked(3, seed=1)
    for layer in student.layers[1:-1]:
        layer.set_weights(teacher.get_layer(layer.name).get_weights())
    pairs = pair_layers(student, teacher, rows(64))
    assert names(pairs) == [(f"out_{number}",) * 2 for number in range(3)]
    assert [pair.similarity for pair in pairs] == pytest.approx([1.0] * 3, abs=1e-5)


def test_unequal_batches_equal_the_formula_by_hand_in_float64() -> None:
    student, teacher = stacked(2), stacked(3, 11, seed=1)
    batches = rows(5, 12, 7)

    def outputs(model: keras.Model, layer: str) -> list[Any]:
        inner = keras.Model(model.inputs[0], model.get_layer(layer).output)
        return [ops.convert_to_numpy(inner(batch)).astype("float64") for batch in batches]

    pairs = pair_layers(student, teacher, batches)
    assert [layer.name for layer in pairs.student_layers] == ["stem", "out_0", "out_1"]
    for row, first in enumerate(pairs.student_layers):
        for column, second in enumerate(pairs.teacher_layers):
            expected = cka_by_hand(outputs(student, first.name), outputs(teacher, second.name), [5, 12, 7])
            assert pairs.similarity[row, column] == pytest.approx(expected, rel=1e-4)


def test_permuted_channels_have_similarity_one() -> None:
    teacher, student = stacked(1), stacked(1, seed=1)
    order = np.random.default_rng(0).permutation(8)
    kernel, bias = teacher.get_layer("stem").get_weights()
    student.get_layer("stem").set_weights([3 * kernel[:, order], bias[order]])
    pairs = pair_layers(student, teacher, rows(16), student_layers="stem", teacher_layers="stem")
    assert pairs[0].similarity == pytest.approx(1, abs=1e-5)


def test_padding_does_not_count() -> None:
    def tokens(seed: int, width: int, mask_zero: bool) -> keras.Model:
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((5,), dtype="int32")
        embedded = layers.Embedding(50, width, mask_zero=mask_zero, name="embed")(inputs)
        return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(embedded)))

    ids = np.random.default_rng(0).integers(1, 50, (12, 5))
    ids[np.arange(5) >= np.arange(12)[:, None] % 4 + 2] = 0
    masked, unmasked = (pair_layers(tokens(0, 4, masks), tokens(1, 8, masks), [ids]) for masks in (True, False))
    batch = [{"token_ids": ids, "padding_mask": ids != 0}]
    inputs = {"token_ids": keras.Input((5,), dtype="int32", name="token_ids")}
    inputs |= {"padding_mask": keras.Input((5,), dtype="bool", name="padding_mask")}
    models = [keras.Model(inputs, tokens(seed, width, False)(inputs["token_ids"])) for seed, width in ((0, 4), (1, 8))]
    by_input = pair_layers(*models, batch)
    layer = next(layer for layer in by_input.student_layers if layer.name.endswith("embed"))
    row = by_input.student_layers.index(layer)
    assert by_input.similarity[row, row] == pytest.approx(masked[0].similarity, abs=1e-6)
    assert masked[0].similarity != pytest.approx(unmasked[0].similarity, abs=1e-3)


# The layers ----------------------------------------------------------------------------------------------------------


def test_the_layers_of_a_functional_model_are_those_on_its_main_path() -> None:
    pairs = pair_layers(stacked(2), stacked(3, seed=1), rows(8))
    assert [(layer.name, layer.block) for layer in pairs.student_layers] == [
        ("stem", False),
        ("out_0", True),
        ("out_1", True),
    ]
    everything = pair_layers(stacked(2), stacked(3, seed=1), rows(8), student_layers="all")
    assert "wide_0" in [layer.name for layer in everything.student_layers]
    assert "head" not in [layer.name for layer in everything.student_layers]  # for terms on outputs


def test_the_layers_of_a_subclassed_model_are_its_blocks_and_layers_outside_of_them() -> None:
    pairs = pair_layers(Subclassed(), stacked(4), rows(16))
    listed = [(layer.name, layer.block) for layer in pairs.student_layers]
    assert [block for _, block in listed] == [False, True, True, True]
    assert listed[0][0] == "stem"
    assert len(pairs) == 3
    student, teacher = Subclassed(), stacked(4)
    student(rows(2)[0])
    assert trains(pair_layers(student, teacher, rows(16)).terms(), student, teacher, rows(16)[0])


def test_activations_that_follow_a_sum_end_the_block_and_gates_do_not() -> None:
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", name="conv")(inputs)
    gate = layers.Dense(4, "sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    x = layers.Multiply(name="gated")([x, gate])
    x = layers.Add(name="sum")([x, layers.Conv2D(4, 3, padding="same")(x)])
    x = layers.ReLU(name="out")(x)
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D(name="pool")(x)))
    pairs = pair_layers(model, keras.models.clone_model(model), [np.random.randn(8, 8, 8, 3)])
    blocks = [layer.name for layer in pairs.student_layers if layer.block]
    assert blocks == ["out"]
    assert names(pairs) == [("out", "out")]


def test_a_nested_model_and_its_last_layer_are_one_layer_under_the_outer_name() -> None:
    inner = keras.Sequential([layers.Dense(8, "tanh", name="a"), layers.Dense(8, "tanh", name="b")], name="inner")
    student = keras.Sequential([keras.Input((6,)), inner, layers.Dropout(0.5, name="drop"), layers.Dense(3)])
    pairs = pair_layers(student, stacked(), rows(8))
    assert [layer.name for layer in pairs.student_layers] == ["inner/a", "inner"]


def test_each_call_of_a_shared_layer_is_a_layer() -> None:
    def twice(seed: int) -> keras.Model:
        keras.utils.set_random_seed(seed)
        inputs, inner = keras.Input((6,)), layers.Dense(6, "tanh", name="inner")
        return keras.Model(inputs, layers.Dense(3, name="head")(inner(inner(inputs))))

    student, teacher = twice(0), twice(1)
    pairs = pair_layers(student, teacher, rows(16))
    assert names(pairs) == [("inner#0", "inner#0"), ("inner#1", "inner#1")]
    assert pairs.terms()[1].student_taps == [Tap("inner", call=1)]
    assert trains(pairs.terms(), student, teacher, rows(16)[0])


def test_layers_before_the_first_weights_are_left_out() -> None:
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Rescaling(2.0, name="scale")(inputs)
    maps = layers.Conv2D(4, 3, strides=4, name="maps")(x)
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D(name="pool")(maps)))
    pairs = pair_layers(model, cnn(), images(8))
    assert [layer.name for layer in pairs.student_layers] == ["maps", "pool"]


@pytest.mark.filterwarnings("ignore:.*retracing")
def test_tokens_and_maps_are_paired_by_their_grids() -> None:
    student, teacher = cnn(), vit()
    pairs = pair_layers(student, teacher, images(8))
    assert [(pair.student.name, pair.teacher.positions) for pair in pairs] == [("maps", (4, 4))]
    assert trains(pairs.terms(), student, teacher, images(8)[0])


@pytest.mark.filterwarnings("ignore:.*retracing")
def test_a_model_of_keras_applications_is_paired_with_its_twin() -> None:
    student = mobilenet()
    teacher = keras.models.clone_model(student)
    teacher.set_weights(student.get_weights())
    pairs = pair_layers(student, teacher, images(8))
    # all twins are equally similar up to rounding, which decides between them
    assert [student == teacher and student.endswith("_add") for student, teacher in names(pairs)] == [True, True]
    assert [pair.similarity for pair in pairs] == pytest.approx([1.0, 1.0], abs=1e-4)


class Noise(layers.Layer):
    """Random also with ``training=False``."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = keras.random.SeedGenerator(1)

    def call(self, x: Any) -> Any:
        return x + keras.random.normal(ops.shape(x), seed=self.seed)


def test_a_model_that_is_random_without_training_is_noticed() -> None:
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, name="second")(Noise()(layers.Dense(8, name="first")(inputs)))
    random = keras.Model(inputs, layers.Dense(3)(hidden))
    with pytest.warns(UserWarning, match="student is random in eval mode: 'noise.*' returned other .* like 1 other"):
        pair_layers(random, stacked(), rows(8))


# The models stay as they were ----------------------------------------------------------------------------------------


def test_weights_flags_and_calls_of_layers_are_as_before() -> None:
    student, teacher = cnn(), vit()
    teacher.get_layer("head").trainable = False
    copies = [keras.models.clone_model(model) for model in (student, teacher)]
    for copied, model in zip(copies, (student, teacher), strict=True):
        copied.set_weights(model.get_weights())
    call = keras.layers.Layer.__call__
    pair_layers(student, teacher, images(8))
    for copied, model in zip(copies, (student, teacher), strict=True):
        assert_same_weights(copied, model, 0)
    assert keras.layers.Layer.__call__ is call
    assert not teacher.get_layer("head").trainable
    with pytest.raises(ValueError, match="at least 4 examples"):
        pair_layers(student, teacher, images(8, 2))
    assert keras.layers.Layer.__call__ is call
    assert not any(recorder._USERS.values())


def test_dropout_and_batch_normalisation_run_as_in_inference() -> None:
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(8, name="hidden"), layers.BatchNormalization(), layers.Dropout(0.5)]
    student = keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(3)])
    before = student.get_weights()
    first, second = (pair_layers(student, stacked(), rows(8)).similarity for _ in range(2))
    np.testing.assert_array_equal(first, second)
    for weight, now in zip(before, student.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, now)


# Settings ------------------------------------------------------------------------------------------------------------


def test_the_code_runs_as_it_is_and_makes_the_same_terms(tmp_path: Path) -> None:
    student, teacher = cnn(), cnn(9, name="teacher")
    pairs = pair_layers(student, teacher, images(8, 8))
    code = pairs.code("cosine", weight=2.5)
    assert code.startswith("from keras_distill import FeatureDistillation\n")
    scope: dict[str, Any] = {}
    exec(code, scope)
    for term, expected in zip(scope["terms"], pairs.terms("cosine", weight=2.5), strict=True):
        assert term.get_config() == expected.get_config()
    assert trains(scope["terms"], student, teacher, images(8)[0])
    assert str(pairs).splitlines()[1].split()[:2] == ["maps", "maps"]
    assert str(pairs).splitlines()[-1] == "linear CKA of 2 x 2 layers, 16 examples in 2 batches"
    pairs.draw(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_by_depth_need_no_similarities() -> None:
    student, teacher = stacked(3), stacked(6, seed=1)
    assert names(pair_layers(student, teacher, rows(2), by="uniform")) == [
        ("out_0", "out_1"),
        ("out_1", "out_3"),
        ("out_2", "out_5"),
    ]
    assert names(pair_layers(student, teacher, rows(2), by="last", count=1)) == [("out_2", "out_5")]


def test_the_originals_are_the_layers_with_equal_weights() -> None:
    teacher, student = Subclassed(5), Subclassed(2)
    for model in (teacher, student):
        model(rows(2)[0])
    for block, number in zip(student.blocks, (1, 4), strict=True):
        block.set_weights(teacher.blocks[number].get_weights())
    pairs = pair_layers(student, teacher, rows(2), by="original")
    listed = [layer.name for layer in pairs.teacher_layers]
    assert [listed.index(pair.teacher.name) for pair in pairs] == [1, 4]
    with pytest.raises(ValueError, match="layers with the weights of layers of the teacher"):
        pair_layers(Subclassed(2), teacher, rows(2), by="original")


def test_datasets_tuples_and_dicts_are_batches() -> None:
    student, teacher = cnn(), cnn(9, name="teacher")
    x, y = images(16)[0], np.arange(16)
    expected = pair_layers(student, teacher, [x[:8], x[8:]]).similarity
    batches: list[Any] = [[(x[:8], y[:8]), (x[8:], y[8:], y[8:])]]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        batches.append(tf.data.Dataset.from_tensor_slices((x, y)).batch(8))
    for each in batches:
        np.testing.assert_allclose(pair_layers(student, teacher, each).similarity, expected, rtol=1e-5)
    changed = pair_layers(student, teacher, [x[:8] / 2, x[8:] / 2], teacher_inputs=lambda inputs: inputs * 2)
    assert changed.similarity.shape == expected.shape
    assert pair_layers(DistillModel(student, teacher), teacher, [x]).student_layers[0].name == "maps"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"batches": rows(8)[0]}, TypeError, r"`batches` to be a dataset or a list of batches. Pass \[batch\]"),
        ({"batches": (rows(8)[0],)}, TypeError, "Received: a tuple"),
        ({"batches": []}, ValueError, "Expected `batches` to hold at least one batch"),
        ({"batches": rows(3)}, ValueError, "at least 4 examples, but got one with 3"),
        ({"student": "model"}, TypeError, "Expected `student` to be a Keras model"),
        (
            {"teacher": CallableTeacher(len, output_shape=(3,))},
            TypeError,
            "Expected `teacher` to be one model with layers",
        ),
        ({"by": "cca"}, ValueError, "Expected `by` to be one of 'cka'"),
        ({"count": 0}, ValueError, "Expected `count` to be at least 1"),
        ({"count": 9}, ValueError, "Expected `count` to be at most 2, the layers to choose from"),
        (
            {"student_layers": "outt_0"},
            ValueError,
            "`student_layer` to name one layer of the student .* Closest: 'out_0'",
        ),
        ({"teacher_inputs": 3}, TypeError, "Expected `teacher_inputs` to be a function"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    settings: dict[str, Any] = {"student": stacked(2), "teacher": stacked(3), "batches": rows(8)}
    with pytest.raises(error, match=words):
        pair_layers(**{**settings, **arguments})


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_is_an_error_that_names_the_layer(who: str) -> None:
    broken, good = stacked(2), stacked(2)
    kernel, bias = broken.get_layer("narrow_0").get_weights()
    broken.get_layer("narrow_0").set_weights([kernel * np.nan, bias])
    models = (broken, good) if who == "student" else (good, broken)
    with pytest.raises(ValueError, match=f"the {who}'s layers to return finite numbers, .* from 'out_0'"):
        pair_layers(*models, rows(8))
