"""Building blocks of the formulas: products in full precision, and four functions with hand-written gradients.

Autograd's own gradients of those four make needless copies. They may be differentiated again, forward too, and take
part in ``torch.func``; ``torch.compile`` sees the plain formulas, whose passes it fuses on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_distill import compat

# Replaces minus infinity: the difference of two infinite scores is NaN. Its softmax is 0 too.
LEAST_SCORE = -1e30
_SMALL_COPY = 2**14  # a CPU copies fewer numbers in less time than it takes to read one value


def precise(function: Callable[[Tensor], Tensor], feature: Tensor) -> Tensor:
    """Apply a function to a feature in the feature's precision, also where autocast would lower it.

    Args:
        function: A network, or any map of one tensor.
        feature: Any shape.

    Returns:
        The function's result.
    """
    device = feature.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return function(feature)
    with torch.autocast(device, enabled=False):
        return function(feature)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product in the precision of its factors, also where autocast would lower it.

    Args:
        left: Shape ``(..., A, B)``.
        right: Shape ``(..., B, C)``.

    Returns:
        Shape ``(..., A, C)``.
    """
    return precise(lambda factor: factor @ right, left)


def sum_of_squares(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Sum of the squares, whose gradient is one product instead of four passes over the values.

    Args:
        values: Any shape.
        dim: Dimensions of the sum.

    Returns:
        The sums, with ``dim`` kept at size 1.
    """
    if not _pays_off(values):
        return values.square().sum(dim=dim, keepdim=True)
    return cast(Tensor, compat.applied(_SumOfSquares, values, dim))


def gram(rows: Tensor) -> Tensor:
    """Products of all pairs of rows, whose gradient takes one matrix product instead of two.

    In the rows' precision also where autocast would lower it.

    Args:
        rows: Shape ``(..., A, B)``.

    Returns:
        Shape ``(..., A, A)``.
    """
    if not _pays_off(rows, on_device=2**18):
        return product(rows, rows.mT)
    return cast(Tensor, compat.applied(_Gram, rows))


def unit(vectors: Tensor, dim: int) -> Tensor:
    """Vectors divided by their length; vectors of zeros stay zero.

    Args:
        vectors: Any shape.
        dim: Dimension along which the vectors lie.

    Returns:
        Vectors of length 1, same shape; in float32 their lengths may be from 1e-18 to 1e18.
    """
    if not _pays_off(vectors):
        return vectors * _inverse_length(vectors, dim)
    return cast(Tensor, compat.applied(_Unit, vectors, dim)[0])


def centred(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Values minus their mean, and exactly zero without gradient where they are constant up to rounding.

    Without the second half, what rounding leaves of a constant would be blown up by any later division.

    Args:
        values: Any shape.
        dim: Dimensions of the mean.

    Returns:
        Same shape.
    """
    mean = values.mean(dim=dim, keepdim=True)
    difference = values - mean
    return difference * _varies(difference.detach(), mean.detach(), dim)


def standardized(
    values: Tensor, dim: int | tuple[int, ...], *, count: int, eps: float = 0.0, added: float = 0.0
) -> Tensor:
    r"""Centred values over their standard deviation, :math:`(x - \bar x) / (\sqrt{\sigma^2 + \epsilon} + a)`.

    Values that are constant up to rounding become zero and get no gradient.

    Args:
        values: Any shape.
        dim: Dimensions of the mean.
        count: The divisor of the sum of squares in the variance.
        eps: Added to the variance.
        added: Added to its root.

    Returns:
        Same shape.
    """
    if not _pays_off(values):
        return _standardized(values, dim, count, eps, added)[0]
    return cast(Tensor, compat.applied(_Standardized, values, dim, count, eps, added)[0])


def _pays_off(values: Tensor, on_device: int = 2**25) -> bool:
    """Whether a hand-written gradient of a function of these values saves more than the call of an autograd function.

    Args:
        values: Argument of the function.
        on_device: Number of values from which it does on a GPU, where a pass over them takes less than the host needs
            to start it.
    """
    if torch.compiler.is_compiling() or not values.requires_grad:
        return False
    return values.numel() >= (2**14 if values.device.type == "cpu" else on_device)


def or_one(values: Tensor) -> Tensor:
    """Values that are safe to divide by: 1 in the place of 0.

    Args:
        values: Any shape, at least 0.

    Returns:
        Same shape.
    """
    return values + (values == 0)


def bounded(scores: Tensor) -> Tensor:
    """The scores, with minus infinity replaced by the least finite score, whose softmax is 0 too.

    Args:
        scores: Any shape.

    Returns:
        Same shape; a score that was minus infinity gets a gradient of 0.
    """
    return scores.clamp(min=LEAST_SCORE)


def softened(logits: Tensor, temperature: float | Tensor, counts: Tensor | None = None, dim: int = -1) -> Tensor:
    """Logits divided by a temperature, all of them finite; rows that do not count become zeros.

    Args:
        logits: Any shape; minus infinity becomes the least finite score.
        temperature: Greater than 0; a scalar tensor gets a gradient.
        counts: True where a row counts, the shape without ``dim``; None where all count.
        dim: Dimension of the classes.

    Returns:
        Same shape, perhaps the logits themselves. The gradient passes as if no value had been replaced; the caller
        drops the values of such rows.
    """
    hidden = None if counts is None else ~counts.unsqueeze(dim)
    if isinstance(temperature, Tensor):  # whose gradient reads the logits: all of them must be finite
        logits = bounded(logits)
        logits = logits if hidden is None else logits.masked_fill(hidden, 0.0)
        return logits / temperature.to(logits.dtype)
    if temperature == 1 and hidden is None:
        if _all_finite(logits):
            return logits
        if not logits.requires_grad:
            return bounded(logits)
    scores = logits.clone() if temperature == 1 else logits / temperature  # a copy passes its gradient on as it is
    if torch.compiler.is_compiling():
        scores = bounded(scores)
        return scores if hidden is None else scores.masked_fill(hidden, 0.0)
    # In place and without autograd, to save a copy and a backward pass. The softmax of the changed scores has a
    # gradient of 0 anyway.
    same = scores.detach()
    same.clamp_min_(LEAST_SCORE)  # unlike clamp_, with a batching rule for torch.func.vmap
    if hidden is not None:
        same.masked_fill_(hidden, 0.0)
    return scores


def _all_finite(scores: Tensor) -> bool:
    """Whether it can be seen, in less time than a copy takes, that all scores are finite."""
    if scores.device.type != "cpu" or scores.numel() < _SMALL_COPY or torch.compiler.is_compiling():
        return False
    if not is_ordinary(scores):
        return False
    return math.isfinite(scores.detach().sum().item())


def is_ordinary(*tensors: Tensor) -> bool:
    """Whether tensors hold numbers, and nothing but autograd's reverse mode follows them."""
    if compat.transforms_are_active():
        return False
    dual: Any = torch.autograd.forward_ad.unpack_dual
    return all(type(tensor) in (Tensor, nn.Parameter) and dual(tensor).tangent is None for tensor in tensors)


class _SumOfSquares(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        return values.square().sum(dim=dim, keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, ctx.dim = inputs
        ctx.save_for_backward(values)
        ctx.save_for_forward(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors
        return values * (2 * gradient), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        values: Tensor = ctx.saved_tensors[0]
        return 2 * (values * tangent).sum(dim=ctx.dim, keepdim=True)


class _Unit(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(vectors: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        inverse = _inverse_length(vectors, dim)
        return vectors * inverse, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        vectors, ctx.dim = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(vectors, *output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        vectors, units, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again, as a function of the vectors
            inverse = _inverse_length(vectors, ctx.dim)
        return _across(gradient, units, ctx.dim) * inverse, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, None]:
        units, inverse = ctx.saved_tensors
        return _across(tangent, units, ctx.dim) * inverse, None


def _inverse_length(vectors: Tensor, dim: int) -> Tensor:
    # A vector of zeros is divided by 1: dividing by a tiny constant instead would give it a gradient that overflows
    # half precision.
    if vectors.device.type == "cpu" and dim % vectors.ndim != vectors.ndim - 1:  # where torch's own norm is slow
        return or_one(vectors.square().sum(dim=dim, keepdim=True)).rsqrt()
    return or_one(torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)).reciprocal()


def _across(change: Tensor, units: Tensor, dim: int) -> Tensor:
    """The part of a change that turns vectors and does not stretch them."""
    return change - units * (units * change).sum(dim=dim, keepdim=True)


class _Gram(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return product(rows, rows.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return product(gradient + gradient.mT, rows)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        change = product(tangent, rows.mT)
        return change + change.mT


class _Standardized(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        values: Tensor, dim: int | tuple[int, ...], count: int, eps: float, added: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _standardized(values, dim, count, eps, added)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        values, *ctx.settings = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(values, *output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        values, scores, *factors = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again, as a function of the values
            factors = _standardized(values, *ctx.settings)[1:]
        return _change(gradient, scores, factors, ctx.settings[0]), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, None, None]:
        scores, *factors = ctx.saved_tensors
        return _change(tangent, scores, factors, ctx.settings[0]), None, None


def _standardized(
    values: Tensor, dim: int | tuple[int, ...], count: int, eps: float, added: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores, and two factors of their derivative."""
    mean = values.mean(dim=dim, keepdim=True)
    difference = values - mean
    squares = difference.square().sum(dim=dim, keepdim=True)
    # The root of a zero variance has no gradient, and the root of a tiny eps is a divisor out of reach of float16.
    root = (squares / count + eps + (squares == 0)).sqrt()
    varies = _varies(difference.detach(), mean.detach(), dim)
    inverse = varies / (root + added)
    # Inside vmap a tensor does not tell whether autograd follows it.
    is_followed = difference.requires_grad or compat.transforms_are_active()
    scores = difference * inverse if is_followed else difference.mul_(inverse)
    return scores, inverse, varies / (root * count)


def _change(change: Tensor, scores: Tensor, factors: Sequence[Tensor], dim: int | tuple[int, ...]) -> Tensor:
    """The derivative of standardized scores, times a change of the values; it is symmetric."""
    inverse, factor = factors
    along = (scores * change).sum(dim=dim, keepdim=True)
    # In place on the product, which vmap has batched if any of the tensors is.
    return (scores * (-factor * along)).add_((change - change.mean(dim=dim, keepdim=True)) * inverse)


def _varies(difference: Tensor, mean: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """True where values differ from their mean by more than rounding."""
    rounding = 4 * torch.finfo(mean.dtype).eps * mean.abs()
    if difference.device.type == "cpu":  # where torch's own norm is slow
        farthest = torch.maximum(difference.amax(dim=dim, keepdim=True), -difference.amin(dim=dim, keepdim=True))
    else:
        farthest = torch.linalg.vector_norm(difference, math.inf, dim=dim, keepdim=True)
    return farthest > rounding
