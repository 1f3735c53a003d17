"""Wrong arguments, data and networks of `pair_layers`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from nets import ConvNet, make
from pair_nets import images
from torch import Tensor, nn

from lightning_distill import CallableTeacher, EMATeacher, FeatureDistillation, pair_layers

# Errors --------------------------------------------------------------------------------------------------------------


def test_a_small_batch_is_refused_before_the_others_run() -> None:
    with pytest.raises(ValueError, match=r"at least 4 examples, but got one with 3. Pass larger batches \(with drop_l"):
        pair_layers(make(ConvNet, 0), make(ConvNet, 1), images(3))
    with pytest.raises(ValueError, match="at least 4 examples, but got one with 2"):
        pair_layers(make(ConvNet, 0), make(ConvNet, 1), images(8, 2))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_is_an_error_that_names_the_layer(who: str) -> None:
    broken, good = make(ConvNet, 0), make(ConvNet, 1)
    with torch.no_grad():
        broken.body[0].weight[0] = torch.nan
    networks = (broken, good) if who == "student" else (good, broken)
    with pytest.raises(ValueError, match=f"the {who}'s layers to return finite numbers, .* from 'body.0'"):
        pair_layers(*networks, images(8))


class TwoNetworks(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.one_net, self.other_net = nn.Linear(2, 2), nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"batches": torch.ones(8, 1, 4, 4)}, TypeError, r"`batches` to be a loader or a list .* got Tensor. Pass \[b"),
        ({"batches": ()}, TypeError, "but got tuple"),
        ({"batches": 3}, TypeError, "but got int"),
        ({"batches": []}, ValueError, "Expected `batches` to hold at least one batch, but got none"),
        ({"student": "resnet"}, TypeError, "Expected `student` to be a module, but got student='resnet'"),
        ({"student": TwoNetworks()}, ValueError, "but got 'one_net', 'other_net'. Pass the network itself"),
        ({"teacher": None}, TypeError, "Expected `teacher` to be one network with layers, but got NoneType"),
        ({"teacher": EMATeacher()}, TypeError, "but got EMATeacher"),
        ({"teacher": CallableTeacher(len)}, TypeError, "but got CallableTeacher"),
        ({"teacher": [nn.Linear(2, 2), nn.Linear(2, 2)]}, TypeError, "but got TeacherEnsemble.* for each of several"),
        (
            {"by": "cca"},
            ValueError,
            "Expected `by` to be one of 'cka', 'uniform', 'last', 'original', but got by='cca'",
        ),
        ({"batches": [{"image": 1}]}, ValueError, r"entries that the student takes, \['x'\], but got \['image'\]"),
        ({"count": 0}, ValueError, "Expected `count` to be at least 1, but got count=0"),
        ({"count": 2.0}, TypeError, "Expected `count` to be an int"),
        ({"max_batches": 0}, ValueError, "Expected `max_batches` to be at least 1"),
        (
            {"student_layers": ["bodi"]},
            ValueError,
            "`student_layers` to name modules of the student, but got 'bodi'. Cl",
        ),
        (
            {"teacher_layers": "fc"},
            ValueError,
            "Expected `teacher_layers` to name modules of the teacher, but got 'fc'",
        ),
        ({"teacher_inputs": 1.5}, TypeError, "Expected `teacher_inputs` to be a function, a key or an index"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    settings: dict[str, Any] = {"student": make(ConvNet, 0), "teacher": make(ConvNet, 1), "batches": images(8)}
    with pytest.raises(error, match=words):
        pair_layers(**{**settings, **arguments})


def test_a_network_without_layers_that_differ_between_examples_is_refused() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2] * self.weight

    with pytest.raises(
        ValueError, match=r"the student to have layers that return a row for each example, .* but got none"
    ):
        pair_layers(Constant(), make(ConvNet, 1), images(8))
    flat = make(ConvNet, 0)
    for parameter in flat.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match=r"the teacher to have layers .* not the same row for all, but got none"):
        pair_layers(make(ConvNet, 1), flat, images(8))


def test_code_takes_names_and_numbers() -> None:
    pairs = pair_layers(make(ConvNet, 0), make(ConvNet, 1), images(8))
    with pytest.raises(TypeError, match=r"Expected `loss` to be a name, but got loss=.*Use terms\(loss\)"):
        pairs.code(nn.MSELoss())
    with pytest.raises(TypeError, match="Expected `weight` to be a number, but got weight='balanced'"):
        pairs.code(weight="balanced")
    with pytest.raises(ValueError, match=r"mse.*cosine"):
        pairs.code("huber")
    assert isinstance(pairs.terms(nn.MSELoss())[0], FeatureDistillation)
