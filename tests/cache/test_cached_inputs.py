"""Inputs that change between the data loader and the student are refused, and all others are accepted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cached_loading import QUIET
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_distill import CacheError, DistillCallback, TeacherCache
from lightning_distill.cache.inputs import BatchInputs

CHANGED = r"^Expected the student to be called with the batch as the data loader returned it"


class Images(Dataset[Any]):
    """Images (3, 6, 4) of bytes or floats, with their labels."""

    def __init__(self, kind: torch.dtype = torch.float32) -> None:
        pixels = torch.randint(256, (8, 3, 6, 4), generator=torch.Generator().manual_seed(1))
        self.images = pixels.to(kind) if kind == torch.uint8 else pixels.to(kind) / 7

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return self.images[index], index % 2


class Network(nn.Module):
    """Takes images of any size, dtype and dimension, and any further arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 2)

    def forward(self, x: Any, *others: Any, **named: Any) -> Tensor:
        x = x["x"] if isinstance(x, dict) else x
        return self.head(x.flatten(1).to(self.head.weight.dtype).mean(1, keepdim=True))


def built(data: Any, folder: Any, allow: bool = False, **settings: Any) -> TeacherCache:
    TeacherCache.build(Network(), data, folder, progress=False, **settings)
    return TeacherCache.open(folder, allow_changed_inputs=allow)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, TeacherCache]:
    kinds = (torch.float32, torch.uint8)
    return {kind: built(Images(kind), tmp_path_factory.mktemp("images")) for kind in kinds}


class Student(LightningModule):
    """Calls its network through a function."""

    def __init__(self, call: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.call, self.steps = Network(), call, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.call(self.model, batch).float().sum()
        self.steps += 1
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(cache: TeacherCache, module: LightningModule, data: Any = None, **settings: Any) -> None:
    data = DataLoader(Images(), batch_size=4) if data is None else data
    trainer = Trainer(**QUIET, callbacks=[DistillCallback(cache)], max_epochs=2, **settings)  # type: ignore[arg-type]
    if isinstance(data, LightningDataModule):
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, data)


STEPS_THAT_CHANGE: dict[str, Callable[[nn.Module, Any], Tensor]] = {
    "mixup": lambda model, batch: model(0.6 * batch[0] + 0.4 * batch[0].flip(0)),
    "flip": lambda model, batch: model(batch[0].flip(-1)),
    "another order": lambda model, batch: model(batch[0][torch.tensor([1, 0, 3, 2])]),
    "noise": lambda model, batch: model(batch[0] + 0.01),
    "in place": lambda model, batch: model(batch[0].add_(1)),
    "in place, then copied": lambda model, batch: model(batch[0].mul_(2).half()),
    "scaled": lambda model, batch: model(batch[0] / 255),
    "low resolution": lambda model, batch: model(nn.functional.avg_pool2d(batch[0], 2)),
    "adversarial": lambda model, batch: model(batch[0] + torch.zeros_like(batch[0], requires_grad=True) + 0.1),
    "channels mixed up": lambda model, batch: model(batch[0].roll(1, 1)),
    "in a dict": lambda model, batch: model({"step": 3, "x": batch[0].flip(-1)}),
    "by name": lambda model, batch: model(x=batch[0].flip(-1)),
    "beside the images": lambda model, batch: model(batch[0][:, :1].expand_as(batch[0]) + 0, extra=batch[0]),
    "one pixel": lambda model, batch: model(batch[0].select_scatter(torch.zeros_like(batch[0][..., 2]), 3, 2)),
}
STEPS_THAT_DO_NOT: dict[str, Callable[[nn.Module, Any], Tensor]] = {
    "plain": lambda model, batch: model(batch[0]),
    "view": lambda model, batch: model(batch[0].view(4, -1)),
    "flattened": lambda model, batch: model(batch[0].permute(0, 2, 3, 1).flatten(1)),
    "permuted": lambda model, batch: model(batch[0].permute(0, 2, 3, 1)),
    "permuted copy": lambda model, batch: model(batch[0].permute(0, 2, 3, 1).contiguous()),
    "layout": lambda model, batch: model(batch[0].to(memory_format=torch.channels_last)),
    "half": lambda model, batch: model(batch[0].half()),
    "bfloat16": lambda model, batch: model(batch[0].bfloat16()),
    "double": lambda model, batch: model(batch[0].double()),
    "copy": lambda model, batch: model(batch[0].clone()),
    "dict": lambda model, batch: model({"x": batch[0]}),
    "by name": lambda model, batch: model(x=batch[0]),
    "slice": lambda model, batch: model(batch[0][..., :-1]),
    "slice, copied": lambda model, batch: model(batch[0][..., 1:].contiguous()),
    "transposed": lambda model, batch: model(batch[0].transpose(2, 3)),
    "every second": lambda model, batch: model(batch[0][..., ::2]),
    "with a mask": lambda model, batch: model(batch[0], batch[0] > 3, torch.rand(4)),
    "twice": lambda model, batch: model(batch[0]) + model(batch[0].clone()),
    "with gradients": lambda model, batch: model(batch[0].requires_grad_()),
    "autocast": lambda model, batch: model(batch[0]),
}


@pytest.mark.parametrize("name", STEPS_THAT_CHANGE)
def test_a_step_that_changes_its_inputs_is_refused_before_the_first_update(caches: Any, name: str) -> None:
    module = Student(STEPS_THAT_CHANGE[name])
    with pytest.raises(CacheError, match=CHANGED):
        fit(caches[torch.float32], module)
    assert module.steps == 1


@pytest.mark.parametrize("name", STEPS_THAT_DO_NOT)
def test_a_step_that_keeps_its_inputs_trains(caches: Any, name: str) -> None:
    module = Student(STEPS_THAT_DO_NOT[name])
    fit(caches[torch.float32], module, **({"precision": "bf16-mixed"} if name == "autocast" else {}))
    assert module.steps == 4


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_precision_of_the_trainer_is_not_a_change(caches: Any, precision: str) -> None:
    module = Student(lambda model, batch: model(batch[0]))
    fit(caches[torch.float32], module, precision=precision)
    module = Student(lambda model, batch: model(batch[0].float()))
    fit(caches[torch.float32], module, precision=precision)
    with pytest.raises(CacheError, match=CHANGED):
        fit(caches[torch.float32], Student(STEPS_THAT_CHANGE["mixup"]), precision=precision)


def test_bytes_may_become_floats_but_not_fractions(caches: Any) -> None:
    data = DataLoader(Images(torch.uint8), batch_size=4)
    fit(caches[torch.uint8], Student(lambda model, batch: model(batch[0].float())), data)
    with pytest.raises(CacheError, match=CHANGED):
        fit(caches[torch.uint8], Student(lambda model, batch: model(batch[0].float() / 255)), data)


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"])
@pytest.mark.parametrize("owner", ["module", "datamodule"])
@pytest.mark.parametrize("changes", [True, False])
def test_a_batch_transfer_hook_that_changes_the_batch_is_refused(
    caches: Any, hook: str, owner: str, changes: bool
) -> None:
    def change(self: Any, batch: Any, *args: Any) -> Any:
        images = batch[0].flip(0) if changes else batch[0].clone()
        if hook == "transfer_batch_to_device":
            return [images.to(args[0]), batch[1].to(args[0])]
        return [images, batch[1]]

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(Images(), batch_size=4)

    module_type: Any = type("Hooked", (Student,), {hook: change} if owner == "module" else {})
    data_type: Any = type("HookedData", (Data,), {hook: change} if owner == "datamodule" else {})
    module = module_type(lambda model, batch: model(batch[0]))
    data = data_type() if owner == "datamodule" else DataLoader(Images(), batch_size=4)
    if not changes:
        fit(caches[torch.float32], module, data)
        return
    with pytest.raises(CacheError, match=CHANGED):
        fit(caches[torch.float32], module, data)


def test_changed_inputs_can_be_allowed(tmp_path: Any) -> None:
    cache = built(Images(), tmp_path, allow=True)
    module = Student(STEPS_THAT_CHANGE["mixup"])
    fit(cache, module)
    assert module.steps == 4


def test_a_random_crop_by_slicing_is_noticed_and_a_fixed_one_is_not(caches: Any) -> None:
    starts = iter([0, 1, 0, 1])
    with pytest.raises(CacheError, match=r"another view of the batch than in the calls before \(a random crop\?\)"):
        fit(caches[torch.float32], Student(lambda model, batch: model(batch[0][:, :, (n := next(starts)) : n + 4])))
    fit(caches[torch.float32], Student(lambda model, batch: model(batch[0][:, :, 1:5, 1:3])))


def test_a_random_transpose_is_noticed(caches: Any) -> None:
    turns = iter([(2, 3), (2, 2)])
    with pytest.raises(CacheError, match=r"another view of the batch than in the calls before"):
        fit(caches[torch.float32], Student(lambda model, batch: model(batch[0].transpose(*next(turns)))))


@pytest.mark.parametrize("part", [-3, slice(2)], ids=["from the end", "from the start"])
def test_a_slice_of_batches_of_several_lengths(part: Any) -> None:
    remembered = BatchInputs(allow=False)
    cut = slice(part, None) if isinstance(part, int) else part
    for length in (5, 8, 4):
        tokens = torch.randint(9, (2, length))
        remembered.clear()
        remembered.remember({"tokens": tokens})
        remembered.check((tokens[:, cut],), {})


def collate_mixed(samples: Any) -> Any:
    x, y = default_collate(samples)
    weight = torch.rand(())
    return weight * x + (1 - weight) * x.flip(0), y


def collate_scaled(samples: Any) -> Any:
    x, y = default_collate(samples)
    return x / 255, y


def collate_with_draws(samples: Any) -> Any:
    x, y = default_collate(samples)
    return x, y, np.random.rand()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_function_that_mixes_at_random_is_refused(caches: Any, tmp_path: Any, workers: int) -> None:
    module = Student(lambda model, batch: model(batch[0]))
    data = DataLoader(Images(), batch_size=4, collate_fn=collate_mixed, num_workers=workers)
    with pytest.raises(CacheError, match=r"collate function to keep the items unchanged"):
        fit(caches[torch.float32], module, data)
    assert module.steps == 0
    fit(built(Images(), tmp_path, allow=True), module, data)


def test_a_collate_function_that_the_teacher_had_too_is_accepted(tmp_path: Any) -> None:
    cache = built(Images(), tmp_path, collate_fn=collate_scaled)
    fit(cache, Student(lambda model, batch: model(batch[0])), DataLoader(Images(), 4, collate_fn=collate_scaled))
    fit(cache, Student(lambda model, batch: model(batch[0])), DataLoader(Images(), 4, collate_fn=collate_with_draws))


def test_several_calls_of_the_student_on_several_tensors_of_the_batch_are_refused(caches: Any) -> None:
    def collate(samples: Any) -> Any:
        x, y = default_collate(samples)
        return x, x + 1, y

    data = DataLoader(Images(), batch_size=4, collate_fn=collate)
    words = "every call of the student in a step to get the same tensor"
    with pytest.raises(CacheError, match=words):
        fit(caches[torch.float32], Student(lambda model, batch: model(batch[0]) + model(batch[1])), data)


@dataclass
class Fields:
    x: Tensor
    y: Tensor


BATCHES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, y: (x, y),
    "dict": lambda x, y: {"x": x, "labels": y},
    "nested": lambda x, y: {"data": [{"x": x}], "labels": y},
    "dataclass": Fields,
    "object": lambda x, y: SimpleNamespace(store=SimpleNamespace(x=x), y=y),
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_any_form(kind: str) -> None:
    x, y = torch.rand(3, 4), torch.arange(3)
    remembered = BatchInputs(allow=False)
    remembered.remember(BATCHES[kind](x, y))
    remembered.check((x,), {})
    remembered.check((x.clone(),), {})
    with pytest.raises(CacheError, match=CHANGED):
        remembered.check((x + 1,), {})


def test_named_inputs_are_compared_by_their_names() -> None:
    ids, mask = torch.randint(9, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    remembered = BatchInputs(allow=False)
    remembered.remember({"input_ids": ids, "attention_mask": mask, "labels": ids})
    remembered.check((), {"input_ids": ids, "attention_mask": mask.bool(), "labels": ids.clone().fill_(-100)})
    remembered.check((), {"input_ids": ids, "position_ids": torch.arange(5)[None]})
    with pytest.raises(CacheError, match=CHANGED):
        remembered.check((), {"attention_mask": mask, "input_ids": ids + 1})
    with pytest.raises(CacheError, match=CHANGED):
        remembered.check((), {"input_ids": ids, "attention_mask": mask.tril()})


def test_a_second_input_that_is_noised_is_noticed() -> None:
    image, text = torch.rand(2, 5), torch.rand(2, 7)
    remembered = BatchInputs(allow=False)
    remembered.remember((image, text))
    remembered.check((image, text, torch.rand(2)), {})
    with pytest.raises(CacheError, match=CHANGED):
        remembered.check((image, text + 0.1), {})


def test_nan_is_not_a_change() -> None:
    x = torch.tensor([[1.0, float("nan")]])
    remembered = BatchInputs(allow=False)
    remembered.remember([x])
    remembered.check((x.clone(),), {})
    with pytest.raises(CacheError, match=CHANGED):
        remembered.check((torch.nan_to_num(x),), {})


# On an accelerator: CPU tensors take its part here --------------------------------------------------------------------


class Device:
    """Replaces the trainer of a GPU, and events, which are finished when the test sets ``done``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hooks: Any = LightningModule) -> None:
        self.done = False
        self.trainer: Any = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device("cuda")),
            lightning_module=hooks(),
            datamodule=None,
        )
        monkeypatch.setitem(BatchInputs.check.__globals__, "_on_host", lambda tensor: False)
        monkeypatch.setitem(BatchInputs.check.__globals__, "later", self.later)

    def later(self, differs: Tensor) -> Callable[[], bool | None]:
        return lambda: bool(differs) if self.done else None


def test_copies_on_the_device_are_known_where_no_hook_can_have_changed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    device, x, y = Device(monkeypatch), torch.rand(3, 4), torch.arange(3)
    monkeypatch.setitem(BatchInputs.check.__globals__, "_differs", lambda *args: pytest.fail("compared"))
    remembered = BatchInputs(allow=False)
    remembered.remember([x, y])
    moved = [x.clone(), y.clone()]
    remembered.follow([x, y], moved, device.trainer)
    remembered.check((moved[0].view(3, 2, 2),), {})


def test_copies_on_the_device_are_not_known_behind_a_hook_or_a_change_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Hooked(LightningModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    x = torch.rand(3, 4)
    for device, batch in ((Device(monkeypatch, Hooked), x), (Device(monkeypatch), x.flip(0))):
        remembered = BatchInputs(allow=False)
        remembered.remember([x])
        moved = [x.flip(0)]
        remembered.follow([batch], moved, device.trainer)
        with pytest.raises(CacheError, match=CHANGED):
            remembered.check((moved[0],), {})


def test_later_comparisons_on_the_device_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device, remembered = Device(monkeypatch), BatchInputs(allow=False)
    for _ in range(8):
        x = torch.rand(3, 4)
        remembered.clear()
        remembered.remember([x])
        remembered.check((x.clone(),), {})
    remembered.check((x + 1,), {})  # not waited for
    remembered.check((x,), {})  # not arrived yet
    device.done = True
    with pytest.raises(CacheError, match="changed in one of the last steps"):
        remembered.check((x,), {})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_changed_inputs_are_noticed_on_a_gpu() -> None:
    x = torch.rand(64, 3, 32, 32).pin_memory()
    remembered = BatchInputs(allow=False)
    for turn in range(12):
        remembered.clear()
        remembered.remember([x])
        on_device = x.cuda(non_blocking=True)
        remembered.check((on_device.half() if turn % 2 else on_device,), {})
    remembered.check((on_device.flip(0),), {})
    torch.cuda.synchronize()
    with pytest.raises(CacheError, match="changed in one of the last steps"):
        remembered.check((on_device,), {})
