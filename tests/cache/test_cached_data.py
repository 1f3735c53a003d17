"""Data that change between reads are refused, however rarely they change; patches can be removed in any order."""

from __future__ import annotations

import functools
import itertools
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cached_loading import Doubled, Numbers, answers_for
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset

from distill_core.store import fingerprint
from lightning_distill import CacheError, Distiller, LogitMSELoss, LogitsDistillation, TeacherCache
from lightning_distill.cache import IndexedBatch
from lightning_distill.cache.data import changes_between_reads, find_rows, leaves
from lightning_distill.patch import MethodPatch


class Rarely(Numbers):
    """Changes a sample with a small probability."""

    def __init__(self, samples: int, probability: float, draw: Any) -> None:
        super().__init__(samples)
        self.probability, self.draw = probability, draw

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(index)
        return (-x - 1 if self.draw() < self.probability else x), y


def own_generator() -> Any:
    return np.random.default_rng(0).random


@pytest.mark.parametrize("samples", [30, 5000])
@pytest.mark.parametrize("draw", [lambda: float(torch.rand(())), np.random.rand, own_generator()])
def test_augmentation_that_acts_rarely_is_noticed(samples: int, draw: Any) -> None:
    assert changes_between_reads(Rarely(samples, 0.02, draw), None)
    assert not changes_between_reads(Rarely(samples, 0.0, draw), None)


class Picture:
    """As the images of PIL: an array by its interface alone, and a text with its place in the memory."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    @property
    def __array_interface__(self) -> Any:
        return self.values.__array_interface__


@dataclass(repr=False)
class Sample:
    values: np.ndarray


@dataclass(slots=True)
class Slots:
    values: np.ndarray


class Slot:
    __slots__ = "values"

    def __init__(self, values: np.ndarray) -> None:
        self.values = values


class Graph:
    """It holds itself, as trees with links to their roots do."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.root = values, self


class Summary(Graph):
    def __repr__(self) -> str:
        return f"Summary(shape={self.values.shape})"


def of_objects(values: np.ndarray) -> Any:
    array = np.empty(1, dtype=object)
    array[0] = values.tolist()
    return array


MAKERS: list[Any] = [Picture, Sample, Slots, Slot, Graph, Summary, of_objects]


@pytest.mark.parametrize("make", [*MAKERS, lambda values: UserDict(x=torch.tensor(values))])
def test_samples_of_equal_content_are_equal_whatever_holds_them(make: Any) -> None:
    values = np.arange(5000)
    other = values.copy()
    other[2500] = -1
    kept = [make(array) for array in (values, values.copy(), other)]
    keys = [fingerprint(leaves([sample])) for sample in kept]
    assert keys[0] == keys[1] != keys[2]


def test_slow_data_are_read_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    class Slow(Numbers):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            reads.append(index)
            return super().__getitem__(index)

    clock = itertools.count(step=3.0)
    monkeypatch.setitem(changes_between_reads.__globals__, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert not changes_between_reads(Slow(5000), None)
    assert len(reads) == 2 * 9


def test_a_generator_of_its_own_is_named_where_a_seed_is_given(tmp_path: Path) -> None:
    data = Rarely(20, 0.5, own_generator())
    words = r"transform_seed=0 seeds torch, NumPy's global state and random: .* a generator of your own"
    with pytest.raises(CacheError, match=words):
        answers_for(data, tmp_path, transform_seed=0)
    with pytest.raises(CacheError, match=r"Pass transform_seed=0, which makes the augmentation of each sample"):
        answers_for(data, tmp_path)


def test_the_rows_of_parts_of_parts(tmp_path: Path) -> None:
    data = Numbers(12)
    manifest = answers_for(data, tmp_path).manifest
    part = Subset(Subset(data, np.arange(11, -1, -1)), torch.tensor([0, 2, 4]))  # type: ignore[arg-type]
    assert list(find_rows(part, manifest)) == [11, 9, 7]  # type: ignore[arg-type]
    assert list(find_rows(ConcatDataset([Subset(data, [5]), part]), manifest)) == [5, 11, 9, 7]  # type: ignore[arg-type]
    assert find_rows(ConcatDataset([part, Numbers(3)]), manifest) is None
    assert find_rows(iter(()), manifest) is None


def test_other_data_are_read_once_however_deep_they_are_nested(tmp_path: Path) -> None:
    reads = []

    class Counted(Numbers):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            reads.append(index)
            return super().__getitem__(index)

    manifest = answers_for(Numbers(12), tmp_path).manifest
    nested: Any = Counted(12, first=5)
    for _ in range(6):
        nested = Subset(nested, range(6))
    assert find_rows(nested, manifest) is None
    assert len(reads) == len(set(reads)) == 8


def test_a_plain_loop_finds_the_rows_in_the_batch(tmp_path: Path) -> None:
    data, student = Numbers(12), nn.Linear(2, 2)
    cache = answers_for(data, tmp_path)
    term = LogitsDistillation(LogitMSELoss())
    attached = torch.utils.data.DataLoader(cache.attach(Subset(data, [7, 1, 4, 9])), batch_size=2)
    with (
        Distiller(student, cache, term) as distiller,
        Distiller(student, Doubled(), LogitsDistillation(LogitMSELoss())) as live,
    ):
        for indexed in attached:
            assert type(indexed) is IndexedBatch
            totals = []
            for distilled, batch in ((distiller, indexed), (live, indexed.batch)):
                with distilled.record():
                    student(indexed.batch[0])
                totals.append(distilled.total(torch.zeros(()), batch).item())
            assert totals[0] == pytest.approx(totals[1])
        with distiller.record():
            student(indexed.batch[0])
        with pytest.raises(CacheError, match=r"In a loop of your own pass the batch of `cache.attach\(dataset\)`"):
            distiller.total(torch.zeros(()), indexed.batch)  # no state of the batch before is kept


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_patches_can_be_removed_in_any_order(order: tuple[int, ...]) -> None:
    owner = SimpleNamespace(value=lambda: "")
    original = owner.value
    patches = [MethodPatch(owner, "value", lambda below, mark=mark: below() + mark) for mark in "abc"]
    left = {*"abc"}
    for number in order:
        assert owner.value() == "".join(sorted(left))
        patches[number].undo()
        left.discard("abc"[number])
    assert owner.value is original


def test_a_patch_leaves_a_foreign_wrapper_alone() -> None:
    class Owner:
        def value(self) -> str:
            return "plain"

    owner: Any = Owner()
    patch = MethodPatch(owner, "value", lambda below: below() + ", patched")
    below = owner.value

    @functools.wraps(below)
    def foreign() -> str:
        return f"foreign({below()})"

    owner.value = foreign
    assert owner.value() == "foreign(plain, patched)"
    patch.undo()
    assert owner.value is foreign
    assert owner.value() == "foreign(plain)"


def test_changed_inputs_are_a_setting_of_the_opened_cache(tmp_path: Path) -> None:
    answers_for(Numbers(3), tmp_path)
    assert not TeacherCache.open(tmp_path).allow_changed_inputs
    assert TeacherCache.open(tmp_path, allow_changed_inputs=True).allow_changed_inputs
