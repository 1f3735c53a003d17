"""Settings that are assigned to a term's loss during training, in graphs that were traced before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from keras_distill import (
    ActivationBoundaryLoss,
    DistillModel,
    FactorTransferLoss,
    FeatureDistillation,
    LogitsDistillation,
    MinifinetuningLoss,
    MultiLevelLogitLoss,
    SimpleRecipeLoss,
    SkewKLLoss,
)
from keras_distill.losses import DistillationLoss

INPUTS = np.random.default_rng(0).standard_normal((8, 6)).astype("float32")
LABELS = np.arange(8) % 3


def network(width: int) -> keras.Model:
    layers = [keras.layers.Dense(width, name="hidden"), keras.layers.Dense(3, name="logits")]
    return keras.Sequential([keras.Input((6,)), *layers])


def made(loss: DistillationLoss, eager: bool) -> tuple[DistillModel, Callable[[], float]]:
    """A model whose student stays as it is, and a function that trains a step and returns the loss."""
    keras.utils.set_random_seed(1)
    term = LogitsDistillation(loss) if loss.class_scores else FeatureDistillation("hidden", "hidden", loss)
    model = DistillModel(network(4), network(4), term, task_weight=0.0)
    task_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), task_loss, run_eagerly=eager)
    return model, lambda: model.fit(INPUTS, LABELS, batch_size=8, verbose=0).history["loss"][0]


SETTINGS: dict[str, tuple[Callable[..., DistillationLoss], str, Any]] = {
    "beside a temperature": (MinifinetuningLoss, "threshold", 0.7),
    "a loss without a temperature": (SkewKLLoss, "skew", 0.7),
    "a loss on layers": (ActivationBoundaryLoss, "margin", 3.0),
    "an exponent of a learned loss": (SimpleRecipeLoss, "power", 2.0),
    "a list": (MultiLevelLogitLoss, "temperatures", [2.0]),
    "a weight within a learned loss": (FactorTransferLoss, "factor_weight", 0.0),
}


@pytest.mark.parametrize(("case", "eager"), [*((case, False) for case in SETTINGS), ("beside a temperature", True)])
def test_a_setting_that_is_assigned_counts_from_the_next_step_on(case: str, eager: bool) -> None:
    make, name, value = SETTINGS[case]
    model, step = made(make(), eager)
    _, expected = made(make(**{name: value}), eager)
    first = step()
    assert first != pytest.approx(expected(), rel=1e-3)

    setattr(model.terms[0].loss, name, value)
    assert step() == pytest.approx(expected(), rel=1e-6)

    setattr(model.terms[0].loss, name, getattr(make(), name))
    assert step() == pytest.approx(first, rel=1e-6)


def test_an_array_that_is_assigned_in_the_place_of_numbers_is_refused() -> None:
    model, step = made(MultiLevelLogitLoss(), True)
    step()
    model.terms[0].loss.temperatures = np.array([2.0])
    with pytest.raises(TypeError, match="Expected `temperatures` to be"):
        step()
