"""Language models on one device and on two with unequal numbers of tokens, in a process of its own.

Run as a script, it writes weights and losses of both into a file of arrays.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras_token_nets import causal, padded, split

from keras_distill import DistillModel, SequenceDistillation

# The first device gets two long sequences, the second one two short ones.
SEQUENCES = [[5, 3, 8, 2, 7], [6, 1, 1, 12, 3], [4, 9], [2, 7, 1], [1, 2, 3, 4, 5], [6, 7], [8], [9]]


def trained(strategy: tf.distribute.Strategy | None, normalize: Any) -> tuple[Any, Any, Any]:
    """The weights before and after an epoch of two batches, and its loss."""
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = DistillModel(causal(), causal(7, 1), SequenceDistillation(normalize=normalize), task_weight=0.0)
        model.compile(keras.optimizers.SGD(0.5), jit_compile=False)
    start = flat(model)
    data = tf.data.Dataset.from_tensor_slices(split(padded(SEQUENCES))).batch(4)
    history = model.fit(data, verbose=0, shuffle=False).history
    return start, flat(model), history["tokens_loss"]


def flat(model: DistillModel) -> Any:
    return np.concatenate([weight.ravel() for weight in model.student.get_weights()])


def main(path: str) -> None:
    """Train in every way and write the results."""
    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2
    report = {}
    for normalize in ("tokens", "sequences"):
        for name, devices in {"single": None, "double": strategy}.items():
            start, end, losses = trained(devices, normalize)
            report |= {f"{normalize}_start": start, f"{normalize}_{name}": end, f"{normalize}_{name}_loss": losses}
    np.savez(path, **report)


if __name__ == "__main__":
    main(sys.argv[1])
