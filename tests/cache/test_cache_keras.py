"""One folder for both frameworks (C3), and the Keras half's own way of reading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import filelock
import keras
import numpy as np
import pytest
import torch
from cache_nets import Module, difference, trained
from keras_nets import assert_same_logs, assert_same_weights, cross_entropy, with_and_without_interruption
from torch import nn

import keras_distill
import lightning_distill
from keras_distill import CacheError, DistillModel

ITEMS = 40
X = np.random.default_rng(0).normal(size=(ITEMS, 6)).astype("float32")
Y = (np.arange(ITEMS) % 10).astype("int32")


def keras_network(width: int, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    hidden = keras.layers.Dense(width, activation="relu", name="hidden")
    return keras.Sequential([keras.Input((6,)), hidden, keras.layers.Dense(10)])


def torch_twin(model: keras.Model) -> nn.Sequential:
    """The same network in PyTorch."""
    (kernel, bias), (kernel2, bias2) = (layer.get_weights() for layer in model.layers)
    twin = nn.Sequential(nn.Linear(*kernel.shape), nn.ReLU(), nn.Linear(*kernel2.shape))
    with torch.no_grad():
        for layer, (k, b) in ((twin[0], (kernel, bias)), (twin[2], (kernel2, bias2))):
            layer.weight.copy_(torch.as_tensor(np.array(k).T))
            layer.bias.copy_(torch.as_tensor(np.array(b)))
    return twin


def adapter(student: Any, teacher: Any) -> Any:
    """The adapter for two shapes, with the same weights whenever it is made."""
    return keras.layers.Dense(teacher[-1], kernel_initializer="ones")


def fitted(teacher: Any, data: Any, *more: Any, features: tuple[str, str] | None = None, **settings: Any) -> Any:
    terms: list[Any] = [keras_distill.LogitsDistillation()]
    if features is not None:
        terms.append(keras_distill.FeatureDistillation(*features, adapter=adapter, weight=0.1))
    model = DistillModel(keras_network(8, seed=1), teacher, terms)
    model.compile(keras.optimizers.SGD(0.1), cross_entropy(), jit_compile=False)
    return model, model.fit(data, *more, epochs=2, verbose=0, shuffle=False, **settings).history


@pytest.mark.parametrize("features", [None, ("hidden", "1")], ids=["logits", "features"])
def test_c3_a_torch_teachers_cache_trains_a_keras_student(tmp_path: Path, features: Any) -> None:
    """C3: as the Keras twin of that teacher does, live."""
    live = keras_network(24, seed=2)
    data = torch.utils.data.TensorDataset(torch.as_tensor(X), torch.as_tensor(Y).long())
    lightning_distill.TeacherCache.build(
        torch_twin(live), data, tmp_path, layers=["1"], dtype="float32", progress=False
    )
    cache = keras_distill.TeacherCache.open(tmp_path)
    expected, logs = fitted(live, X, Y, features=features and ("hidden", "hidden"), batch_size=8)
    if features is None:
        cached, own = fitted(None, cache.attach((X, Y), batch_size=8))
    else:
        cached, own = fitted(None, cache.attach((X, Y), batch_size=8), features=features)
    assert_same_logs(own, logs, 1e-4)
    assert_same_weights(cached, expected, 1e-5)


def test_c3_a_keras_teachers_cache_trains_a_torch_student(tmp_path: Path) -> None:
    """C3: the other way round, through the callback."""
    teacher = keras_network(24, seed=2)
    keras_distill.TeacherCache.build(teacher, X, tmp_path, layers=["hidden"], dtype="float32", batch_size=7)
    cache = lightning_distill.TeacherCache.open(tmp_path)
    data = torch.utils.data.TensorDataset(torch.as_tensor(X), torch.as_tensor(Y).long())
    terms = [lightning_distill.LogitsDistillation()]
    live, cached = (trained(Module(data), source, terms) for source in (torch_twin(teacher), cache))
    assert difference(live, cached) < 1e-5


def test_c3_maps_have_their_channels_where_each_framework_has_them(tmp_path: Path) -> None:
    """C3"""
    teacher = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(5 * 2 * 3, 10))
    data = torch.utils.data.TensorDataset(torch.randn(8, 1, 4, 5), torch.zeros(8).long())
    lightning_distill.TeacherCache.build(teacher, data, tmp_path, layers=["0"], dtype="float32", progress=False)
    answers = keras_distill.TeacherCache.open(tmp_path).answers([3, 1])
    with torch.no_grad():
        maps = teacher[0](data.tensors[0][[3, 1]]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(answers["features"]["0"], maps, rtol=1e-5, atol=1e-6)


@pytest.fixture
def cache(tmp_path: Path) -> keras_distill.TeacherCache:
    teacher = keras_network(24, seed=2)
    return keras_distill.TeacherCache.build(
        teacher, X, tmp_path, layers=["hidden"], dtype="float32", shard_bytes=1, batch_size=4
    )


def test_c3_a_tf_data_set_gets_its_answers_in_order(cache: keras_distill.TeacherCache) -> None:
    """C3"""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("is about TensorFlow")
    import tensorflow as tf

    expected, logs = fitted(None, cache.attach((X, Y), batch_size=8), features=("hidden", "hidden"))
    data = cache.attach(tf.data.Dataset.from_tensor_slices((X, Y))).batch(8)
    model, own = fitted(None, data, features=("hidden", "hidden"))
    assert_same_logs(own, logs, 1e-5)
    assert_same_weights(model, expected, 1e-6)


def of_tensors(change: str) -> Any:
    """Single items for TensorFlow, in the order of the build, changed in some way."""
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, Y))
    changed = {"shuffled": data.shuffle(ITEMS, seed=1), "reversed": data.skip(1).concatenate(data.take(1))}
    return {**changed, "augmented": data.map(lambda x, y: (-x, y)), "none": data}[change]


@pytest.mark.tensorflow
@pytest.mark.parametrize("change", ["none", "shuffled", "reversed", "augmented"])
def test_c5_a_tf_data_set_with_other_inputs_is_refused_at_the_end_of_its_first_pass(
    cache: keras_distill.TeacherCache, change: str
) -> None:
    """C5: the outputs would belong to other items; after `attach` they may be shuffled."""
    data = cache.attach(of_tensors(change))
    if change == "none":
        for _ in range(2):
            assert sum(1 for _ in data.shuffle(ITEMS).map(lambda x, y: (-x, y))) == ITEMS
        return
    with pytest.raises(Exception, match=r"(?s)in the order in which the cache was built.*Shuffle, augment and convert"):
        fitted(None, data.batch(8), features=("hidden", "hidden"))


@pytest.mark.tensorflow
@pytest.mark.parametrize("size", ["known", "unknown"])
def test_c24_a_tf_data_set_is_read_a_few_items_at_a_time(
    cache: keras_distill.TeacherCache, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C24: each item gets its own outputs, and shuffled items are noticed, over several calls."""
    import tensorflow as tf

    from keras_distill.cache import data as cached_data

    monkeypatch.setattr(cached_data, "_ROWS", 7)

    def items(order: Any) -> Any:
        if size == "known":
            return tf.data.Dataset.from_tensor_slices((X[order], Y[order]))
        signature = tf.TensorSpec((None,) * (X.ndim - 1), X.dtype), tf.TensorSpec((), Y.dtype)
        return tf.data.Dataset.from_generator(lambda: zip(X[order], Y[order], strict=True), output_signature=signature)

    expected, numbers = cache.answers(range(ITEMS)), list[int]()
    answers = type(cache).answers
    monkeypatch.setattr(
        type(cache), "answers", lambda self, rows, *rest: numbers.append(len(rows)) or answers(self, rows, *rest)
    )
    data = cache.attach(items(np.arange(ITEMS)))
    for place, (x, targets) in enumerate(data):
        np.testing.assert_array_equal(x, X[place])
        np.testing.assert_array_equal(targets.labels, Y[place])
        np.testing.assert_array_equal(targets.teacher["output"], expected["output"][place])
        np.testing.assert_array_equal(targets.teacher["features"]["hidden"], expected["features"]["hidden"][place])
    assert place == ITEMS - 1
    assert sorted(numbers)[2:] == [7] * (ITEMS // 7)
    with pytest.raises(Exception, match=r"(?s)in the order in which the cache was built"):
        list(cache.attach(items(np.arange(ITEMS)[::-1].copy())))


@pytest.mark.tensorflow
@pytest.mark.parametrize("source", ["arrays", "tf.data", "targets"])
def test_c10_a_training_with_adapters_and_a_cache_goes_on_after_an_exception(
    cache: keras_distill.TeacherCache, tmp_path: Path, source: str
) -> None:
    """C10: Keras restores a backup before the first step, where the shapes of the adapters must be known."""

    def made() -> DistillModel:
        feature = keras_distill.FeatureDistillation("hidden", "hidden", adapter=adapter)
        model = DistillModel(keras_network(8, seed=1), None, [keras_distill.LogitsDistillation(), feature])
        model.compile(keras.optimizers.Adam(0.01), cross_entropy(), jit_compile=False)
        return model

    data: tuple[Any, ...] = (cache.attach((X, Y), batch_size=8),)
    if source == "tf.data":
        data = (cache.attach(of_tensors("none")).batch(8),)
    if source == "targets":
        data = (X, keras_distill.DistillTargets(Y, cache.answers(range(ITEMS))))
    whole, resumed = with_and_without_interruption(made, tmp_path / "backup", *data, shuffle=False, verbose=0)
    assert whole.terms[1].adapters[0] is not None
    assert_same_weights(resumed, whole, 1e-6)


def test_c3_shuffled_arrays_keep_their_answers(cache: keras_distill.TeacherCache) -> None:
    """C3: and come in another order in each epoch."""
    data = cache.attach((X, Y, np.ones(ITEMS, "float32")), batch_size=16, shuffle=True)
    answers, orders = cache.answers(range(ITEMS))["output"], []
    for _ in range(2):
        rows = []
        for index in range(len(data)):
            x, targets, weight = data[index]
            places = [int(np.flatnonzero((row == X).all(-1))[0]) for row in x]
            np.testing.assert_array_equal(targets.teacher["output"], answers[places])
            np.testing.assert_array_equal(targets.labels, Y[places])
            assert len(weight) == len(x)
            rows += places
        orders.append(rows)
        data.on_epoch_end()
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(ITEMS))
    assert orders[0] != orders[1] != list(range(ITEMS))


def test_c5_another_keras_teacher_and_other_arrays_are_refused(
    cache: keras_distill.TeacherCache, tmp_path: Path
) -> None:
    """C5"""
    keras_distill.TeacherCache.open(tmp_path, teacher=keras_network(24, seed=2))
    with pytest.raises(CacheError, match=r"to be of this teacher, but it was built with another"):
        keras_distill.TeacherCache.open(tmp_path, teacher=keras_network(24, seed=3))
    with pytest.raises(CacheError, match=r"to have the 40 items that the cache was built from, but got 39"):
        cache.attach((X[1:], Y[1:]))
    with pytest.raises(CacheError, match=r"but some items differ"):
        cache.attach((X + 1, Y))


def test_c13_a_second_build_into_one_folder_is_refused(tmp_path: Path) -> None:
    """C13: by the lock that builds of the other half take too; it is free afterwards."""
    with (
        filelock.FileLock(tmp_path / ".lock"),
        pytest.raises(CacheError, match=r"to be free, but another process is building there\. Wait for it\.$"),
    ):
        keras_distill.TeacherCache.build(keras_network(8, 1), X, tmp_path)
    assert not list(tmp_path.glob("*.json"))
    keras_distill.TeacherCache.build(keras_network(8, 1), X, tmp_path)
    with filelock.FileLock(tmp_path / ".lock", timeout=0):
        pass


def test_a_cache_at_a_url_is_built_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE_DIR", str(tmp_path / "copies"))
    store, model = tmp_path / "a store", keras_network(16, seed=0)

    caches = [
        keras_distill.TeacherCache.build(model, X, f"file://{store}/built", dtype="float32"),
        keras_distill.TeacherCache.from_arrays(model(X), f"file://{store}/arrays", dtype="float32"),
        lightning_distill.TeacherCache.open(f"file://{store}/built"),
    ]
    for cache in caches:
        np.testing.assert_allclose(cache.reader.read(np.arange(ITEMS))["output"], np.asarray(model(X)), rtol=1e-5)
    assert (store / "built" / "manifest.json").exists()
