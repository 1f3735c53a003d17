"""Self-distillation of a dict that the loop passes, through the user's own adaptation layers (N9)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import Mlp
from torch import Tensor, nn

from lightning_distill import SelfKnowledgeDistillationLoss as SelfKnowledge
from lightning_distill import SoftTargetLoss

GROUPS = [[["shallow.feature", "deep.feature"]], [["shallow.exit", "deep.exit"], ["middle.exit", "deep.exit"]]]


class Exits(nn.Module):
    """Returns the logits of three exits and the features before them, the deepest first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 7)
        self.heads = nn.ModuleList([nn.Linear(7, 3), nn.Linear(6, 3), nn.Linear(5, 3)])

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        shallow = self.first(x).relu()
        middle = self.second(shallow).relu()
        features = [self.third(middle), middle, shallow]
        return [head(feature) for head, feature in zip(self.heads, features, strict=True)], features


def by_keys(model: Exits, adaptation: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The dict of a loop, and a mean over the exits as the student's own loss."""
    exits, features = model(x)
    named = {
        "deep.feature": features[0],
        "shallow.feature": adaptation(features[2]),
        "deep.exit": exits[0],
        "middle.exit": exits[1],
        "shallow.exit": exits[2],
    }
    return named, torch.stack(exits).square().mean()


def by_hand(named: dict[str, Tensor], kinds: tuple[str, str], temperature: float, weights: list[float]) -> Tensor:
    """The sum over the groups, each counted once, without a factor of the squared temperature."""

    def distance(kind: str, feature: Tensor, target: Tensor) -> Tensor:
        if kind == "L2":
            return (feature - target).square().sum().sqrt()
        p, log_q = (target / temperature).softmax(-1), (feature / temperature).log_softmax(-1)
        rows = -(p * log_q).sum(-1) if kind == "CE" else (p * (p.log() - log_q)).sum(-1)
        return rows.mean()

    return sum(
        weight * distance(kind, named[shallow], named[deep].detach())
        for group, kind, weight in zip(GROUPS, kinds, weights, strict=True)
        for shallow, deep in group
    )


@pytest.mark.parametrize("origin", [False, True])
@pytest.mark.parametrize("kind", ["KL", "CE"])
def test_the_tensors_of_the_dict_are_compared_and_the_users_layers_learn(distiller, kind, origin):
    model, adaptation, x = Exits(), nn.Linear(5, 7), torch.randn(6, 4)
    twins = copy.deepcopy((model, adaptation))
    ready = distiller(model, None, SelfKnowledge(GROUPS, 3.0, ["L2", kind], [0.03, 0.3], origin))
    ready.on_train_begin()
    named, own = by_keys(model, adaptation, x)
    total = ready.on_after_compute_loss(x, named, own, teacher_output=named)
    total.backward()
    expected_named, expected_own = by_keys(*twins, x)
    expected = by_hand(expected_named, ("L2", kind), 3.0, [0.03, 0.3]) + (expected_own if origin else 0.0)
    expected.backward()
    torch.testing.assert_close(total, expected)
    for module, twin in zip((model, adaptation), twins, strict=True):
        for parameter, other in zip(module.parameters(), twin.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None)
            if other.grad is not None:
                torch.testing.assert_close(parameter.grad, other.grad)
    assert adaptation.weight.grad.abs().sum() > 0


def test_the_dict_wins_where_its_names_are_layers_too(distiller):
    """The loop applies its own adaptation layer, so the recorded layers must not be compared."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a = self.a(x)
            return a, self.b(a)

    net, adaptation, x = Net(), nn.Linear(6, 6), torch.randn(3, 4)
    ready = distiller(net, None, SelfKnowledge([[["a", "b"]]], 1.0, ["L2"], [1.0]))
    ready.on_train_begin()
    a, b = net(x)
    total = ready.on_after_compute_loss(x, {"a": adaptation(a), "b": b}, torch.tensor(0.0))
    torch.testing.assert_close(total, torch.dist(adaptation(a), b.detach()))
    a, b = net(x)
    recorded = ready.on_after_compute_loss(x, (a, b), torch.tensor(0.0))
    torch.testing.assert_close(recorded, torch.dist(a, b.detach()))


def test_adaptation_layers_may_be_put_on_the_student_while_it_trains(distiller):
    """As in the older API's example: the best weights are restored although they were copied before."""
    model = Exits()
    ready = distiller(model, None, SelfKnowledge(GROUPS, 3.0, ["L2", "CE"], [0.03, 0.3]), eval_func=lambda model: 1.0)
    ready.on_train_begin()
    first = model.first.weight.detach().clone()
    model.adaptation_layers = nn.ModuleList([nn.Linear(5, 7)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    named, own = by_keys(model, model.adaptation_layers[0], torch.randn(6, 4))
    ready.on_after_compute_loss(None, named, own).backward()
    optimizer.step()
    moved = model.adaptation_layers[0].weight.detach().clone()
    assert not torch.equal(model.first.weight, first)
    ready.on_epoch_end()
    ready.on_train_end()
    assert torch.equal(model.first.weight, first)
    assert torch.equal(model.adaptation_layers[0].weight, moved)


def test_the_teacher_may_be_the_student_itself(distiller):
    """As the older API's example passes it."""
    model = Exits()
    ready = distiller(model, model, SelfKnowledge([[["heads.2", "heads.0"]]], 2.0, ["KL"], [1.0]))
    ready.on_train_begin()
    (deep, _, shallow), _ = output = model(torch.randn(3, 4))
    total = ready.on_after_compute_loss(None, output, torch.tensor(0.0))
    torch.testing.assert_close(total, SoftTargetLoss(temperature=2.0)(shallow, deep.detach()) / 4)
    assert model.training


def test_reference_reduction_divides_kl_by_the_classes_and_leaves_the_others_alone():
    named = {"shallow": torch.randn(4, 3), "deep": torch.randn(4, 3)}
    for kind, divisor in (("KL", 3.0), ("CE", 1.0), ("L2", 1.0)):
        values = [
            SelfKnowledge([[["shallow", "deep"]]], 2.0, [kind], [1.0], reference_reduction=reduced)(
                named, None, torch.tensor(0.0)
            )
            for reduced in (False, True)
        ]
        torch.testing.assert_close(values[0], divisor * values[1])
    p, log_q = (named["deep"] / 2).softmax(-1), (named["shallow"] / 2).log_softmax(-1)
    reference = nn.functional.kl_div(log_q, p, reduction="none").mean()
    criterion = SelfKnowledge([[["shallow", "deep"]]], 2.0, ["KL"], [1.0], reference_reduction=True)
    torch.testing.assert_close(criterion(named, None, torch.tensor(0.0)), reference)


WRONG: list[tuple[Any, str]] = [
    ({"shallow": torch.ones(2, 3)}, r"a dict with the key 'dep', which is not a layer .* \['shallow'\]"),
    ({"shallow": torch.ones(2, 3), "deep": torch.ones(2, 3)}, r"the key 'dep'.*Closest: 'deep'"),
    (torch.ones(2, 3), "the key 'shallow', which is not a layer of the student, but got a Tensor"),
    ({"shallow": torch.ones(2, 3), "dep": torch.ones(2, 4)}, r"equal shapes, but got \(2, 3\) and \(2, 4\)"),
]


@pytest.mark.parametrize(("output", "words"), WRONG)
def test_an_output_that_cannot_be_read_is_refused(distiller, output, words):
    ready = distiller(Mlp(5), None, SelfKnowledge([[["shallow", "dep"]]], 2.0, ["KL"]))
    ready.on_train_begin()
    with pytest.raises(ValueError, match=words):
        ready.on_after_compute_loss(None, output, torch.tensor(0.0))


def test_a_loss_of_shape_one_and_a_number_are_taken(distiller):
    """The older API's example makes its loss by torch.FloatTensor([0.0])."""
    named = {"shallow": torch.randn(4, 3, requires_grad=True), "deep": torch.randn(4, 3)}
    ready = distiller(Mlp(5), None, SelfKnowledge([[["shallow", "deep"]]], 2.0, ["CE"], [0.5], True))
    ready.on_train_begin()
    total = ready.on_after_compute_loss(None, named, torch.FloatTensor([0.5]))
    assert total.shape == (1,)
    total.backward()
    torch.testing.assert_close(ready.on_after_compute_loss(None, named, 0.5), total[0])
