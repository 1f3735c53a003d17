"""Divergence of two models' token distributions from hidden states and heads, without ever holding the logits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_distill import checks, compat
from lightning_distill.functional.heads import Head, HeadInputs, Side, prepare_heads
from lightning_distill.functional.inputs import IGNORE_INDEX
from lightning_distill.functional.rows import DIVERGENCES, RowSettings, rows_in_place

__all__ = ["fused_linear_divergence"]

# Tokens of a chunk. Each chunk reads and writes the whole gradient of the head, which costs the more the faster the
# products are.
_TOKENS_ON_CPU, _TOKENS = 256, 1024
_FEW_CHUNKS = 8  # bfloat16 sums of so many parts lose less than the rounding of the logits
_COLUMNS = 2**13  # of the vocabulary that are converted to the precision of the sums at a time
# Newer releases of torch sum products of half precision into float32 on CUDA without converting the factors.
_MM_WIDENS = "dtype" in torch.ops.aten.mm.overloads()  # type: ignore[no-untyped-call]
_FLOAT16_LARGEST = 2.0**10  # for the usual gradients of logits in float16, where numbers range from 2^-24 to 2^16


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    skew: float = 0.1,
    alpha: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    task_weight: float = 0.0,
    weight: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    soft_cap: float | tuple[float | None, float | None] | None = None,
    scale: float | tuple[float | None, float | None] | None = None,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Divergence of the two models' token distributions, and cross entropy, straight from hidden states and heads.

    .. math:: \frac{1}{N} \sum_n w \, D(p^t_n, p^s_n) - w_\text{task} \log \mathrm{softmax}(z^s_n)_{y_n},
        \qquad p = \mathrm{softmax}(z / T), \quad z = c \tanh \frac{a (W h + b)}{c}

    The logits of a whole batch, ``(N, V)``, are never made: both heads are applied to a few tokens at a time, and the
    gradients of those are made at once, in the place of the logits. Tokens that do not count are dropped before the
    products. Labels are compared as they are: shift them first, so that each stands at the token that predicts it.

    The gradients are ready after the forward pass, for a single backward pass. They cannot be differentiated again.

    Args:
        student_hidden: Inputs of the student's head, shape ``(..., H)`` with at least two dimensions.
        student_weight: Matrix of the student's head as in ``nn.Linear``, shape ``(V, H)``.
        teacher_hidden: Inputs of the teacher's head for the same tokens, shape ``(..., H')``.
        teacher_weight: Matrix of the teacher's head, shape ``(V', H')``. If V' and V differ, the columns that only one
            of the models has are left out on both sides.
        labels: Index of the token to predict at each position, shape ``(...)``. Positions with a negative label or
            ``ignore_index`` do not count.
        divergence: ``"kl"`` as in :func:`soft_target_kl` with its factor :math:`T^2`; ``"reverse_kl"``, ``"jsd"``
            (:func:`generalized_jsd`), ``"skew_kl"``, ``"skew_reverse_kl"`` and ``"total_variation"`` as the functions
            of these names; ``"alpha_beta"``, the alpha-beta divergence. These have no factor :math:`T^2`.
        temperature: Softening of both distributions in the divergence, greater than 0.
        beta: Share of the teacher in the mixture of ``"jsd"``, from 0 to 1; exponent of the student's probabilities in
            ``"alpha_beta"``, any number.
        skew: Share of the first distribution in the mixture of the skewed divergences, from 0 to less than 1.
        alpha: Exponent of the teacher's probabilities in ``"alpha_beta"``, any number.
        ignore_index: A label of positions that do not count, beside the negative ones.
        task_weight: Factor :math:`w_\text{task}` of the cross entropy with the labels at temperature 1, at least 0.
        weight: Factor :math:`w` of the divergence, at least 0.
        student_bias: Bias of the student's head, shape ``(V,)``; minus infinity forbids a token.
        teacher_bias: Bias of the teacher's head, shape ``(V',)``.
        soft_cap: Bound :math:`c` of the logits, greater than 0, applied after ``scale``; a number for both models or a
            pair (student, teacher), None for no bound.
        scale: Factor :math:`a` of the logits, greater than 0; a number for both models or a pair (student, teacher).
        chunk_size: Tokens at a time; None for 256 on a CPU and 1024 elsewhere.
        mask: True where a position counts, bool, shape ``(...)`` or its first dimensions; together with ``labels`` both
            must say so.
        normalizer: Number N of tokens to divide the sum by, such as those of all accumulated batches; 0 counts as 1.
            None for the tokens that count in this call.

    Returns:
        A scalar in nats, float32 or float64; 0 with gradients of zeros if no token counts.

    Raises:
        TypeError: If a tensor is not a floating point tensor, the labels are not integers, the mask is not bool, or a
            setting has the wrong type.
        ValueError: If shapes, precisions or devices do not fit together, a setting is out of its range, or a label on
            the CPU is not less than the size of the vocabulary (on other devices the loss is NaN).
        RuntimeError: In a ``torch.func`` transform; and in a second backward pass or one with ``create_graph=True``.

    Example:
        >>> student_hidden, teacher_hidden = torch.tensor([[2.0], [1.0]]), torch.tensor([[4.0, 1.0], [0.0, 2.0]])
        >>> student_weight, teacher_weight = (
        ...     torch.tensor([[1.0], [0.0], [0.5]]),
        ...     torch.tensor([[1.0, 0], [0, 1], [0, 0]]),
        ... )
        >>> fused_linear_divergence(student_hidden, student_weight, teacher_hidden, teacher_weight)
        tensor(0.5493)

    References:
        Hsu et al. 2024 (Liger kernel), arXiv:2410.10989: gradients made in the forward pass, chunk by chunk. Alpha-beta
        divergence: Wang et al. 2025 (ABKD), arXiv:2505.04560, with the limits of Cichocki, Cruces and Amari 2011 where
        an exponent or the sum of both is 0; deviation from the authors' code, whose limits have other factors, so that
        its value jumps there. The other divergences: see their functions.
    """
    # Left out of the graphs of torch.compile, which would unroll the chunks.
    losses: Any = fused_linear_losses
    if torch.compiler.is_compiling():
        losses = torch.compiler.disable(fused_linear_losses)  # type: ignore[no-untyped-call]
    student_scale, teacher_scale = (1.0 if factor is None else factor for factor in _pair("scale", scale))
    settings = RowSettings(
        divergence=divergence,
        temperature=temperature,
        beta=beta,
        skew=skew,
        alpha=alpha,
        weight=weight,
        task_weight=task_weight,
        scales=(student_scale, teacher_scale),
        soft_caps=_pair("soft_cap", soft_cap),
    )
    student = (student_hidden, student_weight, student_bias)
    teacher = (teacher_hidden, teacher_weight, teacher_bias)
    return cast(Tensor, losses(student, teacher, labels, mask, settings, ignore_index, chunk_size, normalizer).total)


class FusedLosses(NamedTuple):
    """The loss and its parts, scalars.

    Attributes:
        total: The weighted sum of the parts, with its graph.
        divergence: Mean divergence, without its weight and detached; 0 if its weight is 0.
        cross_entropy: Mean cross entropy, without its weight and detached; 0 if its weight is 0.
    """

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor


def fused_linear_losses(
    student: Side,
    teacher: Side,
    labels: Tensor | None,
    mask: Tensor | None,
    settings: RowSettings,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int | None = None,
    normalizer: float | Tensor | None = None,
) -> FusedLosses:
    """:func:`fused_linear_divergence` with its parts.

    Args:
        student: Hidden states, weight and bias of the student.
        teacher: Those of the teacher.
        labels: As there.
        mask: As there.
        settings: The divergence, its settings and the weights.
        ignore_index: As there.
        chunk_size: As there.
        normalizer: As there.
    """
    if compat.transforms_are_active():
        expected = "`fused_linear_divergence` to be called outside of the transforms of torch.func"
        remedy = "Use the divergences of logits there."
        raise RuntimeError(checks.message(expected, "a call inside grad, vmap or another one", remedy))
    _check_settings(settings, chunk_size)
    if normalizer is not None and not isinstance(normalizer, Tensor):
        checks.non_negative("normalizer", normalizer)
    inputs = prepare_heads(student, teacher, labels, mask, ignore_index=ignore_index, task=settings.task_weight > 0)
    size = chunk_size or (_TOKENS_ON_CPU if student[0].device.type == "cpu" else _TOKENS)
    sums, gradients = _sums(student, inputs, settings, size)
    total = settings.weight * sums[0] + settings.task_weight * sums[1]
    if gradients is not None:
        total = cast(Tensor, compat.applied(_ReadyGradients, *student, total, gradients))
    if isinstance(normalizer, Tensor):
        return FusedLosses(*(value / torch.where(normalizer == 0, 1, normalizer) for value in (total, *sums)))
    number = (inputs.size if normalizer is None else normalizer) or 1
    return FusedLosses(*(value / number for value in (total, *sums)))


def _pair(name: str, value: Any) -> tuple[float | None, float | None]:
    """A setting of both models, from a number for both or a pair."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(checks.message(f"`{name}` to be a number or a pair (student, teacher)", f"{name}={value!r}"))
    for number in pair:
        if number is not None:
            checks.positive(name, number)
    return pair[0], pair[1]


def _check_settings(settings: RowSettings, chunk_size: int | None) -> None:
    checks.one_of("divergence", settings.divergence, DIVERGENCES)
    checks.positive("temperature", settings.temperature)
    if settings.divergence == "alpha_beta":
        checks.number("beta", settings.beta)
    else:
        checks.between("beta", settings.beta, 0, 1)
    checks.fraction("skew", settings.skew)
    checks.number("alpha", settings.alpha)
    checks.non_negative("weight", settings.weight)
    checks.non_negative("task_weight", settings.task_weight)
    if chunk_size is not None:
        checks.integer("chunk_size", chunk_size)
        checks.at_least("chunk_size", chunk_size, 1)


class _Gradients(NamedTuple):
    """Gradients of the sum over the tokens, times ``factor``; None for tensors that are not trained.

    Attributes:
        hidden: By the student's hidden states of all positions, shape ``(N, H)``.
        weight: By the whole weight of the student's head.
        bias: By its whole bias.
        factor: A power of 2, which keeps small numbers from becoming 0 in float16.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    factor: float


def _sums(student: Side, inputs: HeadInputs, settings: RowSettings, size: int) -> tuple[Tensor, _Gradients | None]:
    """Sums of the two parts over the tokens that count, and the gradients of the loss; None if nothing is trained."""
    trained = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in student]
    with torch.no_grad():
        gradients = _no_gradients(student, trained, inputs, settings, size) if any(trained) else None
        return _sum_of_chunks(inputs, settings, size, gradients), gradients


def _sum_of_chunks(inputs: HeadInputs, settings: RowSettings, size: int, gradients: _Gradients | None) -> Tensor:
    """Sums of the two parts over chunks of tokens, shape ``(2,)``; the gradients of the loss are added up."""
    student, teacher = inputs.student, inputs.teacher
    factor = 1.0 if gradients is None else gradients.factor
    # Two buffers for all chunks: the logits of the student, then their gradients; and the logits of the teacher.
    buffers = [head.weight.new_empty(min(size, inputs.size), len(head.weight)) for head in (student, teacher)]
    sums = torch.zeros(2, dtype=_sum_dtype(inputs), device=student.hidden.device)
    for start in range(0, inputs.size, size):
        rows = inputs.chunk(start, size)
        count = min(size, inputs.size - start)
        student_logits, teacher_logits = (buffer[:count] for buffer in buffers)
        student.write_logits(rows, student_logits)
        teacher.write_logits(rows, teacher_logits)
        labels = None if inputs.labels is None else inputs.labels[rows]
        values = rows_in_place(student_logits, teacher_logits, labels, settings, gradient_factor=factor)
        for place, value in enumerate(values):
            if value is not None:
                sums[place] += value.sum()
        if gradients is not None:
            _add_products(gradients, rows, student_logits, student, is_first=start == 0)
    return sums


def _sum_dtype(inputs: HeadInputs) -> torch.dtype:
    """float32, or float64 if a model has it."""
    both = torch.promote_types(inputs.student.weight.dtype, inputs.teacher.weight.dtype)
    return torch.promote_types(both, torch.float32)


def _no_gradients(
    student: Side, trained: list[bool], inputs: HeadInputs, settings: RowSettings, size: int
) -> _Gradients:
    """The sums of no chunks in the precision of the sums, and the factor of the gradients.

    The first chunk writes the gradient of the weight, which is too large to be filled with zeros before.
    """
    products, factor = inputs.student.weight.dtype, 1.0
    dtype = torch.promote_types(products, torch.float32)
    if (
        all(tensor is None or tensor.dtype == torch.bfloat16 for tensor in student)
        and inputs.size <= size * _FEW_CHUNKS
    ):
        dtype = torch.bfloat16
    if products == torch.float16:
        softening = max(settings.temperature, 1 / settings.temperature)
        usual = settings.weight * softening + settings.task_weight
        factor = 2.0 ** math.floor(math.log2(_FLOAT16_LARGEST / usual)) if usual else 1.0
    hidden, weight, bias = (
        torch.empty(tensor.shape, dtype=dtype, device=tensor.device) if train and tensor is not None else None
        for tensor, train in zip(student, trained, strict=True)
    )
    written = len(inputs.student.weight) if inputs.size else 0
    for tensor in (hidden, bias, None if weight is None else weight[written:]):
        if tensor is not None:
            tensor.zero_()
    return _Gradients(None if hidden is None else hidden.view(-1, hidden.shape[-1]), weight, bias, factor)


def _add_products(
    gradients: _Gradients, rows: slice | Tensor, gradient: Tensor, student: Head, *, is_first: bool
) -> None:
    """Carry the gradient of a chunk's logits on to the hidden states, the weight and the bias."""
    hidden, vocabulary = student.hidden[rows], len(student.weight)
    sums = next(tensor for tensor in gradients[:3] if isinstance(tensor, Tensor))
    # Converted a few columns at a time if the sums are more precise than the products.
    columns = vocabulary if gradient.dtype == sums.dtype else _COLUMNS
    of_hidden = None if gradients.hidden is None else sums.new_empty(hidden.shape)
    for start in range(0, vocabulary, columns):
        part = slice(start, start + columns)
        if of_hidden is not None:
            _add_product(of_hidden, gradient[:, part], student.weight[part], is_first=start == 0)
        if gradients.weight is not None:
            _add_product(gradients.weight[:vocabulary][part], gradient[:, part].T, hidden, is_first=is_first)
    if gradients.hidden is not None and of_hidden is not None:
        gradients.hidden[rows] = of_hidden
    if gradients.bias is not None:
        gradients.bias[:vocabulary].add_(gradient.sum(0, dtype=sums.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """Add a matrix product, summed in the precision of the total, or write the first one."""
    if left.dtype != total.dtype and left.is_cuda and _MM_WIDENS:
        product = torch.mm(left, right, out_dtype=total.dtype)
        total.copy_(product) if is_first else total.add_(product)
    else:  # a beta of 0 ignores the old numbers, which may be anything
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=0 if is_first else 1)


class _ReadyGradients(torch.autograd.Function):
    """The sum as a function of the student's hidden states, weight and bias, whose gradients are known already."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor, gradients: _Gradients
    ) -> Tensor:
        ctx.gradients = gradients
        ctx.like = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in (hidden, weight, bias)]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            expected = "a backward pass without create_graph=True through `fused_linear_divergence`"
            remedy = "Its gradients have no graph: use the divergences of logits for second derivatives."
            raise RuntimeError(checks.message(expected, "one with it", remedy))
        if ctx.gradients is None:
            expected = "a single backward pass through each result of `fused_linear_divergence`"
            remedy = "The gradients of the forward pass are used up: add up all losses before the backward pass."
            raise RuntimeError(checks.message(expected, "a second one", remedy))
        # Multiplied in place and released here, so that the parameters take them over without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        upstream = upstream / gradients.factor
        ready = [
            None if gradient is None else gradient.mul_(upstream).to(like[1]).view(like[0])
            for gradient, like in zip(gradients[:3], ctx.like, strict=True)
        ]
        return (*ready, None, None)
