"""Terms and adapters: shapes, resizing, losses of several kinds, settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill import (
    AttentionTransferLoss,
    Call,
    DistillationLoss,
    DistillationTerm,
    Distiller,
    FeatureDistillation,
    LogitsDistillation,
    Tap,
)
from lightning_distill.adapters import make_adapter
from lightning_distill.patch import MethodPatch
from lightning_distill.recording import find_labels


class Maps(nn.Module):
    """Feature maps of a given number of channels, height and width from images."""

    def __init__(self, channels: int, size: tuple[int, int] = (6, 5)) -> None:
        super().__init__()
        self.conv, self.size = nn.Conv2d(1, channels, 1), size
        self.pool = nn.AdaptiveAvgPool2d(size)
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.conv(x)).mean((2, 3)))


def value(student: nn.Module, teacher: nn.Module, term: DistillationTerm, *inputs: Any) -> Tensor:
    """The term's unweighted value on one input."""
    distiller = Distiller(student, teacher, term)
    with distiller.record():
        student(*inputs or (torch.randn(4, 1, 12, 12),))
    distiller.loss((None, torch.arange(4)))
    distiller.close()
    return distiller.parts[f"{term.name}_loss"]


@pytest.mark.parametrize(
    ("adapter", "student", "teacher", "kind", "weight"),
    [
        ("auto", (2, 4, 5, 5), (2, 4, 7, 3), nn.Identity, None),
        ("auto", (2, 4, 5, 5), (2, 9, 5, 5), nn.Conv2d, (9, 4, 1, 1)),
        ("auto", (2, 7, 4), (2, 7, 9), nn.Linear, (9, 4)),
        ("auto", (2, 4), (2, 9), nn.Linear, (9, 4)),
        ("auto", (2, 1), (2, 9), nn.Linear, (9, 1)),
        ("conv1x1", (2, 4, 7), (2, 9, 7), nn.Conv1d, (9, 4, 1)),
        ("conv1x1", (2, 4, 3, 3, 3), (2, 9, 3, 3, 3), nn.Conv3d, (9, 4, 1, 1, 1)),
        ("linear", (2, 5, 5, 4), (2, 5, 5, 9), nn.Linear, (9, 4)),
        (None, (2, 4), (2, 9), nn.Identity, None),
    ],
)
def test_an_adapter_takes_its_kind_and_shape_from_the_features(
    adapter: str | None, student: tuple[int, ...], teacher: tuple[int, ...], kind: type, weight: tuple[int, ...] | None
) -> None:
    made = make_adapter(adapter, torch.Size(student), torch.Size(teacher), "layer")
    assert type(made) is kind
    if weight is not None:
        assert made.weight.shape == weight
        assert made(torch.randn(student)).shape == teacher


def test_a_module_is_copied_and_a_factory_is_called_with_both_shapes() -> None:
    adapter = nn.Conv2d(4, 9, 3, padding=1)
    copied = make_adapter(adapter, torch.Size((2, 4, 5, 5)), torch.Size((2, 9, 5, 5)), "layer")
    assert copied is not adapter
    assert torch.equal(copied.weight, adapter.weight)
    seen: list[Any] = []

    def factory(*shapes: torch.Size) -> nn.Module:
        seen.extend(shapes)
        return nn.Flatten()

    assert isinstance(make_adapter(factory, torch.Size((2, 4)), torch.Size((2, 9)), "layer"), nn.Flatten)
    assert seen == [torch.Size((2, 4)), torch.Size((2, 9))]


@pytest.mark.parametrize(
    ("adapter", "error", "words"),
    [
        (
            "auto",
            ValueError,
            r"student layer 'stem'.*same number of dimensions.*\(2, 4, 5, 5\) and \(2, 9\)\. Pass adapter=\"pool\"",
        ),
        (lambda student, teacher: 3, TypeError, "`adapter` to make a module, but got int"),
        (
            3,
            TypeError,
            "`adapter` to be 'auto', 'pool', 'linear', 'conv1x1', None, a module or a factory, but got adapter=3",
        ),
    ],
)
def test_an_adapter_that_cannot_be_made_says_why(adapter: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make_adapter(adapter, torch.Size((2, 4, 5, 5)), torch.Size((2, 9)), "stem")
    with pytest.raises(ValueError, match=r"'stem' to have 3 to 5 dimensions for adapter='conv1x1'.*adapter='linear'"):
        make_adapter("conv1x1", torch.Size((2, 4)), torch.Size((2, 9)), "stem")


@pytest.mark.parametrize("size", [(3, 2), (12, 10), (3, 10), (6, 5)], ids=["smaller", "larger", "mixed", "equal"])
def test_a_teachers_map_of_another_size_is_averaged_down_and_interpolated_up(size: tuple[int, int]) -> None:
    student, teacher = Maps(4, (6, 5)), Maps(4, size)
    x = torch.randn(4, 1, 12, 12)
    student_map, teacher_map = student.pool(student.conv(x)), teacher.pool(teacher.conv(x))
    teacher_map = F.adaptive_avg_pool2d(teacher_map, (min(6, size[0]), min(5, size[1])))
    teacher_map = F.interpolate(teacher_map, (6, 5), mode="bilinear", align_corners=False)
    got = value(student, teacher, FeatureDistillation("pool", "pool"), x)
    torch.testing.assert_close(got, F.mse_loss(student_map, teacher_map).detach())


def test_unequal_shapes_without_an_adapter_raise_and_name_the_layers() -> None:
    with pytest.raises(
        ValueError,
        match=r"student feature 'pool' and teacher feature 'conv' to have equal shapes, but got \(4, 4, 6, 5\) and"
        r' \(4, 8, 6, 5\)\. Pass adapter="auto"',
    ):
        value(Maps(4), Maps(8), FeatureDistillation("pool", "conv", adapter=None))


def test_a_size_of_one_is_not_broadcast_silently() -> None:
    with pytest.raises(ValueError, match=r"equal shapes, but got \(4, 1\) and \(4, 3\)"):
        value(nn.Linear(2, 1), nn.Linear(2, 3), FeatureDistillation("", "", adapter=None), torch.randn(4, 2))


def test_attention_transfer_needs_no_adapter_for_other_channels() -> None:
    student, teacher = Maps(4), Maps(16)
    term = FeatureDistillation("pool", "pool", AttentionTransferLoss(), weight=1000.0)
    assert value(student, teacher, term) > 0
    assert list(term.parameters()) == []


def test_a_function_of_two_features_is_a_loss_and_is_averaged() -> None:
    student, teacher = Maps(4), Maps(4)
    x = torch.randn(4, 1, 12, 12)
    term = FeatureDistillation("pool", "pool", lambda student, teacher: (student - teacher).abs(), name="gap")
    expected = (student.pool(student.conv(x)) - teacher.pool(teacher.conv(x))).abs().mean().detach()
    torch.testing.assert_close(value(student, teacher, term, x), expected)


def test_several_layers_are_averaged_pair_by_pair_each_with_its_adapter() -> None:
    student, teacher = Maps(4), Maps(8)
    term = FeatureDistillation(["pool", "head"], ["pool", "head"])
    assert term.name == "pool+head"
    got = value(student, teacher, term, torch.randn(4, 1, 12, 12))
    assert [type(adapter) for adapter in term.adapters] == [nn.Conv2d, nn.Identity]
    assert got > 0


def test_a_loss_over_several_layers_gets_lists() -> None:
    class Flow(DistillationLoss):
        several_layers = True

        def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
            return (student[0].mean() * student[1].mean() - teacher[0].mean() * teacher[1].mean()) ** 2

    student, teacher = Maps(4), Maps(4)
    x = torch.randn(4, 1, 12, 12)
    flow = [net.conv(x).mean() * net(x).mean() for net in (student, teacher)]
    got = value(student, teacher, FeatureDistillation(["conv", "head"], ["conv", "head"], Flow()), x)
    torch.testing.assert_close(got, (flow[0] - flow[1]).detach() ** 2)


def test_a_loss_that_needs_labels_gets_them() -> None:
    """L27: through the term, for logits and for features."""

    class TargetGap(DistillationLoss):
        needs_labels = True

        def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            return (student - teacher)[torch.arange(len(labels)), labels % student.shape[1]].abs().mean()

    student, teacher = nn.Linear(2, 3), nn.Linear(2, 3)
    x = torch.randn(4, 2)
    expected = (student(x) - teacher(x))[torch.arange(4), torch.arange(4) % 3].abs().mean().detach()
    torch.testing.assert_close(value(student, teacher, LogitsDistillation(TargetGap()), x), expected)
    torch.testing.assert_close(value(student, teacher, FeatureDistillation("", "", TargetGap()), x), expected)


def test_a_loss_with_parameters_of_its_own_is_trained_and_saved_like_an_adapter() -> None:
    class Scaled(DistillationLoss):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return (self.scale * student - teacher).square().mean()

    net = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Distiller(net, nn.Linear(2, 3), LogitsDistillation(Scaled())) as distiller:
        distiller.follow(optimizer)
        with distiller.record():
            net(torch.randn(4, 2))
        distiller.loss().backward()
        optimizer.step()
        assert distiller.state_dict()["adapters"]["logits"]["loss.scale"] != 2.0
    assert sorted(net.state_dict()) == ["bias", "weight"]


def test_a_terms_own_subclass_that_lacks_forward_says_so() -> None:
    class Empty(DistillationTerm):
        pass

    with pytest.raises(NotImplementedError, match=r"Expected Empty to implement `forward\(student, teacher, labels\)`"):
        value(nn.Linear(2, 3), nn.Linear(2, 3), Empty(name="empty"), torch.randn(4, 2))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LogitsDistillation(weight=-0.5), ValueError, "`weight` to be at least 0, but got weight=-0.5"),
        (lambda: LogitsDistillation(weight="1"), TypeError, "`weight` to be an int or a float, but got weight='1'"),
        (lambda: LogitsDistillation(name="task"), ValueError, "`name` to be neither empty, 'task' nor"),
        (lambda: LogitsDistillation("mse"), TypeError, "a function, but got loss='mse'. Pass an instance: Soft"),
        (lambda: LogitsDistillation(AttentionTransferLoss), TypeError, r"the class AttentionTransferLoss.*instance"),
        (lambda: FeatureDistillation("a", "b", "mes"), ValueError, "'mse'.* but got .*'mes'.*Closest: 'mse'"),
        (
            lambda: FeatureDistillation("a", "b", adapter="conv"),
            ValueError,
            "`adapter` to be one of 'auto', 'pool', 'linear'",
        ),
        (
            lambda: FeatureDistillation(["a", "b"], "c"),
            ValueError,
            "the same number of layers, at least one, but got 2 and 1",
        ),
        (lambda: FeatureDistillation([], []), ValueError, "at least one, but got 0 and 0"),
        (lambda: Tap(3), TypeError, "`layer` to be a string, but got layer=3"),
        (lambda: Tap("a", where="middle"), ValueError, "`where` to be 'output' or 'input', but got where='middle'"),
        (lambda: Tap("a", call=-1), ValueError, "`call` to be 0 or greater, but got call=-1"),
    ],
)
def test_wrong_settings_of_a_term_are_refused_by_its_constructor(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("batch", "where"),
    [
        ((None, torch.tensor([3, 1])), None),
        ([None, None, torch.tensor([3, 1])], 2),
        ({"x": None, "labels": torch.tensor([3, 1])}, None),
        ({"x": None, "label": torch.tensor([3, 1])}, None),
        ({"x": None, "target": torch.tensor([3, 1])}, None),
        ({"x": None, "y": torch.tensor([3, 1])}, None),
        ({"x": None, "klass": torch.tensor([3, 1])}, "klass"),
        ({"x": {"y": torch.tensor([3, 1])}}, lambda batch: batch["x"]["y"]),
    ],
)
def test_labels_are_found_where_batches_keep_them(batch: Any, where: Any) -> None:
    """L27: the usual places, and those that `labels=` names."""
    assert find_labels(batch, where).tolist() == [3, 1]


@pytest.mark.parametrize(("batch", "where"), [({"x": 1}, None), ((1,), None), ((1, 2), "y"), (3, 0), ({"x": 1}, "z")])
def test_missing_labels_say_how_to_pass_them(batch: Any, where: Any) -> None:
    """L27: the words of the error."""
    with pytest.raises(ValueError, match=r"`labels` to say where a batch keeps its labels.*Pass labels=<key, index"):
        find_labels(batch, where)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
def test_patches_come_off_in_any_order(order: tuple[int, ...]) -> None:
    """L7: the instance ends without the attribute, and a patch that is off is silent even under others."""

    class Thing:
        def speak(self) -> str:
            return "."

    thing = Thing()
    patches = [MethodPatch(thing, "speak", lambda original, n=n: f"{n}{original()}") for n in range(3)]
    assert thing.speak() == "210."
    alive = {0, 1, 2}
    for index in order:
        patches[index].undo()
        alive.remove(index)
        assert thing.speak() == "".join(str(n) for n in sorted(alive, reverse=True)) + "."
    assert "speak" not in vars(thing)


class Lazy(DistillationTerm):
    """A term of the user's that makes a parameter in its first step, which nothing trains."""

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(()))
        return (self.scale * student.output - teacher.output).square().mean()


def test_a_parameter_that_a_term_makes_late_is_not_left_untrained_in_silence() -> None:
    network, images = nn.Linear(4, 3), torch.randn(8, 4)
    with Distiller(network, nn.Linear(4, 3), Lazy(name="lazy")) as distiller:
        for step in range(2):
            with distiller.record():
                loss = network(images).square().mean()
            if step == 0:
                distiller.total(loss)
        with pytest.raises(ValueError, match="Expected an optimizer for the adapters, but got none"):
            distiller.total(loss)
