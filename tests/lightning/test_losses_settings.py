"""Settings of every public loss: their order, their kinds of number, what repr shows, where the classes are."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from cases import CASES
from loss_case import LossCase

from lightning_distill import functional, losses
from lightning_distill.losses import DistillationLoss

pytestmark = pytest.mark.tensors

PUBLIC = {name: getattr(losses, name) for name in losses.__all__ if name != "DistillationLoss"}
every_loss = pytest.mark.parametrize("loss", PUBLIC.values(), ids=PUBLIC)
ON_LOGITS = [
    name for name in functional.__all__ if "student_logits" in inspect.signature(getattr(functional, name)).parameters
]
# The literature always names these first: how soft the distributions are, and which distance it is.
POSITIONAL = {"temperature", "temperatures", "kind"}


def settings_of(loss: type[DistillationLoss]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(loss).parameters
    return {
        name: each for name, each in parameters.items() if each.kind is not each.VAR_POSITIONAL and name != "kwargs"
    }


@every_loss
def test_only_the_temperature_or_the_kind_is_positional(loss: type[DistillationLoss]) -> None:
    settings = settings_of(loss)
    positional = [name for name, each in settings.items() if each.kind is not each.KEYWORD_ONLY]

    assert positional == [name for name in settings if name in POSITIONAL][:1]


@every_loss
def test_a_temperature_comes_first(loss: type[DistillationLoss]) -> None:
    if "temperature" in settings_of(loss):
        assert loss(3.0).temperature == 3.0


@every_loss
def test_numbers_of_numpy_are_numbers(loss: type[DistillationLoss]) -> None:
    defaults = {name: each.default for name, each in settings_of(loss).items()}
    defaults = {**defaults, **({"relation_heads": 2} if "relation_heads" in defaults else {})}
    numbers = {name: each for name, each in defaults.items() if type(each) in (int, float)}

    for kind in (np.float32, np.float64):
        built = loss(**{name: (kind if type(each) is float else np.int64)(each) for name, each in numbers.items()})
        for name, each in numbers.items():
            assert type(getattr(built, name)) is type(each), name
            assert getattr(built, name) == pytest.approx(each), name


@every_loss
def test_repr_shows_every_setting_of_the_constructor(loss: type[DistillationLoss]) -> None:
    built = loss(relation_heads=2) if loss is losses.AttentionRelationLoss else loss()
    if loss is losses.FeatureDistance:
        built = loss("cosine")

    shown = repr(built)
    assert all(f"{name}={getattr(built, name)!r}" in shown for name in settings_of(loss)), shown
    assert " at 0x" not in shown


def test_the_losses_on_class_scores_say_so() -> None:
    on_logits = {case.loss.__name__ for case in CASES if case.on_logits}

    assert {name for name, loss in PUBLIC.items() if loss.class_scores} == on_logits - {
        "LogitMSELoss",
        "UniversalLogitLoss",
    }


@pytest.mark.parametrize("case", [c for c in CASES if c.on_logits], ids=str)
def test_classes_are_the_dimension_after_the_batch_in_dense_maps_and_the_last_elsewhere(case: LossCase) -> None:
    settings = {name: value for name, value in case.settings.items() if name != "class_dim"}
    for shape, dim in (((2, 3, 4, 5), 1), ((2, 3, 4, 5, 2), 1), ((2, 4, 3), -1), ((5, 3), -1)):
        student, teacher = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        value = case.make(**settings)(student, teacher)
        assert value == case.make(**settings, class_dim=dim)(student, teacher)
        if len(shape) > 3:
            moved = [logits.movedim(1, -1).flatten(0, -2) for logits in (student, teacher)]
            torch.testing.assert_close(value, case.make(**settings)(*moved))


@pytest.mark.parametrize("name", ON_LOGITS)
def test_functions_find_the_classes_by_the_same_rule(name: str) -> None:
    function = getattr(functional, name)
    labels = [torch.zeros(2, 4, 5, dtype=torch.int64)] if "labels" in inspect.signature(function).parameters else []
    student, teacher = torch.randn(2, 2, 3, 4, 5)

    torch.testing.assert_close(function(student, teacher, *labels), function(student, teacher, *labels, class_dim=1))
