"""L31: who the student is, where the user does not say, and how layers are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from tiny import Mlp
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_distill import DistillCallback, Distiller, FeatureDistillation, LogitsDistillation

MakeTrainer = Callable[..., Trainer]


class Spy:
    """A loss that keeps what it compares."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        self.pairs.append((student.detach().clone(), teacher.clone()))
        return ((student - teacher) ** 2).mean()


def expected(net: Any) -> list[Tensor]:
    """The logits and the feature of ``layer2`` for the first batch."""
    x = nets.batches()[0][0]
    with torch.no_grad():
        feature = net.layer2(torch.tanh(net.layer1(x.flatten(1))))
        return [net.head(torch.tanh(feature)), feature]


def check(trainer: MakeTrainer, module: Any, layer: str = "model.layer2", **settings: Any) -> None:
    """Assert that a step compares the student of seed 1 with the teacher, in logits and feature."""
    teacher, logits, feature = nets.make(nets.MLP, 2, 6), Spy(), Spy()
    terms = [LogitsDistillation(logits), FeatureDistillation(layer, "layer2", feature, adapter=None)]
    trainer(max_steps=1, callbacks=[DistillCallback(teacher, terms, **settings)]).fit(module, nets.loader())
    assert (len(logits.pairs), len(feature.pairs)) == (1, 1)
    nets.close([logits.pairs[0][0], feature.pairs[0][0]], expected(nets.student()), 1e-6)
    nets.close([logits.pairs[0][1], feature.pairs[0][1]], expected(teacher), 1e-6)


class Crowded(nets.InnerModule):
    """``self.model(x)`` among a criterion, metrics and a module that nobody calls."""

    def __init__(self) -> None:
        super().__init__(nets.student())
        self.weighted = nn.CrossEntropyLoss(weight=torch.ones(nets.CLASSES))
        self.accuracy, self.mean = MulticlassAccuracy(nets.CLASSES), MeanMetric()
        self.ema = nets.student(7)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.model(batch[0])
        loss = self.weighted(logits, batch[1])
        self.accuracy(logits.softmax(-1), batch[1])
        self.mean(loss)
        return loss


class LearnedCriterion(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.scale * logits, labels)


class Itself(nets.ForwardModule):
    """A LightningModule that is the network: its layers are its own children."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        net = nets.student()
        self.layer1, self.layer2, self.head = net.layer1, net.layer2, net.head

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer1(x.flatten(1)))
        return self.head(torch.tanh(self.layer2(x)))

    validation_step = None  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_module_whose_forward_is_called_is_the_student(trainer: MakeTrainer) -> None:
    """L31: `self(x)`, though its child is called too."""
    check(trainer, nets.ForwardModule(nets.student()))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_module_that_is_the_network_is_the_student(trainer: MakeTrainer) -> None:
    """L31: `self(x)` with the layers as children."""
    check(trainer, Itself(), "layer2")


@pytest.mark.parametrize("layer", ["layer2", "model.layer2"])
@pytest.mark.parametrize("named", [None, "model"])
def test_layers_may_be_named_from_the_module_or_from_the_student(
    trainer: MakeTrainer, layer: str, named: str | None
) -> None:
    """L31: `self.model(x)`, with `student=` and without."""
    check(trainer, nets.InnerModule(nets.student()), layer, student=named)


def test_criteria_and_metrics_beside_the_student_are_not_candidates(trainer: MakeTrainer) -> None:
    """L31: nor is a copy of the student that nobody calls."""
    check(trainer, Crowded())


def test_a_criterion_with_parameters_is_not_a_candidate_if_layers_are_tapped(trainer: MakeTrainer) -> None:
    """L31: it does not hold them."""
    module = nets.InnerModule(nets.student())
    module.criterion = LearnedCriterion()
    check(trainer, module)


def test_a_criterion_with_parameters_leaves_the_choice_to_the_user(trainer: MakeTrainer) -> None:
    """L31: with logits alone nothing tells the two apart but `student=`."""
    module = nets.InnerModule(nets.student())
    module.criterion = LearnedCriterion()
    with pytest.raises(ValueError, match=r"several modules were: 'model', 'criterion'\. Pass student="):
        trainer(callbacks=[DistillCallback(nets.teacher())]).fit(module, nets.loader())
    assert nets.same(nets.snapshot(module.model), nets.snapshot(nets.student()))
    fit = trainer(callbacks=[DistillCallback(nets.teacher(), student="model")])
    fit.fit(module, nets.loader())
    assert fit.global_step == 2


class Several(nets.InnerModule):
    """Two networks with the same layers, called in one step."""

    def __init__(self) -> None:
        super().__init__(nets.student())
        self.other = nets.student(7)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.other(batch[0]) + self.model(batch[0]), batch[1])


def test_several_candidates_raise_and_are_listed(trainer: MakeTrainer) -> None:
    """L31: before the first backward."""
    module = Several()
    with pytest.raises(
        ValueError, match=r"Expected one student .* several modules were: 'model', 'other'\. Pass student"
    ):
        trainer(callbacks=[DistillCallback(nets.teacher())]).fit(module, nets.loader())
    assert nets.same(nets.snapshot(module), nets.snapshot(Several()))
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("layer", ["layer2", "model.layer2"])
def test_of_several_candidates_the_named_one_is_the_student(trainer: MakeTrainer, layer: str) -> None:
    """L31: `student=` ends the doubt."""
    check(trainer, Several(), layer, student="model")


def test_a_layer_named_from_the_module_tells_candidates_apart(trainer: MakeTrainer) -> None:
    """L31: 'model.layer2' is held by one of the two."""
    check(trainer, Several(), "model.layer2")


class Deep(nets.InnerModule):
    """The student two levels down."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.parts = nn.ModuleDict({"net": nets.student(), "other": nn.Linear(2, 2)})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.parts["net"](batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("layer", ["layer2", "parts.net.layer2"])
@pytest.mark.parametrize("named", [None, "parts.net"])
def test_a_student_further_down_is_found_or_named_by_its_path(
    trainer: MakeTrainer, layer: str, named: str | None
) -> None:
    """L31: in a ModuleDict, which is never called itself."""
    check(trainer, Deep(), layer, student=named)


class BuiltLater(nets.InnerModule):
    """A network that is built by a hook of Lightning's."""

    def __init__(self, hook: str) -> None:
        super().__init__(nn.Identity())
        self.hook = hook

    def _build(self, hook: str) -> None:
        if hook == self.hook and isinstance(self.model, nn.Identity):
            with torch.device("cpu"):  # Lightning builds on a GPU, which draws other numbers
                self.model = nets.student()

    def setup(self, stage: str) -> None:
        self._build("setup")

    def configure_model(self) -> None:
        self._build("configure_model")


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
@pytest.mark.parametrize("named", [None, "model"])
@pytest.mark.parametrize("layer", ["layer2", "model.layer2"])
def test_a_student_built_in_a_hook_is_found(trainer: MakeTrainer, hook: str, named: str | None, layer: str) -> None:
    """L31, L11: names are checked when the network is there."""
    check(trainer, BuiltLater(hook), layer, student=named)


def test_the_student_may_change_between_two_fits(trainer: MakeTrainer) -> None:
    """L31: one callback, two modules."""
    callback = DistillCallback(nets.teacher(), FeatureDistillation("layer2", "layer2"))
    for module in (nets.InnerModule(nets.student()), Deep(), nets.InnerModule(nets.student())):
        fit = trainer(callbacks=[callback])
        fit.fit(module, nets.loader())
        assert fit.global_step == 2


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_student_called_in_some_steps_only_is_found_in_the_first_of_them(trainer: MakeTrainer) -> None:
    """L31: a step that returns None before it calls anything is allowed."""

    def step(module: Any, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 0 else F.cross_entropy(module.model(batch[0]), batch[1])

    module = nets.StepModule(nets.student(), step)
    trainer(max_epochs=1, callbacks=[DistillCallback(nets.teacher())]).fit(module, nets.loader())
    assert not nets.same(nets.snapshot(module.model), nets.snapshot(nets.student()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_layers_of_a_program_of_torchscript_are_refused_in_words(side: str) -> None:
    networks = {"student": Mlp(5), "teacher": Mlp(5, seed=1)}
    networks[side] = torch.jit.script(networks[side])
    words = rf"the {side} to be a module with layers, since `terms\[0\].{side}_layer` names 'body'.*TorchScript"
    with pytest.raises(ValueError, match=words):
        Distiller(*networks.values(), FeatureDistillation("body", "body"))
