"""Training from a cache equals training with the teacher (C2, C6, C9, C10)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_nets import ITEMS, Augmented, Module, Views, difference, network, table, trained
from device import ACCELERATOR
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import Subset

from lightning_distill import (
    CacheError,
    DistillCallback,
    Distiller,
    DistillModule,
    FeatureDistillation,
    LogitMSELoss,
    LogitsDistillation,
    SoftTargetLoss,
    TeacherCache,
    content_key,
)
from lightning_distill.cache import IndexedBatch

LOGITS = (LogitsDistillation,)
BOTH = (LogitsDistillation, lambda: FeatureDistillation("1", "1", weight=0.5))


def made(terms: Any) -> list[Any]:
    return [make() for make in terms]


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return network(32)


@pytest.fixture(scope="module")
def cache(teacher: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    folder = tmp_path_factory.mktemp("cache")
    return TeacherCache.build(teacher, table(), folder, layers=["1"], dtype="float32", batch_size=7, progress=False)


@pytest.mark.parametrize("terms", [LOGITS, BOTH], ids=["logits", "features"])
@pytest.mark.parametrize(
    "loading",
    [{}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}, {"shuffle": False, "drop_last": True}],
)
def test_c2_the_weights_are_those_of_a_live_teacher(
    cache: TeacherCache, teacher: nn.Module, terms: Any, loading: Any
) -> None:
    """C2, C10: shuffled, with workers, with features and adapters; the batches are what they are without a cache."""
    live = trained(Module(table(), **loading), teacher, made(terms))
    cached = trained(Module(table(), **loading), cache, made(terms))
    assert difference(live, cached) < 1e-6
    assert [type(batch) for batch in cached.batches] == [type(batch) for batch in live.batches]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(cached.batches, live.batches, strict=True))


def test_c2_the_loader_is_left_as_it_was(cache: TeacherCache) -> None:
    """C2"""
    module = Module(table())
    loader = module.train_dataloader()
    module.train_dataloader = lambda: loader  # type: ignore[method-assign]
    kept = loader.dataset, loader.collate_fn, loader.batch_sampler
    trained(module, cache, made(LOGITS))
    assert (loader.dataset, loader.collate_fn, loader.batch_sampler) == kept


def test_c2_a_subset_reads_its_own_rows(cache: TeacherCache, teacher: nn.Module) -> None:
    """C2: a Subset of a Subset of the data."""
    part = Subset(Subset(table(), list(range(30, 5, -1))), [3, 1, 4, 15, 9, 2, 6, 5])
    assert difference(trained(Module(part), teacher, made(LOGITS)), trained(Module(part), cache, made(LOGITS))) < 1e-6


def test_c2_distill_module_takes_a_cache(cache: TeacherCache, teacher: nn.Module) -> None:
    """C2"""

    def fitted(source: Any) -> nn.Module:
        module = DistillModule(network(8, seed=3), source, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        source = Module(table())
        Trainer(max_epochs=2, accelerator=ACCELERATOR, **quiet).fit(
            module, source.train_dataloader(), source.val_dataloader()
        )
        return module.student

    assert difference(fitted(teacher), fitted(cache)) < 1e-6


def test_c2_a_plain_loop_passes_the_rows(cache: TeacherCache, teacher: nn.Module) -> None:
    """C2: through `attach` and a Distiller."""
    attached = cache.attach(table())
    student = network(8, seed=3)
    with Distiller(student, cache) as distiller, Distiller(student, teacher) as live:
        items = [attached[index] for index in (4, 0, 9)]
        x = torch.stack([item.batch[0] for item in items])
        batch = IndexedBatch(x, torch.tensor([item.rows for item in items]))
        totals = []
        for each in (distiller, live):
            with each.record():
                student(x)
            totals.append(each.total(torch.zeros(()), batch))
    # the teacher was run on other batches: products of other shapes round otherwise
    assert totals[0].item() == pytest.approx(totals[1].item(), rel=1e-5)


def test_c6_the_gradient_from_float16_outputs_points_as_that_of_the_live_teacher(
    teacher: nn.Module, tmp_path: Path
) -> None:
    """C6: cosine of 0.9999 or more."""
    cache = TeacherCache.build(teacher, table(), tmp_path, progress=False)
    student, x = network(8, seed=3), table().tensors[0]
    gradients = []
    for target in (teacher(x).detach(), torch.as_tensor(cache.read(range(ITEMS))["output"]).float()):
        student.zero_grad()
        SoftTargetLoss()(student(x), target).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in student.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) >= 0.9999


@pytest.mark.parametrize(("k", "dtype", "limit"), [(9, "float16", 1e-4), (9, "uint8", 1e-3), (6, "float16", 0.05)])
def test_c7_a_student_learns_from_the_likeliest_classes(
    teacher: nn.Module, tmp_path: Path, k: int, dtype: str, limit: float
) -> None:
    """C7"""
    cache = TeacherCache.build(teacher, table(), tmp_path, top_k=k, dtype=dtype, progress=False)
    live = trained(Module(table()), teacher, made(LOGITS))
    assert difference(live, trained(Module(table()), cache, made(LOGITS))) < limit


@pytest.mark.parametrize("loss", [LogitMSELoss(), SoftTargetLoss(standardize=True)])
def test_c7_a_loss_that_needs_all_classes_is_refused(teacher: nn.Module, tmp_path: Path, loss: nn.Module) -> None:
    """C7"""
    cache = TeacherCache.build(teacher, table(), tmp_path, top_k=3, progress=False)
    with pytest.raises(
        ValueError, match=r"^Expected a cache of full outputs for .*, but it holds the likeliest 3 classes alone"
    ):
        trained(Module(table()), cache, [LogitsDistillation(loss)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("views", [1, 2])
def test_c9_the_student_gets_the_samples_that_the_teacher_got(
    teacher: nn.Module, tmp_path: Path, views: int, workers: int
) -> None:
    """C9: random transforms of torch, NumPy and random; epochs cycle through the views."""
    cache = TeacherCache.build(
        teacher,
        Augmented(),
        tmp_path,
        views=views,
        transform_seed=7,
        dtype="float32",
        num_workers=workers,
        progress=False,
    )
    live = Module(Views(cache.attach(Augmented()), views), num_workers=workers)
    live.data.module = live
    cached = Module(Augmented(), num_workers=workers)
    for module, source in ((live, teacher), (cached, cache)):
        trained(module, source, made(LOGITS), epochs=3)
    assert difference(live, cached) < 1e-6
    x = torch.cat([batch[0] for batch in cached.batches[: ITEMS // 8]])
    shown = {tuple(row.tolist()) for row in x}
    assert shown == {tuple(cache.attach(Augmented())[index].batch[0].tolist()) for index in range(ITEMS)}


def test_c9_items_that_change_between_reads_are_refused(teacher: nn.Module, tmp_path: Path) -> None:
    """C9"""
    with pytest.raises(
        CacheError, match=r"^Expected the dataset to return the same samples whenever they are read, but some differ"
    ):
        TeacherCache.build(teacher, Augmented(), tmp_path / "refused", progress=False)
    cache = TeacherCache.build(teacher, Augmented(), tmp_path / "taken", allow_stale_augmentation=True, progress=False)
    trained(Module(Augmented()), cache, made(LOGITS))
    with pytest.raises(CacheError, match=r"^Expected `transform_seed` to be given with views=2, but got None"):
        TeacherCache.build(teacher, table(), tmp_path / "seedless", views=2, progress=False)


def test_c9_the_random_state_is_put_back(teacher: nn.Module, tmp_path: Path) -> None:
    """C9"""
    cache = TeacherCache.build(teacher, Augmented(), tmp_path, transform_seed=7, progress=False)
    attached = cache.attach(Augmented())
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    attached[3]
    assert torch.equal(torch.rand(1), expected)


def loaders() -> Iterator[Any]:
    yield pytest.param(
        Module(table(41)), r"to have the 40 items that the cache was built from, but got 41", id="longer"
    )
    yield pytest.param(
        Module(table(seed=2)), r"to be those that the cache was built from, but some items differ", id="others"
    )
    yield pytest.param(
        Module(table(), batch_size=None, shuffle=False), r"^Expected a data loader that makes batches", id="no batches"
    )


@pytest.mark.parametrize(("module", "words"), [*loaders()])
def test_c5_other_data_are_refused_before_the_first_step(cache: TeacherCache, module: Module, words: str) -> None:
    """C5"""
    before = [parameter.detach().clone() for parameter in module.parameters()]
    with pytest.raises(CacheError, match=words):
        trained(module, cache, made(LOGITS))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert not module.batches


def test_c10_a_layer_that_the_cache_lacks_is_named(cache: TeacherCache) -> None:
    """C10"""
    with pytest.raises(CacheError, match=r"layer '0', but it holds \['1'\]\. Build it with layers=\['0'\]\."):
        trained(Module(table()), cache, [FeatureDistillation("0", "0")])


def test_c2_validation_runs_without_the_teacher(cache: TeacherCache) -> None:
    """C2: it has not seen the validation data, so nothing is claimed about its agreement."""
    module = Module(table())
    callback = DistillCallback(cache)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=1, callbacks=[callback], accelerator=ACCELERATOR, **quiet)
    trainer.fit(module)
    assert "distill/val_teacher_agreement" not in trainer.callback_metrics
    assert "val_loss" in trainer.callback_metrics


class Rows(torch.utils.data.Dataset[Any]):
    """Batches of one row, which are views of the data."""

    def __init__(self) -> None:
        self.x, self.y = (tensor.clone() for tensor in table().tensors)

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index : index + 1], self.y[index : index + 1]


class InPlace(nn.Module):
    """A teacher that doubles its inputs where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.mul_(2.0))


def test_a_teacher_that_changes_its_inputs_in_place_changes_neither_the_data_nor_the_keys(tmp_path: Path) -> None:
    data, settings = Rows(), {"dtype": "float32", "progress": False}
    TeacherCache.build(InPlace(), data, tmp_path / "views", batch_size=1, collate_fn=lambda items: items[0], **settings)
    assert torch.equal(data.x, table().tensors[0])
    keyed = TeacherCache.build(InPlace(), table(), tmp_path / "keyed", key=content_key, **settings)
    live = nn.Sequential(Twofold(), network(32))
    assert difference(trained(Module(table()), keyed, None), trained(Module(table()), live, None)) < 1e-6


class Twofold(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x
