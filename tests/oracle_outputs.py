"""Reference values of the further losses on the models' outputs: float64, loops, from the papers' formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from oracle import Array, kl, rows, softmax


def softened(
    student: Array, teacher: Array, temperature: float, class_dim: int | None
) -> Iterator[tuple[Array, Array]]:
    """The two models' softened probabilities, row by row."""
    for z_s, z_t in zip(rows(student, class_dim), rows(teacher, class_dim), strict=True):
        yield softmax(z_s / temperature), softmax(z_t / temperature)


def mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))


def reverse_kl(student: Array, teacher: Array, *, temperature: float = 1.0, class_dim: int | None = None) -> float:
    """MiniLLM: KL(p_s || p_t), mean over the rows."""
    return mean([kl(p_s, p_t) for p_s, p_t in softened(student, teacher, temperature, class_dim)])


def generalized_jsd(
    student: Array, teacher: Array, *, beta: float = 0.5, temperature: float = 1.0, class_dim: int | None = None
) -> float:
    """GKD: beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = beta p_t + (1 - beta) p_s; its limits at 0 and 1."""
    values = []
    for p_s, p_t in softened(student, teacher, temperature, class_dim):
        m = np.array([beta * t + (1 - beta) * s for s, t in zip(p_s, p_t, strict=True)])
        inner = beta * kl(p_t, m) + (1 - beta) * kl(p_s, m)
        values.append(kl(p_t, p_s) if beta == 0 else kl(p_s, p_t) if beta == 1 else inner)
    return mean(values)


def skew_kl(
    student: Array, teacher: Array, *, skew: float = 0.1, reverse: bool = False, class_dim: int | None = None
) -> float:
    """DistiLLM: KL(p_t || a p_t + (1 - a) p_s), or KL(p_s || a p_s + (1 - a) p_t), mean over the rows."""
    values = []
    for p_s, p_t in softened(student, teacher, 1.0, class_dim):
        first, second = (p_s, p_t) if reverse else (p_t, p_s)
        mixture = np.array([skew * a + (1 - skew) * b for a, b in zip(first, second, strict=True)])
        values.append(kl(first, mixture))
    return mean(values)


def total_variation(student: Array, teacher: Array, *, temperature: float = 1.0, class_dim: int | None = None) -> float:
    """f-distillation: half the sum of |p_s - p_t|, mean over the rows."""
    pairs = softened(student, teacher, temperature, class_dim)
    return mean([0.5 * sum(abs(s - t) for s, t in zip(p_s, p_t, strict=True)) for p_s, p_t in pairs])


def labelled(
    student: Array, teacher: Array, labels: NDArray[np.int64], class_dim: int | None
) -> Iterator[tuple[Array, Array, int]]:
    """Both models' logits and the label, row by row."""
    yield from zip(rows(student, class_dim), rows(teacher, class_dim), labels.ravel().tolist(), strict=True)


def without(values: Array, label: int) -> Array:
    return np.array([value for index, value in enumerate(values) if index != label])


def decoupled_kd(
    student: Array,
    teacher: Array,
    *,
    labels: NDArray[np.int64],
    target_weight: float = 1.0,
    nontarget_weight: float = 8.0,
    temperature: float = 4.0,
    class_dim: int | None = None,
) -> float:
    """DKD: T^2 (a KL(b_t || b_s) + b KL(q_t || q_s)), b = (p_y, 1 - p_y), q over the classes other than y."""
    values = []
    for z_s, z_t, y in labelled(student, teacher, labels, class_dim):
        p_s, p_t = softmax(z_s / temperature), softmax(z_t / temperature)
        target = kl(np.array([p_t[y], sum(without(p_t, y))]), np.array([p_s[y], sum(without(p_s, y))]))
        q_s, q_t = (without(p, y) / sum(without(p, y)) for p in (p_s, p_t))
        values.append(temperature**2 * (target_weight * target + nontarget_weight * kl(q_t, q_s)))
    return mean(values)


def normalized_kd(
    student: Array,
    teacher: Array,
    *,
    labels: NDArray[np.int64],
    nontarget_weight: float = 1.5,
    temperature: float = 1.0,
    class_dim: int | None = None,
) -> float:
    """NKD: -p_t[y] log p_s[y] - g T^2 sum_{c != y} q_t log q_s, q the normalised probabilities of the other classes."""
    values = []
    for z_s, z_t, y in labelled(student, teacher, labels, class_dim):
        target = -softmax(z_t)[y] * math.log(softmax(z_s)[y])
        q_s, q_t = (softmax(without(z, y) / temperature) for z in (z_s, z_t))
        others = -sum(t * math.log(s) for s, t in zip(q_s, q_t, strict=True))
        values.append(target + nontarget_weight * temperature**2 * others)
    return mean(values)


def weighted_soft_labels(
    student: Array,
    teacher: Array,
    *,
    labels: NDArray[np.int64],
    frozen: Array,
    temperature: float = 2.0,
    class_dim: int | None = None,
) -> float:
    """WSLD: (1 - exp(-CE_s / CE_t)) T^2 CE(p_t, p_s); the factor is a constant, taken at the student ``frozen``."""
    weights = []
    for z_s, z_t, y in labelled(frozen, teacher, labels, class_dim):
        weights.append(1 - math.exp(-math.log(softmax(z_s)[y]) / (math.log(softmax(z_t)[y]) - 1e-7)))
    values = []
    for weight, (p_s, p_t) in zip(weights, softened(student, teacher, temperature, class_dim), strict=True):
        cross_entropy = -sum(t * math.log(s) for s, t in zip(p_s, p_t, strict=True))
        values.append(weight * temperature**2 * cross_entropy)
    return mean(values)


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of two vectors, with the authors' 1e-8 beside the product of norms."""
    a, b = [x - mean(a) for x in a], [x - mean(b) for x in b]
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / (norms + 1e-8)


def dist(
    student: Array,
    teacher: Array,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float = 1.0,
    class_dim: int | None = None,
) -> float:
    """DIST: T^2 (b (1 - mean correlation of rows) + g (1 - mean correlation of columns))."""
    pairs = list(softened(student, teacher, temperature, class_dim))
    inter = 1 - mean([pearson(p_s, p_t) for p_s, p_t in pairs])
    columns = range(len(pairs[0][0]))
    intra = 1 - mean([pearson([p_s[c] for p_s, _ in pairs], [p_t[c] for _, p_t in pairs]) for c in columns])
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def gram_difference(vectors_s: Sequence[Sequence[float]], vectors_t: Sequence[Sequence[float]]) -> float:
    """Squared differences of all products between two vectors, summed, over the number of vectors."""
    total = 0.0
    for i in range(len(vectors_s)):
        for j in range(len(vectors_s)):
            of_s = sum(a * b for a, b in zip(vectors_s[i], vectors_s[j], strict=True))
            of_t = sum(a * b for a, b in zip(vectors_t[i], vectors_t[j], strict=True))
            total += (of_s - of_t) ** 2
    return total / len(vectors_s)


def multi_level_logits(
    student: Array, teacher: Array, *, temperatures: Sequence[float] = (2, 3, 4, 5, 6), class_dim: int | None = None
) -> float:
    """MLLD: T^2 KL, differences of the batch's Gram matrices and of the classes', mean over the temperatures."""
    values = []
    for temperature in temperatures:
        pairs = list(softened(student, teacher, temperature, class_dim))
        instances = temperature**2 * mean([kl(p_t, p_s) for p_s, p_t in pairs])
        by_s, by_t = ([list(pair[model]) for pair in pairs] for model in (0, 1))
        classes = gram_difference(list(zip(*by_s, strict=True)), list(zip(*by_t, strict=True)))
        values.append(instances + gram_difference(by_s, by_t) + classes)
    return mean(values)


def binary_soft_target(
    student: Array, teacher: Array, *, temperature: float = 1.0, class_dim: int | None = None
) -> float:
    """T^2 times the binary cross entropy of sigmoids at z / T, mean over classes and rows."""
    values = []
    for z_s, z_t in zip(student.ravel(), teacher.ravel(), strict=True):
        s, t = (1 / (1 + math.exp(-z / temperature)) for z in (z_s, z_t))
        values.append(-(temperature**2) * (t * math.log(s) + (1 - t) * math.log(1 - s)))
    return mean(values)


def channel_wise_kl(student: Array, teacher: Array, *, temperature: float = 4.0) -> float:
    """Shu et al. 2021: T^2 / C sum_c KL over the positions of each channel's softmax, mean over the examples."""
    values = []
    for example in range(len(student)):
        s, t = student[example], teacher[example]
        if s.ndim == 2:  # tokens: channels last
            s, t = s.T, t.T
        for channel_s, channel_t in zip(s, t, strict=True):
            p_s, p_t = (softmax(channel.ravel() / temperature) for channel in (channel_s, channel_t))
            values.append(temperature**2 * kl(p_t, p_s))
    return mean(values)


def universal_logit(student: Array, teacher: Array, *, temperature: float = 1.0, class_dim: int | None = None) -> float:
    """ULD: the sum of |p_s - p_t| over the ranks, with zeros beyond the last class, mean over the rows."""
    values = []
    for z_s, z_t in zip(rows(student, class_dim), rows(teacher, class_dim), strict=True):
        p_s, p_t = (sorted(softmax(z / temperature).tolist(), reverse=True) for z in (z_s, z_t))
        values.append(sum(abs(s - t) for s, t in itertools.zip_longest(p_s, p_t, fillvalue=0.0)))
    return mean(values)


def alpha_beta(
    student: Array,
    teacher: Array,
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    temperature: float = 1.0,
    class_dim: int | None = None,
) -> float:
    """ABKD: -1/(a b) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]; at a + b = 0 the limit of Cichocki et al."""
    values = []
    for q, p in softened(student, teacher, temperature, class_dim):
        pairs = list(zip(p, q, strict=True))
        if alpha + beta == 0:
            terms = [(math.log((b / a) ** alpha) + (a / b) ** alpha - 1) / alpha**2 for a, b in pairs]
        else:
            total = alpha + beta
            terms = [
                -(a**alpha * b**beta - alpha / total * a**total - beta / total * b**total) / (alpha * beta)
                for a, b in pairs
            ]
        values.append(sum(terms))
    return mean(values)


def hard_target(student: Array, teacher: Array, *, class_dim: int | None = None) -> float:
    """DeiT: cross entropy with the teacher's decision, mean over the rows."""
    values = []
    for z_s, z_t in zip(rows(student, class_dim), rows(teacher, class_dim), strict=True):
        values.append(-math.log(softmax(z_s)[list(z_t).index(max(z_t))]))
    return mean(values)


def margin_mse(student: Array, teacher: Array) -> float:
    """Hofstaetter et al. 2020: squared difference of the margins to each negative candidate, mean over all."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        values += [((s[0] - s[i]) - (t[0] - t[i])) ** 2 for i in range(1, len(s))]
    return mean(values)


def listwise_kl(
    student: Array, teacher: Array, *, student_temperature: float = 1.0, teacher_temperature: float = 1.0
) -> float:
    """T_s^2 KL(softmax(t / T_t) || softmax(s / T_s)) over the candidates, mean over the queries."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        values.append(student_temperature**2 * kl(softmax(t / teacher_temperature), softmax(s / student_temperature)))
    return mean(values)


def interpolated_kl(
    student: Array, teacher: Array, *, frozen: Array, start: float, class_dim: int | None = None, **ramp: object
) -> float:
    """TAID: KL(softmax((1 - t) z_s + t z_t) || softmax(z_s)); z_s in the target is constant, taken at ``frozen``."""
    values = []
    triples = zip(*(rows(array, class_dim) for array in (student, teacher, frozen)), strict=True)
    for z_s, z_t, constant in triples:
        target = softmax(np.array([(1 - start) * a + start * b for a, b in zip(constant, z_t, strict=True)]))
        values.append(kl(target, softmax(z_s)))
    return mean(values)


def minifinetuning(
    student: Array,
    teacher: Array,
    *,
    labels: NDArray[np.int64],
    threshold: float = 0.2,
    temperature: float = 1.0,
    class_dim: int | None = None,
) -> float:
    """MFT: T^2 KL(corrected p_t || p_s), the label's lead corrected to the threshold; mean over the rows."""
    values = []
    for z_s, z_t, y in labelled(student, teacher, labels, class_dim):
        p = softmax(z_t / temperature)
        if p[y] == max(p):  # the teacher is right: surer by the threshold
            weight = (min(p[y] + threshold, 1.0) - p[y]) / (1 - p[y])
        else:
            weight = (max(p) - p[y] + threshold) / (1 + max(p) - p[y])
        corrected = np.array([(1 - weight) * p[c] + weight * (c == y) for c in range(len(p))])
        values.append(temperature**2 * kl(corrected, softmax(z_s / temperature)))
    return mean(values)


def localization(student: Array, teacher: Array, *, temperature: float = 10.0) -> float:
    """LD: T^2 KL over the bins of an edge, mean over the edges of all boxes."""
    pairs = softened(student, teacher, temperature, -1)
    return mean([temperature**2 * kl(p_t, p_s) for p_s, p_t in pairs])


def quality_focal(student: Array, teacher: Array, *, power: float = 1.0, class_dim: int = -1) -> float:
    """CrossKD: |sigmoid(s) - sigmoid(t)|^power times the binary cross entropy, mean over everything."""
    values = []
    for s, t in zip(student.ravel(), teacher.ravel(), strict=True):
        score, answer = 1 / (1 + math.exp(-s)), 1 / (1 + math.exp(-t))
        entropy = -answer * math.log(score) - (1 - answer) * math.log(1 - score)
        values.append(abs(score - answer) ** power * entropy)
    return mean(values)
