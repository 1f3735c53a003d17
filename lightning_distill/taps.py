"""Taps, the places in a network that features are read from, and the recorder that reads them.

A :class:`Recorder` hooks one network (the student or a teacher). While it is switched on, it keeps every call of that
network: what it was called with, what it returned, and what the tapped layers inside gave. It knows no Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_distill.checks import closest
from lightning_distill.outputs import map_tensors, select


@dataclass(frozen=True)
class Tap:
    """A place in a network that a feature is read from.

    Args:
        layer: Dotted path of the layer below the student or the teacher, such as ``"layer3.0"``; ``""`` is the whole
            network.
        output: Which part of what the layer gives: an index of a tuple or list, a key of a dict or a field of a
            dataclass, or a callable that picks a tensor. ``None`` takes the obvious tensor and refuses to guess.
        call: Which call of the layer, from 0, where one forward pass runs it several times.
        where: ``"output"`` reads what the layer returns, ``"input"`` what it is called with.

    Raises:
        TypeError: If ``layer`` is not a string.
        ValueError: If ``where`` is neither ``"output"`` nor ``"input"``, or ``call`` is negative.

    Example:
        >>> Tap("encoder.layer.3", output=0)
        Tap(layer='encoder.layer.3', output=0, call=None, where='output')
    """

    layer: str
    output: int | str | Callable[[Any], Tensor] | None = None
    call: int | None = None
    where: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        if not isinstance(self.layer, str):
            raise TypeError(f"Expected `layer` to be a string, but got layer={self.layer!r}. Pass the layer's path.")
        if self.where not in ("output", "input"):
            raise ValueError(f"Expected `where` to be 'output' or 'input', but got where={self.where!r}.")
        if self.call is not None and self.call < 0:
            raise ValueError(f"Expected `call` to be 0 or greater, but got call={self.call}.")

    @classmethod
    def of(cls, layer: str | Tap) -> Tap:
        """The tap itself, or a tap on the output of the layer of that name."""
        return layer if isinstance(layer, Tap) else cls(layer)


def _versions(value: Any) -> list[tuple[Tensor, int]]:
    """Every tensor in ``value`` with the count of in-place changes it has seen."""
    found, waiting = [], [value]
    while waiting:  # not recursive: this runs for every feature of every step
        one = waiting.pop()
        if isinstance(one, Tensor):
            if not one.is_inference():
                found.append((one, one._version))
        elif isinstance(one, (tuple, list)):
            waiting += one
        elif isinstance(one, Mapping):
            waiting += one.values()
    return found


def _snapshot(value: Any, copy: bool) -> tuple[Any, list[tuple[Tensor, int]]]:
    # A compiled graph turns in-place changes into new tensors, so versions tell nothing there: take a copy, which the
    # compiler fuses. Inference tensors keep no versions either.
    if copy or torch.compiler.is_compiling():
        return map_tensors(value, torch.clone), []
    if isinstance(value, Tensor) and not value.is_inference():  # by far the commonest
        return value, [(value, value._version)]
    return value, _versions(value)


def _changed(versions: list[tuple[Tensor, int]]) -> bool:
    for tensor, version in versions:  # noqa: SIM110 - a generator would cost more than the loop
        if tensor._version != version:
            return True
    return False


@dataclass(eq=False)
class Call:
    """One recorded forward pass of a network.

    Attributes:
        args: Positional arguments that the network was called with.
        kwargs: Keyword arguments that it was called with.
        output: What it returned.
        who: ``"student"`` or ``"teacher"``, for messages.
        teacher: Which of several teachers answered, from 0.
        trains: Whether gradients must flow back into the call, so that what is read without them is an error.
        read_logits: From the output to the logits.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    who: str = "student"
    teacher: int = 0
    trains: bool = False
    read_logits: Callable[[Any], Tensor] | None = None
    _versions: list[tuple[Tensor, int]] = field(default_factory=list, repr=False)
    _output_versions: list[tuple[Tensor, int]] = field(default_factory=list, repr=False)
    _runs: dict[tuple[str, str], list[tuple[Any, list[tuple[Tensor, int]]]]] = field(default_factory=dict, repr=False)

    @property
    def logits(self) -> Tensor:
        """The logits in the call's output.

        Raises:
            ValueError: If the output was changed in place since, holds no obvious logits, or carries no gradient.
        """
        if _changed(self._output_versions):
            raise ValueError(
                f"Expected the {self.who}'s output to stay as it was returned, but it was changed in place since."
                " Compute a new tensor from it."
            )
        logits = self.read_logits(self.output) if self.read_logits else select(self.output, None, f"{self.who} output")
        return self._with_gradient(logits)

    def _with_gradient(self, tensor: Tensor, layer: str | None = None) -> Tensor:
        if self.trains and not tensor.requires_grad:
            what = "output" if layer is None else f"layer {layer!r}"
            raise ValueError(
                f"Expected the student's {what} to carry a gradient, but it does not: it is frozen, or runs inside"
                " reentrant activation checkpointing. Unfreeze it, pass use_reentrant=False, or tap another layer."
            )
        return tensor

    def feature(self, tap: Tap) -> Tensor:
        """The tensor that a tap reads.

        Args:
            tap: The place; the recorder must have been made with it.

        Returns:
            The feature, with its graph.

        Raises:
            ValueError: If the layer did not run, ran more than once without a call index, was changed in place after
                it was read, gives no obvious tensor, or carries no gradient where the call needs one.
        """
        runs = self._runs.get((tap.layer, tap.where), [])
        if tap.layer == "":
            whole = self.output if tap.where == "output" else _input(self.args, self.kwargs)
            runs = [(whole, self._versions if tap.where == "input" else self._output_versions)]
        if len(runs) == 1 and not tap.call and tap.output is None and isinstance(runs[0][0], Tensor):
            value, versions = runs[0]  # by far the commonest
            if not _changed(versions):
                return self._with_gradient(value, tap.layer)
        what = f"{self.who} layer {tap.layer!r}"
        if not runs:
            raise ValueError(f"Expected {what} to run in the {self.who}'s forward pass, but it did not. Tap another.")
        if tap.call is None and len(runs) > 1:
            raise ValueError(
                f"Expected {what} to run once in a forward pass, but it ran {len(runs)} times."
                f" Pass Tap({tap.layer!r}, call=0) to call={len(runs) - 1}."
            )
        if (tap.call or 0) >= len(runs):
            raise ValueError(f"Expected `call` to be below {len(runs)}, the runs of {what}, but got call={tap.call}.")
        value, versions = runs[tap.call or 0]
        if _changed(versions):
            raise ValueError(
                f"Expected {what} to keep the feature that was read from it, but a later layer changed it in place."
                " Tap that later layer, or build it with inplace=False."
            )
        return self._with_gradient(select(value, tap.output, f"the {tap.where} of {what}"), tap.layer)

    def check_input(self) -> None:
        """Raise if the network's input was changed in place since, so that nobody else can be shown the same input.

        Raises:
            ValueError: If it was.
        """
        if _changed(self._versions):
            raise ValueError(
                f"Expected the {self.who}'s input to stay as it was, but it was changed in place, so the teacher would"
                " not see what the student saw. Build the first layer with inplace=False, and make a new tensor where"
                " the training step changes it."
            )


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs and not args:
        return kwargs
    return args[0] if len(args) == 1 else args


def find_layer(root: nn.Module, layer: str) -> nn.Module | None:
    """The module of that dotted path below ``root``, seen through DDP, compile and Fabric wrappers, or ``None``."""
    try:
        return root.get_submodule(layer)
    except AttributeError:
        wrapped = [root._modules.get(name) for name in ("module", "_orig_mod", "_forward_module")]
        inner = next((module for module in wrapped if module is not None), None)
        return None if inner is None else find_layer(inner, layer)


class Recorder:
    """Forward hooks on a network that record only while switched on.

    Attributes:
        calls: The calls recorded since it was last switched on.

    Args:
        root: The network.
        taps: The places to read.
        who: ``"student"`` or ``"teacher"``, for messages.
        prefix: A prefix that layer names may carry, such as ``"model."`` where the names are those of a module above.
    """

    def __init__(self, root: nn.Module, taps: Iterable[Tap], who: str = "student", prefix: str = "") -> None:
        self.root, self.taps, self.who, self.prefix = root, list(taps), who, prefix
        # a teacher's own input and output are at hand where it is called: without a tap on them its root needs no hook
        self._whole = who == "student" or any(not tap.layer for tap in self.taps)
        self.calls: list[Call] = []
        self._on = self._needs_grad = self._features = self._copy = False
        self._stack: list[Call] = []
        self._handles: list[RemovableHandle] = []

    @property
    def watched(self) -> list[Recorder]:
        """The recorders to switch on for a step: this one."""
        return [self]

    def find(self, layer: str) -> nn.Module | None:
        """The module that a layer name means, or ``None``."""
        found = find_layer(self.root, layer)
        if found is None and self.prefix and layer.startswith(self.prefix):
            found = find_layer(self.root, layer[len(self.prefix) :])
        return found

    def unknown(self) -> list[str]:
        """The names of tapped layers that the network does not have."""
        return [tap.layer for tap in self.taps if self.find(tap.layer) is None]

    def check(self, terms: Iterable[tuple[str, Tap]]) -> None:
        """Raise if a layer is unknown.

        Args:
            terms: Pairs of the argument that named a layer, and the tap.

        Raises:
            ValueError: With the closest names.
        """
        for argument, tap in terms:
            if self.find(tap.layer) is None:
                names = [name for name, _ in self.root.named_modules() if name]
                raise ValueError(
                    f"Expected `{argument}` to name a module of the {self.who}, but got {tap.layer!r}."
                    f" {closest(tap.layer, names)}"
                )

    def attach(self) -> None:
        """Register the hooks; further calls do nothing."""
        if self._handles:
            return
        if any(_is_compiled(module) for module in self.root.modules()):
            torch.compiler.reset()  # graphs that were compiled before the hooks existed would ignore them
        for layer, where in sorted({(tap.layer, tap.where) for tap in self.taps if tap.layer}):
            module = self.find(layer)
            if module is None:
                continue  # `check` has reported it, unless the layer is to appear later: then reading it raises
            if where == "output":
                self._handles.append(module.register_forward_hook(self._output_hook(layer)))
            else:
                self._handles.append(module.register_forward_pre_hook(self._input_hook(layer), with_kwargs=True))
        if self._whole:
            self._handles.append(self.root.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(self.root.register_forward_hook(self._leave))

    def detach(self) -> None:
        """Remove the hooks and release what was recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def clear(self) -> None:
        """Release what was recorded."""
        self.calls.clear()
        self._stack.clear()

    def start(self, needs_grad: bool = False, features: bool = True) -> None:
        """Switch on, forgetting what was recorded before.

        Args:
            needs_grad: Whether to leave out calls made with gradients disabled.
            features: Whether to keep what the tapped layers give, beside the input and the output.
        """
        self.attach()
        self.clear()
        self._on, self._needs_grad, self._features = True, needs_grad, features
        self._copy = torch.is_inference_mode_enabled()
        if not self._whole:
            self._stack = [Call((), {}, who=self.who)]
            self.calls.append(self._stack[0])

    def stop(self) -> None:
        """Switch off; what was recorded stays."""
        self._on = False
        self._stack.clear()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._on and (torch.is_grad_enabled() or not self._needs_grad):
            (args, kwargs), versions = _snapshot((args, kwargs), self._copy)
            self._stack.append(Call(args, kwargs, who=self.who, trains=self._needs_grad, _versions=versions))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._on and self._stack and (torch.is_grad_enabled() or not self._needs_grad):
            call = self._stack.pop()
            call.output, call._output_versions = _snapshot(output, self._copy)
            if not self._stack:  # a network that calls itself is recorded once
                self.calls.append(call)

    def _output_hook(self, layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._on and self._features and self._stack:
                self._stack[0]._runs.setdefault((layer, "output"), []).append(_snapshot(output, self._copy))

        return hook

    def _input_hook(self, layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._on and self._features and self._stack:
                value = _snapshot(_input(args, kwargs), self._copy)
                self._stack[0]._runs.setdefault((layer, "input"), []).append(value)

        return hook

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return self  # copies of a hooked network (EMA, SWA) must not start recorders of their own


def _is_compiled(module: nn.Module) -> bool:
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or hasattr(module, "_orig_mod") or getattr(module, "_compiler_ctx", None) is not None


class Recording:
    """A context in which recorders are switched on; after an exception nothing of it stays recorded.

    Args:
        recorders: The recorders.
        needs_grad: Whether to leave out calls made with gradients disabled.
        features: Whether to keep what the tapped layers give.
    """

    def __init__(self, recorders: Sequence[Recorder], needs_grad: bool = False, features: bool = True) -> None:
        self._recorders, self._needs_grad, self._features = recorders, needs_grad, features

    def __enter__(self) -> None:
        for recorder in self._recorders:
            recorder.start(self._needs_grad, self._features)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for recorder in self._recorders:
            recorder.stop()
            if kind is not None:
                recorder.clear()
