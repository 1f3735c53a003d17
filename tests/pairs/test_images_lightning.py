"""Features on images together: every pair of kinds of teachers and terms is the same in every situation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from pairs.lightning_cell import QUIET, same
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import (
    CallableTeacher,
    ContrastiveRepresentationLoss,
    CrossHeadDistillation,
    CurriculumTemperature,
    DistillCallback,
    EMATeacher,
    FactorTransferLoss,
    FeatureDistillation,
    FocalGlobalLoss,
    LogitsDistillation,
    Normalize,
    QueueSimilarityLoss,
    ReusedClassifierDistillation,
    ReviewDistillation,
    SelfDistillation,
    SoftTargetLoss,
    Tap,
)


class Levels(nn.Module):
    """The two levels of a feature pyramid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x)
        return {"fine": fine, "coarse": self.coarse(fine)}


class Pyramid(nn.Module):
    def __init__(self, width: int = 4, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem, self.levels = nn.Conv2d(3, width, 3, 2, 1), Levels(width)
            self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.levels(self.stem(x))["coarse"]).mean((2, 3)))


def rows() -> TensorDataset:
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, torch.arange(12) % 3, torch.arange(12))


def boxes(batch: Any) -> list[Tensor]:
    return [torch.tensor([[0.0, 0.0, 9.0, 9.0], [6.0, 4.0, 16.0, 12.0]])] * len(batch[0])


def source(batch: Any) -> Tensor:
    return batch[1] % 2


def channel_means(x: Tensor) -> Tensor:
    return x.mean((2, 3))


EVERY = Tap("levels", output="*")
NORMALIZE = Normalize.between(([0.5] * 3, [0.2] * 3), ([0.4] * 3, [0.3] * 3), size=12)
TEACHERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "average": (lambda: EMATeacher(0.5), {"teacher_inputs": NORMALIZE}),
    "weights": (lambda: [Pyramid(4, 1), Pyramid(5, 2)], {"teacher_weights": [1, 2]}),
    "route": (lambda: [Pyramid(4, 1), Pyramid(5, 2)], {"route": source, "teacher_inputs": NORMALIZE}),
    "one": (lambda: Pyramid(5, 2), {}),
}
TERMS: dict[str, Callable[[], Any]] = {
    "levels": lambda: FeatureDistillation(EVERY, EVERY),
    "focal": lambda: FeatureDistillation(EVERY, EVERY, FocalGlobalLoss(), boxes=boxes),
    "factors": lambda: FeatureDistillation("levels.fine", "levels.fine", FactorTransferLoss()),
    "review": lambda: ReviewDistillation([EVERY], [EVERY]),
    "queue": lambda: FeatureDistillation("norm", "norm", QueueSimilarityLoss(size=5), adapter="pool"),
    "contrast": lambda: FeatureDistillation("norm", "norm", ContrastiveRepresentationLoss(size=12, width=4), index=2),
    "curriculum": lambda: LogitsDistillation(SoftTargetLoss(CurriculumTemperature(reversal_weight=1.0))),
    "own head": lambda: CrossHeadDistillation(Tap("head", where="input"), "head", "mse"),
    "normalised adapter": lambda: FeatureDistillation("norm", "norm", adapter=_normalised),
    "itself": lambda: SelfDistillation("levels.fine", Tap("levels", output="coarse"), adapter=nn.AvgPool2d(2)),
}
PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]] = {
    f"{teacher}, {term}": (made, TERMS[term], settings)
    for teacher, (made, settings) in TEACHERS.items()
    for term in TERMS
}
PAIRS["one, classifier"] = (
    TEACHERS["one"][0],
    lambda: ReusedClassifierDistillation("norm", "norm", classifier="head"),
    {"task_weight": 0.0},
)
PAIRS["function, logits"] = (lambda: CallableTeacher(channel_means), LogitsDistillation, {"teacher_inputs": NORMALIZE})
PAIRS["confidence, logits"] = (TEACHERS["weights"][0], LogitsDistillation, {"teacher_weights": "entropy"})
PAIRS["mixture, logits"] = (TEACHERS["weights"][0], LogitsDistillation, {"mix": "probabilities"})
# Pairs that cannot work, with the words of the error.
REFUSED = {
    "route, focal": "no mask, no ignore_index, no boxes and no index with a route",
    "route, contrast": "no mask, no ignore_index, no boxes and no index with a route",
    "route, own head": "with a route, but got CrossHeadDistillation",
}


def _normalised(student: torch.Size, teacher: torch.Size) -> nn.Module:
    return nn.Sequential(nn.Conv2d(student[1], teacher[1], 1), nn.BatchNorm2d(teacher[1]))


class Module(LightningModule):
    def __init__(self, model: nn.Module, distill: DistillCallback | None = None) -> None:
        super().__init__()
        self.model, self.distill = model, [distill]
        self.automatic_optimization = distill is None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        (distill,) = self.distill
        if distill is not None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(distill.task_weight * loss + distill.loss())
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)


def callback(name: str) -> DistillCallback:
    teacher, terms, settings = PAIRS[name]
    return DistillCallback(teacher(), terms(), student="model", **settings)


def trained(
    name: str, model: nn.Module | None = None, manual: bool = False, path: Path | None = None, **settings: Any
) -> dict[str, Tensor]:
    """All that two epochs change: the student, the learned parts, the average."""
    distill = callback(name)
    module = Module(Pyramid() if model is None else model, distill if manual else None)
    torch.manual_seed(0)
    trainer = Trainer(callbacks=[distill], **{**QUIET, "max_epochs": 2, "limit_val_batches": 0, **settings})
    trainer.fit(module, DataLoader(rows(), 6), DataLoader(rows(), 4), ckpt_path=path)
    if path is None and trainer.max_epochs == 1:
        trainer.save_checkpoint(settings["default_root_dir"] / "first.ckpt")
    state = distill.adapter_state()
    values = {f"{term}.{key}": value for term, each in state.get("adapters", {}).items() for key, value in each.items()}
    values |= {f"average.{key}": value for key, value in state.get("teacher", {}).get("average", {}).items()}
    return values | {key.removeprefix("_orig_mod."): value for key, value in module.model.state_dict().items()}


def resumed(name: str, folder: Path) -> dict[str, Tensor]:
    trained(name, max_epochs=1, default_root_dir=folder)
    return trained(name, path=folder / "first.ckpt")


SITUATIONS: dict[str, Callable[[str, Path], dict[str, Tensor]]] = {
    "validated": lambda name, folder: trained(name, limit_val_batches=3, val_check_interval=1),
    "resumed": resumed,
    "manual": lambda name, folder: trained(name, manual=True),
    "compiled": lambda name, folder: trained(name, model=torch.compile(Pyramid(), backend="eager")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_the_same_in_every_situation(name: str, tmp_path: Path) -> None:
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            trained(name)
        return
    plain = trained(name)
    assert any(not torch.equal(plain[key], value) for key, value in Pyramid().state_dict().items())
    for situation, run in SITUATIONS.items():
        # a compiled network's features are copies with other strides, whose products are rounded in another order
        rounds = "contrast" in name and situation == "compiled"
        same(run(name, tmp_path), plain, tolerance=2e-6 if rounds else 0.0)
    distill = callback(name)
    for other in (copy.deepcopy(distill), pickle.loads(pickle.dumps(distill))):
        assert [term.name for term in other.terms] == [term.name for term in distill.terms]
