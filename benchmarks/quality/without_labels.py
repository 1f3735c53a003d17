"""A network learns the features of another without any labels; a linear probe says how good its own features are."""

from __future__ import annotations

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

Labelled = tuple[Tensor, Tensor]
MEASURED = 500  # images by which the teachers' features are standardized
TEACHERS = {"EfficientNet": efficientnet.published, "random weights": efficientnet.untrained}
small = partial(Convolutional, [16], [32, 64], IMAGES)


def probe(network: nn.Module, train: Labelled, test: Labelled) -> float:
    """The test accuracy of a logistic regression on a network's features, fitted to the examples with labels.

    Args:
        network: Gives features ``(N, D)``.
        train: Images and their classes; ``UNLABELLED`` where the class is not known.
        test: Images and their classes.
    """
    known = train[1] != UNLABELLED
    network.eval()
    with torch.no_grad():
        features, test_features = (
            torch.cat([network(part) for part in images.split(500)]) for images in (train[0][known], test[0])
        )
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    regression.fit(features.numpy(), train[1][known].numpy())
    return float(regression.score(test_features.numpy(), test[1].numpy()))


class Probed(Classifier):
    """Also logs the accuracy of a linear probe on its features, before and after the training."""

    before = after = 0.0

    def _probed(self) -> float:
        net, dataset = self.net, self.trainer.train_dataloader.dataset  # type: ignore[union-attr]
        train = getattr(dataset, "dataset", dataset).tensors  # of a cache's data set those that it wraps
        accuracy = probe(nn.Sequential(net.early, net.deep, net.pooled), train, data.mnist().test)  # type: ignore[attr-defined]
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
