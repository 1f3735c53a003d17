"""The cost of reading a cache: a cold first step, and TensorFlow's data sets: ``python -m benchmarks.cache_reading``.

The first step of an epoch with a cache that was just opened verifies checksums; that of the next epoch does not. In
Keras the same model is fitted with the teacher's outputs in memory, and with outputs that ``attach`` reads.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.timing import Plan, Row, Runs, Timing, absolute, compare, prepare, report

if __name__ == "__main__":
    os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
    prepare("benchmarks.cache_reading")

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.cache import Module, images, tokens
from benchmarks.step_overhead import quiet_lightning
from benchmarks.workloads import trainer_for
from lightning_distill import DistillCallback, TeacherCache

QUICK, FULL = Plan(1, 3, 1, 0), Plan(1, 7, 1, 0)
BATCH = 32  # items in a step of Keras; `attach` of arrays makes the same


class FirstSteps(Callback):
    """The time from the start of each epoch to the end of its first step."""

    def __init__(self) -> None:
        self.timings: list[Timing] = []

    def on_train_epoch_start(self, *args: Any) -> None:
        self.begin = time.process_time(), time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            cpu, wall = self.begin
            self.timings.append(Timing(time.process_time() - cpu, time.perf_counter() - wall))


def cold_questions(name: str, case: Any, plan: Plan) -> list[Row]:
    """The first step of a cold epoch against that of a warm one."""
    student, runs = case.network(1), Runs(cold=[], warm=[])
    with tempfile.TemporaryDirectory() as folder:
        settings = {"top_k": case.top_k, "dtype": case.dtype, "progress": False}
        TeacherCache.build(case.network(4).eval(), case.data, folder, **settings)
        for _ in range(plan.rounds):
            cache, first = TeacherCache.open(folder), FirstSteps()
            trainer = trainer_for([DistillCallback(cache), first])
            # a step of another kind before, so that the allocator is as warm in the first epoch as in the second
            nn.functional.mse_loss(student(case.data[:8][0]).mean(), torch.zeros(())).backward()
            trainer.fit_loop.max_epochs = 3
            trainer.limit_train_batches = 4
            trainer.fit(Module(student), DataLoader(case.data, case.batch_size, shuffle=True))
            runs["cold"].append(first.timings[0])
            runs["warm"].append(first.timings[-1])
    return [compare(f"{name}: first step, cold epoch / warm epoch", runs, "cold", "warm", gate=1.2)]


def keras_questions(plan: Plan) -> list[Row]:
    """An epoch with ``attach`` against one with the outputs in memory."""
    # not above: TensorFlow must be imported after Triton, which PyTorch imports when it is first needed
    import keras
    import tensorflow as tf

    from keras_distill import DistillModel, DistillTargets, LogitsDistillation, SoftTargetLoss, TeacherCache

    steps = 128
    x, labels = np.random.default_rng(0).random((steps * BATCH, 16, 16, 3), "float32"), np.arange(steps * BATCH) % 100

    def network(width: int) -> Any:
        return keras.Sequential(
            [
                keras.Input((16, 16, 3)),
                keras.layers.Conv2D(width, 3, strides=2, activation="relu"),
                keras.layers.Conv2D(width, 3, activation="relu"),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(100),
            ]
        )

    class InMemory(keras.utils.PyDataset):
        """What ``attach`` makes of arrays, with the outputs in memory."""

        def __len__(self) -> int:
            return steps

        def __getitem__(self, index: int) -> Any:
            rows = order[index * BATCH :][:BATCH]
            return x[rows], DistillTargets(labels[rows], outputs[rows])

    teacher, order = network(96), np.random.default_rng(0).permutation(len(x))
    runs: Runs = {"memory": [], "attached": [], "arrays in memory": [], "arrays": []}
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache.build(teacher, x, folder)
        outputs = teacher.predict(x, verbose=0).astype("float16")
        plain = tf.data.Dataset.from_tensor_slices((x, labels))
        memory = tf.data.Dataset.from_tensor_slices((x, DistillTargets(labels, outputs)))
        data = {
            "memory": memory.shuffle(512).batch(BATCH).prefetch(2),
            "attached": cache.attach(plain).shuffle(512).batch(BATCH).prefetch(2),
            "arrays in memory": InMemory(),
            "arrays": cache.attach((x, labels), shuffle=True),
        }
        model = DistillModel(network(64), None, LogitsDistillation(SoftTargetLoss(temperature=4.0)))
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        for turn in range(plan.rounds + 1):
            for name, batches in data.items():
                cpu, wall = time.process_time(), time.perf_counter()
                model.fit(batches, verbose=0)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                timing = Timing(cpu / steps, wall / steps)
                if turn:  # the first turn traces
                    runs[name].append(timing)
    return [
        absolute(f"Keras: a step of {BATCH} items, outputs in memory", runs, "memory", "for scale"),
        compare(f"Keras: attach(tf.data) - outputs in memory, {BATCH} items", runs, "attached", "memory", unit="ms"),
        compare("Keras: attach(tf.data) / outputs in memory", runs, "attached", "memory", gate=1.05),
        compare("Keras: attach(arrays) / outputs in memory", runs, "arrays", "arrays in memory", gate=1.05),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, default=Path("cache_reading.json"), help="where to write the figures")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    quiet_lightning()
    rows = [
        *cold_questions("images", images(), plan),
        *cold_questions("language model", tokens(), plan),
        *keras_questions(plan),
    ]
    report("Reading a cache", rows, arguments.json, asdict(plan))


if __name__ == "__main__":
    main()
