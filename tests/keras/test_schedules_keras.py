"""Schedules over steps, epochs and the fraction of the training, without a new trace, resumed where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_distill.schedules
import lightning_distill.schedules
from keras_distill import DistillationScheduler, DistillModel, LogitsDistillation, TAIDLoss
from keras_distill.schedules import Cosine, Linear, Progress, Schedule, Step, WarmUp

IMAGES = np.random.default_rng(0).standard_normal((16, 4)).astype("float32")
LABELS = np.arange(16) % 3


def model(**settings: Any) -> DistillModel:
    student, teacher = (keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]) for _ in range(2))
    made = DistillModel(student, teacher, LogitsDistillation(**settings))
    made.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return made


class Watch(keras.callbacks.Callback):
    """The term's weight at the end of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen.append(float(self.model.terms[0].weight))


def weights_seen(made: DistillModel, schedule: Any, **settings: Any) -> list[float]:
    watch = Watch()
    callbacks = [DistillationScheduler("weight", schedule), watch]
    made.fit(IMAGES, LABELS, **{"batch_size": 4, "verbose": 0, "callbacks": callbacks, **settings})
    return watch.seen


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Linear(1.0, 0.0, duration=8, over="steps"), [1 - step / 8 for step in range(8)]),
        (Linear(1.0, 0.0), [1 - step / 8 for step in range(8)]),
        (Linear(1.0, 0.0, duration=2, over="epochs"), [1.0] * 4 + [0.5] * 4),
        (Step([2.0, 1.0], boundaries=[3], over="steps"), [2.0] * 3 + [1.0] * 5),
        (Schedule(lambda step: step**2, over="steps"), [float(step**2) for step in range(8)]),
        (lambda epoch: epoch + 0.5, [0.5] * 4 + [1.5] * 4),
    ],
)
def test_the_weight_follows_its_schedule(schedule: Any, expected: list[float]) -> None:
    assert weights_seen(model(), schedule, epochs=2) == pytest.approx(expected)


def test_a_generator_whose_length_is_unknown_moves_the_fraction_at_least_once_an_epoch() -> None:
    def batches() -> Any:
        for start in range(0, 16, 4):
            yield IMAGES[start : start + 4], LABELS[start : start + 4]

    made, watch = model(), Watch()
    schedule = DistillationScheduler("weight", Linear(1.0, 0.0))
    with pytest.warns(UserWarning, match="ran out of data"):  # Keras warns of every finite generator
        made.fit(batches(), verbose=0, shuffle=False, callbacks=[schedule, watch])
    assert watch.seen == [1.0] * 4


def test_accumulated_gradients_count_as_one_step() -> None:
    made = model()
    made.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), made.loss)
    assert weights_seen(made, Linear(0.0, 2.0, duration=2, over="steps")) == [0.0, 0.0, 1.0, 1.0]


def test_the_loss_in_the_logs_is_that_of_the_scheduled_weight() -> None:
    made = model()
    schedule = DistillationScheduler("weight", Step([3.0, 0.0], boundaries=[1]))
    logs = made.fit(IMAGES, LABELS, epochs=2, batch_size=16, verbose=0, callbacks=[schedule]).history
    assert logs["logits_weight"] == [3.0, 0.0]
    np.testing.assert_allclose(logs["distillation_loss"], [3.0 * logs["logits_loss"][0], 0.0], rtol=1e-6)


@pytest.mark.tensorflow
def test_a_new_number_in_every_step_needs_no_new_trace() -> None:
    made, traces = model(), []
    call = made.student.layers[0].call
    made.student.layers[0].call = lambda *args, **kwargs: (traces.append(1), call(*args, **kwargs))[1]
    weights_seen(made, Cosine(1.0, 0.0))
    once = len(traces)
    weights_seen(made, Cosine(0.5, 0.1), epochs=2)
    assert len(traces) == once


def test_a_loaded_model_continues_the_schedule(tmp_path: Path) -> None:
    schedule = Linear(1.0, 0.0, duration=8, over="steps")
    first = model()
    whole = weights_seen(first, schedule)
    first.save(tmp_path / "model.keras")
    second = keras.models.load_model(tmp_path / "model.keras")
    second.teacher = first.teacher
    whole += weights_seen(second, schedule, initial_epoch=1, epochs=2)
    assert whole == pytest.approx([1 - step / 8 for step in range(8)])


def test_both_halves_compute_the_same_numbers() -> None:
    settings = {
        "Linear": ((2.0, 0.5), {"duration": 0.7}),
        "Cosine": ((2.0, 0.5), {"duration": 7, "over": "epochs"}),
        "WarmUp": ((3.0,), {"duration": 9, "over": "steps"}),
        "Step": (([4.0, 2.0, 1.0],), {"boundaries": [2, 5]}),
    }
    for name, (args, kwargs) in settings.items():
        schedule, expected = (
            getattr(half, name)(*args, **kwargs) for half in (keras_distill.schedules, lightning_distill.schedules)
        )
        for step in range(11):
            point = (step, step, step / 10)
            assert schedule.at(Progress(*point)) == expected.at(lightning_distill.schedules.Progress(*point))


def test_a_wrong_schedule_raises() -> None:
    with pytest.raises(ValueError, match=r"^Expected `duration` to be given in steps, but got duration=None\.$"):
        WarmUp(1.0, over="steps")
    with pytest.raises(TypeError, match=r"^Expected `schedule` to be a schedule or a function of the epoch\. Received"):
        DistillationScheduler("weight", 0.5)
    with pytest.raises(ValueError, match=r"^Expected `weight` to be at least 0\. Received: weight=-1\.0$"):
        weights_seen(model(), Linear(-1.0, 0.0))


def test_a_loss_with_a_ramp_of_its_own_follows_it_logs_it_and_keeps_it_in_the_file(tmp_path: Path) -> None:
    settings = {"start": 0.2, "end": 1.0, "duration": 8.0, "over": "steps"}
    made = model(loss=TAIDLoss(**settings))

    logs = made.fit(IMAGES, LABELS, batch_size=4, epochs=1, verbose=0).history
    made.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.teacher = made.teacher
    later = loaded.fit(IMAGES, LABELS, batch_size=4, epochs=2, initial_epoch=1, verbose=0).history

    assert logs["logits_interpolation"] == pytest.approx([0.2 + 0.8 * 3 / 8])
    assert later["logits_interpolation"] == pytest.approx([0.2 + 0.8 * 7 / 8])
    loss = loaded.terms[0].loss
    assert {name: loss.get_config()[name] for name in settings} == settings
    assert "interpolation" not in loss.get_config()
