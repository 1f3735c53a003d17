"""Distances of two models' probabilities on spans of text, each of them several tokens of either model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_distill.functional.inputs import prepare
from lightning_distill.functional.primitives import softened
from lightning_distill.functional.vocabularies import rank_differences

_CHUNK = 2**22  # elements of a vocabulary's rows at a time


class SpanRows(NamedTuple):
    """The tokens of some spans and the logits that predict them, in the order of the text.

    Attributes:
        logits: The row that predicts each token, shape ``(K, V)``.
        tokens: The tokens, shape ``(K,)``.
        spans: The span of each token, from 0; each span is a run of at least one token, shape ``(K,)``.
    """

    logits: Tensor
    tokens: Tensor
    spans: Tensor


def universal_logit_of_spans(student: SpanRows, teacher: SpanRows, number: int, *, temperature: float = 1.0) -> Tensor:
    r"""The distance of sorted probabilities between the two models' distributions at the end of each span.

    By the chain rule the probability that a span of the tokens :math:`x_1 \dots x_n` ends with v instead is

    .. math:: p(x_1 \dots x_{n-1}, v) = p(v \mid x_1 \dots x_{n-1}) \prod_{i < n} p(x_i \mid x_1 \dots x_{i-1})

    so the last row is multiplied by the probabilities of the earlier tokens. Every row is the one that predicts its
    token, at the position before it. For a span of one token on both sides it is :func:`universal_logit`.

    Args:
        student: The student's tokens.
        teacher: The teacher's tokens of the same spans.
        number: Number of spans M.
        temperature: Softening of both distributions, greater than 0.

    Returns:
        Distance from 0 to 2, shape ``(M,)``.

    Example:
        >>> student = SpanRows(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0]), torch.tensor([0]))
        >>> teacher = SpanRows(torch.tensor([[1.0, 3.0], [0.0, 2.0]]), torch.tensor([1, 0]), torch.tensor([0, 0]))
        >>> universal_logit_of_spans(student, teacher, 1)
        tensor([0.3403])
    """
    rows, before = _ends(student, number, temperature)
    teacher_rows, teacher_before = _ends(teacher, number, temperature)
    function: Any = _SpanDistance.apply  # which torch leaves without types
    values: Tensor = function(rows, *prepare(before, teacher_before), teacher_rows.detach(), temperature)
    return values


def chunk_likelihood(student: SpanRows, teacher: SpanRows, number: int, *, temperature: float = 100.0) -> Tensor:
    r"""Divergence of the two models' likelihoods of each span, as a choice between the span and any other text.

    .. math:: \mathrm{KL}(p_t^{1/T} \,\|\, p_s^{1/T}) + \mathrm{KL}(1 - p_t^{1/T} \,\|\, 1 - p_s^{1/T})

    where KL(a ‖ b) is a log(a / b) and p is the product of the probabilities of the span's tokens. Spans of several
    tokens have small likelihoods; the temperature brings them away from 0.

    Args:
        student: The student's tokens.
        teacher: The teacher's tokens of the same spans.
        number: Number of spans M.
        temperature: Root that is taken of the likelihoods, greater than 0.

    Returns:
        Divergence in nats, shape ``(M,)``.

    Example:
        >>> student = SpanRows(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0]), torch.tensor([0]))
        >>> teacher = SpanRows(torch.tensor([[1.0, 3.0], [0.0, 2.0]]), torch.tensor([1, 0]), torch.tensor([0, 0]))
        >>> chunk_likelihood(student, teacher, 1, temperature=1.0)
        tensor([0.6863])
    """
    likelihoods = []
    for side in _prepared(student, teacher):
        log_probabilities = _of_tokens(side.logits.log_softmax(-1), side)
        summed = log_probabilities.new_zeros(number).index_add(0, side.spans, log_probabilities)
        # a likelihood of 1 leaves nothing to any other text, whose logarithm would be infinite
        likelihoods.append(summed.clamp(max=-torch.finfo(summed.dtype).eps) / temperature)
    log_student, log_teacher = likelihoods
    rest_student, rest_teacher = (-torch.expm1(each) for each in likelihoods)
    apart = log_teacher.exp() * (log_teacher - log_student)
    return apart + rest_teacher * (rest_teacher.log() - rest_student.log())


def _prepared(student: SpanRows, teacher: SpanRows) -> tuple[SpanRows, SpanRows]:
    student_logits, teacher_logits = prepare(student.logits, teacher.logits)
    sides = ((student, student_logits), (teacher, teacher_logits))
    first, second = (side._replace(logits=softened(logits, 1.0)) for side, logits in sides)
    return first, second


def _of_tokens(log_probabilities: Tensor, side: SpanRows) -> Tensor:
    return log_probabilities.gather(-1, side.tokens[:, None]).squeeze(-1)


def _ends(side: SpanRows, number: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The rows that predict the last token of each span, and the logarithm of the probability of those before it."""
    last = torch.ones_like(side.spans, dtype=torch.bool)
    last[:-1] = side.spans[1:] != side.spans[:-1]
    logits, _ = prepare(side.logits[~last], side.logits[:0])
    earlier = SpanRows(logits, side.tokens[~last], side.spans[~last])
    log_probabilities = _of_tokens(softened(logits, temperature).log_softmax(-1), earlier)
    return side.logits[last], log_probabilities.new_zeros(number).index_add(0, earlier.spans, log_probabilities)


class _SpanDistance(torch.autograd.Function):
    """The distance of sorted rows of probabilities, a few rows at a time; its gradient is made on the way.

    Autograd would keep the probabilities, their order in 64 bits and the sorted rows. This keeps the gradient alone.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, before: Tensor, teacher_before: Tensor, teacher_rows: Tensor, temperature: float
    ) -> Tensor:
        values, gradient = torch.empty_like(before), torch.empty_like(rows)
        slopes, classes = torch.empty_like(before), rows.shape[-1]
        step = max(1, _CHUNK // max(classes, teacher_rows.shape[-1]))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            alone = softened(rows[part].to(before.dtype), temperature).softmax(-1)
            joint = alone * before[part, None].exp()
            teacher = softened(teacher_rows[part].to(before.dtype), temperature).softmax(-1)
            ranked, order = joint.sort(dim=-1, descending=True)
            apart = rank_differences(
                ranked, teacher.mul_(teacher_before[part, None].exp()).sort(descending=True).values
            )
            values[part] = apart.abs().sum(-1)
            joint.mul_(torch.empty_like(joint).scatter_(-1, order, apart[:, :classes].sign()))
            slopes[part] = joint.sum(-1)
            gradient[part] = (joint - alone * slopes[part, None]) / temperature
        ctx.save_for_backward(gradient, slopes)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        gradient, slopes = ctx.saved_tensors
        return gradient * factor[:, None].to(gradient.dtype), slopes * factor, None, None, None
