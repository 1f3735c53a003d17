"""Situations of the pairs: the module is copied while it is trained."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from pairs.by_hand import outputs
from pairs.lightning_cell import QUIET, Cell, Module, Watch, close, hooks, same
from pairs.lightning_table import BATCH, ROWS, student
from torch import Tensor
from torch.utils.data import DataLoader


def saved_and_loaded(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


class CopiesItself(Module):
    """Copies itself in the third step, after the student was called, and runs the copy with gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.current_epoch == 0 and batch_idx == 2:
            kept = {name: make(self) for name, make in COPIES.items()}
            for twin in kept.values():
                twin.task(batch)
            self.__dict__["kept"] = kept
        return loss


class CopiesAfter(Callback):
    """Copies the module after its third step."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == 2:
            self.kept = {name: make(pl_module) for name, make in COPIES.items()}
            for twin in self.kept.values():
                assert hooks(twin) == 0


def copied_between_steps(cell: Cell) -> None:
    module, distill, copies = cell.module(), cell.callback(), CopiesAfter()
    _, watch = cell.fit(module, distill, callbacks=[copies])
    hand = cell.hand(watch).train(cell.steps())
    cell.equal(hand, watch, distill, module)
    _copies_are_plain(cell, copies.kept, hand.after[2])


def copied_inside_a_step(cell: Cell) -> None:
    module, distill = CopiesItself(cell.name), cell.callback()
    _, watch = cell.fit(module, distill)
    hand = cell.hand(watch).train(cell.steps())
    cell.equal(hand, watch, distill, module)
    _copies_are_plain(cell, module.__dict__["kept"], hand.after[1])


def _copies_are_plain(cell: Cell, copies: dict[str, Any], values: dict[str, Tensor]) -> None:
    """The copies validate and train themselves, and nothing is distilled."""
    assert copies.keys() == COPIES.keys()
    for name, twin in copies.items():
        assert not [key for key in vars(twin) if key.endswith("_step")]
        same({key: value.detach() for key, value in twin.model.named_parameters()}, values)
        if name != "torch.save":  # the three are alike up to here
            continue
        model = student()
        model.load_state_dict(values)
        trainer = Trainer(max_epochs=1, **QUIET)
        (measured,) = trainer.validate(twin, DataLoader(cell.feature.rows(), BATCH), verbose=False)
        whole = cell.feature.rows().batch(0, ROWS)
        with torch.no_grad():
            logits = outputs(model, whole["x"])["logits"]
            expected = torch.nn.functional.cross_entropy(logits.flatten(0, -2), whole["labels"].flatten())
        close([measured["val_loss"]], [expected.item()])
        trainer.fit(twin)
        hand = cell.hand(Watch(cell.callback()), fresh=False, model=model)
        hand.train(cell.steps((BATCH,)), distils=lambda number: False, weighs_task=False)
        same({key: value.detach() for key, value in twin.model.named_parameters()}, hand.after[-1])
