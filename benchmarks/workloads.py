"""Students, teachers and the arms that train them, by hand and with the callback."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from benchmarks.timing import Arm, Tick, repeat
from lightning_distill import DistillCallback, FeatureDistillation, LogitsDistillation

Batches = list[tuple[Tensor, Tensor]]
TEMPERATURE = 4.0
FEATURES = {"conv": ["stage1", "stage2"], "mlp": ["layer1", "layer2"], "resnet": ["layer3", "layer4"]}


# Networks ------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions with a skip connection."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.past = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.past(x))


class ConvNet(nn.Module):
    """Images (N, 3, 32, 32): ``stage1``, ``stage2``, ``head``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stage1, self.stage2 = Block(3, width, 2), Block(width, 2 * width, 2)
        self.head = nn.Linear(2 * width, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(x)).mean((-2, -1)))


class MLP(nn.Module):
    """Vectors (N, 64): ``layer1``, ``layer2``, ``head``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1, self.layer2, self.head = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.layer2(F.relu(self.layer1(x)))))


@dataclass
class Workload:
    """A student, a teacher and batches for them."""

    name: str
    student: nn.Module
    teacher: nn.Module
    batches: Batches

    @property
    def features(self) -> list[str]:
        return FEATURES[self.name]


def conv_workload() -> Workload:
    torch.manual_seed(0)
    batches = [(torch.randn(32, 3, 32, 32), torch.randint(100, (32,))) for _ in range(4)]
    return Workload("conv", ConvNet(40), ConvNet(64).eval(), batches)


def mlp_workload() -> Workload:
    torch.manual_seed(0)
    batches = [(torch.randn(64, 64), torch.randint(10, (64,))) for _ in range(4)]
    return Workload("mlp", MLP(128), MLP(192).eval(), batches)


# Arms ----------------------------------------------------------------------------------------------------------------


class Plain(LightningModule):
    """The student alone."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.network = copy.deepcopy(work.student)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class HandWritten(Plain):
    """Distillation written by hand, without logging or checks."""

    def __init__(self, work: Workload, with_features: bool) -> None:
        super().__init__(work)
        teacher = copy.deepcopy(work.teacher).requires_grad_(False)
        self.outside = [teacher]  # in a list: no part of the checkpoint
        self.adapters = nn.ModuleList(adapters(work) if with_features else [])
        self.student_features: list[Tensor] = []
        self.teacher_features: list[Tensor] = []
        if with_features:
            for layer in work.features:
                for network, kept in ((self.network, self.student_features), (teacher, self.teacher_features)):
                    network.get_submodule(layer).register_forward_hook(lambda m, i, out, kept=kept: kept.append(out))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.network(x)
        with torch.no_grad():
            teacher_logits = self.outside[0].eval()(x)
        student_log = F.log_softmax(logits / TEMPERATURE, -1)
        teacher_log = F.log_softmax(teacher_logits / TEMPERATURE, -1)
        soft = F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * TEMPERATURE**2
        loss = F.cross_entropy(logits, y) + soft
        for adapter, student_feature, teacher_feature in zip(
            self.adapters, self.student_features, self.teacher_features, strict=False
        ):
            loss = loss + F.mse_loss(adapter(student_feature), teacher_feature)
        self.student_features.clear()
        self.teacher_features.clear()
        return loss


def shapes(work: Workload) -> list[tuple[torch.Size, torch.Size]]:
    """Shapes of the student's and the teacher's features."""
    collected: list[torch.Size] = []
    for network in (work.student, work.teacher):
        handles = [
            network.get_submodule(layer).register_forward_hook(lambda m, i, out: collected.append(out.shape))
            for layer in work.features
        ]
        with torch.no_grad():
            network(work.batches[0][0])
        for handle in handles:
            handle.remove()
    return list(zip(collected[: len(work.features)], collected[len(work.features) :], strict=True))


def adapters(work: Workload) -> list[nn.Module]:
    """A 1x1 convolution or a linear map for every feature."""
    torch.manual_seed(1)
    return [
        nn.Conv2d(student_shape[1], teacher_shape[1], 1)
        if len(student_shape) == 4
        else nn.Linear(student_shape[1], teacher_shape[1])
        for student_shape, teacher_shape in shapes(work)
    ]


def callback(work: Workload, with_features: bool = False, weight: float = 1.0, **settings: Any) -> DistillCallback:
    """The same distillation by the callback."""
    terms: list[Any] = [LogitsDistillation(weight=weight)]
    if with_features:
        terms += [FeatureDistillation(layer, layer, weight=weight) for layer in work.features]
    return DistillCallback(copy.deepcopy(work.teacher), terms, **settings)


class Premade:
    """An iterable of batches made beforehand; Lightning would take a list for a collection of loaders."""

    def __init__(self, batches: Batches, length: int) -> None:
        self.batches = [batches[index % len(batches)] for index in range(length)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


class Clock(Callback):
    """Ticks at every batch start, in training and in validation."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def on_train_batch_start(self, *_: Any) -> None:
        self.tick()

    def on_validation_batch_start(self, *_: Any) -> None:
        self.tick()


def trainer_for(callbacks: Sequence[Callback], **settings: Any) -> Trainer:
    """A Trainer that does nothing but train."""
    quiet = {f"enable_{feature}": False for feature in ("checkpointing", "progress_bar", "model_summary")}
    settings = {"accelerator": "cpu", "log_every_n_steps": 10**9, **settings}
    return Trainer(logger=False, callbacks=[*callbacks], max_epochs=1, **quiet, **settings)


def fit(
    work: Workload,
    module: Callable[[], LightningModule],
    distil: Callable[[], Callback] | None = None,
    validate: bool = False,
    **settings: Any,
) -> Arm:
    """An arm: the steps (or validation steps) of a fresh module under a fresh Trainer."""

    def arm(tick: Tick, units: int) -> None:
        torch.manual_seed(2)
        trainer = trainer_for([Clock(tick)] if distil is None else [Clock(tick), distil()], **settings)
        batches = Premade(work.batches, units + 1)
        if validate:
            trainer.validate(module(), batches, verbose=False)
        else:
            trainer.fit(module(), batches)

    return arm


def inference(work: Workload, dtype: torch.dtype = torch.float32) -> Arm:
    """An arm: the teacher's forward pass in a bare loop."""
    teacher = copy.deepcopy(work.teacher).eval().to(dtype)
    return forward_arm(teacher, [x.to(dtype) for x, _ in work.batches])


def forward_arm(teacher: nn.Module, inputs: list[Tensor]) -> Arm:
    """An arm: a network's forward pass in a bare loop."""

    @torch.no_grad()
    def forward(index: int) -> None:
        teacher(inputs[index % len(inputs)])

    return repeat(forward)


def adapters_arithmetic(work: Workload) -> Arm:
    """An arm: the adapters' forward pass, backward pass and optimizer step in a bare loop, their loss left out."""
    modules = adapters(work)
    optimizer = torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.01, momentum=0.9)
    features = [torch.randn(student_shape).requires_grad_() for student_shape, _ in shapes(work)]
    gradients = [torch.randn(teacher_shape) for _, teacher_shape in shapes(work)]

    def step(index: int) -> None:
        torch.autograd.backward([module(x) for module, x in zip(modules, features, strict=True)], gradients)
        optimizer.step()
        optimizer.zero_grad()
        for feature in features:
            feature.grad = None

    return repeat(step)
