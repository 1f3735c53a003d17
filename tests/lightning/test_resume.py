"""L5 and L6: a checkpoint is that of a plain run, plus one entry; training goes on as if it never stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillCallback, DistillModule, FeatureDistillation, LogitsDistillation

MakeTrainer = Callable[..., Trainer]
EPOCHS = 4


def terms() -> list[Any]:
    return [
        LogitsDistillation(weight=0.5),
        FeatureDistillation("model.body", "body", "mse", weight=2.0),
        FeatureDistillation("model.stem", "stem", "l1", name="stem"),
    ]


def callback(**settings: Any) -> DistillCallback:
    return DistillCallback(nets.make(nets.ConvNet, 4, 5), **{"terms": terms(), **settings})


class Module(nets.ForwardModule):
    def __init__(self) -> None:
        super().__init__(nets.make(nets.ConvNet, 3, 3, dropout=0.3))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.03)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


class SeedSteps(Callback):
    """Makes dropout depend on the step alone; a resumed run cannot have the old random state."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(100 + trainer.global_step)


class Crash(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("the machine went away")


def fit(
    trainer: MakeTrainer, *callbacks: Callback, ckpt_path: Any = None, **settings: Any
) -> tuple[nn.Module, Trainer]:
    torch.manual_seed(5)
    module = Module()
    runs = trainer(**{"max_epochs": EPOCHS, **settings}, callbacks=[*callbacks, SeedSteps()])
    runs.fit(module, nets.loader(), nets.loader(7), ckpt_path=ckpt_path)
    return module, runs


def equal(first: Any, second: Any) -> bool:
    """Whether two nested states are the same, tensors bit for bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def layout(value: Any) -> Any:
    """A nested state with tensors replaced by their shapes."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: layout(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [layout(entry) for entry in value]
    return type(value).__name__


def save(folder: Path, monitor: str | None = None, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, monitor=monitor, **{"save_last": True, **settings})


# L6: resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("ckpt", ["last", "best"])
def test_a_crashed_run_resumes_bit_for_bit(trainer: MakeTrainer, tmp_path: Path, epoch: int, ckpt: str) -> None:
    """L6: student, adapters and the adapters' optimizer are those of a run that never stopped."""
    straight = callback()
    expected, _ = fit(trainer, straight)

    keep = save(tmp_path, save_top_k=-1, filename="{epoch}", enable_version_counter=False)
    with pytest.raises(RuntimeError, match="the machine went away"):
        fit(trainer, callback(), keep, Crash(epoch), enable_checkpointing=True)
    path = keep.last_model_path if ckpt == "last" else tmp_path / f"epoch={epoch - 1}.ckpt"
    resumed = callback()
    module, runs = fit(trainer, resumed, ckpt_path=path)

    assert runs.global_step == 3 * EPOCHS
    assert nets.same(nets.snapshot(expected), nets.snapshot(module))
    assert equal(straight.adapter_state(), resumed.adapter_state())
    state = resumed.adapter_state()
    assert sorted(state["adapters"]) == ["model.body", "stem"]
    assert len(state["optimizer"]["state"]) == 4  # AdamW's moments for two weights and two biases


def test_a_run_stopped_by_max_epochs_resumes_with_the_same_callback_object(
    trainer: MakeTrainer, tmp_path: Path
) -> None:
    """L6: what the object remembers of the first run gives way to the checkpoint."""
    straight, again = callback(), callback()
    expected, _ = fit(trainer, straight)
    _, runs = fit(trainer, again, max_epochs=2)
    runs.save_checkpoint(tmp_path / "two.ckpt")
    fit(trainer, again)  # two epochs more in another run, which must leave no trace
    module, _ = fit(trainer, again, ckpt_path=tmp_path / "two.ckpt")
    assert nets.same(nets.snapshot(expected), nets.snapshot(module))
    assert equal(straight.adapter_state(), again.adapter_state())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_resumes_in_the_middle_of_an_epoch(trainer: MakeTrainer, tmp_path: Path) -> None:
    """L6: a checkpoint between two steps; Lightning starts the data over, so that all batches are alike here."""
    x, y = nets.digits(8)
    data = DataLoader(TensorDataset(x.repeat(5, 1, 1, 1), y.repeat(5)), 8)

    def run(steps: int, distill: DistillCallback, ckpt_path: Any = None) -> tuple[nn.Module, Trainer]:
        module = nets.InnerModule(nets.student(), lambda parameters: torch.optim.Adam(parameters, lr=0.02))
        runs = trainer(max_steps=steps, callbacks=[distill])
        runs.fit(module, data, ckpt_path=ckpt_path)
        return module, runs

    def make() -> DistillCallback:
        return DistillCallback(nets.teacher(), FeatureDistillation("layer2", "layer2"))

    straight, resumed = make(), make()
    torch.manual_seed(3)
    expected, _ = run(7, straight)
    torch.manual_seed(3)
    _, first = run(3, make())
    first.save_checkpoint(tmp_path / "three.ckpt")
    module, _ = run(7, resumed, tmp_path / "three.ckpt")
    assert nets.same(nets.snapshot(expected), nets.snapshot(module))
    assert equal(straight.adapter_state(), resumed.adapter_state())


def test_a_checkpoint_resumed_and_saved_before_any_step_keeps_its_adapters(
    trainer: MakeTrainer, tmp_path: Path
) -> None:
    """L6: adapters wait for the first batch; a checkpoint written meanwhile must have them."""
    distill = callback()
    _, runs = fit(trainer, distill, max_epochs=2)
    runs.save_checkpoint(tmp_path / "two.ckpt")

    class SaveAtStart(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "again.ckpt")

    fit(trainer, callback(), SaveAtStart(), ckpt_path=tmp_path / "two.ckpt")
    first, second = (torch.load(tmp_path / f"{name}.ckpt", "cpu")["callbacks"] for name in ("two", "again"))
    assert equal(first[distill.state_key], second[distill.state_key])


def test_a_distilled_checkpoint_resumes_without_the_callback(trainer: MakeTrainer, tmp_path: Path) -> None:
    """L6: the user may stop using the library."""
    _, runs = fit(trainer, callback(), max_epochs=2)
    runs.save_checkpoint(tmp_path / "two.ckpt")
    module, plain = fit(trainer, ckpt_path=tmp_path / "two.ckpt")
    assert plain.global_step == 3 * EPOCHS
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_a_plain_checkpoint_resumes_with_the_callback(trainer: MakeTrainer, tmp_path: Path) -> None:
    """L6: with fresh adapters, as if the callback had started there."""
    plain, runs = fit(trainer, max_epochs=2)
    runs.save_checkpoint(tmp_path / "two.ckpt")
    distill = callback()
    module, resumed = fit(trainer, distill, ckpt_path=tmp_path / "two.ckpt")
    assert resumed.global_step == 3 * EPOCHS
    assert sorted(distill.adapter_state()["adapters"]) == ["model.body", "stem"]
    assert not nets.same(nets.snapshot(plain), nets.snapshot(module))
    assert {int(state["step"]) for state in distill.adapter_state()["optimizer"]["state"].values()} == {6}


@pytest.mark.parametrize("change", ["another shape", "another adapter"])
def test_a_checkpoint_of_other_terms_raises_before_the_first_backward(
    trainer: MakeTrainer, tmp_path: Path, change: str
) -> None:
    """L6: adapters that do not fit do not start from new values silently."""
    _, runs = fit(trainer, callback(), max_epochs=1)
    runs.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt")["state_dict"]
    if change == "another shape":
        other = DistillCallback(nets.make(nets.ConvNet, 4, 6), terms())
    else:
        feature = FeatureDistillation("model.body", "body", adapter=lambda *_: nn.Sequential(nn.Conv2d(6, 10, 1)))
        other = callback(terms=[feature, terms()[2]])
    module = Module()
    with pytest.raises(
        ValueError, match=r"(?s)Expected the saved adapters to fit term 'model\.body', but got .* Resume with"
    ):
        trainer(max_epochs=2, callbacks=[other]).fit(
            module, nets.loader(), nets.loader(7), ckpt_path=tmp_path / "one.ckpt"
        )
    # parameters, not buffers: the first forward pass has moved the running means of batch normalisation
    assert all(torch.equal(saved[name], parameter) for name, parameter in module.named_parameters())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_checkpoint_that_lacks_a_term_with_an_adapter_says_so(trainer: MakeTrainer, tmp_path: Path) -> None:
    """L6: a term added since has no saved adapter."""
    _, runs = fit(trainer, callback(terms=terms()[:2]), max_epochs=1)
    runs.save_checkpoint(tmp_path / "one.ckpt")
    module = Module()
    with pytest.raises(ValueError, match=r"Expected the saved adapters to fit term 'stem'"):
        trainer(max_epochs=2, callbacks=[callback()]).fit(
            module, nets.loader(), nets.loader(7), ckpt_path=tmp_path / "one.ckpt"
        )
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("added", ["logits", "identity"])
def test_a_term_without_an_adapter_may_come_and_go(trainer: MakeTrainer, tmp_path: Path, added: str) -> None:
    """L6: only what was learned must fit."""
    features = terms()[1:2]
    more = LogitsDistillation() if added == "logits" else FeatureDistillation("model.head", "head", adapter=None)
    for name, first, second in (("come", features, [more, *features]), ("go", [more, *features], features)):
        _, runs = fit(trainer, callback(terms=first), max_epochs=1)
        runs.save_checkpoint(tmp_path / f"{name}.ckpt")
        _, resumed = fit(trainer, callback(terms=second), max_epochs=2, ckpt_path=tmp_path / f"{name}.ckpt")
        assert resumed.global_step == 6


# L5: what a checkpoint holds -----------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_plain_one_with_one_entry_more(trainer: MakeTrainer, tmp_path: Path) -> None:
    """L5: the same keys, the same layout of optimizers and schedulers, loadable without running code."""
    keys: list[list[str]] = []
    states: list[dict[str, Any]] = []
    for name, callbacks in (("plain", []), ("distilled", [callback()])):
        module, runs = fit(trainer, *callbacks, max_epochs=1)
        runs.save_checkpoint(tmp_path / f"{name}.ckpt")
        states.append(torch.load(tmp_path / f"{name}.ckpt", weights_only=True))
        keys.append(list(module.state_dict()))
    plain, distilled = states
    assert keys[0] == keys[1] == list(distilled["state_dict"])
    assert plain.keys() == distilled.keys()
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert layout(plain[part]) == layout(distilled[part]), part
    added = set(distilled["callbacks"]) - set(plain["callbacks"])
    assert added == {callback().state_key}
    assert set(distilled["callbacks"][added.pop()]) == {"adapters", "optimizer"}


def test_a_checkpoint_loads_strictly_into_the_bare_network(trainer: MakeTrainer, tmp_path: Path) -> None:
    """L5: and with load_from_checkpoint, without the teacher."""
    module, runs = fit(trainer, callback(), max_epochs=1)
    runs.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    bare = nets.ConvNet(3)
    bare.load_state_dict({key.removeprefix("model."): value for key, value in saved.items()}, strict=True)
    x = nets.digits()[0]
    assert torch.equal(bare.eval()(x), module.model.eval()(x))
    loaded = Module.load_from_checkpoint(tmp_path / "one.ckpt", strict=True)
    assert nets.same(nets.snapshot(loaded), nets.snapshot(module))


def test_the_teacher_is_in_no_checkpoint(trainer: MakeTrainer, tmp_path: Path) -> None:
    """L5, L13: not one of its tensors, by value."""
    distill = callback()
    _, runs = fit(trainer, distill, max_epochs=1)
    runs.save_checkpoint(tmp_path / "one.ckpt")
    saved: list[Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            saved.append(value)
        for entry in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            walk(entry)

    walk(torch.load(tmp_path / "one.ckpt", weights_only=True))
    assert len(saved) > 20
    teacher = [parameter for parameter in distill.teacher.parameters() if parameter.ndim > 1]
    assert not any(
        value.shape == saved_value.shape and torch.equal(value, saved_value)
        for value in teacher
        for saved_value in saved
    )


def test_logits_alone_add_no_entry(trainer: MakeTrainer, tmp_path: Path) -> None:
    """L5: without adapters there is nothing to save."""
    _, runs = fit(trainer, callback(terms=None), max_epochs=1)
    runs.save_checkpoint(tmp_path / "one.ckpt")
    assert "distill" not in str(torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"])


def test_model_checkpoint_can_watch_the_agreement(trainer: MakeTrainer, tmp_path: Path) -> None:
    """L5, L17: best and last are written, and each resumes."""
    keep = save(tmp_path, "distill/val_teacher_agreement", mode="max", filename="best", auto_insert_metric_name=False)
    fit(trainer, callback(), keep, enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["best.ckpt", "last.ckpt"]
    for name in ("best", "last"):
        _, runs = fit(trainer, callback(), ckpt_path=tmp_path / f"{name}.ckpt", max_epochs=EPOCHS + 1)
        assert runs.global_step == 3 * (EPOCHS + 1)


def test_a_distill_module_resumes_bit_for_bit(trainer: MakeTrainer, tmp_path: Path) -> None:
    """L6: also with its own callback."""

    def run(epochs: int, ckpt_path: Any = None) -> tuple[DistillModule, Trainer]:
        torch.manual_seed(5)
        module = DistillModule(nets.student(), nets.teacher(), FeatureDistillation("layer2", "layer2"))
        runs = trainer(max_epochs=epochs)
        runs.fit(module, nets.loader(), nets.loader(7), ckpt_path=ckpt_path)
        return module, runs

    straight, _ = run(4)
    _, first = run(2)
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = run(4, tmp_path / "two.ckpt")
    assert nets.same(nets.snapshot(straight), nets.snapshot(resumed))
    assert equal(straight.distill.adapter_state(), resumed.distill.adapter_state())
