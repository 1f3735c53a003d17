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


def focal_global(
    student: Array,
    teacher: Array,
    *,
    parameters: Parameters,
    foreground: Array | None = None,
    temperature: float = 0.5,
    foreground_weight: float = 1e-3,
    background_weight: float = 5e-4,
    attention_weight: float = 1e-3,
    context_weight: float = 5e-6,
) -> float:
    """Yang et al. 2022 (FGD), equations 2 to 11: sums over positions and channels, mean over the examples.

    Without weights of boxes the positions whose first channel of the teacher is positive have 1/4, the others 0.
    """
    weights = np.where(teacher[:, 0] > 0, 0.25, 0.0) if foreground is None else foreground
    total = 0.0
    for f_s, f_t, scale in zip(student, teacher, weights, strict=True):
        channels, height, width = f_t.shape
        places = [(i, j) for i in range(height) for j in range(width)]
        outside = sum(1 for i, j in places if scale[i, j] == 0)
        a_s, c_s = _attention(f_s, temperature)
        a_t, c_t = _attention(f_t, temperature)
        g_s, g_t = (_with_context(f, parameters, f"{who}_context") for f, who in ((f_s, "student"), (f_t, "teacher")))
        for i, j in places:
            weight = foreground_weight * scale[i, j]
            if scale[i, j] == 0:
                weight = background_weight / outside
            for c in range(channels):
                total += weight * a_t[i, j] * c_t[c] * (f_s[c, i, j] - f_t[c, i, j]) ** 2
                total += context_weight * (g_s[c, i, j] - g_t[c, i, j]) ** 2
            total += attention_weight * abs(a_s[i, j] - a_t[i, j])
        total += attention_weight * sum(abs(s - t) for s, t in zip(c_s, c_t, strict=True))
    return float(total / len(student))


def _attention(feature: Array, temperature: float) -> tuple[Array, Array]:
    """Equations 4 to 6: softmax of the mean sizes over positions and over channels, times their numbers."""
    channels, height, width = feature.shape
    by_place = np.exp(np.abs(feature).sum(0) / channels / temperature)
    by_channel = np.exp(np.abs(feature).sum((1, 2)) / (height * width) / temperature)
    return height * width * by_place / by_place.sum(), channels * by_channel / by_channel.sum()


def _with_context(feature: Array, parameters: Parameters, name: str) -> Array:
    """Equation 10: F + W2(ReLU(LN(W1(sum_j softmax_j(Wk F)_j F_j))))."""

    def convolved(vector: Array, layer: str) -> Array:
        weight = parameters[f"{name}.{layer}.weight"].reshape(-1, len(vector))
        return matrix_times(weight, vector) + parameters[f"{name}.{layer}.bias"]

    columns = feature.reshape(len(feature), -1).T
    scores = np.array([math.exp(convolved(column, "attention")[0]) for column in columns])
    read = sum(score * column for score, column in zip(scores / scores.sum(), columns, strict=True))
    narrow = convolved(read, "reduce")
    narrow = (narrow - narrow.mean()) / math.sqrt(narrow.var() + 1e-5)
    narrow = narrow * parameters[f"{name}.norm.weight"].ravel() + parameters[f"{name}.norm.bias"].ravel()
    return feature + convolved(np.maximum(narrow, 0), "expand")[:, None, None]
