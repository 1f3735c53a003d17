"""Random combinations of features and situations, each compared with a loop written by hand.

The suite runs a few seeds (test_random_lightning.py). For many, by hand::

    python tests/pairs/random_lightning.py --seeds 500 --start 0

which prints the settings of every combination that differs, and how many do.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":  # started as a script: the tests and the project are found beside it
    sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from pairs.by_hand import Batch, Hand, Place, cross_entropy, curriculum, decoupled, line, places, soft_targets, squared
from pairs.lightning_cell import QUIET, Watch, close, hooks, learned, same
from pairs.lightning_copies import COPIES
from pairs.lightning_table import ROWS, Rows, first_teacher, second_teacher, student
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_distill import (
    CurriculumTemperature,
    DecoupledKDLoss,
    DistillCallback,
    FeatureDistillation,
    LogitsDistillation,
    SoftTargetLoss,
    TeacherCache,
)
from lightning_distill.schedules import Cosine, Linear, Step

Number = Callable[[Place], float]


@dataclass
class Drawn:
    """One combination; the same choices in the library's words and by hand."""

    loss: str
    loss_schedule: str
    weight_schedule: str
    feature: str  # the distance of a feature term, or ""
    teacher: str
    task_weight: float | str
    optimizer: str
    accumulate: int
    clip: float | None
    form: str  # of the batch
    manual: bool
    situation: str
    views: int
    batch: int
    first: bool  # whether our callback is the first


def draw(seed: int) -> Drawn:
    """The combination of a seed."""
    choose = random.Random(seed).choice
    manual = choose([False, False, False, True])
    teacher = choose(["live", "live", "cache", "several"])
    return Drawn(
        loss=choose(["soft", "soft", "decoupled", "mse", "curriculum", "curriculum"]),
        loss_schedule=choose(["", "", "steps", "fraction", "epochs"]),
        weight_schedule=choose(["", "", "steps", "fraction", "epochs"]),
        feature=choose(["", "mse", "cosine"]),
        teacher=teacher,
        task_weight=choose([1.0, 1.0, 0.3, 0.0, "epochs"]),
        optimizer=choose(["sgd", "momentum", "adam", "adamw"]),
        accumulate=1 if manual else choose([1, 1, 2, 3]),
        clip=None if manual else choose([None, None, 0.1]),
        form=choose(["dict", "tuple", "nested"]),
        manual=manual,
        situation=choose(["", "", "finder", "reload", "copy", "second", "resume"]),
        views=1 if teacher == "cache" else choose([1, 1, 2]),
        batch=choose([4, 6, 7]),
        first=choose([True, False]),
    )


# By the library -------------------------------------------------------------------------------------------------------


def scheduled(kind: str, start: float, end: float) -> Any:
    if kind == "steps":
        return Linear(start, end, duration=4, over="steps")
    if kind == "epochs":
        return Step([start, end], boundaries=[1])
    return Cosine(start, end) if kind == "fraction" else start


def terms(drawn: Drawn) -> list[Any]:
    temperature = scheduled(drawn.loss_schedule, 5.0, 2.0)
    losses = {
        "soft": lambda: SoftTargetLoss(temperature),
        "decoupled": lambda: DecoupledKDLoss(temperature, nontarget_weight=2.0),
        "mse": lambda: LogitsMse(),
        "curriculum": lambda: SoftTargetLoss(CurriculumTemperature(0.1, 0.5, reversal_weight=1.0)),
    }
    made: list[Any] = [LogitsDistillation(losses[drawn.loss](), weight=scheduled(drawn.weight_schedule, 1.5, 0.0))]
    if drawn.feature:
        made.append(FeatureDistillation("body", "body", drawn.feature, weight=0.7))
    return made


class LogitsMse(torch.nn.Module):
    """A loss of the user's own."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return squared(student, teacher)


class Formed(Dataset[Any]):
    """The rows in one of the forms that batches have."""

    def __init__(self, form: str) -> None:
        self.rows, self.form = Rows(), form

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        x, y = self.rows.x[index], self.rows.labels[index]
        return {"dict": {"x": x, "labels": y}, "tuple": (x, y), "nested": {"inputs": {"x": x}, "y": y}}[self.form]


def as_dict(batch: Any) -> Batch:
    if isinstance(batch, dict) and "inputs" in batch:
        return {"x": batch["inputs"]["x"], "labels": batch["y"]}
    return batch if isinstance(batch, dict) else {"x": batch[0], "labels": batch[1]}


def optimizer_of(kind: str) -> Callable[[Any], torch.optim.Optimizer]:
    return {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-3),
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.05, eps=1e-3),
    }[kind]


VIEWS: list[Callable[[Tensor], Tensor]] = [lambda x: x, lambda x: 1 - x]


class RandomModule(LightningModule):
    """The user's module for a combination."""

    def __init__(self, drawn: Drawn, distill: DistillCallback) -> None:
        super().__init__()
        self.model, self.drawn, self.distill, self.lr = student(), drawn, [distill], 0.1
        self.automatic_optimization = not drawn.manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        named = as_dict(batch)
        losses = [cross_entropy(self.model(view(named["x"])), named["labels"]) for view in VIEWS[: self.drawn.views]]
        loss = torch.stack(losses).mean()
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss + self.distill[0].loss())
        optimizer.step()
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.drawn.optimizer)(self.model.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        later = self.drawn.situation == "reload" and self.trainer.current_epoch > 0
        return DataLoader(Formed(self.drawn.form), self.drawn.batch - 3 * later)


class Copies(Callback):
    """Copies the module in the middle of the training, in all ways."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.current_epoch == 0 and not self.kept:
            bare, pl_module.distill = pl_module.distill, []
            self.kept = [make(pl_module) for make in COPIES.values()]
            pl_module.distill = bare


class Stops(Callback):
    """Saves a checkpoint at an optimizer step and stops."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)
        trainer.should_stop = True


# By hand --------------------------------------------------------------------------------------------------------------


def number(kind: str, start: float, end: float) -> Number:
    if kind == "steps":
        return lambda place: line(start, end, place.step / 4)
    if kind == "epochs":
        return lambda place: end if place.epoch else start
    if kind == "fraction":
        return lambda place: line(start, end, (1 - torch.cos(torch.tensor(torch.pi * place.fraction)).item()) / 2)
    return lambda place: start


def formula(drawn: Drawn) -> Any:
    temperature, weight = number(drawn.loss_schedule, 5.0, 2.0), number(drawn.weight_schedule, 1.5, 0.0)

    def compute(result: Any, ask: Any, batch: Any, place: Place, learned: dict[str, Tensor]) -> Tensor:
        teachers = [first_teacher(), second_teacher()][: 2 if drawn.teacher == "several" else 1]
        total = torch.zeros(())
        for index, teacher in enumerate(teachers):
            answer = ask(teacher)
            if drawn.loss == "soft":
                value = soft_targets(result["logits"], answer["logits"], temperature(place))
            elif drawn.loss == "decoupled":
                value = decoupled(result["logits"], answer["logits"], batch["labels"], temperature(place), 2.0)
            elif drawn.loss == "curriculum":
                value = curriculum(result["logits"], answer["logits"], learned)
            else:
                value = squared(result["logits"], answer["logits"])
            total = total + weight(place) * value if weight(place) else total
            if drawn.feature:
                matrix, bias = (learned[f"body.adapters.{index}.{name}"] for name in ("weight", "bias"))
                adapted, target = result["body"] @ matrix.T + bias, answer["body"]
                if drawn.feature == "mse":
                    distance = squared(adapted, target)
                else:
                    lengths = adapted.norm(dim=-1) * target.norm(dim=-1)
                    distance = (1 - (adapted * target).sum(-1) / lengths).mean()
                total = total + 0.7 * distance
        return total / len(teachers)

    return compute


def check(seed: int, folder: Path) -> Drawn:
    """Train both ways and compare.

    Args:
        seed: Of the combination.
        folder: For files.

    Raises:
        AssertionError: If they differ.
    """
    drawn = draw(seed)
    torch.manual_seed(seed)

    def callback() -> DistillCallback:
        teacher: Any = first_teacher()
        if drawn.teacher == "several":
            teacher = [first_teacher(), second_teacher()]
        if drawn.teacher == "cache":
            path = folder / f"cache-{drawn.form}"
            forward = lambda model, batch: model(as_dict(batch)["x"])  # noqa: E731
            if not path.exists():
                settings: dict[str, Any] = {"layers": ["body"], "dtype": "float32", "progress": False}
                TeacherCache.build(first_teacher(), Formed(drawn.form), path, forward=forward, **settings)
            teacher = TeacherCache.open(path)
        weight = Step([1.0, 0.25], boundaries=[1]) if drawn.task_weight == "epochs" else drawn.task_weight
        return DistillCallback(teacher, terms(drawn), student="model", task_weight=weight)

    def run(module: Any, distill: DistillCallback, *callbacks: Callback, ckpt_path: Any = None) -> Watch:
        watch = Watch(distill)
        ordered = [distill, *callbacks] if drawn.first else [*callbacks, distill]
        settings: dict[str, Any] = {**QUIET, "max_epochs": 2, "default_root_dir": folder / f"run{seed}"}
        if drawn.situation == "reload":
            settings["reload_dataloaders_every_n_epochs"] = 1
        if drawn.situation == "finder":
            settings["enable_checkpointing"] = True
        trainer = Trainer(
            callbacks=[*ordered, watch],
            accumulate_grad_batches=drawn.accumulate,
            gradient_clip_val=drawn.clip,
            **settings,
        )
        trainer.fit(module, ckpt_path=ckpt_path)
        return watch

    distill = callback()
    module = RandomModule(drawn, distill)
    situation = "" if drawn.manual and drawn.situation == "finder" else drawn.situation
    rows = Rows()
    sizes = [drawn.batch, drawn.batch - 3 if situation == "reload" else drawn.batch]
    batches = [[rows.batch(start, size) for start in range(0, ROWS, size)] for size in sizes]
    steps = [
        [(batches[place.epoch][place.batch], place) for place in window]
        for window in places([len(epoch) for epoch in batches], drawn.accumulate)
    ]
    start: Any = None
    model = student()
    skipped = 0
    if situation == "finder":
        watch = run(module, distill, LearningRateFinder(num_training_steps=3, update_attr=False))
    elif situation == "second":
        run(module, distill)
        model = copy.deepcopy(module.model)
        watch = run(module, distill)
    elif situation == "resume":
        path = folder / f"{seed}.ckpt"
        first = run(module, distill, Stops(path))
        distill = callback()
        module = RandomModule(drawn, distill)
        watch = run(module, distill, ckpt_path=path)
        start, skipped = first.start, len(batches[0])
    elif situation == "copy":
        copies = Copies()
        watch = run(module, distill, copies)
        assert len(copies.kept) == len(COPIES)
        assert not any(hooks(twin) for twin in copies.kept)
    else:
        watch = run(module, distill)
    hand = Hand(
        formula(drawn),
        model,
        (start if start is not None else watch.start) or {},
        views=VIEWS[: drawn.views],
        task_weight=number("epochs", 1.0, 0.25) if drawn.task_weight == "epochs" else lambda place: drawn.task_weight,
        optimizer=optimizer_of(drawn.optimizer),
    )
    hand.train(steps, divide_by=drawn.accumulate, clip=drawn.clip, weighs_task=not drawn.manual)
    close(watch.losses, hand.losses[skipped:], 2e-5)
    same({name: value.detach() for name, value in module.model.named_parameters()}, hand.after[-1], 2e-5)
    same(learned(distill), hand.values(), 2e-5)
    return drawn


def main() -> int:
    """Run many seeds; the exit code is 1 if any of them differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="how many combinations")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.start, options.start + options.seeds):
            try:
                check(seed, Path(folder))
            except Exception:  # counted and printed; the other seeds still run
                wrong += 1
                print(f"seed {seed}: {draw(seed)}")
                traceback.print_exc(limit=-3)
    print(f"{options.seeds} combinations, {wrong} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
