"""SequenceDistillation in Keras beside precisions, vocabularies, metrics, caches and files, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_loss_cases import differentiated
from keras_nets import numpy_of
from keras_token_nets import (
    CLOSE,
    IGNORED,
    by_sequence,
    causal,
    divergence,
    mean,
    models,
    padded,
    split,
    trained,
    value_of,
)

import keras_distill
from keras_distill import (
    Call,
    DecoupledKDLoss,
    DistillModel,
    DistillStep,
    DistillTargets,
    DISTLoss,
    GeneralizedJSDLoss,
    ReverseKLLoss,
    SequenceDistillation,
    SoftTargetLoss,
    TeacherCache,
    TeacherDivergence,
)

# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("filler", [-math.inf, -6e4])
@pytest.mark.parametrize(
    "loss", [SoftTargetLoss(temperature=0.05), ReverseKLLoss(temperature=0.05), GeneralizedJSDLoss(temperature=0.05)]
)
def test_forbidden_tokens_leave_values_and_gradients_finite(loss: Any, filler: float, side: str, dtype: str) -> None:
    generator = np.random.default_rng(0)
    logits = [5 * generator.normal(size=(2, 4, 9)).astype("float32") for _ in range(2)]
    for index, name in enumerate(("student", "teacher")):
        if side in (name, "both"):
            logits[index][..., 5:] = filler

    class Wrapped:
        needs_labels = False

        def __call__(self, teacher: Any, student: Any) -> Any:
            return SequenceDistillation(loss).compute(Call(student), Call(teacher), labels=ops.ones((2, 4), "int32"))

    result = differentiated(Wrapped(), *logits, dtype)
    assert np.isfinite(result.value)
    gradient = np.asarray(result.student, "float32")
    assert not np.isnan(gradient).any()
    # where the teacher alone forbids tokens, the reverse divergence has gradients beyond the range of float16
    too_large = isinstance(loss, ReverseKLLoss) and side == "teacher" and dtype == "float16"
    assert np.isfinite(gradient).all() or too_large
    assert result.teacher is None


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains(policy: str) -> None:
    networks = models(dtype=policy)
    logs, gradients = trained(networks, *split(padded()))
    assert logs["tokens_loss"] == pytest.approx(mean(by_sequence(*models())), rel=0.05)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


# Vocabularies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student_size", "teacher_size"), [(13, 16), (16, 13)])
def test_columns_that_only_one_side_has_are_left_out_on_both(student_size: int, teacher_size: int) -> None:
    networks = causal(vocabulary=student_size), causal(7, 1, vocabulary=teacher_size)
    inputs, labels = split(padded())
    logs, gradients = trained(networks, inputs, labels)
    tensors = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    logits = [numpy_of(network(tensors)) for network in networks]
    counts = labels[:, 1:] != IGNORED
    for columns, term in ((13, None), (10, SequenceDistillation(vocabulary=10))):
        expected = divergence(*(values[..., :columns] for values in logits))[:, :-1][counts].mean()
        assert value_of(networks, inputs, labels, term) == pytest.approx(expected, **CLOSE)
    assert logs["tokens_loss"] == pytest.approx(value_of(networks, inputs, labels), **CLOSE)
    kernel = next(gradient for name, gradient in gradients.items() if "lm_head/kernel" in name)
    assert (kernel[:, 13:] == 0).all()
    assert (kernel[:, :13] != 0).any()


# Beside the rest of the library ---------------------------------------------------------------------------------------


def test_a_loss_with_labels_gets_the_token_that_each_position_predicts() -> None:
    networks, (inputs, labels) = models(), split(padded())
    loss, counts = DecoupledKDLoss(), labels[:, 1:] != IGNORED
    logits = [numpy_of(network(keras.tree.map_structure(ops.convert_to_tensor, inputs))) for network in networks]
    student, teacher = (ops.array(values[:, :-1][counts]) for values in logits)
    expected = float(loss((teacher, ops.array(labels[:, 1:][counts])), student))
    assert value_of(networks, inputs, labels, SequenceDistillation(loss)) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize(
    "loss", ["mse", keras.losses.MeanSquaredError(), lambda student, teacher: (student - teacher) ** 2]
)
def test_losses_of_keras_and_plain_functions_are_averaged_over_the_same_tokens(loss: Any) -> None:
    networks, (inputs, labels) = models(), split(padded())
    logits = [numpy_of(network(keras.tree.map_structure(ops.convert_to_tensor, inputs))) for network in networks]
    expected = ((logits[0] - logits[1]) ** 2).mean(-1)[:, :-1][labels[:, 1:] != IGNORED].mean()
    assert value_of(networks, inputs, labels, SequenceDistillation(loss)) == pytest.approx(expected, **CLOSE)


def test_probabilities_are_compared_with_from_logits_false() -> None:
    networks = models(activation="softmax")
    inputs, labels = split(padded())
    logits = [
        np.log(numpy_of(network(keras.tree.map_structure(ops.convert_to_tensor, inputs)))) for network in networks
    ]
    expected = divergence(*logits)[:, :-1][labels[:, 1:] != IGNORED].mean()
    term = SequenceDistillation(SoftTargetLoss(1.0, from_logits=False))
    assert value_of(networks, inputs, labels, term) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="student's output to be logits"):
        DistillModel(*networks, SequenceDistillation())


def test_metrics_of_the_teacher_are_means_over_the_same_tokens() -> None:
    networks, (inputs, labels) = models(), split(padded())
    model = DistillModel(
        *networks, SequenceDistillation(), teacher_metrics=[keras_distill.TeacherAgreement(), TeacherDivergence(1.0)]
    )
    model.compile(jit_compile=False)
    logs = model.evaluate(inputs, labels, verbose=0, return_dict=True)
    counts = labels[:, 1:] != IGNORED
    tensors = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    best = [numpy_of(network(tensors)).argmax(-1)[:, :-1][counts] for network in networks]
    assert logs["teacher_divergence"] == pytest.approx(mean(by_sequence(*networks)), **CLOSE)
    assert logs["teacher_agreement"] == pytest.approx(np.mean(best[0] == best[1]), **CLOSE)


@pytest.mark.parametrize("settings", [{}, {"top_k": 4}])
def test_a_cache_teaches_as_the_teacher_does(tmp_path: Path, settings: dict[str, int]) -> None:
    student, teacher = models("masked")
    rows = padded()
    cache = TeacherCache.build(teacher, rows["token_ids"], tmp_path / "cache", **settings)
    model = DistillModel(student, None, SequenceDistillation())
    model.compile(keras.optimizers.SGD(0.0), jit_compile=False)
    history = model.fit(
        cache.attach((rows["token_ids"], rows["labels"]), batch_size=3, shuffle=False), verbose=0
    ).history
    logits = [numpy_of(network(ops.array(rows["token_ids"]))) for network in (student, teacher)]
    if settings:  # the likeliest tokens, and all others together
        order = np.argsort(-logits[1], axis=-1)
        logits = [np.take_along_axis(values, order, axis=-1) for values in logits]
        logits = [
            np.concatenate([values[..., :4], np.log(np.exp(values[..., 4:]).sum(-1, keepdims=True))], -1)
            for values in logits
        ]
    expected = divergence(*logits)[:, :-1][rows["labels"][:, 1:] != IGNORED].mean()
    assert history["tokens_loss"][0] == pytest.approx(expected, rel=2e-3)


def test_stored_targets_teach_as_the_teacher_does() -> None:
    networks, (inputs, labels) = models(), split(padded())
    logits = networks[1].predict(inputs, verbose=0)
    logs, _ = trained((networks[0], None), inputs, DistillTargets(labels, logits))
    assert logs["tokens_loss"] == pytest.approx(mean(by_sequence(*networks)), **CLOSE)


@keras.saving.register_keras_serializable(package="test_sequence_keras")
def answers(x: Any) -> Any:
    return x["answer"]


@pytest.mark.parametrize("mask", [None, "answer", answers])
def test_a_saved_model_continues_with_the_same_settings(tmp_path: Path, mask: Any) -> None:
    settings = {"shift": False, "ignore_index": 0, "normalize": "sequences", "vocabulary": 10, "weight": 0.5}
    student, teacher = models()
    model = DistillModel(student, teacher, SequenceDistillation(ReverseKLLoss(temperature=2.0), mask=mask, **settings))
    model.compile("sgd", jit_compile=False)
    inputs, labels = split(padded())
    inputs["answer"] = np.array([[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    expected = model.evaluate(inputs, labels, verbose=0, return_dict=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    [term] = loaded.terms
    assert isinstance(term, SequenceDistillation)
    assert (term.shift, term.tokens.ignore_index, term.normalize, term.vocabulary) == (False, 0, "sequences", 10)
    assert (term.tokens.mask, term.weight, term.temperature, term.name) == (mask, 0.5, 2.0, "tokens")
    loaded.teacher = teacher
    assert loaded.evaluate(inputs, labels, verbose=0, return_dict=True) == pytest.approx(expected)


@pytest.mark.tensorflow
def test_a_loop_in_a_graph_trains_on_sequences_of_any_length() -> None:
    import tensorflow as tf

    networks = models()
    step = DistillStep(*networks, SequenceDistillation())

    @tf.function(reduce_retracing=True, input_signature=[tf.TensorSpec((None, None), "int32")] * 3)
    def loss(tokens: Any, padding: Any, labels: Any) -> Any:
        with step.watching():
            output = step.student({"token_ids": tokens, "padding_mask": padding})
        return step.losses(output, labels=labels)["tokens_loss"]

    for length in (5, 8):
        rows = padded(length=length)
        value = loss(*(tf.constant(rows[name]) for name in ("token_ids", "padding_mask", "labels")))
        assert float(value) == pytest.approx(mean(by_sequence(*networks)), **CLOSE)


@pytest.mark.tensorflow
def test_a_dataset_with_a_padding_batch_trains() -> None:
    import tensorflow as tf

    networks = models()
    rows = padded()
    data = tf.data.Dataset.from_tensor_slices(split(rows)).padded_batch(
        3, padded_shapes=({"token_ids": [None], "padding_mask": [None]}, [None]), padding_values=(None, IGNORED)
    )
    logs, _ = trained(networks, data, None)
    assert logs["tokens_loss"] == pytest.approx(mean(by_sequence(*networks)), **CLOSE)


def test_distillation_brings_the_student_to_the_teacher() -> None:
    networks = models()
    model = DistillModel(*networks, SequenceDistillation(), task_weight=0.0)
    model.compile(keras.optimizers.Adam(0.05), jit_compile=False)
    losses = model.fit(*split(padded()), epochs=40, verbose=0).history["tokens_loss"]
    assert losses[-1] < 0.1 * losses[0]


# Refused --------------------------------------------------------------------------------------------------------------


def computed(student: Any, teacher: Any, labels: Any = None, term: Any = None, **settings: Any) -> Any:
    calls = [Call(ops.zeros(shape)) for shape in (student, teacher)]
    labels = None if labels is None else ops.ones(labels, "int32")
    return (term or SequenceDistillation()).compute(*calls, labels=labels, **settings)


TOKENS = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], "int32")
MOVED = np.array([[2, 3, 4, 5, 0], [7, 8, 9, 10, 0]], "int32")
WRONG: dict[str, tuple[Any, str]] = {
    "no labels and no mask": (
        lambda: value_of(models("plain"), TOKENS),
        r"Expected labels, a padding mask or `mask=` to say which tokens count\. Pass token labels",
    ),
    "labels of another length": (
        lambda: computed((2, 4, 9), (2, 4, 9), (2, 5)),
        r"`labels` to have one value for each position of the student's logits, shape \(2, 4\)",
    ),
    "weights of another length": (
        lambda: computed((2, 4, 9), (2, 4, 9), (2, 4), sample_weight=ops.ones((2, 3))),
        r"`sample_weight` to have one value for each position",
    ),
    "a mask of another length": (
        lambda: computed((2, 4, 9), (2, 4, 9), (2, 4), SequenceDistillation(mask=lambda x: ops.ones((2, 3)))),
        r"`mask` to have one value for each position",
    ),
    "a mask that is not there": (
        lambda: value_of(models(), *split(padded()), SequenceDistillation(mask="answer")),
        r"`mask` to say where the inputs keep the mask.*mask='answer' and inputs with the keys \['padding_mask', 'tok",
    ),
    "a mask in inputs without names": (
        lambda: value_of(models("plain"), TOKENS, None, SequenceDistillation(mask="answer")),
        "`mask` to say where the inputs keep the mask",
    ),
    "a teacher of another length": (
        lambda: computed((2, 4, 9), (2, 6, 9), (2, 4)),
        r"student and teacher to score the same tokens.*\(2, 4\) and \(2, 6\)",
    ),
    "flattened logits": (
        lambda: computed((8, 9), (8, 9), (2, 4)),
        r"student's logits to have the shape \(batch, tokens, vocabulary\).*\(8, 9\)",
    ),
    "other tokenizers": (
        lambda: DistillModel(causal(), causal(7, 1, 64), SequenceDistillation()),
        r"vocabularies to differ by padding at most.*13 entries of the student's and 64 of the teacher's",
    ),
    "more columns than both have": (
        lambda: DistillModel(*models(), SequenceDistillation(vocabulary=14)),
        "`vocabulary` to be at most 13, which both models have",
    ),
    "several outputs": (
        lambda: SequenceDistillation().compute(Call([ops.zeros((2, 4, 9))] * 2), Call([ops.zeros((2, 4, 9))] * 2)),
        "models with one output for SequenceDistillation",
    ),
    "labels that are shifted already": (
        lambda: value_of(models("plain"), TOKENS, MOVED),
        r"labels that are the student's own tokens with shift=True\. Pass shift=False",
    ),
    "labels that are shifted already, in fit": (
        lambda: trained(models("plain"), TOKENS, MOVED, jit_compile=False),
        r"labels that are the student's own tokens with shift=True\. Pass shift=False",
    ),
    "labels that are not shifted yet": (
        lambda: value_of((CausalLM(), CausalLM()), TOKENS, TOKENS, SequenceDistillation(shift=False)),
        r"labels that are shifted already with shift=False\. Pass shift=True",
    ),
    "a masked model with a shift": (
        lambda: DistillStep(MaskedLM(), MaskedLM(), SequenceDistillation()),
        "`shift` to be False for a masked language model",
    ),
    "a loss of whole batches": (
        lambda: SequenceDistillation(DISTLoss()),
        "`loss` to return one value for each position",
    ),
    "a loss that takes the mean": (
        lambda: computed((2, 4, 9), (2, 4, 9), (2, 4), SequenceDistillation(lambda s, t: ops.mean(s - t))),
        r"to return one value for each token, shape \(batch, tokens\)",
    ),
    "a sum": (lambda: SequenceDistillation(SoftTargetLoss(reduction="sum")), "`loss` to be averaged"),
    "an unknown normalisation": (lambda: SequenceDistillation(normalize="batch"), "`normalize` to be one of"),
    "a mask of numbers": (lambda: SequenceDistillation(mask=3), "`mask` to be a key of the inputs"),
    "no columns": (lambda: SequenceDistillation(vocabulary=0), "`vocabulary` to be greater than 0"),
    "a loss on labels without labels": (
        lambda: value_of(models(), split(padded())[0], None, SequenceDistillation(DecoupledKDLoss())),
        "token labels of shape .* for DecoupledKDLoss",
    ),
}


class _Wrapped(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.network = causal(kind="plain")

    def call(self, inputs: Any) -> Any:
        return self.network(inputs)


class CausalLM(_Wrapped):
    """Named as the causal models of KerasHub."""


class MaskedLM(_Wrapped):
    """Named as the masked models of KerasHub."""


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_refused_with_a_remedy(wrong: str) -> None:
    make, words = WRONG[wrong]
    with pytest.raises((ValueError, TypeError), match=words):
        make()


@pytest.mark.tensorflow
def test_shifted_labels_of_a_dataset_are_refused_before_the_first_step() -> None:
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((TOKENS, MOVED)).batch(2)
    with pytest.raises(ValueError, match="Pass shift=False"):
        trained(models("plain"), data, None)
    trained(models("plain"), data, None, SequenceDistillation(shift=False))


def test_labels_are_looked_at_in_each_training() -> None:
    student, teacher = models("plain")
    model = DistillModel(student, teacher, SequenceDistillation())
    model.compile("sgd", jit_compile=False)
    model.fit(TOKENS, TOKENS, verbose=0)
    with pytest.raises(ValueError, match="Pass shift=False"):
        model.fit(TOKENS, MOVED, verbose=0)


def test_labels_of_few_tokens_are_not_judged() -> None:
    networks = models("plain")
    value_of(networks, TOKENS[:1, :4], MOVED[:1, :4])  # three of them are equal to the next token
    value_of(networks, np.full((2, 5), 3, "int32"), np.full((2, 5), 3, "int32"))
