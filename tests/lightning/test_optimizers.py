"""L3: the adapters train as if they sat in the student's own optimizer, which nevertheless is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from lightning_distill import DistillCallback, Distiller, FeatureDistillation, LogitsDistillation, Tap
from lightning_distill.schedules import Step

pytestmark = pytest.mark.exact

MakeTrainer = Callable[..., Trainer]
STEPS = 12  # two epochs of six


def kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    # one function for the callback and the loop, so that equality can be bit for bit
    log_p_t, log_p_s = F.log_softmax(teacher_logits / 2, -1), F.log_softmax(student_logits / 2, -1)
    return 4 * (log_p_t.exp() * (log_p_t - log_p_s)).sum(-1).mean()


def gap(student: Tensor, teacher: Tensor) -> Tensor:
    return ((student - teacher) ** 2).mean()


def run_by_hand(
    make_optimizers: Callable[[list[nn.Parameter], list[nn.Parameter]], list[Any]],
    schedule: Callable[[Any], Any] | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    steps: int = STEPS,
) -> tuple[nn.Module, nn.Module]:
    """Student and adapter after a plain loop; the optimizers are made from both their parameters."""
    net, teacher, adapter = nets.student(), nets.teacher(), nets.make(nn.Linear, 5, 6, 10)
    optimizers = make_optimizers(list(net.parameters()), list(adapter.parameters()))
    scheduler = schedule(optimizers[0]) if schedule else None
    data = nets.batches(48) * 2
    for step in range(steps):
        for x, y in data[step * accumulate : (step + 1) * accumulate]:
            feature = net.layer2(torch.tanh(net.layer1(x.flatten(1))))
            logits = net.head(torch.tanh(feature))
            with torch.no_grad():
                teacher_feature = teacher.layer2(torch.tanh(teacher.layer1(x.flatten(1))))
                teacher_logits = teacher.head(torch.tanh(teacher_feature))
            distillation = kl(logits, teacher_logits) + 2.0 * gap(adapter(feature), teacher_feature)
            ((0.5 * F.cross_entropy(logits, y) + distillation) / accumulate).backward()
        if clip is not None:
            for module in (net, adapter):
                nn.utils.clip_grad_norm_(module.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return net, adapter


def callback(**settings: Any) -> DistillCallback:
    adapter = nets.make(nn.Linear, 5, 6, 10)
    feature = FeatureDistillation("layer2", "layer2", gap, weight=2.0, adapter=adapter)
    return DistillCallback(nets.teacher(), [LogitsDistillation(kl), feature], task_weight=0.5, **settings)


def run_callback(
    trainer: MakeTrainer, configure: Callable[[list[nn.Parameter]], Any], distill: DistillCallback, **settings: Any
) -> tuple[nn.Module, nn.Module]:
    module = nets.InnerModule(nets.student(), lambda parameters: configure(list(parameters)))
    trainer(**{"max_epochs": 2, **settings}, callbacks=[distill]).fit(module, nets.loader(48))
    return module.model, distill.terms[1].adapters[0]


def assert_same(first: tuple[nn.Module, nn.Module], second: tuple[nn.Module, nn.Module]) -> None:
    for actual, expected in zip(first, second, strict=True):
        assert nets.same(nets.snapshot(actual), nets.snapshot(expected))


O = torch.optim  # noqa: E741
OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "SGD": (lambda p: O.SGD(p, lr=0.1), None),
    "SGD Nesterov": (lambda p: O.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01), None),
    "AdamW with cosine": (
        lambda p: O.AdamW(p, lr=0.03, weight_decay=0.1),
        lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    ),
    "OneCycle over momentum": (
        lambda p: O.SGD(p, lr=0.1, momentum=0.9),
        lambda o: schedulers.OneCycleLR(o, max_lr=0.2, total_steps=STEPS, cycle_momentum=True),
    ),
    "OneCycle over betas": (
        lambda p: O.Adam(p, lr=0.01),
        lambda o: schedulers.OneCycleLR(o, max_lr=0.05, total_steps=STEPS, cycle_momentum=True),
    ),
    "warm-up from zero": (lambda p: O.AdamW(p, lr=0.02), lambda o: schedulers.LambdaLR(o, lambda step: step / STEPS)),
    "RMSprop": (lambda p: O.RMSprop(p, lr=0.01, momentum=0.5, centered=True), None),
    "Adagrad": (lambda p: O.Adagrad(p, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.2), None),
    "NAdam": (lambda p: O.NAdam(p, lr=0.02, decoupled_weight_decay=True, weight_decay=0.1), None),
    "Adam amsgrad": (lambda p: O.Adam(p, lr=0.02, amsgrad=True, betas=(0.8, 0.9)), None),
    "RAdam": (lambda p: O.RAdam(p, lr=0.02), None),
    "Adadelta": (lambda p: O.Adadelta(p, lr=1.0), None),
    "Adamax": (lambda p: O.Adamax(p, lr=0.02), None),
    "ASGD": (lambda p: O.ASGD(p, lr=0.1), None),
    "Rprop": (lambda p: O.Rprop(p, lr=0.01), None),
    "Adafactor": (lambda p: O.Adafactor(p, lr=0.05), None),
}


def configuration(name: str) -> Callable[[list[nn.Parameter]], Any]:
    optimizer, schedule = OPTIMIZERS[name]

    def configure(parameters: list[nn.Parameter]) -> Any:
        made = optimizer(parameters)
        if schedule is None:
            return made
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule(made), "interval": "step"}}

    return configure


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_student_and_adapters_equal_one_optimizer_bit_for_bit(trainer: MakeTrainer, name: str) -> None:
    """L3: with the adapter's parameters in the student's parameter group."""
    optimizer, schedule = OPTIMIZERS[name]
    expected = run_by_hand(lambda student, adapters: [optimizer([*student, *adapters])], schedule)
    assert_same(run_callback(trainer, configuration(name), callback()), expected)
    assert not nets.same(nets.snapshot(expected[1]), nets.snapshot(nets.make(nn.Linear, 5, 6, 10)))


def test_accumulated_gradients_equal_one_optimizer_bit_for_bit(trainer: MakeTrainer) -> None:
    """L2, L3: the adapters step when the student does."""
    optimizer = OPTIMIZERS["SGD Nesterov"][0]
    expected = run_by_hand(lambda student, adapters: [optimizer([*student, *adapters])], accumulate=2, steps=6)
    actual = run_callback(trainer, configuration("SGD Nesterov"), callback(), accumulate_grad_batches=2)
    assert_same(actual, expected)


def test_clipping_treats_the_student_as_in_a_plain_run(trainer: MakeTrainer) -> None:
    """L3: its norm is its own, the adapters' are clipped by themselves."""
    optimizer = OPTIMIZERS["SGD Nesterov"][0]
    expected = run_by_hand(lambda student, adapters: [optimizer([*student, *adapters])], clip=0.2)
    assert_same(run_callback(trainer, configuration("SGD Nesterov"), callback(), gradient_clip_val=0.2), expected)


def test_clipping_by_value_leaves_adapters_alone_while_their_terms_rest(trainer: MakeTrainer) -> None:
    """PyTorch cannot clip the values of no gradients at all."""
    distill = callback()
    distill.terms[1].weight = Step([2.0, 0.0], boundaries=[1])
    clip = {"gradient_clip_val": 0.2, "gradient_clip_algorithm": "value"}
    _, short = run_callback(trainer, configuration("SGD"), callback(), max_epochs=1, **clip)
    _, long = run_callback(trainer, configuration("SGD"), distill, max_epochs=2, **clip)
    assert nets.same(nets.snapshot(long), nets.snapshot(short))


Groups = Callable[[list[nn.Parameter], list[nn.Parameter]], list[Any]]
SLOW, FAST = {"lr": 0.01, "weight_decay": 0.3, "momentum": 0.5}, {"lr": 0.1, "weight_decay": 0.02, "momentum": 0.8}
GROUPS: dict[str, Groups] = {
    "the first": lambda student, adapters: [
        {"params": student[:2] + adapters, **FAST},
        {"params": student[2:], **SLOW},
    ],
    "the last": lambda student, adapters: [{"params": student[:2], **SLOW}, {"params": student[2:] + adapters, **FAST}],
}


@pytest.mark.parametrize("leading", GROUPS)
@pytest.mark.parametrize("schedule", ["none", "cosine", "warm-up from zero"])
def test_of_several_groups_the_one_with_the_largest_rate_is_mirrored(
    trainer: MakeTrainer, leading: str, schedule: str
) -> None:
    """L3: also where a schedule moves all rates, and where it starts them all at zero."""
    schedule_of: Any = {
        "none": None,
        "cosine": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
        "warm-up from zero": lambda o: schedulers.LambdaLR(o, lambda step: min(1.0, step / 4)),
    }[schedule]
    expected = run_by_hand(lambda student, adapters: [O.SGD(GROUPS[leading](student, adapters))], schedule_of)

    def configure(parameters: list[nn.Parameter]) -> Any:
        optimizer = O.SGD(GROUPS[leading](parameters, []))
        if schedule_of is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule_of(optimizer), "interval": "step"}}

    assert_same(run_callback(trainer, configure, callback()), expected)


class Needy(torch.optim.SGD):
    """A user's optimizer that cannot be made from its parameter groups."""

    def __init__(self, params: Any, secret: str, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.secret = secret


class Embeds(nn.Module):
    """A student with sparse gradients only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(4, 6, sparse=True)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x.flatten(1) > 0).long() + 2 * (x.flatten(1) > 1).long().clamp(max=1))


class Matrices(nn.Module):
    """A student with matrices only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Linear(16, 6, bias=False)
        self.layer2 = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, nets.CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer2(torch.tanh(self.layer1(x.flatten(1))))))


UNCLONEABLE: dict[str, tuple[Callable[[], nn.Module], Callable[[Iterable[nn.Parameter]], Any], Any]] = {
    "LBFGS": (nets.student, lambda p: O.LBFGS(p, lr=0.1, max_iter=3), "layer2"),
    "SparseAdam": (lambda: nets.make(Embeds, 1), lambda p: O.SparseAdam(list(p), lr=0.02), "table"),
    "Needy": (nets.student, lambda p: Needy(p, "of the user"), "layer2"),
}
if hasattr(O, "Muon"):  # torch 2.9 and newer
    UNCLONEABLE["Muon"] = (lambda: nets.make(Matrices, 1), lambda p: O.Muon(p, lr=0.02), "layer2")


@pytest.mark.parametrize("name", UNCLONEABLE)
def test_an_optimizer_that_cannot_be_cloned_raises_before_the_first_backward(trainer: MakeTrainer, name: str) -> None:
    """L3: the message asks for adapter_optimizer, the student is as it was."""
    network, optimizer, layer = UNCLONEABLE[name]
    module = nets.InnerModule(network(), optimizer)
    before = nets.snapshot(module)
    term = FeatureDistillation(layer, "layer2", adapter="linear")
    with pytest.raises(
        ValueError, match=rf"Expected the student's optimizer .* but got {name}.* Pass adapter_optimizer"
    ):
        trainer(callbacks=[DistillCallback(nets.teacher(), term)]).fit(module, nets.loader())
    assert nets.same(before, nets.snapshot(module))
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("name", UNCLONEABLE)
def test_an_optimizer_that_cannot_be_cloned_works_with_adapter_optimizer(trainer: MakeTrainer, name: str) -> None:
    """L3: both student and adapters train."""
    network, optimizer, layer = UNCLONEABLE[name]
    module = nets.InnerModule(network(), optimizer)
    before = nets.snapshot(module)
    adapter = nets.make(nn.Linear, 5, 6, 10)
    term = FeatureDistillation(Tap(layer), "layer2", adapter=adapter)
    distill = DistillCallback(nets.teacher(), term, adapter_optimizer=torch.optim.Adam)
    trainer(max_epochs=1, callbacks=[distill]).fit(module, nets.loader())
    after = nets.snapshot(module)
    assert all(not torch.equal(before[key], after[key]) and after[key].isfinite().all() for key in before)
    for parameter, start in zip(term.adapters[0].parameters(), adapter.parameters(), strict=True):
        assert not torch.equal(parameter, start)


@pytest.mark.parametrize("name", sorted(UNCLONEABLE.keys() - {"SparseAdam"}))
def test_logits_alone_need_no_clone(trainer: MakeTrainer, name: str) -> None:
    """L3: without adapters there is nothing to follow."""
    network, optimizer, _ = UNCLONEABLE[name]
    fit = trainer(callbacks=[DistillCallback(nets.teacher())])
    fit.fit(nets.InnerModule(network(), optimizer), nets.loader())
    assert fit.global_step == 2


def test_adapter_optimizer_keeps_its_own_settings(trainer: MakeTrainer) -> None:
    """L3: a factory's optimizer is stepped with the student's, and does not take over its schedule."""

    def make(student: list[nn.Parameter], adapters: list[nn.Parameter]) -> list[Any]:
        return [O.AdamW(student, lr=0.03, weight_decay=0.1), O.RMSprop(adapters, lr=0.004)]

    expected = run_by_hand(make, OPTIMIZERS["AdamW with cosine"][1])
    distill = callback(adapter_optimizer=lambda parameters: O.RMSprop(parameters, lr=0.004))
    assert_same(run_callback(trainer, configuration("AdamW with cosine"), distill), expected)


class TwoOptimizers(nets.InnerModule):
    """Manual optimization of another network before the student."""

    def __init__(self, distill: DistillCallback) -> None:
        super().__init__(nets.student())
        self.other, self.automatic_optimization = nn.Linear(16, 1), False
        self.distill = distill

    def training_step(self, batch: Any, batch_idx: int) -> None:
        other_optimizer, optimizer = self.optimizers()
        other_optimizer.zero_grad()
        self.manual_backward(self.other(batch[0].flatten(1)).square().mean())
        other_optimizer.step()
        loss = 0.5 * self.criterion(self.model(batch[0]), batch[1]) + self.distill.loss()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return O.Adam(self.other.parameters(), lr=0.5), O.SGD(self.model.parameters(), lr=0.1, momentum=0.9)


def test_among_several_optimizers_the_students_is_followed(trainer: MakeTrainer) -> None:
    """L3, L18: the one that has the student's parameters."""
    expected = run_by_hand(lambda student, adapters: [O.SGD([*student, *adapters], lr=0.1, momentum=0.9)])
    distill = callback()
    distill.student = "model"  # `other` is called as well
    module = TwoOptimizers(distill)
    trainer(max_epochs=2, callbacks=[distill]).fit(module, nets.loader(48))
    assert_same((module.model, distill.terms[1].adapters[0]), expected)


def test_the_students_optimizer_is_left_alone(trainer: MakeTrainer) -> None:
    """L3, L5: its groups hold the student's parameters only, and it keeps no hook."""
    module = nets.InnerModule(nets.student())
    fit = trainer(callbacks=[callback()])
    fit.fit(module, nets.loader(48))
    optimizer = fit.optimizers[0]
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [list(map(id, module.parameters()))]
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert "zero_grad" not in vars(optimizer)
    assert copy.deepcopy(optimizer) is not optimizer


CLEARS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], None]] = {
    "the optimizer": lambda student, optimizer: optimizer.zero_grad(),
    "the student": lambda student, optimizer: student.zero_grad(),
    "by hand": lambda student, optimizer: [setattr(p, "grad", None) for p in student.parameters()] and None,
    "nothing": lambda student, optimizer: None,
}


@pytest.mark.parametrize("by", CLEARS)
def test_gradients_of_a_step_that_is_not_taken_are_cleared_with_the_students(by: str) -> None:
    """In a loop that leaves out every second step; where nothing clears them, gradients are accumulated."""
    networks = nets.student(), nets.teacher()
    copies = copy.deepcopy(networks[0]), nets.teacher().eval()
    optimizer = torch.optim.SGD(networks[0].parameters(), lr=0.1, momentum=0.9)
    adapter: Any = None
    with Distiller(*networks, FeatureDistillation("layer1", "layer1"), task_weight=0) as distiller:
        distiller.follow(optimizer)
        for number, (x, y) in enumerate(nets.batches() * 2):
            CLEARS[by](networks[0], optimizer)
            with distiller.record():
                task = F.cross_entropy(networks[0](x), y)
            distiller.total(task).backward()
            if adapter is None:
                adapter = copy.deepcopy(distiller.terms[0].adapters[0])
                adapter.zero_grad()
                together = torch.optim.SGD([*copies[0].parameters(), *adapter.parameters()], lr=0.1, momentum=0.9)
            if by != "nothing":
                together.zero_grad()
            own, target = (network.layer1(x.flatten(1)) for network in copies)
            F.mse_loss(adapter(own), target.detach()).backward()
            if number % 2:
                optimizer.step()
                together.step()
                if by == "nothing":
                    CLEARS["the optimizer"](networks[0], optimizer)
                    together.zero_grad()
        trained = distiller.terms[0].adapters[0]
        for actual, expected in ((networks[0].layer1, copies[0].layer1), (trained, adapter)):
            nets.close(list(actual.parameters()), list(expected.parameters()), 1e-6)
