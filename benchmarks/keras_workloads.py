"""Keras students, teachers and the arms that train them: alone, by ``keras.distillation`` and by ``DistillModel``."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from keras import layers

from benchmarks.timing import Plan, Runs, Timing
from keras_distill import DistillModel, FeatureDistillation, LogitsDistillation, SoftTargetLoss

CLASSES = 100
TEMPERATURE = 4.0
TASK = 0.5  # keras.distillation takes the labels' part w from 0 to 1 and gives the rest 1 - w
KerasArm = Callable[[], None]  # does a block of steps


# Networks ------------------------------------------------------------------------------------------------------------


def network(first: int, second: int, blocks: int, name: str) -> keras.Model:
    """A residual network for images (N, 32, 32, 3): ``stage1`` with ``first`` channels, ``stage2``, ``head``."""
    inputs = keras.Input((32, 32, 3))
    x = inputs
    for stage, width in (("stage1", first), ("stage2", second)):
        for index in range(blocks):
            last = index == blocks - 1
            x = block(x, width, 2 if index == 0 else 1, stage if last else f"{stage}_{index}")
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x), name=name)


def block(x: Any, width: int, stride: int, name: str) -> Any:
    """Two convolutions with a skip connection; the block's output has the name."""
    past = layers.Conv2D(width, 1, stride, use_bias=False)(x)
    x = layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
    return layers.ReLU(name=name)(layers.add([layers.BatchNormalization()(x), past]))


@dataclass
class KerasWorkload:
    """A teacher, students like it, and batches for them.

    Student and teacher have the same number of channels in ``stage2``, since keras.distillation has no adapters; in
    ``stage1`` the student has fewer.
    """

    teacher: keras.Model
    batches: list[tuple[Any, Any]]

    def student(self) -> keras.Model:
        keras.utils.set_random_seed(2)
        return network(24, 64, 1, "student")

    def data(self, steps: int) -> tf.data.Dataset:
        """So many batches, in memory."""
        images, labels = (tf.concat(parts, 0) for parts in zip(*self.batches, strict=True))
        batched = tf.data.Dataset.from_tensor_slices((images, labels)).batch(32, drop_remainder=True)
        return in_memory(batched.repeat().take(steps))


def in_memory(data: tf.data.Dataset) -> tf.data.Dataset:
    """The data kept after the first pass, and handed on by one thread."""
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.autotune.enabled = False
    return data.cache().with_options(options)


def keras_workload() -> KerasWorkload:
    keras.utils.set_random_seed(0)
    batches = [(keras.random.normal((32, 32, 32, 3)), keras.random.randint((32,), 0, CLASSES)) for _ in range(4)]
    return KerasWorkload(network(40, 64, 2, "teacher"), batches)


# Arms ----------------------------------------------------------------------------------------------------------------


def compiled(model: keras.Model, **settings: Any) -> keras.Model:
    """The model with the loss and the optimizer of every arm."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, **settings)
    return model


def distil_model(
    work: KerasWorkload, features: Iterable[str] = (), student: keras.Model | None = None, **settings: Any
) -> DistillModel:
    """A DistillModel with the weights that keras.distillation gives its losses."""
    terms = [
        LogitsDistillation(SoftTargetLoss(TEMPERATURE), weight=1 - TASK),
        *(FeatureDistillation(layer, layer, "mse", weight=1 - TASK) for layer in features),
    ]
    return DistillModel(student or work.student(), work.teacher, terms, task_weight=TASK, **settings)


def keras_distiller(
    work: KerasWorkload, features: Iterable[str] = (), student: keras.Model | None = None
) -> keras.Model:
    """keras.distillation with the same losses: the divergence has to be an object for its softmax to be taken."""
    losses: list[Any] = [
        keras.distillation.LogitsDistillation(TEMPERATURE, keras.losses.KLDivergence()),
        *(keras.distillation.FeatureDistillation("mse", layer, layer) for layer in features),
    ]
    teacher = keras.models.clone_model(work.teacher)  # it is frozen for good
    teacher.set_weights(work.teacher.get_weights())
    return keras.distillation.Distiller(teacher, student or work.student(), losses, student_loss_weight=TASK)


def fitting(model: keras.Model, data: tf.data.Dataset, **settings: Any) -> KerasArm:
    """An arm: ``fit`` over the data, once."""
    compiled(model, **settings)
    return lambda: model.fit(data, verbose=0, shuffle=False)  # type: ignore[func-returns-value]


def evaluating(model: keras.Model, data: tf.data.Dataset) -> KerasArm:
    """An arm: ``evaluate`` over the data, once."""
    compiled(model)
    return lambda: model.evaluate(data, verbose=0)  # type: ignore[func-returns-value]


def inference(work: KerasWorkload, data: tf.data.Dataset) -> KerasArm:
    """An arm: the teacher's forward pass as a function of TensorFlow in a bare loop."""
    forward = tf.function(lambda x: work.teacher(x, training=False))

    def arm() -> None:
        for images, _ in data:
            forward(images)

    return arm


def adapter_arithmetic(work: KerasWorkload, feature: str, steps: int) -> KerasArm:
    """An arm: an adapter's forward pass, backward pass and optimizer step, its loss left out."""
    student_shape, teacher_shape = (
        model.get_layer(feature).output.shape[1:] for model in (work.student(), work.teacher)
    )
    adapter = layers.Conv2D(teacher_shape[-1], 1)
    adapter.build((32, *student_shape))
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(adapter.trainable_variables)
    x, upstream = tf.random.normal((32, *student_shape)), tf.random.normal((32, *teacher_shape))

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = adapter(x)
        down, *gradients = tape.gradient(y, [x, *adapter.trainable_variables], output_gradients=upstream)
        optimizer.apply_gradients(zip(gradients, adapter.trainable_variables, strict=True))
        return down  # the gradient for the student: returned so that it is not optimized away

    def arm() -> None:
        for _ in range(steps):
            step()

    return arm


def interleave_blocks(make: Callable[[], Mapping[str, KerasArm]], plan: Plan, label: str) -> Runs:
    """The timings of every arm, block by block in turn: A B A B ...

    Processor time is the whole process's: TensorFlow computes in threads of its own.

    Args:
        make: Makes the arms afresh for each start; each does ``plan.block`` steps.
        plan: How long; ``warmup`` counts blocks.
        label: Printed while the measurement runs.
    """
    runs: Runs = {}
    for start in range(plan.starts):
        print(f"{label}: start {start + 1} of {plan.starts}", file=sys.stderr, flush=True)
        arms = make()
        for turn in range(plan.warmup + plan.rounds):
            gc.collect()
            for name, arm in arms.items():
                wall, cpu = time.perf_counter(), time.process_time()
                arm()
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                if turn >= plan.warmup:
                    runs.setdefault(name, []).append(Timing(cpu / plan.block, wall / plan.block))
    return runs
