"""Rows are found by the sample's own key: in parts, streams and mixtures of the data (C18)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_nets import Module, network, table
from cache_nets import difference as weights_differ
from cache_nets import trained as fitted
from ragged_data import Padding, Sample, Sentences, built, difference, teacher, trained
from token_nets import LENGTHS
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, get_worker_info, random_split

from distill_core.keys import digest
from lightning_distill import (
    CacheError,
    Distiller,
    FeatureDistillation,
    LogitsDistillation,
    SequenceDistillation,
    TeacherCache,
    content_key,
)

NUMBER = len(LENGTHS)


class Stream(IterableDataset[Sample]):
    """The sentences as a stream; each worker reads a part of it."""

    def __init__(self, order: Any = range(NUMBER)) -> None:
        self.order = list(order)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        order = self.order if worker is None else self.order[worker.id :: worker.num_workers]
        yield from (Sentences()[index] for index in order)


class Table:
    """Acts like ``datasets.Dataset``: neither a class of torch nor a list, and reads batches of indices."""

    def __len__(self) -> int:
        return NUMBER

    def __getitem__(self, index: int) -> Sample:
        return Sentences()[index]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        return [self[index] for index in indices]


class Batches(IterableDataset[Any]):
    """Acts like WebDataset: a stream that makes its batches by itself, with their keys."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, NUMBER, 5):
            samples = [Sentences()[index] for index in range(start, min(start + 5, NUMBER))]
            yield {"__key__": [sample["id"] for sample in samples], **Padding()(samples)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return built(tmp_path_factory.mktemp("keyed"), key="id")


def part() -> Dataset[Any]:
    return random_split(Sentences(), [15, 9], torch.Generator().manual_seed(2))[0]  # type: ignore[arg-type]


DATA = {
    "all": Sentences,
    "a part of random_split": part,
    "a Subset in another order": lambda: Subset(Sentences(), list(range(NUMBER))[::-1]),
    "parts together": lambda: ConcatDataset([Subset(Sentences(), [4, 2]), part(), Subset(Sentences(), [2, 9, 11])]),
    "a list": lambda: [Sentences()[index] for index in range(3, 20)],
    "a table": Table,
    "a stream": lambda: Stream(range(4, NUMBER)),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", DATA)
def test_c18_the_weights_are_those_of_a_live_teacher(cache: TeacherCache, data: str, workers: int) -> None:
    """C18: whatever holds the samples."""
    live, cached = (
        trained(source, Padding("left"), DATA[data](), num_workers=workers) for source in (teacher(), cache)
    )
    assert difference(live, cached) < 1e-6


@pytest.mark.parametrize("data", [part, Stream, Table])
def test_c18_the_data_that_were_built_from_may_be_any(tmp_path: Path, data: Any) -> None:
    """C18: a part of random_split trains on that part, a stream on its samples in another order."""
    cache = built(tmp_path, data(), key="id")
    samples = [data()[index] for index in range(len(data()))] if hasattr(data(), "__len__") else list(data())
    live, cached = (trained(source, Padding(), samples[::-1]) for source in (teacher(), cache))
    assert difference(live, cached) < 1e-6
    assert cache.manifest.length == len(samples)
    assert TeacherCache.open(tmp_path, teacher=teacher(), dataset=data()).manifest.key == cache.manifest.key


def test_c18_a_part_needs_no_keys_if_it_is_the_one_of_the_build(tmp_path: Path) -> None:
    """C2: a cache built from one part of random_split trains on that part."""
    cache = built(tmp_path, part())
    live, cached = (trained(source, Padding(), part()) for source in (teacher(), cache))
    assert difference(live, cached) < 1e-6


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_c18_a_stream_is_cut_into_the_same_rows_by_any_workers(tmp_path: Path, workers: int) -> None:
    """C18: a worker that ends early leaves a short batch among the others'."""

    class Uneven(Stream):
        def __iter__(self) -> Iterator[Sample]:
            worker = get_worker_info()
            order = range(23) if worker is None or workers < 2 else (range(4), range(4, 23))[worker.id]
            yield from (Sentences()[index] for index in order)

    cache = built(tmp_path, Uneven(), key="id", num_workers=workers, batch_size=3, shard_bytes=2000)
    assert cache.manifest.shards > 2
    cache.verify()
    rows = cache.reader.find(np.array([digest(f"sentence-{index}") for index in range(24)], "uint64"))
    assert sorted(rows.tolist()) == [-1, *range(23)]
    assert cache.read(rows[:23])["output"].lengths.tolist() == list(LENGTHS[:23])


def test_c18_a_stream_that_makes_its_batches_is_read(tmp_path: Path) -> None:
    """C18: with batch_size=None, and its keys in a column of the batch."""
    cache = built(tmp_path, [{**sample, "__key__": sample["id"]} for sample in Stream()], key="__key__")
    loading: dict[str, Any] = {"batch_size": None}
    live, cached = (trained(source, None, Batches(), **loading) for source in (teacher(), cache))
    assert difference(live, cached) < 1e-6
    function = TeacherCache.build(
        teacher(), Stream(), tmp_path / "f", key=content_key, collate_fn=Padding(), progress=False
    )
    with pytest.raises(CacheError, match=r"^Expected a data loader that makes batches of samples, .* batch_size=None"):
        trained(function, None, Batches(), **loading)


@pytest.mark.parametrize("key", [lambda sample: int(sample["id"][9:]), lambda sample: torch.tensor(len(sample["id"]))])
def test_c18_a_function_returns_the_key(tmp_path: Path, key: Any) -> None:
    """C18: it is passed again when the cache is opened."""
    data = [Sentences()[index] for index in (1, 10)]
    built(tmp_path, data, key=key)
    assert TeacherCache.open(tmp_path, key=key, dataset=data[1:]).manifest.key == {"kind": "function"}
    with pytest.raises(CacheError, match=r"^Expected `key` to be the function that the cache was built with, but got"):
        TeacherCache.open(tmp_path)


def test_c18_samples_without_a_name_have_a_digest_as_their_key(tmp_path: Path) -> None:
    """C18: also as tensors instead of lists; changed samples are refused."""
    cache = built(tmp_path, Sentences(), key=content_key)
    assert TeacherCache.open(tmp_path).keys is not None
    tensors = [{**sample, "input_ids": torch.tensor(sample["input_ids"])} for sample in Stream(range(7, 20))]
    live, cached = (trained(source, Padding(), tensors) for source in (teacher(), cache))
    assert difference(live, cached) < 1e-6
    changed = [{**sample, "input_ids": [*sample["input_ids"], 1]} for sample in Stream()]
    with pytest.raises(CacheError, match=r"hold the sample with the key '\w{32}', .* samples were changed since"):
        trained(cache, Padding(), changed)


def test_c18_a_loop_of_your_own_finds_the_rows(cache: TeacherCache) -> None:
    """C18: over a stream and over a part."""
    for data in (Stream([7, 3, 20]), Subset(Sentences(), [7, 3, 20])):
        loader = DataLoader(cache.attach(data), 3, collate_fn=cache.collate(Padding()))  # type: ignore[var-annotated]
        batch = next(iter(loader))
        totals = []
        for source in (cache, teacher()):
            student = teacher()
            student.lm_head.bias.data += torch.arange(13) / 3
            with Distiller(student, source, SequenceDistillation()) as distiller:
                with distiller.record():
                    student(batch.batch["input_ids"], batch.batch["attention_mask"])
                totals.append(distiller.total(torch.zeros(()), batch).item())
        assert totals[0] == pytest.approx(totals[1], rel=1e-5)
        assert totals[0] > 0.1


def test_c18_a_missing_key_is_named(cache: TeacherCache) -> None:
    """C18: before the first step for map-style data, in the worker for a stream."""
    strange = {"id": "another", "input_ids": [1, 2, 3]}
    words = r"^Expected the cache to hold the sample with the key 'another', but it does not \(24 samples\)\. Build a"
    with pytest.raises(CacheError, match=words):
        trained(cache, Padding(), [strange, *Stream()])
    with pytest.raises(CacheError, match=words):
        trained(cache, Padding(), [*Stream(), strange], shuffle=False, steps=9)
    with pytest.raises(CacheError, match=words):
        TeacherCache.open(cache.reader.folder, dataset=[strange])
    with pytest.raises(
        CacheError, match=r"^Expected every sample to have its key at key='id', but got a sample of \['x"
    ):
        trained(cache, Padding(), [{"x": 1}])


def test_c5_c18_other_data_with_the_same_keys_are_refused(tmp_path: Path, cache: TeacherCache) -> None:
    """C5, C18: other tokens of the same number, and images; unless the inputs may differ."""
    other = [{**sample, "input_ids": [7] * len(sample["input_ids"])} for sample in Stream()]
    words = r"Expected the sample with the key 'sentence-\d+' to be the one that the teacher got, but its inputs differ"
    for workers in (0, 2):
        with pytest.raises(CacheError, match=words):
            trained(cache, Padding("left"), other, num_workers=workers)
    allowed = TeacherCache.open(cache.reader.folder, allow_changed_inputs=True)
    trained(allowed, Padding("left"), other)
    pairs = [(torch.full((6,), float(number)), number) for number in range(12)]
    settings: dict[str, Any] = {"key": 1, "progress": False}
    images = TeacherCache.build(network(8), pairs, tmp_path, **settings)
    with pytest.raises(CacheError, match=r"^Expected the sample with the key 0 to be the one that the teacher got"):
        fitted(Module([(x + 1, number % 10) for x, number in pairs], shuffle=False), images, [LogitsDistillation()])


def test_c18_a_repeated_key_is_refused_at_the_build(tmp_path: Path) -> None:
    """C18: in one batch it is named; in two batches, and in two shards of a build with several processes."""
    data = [*Stream()]
    with pytest.raises(CacheError, match=r"of its own, but two have the key 'sentence-2'\. Pass another key="):
        built(tmp_path / "a", [*data[:4], data[2]], key="id", batch_size=8)
    with pytest.raises(CacheError, match=r"a key of samples 24 to 24 occurred before"):
        built(tmp_path / "b", Stream([*range(24), 5]), key="id", batch_size=8)
    with pytest.raises(CacheError, match=r"of its own, but samples 5 and 24 have the same"):
        built(tmp_path / "c", [*data, data[5]], key="id", batch_size=8)


@pytest.mark.parametrize("data", [Stream, Sentences])
def test_c18_a_build_is_resumed_to_the_same_bytes(tmp_path: Path, data: Any) -> None:
    """C12, C18: whole shards are kept, and a stream in another order is refused."""
    folder, seen = tmp_path / "half", itertools.count()

    def failing(net: Any, batch: dict[str, Tensor]) -> Tensor:
        if next(seen) == 4:  # one forward finds the shapes
            raise RuntimeError("stopped")
        return forward(net, batch)

    def forward(net: Any, batch: dict[str, Tensor]) -> Tensor:
        calls.append(len(batch["input_ids"]))
        return net(batch["input_ids"], batch["attention_mask"])

    calls: list[int] = []
    with pytest.raises(RuntimeError, match="stopped"):
        built(folder, data(), key="id", forward=failing)
    if data is Stream:
        with pytest.raises(CacheError, match=r"^Expected the stream to return the samples of shard 0 as in the build"):
            built(folder, Stream(range(NUMBER)[::-1]), key="id", forward=forward)
    calls.clear()
    built(folder, data(), key="id", forward=forward)
    assert len(calls) < 7  # of six batches, and the one that finds the shapes
    built(tmp_path / "whole", data(), key="id", forward=forward)
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "half")]
    assert contents[0] == contents[1]
    calls.clear()
    built(folder, data(), key="id", forward=forward)  # complete
    assert len(calls) == 1


def test_c18_samples_that_change_between_reads_are_refused(tmp_path: Path) -> None:
    """C9, C18: a stream with random augmentation, although its order may change."""

    class Noisy(Stream):
        def __iter__(self) -> Iterator[Sample]:
            self.order.reverse()
            for sample in super().__iter__():
                yield {**sample, "input_ids": [int(torch.randint(1, 13, ())), *sample["input_ids"]]}

    class Shuffled(Stream):
        def __iter__(self) -> Iterator[Sample]:
            self.order.reverse()
            yield from super().__iter__()

    with pytest.raises(CacheError, match=r"^Expected the stream to return the same samples whenever it is read, but"):
        built(tmp_path / "noisy", Noisy(), key="id")
    assert built(tmp_path / "allowed", Noisy(), key="id", allow_stale_augmentation=True).manifest.data["stale"]
    assert not built(tmp_path / "shuffled", Shuffled(), key="id").manifest.data["stale"]


def test_c18_settings_that_do_not_fit_keys_are_refused(tmp_path: Path, cache: TeacherCache) -> None:
    """C18: in words that say how to pass them."""
    cases: list[tuple[str, dict[str, Any], Any]] = [
        (r"^Expected `key` to be given for a stream, .* but got None with a Stream\. Pass key=<a", {}, Stream()),
        (r"^Expected `views` to be 1 and `transform_seed` None for rows", {"key": "id", "transform_seed": 1}, None),
        (r"^Expected `key` to be a column, an index or a function of a sample, but got key=True", {"key": True}, None),
        (r"^Expected every sample to have its key at key='name', but got a sample of \['id'", {"key": "name"}, None),
        (r"^Expected the key of a sample to be a string, .* but got list\. Pass", {"key": "input_ids"}, None),
        (r"^Expected a stream of at least one sample, but it is empty", {"key": "id"}, Stream([])),
        (r"^Expected a map-style dataset with a length, or an IterableDataset with key", {"key": "id"}, iter([1])),
    ]
    for words, settings, data in cases:
        with pytest.raises(CacheError, match=words):
            built(tmp_path / "x", data, **settings)
    with pytest.raises(CacheError, match=r"^Expected `key` to be that of the build, .*'id'.*, but got key='text'"):
        TeacherCache.open(cache.reader.folder, key="text")
    built(tmp_path / "plain")
    with pytest.raises(
        CacheError, match=r"^Expected `key` to be None, since the cache was built without keys, but got"
    ):
        TeacherCache.open(tmp_path / "plain", key="id")
    with pytest.raises(CacheError, match=r"or build the cache with key=\.\.\., which finds samples in any data set"):
        trained(TeacherCache.open(tmp_path / "plain"), Padding(), [*Stream(range(9))])


def test_c18_one_of_several_loaders_has_the_samples(cache: TeacherCache) -> None:
    """C2, C18: the other loader's samples have other keys."""
    from lightning.pytorch import Trainer
    from token_nets import QUIET, LanguageModule

    from lightning_distill import DistillCallback

    class Two(LanguageModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.model(batch["other"]["input_ids"], batch["other"]["attention_mask"])
            return super().training_step(batch["own"], batch_idx)

    others = [{"id": f"other-{index}", "input_ids": [1, 2]} for index in range(12)]
    loaders = {
        name: DataLoader(data, 4, collate_fn=Padding()) for name, data in (("other", others), ("own", Sentences()))
    }
    term = SequenceDistillation(labels=lambda batch: batch["own"]["labels"])
    trainer = Trainer(max_steps=2, max_epochs=-1, callbacks=[DistillCallback(cache, term)], **QUIET)
    trainer.fit(Two(), loaders)
    assert trainer.global_step == 2


def test_c18_features_and_images_are_keyed_too(tmp_path: Path) -> None:
    """C18: rows of one length, in tuples, keyed by an index."""
    data = [(*table()[index], f"image {index}") for index in range(40)]

    class Named(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[:2], batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch[:2], batch_idx)

    cache = TeacherCache.build(network(32), data, tmp_path, key=2, layers=["1"], dtype="float32", progress=False)
    terms = [FeatureDistillation("1", "1", weight=0.5)]
    part = data[30:3:-1]
    live, cached = (fitted(Named(part), source, terms) for source in (network(32), cache))
    assert weights_differ(live, cached) < 1e-6


class Numbered(Padding):
    """Batches with the keys of their samples, as numbers."""

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        return {"number": torch.tensor([sample["number"] for sample in samples]), **super().__call__(samples)}


def test_a_batch_may_hold_the_keys_of_its_samples(tmp_path: Path) -> None:
    data = [{**Sentences()[index], "number": index} for index in range(NUMBER)]
    cache = built(tmp_path, data=data, key="number", collate_fn=Numbered())

    assert cache.manifest.length == NUMBER


def test_entries_that_the_teacher_does_not_take_are_named(tmp_path: Path) -> None:
    data = [{**Sentences()[index], "number": index} for index in range(NUMBER)]

    with pytest.raises(CacheError, match=r"'number'.* as keywords, but: .*Pass forward="):
        built(tmp_path, data=data, key="id", collate_fn=Numbered())


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_other_samples_with_the_same_keys_do_not_continue_a_build(tmp_path: Path, kind: str) -> None:
    samples = [Sentences()[index] for index in range(NUMBER)]
    others = [{**sample, "input_ids": [1] * len(sample["input_ids"])} for sample in samples]
    data = {"map": list, "stream": lambda rows: Rows(rows)}[kind]

    first = built(tmp_path, data=data(samples), key="id").read(range(NUMBER))["output"]
    again = built(tmp_path, data=data(samples), key="id").read(range(NUMBER))["output"]
    np.testing.assert_array_equal(first.values, again.values)
    with pytest.raises(CacheError, match="to hold a cache of these samples, but it holds others with the same keys"):
        built(tmp_path, data=data(others), key="id")


class Rows(IterableDataset[Sample]):
    """Samples as a stream."""

    def __init__(self, rows: list[Sample]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.rows)
