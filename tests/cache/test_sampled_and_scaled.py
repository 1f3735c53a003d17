"""Classes drawn at random, features in 8 bits, and the losses that such caches cannot serve (C22, T11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_nets import Module, network, table
from cache_nets import difference as weights_differ
from cache_nets import trained as fitted
from loss_case import golden_arrays, golden_index
from ragged_data import Padding, built, difference, teacher, trained
from torch import nn

from distill_core.codecs import ScaledCodec
from distill_core.sampled import SampledCodec
from lightning_distill import (
    CacheError,
    FeatureDistillation,
    GeneralizedJSDLoss,
    LogitsDistillation,
    ReverseKLLoss,
    SequenceDistillation,
    SkewKLLoss,
    SoftCrossEntropyLoss,
    SoftTargetLoss,
    TeacherCache,
    TotalVariationLoss,
)
from lightning_distill.functional.top_k import Sampled, TopK, merge_classes

RNG = np.random.default_rng(3)
LOGITS = {
    "peaked": np.float32([9, 4, 3, 2, 1, 0, 0, -1, -2, -30]),
    "flat": np.float32([0.1, 0, 0, 0, 0, 0, -0.1, 0, 0, 0]),
    "two modes": np.float32([5, 5, 1, 1, 1, 1, 1, 1, 1, 1]),
    "certain": np.float32([200, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    "steep": -1.7 * np.arange(10, dtype="float32"),
}


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype("float64") - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def estimates(logits: np.ndarray, draws: int, times: int) -> np.ndarray:
    """The estimated probabilities of many draws of one row, shape ``(times, C)``."""
    codec = SampledCodec(logits.shape, draws)
    indices, logs, tail = codec.decode(codec.encode(np.tile(logits, (times, 1)), (1,)))
    assert (np.diff(np.sort(indices, -1), axis=-1) > 0).all()  # distinct
    assert float(tail.max()) < -1000
    rows = np.zeros((times, len(logits)))
    np.put_along_axis(rows, indices, np.exp(logs.astype("float64")), -1)
    return rows


@pytest.mark.parametrize("draws", [2, 4, 9])
@pytest.mark.parametrize("kind", LOGITS)
def test_c22_the_mean_of_the_draws_is_the_distribution(kind: str, draws: int) -> None:
    """C22: unbiased to five standard errors; every draw sums to 1."""
    p, rows = softmax(LOGITS[kind]), estimates(LOGITS[kind], draws, 20_000)
    np.testing.assert_allclose(rows.sum(-1), 1.0, atol=1e-5)
    # a class that is drawn rarely may not occur at all: its variance is then that of the threshold, at most 1 / K
    deviation = np.where(p < 1e-4, np.sqrt(1.1 * p / draws), rows.std(0))
    assert (np.abs(rows.mean(0) - p) <= 5 * deviation / np.sqrt(len(rows)) + 1e-6).all()


def test_c22_likely_classes_are_always_drawn() -> None:
    """C22: nearly exactly, and the likeliest comes first."""
    p, rows = softmax(LOGITS["peaked"]), estimates(LOGITS["peaked"], 4, 500)
    assert (rows[:, 0] > 0.97).all()
    np.testing.assert_allclose(rows[:, 0], p[0], atol=2e-3)
    codec = SampledCodec((10,), 4)
    assert (codec.decode(codec.encode(LOGITS["peaked"][None]))[0][:, 0] == 0).all()


@pytest.mark.parametrize("classes", [32_768, 128_000])
def test_c22_twelve_draws_take_at_most_forty_bytes_a_token(classes: int) -> None:
    """C22: indices and probabilities as they are stored."""
    codec = SampledCodec((classes,), 12)
    stored = codec.encode(RNG.standard_normal((2, classes)).astype("float32"))
    assert sum(array.nbytes for array in stored.values()) / 2 == codec.bytes_per_item <= 40


@pytest.mark.parametrize("loss", [SoftTargetLoss(1.0), SoftCrossEntropyLoss()])
def test_c22_the_gradient_is_unbiased(loss: nn.Module) -> None:
    """C22, T11: the mean gradient of many draws is that of the whole distribution."""
    target, times = torch.from_numpy(LOGITS["two modes"] / 2), 30_000
    start = torch.linspace(-1, 1, 10, dtype=torch.float64)
    full = start[None].clone().requires_grad_()
    loss(full, target[None].double()).backward()
    codec = SampledCodec((10,), 3)
    drawn = (torch.from_numpy(array) for array in codec.decode(codec.encode(target.expand(times, 10).numpy(), (2,))))
    student = start.expand(times, 10).clone().requires_grad_()
    loss(*merge_classes(student, Sampled(*drawn, 10), 1.0)).backward()
    assert full.grad is not None
    assert student.grad is not None
    gradients = student.grad * times
    error = 5 * gradients.std(0) / times**0.5
    assert bool(((gradients.mean(0) - full.grad[0]).abs() <= error).all())
    assert float(gradients.std()) > 0.05


def test_c22_every_class_but_one_is_nearly_all(tmp_path: Path) -> None:
    """C17, C22: training on tokens, of which 12 of 13 are drawn, is close to a live teacher."""
    cache = built(tmp_path, sampled=12)
    assert cache.manifest.arrays["output"] == {
        "shape": [13],
        "dtype": "uint8",
        "sampled": 12,
        "ragged": "attention_mask",
    }
    live, cached = (trained(source, Padding("left")) for source in (teacher(), cache))
    assert difference(live, cached) < 0.05
    cache.verify()


def test_c22_draws_are_repeated_by_a_resumed_build(tmp_path: Path) -> None:
    """C12, C22"""
    built(tmp_path / "whole", sampled=3, feature_dtype="uint8", layers=["body"], shard_bytes=100)
    built(tmp_path / "half", sampled=3, feature_dtype="uint8", layers=["body"], shard_bytes=100)
    (tmp_path / "half" / "manifest.json").rename(tmp_path / "half" / "building.json")
    (tmp_path / "half" / "shard-00002.json").unlink()
    built(tmp_path / "half", sampled=3, feature_dtype="uint8", layers=["body"], shard_bytes=100)
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "half")]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    "loss",
    [
        ReverseKLLoss(),
        GeneralizedJSDLoss(beta=0.5),
        GeneralizedJSDLoss(beta=0),
        SkewKLLoss(),
        TotalVariationLoss(),
        SoftTargetLoss(2.0),
        SoftCrossEntropyLoss(2.0),
        SoftTargetLoss(1.0, standardize=True),
    ],
    ids=str,
)
def test_c22_losses_that_would_be_biased_are_refused(tmp_path: Path, loss: nn.Module) -> None:
    """C22, T11: by both terms on logits."""
    words = (
        r"^Expected SoftTargetLoss or SoftCrossEntropyLoss at temperature 1 for a cache of classes drawn at random, but"
    )
    with pytest.raises(ValueError, match=words):
        trained(built(tmp_path / "a", sampled=3), Padding(), terms=[SequenceDistillation(loss)])
    cache = TeacherCache.build(network(32), table(), tmp_path / "b", sampled=3, progress=False)
    with pytest.raises(ValueError, match=words):
        fitted(Module(table()), cache, [LogitsDistillation(loss)])


@pytest.mark.parametrize(("case", "loss"), [("s1", SoftTargetLoss(1.0)), ("s3", GeneralizedJSDLoss(beta=0.5))])
def test_t11_the_tail_is_an_outcome_as_in_published_code(case: str, loss: nn.Module) -> None:
    """T11: divergences over k + 1 outcomes equal TRL's, whichever k tokens are known."""
    (entry,) = [entry for entry in golden_index("topk_tail_kl") if entry["case"] == case]
    arrays = {name: torch.from_numpy(array) for name, array in golden_arrays(entry).items()}
    student = arrays["student_logits"].clone().requires_grad_()
    if "teacher_logits" in arrays:
        indices = student.detach().topk(entry["hyperparameters"]["k"]).indices
        logs = arrays["teacher_logits"].log_softmax(-1).gather(-1, indices)
    else:
        indices, logs = arrays["teacher_topk_ids"], arrays["teacher_topk_logprobs"]
    tail = (1 - logs.exp().sum(-1, keepdim=True)).log()
    merged = merge_classes(student, TopK(indices, logs, tail, student.shape[-1]), 1.0)
    value = loss(*merged, mask=arrays["labels"] != -100)
    value.backward()
    # the reference raises the student's tail of case s3 from 5e-11 to 1e-7, where it has no gradient
    tolerance = entry["tolerance_suggested"]["float64"] if case == "s1" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(value.detach(), arrays["loss"], **tolerance)
    torch.testing.assert_close(student.grad, arrays["grad_student_logits"], **tolerance)


# Features in 8 bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "channels"), [((6,), 0), ((4, 5, 3), 0), ((5, 3, 4), 2), ((7, 6), 1)])
def test_c22_the_error_is_half_a_step_of_the_channel(shape: tuple[int, ...], channels: int) -> None:
    """C22: a channel of large numbers does not coarsen the others, and a constant one is exact."""
    values = RNG.standard_normal((50, *shape)).astype("float32")
    last = np.moveaxis(values, channels + 1, -1)
    last[..., 0] *= 1000
    last[..., 1] = 3.5
    codec = ScaledCodec(shape, channels)
    stored = codec.encode(values)
    assert stored["values"].dtype == np.uint8
    back = np.moveaxis(codec.decode({**stored, "scale": stored["scale"].repeat(50, 0)}), channels + 1, -1)
    outer = tuple(range(last.ndim - 1))
    allowed = (last.max(outer) - last.min(outer)) / 255 / 2
    assert (np.abs(back - last).max(outer) <= allowed * 1.001 + 1e-6).all()
    np.testing.assert_array_equal(back[..., 1], 3.5)


def test_c22_each_shard_has_scales_of_its_own(tmp_path: Path) -> None:
    """C22: rows of several shards in one batch."""
    settings: dict[str, Any] = {"layers": ["1"], "dtype": "float32", "batch_size": 4, "shard_bytes": 1}
    full = TeacherCache.build(network(32), table(), tmp_path / "full", progress=False, **settings)
    cache = TeacherCache.build(
        network(32), table(), tmp_path / "small", feature_dtype="uint8", progress=False, **settings
    )
    assert cache.manifest.arrays["feature0"] == {"shape": [32], "dtype": "uint8", "channels": 0}
    rows = [39, 0, 17, 17]
    exact, close = full.read(rows)["feature0"], cache.read(rows)["feature0"]
    assert 0 < np.abs(exact - close).max() < 0.01
    cache.verify()


def test_c22_features_of_tokens_and_maps_train_a_student(tmp_path: Path) -> None:
    """C10, C17, C22"""
    cache = built(tmp_path / "tokens", layers=["body"], feature_dtype="uint8")
    terms = [FeatureDistillation("model.body", "body", mask="attention_mask", weight=3.0)]
    live, cached = (trained(source, Padding("left"), terms=terms) for source in (teacher(), cache))
    assert difference(live, cached) < 0.01
    maps = nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(24, 10))
    described = TeacherCache.build(
        maps, table(), tmp_path / "maps", layers=["1"], feature_dtype="uint8", progress=False
    )
    assert described.manifest.arrays["feature0"] == {"shape": [4, 2, 3], "dtype": "uint8", "channels": 0}
    terms = [FeatureDistillation("1", "3", adapter="auto")]
    small = TeacherCache.build(network(32), table(), tmp_path / "rows", layers=["1"], feature_dtype="uint8")
    live, cached = (fitted(Module(table()), source, [FeatureDistillation("1", "1")]) for source in (network(32), small))
    assert weights_differ(live, cached) < 0.02


def test_c22_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    """C22"""
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"^Expected `top_k` or `sampled` to be None, but got top_k=3 and sampled=3", {"top_k": 3, "sampled": 3}),
        (r"^Expected `sampled` to be 2 to 9, fewer than the classes, but got sampled=1\.$", {"sampled": 1}),
        (r"^Expected `sampled` to be 2 to 9, fewer than the classes, but got sampled=10\.$", {"sampled": 10}),
        (r"^Expected `feature_dtype` to be one of uint8, .* but got feature_dtype='int4'", {"feature_dtype": "int4"}),
        (r"without top_k, but got 'uint8'\. Features take feature_dtype='uint8'", {"dtype": "uint8"}),
    ]
    for words, settings in cases:
        with pytest.raises(ValueError, match=words):
            TeacherCache.build(network(8), table(), tmp_path / "x", progress=False, **settings)
    with pytest.raises(ValueError, match=r"^Expected the teacher's outputs to be logits, but got probabilities"):
        TeacherCache.build(
            nn.Sequential(network(8), nn.Softmax(-1)), table(), tmp_path / "y", sampled=3, progress=False
        )
    with pytest.raises(CacheError, match=r"array|Expected"):
        TeacherCache.open(tmp_path / "x")
