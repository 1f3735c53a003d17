"""Keras reads caches of sequences, of drawn classes and of keyed rows, also those of PyTorch (C17, C18, C21, C22)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_nets import assert_same_weights
from keras_token_nets import SEQUENCES, VOCABULARY, causal, padded, split
from torch import Tensor, nn

import keras_distill
import lightning_distill
from keras_distill import CacheError, DistillModel, DistillTargets, SequenceDistillation, SoftTargetLoss
from keras_distill.functional.top_k import Sampled

WORDS = [*SEQUENCES, [3, 3, 9, 1], [12, 5], [7, 2, 2, 8, 1]]


def logits_of(sentence: Any) -> np.ndarray[Any, Any]:
    """The Keras teacher's logits for one sentence, without padding."""
    rows = {"token_ids": np.array([sentence], "int32"), "padding_mask": np.ones((1, len(sentence)), "int32")}
    return np.asarray(keras.ops.convert_to_numpy(causal(7, seed=1)(rows)))[0]


class Replay(nn.Module):
    """A PyTorch teacher with the numbers of the Keras teacher, by the first tokens of a sentence."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = input_ids.new_zeros((*input_ids.shape, VOCABULARY)).float()
        for row, (tokens, mask) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
            out[row][mask] = out.new_tensor(logits_of(tokens[mask].tolist()))
        return out


def torch_cache(folder: Path, **settings: Any) -> keras_distill.TeacherCache:
    """A cache that PyTorch wrote, from batches padded on the left."""
    import torch

    def collate(samples: list[Any]) -> dict[str, Tensor]:
        rows = padded([sample["tokens"] for sample in samples], "left")
        return {
            "input_ids": torch.tensor(rows["token_ids"]).long(),
            "attention_mask": torch.tensor(rows["padding_mask"]).long(),
        }

    data = [{"id": number, "tokens": tokens} for number, tokens in enumerate(WORDS)]
    settings = {"dtype": "float32", "batch_size": 2, "shard_bytes": 1, "progress": False, **settings}
    lightning_distill.TeacherCache.build(Replay(), data, folder, collate_fn=collate, **settings)
    return keras_distill.TeacherCache.open(folder)


def fitted(teacher: Any, data: Any, term: Any = None, **fitting: Any) -> DistillModel:
    model = DistillModel(causal(), teacher, [term or SequenceDistillation(weight=2.0)], task_weight=0.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)
    model.compile(keras.optimizers.SGD(0.5), loss, jit_compile=False)
    model.fit(data, epochs=2, verbose=0, shuffle=False, **fitting)
    return model


@pytest.fixture(scope="module")
def live() -> DistillModel:
    """The student of a live teacher, in batches of three; it is the same for any padding."""
    x, y = split(padded(WORDS))
    return fitted(causal(7, seed=1), x, y=y, batch_size=3)


@pytest.mark.parametrize(("side", "length"), [("right", 8), ("left", 7)])
def test_c17_a_cache_of_torch_trains_keras_at_its_own_padding(
    tmp_path: Path, live: DistillModel, side: str, length: Any
) -> None:
    """C3, C17: as the live teacher in Keras does."""
    x, y = split(padded(WORDS, side, length))
    cached = fitted(None, torch_cache(tmp_path).attach((x, y), batch_size=3))
    assert_same_weights(cached, live, 1e-5)


def test_c17_tokens_without_a_mask_are_padded_on_the_right(tmp_path: Path) -> None:
    """C17: places of padding are NaN, so that a loss that counts them is not a wrong number."""
    cache = torch_cache(tmp_path)
    tokens = padded(WORDS, length=6)["token_ids"]
    answer = cache.attach(tokens, batch_size=6)[0][1].teacher
    assert answer.shape == (6, 6, VOCABULARY)
    for row, sentence in enumerate(WORDS):
        np.testing.assert_allclose(answer[row, : len(sentence)], logits_of(sentence), atol=1e-5)
        assert np.isnan(answer[row, len(sentence) :]).all()
    explicit = cache.attach(padded(WORDS, "left")["token_ids"], mask=padded(WORDS, "left")["padding_mask"])
    np.testing.assert_allclose(explicit[0][1].teacher[1, -2:], answer[1, :2])


def test_c17_a_tf_dataset_of_padded_items_is_read(tmp_path: Path, live: DistillModel) -> None:
    """C17: in the order of the build."""
    x, y = split(padded(WORDS))
    data = tf.data.Dataset.from_tensor_slices((x, y))
    cache = torch_cache(tmp_path)
    cached = fitted(None, cache.attach(data).batch(3))
    assert_same_weights(cached, live, 1e-5)
    unknown = tf.data.Dataset.from_generator(lambda: iter(WORDS), output_signature=tf.TensorSpec((None,), "int32"))
    with pytest.raises(CacheError, match=r"^Expected items of a fixed number of tokens for a cache of sequences, but"):
        cache.attach(unknown)


def test_c17_the_likeliest_tokens_are_padded_too(tmp_path: Path, live: DistillModel) -> None:
    """C7, C17: with the tail of the other classes."""
    x, y = split(padded(WORDS))
    cache = torch_cache(tmp_path / "top", top_k=12, dtype="float16")
    assert_same_weights(fitted(None, cache.attach((x, y), batch_size=3)), live, 2e-3)
    cache.reader.verify()


def test_c22_drawn_tokens_train_keras(tmp_path: Path, live: DistillModel) -> None:
    """C22: close to the live teacher where nearly all are drawn; losses that would be biased are refused."""
    x, y = split(padded(WORDS))
    cache = torch_cache(tmp_path, sampled=12)
    assert isinstance(cache.attach((x, y))[0][1].teacher, Sampled)
    assert_same_weights(fitted(None, cache.attach((x, y), batch_size=3)), live, 0.05)
    from_dataset = cache.attach(tf.data.Dataset.from_tensor_slices((x, y))).batch(3)
    assert isinstance(from_dataset.element_spec[1].teacher, Sampled)
    for loss in (SoftTargetLoss(2.0), keras_distill.ReverseKLLoss()):
        with pytest.raises(ValueError, match=r"Expected SoftTargetLoss or SoftCrossEntropyLoss at temperature 1 for a"):
            fitted(None, cache.attach((x, y), batch_size=3), SequenceDistillation(loss))


def test_c18_keys_find_the_rows_of_a_part(tmp_path: Path) -> None:
    """C18: in any order; missing ones are named."""
    cache = torch_cache(tmp_path, key="id")
    part = [4, 1, 2]
    x, y = split(padded([WORDS[number] for number in part]))
    data = cache.attach(tf.data.Dataset.from_tensor_slices((x, y)), keys=part).batch(3)
    for answers in (cache.attach((x, y), keys=part)[0][1].teacher, next(iter(data))[1].teacher.numpy()):
        for row, number in enumerate(part):
            np.testing.assert_allclose(answers[row, : len(WORDS[number])], logits_of(WORDS[number]), atol=1e-5)
    with pytest.raises(
        CacheError, match=r"^Expected the cache to hold the item with the key 9, but it does not \(6 it"
    ):
        cache.attach((x, y), keys=[4, 9, 2])
    with pytest.raises(CacheError, match=r"^Expected `keys` to be the items' keys, but got None\. Keys find the rows"):
        cache.attach((x, y))
    with pytest.raises(CacheError, match=r"^Expected `keys` to be None, since the cache was built without keys, but"):
        torch_cache(tmp_path / "plain").attach((x, y), keys=part)
    with pytest.raises(CacheError, match=r"^Expected the data to have the 2 items that the cache was built from, but"):
        cache.attach((x, y), keys=part[:2])


def test_c17_other_tokens_than_the_teacher_got_are_refused(tmp_path: Path) -> None:
    """C17: truncated sequences, sequences in another order, and masks that are not there."""
    cache = torch_cache(tmp_path)
    with pytest.raises(CacheError, match=r"^Expected item 0 to have the 5 tokens that the teacher got, but got 3"):
        cache.attach(padded(WORDS)["token_ids"][:, :3])[0]
    with pytest.raises(CacheError, match=r"^Expected item \d to have the \d tokens that the teacher got, but got \d"):
        cache.attach(split(padded([*WORDS[1:], WORDS[0]])))[0]
    with pytest.raises(
        CacheError, match=r"^Expected `mask` to be an array or the key of an input array, but got mask='m"
    ):
        cache.attach(split(padded(WORDS)), mask="m")
    with pytest.raises(CacheError, match=r"^Expected `places` to be given for a cache of sequences, but got None"):
        cache.answers([0])


@pytest.mark.parametrize("side", ["right", "left"])
def test_c5_c18_other_tokens_with_the_same_key_are_refused(tmp_path: Path, side: str) -> None:
    """C5, C18: as in the PyTorch half, such as those of another tokenizer, at the first item of each batch."""
    cache = torch_cache(tmp_path, key="id")
    x, y = split(padded(WORDS, side))
    changed = {**x, "token_ids": np.where(x["padding_mask"] > 0, x["token_ids"] % 13 + 1, 0).astype("int32")}
    mixed = {**x, "token_ids": np.concatenate([x["token_ids"][:3], changed["token_ids"][3:]])}
    expected, keys = cache.attach((x, y), keys=range(len(WORDS)), batch_size=3)[1][1].teacher, range(len(WORDS))
    with pytest.raises(CacheError, match=r"^Expected item 0 to have the tokens that the teacher got for its key, but"):
        cache.attach((changed, y), keys=keys, batch_size=3)[0]
    batches = cache.attach((mixed, y), keys=keys, batch_size=3)
    assert len(batches[0]) == 2
    with pytest.raises(CacheError, match=r"^Expected item 3 to have the tokens.* with its tokenizer; or TeacherCache"):
        batches[1]
    allowing = keras_distill.TeacherCache.open(tmp_path, allow_changed_inputs=True)
    accepted = allowing.attach((changed, y), keys=keys, batch_size=3)[1][1].teacher
    np.testing.assert_array_equal(accepted, expected)


def test_c21_arrays_become_a_cache_of_keras_that_torch_reads(tmp_path: Path) -> None:
    """C3, C21: outputs, features and keys."""
    tokens = [logits_of(sentence) for sentence in WORDS]
    cache = keras_distill.TeacherCache.from_arrays(
        {"output": tokens, "body": [rows[:, :3] for rows in tokens]}, tmp_path, dtype="float32", key="id", keys=range(6)
    )
    targets = cache.attach(split(padded(WORDS)), keys=range(6))[0][1]
    assert isinstance(targets, DistillTargets)
    assert targets.teacher["features"]["body"].shape == (6, 5, 3)
    other = lightning_distill.TeacherCache.open(tmp_path)
    np.testing.assert_allclose(other.read([2])["output"].values, tokens[2], atol=1e-6)
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    plain = keras_distill.TeacherCache.from_arrays(x + 1, tmp_path / "plain", inputs=x, feature_dtype="uint8")
    np.testing.assert_allclose(plain.attach(x)[0][1].teacher, x + 1, atol=1e-2)
    with pytest.raises(CacheError, match=r"^Expected the data that the cache was built from, but some items differ"):
        plain.attach(x + 1)
    assert len(keras_distill.TeacherCache.from_arrays(x, tmp_path / "unknown").attach(x * 2)) == 1
    with pytest.raises(CacheError, match=r"^Expected `key` and `keys` to be given together, but got key=None"):
        keras_distill.TeacherCache.from_arrays(x, tmp_path / "k", keys=range(8))
    with pytest.raises(
        CacheError, match=r"^Expected the data to have the 8 items that the cache was built from, but got"
    ):
        keras_distill.TeacherCache.from_arrays(x, tmp_path / "l", inputs=x[:3])


def test_c22_keras_builds_caches_of_drawn_classes_and_features_in_8_bits(tmp_path: Path) -> None:
    """C22"""
    teacher = keras.Sequential([keras.Input((6,)), keras.layers.Dense(12, name="hidden"), keras.layers.Dense(10)])
    x = np.random.default_rng(0).normal(size=(20, 6)).astype("float32")
    cache = keras_distill.TeacherCache.build(
        teacher, x, tmp_path, layers=["hidden"], sampled=4, feature_dtype="uint8", batch_size=8
    )
    answer = cache.attach(x)[0][1].teacher
    hidden = keras.ops.convert_to_numpy(teacher.layers[0](x))
    np.testing.assert_allclose(answer["features"]["hidden"], hidden, atol=0.02)
    assert answer["output"].indices.shape == (20, 4)
    np.testing.assert_array_equal(np.exp(answer["output"].logs).sum(-1).round(3), 1.0)
