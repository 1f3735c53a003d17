"""Reference values in float64 NumPy, written with loops from the papers' formulas and never from the library's code.

Every function takes the student's array, the teacher's array and the settings of the loss, and returns the loss of the
batch. ``gradient`` differentiates any of them numerically.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(scores: Array) -> Array:
    largest = max(scores)
    exponentials = [math.exp(score - largest) for score in scores]
    return np.array([value / sum(exponentials) for value in exponentials])


def rows(array: Array, axis: int | None) -> Iterator[Array]:
    """The vectors along one axis, one after the other; None is the axis of the channels or classes."""
    moved = np.moveaxis(array, channel_axis(array) if axis is None else axis, -1)
    for index in np.ndindex(moved.shape[:-1]):
        yield moved[index]


def channel_axis(array: Array) -> int:
    return 1 if array.ndim >= 4 else array.ndim - 1


def standardized(scores: Array) -> Array:
    """Sun et al. 2024: each row of logits becomes its z-score, with the unbiased standard deviation plus 1e-7."""
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
    return np.array([(score - mean) / (math.sqrt(variance) + 1e-7) for score in scores])


def kl(p: Array, q: Array) -> float:
    """KL(p || q) = sum_c p_c log(p_c / q_c)."""
    return sum(float(a * math.log(a / b)) for a, b in zip(p, q, strict=True) if a > 0)


def soft_target(
    student: Array, teacher: Array, *, temperature: float = 4.0, standardize: bool = False, class_dim: int | None = None
) -> float:
    """Hinton et al. 2015: T^2 KL(softmax(z_t / T) || softmax(z_s / T)), mean over the rows."""
    values = []
    for z_s, z_t in zip(rows(student, class_dim), rows(teacher, class_dim), strict=True):
        if standardize:
            z_s, z_t = standardized(z_s), standardized(z_t)
        values.append(temperature**2 * kl(softmax(z_t / temperature), softmax(z_s / temperature)))
    return sum(values) / len(values)


def soft_cross_entropy(
    student: Array, teacher: Array, *, temperature: float = 1.0, class_dim: int | None = None
) -> float:
    """Hinton et al. 2015: -T^2 sum_c p_t log p_s, mean over the rows."""
    values = []
    for z_s, z_t in zip(rows(student, class_dim), rows(teacher, class_dim), strict=True):
        p_s, p_t = softmax(z_s / temperature), softmax(z_t / temperature)
        values.append(-(temperature**2) * sum(t * math.log(s) for s, t in zip(p_s, p_t, strict=True)))
    return float(sum(values) / len(values))


def logit_mse(student: Array, teacher: Array, *, class_dim: int | None = None) -> float:
    """Ba and Caruana 2014: mean over the classes of (z_s - z_t)^2, mean over the rows."""
    values = []
    for z_s, z_t in zip(rows(student, class_dim), rows(teacher, class_dim), strict=True):
        values.append(sum((s - t) ** 2 for s, t in zip(z_s, z_t, strict=True)) / len(z_s))
    return float(sum(values) / len(values))


def mean_of_differences(function: Callable[[float], float]) -> Callable[[Array, Array], float]:
    """FitNets with any penalty: the mean over examples and elements of a function of the difference."""

    def value(student: Array, teacher: Array) -> float:
        penalties = [function(float(s - t)) for s, t in zip(student.ravel(), teacher.ravel(), strict=True)]
        return sum(penalties) / len(penalties)

    return value


mse = mean_of_differences(lambda difference: difference**2)
l1 = mean_of_differences(abs)
smooth_l1 = mean_of_differences(lambda x: 0.5 * x**2 if abs(x) < 1 else abs(x) - 0.5)


def cosine(student: Array, teacher: Array, *, channel_dim: int | None = None) -> float:
    """DistilBERT: 1 - s.t / (|s| |t|) over the channels, mean over positions and examples."""
    axis = channel_axis(student) if channel_dim is None else channel_dim
    values = []
    for s, t in zip(rows(student, axis), rows(teacher, axis), strict=True):
        product = sum(a * b for a, b in zip(s, t, strict=True))
        values.append(1 - product / math.sqrt(sum(a * a for a in s)) / math.sqrt(sum(b * b for b in t)))
    return float(sum(values) / len(values))


def feature_kl(student: Array, teacher: Array, *, channel_dim: int | None = None) -> float:
    """KL of the softmaxes over the channels, summed over the channels, mean over positions and examples."""
    axis = channel_axis(student) if channel_dim is None else channel_dim
    pairs = list(zip(rows(student, axis), rows(teacher, axis), strict=True))
    return sum(kl(softmax(t), softmax(s)) for s, t in pairs) / len(pairs)


def attention_transfer(student: Array, teacher: Array, *, p: float = 2.0) -> float:
    """Zagoruyko and Komodakis 2017: mean squared difference of L2-normalised maps mean_c |f_c|^p."""
    values = []
    for example in range(len(student)):
        maps = []
        for feature in (student, teacher):
            axis = channel_axis(feature) - 1
            attention = [sum(abs(a) ** p for a in vector) / len(vector) for vector in rows(feature[example], axis)]
            norm = math.sqrt(sum(q * q for q in attention))
            maps.append([q / norm for q in attention])
        values.append(sum((a - b) ** 2 for a, b in zip(*maps, strict=True)) / len(maps[0]))
    return float(sum(values) / len(values))


def entropy(p: Array) -> float:
    return -sum(float(value * math.log(value)) for value in p if value > 0)


def gradient(function: Callable[[Array], float], at: Array, step: float = 1e-3) -> Array:
    """Five-point derivative by every element: its error is of the fourth order in the step."""
    result = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        samples = []
        for multiple in (-2, -1, 1, 2):
            moved = at.copy()
            moved[index] += multiple * step
            samples.append(function(moved))
        result[index] = (samples[0] - 8 * samples[1] + 8 * samples[2] - samples[3]) / (12 * step)
    return result
