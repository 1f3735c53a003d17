"""`mask=` and `ignore_index=` of LogitsDistillation: the numbers of the PyTorch half, files, metrics, refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from counted_maps import FINE, INPUTS, MASK, STUDENT, TEACHER, marked, no_task
from keras import ops

from keras_distill import (
    ChannelWiseLoss,
    DecoupledKDLoss,
    DistillModel,
    LogitMSELoss,
    LogitsDistillation,
    SoftTargetLoss,
    TeacherAgreement,
)
from keras_distill.recording import Call
from keras_distill.terms.counting import resized_mask


@pytest.mark.parametrize("size", [(8, 12), (4, 6), (7, 5), (3, 2), (9, 4), (2, 12)])
def test_a_mask_is_resized_as_in_the_pytorch_half(size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    from lightning_distill.terms.maps import resized_mask as of_lightning

    for seed in range(5):
        mask = np.random.default_rng(seed).random((2, *size)) < 0.5
        expected = of_lightning(torch.tensor(mask), torch.zeros(2, 5, 4, 6)).numpy()
        np.testing.assert_array_equal(ops.convert_to_numpy(resized_mask(ops.array(mask), STUDENT)), expected)


@pytest.mark.parametrize("settings", [{"mask": "mask"}, {"ignore_index": 255}, {"mask": "mask", "ignore_index": 255}])
@pytest.mark.parametrize("loss", ["SoftTargetLoss", "LogitMSELoss"])
def test_the_value_is_that_of_the_pytorch_half(loss: str, settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    import lightning_distill
    from lightning_distill.recording import Call as TorchCall

    first = [torch.tensor(array).permute(0, 3, 1, 2) for array in (STUDENT, TEACHER)]
    mask = np.repeat(np.repeat(MASK, 2, 1), 2, 2) if len(settings) == 2 else MASK
    batch = {"labels": torch.tensor(FINE), "mask": torch.tensor(mask)}
    calls = [TorchCall((), {}, output=logits, batch=batch) for logits in first]
    term = lightning_distill.LogitsDistillation(getattr(lightning_distill, loss)(), **settings)
    expected = float(term(*calls, batch["labels"])) if "ignore_index" in settings else float(term(*calls))

    own = LogitsDistillation({"SoftTargetLoss": SoftTargetLoss, "LogitMSELoss": LogitMSELoss}[loss](), **settings)
    student = Call(ops.array(STUDENT), inputs={"mask": mask})
    value = own.compute(student, Call(ops.array(TEACHER)), labels=ops.array(FINE))
    assert float(value) == pytest.approx(expected, rel=1e-5)


def network(seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    images = keras.Input((4, 6, 3), name="images")
    return keras.Model({"images": images}, keras.layers.Conv2D(5, 1, name="scores")(images))


def distilled(**settings: Any) -> DistillModel:
    term = LogitsDistillation(SoftTargetLoss(temperature=1.0), **settings)
    model = DistillModel(network(1), network(2), term, teacher_metrics=[TeacherAgreement()])
    model.compile(keras.optimizers.SGD(0.1), no_task, jit_compile=False)
    return model


@pytest.mark.parametrize("settings", [{"mask": "mask"}, {"mask": marked, "ignore_index": 255}])
def test_a_training_and_its_metrics_leave_positions_out(settings: dict[str, Any], tmp_path: Path) -> None:
    model, labels = distilled(**settings), FINE[:, ::2, ::2]
    kept = MASK & (labels != 255) if "ignore_index" in settings else MASK
    outputs = [np.asarray(each.predict({"images": INPUTS["images"]}, verbose=0), "float64") for each in
               (model.student, model.teacher)]  # fmt: skip
    log_s, log_t = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in outputs)
    divergence = (np.exp(log_t) * (log_t - log_s)).sum(-1)[kept].mean()
    agreement = (log_s.argmax(-1) == log_t.argmax(-1))[kept].mean()
    model.save(tmp_path / "model.keras")
    logs = model.fit(INPUTS, labels, batch_size=2, verbose=0).history
    assert logs["logits_loss"][0] == pytest.approx(divergence, rel=1e-4)
    assert logs["teacher_agreement"][0] == pytest.approx(agreement, rel=1e-5)

    again = LogitsDistillation.from_config(model.terms[0].get_config())
    assert (again.mask, again.ignore_index) == (settings["mask"], settings.get("ignore_index"))


def test_labels_that_a_loss_needs_go_together_with_those_to_ignore() -> None:
    labels = np.where(FINE[:, ::2, ::2] == 255, 255, FINE[:, ::2, ::2])
    calls = Call(ops.array(STUDENT)), Call(ops.array(TEACHER))
    value = LogitsDistillation(DecoupledKDLoss(), ignore_index=255).compute(*calls, labels=ops.array(labels))
    kept = labels != 255
    alone = LogitsDistillation(DecoupledKDLoss()).compute(
        Call(ops.array(STUDENT[kept])), Call(ops.array(TEACHER[kept])), labels=ops.array(labels[kept])
    )
    assert float(value) == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda: LogitsDistillation(ChannelWiseLoss(), ignore_index=255), ValueError, "one value for each position"),
        (lambda: LogitsDistillation(mask=0.5), TypeError, "`mask` to be a key or an index of the inputs"),
        (
            lambda: distilled(mask="other").fit(INPUTS, FINE[:, ::2, ::2], verbose=0),
            ValueError,
            "the mask 'other'",
        ),
        (
            lambda: LogitsDistillation(ignore_index=255).compute(Call(STUDENT), Call(TEACHER)),
            ValueError,
            "labels for a term with ignore_index=255",
        ),
        (
            lambda: LogitsDistillation(ignore_index=255).compute(Call(STUDENT), Call(TEACHER), labels=FINE[:, 0]),
            ValueError,
            "labels, with `ignore_index`, to have one value for each example or position of a tensor (2, 4, 6, 5)",
        ),
    ],
    ids=["loss", "mask", "key", "labels", "shape"],
)
def test_a_use_that_cannot_be_right_is_refused_in_words(act: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        act()
