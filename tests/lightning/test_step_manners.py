"""Logs and syncs of a step, weights set inside it, and state that a run must not change (L24, L26, L30)."""

from __future__ import annotations

import configparser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from device import ACCELERATOR
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from plain_trainer import PLAIN
from tiny import Classifier, Mlp, ValidatedClassifier, loader
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_distill import DistillCallback, DistillModule, FeatureDistillation, LogitsDistillation, measures

ROOT = Path(__file__).parents[2]


class CountingTeacher(Mlp):
    """A teacher that keeps the number of rows of each call."""

    def __init__(self) -> None:
        super().__init__(7, seed=1)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return super().forward(x)


def terms() -> list[Any]:
    return [LogitsDistillation(weight=0.5), FeatureDistillation("body", "body", weight=2.0)]


def distill(**settings: Any) -> DistillCallback:
    return DistillCallback(CountingTeacher(), terms(), **settings)


def learned(callback: DistillCallback) -> dict[str, Tensor]:
    return callback.adapter_state()["adapters"]["body"]


def equal(left: Any, right: Any) -> bool:
    left, right = (list(values.values() if isinstance(values, dict) else values) for values in (left, right))
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# L24: logging and syncs ----------------------------------------------------------------------------------------------


class Logs(Classifier):
    """Keeps each call of self.log and self.log_dict, from any caller."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, str, Any]] = []

    def log(self, name, value, **settings):
        self.logged.append((self.trainer.fit_loop.epoch_loop.batch_idx, name, settings.get("batch_size")))
        super().log(name, value, **settings)

    def log_dict(self, dictionary, **settings):
        for name, value in dictionary.items():
            self.log(name, value, **settings)


KEYS = {"distill/loss", "distill/task_loss", "distill/distillation_loss", "distill/logits_loss", "distill/body_loss"}


def test_l24_losses_are_logged_on_log_steps_only_and_with_the_batch_size(trainer, tmp_path):
    module = Logs()
    run = trainer(callbacks=distill(), max_steps=8, log_every_n_steps=3, logger=CSVLogger(tmp_path))
    run.fit(module, loader(rows=30))  # batches of 4, the last of 2
    # and once more after the last batch: the means over the epoch
    assert {(step, key) for step, key, _ in module.logged} == {(step, key) for step in (2, 5, 7) for key in KEYS}
    assert {size for step, _, size in module.logged if step != 7} == {4}


def test_l24_batch_size_of_an_uneven_last_batch_is_its_own(trainer):
    module = Logs()
    trainer(callbacks=distill(), max_steps=8, log_every_n_steps=1).fit(module, loader(rows=30))
    assert [size for step, key, size in module.logged if key == "distill/task_loss"][:-1] == [4] * 7 + [2]


def test_l24_log_false_logs_nothing(trainer):
    module = Logs()
    run = trainer(callbacks=distill(log=False), max_steps=2, log_every_n_steps=1)
    run.fit(module, loader())
    assert not module.logged
    assert not any(key.startswith("distill/") for key in run.callback_metrics)


class NoSync(TorchDispatchMode):
    """Fails where a tensor's value is asked for, which on a GPU would make the host wait."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(word in str(func) for word in self.FORBIDDEN), f"{func} makes the host wait"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", ["mse", "l1", "smooth_l1", "cosine", "kl"])
def test_l24_step_makes_the_host_wait_for_nothing(trainer, loss):
    class Quiet(Classifier):
        def optimizer_step(self, *args, **settings):
            if self.trainer.global_step == 0:  # the first step builds the adapters
                return super().optimizer_step(*args, **settings)
            with NoSync():
                return super().optimizer_step(*args, **settings)

    callback = DistillCallback(CountingTeacher(), [LogitsDistillation(), FeatureDistillation("body", "body", loss)])
    trainer(callbacks=callback, max_steps=4, log_every_n_steps=1).fit(Quiet(), loader())
    assert len(callback.teacher.rows) == 4


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.gpu
def test_l24_step_on_a_gpu_makes_the_host_wait_for_nothing(trainer, monkeypatch):
    monkeypatch.setattr(measures, "_PENDING", 2)  # so that sums are taken while the test looks

    class Quiet(Classifier):
        def training_step(self, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if self.trainer.global_step else "default")
            return super().training_step(batch, batch_idx)

        def on_before_zero_grad(self, optimizer):
            torch.cuda.set_sync_debug_mode("default")

    run = trainer(callbacks=distill(), max_steps=6, log_every_n_steps=100, accelerator="gpu")
    try:
        run.fit(Quiet(), loader())
    finally:
        torch.cuda.set_sync_debug_mode("default")


# L26: a weight that is set inside the step ---------------------------------------------------------------------------


def test_l26_weight_set_inside_the_training_step_is_never_silently_ignored(trainer):
    class Wakes(Classifier):
        def training_step(self, batch, batch_idx):
            for term in self.callback.terms:
                term.weight = float(batch_idx % 2)
            return super().training_step(batch, batch_idx)

    module, callback = Wakes(), distill()
    module.callback = callback
    try:
        trainer(callbacks=callback, max_steps=4).fit(module, loader())
    except MisconfigurationException as error:
        assert "weight" in str(error)  # noqa: PT017
    else:
        assert len(callback.teacher.rows) == 2


# L30: names, and what is left alone ----------------------------------------------------------------------------------


class OldClassifier(pytorch_lightning.LightningModule):
    """A module of the older package name."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Mlp(5)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]), batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


QUIET: dict[str, Any] = {**PLAIN, "accelerator": ACCELERATOR, "devices": 1}


def test_l30_trainer_and_module_of_the_older_package_name_work_as_the_new_ones(tmp_path):
    ended = []
    for package, module in ((pytorch_lightning, OldClassifier()), (pl, ValidatedClassifier())):
        torch.manual_seed(5)
        callback = distill()
        run = package.Trainer(callbacks=[callback], max_epochs=1, default_root_dir=tmp_path, **QUIET)
        run.fit(module, loader(), loader(rows=6))
        ended.append(
            (list(module.parameters()), learned(callback), run.callback_metrics["distill/val_teacher_agreement"])
        )
        assert "training_step" not in vars(module)
        assert "validation_step" not in vars(module)
    assert equal(ended[0][0], ended[1][0])
    assert equal(ended[0][1], ended[1][1])
    assert ended[0][2] == ended[1][2]


def test_l30_module_of_the_older_package_without_configure_model_is_checked_at_setup(tmp_path):
    callback = DistillCallback(CountingTeacher(), FeatureDistillation("bod", "body"))
    run = pytorch_lightning.Trainer(callbacks=[callback], max_steps=1, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match=r"terms\[0\].student_layer.* 'bod'"):
        run.fit(OldClassifier(), loader(), loader())


@pytest.mark.parametrize("entry_point", ["validate", "test", "predict"])
def test_l30_validate_test_and_predict_leave_the_student_as_a_run_without_the_callback(trainer, entry_point):
    class Noisy(ValidatedClassifier):
        """With batch normalisation and dropout, which a stray forward would change."""

        def __init__(self) -> None:
            super().__init__(nn.Sequential(Mlp(5), nn.BatchNorm1d(3), nn.Dropout(0.5)))

    results = []
    for callbacks in (None, [DistillCallback(CountingTeacher())]):
        torch.manual_seed(5)
        module = Noisy()
        run = trainer(callbacks=callbacks)
        settings = {} if entry_point == "predict" else {"verbose": False}
        returned = getattr(run, entry_point)(module, loader(), **settings)
        state = [*module.state_dict().values(), torch.random.get_rng_state()]
        flags = [part.training for part in module.modules()] + [p.requires_grad for p in module.parameters()]
        results.append((returned, state, flags, [p.grad for p in module.parameters()], sorted(vars(module))))
    (plain, state, *rest), (distilled, other, *others) = results
    assert equal(state, other)
    assert rest == others
    if entry_point == "predict":
        assert equal(plain, distilled)
    else:
        assert plain == [{k: v for k, v in distilled[0].items() if not k.startswith("distill/")}]
        assert ("distill/val_teacher_agreement" in distilled[0]) == (entry_point == "validate")


@pytest.mark.parametrize("entry_point", ["test", "predict"])
def test_l30_test_and_predict_never_run_the_teacher(trainer, entry_point):
    callback = DistillCallback(CountingTeacher())
    settings = {} if entry_point == "predict" else {"verbose": False}
    getattr(trainer(callbacks=callback), entry_point)(ValidatedClassifier(), loader(), **settings)
    assert callback.teacher.rows == []


def test_l30_no_entry_point_puts_the_callback_into_every_trainer():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    points = dict(setup["options.entry_points"]) if setup.has_section("options.entry_points") else {}
    assert not [name for name in points if "callbacks_factory" in name]
    assert "callbacks_factory" not in (ROOT / "pyproject.toml").read_text()
    assert not any(isinstance(item, DistillCallback) for item in Trainer(**QUIET).callbacks)


def test_l30_distill_module_runs_under_the_new_trainer_with_a_plain_student(trainer):
    student = Mlp(5)
    module = DistillModule(student, CountingTeacher(), terms(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert isinstance(module, LightningModule)
    trainer(max_epochs=1).fit(module, loader(), loader())
    assert module.teacher.rows == [4] * 8
