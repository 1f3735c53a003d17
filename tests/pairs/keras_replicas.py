"""Every feature trained on two logical devices; TensorFlow is configured once, before it starts."""

from __future__ import annotations

import json
import sys

import tensorflow as tf

[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

from pairs.keras_teachers import BATCH, EPOCHS, FEATURES  # noqa: E402


def main(path: str) -> None:
    """Write the students' weights."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    report = {}
    for name, feature in FEATURES.items():
        with strategy.scope():
            model = feature.model(jit_compile=False)
        try:
            model.fit(feature.x, feature.targets(model), BATCH, EPOCHS, verbose=0, shuffle=False)
        except ValueError as error:
            report[name] = str(error)
            continue
        report[name] = [weights.tolist() for weights in model.student.get_weights()]
    with open(path, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(sys.argv[1])
