"""How terms call losses: in float32 or better, with labels and a mask if the term has them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill_core.requires import Requires
from lightning_distill.functional.inputs import savable
from lightning_distill.losses import DistillationLoss
from lightning_distill.losses.temperature import CurriculumTemperature
from lightning_distill.recording import Call, map_tensors
from lightning_distill.recording.batches import find_entry
from lightning_distill.recording.labels import find_tensor

Mask = str | int | Callable[[Any], Tensor]


def checked_loss(loss: Any) -> Any:
    """A loss object or a function.

    Raises:
        TypeError: If it is a class, or cannot be called.
    """
    if isinstance(loss, type) or not callable(loss):
        got = f"the class {loss.__name__}" if isinstance(loss, type) else f"loss={loss!r}"
        example = f"{loss.__name__}(...)" if isinstance(loss, type) else "SoftTargetLoss(temperature=4.0)"
        remedy = f"Pass an instance: {example}."
        raise TypeError(f"Expected `loss` to be a loss object or a function, but got {got}. {remedy}")
    return loss


def takes_mask(loss: Any) -> bool:
    """Whether a loss can be called with ``mask=``."""
    function = loss.forward if isinstance(loss, torch.nn.Module) else loss
    try:
        return "mask" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False


def check_takes_mask(loss: Any) -> None:
    """Raise if a loss cannot be called with ``mask=``.

    Raises:
        ValueError: If it cannot.
    """
    if not takes_mask(loss):
        raise ValueError(
            f"Expected `loss` to take a mask, since the term has one, but got {loss!r}. Pass a loss whose"
            " forward has a parameter `mask`."
        )


def check_places(loss: Any, requires: Requires, boxes: Any, index: Any) -> None:
    """Raise if a term on layers does not say where a batch keeps what its loss needs, or says so for another loss.

    Args:
        loss: The loss.
        requires: Its requirements.
        boxes: Where a batch keeps its boxes, or ``None``.
        index: Where a batch keeps the rows of the examples, or ``None``, which a cache may know.

    Raises:
        ValueError: If so.
    """
    name = type(loss).__name__
    if isinstance(getattr(loss, "temperature", None), CurriculumTemperature):
        raise ValueError(
            f"Expected the temperature of {name} to be a number or a schedule in a term on layers, but got a"
            " CurriculumTemperature. Use the loss in a LogitsDistillation."
        )
    if requires.needs_boxes and boxes is None:
        raise ValueError(
            f"Expected `boxes` to say where a batch keeps its boxes, which {name} needs, but got boxes=None. Pass a"
            " key, an index, a function of the batch, or a tap on the layer that resizes images."
        )
    if boxes is not None and requires.several_layers:
        raise ValueError(
            f"Expected `boxes` to be None for {name}, which compares several layers at once, but got boxes={boxes!r}."
            " Use a loss on single layers."
        )
    if boxes is not None and requires.needs_index:
        raise ValueError(
            f"Expected `boxes` to be None for {name}, which compares whole examples, but got boxes={boxes!r}. Leave it"
            " out."
        )
    if index is not None and not requires.needs_index:
        raise ValueError(
            f"Expected `index` to be None for {name}, which needs no rows of the examples, but got index={index!r}."
            " Leave it out."
        )


def counted_positions(call: Call, mask: Mask | None, ignore_index: int | None, labels: Tensor | None) -> Tensor | None:
    """The positions that count.

    Args:
        call: The student's call, with the batch.
        mask: A key, field name or index in the batch, or a function of the batch; positions that are not 0 count.
        ignore_index: Label of positions that do not count.
        labels: The labels, where ``ignore_index`` is given.

    Returns:
        A bool tensor, or ``None`` if all positions count.

    Raises:
        ValueError: If the batch has no mask at that place, or it does not fit the labels.
    """
    counted: Tensor | None = None
    if mask is not None:
        if call.batch is None:
            raise ValueError(
                f"Expected a batch for the term with mask={mask!r}, but got none. Call"
                " distiller.total(task_loss, batch)."
            )
        counted = find_tensor(call.batch, mask).bool()
    if ignore_index is not None and labels is not None:
        kept = labels != ignore_index
        if counted is not None and not _fits(counted.shape, kept.shape):
            raise ValueError(
                f"Expected mask={mask!r} to have the shape of the labels where ignore_index is given,"
                f" {tuple(kept.shape)}, but got {tuple(counted.shape)}. Resize it to the labels."
            )
        counted = kept if counted is None else counted & kept
    return counted


def _fits(mask: torch.Size, labels: torch.Size) -> bool:
    """Whether a mask has the labels' shape, or a 1 in the place of a size."""
    return len(mask) == len(labels) and all(size in (1, other) for size, other in zip(mask, labels, strict=True))


def check_of_examples(mask: Tensor | None, term: str) -> None:
    """Raise if a mask of positions belongs to a term that compares the means over all positions.

    Args:
        mask: The mask, or ``None``.
        term: Name of the term.

    Raises:
        ValueError: If so.
    """
    if mask is not None and mask.ndim > 1:
        raise ValueError(
            f"Expected the mask of term {term!r} to be one of whole examples, (N,), since adapter='pool' takes the"
            f" means over all positions, but got shape {tuple(mask.shape)}. Name layers whose means leave the others"
            " out, or compare the positions: adapter='auto'."
        )


def check_held(held: Tensor | None, mask: Tensor | None, term: str, once: bool = False) -> None:
    """Raise if a term counts positions that a cached teacher of sequences has no answers for.

    Args:
        held: The positions that the cache holds, or ``None`` for all.
        mask: The positions that count, or ``None`` for all.
        term: Name of the term.
        once: Whether to compare the two, which waits for the device.

    Raises:
        ValueError: If so.
    """
    if held is None:
        return
    if mask is None:
        raise ValueError(
            f"Expected term {term!r} to have a mask, since the cache holds the tokens of sequences without padding, but"
            ' got none. Pass mask="attention_mask", or use SequenceDistillation.'
        )
    if once and bool((mask & ~held).any()):
        raise ValueError(
            f"Expected term {term!r} to count tokens that the cache holds, but its mask has other positions too. Pass"
            " the mask that the cache was built with, or one of fewer positions."
        )


def attention_mask(call: Call, name: str = "attention_mask") -> Tensor | None:
    """The tokens that are not padding, by the attention mask of a call or, if it has none, of its batch.

    Args:
        call: The student's call, with the batch.
        name: Name of the mask.

    Returns:
        A bool tensor ``(N, L)``, or ``None`` without an attention mask.

    Raises:
        ValueError: If the mask has another number of dimensions.
    """
    masks = (find_entry(name, call.batch, call.arguments, ndim) for ndim in (2, None))
    mask = next((mask for mask in masks if mask is not None), None)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"Expected `{name}` to have the shape (batch, tokens), but got {got}. Pass mask=<a function of the batch>"
            " that returns a mask of that shape."
        )
    return mask.bool()


def value_of(
    loss: Any,
    requires: Requires,
    student: Tensor | list[Tensor],
    teacher: Tensor | list[Tensor],
    labels: Tensor | None,
    mask: Tensor | None = None,
    third: Tensor | None = None,
    *,
    mean: bool = True,
) -> Tensor:
    """A loss computed in float32 or better, averaged if it is not a scalar and ``mean`` is True.

    Its third argument is the labels, or ``third`` where it needs boxes or the rows of the examples.

    Raises:
        TypeError: If the loss does not return a tensor.
    """
    first = student if isinstance(student, Tensor) else student[0]
    owner = getattr(loss, "__self__", loss)  # of a method
    if not isinstance(owner, DistillationLoss):  # the library's losses widen their inputs themselves
        student, teacher = map_tensors(student, widened), map_tensors(teacher, lambda tensor: widened(savable(tensor)))
    further = [labels] if requires.needs_labels else [third] if requires.needs_boxes or requires.needs_index else []
    arguments = (student, teacher, *further)
    keywords = {} if mask is None else {"mask": mask}
    if torch.is_autocast_enabled(first.device.type):
        with torch.autocast(first.device.type, enabled=False):
            value = loss(*arguments, **keywords)
    else:
        value = loss(*arguments, **keywords)
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected `loss` to return a tensor, but got {type(value).__name__}.")
    return value if value.ndim == 0 or not mean else value.mean()


def widened(value: Tensor) -> Tensor:
    """The tensor, in float32 if it is in half precision."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
