"""Compiled students and teachers (L15), and in-place changes inside a compiled region (L10)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from tiny import Classifier, Mlp, ValidatedClassifier, loader
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_distill import DistillCallback, Distiller, FeatureDistillation, LogitsDistillation

BACKEND = "aot_eager"
# The compiler suppresses this warning of its own, but under "error" it is raised first.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    counters.clear()


def submodule(module: LightningModule, **settings: Any) -> Any:
    module.model = torch.compile(module.model, backend=BACKEND, **settings)
    return module


def in_place(module: LightningModule, **settings: Any) -> Any:
    module.model.compile(backend=BACKEND, **settings)
    return module


def inner_layer(module: LightningModule, **settings: Any) -> Any:
    module.model.body = torch.compile(module.model.body, backend=BACKEND, **settings)
    return module


def inner_layer_in_place(module: LightningModule, **settings: Any) -> Any:
    module.model.body.compile(backend=BACKEND, **settings)
    return module


def whole_module(module: LightningModule, **settings: Any) -> Any:
    return torch.compile(module, backend=BACKEND, **settings)


def whole_module_in_place(module: LightningModule, **settings: Any) -> Any:
    module.compile(backend=BACKEND, **settings)
    return module


WAYS = [submodule, in_place, inner_layer, inner_layer_in_place, whole_module, whole_module_in_place]


class Forward(Classifier):
    """A module whose step calls itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def terms() -> list[Any]:
    return [LogitsDistillation(weight=0.5), FeatureDistillation("body", "body", weight=2.0)]


def distil(trainer: Callable[..., Any], module: Any, teacher: nn.Module, steps: int = 3, **settings: Any) -> Any:
    """The parameters of student and adapters after a few steps."""
    bare = getattr(module, "_orig_mod", module)
    parameters = list(bare.parameters())
    callback = DistillCallback(teacher, terms(), student=settings.pop("student", "model"))
    trainer(callbacks=callback, max_steps=steps, **settings).fit(module, loader())
    return [*parameters, *callback.adapter_state()["adapters"]["body"].values()]


def by_hand(start: Mlp, adapter: nn.Module, teacher: nn.Module, steps: int = 3) -> list[Tensor]:
    """The same after a loop in plain PyTorch, without a compiler."""
    student, teacher = copy.deepcopy(start), copy.deepcopy(teacher).eval()
    optimizer = torch.optim.SGD([*student.parameters(), *adapter.parameters()], lr=0.1, momentum=0.9)
    for x, y in list(loader())[:steps]:
        feature = student.body(x)
        logits = student.head(F.relu(feature))
        with torch.no_grad():
            teacher_feature = teacher.body(x)
            target = teacher.head(F.relu(teacher_feature))
        p, log_q = (target / 4).softmax(-1), (logits / 4).log_softmax(-1)
        soft = 16 * (p * (p.log() - log_q)).sum(-1).mean()
        loss = F.cross_entropy(logits, y) + 0.5 * soft + 2.0 * (adapter(feature) - teacher_feature).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*student.parameters(), *adapter.parameters()]


class FirstAdapter(Callback):
    def __init__(self) -> None:
        self.adapter: Any = None

    def on_before_backward(self, trainer, pl_module, loss):
        if self.adapter is None:
            callback = next(item for item in trainer.callbacks if isinstance(item, DistillCallback))
            self.adapter = copy.deepcopy(callback.terms[1].adapters[0]).cpu()


def close(left: list[Tensor], right: list[Tensor]) -> None:
    for actual, expected in zip(left, right, strict=True):
        torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fullgraph", [False, True], ids=["", "fullgraph"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_l15_compiled_student_has_no_graph_breaks_and_trains_as_by_hand(trainer, way, fullgraph):
    settings = {"fullgraph": True} if fullgraph else {}
    module, first, teacher = way(Forward(), **settings), FirstAdapter(), Mlp(7, seed=1)
    student = None if way in (whole_module, whole_module_in_place) else "model"
    layer = "body" if student else "model.body"
    bare = getattr(module, "_orig_mod", module)
    parameters = list(bare.parameters())
    callback = DistillCallback(
        teacher,
        [LogitsDistillation(weight=0.5), FeatureDistillation(layer, "body", weight=2.0, name="body")],
        student=student,
    )
    trainer(callbacks=[callback, first], max_steps=3).fit(module, loader())
    assert counters["stats"]["unique_graphs"] > 0, "something was compiled"
    assert not counters["graph_break"]
    close(
        [*parameters, *callback.adapter_state()["adapters"]["body"].values()],
        by_hand(Mlp(5), first.adapter, Mlp(7, seed=1)),
    )


@pytest.mark.parametrize("way", ["wrapped", "in place", "inner"])
def test_l15_compiled_teacher_has_no_graph_breaks_and_trains_as_an_eager_one(trainer, way):
    eager = distil(trainer, Classifier(), Mlp(7, seed=1))
    teacher: Any = Mlp(7, seed=1)
    if way == "wrapped":
        teacher = torch.compile(teacher, backend=BACKEND, fullgraph=True)
    elif way == "in place":
        teacher.compile(backend=BACKEND, fullgraph=True)
    else:
        teacher.body.compile(backend=BACKEND, fullgraph=True)
    got = distil(trainer, submodule(Classifier(), fullgraph=True), teacher)
    assert counters["stats"]["unique_graphs"] >= 2
    assert not counters["graph_break"]
    close(got, eager)


@pytest.mark.parametrize("way", [submodule, in_place, inner_layer], ids=lambda way: way.__name__)
def test_l15_hooks_on_a_student_that_already_ran_compiled_are_not_ignored(trainer, way):
    eager = distil(trainer, Classifier(), Mlp(7, seed=1))
    module = way(Classifier())
    for x, y in loader():
        F.cross_entropy(module.model(x), y).backward()
    module.zero_grad()
    assert counters["stats"]["unique_graphs"] > 0
    close(distil(trainer, module, Mlp(7, seed=1)), eager)
    assert not counters["graph_break"]


def test_l15_teacher_that_already_ran_compiled_still_gives_its_features(trainer):
    eager = distil(trainer, Classifier(), Mlp(7, seed=1))
    teacher = torch.compile(Mlp(7, seed=1), backend=BACKEND)
    with torch.no_grad():
        teacher.eval()(next(iter(loader()))[0])
    close(distil(trainer, Classifier(), teacher), eager)


def test_l15_second_fit_of_a_compiled_student_is_distilled_as_the_first(trainer):
    module, eager = in_place(Classifier()), Classifier()
    for model in (module, eager):
        callback = DistillCallback(Mlp(7, seed=1), terms())
        for _ in range(2):
            trainer(callbacks=callback, max_steps=2).fit(model, loader())
    close(list(module.parameters()), list(eager.parameters()))


@pytest.mark.parametrize("way", [submodule, in_place, inner_layer, inner_layer_in_place], ids=lambda way: way.__name__)
def test_l15_compiled_student_is_compiled_once_and_not_again_at_each_step(trainer, way):
    graphs = []
    for steps in (2, 8):
        torch.compiler.reset()
        counters.clear()
        distil(trainer, way(Classifier()), torch.compile(Mlp(7, seed=1), backend=BACKEND), steps=steps)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


def test_l15_validation_of_a_compiled_student_counts_the_agreement(trainer):
    logged = []
    for module in (ValidatedClassifier(), submodule(ValidatedClassifier(), fullgraph=True)):
        run = trainer(callbacks=DistillCallback(Mlp(7, seed=1), terms(), student="model"), max_epochs=1)
        run.fit(module, loader(), loader(rows=13, batch_size=5, seed=9))
        logged.append(float(run.callback_metrics["distill/val_teacher_agreement"]))
    assert 0 < logged[0] < 1
    assert logged[0] == logged[1]
    assert not counters["graph_break"]


def test_l15_distiller_in_a_hand_written_loop_takes_a_compiled_student():
    ended = []
    for compiled in (False, True):
        student: Any = Mlp(5)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        student = torch.compile(student, backend=BACKEND, fullgraph=True) if compiled else student
        torch.manual_seed(0)
        with Distiller(student, Mlp(7, seed=1), terms()) as distiller:
            distiller.follow(optimizer)
            for x, y in loader():
                with distiller.record():
                    loss = F.cross_entropy(student(x), y)
                optimizer.zero_grad()
                distiller.total(loss, (x, y)).backward()
                optimizer.step()
        ended.append(list(student.parameters()))
    close(ended[1], ended[0])
    assert not counters["graph_break"]


def test_l15_compiled_student_runs_as_a_plain_one_once_distillation_is_over(trainer):
    module = submodule(Classifier())
    distil(trainer, module, Mlp(7, seed=1))
    x = next(iter(loader()))[0]
    inner = module.model._orig_mod
    torch.testing.assert_close(module.model(x), inner.head(F.relu(inner.body(x))))
    assert not inner.body._forward_hooks
    assert not inner._forward_hooks
    assert not module.model._forward_hooks


# L10: in-place changes ---------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """A ReLU(inplace=True) behind the tapped convolution."""

    def __init__(self, channels: int, inplace: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(channels)
            self.conv, self.relu = nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(inplace=inplace)
            self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv(x.view(-1, 1, 2, 2))).mean((2, 3)))


@pytest.mark.parametrize("way", ["eager", "wrapped", "in place", "conv alone", "fullgraph"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_l10_relu_in_place_behind_a_tapped_convolution_is_never_silently_wrong(trainer, way, side):
    def run(inplace: bool, way: str) -> list[Tensor]:
        student, teacher = InPlace(2, inplace and side == "student"), InPlace(4, inplace and side == "teacher")
        changed: Any = student if side == "student" else teacher
        if way == "in place":
            changed.compile(backend=BACKEND)
        elif way == "conv alone":
            changed.conv.compile(backend=BACKEND)
        elif way in ("wrapped", "fullgraph"):
            changed = torch.compile(changed, backend=BACKEND, fullgraph=way == "fullgraph")
        module = Classifier(changed if side == "student" else student)
        parameters = list(module.parameters())
        callback = DistillCallback(
            changed if side == "teacher" else teacher, FeatureDistillation("conv", "conv", weight=3.0), student="model"
        )
        trainer(callbacks=callback, max_steps=2).fit(module, loader())
        return parameters

    expected = run(False, "eager")
    try:
        got = run(True, way)
    except ValueError as error:
        assert "changed it in place" in str(error)  # noqa: PT017
    else:
        close(got, expected)


def test_l10_eager_relu_in_place_raises_and_names_the_layer(trainer):
    callback = DistillCallback(InPlace(4, False), FeatureDistillation("conv", "conv"))
    with pytest.raises(ValueError, match=r"student layer 'conv' .* changed it in place"):
        trainer(callbacks=callback).fit(Classifier(InPlace(2, True)), loader())
