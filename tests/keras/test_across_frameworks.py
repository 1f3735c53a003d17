"""A teacher of one framework, a student of the other: on the torch backend Keras models are torch modules."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from keras import ops
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import keras_distill
import lightning_distill

ON_TORCH = keras.backend.backend() == "torch"
needs_torch_backend = pytest.mark.skipif(not ON_TORCH, reason="needs KERAS_BACKEND=torch, chosen once in a process")
IMAGES = np.random.default_rng(0).standard_normal((16, 6)).astype("float32")
LABELS = np.arange(16) % 3


def keras_network(width: int) -> keras.Model:
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(width, activation="relu", name="hidden"), keras.layers.Dense(3)]
    )


def torch_network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = torch_network(4)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Torch(nn.Module):
    """A Keras model as torch sees a module: Keras calls its layers past torch's forward hooks."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.model(images)


@needs_torch_backend
@pytest.mark.parametrize("features", [False, True])
def test_a_keras_model_teaches_a_lightning_module(features: bool) -> None:
    teacher = keras_network(8)
    before = [ops.convert_to_numpy(variable).copy() for variable in teacher.variables]
    terms = [lightning_distill.LogitsDistillation()]
    taught_by = teacher
    if features:
        hidden = teacher.get_layer("hidden").output
        taught_by = Torch(keras.Model(teacher.inputs, {"logits": teacher.outputs[0], "hidden": hidden}))
        tap = lightning_distill.Tap("", output="hidden")
        terms.append(lightning_distill.FeatureDistillation("model.1", tap, name="hidden"))
    distill = lightning_distill.DistillCallback(taught_by, terms)
    data = DataLoader(TensorDataset(torch.as_tensor(IMAGES), torch.as_tensor(LABELS)), batch_size=8)
    module = Classifier()
    plain = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = Trainer(
        callbacks=[distill],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, data)
    assert module.state_dict().keys() == plain.keys()
    assert not torch.equal(module.state_dict()["model.0.weight"], plain["model.0.weight"])
    for variable, value in zip(teacher.variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
    # the logged value is the formula's, with the Keras model's own logits
    student_logits = torch_network(4)(torch.as_tensor(IMAGES))
    teacher_logits = torch.as_tensor(np.asarray(teacher.predict(IMAGES, verbose=0)))
    value = lightning_distill.SoftTargetLoss()(student_logits, teacher_logits).item()
    keras_value = keras_distill.SoftTargetLoss()(teacher_logits, student_logits.detach())
    assert value == pytest.approx(float(keras_value), rel=1e-5)


@needs_torch_backend
def test_a_torch_module_teaches_a_keras_model() -> None:
    network = torch_network(8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    teacher = keras.Sequential([keras.Input((6,)), keras.layers.TorchModuleWrapper(network)])
    model = keras_distill.DistillModel(keras_network(4), teacher)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    expected = keras_distill.SoftTargetLoss()(
        network(torch.as_tensor(IMAGES)).detach(), ops.convert_to_tensor(model.student.predict(IMAGES, verbose=0))
    )
    logs = model.evaluate(IMAGES, LABELS, verbose=0, return_dict=True)
    assert logs["logits_loss"] == pytest.approx(float(expected), rel=1e-5)
    first = [ops.convert_to_numpy(variable).copy() for variable in model.student.trainable_variables]
    model.fit(IMAGES, LABELS, verbose=0)
    assert any(
        not np.array_equal(a, ops.convert_to_numpy(b))
        for a, b in zip(first, model.student.trainable_variables, strict=True)
    )
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_outputs_of_a_torch_teacher_train_a_keras_student_on_any_backend() -> None:
    network = torch_network(8).eval()
    with torch.no_grad():
        answers = network(torch.as_tensor(IMAGES)).numpy()
    model = keras_distill.DistillModel(keras_network(4))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    logs = model.fit(IMAGES, keras_distill.DistillTargets(LABELS, answers), batch_size=16, epochs=20, verbose=0).history
    assert logs["logits_loss"][-1] < logs["logits_loss"][0]
