"""Formulas for detectors, on the scores of boxes and on feature maps with boxes: no gradient into the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import log_odds, prepare, prepare_logits, prepare_number, prepare_temperature
from keras_distill.functional.vectors import flattened

__all__ = ["focal_global", "foreground_weights", "quality_focal"]


def quality_focal(student_logits: Any, teacher_logits: Any, *, power: Any = 1.0, from_logits: bool = True) -> Any:
    r"""Binary cross entropy of each class under the teacher's scores, weighed by the distance between the scores.

    .. math:: -\frac{1}{C} \sum_c |s^s_c - s^t_c|^\beta
        \left( s^t_c \log s^s_c + (1 - s^t_c) \log (1 - s^s_c) \right), \qquad s = \sigma(z)

    For detectors that answer each class with yes or no at very many places: the places where both models agree on the
    background, which are most, count little.

    Args:
        student_logits: Scores before the sigmoid, shape ``(N, ..., C)``.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        power: The exponent of the distance, at least 1; a scalar variable may be changed while training.
        from_logits: Whether these are logits; if False they are probabilities of a sigmoid and z is the logarithm of
            their odds.

    Returns:
        Weighed cross entropy in nats, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, or the power is less than 1.

    Example:
        >>> round(float(quality_focal([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]])[0]), 4)
        0.1215

    References:
        Wang et al. 2023 (CrossKD), arXiv:2306.11369, the term on the class scores, with a power of 1; the form is the
        quality focal loss of Li et al. 2020, equation 3, arXiv:2006.04388. The distance has a gradient too.
    """
    checks.boolean("from_logits", from_logits)
    student, teacher = prepare_logits(student_logits, teacher_logits, at_least=1)
    power = prepare_number("power", power, student, lambda name, value: checks.at_least(name, value, 1))
    if not from_logits:
        student, teacher = log_odds(student), log_odds(teacher)
    yes = ops.sigmoid(teacher) * ops.log_sigmoid(student)
    no = ops.sigmoid(-teacher) * ops.log_sigmoid(-student)
    distances = ops.abs(ops.sigmoid(student) - ops.sigmoid(teacher))
    return -ops.mean(ops.power(distances, power) * (yes + no), axis=-1)


def foreground_weights(boxes: Sequence[Any] | Any, image_size: tuple[int, int], map_size: tuple[int, int]) -> Any:
    r"""Weight of each position of a feature map: one over the area of the smallest box on it, 0 outside all boxes.

    .. math:: w_{ij} = \max_{r \ni (i, j)} \frac{1}{H_r W_r}

    So each object counts equally, however large it is. A position is in a box if they overlap.

    Args:
        boxes: The boxes of each image in pixels, a tensor ``(M, 4)`` of left, top, right and bottom for each, or one
            tensor ``(N, M, 4)``. Boxes without an area do not count.
        image_size: Height and width of the images in pixels.
        map_size: Height H and width W of the map.

    Returns:
        Shape ``(N, H, W)``, with :math:`H_r W_r` in positions of the map.

    Raises:
        ValueError: If the boxes do not have four numbers.

    Example:
        >>> weights = foreground_weights([[[0.0, 0.0, 8.0, 16.0]]], (16, 16), (2, 4))
        >>> [float(weight) for weight in weights[0, 0]]
        [0.25, 0.25, 0.0, 0.0]

    References:
        Yang et al. 2022 (FGD), equations 2 and 3, arXiv:2111.11837. The authors' code takes one more position at the
        right and at the bottom of each box.
    """
    if ops.is_tensor(boxes):
        return _of_images(boxes, image_size, map_size)
    # images have different numbers of boxes
    each = [_of_images(ops.expand_dims(ops.convert_to_tensor(corners), 0), image_size, map_size) for corners in boxes]
    return ops.concatenate(each, axis=0)


def _of_images(boxes: Any, image_size: tuple[int, int], map_size: tuple[int, int]) -> Any:
    if len(boxes.shape) != 3 or boxes.shape[-1] != 4:
        expected = "`boxes` to have left, top, right and bottom of each box, shape (M, 4) for each image"
        raise ValueError(checks.message(expected, f"shape {tuple(boxes.shape)[1:]}"))
    boxes = ops.cast(boxes, "float32")
    inside = []
    for low, high, size, positions in ((1, 3, image_size[0], map_size[0]), (0, 2, image_size[1], map_size[1])):
        first = ops.arange(positions, dtype="float32")
        start, stop = (boxes[:, :, edge, None] * positions / size for edge in (low, high))
        overlaps = ops.logical_and(start < first + 1, stop > first)
        inside.append(ops.cast(ops.logical_and(overlaps, stop > start), "float32"))
    rows, columns = inside
    areas = ops.maximum(ops.sum(rows, axis=-1) * ops.sum(columns, axis=-1), 1)
    weights = rows[:, :, :, None] * columns[:, :, None, :] / areas[:, :, None, None]
    return ops.max(ops.pad(weights, ((0, 0), (0, 1), (0, 0), (0, 0))), axis=1)  # one more, for images without boxes


def focal_global(
    student: Any,
    teacher: Any,
    foreground: Any,
    *,
    student_context: Callable[[Any], Any],
    teacher_context: Callable[[Any], Any],
    temperature: Any = 0.5,
    foreground_weight: Any = 1e-3,
    background_weight: Any = 5e-4,
    attention_weight: Any = 1e-3,
    context_weight: Any = 5e-6,
) -> Any:
    r"""Differences of two feature maps inside and outside of boxes, where the teacher looks, and of their contexts.

    .. math:: \sum_{p,c} (\alpha w_p + \beta b_p) A^t_p C^t_c (f^s_{pc} - f^t_{pc})^2
        + \gamma \Big( \sum_p |A^s_p - A^t_p| + \sum_c |C^s_c - C^t_c| \Big)
        + \lambda \sum_{p,c} \left( G^s(f^s) - G^t(f^t) \right)_{pc}^2

    .. math:: A_p = P \, \mathrm{softmax}_p \Big( \frac{1}{T C} \sum_c |f_{pc}| \Big), \qquad
        C_c = C \, \mathrm{softmax}_c \Big( \frac{1}{T P} \sum_p |f_{pc}| \Big)

    The weight :math:`w_p` is that of :func:`foreground_weights`; :math:`b_p` is one over the number of positions
    outside all boxes, and 0 inside. The sums make values large: the weights are small.

    Args:
        student: The student's map, shape ``(N, H, W, C)``, with P = H W positions.
        teacher: The teacher's map, same shape.
        foreground: Weight of each position, 0 outside all boxes, shape ``(N, H, W)``.
        student_context: The learned context :math:`G^s`: a function of the map that returns a map of the same shape.
        teacher_context: The same for the teacher.
        temperature: Softening of both attentions, greater than 0.
        foreground_weight: The factor :math:`\alpha`, 0 or greater.
        background_weight: The factor :math:`\beta`, 0 or greater.
        attention_weight: The factor :math:`\gamma`, 0 or greater.
        context_weight: The factor :math:`\lambda`, 0 or greater.

    Returns:
        Sum over the example's numbers, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor, or a setting is not a number.
        ValueError: If the shapes differ or are not those of maps, or a setting is out of its range.

    Example:
        >>> student, teacher = [[[[1.0], [2.0]]]], [[[[3.0], [0.0]]]]
        >>> same = lambda feature: feature
        >>> weights = {"foreground_weight": 1.0, "attention_weight": 0.0, "context_weight": 0.0}
        >>> value = focal_global(
        ...     student, teacher, [[[1.0, 0.0]]], student_context=same, teacher_context=same, **weights
        ... )
        >>> round(float(value[0]), 4)
        7.9802

    References:
        Yang et al. 2022 (FGD), equations 2 to 11, arXiv:2111.11837, with the weights that its code has for RetinaNet;
        there each level of the pyramid is added, and the batch averaged.
    """
    student, teacher = prepare(student, teacher)
    checks.same_shape(
        student, teacher, names=("student", "teacher"), remedy="Map the student's feature with an adapter."
    )
    if len(student.shape) != 4:
        raise ValueError(checks.message("`student` to be a map (N, H, W, C)", f"shape {tuple(student.shape)}"))
    foreground = ops.cast(ops.convert_to_tensor(foreground), student.dtype)
    if len(foreground.shape) != 3 or checks.shapes_differ(tuple(foreground.shape), tuple(student.shape)[:3]):
        expected = f"`foreground` to have a weight for each position, shape {tuple(student.shape)[:3]}"
        raise ValueError(checks.message(expected, f"shape {tuple(foreground.shape)}"))
    temperature = prepare_temperature(temperature, student)
    weights = {"foreground_weight": foreground_weight, "background_weight": background_weight}
    weights |= {"attention_weight": attention_weight, "context_weight": context_weight}
    inside, outside, attention, context = (
        prepare_number(name, value, student, checks.non_negative) for name, value in weights.items()
    )
    background = ops.cast(foreground == 0, student.dtype)
    background = background / ops.maximum(ops.sum(background, axis=(1, 2), keepdims=True), 1)

    (student_places, student_channels), (teacher_places, teacher_channels) = (
        _attentions(feature, temperature) for feature in (student, teacher)
    )
    squares = ops.sum(ops.square(student - teacher) * teacher_channels[:, None, None, :], axis=-1)
    at_places = teacher_places * flattened(inside * foreground + outside * background, 1)
    values = ops.sum(flattened(squares, 1) * at_places, axis=-1)
    apart = ops.sum(ops.abs(student_places - teacher_places), axis=-1)
    values = values + attention * (apart + ops.sum(ops.abs(student_channels - teacher_channels), axis=-1))
    contexts = ops.cast(student_context(student) - teacher_context(teacher), values.dtype)
    return values + context * ops.sum(ops.square(contexts), axis=(1, 2, 3))


def _attentions(feature: Any, temperature: Any) -> tuple[Any, Any]:
    """The attention of the positions ``(N, P)`` and of the channels ``(N, C)``; their means are 1."""
    sizes = ops.abs(feature)
    places = flattened(ops.mean(sizes, axis=-1), 1)
    channels = ops.mean(sizes, axis=(1, 2))
    places, channels = (
        ops.cast(ops.shape(means)[1], feature.dtype) * _softmax(means / temperature) for means in (places, channels)
    )
    return places, channels


def _softmax(scores: Any) -> Any:
    """The softmax over the last dimension, which may have one number alone: ``ops.softmax`` warns of that."""
    return ops.exp(scores - ops.logsumexp(scores, axis=-1, keepdims=True))
