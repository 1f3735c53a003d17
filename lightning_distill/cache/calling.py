"""The call of a cached teacher with a batch, and the digest by which a teacher is recognized."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from distill_core.normalization import identity_of
from distill_core.store import CacheError, fingerprint
from lightning_distill.cache.data import tensor_bits
from lightning_distill.recording import Call
from lightning_distill.recording.batches import as_arguments, inputs_in
from lightning_distill.teachers.inputs import Place, TeacherInputs


def call_teacher(teacher: nn.Module, batch: Any, teacher_inputs: Place = None) -> Any:
    """The teacher's output for a batch: called with the batch's inputs, or others that are made of them.

    Args:
        teacher: The teacher.
        batch: The batch.
        teacher_inputs: Makes the teacher's inputs of the batch's, or their place in the batch.

    Raises:
        CacheError: If the teacher does not take the entries of a dict.
    """
    args, kwargs = as_arguments(inputs_in(batch))
    shown = TeacherInputs(teacher_inputs, {}).of(Call(args, kwargs, batch=batch))
    if shown.kwargs:
        try:
            inspect.signature(teacher.forward).bind(*shown.args, **shown.kwargs)
        except TypeError as error:
            raise CacheError(
                f"Expected the teacher to take the batch's {list(shown.kwargs)} as keywords, but: {error}. Pass"
                " forward=<a function of the teacher and the batch>, or leave them out in collate_fn."
            ) from None
    return teacher(*shown.args, **shown.kwargs)


def as_array(tensor: Tensor) -> Any:
    """An output as an array: in float32 if it holds floats, since NumPy has no bfloat16; other types as they are."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy(force=True)


def described_teacher(teacher: nn.Module, teacher_inputs: Place = None) -> dict[str, Any]:
    """The entry of a teacher in the manifest.

    Args:
        teacher: The teacher.
        teacher_inputs: Makes its inputs, or says where a batch has them.

    Raises:
        CacheError: If ``teacher_inputs`` cannot be recognized in another process.
    """
    described = {"class": type(teacher).__qualname__, "fingerprint": teacher_fingerprint(teacher)}
    return described if teacher_inputs is None else {**described, "inputs": identity_of(teacher_inputs)}


def teacher_fingerprint(teacher: nn.Module) -> str:
    """A digest of a teacher's class, parameters and buffers.

    Args:
        teacher: The teacher.

    Returns:
        32 hexadecimal digits.
    """

    def parts() -> Iterator[Any]:
        yield type(teacher).__qualname__
        for name, value in teacher.state_dict().items():
            yield name
            if isinstance(value, Tensor):
                yield tensor_bits(value)

    return fingerprint(parts())
