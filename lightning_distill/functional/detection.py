"""Formulas for detectors, on the scores of boxes and on feature maps with boxes: no gradient into the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, prepare, prepare_logits, reduced
from lightning_distill.functional.primitives import LEAST_SCORE, precise, softened
from lightning_distill.functional.vectors import over_examples, positions_mask, without

__all__ = ["focal_global", "foreground_weights", "quality_focal"]

Context = Callable[[Tensor, "Tensor | None"], Tensor]


def quality_focal(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    power: float = 1.0,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Binary cross entropy of each class under the teacher's scores, weighed by the distance between the scores.

    .. math:: -\frac{1}{C} \sum_c |s^s_c - s^t_c|^\beta
        \left( s^t_c \log s^s_c + (1 - s^t_c) \log (1 - s^s_c) \right), \qquad s = \sigma(z)

    For detectors that answer each class with yes or no at very many places: the places where both models agree on the
    background, which are most, count little.

    Args:
        student_logits: Scores before the sigmoid, shape ``(N, ..., C)`` (classes at ``class_dim``).
        teacher_logits: The teacher's scores for the same inputs, same shape.
        power: The exponent of the distance, at least 1.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Weighed cross entropy in nats, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, or the power is less than 1.

    Example:
        >>> quality_focal(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]]))
        tensor([0.1215])

    References:
        Wang et al. 2023 (CrossKD), arXiv:2306.11369, the term on the class scores, with a power of 1; the form is the
        quality focal loss of Li et al. 2020, equation 3, arXiv:2006.04388. The distance has a gradient too.
    """
    checks.at_least("power", power, 1)
    student, teacher, dim, counts = prepare_logits(student_logits, teacher_logits, class_dim, mask=mask, at_least=1)
    student, teacher = (softened(logits, 1.0, counts, dim) for logits in (student, teacher))
    answers = teacher.sigmoid()
    entropies = F.binary_cross_entropy_with_logits(student, answers, reduction="none")
    values = (student.sigmoid() - answers).abs().pow(power) * entropies
    return reduced(values.mean(dim=dim), counts, reduction)


def foreground_weights(
    boxes: Sequence[Tensor] | Tensor, image_size: tuple[int, int], map_size: tuple[int, int]
) -> Tensor:
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
        >>> foreground_weights([torch.tensor([[0.0, 0.0, 8.0, 16.0]])], (16, 16), (2, 4))
        tensor([[[0.2500, 0.2500, 0.0000, 0.0000],
                 [0.2500, 0.2500, 0.0000, 0.0000]]])

    References:
        Yang et al. 2022 (FGD), equations 2 and 3, arXiv:2111.11837. The authors' code takes one more position at the
        right and at the bottom of each box.
    """
    return torch.stack([_of_image(each, image_size, map_size) for each in boxes])


def _of_image(boxes: Tensor, image_size: tuple[int, int], map_size: tuple[int, int]) -> Tensor:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        expected = "`boxes` to have left, top, right and bottom of each box, shape (M, 4) for each image"
        raise ValueError(checks.message(expected, f"shape {tuple(boxes.shape)}"))
    boxes = boxes.float() if boxes.dtype != torch.float64 else boxes
    height, width = map_size
    inside = []
    for low, high, size, positions in ((1, 3, image_size[0], height), (0, 2, image_size[1], width)):
        first = torch.arange(positions, device=boxes.device)
        start, stop = (boxes[:, edge, None] * positions / size for edge in (low, high))
        inside.append((start < first + 1) & (stop > first) & (stop > start))
    rows, columns = inside
    areas = rows.sum(1) * columns.sum(1)
    weights = (rows[:, :, None] & columns[:, None, :]) / areas.clamp(min=1)[:, None, None]
    empty = weights.new_zeros(1, height, width)
    return torch.cat([weights, empty]).amax(0)


def focal_global(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    *,
    student_context: Context,
    teacher_context: Context,
    temperature: float = 0.5,
    foreground_weight: float = 1e-3,
    background_weight: float = 5e-4,
    attention_weight: float = 1e-3,
    context_weight: float = 5e-6,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Differences of two feature maps inside and outside of boxes, where the teacher looks, and of their contexts.

    .. math:: \sum_{p,c} (\alpha w_p + \beta b_p) A^t_p C^t_c (f^s_{pc} - f^t_{pc})^2
        + \gamma \Big( \sum_p |A^s_p - A^t_p| + \sum_c |C^s_c - C^t_c| \Big)
        + \lambda \sum_{p,c} \left( G^s(f^s) - G^t(f^t) \right)_{pc}^2

    .. math:: A_p = P \, \mathrm{softmax}_p \Big( \frac{1}{T C} \sum_c |f_{pc}| \Big), \qquad
        C_c = C \, \mathrm{softmax}_c \Big( \frac{1}{T P} \sum_p |f_{pc}| \Big)

    The weight :math:`w_p` is that of :func:`foreground_weights`; :math:`b_p` is one over the number of positions
    outside all boxes, and 0 inside. The sums make values large: the weights are small.

    Args:
        student: The student's map, shape ``(N, C, H, W)``, with P = H W positions.
        teacher: The teacher's map, same shape.
        foreground: Weight of each position, 0 outside all boxes, shape ``(N, H, W)``.
        student_context: The learned context :math:`G^s`: a function of the map and of the mask of its positions (or
            None) that returns a map of the same shape.
        teacher_context: The same for the teacher.
        temperature: Softening of both attentions, greater than 0.
        foreground_weight: The factor :math:`\alpha`, 0 or greater.
        background_weight: The factor :math:`\beta`, 0 or greater.
        attention_weight: The factor :math:`\gamma`, 0 or greater.
        context_weight: The factor :math:`\lambda`, 0 or greater.
        mask: True where an example or a position counts, shape ``(N,)`` or ``(N, H, W)``; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for their mean.

    Returns:
        Sum over the example's numbers, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor, or a setting is not a number.
        ValueError: If the shapes differ or are not those of maps, or a setting is out of its range.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 0.0]]]])
        >>> same = lambda feature, positions: feature
        >>> boxes = torch.tensor([[[1.0, 0.0]]])
        >>> weights = {"foreground_weight": 1.0, "attention_weight": 0.0, "context_weight": 0.0}
        >>> focal_global(student, teacher, boxes, student_context=same, teacher_context=same, **weights)
        tensor([7.9802])

    References:
        Yang et al. 2022 (FGD), equations 2 to 11, arXiv:2111.11837, with the weights that its code has for RetinaNet;
        there each level of the pyramid is added, and the batch averaged.
    """
    checks.positive("temperature", temperature)
    weights = {"foreground_weight": foreground_weight, "background_weight": background_weight}
    weights |= {"attention_weight": attention_weight, "context_weight": context_weight}
    for name, weight in weights.items():
        checks.non_negative(name, weight)
    student, teacher = prepare(student, teacher)
    checks.same_shape(student, teacher, remedy="Map the student's feature to the teacher's shape with an adapter.")
    if student.ndim != 4:
        raise ValueError(checks.message("`student` to be a map (N, C, H, W)", f"shape {tuple(student.shape)}"))
    shape = (len(student), *student.shape[2:])
    if tuple(foreground.shape) != shape:
        expected = f"`foreground` to have a weight for each position, shape {shape}"
        raise ValueError(checks.message(expected, f"shape {tuple(foreground.shape)}"))
    positions = positions_mask(mask, student)
    student, teacher = without(student, positions), without(teacher, positions)
    counts = torch.ones_like(foreground, dtype=torch.bool) if positions is None else positions
    foreground = torch.where(counts, foreground, 0.0).to(student.dtype)
    outside = counts & (foreground == 0)
    background = outside.to(student.dtype) / outside.flatten(1).sum(1).clamp(min=1)[:, None, None]

    (student_places, student_channels), (teacher_places, teacher_channels) = (
        _attentions(feature, counts, temperature) for feature in (student, teacher)
    )
    squares = (student - teacher).square() * teacher_channels[:, :, None, None]
    at_places = foreground_weight * foreground + background_weight * background
    values = (squares.sum(1) * teacher_places * at_places).flatten(1).sum(1)
    apart = (student_places - teacher_places).abs().flatten(1).sum(1)
    values = values + attention_weight * (apart + (student_channels - teacher_channels).abs().sum(1))
    contexts = precise(lambda feature: student_context(feature, positions), student)
    contexts = contexts - precise(lambda feature: teacher_context(feature, positions), teacher)
    values = values + context_weight * without(contexts, positions).square().flatten(1).sum(1)
    return over_examples(values, positions, reduction)


def _attentions(feature: Tensor, counts: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The attention of the positions ``(N, H, W)`` and of the channels ``(N, C)``; their means are 1."""
    sizes = feature.abs()
    number = counts.flatten(1).sum(1, keepdim=True).clamp(min=1).to(feature.dtype)
    scores = (sizes.mean(1) / temperature).masked_fill(~counts, LEAST_SCORE).flatten(1)
    places = (number * scores.softmax(1)).view_as(counts) * counts
    channels = feature.shape[1] * (sizes.flatten(2).sum(2) / (number * temperature)).softmax(1)
    return places, channels * counts.flatten(1).any(1, keepdim=True)
