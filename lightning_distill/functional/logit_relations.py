"""Formulas on how rows and columns of the models' probabilities relate: student first, no gradient into the teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, prepare_logits, reduced
from lightning_distill.functional.kernels.plain import kl_from_logs
from lightning_distill.functional.primitives import gram, softened, sum_of_squares

__all__ = [
    "batch_correlation",
    "class_correlation",
    "inter_class_relation",
    "intra_class_relation",
    "multi_level_logits",
]

_CORRELATION_EPS = 1e-8


def inter_class_relation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""One minus the correlation of the two models' probabilities of an example, over the classes.

    .. math:: T^2 (1 - \rho(p^s_n, p^t_n)), \qquad \rho(a, b) = \frac{(a - \bar a) \cdot (b - \bar b)}
        {\|a - \bar a\| \, \|b - \bar b\|}, \qquad p = \mathrm{softmax}(z / T)

    The student need not match the teacher's probabilities, only how they compare with each other: a strong teacher is
    easier to follow.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        From 0 to 2 times :math:`T^2`, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[0.0, 1.0, 2.0]])
        >>> inter_class_relation(student, teacher)
        tensor([1.5000])

    References:
        Huang et al. 2022 (DIST), equation 8, arXiv:2205.10536; 1e-8 is added to the product of norms. Deviation:
        probabilities that are constant up to rounding are centred but not divided, because the gradient would be
        noise divided by 1e-8; their correlation counts as 0.
    """
    student, teacher, counts = _probabilities(student_logits, teacher_logits, temperature, class_dim, mask)
    return reduced(_uncorrelated(student, teacher, -1), counts, reduction) * temperature**2


def intra_class_relation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    class_dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""One minus the correlation of the two models' probabilities of a class, over the examples; mean of the classes.

    .. math:: \frac{T^2}{C} \sum_c (1 - \rho(p^s_{:,c}, p^t_{:,c})), \qquad p = \mathrm{softmax}(z / T)

    It compares which examples of the batch look most like a class. A batch of one example has the value :math:`T^2` and
    the gradient 0.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.

    Returns:
        A scalar from 0 to 2 times :math:`T^2`: the whole batch is compared, each pixel of a dense map as an example.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
        >>> intra_class_relation(student, teacher)
        tensor(0.6667)

    References:
        Huang et al. 2022 (DIST), equation 9, arXiv:2205.10536; as in :func:`inter_class_relation`.
    """
    student, teacher, counts = _matrices(student_logits, teacher_logits, temperature, class_dim, mask)
    return temperature**2 * _between_rows(student, teacher, counts)


def inter_and_intra_class_relation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    class_dim: int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean of :func:`inter_class_relation` and :func:`intra_class_relation`, with one softmax for both.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.

    Returns:
        Two scalars.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.
    """
    student, teacher, counts = _matrices(student_logits, teacher_logits, temperature, class_dim, mask)
    inter = reduced(_uncorrelated(student, teacher, 1), counts, "mean")
    return temperature**2 * inter, temperature**2 * _between_rows(student, teacher, counts)


def batch_correlation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    class_dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Squared difference of the two models' products between the examples of a batch.

    .. math:: \frac{1}{N} \| P_s P_s^\top - P_t P_t^\top \|_F^2, \qquad P = \mathrm{softmax}(z / T)

    It compares which examples a model finds alike. Memory grows with the square of the number of rows; in a dense map
    each pixel is a row.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.

    Returns:
        A scalar: the whole batch is compared.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
        >>> batch_correlation(student, teacher)
        tensor(0.0919)

    References:
        Jin, Wang and Lin 2023, "Batch-level Alignment" in section 3, CVPR.
    """
    student, teacher, counts = _matrices(student_logits, teacher_logits, temperature, class_dim, mask)
    return _batch_products(student, teacher, counts)


def class_correlation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    class_dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Squared difference of the two models' products between the classes.

    .. math:: \frac{1}{C} \| P_s^\top P_s - P_t^\top P_t \|_F^2, \qquad P = \mathrm{softmax}(z / T)

    It compares which classes a model finds likely together. The products are summed over the batch, so the value grows
    with its size.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.

    Returns:
        A scalar: the whole batch is compared.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
        >>> class_correlation(student, teacher)
        tensor(0.2621)

    References:
        Jin, Wang and Lin 2023, "Class-level Alignment" in section 3, CVPR.
    """
    student, teacher, counts = _matrices(student_logits, teacher_logits, temperature, class_dim, mask)
    return _class_products(student, teacher, counts)


def multi_level_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    class_dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Divergence of each example, of the batch's products and of the classes', averaged over several temperatures.

    .. math:: \frac{1}{K} \sum_T \left( \frac{T^2}{N} \sum_n \mathrm{KL}(p^t_n \| p^s_n)
        + \frac{1}{N} \| P_s P_s^\top - P_t P_t^\top \|_F^2 + \frac{1}{C} \| P_s^\top P_s - P_t^\top P_t \|_F^2 \right)

    Several temperatures cover the teacher's first choices and its faint preferences together. The parts are
    :func:`soft_target_kl`, :func:`batch_correlation` and :func:`class_correlation`.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperatures: The K temperatures, each greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.

    Returns:
        A scalar: the whole batch is compared.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, ``temperatures`` is empty or one is not
            greater than 0.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
        >>> multi_level_logits(student, teacher)
        tensor(0.8134)

    References:
        Jin, Wang and Lin 2023, section 3, CVPR; deviations: the mean over the temperatures, where the paper has the
        sum; :math:`T^2` and the mean over the examples in the divergence, as in the authors' code; but without that
        code's two views of each image and its masks of confidence.
    """
    checks.positives("temperatures", temperatures)
    student_rows, teacher_rows, dim, counts = prepare_logits(student_logits, teacher_logits, class_dim, mask=mask)
    student_rows, teacher_rows = (rows.movedim(dim, -1).flatten(0, -2) for rows in (student_rows, teacher_rows))
    counts = None if counts is None else counts.flatten()
    # The temperatures become the first dimension: a kernel does all of them at once.
    divisors = student_rows.new_tensor(list(temperatures)).view(-1, 1, 1)
    log_student, log_teacher = (
        F.log_softmax(softened(rows, 1.0, counts) / divisors, dim=-1) for rows in (student_rows, teacher_rows)
    )
    divergences = kl_from_logs(log_teacher, log_student, -1) * divisors.squeeze(-1).square()
    each = None if counts is None else counts.expand(len(temperatures), -1)
    student, teacher = log_student.exp(), log_teacher.exp()
    products = _batch_products(student, teacher, counts) + _class_products(student, teacher, counts)
    return reduced(divergences, each, "mean") + products / len(temperatures)


def _probabilities(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, class_dim: int | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    checks.temperature(temperature)
    student, teacher, dim, counts = prepare_logits(student_logits, teacher_logits, class_dim, mask=mask)
    student, teacher = (
        F.softmax(softened(logits.movedim(dim, -1), temperature, counts), dim=-1) for logits in (student, teacher)
    )
    return student, teacher, counts


def _matrices(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, class_dim: int | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One row of probabilities for each row of logits, and which of them count."""
    student, teacher, counts = _probabilities(student_logits, teacher_logits, temperature, class_dim, mask)
    return student.flatten(0, -2), teacher.flatten(0, -2), None if counts is None else counts.flatten()


def _batch_products(student: Tensor, teacher: Tensor, counts: Tensor | None) -> Tensor:
    student, teacher = _only(student, counts), _only(teacher, counts)
    return F.mse_loss(gram(student), gram(teacher), reduction="sum") / _number(student, counts)


def _class_products(student: Tensor, teacher: Tensor, counts: Tensor | None) -> Tensor:
    student, teacher = _only(student, counts), _only(teacher, counts)
    return F.mse_loss(gram(student.mT), gram(teacher.mT), reduction="sum") / student.shape[-1]


def _between_rows(student: Tensor, teacher: Tensor, counts: Tensor | None) -> Tensor:
    """One minus the correlation over the rows that count, averaged over the classes; 0 where no row counts."""
    values = _uncorrelated(student, teacher, 0, counts).mean()
    return values if counts is None else torch.where(counts.any(), values, 0.0)


def _only(rows: Tensor, counts: Tensor | None) -> Tensor:
    return rows if counts is None else torch.where(counts[:, None], rows, 0.0)


def _number(rows: Tensor, counts: Tensor | None) -> Tensor | int:
    return rows.shape[-2] if counts is None else counts.sum().clamp(min=1)


def _uncorrelated(student: Tensor, teacher: Tensor, dim: int, counts: Tensor | None = None) -> Tensor:
    """One minus the correlation; over the rows that count, where ``dim`` is that of the rows."""
    (student, norm_student), (teacher, norm_teacher) = (_centred(values, dim, counts) for values in (student, teacher))
    return 1 - (student * teacher).sum(dim=dim) / (norm_student * norm_teacher + _CORRELATION_EPS)


def _centred(values: Tensor, dim: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    values = _only(values, counts)
    number = values.shape[dim] if counts is None else counts.sum().clamp(min=1)
    mean = values.mean(dim=dim, keepdim=True) if counts is None else values.sum(dim=dim, keepdim=True) / number
    centred = _only(values - mean, counts)
    squares = sum_of_squares(centred, dim).squeeze(dim)
    rounding = (4 * torch.finfo(values.dtype).eps * number**0.5) * mean.detach().squeeze(dim)
    return centred, torch.where(squares <= rounding.square(), 1.0, squares).sqrt()
