"""A network that learns from its own deep layers: the term in every place, and the criterion (N9, N6)."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import Classifier, Mlp, loader
from torch import Tensor, nn

from lightning_distill import (
    DistillCallback,
    Distiller,
    DistillModule,
    FeatureDistillation,
    LogitsDistillation,
    SelfDistillation,
)
from lightning_distill import SelfKnowledgeDistillationLoss as SelfKnowledge
from lightning_distill.losses import SoftTargetLoss

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class Exits(nn.Module):
    """Three blocks with a classifier behind each; the features' widths may differ."""

    def __init__(self, widths: tuple[int, int, int] = (6, 6, 6), seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = [4, *widths]
            self.block1, self.block2, self.block3 = (nn.Linear(sizes[i], sizes[i + 1]) for i in range(3))
            self.exit1, self.exit2, self.exit3 = (nn.Linear(width, 3) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        first = self.block1(x)
        second = self.block2(first.relu())
        third = self.block3(second.relu())
        self.exit1(first)
        self.exit2(second)
        return self.exit3(third)

    def places(self, x: Tensor) -> dict[str, Tensor]:
        """The output of every layer, called by hand."""
        first = self.block1(x)
        second = self.block2(first.relu())
        third = self.block3(second.relu())
        exits = {"exit1": self.exit1(first), "exit2": self.exit2(second), "exit3": self.exit3(third)}
        return {"block1": first, "block2": second, "block3": third, **exits}


def criterion_loss(kind: str, shallow: np.ndarray, deep: np.ndarray, temperature: float) -> float:
    """The losses of the criterion, which has no factor of the squared temperature."""
    return logits_loss(kind, shallow, deep, temperature) / (1 if kind == "L2" else temperature**2)


def logits_loss(kind: str, shallow: np.ndarray, deep: np.ndarray, temperature: float) -> float:
    """The losses of the terms."""
    if kind == "L2":
        return np.sqrt(((shallow - deep) ** 2).sum())

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z / temperature - (z / temperature).max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p, q = softmax(deep), softmax(shallow)
    rows = -(p * np.log(q)).sum(-1) if kind == "CE" else (p * np.log(p / q)).sum(-1)
    return temperature**2 * rows.mean()


def total_of(distiller, criterion: SelfKnowledge, model: nn.Module, x: Tensor, student_loss: float = 0.0) -> Tensor:
    ready = distiller(model, None, criterion)
    ready.on_train_begin()
    return ready.on_after_compute_loss(x, model(x), torch.tensor(student_loss, dtype=torch.float64))


def inputs(rows: int = 5) -> Tensor:
    return 2 * torch.randn(rows, 4, dtype=torch.float64)


# The criterion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1, 3.0])
@pytest.mark.parametrize("kind", ["L2", "KL", "CE"])
def test_n9_value_equals_the_formula(distiller, kind, temperature):
    model, x = Exits().double(), inputs()
    criterion = SelfKnowledge([[["exit1", "exit3"], ["exit2", "exit3"]]], temperature, [kind], [0.3])
    got = total_of(distiller, criterion, model, x)
    z = {name: value.detach().numpy() for name, value in model.places(x).items()}
    expected = 0.3 * sum(criterion_loss(kind, z[name], z["exit3"], temperature) for name in ("exit1", "exit2"))
    torch.testing.assert_close(got.item(), float(expected), **CLOSE)


@pytest.mark.parametrize("origin", [False, True])
def test_n9_groups_are_summed_once_with_their_weights(distiller, origin):
    model, x = Exits().double(), inputs()
    groups = [
        [["block1", "block3"], ["block2", "block3"]],
        [["exit1", "exit3"], ["exit2", "exit3"]],
        [["exit1", "exit2"]],
    ]
    criterion = SelfKnowledge(groups, 3.0, ["L2", "KL", "CE"], [0.5, 0.05, 0.7], origin)
    got = total_of(distiller, criterion, model, x, 1.9)
    z = {name: value.detach().numpy() for name, value in model.places(x).items()}
    expected = 1.9 * origin
    for group, kind, weight in zip(groups, ("L2", "KL", "CE"), (0.5, 0.05, 0.7), strict=True):
        expected += weight * sum(criterion_loss(kind, z[shallow], z[deep], 3.0) for shallow, deep in group)
    torch.testing.assert_close(got.item(), float(expected), **CLOSE)


@pytest.mark.parametrize("kind", ["L2", "KL", "CE"])
def test_n9_deep_targets_get_no_gradient(distiller, kind):
    model, x = Exits().double(), inputs()
    criterion = SelfKnowledge([[["exit1", "exit3"], ["exit2", "exit3"]]], 2.0, [kind], [1.0])
    total_of(distiller, criterion, model, x).backward()
    assert model.exit3.weight.grad is None
    assert model.block3.weight.grad is None
    assert model.exit1.weight.grad.abs().sum() > 0
    assert model.exit2.weight.grad.abs().sum() > 0


def test_n9_ce_and_equal_weights_are_the_default():
    criterion = SelfKnowledge([[["exit1", "exit3"]], [["exit2", "exit3"]]])
    assert criterion.loss_types == ("CE", "CE")
    assert criterion.loss_weights == (0.5, 0.5)
    assert criterion.task_weight == 0.0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layer_mappings": []}, "`layer_mappings` to be a list of pairs"),
        ({"temperature": -1.0}, "`temperature` to be greater than 0"),
        ({"loss_types": ["MSE"]}, r"`loss_types\[0\]`.*'MSE'"),
        ({"loss_types": ["L2", "KL"]}, "`loss_types` to hold 1 entries"),
        ({"loss_weights": [0.1, 0.2]}, "`loss_weights` to hold 1 entries"),
        ({"loss_weights": [-0.1]}, r"`loss_weights\[0\]`.*-0\.1"),
    ],
)
def test_n9_wrong_setting_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        SelfKnowledge(**{"layer_mappings": [[["exit1", "exit3"]]], **settings})


def test_n9_group_without_inner_lists_is_refused():
    """The form of the other criterion, pairs without groups, is not taken for something else."""
    with pytest.raises(ValueError, match="layer_mappings"):
        SelfKnowledge([["exit1", "exit3"], ["exit2", "exit3"]])


def test_n9_a_teacher_that_is_set_is_not_called(distiller):
    model, teacher, x = Exits().double(), Mlp(3).double(), inputs()
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    ready = distiller(model, teacher, SelfKnowledge([[["exit1", "exit3"]]], 2.0, ["KL"]))
    ready.on_train_begin()
    ready.on_after_compute_loss(x, model(x), torch.tensor(0.0))


def test_n9_built_in_training_needs_no_teacher_and_teaches_the_shallow_exits(distiller):
    model = Exits((5, 6, 7), seed=2)
    before, x = copy.deepcopy(model), torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    labels = (x.sum(1) > 0).long()
    criterion = SelfKnowledge(
        [[["block1", "block3"]], [["exit1", "exit3"], ["exit2", "exit3"]]], 2.0, ["L2", "KL"], [0.01, 1.0], True
    )
    ready = distiller(model, None, criterion, train={"end_epoch": 15}, train_dataloader=[(x, labels)] * 6)
    ready.optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    assert ready.fit() is model

    for exit_ in ("exit1", "exit2", "exit3"):  # the first two see no labels and learn from the deepest only
        assert F.cross_entropy(model.places(x)[exit_], labels) < F.cross_entropy(before.places(x)[exit_], labels)
        assert (model.places(x)[exit_].argmax(-1) == labels).float().mean() > 0.85


# The term ----------------------------------------------------------------------------------------------------------


def test_n9_term_in_a_distiller_without_a_teacher_equals_the_formula():
    model, x = Exits().double(), inputs()
    term = SelfDistillation(["exit1", "exit2"], "exit3", SoftTargetLoss(temperature=3.0), weight=0.5)
    with Distiller(model, None, term) as distiller:
        with distiller.record():
            model(x)
        total = distiller.total(torch.tensor(0.25, dtype=torch.float64))
    z = {name: value.detach().numpy() for name, value in model.places(x).items()}
    expected = 0.25 + 0.5 * np.mean([logits_loss("KL", z[name], z["exit3"], 3.0) for name in ("exit1", "exit2")])
    torch.testing.assert_close(total.item(), float(expected), **CLOSE)


def by_hand(model: Exits, adapter: nn.Linear, data, steps: int) -> None:
    """Training with one adapted self-distillation term, in plain torch."""
    optimizer = torch.optim.SGD([*model.parameters(), *adapter.parameters()], lr=0.1, momentum=0.9)
    for x, y in list(data)[:steps]:
        z = model.places(x)
        loss = F.cross_entropy(z["exit3"], y) + 2.0 * (adapter(z["block1"]) - z["block3"].detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Notes(DistillCallback):
    """Keeps the adapters as they were first drawn."""

    first: dict[str, Any] | None = None

    def on_before_backward(self, trainer, pl_module, loss):
        super().on_before_backward(trainer, pl_module, loss)
        if self.first is None:
            self.first = copy.deepcopy(self.adapter_state()["adapters"])


def test_n6_callback_trains_the_student_and_the_adapter_as_by_hand(trainer):
    """N9: no teacher in the callback either."""
    model = Exits((5, 6, 7))
    twin = copy.deepcopy(model)
    callback = Notes(None, SelfDistillation("block1", "block3", weight=2.0))
    trainer(callbacks=callback, max_steps=4).fit(Classifier(model), loader())
    adapter = nn.Linear(5, 7)
    adapter.weight.data, adapter.bias.data = sorted(callback.first["block1"].values(), key=lambda v: -v.ndim)
    drawn = adapter.weight.detach().clone()
    by_hand(twin, adapter, loader(), 4)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    ended = max(callback.adapter_state()["adapters"]["block1"].values(), key=lambda v: v.ndim)
    torch.testing.assert_close(ended, adapter.weight.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(ended, drawn)


def test_n6_adapters_are_saved_and_resumed_exactly(trainer, tmp_path):
    def parts():
        torch.manual_seed(4)
        return Classifier(Exits((5, 6, 7))), DistillCallback(None, SelfDistillation("block1", "block3", weight=2.0))

    module, whole = parts()
    trainer(callbacks=whole, max_epochs=2).fit(module, loader())
    half, callback = parts()
    first = trainer(callbacks=callback, max_epochs=1)
    first.fit(half, loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, callback = parts()
    trainer(callbacks=callback, max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), resumed.parameters(), strict=True))
    expected, adapter = (each.adapter_state()["adapters"]["block1"] for each in (whole, callback))
    assert all(torch.equal(value, adapter[name]) for name, value in expected.items())


def test_n9_distill_module_trains_without_a_teacher(trainer):
    model = Exits((5, 6, 7))
    before = copy.deepcopy(model)
    module = DistillModule(model, None, SelfDistillation("block1", "block3"))
    running = trainer(max_epochs=1, log_every_n_steps=1)
    running.fit(module, loader(), loader(rows=6))
    assert "distill/block1_loss" in running.callback_metrics
    assert not any(
        torch.equal(a, b) for a, b in zip(model.block1.parameters(), before.block1.parameters(), strict=True)
    )


def test_n9_term_stands_beside_terms_with_a_teacher(trainer):
    model, teacher = Exits(), Mlp(9, seed=3)
    x = torch.randn(4, 4)
    terms = [
        LogitsDistillation(SoftTargetLoss(temperature=2.0), weight=0.5),
        SelfDistillation("exit1", "exit3", SoftTargetLoss(temperature=3.0), weight=0.25),
    ]
    with Distiller(model, teacher, terms) as distiller:
        with distiller.record():
            model(x)
        total = distiller.total(torch.tensor(0.0)).item()
        assert distiller.parts["exit1_loss"] > 0
    z = {name: value.detach().numpy() for name, value in model.places(x).items()}
    teacher_logits = teacher(x).detach().numpy()
    expected = 0.5 * logits_loss("KL", z["exit3"], teacher_logits, 2.0)
    expected += 0.25 * logits_loss("KL", z["exit1"], z["exit3"], 3.0)
    assert total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("term", [LogitsDistillation(), FeatureDistillation("block1", "block3")])
def test_n9_term_that_reads_a_teacher_raises_without_one(term):
    with pytest.raises(ValueError, match=rf"`teacher` to be a module, since term '{term.name}' reads it"):
        Distiller(Exits(), None, [SelfDistillation("exit1", "exit3"), term])


def test_n9_unknown_deep_layer_raises_with_the_closest():
    with pytest.raises(ValueError, match=r"'exit33'.*Closest: 'exit3'"):
        Distiller(Exits(), None, SelfDistillation("exit1", "exit33"))


def test_n9_deep_layer_of_another_shape_without_adapter_raises():
    model = Exits((5, 6, 7))
    with Distiller(model, None, SelfDistillation("block1", "block3", adapter=None)) as distiller:
        with distiller.record():
            model(torch.ones(2, 4))
        with pytest.raises(ValueError, match=r"'block1'.*'block3'.*equal shapes, but got \(2, 5\) and \(2, 7\)"):
            distiller.total(torch.tensor(0.0))
