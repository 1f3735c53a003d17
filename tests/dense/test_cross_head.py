"""The student's features through the teacher's frozen head: values by hand, gradients, structures, wrong settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from scenes import VOID, Net, Scenes, Segmenter, close, loader, stacked, with_boxes
from torch import Tensor, nn

from lightning_distill import (
    CrossHeadDistillation,
    DistillCallback,
    Distiller,
    QualityFocalLoss,
    SoftTargetLoss,
    SolutionFlowLoss,
    Tap,
    TeacherCache,
    VariationalInformationLoss,
)
from lightning_distill.adapters.shapes import calls_of, describe
from lightning_distill.functional import quality_focal

BATCH = with_boxes([*Scenes(2, 16)])
IMAGES = BATCH["images"]
INTO_HEAD = Tap("head", output="*", where="input")
FROM_HEAD = Tap("head", output="*")


def value(term: Any, student: nn.Module, teacher: Any) -> tuple[Tensor, Distiller]:
    distiller = Distiller(student, teacher, term, task_weight=0)
    with distiller.record():
        output = student(IMAGES)
    return distiller.total(output.mean(), BATCH), distiller


def into_head(net: Net, images: Tensor = IMAGES) -> list[Tensor]:
    return [*net.neck(images).values()]


def test_the_predictions_of_all_levels_are_compared() -> None:
    student, teacher = Net(3, 0), Net(5, 1)

    total, distiller = value(CrossHeadDistillation(INTO_HEAD, FROM_HEAD), student, teacher)

    (term,) = distiller.terms
    assert [tuple(adapter.weight.shape) for adapter in term.adapters] == [(5, 3, 1, 1)] * 2
    crossed = teacher.head([adapter(m) for adapter, m in zip(term.adapters, into_head(student), strict=True)])
    losses = [quality_focal(a, b).mean() for a, b in zip(crossed, teacher.head(into_head(teacher)), strict=True)]
    close(total, sum(losses) / 2)


def test_a_head_may_be_cut_where_each_level_runs_through_it() -> None:
    """CrossKD's own form: the student's tower, then the teacher's last layer, level by level."""
    student, teacher = Net(3, 0), Net(5, 1)
    towers = [Tap("head.tower", call=level) for level in range(2)]
    scores = [Tap("head.scores", call=level) for level in range(2)]

    total, distiller = value(CrossHeadDistillation(towers, scores, SoftTargetLoss(1.0)), student, teacher)

    losses = []
    for adapter, feature, target in zip(
        distiller.terms[0].adapters, into_head(student), into_head(teacher), strict=True
    ):
        crossed = teacher.head.scores(adapter(student.head.tower(feature)))
        expected = teacher.head.scores(teacher.head.tower(target).relu())
        losses.append(SoftTargetLoss(1.0)(crossed, expected))
    close(total, sum(losses) / 2)


def test_gradients_reach_the_student_s_features_and_neither_the_teacher_nor_the_student_s_head() -> None:
    student, teacher = Net(3, 0), Net(5, 1)

    total, distiller = value(CrossHeadDistillation(INTO_HEAD, FROM_HEAD), student, teacher)
    total.backward()

    assert all(parameter.grad.any() for parameter in student.neck.parameters())
    assert all(parameter.grad is None for parameter in [*student.head.parameters(), *teacher.parameters()])
    assert all(adapter.weight.grad.any() for adapter in distiller.terms[0].adapters)


def test_equal_features_make_equal_predictions() -> None:
    total, distiller = value(CrossHeadDistillation(INTO_HEAD, FROM_HEAD), Net(3, 1), Net(3, 1))

    assert total.item() == 0
    assert [type(adapter) for adapter in distiller.terms[0].adapters] == [nn.Identity] * 2


def test_a_head_that_changes_its_input_in_place_is_refused() -> None:
    teacher = Net(3, 1)
    teacher.head.forward = lambda maps: [teacher.head.scores(each.relu_()) for each in maps]

    with pytest.raises(ValueError, match=r"a later layer changed it in place\. Tap that later layer, or build it with"):
        value(CrossHeadDistillation(INTO_HEAD, FROM_HEAD), Net(3, 0), teacher)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_teacher_in_another_precision_reads_the_features_in_its_own(dtype: torch.dtype) -> None:
    distiller = Distiller(
        Net(3, 0), Net(5, 1), CrossHeadDistillation(INTO_HEAD, FROM_HEAD), task_weight=0, teacher_dtype=dtype
    )
    with distiller.record():
        output = distiller.student(IMAGES)

    total = distiller.total(output.mean())
    total.backward()

    assert torch.isfinite(total)
    assert distiller.student.neck.fine.weight.grad.any()


def test_under_autocast_the_loss_is_computed_in_float32() -> None:
    distiller = Distiller(Net(3, 0), Net(5, 1), CrossHeadDistillation(INTO_HEAD, FROM_HEAD), task_weight=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with distiller.record():
            output = distiller.student(IMAGES)
        total = distiller.total(output.mean())

    assert total.dtype == torch.float32


def test_several_teachers_have_a_head_and_adapters_each() -> None:
    student, teachers = Net(3, 0), [Net(4, 1), Net(5, 2)]

    total, distiller = value(CrossHeadDistillation(INTO_HEAD, FROM_HEAD, "mse"), student, teachers)

    adapters = distiller.terms[0].adapters
    assert [adapter.weight.shape[0] for adapter in adapters] == [4, 4, 5, 5]
    losses = []
    for number, teacher in enumerate(teachers):
        pair = adapters[2 * number : 2 * number + 2]
        crossed = teacher.head([adapter(m) for adapter, m in zip(pair, into_head(student), strict=True)])
        losses += [F.mse_loss(a, b) for a, b in zip(crossed, teacher.head(into_head(teacher)), strict=True)]
    close(total, sum(losses) / 4)


def test_void_pixels_do_not_count_at_any_level() -> None:
    student, teacher = Net(3, 0), Net(3, 1)
    term = CrossHeadDistillation(INTO_HEAD, FROM_HEAD, "mse", ignore_index=VOID)

    total, _ = value(term, student, teacher)

    losses = []
    for a, b in zip(teacher.head(into_head(student)), teacher.head(into_head(teacher)), strict=True):
        counted = F.adaptive_avg_pool2d((BATCH["labels"] != VOID).float(), a.shape[2:]) >= 0.5
        losses.append((a - b).square().mean(1)[counted].mean())
    close(total, sum(losses) / 2)


def test_positions_in_boxes_count_alone() -> None:
    everywhere, _ = value(CrossHeadDistillation(INTO_HEAD, FROM_HEAD), Net(3, 0), Net(3, 1))
    inside, _ = value(CrossHeadDistillation(INTO_HEAD, FROM_HEAD, boxes="boxes"), Net(3, 0), Net(3, 1))

    assert inside != everywhere


# How heads are called -------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    fine: Tensor
    coarse: Tensor


class Two(nn.Module):
    """A network whose head takes two maps in one of several forms."""

    def __init__(self, width: int, seed: int, form: str) -> None:
        super().__init__()
        self.base, self.form = Net(width, seed), form
        self.head = {"tuple": OneArgument, "list": OneArgument, "dict": OneArgument}.get(form, TwoArguments)(width)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.base.neck(images)
        fine, coarse = maps.values()
        calls = {
            "arguments": lambda: self.head(fine, coarse),
            "keywords": lambda: self.head(fine=fine, coarse=coarse),
            "tuple": lambda: self.head((fine, coarse)),
            "list": lambda: self.head([fine, coarse]),
            "dict": lambda: self.head({"a": fine, "b": coarse}),
        }
        return calls[self.form]()


class TwoArguments(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(width)
            self.scores = nn.Conv2d(width, 4, 1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        return self.scores(fine) + F.interpolate(self.scores(coarse.tanh()), fine.shape[2:])


class OneArgument(TwoArguments):
    def forward(self, maps: Any) -> Tensor:
        return super().forward(*(maps.values() if isinstance(maps, dict) else maps))


@pytest.mark.parametrize("form", ["arguments", "keywords", "tuple", "list", "dict"])
def test_the_teacher_s_head_is_called_as_in_the_teacher(form: str) -> None:
    student, teacher = Two(3, 0, form), Two(5, 1, form)

    total, distiller = value(CrossHeadDistillation(INTO_HEAD, "head", "mse"), student, teacher)

    adapters = distiller.terms[0].adapters
    maps = [adapter(m) for adapter, m in zip(adapters, student.base.neck(IMAGES).values(), strict=True)]
    crossed = TwoArguments.forward(teacher.head, *maps)
    close(total, F.mse_loss(crossed, teacher(IMAGES)))


# In a training --------------------------------------------------------------------------------------------------------


def test_a_trainer_trains_the_student_through_the_head_and_leaves_the_teacher_as_it_was() -> None:
    teacher = Net(5, 1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    distill = DistillCallback(teacher, CrossHeadDistillation(INTO_HEAD, FROM_HEAD), task_weight=0.0)
    module = Segmenter(Net(3, 0))
    head = module.net.head.scores.weight.clone()
    trainer = Trainer(
        callbacks=[distill], max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, loader(stacked))

    assert "distill/cross_head_loss" in trainer.callback_metrics
    assert not torch.equal(module.net.neck.fine.weight, Net(3, 0).neck.fine.weight)
    assert torch.equal(module.net.head.scores.weight, head)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_process_without_a_batch_makes_the_same_adapters_from_the_noted_shapes() -> None:
    student = Net(3, 0)
    _, distiller = value(CrossHeadDistillation(INTO_HEAD, FROM_HEAD), student, Net(5, 1))
    term = distiller.terms[0]
    with distiller.record():
        student(IMAGES)
    (call,) = distiller._step.student.find()
    shapes = describe(term, call, distiller._step.answers(call))

    fresh = CrossHeadDistillation(INTO_HEAD, FROM_HEAD)
    fresh.build(*calls_of(fresh, shapes, torch.device("cpu")))

    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in term.state_dict().items()}


# Wrong settings -------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_quality_focal_loss_unless_another_is_passed() -> None:
    assert isinstance(CrossHeadDistillation("a", "b").loss, QualityFocalLoss)


@pytest.mark.parametrize("loss", [VariationalInformationLoss(), SolutionFlowLoss()])
def test_losses_of_features_are_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected `loss` to compare two predictions without parameters of its own"):
        CrossHeadDistillation(["a", "b"], ["a", "b"], loss)


@pytest.mark.parametrize("layer", [Tap("head", where="input"), ""])
def test_the_teacher_s_layer_must_be_one_that_predicts(layer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"Expected `teacher_layer` to be a part of the teacher that makes predictions"
    ):
        CrossHeadDistillation("neck", layer)


def test_a_head_that_takes_more_maps_than_the_student_gives_is_refused() -> None:
    words = (
        r"Expected student layer 'neck.fine' to give the 2 tensors that teacher layer 'head' takes, but got 1. Pass"
        r" Tap\('neck.fine', output='\*'\) for all of a list, or tap what goes into the student's own head."
    )
    with pytest.raises(ValueError, match=words):
        value(CrossHeadDistillation("neck.fine", FROM_HEAD), Net(3, 0), Net(5, 1))


class Flat(nn.Module):
    """Flattens the fine or the coarse map."""

    def __init__(self, level: str) -> None:
        super().__init__()
        self.neck, self.flatten, self.level = Net(3, 0).neck, nn.Flatten(2), level

    def forward(self, images: Tensor) -> Tensor:
        return self.flatten(self.neck(images)[self.level])


def test_predictions_of_other_shapes_are_refused() -> None:
    into = Tap("flatten", where="input")

    with pytest.raises(ValueError, match=r"to make predictions of equal shapes from both networks' features, but got"):
        value(CrossHeadDistillation(into, "flatten", "mse"), Flat("coarse"), Flat("fine"))


def test_a_cache_has_no_head(tmp_path: Any) -> None:
    data = [(scene, target["mask"]) for scene, target in Scenes(2, 16)]
    cache = TeacherCache.build(Net(3, 1), data, tmp_path / "cache", layers=["neck.fine"], progress=False)

    with pytest.raises(ValueError, match=r"Expected `teacher` to be a network for term 'cross_neck.fine', which reads"):
        Distiller(Net(3, 0), cache, CrossHeadDistillation("neck.fine", "neck.fine"))
