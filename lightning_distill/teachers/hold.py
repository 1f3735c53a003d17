"""The hold on a teacher: it is frozen while it is held, and restored afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class _State:
    """The state of a module before it was held: its mode and its tensors by name; and its holders and precision."""

    def __init__(self, module: nn.Module) -> None:
        self.training: bool | None = getattr(module, "training", None)  # a frozen TorchScript program has none
        self.requires_grad = {name: tensor.requires_grad for name, tensor in module.named_parameters(recurse=False)}
        self.data = {name: tensor.data for name, tensor in module.named_parameters(recurse=False)}
        self.buffers: dict[str, Tensor] = dict(module.named_buffers(recurse=False))
        self.holders = 0
        self.dtype: torch.dtype | None = None

    def restore(self, module: nn.Module) -> None:
        """Restore the module's mode, flags, device and precision."""
        if self.training is not None:
            module.training = self.training
        for name, parameter in module.named_parameters(recurse=False):
            before = self.data.get(name)
            if before is not None and not _same_storage(before, parameter.data):
                _keep_changes(before, parameter.data)
                parameter.data = before
            if self.requires_grad.get(name, parameter.requires_grad) != parameter.requires_grad:
                parameter.requires_grad = self.requires_grad[name]  # requires_grad_() is refused inside torch.func
        for name, buffer in list(module.named_buffers(recurse=False)):
            before = self.buffers.get(name)
            if before is not None and before is not buffer:
                _keep_changes(before, buffer)
                module._buffers[name] = before


def modules_of_student(student: nn.Module, teachers: Iterable[nn.Module]) -> set[nn.Module]:
    """The modules of the student, without those that are only inside a teacher that it holds.

    Args:
        student: The student, or the module that contains it.
        teachers: The teachers; the module may keep one in an attribute.
    """
    held, waiting, own = set(teachers) - {student}, [student], set()
    while waiting:
        module = waiting.pop()
        if module not in held and module not in own:
            own.add(module)
            waiting += module.children()
    return own


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """A key that is equal for tensors that begin at one place in memory, where a change of one changes the other.

    Args:
        tensor: The tensor.
    """
    try:
        address = 0 if tensor.is_meta else tensor.data_ptr()
    except (RuntimeError, ValueError):  # a tensor that consists of several others, or has no values yet
        address = 0
    return (tensor.device, address) if address else (id(tensor),)


class Hold:
    """Keeps a teacher in eval mode, without gradients, on a device and in a precision.

    Several objects may hold one network, or networks that share parts; each module is restored when its last hold is
    released. Values that the user writes into the teacher meanwhile, such as a moving average of the student, stay in
    it.

    Args:
        module: The teacher, or several in a container.
        dtype: The precision that the teacher computes in; ``None`` takes that of the surrounding code.

    Attributes:
        student: The student's modules. Those that are the teacher's too, such as a frozen encoder, keep their modes and
            are not restored: the student's owner decides on them. Set it before :meth:`take`.
    """

    # by module and not by teacher: two callbacks may share one network, alone in one and among several in the other
    _held: ClassVar[WeakKeyDictionary[nn.Module, _State]] = WeakKeyDictionary()

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.module, self.dtype = module, dtype
        self.student: set[nn.Module] = set()
        self._shared: set[nn.Module] = set()
        self._shared_parameters: dict[int, nn.Parameter] = {}  # by id; those of modules of the teacher's own too
        self._modules: list[nn.Module] = []
        self._scripts: list[nn.Module] = []
        self._taken = False
        self._end: Any = None

    @property
    def taken(self) -> bool:
        """Whether the teacher is held by this holder."""
        return self._taken

    def take(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Hold the teacher; further calls do nothing.

        Args:
            device: Where to move it; ``None`` leaves it where it is.
            dtype: The precision where it has none of its own; ``None`` leaves it as it is.

        Raises:
            ValueError: If it has a parameter without values, another holder has it in another precision, it cannot be
                moved, or it shares parameters with the student and has a precision of its own.
        """
        if self._taken:
            return
        _check_values(self.module)
        everything = [*self.module.modules()]
        self._shared = self.student & set(everything)
        own = {id(parameter) for module in self.student for parameter in module.parameters(recurse=False)}
        self._shared_parameters = {id(entry): entry for entry in self.module.parameters() if id(entry) in own}
        if self.dtype is not None and any(entry.dtype != self.dtype for entry in self._shared_parameters.values()):
            raise ValueError(
                f"Expected `teacher_dtype` to be None for a teacher that shares parameters with the student, but got"
                f" {self.dtype}, which would convert the student's too. Pass copy.deepcopy(teacher)."
            )
        dtype = self.dtype or dtype
        modules = [module for module in everything if module not in self._shared]
        for module in modules:  # before anything is stored, so that an error leaves nothing behind
            state = self._held.get(module)
            if state is not None and state.dtype != dtype:
                raise ValueError(
                    f"Expected `teacher_dtype` to be the same for all users of one teacher, but got {dtype} and"
                    f" {state.dtype}. Pass one value, or a copy of the teacher: copy.deepcopy(teacher)."
                )
        for module in modules:
            state = self._held.get(module)
            if state is None:
                state = self._held[module] = _State(module)
            state.holders, state.dtype = state.holders + 1, dtype
        self._scripts = [module for module in modules if isinstance(module, torch.jit.ScriptModule)]
        self._modules = [module for module in modules if module not in self._scripts]
        self._taken = True
        # a hold that is dropped without a release restores the teacher too
        self._end = finalize(self, _release, modules)
        modes = [(module, module.training) for module in self._shared]
        with contextlib.suppress(NotImplementedError):  # an exported program keeps the mode that it was traced in
            self.module.eval()
        _set_modes(modes)
        self.still()
        try:
            self._move(device, dtype)
        except BaseException:
            self.release()
            raise

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """A context for a call of the teacher: the modules that it shares with the student are in eval mode too.

        Raises:
            ValueError: If a parameter that they share is trained, so that the teacher would change with the student.
        """
        if any(parameter.requires_grad for parameter in self._shared_parameters.values()):
            raise ValueError(
                "Expected the parameters that teacher and student share to stay frozen, but they are trained now, so"
                " that the teacher would change too. Pass copy.deepcopy(teacher)."
            )
        modes = [(module, module.training) for module in self._shared]
        _set_modes([(module, False) for module in self._shared])
        try:
            yield
        finally:
            _set_modes(modes)

    def _move(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        if _is_dispatched(self.module):  # its parts are on several devices, and its hooks move the inputs
            if dtype is not None:
                raise ValueError(
                    "Expected the teacher to be on one device with `teacher_dtype` or a true precision, but it was"
                    " dispatched to several devices or offloaded. Load it in that precision."
                )
            return
        # `to` puts new data into the parameters; the data noted before is what `release` gives back, unrounded
        if device is not None or dtype is not None:
            self.module.to(device=device, dtype=dtype)

    def release(self) -> None:
        """Release the teacher; the last holder restores its modes, flags, device and precision."""
        if self._end is not None:
            self._end()
        self._modules, self._scripts, self._end, self._taken = [], [], None, False

    def still(self) -> None:
        """Set eval mode and disable gradients again, in case other code has changed them."""
        for module in self._modules:
            if module.training:  # a `train()` on something that holds the teacher reaches it too
                module.training = False
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad and id(parameter) not in self._shared_parameters:
                    parameter.requires_grad_(False)
        for module in self._scripts:  # TorchScript programs have no table of parameters and may have no mode
            if getattr(module, "training", False):
                module.training = False
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    with contextlib.suppress(RuntimeError):  # a frozen program has constants
                        parameter.requires_grad_(False)


def _set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        if module.training != training:
            module.training = training


def _release(modules: list[nn.Module]) -> None:
    for module in modules:
        state = Hold._held.get(module)
        if state is None:
            continue
        state.holders -= 1
        if state.holders == 0:
            del Hold._held[module]
            state.restore(module)


def _same_storage(before: Tensor, now: Tensor) -> bool:
    if (before.dtype, before.device) != (now.dtype, now.device):
        return False
    try:
        return before.data_ptr() == now.data_ptr()
    except RuntimeError:  # a quantized tensor that consists of several others
        return True


def _keep_changes(before: Tensor, now: Tensor) -> None:
    """Copy changes of the converted tensor into the old one."""
    if before.is_inference() or before.shape != now.shape or before.is_meta or now.is_meta:
        return
    converted = before.to(device=now.device, dtype=now.dtype)
    if not torch.equal(converted, now):
        before.copy_(now)


def _check_values(module: nn.Module) -> None:
    """Raise if a parameter or a buffer of the teacher has no values."""
    if _is_dispatched(module):  # accelerate keeps the values of parts elsewhere
        return
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            got, remedy = "is initialised by its first call", "Call the teacher once, and load its weights"
        elif tensor.is_meta:
            got, remedy = "is on the device 'meta'", "Load its weights: teacher.load_state_dict(weights, assign=True)"
        else:
            continue
        raise ValueError(f"Expected `teacher` to have values, but its {name!r} {got}. {remedy}.")


def _is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate has put parts of the network on several devices."""
    return any(hasattr(part, "_hf_hook") or hasattr(part, "hf_device_map") for part in module.modules())
