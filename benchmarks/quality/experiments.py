"""The experiments: each is one call of ``compare`` on real data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_distill
from benchmarks.quality import data, pitch, sentences, text
from benchmarks.quality.classifier import TRAINER, UNLABELLED, Classifier, loaders, trained_once
from benchmarks.quality.methods import table
from benchmarks.quality.networks import IMAGES, LARGE, SIGNALS, SMALL, Convolutional, perceptron
from lightning_distill import (
    FeatureDistillation,
    LogitsDistillation,
    SoftTargetLoss,
)


@dataclass(frozen=True)
class Experiment:
    """A question, and the arguments of ``compare`` that answer it.

    Args:
        title: Of its section in the docs.
        text: The networks and data, and the published numbers.
        arguments: Makes the arguments of ``compare``, given the number of epochs.
        epochs: Of each student.
        seeds: Number of seeds.
        metric: The metric that decides.
        mode: ``"max"`` if a greater metric is better; such metrics are shares, shown in percent. ``"min"`` otherwise.
        package: The half whose ``compare`` makes the runs.
        references: Measures the metric of other networks, which the page names beside the methods, given the folder of
            the experiment.
    """

    title: str
    text: str
    arguments: Callable[[int, Path], Mapping[str, Any]]
    epochs: int
    seeds: int = 5
    metric: str = "accuracy"
    mode: str = "max"
    package: str = "lightning_distill"
    references: Callable[[Path], Mapping[str, float]] | None = None


def trained(
    make: Callable[[], nn.Module], examples: data.Examples, epochs: int, lr: float, path: Path, batch_size: int = 100
) -> nn.Module:
    """A classifier that teaches."""
    batches = loaders(examples.train, examples.test, batch_size)
    return trained_once(partial(Classifier, make, lr), batches, epochs, path)


# Signals are images with one row, so that both tasks of the table have maps.
def signals() -> data.Examples:
    """MNIST-1D as images (N, 1, 1, 40)."""
    examples = data.mnist1d()
    return data.Examples(*((inputs[:, None, None], classes) for inputs, classes in (examples.train, examples.test)))


def few_labels(examples: data.Examples, a_class: int, seed: int) -> tuple[Any, Any]:
    """The loaders where only some labels of each class are known."""
    inputs, classes = examples.train
    labels, places = torch.full_like(classes, UNLABELLED), data.few_labels(examples, a_class, seed)
    labels[places] = classes[places]
    return loaders((inputs, labels), examples.test)


def loss_table(
    examples: Callable[[], data.Examples],
    kernel: tuple[int, int],
    teacher_epochs: int,
    lr: float,
    epochs: int,
    folder: Path,
    labels: int | None = None,
) -> dict[str, Any]:
    """All losses with one recipe: the task's loss plus one term, whose weight is balanced.

    Args:
        labels: How many labels of each class the student knows; None for all.
    """
    teacher = trained(LARGE[kernel], examples(), teacher_epochs, lr, folder / "teacher.pt")
    losses = table(lightning_distill, "balanced", ("deep.0.1", "deep.1.1"))
    few = partial(few_labels, examples(), labels)
    return {
        "module": partial(Classifier, SMALL[kernel], 1e-2),
        "data": (lambda: loaders(examples().train, examples().test)) if labels is None else few,
        "teacher": teacher,
        "student": "net",
        "methods": {name: {"terms": make()} for name, make in losses.items()},
        "trainer": {**TRAINER, "max_epochs": epochs, "check_val_every_n_epoch": 5},
    }


def keras_loss_table(*arguments: Any, **settings: Any) -> dict[str, Any]:
    """The same in Keras, which is imported only for it."""
    from benchmarks.quality import keras_experiments

    return keras_experiments.loss_table(*arguments, **settings)


def cnn_to_mlp(epochs: int, folder: Path) -> dict[str, Any]:
    """A perceptron learns signals from a convolutional network."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = LARGE[SIGNALS]()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x[:, None, None])
            return logits

    teacher = trained(Net, data.mnist1d(), 30, 1e-2, folder / "teacher.pt")
    return {
        "module": partial(Classifier, partial(perceptron, 40, 100), 1e-2),
        "data": lambda: loaders(data.mnist1d().train, data.mnist1d().test),
        "teacher": teacher,
        "student": "net",
        "methods": {
            "soft targets, T 4": [LogitsDistillation()],
            "soft targets alone, T 4": {"terms": [LogitsDistillation()], "task_weight": 0.0},
        },
        "trainer": {**TRAINER, "max_epochs": epochs},
    }


def hinton(epochs: int, folder: Path) -> dict[str, Any]:
    """The networks of the paper's first experiment."""
    examples = data.mnist()
    teacher = trained(partial(perceptron, 784, 1200, 0.5), examples, 40, 1e-3, folder / "teacher.pt")
    return {
        "module": partial(Classifier, partial(perceptron, 784, 800), 1e-3),
        "data": lambda: loaders(examples.train, examples.test),
        "teacher": teacher,
        "student": "net",
        "methods": {"soft targets, T 20": [LogitsDistillation(SoftTargetLoss(20.0))]},
        "trainer": {**TRAINER, "max_epochs": epochs, "check_val_every_n_epoch": epochs},
    }


class WithoutThrees(Classifier):
    """Also logs the accuracy on the threes, as it is and with the bias of their class raised by 3.5."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, labels = batch
        logits, threes = self.net(inputs), labels == 3
        raised = logits + 3.5 * F.one_hot(torch.tensor(3), 10)
        for name, scores in (("accuracy_of_threes", logits), ("accuracy_of_threes_with_bias", raised)):
            self.log(name, (scores.argmax(1) == labels)[threes].float().mean(), batch_size=int(threes.sum()))
        for name, scores in (("accuracy", logits), ("accuracy_with_bias", raised)):
            self.log(name, (scores.argmax(1) == labels).float().mean(), batch_size=len(labels))


def omitted_digit(epochs: int, folder: Path) -> dict[str, Any]:
    """The student never sees a three."""
    examples = data.mnist()
    teacher = trained(partial(perceptron, 784, 1200, 0.5), examples, 40, 1e-3, folder / "teacher.pt")
    kept = examples.train[1] != 3
    train = (examples.train[0][kept], examples.train[1][kept])
    return {
        "module": partial(WithoutThrees, partial(perceptron, 784, 800), 1e-3),
        "data": lambda: loaders(train, examples.test),
        "teacher": teacher,
        "student": "net",
        "methods": {
            "soft targets, T 4": [LogitsDistillation()],
            "soft targets alone, T 4": {"terms": [LogitsDistillation()], "task_weight": 0.0},
            "soft targets alone, T 10": {"terms": [LogitsDistillation(SoftTargetLoss(10.0))], "task_weight": 0.0},
        },
        "trainer": {**TRAINER, "max_epochs": epochs},
    }


def scarce_labels(a_class: int, epochs: int, folder: Path) -> dict[str, Any]:
    """Few labels for the student; the teacher has seen them all."""
    examples = data.mnist()
    teacher = trained(LARGE[IMAGES], examples, 10, 3e-3, folder / "teacher.pt")

    return {
        "module": partial(Classifier, SMALL[IMAGES], 1e-2),
        "data": partial(few_labels, examples, a_class),
        "teacher": teacher,
        "student": "net",
        "methods": {
            "soft targets": [LogitsDistillation()],
            "soft targets and features": [
                LogitsDistillation(),
                FeatureDistillation("deep", "deep", weight="balanced"),
            ],
        },
        "trainer": {**TRAINER, "max_epochs": epochs},
    }


def time_series(name: str, epochs: int, folder: Path) -> dict[str, Any]:
    """A data set of the UCR archive with its own split."""
    examples = data.series(name)
    number = int(examples.train[1].max()) + 1

    def net(early: list[int], deep: list[int], dropout: float = 0.0) -> nn.Module:
        made = Convolutional(early, deep, (1, 9), dropout)
        made.classifier = nn.Linear(deep[-1], number)
        return nn.Sequential(nn.Unflatten(1, (1, 1)), made)  # (N, 1, L) as images of one row

    teacher = trained(partial(net, [64, 64], [128, 128], 0.3), examples, 100, 3e-3, folder / "teacher.pt", 16)
    return {
        "module": partial(Classifier, partial(net, [4], [8]), 1e-2),
        "data": lambda: loaders(examples.train, examples.test, 16),
        "teacher": teacher,
        "student": "net",
        "methods": {
            "soft targets": [LogitsDistillation()],
            "features": [FeatureDistillation("1.deep", "1.deep", weight="balanced")],
        },
        "trainer": {**TRAINER, "max_epochs": epochs},
    }


def without_labels(*arguments: Any) -> dict[str, Any]:
    """Features without labels, from a module that imports this."""
    from benchmarks.quality import without_labels

    return without_labels.features(*arguments)


def of_teachers(a_class: int, folder: Path) -> dict[str, float]:
    """The teachers' own features, from the same module."""
    from benchmarks.quality import without_labels

    return without_labels.of_teachers(a_class)


EXPERIMENTS = {
    "losses_images": Experiment(
        "All losses: images",
        "scikit-learn's digits, 1,000 images of 8 x 8 for training and 797 for the test. Convolutional"
        ' networks; the task\'s loss plus one term with `weight="balanced"`.',
        partial(loss_table, data.digits, IMAGES, 12, 3e-3),
        15,
        seeds=10,
    ),
    "losses_few_labels": Experiment(
        "All losses: few labels",
        "The same images, of which the student knows 10 labels a class, for 20 epochs.",
        partial(loss_table, data.digits, IMAGES, 12, 3e-3, labels=10),
        20,
        seeds=10,
    ),
    "losses_signals": Experiment(
        "All losses: signals",
        "MNIST-1D, 4,000 signals of 40 numbers for training and 1,000 for the test, with the same networks in one"
        " dimension and the same recipe.",
        partial(loss_table, signals, SIGNALS, 20, 1e-2),
        10,
    ),
    "losses_images_keras": Experiment(
        "All losses: images, Keras",
        "The same images, networks and recipe with `keras_distill` on TensorFlow.",
        partial(keras_loss_table, data.digits, IMAGES, 12, 3e-3),
        15,
        metric="val_accuracy",
        package="keras_distill",
    ),
    "losses_few_labels_keras": Experiment(
        "All losses: few labels, Keras",
        "The same images and 10 labels a class, with `keras_distill` on TensorFlow.",
        partial(keras_loss_table, data.digits, IMAGES, 12, 3e-3, labels=10),
        20,
        metric="val_accuracy",
        package="keras_distill",
    ),
    "cnn_to_mlp": Experiment(
        "A convolutional network teaches a perceptron",
        "MNIST-1D. Published: 94 % for a convolutional network and 68 % for a perceptron (arXiv:2011.14439).",
        cnn_to_mlp,
        40,
    ),
    "hinton": Experiment(
        "Hinton's table",
        "MNIST, 4,000 of its 60,000 images for training, with the networks of Hinton et al. 2015, section 3: two hidden"
        " layers of 1,200 units with dropout teach two of 800 without. Published, of 10,000 test images: 67 errors of"
        " the teacher, 146 of the student alone, 74 of the student with soft targets at T = 20, whose teacher saw"
        " shifted images too, as here no network does.",
        hinton,
        40,
        seeds=3,
    ),
    "omitted_digit": Experiment(
        "The omitted digit",
        "MNIST, 4,000 of its 60,000 images for training. The student never sees a three, as in Hinton et al. 2015,"
        " section 3, where it knew 98.6 % of the test's threes once the bias of their class was raised by 3.5: compare"
        " the column with the bias.",
        omitted_digit,
        40,
        seeds=3,
        metric="accuracy_of_threes",
    ),
    "ten_labels": Experiment(
        "Ten labels a class",
        "MNIST: all 4,000 images, of which the student sees 100 labels and the teacher has seen all.",
        partial(scarce_labels, 10),
        10,
    ),
    **{
        f"series_{name.lower()}": Experiment(
            f"Time series: {name}",
            f"{name} of the UCR archive, with its own split.",
            partial(time_series, name),
            60,
        )
        for name in ("GunPoint", "ArrowHead", "ItalyPowerDemand")
    },
    "text": Experiment(
        "Text: which divergence",
        "The sources of Python's standard library with a vocabulary of 512 tokens: rows of 96 tokens to train on, and"
        " files that no training saw for the test. A quarter of the cross entropy plus three quarters of a divergence;"
        " the teacher's outputs are cached.",
        text.divergences,
        3,
        metric="bits_per_byte",
        mode="min",
    ),
    "without_labels": Experiment(
        "Features without labels",
        "MNIST: 4,000 images without labels. A small convolutional network learns the features of EfficientNet-Lite0,"
        " which has seen photographs only, or as a control those of the same network with random weights. A linear"
        " probe on the student's features then sees 10 labels a class; the student alone learns from these labels. The"
        " column *accuracy* is that of the network's own classifier, which learns from labels only.",
        partial(without_labels, 10),
        10,
        seeds=3,
        metric="accuracy_of_probe",
        references=partial(of_teachers, 10),
    ),
    "crepe": Experiment(
        "CREPE, full to tiny",
        "The published full network, which hears pitch, teaches a tiny one that begins with random weights, on 2,000"
        " drawn tones. The student alone learns their pitches with the paper's targets; with a teacher it learns the"
        " teacher's scores alone. Accuracy: pitches heard to within 50 cents, on 1,000 other tones.",
        pitch.crepe,
        15,
        seeds=3,
        references=pitch.published_accuracies,
    ),
    "sentences": Experiment(
        "Layers of a sentence encoder",
        "Docstrings and the code below them, of Python's standard library, NumPy, SciPy, scikit-learn, Matplotlib,"
        " NetworkX and SymPy, by the versions of constraints.txt: 26,305 pairs for training, 1,098 pairs of other files"
        " for the test. A transformer of four layers finds the code of a docstring; the student has one and begins as"
        " the teacher's first, also alone. It learns the pairs, and the teacher's ranking of the codes in the batch,"
        " its embeddings, or both. *Rank* is the mean of 1 / (place of the right code among all 1,098), in percent,"
        " *accuracy* how often it is the first.",
        sentences.layer_reduction,
        4,
        seeds=3,
        metric="rank",
        references=sentences.of_first_layer,
    ),
}
