"""A cache of the likeliest classes in Keras: the Lightning half's numbers, on every backend (C3, C7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from cache_nets import Module, trained
from keras import ops
from keras_loss_cases import DIFFERENTIATED, differentiated
from keras_nets import Counter, assert_same_logs, assert_same_weights, cross_entropy
from torch import nn
from torch.utils.data import TensorDataset

import keras_distill
import lightning_distill
from keras_distill import CacheError, Call, DistillModel, DistillTargets, LogitsDistillation, losses
from keras_distill.functional.top_k import TopK, merge_classes
from lightning_distill.cache.loaders import read_answers
from lightning_distill.cache.teacher import Stored

ITEMS, CLASSES = 24, 10
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ITEMS, 6)).astype("float32")
Y = (np.arange(ITEMS) % CLASSES).astype("int32")
LOSSES = [
    ("SoftTargetLoss", {"temperature": 3.0}),
    ("SoftTargetLoss", {"temperature": 1.0}),
    ("SoftCrossEntropyLoss", {"temperature": 2.0}),
    ("ReverseKLLoss", {"temperature": 2.0}),
    ("GeneralizedJSDLoss", {"beta": 0.3, "temperature": 2.0}),
    ("SkewKLLoss", {"skew": 0.2}),
    ("SkewKLLoss", {"skew": 0.2, "reverse": True}),
    ("TotalVariationLoss", {"temperature": 1.5}),
]


def network(width: int, seed: int, features: int = 6) -> keras.Model:
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((features,))
    hidden = keras.layers.Dense(width, activation="relu", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(CLASSES, name="scores")(hidden))


def torch_twin(model: keras.Model) -> nn.Sequential:
    (kernel, bias), (kernel2, bias2) = (model.get_layer(name).get_weights() for name in ("hidden", "scores"))
    twin = nn.Sequential(nn.Linear(*kernel.shape), nn.ReLU(), nn.Linear(*kernel2.shape))
    for layer, (k, b) in ((twin[0], (kernel, bias)), (twin[2], (kernel2, bias2))):
        layer.load_state_dict({"weight": torch.tensor(np.array(k).T), "bias": torch.tensor(np.array(b))})
    return twin


def fitted(teacher: Any, data: Any, *more: Any, terms: Any = None, epochs: int = 2, **settings: Any) -> Any:
    model = DistillModel(network(8, seed=1), teacher, terms)
    model.compile(keras.optimizers.SGD(0.1), cross_entropy(), **{"jit_compile": False, **settings})
    return model, model.fit(data, *more, epochs=epochs, verbose=0, shuffle=False).history


class Merged:
    """A term's loss as a function of the student's logits and the teacher's log-probabilities."""

    needs_labels = False

    def __init__(self, loss: Any, answers: TopK) -> None:
        self.term, self.answers = LogitsDistillation(loss), answers

    def __call__(self, logs: Any, student: Any) -> Any:
        indices, _, tail, classes = map(ops.convert_to_tensor, self.answers)
        return self.term.compute(Call(student), Call(TopK(indices, logs, tail, classes)))


@pytest.mark.parametrize("shape", [(5, 12), (3, 4, 12)], ids=str)
@pytest.mark.parametrize(("name", "settings"), LOSSES)
def test_c7_values_and_gradients_are_the_lightning_halfs(
    tmp_path: Path, name: str, settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """C7: on the same folder, to 1e-6; the teacher gets no gradient."""
    logits = torch.as_tensor(3 * RNG.standard_normal(shape).astype("float32"))
    cache = lightning_distill.TeacherCache.build(
        nn.Identity(), TensorDataset(logits), tmp_path, top_k=4, dtype="uint8", progress=False
    )
    rows, student = [2, 0, 1], (2 * RNG.standard_normal((3, *shape[1:]))).astype("float32")
    student_logits = torch.as_tensor(student).requires_grad_()
    call = lightning_distill.Call((), {}, output=student_logits)
    (teacher_answer,) = cache.as_source().answers(call, Stored(read_answers(cache, rows, None)))
    term = lightning_distill.LogitsDistillation(getattr(lightning_distill.losses, name)(**settings))
    expected = term(call, teacher_answer)
    expected.backward()

    answers = keras_distill.TeacherCache.open(tmp_path).answers(rows)
    result = differentiated(Merged(getattr(losses, name)(**settings), answers), student, answers.logs)
    np.testing.assert_allclose(result.value, expected.item(), rtol=1e-6, atol=1e-6)
    assert student_logits.grad is not None
    np.testing.assert_allclose(result.student, student_logits.grad, rtol=1e-5, atol=1e-6)
    assert result.teacher is None or not result.teacher.any()


@pytest.mark.parametrize("wrote", ["torch", "keras"])
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_c3_c7_students_of_both_halves_learn_the_same_from_either_folder(
    tmp_path: Path, wrote: str, dtype: str
) -> None:
    """C3, C7: a cache that PyTorch wrote trains a Keras student, and the other way round."""
    teacher, student = network(24, seed=2), network(8, seed=1)
    data = TensorDataset(torch.as_tensor(X), torch.as_tensor(Y).long())
    settings = {"top_k": 4, "dtype": dtype, "batch_size": 8}
    if wrote == "torch":
        lightning_distill.TeacherCache.build(torch_twin(teacher), data, tmp_path, progress=False, **settings)
    else:
        keras_distill.TeacherCache.build(teacher, X, tmp_path, **settings)
    module = Module(data, shuffle=False)
    module.model = torch_twin(student)
    cache = lightning_distill.TeacherCache.open(tmp_path)
    trained(module, cache, [lightning_distill.LogitsDistillation()], epochs=2)
    model, _ = fitted(None, keras_distill.TeacherCache.open(tmp_path).attach((X, Y), batch_size=8))
    before = student.get_weights()
    for value, expected, start in zip(model.student.get_weights(), module.model.parameters(), before, strict=True):
        np.testing.assert_allclose(value, expected.detach().numpy().T, rtol=1e-5, atol=1e-6)
        assert np.abs(value - start).max() > 1e-3


@pytest.fixture
def cache(tmp_path: Path) -> keras_distill.TeacherCache:
    return keras_distill.TeacherCache.build(network(24, seed=2), X, tmp_path, top_k=4, batch_size=8)


@pytest.mark.tensorflow
@pytest.mark.parametrize("way", [{"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 3}], ids=str)
def test_c7_compiled_and_eager_steps_are_those_of_a_graph(
    cache: keras_distill.TeacherCache, way: dict[str, Any]
) -> None:
    """C7: XLA too, with batches that divide the data and that leave a rest."""
    for size in (8, 7):
        expected, logs = fitted(None, cache.attach((X, Y), batch_size=size))
        model, own = fitted(None, cache.attach((X, Y), batch_size=size), **way)
        assert_same_logs(own, logs)
        assert_same_weights(model, expected, 1e-5)


@pytest.mark.tensorflow
def test_c7_a_tf_data_set_and_arrays_of_answers_do_the_same(cache: keras_distill.TeacherCache) -> None:
    """C7: with sample weights, which Keras hands to every part of the targets where it is given arrays."""
    import tensorflow as tf

    weight = np.linspace(0.0, 2.0, ITEMS).astype("float32")
    expected, logs = fitted(None, cache.attach((X, Y, weight), batch_size=8))
    zipped = cache.attach(tf.data.Dataset.from_tensor_slices((X, Y, weight))).batch(8)
    assert zipped.element_spec[1].teacher.classes.shape.as_list() == [None, 0, CLASSES]
    targets = DistillTargets(Y, cache.answers(np.arange(ITEMS)))
    for data in ((zipped,), (X, targets, 8, 2)):
        model = DistillModel(network(8, seed=1))
        model.compile(keras.optimizers.SGD(0.1), cross_entropy(), jit_compile=False)
        more = {"sample_weight": weight} if len(data) > 1 else {"epochs": 2}
        own = model.fit(*data, shuffle=False, verbose=0, **more).history
        assert_same_logs(own, logs)
        assert_same_weights(model, expected, 1e-5)


def test_c7_the_agreement_is_that_with_the_likeliest_class(cache: keras_distill.TeacherCache) -> None:
    """C7: exactly that with the live teacher."""
    live, _ = fitted(network(24, seed=2), X, Y, 8, epochs=10)
    expected = live.evaluate(X, Y, verbose=0, return_dict=True)["teacher_agreement"]
    model, _ = fitted(None, cache.attach((X, Y)), epochs=0)
    model.student.set_weights(live.student.get_weights())
    assert 0 < expected < 1
    own = model.evaluate(cache.attach((X, Y)), verbose=0, return_dict=True)["teacher_agreement"]
    assert own == pytest.approx(expected, abs=1e-6)


def test_c7_all_classes_but_one_equal_full_outputs_on_masked_sequences(tmp_path: Path) -> None:
    """C7: (N, L, C) with padding and sample weights, as with the live teacher."""
    tokens = RNG.integers(1, 9, size=(ITEMS, 5))
    tokens[::2, 3:] = 0
    labels = RNG.integers(0, 4, size=(ITEMS, 5))
    weight = np.linspace(0.5, 2.0, 5 * ITEMS).reshape(ITEMS, 5).astype("float32")

    def tagger(width: int, seed: int) -> keras.Model:
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((None,), dtype="int32")
        embedded = keras.layers.Embedding(9, width, mask_zero=True)(inputs)
        return keras.Model(inputs, keras.layers.Dense(4)(embedded))

    def run(teacher: Any, *data: Any, **settings: Any) -> Any:
        model = DistillModel(tagger(3, 1), teacher, LogitsDistillation(losses.SoftTargetLoss(2.0)))
        model.compile(keras.optimizers.SGD(0.5), cross_entropy(), jit_compile=False)
        return model, model.fit(*data, epochs=3, shuffle=False, verbose=0, **settings).history

    teacher = tagger(16, 2)
    embedding = teacher.layers[-2]
    embedding.set_weights([20 * embedding.get_weights()[0]])
    cache = keras_distill.TeacherCache.build(teacher, tokens, tmp_path, top_k=3, batch_size=8)
    live, logs = run(teacher, tokens, labels, batch_size=8, sample_weight=weight)
    model, own = run(None, cache.attach((tokens, labels, weight), batch_size=8))
    assert_same_logs(own, logs, 2e-3)
    assert_same_weights(model, live, 2e-3)
    assert logs["logits_loss"][-1] < 0.95 * logs["logits_loss"][0]


def test_c7_a_student_that_is_sure_has_finite_gradients() -> None:
    """C7: at logits of 1e4."""
    logs = np.log(np.float32([[0.6, 0.3]]))
    answers = TopK(np.int32([[2, 1]]), logs, np.log(np.float32([[0.1]])), np.zeros((1, 0, 6), "float32"))
    result = differentiated(Merged(losses.SoftTargetLoss(1.0), answers), [[1e4, 0.0, 0.0, 0.0, 0.0, 0.0]], logs)
    assert np.isfinite(result.value)
    assert np.isfinite(result.student).all()


def test_c7_features_are_kept_beside_the_likeliest_classes(tmp_path: Path) -> None:
    """C7, C10: in float16 where the classes are in 8 bits; the teacher is not run."""
    teacher = network(24, seed=2)
    counted = keras.Sequential([keras.Input((6,)), Counter(name="counter"), teacher])
    cache = keras_distill.TeacherCache.build(counted, X, tmp_path, layers=["counter"], top_k=3, dtype="uint8")
    assert cache.manifest.arrays["feature0"] == {"shape": [6], "dtype": "float16"}
    ran = float(counted.get_layer("counter").calls.value)
    feature = keras_distill.FeatureDistillation("hidden", "counter", weight=0.5)
    _, logs = fitted(None, cache.attach((X, Y)), terms=[LogitsDistillation(), feature], epochs=3)
    assert logs["hidden_loss"][-1] < logs["hidden_loss"][0]
    assert logs["logits_loss"][-1] < logs["logits_loss"][0]
    assert float(counted.get_layer("counter").calls.value) == ran


@pytest.mark.parametrize(
    "loss",
    [
        losses.LogitMSELoss(),
        losses.SoftTargetLoss(standardize=True),
        losses.SoftTargetLoss(from_logits=False),
        keras.losses.MeanSquaredError(),
        lambda student, teacher: ops.mean(student - teacher),
    ],
    ids=["mse", "standardized", "probabilities", "of Keras", "function"],
)
@pytest.mark.parametrize("built", [False, True], ids=["new term", "built term"])
def test_c7_a_loss_that_needs_all_classes_is_refused(cache: keras_distill.TeacherCache, loss: Any, built: bool) -> None:
    """C7: before the first step, also where the term has learned from a live teacher before."""
    student, teacher = network(8, seed=1), network(24, seed=2)
    from_logits = getattr(loss, "from_logits", True)
    if not from_logits:  # models of logits are refused for it when the model is made
        student, teacher = (keras.Sequential([network, keras.layers.Softmax()]) for network in (student, teacher))
    model = DistillModel(student, teacher if built else None, LogitsDistillation(loss))
    task = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    model.compile(keras.optimizers.SGD(0.1), task, jit_compile=False)
    before = model.student.get_weights()
    words = r"Expected a cache of full outputs for \w+\. Build it without top_k, or use a divergence of logits such as"
    with pytest.raises(ValueError, match=words + r" SoftTargetLoss\(\)\. Received: the likeliest 4 classes alone"):
        model.fit(cache.attach((X, Y)), verbose=0)
    if built and keras.backend.backend() == "jax":
        return  # the error comes while Keras traces the step, and on JAX Keras loses the weights of every such model
    for value, start in zip(model.student.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, start)


@pytest.mark.parametrize("built", [False, True], ids=["new term", "built term"])
def test_c5_c7_a_student_of_other_classes_is_refused(tmp_path: Path, built: bool) -> None:
    """C5, C7: whose classes all exist in the teacher's, so that no index would be out of range."""
    teacher = keras.Sequential([keras.Input((6,)), keras.layers.Dense(CLASSES + 5)])
    cache = keras_distill.TeacherCache.build(teacher, X, tmp_path, top_k=4)
    with pytest.raises(ValueError, match=r"to have the teacher's shape .*15\)\. The cache comes from another teacher"):
        fitted(network(24, seed=2) if built else None, cache.attach((X, Y)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": CLASSES}, r"^Expected `top_k` to be 1 to 9, fewer than the classes, but got top_k=10\.$"),
        ({"top_k": 4, "dtype": "float32"}, r"^Expected `dtype` to be 'float16' or 'uint8' with top_k, but got"),
        ({"dtype": "uint8"}, r"to be float16, bfloat16 or float32 without top_k, but got 'uint8'"),
    ],
)
def test_c7_wrong_settings_raise_before_anything_is_written(tmp_path: Path, settings: Any, words: str) -> None:
    """C7"""
    with pytest.raises(ValueError, match=words):
        keras_distill.TeacherCache.build(network(8, seed=2), X, tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("last", [keras.layers.Softmax, lambda: keras.layers.Dense(3, activation="softmax")])
def test_c7_a_teacher_of_probabilities_is_refused(tmp_path: Path, last: Any) -> None:
    """C7: as logits they would be another distribution."""
    teacher = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3), last()])
    with pytest.raises(CacheError, match=r"^Expected the teacher's outputs to be logits with top_k, but got prob"):
        keras_distill.TeacherCache.build(teacher, X, tmp_path, top_k=2)


def test_impossible_classes_have_no_gradient() -> None:
    """Also where all classes but the k likeliest are impossible."""
    logits = np.array([[2.0, 1.0, -np.inf, 0.5], [2.0, 1.0, -np.inf, -np.inf]], "float32")
    zeros = ops.zeros((2, 2))
    teacher = TopK(ops.array([[0, 1], [1, 0]]), zeros, zeros[:, :1], ops.zeros((2, 0, 4)))

    def merged(student: Any, _: Any) -> Any:
        return ops.sum(ops.exp(merge_classes(student, teacher, 2.0)[0]))

    result = DIFFERENTIATED[keras.backend.backend()](merged, ops.array(logits), ops.array(logits))

    np.testing.assert_allclose(result.student, np.where(np.isinf(logits), 0.0, np.exp(logits)), rtol=1e-6)
