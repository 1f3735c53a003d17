"""The teacher's state and the trainer's precisions (L13, L14), against loops written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelSummary
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny import Classifier, Mlp, loader
from torch import Tensor, nn

from lightning_distill import DistillCallback, DistillModule, FeatureDistillation, LogitsDistillation, SoftTargetLoss

DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
}


class Watched(Mlp):
    """A teacher that notes the state that each forward finds it in."""

    def __init__(self, width: int, seed: int = 1) -> None:
        super().__init__(width, seed)
        self.inner = nn.BatchNorm1d(width)
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(self.act(self.body(x)))
        out = self.head(hidden)
        self.seen.append(
            (
                any(module.training for module in self.modules()),
                any(parameter.requires_grad for parameter in self.parameters()),
                torch.is_grad_enabled(),
                self.body.weight.dtype,
                x.dtype,
                out.dtype,
            )
        )
        return out


def terms() -> list[Any]:
    return [LogitsDistillation(weight=0.5), FeatureDistillation("body", "body", weight=2.0)]


def soft_targets(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Hinton's loss in plain words of its own: T^2 sum p (log p - log q), mean over the batch."""
    p, log_q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * (p * (p.log() - log_q)).sum(-1).mean()


def same(left: nn.Module, right: nn.Module) -> None:
    for (name, actual), (_, expected) in zip(left.named_parameters(), right.named_parameters(), strict=True):
        torch.testing.assert_close(actual.cpu(), expected.cpu(), msg=lambda text, name=name: f"{name}: {text}")


# L13: the teacher ------------------------------------------------------------------------------------------------


def test_l13_teacher_is_in_eval_mode_without_gradients_at_each_forward_even_after_train(trainer):
    class Wakes(Classifier):
        def __init__(self, teacher):
            super().__init__()
            self.keep = [teacher]

        def training_step(self, batch, batch_idx):
            self.keep[0].train()
            self.keep[0].requires_grad_(True)
            return super().training_step(batch, batch_idx)

    teacher = Watched(7)
    before = copy.deepcopy(teacher.state_dict())
    trainer(callbacks=DistillCallback(teacher, terms()), max_steps=3).fit(Wakes(teacher), loader())
    assert [entry[:3] for entry in teacher.seen] == [(False, False, False)] * 3
    for name, value in before.items():  # BatchNorm's statistics too
        assert torch.equal(value, teacher.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
@pytest.mark.parametrize("student", [None, "model"])
def test_a_teacher_that_the_module_keeps_itself_is_held_and_given_back(trainer, student):
    """Much code keeps the teacher beside the student, and gives all parameters to the optimizer."""
    module, teacher = Classifier(), Watched(7)
    module.teacher = teacher
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer(callbacks=DistillCallback(teacher, terms(), student=student)).fit(module, loader())
    assert teacher.seen
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_l13_teacher_is_absent_from_state_dict_optimizer_and_summary(trainer):
    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.parameters = [
                id(p) for optimizer in trainer.optimizers for g in optimizer.param_groups for p in g["params"]
            ]
            self.keys = set(pl_module.state_dict())
            self.summary = ModelSummary()._summary(trainer, pl_module).total_parameters

    teacher, student, looks = Watched(7), Classifier(), Looks()
    plain = {name: value.shape for name, value in student.state_dict().items()}
    callback = DistillCallback(teacher, terms())
    trainer(callbacks=[callback, looks]).fit(student, loader())
    assert callback.adapter_state(), "the run had adapters"
    assert looks.parameters == [id(parameter) for parameter in student.parameters()]
    assert looks.keys == set(plain)
    assert looks.summary == sum(parameter.numel() for parameter in student.parameters())


def test_l13_teacher_is_absent_from_ema_copies(trainer):
    teacher = Watched(7)
    module = DistillModule(Mlp(5), teacher, terms(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    ema = EMAWeightAveraging()
    seen = {}

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            copied = ema._average_model
            seen["modules"] = [type(part).__name__ for part in copied.modules()]
            seen["numel"] = sum(parameter.numel() for parameter in copied.parameters())
            seen["teacher"] = copied.module.distill.teacher is teacher

    trainer(callbacks=[ema, Looks()]).fit(module, loader(), loader())
    assert "Watched" not in seen["modules"]
    assert seen["numel"] == sum(parameter.numel() for parameter in module.student.parameters())
    assert seen["teacher"], "an EMA copy of the module shares the teacher and does not copy it"


def test_l13_teacher_dtype_works_under_a_float32_trainer_and_is_given_back_unrounded(trainer):
    teacher, student = Watched(7), Classifier(lr=0.05)
    before, oracle = copy.deepcopy(teacher), copy.deepcopy(student)
    callback = DistillCallback(teacher, LogitsDistillation(weight=0.5), teacher_dtype="bfloat16")
    trainer(callbacks=callback, max_steps=3).fit(student, loader())
    assert {entry[3:] for entry in teacher.seen} == {(torch.bfloat16,) * 3}
    for name, value in before.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name]), name
        assert value.dtype == teacher.state_dict()[name].dtype

    half = before.eval().bfloat16()
    optimizer = oracle.configure_optimizers()
    for x, y in list(loader())[:3]:
        logits = oracle.model(x)
        with torch.no_grad():
            target = half(x.bfloat16()).float()
        optimizer.zero_grad()
        (F.cross_entropy(logits, y) + 0.5 * soft_targets(logits, target)).backward()
        optimizer.step()
    same(student, oracle)


# L14: precisions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_l14_gradients_equal_a_hand_written_step_in_every_precision(trainer, precision):
    student, teacher = Classifier(), Watched(5)
    dtype, mixed = DTYPES[precision], precision.endswith("mixed")
    oracle, oracle_teacher = (
        copy.deepcopy(student).to(DEVICE, dtype),
        copy.deepcopy(teacher).eval().requires_grad_(False).to(DEVICE, dtype),
    )
    callback = DistillCallback(
        teacher, [LogitsDistillation(weight=0.5), FeatureDistillation("body", "body", weight=2.0, adapter=None)]
    )
    trainer(callbacks=callback, precision=precision, max_steps=2).fit(student, loader())

    optimizer = oracle.configure_optimizers()
    for x, y in list(loader())[:2]:
        x, y = x.to(DEVICE, dtype), y.to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
            feature = oracle.model.body(x)
            logits = oracle.model.head(oracle.model.act(feature))
            task = F.cross_entropy(logits, y)
            teacher_feature = oracle_teacher.body(x)
            target = oracle_teacher.head(oracle_teacher.inner(oracle_teacher.act(teacher_feature)))
        wide = torch.float64 if precision == "64-true" else torch.float32
        loss = (
            task
            + 0.5 * soft_targets(logits.to(wide), target.to(wide))
            + 2.0 * (feature.to(wide) - teacher_feature.to(wide)).square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    same(student, oracle)
    assert {entry[3] for entry in teacher.seen[:2]} == {dtype}


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_l14_losses_are_computed_in_float32_or_better_and_adapters_learn(trainer, precision):
    seen = []

    def spy(student: Tensor, teacher: Tensor) -> Tensor:
        seen.append(
            (student.dtype, teacher.dtype, torch.is_autocast_enabled(DEVICE), (student - teacher).square().mean().dtype)
        )
        return (student - teacher).square().mean()

    wide = torch.float64 if precision == "64-true" else torch.float32
    callback = DistillCallback(Watched(7), [LogitsDistillation(spy), FeatureDistillation("body", "body", spy)])
    student = Classifier()
    run = trainer(callbacks=callback, precision=precision, max_steps=1)
    run.fit(student, loader())
    first = copy.deepcopy(callback.adapter_state())
    assert set(seen) == {(wide, wide, False, wide)}
    run = trainer(callbacks=callback, precision=precision, max_steps=3)
    run.fit(student, loader())
    for name, value in callback.adapter_state()["adapters"]["body"].items():
        assert value.isfinite().all()
        assert not torch.equal(value, first["adapters"]["body"][name]), f"{name} was not trained"


class Overflow(Callback):
    """Puts an infinity into a gradient of one step, after the backward pass."""

    def __init__(self, where: str, at: int) -> None:
        self.where, self.at, self.steps = where, at, []

    def on_after_backward(self, trainer, pl_module):
        callback = next(item for item in trainer.callbacks if isinstance(item, DistillCallback))
        adapters = [parameter for term in callback.terms for parameter in term.parameters()]
        if trainer.fit_loop.epoch_loop.batch_idx == self.at:
            target = pl_module.model.head.bias if self.where == "student" else adapters[0]
            target.grad.view(-1)[0] = float("inf")

    def on_train_batch_end(self, trainer, pl_module, *_):
        callback = next(item for item in trainer.callbacks if isinstance(item, DistillCallback))
        adapters = [parameter for term in callback.terms for parameter in term.parameters()]
        scale = trainer.precision_plugin.scaler.get_scale()
        self.steps.append(
            (scale, [p.detach().clone() for p in pl_module.parameters()], [p.detach().clone() for p in adapters])
        )


@pytest.mark.parametrize("clip", [None, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("where", ["student", "adapter"])
def test_l14_on_overflow_student_and_adapters_skip_together_and_the_next_step_recovers(trainer, where, clip):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    callback, overflow, student = DistillCallback(Watched(7), terms()), Overflow(where, at=1), Classifier()
    run = trainer(
        callbacks=[callback, overflow],
        plugins=MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler),
        max_steps=4,
        gradient_clip_val=clip,
    )
    run.fit(student, loader(rows=32))
    scales, students, adapters = zip(*overflow.steps, strict=True)
    assert list(scales[:3]) == [1024.0, 512.0, 512.0]
    for parts, name in ((students, "student"), (adapters, "adapter")):
        assert all(torch.equal(a, b) for a, b in zip(parts[0], parts[1], strict=True)), f"{name} stepped on an overflow"
        assert any(not torch.equal(a, b) for a, b in zip(parts[1], parts[2], strict=True)), f"{name} did not recover"
        assert all(part.isfinite().all() for step in parts for part in step)


@pytest.mark.parametrize("where", [None, "student", "adapter"])
def test_l14_mixed_precision_equals_a_hand_written_loop_with_one_optimizer_for_both(trainer, where):
    teacher, student = Watched(7), Classifier()
    oracle = copy.deepcopy(student).to(DEVICE)
    oracle_teacher = copy.deepcopy(teacher).to(DEVICE).eval().requires_grad_(False)
    callback, overflow = DistillCallback(teacher, terms()), Overflow(where or "", at=1 if where else -1)
    first = {}

    class Start(Callback):
        def on_after_backward(self, trainer, pl_module):
            if not first:
                first["adapter"] = copy.deepcopy(callback.terms[1].adapters[0])

    plugin = MixedPrecision("16-mixed", DEVICE, torch.amp.GradScaler(DEVICE, init_scale=1024.0))
    trainer(callbacks=[callback, Start(), overflow], plugins=plugin, max_steps=4).fit(student, loader(rows=32))

    adapter, scaler = first["adapter"], torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    adapter.zero_grad()
    optimizer = torch.optim.SGD([*oracle.parameters(), *adapter.parameters()], lr=0.1, momentum=0.9)
    for index, (x, y) in enumerate(list(loader(rows=32))[:4]):
        x, y = x.to(DEVICE), y.to(DEVICE)
        with torch.autocast(DEVICE, torch.float16):
            feature = oracle.model.body(x)
            logits = oracle.model.head(oracle.model.act(feature))
            task = F.cross_entropy(logits, y)
            teacher_feature = oracle_teacher.body(x)
            target = oracle_teacher.head(oracle_teacher.inner(oracle_teacher.act(teacher_feature)))
            mapped = adapter(feature)
        loss = (
            task
            + 0.5 * soft_targets(logits.float(), target.float())
            + 2.0 * (mapped.float() - teacher_feature.float()).square().mean()
        )
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if where and index == 1:
            spoiled = oracle.model.head.bias if where == "student" else next(adapter.parameters())
            spoiled.grad.view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    same(student, oracle)
    same(callback.terms[1].adapters[0], adapter)


@pytest.mark.gpu
def test_l14_mixed_precision_on_a_gpu_skips_and_recovers(trainer):
    callback, overflow, student = DistillCallback(Watched(7), terms()), Overflow("adapter", at=1), Classifier()
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    plugin = MixedPrecision(precision="16-mixed", device="cuda", scaler=scaler)
    run = trainer(callbacks=[callback, overflow], plugins=plugin, max_steps=4, accelerator="gpu")
    run.fit(student, loader(rows=32))
    scales, students, adapters = zip(*overflow.steps, strict=True)
    assert list(scales[:3]) == [1024.0, 512.0, 512.0]
    for parts in (students, adapters):
        assert all(torch.equal(a, b) for a, b in zip(parts[0], parts[1], strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(parts[1], parts[2], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "16-mixed", "16-true"])
def test_l13_teacher_is_on_the_gpu_in_the_trainers_precision_and_back_on_the_cpu_afterwards(trainer, precision):
    teacher = Watched(7)
    callback = DistillCallback(teacher, [LogitsDistillation(SoftTargetLoss(temperature=2.0))])
    trainer(callbacks=callback, precision=precision, accelerator="gpu").fit(Classifier(), loader())
    assert {entry[3] for entry in teacher.seen} == {DTYPES.get(precision, torch.float32)}
    assert {parameter.device.type for parameter in teacher.parameters()} == {"cpu"}
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
