"""L9-L12, L27: what cannot work raises before the first backward, in plain words, and training can go on afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_distill import DistillCallback, FeatureDistillation, LogitsDistillation, Tap, TeacherCache

MakeTrainer = Callable[..., Trainer]


def rejects(trainer: MakeTrainer, module: Any, callback: DistillCallback, match: str, data: Any = None) -> None:
    """Assert that a fit raises before the first backward, leaves everything clean, and a fresh fit then works."""
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    attributes = set(vars(module)) | {"_hparams"}
    flags = [(parameter.requires_grad, parameter.grad) for parameter in callback.teacher.parameters()]
    with pytest.raises(ValueError, match=match):
        trainer(callbacks=[callback]).fit(module, nets.loader() if data is None else data)
    for name, parameter in module.named_parameters():
        assert parameter.grad is None, name
        assert torch.equal(before[name], parameter), name
    assert set(vars(module)) <= attributes
    assert nets.hooks(module, callback.teacher) == 0
    assert [(parameter.requires_grad, parameter.grad) for parameter in callback.teacher.parameters()] == flags
    again = nets.InnerModule(nets.student())
    fresh = trainer(callbacks=[DistillCallback(nets.teacher())])
    fresh.fit(again, nets.loader())
    assert fresh.global_step == 2


def features(student_layer: Any = "layer2", teacher_layer: Any = "layer2", **settings: Any) -> DistillCallback:
    teacher = settings.pop("teacher", None) or nets.teacher()
    return DistillCallback(teacher, FeatureDistillation(student_layer, teacher_layer, **settings))


WITHOUT_VALUES = {
    "meta": (lambda: nets.teacher().to("meta"), r"`teacher` to have values, but its '\S*layer1.weight' is on .*'meta'"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), r"but its '\S*0.weight' is initialised by its first call"),
}
USERS: dict[str, Callable[[MakeTrainer, nn.Module, Any], object]] = {
    "callback": lambda trainer, teacher, folder: trainer(callbacks=[DistillCallback(teacher)]).fit(
        nets.InnerModule(nets.student()), nets.loader()
    ),
    "one of several": lambda trainer, teacher, folder: trainer(
        callbacks=[DistillCallback([nets.teacher(), teacher])]
    ).fit(nets.InnerModule(nets.student()), nets.loader()),
    "cache": lambda trainer, teacher, folder: TeacherCache.build(teacher, nets.loader().dataset, folder),
}


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("kind", WITHOUT_VALUES)
def test_a_teacher_without_values_raises(trainer: MakeTrainer, tmp_path: Any, kind: str, user: str) -> None:
    make, match = WITHOUT_VALUES[kind]
    with pytest.raises(ValueError, match=match):
        USERS[user](trainer, make(), tmp_path)


# L9 ------------------------------------------------------------------------------------------------------------------


def test_a_frozen_feature_raises(trainer: MakeTrainer) -> None:
    """L9: the message names the layer."""
    module = nets.InnerModule(nets.student())
    module.model.layer1.requires_grad_(False)
    match = r"Expected the student's layer 'layer1' to carry a gradient, but it does not: it is frozen"
    rejects(trainer, module, features("layer1", "layer1"), match)


def test_a_frozen_feature_raises_though_its_adapter_could_learn(trainer: MakeTrainer) -> None:
    """L9: beside a term on logits, which has a gradient."""
    module = nets.InnerModule(nets.student())
    module.model.layer1.requires_grad_(False)
    terms = [LogitsDistillation(), FeatureDistillation("layer1", "layer1", adapter="linear")]
    rejects(trainer, module, DistillCallback(nets.teacher(), terms), r"student's layer 'layer1' to carry a gradient")


def test_a_detached_output_raises(trainer: MakeTrainer) -> None:
    """L9: logits without a gradient raise too."""

    class Detached(nets.MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        return module.model(batch[0]).sum() + module.model.head.weight.sum()

    module = nets.StepModule(nets.make(Detached, 1), step)
    rejects(trainer, module, DistillCallback(nets.teacher()), r"student's output to carry a gradient")


class Checkpointed(nets.MLP):
    use_reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(x.flatten(1))
        x = checkpoint(lambda value: torch.tanh(self.layer2(torch.tanh(value))), x, use_reentrant=self.use_reentrant)
        return self.head(x)


def test_a_feature_inside_reentrant_checkpointing_raises(trainer: MakeTrainer) -> None:
    """L9: it is computed without a graph, and once more in the backward."""
    module = nets.InnerModule(nets.make(Checkpointed, 1))
    match = r"student's layer 'layer2' to carry a gradient.*reentrant activation checkpointing.*use_reentrant=False"
    rejects(trainer, module, features(), match)


@pytest.mark.parametrize("layer", ["layer1", "layer2"])
def test_non_reentrant_checkpointing_trains_as_without(trainer: MakeTrainer, layer: str) -> None:
    """L9: the layer that runs again in the backward is not recorded again."""

    def train(network: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = nets.make(network, 1)
        net.use_reentrant = False
        trainer(max_epochs=1, callbacks=[features(layer, layer)]).fit(nets.InnerModule(net), nets.loader())
        return nets.snapshot(net)

    plain, checkpointed = train(nets.MLP), train(Checkpointed)
    nets.close(list(plain.values()), list(checkpointed.values()), 1e-6)
    start = nets.snapshot(nets.student())
    assert not torch.equal(plain["layer1.weight"], start["layer1.weight"])


# L10 -----------------------------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """A convolution with ReLU(inplace=True) behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(48, nets.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.norm(self.conv(x))).flatten(1))


@pytest.mark.parametrize("layer", ["norm", "conv", "relu"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_feature_changed_in_place_is_never_silently_wrong(trainer: MakeTrainer, layer: str, side: str) -> None:
    """L10: what ReLU(inplace=True) overwrites raises and names its layer; what it leaves alone works."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def gap(student: Tensor, teacher: Tensor) -> Tensor:
        pairs.append((student.detach().clone(), teacher.clone()))
        return F.mse_loss(student, teacher)

    nets_by_side = {"student": nets.make(InPlace, 1), "teacher": nets.make(InPlace, 2)}
    other = "conv"  # on the other side: a feature that nothing overwrites
    layers = {"student": other, "teacher": other, side: layer}
    callback = features(*layers.values(), loss=gap, adapter=None, teacher=nets_by_side["teacher"])
    module = nets.InnerModule(nets_by_side["student"])
    if layer == "norm":
        match = rf"Expected {side} layer 'norm' to keep the feature that was read from it, but a later layer changed"
        rejects(trainer, module, callback, match)
        return
    start = nets.make(InPlace, 1)
    trainer(max_steps=1, callbacks=[callback]).fit(module, nets.loader())
    x = nets.batches()[0][0]
    expected = {"conv": lambda net: net.conv(x), "relu": lambda net: net.relu(net.norm(net.conv(x)))}
    teacher = nets_by_side["teacher"].eval()
    with torch.no_grad():
        nets.close(pairs[0], [expected[layers["student"]](start), expected[layers["teacher"]](teacher)], 1e-6)


class ChangesInput(nets.MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2.0))


def test_an_input_changed_in_place_by_the_student_raises(trainer: MakeTrainer) -> None:
    """L10: the teacher would get another input than the student."""
    match = r"Expected the student's input to stay as it was, but it was changed in place.*inplace=False"
    rejects(trainer, nets.InnerModule(nets.make(ChangesInput, 1)), DistillCallback(nets.teacher()), match)


def test_an_input_changed_in_place_by_the_step_raises(trainer: MakeTrainer) -> None:
    """L10: after the student has seen it."""

    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        logits = module.model(batch[0])
        batch[0].zero_()
        return F.cross_entropy(logits, batch[1])

    match = r"input to stay as it was.*make a new tensor where the training step changes it"
    rejects(trainer, nets.StepModule(nets.student(), step), DistillCallback(nets.teacher()), match)


def test_an_output_changed_in_place_by_the_step_raises(trainer: MakeTrainer) -> None:
    """L10: the logits that are distilled are those that the student gave."""

    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        logits = module.model(batch[0])
        logits[:, 0] = 0.0
        return F.cross_entropy(logits, batch[1])

    match = r"Expected the student's output to stay as it was returned, but it was changed in place"
    rejects(trainer, nets.StepModule(nets.student(), step), DistillCallback(nets.teacher()), match)


# L11 -----------------------------------------------------------------------------------------------------------------


class Twice(nets.MLP):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer1(x.flatten(1)))
        return self.head(torch.tanh(self.layer2(torch.tanh(self.layer2(x)))))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_layer_that_ran_twice_needs_a_call_index(trainer: MakeTrainer, side: str) -> None:
    """L11: the message offers the indices."""
    kinds = {"student": nets.MLP, "teacher": nets.MLP, side: Twice}
    module = nets.InnerModule(nets.make(kinds["student"], 1))
    callback = features(teacher=nets.make(kinds["teacher"], 2, 10))
    match = rf"Expected {side} layer 'layer2' to run once .* ran 2 times. Pass Tap\('layer2', call=0\) to call=1"
    rejects(trainer, module, callback, match)


def test_a_call_index_beyond_the_last_call_raises(trainer: MakeTrainer) -> None:
    """L11: with the number of calls."""
    module = nets.InnerModule(nets.make(Twice, 1))
    match = r"Expected `call` to be below 2, the runs of student layer 'layer2', but got call=2"
    rejects(trainer, module, features(Tap("layer2", call=2)), match)


def test_a_layer_that_did_not_run_raises(trainer: MakeTrainer) -> None:
    """L11: a term that never fires raises instead of adding a silent zero."""
    module = nets.InnerModule(nets.student())
    module.model.idle = nn.Linear(6, 6)
    rejects(trainer, module, features("idle"), r"Expected student layer 'idle' to run in the student's forward pass")


STEPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "forward called directly": lambda module, x: module.model.forward(x),
    "submodules called instead": lambda module, x: module.model.head(torch.tanh(module.model.layer1(x.flatten(1)))),
    "functional": lambda module, x: x.flatten(1)[:, : nets.CLASSES] + module.model.head.bias,
}


@pytest.mark.parametrize("named", [None, "model"])
@pytest.mark.parametrize("style", STEPS)
def test_a_student_that_was_never_called_raises(trainer: MakeTrainer, style: str, named: str | None) -> None:
    """L11: the message names `student=`."""

    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(STEPS[style](module, batch[0]), batch[1])

    match = r"(?s)to be called with gradients in `training_step`, but it was not.*self\.model\.forward\(x\).*student="
    module = nets.StepModule(nets.student(), step)
    rejects(trainer, module, DistillCallback(nets.teacher(), student=named), match)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_unknown_layer_raises_at_setup_with_the_closest_names(trainer: MakeTrainer, side: str) -> None:
    """L11: before the data is touched."""
    callback = features(**{f"{side}_layer": "layer3"})
    module = nets.InnerModule(nets.student())
    match = rf"Expected `terms\[0\]\.{side}_layer` to name a module of the {side}, but got 'layer3'\. .*layer[12]"
    rejects(trainer, module, callback, match, data=Untouchable())


class Untouchable:
    def __iter__(self) -> Any:
        raise AssertionError("the data was read")


def test_an_unknown_student_raises_at_setup_with_the_closest_names(trainer: MakeTrainer) -> None:
    """L11: the path of `student=` too."""
    callback = DistillCallback(nets.teacher(), student="modle")
    match = r"Expected `student` to name a module of the LightningModule, but got student='modle'\. .*'model'"
    rejects(trainer, nets.InnerModule(nets.student()), callback, match, data=Untouchable())


def test_an_unknown_layer_of_a_module_built_later_raises_in_the_first_step(trainer: MakeTrainer) -> None:
    """L11: where configure_model builds the network, names can be checked only then."""

    class Later(nets.InnerModule):
        def configure_model(self) -> None:
            if not hasattr(self.model, "layer1"):
                with torch.device("cpu"):  # Lightning builds on a GPU, which draws other numbers
                    self.model = nets.student()

    module = Later(nn.Identity())
    with pytest.raises(ValueError, match=r"`terms\[0\]\.student_layer` to name a module .* 'layer3'.*layer2"):
        trainer(callbacks=[features("layer3")]).fit(module, nets.loader())
    assert nets.same(nets.snapshot(module.model), nets.snapshot(nets.student()))


# L12 and shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["all of it", "one layer"])
def test_a_teacher_that_shares_parameters_with_the_student_raises(trainer: MakeTrainer, part: str) -> None:
    """L12: freezing it would freeze the student."""
    module, teacher = nets.InnerModule(nets.student()), nets.student(3)
    teacher.layer1 = module.model.layer1
    callback = DistillCallback(module.model if part == "all of it" else teacher)
    match = r"Expected `teacher` to share no parameter with the student, but both train 'layer1\.weight'.*copy"
    rejects(trainer, module, callback, match, data=Untouchable())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_shapes_that_no_adapter_makes_equal_raise(trainer: MakeTrainer) -> None:
    """Both shapes are in the message, with what to pass."""
    match = (
        r"Expected student feature 'layer2' and teacher feature 'layer2' to have equal shapes, but got \(8, 6\) and"
        r' \(8, 10\)\. Pass adapter="auto"\.'
    )
    rejects(trainer, nets.InnerModule(nets.student()), features(adapter=None), match)


def test_logits_of_another_number_of_classes_raise(trainer: MakeTrainer) -> None:
    """Two label sets cannot be compared."""
    teacher = nets.teacher()
    teacher.head = nn.Linear(10, nets.CLASSES + 2)
    rejects(trainer, nets.InnerModule(nets.student()), DistillCallback(teacher), r"\(8, 5\).*\(8, 7\)")


# L27 -----------------------------------------------------------------------------------------------------------------


class Labelled:
    """A loss that needs labels."""

    needs_labels = True

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        self.seen.append(labels)
        return ((student - teacher) ** 2).mean(-1)[labels >= 0].mean()


PLACES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "the second of a pair": (lambda x, y: (x, y), None),
    "the second of a list": (lambda x, y: [x, y], None),
    "a key": (lambda x, y: {"image": x, "truth": y}, "truth"),
    "an index": (lambda x, y: (x, x, y), -1),
    "a function": (lambda x, y: {"image": x, "all": {"y": y}}, lambda batch: batch["all"]["y"]),
    **{name: (lambda x, y, name=name: {"x": x, name: y}, None) for name in ("labels", "label", "target", "y")},
}


def first_step(module: Any, batch: Any, batch_idx: int) -> Tensor:
    return module.model(next(iter(batch.values())) if isinstance(batch, dict) else batch[0]).square().mean()


@pytest.mark.parametrize("where", PLACES)
def test_labels_are_found_in_the_batch(trainer: MakeTrainer, where: str) -> None:
    """L27: in the usual places, or where `labels` says."""
    make, labels = PLACES[where]
    loss = Labelled()
    callback = DistillCallback(nets.teacher(), LogitsDistillation(loss), labels=labels)
    data = nets.as_loader([make(x, y) for x, y in nets.batches()])
    trainer(max_epochs=1, callbacks=[callback]).fit(nets.StepModule(nets.student(), first_step), data)
    nets.close(loss.seen, [y for _, y in nets.batches()], 0.0)


@pytest.mark.parametrize(
    ("batch", "labels"),
    [
        (lambda x, y: {"image": x, "truth": y}, None),
        (lambda x, y: {"image": x, "truth": y}, "label"),
        (lambda x, y: [x], None),
        (lambda x, y: (x, y, y + 100), None),  # the second may be an index or a weight
        (lambda x, y: (x, y), 2),
        (lambda x, y: (x, y), lambda batch: None),
    ],
)
def test_missing_labels_raise_and_say_how_to_pass_them(trainer: MakeTrainer, batch: Any, labels: Any) -> None:
    """L27: before the first backward."""
    callback = DistillCallback(nets.teacher(), LogitsDistillation(Labelled()), labels=labels)
    module = nets.StepModule(nets.student(), first_step)
    match = r"Expected `labels` to say where a batch keeps its labels, .* Pass labels=<key, index, or a function"
    rejects(trainer, module, callback, match, nets.as_loader([batch(x, y) for x, y in nets.batches()]))
