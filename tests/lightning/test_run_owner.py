"""A run owns all of one fit: how it reaches the training step, and how it records, without a trace on the module."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from tiny import Classifier, Mlp, ValidatedClassifier, loader
from torch import Tensor, nn

from lightning_distill import DistillCallback, FeatureDistillation, LogitsDistillation
from lightning_distill.patch import patch_step

Make = Callable[..., Any]


class Asked(Mlp):
    """A teacher that counts its calls and keeps their inputs."""

    def __init__(self) -> None:
        super().__init__(7, seed=1)
        self.shown: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shown.append(x)
        return super().forward(x)


class At(Callback):
    """Calls functions at hooks."""

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        for name, function in hooks.items():
            setattr(self, name, function)


def distill(**settings: Any) -> DistillCallback:
    terms = [LogitsDistillation(), FeatureDistillation("body", "body")]
    return DistillCallback(Asked(), terms, **{"student": "model", **settings})


def hooks(module: nn.Module) -> list[Any]:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return [hook for part in module.modules() for table in tables for hook in getattr(part, table).items()]


# The way into the step -----------------------------------------------------------------------------------------------


def test_code_that_looks_at_the_module_in_mid_fit_finds_it_as_it_was(trainer: Make) -> None:
    seen: dict[str, Any] = {}

    def look(trainer: Any, module: Any, *_: Any) -> None:
        seen.update(kind=type(module), keys=set(vars(module)), code=module.training_step.__code__)
        seen["overridden"] = is_overridden("training_step", module)

    trainer(callbacks=[distill(), At(on_train_batch_start=look)]).fit(Classifier(), loader())
    assert seen["kind"] is Classifier
    assert seen["overridden"]
    assert "training_step" not in seen["keys"]
    assert seen["code"] is Classifier.training_step.__code__


def test_the_modules_own_step_finds_itself_as_it_was_too(trainer: Make) -> None:
    class Looks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert "training_step" not in vars(self)
            assert not [key for key in vars(self) if key.endswith("_step")]
            return super().training_step(batch, batch_idx)

    callback = distill()
    trainer(callbacks=callback).fit(Looks(), loader())
    assert len(callback.teacher.shown) == 2


def test_autocast_is_open_around_the_teacher_and_the_terms(trainer: Make) -> None:
    seen = []

    class Looks(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled(DEVICE))
            return super().forward(x)

    callback = DistillCallback(Looks(7, seed=1), student="model")
    trainer(callbacks=callback, precision="bf16-mixed").fit(Classifier(), loader())
    assert seen == [True, True]


def test_a_strategy_that_never_reaches_the_step_leaves_nothing() -> None:
    class Strategy:
        lightning_module = Classifier()

        def training_step(self) -> None:
            raise RuntimeError("before the step")

    strategy = Strategy()
    patch = patch_step(strategy, "training_step", lambda step: step())
    with pytest.raises(RuntimeError, match="before the step"):
        strategy.training_step()
    patch.undo()
    assert "training_step" not in vars(strategy.lightning_module)
    assert "training_step" not in vars(strategy)


def test_a_step_that_calls_its_own_training_step_again_is_distilled_once(trainer: Make) -> None:
    class Twice(Classifier):
        depth = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.depth == 0:
                self.depth = 1
                try:
                    return self.training_step(batch, batch_idx)  # a retry, as after an error
                finally:
                    self.depth = 0
            return super().training_step(batch, batch_idx)

    callback = distill()
    trainer(callbacks=callback).fit(Twice(), loader())
    assert len(callback.teacher.shown) == 2


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor", "ignore:Found `dataloader_iter`")
def test_one_trainer_fits_twice_with_every_form_of_the_step(trainer: Make) -> None:
    class NoIndex(ValidatedClassifier):
        def training_step(self, batch: Any) -> Any:
            return {"loss": super().training_step(batch, 0), "more": 1}

    class Iterates(ValidatedClassifier):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step([part.to(self.device) for part in batch], batch_idx)

    for kind in (NoIndex, Iterates):
        callback, module = distill(validate=False), kind()
        run = trainer(callbacks=callback, max_epochs=1)
        run.fit(module, loader(), loader())
        run.fit_loop.max_epochs = 3
        run.fit(module, loader(), loader())
        assert len(callback.teacher.shown) == 12
        assert "training_step" not in vars(module)
        assert "training_step" not in vars(run.strategy)


@pytest.mark.parametrize("fails", [False, True])
def test_two_callbacks_on_layers_that_come_late_leave_nothing(trainer: Make, fails: bool) -> None:
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__()
            del self.model

        def configure_model(self) -> None:
            if not hasattr(self, "model"):
                self.model = Mlp(5)

    first = DistillCallback(Asked(), FeatureDistillation("body", "body"), name="first")
    second = DistillCallback(Asked(), FeatureDistillation("head", "head"), name="second")
    stop = At(on_train_epoch_end=lambda *_: 1 / 0 if fails else None)
    module = Late()
    run = trainer(callbacks=[first, second, stop], max_epochs=1)
    if fails:
        with pytest.raises(ZeroDivisionError):
            run.fit(module, loader())
    else:
        run.fit(module, loader())
    assert (len(first.teacher.shown), len(second.teacher.shown)) == (4, 4)
    assert hooks(module) == []
    assert "training_step" not in vars(module)
    assert not any("Patch" in type(value).__name__ for value in vars(run.strategy).values())


def test_a_module_may_hold_its_callback_while_it_is_copied(trainer: Make) -> None:
    callback, module, kept = distill(), ValidatedClassifier(), []
    module.callback = callback

    def take(trainer: Any, module: Any, *_: Any) -> None:
        kept.append(copy.deepcopy(module))

    run = trainer(callbacks=[callback, At(on_train_batch_end=take), EMAWeightAveraging()])
    run.fit(module, loader(), loader())
    assert kept[0].callback._run is None
    assert "log" not in vars(kept[0].callback)
    assert kept[0].callback.teacher is callback.teacher, "the frozen teacher is not copied along"


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "mean": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1),
}


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("distill_first", [True, False])
def test_an_averaged_module_trains_itself_and_is_not_recorded(trainer: Make, name: str, distill_first: bool) -> None:
    callback, average, checked = distill(), AVERAGES[name](), []

    def look(trainer: Any, module: Any, *_: Any) -> None:
        inner = average._average_model if name == "swa" else average._average_model.module
        inner.zero_grad()
        device = next(inner.parameters()).device
        inner.train().training_step([part.to(device) for part in next(iter(loader()))], 0).backward()
        checked.append(all(parameter.grad is not None for parameter in inner.parameters()))
        checked.append(hooks(inner) == [] and "training_step" not in vars(inner))

    ordered = [callback, average] if distill_first else [average, callback]
    trainer(callbacks=[*ordered, At(on_train_batch_end=look)], max_epochs=2).fit(Classifier(), loader())
    assert checked == [True] * 16
    assert len(callback.teacher.shown) == 8


# Recording -----------------------------------------------------------------------------------------------------------


class Momentum(Classifier):
    """Copies its student inside the first step and calls the copy with gradients in every step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if "other" not in self.__dict__:
            loss = super().training_step(batch, batch_idx)
            self.__dict__["other"] = copy.deepcopy(self.model)
            self.__dict__["file"] = pickle.dumps(self.model)
            return loss + self.__dict__["other"](batch[0]).mean() * 0
        return super().training_step(batch, batch_idx) + self.__dict__["other"](batch[0]).mean() * 0


def test_a_copy_of_the_student_made_inside_a_step_is_never_recorded(trainer: Make) -> None:
    callback, module, kept = distill(), Momentum(), []
    take = At(on_train_batch_end=lambda t, m, *_: kept.append(copy.deepcopy(m.model)))
    trainer(callbacks=[callback, take], max_steps=4).fit(module, loader())
    assert len(callback.teacher.shown) == 4
    assert [hooks(network_copy) for network_copy in kept] == [[]] * 4, "between the steps a copy gets no hook"


def test_a_student_pickled_inside_a_step_loads_without_this_package(trainer: Make) -> None:
    module = Momentum()
    trainer(callbacks=distill(), max_steps=1).fit(module, loader())
    file = module.__dict__["file"]
    assert b"lightning_distill" not in file
    assert pickle.loads(file).cpu()(torch.zeros(1, 4)).shape == (1, 3)


def test_a_module_saved_inside_a_step_loads_in_another_process(trainer: Make, tmp_path: Any) -> None:
    class Saves(Momentum):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            torch.save(self.model, tmp_path / "student.pt")
            return loss

    trainer(callbacks=distill(), max_steps=1).fit(Saves(), loader())
    code = (
        "import sys, torch; sys.modules['lightning_distill'] = None\n"
        f"print(torch.load({str(tmp_path / 'student.pt')!r}, 'cpu', weights_only=False)(torch.zeros(1, 4)).shape[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment()
    )
    assert result.stdout.strip() == "3", result.stderr


def environment() -> dict[str, str]:
    """The tests' own modules can be imported there too."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}


def test_a_shallow_copy_that_shares_the_hooks_is_not_recorded(trainer: Make) -> None:
    class Shallow(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + copy.copy(self.model)(batch[0]).mean() * 0

    callback = DistillCallback(Asked(), student="model")
    trainer(callbacks=callback).fit(Shallow(), loader())
    assert len(callback.teacher.shown) == 2


def test_calls_between_the_steps_are_not_recorded(trainer: Make) -> None:
    callback = distill()
    look = At(
        on_train_batch_end=lambda t, m, *_: m.model(torch.zeros(1, 4, device=m.device)),
        on_train_batch_start=lambda t, m, *_: m.model(torch.zeros(1, 4, device=m.device)),
        on_before_zero_grad=lambda t, m, *_: m.model(torch.zeros(1, 4, device=m.device)),
    )
    trainer(callbacks=[callback, look], max_steps=4).fit(Classifier(), loader())
    assert len(callback.teacher.shown) == 4
    assert all(len(x) == 4 for x in callback.teacher.shown)


def test_calls_without_gradients_inside_a_step_are_not_recorded(trainer: Make) -> None:
    class Looks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                self.model(torch.zeros(1, 4, device=self.device))
            return super().training_step(batch, batch_idx)

    callback = distill()
    trainer(callbacks=callback).fit(Looks(), loader())
    assert len(callback.teacher.shown) == 2


def test_features_are_read_after_the_users_own_hooks(trainer: Make) -> None:
    seen: list[Tensor] = []

    class Reads(DistillCallback):
        def teacher_forward(self, call: Any) -> Any:
            seen.append(call.runs["body", "output"][0][0].detach())
            return super().teacher_forward(call)

    module = Classifier()
    handle = module.model.body.register_forward_hook(lambda layer, args, output: output * 0)
    trainer(callbacks=Reads(Asked(), FeatureDistillation("body", "body"), student="model")).fit(module, loader())
    assert len(seen) == 2
    assert all(feature.abs().sum() == 0 for feature in seen)
    handle.remove()
    assert hooks(module) == [], "and the user's hook is the user's to remove"


class Narrow(Mlp):
    """Runs out of memory for large batches, after its first layer."""

    def forward(self, x: Tensor) -> Tensor:
        feature = self.body(x)
        if len(x) > 2:
            raise RuntimeError("out of memory")
        return self.head(self.act(feature))


class Retries(Classifier):
    """Calls the student again with halves of the batch where the whole fails."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        try:
            logits = self.model(x)
        except RuntimeError:
            logits = torch.cat([self.model(half) for half in x.split(2)])
        return F.cross_entropy(logits, y)


def test_a_student_that_fails_and_is_called_again_is_recorded_where_it_worked(trainer: Make) -> None:
    callback = distill()
    trainer(callbacks=callback).fit(Retries(Narrow(5)), loader())
    assert [len(x) for x in callback.teacher.shown] == [2, 2, 2, 2]


def test_equal_numbers_as_in_a_plain_run_where_every_weight_is_zero(trainer: Make) -> None:
    ended = []
    for callbacks in ([], [DistillCallback(Asked(), LogitsDistillation(weight=0.0), student="model")]):
        torch.manual_seed(1)
        module = Classifier(Mlp(5))
        module.model.act = nn.Sequential(nn.ReLU(), nn.Dropout())
        trainer(callbacks=callbacks, max_epochs=2).fit(module, loader())
        ended.append([parameter.tolist() for parameter in module.parameters()])
    assert ended[0] == ended[1]


class ChangesItsInput(Mlp):
    """A teacher whose first operation works in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


@pytest.mark.parametrize("several", [False, True])
def test_a_teacher_that_changes_its_input_in_place_is_refused(trainer: Make, several: bool) -> None:
    # unnoticed, the next teacher would see another input, and the student's own input gradient would be wrong
    teacher: Any = [ChangesItsInput(7, seed=1), Mlp(7, seed=2)] if several else ChangesItsInput(7, seed=1)
    with pytest.raises(ValueError, match="`teacher` to leave its input as it is, but it was changed in place"):
        trainer(callbacks=DistillCallback(teacher, student="model")).fit(Classifier(), loader())


def test_a_teacher_without_a_forward_is_refused_by_its_name(trainer: Make) -> None:
    with pytest.raises(TypeError, match="have a `forward` of its own, but got Classifier"):
        trainer(callbacks=DistillCallback(Classifier(), student="model")).fit(Classifier(), loader())
