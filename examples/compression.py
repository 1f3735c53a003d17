"""Functions that the recipes with pruning and quantisation share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from common import QUIET
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from networks import cnn
from torch import Tensor, nn

from lightning_distill import DistillCallback, LogitsDistillation


class Student(LightningModule):
    """A user's module: it knows of no distillation."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def student() -> nn.Sequential:
    """A network whose linear layers are wide enough for the integer kernels."""
    torch.manual_seed(1)
    return nn.Sequential(*cnn(4)[:-1], nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def distil(
    network: nn.Module, teacher: nn.Module, loader: Any, epochs: int, callbacks: Sequence[Callback] = ()
) -> None:
    """Train a network with the callback and others beside it."""
    distill = DistillCallback(teacher, LogitsDistillation(weight=0.9), task_weight=0.1)
    trainer = Trainer(max_epochs=epochs, callbacks=[distill, *callbacks], **QUIET)
    trainer.fit(Student(network), loader)


def pruning(network: nn.Module, amount: float, epochs: int) -> ModelPruning:
    """Lightning's callback that takes weights away in the first half of the training."""
    layers = [(module, "weight") for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return ModelPruning(
        "l1_unstructured",
        parameters_to_prune=layers,
        amount=lambda epoch: amount if epoch == max(0, epochs // 2 - 1) else 0.0,
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=False,
        make_pruning_permanent=True,
    )


def sparsity(network: nn.Module) -> float:
    """The share of weights that are 0."""
    weights = [module.weight for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return float(sum((weight == 0).sum() for weight in weights) / sum(weight.numel() for weight in weights))


def fake_quantized(network: nn.Module) -> nn.Module:
    """The network with 8-bit arithmetic imitated in its linear layers, for the training."""
    return _quantize(network, "prepare")


def quantized(network: nn.Module) -> nn.Module:
    """The network after the training, with real 8-bit weights in its linear layers."""
    return _quantize(network, "convert")


def _quantize(network: nn.Module, step: str) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.qat import QATConfig

    base = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao announces the names that its next versions will change
        quantize_(network, QATConfig(base, step=step))
    return network
