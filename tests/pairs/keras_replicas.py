"""Every feature trained on two logical devices; TensorFlow is configured once, before it starts."""

from __future__ import annotations

import sys

import tensorflow as tf

[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

from pairs.keras_report import write_report  # noqa: E402

if __name__ == "__main__":
    write_report(sys.argv[1], tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope)
