"""Losses and terms with parts of their own in training: two epochs equal one epoch, a file, and another epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from device import DEVICE
from lightning.pytorch import Callback, LightningModule, Trainer
from parts_nets import Network
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from distill_core.margins import margins_of
from lightning_distill import (
    DistillCallback,
    FeatureDistillation,
    MarginReLULoss,
    ReusedClassifierDistillation,
    ReviewDistillation,
    SoftmaxRegressionLoss,
    TeacherCache,
)

MakeTrainer = Callable[..., Trainer]
TERMS: dict[str, Callable[[], Any]] = {
    "margin_relu": lambda: FeatureDistillation("norm", "norm", MarginReLULoss(), weight=0.1),
    "softmax_regression": lambda: FeatureDistillation("body", "body", SoftmaxRegressionLoss()),
    "reused_classifier": lambda: ReusedClassifierDistillation("body", "body"),
    "review": lambda: ReviewDistillation(["norm", "body"], ["norm", "body"]),
}
# The parts of each term in the callback's state; the student's state holds none of them.
LEARNED: dict[str, set[str]] = {
    "margin_relu": {"adapters"},
    "reused_classifier": {"adapters"},
    "review": {"adapters"},
    "softmax_regression": {"learned"},
}
every_term = pytest.mark.parametrize("name", TERMS)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Network(3, seed=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class SeedSteps(Callback):
    """Makes what a loss draws depend on the step alone; a resumed run cannot have the old random state."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(100 + trainer.global_step)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 2, 3, 3, generator=generator), torch.randint(3, (8,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def fit(trainer: MakeTrainer, name: str, epochs: int, path: Path | None = None) -> tuple[Any, Module, DistillCallback]:
    module, callback = Module(), DistillCallback(Network(4), TERMS[name](), student="model", validate=False)
    runs = trainer(max_epochs=epochs, callbacks=[callback, SeedSteps()])
    torch.manual_seed(0)
    runs.fit(module, data(), ckpt_path=path)
    return runs, module, callback


@every_term
def test_a_resumed_run_ends_where_a_straight_one_does(trainer: MakeTrainer, name: str, tmp_path: Path) -> None:
    _, straight, whole = fit(trainer, name, 2)
    runs, first, begun = fit(trainer, name, 1)
    runs.save_checkpoint(tmp_path / "last.ckpt")
    _, second, resumed = fit(trainer, name, 2, tmp_path / "last.ckpt")

    assert nets.same(straight.state_dict(), second.state_dict())
    assert not nets.same(straight.state_dict(), first.state_dict())
    expected, actual, before = (callback.adapter_state()["adapters"] for callback in (whole, resumed, begun))
    for term, values in expected.items():
        assert values.keys() == actual[term].keys()
        assert {key.split(".")[0] for key in values} == LEARNED[name]
        assert all(torch.equal(value, actual[term][key]) for key, value in values.items())
        trained = dict(whole.terms[0].named_parameters())
        assert not any(torch.equal(values[key], before[term][key]) for key in trained)


@every_term
def test_the_student_s_state_is_that_of_a_plain_network(trainer: MakeTrainer, name: str) -> None:
    _, module, callback = fit(trainer, name, 1)

    assert all(getattr(term, "_layers", None) is None for term in callback.terms)
    assert module.model.state_dict().keys() == Network(3).state_dict().keys()
    assert nets.same(nets.snapshot(callback.teacher), nets.snapshot(Network(4)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    settings = {"layers": ["norm", "body"], "dtype": "float32", "batch_size": 4, "progress": False}
    return TeacherCache.build(Network(4), data().dataset, tmp_path_factory.mktemp("cache"), **settings)


def fit_from(cache: Any, trainer: MakeTrainer, term: Any) -> Module:
    module = Module()
    callback = DistillCallback(cache, term, student="model", validate=False)
    runs = trainer(max_epochs=2, callbacks=[callback, SeedSteps()])
    torch.manual_seed(0)
    runs.fit(module, data())
    return module


def test_a_cache_serves_a_loss_whose_margins_are_given(trainer: MakeTrainer, cache: TeacherCache) -> None:
    norm = Network(4).norm
    margins = margins_of(norm.weight.tolist(), norm.bias.tolist())
    cached = fit_from(cache, trainer, FeatureDistillation("norm", "norm", MarginReLULoss(margins=margins)))
    live = fit_from(Network(4), trainer, FeatureDistillation("norm", "norm", MarginReLULoss()))

    for (name, value), expected in zip(cached.named_parameters(), live.parameters(), strict=True):
        # before a batch normalisation: its gradient is rounding errors alone, of which AdamW makes whole steps
        if DEVICE == "cpu" or name != "model.conv.bias":
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "term",
    [
        FeatureDistillation("norm", "norm", MarginReLULoss()),
        FeatureDistillation("body", "body", SoftmaxRegressionLoss()),
        ReusedClassifierDistillation("body", "body"),
    ],
    ids=["margin_relu", "softmax_regression", "reused_classifier"],
)
def test_a_cache_without_the_teacher_s_layers_raises(trainer: MakeTrainer, cache: TeacherCache, term: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected `teacher` to be a network for term .*, but it is not\. Pass the "):
        fit_from(cache, trainer, term)
