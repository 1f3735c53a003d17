"""Reference values of the losses with parameters: float64 loops from the papers' formulas, channels first or last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from oracle import Array, channel_axis

Parameters = Mapping[str, Array]


def vectors(feature: Array) -> Array:
    """The channels at every position of every example, one row each."""
    return np.moveaxis(feature, channel_axis(feature), -1).reshape(-1, feature.shape[channel_axis(feature)])


def matrix_times(matrix: Array, vector: Array) -> Array:
    rows = matrix.reshape(len(matrix), -1)
    return np.array([sum(float(a * b) for a, b in zip(row, vector, strict=True)) for row in rows])


def length_one(vector: Array) -> list[float]:
    length = math.sqrt(sum(float(value) ** 2 for value in vector))
    return [float(value) / length for value in vector]


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


def network(example: Array, parameters: Parameters, name: str) -> Array:
    """Convolutions of width 3 with leaky ReLUs of 0.1 behind them; channels first."""
    for index in (0, 2, 4):
        example = convolution(example, parameters[f"{name}.{index}.weight"], parameters[f"{name}.{index}.bias"])
        example = np.where(example > 0, example, 0.1 * example)
    return example


def factor_transfer(
    student: Array,
    teacher: Array,
    *,
    parameters: Parameters,
    rate: float = 0.5,
    power: float = 1.0,
    factor_weight: float = 1.0,
    reconstruction_weight: float = 1.0,
) -> float:
    """Kim et al. 2018: mean |T(s) / length - P(t) / length|^p, plus mean (R(P(t)) - t)^2, which trains P and R."""
    distance = error = 0.0
    axis = channel_axis(student) - 1 if student.ndim > 2 else 0
    for s, t in zip(student, teacher, strict=True):
        s, t = (np.moveaxis(example, axis, 0) for example in (s, t))
        factor = network(t, parameters, "paraphraser")
        units = []
        for vector in (network(s, parameters, "translator").ravel(), factor.ravel()):
            length = math.sqrt(sum(float(value) ** 2 for value in vector))
            units.append([float(value) / length for value in vector])
        distance += sum(abs(a - b) ** power for a, b in zip(*units, strict=True)) / factor.size
        restored = network(factor, parameters, "restorer")
        error += sum(float(a - b) ** 2 for a, b in zip(restored.ravel(), t.ravel(), strict=True)) / t.size
    return (factor_weight * distance + reconstruction_weight * error) / len(student)


def softmax_regression(
    student: Array,
    teacher: Array,
    *,
    parameters: Parameters,
    classifier: Array,
    feature_weight: float = 1.0,
    regression_weight: float = 1.0,
) -> float:
    """SRRL: squared difference of averaged features, and of their logits; the student's behind linear, BN, ReLU."""
    mapped = np.stack([matrix_times(parameters["connector.weight"], vector) for vector in vectors(student)])
    connected = normalized(mapped[:, :, None, None], parameters["scale"], parameters["shift"])[:, :, 0, 0]
    connected = np.maximum(connected, 0).reshape(len(student), -1, mapped.shape[1])
    targets = vectors(teacher).reshape(len(teacher), -1, mapped.shape[1])
    total = 0.0
    for s, t in zip(connected, targets, strict=True):
        difference = s.mean(axis=0) - t.mean(axis=0)
        logits = matrix_times(classifier, difference)
        total += feature_weight * sum(float(value) ** 2 for value in difference) / len(difference)
        total += regression_weight * sum(float(value) ** 2 for value in logits) / len(logits)
    return total / len(student)


def normalized(maps: Array, scale: Array, shift: Array) -> Array:
    """Each channel of (N, C, H, W) with the mean and the biased variance of the batch, eps 1e-5."""
    result = np.empty_like(maps)
    for channel in range(maps.shape[1]):
        values = maps[:, channel]
        deviation = math.sqrt(float(((values - values.mean()) ** 2).mean()) + 1e-5)
        result[:, channel] = scale[channel] * (values - values.mean()) / deviation + shift[channel]
    return result


def review(students: Sequence[Array], parameters: Parameters) -> list[Array]:
    """Chen et al. 2021: fused maps from the deepest to the shallowest, in the order of the students' maps."""
    fused: Array | None = None
    results: list[Array] = []
    for index in reversed(range(len(students))):
        feature = students[index]
        count, _, *size = feature.shape
        matrix = parameters[f"squeeze.{index}.0.weight"][:, :, 0, 0]
        mapped = np.einsum("oc,nchw->nohw", matrix, feature)
        norm = [parameters[f"squeeze.{index}.1.{name}"] for name in ("weight", "bias")]
        current = normalized(mapped, *norm)
        if fused is not None:
            rows, columns = (
                [i * old // new for i in range(new)] for new, old in zip(size, fused.shape[2:], strict=True)
            )
            fused = fused[:, :, rows][:, :, :, columns]
            weight, bias = (parameters[f"attention.{index}.{name}"] for name in ("weight", "bias"))
            both = np.concatenate([current, fused], axis=1)
            scores = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0], both) + bias[:, None, None]
            factors = 1 / (1 + np.exp(-scores))
            current = current * factors[:, :1] + fused * factors[:, 1:]
        fused = current
        kernel = parameters[f"spread.{index}.0.weight"]
        spread = np.stack([convolution(current[n], kernel, np.zeros(len(kernel))) for n in range(count)])
        norm = [parameters[f"spread.{index}.1.{name}"] for name in ("weight", "bias")]
        results.insert(0, normalized(spread, *norm))
    return results


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


def contrastive_representation(
    student: Array,
    teacher: Array,
    *,
    parameters: Parameters,
    index: Array,
    size: int,
    width: int,
    temperature: float,
    normalizer: float | tuple[float, float],
    negatives: Sequence[Sequence[int]] | None = None,
    eps: float = 0.0,
) -> float:
    """CRD, equations 18 and 19: - log h(own) - sum_k log(1 - h(other k)), the teacher's memory for the student and the
    student's for the teacher; h = p / (p + K/M + eps), p = exp(u v / T) / Z. Without ``negatives`` all other rows."""
    sides = {}
    for who, feature in (("student", student), ("teacher", teacher)):
        weight, bias = parameters[f"{who}_embedding.weight"], parameters[f"{who}_embedding.bias"]
        axis = channel_axis(feature)
        vectors = np.moveaxis(np.asarray(feature, dtype=np.float64), axis, 1).reshape(len(feature), len(weight[0]), -1)
        sides[who] = [length_one(weight @ vector.mean(axis=1) + bias) for vector in vectors]
        assert len(weight) == width
    memories = {who: parameters[f"{who}_memory"] for who in sides}
    assert len(memories["student"]) == size
    total = 0.0
    constants = normalizer if isinstance(normalizer, tuple) else (normalizer, normalizer)
    for anchor, remembered, z in (("student", "teacher", constants[0]), ("teacher", "student", constants[1])):
        for place, (embedding, own) in enumerate(zip(sides[anchor], index, strict=True)):
            others = [row for row in range(size) if row != own] if negatives is None else negatives[place]
            noise = len(others) / size

            p = [
                math.exp(sum(a * b for a, b in zip(embedding, entry, strict=True)) / temperature) / z
                for entry in memories[remembered][[own, *others]]
            ]
            total -= math.log(p[0] / (p[0] + noise + eps))
            total -= sum(math.log(noise / (other + noise + eps)) for other in p[1:])
    return total / len(student)
