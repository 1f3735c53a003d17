"""The same training on one device and on two, in a process of its own: TensorFlow is configured once, before it starts.

Run as a script, it writes logs and weights of both into a JSON file.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras_nets import cross_entropy, mlp, table

from keras_distill import DistillModel, FeatureDistillation, LogitsDistillation, SoftTargetLoss


def regularized(name: str, activity: str | None) -> keras.Model:
    """A student with regularisers of its weights and perhaps of an activity; they count once on several devices."""
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(
        8, "relu", name="hidden", kernel_regularizer=keras.regularizers.L2(0.05), activity_regularizer=activity
    )(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(hidden), name=name)


def activity_counts_once(strategy: tf.distribute.Strategy) -> bool:
    """Whether Keras itself trains a plain model with a regulariser of the activity alike on one device and on two.

    Keras 3.12 does not.
    """
    weights = []
    for scope in (contextlib.nullcontext(), strategy.scope()):
        keras.utils.set_random_seed(3)
        with scope:
            model = regularized("plain", "l2")
            model.compile(keras.optimizers.SGD(0.05), cross_entropy())
        model.fit(tf.data.Dataset.from_tensor_slices(table(16)).batch(16), verbose=0, shuffle=False)
        weights.append(model.get_weights())
    return all(np.allclose(first, second, atol=1e-5) for first, second in zip(*weights, strict=True))


def gap(student: Any, teacher: Any) -> Any:
    """A loss that takes the mean itself."""
    return keras.ops.mean(keras.ops.square(student - teacher))


def trained(
    strategy: tf.distribute.Strategy | None, *, weighted: bool, task: Any, activity: str | None
) -> dict[str, Any]:
    """Logs and weights after two epochs of two batches, on one device if ``strategy`` is None."""
    keras.utils.set_random_seed(3)
    with strategy.scope() if strategy else contextlib.nullcontext():
        terms = [
            LogitsDistillation(SoftTargetLoss(temperature=2.0), weight=0.5),
            FeatureDistillation("hidden", "hidden", weight=0.3),
            LogitsDistillation(gap, weight=0.1, name="gap"),
        ]
        model = DistillModel(regularized("student", activity), mlp(12, name="teacher"), terms, task_weight=0.7)
        model.compile(keras.optimizers.SGD(0.05), task, metrics=["accuracy"])
    inputs, labels = table(32)
    weights = np.linspace(0.0, 2.0, 32, dtype="float32") if weighted else None
    rows = [part for part in (inputs, labels, weights) if part is not None]
    data = tf.data.Dataset.from_tensor_slices(tuple(rows)).batch(16, drop_remainder=True)
    fitted = model.fit(data, epochs=2, verbose=0, validation_data=data, shuffle=False)
    return {
        "history": fitted.history,
        "evaluated": model.evaluate(data, verbose=0, return_dict=True),
        "weights": [value.tolist() for value in model.get_weights()],
    }


def main(path: str) -> None:
    """Train in every way and write what came out."""
    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    report = {}
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2
    activity = "l2" if activity_counts_once(strategy) else None
    for case, settings in {
        "plain": {"weighted": False, "task": cross_entropy()},
        "weighted": {"weighted": True, "task": cross_entropy()},
        "string": {"weighted": False, "task": "sparse_categorical_crossentropy"},
    }.items():
        report[case] = {
            name: trained(devices, activity=activity, **settings)
            for name, devices in {"one": None, "two": strategy}.items()
        }
    report["activity"] = activity
    with open(path, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(sys.argv[1])
