"""Teachers that expect other images than the student: other statistics, sizes and entries of the batch."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import make
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_distill import (
    CacheError,
    DistillCallback,
    Distiller,
    FeatureDistillation,
    LogitsDistillation,
    Normalize,
    TeacherCache,
)
from lightning_distill.compat import redefined

STUDENT = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TEACHER = ((0.5, 0.25, 0.75), (0.5, 0.125, 0.25))


def by_hand(images: Tensor) -> Tensor:
    """From the student's images back to numbers from 0 to 1, and on to the teacher's, one channel after the other."""
    channels = [
        (images[:, index] * STUDENT[1][index] + STUDENT[0][index] - TEACHER[0][index]) / TEACHER[1][index]
        for index in range(3)
    ]
    return torch.stack(channels, 1)


class Network(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 2)

    def forward(self, pixel_values: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(scale * self.body(pixel_values).mean((2, 3)))


def darken(images: Tensor) -> Tensor:
    return images * 0.5


def test_between_undoes_the_students_statistics_and_applies_the_teachers() -> None:
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(Normalize.between(STUDENT, TEACHER)(images), by_hand(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "expected"), [(8, (8, 8)), ((3, 5), (3, 5)), (None, (4, 6))])
def test_images_are_resized(size: Any, expected: tuple[int, int]) -> None:
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    changed = Normalize.between(student=STUDENT, teacher=TEACHER, size=size)(images)
    resized = F.interpolate(by_hand(images), expected, mode="bilinear", antialias=True)
    torch.testing.assert_close(changed, resized, rtol=1e-12, atol=1e-12)


def test_it_takes_the_forms_of_a_networks_inputs() -> None:
    change, images = Normalize.between(STUDENT, TEACHER), torch.randn(2, 3, 4, 4)
    expected, others = change(images), torch.ones(2)
    first, second = change((images, others))
    assert torch.equal(first, expected)
    assert second is others
    entries = {"pixel_values": images, "scale": others}
    assert torch.equal(change(entries)["pixel_values"], expected)
    assert change(entries)["scale"] is others
    assert entries["pixel_values"] is images
    assert torch.equal(change({"x": images, "mask": others})["x"], expected)
    assert change(images.half()).dtype == torch.float16


def test_its_settings_are_shown_compared_and_pickled() -> None:
    change = Normalize.between(([0.5], [0.5]), ([0.25], [0.25]), size=8)
    assert repr(change) == "Normalize(mean=(-0.5,), std=(0.5,), size=(8, 8))"
    assert pickle.loads(pickle.dumps(change)) == change
    assert change != Normalize.between(([0.5], [0.5]), ([0.25], [0.25]))


@pytest.mark.parametrize(
    ("student", "teacher", "size", "error", "words"),
    [
        (STUDENT, ((0.5,), (0.5,)), None, ValueError, "the same number of channels, but got 3 and 1"),
        (STUDENT, ((0.5, 0.5, 0.5), (0.5, 0.5)), None, ValueError, r"`teacher\[0\]` and `teacher\[1\]` .* 3 and 2"),
        (((0.5,), (0.0,)), ((0.5,), (0.5,)), None, ValueError, r"`student\[1\]\[0\]` to be greater than 0"),
        (STUDENT[0], STUDENT, None, TypeError, "`student` to be a pair of mean and standard deviation"),
        ((0.5, 0.5), STUDENT, None, TypeError, r"`student\[0\]` to be a list or tuple with a number for each"),
        (STUDENT, TEACHER, 0, ValueError, "`size` to be greater than 0"),
        (STUDENT, TEACHER, 2.5, TypeError, "`size` to be an int"),
        (STUDENT, TEACHER, (1, 2, 3), ValueError, "`size` to be a number or a pair of height and width"),
    ],
)
def test_wrong_statistics_are_refused(student: Any, teacher: Any, size: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        Normalize.between(student, teacher, size)


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        (torch.ones(2, 4, 4, 3), ValueError, r"images of 3 channels in dimension 1, .* \(2, 4, 4, 3\)"),
        (torch.ones(3, 4, 4), ValueError, "with four dimensions"),
        (torch.ones(2, 3, 4, 4, dtype=torch.uint8), TypeError, "`images` to be a floating point tensor, but .*uint8"),
        ("image", TypeError, "images as a tensor, but got a str"),
        ((), ValueError, "images in the student's inputs, but got none"),
        (
            {"a": torch.ones(1, 3, 2, 2), "b": torch.ones(1, 3, 2, 2)},
            ValueError,
            r"'pixel_values', .*\['a', 'b'\]",
        ),
    ],
)
def test_inputs_without_such_images_are_refused(inputs: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        Normalize.between(STUDENT, TEACHER)(inputs)


def test_the_teacher_gets_its_own_images_and_the_student_keeps_its_own() -> None:
    student, teacher, images = make(Network, 1), make(Network, 2, 6), torch.randn(2, 3, 4, 4)
    change = Normalize.between(STUDENT, TEACHER, size=6)
    term = FeatureDistillation("body", "body")
    with Distiller(student, teacher, term, task_weight=0, teacher_inputs=change) as distiller:
        with distiller.record():
            student(pixel_values=images)
        loss = distiller.loss()
    target = F.adaptive_avg_pool2d(teacher.body(change(images)), 4)
    torch.testing.assert_close(loss, F.mse_loss(distiller.terms[0].adapters[0](student.body(images)), target))


class Timm(Network):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": STUDENT[0], "std": STUDENT[1], "input_size": (3, 224, 224), **config}


@pytest.mark.parametrize("config", [{"mean": (0.5,) * 3}, {"std": (0.5,) * 3}, {"input_size": (3, 518, 518)}])
def test_networks_that_expect_other_images_are_a_warning(config: Any) -> None:
    name = next(iter(config))
    with pytest.warns(UserWarning, match=rf"different images, {name}=.*Pass teacher_inputs=Normalize\.between"):
        Distiller(nn.Sequential(Timm()), nn.Sequential(Timm(**config)))


def test_networks_of_equal_images_and_own_inputs_of_the_teacher_pass_without_a_warning() -> None:
    class Object:
        mean, std = (0.5,) * 3, (0.5,) * 3

        def __init__(self) -> None:
            self.mean, self.std = (0.5,) * 3, (0.5,) * 3

    other = Network()
    other.default_cfg = Object()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Distiller(Timm(), Timm())
        Distiller(Network(), Timm())
        Distiller(Timm(), other, teacher_inputs=Normalize.between(STUDENT, TEACHER))
    with pytest.warns(UserWarning, match="different images, mean="):
        Distiller(Timm(), other)


def test_teachers_that_disagree_about_the_images_are_refused() -> None:
    teachers = [Timm(), Timm(mean=(0.5,) * 3)]
    with pytest.raises(ValueError, match=r"networks for the same images, .* mean=.* Wrap each one in a module"):
        Distiller(Network(), teachers, teacher_inputs=Normalize.between(STUDENT, TEACHER))

    class Chooses(DistillCallback):
        def teacher_forward(self, call: Any) -> list[Any]:
            return [teacher(call.args[0]) for teacher in self.teacher]

    assert redefined(Chooses(teachers), "teacher_forward")
    assert not redefined(DistillCallback(teachers), "teacher_forward")


# The cache ------------------------------------------------------------------------------------------------------------


def test_a_cache_is_built_from_the_teachers_inputs(tmp_path: Path) -> None:
    data, teacher = TensorDataset(torch.randn(5, 3, 4, 4), torch.arange(5) % 2), make(Network, 2)
    change = Normalize.between(STUDENT, TEACHER, size=6)
    settings: dict[str, Any] = {"dtype": "float32", "progress": False}
    cache = TeacherCache.build(teacher, data, tmp_path, teacher_inputs=change, **settings)
    rows = torch.from_numpy(cache.read(range(5))["output"])
    torch.testing.assert_close(rows, teacher(change(data.tensors[0])).detach(), rtol=1e-5, atol=1e-6)
    TeacherCache.build(teacher, data, tmp_path, teacher_inputs=Normalize.between(STUDENT, TEACHER, 6), **settings)
    with pytest.raises(CacheError, match=r"was begun with teacher=.*Normalize\(.* and now it is"):
        TeacherCache.build(teacher, data, tmp_path, teacher_inputs=Normalize.between(STUDENT, TEACHER), **settings)
    with pytest.raises(CacheError, match="was begun with teacher="):
        TeacherCache.build(teacher, data, tmp_path, **settings)
    TeacherCache.open(tmp_path, teacher=teacher, teacher_inputs=change)
    with pytest.raises(CacheError, match=r"to be of teacher_inputs=None, but it was built with Normalize\("):
        TeacherCache.open(tmp_path, teacher=teacher)
    with pytest.raises(ValueError, match=r"`teacher_inputs` to be None with a cache.*Pass it to TeacherCache\.build"):
        Distiller(Network(), cache, LogitsDistillation(), teacher_inputs=change)


def test_a_cache_knows_a_function_by_its_source_and_refuses_one_without_a_name(tmp_path: Path) -> None:
    data, teacher = TensorDataset(torch.randn(3, 3, 4, 4), torch.arange(3) % 2), make(Network, 2)
    settings: dict[str, Any] = {"dtype": "float32", "progress": False}
    cache = TeacherCache.build(teacher, data, tmp_path / "cache", teacher_inputs=darken, **settings)
    rows = torch.from_numpy(cache.read(range(3))["output"])
    torch.testing.assert_close(rows, teacher(data.tensors[0] * 0.5).detach(), rtol=1e-5, atol=1e-6)
    assert cache.manifest.teacher["inputs"].split()[0].endswith("darken")
    for nameless in (lambda images: images * 0.5, nn.Identity()):
        with pytest.raises(CacheError, match=r"`teacher_inputs` to have a name that a cache can keep"):
            TeacherCache.build(teacher, data, tmp_path / "other", teacher_inputs=nameless, **settings)
    with pytest.raises(CacheError, match="`forward` or `teacher_inputs`, but got both"):
        TeacherCache.build(
            teacher, data, tmp_path / "x", teacher_inputs=darken, forward=lambda network, batch: None, **settings
        )


def test_a_cache_finds_the_teachers_inputs_in_the_batch(tmp_path: Path) -> None:
    data = [{"pixel_values": torch.randn(3, 4, 4), "teacher": torch.randn(3, 4, 4)} for _ in range(3)]
    teacher = make(Network, 2)
    cache = TeacherCache.build(teacher, data, tmp_path, teacher_inputs="teacher", dtype="float32", progress=False)
    expected = teacher(torch.stack([sample["teacher"] for sample in data])).detach()
    torch.testing.assert_close(torch.from_numpy(cache.read(range(3))["output"]), expected, rtol=1e-5, atol=1e-6)
