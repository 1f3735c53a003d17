"""Distillation beside Lightning's other callbacks and tools (L16, L17, L22)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from tiny import Classifier, Mlp, ValidatedClassifier, dataset, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import DistillCallback, FeatureDistillation, LogitsDistillation


class CountingTeacher(Mlp):
    """A teacher that keeps the number of rows of each call."""

    def __init__(self) -> None:
        super().__init__(7, seed=1)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return super().forward(x)


class Tunable(Classifier):
    """A module with a batch size and a learning rate to be found."""

    def __init__(self, lr: float = 0.1, batch_size: int = 4) -> None:
        super().__init__(Mlp(5), lr)
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(dataset(64), batch_size=self.batch_size)


def terms() -> list[Any]:
    return [LogitsDistillation(weight=0.5), FeatureDistillation("body", "body", weight=2.0)]


def distill(**settings: Any) -> DistillCallback:
    return DistillCallback(CountingTeacher(), terms(), **settings)


def learned(callback: DistillCallback) -> dict[str, Tensor]:
    return callback.adapter_state()["adapters"]["body"]


def equal(left: Any, right: Any) -> bool:
    left, right = (list(values.values() if isinstance(values, dict) else values) for values in (left, right))
    return len(left) == len(right) and all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(left, right, strict=True))


class First(Callback):
    """The adapters before the first step of the last run."""

    def on_train_start(self, trainer, pl_module):
        self.adapters = None

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        callback = next(callback_ for callback_ in trainer.callbacks if isinstance(callback_, DistillCallback))
        if self.adapters is None and callback.adapter_state():
            self.adapters = {name: value.clone() for name, value in learned(callback).items()}


# L16: finders ------------------------------------------------------------------------------------------------------


def tune_rate(trainer: Any, module: Tunable) -> None:
    Tuner(trainer).lr_find(module, num_training=5, update_attr=True)


def tune_batch(trainer: Any, module: Tunable) -> None:
    Tuner(trainer).scale_batch_size(module, mode="power", steps_per_trial=2, max_trials=2)


@pytest.mark.parametrize("tune", [tune_rate, tune_batch])
@pytest.mark.filterwarnings("ignore:.*Failed to compute suggestion")
def test_l16_tuner_runs_the_teacher_and_leaves_fresh_adapters(trainer, tune):
    torch.manual_seed(5)
    module, callback, first = Tunable(), distill(), First()
    run = trainer(callbacks=[callback, first], max_steps=3)
    tune(run, module)
    tuned = len(callback.teacher.rows)
    assert tuned > 3, "the teacher ran while tuning"
    torch.manual_seed(5)
    run.fit(module)
    assert len(callback.teacher.rows) == tuned + 3

    torch.manual_seed(5)
    plain, other = Tunable(lr=module.lr, batch_size=module.batch_size), distill()
    trainer(callbacks=other, max_steps=3).fit(plain)
    assert equal(list(module.parameters()), list(plain.parameters()))
    assert equal(learned(callback), learned(other)), "nothing of the tuner's adapters was left"


@pytest.mark.parametrize("distill_first", [True, False])
@pytest.mark.parametrize("kind", ["rate", "batch"])
@pytest.mark.filterwarnings("ignore:.*Failed to compute suggestion")
def test_l16_finder_callbacks_run_the_teacher_and_leave_fresh_adapters(trainer, kind, distill_first):
    torch.manual_seed(5)
    module, callback = Tunable(), distill()
    if kind == "rate":
        finder: Callback = LearningRateFinder(num_training_steps=5, update_attr=True)
    else:
        finder = BatchSizeFinder(steps_per_trial=2, max_trials=2)
    callbacks = [callback, finder] if distill_first else [finder, callback]
    trainer(callbacks=callbacks, max_steps=3).fit(module)
    assert len(callback.teacher.rows) > 3 + 2, "the teacher ran while the finder did"

    torch.manual_seed(5)
    plain, other = Tunable(lr=module.lr, batch_size=module.batch_size), distill()
    trainer(callbacks=other, max_steps=3).fit(plain)
    assert equal(list(module.parameters()), list(plain.parameters()))
    assert equal(learned(callback), learned(other)), "nothing of the finder's adapters was left"


def test_l16_learning_rate_that_is_found_is_that_of_the_distilled_loss(trainer):
    rates = []
    for callback in (None, distill()):
        run = trainer(callbacks=callback, max_steps=3)
        finder = Tuner(run).lr_find(Tunable(), num_training=6, update_attr=False)
        rates.append(finder.results["loss"])
    assert rates[0] != rates[1]


# L17: other callbacks ------------------------------------------------------------------------------------------------


class TwoParts(Classifier):
    """A module in the form that BackboneFinetuning expects."""

    def __init__(self) -> None:
        super().__init__()
        whole = Mlp(5)
        self.model = nn.Sequential()
        self.backbone, self.head = whole.body, nn.Sequential(whole.act, whole.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


def together(trainer: Any, other: Callable[[], Callback], distill_first: bool, epochs: int = 3, **settings: Any) -> Any:
    torch.manual_seed(5)
    module, callback, beside = ValidatedClassifier(), distill(), other()
    callbacks = [callback, beside] if distill_first else [beside, callback]
    run = trainer(callbacks=callbacks, max_epochs=epochs, **settings)
    run.fit(module, loader(), loader(rows=6))
    return module, callback, beside, run


OTHERS: dict[str, Callable[[], Callback]] = {
    "average": lambda: WeightAveraging(use_buffers=True),
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
    "accumulation": lambda: GradientAccumulationScheduler({0: 1, 1: 2}),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_l17_result_does_not_depend_on_the_order_of_the_callbacks(trainer, name):
    ended = [together(trainer, OTHERS[name], first) for first in (True, False)]
    assert equal(list(ended[0][0].parameters()), list(ended[1][0].parameters()))
    assert equal(learned(ended[0][1]), learned(ended[1][1]))
    assert ended[0][1].teacher.rows.count(4) >= 12
    plain = together(trainer, Callback, True)
    assert not equal(list(ended[0][0].parameters()), list(plain[0].parameters())), "the other callback did something"


@pytest.mark.parametrize("distill_first", [True, False])
def test_l17_weight_average_is_the_average_of_the_distilled_students(trainer, distill_first):
    seen: list[list[Tensor]] = []

    class Average(WeightAveraging):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            seen.append([parameter.detach().to("cpu", copy=True) for parameter in pl_module.parameters()])
            super().on_train_batch_end(trainer, pl_module, *rest)

    module, *_ = together(trainer, Average, distill_first, epochs=1)
    assert len(seen) == 4
    for index, parameter in enumerate(module.parameters()):
        torch.testing.assert_close(parameter.detach(), torch.stack([step[index] for step in seen]).mean(0))


@pytest.mark.parametrize("distill_first", [True, False])
@pytest.mark.filterwarnings("ignore:The lr scheduler dict contains the key")
def test_l17_backbone_finetuning_adds_its_group_and_adapters_go_on(trainer, distill_first):
    module = TwoParts()
    callback = DistillCallback(
        CountingTeacher(), [LogitsDistillation(), FeatureDistillation("head", "head", adapter="linear")]
    )
    finetuning = BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0, backbone_initial_lr=0.05
    )
    frozen = copy.deepcopy(module.backbone)
    seen = []

    class Looks(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            state = callback.adapter_state()["adapters"]["head"]
            seen.append(([p.detach().clone() for p in pl_module.backbone.parameters()], copy.deepcopy(state)))
            self.groups = len(trainer.optimizers[0].param_groups)

    looks = Looks()
    callbacks = [callback, finetuning] if distill_first else [finetuning, callback]
    trainer(callbacks=[*callbacks, looks], max_epochs=2).fit(module, loader())
    assert equal(seen[0][0], list(frozen.parameters()))
    assert not equal(seen[1][0], list(frozen.parameters()))
    assert not equal(seen[0][1], seen[1][1])
    assert looks.groups == 2


@pytest.mark.parametrize("distill_first", [True, False])
def test_l17_learning_rate_monitor_sees_the_students_groups_alone(trainer, tmp_path, distill_first):
    class Scheduled(ValidatedClassifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    monitor, callback = LearningRateMonitor(), distill()
    callbacks = [callback, monitor] if distill_first else [monitor, callback]
    run = trainer(callbacks=callbacks, max_epochs=2, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(Scheduled(), loader(), loader())
    assert list(monitor.lrs) == ["lr-SGD"]
    assert monitor.lrs["lr-SGD"] == [0.1, 0.05] or monitor.lrs["lr-SGD"][-1] == 0.05


@pytest.mark.parametrize("distill_first", [True, False])
def test_l17_model_checkpoint_monitors_a_distillation_key_and_writes_the_students_state_dict(
    trainer, tmp_path, distill_first
):
    def checkpoint() -> ModelCheckpoint:
        return ModelCheckpoint(
            tmp_path / str(distill_first),
            filename="{epoch}-{distill/val_teacher_agreement:.2f}",
            monitor="distill/val_teacher_agreement",
            mode="max",
            auto_insert_metric_name=False,
        )

    module, callback, saver, _ = together(trainer, checkpoint, distill_first, enable_checkpointing=True, epochs=1)
    assert "/" not in str(Path(saver.best_model_path).relative_to(tmp_path / str(distill_first)))
    saved = torch.load(saver.best_model_path, weights_only=True)
    assert list(saved["state_dict"]) == list(module.state_dict())
    ValidatedClassifier().load_state_dict(saved["state_dict"], strict=True)
    assert equal(saved["callbacks"][callback.state_key]["adapters"]["body"], learned(callback))


# L22: DeepSpeed ------------------------------------------------------------------------------------------------------


class DeepSpeedStrategy(SingleDeviceStrategy):
    """Of the real one its name, since DeepSpeed itself needs a GPU and a package of its own."""


class FurtherDeepSpeed(DeepSpeedStrategy):
    """Derived from it, as users do."""


@pytest.mark.exact
@pytest.mark.parametrize("kind", [DeepSpeedStrategy, FurtherDeepSpeed])
def test_l22_deepspeed_with_adapters_raises_before_the_first_step(trainer, kind):
    module, callback = Classifier(), distill()
    before = copy.deepcopy(list(module.parameters()))
    with pytest.raises(
        (ValueError, MisconfigurationException), match=r"DeepSpeed.*Distil logits only, or use DDP or FSDP2"
    ):
        trainer(callbacks=callback, strategy=kind(torch.device("cpu"))).fit(module, loader())
    assert equal(list(module.parameters()), before)
    assert "training_step" not in vars(module)


@pytest.mark.exact
def test_l22_deepspeed_with_logits_only_and_with_features_of_equal_shape_is_allowed(trainer):
    same_shape = FeatureDistillation("head", "head")
    callback = DistillCallback(CountingTeacher(), [LogitsDistillation(), same_shape])
    trainer(callbacks=callback, strategy=DeepSpeedStrategy(torch.device("cpu"))).fit(Classifier(), loader())
    assert len(callback.teacher.rows) == 2
