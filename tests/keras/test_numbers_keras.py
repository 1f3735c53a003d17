"""Which rows count, in which number: masks and reductions, ignored labels, agreement, schedules, cached views."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import cross_entropy, kl64, mlp, numpy_of, table

from keras_distill import (
    BinarySoftTargetLoss,
    Call,
    DecoupledKDLoss,
    DistillModel,
    FeatureDistillation,
    LogitMSELoss,
    LogitsDistillation,
    SoftTargetLoss,
    TeacherCache,
)
from keras_distill.schedules import Linear

X, Y = table(8)
IDS = np.array([[1, 2, 0, 0], [3, 4, 5, 6]], "int32")


def tagger(width: int, name: str = "student", *, mask_zero: bool = True) -> keras.Model:
    inputs = keras.Input((4,), dtype="int32")
    hidden = keras.layers.Embedding(9, width, mask_zero=mask_zero)(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(hidden), name=name)


@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size", "mean", "mean_with_sample_weight"])
def test_a_mask_and_a_reduction_work_as_in_keras(reduction: str) -> None:
    student, teacher = tagger(3), tagger(5, "teacher", mask_zero=False)
    loss = LogitMSELoss(reduction=reduction)
    model = DistillModel(student, teacher, LogitsDistillation(loss))
    model.compile("sgd", run_eagerly=True)
    value = model.evaluate(IDS, verbose=0, return_dict=True)["logits_loss"]
    assert value == pytest.approx(float(ops.convert_to_numpy(loss(teacher(IDS), student(IDS)))), rel=1e-5)


@pytest.mark.parametrize("ignored", [-1, -100])
def test_ignored_labels_do_not_count_and_leave_the_weights_finite(ignored: int) -> None:
    """As in docs/keras.md: images without a label have -1 and `ignore_class=-1`."""
    student, teacher = mlp(), mlp(6, name="teacher")
    model = DistillModel(student, teacher, LogitsDistillation(DecoupledKDLoss()))
    task = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=ignored)
    model.compile(keras.optimizers.SGD(0.0), task, run_eagerly=True)
    labels = np.where(np.arange(8) % 2, Y, ignored)
    logs = model.fit(X, labels, verbose=0).history
    kept = labels >= 0
    expected = float(ops.convert_to_numpy(DecoupledKDLoss()((teacher(X)[kept], Y[kept]), student(X)[kept])))
    assert logs["logits_loss"][0] == pytest.approx(expected, rel=1e-5)
    model.optimizer.learning_rate = 0.1
    model.fit(X, labels, verbose=0)
    assert all(np.isfinite(weights).all() for weights in student.get_weights())


def single(activation: str | None, name: str) -> keras.Model:
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(1, activation)], name=name)


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_agreement_on_a_single_score_compares_the_decisions(activation: str | None) -> None:
    student, teacher = single(activation, "student"), single(activation, "teacher")
    model = DistillModel(student, teacher, LogitsDistillation(BinarySoftTargetLoss(from_logits=activation is None)))
    model.compile("sgd", run_eagerly=True)
    logs = model.evaluate(X, verbose=0, return_dict=True)
    threshold = 0.5 if activation else 0.0
    student_class, teacher_class = (numpy_of(network(X)) > threshold for network in (student, teacher))
    assert logs["teacher_agreement"] == pytest.approx((student_class == teacher_class).mean())
    assert 0 < logs["teacher_agreement"] < 1


def test_agreement_is_missing_if_no_class_is_chosen() -> None:
    regression = DistillModel(single(None, "student"), single(None, "teacher"), LogitsDistillation("mse"))
    labels = DistillModel(mlp(), mlp(6, name="teacher"), LogitsDistillation(BinarySoftTargetLoss()))
    features = DistillModel(mlp(), mlp(6, name="teacher"), FeatureDistillation("hidden", "hidden"))
    for model in (regression, labels, features):
        model.compile("sgd", run_eagerly=True)
        assert "teacher_agreement" not in model.evaluate(X, verbose=0, return_dict=True)


def test_schedules_over_steps_count_steps_of_an_optimizer_that_scales_its_loss_and_accumulates() -> None:
    """Two batches a step, five batches an epoch: a step lies across two epochs."""
    model = DistillModel(
        mlp(), mlp(6, name="teacher"), LogitsDistillation(weight=Linear(1.0, 0.0, duration=5, over="steps"))
    )
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1.0), cross_entropy(), run_eagerly=True)
    seen: list[float] = []
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(model.terms[0].weight))
    model.fit(np.tile(X, (5, 1)), np.tile(Y, 5), batch_size=8, epochs=2, callbacks=[watch], verbose=0)
    assert seen == pytest.approx([1.0, 1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2])


def test_settings_of_keras_itself_are_in_the_config() -> None:
    model = DistillModel(mlp(), mlp(6, name="teacher"), dtype="mixed_bfloat16", trainable=False)
    back = DistillModel.from_config(model.get_config())
    assert back.dtype_policy.name == "mixed_bfloat16"
    assert back.trainable is False
    again = DistillModel.from_config(DistillModel(mlp(), None, teacher_dtype="bfloat16").get_config())
    assert again.step.teacher_dtype == "bfloat16"


def test_values_of_a_custom_term_equal_those_of_a_plain_call() -> None:
    student, teacher = mlp(), mlp(6, name="teacher")
    term = LogitsDistillation(SoftTargetLoss(temperature=2.0))
    value = float(term.compute(Call(student(X)), Call(teacher(X), who="teacher")))
    assert value == pytest.approx(kl64(numpy_of(student(X)), numpy_of(teacher(X)), 2.0).mean(), rel=1e-5)


# Caches ---------------------------------------------------------------------------------------------------------------


def flipped(item: Any, seed: Any) -> Any:
    return item * np.random.default_rng(seed).uniform(0.5, 2.0)


def test_cached_views_change_in_training_and_never_in_evaluation(tmp_path: Any) -> None:
    teacher = mlp(6, name="teacher")
    settings = {"views": 3, "transform": flipped, "transform_seed": 1}
    cache = TeacherCache.build(teacher, X, tmp_path, dtype="float32", **settings)
    data = cache.attach((X, Y), batch_size=8, transform=flipped)
    model = DistillModel(mlp())
    model.compile(keras.optimizers.SGD(0.0), cross_entropy(), run_eagerly=True)
    losses = [model.evaluate(data, verbose=0, return_dict=True)["logits_loss"] for _ in range(2)]
    logs = model.fit(data, validation_data=cache.attach((X, Y), transform=flipped), epochs=3, verbose=0).history
    losses.append(model.evaluate(data, verbose=0, return_dict=True)["logits_loss"])
    assert len(set(losses)) == len(set(logs["val_logits_loss"])) == 1
    assert len(set(logs["logits_loss"])) == 3


class Fails(keras.callbacks.Callback):
    """Ends the training in its second epoch."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            raise RuntimeError("in the second epoch")


def test_a_failed_training_leaves_cached_data_at_epoch_0(tmp_path: Any) -> None:
    data = TeacherCache.build(mlp(6, name="teacher"), X, tmp_path).attach((X, Y))
    model = DistillModel(mlp())
    model.compile("sgd", cross_entropy(), run_eagerly=True)
    with pytest.raises(RuntimeError, match="in the second epoch"):
        model.fit(data, epochs=3, callbacks=[Fails()], verbose=0)
    assert data.epoch == 0


@pytest.mark.tensorflow
def test_a_cache_is_attached_to_inputs_alone_and_read_in_blocks_for_a_data_set(tmp_path: Any) -> None:
    import tensorflow as tf

    teacher = mlp(6, name="teacher")
    cache = TeacherCache.build(teacher, X, tmp_path, dtype="float32")
    model = DistillModel(mlp())
    model.compile(keras.optimizers.SGD(0.0), jit_compile=False)
    expected = kl64(numpy_of(model.student(X)), numpy_of(teacher(X))).mean()
    logs = model.fit(cache.attach(X, batch_size=8), verbose=0).history
    assert logs["logits_loss"][0] == pytest.approx(expected, rel=1e-4)
    reads: list[int] = []
    answers = cache.answers
    cache.answers = lambda rows, *places: reads.append(len(rows)) or answers(rows, *places)
    data = cache.attach(tf.data.Dataset.from_tensor_slices((X, Y))).batch(8)
    assert model.evaluate(data, verbose=0, return_dict=True)["logits_loss"] == pytest.approx(expected, rel=1e-4)
    assert reads == [1, 8]


def test_maps_and_attention_maps_stored_by_pytorch_are_distinguished(tmp_path: Any) -> None:
    cache = TeacherCache.build(mlp(6, name="teacher"), X, tmp_path)
    cache.manifest.data["kind"] = "pytorch"
    generator = np.random.default_rng(0)
    maps = generator.normal(size=(2, 3, 5, 5)).astype("float32")
    attention = numpy_of(ops.softmax(generator.normal(size=(2, 3, 5, 5))))
    assert cache._channels_last("feature0", maps).shape == (2, 5, 5, 3)
    np.testing.assert_array_equal(cache._channels_last("feature1", attention), attention)
    assert cache._channels_last("output", maps).shape == (2, 5, 5, 3)
    assert cache._channels_last("feature2", maps[:, 0]).shape == (2, 5, 5)
