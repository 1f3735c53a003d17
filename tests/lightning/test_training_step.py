"""One training step: L1, L2, L8, L18, L26 and L28, against loops written by hand in plain PyTorch."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_distill import DistillCallback, FeatureDistillation, LogitsDistillation, SoftTargetLoss

MakeTrainer = Callable[..., Trainer]
TEMPERATURE, LOGITS_WEIGHT, FEATURE_WEIGHT, TASK_WEIGHT = 3.0, 0.7, 2.0, 0.4


def kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Hinton's loss written out: T^2 sum_c p_t (log p_t - log p_s), mean over the examples."""
    p_t, p_s = (torch.softmax(z / TEMPERATURE, -1) for z in (teacher_logits, student_logits))
    return TEMPERATURE**2 * (p_t * (p_t.log() - p_s.log())).sum(-1).mean()


def layers(net: nets.MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """The feature of ``layer2`` and the logits."""
    feature = net.layer2(torch.tanh(net.layer1(x.flatten(1))))
    return feature, net.head(torch.tanh(feature))


def terms(adapter: nn.Module | None = None) -> list[Any]:
    logits = LogitsDistillation(SoftTargetLoss(temperature=TEMPERATURE), weight=LOGITS_WEIGHT)
    if adapter is None:
        return [logits]
    return [logits, FeatureDistillation("layer2", "layer2", "mse", weight=FEATURE_WEIGHT, adapter=adapter)]


@dataclass
class ByHand:
    """A distillation loop in plain PyTorch, in float64, without the library."""

    batches: list[tuple[Tensor, Tensor]]
    accumulate: int = 1
    task_weight: float = TASK_WEIGHT

    def run(self, adapter: nn.Module | None = None) -> None:
        self.net, teacher = nets.student().double(), nets.teacher().double()
        self.adapter = None if adapter is None else copy.deepcopy(adapter).double()
        parameters = [*self.net.parameters(), *(self.adapter.parameters() if self.adapter else [])]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        self.totals: list[Tensor] = []
        self.gradients: list[list[Tensor]] = []
        for index, (x, y) in enumerate(self.batches):
            feature, logits = layers(self.net, x.double())
            with torch.no_grad():
                teacher_feature, teacher_logits = layers(teacher, x.double())
            total = self.task_weight * F.cross_entropy(logits, y) + LOGITS_WEIGHT * kl(logits, teacher_logits)
            if self.adapter is not None:
                total = total + FEATURE_WEIGHT * ((self.adapter(feature) - teacher_feature) ** 2).mean()
            self.totals.append(total.detach())
            (total / self.accumulate).backward()
            if (index + 1) % self.accumulate == 0 or index + 1 == len(self.batches):
                self.gradients.append([parameter.grad.clone() for parameter in self.net.parameters()])
                optimizer.step()
                optimizer.zero_grad()


class Gradients(Callback):
    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append([parameter.grad.clone() for parameter in pl_module.model.parameters()])


def fit_double(
    trainer: MakeTrainer, module: Any, data: Any, *more: Callback, adapter: nn.Module | None = None, **settings: Any
) -> DistillCallback:
    """One epoch in float64 with the callback in the middle of the others."""
    callback = DistillCallback(nets.teacher(), terms(adapter), task_weight=TASK_WEIGHT)
    trainer(max_epochs=1, precision="64-true", callbacks=[callback, *more], **settings).fit(module, data)
    return callback


def assert_like(by_hand: ByHand, module: Any, callback: DistillCallback) -> None:
    nets.close(list(module.model.parameters()), list(by_hand.net.parameters()), 1e-12)
    if by_hand.adapter is not None:
        nets.close(list(callback.terms[1].adapters.parameters()), list(by_hand.adapter.parameters()), 1e-12)


# L1 ------------------------------------------------------------------------------------------------------------------


def fit_conv(trainer: MakeTrainer, callback: DistillCallback | None) -> dict[str, Tensor]:
    torch.manual_seed(11)
    module = nets.ForwardModule(nets.make(nets.ConvNet, 3, 3, dropout=0.5))
    callbacks = [] if callback is None else [callback]
    trainer(max_epochs=3, callbacks=callbacks).fit(module, nets.loader(shuffle=True), nets.loader(7))
    return nets.snapshot(module)


def conv_terms(weight: float, adapter: str | None = "auto") -> list[Any]:
    layer = "stem" if adapter is None else "body"
    return [
        LogitsDistillation(weight=weight),
        FeatureDistillation(f"model.{layer}", layer, "mse", weight=weight, adapter=adapter),
    ]


def test_all_weights_zero_train_bit_for_bit_as_without_the_callback(trainer: MakeTrainer) -> None:
    """L1: with shuffling, dropout and batch normalisation, buffers included, the generators left alike."""
    plain = fit_conv(trainer, None)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    random.seed(0)
    np.random.seed(0)
    distilled = fit_conv(trainer, DistillCallback(nets.make(nets.ConvNet, 4, 5, dropout=0.5), conv_terms(0.0)))
    assert nets.same(plain, distilled)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


@pytest.mark.parametrize("kind", ["logits", "adapter"])
def test_distilling_takes_nothing_from_the_global_random_state(trainer: MakeTrainer, kind: str) -> None:
    """L1: shuffling and dropout masks are those of a run without the callback, though adapters are initialised."""
    fit_conv(trainer, None)
    plain = torch.get_rng_state()
    distilled = DistillCallback(
        nets.make(nets.ConvNet, 4, 5, dropout=0.5), conv_terms(1.0)[: 1 if kind == "logits" else 2]
    )
    changed = fit_conv(trainer, distilled)
    assert torch.equal(plain, torch.get_rng_state())
    assert not nets.same(changed, fit_conv(trainer, None))


def test_adapters_start_alike_for_one_seed_and_differ_for_another(trainer: MakeTrainer) -> None:
    """L1: without the global random state adapters still depend on the seed."""

    def start(seed: int) -> Tensor:
        torch.manual_seed(seed)
        callback = DistillCallback(nets.teacher(), FeatureDistillation("layer2", "layer2"))
        module = nets.InnerModule(nets.student(), lambda parameters: torch.optim.SGD(parameters, lr=0.0))
        trainer(max_steps=1, callbacks=[callback]).fit(module, nets.loader())
        return callback.terms[0].adapters[0].weight

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


# L2 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_gradients_equal_a_hand_written_loop(trainer: MakeTrainer, accumulate: int, with_adapter: bool) -> None:
    """L2: at every optimizer step, for accumulate_grad_batches 1 and 2, five batches so that the last window is odd."""
    adapter = nets.make(nn.Linear, 5, 6, 10) if with_adapter else None
    by_hand = ByHand(nets.batches(40), accumulate)
    by_hand.run(adapter)
    module, gradients = nets.InnerModule(nets.student()), Gradients()
    callback = fit_double(
        trainer, module, nets.loader(40), gradients, adapter=adapter, accumulate_grad_batches=accumulate
    )
    assert len(gradients.seen) == len(by_hand.gradients) == {1: 5, 2: 3}[accumulate]
    if accumulate == 1:  # Lightning divides a last window that is not full by its whole length too, as the loop does
        assert all(float(gradient.abs().max()) > 1e-4 for gradient in gradients.seen[0])
    for seen, expected in zip(gradients.seen, by_hand.gradients, strict=True):
        nets.close(seen, expected, 1e-12)
    assert_like(by_hand, module, callback)


def test_the_reported_loss_is_the_total(trainer: MakeTrainer) -> None:
    """L2: what on_train_batch_end is given is task_weight * task loss + the weighted terms."""
    by_hand, outputs = ByHand(nets.batches()), nets.Outputs()
    by_hand.run()
    fit_double(trainer, nets.InnerModule(nets.student()), nets.loader(), outputs)
    nets.close([output["loss"] for output in outputs.outputs], by_hand.totals, 1e-12)


def test_extra_keys_of_a_returned_dict_stay(trainer: MakeTrainer) -> None:
    """L2: the loss is replaced by the total in a dict of the user's own, the rest arrives as it was."""

    def step(module: Any, batch: Any, batch_idx: int) -> dict[str, Any]:
        logits = module.model(batch[0])
        return {"seen": batch_idx, "loss": F.cross_entropy(logits, batch[1]), "logits": logits.detach()}

    by_hand, outputs = ByHand(nets.batches()), nets.Outputs()
    by_hand.run()
    module = nets.StepModule(nets.student(), step)
    assert_like(by_hand, module, fit_double(trainer, module, nets.loader(), outputs))
    nets.close([output["loss"] for output in outputs.outputs], by_hand.totals, 1e-12)
    assert [output["seen"] for output in outputs.outputs] == [0, 1, 2]
    assert [output["logits"].shape for output in outputs.outputs] == [(8, nets.CLASSES)] * 3


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_returned_none_skips_the_batch_as_without_the_callback(trainer: MakeTrainer) -> None:
    """L2: the skipped batch leaves no trace in parameters."""

    def step(module: Any, batch: Any, batch_idx: int) -> Tensor | None:
        logits = module.model(batch[0])
        return None if batch_idx == 1 else F.cross_entropy(logits, batch[1])

    by_hand = ByHand([nets.batches()[0], nets.batches()[2]])
    adapter = nets.make(nn.Linear, 5, 6, 10)
    by_hand.run(adapter)
    module = nets.StepModule(nets.student(), step)
    callback = fit_double(trainer, module, nets.loader(), adapter=adapter)
    assert_like(by_hand, module, callback)


class BatchOnly(nets.InnerModule):
    def training_step(self, batch: Any) -> Any:
        return self.criterion(self.model(batch[0]), batch[1])


class Stars(nets.InnerModule):
    def training_step(self, *args: Any) -> Any:
        batch, batch_idx = args
        assert isinstance(batch_idx, int)
        return self.criterion(self.model(batch[0]), batch[1])


class Keywords(nets.InnerModule):
    def training_step(self, batch: Any, **kwargs: Any) -> Any:
        return self.criterion(self.model(batch[0]), batch[1])


class Iterator(nets.InnerModule):
    def training_step(self, dataloader_iter: Any) -> Any:
        x, y = (part.to(self.device) for part in next(dataloader_iter)[0])
        return self.criterion(self.model(x.double()), y)


@pytest.mark.parametrize("kind", [nets.InnerModule, nets.ForwardModule, BatchOnly, Stars, Keywords, Iterator])
@pytest.mark.filterwarnings(
    "ignore:Found .dataloader_iter. argument",
    "ignore:You are using the `dataloader_iter`",
    "ignore:You defined a `validation_step`",
)
def test_every_signature_of_training_step_works(trainer: MakeTrainer, kind: Any) -> None:
    """L2: (batch), (batch, batch_idx), *args, **kwargs and dataloader_iter."""
    by_hand, module = ByHand(nets.batches()), kind(nets.student())
    by_hand.run()
    assert_like(by_hand, module, fit_double(trainer, module, nets.loader()))


@dataclass
class Example:
    image: Tensor
    target: Tensor


class Styled(Dataset[Any]):
    def __init__(self, style: Callable[[Tensor, Tensor], Any], count: int = 24) -> None:
        self.style, self.data = style, nets.digits(count)

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, index: int) -> Any:
        return self.style(self.data[0][index], self.data[1][index])


def collate_examples(examples: list[Example]) -> Example:
    images, targets = zip(*((example.image, example.target) for example in examples), strict=True)
    return Example(torch.stack(images), torch.stack(targets))


BATCHES: dict[str, tuple[Any, Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": (nets.loader, lambda batch: batch),
    "dict": (lambda: DataLoader(Styled(lambda x, y: {"x": x, "y": y}), 8), lambda batch: (batch["x"], batch["y"])),
    "dataclass": (
        lambda: DataLoader(Styled(Example), 8, collate_fn=collate_examples),
        lambda batch: (batch.image, batch.target),
    ),
    "dict of loaders": (lambda: {"a": nets.loader(), "b": nets.loader(seed=9)}, lambda batch: batch["a"]),
    "list of loaders": (lambda: [nets.loader(seed=9), nets.loader()], lambda batch: batch[1]),
    "CombinedLoader": (
        lambda: CombinedLoader({"a": nets.loader(), "b": nets.loader(8)}, "max_size_cycle"),
        lambda batch: batch["a"],
    ),
}


@pytest.mark.parametrize("style", BATCHES)
def test_every_kind_of_batch_works(trainer: MakeTrainer, style: str) -> None:
    """L2: the callback never looks into a batch unless a loss needs labels."""
    data, unpack = BATCHES[style]

    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        x, y = unpack(batch)
        return F.cross_entropy(module.model(x), y)

    by_hand, module = ByHand(nets.batches()), nets.StepModule(nets.student(), step)
    by_hand.run()
    assert_like(by_hand, module, fit_double(trainer, module, data()))


# L8 ------------------------------------------------------------------------------------------------------------------


class Watching(nets.MLP):
    """Notes the modes in which it runs."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.modes: list[tuple[bool, bool, bool]] = []
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self.training))
        if self.table is None:  # what many networks keep from their first call, positions for example
            self.table = torch.zeros(nets.CLASSES, dtype=x.dtype, device=x.device)
        return super().forward(x) + self.table


@pytest.mark.parametrize("validate_first", [False, True])
@pytest.mark.parametrize("loss", ["kl", "own"])
def test_every_loss_still_backpropagates_after_validation(
    trainer: MakeTrainer, validate_first: bool, loss: str
) -> None:
    """L8: the teacher runs under no_grad in training, whatever inference mode validation uses in between."""
    teacher = nets.make(Watching, 2, 10)
    # autograd saves the teacher's tensor for the product
    product = None if loss == "kl" else (lambda student, teacher: (student * teacher).mean())
    feature = FeatureDistillation("layer2", "layer2", "mse")
    callback = DistillCallback(teacher, [LogitsDistillation(product), feature])
    module = nets.ForwardModule(nets.student())
    fit = trainer(max_epochs=2, val_check_interval=1, num_sanity_val_steps=2, callbacks=[callback])
    if validate_first:
        fit.validate(module, nets.loader(), verbose=False)
    before = nets.snapshot(module)
    fit.fit(module, nets.loader(), nets.loader(7))
    assert fit.global_step == 6
    assert not nets.same(before, nets.snapshot(module))
    grad, inference, training = zip(*teacher.modes[3 if validate_first else 0 :], strict=True)
    assert grad == inference == training == (False,) * 12  # six steps, six validations, nothing in the sanity check


# L18 -----------------------------------------------------------------------------------------------------------------


class Manual(nets.InnerModule):
    """Manual optimization, with ``callback.loss()`` in the user's own step."""

    def __init__(self, model: nn.Module, distill: Any = None) -> None:
        super().__init__(model)
        self.automatic_optimization = False
        self.distill = distill

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = TASK_WEIGHT * self.criterion(self.model(batch[0]), batch[1])
        if self.distill is not None:
            loss = loss + self.distill()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def test_manual_optimization_trains_student_and_adapters(trainer: MakeTrainer) -> None:
    """L18: equal to the loop written by hand."""
    adapter = nets.make(nn.Linear, 5, 6, 10)
    by_hand = ByHand(nets.batches())
    by_hand.run(adapter)
    callback = DistillCallback(nets.teacher(), terms(adapter))
    module = Manual(nets.student(), callback.loss)
    trainer(max_epochs=1, precision="64-true", callbacks=[callback]).fit(module, nets.loader())
    assert_like(by_hand, module, callback)


def test_manual_optimization_without_callback_loss_raises(trainer: MakeTrainer) -> None:
    """L18: distillation is never silently left out."""
    module = Manual(nets.student())
    fit = trainer(callbacks=[DistillCallback(nets.teacher())])
    with pytest.raises(MisconfigurationException, match=r"`callback\.loss\(\)`.*manual.*not called"):
        fit.fit(module, nets.loader())


def test_callback_loss_outside_a_run_raises() -> None:
    """L18: with what to do."""
    with pytest.raises(MisconfigurationException, match=r"Expected `loss` to be called inside `training_step`"):
        DistillCallback(nets.teacher()).loss()
