"""SequenceDistillation in Keras: which positions count, and how they are averaged."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import keras_two_devices_tokens
import numpy as np
import pytest
from keras import ops
from keras_token_nets import (
    CLOSE,
    IGNORED,
    SEQUENCES,
    by_sequence,
    causal,
    every,
    mean,
    models,
    padded,
    split,
    trained,
    value_of,
)

import keras_distill
import lightning_distill
from keras_distill import (
    Call,
    DistillModel,
    GeneralizedJSDLoss,
    LogitMSELoss,
    ReverseKLLoss,
    SequenceDistillation,
    SkewKLLoss,
    SoftTargetLoss,
)
from keras_distill.recording.tokens import TokenPositions


def inputs_of(kind: str, rows: Any) -> Any:
    return split(rows)[0] if kind == "dict" else rows["token_ids"]


# Which positions count ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("kind", ["dict", "masked"])
@pytest.mark.parametrize("extra", [0, 3])
def test_padding_on_either_side_changes_nothing(side: str, labels: bool, kind: str, extra: int) -> None:
    networks, rows = models(kind), padded(side=side, length=5 + extra)
    logs, gradients = trained(networks, inputs_of(kind, rows), rows["labels"] if labels else None)
    assert logs["tokens_loss"] == pytest.approx(mean(by_sequence(*networks)), **CLOSE)
    _, expected = trained(networks, inputs_of(kind, padded()), padded()["labels"])
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], atol=1e-6, err_msg=name)


def test_labels_alone_say_which_tokens_count() -> None:
    networks, rows = models("plain"), padded()
    values = every(*networks, rows["token_ids"])[:, :-1]
    counts = rows["labels"][:, 1:] != IGNORED
    assert value_of(networks, rows["token_ids"], rows["labels"]) == pytest.approx(values[counts].mean(), **CLOSE)
    zeros = SequenceDistillation(ignore_index=0)  # labels that contain the padding itself
    assert value_of(networks, rows["token_ids"], rows["token_ids"], zeros) == pytest.approx(
        values[counts].mean(), **CLOSE
    )


@pytest.mark.parametrize("run", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}])
def test_a_student_equal_to_its_teacher_gives_exactly_0(run: dict[str, bool]) -> None:
    if keras.backend.backend() == "torch" and run.get("jit_compile"):
        pytest.skip("XLA does not compile models of torch")
    for side in ("left", "right"):
        rows = padded(side=side)
        logs, gradients = trained((causal(), causal()), *split(rows), **run)
        assert logs["tokens_loss"] == 0
        assert max(np.abs(gradient).max() for gradient in gradients.values()) < 1e-7


@pytest.mark.parametrize("run", [{"run_eagerly": True}, {"jit_compile": True}])
def test_eager_steps_and_xla_give_the_value_of_the_graph(run: dict[str, bool]) -> None:
    if keras.backend.backend() == "torch" and run.get("jit_compile"):
        pytest.skip("XLA does not compile models of torch")
    logs, _ = trained(models(), *split(padded()), **run)
    assert logs["tokens_loss"] == pytest.approx(mean(by_sequence(*models())), **CLOSE)


def test_the_teacher_is_not_read_one_position_off() -> None:
    networks, rows = models(), padded()
    value, values = value_of(networks, *split(rows)), every(*networks, split(rows)[0])
    for moved in (values[:, 1:][rows["labels"][:, 1:] != IGNORED], values[rows["labels"] != IGNORED]):
        assert abs(moved.mean() - value) > 1e-3
    assert value == pytest.approx(values[:, :-1][rows["labels"][:, 1:] != IGNORED].mean(), **CLOSE)


@pytest.mark.parametrize("loss", ["SoftTargetLoss", "ReverseKLLoss", "GeneralizedJSDLoss", "DecoupledKDLoss"])
@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
def test_values_equal_those_of_the_pytorch_half(loss: str, normalize: Any) -> None:
    import torch

    rows, generator = padded(), np.random.default_rng(0)
    student, teacher = (generator.normal(size=(3, 5, 9)).astype("float32") for _ in range(2))
    labels = np.where(rows["labels"] == IGNORED, IGNORED, rows["labels"] % 9).astype("int32")
    term = SequenceDistillation(getattr(keras_distill, loss)(), normalize=normalize)
    value = term.compute(Call(ops.array(student)), Call(ops.array(teacher)), labels=ops.array(labels))
    twin = lightning_distill.SequenceDistillation(getattr(lightning_distill, loss)(), normalize=normalize)
    call = lightning_distill.Call((), {"labels": torch.tensor(labels).long()}, output=torch.tensor(student))
    expected = twin(call, lightning_distill.Call((), {}, output=torch.tensor(teacher)))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)


def test_both_halves_have_the_same_settings() -> None:
    settings = [
        {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
        for kind in (SequenceDistillation, lightning_distill.SequenceDistillation)
    ]
    only = {"use_sample_weight", "kwargs"}, {"labels"}  # Keras passes the labels of a batch to a model by itself
    kept = [
        {name: value for name, value in own.items() if name not in left}
        for own, left in zip(settings, only, strict=True)
    ]
    assert kept[0] == kept[1]


NUMBERS = np.array([[number for number, sequence in enumerate(SEQUENCES) for _ in sequence]], "int32")
PLACES = np.array([[place for sequence in SEQUENCES for place in range(len(sequence))]], "int32")
PAIRS = (NUMBERS[:, :, None] == NUMBERS[:, None]) & np.tril(np.ones((11, 11), bool))  # a token sees another
PACKED_MARKS = {
    "positions": {"position_ids": PLACES},
    "positions in three parts": {"position_ids": np.stack([PLACES] * 3)},
    "numbers of documents": {"seq_idx": NUMBERS},
    "padding mask": {"padding_mask": NUMBERS + 1},
    "mask of pairs": {"attention_mask": PAIRS},
    "mask of pairs for heads": {"attention_mask": PAIRS[:, None].astype("int32")},
}


@pytest.mark.parametrize("mark", PACKED_MARKS)
def test_no_token_of_a_packed_document_predicts_the_first_of_the_next(mark: str) -> None:
    tokens = np.array([[token for sequence in SEQUENCES for token in sequence]], "int32")
    networks = models("plain")
    inputs = {"token_ids": tokens, **PACKED_MARKS[mark]}
    values = every(*networks, tokens)[0]
    counted = [value for place, value in enumerate(values) if place not in (4, 6, 10)]  # the last of each document
    assert value_of([named(network) for network in networks], inputs, tokens) == pytest.approx(
        sum(counted) / len(counted), **CLOSE
    )
    assert value_of(networks, tokens, tokens) == pytest.approx(
        values[:-1].mean(), **CLOSE
    )  # without marks one document
    shifted = np.roll(tokens, -1, axis=1)
    shifted[0, -1] = IGNORED
    with pytest.raises(ValueError, match="to leave out the last token of each packed document"):
        value_of([named(network) for network in networks], inputs, shifted, SequenceDistillation(shift=False))
    shifted[0, [4, 6]] = IGNORED
    cut = shifted.copy()  # from a longer text, whose next token the last label is
    cut[0, -1] = 1
    value_of([named(network) for network in networks], inputs, cut, SequenceDistillation(shift=False))
    value = value_of([named(network) for network in networks], inputs, shifted, SequenceDistillation(shift=False))
    assert value == pytest.approx(sum(counted) / len(counted), **CLOSE)


def test_shifted_labels_may_be_equal_to_the_padding_after_a_text() -> None:
    """Its end is often the token that pads, and `position_ids` are 0 there."""
    places, shown = np.array([[0, 1, 2, 3, 4, 0, 0, 0]]), np.array([[1, 1, 1, 1, 1, 0, 0, 0]])
    inputs = {"token_ids": np.array([[5, 3, 8, 2, 7, 0, 0, 0]]), "position_ids": places, "padding_mask": shown}
    labels = np.array([[3, 8, 2, 7, 0, IGNORED, IGNORED, IGNORED]])
    positions = TokenPositions(shift=False, ignore_index=IGNORED, mask=None)
    assert positions.check_alignment(inputs, labels)
    with pytest.raises(ValueError, match="to leave out the last token of each packed document"):
        positions.check_alignment({**inputs, "padding_mask": np.ones_like(shown)}, labels)


@pytest.mark.parametrize("alone", [False, True], ids=["padding", "a document of one token"])
def test_the_end_of_a_text_counts_where_its_token_is_that_of_the_padding_at_place_0(alone: bool) -> None:
    """Without a mask too; a single token at place 0 is another document."""
    places = np.array([[0, 1, 2, 3, 4, 5, 6, 0] if alone else [0, 1, 2, 3, 4, 0, 0, 0]])
    tokens = np.array([[5, 3, 8, 2, 7, 6, 4, 9] if alone else [5, 3, 8, 2, 7, 0, 0, 0]])
    labels = tokens if alone else np.array([[5, 3, 8, 2, 7, 0, IGNORED, IGNORED]])
    inputs = {"token_ids": tokens, "position_ids": places}
    positions = TokenPositions(shift=True, ignore_index=IGNORED, mask=None)
    counts = keras.ops.convert_to_numpy(positions.of(np.zeros((1, 8, 9)), inputs, labels).counts)
    assert counts.sum() == (6 if alone else 5)
    if not alone:
        shifted = np.array([[3, 8, 2, 7, 0, IGNORED, IGNORED, IGNORED]])
        assert TokenPositions(shift=False, ignore_index=IGNORED).check_alignment(inputs, shifted)


def named(network: keras.Model) -> keras.Model:
    """The model, with a dict of inputs of which it reads the tokens alone."""
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    return keras.Model({"token_ids": tokens}, network(tokens), name=network.name)


def test_an_answer_of_one_token_keeps_its_signal() -> None:
    networks, rows = models(), padded([[5, 3, 8, 2, 7]])
    inputs, labels = split(rows)
    labels = np.where(np.arange(5) < 4, IGNORED, labels)
    logs, gradients = trained(networks, inputs, labels)
    expected = every(*networks, inputs)[0, 3]
    assert logs["tokens_loss"] == pytest.approx(expected, **CLOSE)
    assert max(np.abs(gradient).max() for gradient in gradients.values()) > 1e-3
    marked = {**inputs, "answer": np.array([[0, 0, 0, 0, 1]])}
    for mask in ("answer", lambda x: x["answer"]):
        logs, _ = trained(networks, marked, None, SequenceDistillation(mask=mask))
        assert logs["tokens_loss"] == pytest.approx(expected, **CLOSE)


def test_a_mask_and_labels_both_count() -> None:
    networks, (inputs, labels) = models(), split(padded())
    inputs["answer"] = np.array([[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    labels[0, 4] = IGNORED
    values = every(*networks, split(padded())[0])
    expected = np.mean([values[0, 1], values[0, 2], values[1, 0], *values[2, :3]])
    assert value_of(networks, inputs, labels, SequenceDistillation(mask="answer")) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
@pytest.mark.parametrize(
    "loss", [SoftTargetLoss(), ReverseKLLoss(), GeneralizedJSDLoss(), SkewKLLoss(), LogitMSELoss()]
)
def test_nothing_that_counts_gives_0_and_gradients_of_0(loss: Any, normalize: Any) -> None:
    inputs, labels = split(padded())
    term = SequenceDistillation(loss, normalize=normalize)
    logs, gradients = trained(models(), inputs, np.full_like(labels, IGNORED), term)
    assert logs["tokens_loss"] == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_labels_of_whole_sequences_are_not_taken_for_tokens() -> None:
    networks, (inputs, _) = models(), split(padded())
    assert value_of(networks, inputs, np.array([1, 0, 2])) == pytest.approx(mean(by_sequence(*networks)), **CLOSE)


def test_shifted_labels_count_in_place() -> None:
    """As the preprocessors of KerasHub make them, with weights of 0 where a token predicts padding."""
    networks, rows = models(), padded()
    inputs = {name: rows[name][:, :-1] for name in ("token_ids", "padding_mask")}
    labels, weights = rows["token_ids"][:, 1:], rows["padding_mask"][:, 1:].astype("float32")
    term = SequenceDistillation(shift=False)
    logs, _ = trained(networks, inputs, labels, term, sample_weight=weights)
    assert logs["tokens_loss"] == pytest.approx(mean(by_sequence(*networks)), **CLOSE)


def test_decoder_inputs_are_not_confused_with_the_encoders() -> None:
    networks = models("plain")
    rows = padded()
    inputs = {
        "token_ids": rows["token_ids"],
        "decoder_token_ids": rows["token_ids"],
        "decoder_padding_mask": rows["padding_mask"],
        "padding_mask": np.zeros((3, 5), "int32"),
    }
    term = SequenceDistillation(shift=False)
    expected = every(*networks, rows["token_ids"])[rows["padding_mask"] == 1].mean()
    assert value_of([named(network) for network in networks], inputs, None, term) == pytest.approx(expected, **CLOSE)


# How they are averaged ------------------------------------------------------------------------------------------------


def test_sequences_count_alike_with_normalize_sequences() -> None:
    networks, rows = models(), padded([*SEQUENCES, [3]])  # the last sequence has no token to predict
    expected = np.mean([np.mean(values) for values in by_sequence(*networks) if values])
    logs, _ = trained(networks, *split(rows), SequenceDistillation(normalize="sequences"))
    assert logs["tokens_loss"] == pytest.approx(expected, **CLOSE)
    assert abs(expected - mean(by_sequence(*networks))) > 1e-3


@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
def test_sample_weights_multiply_the_values_as_in_losses_of_keras(normalize: Any) -> None:
    networks, rows = models(), padded()
    values, weights = by_sequence(*networks), np.array([2.0, 0.0, 0.5], "float32")
    weighted = [[weight * value for value in row] for weight, row in zip(weights, values, strict=True)]
    expected = {"tokens": mean(weighted), "sequences": np.mean([np.mean(row) for row in weighted])}[normalize]
    term = SequenceDistillation(normalize=normalize)
    logs, _ = trained(networks, *split(rows), term, sample_weight=weights)
    assert logs["tokens_loss"] == pytest.approx(expected, **CLOSE)
    ignoring = SequenceDistillation(normalize=normalize, use_sample_weight=False)
    logs, _ = trained(networks, *split(rows), ignoring, sample_weight=weights)
    assert logs["tokens_loss"] == pytest.approx(value_of(networks, *split(rows), term), **CLOSE)


@pytest.mark.parametrize("by_weight", [False, True])
def test_weights_of_tokens_belong_to_the_labels(by_weight: bool) -> None:
    networks, rows = models(), padded()
    weights = np.linspace(0.5, 3.0, 15, dtype="float32").reshape(3, 5)
    weights[0, 1:3] = 0.0  # these tokens do not count
    values = every(*networks, split(rows)[0])[:, :-1]
    counts = (rows["labels"][:, 1:] != IGNORED) & (weights[:, 1:] != 0)
    weighted = (weights[:, 1:] * values)[counts].sum()
    expected = weighted / (weights[:, 1:][counts].sum() if by_weight else counts.sum())
    loss = SoftTargetLoss(1.0, reduction="mean_with_sample_weight" if by_weight else "sum_over_batch_size")
    logs, _ = trained(networks, *split(rows), SequenceDistillation(loss), sample_weight=weights)
    assert logs["tokens_loss"] == pytest.approx(expected, **CLOSE)


@pytest.mark.tensorflow
def test_two_devices_with_unequal_numbers_of_tokens_equal_one(tmp_path: Path) -> None:
    command = [sys.executable, keras_two_devices_tokens.__file__, str(tmp_path / "report.npz")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    report = np.load(tmp_path / "report.npz")
    for normalize in ("tokens", "sequences"):
        single, double = report[f"{normalize}_single"], report[f"{normalize}_double"]
        assert np.abs(report[f"{normalize}_start"] - single).max() > 1e-3
        np.testing.assert_allclose(double, single, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(report[f"{normalize}_double_loss"], report[f"{normalize}_single_loss"], rtol=1e-5)


def accumulated(sequences: Any, optimizer: Any, batch_size: int) -> list[Any]:
    rows = padded(sequences)
    student, teacher = models()
    model = DistillModel(student, teacher, SequenceDistillation())
    model.compile(optimizer, jit_compile=False)
    model.fit(*split(rows), batch_size=batch_size, shuffle=False, verbose=0)
    return student.get_weights()


def test_accumulated_batches_of_equally_many_tokens_equal_a_large_batch() -> None:
    sequences = [[5, 3, 8], [4, 9, 2, 1], [6, 1, 1, 12], [3, 3, 7]]
    with pytest.warns(UserWarning, match=r"averages the gradients of 2 batches.*tokens in term 'tokens'"):
        halves = accumulated(sequences, keras.optimizers.SGD(0.5, gradient_accumulation_steps=2), 2)
    for value, expected in zip(halves, accumulated(sequences, keras.optimizers.SGD(0.5), 4), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-6)
