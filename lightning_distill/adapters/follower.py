"""The adapters' own optimizer."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from lightning_distill import compat
from lightning_distill.patch import MethodPatch
from lightning_distill.processes import world_size

OptimizerCallable = Callable[[Iterable[nn.Parameter]], Optimizer]

_UNCLONEABLE = ("LBFGS", "SparseAdam", "Muon")  # a closure, sparse gradients or matrices only: not for adapters


class Follower:
    """Trains the learned parts with an optimizer that mirrors the student's and steps together with it.

    Adding the adapters to the student's optimizer instead would change its checkpoint and break learning-rate
    schedulers that count groups. In a distributed training the processes communicate at the leader's step, which all of
    them take: they agree on the parts that exist and average all gradients at once.

    Args:
        meet: Lets the processes agree on the learned parts that exist, and exchange what these remember; called with
            the student's device.
        leader: The student's optimizer, or Lightning's or Fabric's wrapper of it.
        factory: Makes the optimizer from the parameters; ``None`` clones the leader's class and settings, and copies
            its current settings before each step. Of several parameter groups the one with the largest learning rate
            is mirrored.
        scaler: The gradient scaler of a hand-written loop.

    Attributes:
        leader: The student's optimizer, without its wrapper.
        optimizer: The adapters' optimizer; ``None`` until the first adapter is built.
    """

    def __init__(
        self,
        meet: Callable[[torch.device], None],
        leader: Optimizer,
        factory: OptimizerCallable | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.leader = bare(leader)
        self.optimizer: Optimizer | None = None
        self._meet, self._factory, self._scaler = meet, factory, scaler
        self._parameters: list[nn.Parameter] = []
        self._mirrored: list[str] = []
        self._prepared = False
        self._overflow: dict[torch.device, Tensor] = {}
        self._handle = self.leader.register_step_post_hook(self._step)
        self._patches = [MethodPatch(self.leader, "zero_grad", self._zero_grad)]
        if leader is not self.leader:
            self._patches.append(MethodPatch(leader, "zero_grad", self._zero_grad_of_wrapper))

    @property
    def device(self) -> torch.device:
        """The device of the student's parameters."""
        parameters = (parameter for group in self.leader.param_groups for parameter in group["params"])
        device: torch.device = next(parameters).device
        return device

    @property
    def has_gradients(self) -> bool:
        """Whether any learned part has a gradient; none has one while the terms rest."""
        return any(parameter.grad is not None for parameter in self._parameters)

    def adopt(self, parameters: list[nn.Parameter], state: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Train these parameters from now on.

        Args:
            parameters: The parameters.
            state: The optimizer's state of each of them; empty for a new one.
            groups: Saved settings of the optimizer's groups; empty takes the leader's.

        Raises:
            ValueError: If the leader cannot be cloned.
        """
        optimizer = _clone(self.leader, parameters) if self._factory is None else self._factory(parameters)
        if any(state) or groups:
            full = optimizer.state_dict()
            full["state"] = {index: entry for index, entry in enumerate(state) if entry}
            if len(groups) == len(full["param_groups"]):
                full["param_groups"] = [
                    {**group, **saved, "params": group["params"]}
                    for group, saved in zip(full["param_groups"], groups, strict=True)
                ]
            optimizer.load_state_dict(full)
        self._parameters, self.optimizer = parameters, optimizer
        settings = optimizer.param_groups[0].keys() & self.leader.param_groups[0].keys()
        self._mirrored = [] if self._factory else sorted(settings - {"params", "param_names"})

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimizer's state of one parameter; empty before its first step."""
        return {} if self.optimizer is None else dict(self.optimizer.state.get(parameter, {}))

    def groups(self) -> list[dict[str, Any]]:
        """The settings of the optimizer's groups, without their parameters."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [{key: value for key, value in group.items() if key != "params"} for group in groups]

    def prepare(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Average the gradients over the processes and undo their scaling, once before a step.

        Args:
            scaler: The gradient scaler, if the leader's gradients have just been unscaled by it: an overflow in either
                optimizer then makes both skip the step.
        """
        if self._prepared:
            return
        distributed = world_size() > 1
        if distributed:
            self._meet(self.device)
            self._prepared = True
        if not self._parameters or (scaler is None and not distributed):
            return
        self._prepared = True
        with torch.no_grad():
            if distributed:
                average_gradients(self._parameters)
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            if scaler is not None and gradients and self.optimizer is not None:
                scaler.unscale_(self.optimizer)
                self._overflow = compat.overflow_flags(scaler, self.optimizer)
                for device, leaders_flag in compat.overflow_flags(scaler, self.leader).items():
                    leaders_flag.copy_(torch.maximum(leaders_flag, self._overflow.pop(device, leaders_flag)))
                    for gradient in gradients:  # values left by a skipped step must not reach the next one
                        gradient.masked_fill_(leaders_flag.bool(), 0.0)

    def begin(self, student: nn.Module) -> None:
        """Before a loss is made: drop the gradients of a step that was not taken.

        The student's may have been cleared by ``student.zero_grad()``, which this optimizer does not see.

        Args:
            student: The student.
        """
        if not self.has_gradients:
            return
        leaders = (parameter for group in self.leader.param_groups for parameter in group["params"])
        if all(parameter.grad is None for parameter in itertools.chain(leaders, student.parameters())):
            self._clear()

    def close(self) -> None:
        """Stop following the leader."""
        self._handle.remove()
        for patch in self._patches:
            patch.undo()

    def _zero_grad(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        self._clear()

    def _zero_grad_of_wrapper(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Lightning's and Fabric's clear past the optimizer that they wrap; accelerate's keeps some gradients."""
        original(*args, **kwargs)
        leaders = (parameter.grad for group in self.leader.param_groups for parameter in group["params"])
        if not any(gradient is not None and bool(gradient.any()) for gradient in leaders):
            self._clear()

    def _clear(self) -> None:
        self._prepared = False
        for parameter in self._parameters:
            parameter.grad = None

    def _step(self, *_: Any) -> None:
        self.prepare()
        if self.optimizer is None or not self.has_gradients:
            self._prepared = False
            return
        # a fused leader unscales inside its own step and skips there: only then are flags left to read
        flags = [*self._overflow.values(), getattr(self.leader, "found_inf", None)]
        self._overflow = {}
        if any(flag is not None and flag.item() for flag in flags):
            self._clear()
            return
        if self._mirrored:
            lead = _leading_group(self.leader)
            for group in self.optimizer.param_groups:
                group.update({key: lead[key] for key in self._mirrored})
        if self._scaler is None:
            compat.plain_step(self.optimizer)(self.optimizer)
        else:  # the leader's own step was allowed already; the scaler decides about this one
            self._scaler.step(self.optimizer)
        self._clear()


def bare(optimizer: Any) -> Optimizer:
    """The optimizer inside Lightning's or Fabric's wrapper, or the optimizer itself."""
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes, in one communication in which every process takes part.

    A process without a gradient counts as zeros, as in DDP. A gradient that no process has stays ``None``, so that
    optimizers leave its parameter alone.
    """
    wide = torch.float64 if any(parameter.dtype == torch.float64 for parameter in parameters) else torch.float32
    device = parameters[0].device
    counts = torch.tensor([float(parameter.grad is not None) for parameter in parameters], dtype=wide, device=device)
    gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]
    flat = torch.cat([counts, *(gradient.reshape(-1).to(wide) for gradient in gradients)])
    torch.distributed.all_reduce(flat)
    present, *sums = torch.split(flat, [len(parameters), *(gradient.numel() for gradient in gradients)])
    # reading from the device waits for it: done only if this process lacks a gradient that others may have
    lacking = any(parameter.grad is None for parameter in parameters)
    used = present.tolist() if lacking else [1.0] * len(parameters)
    size = world_size()
    for parameter, count, total in zip(parameters, used, sums, strict=True):
        parameter.grad = (total / size).view_as(parameter).to(parameter.dtype) if count else None


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
        except Exception as error:  # a custom optimizer may need arguments that only the user knows
            reason = f" ({error})"
    raise ValueError(
        "Expected the student's optimizer to be one that can be cloned for the adapters, but got"
        f" {kind.__name__}{reason}."
        " Pass adapter_optimizer=torch.optim.AdamW, or another factory."
    )
