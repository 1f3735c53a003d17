"""Reference values of the losses on features, relations and attention: float64 loops from the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from oracle import Array, channel_axis, rows


def dot(a: Array, b: Array) -> float:
    return sum(float(x * y) for x, y in zip(a, b, strict=True))


def of_length_one(vector: Array, eps: float = 0.0) -> Array:
    return vector / (math.sqrt(dot(vector, vector)) + eps)


def flat(array: Array) -> list[Array]:
    """One vector for each example."""
    return [example.ravel() for example in array]


def channel_rows(example: Array) -> list[Array]:
    """The maps of single channels of one example, from (C, H, W) or (L, C)."""
    return [channel.ravel() for channel in (example if example.ndim == 3 else example.T)]


def pearson_feature(student: Array, teacher: Array) -> float:
    """Cao et al. 2022: half the MSE of each channel's z-scores over examples and positions, std unbiased plus 1e-6."""
    total = 0.0
    for channel in range(student.shape[channel_axis(student)]):
        scores = []
        for feature in (student, teacher):
            values = np.take(feature, channel, axis=channel_axis(feature)).ravel()
            mean = sum(values) / len(values)
            deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
            scores.append([(value - mean) / (deviation + 1e-6) for value in values])
        total += sum((s - t) ** 2 for s, t in zip(*scores, strict=True))
    return float(total / student.size / 2)


def neuron_selectivity(student: Array, teacher: Array) -> float:
    """Huang and Wang 2017: MMD^2 of the unit maps of the channels with k(a, b) = (a . b)^2, mean over the examples."""

    def mean_kernel(a: Sequence[Array], b: Sequence[Array]) -> float:
        return sum(dot(x, y) ** 2 for x in a for y in b) / len(a) / len(b)

    values = []
    for one, other in zip(student, teacher, strict=True):
        s, t = ([of_length_one(row) for row in channel_rows(example)] for example in (one, other))
        values.append(mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t))
    return sum(values) / len(values)


def cka(student: Array, teacher: Array) -> float:
    """Kornblith et al. 2019: 1 - |Y^T X|^2 / (|X^T X| |Y^T Y|), columns centred over the examples."""

    def columns(feature: Array) -> list[Array]:
        matrix = np.array(flat(feature))
        return [column - sum(column) / len(column) for column in matrix.T]

    def squared_norm(a: Sequence[Array], b: Sequence[Array]) -> float:
        return sum(dot(x, y) ** 2 for x in a for y in b)

    x, y = columns(student), columns(teacher)
    return 1 - squared_norm(y, x) / math.sqrt(squared_norm(x, x) * squared_norm(y, y))


def normalized_mse(student: Array, teacher: Array) -> float:
    """Sun et al. 2019: mean over channels, positions and examples of (s/|s| - t/|t|)^2."""
    values = []
    for s, t in zip(rows(student, channel_axis(student)), rows(teacher, channel_axis(teacher)), strict=True):
        values.append(sum((a - b) ** 2 for a, b in zip(of_length_one(s), of_length_one(t), strict=True)) / len(s))
    return float(sum(values) / len(values))


def feature_map_transfer(student: Array, teacher: Array, *, eps: float = 1e-12) -> float:
    """MobileBERT: mean squared difference of the layer-normalised channel vectors."""

    def layer_norm(vector: Array) -> list[float]:
        mean = sum(vector) / len(vector)
        variance = sum((value - mean) ** 2 for value in vector) / len(vector)
        return [(value - mean) / math.sqrt(variance + eps) for value in vector]

    values = []
    for s, t in zip(rows(student, channel_axis(student)), rows(teacher, channel_axis(teacher)), strict=True):
        values.append(sum((a - b) ** 2 for a, b in zip(layer_norm(s), layer_norm(t), strict=True)) / len(s))
    return float(sum(values) / len(values))
