"""The live curve in notebooks, and the summary at the end of fit, for Keras (W5)."""

from __future__ import annotations

from typing import Any

import pytest
from keras_nets import cross_entropy, mlp, table
from live_notebook import Notebook

from keras_distill import DistillationScheduler, DistillModel, DistillSummary, LiveCurve, LogitsDistillation

X, Y = table(32)


def fit(*callbacks: Any) -> Any:
    model = DistillModel(mlp(8), mlp(8, name="teacher"), LogitsDistillation(weight=0.25))
    model.compile("sgd", cross_entropy(), run_eagerly=True)
    return model.fit(X, Y, batch_size=8, epochs=2, callbacks=list(callbacks), verbose=0).history


def test_the_curve_is_drawn_and_replaced_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook(monkeypatch)
    fit(LiveCurve(every=3))
    assert notebook.replaced == [False, True, True, True]  # after 3 and 6 batches, and after both epochs
    assert {name: len(values) for name, values in notebook.curves.items()} == {"task_loss": 4, "logits_loss": 4}


def test_outside_of_a_notebook_one_warning_says_that_nothing_is_drawn() -> None:
    with pytest.warns(UserWarning, match="draws nothing, since this is not a notebook"):
        fit(LiveCurve(every=1))


def test_the_summary_has_the_steps_the_losses_the_weight_and_the_agreement(capsys: pytest.CaptureFixture[str]) -> None:
    history = fit(DistillSummary())
    printed = capsys.readouterr().out
    first, *lines = printed[printed.index("Distillation:") :].strip().split("\n")
    assert first.startswith("Distillation: 8 steps in ")
    values = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert values["task_loss"] == f"{history['task_loss'][-1]:.4g}"
    assert values["logits_loss"] == f"{history['logits_loss'][-1]:.4g}, weight 0.25"
    assert values["teacher_agreement"] == f"{history['teacher_agreement'][-1]:.4g}"


def test_a_scheduler_that_is_verbose_prints_a_line_for_each_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    fit(DistillationScheduler("weight", lambda epoch: 0.5 / (1 + epoch), verbose=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert lines == ["Epoch 1: logits_weight is 0.5.", "Epoch 2: logits_weight is 0.25."]
