"""The live curve in notebooks, and the summary at the end of a fit (W5)."""

from __future__ import annotations

from typing import Any

import pytest
from device import ACCELERATOR
from lightning.pytorch import Trainer
from live_notebook import Notebook
from plain_trainer import PLAIN
from tiny import Mlp, ValidatedClassifier, loader

from distill_core.live import Curve
from lightning_distill import Balanced, DistillCallback, DistillSummary, LiveCurve, LogitsDistillation

QUIET: dict[str, Any] = {**PLAIN, "accelerator": ACCELERATOR, "devices": 1, "num_sanity_val_steps": 0}


def fit(*callbacks: Any, **settings: Any) -> DistillCallback:
    distill = DistillCallback(Mlp(7, seed=1), LogitsDistillation(weight=Balanced(steps=2)), student="model")
    trainer = Trainer(callbacks=[*callbacks, distill], max_epochs=2, log_every_n_steps=1, **QUIET, **settings)
    trainer.fit(ValidatedClassifier(), loader(), loader(rows=6))
    return distill


def test_the_curve_is_drawn_and_replaced_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook(monkeypatch)
    fit(LiveCurve(every=3))
    assert notebook.replaced == [False, True, True]  # after 3, 6 and all 8 steps
    assert {name: len(values) for name, values in notebook.curves.items()} == {
        "distill/task_loss": 3,
        "distill/logits_loss": 3,
    }


def test_a_second_fit_has_a_figure_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook, curve = Notebook(monkeypatch), LiveCurve(every=8)
    fit(curve)
    fit(curve)
    assert notebook.replaced == [False, True] * 2


def test_outside_of_a_notebook_one_warning_says_that_nothing_is_drawn() -> None:
    with pytest.warns(UserWarning, match="draws nothing, since this is not a notebook") as caught:
        fit(LiveCurve(every=1))
    assert len([each for each in caught if "draws nothing" in str(each.message)]) == 1


def test_the_summary_has_the_steps_the_losses_the_weight_and_the_agreement(capsys: pytest.CaptureFixture[str]) -> None:
    distill = fit(DistillSummary())
    printed = capsys.readouterr().out
    first, *lines = printed[printed.index("Distillation:") :].strip().split("\n")
    assert first.startswith("Distillation: 8 steps in ")
    values = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    metrics = {key: float(value) for key, value in distill_metrics(distill).items()}
    assert values["task_loss"] == f"{metrics['task_loss']:.4g}"
    assert values["logits_loss"] == f"{metrics['logits_loss']:.4g}, weight {distill.terms[0].weight:.4g}"
    assert values["val_teacher_agreement"] == f"{metrics['val_teacher_agreement']:.4g}"


def distill_metrics(distill: DistillCallback) -> dict[str, Any]:
    """The values of the run that has just ended, by a second one that is the same."""
    other = DistillCallback(Mlp(7, seed=1), LogitsDistillation(weight=Balanced(steps=2)), student="model")
    trainer = Trainer(callbacks=[other], max_epochs=2, log_every_n_steps=1, **QUIET)
    trainer.fit(ValidatedClassifier(), loader(), loader(rows=6))
    return {key.removeprefix("distill/"): value for key, value in trainer.callback_metrics.items()}


def test_gaps_and_negative_values_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook, curve = Notebook(monkeypatch), Curve(every=1)
    for step, value in enumerate((1.0, float("nan"), -2.0)):
        curve.add(step, {"loss": value})
    curve.draw()
    assert notebook.figures[-1].axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(("every", "words"), [(0, "`every` to be greater than 0"), (1.5, "`every` to be an int")])
def test_wrong_settings_are_refused(every: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        LiveCurve(every)
