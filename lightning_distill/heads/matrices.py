"""The matrix and the bias that a head applies, whatever is wrapped around it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_REMEDY = "Use SequenceDistillation, which reads the logits."


class Matrix(NamedTuple):
    """A linear head.

    Attributes:
        weight: Shape ``(V, H)``, with its graph.
        bias: Shape ``(V,)``, or ``None``.
    """

    weight: Tensor
    bias: Tensor | None


def matrix_of(head: Any) -> Matrix:
    """The matrix and the bias that a head applies now.

    A LoRA on the head is merged, with its graph. Quantised weights of a frozen head are made whole.

    Args:
        head: An ``nn.Linear``, or one that PEFT has wrapped.

    Raises:
        TypeError: If the head applies something else than a matrix and a bias.

    Example:
        >>> matrix_of(nn.Linear(3, 5, bias=False)).weight.shape
        torch.Size([5, 3])
    """
    if getattr(head, "modules_to_save", None) is not None:  # PEFT trains a copy of the whole head
        name = None if head.disable_adapters else head.active_adapters[0]
        return matrix_of(head.original_module if name is None else head.modules_to_save[name])
    if hasattr(head, "base_layer") and hasattr(head, "get_delta_weight"):
        return _merged(head)
    if type(head).forward is not nn.Linear.forward:
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise _refusal("the head to be a linear layer", f"{kind}, which has a forward of its own (quantised?)")
    weight = head.weight
    if type(weight) not in (Tensor, nn.Parameter):
        if weight.requires_grad or not hasattr(weight, "dequantize") or "DTensor" in type(weight).__name__:
            raise _refusal(
                "the head's weight to be a whole tensor", f"a {type(weight).__name__} (sharded, or quantised)"
            )
        weight = weight.dequantize()
    if not weight.is_floating_point():
        raise _refusal("the head's weight to be of floating point numbers", f"a tensor of {weight.dtype}")
    return Matrix(weight, head.bias)


def _merged(head: Any) -> Matrix:
    """The matrix of a head with the LoRA of PEFT."""
    weight, bias = matrix_of(head.base_layer)
    active = (
        [] if head.disable_adapters or head.merged else [name for name in head.active_adapters if name in head.lora_A]
    )
    variants = getattr(head, "lora_variant", None) or getattr(head, "use_dora", {})
    for name in active:
        if variants.get(name):
            raise _refusal(
                "a plain LoRA on the head", "DoRA or another variant", "Leave the head out of target_modules."
            )
        if head.training and getattr(head.lora_dropout[name], "p", 0.0):
            remedy = "Set it to 0 for the head: dropout of the head's input cannot be merged into its matrix."
            raise _refusal("a LoRA without dropout on the head", f"lora_dropout={head.lora_dropout[name].p}", remedy)
        if head.lora_B[name].bias is not None:
            raise _refusal("a LoRA without a bias on the head", "lora_bias=True", "Leave it out.")
        weight = weight + head.get_delta_weight(name).to(weight.dtype)
    return Matrix(weight, bias)


def _refusal(expected: str, got: str, remedy: str = _REMEDY) -> TypeError:
    return TypeError(f"Expected {expected} where it is skipped, but got {got}. {remedy}")


def has_gradient(matrix: Matrix, hidden: Tensor) -> bool:
    """Whether anything that goes into a head is trained."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, matrix.weight, matrix.bias)
    )
