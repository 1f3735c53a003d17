"""Augmented views in a cache that Keras builds: the student gets the inputs that the teacher got (C9)."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras_nets import assert_same_weights, cross_entropy
from torch import nn
from torch.utils.data import TensorDataset

import keras_distill
import lightning_distill
from keras_distill import CacheError, DistillModel, TeacherCache

ITEMS = 20
X = np.random.default_rng(0).normal(size=(ITEMS, 8, 8, 2)).astype("float32")
Y = (np.arange(ITEMS) % 3).astype("int32")


def crop_and_flip(x: Any, seed: Any) -> Any:
    """6 of 8 rows and columns, half of them mirrored."""
    random = np.random.default_rng(seed)
    top, left = random.integers(0, 3, size=2)
    x = x[top : top + 6, left : left + 6]
    return x[:, ::-1] if random.random() < 0.5 else x


def network(filters: int, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6, 6, 2))
    maps = keras.layers.Conv2D(filters, 3, activation="relu", name="maps")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(maps)))


def built(folder: Path, transform: Any = crop_and_flip, inputs: Any = X, **settings: Any) -> TeacherCache:
    settings = {"views": 2, "transform_seed": 7, "dtype": "float32", "batch_size": 8, "shard_bytes": 1, **settings}
    return TeacherCache.build(network(9, seed=2), inputs, folder, transform=transform, **settings)


def distilled(teacher: Any) -> DistillModel:
    model = DistillModel(network(3, seed=1), teacher)
    model.compile(keras.optimizers.SGD(0.05), cross_entropy(), jit_compile=False)
    return model


def epoch_of(data: Any, epoch: int) -> list[Any]:
    data.epoch = epoch
    return [data[index] for index in range(len(data))]


@pytest.mark.parametrize("views", [1, 2, 3])
def test_c9_the_answers_belong_to_exactly_these_inputs(tmp_path: Path, views: int) -> None:
    """C9: the teacher, run again on the student's inputs, returns the cached outputs; views differ."""
    teacher = network(9, seed=2)
    data = built(tmp_path, views=views).attach((X, Y), transform=crop_and_flip, batch_size=7, shuffle=True)
    shown = []
    for epoch in range(2 * views):
        batches = epoch_of(data, epoch)
        for x, targets in batches:
            np.testing.assert_allclose(targets.teacher, teacher.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
        labels = np.concatenate([targets.labels for _, targets in batches])
        np.testing.assert_array_equal(np.sort(labels), np.sort(Y))
        shown.append({x.tobytes() for batch, _ in batches for x in batch})
    assert shown[views:] == shown[:views]
    assert all(first != second for index, first in enumerate(shown[:views]) for second in shown[:index])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("layers", [(), ("maps",)])
def test_c9_cached_and_live_distillation_end_in_the_same_weights(tmp_path: Path, shuffle: bool, layers: Any) -> None:
    """C9: random crops and flips, three epochs over two views."""
    cache = built(tmp_path, layers=layers)
    attached = [cache.attach((X, Y), transform=crop_and_flip, batch_size=8, shuffle=shuffle) for _ in range(2)]
    cached, live = distilled(None), distilled(network(9, seed=2))
    cached.fit(attached[0], epochs=3, shuffle=False, verbose=0)
    for epoch in range(3):
        for x, targets in epoch_of(attached[1], epoch):
            live.train_on_batch(x, targets.labels)
    assert_same_weights(cached, live, 1e-5)


def test_c9_a_resumed_training_gets_the_views_of_its_epochs(tmp_path: Path) -> None:
    """C9: three epochs at once and in parts, with callbacks of the user's in every form that Keras takes."""
    cache = built(tmp_path)
    whole, parts, seen = distilled(None), distilled(None), []
    whole.fit(cache.attach((X, Y), transform=crop_and_flip, shuffle=True), epochs=3, shuffle=False, verbose=0)
    callback = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: seen.append(epoch))
    for epoch in range(3):
        data = cache.attach((X, Y), transform=crop_and_flip, shuffle=True)
        callbacks = [callback, [callback], keras.callbacks.CallbackList([callback], model=parts)][epoch]
        parts.fit(x=data, epochs=epoch + 1, initial_epoch=epoch, shuffle=False, verbose=0, callbacks=callbacks)
    assert_same_weights(parts, whole, 1e-6)
    assert seen == [0, 1, 2]


def test_c9_a_pass_over_the_data_in_several_epochs_is_that_of_one_epoch(tmp_path: Path) -> None:
    """C9: with `steps_per_epoch`, in the order and the view of one pass, although Keras reads ahead."""
    cache = built(tmp_path)
    whole, halves, listed = (distilled(None) for _ in range(3))
    half: dict[str, Any] = {"epochs": 6, "steps_per_epoch": 2}
    own = keras.callbacks.CallbackList([], add_history=True, model=listed)
    for model, settings in ((whole, {"epochs": 3}), (halves, half), (listed, {**half, "callbacks": own})):
        data = cache.attach((X, Y), transform=crop_and_flip, batch_size=5, shuffle=True)
        model.fit(data, shuffle=False, verbose=0, **settings)
        assert data.epoch == 0
    assert_same_weights(halves, whole, 1e-6)
    assert_same_weights(listed, whole, 1e-6)
    resumed = distilled(None)
    for first, end in ((0, 2), (2, 6)):
        data = cache.attach((X, Y), transform=crop_and_flip, batch_size=5, shuffle=True)
        resumed.fit(data, shuffle=False, verbose=0, initial_epoch=first, epochs=end, steps_per_epoch=2)
    assert_same_weights(resumed, whole, 1e-6)


def test_c9_a_single_view_can_be_chosen(tmp_path: Path) -> None:
    """C9: in every epoch, and views go with the likeliest classes too."""
    cache = built(tmp_path, top_k=2, dtype="float16")
    data = cache.attach((X, Y), transform=crop_and_flip, view=1, batch_size=ITEMS)
    [(first, targets)], [(second, _)] = epoch_of(data, 0), epoch_of(data, 1)
    np.testing.assert_array_equal(first, second)
    best = network(9, seed=2).predict(first, verbose=0).argmax(-1)
    np.testing.assert_array_equal(targets.teacher.indices[:, 0], best)


def test_c9_inputs_of_several_arrays_are_augmented_together(tmp_path: Path) -> None:
    """C9: a transform is given the item in the structure of the inputs, and may work in place."""
    inputs = {"image": X[:, :6, :6], "number": np.arange(ITEMS, dtype="float32")[:, None]}
    image, number = keras.Input((6, 6, 2), name="image"), keras.Input((1,), name="number")
    flat = keras.layers.Concatenate()([keras.layers.Flatten()(image), number])
    teacher = keras.Model({"image": image, "number": number}, keras.layers.Dense(3)(flat))

    def shifted(item: Any, seed: Any) -> Any:
        item["number"] += np.random.default_rng(seed).integers(5)
        return {"image": keras.ops.flip(item["image"], axis=0), "number": item["number"]}

    settings = {"transform": shifted, "transform_seed": 3, "views": 2, "dtype": "float32"}
    cache = TeacherCache.build(teacher, inputs, tmp_path, **settings)
    np.testing.assert_array_equal(inputs["number"][:, 0], np.arange(ITEMS))
    (x, targets) = cache.attach((inputs, Y), transform=shifted, view=1, batch_size=ITEMS)[0]
    assert (x["number"] != inputs["number"]).any()
    np.testing.assert_array_equal(x["image"], inputs["image"][:, ::-1])
    np.testing.assert_allclose(targets.teacher, teacher.predict(x, verbose=0), rtol=1e-4, atol=1e-5)


@pytest.mark.tensorflow
def test_c9_stateless_functions_of_tensorflow_take_the_seed(tmp_path: Path) -> None:
    """C9: as in the docstring."""
    import tensorflow as tf

    def crop(x: Any, seed: Any) -> Any:
        return tf.image.stateless_random_flip_left_right(tf.image.stateless_random_crop(x, (6, 6, 2), seed), seed)

    cached, live = distilled(None), distilled(network(9, seed=2))
    cache = built(tmp_path, crop)
    cached.fit(cache.attach((X, Y), transform=crop, batch_size=8), epochs=2, shuffle=False, verbose=0)
    for epoch in range(2):
        for x, targets in epoch_of(cache.attach((X, Y), transform=crop, batch_size=8), epoch):
            live.train_on_batch(x, targets.labels)
    assert_same_weights(cached, live, 1e-5)


def test_c12_a_build_of_views_that_was_stopped_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C12: batches of 8 of 20 items, so that one lies in both views."""
    built(tmp_path / "whole")
    write = keras_distill.cache.builder.Writer.write

    def fails(self: Any, shard: int, batches: Any) -> None:
        if shard == 2:
            raise OSError("No space left on device")
        write(self, shard, batches)

    monkeypatch.setattr(keras_distill.cache.builder.Writer, "write", fails)
    with pytest.raises(OSError, match="No space"):
        built(tmp_path / "stopped")
    monkeypatch.undo()
    built(tmp_path / "stopped")
    whole, stopped = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "stopped")
    )
    assert whole == stopped


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"transform": None}, r"^Expected `transform` to be a function with transform_seed=7, but got None"),
        (
            {"transform": None, "transform_seed": None},
            r"^Expected `transform` to be a function with views=2, but got",
        ),
        ({"transform_seed": None}, r"^Expected `transform_seed` to be a number with a transform, but got None"),
        ({"views": 0}, r"^Expected `views` to be 1 or greater, but got views=0\.$"),
        (
            {"transform": lambda x, seed: x[1:7, 1:7] + np.random.rand()},
            r"^Expected `transform` to return the same for the same item and seed, but some items differ",
        ),
    ],
)
def test_c9_contradicting_settings_are_refused_when_building(tmp_path: Path, settings: Any, words: str) -> None:
    """C9"""
    with pytest.raises(CacheError, match=words):
        built(tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()
    with pytest.raises(TypeError, match=r"^Expected `transform` to be a function of an item and a seed, but got 3\.$"):
        built(tmp_path / "new", 3)


def test_c9_data_that_do_not_fit_the_cache_are_refused_when_attaching(tmp_path: Path) -> None:
    """C5, C9: no transform, another one, one too many, a view that is not there, data that know no epochs."""
    cache, plain = built(tmp_path / "views"), X[:, 1:7, 1:7]
    with pytest.raises(CacheError, match=r"^Expected `transform` to be a function, since the teacher got augmented"):
        cache.attach((X, Y))
    with pytest.raises(CacheError, match=r"but some items differ\.$"):
        cache.attach((X, Y), transform=lambda x, seed: x[1:7, 1:7])
    with pytest.raises(CacheError, match=r"^Expected `view` to be below 2, but got view=2\.$"):
        cache.attach((X, Y), transform=crop_and_flip, view=2)
    once = TeacherCache.build(network(9, seed=2), plain, tmp_path / "plain")
    with pytest.raises(CacheError, match="that was built with a transform in Keras, but this cache was not"):
        once.attach((plain, Y), transform=crop_and_flip)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with pytest.raises(CacheError, match=r"^Expected arrays where the cache holds augmented views, but got a tf"):
            cache.attach(tf.data.Dataset.from_tensor_slices((plain, Y)), view=0)


def test_c3_c9_neither_half_takes_the_others_augmentation_for_its_own(tmp_path: Path) -> None:
    """C3, C9: PyTorch cannot repeat Keras' views, and Keras those of PyTorch only as arrays of a named view."""
    built(tmp_path / "keras")
    data = TensorDataset(torch.as_tensor(X), torch.as_tensor(Y).long())
    with pytest.raises(CacheError, match=r"but Keras augmented the teacher's inputs\. Build the cache in PyTorch"):
        lightning_distill.TeacherCache.open(tmp_path / "keras").attach(data)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(128, 3))
    lightning_distill.TeacherCache.build(
        teacher, data, tmp_path / "torch", views=2, transform_seed=1, dtype="float32", progress=False
    )
    cache = TeacherCache.open(tmp_path / "torch")
    with pytest.raises(CacheError, match=r"^Expected `view` to be a number, since the teacher got items that PyTorch"):
        cache.attach((X, Y))
    (_, targets) = cache.attach((X, Y), view=1, batch_size=ITEMS)[0]
    np.testing.assert_array_equal(targets.teacher, cache.answers(range(ITEMS, 2 * ITEMS)))


@pytest.mark.parametrize("augmented", [True, False], ids=["augmented", "plain"])
def test_c24_threads_prepare_the_batches_and_the_files_are_the_same(tmp_path: Path, augmented: bool) -> None:
    """C24: ``workers=2``; each batch is transformed once, in its place, while the teacher runs."""
    threads = set()

    def noted(x: Any, seed: Any) -> Any:
        threads.add(threading.current_thread().name)
        return crop_and_flip(x, seed)

    folders = [tmp_path / "one", tmp_path / "threads"]
    for folder, workers in zip(folders, (0, 2), strict=True):
        if augmented:
            built(folder, noted, workers=workers, progress=False)
        else:
            TeacherCache.build(
                network(9, seed=2), X[:, :6, :6], folder, batch_size=8, shard_bytes=1, workers=workers, progress=False
            )
    shards = sorted(path.name for path in folders[0].rglob("*.npy"))
    assert len(shards) > 2
    for name in shards:
        assert next(folders[0].rglob(name)).read_bytes() == next(folders[1].rglob(name)).read_bytes()
    assert (len(threads) > 1) == augmented


def test_c24_an_error_of_a_transform_in_a_thread_is_the_users_and_what_is_built_stays(tmp_path: Path) -> None:
    begun = threading.active_count()
    calls: list[int] = []

    def failing(x: Any, seed: Any) -> Any:
        calls.append(1)
        if len(calls) > 60:
            raise RuntimeError("a broken image")
        return crop_and_flip(x, seed)

    with pytest.raises(RuntimeError, match="a broken image"):
        built(tmp_path, failing, workers=2, progress=False)
    assert threading.active_count() == begun
    cache = built(tmp_path, workers=2, progress=False)
    whole = built(tmp_path / "whole", progress=False)
    targets = [data.attach((X, Y), transform=crop_and_flip, batch_size=7)[0][1].teacher for data in (cache, whole)]
    np.testing.assert_array_equal(*targets)


def test_c24_a_progress_bar_counts_the_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built(tmp_path / "quiet", progress=False)
    assert capsys.readouterr().out == ""
    built(tmp_path / "loud")
    assert "5/5" in capsys.readouterr().out
    built(tmp_path / "loud")  # complete
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("workers", [-1, 1.5, True])
def test_c24_workers_must_be_a_number(tmp_path: Path, workers: Any) -> None:
    with pytest.raises(ValueError, match="Expected `workers` to be an int of 0 or more"):
        built(tmp_path, workers=workers)
