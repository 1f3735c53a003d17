"""Every way in which Lightning makes and reads data loaders, from a cache."""

from __future__ import annotations

import gc
import math
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from cached_loading import (
    QUIET,
    SAMPLES,
    Bag,
    Hooked,
    InBatches,
    MakesBatches,
    Noted,
    Numbers,
    Student,
    answers_for,
    check,
    fitted,
    is_untouched,
    loader,
)
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import ConcatDataset, DataLoader, Subset, WeightedRandomSampler, get_worker_info, random_split

from lightning_distill import CacheError, DistillCallback, TeacherCache
from lightning_distill.cache.loaders import CachedBatch
from lightning_distill.cache.training import CachedLoaders
from lightning_distill.patch import MethodPatch


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return answers_for(Numbers(), tmp_path_factory.mktemp("numbers"))


class At(Callback):
    """Calls a function at one hook."""

    def __init__(self, hook: str, function: Any) -> None:
        setattr(self, hook, lambda trainer, *args, **kwargs: function(trainer))


KINDS: dict[str, Any] = {
    "plain": lambda: loader(Numbers()),
    "shuffled": lambda: loader(Numbers(), shuffle=True),
    "workers": lambda: loader(Numbers(), num_workers=1),
    "persistent workers": lambda: loader(Numbers(), num_workers=1, persistent_workers=True),
    "batched reads": lambda: loader(InBatches()),
    "weighted": lambda: loader(Numbers(), sampler=WeightedRandomSampler(torch.rand(SAMPLES), SAMPLES)),
    "batch sampler": lambda: DataLoader(Numbers(), batch_sampler=[[3, 4], [9, 1, 2], [5]]),
    "negative indices": lambda: DataLoader(Numbers(), batch_sampler=[[-1, 0], [-3, 2]]),
    "batch_size=None": lambda: DataLoader(MakesBatches(), batch_size=None, sampler=[[1, 2], [7, 8, 3]]),
    "own batch object": lambda: loader(Numbers(), collate_fn=Bag),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_of_any_kind_trains_and_is_left_untouched_in_two_fits(cache: TeacherCache, kind: str) -> None:
    data = KINDS[kind]()
    before = dict(vars(data))

    def look(trainer: Trainer) -> None:
        used = trainer.train_dataloader
        assert type(used) is DataLoader
        assert used.dataset is data.dataset
        assert used.dataset.classes == ("even", "odd")
        assert (used.collate_fn, used.sampler) == (data.collate_fn, data.sampler)

    for _ in range(2):
        _, _, trainer = fitted(cache, data, None, At("on_train_start", look))
        assert trainer.train_dataloader is data
    assert vars(data).keys() == before.keys()
    assert all(vars(data)[name] is value for name, value in before.items())
    if kind == "batched reads":
        assert set(data.dataset.reads) == {4}


def test_a_loader_with_persistent_workers_that_was_iterated_before_gets_its_own_answers(cache: TeacherCache) -> None:
    data = loader(Numbers(), num_workers=1, persistent_workers=True, shuffle=True)
    for _ in range(2):
        list(data)  # image statistics, or a look at the data
        fitted(cache, data)


def test_a_reload_keeps_the_workers_and_the_end_lets_them_go(cache: TeacherCache) -> None:
    iterators, workers = [], set()

    def look(trainer: Trainer) -> None:
        iterator = trainer.train_dataloader._iterator
        iterators.append(weakref.ref(iterator))
        workers.update(worker.pid for worker in iterator._workers)

    data = loader(Numbers(), num_workers=1, persistent_workers=True)
    fitted(cache, data, None, At("on_train_batch_end", look), epochs=3, reload_dataloaders_every_n_epochs=1)
    assert len(workers) == 1
    assert all(iterator() is None for iterator in iterators)
    assert data._iterator is None


@pytest.mark.parametrize("reload", [0, 1])
def test_the_trainers_loaders_go_without_a_garbage_collection(
    cache: TeacherCache, reload: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = []
    module = Student(lambda self: loader(Numbers()))
    look = At("on_train_epoch_start", lambda trainer: twins.append(weakref.ref(trainer.train_dataloader)))
    gc.collect()
    gc.disable()
    monkeypatch.setattr(gc, "collect", lambda: None)  # Lightning calls it at the end
    try:
        fitted(cache, None, module, look, reload_dataloaders_every_n_epochs=reload)
        left = [twin() for twin in twins]
    finally:
        gc.enable()
    assert left == [None, None]


def test_workers_read_the_answers(cache: TeacherCache, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = cache.reader.read
    monkeypatch.setattr(cache.reader, "read", lambda rows: reads.append(os.getpid()) or read(rows))
    fitted(cache, loader(Numbers(), num_workers=1))
    assert reads == []  # the worker's list is another one
    fitted(cache, loader(Numbers()), epochs=1)
    assert len(reads) == SAMPLES // 4


def test_a_worker_sees_the_dataset_itself(cache: TeacherCache) -> None:
    def init(worker: int) -> None:
        data: Any = get_worker_info().dataset  # type: ignore[union-attr]
        assert isinstance(data, Numbers)
        data.first = 100  # an attribute that its samples depend on

    module = Student()
    with pytest.raises(AssertionError):  # the cache's rows are those of the numbers before
        fitted(cache, loader(Numbers(), num_workers=1, worker_init_fn=init), module)
    assert min(map(min, module.got)) == 100


@pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers=True`")
def test_spawned_workers(cache: TeacherCache) -> None:
    fitted(cache, loader(Numbers(), num_workers=1, multiprocessing_context="spawn"), epochs=1)


def test_answers_are_pinned_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *args: self + 100)
    pinned = pin_memory(CachedBatch([torch.zeros(1)], {"output": torch.zeros(1)}), "cuda")
    assert type(pinned) is CachedBatch
    assert pinned.batch[0] == pinned.answers["output"] == 100


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.kinds: set[str] = set()
        self.made: list[Any] = []

    def train_dataloader(self) -> Any:
        self.made.append(loader(Numbers(), shuffle=True))
        return self.made[-1]

    def val_dataloader(self) -> Any:
        return loader(Numbers())  # as long as the training data

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.kinds.add(type(batch).__name__)
        return batch


@pytest.mark.parametrize("reload", [0, 1])
def test_a_datamodule_with_its_hook_and_reloads(cache: TeacherCache, reload: int) -> None:
    data = Data()
    fitted(cache, data, epochs=3, reload_dataloaders_every_n_epochs=reload)
    assert data.kinds == {"list"}
    assert len(data.made) == (3 if reload else 1)
    assert all(is_untouched(made) for made in data.made)


def test_the_modules_hooks_get_the_plain_batch(cache: TeacherCache) -> None:
    module = Hooked()
    fitted(cache, loader(Numbers()), module)
    assert module.kinds == {"list"}


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_overfit_batches_and_limits(cache: TeacherCache) -> None:
    module = Student(lambda self: loader(Numbers(), shuffle=True))
    fitted(cache, None, module, overfit_batches=2)
    assert module.got == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    fitted(cache, loader(Numbers(), shuffle=True), limit_train_batches=2)


FINDERS = {
    "rate": lambda: LearningRateFinder(num_training_steps=5, min_lr=1e-6, max_lr=1e-4),
    "batch size": lambda: BatchSizeFinder(mode="power", steps_per_trial=2, max_trials=2, init_val=2),
}


@pytest.mark.parametrize("how", ["callback first", "callback last", "tuner"])
@pytest.mark.parametrize("name", FINDERS)
def test_finders_and_the_tuner(cache: TeacherCache, tmp_path: Path, name: str, how: str) -> None:
    module, term = Student(lambda self: loader(Numbers(), batch_size=self.batch_size, shuffle=True)), Noted()
    module.val_dataloader = lambda: loader(Numbers())  # type: ignore[method-assign]  # as long as the training data
    distill = DistillCallback(cache, term)
    callbacks = {"callback first": [FINDERS[name](), distill], "callback last": [distill, FINDERS[name]()]}
    trainer = Trainer(**QUIET, callbacks=callbacks.get(how, [distill]), default_root_dir=tmp_path, max_epochs=1)  # type: ignore[arg-type]
    if how == "tuner" and name == "rate":
        Tuner(trainer).lr_find(module, num_training=5, min_lr=1e-6, max_lr=1e-4)
    elif how == "tuner":
        Tuner(trainer).scale_batch_size(module, steps_per_trial=2, max_trials=2, init_val=2)
    trainer.fit(module)
    check(module, term)
    epoch = module.got[-math.ceil(SAMPLES / module.batch_size) :]
    assert sorted(number for numbers in epoch for number in numbers) == list(range(SAMPLES))


@pytest.mark.parametrize("own", [False, True], ids=["dict", "CombinedLoader"])
@pytest.mark.parametrize("reload", [0, 1])
def test_the_one_of_several_loaders_that_fits_is_used(cache: TeacherCache, own: bool, reload: int) -> None:
    loaders = {"a": loader(Numbers(), shuffle=True), "b": [loader(Numbers(8))]}
    data = CombinedLoader(loaders, "max_size_cycle") if own else loaders
    for _ in range(2):
        fitted(cache, data, reload_dataloaders_every_n_epochs=reload)
    assert is_untouched(loaders["a"])  # type: ignore[arg-type]
    if own:
        assert data.iterables["a"] is loaders["a"]  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_answers_keep_their_precision(cache: TeacherCache, precision: Any) -> None:
    kinds = set()

    class Kind(Noted):
        def forward(self, student: Any, teacher: Any, labels: Any = None) -> Any:
            kinds.add(teacher.logits.dtype)
            return super().forward(student, teacher, labels)

    trainer = Trainer(**QUIET, callbacks=[DistillCallback(cache, Kind())], max_epochs=1, precision=precision)  # type: ignore[arg-type]
    trainer.fit(Student(), loader(Numbers()))
    assert kinds == {torch.float32}


def test_several_steps_on_one_batch(cache: TeacherCache) -> None:
    class Closures(Student):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=1e-3, max_iter=3)

    module, _, _ = fitted(cache, loader(Numbers()), Closures(), epochs=1)
    assert len(module.got) > SAMPLES // 4


def test_an_attribute_that_is_set_on_either_loader_counts(cache: TeacherCache) -> None:
    for on_the_trainers in (True, False):
        data, batches = loader(Numbers()), []

        def collate(samples: Any, batches: list[int] = batches) -> Any:
            batches.append(len(samples))
            return torch.utils.data.default_collate(samples)

        def change(
            trainer: Trainer, data: Any = data, trainers: bool = on_the_trainers, collate: Any = collate
        ) -> None:
            (trainer.train_dataloader if trainers else data).collate_fn = collate

        fitted(cache, data, None, At("on_train_epoch_end", change))
        assert batches == [4] * (SAMPLES // 4)


def test_the_order_of_the_data_is_that_of_a_plain_run(cache: TeacherCache) -> None:
    orders = []
    for callbacks in ([], [DistillCallback(cache, Noted())]):
        torch.manual_seed(1)
        module, data = Student(), loader(Numbers(), shuffle=True, num_workers=1, persistent_workers=True)
        Trainer(**QUIET, callbacks=callbacks, max_epochs=2).fit(module, data)  # type: ignore[arg-type]
        orders.append(module.got)
    assert orders[0] == orders[1]


def test_an_exception_leaves_nothing_behind(cache: TeacherCache) -> None:
    def fail(trainer: Trainer) -> None:
        raise RuntimeError("stop")

    data, callback = loader(Numbers()), DistillCallback(cache, Noted())
    trainer = Trainer(**QUIET, callbacks=[callback, At("on_train_batch_end", fail)], max_epochs=1)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(Student(), data)
    assert is_untouched(data)
    for owner in (trainer.strategy, trainer.precision_plugin, trainer.fit_loop):
        assert not any(isinstance(value, MethodPatch) for value in vars(owner).values())
    fitted(cache, data)


# Which rows belong to which samples -----------------------------------------------------------------------------------


def test_parts_of_the_data_get_their_own_answers(cache: TeacherCache) -> None:
    data = Numbers()
    first, second = random_split(data, [SAMPLES - 8, 8])
    fitted(cache, loader(Subset(first, list(range(0, 16, 2))), shuffle=True))
    fitted(cache, loader(ConcatDataset([second, Subset(data, [3, 1])]), shuffle=True))


def test_a_cache_of_one_part_of_a_random_split_trains_on_that_part(tmp_path: Path) -> None:
    part, _ = random_split(Numbers(), [10, SAMPLES - 10])
    cache = answers_for(part, tmp_path / "part")
    fitted(cache, loader(part, shuffle=True))
    fitted(cache, loader(Subset(part, [7, 2, 5, 1])))
    assert float(cache.attach(part)[3].batch[0][0]) == cache.read([3])["output"][0, 0] / 2


def test_a_subset_of_all_items_in_another_order_is_refused_where_only_their_number_is_known(tmp_path: Path) -> None:
    class Changing(Numbers):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x + torch.tensor([0.0, float(torch.rand(()))]), y

    cache = answers_for(Changing(), tmp_path, allow_stale_augmentation=True)
    fitted(cache, loader(Changing(), shuffle=True))
    fitted(cache, loader(Subset(Changing(), range(SAMPLES)), shuffle=True))
    with pytest.raises(CacheError, match=r"got a Subset of all its items in another order"):
        fitted(cache, loader(Subset(Changing(), list(range(SAMPLES))[::-1])))


def test_views_follow_the_given_epoch(tmp_path: Path) -> None:
    class Noisy(Numbers):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x + torch.tensor([0.0, float(torch.rand(()))]), y

        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self[index] for index in indices]

    cache = answers_for(Noisy(), tmp_path, views=2, transform_seed=3)
    got: list[Any] = []

    class Looks(Student):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            got.append(batch[0])
            return super().training_step(batch, batch_idx)

    for kind in ({"num_workers": 1, "persistent_workers": True, "shuffle": True}, {"batch_sampler": [[2, 3]]}):
        got.clear()
        data = DataLoader(Noisy(), **{"batch_size": 4, **kind} if "num_workers" in kind else kind)  # type: ignore[arg-type]
        fitted(cache, data, Looks(), epochs=3)
        attached = cache.attach(Noisy())
        size = len(got) // 3
        for step, x in enumerate(got):
            view = (step // size) % 2
            for sample in x:
                expected = attached[view * SAMPLES + int(sample[0])].batch[0]
                assert torch.equal(sample, expected)


def test_the_loaders_close_on_a_trainer_that_never_ran(cache: TeacherCache) -> None:
    trainer = Trainer(**QUIET)  # type: ignore[arg-type]
    trainer.strategy._lightning_module = Student()
    loaders = CachedLoaders(trainer, cache)
    assert loaders.answers is None
    loaders.close()
    assert "setup_data" not in vars(trainer.fit_loop)
