"""The rows of the data that ContrastiveRepresentationLoss reads: from caches and batches, in trainings, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_distill import (
    ContrastiveRepresentationLoss,
    DistillCallback,
    Distiller,
    FeatureDistillation,
    TeacherCache,
)

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def drawn(seed: int, count: int = 2, width: int = 3) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


class Embedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Numbered(Dataset[Any]):
    """Samples with their row, as a dict."""

    def __init__(self, count: int = 8) -> None:
        self.x = drawn(0, count, 4)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"x": self.x[row], "row": row}


class Student(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = Embedder(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.network(batch["x"] if isinstance(batch, dict) else batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validated(Student):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.network(batch["x"])


def contrast(index: Any = None, **settings: Any) -> FeatureDistillation:
    loss = ContrastiveRepresentationLoss(**{"negatives": 3, "width": 4, **settings})
    return FeatureDistillation("body", "body", loss, index=index, name="contrast")


def test_a_trainer_reads_rows_from_the_batch_and_leaves_the_term_out_of_validation() -> None:
    callback = DistillCallback(Embedder(5), contrast("row", size=8), student="network")
    trainer = Trainer(max_epochs=1, callbacks=callback, **QUIET)
    trainer.fit(Validated(), DataLoader(Numbered(), 4), DataLoader(Numbered(40), 20))
    memory = callback.adapter_state()["adapters"]["contrast"]["learned.0.student_memory"]
    assert memory.shape == (8, 4)
    assert "distill/contrast_loss" in trainer.logged_metrics
    assert not [name for name in trainer.logged_metrics if "val" in name and "contrast" in name]


@pytest.mark.parametrize("views", [1, 2])
def test_a_cache_knows_rows_and_size(tmp_path: Path, views: int) -> None:
    data = TensorDataset(Numbered().x, torch.zeros(8))
    seeds: dict[str, Any] = {"views": views, "transform_seed": 0} if views > 1 else {}
    cache = TeacherCache.build(Embedder(5), data, tmp_path, layers=["body"], progress=False, **seeds)
    callback = DistillCallback(cache, contrast(), student="network")
    seen: list[Tensor] = []
    trainer = Trainer(max_epochs=2, callbacks=callback, **QUIET)
    original = ContrastiveRepresentationLoss._chosen

    def watched(self: Any, index: Tensor) -> Tensor:
        seen.append(index)
        return original(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContrastiveRepresentationLoss, "_chosen", watched)
        trainer.fit(Student(), DataLoader(data, 4, shuffle=True))
    assert torch.cat(seen[:2]).sort().values.tolist() == list(range(8))
    assert torch.cat(seen[2:]).sort().values.tolist() == list(range(8))
    assert callback.adapter_state()["adapters"]["contrast"]["learned.0.teacher_memory"].shape == (8, 4)


def test_a_resumed_training_is_the_straight_one(tmp_path: Path) -> None:
    def trained(epochs: int, path: Path | None = None) -> tuple[Trainer, Student, DistillCallback]:
        torch.manual_seed(5)
        callback = DistillCallback(Embedder(5), contrast("row", size=8, negatives=7), student="network")
        trainer, module = Trainer(max_epochs=epochs, callbacks=callback, **QUIET), Student()
        torch.manual_seed(5)
        callback.teacher.load_state_dict(Embedder(5).state_dict())
        trainer.fit(module, DataLoader(Numbered(), 4), ckpt_path=path)
        return trainer, module, callback

    _, straight, whole = trained(2)
    trainer, _, _ = trained(1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, resumed, again = trained(2, tmp_path / "last.ckpt")
    for expected, value in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, value)
    states = [callback.adapter_state()["adapters"]["contrast"] for callback in (whole, again)]
    assert states[0]["learned.0.log_normalizers"].isfinite().all()
    for name, values in states[0].items():
        assert torch.equal(values, states[1][name]), name


def loss_of(batch: Any, term: FeatureDistillation, teacher: Any = None) -> Tensor:
    student = Embedder(3)
    with Distiller(student, teacher or Embedder(5), term, task_weight=0) as distiller:
        distiller.follow(torch.optim.SGD(student.parameters(), lr=0.1))
        with distiller.record():
            student(drawn(0, 2, 4))
        return distiller.total(torch.zeros(()), batch)


@pytest.mark.parametrize("place", ["row", "rows2d", lambda batch: batch["row"]], ids=["key", "a column", "a function"])
def test_rows_are_named_as_masks_are(place: Any) -> None:
    batch = {"row": torch.tensor([1, 5]), "rows2d": torch.tensor([[1], [5]], dtype=torch.int32)}
    assert loss_of(batch, contrast(place, size=8)).isfinite()
    assert loss_of((drawn(0), torch.tensor([1, 5])), contrast(1, size=8)).isfinite()


@pytest.mark.parametrize(
    ("batch", "term", "words"),
    [
        ({}, contrast(size=8), "`index` to say where a batch keeps the row of each example .* got index=None. Let the"),
        (
            {"x": 1},
            contrast("row", size=8),
            "hold the row of each example at index='row', but got a dict with NoneType",
        ),
        (
            None,
            contrast("row", size=8),
            r"a batch for index='row', but got none. Call distiller.total\(task_loss, batch",
        ),
        (
            {"row": torch.tensor([1.0, 2.0])},
            contrast("row", size=8),
            "one whole number for each of 2 examples, but got torch.float32",
        ),
        ({"row": torch.tensor([1, 2, 3])}, contrast("row", size=8), r"but got torch.int64 of shape \(3,\)"),
        (
            {"row": torch.tensor([1, 8])},
            contrast("row", size=8),
            "to be rows of the data set, 0 to 7, but got 8. Pass size",
        ),
        ({"row": torch.tensor([-1, 2])}, contrast("row", size=8), "to be rows of the data set, 0 to 7, but got -1"),
        (
            {"row": torch.tensor([1, 2])},
            contrast("row"),
            "`size` to be the number of examples in the data set, but got",
        ),
    ],
)
def test_rows_that_are_not_known_are_an_error_in_the_first_step(batch: Any, term: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loss_of(batch, term)


def test_a_later_batch_with_rows_outside_is_an_error_too() -> None:
    student = Embedder(3)
    with Distiller(student, Embedder(5), contrast("row", size=8), task_weight=0) as distiller:
        distiller.follow(torch.optim.SGD(student.parameters(), lr=0.1))
        for rows, words in (([0, 7], None), ([0, 8], "0 to 7, but got 8")):
            with distiller.record():
                student(drawn(0, 2, 4))
            if words is None:
                distiller.total(torch.zeros(()), {"row": torch.tensor(rows)}).backward()
            else:
                with pytest.raises(ValueError, match=words):
                    distiller.total(torch.zeros(()), {"row": torch.tensor(rows)})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: FeatureDistillation("body", "body", "mse", index="row"),
            "`index` to be None for FeatureDistance, which needs no rows of the examples, but got index='row'",
        ),
        (
            lambda: FeatureDistillation("body", "body", ContrastiveRepresentationLoss(), boxes="boxes"),
            "`boxes` to be None for ContrastiveRepresentationLoss, which compares whole examples",
        ),
        (
            lambda: Distiller(Embedder(3), [Embedder(5), Embedder(5)], contrast("row", size=8), route="which"),
            "no boxes and no index with a route",
        ),
    ],
)
def test_terms_that_do_not_fit_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
