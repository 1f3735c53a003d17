"""Tiny networks, LightningModules in the styles users write them, and random data in the shape of digits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 5

# Networks ------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Flat inputs (N, 16): ``layer1``, ``layer2``, ``head``."""

    def __init__(self, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer1 = nn.Linear(16, width)
        self.layer2 = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer1(x.flatten(1)))
        x = torch.tanh(self.layer2(x))
        return self.head(self.dropout(x))


class ConvNet(nn.Module):
    """Images (N, 1, 4, 4): ``stem``, ``body``, ``head``, with batch normalisation and dropout."""

    def __init__(self, channels: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.Tanh())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.body(self.stem(x)).mean((-2, -1))))


def make(network: Callable[..., nn.Module], seed: int, *args: Any, **kwargs: Any) -> Any:
    """A network whose weights depend on the seed alone; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network(*args, **kwargs)


def student(seed: int = 1) -> MLP:
    return make(MLP, seed, 6)


def teacher(seed: int = 2) -> MLP:
    return make(MLP, seed, 10)


# Modules -------------------------------------------------------------------------------------------------------------


class InnerModule(LightningModule):
    """The commonest style: ``self.model(x)`` in the step, and a criterion beside it."""

    def __init__(self, model: nn.Module, optimizer: Callable[[Iterable[nn.Parameter]], Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.criterion = nn.CrossEntropyLoss()
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return self.criterion(self.model(x), y)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.model.parameters())


class ForwardModule(InnerModule):
    """The style of Lightning's own pages: ``self(x)``, with a validation step."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), batch_size=len(x))


class StepModule(InnerModule):
    """Runs a training step that a test gives as a function of the module and the step's arguments."""

    def __init__(self, model: nn.Module, step: Callable[..., Any], **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch, batch_idx)


# Data ----------------------------------------------------------------------------------------------------------------


def digits(count: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 4, 4) and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 4, 4, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def loader(count: int = 24, batch_size: int = 8, shuffle: bool = False, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*digits(count, seed)), batch_size, shuffle=shuffle)


def batches(count: int = 24, batch_size: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """What ``loader`` gives without shuffling."""
    x, y = digits(count, seed)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def as_loader(batches: Sequence[Any]) -> DataLoader[Any]:
    """A loader of batches that are made already; Lightning takes a list for a list of loaders."""
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


# Looking -------------------------------------------------------------------------------------------------------------


class Outputs(Callback):
    """Keeps what ``on_train_batch_end`` is given for each step."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state_dict."""
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state_dicts have the same keys and bit for bit the same tensors."""
    return list(first) == list(second) and all(torch.equal(first[key].cpu(), second[key].cpu()) for key in first)


def hooks(*modules: nn.Module) -> int:
    """How many hooks of any kind there are on the modules and everything inside them."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return sum(len(getattr(inner, kind)) for module in modules for inner in module.modules() for kind in kinds)


def close(first: Sequence[Tensor], second: Sequence[Tensor], tolerance: float) -> None:
    """Assert that tensors agree pairwise, whatever their devices are."""
    assert len(first) == len(second)
    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(left.cpu(), right.cpu(), rtol=tolerance, atol=tolerance)
