"""A network learns the features of another without any labels; a linear probe says how good its own features are."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.quality import data, efficientnet
from benchmarks.quality.classifier import TRAINER, UNLABELLED, Classifier
from benchmarks.quality.experiments import few_labels
from benchmarks.quality.networks import IMAGES, Convolutional
from lightning_distill import FeatureDistillation, ProbabilisticTransferLoss, TeacherCache
from lightning_distill.cache import content_key

MEASURED = 500  # images by which the teachers' features are standardized
TEACHERS = {"EfficientNet": efficientnet.published, "random weights": efficientnet.untrained}
small = partial(Convolutional, [16], [32, 64], IMAGES)


def features_of(network: nn.Module, images: Tensor) -> Tensor:
    """The features ``(N, D)`` that a network has of images, in eval mode."""
    network.eval()
    with torch.no_grad():
        return torch.cat([network(part) for part in images.split(100)])


def probe(features: Tensor, classes: Tensor, test_features: Tensor, test_classes: Tensor) -> float:
    """The test accuracy of a logistic regression on features, fitted to those of examples with labels.

    Args:
        features: Features ``(N, D)``.
        classes: Their classes ``(N,)``.
        test_features: Features for the test.
        test_classes: Their classes.
    """
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    regression.fit(features.numpy(), classes.numpy())
    return float(regression.score(test_features.numpy(), test_classes.numpy()))


def of_teachers(a_class: int) -> dict[str, float]:
    """The accuracy of probes on the teachers' own features, the mean of five draws of the labels."""
    examples = data.mnist()
    images, classes = examples.train
    accuracies = {}
    for name, make in TEACHERS.items():
        teacher = make(images[:MEASURED])
        test_features, values = features_of(teacher, examples.test[0]), []
        for seed in range(5):
            places = data.few_labels(examples, a_class, seed)
            known_features = features_of(teacher, images[places])
            values.append(probe(known_features, classes[places], test_features, examples.test[1]))
        accuracies[f"a probe on the teacher's own features, {name}:"] = statistics.fmean(values)
    return accuracies


class Probed(Classifier):
    """Also logs the accuracy of a linear probe on its features, before and after the training."""

    before = after = 0.0

    def _probed(self) -> float:
        net, dataset = self.net, self.trainer.train_dataloader.dataset  # type: ignore[union-attr]
        images, classes = getattr(dataset, "dataset", dataset).tensors  # of a cache's data set those that it wraps
        network = nn.Sequential(net.early, net.deep, net.pooled)  # type: ignore[arg-type]
        test_images, test_classes = data.mnist().test
        known = classes != UNLABELLED
        known_features, test_features = features_of(network, images[known]), features_of(network, test_images)
        accuracy = probe(known_features, classes[known], test_features, test_classes)
        net.train()
        return accuracy

    def on_train_start(self) -> None:
        self.before = self._probed()

    def on_train_end(self) -> None:
        self.after = self._probed()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("accuracy_of_probe", self.after, batch_size=len(batch[1]))
        self.log("accuracy_of_probe_before_training", self.before, batch_size=len(batch[1]))


def image_key(example: tuple[Tensor, Tensor]) -> str:
    """The key of an example in a cache: of its image, since the labels that are known differ."""
    return content_key(example[0])


def features(a_class: int, epochs: int, folder: Path) -> dict[str, Any]:
    """The student alone learns some labels; with a teacher it learns the features of all images, and no labels."""
    examples = data.mnist()
    images = examples.train[0]
    methods: dict[str, Any] = {}
    for name, make in TEACHERS.items():
        teacher = TeacherCache.build(
            make(images[:MEASURED]),
            TensorDataset(*examples.train),
            folder / name,
            layers=["standardized"],
            outputs=False,
            batch_size=50,
            key=image_key,
            progress=False,
        )
        for title, loss in (("mse", "mse"), ("ProbabilisticTransferLoss", ProbabilisticTransferLoss())):
            term = FeatureDistillation("pooled", "standardized", loss)
            methods[f"{name}, {title}"] = {"terms": [term], "task_weight": 0.0, "teacher": teacher}
    return {
        "module": partial(Probed, small, 1e-2),
        "data": partial(few_labels, examples, a_class),
        "student": "net",
        "methods": methods,
        "trainer": {**TRAINER, "max_epochs": epochs, "check_val_every_n_epoch": epochs},
    }
