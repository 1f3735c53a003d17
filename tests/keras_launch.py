"""Helpers of the tests of the launcher for Keras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras_nets import kl64, log_softmax64, mlp, numpy_of, table

from keras_distill import Distillation

YAML = """
model: {name: digits, framework: tensorflow}
distillation:
  train:
    start_epoch: 0
    end_epoch: 3
    optimizer: {SGD: {learning_rate: 0.5, momentum: 0.9}}
    criterion: {KnowledgeDistillationLoss: {temperature: 2, loss_types: [CE, KL], loss_weights: [0.5, 0.5]}}
    fit: {batch_size: 8, verbose: 0}
evaluation: {accuracy: {metric: {topk: 1}}}
tuning: {random_seed: 7}
"""
STUDENT = np.array([[2.0, 0.0, 1.0], [-1.0, 3.0, 0.5]])
TEACHER = np.array([[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]])


def launched(conf: Any = None, *, epochs: int = 1, **attributes: Any) -> Distillation:
    """A launcher with a student, a larger teacher and 16 examples; quiet."""
    plain = {"distillation": {"train": {"end_epoch": epochs, "fit": {"batch_size": 8, "verbose": 0}}}}
    distiller = Distillation(plain if conf is None else conf)
    distiller.student_model, distiller.teacher_model = mlp(), mlp(12, name="teacher")
    distiller.train_dataloader = table()
    for name, value in attributes.items():
        setattr(distiller, name, value)
    return distiller


def yaml_file(folder: Path, text: str = YAML) -> Path:
    """A file with the text."""
    path = folder / "distill.yaml"
    path.write_text(text)
    return path


def probabilities(logits: Any) -> np.ndarray[Any, Any]:
    """exp of log_softmax64."""
    return np.exp(log_softmax64(logits))


def divergence64(kind: str, temperature: float, student: Any = STUDENT, teacher: Any = TEACHER) -> float:
    """T^2 D(z_s / T, z_t / T)."""
    log_student, soft_targets = log_softmax64(student / temperature), probabilities(teacher / temperature)
    return {
        "CE": temperature**2 * -(soft_targets * log_student).sum(-1).mean(),
        "KL": kl64(student, teacher, temperature).mean(),
        "MSE": ((student - teacher) ** 2).mean(),
    }[kind]


class Logs(keras.callbacks.Callback):
    """Keeps the logs of the epochs, and counts batches."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[dict[str, float]] = []
        self.batches = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epochs.append(dict(logs or {}))


def accuracy(model: keras.Model) -> float:
    """The share of right answers."""
    inputs, labels = table()
    return float((numpy_of(model(inputs, training=False)).argmax(-1) == labels).mean())
