"""Teachers: freezing them for the length of a training run, running them without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_distill.outputs import map_tensors
from lightning_distill.teachers.loading import load_teacher as load_teacher


class TeacherEnsemble(nn.ModuleList):
    """Several teachers that are shown the same input and answer in a list."""

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The output of every teacher."""
        return [teacher(*args, **kwargs) for teacher in self]


class NoTeacher(nn.Module):
    """What stands in for the teacher where a student learns from itself alone."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


def as_teacher(teacher: Any) -> nn.Module:
    """The teacher, or several as one module; for None one that gives nothing.

    Raises:
        TypeError: If something in it is not a module.
        ValueError: If a sequence is empty.
    """
    if teacher is None:
        return NoTeacher()
    if isinstance(teacher, nn.Module):
        return teacher
    several = teacher
    if hasattr(several, "as_teacher"):  # a cache
        stand_in: nn.Module = several.as_teacher()
        return stand_in
    if not isinstance(several, (list, tuple)):
        raise TypeError(
            f"Expected `teacher` to be a module or a sequence of modules, but got teacher={teacher!r}."
            " Use load_teacher(checkpoint, model) for a file."
        )
    if not several:
        raise ValueError("Expected `teacher` to be at least one module, but got an empty sequence. Pass a network.")
    if wrong := [type(one).__name__ for one in several if not isinstance(one, nn.Module)]:
        raise TypeError(f"Expected `teacher` to hold modules only, but got {wrong[0]}. Pass networks.")
    return TeacherEnsemble(several)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name.

    Raises:
        ValueError: If the name is not that of a floating point dtype.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(
            f"Expected `teacher_dtype` to be a floating point dtype, but got teacher_dtype={dtype!r}."
            " Pass 'bfloat16', 'float16', 'float32' or 'float64'."
        )
    return found


class FrozenTeacher:
    """A teacher held still for a training run, and given back as it was when nobody holds it any more.

    Args:
        module: The teacher.
        dtype: The precision it runs in, whatever precision surrounds it; ``None`` leaves that to the surroundings.
    """

    # what undoes the freezing of each teacher that is held, and how many hold it: two callbacks may share one
    _held: ClassVar[WeakKeyDictionary[nn.Module, tuple[int, list[Callable[[], None]]]]] = WeakKeyDictionary()

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.module, self.dtype = module, dtype
        self._modules: list[nn.Module] = []

    def freeze(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Put the teacher in eval mode, without gradients, on a device, in a precision; further calls do nothing.

        Args:
            device: Where to; ``None`` leaves it where it is.
            dtype: The precision where it has none of its own; ``None`` leaves it as it is.
        """
        if self._modules:
            return
        self._modules = list(self.module.modules())
        holders, undo = self._held.get(self.module, (0, []))
        self._held[self.module] = (holders + 1, undo or [_restorer(module) for module in self._modules])
        self.module.eval().requires_grad_(False)
        # `to` puts new data into the parameters; the data put aside above is what `release` gives back, unrounded
        self.module.to(device=device, dtype=self.dtype or dtype)

    def release(self) -> None:
        """Give the teacher its modes, flags, device and precision back, once its last holder lets go."""
        if not self._modules:
            return
        self._modules = []
        holders, undo = self._held.pop(self.module)
        if holders > 1:
            self._held[self.module] = (holders - 1, undo)
            return
        for restore in undo:
            restore()

    def still(self) -> None:
        """Put the teacher back in eval mode and without gradients, should somebody have changed that."""
        for module in self._modules:
            if module.training:  # a `train()` on something that holds the teacher reaches it too
                module.training = False
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    parameter.requires_grad_(False)

    def cast(self, value: Any) -> Any:
        """``value`` with its floating point tensors in the teacher's own precision, if it has one."""
        if self.dtype is None:
            return value
        return map_tensors(value, lambda tensor: tensor.to(self.dtype) if tensor.is_floating_point() else tensor)


def _restorer(module: nn.Module) -> Callable[[], None]:
    training = module.training
    parameters = {
        name: (parameter, parameter.data, parameter.requires_grad)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    buffers: dict[str, Tensor | None] = dict(module._buffers)

    def restore() -> None:
        module.training = training
        for name, (parameter, data, requires_grad) in parameters.items():
            if parameter.data is not data:
                parameter.data = data
            module._parameters[name] = parameter
            parameter.requires_grad_(requires_grad)
        module._buffers.update(buffers)

    return restore
