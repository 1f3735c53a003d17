"""The distiller without any Trainer: a plain loop, a gradient scaler, Fabric, several teachers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from device import ACCELERATOR, DEVICE
from lightning.fabric import Fabric
from nets import MLP, batches, make, same, snapshot, student, teacher
from torch import Tensor, nn

from lightning_distill import (
    Distiller,
    FeatureDistillation,
    LogitsDistillation,
    SoftTargetLoss,
    Tap,
)
from lightning_distill.recording import Call

pytestmark = pytest.mark.tensors


def soft_targets(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Hinton's term as in the paper, T^2 KL, mean over the batch."""
    targets = torch.softmax(teacher_logits / temperature, -1)
    gap = torch.log(targets) - torch.log_softmax(student_logits / temperature, -1)
    return temperature**2 * (targets * gap).sum(-1).mean()


def run(
    net: nn.Module, distiller: Distiller, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]
) -> None:
    for x, y in data:
        with distiller.record():
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        distiller.total(loss, (x, y)).backward()
        optimizer.step()


def test_a_plain_loop_gives_the_gradients_of_the_written_out_formula() -> None:
    """L2: total = task_weight * task_loss + sum of weight * term, against a formula written by hand."""
    net, big = student(), teacher().eval()
    x, y = batches()[0]
    with Distiller(net, big, LogitsDistillation(weight=0.7), task_weight=0.3) as distiller:
        with distiller.record():
            loss = F.cross_entropy(net(x), y)
        total = distiller.total(loss, (x, y))
    gradients = torch.autograd.grad(total, list(net.parameters()))
    expected = 0.3 * F.cross_entropy(net(x), y) + 0.7 * soft_targets(net(x), big(x).detach())
    torch.testing.assert_close(total, expected)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, list(net.parameters())), strict=True):
        torch.testing.assert_close(gradient, reference)


def test_parts_hold_each_term_without_its_weight_and_no_graph() -> None:
    net, big = student(), teacher().eval()
    x, y = batches()[0]
    distiller = Distiller(net, big, [LogitsDistillation(weight=0.5), FeatureDistillation("head", "head", weight=2.0)])
    with distiller.record():
        loss = F.cross_entropy(net(x), y)
    distiller.total(loss)
    parts = distiller.parts
    assert set(parts) == {"task_loss", "distillation_loss", "logits_loss", "head_loss"}
    torch.testing.assert_close(parts["distillation_loss"], 0.5 * parts["logits_loss"] + 2.0 * parts["head_loss"])
    torch.testing.assert_close(parts["head_loss"], F.mse_loss(net(x), big(x)))
    assert not any(part.requires_grad for part in parts.values())


def test_adapters_follow_an_optimizer_as_if_they_were_in_it() -> None:
    """L3 in a plain loop: student and adapter equal a loop with one optimizer over both, bit for bit."""
    net, big, data = student(), teacher(), batches()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    with Distiller(net, big, FeatureDistillation("layer2", "layer2")) as distiller:
        distiller.follow(optimizer)
        with distiller.record():
            net(data[0][0])
        distiller.total(torch.zeros(()))  # makes the adapter, takes no step
        start = distiller.state_dict()["adapters"]["layer2"]
        adapter = nn.Linear(6, 10)
        adapter.load_state_dict({name.removeprefix("adapters.0."): value.clone() for name, value in start.items()})
        twin = copy.deepcopy(net)
        run(net, distiller, optimizer, data)
        learned = distiller.state_dict()["adapters"]["layer2"]
    optimizer_of_both = torch.optim.AdamW([*twin.parameters(), *adapter.parameters()], lr=1e-2)
    for x, y in data:
        student_feature = twin.layer2(torch.tanh(twin.layer1(x.flatten(1))))
        loss = F.cross_entropy(twin.head(torch.tanh(student_feature)), y)
        with torch.no_grad():
            teacher_feature = big.layer2(torch.tanh(big.layer1(x.flatten(1))))
        optimizer_of_both.zero_grad()
        (loss + F.mse_loss(adapter(student_feature), teacher_feature)).backward()
        optimizer_of_both.step()
    for name, value in net.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    assert torch.equal(learned["adapters.0.weight"], adapter.weight)
    assert torch.equal(learned["adapters.0.bias"], adapter.bias)


def test_adapters_that_no_optimizer_trains_raise_on_the_second_step() -> None:
    net = student()
    distiller = Distiller(net, teacher(), FeatureDistillation("layer1", "layer1"))
    for _ in range(2):
        with distiller.record():
            loss = net(torch.randn(3, 16)).sum()
        if "distillation_loss" in distiller.parts:
            with pytest.raises(ValueError, match=r"optimizer for the adapters.*distiller\.follow\(optimizer\)"):
                distiller.total(loss)
        else:
            distiller.total(loss)


def test_parameters_can_go_into_the_users_own_optimizer() -> None:
    net, data = student(), batches()
    distiller = Distiller(net, teacher(), FeatureDistillation("layer1", "layer1"))
    with pytest.raises(ValueError, match="Expected `total` to be called before `parameters`"):
        distiller.parameters()
    with distiller.record():
        loss = F.cross_entropy(net(data[0][0]), data[0][1])
    total = distiller.total(loss)
    optimizer = torch.optim.SGD([*net.parameters(), *distiller.parameters()], lr=0.1)
    before = [parameter.detach().clone() for parameter in distiller.parameters()]
    total.backward()
    optimizer.step()
    run(net, distiller, optimizer, data)
    assert all(not torch.equal(old, new) for old, new in zip(before, distiller.parameters(), strict=True))


def test_a_state_resumes_bit_for_bit_in_a_plain_loop() -> None:
    """L6 without a Trainer: adapters and their optimizer's momentum continue."""
    data = batches(48)

    def begin(net: nn.Module) -> tuple[Distiller, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        distiller = Distiller(net, teacher(), FeatureDistillation("layer1", "layer1"))
        distiller.follow(optimizer)
        return distiller, optimizer

    whole = student()
    distiller, optimizer = begin(whole)
    run(whole, distiller, optimizer, data)
    half = student()
    first, optimizer = begin(half)
    run(half, first, optimizer, data[:3])
    saved = copy.deepcopy((half.state_dict(), optimizer.state_dict(), first.state_dict()))
    first.close()
    resumed = make(MLP, 9, 6)
    second, optimizer = begin(resumed)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    assert second.state_dict().keys() == saved[2].keys()  # a state that still waits for its first batch is not lost
    run(resumed, second, optimizer, data[3:])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    resumed_state, expected = second.state_dict()["adapters"]["layer1"], distiller.state_dict()["adapters"]["layer1"]
    assert all(torch.equal(resumed_state[name], expected[name]) for name in expected)


def test_a_gradient_scaler_of_a_plain_loop_scales_the_adapters_too() -> None:
    """L14 without a Trainer: the adapters' gradients are unscaled, and an overflow leaves them as they were."""
    net, twin, data = student(), student(), batches()
    results = []
    for model, scaled in ((net, True), (twin, False)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        with Distiller(model, teacher(), FeatureDistillation("layer1", "layer1")) as distiller:
            distiller.follow(optimizer, scaler=scaler if scaled else None)
            for x, y in data:
                with distiller.record():
                    loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                scaler.scale(distiller.total(loss)).backward()
                scaler.step(optimizer)
                scaler.update()
            results.append(distiller.state_dict()["adapters"]["layer1"])
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name])


def test_fabric_runs_the_distiller_without_a_trainer() -> None:
    net, plain, data = student(), student(), batches()
    fabric = Fabric(accelerator=ACCELERATOR, devices=1)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    with Distiller(model, teacher(), FeatureDistillation("layer1", "layer1")) as distiller:
        distiller.follow(optimizer)
        for x, y in data:
            with distiller.record():
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            fabric.backward(distiller.total(loss))
            optimizer.step()
    bare = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    with Distiller(plain, teacher(), FeatureDistillation("layer1", "layer1")) as distiller:
        distiller.follow(bare)
        run(plain, distiller, bare, data)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value)


def test_fabric_in_mixed_precision_takes_the_gradients_of_balanced_weights() -> None:
    net, data = student(), batches()
    fabric = Fabric(accelerator=ACCELERATOR, devices=1, precision="bf16-mixed")
    model = fabric.setup(net)
    with Distiller(model, teacher(), LogitsDistillation(weight="balanced")) as distiller:
        for x, y in data:
            with distiller.record():
                loss = F.cross_entropy(model(x), y)
            total = distiller.total(loss, (x, y))
        assert 0.0 < distiller.terms[0].weight != 1.0
        with pytest.raises(RuntimeError, match=r"call `fabric\.backward\(loss\)`"):
            total.backward()


def test_accelerate_accumulates_the_gradients_of_the_adapters_too() -> None:
    """Its optimizer keeps the gradients in `zero_grad` between the micro-batches of a step."""
    net, plain, data = student(), student(), batches()
    try:
        accelerator = Accelerator(cpu=DEVICE == "cpu", gradient_accumulation_steps=2)
        model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
        with Distiller(model, teacher(), FeatureDistillation("layer1", "layer1")) as distiller:
            distiller.follow(optimizer)
            for x, y in data:
                with accelerator.accumulate(model):
                    with distiller.record():
                        loss = F.cross_entropy(model(x), y)
                    accelerator.backward(distiller.total(loss))
                    optimizer.step()
                    optimizer.zero_grad()
            adapters = distiller.state_dict()["adapters"]["layer1"]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    bare = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    with Distiller(plain, teacher(), FeatureDistillation("layer1", "layer1")) as distiller:
        distiller.follow(bare)
        for index, (x, y) in enumerate(data):
            with distiller.record():
                loss = F.cross_entropy(plain(x), y)
            (distiller.total(loss) / 2).backward()
            if index % 2 == 1:
                bare.step()
                bare.zero_grad()
        expected = distiller.state_dict()["adapters"]["layer1"]
    for name, value in {**plain.state_dict(), **expected}.items():
        torch.testing.assert_close({**net.state_dict(), **adapters}[name], value)


def test_gradients_thrown_away_by_the_user_are_thrown_away_for_the_adapters() -> None:
    net, data = student(), batches()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    distiller = Distiller(net, teacher(), FeatureDistillation("layer1", "layer1"))
    distiller.follow(optimizer)
    with distiller.record():
        loss = F.cross_entropy(net(data[0][0]), data[0][1])
    distiller.total(loss).backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in distiller.parameters())
    distiller.close()
    assert "zero_grad" not in vars(optimizer)


def test_terms_are_averaged_over_several_teachers_each_with_its_adapter() -> None:
    net, first, second = student(), teacher(2), make(MLP, 3, 12)
    x, _ = batches()[0]
    distiller = Distiller(net, [first, second], [LogitsDistillation(), FeatureDistillation("layer1", "layer1")])
    with distiller.record():
        net(x)
    distiller.loss()
    shapes = {name: tuple(value.shape) for name, value in distiller.state_dict()["adapters"]["layer1"].items()}
    assert shapes["adapters.0.weight"] == (10, 6)
    assert shapes["adapters.1.weight"] == (12, 6)
    expected = (soft_targets(net(x), first(x)) + soft_targets(net(x), second(x))) / 2
    torch.testing.assert_close(distiller.parts["logits_loss"], expected.detach())
    with distiller.record(needs_grad=False, features=False):
        logits = net(x)
    ((student_scores, teacher_scores),) = distiller.agree()
    assert torch.equal(student_scores, logits)
    torch.testing.assert_close(teacher_scores, ((first(x).softmax(-1) + second(x).softmax(-1)) / 2).log().detach())


def test_a_wrapped_student_is_read_by_the_names_of_the_network_inside() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    wrapped = Wrapper(student())
    distiller = Distiller(wrapped, teacher(), FeatureDistillation("head", "head"))
    with distiller.record():
        wrapped(torch.randn(2, 16))
    assert distiller.loss() > 0


def test_closing_gives_everything_back_and_recording_again_goes_on() -> None:
    """L7 without a Trainer."""
    net, big = student(), teacher()
    big.layer1.weight.requires_grad_(False)
    before = snapshot(big)
    distiller = Distiller(net, big, FeatureDistillation("layer1", "layer1"), teacher_dtype="bfloat16")
    for _ in range(2):
        with distiller.record():
            net(torch.randn(2, 16))
        assert distiller.loss() > 0
        assert big.head.weight.dtype == torch.bfloat16
        assert not big.training
        distiller.parameters()
        distiller.close()
        assert big.training
        assert [parameter.requires_grad for parameter in big.parameters()] == [False, True, True, True, True, True]
        assert same(big.state_dict(), before)
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in [*net.modules(), *big.modules()]
        )


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"terms": []}, ValueError, "`terms` to hold at least one term"),
        ({"terms": [nn.MSELoss()]}, TypeError, r"`terms\[0\]` to be a term, but got MSELoss.*Wrap a loss"),
        ({"terms": SoftTargetLoss}, TypeError, r"`terms\[0\]` to be a term, but got the class SoftTargetLoss"),
        ({"terms": nn.functional.mse_loss}, TypeError, r"`terms\[0\]` to be a term, but got function.*Wrap a loss"),
        ({"terms": [LogitsDistillation(), LogitsDistillation()]}, ValueError, "distinct names, but got 'logits' twice"),
        ({"task_weight": -1.0}, ValueError, "`task_weight` to be at least 0, but got task_weight=-1.0"),
        ({"teacher": "net.pt"}, TypeError, r"`teacher` to be a module or a sequence.*load_teacher"),
        ({"teacher": []}, ValueError, "`teacher` to be at least one module"),
        ({"teacher": [nn.Linear(16, 5), 3]}, TypeError, "`teacher` to hold modules only, but got int"),
        ({"teacher_dtype": "int8"}, ValueError, "`teacher_dtype` to be a floating point dtype, but got .*'int8'"),
        (
            {"terms": FeatureDistillation("layer9", "layer1")},
            ValueError,
            r"`terms\[0\]\.student_layer`.*'layer9'.*Closest",
        ),
        ({"terms": FeatureDistillation("layer1", "nope")}, ValueError, r"`terms\[0\]\.teacher_layer`.*'nope'.*Known"),
    ],
)
def test_wrong_settings_are_refused_at_once(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Distiller(**{"student": student(), "teacher": teacher(), **arguments})


def test_a_student_that_was_not_called_as_a_module_raises() -> None:
    """L11 without a Trainer."""
    net = student()
    distiller = Distiller(net, teacher())
    with distiller.record():
        loss = net.forward(torch.randn(2, 16)).sum()
    with pytest.raises(ValueError, match=r"student, MLP, to be called with gradients.*not student\.forward\(x\)"):
        distiller.total(loss)


def test_a_call_can_be_read_by_hand() -> None:
    call = Call((torch.ones(2, 3),), {}, output=(torch.zeros(2), torch.ones(2, 4)))
    with pytest.raises(
        ValueError, match=r"LogitsDistillation\(output=\.\.\.\).*tensors are: 0: tensor of shape \(2,\), 1:"
    ):
        _ = call.logits
    assert torch.equal(call.output_at(0), torch.zeros(2))
    assert torch.equal(call.feature(Tap("", output=1)), torch.ones(2, 4))
    assert torch.equal(call.feature(Tap("", where="input")), torch.ones(2, 3))


def test_a_teacher_shared_by_two_distillers_is_given_back_by_the_last() -> None:
    """L7: in either order."""
    for order in ((0, 1), (1, 0)):
        net, big = student(), teacher()
        before = snapshot(big)
        both = [Distiller(net, big, LogitsDistillation(), teacher_dtype="bfloat16") for _ in range(2)]
        for distiller in both:
            with distiller.record():
                net(torch.randn(2, 16))
            distiller.loss()
        both[order[0]].close()
        assert not big.training
        both[order[1]].close()
        assert big.training
        assert all(parameter.requires_grad for parameter in big.parameters())
        assert same(big.state_dict(), before)
