"""Every family of networks teaches every other one: a loop by hand, or an error that says what to pass."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vision_families as families
from nets import make
from timm_families import TIMM
from torch import Tensor, nn
from vision_families import FAMILIES, Family

from lightning_distill import Distiller, FeatureDistillation


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(family: Family, seed: int) -> nn.Module:
    return make(family.make, seed).double()


def feature(module: nn.Module, family: Family, images: Tensor) -> Tensor:
    """The feature as the table describes it, read with a plain hook."""
    outputs: list[Any] = []
    handle = module.get_submodule(family.layer).register_forward_hook(lambda *call: outputs.append(call[2]))
    module(pixel_values=images)
    handle.remove()
    return family.by_hand(outputs[0])


def to_the_smaller(student: Tensor, teacher: Tensor, *, both_maps: bool) -> tuple[Tensor, Tensor]:
    """Two maps resized by hand; two layers that return maps keep the student's size."""
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    if both_maps:
        size = student.shape[2:]
        averaged = F.adaptive_avg_pool2d(teacher, [min(a, b) for a, b in zip(size, teacher.shape[2:], strict=True)])
        return student, F.interpolate(averaged, size, mode="bilinear")
    size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return tuple(F.interpolate(each, size, mode="bilinear", antialias=True) for each in (student, teacher))


def returns_maps(name: str) -> bool:
    return name not in ("vit", "dino", "clip", "swin", "embedding", "timm vit", "timm registers")


ALL = {**FAMILIES, **TIMM}
# Each network of timm with the others of timm, and with tokens, maps and a vector of the other families.
BESIDE_TIMM = [*TIMM, "vit", "resnet", "embedding"]
PAIRS = [*itertools.product(FAMILIES, repeat=2)]
PAIRS += [pair for pair in itertools.product(BESIDE_TIMM, repeat=2) if not set(pair) <= set(FAMILIES)]
FITTING = [pair for pair in PAIRS if len({ALL[name].grid == () for name in pair}) == 1]


@pytest.mark.parametrize(("student_name", "teacher_name"), FITTING)
def test_two_steps_equal_a_loop_by_hand(student_name: str, teacher_name: str) -> None:
    families_of_both = ALL[student_name], ALL[teacher_name]
    if student_name == teacher_name and not returns_maps(student_name):
        # tokens of equal number are compared one by one, class tokens included
        families_of_both = (replace(ALL[student_name], by_hand=families.as_it_is),) * 2
    student, teacher = (network(family, seed) for seed, family in enumerate(families_of_both))
    by_hand = copy.deepcopy(student)
    images = make(torch.randn, 5, 2, 3, families.PIXELS, families.PIXELS).double()
    term = FeatureDistillation(*(family.tap for family in families_of_both))
    optimizer, optimizer_by_hand = (torch.optim.SGD(each.parameters(), lr=0.01) for each in (student, by_hand))
    adapter: nn.Module | None = None
    with Distiller(student, teacher, term, task_weight=0) as distiller:
        distiller.follow(optimizer)
        for _ in range(2):
            with distiller.record():
                student(pixel_values=images)
            loss = distiller.loss()
            if adapter is None:
                adapter = copy.deepcopy(distiller.terms[0].adapters[0])
                optimizer_by_hand.add_param_group({"params": list(adapter.parameters())})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            with torch.no_grad():
                target = feature(teacher, families_of_both[1], images)
            own = feature(by_hand, families_of_both[0], images)
            if own.ndim == 4:
                both_maps = returns_maps(student_name) and returns_maps(teacher_name)
                own, target = to_the_smaller(own, target, both_maps=both_maps)
            expected = F.mse_loss(adapter(own), target)
            optimizer_by_hand.zero_grad()
            expected.backward()
            optimizer_by_hand.step()
            torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for trained, hand in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(trained, hand, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("student_name", "teacher_name"), [pair for pair in PAIRS if pair not in FITTING])
def test_a_vector_for_positions_says_what_to_pass(student_name: str, teacher_name: str) -> None:
    pair = ALL[student_name], ALL[teacher_name]
    student, teacher = (network(family, seed) for seed, family in enumerate(pair))
    images = torch.randn(2, 3, families.PIXELS, families.PIXELS).double()
    with Distiller(student, teacher, FeatureDistillation(*(family.tap for family in pair))) as distiller:
        with distiller.record():
            student(pixel_values=images)
        with pytest.raises(ValueError, match=r'Pass adapter="pool".*or name the pooling layer that follows'):
            distiller.loss()


@pytest.mark.parametrize(("student_name", "teacher_name"), [pair for pair in PAIRS if "embedding" in pair])
def test_pooled_features_equal_means_by_hand(student_name: str, teacher_name: str) -> None:
    pair = ALL[student_name], ALL[teacher_name]
    student, teacher = (network(family, seed) for seed, family in enumerate(pair))
    images = make(torch.randn, 5, 2, 3, families.PIXELS, families.PIXELS).double()
    term = FeatureDistillation(*(family.tap for family in pair), adapter="pool")
    with Distiller(student, teacher, term, task_weight=0) as distiller:
        with distiller.record():
            student.eval()(pixel_values=images)
        loss = distiller.loss()
        means = [feature(each, family, images) for each, family in zip((student, teacher), pair, strict=True)]
        means = [each if each.ndim == 2 else each.mean((2, 3)) for each in means]
        torch.testing.assert_close(loss, F.mse_loss(distiller.terms[0].adapters[0](means[0]), means[1]))


def test_the_table_has_the_grids_that_it_says() -> None:
    for family in ALL.values():
        module = network(family, 0)
        images = torch.randn(2, 3, families.PIXELS, families.PIXELS).double()
        assert feature(module, family, images).shape[2:] == torch.Size(family.grid)


def test_networks_of_timm_are_in_the_table() -> None:
    if not TIMM:
        pytest.skip("timm is not installed; `make install` brings it")
    assert len(TIMM) == 6
    assert len([pair for pair in PAIRS if set(pair) & set(TIMM)]) == 72
