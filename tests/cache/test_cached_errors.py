"""Training data and calls that a cache has no outputs for are refused with a clear error, before the first update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cached_loading import SAMPLES, Numbers, Stream, Student, answers_for, fitted, is_untouched, loader
from torch.utils.data import DataLoader, Subset

from lightning_distill import CacheError, TeacherCache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return answers_for(Numbers(), tmp_path_factory.mktemp("numbers"))


BAD: dict[str, Any] = {
    "stream": (
        lambda: loader(Stream()),
        r"^Expected a map-style data set with a length, but got Stream: the items of a stream",
    ),
    "other length": (lambda: loader(Numbers(SAMPLES + 1)), rf"the {SAMPLES} items .*, but got {SAMPLES + 1}\."),
    "other part": (lambda: loader(Subset(Numbers(9), [1, 2])), r"but got 2, a part of 9\."),
    "other samples": (lambda: loader(Numbers(first=5)), r"but some items differ"),
    "not a loader": (lambda: [(torch.zeros(4, 2), torch.zeros(4))], r"^Expected the training data to be a torch Data"),
    "several": (
        lambda: {"a": loader(Numbers()), "b": loader(Numbers())},
        r"^Expected one training DataLoader over the data that the cache was built from, but got several",
    ),
    "none of several": (
        lambda: {"a": loader(Numbers(3)), "b": loader(Stream())},
        r"but got Numbers \(3 items\), Stream \(a stream\)\.",
    ),
    "single samples": (lambda: loader(Numbers(), batch_size=None), r"^Expected a data loader that makes batches"),
    "keys": (lambda: DataLoader(Numbers(), batch_sampler=[["a", "b"]]), r"sampler to give indices .*, but got 'a'"),
}


@pytest.mark.parametrize("name", BAD)
def test_data_that_do_not_fit_are_refused_with_a_clear_error(cache: TeacherCache, name: str) -> None:
    make, words = BAD[name]
    data, module = make(), Student()
    with pytest.raises(CacheError, match=words):
        fitted(cache, data, module)
    assert not module.got
    for used in data.values() if isinstance(data, dict) else [data]:
        assert is_untouched(used) if isinstance(used, DataLoader) else True


def test_a_loader_that_keeps_its_iterator_is_noticed(cache: TeacherCache) -> None:
    class Keeps(DataLoader[Any]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.__dict__["kept"] = super().__iter__()

        def __iter__(self) -> Any:
            return self.kept

    with pytest.raises(CacheError, match=r"^Expected the batch to carry the teacher's outputs, but it came from else"):
        fitted(cache, Keeps(Numbers(), batch_size=4))


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_takes_an_iterator_is_refused(cache: TeacherCache) -> None:
    class Iterates(Student):
        def training_step(self, dataloader_iter: Any) -> Any:
            raise AssertionError

    with pytest.raises(Exception, match="Expected `training_step` to take a batch where the teacher is a cache"):
        fitted(cache, loader(Numbers()), Iterates())


@pytest.mark.parametrize("part", [slice(0, 2), [0, 1, 2, 3, 0]], ids=["fewer", "more"])
def test_a_call_with_another_number_of_examples_is_refused(cache: TeacherCache, part: Any) -> None:
    class Part(Student):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(batch[0][part]).sum()

    number = 2 if isinstance(part, slice) else 5
    with pytest.raises(CacheError, match=rf"called with the 4 examples of the batch, .* but got {number}\."):
        fitted(cache, loader(Numbers()), Part())
