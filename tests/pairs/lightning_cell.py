"""One cell of the table: a feature in a situation, its Trainer runs, and the loop by hand that they must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from device import ACCELERATOR
from lightning.pytorch import Callback, LightningModule, Trainer
from pairs.by_hand import Batch, Hand, Place, cross_entropy, draw_alike, places
from pairs.lightning_table import BATCH, MEASURED, ROWS, Feature, student
from pairs.lightning_teachers import FEATURES
from plain_trainer import PLAIN
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import DistillCallback

QUIET: dict[str, Any] = {**PLAIN, "accelerator": ACCELERATOR, "devices": 1, "num_sanity_val_steps": 0}
FRESH: dict[str, dict[str, Tensor]] = {}  # the first values of every feature's learned parts, for the seed of the cells


class Module(LightningModule):
    """The user's module, in the commonest form; it knows nothing of distillation."""

    def __init__(self, feature: str, model: nn.Module | None = None) -> None:
        super().__init__()
        self.feature, self.model = feature, student() if model is None else model
        self.batch_size, self.lr = BATCH, 0.1

    def task(self, batch: Batch) -> Tensor:
        views = FEATURES[self.feature].views
        losses = [cross_entropy(self.model(view(batch["x"])), batch["labels"]) for view in views]
        return torch.stack(losses).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.task(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = cross_entropy(self.model(batch["x"]), batch["labels"])
        self.log("val_loss", loss, batch_size=len(batch["x"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(FEATURES[self.feature].rows(), self.batch_size)


class Watch(Callback):
    """Notes the losses, the batches, the learning rates, and the learned parts before they are first trained."""

    def __init__(self, distill: DistillCallback) -> None:
        self.distill = distill
        self.on_train_start()

    def on_train_start(self, *_: Any) -> None:
        self.losses: list[float] = []
        self.batches: list[Batch] = []
        self.rates: list[float] = []
        self.start: dict[str, Tensor] | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        draw_alike(trainer.current_epoch, batch_idx)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # that of float16 has scaled the loss
        scale = 1.0 if scaler is None else scaler.get_scale()
        self.losses.append(loss.item() / scale * trainer.accumulate_grad_batches)
        if self.start is None and (values := learned(self.distill)):
            self.start = values

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def learned(distill: DistillCallback) -> dict[str, Tensor]:
    """Copies of the learned parts on the CPU, by term and name."""
    saved = distill.adapter_state().get("adapters", {})
    return {
        f"{term}.{key}": value.to("cpu", copy=True) for term, state in saved.items() for key, value in state.items()
    }


def average(distill: DistillCallback) -> dict[str, Tensor]:
    """The moving average that teaches, alone or as the first of several teachers, by name."""
    state = distill.adapter_state().get("teacher", {})
    values: dict[str, Tensor] = state.get("0", state).get("average", {})
    return values


class Cell:
    """A feature in a situation.

    Args:
        name: The feature's name.
        folder: For files of this cell.
        shared: For the caches, which all cells share.
    """

    def __init__(self, name: str, folder: Path, shared: Path) -> None:
        self.name, self.folder = name, folder
        self.feature: Feature = FEATURES[name]
        self.shared = shared
        self.even = list(FEATURES).index(name) % 2 == 0  # the order of the callbacks, which must not matter
        self.watch: Watch | None = None  # of the last run
        torch.manual_seed(7)

    def callback(self, **settings: Any) -> DistillCallback:
        teacher = self.feature.make_teacher(self.shared)
        return DistillCallback(teacher, self.feature.terms(), student="model", **self.feature.settings, **settings)

    def module(self, model: nn.Module | None = None) -> Module:
        return Module(self.name, model)

    def fit(
        self,
        module: LightningModule,
        distill: DistillCallback,
        *,
        callbacks: Sequence[Callback] = (),
        first: bool = True,
        before: Callable[[Trainer], None] = lambda trainer: None,
        ckpt_path: Any = None,
        **settings: Any,
    ) -> tuple[Trainer, Watch]:
        """A run of two epochs of four batches, unless the settings say otherwise."""
        self.watch = watch = Watch(distill)
        ordered = [distill, *callbacks] if first else [*callbacks, distill]
        trainer_settings = {"max_epochs": 2, "default_root_dir": self.folder, **QUIET, **settings}
        trainer = Trainer(callbacks=[*ordered, watch], **trainer_settings)
        before(trainer)
        torch.manual_seed(7)
        trainer.fit(module, ckpt_path=ckpt_path)
        return trainer, watch

    def hand(self, watch: Watch, *, fresh: bool = True, model: nn.Module | None = None, **settings: Any) -> Hand:
        """The loop by hand, from the first values of the learned parts."""
        start = watch.start or {}
        if fresh:
            known = self.first_values()
            assert start.keys() == known.keys()
            for key, value in start.items():
                assert torch.equal(value, known[key]), f"{key} did not start afresh"
        feature = self.feature
        torch.manual_seed(7)
        dtype = None if feature.cache is None else torch.float32  # in which the cache was built
        own = {"views": feature.views, "task_weight": feature.task_weight, "decay": feature.decay, "dtype": dtype}
        settings = {**own, **settings}
        return Hand(feature.formula, student() if model is None else model, start, **settings)

    def first_values(self) -> dict[str, Tensor]:
        """The first values of the learned parts, from a run of one step of its own."""
        if self.name not in FRESH:
            distill = self.callback()
            watch = Watch(distill)
            torch.manual_seed(7)
            Trainer(callbacks=[distill, watch], max_steps=1, **QUIET).fit(self.module())
            FRESH[self.name] = watch.start or {}
        return FRESH[self.name]

    def steps(
        self, sizes: Sequence[int] = (BATCH, BATCH), accumulate: int = 1, optimizers: int = 1
    ) -> list[list[tuple[Batch, Place]]]:
        """The batches of every optimizer step: the rows in order, in batches of one size an epoch."""
        rows = self.feature.rows()
        batches = [[rows.batch(start, size) for start in range(0, ROWS, size)] for size in sizes]
        waiting = iter(batch for epoch in batches for batch in epoch)
        windows = places([len(epoch) for epoch in batches], accumulate, optimizers)
        return [[(next(waiting), place) for place in window] for window in windows]

    def equal(
        self,
        hand: Hand,
        watch: Watch,
        distill: DistillCallback,
        module: Any,
        *,
        final: dict[str, Tensor] | None = None,
        tolerance: float = 2e-6,
    ) -> None:
        """Assert that a run equals the loop: every loss, the student, the learned parts."""
        if self.name in MEASURED:
            tolerance *= 5  # the weights are quotients, which magnify the rounding of float32
        close(watch.losses, hand.losses, tolerance)
        ended = {name: value.detach() for name, value in module.model.named_parameters()}
        ended = {name.removeprefix("_orig_mod."): value for name, value in ended.items()}
        same(ended, hand.after[-1] if final is None else final, tolerance)
        same(learned(distill), hand.values(), tolerance)
        if self.feature.decay is not None:
            same(average(distill), {name: value.detach() for name, value in hand.teacher.named_parameters()}, tolerance)

    def clean(self, trainer: Trainer, module: LightningModule) -> None:
        """Assert that nothing is left on the module or the Trainer's objects."""
        for owner in (module, trainer.strategy, trainer.precision_plugin, trainer.fit_loop):
            kept = [name for name, value in vars(owner).items() if type(value).__module__.startswith("lightning_dis")]
            assert not kept, f"{type(owner).__name__}: {kept}"
        assert hooks(module) == 0


def hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(inner, kind)) for inner in module.modules() for kind in kinds)


def close(first: Sequence[float], second: Sequence[float], tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(torch.tensor(first), torch.tensor(second), rtol=tolerance, atol=tolerance)


def same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            value.cpu(), second[name].cpu(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
