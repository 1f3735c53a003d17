"""Targets that carry the teacher's outputs: the same training without running the teacher in every epoch (K26)."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import assert_same_logs, assert_same_weights, cross_entropy, mlp, table

from keras_distill import DistillModel, DistillTargets, FeatureDistillation, LogitsDistillation, Tap

LOGITS = (LogitsDistillation,)


def adapter(student: Any, teacher: Any) -> keras.layers.Layer:
    """The same weights each time, whenever it is made."""
    return keras.layers.Dense(teacher[-1], kernel_initializer=keras.initializers.GlorotUniform(seed=3))


FEATURES = (LogitsDistillation, lambda: FeatureDistillation("hidden", "hidden", weight=0.4, adapter=adapter))


class Seen(keras.layers.Layer):
    """Passes its input on, and counts the examples that truly come by, in graphs too."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.examples = 0

    def count(self, inputs: Any) -> Any:
        self.examples += len(inputs)
        return inputs

    def call(self, inputs: Any) -> Any:
        if keras.backend.backend() == "jax":
            import jax

            jax.debug.callback(self.count, inputs)
            return inputs
        if keras.backend.backend() == "torch":
            self.count(inputs)
            return inputs
        import tensorflow as tf

        counted = tf.numpy_function(self.count, [inputs], inputs.dtype)
        counted.set_shape(inputs.shape)
        return counted


def counting_teacher() -> tuple[keras.Model, Seen]:
    """The same teacher each time, and what counts its examples."""
    keras.utils.set_random_seed(11)
    inputs, seen = keras.Input((6,)), Seen()
    hidden = keras.layers.Dense(12, activation="relu", name="hidden")(seen(inputs))
    teacher = keras.Model(inputs, keras.layers.Dense(3, name="logits")(hidden), name="teacher")
    seen.examples = 0
    return teacher, seen


def distilled(terms: Any, teacher: keras.Model | None, student: str = "functional", **settings: Any) -> DistillModel:
    keras.utils.set_random_seed(5)
    if student == "functional":
        pupil = mlp(8)
    else:  # knows its inputs from the data alone
        pupil = keras.Sequential([keras.layers.Dense(8, "relu", name="hidden"), keras.layers.Dense(3, name="logits")])
    model = DistillModel(pupil, teacher, [make() for make in terms], task_weight=0.7, **settings)
    model.compile(keras.optimizers.SGD(0.1), cross_entropy(), metrics=["accuracy"], jit_compile=False)
    return model


def arrays(targets: DistillTargets) -> DistillTargets:
    """Tensors as NumPy arrays, as they come out of a file."""
    teacher = keras.tree.map_structure(ops.convert_to_numpy, targets.teacher)
    return DistillTargets(targets.labels, teacher)


def cached(terms: Any, examples: int = 32, seed: int = 0) -> tuple[Any, DistillTargets]:
    """Inputs, and targets that a model with a teacher has made."""
    inputs, labels = table(examples, seed)
    return inputs, arrays(
        distilled(terms, counting_teacher()[0]).teacher_targets(ops.convert_to_tensor(inputs), labels)
    )


SETTINGS = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}


@pytest.mark.parametrize("student", ["functional", "unbuilt"])
@pytest.mark.parametrize("terms", [LOGITS, FEATURES], ids=["logits", "features"])
def test_k26_stored_outputs_in_arrays_train_like_a_live_teacher(terms: Any, student: str) -> None:
    """K26: weights and logs, sample weights and validation included, without any teacher."""
    weights = np.linspace(0.0, 2.0, 32, dtype="float32")
    live = distilled(terms, counting_teacher()[0], student)
    expected = live.fit(*table(32), sample_weight=weights, validation_data=table(8, 1), **SETTINGS).history
    inputs, targets = cached(terms)
    model = distilled(terms, None, student)
    logs = model.fit(inputs, targets, sample_weight=weights, validation_data=cached(terms, 8, 1), **SETTINGS).history
    assert model.teacher is None
    assert {"teacher_agreement", "val_distillation_loss", "val_accuracy"} <= logs.keys()
    assert_same_logs(logs, expected, 1e-5)
    assert_same_weights(model, live, 1e-5)
    evaluated = model.evaluate(inputs, targets, verbose=0, return_dict=True)
    assert evaluated == pytest.approx(live.evaluate(*table(32), verbose=0, return_dict=True), rel=1e-5)


@pytest.mark.tensorflow
@pytest.mark.parametrize("terms", [LOGITS, FEATURES], ids=["logits", "features"])
@pytest.mark.parametrize("weighted", [True, False])
def test_k26_a_cached_data_set_runs_the_teacher_once_per_example(terms: Any, weighted: bool) -> None:
    """K26: `map(...).cache()` over three epochs; weights and logs are those of a live teacher."""
    import tensorflow as tf

    parts = (*table(32), *((np.linspace(0.0, 2.0, 32, dtype="float32"),) if weighted else ()))
    data = tf.data.Dataset.from_tensor_slices(parts).batch(8)
    teacher, seen = counting_teacher()
    live = distilled(terms, teacher)
    expected = live.fit(data, epochs=3, shuffle=False, verbose=0).history
    assert seen.examples == 3 * 32
    teacher, seen = counting_teacher()
    model = distilled(terms, teacher)
    cache = data.map(lambda x, y, *w: (x, model.teacher_targets(x, y), *w)).cache()
    logs = model.fit(cache, epochs=3, shuffle=False, verbose=0).history
    assert seen.examples == 32
    assert_same_logs(logs, expected, 1e-5)
    assert_same_weights(model, live, 1e-5)


@pytest.mark.tensorflow
def test_k26_a_cached_data_set_trains_without_a_teacher() -> None:
    """K26: the data alone, an unbuilt student, features; adapters take their shapes from the targets."""
    import tensorflow as tf

    live = distilled(FEATURES, counting_teacher()[0], "unbuilt")
    data = tf.data.Dataset.from_tensor_slices(table(32)).batch(8)
    expected = live.fit(data, epochs=2, shuffle=False, verbose=0).history
    maker = distilled(FEATURES, counting_teacher()[0])
    cache = data.map(lambda x, y: (x, maker.teacher_targets(x, y))).cache()
    model = distilled(FEATURES, None, "unbuilt")
    assert_same_logs(model.fit(cache, epochs=2, shuffle=False, verbose=0).history, expected, 1e-5)
    assert_same_weights(model, live, 1e-5)


def test_k26_the_teacher_does_not_run_on_cached_targets() -> None:
    """K26: even where the model has one."""
    inputs, targets = cached(FEATURES)
    teacher, seen = counting_teacher()
    model = distilled(FEATURES, teacher)
    model.run_eagerly = True
    seen.examples = 0
    model.fit(inputs, targets, **SETTINGS)
    model.evaluate(inputs, targets, verbose=0)
    assert seen.examples == 0


def test_k26_the_targets_are_the_teachers_outputs_in_inference() -> None:
    """K26: without labels too; the features by the keys of their taps."""
    inputs, seen = keras.Input((6,)), keras.layers.Dense(12, name="hidden")
    hidden = keras.layers.Dropout(0.9, name="drop")(seen(inputs))
    teacher = keras.Model(inputs, keras.layers.Dense(3)(hidden))
    model = DistillModel(mlp(), teacher, FeatureDistillation("hidden", Tap("drop", where="input")))
    x = ops.convert_to_tensor(table(4)[0])
    targets = model.teacher_targets(x)
    assert targets.labels is None
    np.testing.assert_allclose(
        ops.convert_to_numpy(targets.teacher["output"]), ops.convert_to_numpy(teacher(x, training=False)), rtol=1e-5
    )
    assert list(targets.teacher["features"]) == ["drop:input"]
    expected = ops.convert_to_numpy(seen(x))
    np.testing.assert_allclose(ops.convert_to_numpy(targets.teacher["features"]["drop:input"]), expected, rtol=1e-5)


@pytest.mark.parametrize("terms", [LOGITS, FEATURES], ids=["logits", "features"])
@pytest.mark.parametrize("weighted", [True, False])
def test_k26_unlabelled_targets(terms: Any, weighted: bool) -> None:
    """K26 and K28: labels=None; equal to a live teacher whose student does not heed the labels."""
    weights = np.linspace(0.0, 2.0, 32, dtype="float32") if weighted else None
    live = distilled(terms, counting_teacher()[0])
    live.task_weight = 0.0
    expected = live.fit(*table(32), sample_weight=weights, **SETTINGS).history
    inputs, targets = cached(terms)
    model = distilled(terms, None)
    logs = model.fit(inputs, targets._replace(labels=None), sample_weight=weights, **SETTINGS).history
    assert set(expected) - set(logs) == {"task_loss", "accuracy"}
    assert_same_logs(logs, {key: values for key, values in expected.items() if key in logs}, 1e-5)
    assert_same_weights(model.student, live.student, 1e-5)


@pytest.mark.parametrize("structure", ["list", "dict", "output and features"])
def test_k26_several_outputs(structure: str) -> None:
    """K26: lists and dicts of outputs, also a dict whose keys are those that the targets use themselves."""

    def several(width: int, name: str) -> keras.Model:
        inputs = keras.Input((6,))
        hidden = keras.layers.Dense(width, name="hidden")(inputs)
        first, second = keras.layers.Dense(3, name="first")(hidden), keras.layers.Dense(4, name="second")(hidden)
        outputs = {
            "list": [first, second],
            "dict": {"a": first, "b": second},
            "output and features": {"output": first, "features": second},
        }[structure]
        return keras.Model(inputs, outputs, name=name)

    def made(teacher: keras.Model | None) -> DistillModel:
        keras.utils.set_random_seed(5)
        model = DistillModel(several(8, "student"), teacher)
        model.compile(keras.optimizers.SGD(0.1), jit_compile=False)
        return model

    keras.utils.set_random_seed(11)
    teacher = several(12, "teacher")
    inputs, _ = table(32)
    live, model = made(teacher), made(None)
    targets = arrays(live.teacher_targets(ops.convert_to_tensor(inputs)))
    expected = live.fit(inputs, **SETTINGS).history
    assert_same_logs(model.fit(inputs, targets, **SETTINGS).history, expected, 1e-5)
    assert_same_weights(model, live, 1e-5)
    weights = np.repeat(np.float32([2.0, 0.0]), 16)  # the mean over all is that over the first half
    logs = model.evaluate(inputs, targets, 32, sample_weight=weights, verbose=0, return_dict=True)
    half = live.evaluate(inputs[:16], batch_size=16, verbose=0, return_dict=True)
    assert logs["distillation_loss"] == pytest.approx(half["distillation_loss"], rel=1e-5)


def test_k26_outputs_in_a_dict_with_the_key_output_are_not_taken_for_features() -> None:
    """K26: only a dict of an output and features is read as such."""

    def network(width: int) -> keras.Model:
        inputs = keras.Input((6,))
        hidden = keras.layers.Dense(width)(inputs)
        return keras.Model(inputs, {name: keras.layers.Dense(3)(hidden) for name in ("output", "another")})

    student, teacher = network(8), network(12)
    inputs, _ = table(16)
    logs = []
    for live, targets in ((teacher, None), (None, DistillTargets(None, teacher.predict_on_batch(inputs)))):
        model = DistillModel(student, live)
        model.compile("sgd", run_eagerly=True)
        logs.append(model.test_on_batch(inputs, targets, return_dict=True))
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


def test_k26_targets_work_in_loaders_and_generators() -> None:
    """K26: batches that come from Python."""
    live = distilled(FEATURES, counting_teacher()[0])
    expected = live.fit(*table(32), **SETTINGS).history
    inputs, targets = cached(FEATURES)

    def batch(start: int) -> tuple[Any, DistillTargets]:
        rows = slice(start, start + 8)
        return inputs[rows], DistillTargets(*keras.tree.map_structure(lambda part: part[rows], (*targets,)))

    def batches() -> Any:
        while True:
            yield from (batch(start) for start in range(0, 32, 8))

    class Sequence(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            return batch(8 * index)

    for data in (batches(), Sequence()):
        model = distilled(FEATURES, None)
        logs = model.fit(data, epochs=2, steps_per_epoch=4, shuffle=False, verbose=0).history
        assert_same_logs(logs, expected, 1e-5)
        assert_same_weights(model, live, 1e-5)


def test_k26_a_validation_split_of_targets() -> None:
    """K26: Keras splits the targets along with the inputs."""
    live = distilled(FEATURES, counting_teacher()[0])
    expected = live.fit(*table(32), validation_split=0.25, **SETTINGS).history
    inputs, targets = cached(FEATURES)
    model = distilled(FEATURES, None)
    assert_same_logs(model.fit(inputs, targets, validation_split=0.25, **SETTINGS).history, expected, 1e-5)


def test_k26_training_goes_on_without_evaluating_distillation() -> None:
    """K26 and K27: the cached targets of a validation set are not used when they are not asked for."""
    inputs, targets = cached(LOGITS)
    model = distilled(LOGITS, None, evaluate_distillation=False)
    logs = model.fit(inputs, targets, validation_data=(inputs, targets), **SETTINGS).history
    assert not {"val_distillation_loss", "val_logits_loss", "val_teacher_agreement"} & logs.keys()
    assert logs["val_loss"] == pytest.approx([0.7 * value for value in logs["val_task_loss"]], rel=1e-5)


def test_k26_a_missing_teacher_and_missing_targets_are_refused() -> None:
    """K26: the error before the first step names the missing part."""
    with pytest.raises(ValueError, match=r"Expected a teacher to learn from\. .*DistillTargets"):
        distilled(LOGITS, None).fit(*table(8), verbose=0)
    with pytest.raises(ValueError, match=r"Expected one teacher\. Set `model\.teacher`"):
        distilled(LOGITS, None).teacher_targets(ops.ones((2, 6)))


@pytest.mark.parametrize("kind", ["arrays", "PyDataset", pytest.param("tf.data", marks=pytest.mark.tensorflow)])
def test_k26_class_weights_are_refused_in_words(kind: str) -> None:
    """K26: Keras would take the targets for those of two outputs."""
    inputs, targets = cached(LOGITS)

    class Whole(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            return inputs, targets

    data: Any = (inputs, targets)
    if kind == "PyDataset":
        data = (Whole(),)
    elif kind == "tf.data":
        import tensorflow as tf

        data = (tf.data.Dataset.from_tensors((inputs, targets)),)
    words = r"^Expected `class_weight` to be None if .*`sample_weight`\. Received: class_weight=\{0: 2\.0\}$"
    with pytest.raises(ValueError, match=words):
        distilled(LOGITS, None).fit(*data, class_weight={0: 2.0}, verbose=0)


def test_k26_a_missing_feature_is_named() -> None:
    """K26: targets made without the features that a term reads."""
    inputs, targets = cached(LOGITS)
    with pytest.raises(ValueError, match=r"'hidden'.*DistillTargets"):
        distilled(FEATURES, None).fit(inputs, targets, **SETTINGS)
