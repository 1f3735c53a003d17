"""Adapters, the learned maps from a student feature's shape to a teacher feature's, and their optimizer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from lightning_distill.patch import Patch

AdapterFactory = Callable[[torch.Size, torch.Size], nn.Module]
OptimizerCallable = Callable[[Iterable[nn.Parameter]], Optimizer]

_CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_UNCLONEABLE = ("LBFGS", "SparseAdam", "Muon")  # a closure, sparse gradients or matrices only: not for adapters


def make_adapter(
    adapter: str | nn.Module | AdapterFactory | None, student: torch.Size, teacher: torch.Size, layer: str
) -> nn.Module:
    """The module that maps a student feature to the teacher's shape.

    Args:
        adapter: ``"auto"`` (identity where the shapes agree, else a 1x1 convolution for maps and a linear map for
            vectors and token sequences), ``"linear"`` (over the last dimension), ``"conv1x1"`` (over dimension 1),
            ``None`` (identity), a module to copy, or a factory called with the two shapes.
        student: Shape of the student's feature, ``(N, D)``, ``(N, L, D)`` or ``(N, C, H, W)``.
        teacher: Shape of the teacher's feature.
        layer: The student layer's name, for messages.

    Returns:
        A new module, in float32 on the CPU.

    Raises:
        ValueError: If no adapter of that kind fits the shapes.
        TypeError: If ``adapter`` is none of these.

    Example:
        >>> make_adapter("auto", torch.Size((8, 16, 7, 7)), torch.Size((8, 64, 7, 7)), "layer3")
        Conv2d(16, 64, kernel_size=(1, 1), stride=(1, 1))
    """
    if adapter == "auto":
        maps = len(student) > 3
        if len(student) != len(teacher) or len(student) < 2:
            raise ValueError(
                f"Expected the features of student layer {layer!r} and its teacher layer to have the same number of"
                f" dimensions, 2 or more, but got {tuple(student)} and {tuple(teacher)}."
                " Pass adapter=<a module, or a factory of the two shapes>."
            )
        dim = 1 if maps else -1
        adapter = None if student[dim] == teacher[dim] else "conv1x1" if maps else "linear"
    if adapter is None:
        return nn.Identity()
    if adapter == "linear":
        return nn.Linear(student[-1], teacher[-1])
    if adapter == "conv1x1":
        if len(student) not in _CONVOLUTIONS:
            raise ValueError(
                f"Expected the feature of student layer {layer!r} to have 3 to 5 dimensions for adapter='conv1x1',"
                f" but got {tuple(student)}. Pass adapter='linear'."
            )
        return _CONVOLUTIONS[len(student)](student[1], teacher[1], kernel_size=1)
    if isinstance(adapter, nn.Module):
        return copy.deepcopy(
            adapter
        )  # a second training run must start from what was passed, not from what was learned
    if callable(adapter):
        made = adapter(student, teacher)
        if isinstance(made, nn.Module):
            return made
        raise TypeError(f"Expected `adapter` to make a module, but got {type(made).__name__}. Return an nn.Module.")
    raise TypeError(
        "Expected `adapter` to be 'auto', 'linear', 'conv1x1', None, a module or a factory, but got"
        f" adapter={adapter!r}."
    )


class FollowerOptimizer:
    """The adapters' own optimizer: it mirrors the student's optimizer and steps whenever that one steps.

    Adding the adapters to the student's optimizer instead would change its checkpoint and break learning-rate
    schedulers that count groups.

    Args:
        parameters: What it trains.
        leader: The student's optimizer, or Lightning's or Fabric's wrapper of it.
        factory: Makes the optimizer from the parameters; ``None`` clones the leader's class and settings, and copies
            its current settings before each step. Of several parameter groups the one with the largest learning rate
            is mirrored.
        scaler: The gradient scaler of a hand-written loop.

    Raises:
        ValueError: If the leader cannot be cloned.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        leader: Optimizer,
        factory: OptimizerCallable | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.leader = bare(leader)
        self._parameters, self._mirrors, self._scaler = list(parameters), factory is None, scaler
        self.optimizer = _clone(self.leader, self._parameters) if factory is None else factory(self._parameters)
        settings = self.optimizer.param_groups[0].keys() & self.leader.param_groups[0].keys()
        self._mirrored = sorted(settings - {"params", "param_names"})
        # past the profiler's record and the hooks that every step runs: nobody can have hooked this optimizer, and on a
        # step of a millisecond they show
        step = type(self.optimizer).step
        self._bare_step = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
        self._handle = self.leader.register_step_post_hook(self._step)
        # Lightning's and Fabric's wrappers clear gradients by themselves, past the optimizer that they wrap
        owners = {id(owner): owner for owner in (leader, self.leader)}.values()
        self._patches = [Patch(owner, "zero_grad", self._zero_grad) for owner in owners]
        self._prepared = False
        self._overflow: dict[torch.device, Tensor] = {}

    def prepare(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Average the gradients over the processes and undo their scaling, once before a step.

        Args:
            scaler: The gradient scaler, if the leader's gradients have just been unscaled by it: an overflow in either
                optimizer then makes both skip the step.
        """
        if self._prepared or (scaler is None and world_size() == 1):
            return
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if not gradients:
            return
        self._prepared = True
        with torch.no_grad():
            average_over_processes(gradients)
            if scaler is not None:
                scaler.unscale_(self.optimizer)
                self._overflow = _overflows(scaler, self.optimizer)
                for device, theirs in _overflows(scaler, self.leader).items():
                    theirs.copy_(torch.maximum(theirs, self._overflow.pop(device, theirs)))
                    for gradient in gradients:  # what a skipped step leaves must not reach the next one
                        gradient.masked_fill_(theirs.bool(), 0.0)

    def close(self) -> None:
        """Let the leader go."""
        self._handle.remove()
        for patch in self._patches:
            patch.undo()

    def _zero_grad(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        self._clear()

    def _clear(self) -> None:
        self._prepared = False
        for parameter in self._parameters:
            parameter.grad = None

    def _step(self, *_: Any) -> None:
        if all(parameter.grad is None for parameter in self._parameters):
            return
        self.prepare()
        # a fused leader unscales inside its own step, and skips there; only then are there flags left to read here
        flags = [*self._overflow.values(), getattr(self.leader, "found_inf", None)]
        self._overflow = {}
        if any(flag is not None and flag.item() for flag in flags):
            self._clear()
            return
        if self._mirrors:
            lead = _leading_group(self.leader)
            for group in self.optimizer.param_groups:
                group.update({key: lead[key] for key in self._mirrored})
        if self._scaler is None:
            self._bare_step(self.optimizer)
        else:  # the leader's own step was allowed already; the scaler decides about this one
            self._scaler.step(self.optimizer)
        self._clear()


def bare(optimizer: Any) -> Optimizer:
    """The optimizer inside Lightning's or Fabric's wrapper, or the optimizer itself."""
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def average_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its mean over all processes, in place, in one communication per dtype."""
    size = world_size()
    if size == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        torch.distributed.all_reduce(flat)
        for tensor, mean in zip(same, torch.split(flat.div_(size), [tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def world_size() -> int:
    """Number of processes that train together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def _leading_group(optimizer: Optimizer) -> dict[str, Any]:
    if len(optimizer.param_groups) == 1:
        return optimizer.param_groups[0]
    # by the rates before any schedule, since a warm-up starts all of them at 0
    return max(optimizer.param_groups, key=lambda group: float(group.get("initial_lr", group.get("lr", 0.0))))


def _clone(leader: Optimizer, parameters: list[nn.Parameter]) -> Optimizer:
    kind = type(leader)
    settings = {
        key: value for key, value in _leading_group(leader).items() if key in inspect.signature(kind).parameters
    }
    settings.pop("params", None)
    reason = ""
    if not isinstance(leader, (LBFGS, SparseAdam)) and kind.__name__ not in _UNCLONEABLE:
        try:
            return kind(parameters, **settings)
        except Exception as error:  # a user's optimizer may need what only the user knows
            reason = f" ({error})"
    raise ValueError(
        "Expected the student's optimizer to be one that can be cloned for the adapters, but got"
        f" {kind.__name__}{reason}."
        " Pass adapter_optimizer=torch.optim.AdamW, or another factory."
    )


def _overflows(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> dict[torch.device, Tensor]:
    # The scaler has no public way to make two optimizers skip together; step() asks each for its own flags.
    found: dict[torch.device, Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return dict(found)
