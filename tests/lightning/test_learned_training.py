"""Losses with parameters in training: they are adapters in all but name (L3, L5, L6)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_distill import (
    DistillCallback,
    Distiller,
    DistillModule,
    FeatureDistillation,
    MaskedGenerativeLoss,
    SelfDistillation,
    Tap,
    VariationalInformationLoss,
)

MakeTrainer = Callable[..., Trainer]
EPOCHS = 4


def terms(weight: float = 0.01) -> list[FeatureDistillation]:
    """Both losses, on maps of other channels than the teacher's, at ``body`` and ``stem``."""
    return [
        FeatureDistillation("body", "body", VariationalInformationLoss(), weight=0.5),
        FeatureDistillation("stem", "stem", MaskedGenerativeLoss(mask_ratio=0.3), weight=weight),
    ]


def teacher() -> nn.Module:
    return nets.make(nets.ConvNet, 4, 5)


class SeedSteps(Callback):
    """Makes masks depend on the step alone; a resumed run cannot have the old random state."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(100 + trainer.global_step)


def through_callback(**settings: Any) -> tuple[LightningModule, DistillCallback]:
    module = nets.InnerModule(nets.make(nets.ConvNet, 3, 3), lambda p: torch.optim.AdamW(p, lr=0.01))
    return module, DistillCallback(teacher(), terms(**settings), student="model")


def through_module(**settings: Any) -> tuple[LightningModule, DistillCallback]:
    module = DistillModule(nets.make(nets.ConvNet, 3, 3), teacher(), terms(**settings))
    return module, module.distill


def fit(
    trainer: MakeTrainer,
    made: tuple[LightningModule, DistillCallback],
    *more: Callback,
    path: Path | None = None,
    **settings: Any,
) -> Trainer:
    module, distill = made
    own = [] if isinstance(module, DistillModule) else [distill]
    runs = trainer(**{"max_epochs": EPOCHS, **settings}, callbacks=[*own, SeedSteps(), *more])
    torch.manual_seed(5)
    runs.fit(module, nets.loader(), *[nets.loader(7)] * isinstance(module, DistillModule), ckpt_path=path)
    return runs


ways = pytest.mark.parametrize("way", [through_callback, through_module], ids=["callback", "module"])
NAMES = {
    "body": {"learned.0.rho", *(f"learned.0.mean.{index}.weight" for index in (0, 2, 4))},
    "stem": {f"{part}.{kind}" for part in ("adapters.0", "learned.0.generator.0", "learned.0.generator.2")
             for kind in ("weight", "bias")},
}  # fmt: skip


@ways
def test_every_parameter_changes_in_training_and_none_is_the_students(trainer: MakeTrainer, way: Any) -> None:
    """L5: two fits, of one step and of more, from the same seed."""
    plain = nets.snapshot(nets.make(nets.ConvNet, 3, 3)).keys()
    states = []
    for steps in (1, 3):
        module, distill = way()
        runs = fit(trainer, (module, distill), max_epochs=None, max_steps=steps)
        states.append(distill.adapter_state())
        names = {name.removeprefix("model.").removeprefix("student.") for name in module.state_dict()}
        assert names == plain
        assert sum(len(group["params"]) for group in runs.optimizers[0].param_groups) == len(list(module.parameters()))
    for term, names in NAMES.items():
        first, second = (state["adapters"][term] for state in states)
        assert first.keys() == second.keys() == names
        assert not any(torch.equal(first[name], second[name]) for name in names)


@pytest.mark.exact
def test_student_and_parameters_equal_a_loop_with_one_optimizer(trainer: MakeTrainer) -> None:
    """L3: bit for bit, masks included."""
    module, distill = through_callback()
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)
    starts: list[Any] = []

    class Start(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            starts.append(
                [{name: value.clone() for name, value in term.state_dict().items()} for term in distill.terms]
            )

    fit(trainer, (module, distill), Start(), max_epochs=1)

    student, wise = nets.make(nets.ConvNet, 3, 3), teacher().eval()
    information, generation, adapter = (
        VariationalInformationLoss(),
        MaskedGenerativeLoss(mask_ratio=0.3),
        nn.Conv2d(3, 5, 1),
    )
    information.build(torch.Size((8, 6, 2, 2)), torch.Size((8, 10, 2, 2)))
    generation.build(torch.Size((8, 5, 4, 4)), torch.Size((8, 5, 4, 4)))
    body, stem = starts[0]
    information.load_state_dict({name.removeprefix("learned.0."): value for name, value in body.items()})
    parts = nn.ModuleDict({"learned": nn.ModuleList([generation]), "adapters": nn.ModuleList([adapter])})
    parts.load_state_dict(stem)
    trained = [*student.parameters(), *information.parameters(), *parts.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9, nesterov=True)
    for step, (x, y) in enumerate(nets.batches()):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        low = student.stem(x)
        high = student.body(low)
        task = nn.functional.cross_entropy(student.head(student.dropout(high.mean((-2, -1)))), y)
        with torch.no_grad():
            low_teacher = wise.stem(x)
            high_teacher = wise.body(low_teacher)
        loss = task + (0.5 * information(high, high_teacher) + 0.01 * generation(adapter(low), low_teacher))
        loss.backward()
        optimizer.step()

    assert nets.same(nets.snapshot(module.model), nets.snapshot(student))
    assert nets.same(nets.snapshot(distill.terms[0].learned[0]), nets.snapshot(information))
    assert nets.same(nets.snapshot(distill.terms[1].learned[0]), nets.snapshot(generation))


@ways
def test_the_student_learns_from_a_learned_loss(trainer: MakeTrainer, way: Any) -> None:
    finals = []
    for weight in (0.01, 0.02):
        module, distill = way(weight=weight)
        fit(trainer, (module, distill), max_epochs=1)
        finals.append(module.state_dict())
    assert not torch.equal(*(next(iter(final.values())) for final in finals))


@ways
def test_a_stopped_run_resumes_bit_for_bit(trainer: MakeTrainer, tmp_path: Path, way: Any) -> None:
    """L6: parameters of the losses and their optimizer's state, as the adapters'."""
    straight = way()
    fit(trainer, straight)
    expected = straight[1].adapter_state()
    runs = fit(trainer, way(), max_epochs=2)
    runs.save_checkpoint(tmp_path / "two.ckpt")

    module, distill = way()
    resumed = fit(trainer, (module, distill), path=tmp_path / "two.ckpt")

    assert resumed.global_step == 3 * EPOCHS
    assert nets.same(straight[0].state_dict(), module.state_dict())
    for term, names in NAMES.items():
        for name in names:
            assert torch.equal(distill.adapter_state()["adapters"][term][name], expected["adapters"][term][name])
    actual_state, expected_state = (state["optimizer"]["state"] for state in (distill.adapter_state(), expected))
    assert len(actual_state) == sum(map(len, NAMES.values()))
    assert all(torch.equal(actual_state[key]["exp_avg"], expected_state[key]["exp_avg"]) for key in expected_state)


def test_a_checkpoint_is_that_of_a_plain_run_with_one_entry_more(trainer: MakeTrainer, tmp_path: Path) -> None:
    """L5: loads strictly into the bare network, without running code."""
    module, distill = through_callback()
    keep = ModelCheckpoint(tmp_path, filename="one")
    fit(trainer, (module, distill), keep, max_epochs=1, enable_checkpointing=True)

    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    bare = nets.ConvNet(3)
    bare.load_state_dict({name.removeprefix("model."): value for name, value in saved["state_dict"].items()})
    assert nets.same(nets.snapshot(bare), nets.snapshot(module.model))
    assert {term: state.keys() for term, state in saved["callbacks"][distill.state_key]["adapters"].items()} == NAMES


def test_a_checkpoint_of_another_loss_raises_before_the_first_backward(trainer: MakeTrainer, tmp_path: Path) -> None:
    """L6: no silent fresh start."""
    fit(trainer, through_callback(), max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    module, _ = through_callback()
    other = DistillCallback(teacher(), FeatureDistillation("body", "body"), student="model")
    with pytest.raises(ValueError, match=r"(?s)Expected the saved adapters to fit term 'body', but got .*learned\.0"):
        trainer(callbacks=[other], max_epochs=2).fit(module, nets.loader(), ckpt_path=tmp_path / "one.ckpt")
    assert all(parameter.grad is None for parameter in module.parameters())


def distilled(*terms: FeatureDistillation, dtype: torch.dtype = torch.float32, count: int = 1) -> Distiller:
    """A distiller after its first step."""
    student = nets.make(nets.ConvNet, 3, 3).to(dtype)
    teachers = [nets.make(nets.ConvNet, 9, 5 + index).to(dtype) for index in range(count)]
    distiller = Distiller(student, teachers if count > 1 else teachers[0], list(terms))
    distiller.follow(torch.optim.SGD(student.parameters(), lr=0.1))
    with distiller, distiller.record():
        x = nets.digits()[0].to(dtype)
        distiller.total(student(x).square().mean(), None).backward()
    return distiller


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_parameters_have_the_precision_of_the_comparison(dtype: torch.dtype) -> None:
    """As wide as the features, and float32 at least: an adapter may be narrower."""
    own_terms = terms()
    distilled(*own_terms, dtype=dtype)

    wide = torch.promote_types(dtype, torch.float32)
    assert {parameter.dtype for term in own_terms for parameter in term.learned.parameters()} == {wide}
    assert {parameter.dtype for parameter in own_terms[1].adapters.parameters()} == {dtype}
    assert all(parameter.grad.isfinite().all() for term in own_terms for parameter in term.parameters())


def test_parameters_move_with_the_term() -> None:
    term = terms()[0]
    (owned,) = distilled(term).terms

    owned.to("meta", torch.float64)

    assert {(parameter.device.type, parameter.dtype) for parameter in owned.parameters()} == {("meta", torch.float64)}


def test_every_pair_of_layers_and_every_teacher_has_parameters_of_its_own() -> None:
    loss = VariationalInformationLoss()
    term = FeatureDistillation(["stem", "body"], ["stem", "body"], loss)
    distilled(term, count=2)

    widths = [len(loss_copy.rho) for loss_copy in term.learned]
    assert widths == [5, 10, 6, 12]  # teacher by teacher
    assert all(loss_copy.rho.grad.abs().min() > 0 for loss_copy in term.learned)
    assert not loss.state_dict()  # what was passed stays as it was, and may serve another term


def test_a_user_s_adapter_comes_before_a_learned_loss() -> None:
    """The mean then maps the adapter's output."""
    term = FeatureDistillation("body", "body", VariationalInformationLoss(), adapter=nn.Conv2d(6, 2, 1))
    distilled(term)

    assert term.learned[0].mean[0].weight.shape == (10, 2, 1, 1)
    assert term.adapters[0].weight.grad.abs().max() > 0


def test_a_larger_map_of_the_teacher_is_resized() -> None:
    term = FeatureDistillation("body", "stem", MaskedGenerativeLoss(mask="channel"))
    distilled(term)

    assert term.adapters[0].weight.shape == (5, 6, 1, 1)


def test_a_frozen_parameter_of_a_loss_is_not_trained() -> None:
    class Fixed(VariationalInformationLoss):
        def build(self, student: torch.Size, teacher: torch.Size) -> None:
            super().build(student, teacher)
            self.rho.requires_grad_(False)

    term = FeatureDistillation("body", "body", Fixed())
    assert len(distilled(term).parameters()) == 3


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (FeatureDistillation("head", "body", VariationalInformationLoss()), r"same number of dimensions, 2 to 5, but"),
        (FeatureDistillation("head", "head", MaskedGenerativeLoss()), r"to have positions for mask='spatial', but got"),
        (
            FeatureDistillation(Tap("body", where="input"), "body", MaskedGenerativeLoss(), adapter=None),
            r"student feature 'body' and teacher feature 'body' to have equal shapes, but got .* Pass adapter=.auto",
        ),
    ],
    ids=["dimensions", "positions", "shapes"],
)  # fmt: skip
def test_shapes_that_do_not_fit_raise_before_the_first_backward(
    trainer: MakeTrainer, term: FeatureDistillation, words: str
) -> None:
    """Nothing has been trained by then."""
    module = nets.InnerModule(nets.make(nets.ConvNet, 3, 3))
    callback = DistillCallback(teacher(), term, student="model")
    with pytest.raises(ValueError, match=words):
        trainer(callbacks=[callback]).fit(module, nets.loader())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_learned_loss_serves_self_distillation() -> None:
    """Between two layers of the student; the deep one gets no gradient."""
    student = nets.student()
    term = SelfDistillation("layer1", "layer2", VariationalInformationLoss())
    with Distiller(student, None, term) as distiller:
        distiller.follow(torch.optim.SGD(student.parameters(), lr=0.1))
        with distiller.record():
            student(nets.digits()[0])
        distiller.total(torch.zeros(())).backward()

    assert term.learned[0].rho.grad.abs().min() > 0
    assert student.layer1.weight.grad.abs().max() > 0
    assert student.layer2.weight.grad is None
