"""The recorder: hooks on a network that exist for one step and keep its calls."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_distill import compat
from lightning_distill.checks import closest
from lightning_distill.recording.arguments import (
    drop_capturing_hooks,
    has_capturing_hooks,
    parameters_of,
    takes,
    with_arguments,
)
from lightning_distill.recording.calls import Call, Tap, inputs_of, snapshot

_KEYS = itertools.count(2**40)  # beyond the numbers that torch gives its own hooks


def find_layer(root: nn.Module, layer: str) -> nn.Module | None:
    """The module of that dotted path below ``root``, seen through DDP, compile and Fabric wrappers, or ``None``."""
    try:
        return root.get_submodule(layer)
    except RuntimeError:  # a program of TorchScript has modules that call no hooks
        return root if not layer else None
    except AttributeError:
        inner = compat.unwrapped(root)
        return None if inner is None else find_layer(inner, layer)


class LayerPath:
    """The modules on the path from a network to a layer, to see cheaply whether one was replaced.

    Args:
        root: The network.
        layer: Dotted path of the module, which must exist.
    """

    def __init__(self, root: nn.Module, layer: str) -> None:
        self._links: list[tuple[dict[str, nn.Module | None], str, nn.Module | None]] = []
        for part in filter(None, layer.split(".")):
            while part not in root._modules:
                inner = compat.unwrapped(root)
                if inner is None:  # not a module of the table, such as a property that returns one
                    return
                name = next(name for name, module in root._modules.items() if module is inner)
                self._links.append((root._modules, name, inner))
                root = inner
            child = root._modules[part]
            self._links.append((root._modules, part, child))
            if child is None:
                return
            root = child

    @property
    def holds(self) -> bool:
        """Whether no module on the way was replaced since."""
        return all(table.get(name) is module for table, name, module in self._links)


def random_state() -> dict[str, Any]:
    """The states of torch's generators on the CPU and on the current accelerator."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


@contextlib.contextmanager
def restored(state: dict[str, Any]) -> Iterator[None]:
    """A context with the generators in an earlier state; afterwards they are as before it."""
    before = random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(before)


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


class _Hook:
    """A hook for one module and one step. A copy or a pickle of that module gets a function that does nothing.

    Args:
        module: The module. Copies of it that share the table of hooks are not recorded.
        recorder: Keeps the features that the hook reads.
        layer: Name of the layer.
    """

    def __init__(self, module: nn.Module, recorder: Recorder, layer: str = "") -> None:
        self.module, self.recorder, self.layer, self.key = module, recorder, layer, next(_KEYS)

    def put(self) -> None:
        """Add the hook to the module's table."""
        compat.forward_hooks(self.module)[self.key] = self

    def take(self) -> None:
        """Remove the hook from the module's table."""
        compat.forward_hooks(self.module).pop(self.key, None)

    def __deepcopy__(self, memo: Any) -> Any:
        return contextlib.nullcontext().__exit__  # takes anything and returns None; from the standard library

    def __reduce__(self) -> Any:  # so a file that was saved inside a step loads without this package
        return getattr, (contextlib.nullcontext(), "__exit__")


class _PreHook(_Hook):
    def put(self) -> None:
        compat.forward_pre_hooks(self.module)[self.key] = self
        compat.pre_hooks_with_kwargs(self.module)[self.key] = True

    def take(self) -> None:
        compat.forward_pre_hooks(self.module).pop(self.key, None)
        compat.pre_hooks_with_kwargs(self.module).pop(self.key, None)


class _OutputHook(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        recorder = self.recorder
        if module is self.module and recorder.open:
            recorder.open[0].runs.setdefault((self.layer, "output"), []).append(snapshot(output, recorder.copies))


class _InputHook(_PreHook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder = self.recorder
        if module is self.module and recorder.open:
            value = snapshot(inputs_of(args, kwargs), recorder.copies)
            recorder.open[0].runs.setdefault((self.layer, "input"), []).append(value)


class _EnterHook(_PreHook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.recorder.enter(args, kwargs) if module is self.module else None


class _LeaveHook(_Hook):
    def put(self) -> None:
        super().put()
        compat.always_called_hooks(self.module)[self.key] = True  # after an exception too, which the user may catch

    def take(self) -> None:
        super().take()
        compat.always_called_hooks(self.module).pop(self.key, None)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self.module:
            self.recorder.leave(output)


class Recorder:
    """Records the calls of a network, and the features at its tapped layers, while a :class:`Recording` is open.

    Attributes:
        calls: The calls recorded since it was last cleared.
        open: The calls under way: the network's, and inside it its calls of itself.
        keeps_random_state: Whether calls keep the state of the generators, so that one can be made again.
        copies: Whether tensors are copied, because they keep no versions.

    Args:
        root: The network.
        taps: The places to read.
        who: ``"student"`` or ``"teacher"``, for messages.
        prefix: A prefix that layer names may carry, such as ``"model."`` where the names are those of a module above.
        first: The part of the network whose call opens a call of the network; ``None`` is the network itself.
        last: The part whose call closes it; ``None`` is the network itself.
    """

    def __init__(
        self,
        root: nn.Module,
        taps: Iterable[Tap],
        who: str = "student",
        prefix: str = "",
        *,
        first: nn.Module | None = None,
        last: nn.Module | None = None,
    ) -> None:
        self.root, self.taps, self.who, self.prefix = root, list(taps), who, prefix
        self.first, self.last = root if first is None else first, root if last is None else last
        # A teacher's own input and output are known where it is called: without a tap on them its root needs no hook.
        self._whole = who == "student" or any(not tap.layer for tap in self.taps)
        self.calls: list[Call] = []
        self.open: list[Call] = []
        self.copies = self.keeps_random_state = False
        self._needs_grad = False
        self._arguments: dict[str, Any] = {}
        self._parameters: tuple[str, ...] = ()
        self._was_capturing: bool | None = None  # None until arguments are added to a call
        self._hooks: list[_Hook] | None = None
        self._paths: list[LayerPath] = []  # to the layers of the hooks
        self._ends: list[_Hook] = []

    def find(self, layer: str) -> nn.Module | None:
        """The module that a layer name refers to, or ``None``."""
        module = find_layer(self.root, layer)
        if module is None and self.prefix:
            if layer == self.prefix.rstrip("."):
                return self.root
            if layer.startswith(self.prefix):
                module = find_layer(self.root, layer[len(self.prefix) :])
        return module

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
            if self.find(tap.layer) is None and isinstance(self.root, torch.jit.ScriptModule):
                raise ValueError(
                    f"Expected the {self.who} to be a module with layers, since `{argument}` names {tap.layer!r}, but"
                    " got a program of TorchScript, whose layers cannot be read. Pass the module that it was made of."
                )
            if self.find(tap.layer) is None:
                names = [name for name, _ in self.root.named_modules() if name]
                raise ValueError(
                    f"Expected `{argument}` to name a module of the {self.who}, but got {tap.layer!r}."
                    f" {closest(tap.layer, names)}"
                )

    def clear(self) -> None:
        """Release what was recorded."""
        self.calls.clear()
        self.open.clear()

    def close(self) -> None:
        """Remove the hooks that transformers has put on the layers because of added arguments."""
        if self._was_capturing is False:
            drop_capturing_hooks(self.root)
        self._was_capturing = None

    def start(self, needs_grad: bool, features: bool, arguments: Mapping[str, Any] | None = None) -> list[_Hook]:
        """Put the hooks into the modules' tables.

        Args:
            needs_grad: Whether to leave out calls made with gradients disabled.
            features: Whether to keep the features at the tapped layers, beside the input and the output.
            arguments: Keyword arguments to add to each recorded call, if the network takes them.

        Returns:
            The hooks; the caller removes them.
        """
        if self._hooks is None or not all(path.holds for path in self._paths):  # the user may replace a layer
            self._hooks = self._feature_hooks()
            if self._whole:
                self._ends = [_EnterHook(self.first, self), _LeaveHook(self.last, self)]
            self._parameters = tuple(parameters_of(self.first))
        self._needs_grad, self.copies = needs_grad, torch.is_inference_mode_enabled()
        whole = self.first is self.last  # of several networks none is called with all
        self._arguments = {key: value for key, value in (arguments or {}).items() if whole and takes(self.root, key)}
        if self._arguments and self._was_capturing is None:
            self._was_capturing = has_capturing_hooks(self.root)
        if not self._whole:
            self.open = [Call((), {}, who=self.who)]
            self.calls.append(self.open[0])
        hooks = [*self._hooks, *self._ends] if features else [*self._ends]
        for hook in hooks:
            hook.put()
        return hooks

    def _feature_hooks(self) -> list[_Hook]:
        hooks: list[_Hook] = []
        self._paths = []
        for layer, where in sorted({(tap.layer, tap.where) for tap in self.taps if tap.layer}):
            module = self.find(layer)
            if module is not None:  # else `check` has reported it, or reading it will
                hooks.append((_OutputHook if where == "output" else _InputHook)(module, self, layer))
                inside = find_layer(self.root, layer) is not None
                self._paths.append(LayerPath(self.root, layer if inside else layer[len(self.prefix) :]))
        return hooks

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Open a call.

        Returns:
            The arguments to call the network with, if they differ from the user's.
        """
        if not torch.is_grad_enabled() and self._needs_grad:
            return None
        if self.open and self.first is not self.last:
            raise ValueError(
                f"Expected {type(self.last).__name__} to be called after each call of {type(self.first).__name__}, the"
                " last and the first of `student`, but the first was called twice. Call them in turn."
            )
        (args, kwargs), versions = snapshot((args, kwargs), self.copies)
        state = random_state() if self.keeps_random_state else None
        self.open.append(
            Call(
                args,
                kwargs,
                who=self.who,
                trains=self._needs_grad,
                input_versions=versions,
                random_state=state,
                parameters=self._parameters,
                network=self.root,
            )
        )
        return with_arguments(self.root, args, kwargs, self._arguments) if self._arguments else None

    def leave(self, output: Any) -> None:
        """Close the call that was opened last."""
        if not self.open or (not torch.is_grad_enabled() and self._needs_grad):
            return
        call = self.open.pop()
        if call.skipped is not None:
            call.skipped.trace.open = False
        if output is None:  # the forward pass raised an error
            return
        if self._arguments and isinstance(output, tuple) and not hasattr(output, "_fields"):
            raise ValueError(
                f"Expected the {self.who} to return its outputs by name where a term adds {', '.join(self._arguments)}"
                " to its call, but got a tuple. Leave out return_dict=False, in the call and in the model's config."
            )
        call.output, call.output_versions = snapshot(output, self.copies)
        if not self.open:  # a network that calls itself is recorded once
            self.calls.append(call)

    def rerun(self, call: Call) -> Call:
        """Call the network once more as in a recorded call, with the same random numbers.

        Args:
            call: The recorded call, which must have kept its random state. The new call takes its place.

        Returns:
            The new call.

        Raises:
            ValueError: If the network consists of several that are called one after the other.
        """
        if self.first is not self.last:
            raise ValueError(
                "Expected a student that is one network where its logits are scaled or capped after the head, but got"
                " several that are called one after the other. Use SequenceDistillation."
            )
        place = self.calls.index(call)
        del self.calls[place]
        with restored(call.random_state):
            self.last(*call.args, **call.kwargs)
        again = self.calls.pop()
        self.calls.insert(place, again)
        return again


class Recording:
    """A context in which recorders record. Calls of an earlier recording stay; after an exception nothing stays.

    Args:
        recorders: The recorders.
        needs_grad: Whether to leave out calls made with gradients disabled.
        features: Whether to keep the features at the tapped layers.
        arguments: Keyword arguments to add to each recorded call.
    """

    def __init__(
        self,
        recorders: Sequence[Recorder],
        needs_grad: bool = False,
        features: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._recorders, self._needs_grad, self._features = recorders, needs_grad, features
        self._arguments = arguments
        self._hooks: list[_Hook] = []

    def __enter__(self) -> None:
        for recorder in self._recorders:
            self._hooks += recorder.start(self._needs_grad, self._features, self._arguments)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for hook in self._hooks:
            hook.take()
        self._hooks = []
        for recorder in self._recorders:
            recorder.open.clear()
            if kind is not None:
                recorder.clear()
