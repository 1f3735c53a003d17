"""Reference values of the losses on features, relations and attention: float64 loops from the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from oracle import Array, channel_axis, kl, rows, softmax


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
    for student_example, teacher_example in zip(student, teacher, strict=True):
        s, t = ([of_length_one(row) for row in channel_rows(example)] for example in (student_example, teacher_example))
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


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def unit_gram(vectors: Sequence[Array]) -> list[Array]:
    """The products of all pairs of vectors, each row divided by its length."""
    return [of_length_one(np.array([dot(a, b) for b in vectors])) for a in vectors]


def mean_square(a: Sequence[Array], b: Sequence[Array]) -> float:
    return float(
        np.mean([(x - y) ** 2 for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)])
    )


def similarity_preserving(student: Array, teacher: Array) -> float:
    """Tung and Mori 2019: mean squared difference of the row-normalised Gram matrices of the examples."""
    return mean_square(unit_gram(flat(student)), unit_gram(flat(teacher)))


def relational(student: Array, teacher: Array, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> float:
    """Park et al. 2019: Huber of distances in units of their mean, and of cosines of angles; all pairs and triples."""
    examples = range(len(student))
    ratios, cosines = [], []
    for rows_ in (flat(student), flat(teacher)):
        gaps = {(i, j): rows_[j] - rows_[i] for i in examples for j in examples}
        distance = {pair: math.sqrt(dot(gap, gap)) for pair, gap in gaps.items()}
        positive = [value for value in distance.values() if value > 0]
        mean = sum(positive) / len(positive) if positive else 1.0
        ratios.append({pair: value / mean for pair, value in distance.items()})
        cosine = {}
        for i in examples:
            for j in examples:
                for k in examples:
                    size = distance[i, j] * distance[i, k]
                    cosine[i, j, k] = dot(gaps[i, j], gaps[i, k]) / size if size > 0 else 0.0
        cosines.append(cosine)
    distances = [huber(ratios[0][pair] - ratios[1][pair]) for pair in ratios[0]]
    angles = [huber(cosines[0][triple] - cosines[1][triple]) for triple in cosines[0]]
    return distance_weight * sum(distances) / len(distances) + angle_weight * sum(angles) / len(angles)


def probabilistic_transfer(student: Array, teacher: Array) -> float:
    """Passalis and Tefas 2018 with the cosine kernel; eps 1e-7 in length and logarithm, mean over all pairs."""
    probabilities = []
    for feature in (student, teacher):
        vectors = [of_length_one(vector, eps=1e-7) for vector in flat(feature)]
        kernel = [np.array([(dot(a, b) + 1) / 2 for b in vectors]) for a in vectors]
        probabilities.append([row / sum(row) for row in kernel])
    total = 0.0
    for s_row, t_row in zip(*probabilities, strict=True):
        total += sum(float(t * math.log((t + 1e-7) / (s + 1e-7))) for s, t in zip(s_row, t_row, strict=True))
    return total / len(student) ** 2


def correlation_congruence(
    student: Array, teacher: Array, *, kernel: str = "gaussian", gamma: float = 0.4, order: int = 2
) -> float:
    """Peng et al. 2019: Taylor series of the Gaussian kernel of unit vectors; or products of neighbouring errors."""
    if kernel == "neighbour":
        errors = [abs(s - t) for s, t in zip(flat(student), flat(teacher), strict=True)]
        return sum(dot(error, following) for error, following in pairwise(errors)) / (len(errors) - 1)

    def series(vectors: Sequence[Array]) -> list[Array]:
        powers = range(order + 1)
        return [
            np.array(
                [
                    sum(math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * dot(a, b) ** p for p in powers)
                    for b in vectors
                ]
            )
            for a in vectors
        ]

    return mean_square(*(series([of_length_one(vector) for vector in flat(f)]) for f in (student, teacher)))


def inter_channel_correlation(student: Array, teacher: Array) -> float:
    """Liu et al. 2021: mean squared difference of the row-normalised Gram matrices of each example's channels."""
    values = [
        mean_square(unit_gram(channel_rows(s)), unit_gram(channel_rows(t)))
        for s, t in zip(student, teacher, strict=True)
    ]
    return sum(values) / len(values)


def attention_mse(student: Array, teacher: Array) -> float:
    """TinyBERT: mean squared difference of the scores, those of -100 or less set to 0."""
    pairs = zip(student.ravel(), teacher.ravel(), strict=True)
    return float(sum(((s if s > -100 else 0) - (t if t > -100 else 0)) ** 2 for s, t in pairs) / student.size)


def attention_kl(student: Array, teacher: Array) -> float:
    """MobileBERT: KL(softmax(t) | softmax(s)) over the keys, mean over examples, heads and queries."""
    pairs = list(zip(rows(student, -1), rows(teacher, -1), strict=True))
    return sum(kl(softmax(t), softmax(s)) for s, t in pairs) / len(pairs)


def attention_relation(student: Array, teacher: Array, *, relation_heads: int) -> float:
    """MiniLMv2: the same for the scaled products of the tokens' vectors, split into relation heads."""
    values = []
    for s_vectors, t_vectors in zip(student, teacher, strict=True):
        for head in range(relation_heads):
            for query in range(len(s_vectors)):
                relations = []
                for vectors in (s_vectors, t_vectors):
                    size = vectors.shape[1] // relation_heads
                    part = vectors[:, head * size : (head + 1) * size]
                    relations.append(softmax(np.array([dot(part[query], key) / math.sqrt(size) for key in part])))
                values.append(kl(relations[1], relations[0]))
    return sum(values) / len(values)


def pixel_relation(student: Array, teacher: Array, *, temperature: float = 0.1) -> float:
    """CIRKD: KL of the softmaxes of a pixel's cosines to an image's pixels, mean over pixels and pairs of images."""
    pixels = []  # for each model, for each image, the unit vectors of its pixels
    for feature in (student, teacher):
        axis = channel_axis(feature) - 1
        pixels.append([[of_length_one(vector) for vector in rows(image, axis)] for image in feature])
    values = []
    for i in range(len(student)):
        for j in range(len(student)):
            for p in range(len(pixels[0][0])):
                s, t = (
                    softmax(np.array([dot(images[i][p], other) / temperature for other in images[j]]))
                    for images in pixels
                )
                values.append(kl(t, s))
    return sum(values) / len(values)


def activation_boundary(student: Array, teacher: Array, *, margin: float = 1.0) -> float:
    """Heo et al. 2019: (s - m)^2 where t > 0 and s < m, (s + m)^2 where t <= 0 and s > -m; mean over all units."""
    total = 0.0
    for s, t in zip(student.ravel(), teacher.ravel(), strict=True):
        if t > 0 and s < margin:
            total += (s - margin) ** 2
        if t <= 0 and s > -margin:
            total += (s + margin) ** 2
    return float(total / student.size)


def margin_relu(student: Array, teacher: Array, *, margins: Sequence[float]) -> float:
    """Heo et al. 2019: 0 where s <= t <= 0, else (s - t)^2, with t no less than its channel's margin; mean."""
    total = 0.0
    for s, t in zip(rows(student, None), rows(teacher, None), strict=True):
        for a, b, margin in zip(s, t, margins, strict=True):
            b = max(float(b), margin)
            total += 0.0 if a <= b <= 0 else (float(a) - b) ** 2
    return total / student.size


def hierarchical_context(student: Array, teacher: Array, *, levels: Sequence[int] = (4, 2, 1)) -> float:
    """Chen et al. 2021: mean squares of the maps and of averages over l x l cells, with weights 1, 1/2, 1/4 ..."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        difference = np.moveaxis(s - t, channel_axis(student) - 1, 0)
        sizes = difference.shape[1:]
        squares, weights = float((difference**2).mean()), 1.0
        for index, level in enumerate(level for level in levels if level < max(sizes)):
            cells = [min(level, size) for size in sizes]
            means = []
            for channel in difference:
                for cell in np.ndindex(*cells):
                    part = [
                        slice(i * size // count, math.ceil((i + 1) * size / count))
                        for i, size, count in zip(cell, sizes, cells, strict=True)
                    ]
                    means.append(float(channel[tuple(part)].mean()))
            squares += 0.5 ** (index + 1) * sum(mean**2 for mean in means) / len(means)
            weights += 0.5 ** (index + 1)
        total += squares / weights
    return total / len(student)


def solution_flow(student: Array, teacher: Array) -> float:
    """Yim et al. 2017: mean squared difference of G = F1 F2^T / P; the two layers are parts of the channels."""
    values = []
    for student_example, teacher_example in zip(student, teacher, strict=True):
        products = []
        for example in (student_example, teacher_example):
            channels = channel_rows(example)
            first, second = channels[: -(-len(channels) // 2)], channels[-(-len(channels) // 2) :]
            products.append([dot(a, b) / len(a) for a in first for b in second])
        values.append(sum((s - t) ** 2 for s, t in zip(*products, strict=True)) / len(products[0]))
    return sum(values) / len(values)
