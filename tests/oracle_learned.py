"""Reference values of the losses with parameters: float64 loops from the papers' formulas, channels first or last."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from oracle import Array, channel_axis

Parameters = Mapping[str, Array]


def vectors(feature: Array) -> Array:
    """The channels at every position of every example, one row each."""
    return np.moveaxis(feature, channel_axis(feature), -1).reshape(-1, feature.shape[channel_axis(feature)])


def matrix_times(matrix: Array, vector: Array) -> Array:
    rows = matrix.reshape(len(matrix), -1)
    return np.array([sum(float(a * b) for a, b in zip(row, vector, strict=True)) for row in rows])


def variational_information(
    student: Array, teacher: Array, *, parameters: Parameters, initial_variance: float = 5.0
) -> float:
    """Ahn et al. 2019: ((mu - t)^2 / var + log var) / 2, mean over everything; the variance of a channel is
    log(1 + e^rho) + 1e-5, the mean three 1x1 convolutions with ReLU between them."""
    variances = [math.log(1 + math.exp(rho)) + 1e-5 for rho in parameters["rho"]]
    total = 0.0
    for s, t in zip(vectors(student), vectors(teacher), strict=True):
        mean = np.maximum(matrix_times(parameters["mean.0.weight"], s), 0)
        mean = np.maximum(matrix_times(parameters["mean.2.weight"], mean), 0)
        mean = matrix_times(parameters["mean.4.weight"], mean)
        for m, target, variance in zip(mean, t, variances, strict=True):
            total += ((m - target) ** 2 / variance + math.log(variance)) / 2
    return float(total / teacher.size)


def convolution(example: Array, weight: Array, bias: Array) -> Array:
    """A convolution (C, positions) -> (O, positions) whose kernel sees zeros beyond the border."""
    positions = example.shape[1:]
    result = np.zeros((len(weight), *positions))
    for channel, kernel in enumerate(weight):
        for place in np.ndindex(positions):
            value = float(bias[channel])
            for tap in np.ndindex(kernel.shape[1:]):
                seen = tuple(p + k - 1 for p, k in zip(place, tap, strict=True))
                if all(0 <= i < size for i, size in zip(seen, positions, strict=True)):
                    value += sum(float(kernel[c][tap] * example[(c, *seen)]) for c in range(len(example)))
            result[(channel, *place)] = value
    return result


def masked_generative(
    student: Array,
    teacher: Array,
    *,
    parameters: Parameters,
    hidden: Array | None = None,
    mask_ratio: float = 0.0,
    mask: str = "spatial",
) -> float:
    """Yang et al. 2022: sum of (G(mask * s) - t)^2, mean over the examples; G is convolution, ReLU, convolution."""
    first, second = ([parameters[f"generator.{i}.{kind}"] for kind in ("weight", "bias")] for i in (0, 2))
    shown = student if hidden is None else student * hidden
    total = 0.0
    for s, t in zip(shown, teacher, strict=True):
        s, t = (np.moveaxis(example, channel_axis(student) - 1, 0) for example in (s, t))
        generated = convolution(np.maximum(convolution(s, *first), 0), *second)
        total += sum(float((g - target) ** 2) for g, target in zip(generated.ravel(), t.ravel(), strict=True))
    return total / len(student)


def log_sum_distance(
    student: Array, teacher: Array, *, parameters: Parameters, power: float = 4.0, eps: float = 1e-4
) -> float:
    """SRD: log of the sum of |BN(W mean f_s) - BN(mean f_t)|^a; the means are over positions, BN over the batch."""
    normalized = []
    for feature, matrix in ((student, parameters["projection.weight"]), (teacher, None)):
        examples = [sum(vectors(example[None])) / len(vectors(example[None])) for example in feature]
        if matrix is not None:
            examples = [matrix_times(matrix, example) for example in examples]
        columns = []
        for column in zip(*examples, strict=True):
            mean = sum(column) / len(column)
            variance = sum((value - mean) ** 2 for value in column) / len(column)
            columns.append([(value - mean) / math.sqrt(variance + eps) for value in column])
        normalized.append(columns)
    pairs = [pair for columns in zip(*normalized, strict=True) for pair in zip(*columns, strict=True)]
    return math.log(sum(abs(s - t) ** power for s, t in pairs))


def queue_similarity(
    student: Array,
    teacher: Array,
    *,
    parameters: Parameters,
    size: int,
    student_temperature: float = 0.2,
    teacher_temperature: float = 0.01,
) -> float:
    """SEED, equations 4 and 5: - sum_j p_t(j) log p_s(j), the softmaxes over the dot products of vectors of length 1
    with the queue and the teacher's own embedding; mean over the examples."""

    def length_one(vector: Array) -> list[float]:
        length = math.sqrt(sum(float(value) ** 2 for value in vector))
        return [float(value) / length for value in vector]

    def softmax(embedding: list[float], entries: list[list[float]], temperature: float) -> list[float]:
        scores = [sum(a * b for a, b in zip(embedding, entry, strict=True)) / temperature for entry in entries]
        exponentials = [math.exp(score - max(scores)) for score in scores]
        return [value / sum(exponentials) for value in exponentials]

    queue = [length_one(entry) for entry in parameters["queue"]]
    assert len(queue) == size
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        entries = [length_one(t), *queue]
        p_student = softmax(length_one(s), entries, student_temperature)
        p_teacher = softmax(length_one(t), entries, teacher_temperature)
        total -= sum(p * math.log(q) for p, q in zip(p_teacher, p_student, strict=True))
    return total / len(student)
