"""The mean over the tokens of a whole optimizer step, however it is cut into micro-batches and processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cross_tokenizer_models import by_hand as by_hand_spans
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from processes import run_processes
from token_nets import LENGTHS, QUIET, CausalModel, LanguageModule, Sequences, by_hand, by_hand_windows, close, loader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_distill import DistillCallback, Distiller, SequenceDistillation, TeacherCache

SCRIPT = Path(__file__).parent / "token_processes.py"
fsdp2 = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this release of torch does not run on the CPU"
)


class Stream(IterableDataset[Any]):
    """The same sequences without a length."""

    def __iter__(self) -> Any:
        return (Sequences()[index] for index in range(len(LENGTHS)))


class Batches:
    """Batches from somewhere else than a DataLoader."""

    def __iter__(self) -> Any:
        return iter(loader(2))

    def __len__(self) -> int:
        return len(loader(2))


def fitted(data: Any, term: Any = None, module: Any = None, callbacks: Any = (), teacher: Any = None, **settings: Any):
    module = LanguageModule() if module is None else module
    term = SequenceDistillation(weight=2.0) if term is None else term
    callback = DistillCallback(CausalModel(7, seed=1) if teacher is None else teacher, term)
    trainer = Trainer(callbacks=[callback, *callbacks], **{"max_epochs": 1, **settings}, **QUIET)
    trainer.fit(module, data)
    return module.model.state_dict(), trainer


CUTS = {
    "one batch": (loader(8), {}),
    "four micro-batches": (loader(2), {"accumulate_grad_batches": 4}),
    "eight micro-batches": (loader(1), {"accumulate_grad_batches": 8}),
    "a stream": (DataLoader(Stream(), batch_size=2), {"accumulate_grad_batches": 4}),
    "workers": (loader(2, num_workers=1, persistent_workers=True), {"accumulate_grad_batches": 4}),
    "any iterable": (Batches(), {"accumulate_grad_batches": 4}),
}


@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_gives_the_weights_of_the_loop_by_hand(cut: str) -> None:
    data, settings = CUTS[cut]
    state, _ = fitted(data, **settings)
    micro_batches = settings.get("accumulate_grad_batches", 1)
    close(state, by_hand(3, micro_batches=micro_batches))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_mean_over_sequences_is_of_the_whole_step_too(accumulate: int) -> None:
    term = SequenceDistillation(weight=2.0, normalize="sequences")
    state, _ = fitted(loader(8 // accumulate), term, accumulate_grad_batches=accumulate)
    close(state, by_hand(3, micro_batches=accumulate, normalize="sequences"))
    with pytest.raises(AssertionError):
        close(state, by_hand(3, micro_batches=accumulate))


def test_the_mean_by_micro_batch_would_be_another() -> None:
    torch.manual_seed(0)
    student, teacher = CausalModel(), CausalModel(7, seed=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9)
    distiller = Distiller(student, teacher, SequenceDistillation(weight=2.0))
    batches = list(loader(2))
    for start in range(0, len(batches), 4):
        optimizer.zero_grad()
        for batch in batches[start : start + 4]:
            with distiller.record():
                logits = student(batch["input_ids"], batch["attention_mask"])["logits"]
            (distiller.total(logits[:, 0].square().mean(), batch) / 4).backward()
        optimizer.step()
    with pytest.raises(AssertionError):
        close(student.state_dict(), by_hand(3, micro_batches=4), atol=1e-3)


def test_a_short_last_window_counts_its_own_tokens() -> None:
    state, _ = fitted(loader(2), accumulate_grad_batches=5)  # windows of 5, 5 and 2 micro-batches
    close(state, by_hand(3, sequences=10, micro_batches=5))


def test_a_limit_of_batches_ends_the_last_window() -> None:
    state, _ = fitted(loader(2), accumulate_grad_batches=4, limit_train_batches=6)
    expected = by_hand_windows([range(8), range(8, 12)], micro_batches=4)
    close(state, expected)


def test_several_epochs_with_another_accumulation_each() -> None:
    state, _ = fitted(
        loader(2),
        callbacks=[GradientAccumulationScheduler({0: 4, 1: 2})],
        max_epochs=2,
    )
    windows = (
        [range(start, start + 8) for start in range(0, 24, 8)],
        [range(start, start + 4) for start in range(0, 24, 4)],
    )
    close(state, by_hand_windows([*windows[0], *windows[1]], micro_batches=[4] * 3 + [2] * 6))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_an_interrupted_epoch_goes_on_in_the_middle(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 7:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fitted(loader(2), callbacks=[Stop()], accumulate_grad_batches=4)
    module = LanguageModule()
    callback = DistillCallback(CausalModel(7, seed=1), SequenceDistillation(weight=2.0))
    trainer = Trainer(callbacks=callback, max_epochs=1, accumulate_grad_batches=4, **QUIET)
    trainer.fit(module, DataLoader(Resumed(), batch_size=2), ckpt_path=tmp_path / "middle.ckpt")
    close(module.model.state_dict(), by_hand(3, micro_batches=4))


class Resumed(Sequences):
    """The rows that are left: Lightning does not skip the batches of a loader without a state of its own."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__((index + 16) % len(LENGTHS))


def test_a_cached_teacher_gives_the_same_weights(tmp_path: Path) -> None:
    data = Sequences()

    cache = TeacherCache.build(CausalModel(7, seed=1), data, tmp_path / "cache", dtype="float32")
    state, _ = fitted(DataLoader(data, batch_size=2), teacher=cache, accumulate_grad_batches=4)
    close(state, by_hand(3, micro_batches=4), atol=1e-6)  # the cache holds float32


def test_own_loop_with_a_window_gives_the_weights_of_the_loop_by_hand() -> None:
    student, teacher = CausalModel(), CausalModel(7, seed=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9)
    batches = list(loader(2))
    with Distiller(student, teacher, SequenceDistillation(weight=2.0)) as distiller:
        for start in range(0, len(batches), 4):
            optimizer.zero_grad()
            with distiller.window(batches[start : start + 4]):
                for batch in batches[start : start + 4]:
                    with distiller.record():
                        logits = student(batch["input_ids"], batch["attention_mask"])["logits"]
                    (distiller.total(logits[:, 0].square().mean(), batch) / 4).backward()
            optimizer.step()
    close(student.state_dict(), by_hand(3, micro_batches=4))
    with pytest.raises(ValueError, match="`batches` to hold the micro-batches"), distiller.window([]):
        pass


def test_own_loop_with_several_calls_for_a_copy_of_a_batch_is_refused() -> None:
    student, batches = CausalModel(), list(loader(4))
    with Distiller(student, CausalModel(7, seed=1), SequenceDistillation()) as distiller, distiller.window(batches):
        moved = {name: rows.clone() for name, rows in batches[0].items()}
        with distiller.record():
            for part in (slice(1), slice(1, None)):
                logits = student(**{name: rows[part] for name, rows in moved.items()})["logits"]
        with pytest.raises(ValueError, match="Expected `total` to get one of the batches that `window` got"):
            distiller.total(logits.mean(), moved)


# Where the tokens cannot be counted ahead ------------------------------------------------------------------------


class OwnLabels(LanguageModule):
    """Makes its labels in the step, so that the loader's batches do not have them."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        labels = batch["answers"]
        return self.model(batch["input_ids"], batch["mask"], labels=labels)["logits"][:, 0].square().mean()


class Renamed(Sequences):
    def __getitem__(self, index: int) -> Any:
        row = super().__getitem__(index)
        return {"input_ids": row["input_ids"], "mask": row["attention_mask"], "answers": row["labels"]}


def test_labels_that_only_the_call_has_give_the_mean_by_micro_batch_and_a_warning() -> None:
    with pytest.warns(UserWarning, match="mean over each micro-batch.*before the training step"):
        state, _ = fitted(DataLoader(Renamed(), batch_size=2), module=OwnLabels(), accumulate_grad_batches=4)
    with pytest.raises(AssertionError):
        close(state, by_hand(3, micro_batches=4), atol=1e-3)


class ChangesLabels(LanguageModule):
    """Ignores one more token in the step."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        labels = batch["labels"].clone()
        labels[:, 3] = -100
        return {**batch, "labels": labels}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        labels = batch["labels"].clone()
        labels[:, 4] = -100
        return own(self.model(batch["input_ids"], batch["attention_mask"], labels=labels)["logits"])


def own(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 0].square().mean()


def test_labels_that_the_step_changes_are_noticed() -> None:
    with pytest.warns(UserWarning, match="counts 5 tokens in the training step, but 6"):
        fitted(loader(2), module=ChangesLabels(), accumulate_grad_batches=4)


class CallsTwice(LanguageModule):
    """Calls the student for the first sequence of a batch and for both, so that one counts twice."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = [{name: rows[:size] for name, rows in batch.items()} for size in (1, 2)]
        return torch.stack([own(self.model(**part)["logits"]) for part in parts]).mean()


def test_calls_that_are_neither_views_nor_parts_of_the_batch_are_noticed() -> None:
    with pytest.warns(UserWarning, match=r"counts 5.5 tokens in the training step, but 8 in the batch"):
        fitted(loader(2), module=CallsTwice(), accumulate_grad_batches=4)


def test_a_number_that_arrives_late_from_a_device_is_compared_in_a_later_step(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    def late(values: Tensor, *, wait: bool) -> Callable[[], Tensor | None]:
        waits.append(wait)
        answers = iter([None, None, values])
        return lambda: next(answers)

    monkeypatch.setattr("lightning_distill.windows.AT_ONCE", 2)
    monkeypatch.setattr("lightning_distill.windows.later", late)
    with pytest.warns(UserWarning, match="counts 5 tokens in the training step, but 6"):
        fitted(loader(2), module=ChangesLabels(), accumulate_grad_batches=4)
    assert waits == [True, True, False]  # then it has arrived, and is the last that is compared


class Manual(LanguageModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = own(self.model(batch["input_ids"], batch["attention_mask"])["logits"])
        self.manual_backward(loss + self.trainer.callbacks[0].loss())
        optimizer.step()


def test_manual_optimization_takes_the_mean_of_the_batch_and_says_so_once() -> None:
    with pytest.warns(UserWarning, match="optimization is manual") as caught:
        state, _ = fitted(loader(8), module=Manual())
    assert len([warning for warning in caught if "micro-batch" in str(warning.message)]) == 1
    close(state, by_hand(3))


def test_nothing_is_counted_or_warned_of_without_accumulation() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*micro-batch.*")
        fitted(DataLoader(Renamed(), batch_size=2), module=OwnLabels())


# Two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(SCRIPT, "pair", 2, tmp_path_factory.mktemp("pair"))


@pytest.mark.distributed
def test_two_processes_count_the_spans_of_two_tokenizers(pair: list[dict[str, Any]]) -> None:
    models = CausalModel(vocabulary=300), CausalModel(7, seed=1, vocabulary=420)
    expected = by_hand_spans("uld", 8, 1, models, task_weight=0.0)
    for results in pair:
        state = {name: torch.tensor(values, dtype=torch.float64) for name, values in results["two_tokenizers"].items()}
        close(state, expected)


TWO = {
    "ddp": {"micro_batches": 2},
    "ddp_accumulating": {"micro_batches": 8},
    "ddp_sequences": {"micro_batches": 4, "normalize": "sequences"},
    "own_loop": {"micro_batches": 4},
    "skipping": {"micro_batches": 2, "task_weight": 0.0},
    "skipping_accumulating": {"micro_batches": 4, "task_weight": 0.0},
    "own_loop_skipping": {"micro_batches": 2, "task_weight": 0.0},
    "own_loop_skipping_unused": {"micro_batches": 2, "task_weight": 0.0},
    "fsdp": {"micro_batches": 4},
    "skipping_fsdp": {"micro_batches": 4, "task_weight": 0.0},
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", [pytest.param(name, marks=fsdp2 if "fsdp" in name else ()) for name in TWO])
def test_two_processes_of_unequal_numbers_of_tokens_give_the_same_weights(pair: Any, name: str) -> None:
    for rank in pair:
        close(rank[name], by_hand(3, **TWO[name]))


@pytest.mark.distributed
@fsdp2
def test_heads_that_are_sharded_and_capped_give_the_gradients_of_whole_logits(pair: Any) -> None:
    for rank in pair:
        assert rank["sharded_capped"] < 1e-9


@pytest.mark.distributed
def test_a_process_that_cannot_count_takes_all_to_the_mean_by_micro_batch(pair: Any) -> None:
    assert pair[0]["relabelled"] == pair[1]["relabelled"]
    assert pair[0]["warnings"] == []
    assert [text[:56] for text in pair[1]["warnings"]] == ["The loss on tokens is the mean over each micro-batch, an"]
    for normalized in ("tokens", "sequences"):
        with pytest.raises(AssertionError):
            close(pair[0]["relabelled"], by_hand(3, micro_batches=4, normalize=normalized), atol=1e-4)
