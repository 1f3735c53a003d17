"""The term that reuses the teacher's classifier: published values, the student that results, and words of errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from loss_case import golden_index
from parts_nets import Network, one_step, tensors_of
from torch import Tensor, nn

from lightning_distill import Call, Distiller, ReusedClassifierDistillation, Tap
from lightning_distill.adapters.shapes import calls_of, describe

PLACE = ("body", "output")


def calls(*features: Tensor) -> list[Call]:
    return [
        Call.from_outputs(features={PLACE: feature}, who=who, trains=who == "student")
        for feature, who in zip(features, ("student", "teacher"), strict=True)
    ]


@pytest.mark.parametrize("entry", golden_index("simkd"), ids=lambda entry: entry["case"])
def test_the_loss_is_the_published_one(entry: dict[str, Any]) -> None:
    """The reference makes the larger map smaller; the library always resizes the teacher's."""
    tensors = tensors_of(entry)
    student, teacher = tensors["student_feat"].requires_grad_(), tensors["teacher_feat"]
    pair = calls(F.adaptive_avg_pool2d(student, teacher.shape[2:]), teacher)
    term = ReusedClassifierDistillation("body", "body", factor=entry["hyperparameters"]["factor"])
    term.connect(lambda name: [nn.Linear(teacher.shape[1], 3)])
    term.build(pair[0], [pair[1]])
    projector = term.adapters[0]
    published = {name.removeprefix("param_transfer."): value for name, value in tensors.items() if "param_" in name}
    projector.load_state_dict(published, strict=False)

    value = term(*pair)
    value.backward()

    tolerance = entry["tolerance_suggested"]["float64"]
    torch.testing.assert_close(value.detach(), tensors["loss"], **tolerance)
    torch.testing.assert_close(student.grad, tensors["grad_student_feat"], **tolerance)
    assert published.keys() == dict(projector.named_parameters()).keys()
    for name, parameter in projector.named_parameters():
        torch.testing.assert_close(parameter.grad, tensors[f"gradp_transfer.{name}"], **tolerance)


def inputs(count: int = 5) -> Tensor:
    return torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(0))


def test_the_deployable_student_reads_its_projected_feature_with_the_teachers_classifier() -> None:
    student, teacher = Network(3, seed=1), Network(4)
    (term,) = one_step(teacher, ReusedClassifierDistillation("body", "body"), student=student)

    deployed = term.deployable(student, teacher)

    student.eval()
    projector = copy.deepcopy(term.adapters[0]).eval()
    feature = student.body(student.norm(student.conv(inputs())).relu())
    expected = teacher.head(projector(feature).mean((2, 3)))
    torch.testing.assert_close(deployed(inputs()), expected)
    assert {name.split(".")[0] for name in deployed.state_dict()} == {"student", "projector", "classifier"}
    assert not deployed.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_training_makes_the_deployable_student_agree_with_the_teacher() -> None:
    student, teacher = Network(6, seed=1), Network(4)
    x = inputs(64)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    term = ReusedClassifierDistillation("body", "body")
    with Distiller(student, teacher, term, task_weight=0.0) as distiller:
        distiller.follow(optimizer)
        values = []
        for _ in range(300):
            optimizer.zero_grad()
            with distiller.record():
                student(x)
            distiller.total(torch.zeros(())).backward()
            optimizer.step()
            values.append(distiller.parts["reused_classifier_loss"].item())
        deployed = term.deployable(student, teacher)  # the settings know their only owner's parts

    decisions = deployed(x).argmax(1), teacher.eval()(x).argmax(1)
    assert values[-1] < 0.1 * values[0]
    assert (decisions[0] == decisions[1]).float().mean() > 0.9


def test_the_deployable_student_exports_copies_and_pickles() -> None:
    student, teacher = Network(3, seed=1), Network(4)
    (term,) = one_step(teacher, ReusedClassifierDistillation("body", "body"), student=student)
    deployed = term.deployable(student, teacher)

    exported = torch.export.export(deployed, (inputs(),), strict=False).module()

    torch.testing.assert_close(exported(inputs()), deployed(inputs()))
    torch.testing.assert_close(pickle.loads(pickle.dumps(deployed))(inputs()), deployed(inputs()))


def test_validation_uses_the_running_statistics_of_the_projector() -> None:
    student, teacher = Network(3, seed=1), Network(4)
    with Distiller(student, teacher, ReusedClassifierDistillation("body", "body"), task_weight=0.0) as distiller:
        distiller.follow(torch.optim.SGD(student.parameters(), lr=0.1))

        def value(needs_grad: bool) -> float:
            with distiller.record(needs_grad=needs_grad):
                student(inputs())
            return distiller.loss().item()

        value(True)
        (term,) = distiller.terms
        before = {name: value.clone() for name, value in term.state_dict().items()}
        student.eval()
        assert value(False) == value(False)
        assert all(torch.equal(value, before[name]) for name, value in term.state_dict().items())
        value(True)
        assert not torch.equal(term.state_dict()["adapters.0.1.running_mean"], before["adapters.0.1.running_mean"])


def test_vectors_are_projected_by_linear_maps() -> None:
    class Vectors(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(18, width)), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    student, teacher = Vectors(4), Vectors(6)
    (term,) = one_step(teacher, ReusedClassifierDistillation("body", Tap("head", where="input")), student=student)

    expected = teacher.head(copy.deepcopy(term.adapters[0]).eval()(student.body(inputs())))
    torch.testing.assert_close(term.deployable(student, teacher)(inputs()), expected)


def test_a_process_without_a_batch_makes_the_projector_from_the_shapes() -> None:
    teacher = Network(4)
    student_call, teacher_call = calls(torch.randn(4, 6, 2, 2).requires_grad_(), torch.randn(4, 8, 2, 2))
    teacher_call.output = teacher.head(teacher_call.feature(Tap("body")).mean((2, 3)))
    projectors = []
    for shaped in (False, True):
        term = ReusedClassifierDistillation("body", "body")
        term.connect(lambda name: [teacher.head if name == "head" else teacher])
        student_side, teachers = student_call, [teacher_call]
        if shaped:
            shapes = describe(term, student_call, [teacher_call])
            student_side, teachers = calls_of(term, shapes, torch.device("cpu"))
        torch.manual_seed(0)
        term.build(student_side, teachers)
        projectors.append(term.state_dict())

    assert nets.same(*projectors)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: one_step(Network(4), ReusedClassifierDistillation("norm", "body", factor=0)),
            r"`factor` to be at least 1, but got factor=0",
        ),
        (
            lambda: one_step(Network(4), ReusedClassifierDistillation("body", "norm")),
            r"the teacher to have one linear layer of 4 inputs, .* but got 0: none",
        ),
        (
            lambda: one_step(Network(4), ReusedClassifierDistillation("body", "body.0")),
            r"classifier to make its logits from the average of 'body\.0', but got other logits, .* behind its act",
        ),
        (
            lambda: one_step([Network(4), Network(4)], ReusedClassifierDistillation("body", "body")),
            r"one teacher for term 'reused_classifier', whose classifier the student reuses, but got 2\.",
        ),
        (
            lambda: one_step(Network(4), ReusedClassifierDistillation("head", "body")),
            r"'head' and 'body' to return maps \(N, C, H, W\) or vectors, but got \(5, 3\) and",
        ),
        (
            lambda: ReusedClassifierDistillation("body", "body").deployable(Network(3), Network(4)),
            r"the projector to be made, but got no step yet\. Call it on the owner's term",
        ),
    ],
)
def test_places_that_do_not_fit_raise(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_classifier_that_is_not_named_raises() -> None:
    with pytest.raises(TypeError, match=r"Expected `classifier` to be the name of a layer, but got classifier=Linear"):
        ReusedClassifierDistillation("body", "body", classifier=nn.Linear(2, 2))
