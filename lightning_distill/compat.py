"""Every private name of torch and Lightning that this package uses; tests/lightning/test_compat.py has a test for each.

A new release of torch or Lightning is checked by running that file.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._functorch.utils import unwrap_dead_wrappers
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

if TYPE_CHECKING:  # recording, teachers and adapters use this module and know no Trainer
    from lightning.pytorch import Trainer

# torch ---------------------------------------------------------------------------------------------------------------


def version_of(tensor: Tensor) -> int:
    """How many in-place changes a tensor has seen; not for inference tensors, which do not count them."""
    return tensor._version


def transforms_are_active(*tensors: Tensor) -> bool:
    """Whether the caller is inside ``torch.func`` (vmap, grad, jvp), or tensors are batches of ``is_grads_batched``."""
    return torch._C._are_functorch_transforms_active() or any(
        torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors
    )


def applied(function: Any, *inputs: Any) -> Any:
    """An autograd function of some inputs, given in the order of its ``forward``.

    ``Function.apply`` binds them to the signature of ``forward`` first, which takes longer than the arithmetic on a
    small batch.
    """
    if torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(inputs))


def without_subclasses() -> Any:
    """A context in which operations on tensors of subclasses do what they do on plain tensors."""
    return torch._C.DisableTorchFunctionSubclass()


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that notes the operators that run within it, such as ``torch.ops.aten.mm``.

    Attributes:
        seen: Each operator once, without its overload.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operator and run it."""
        self.seen.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))


def as_kind(tensor: Tensor, kind: type[Tensor]) -> Any:
    """A detached tensor as one of a subclass of Tensor, with the same memory."""
    return Tensor._make_subclass(kind, tensor)


IS_VIEW: Any = Tensor._is_view  # asked by FSDP2 of a model's outputs


def forward_hooks(module: nn.Module) -> dict[int, Any]:
    """The table of a module's forward hooks.

    An entry costs a twentieth of ``register_forward_hook`` and ``remove``, which matters for hooks of one step.
    """
    return module._forward_hooks


def forward_pre_hooks(module: nn.Module) -> dict[int, Any]:
    """The table of a module's forward pre-hooks."""
    return module._forward_pre_hooks


def pre_hooks_with_kwargs(module: nn.Module) -> dict[int, bool]:
    """Keys of the pre-hooks that receive keyword arguments too."""
    return module._forward_pre_hooks_with_kwargs


def always_called_hooks(module: nn.Module) -> dict[int, bool]:
    """Keys of the forward hooks that also run after an exception."""
    return module._forward_hooks_always_called


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was applied to this module itself, as a wrapper or in place."""
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or hasattr(module, "_orig_mod") or getattr(module, "_compiler_ctx", None) is not None


def is_compiled_method(function: Any, method: Callable[..., Any]) -> bool:
    """Whether a function is the form of a method that torch.compile has made."""
    inner = getattr(function, "_torchdynamo_orig_callable", None)
    if getattr(inner, "__globals__", {}).get("__name__") == "torch._dynamo.external_utils":  # around methods of torch
        inner = getattr(inner, "__wrapped__", None)
    return inner is not None and getattr(inner, "__func__", inner) is method


def unwrapped(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper of DDP, torch.compile or Fabric; ``None`` if it is not such a wrapper."""
    inside = [module._modules.get(name) for name in ("module", "_orig_mod", "_forward_module")]
    return next((inner for inner in inside if inner is not None), None)


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is a wrapper of DDP, torch.compile or Fabric around a network."""
    return isinstance(module, DistributedDataParallel) or is_of_fabric(module) or "_orig_mod" in module._modules


def is_of_fabric(module: nn.Module) -> bool:
    """Whether a module is Fabric's wrapper of another."""
    return "_forward_module" in module._modules


def make_iterator(loader: DataLoader[Any]) -> Any:
    """A new iterator over a data loader; an instance attribute of this method's name takes its place."""
    return loader._get_iterator()


ITERATOR_METHOD = "_get_iterator"  # of a DataLoader, called by iter()
KEPT_ITERATOR = "_iterator"  # a DataLoader's iterator with persistent workers, used again in the next epoch


class HookGuards:
    """While it is held, torch.compile notices hooks that are added or removed.

    By default dynamo does not guard on hooks: a graph that was traced without them is used with them, and the feature
    is missing without an error. With the guards there is one graph with hooks and one without, and no recompilation
    from step to step. Graphs from before have no such guard and are dropped, if there are any.

    Args:
        owner: An object with whose end they are released at the latest; None if they are always undone.
    """

    _holders = 0  # several may be held at once, and released in any order
    _before = True

    def __init__(self, owner: object = None) -> None:
        self._held = "torch._dynamo" in sys.modules  # else nothing has been compiled, and importing it takes a second
        if not self._held:
            return
        from torch._dynamo import config, convert_frame

        if HookGuards._holders == 0:
            HookGuards._before = config.skip_nnmodule_hook_guards
            config.skip_nnmodule_hook_guards = False
            if convert_frame.input_codes.seen:
                torch.compiler.reset()
        HookGuards._holders += 1
        if owner is not None:
            weakref.finalize(owner, self.undo)

    def undo(self) -> None:
        """Restore the setting when the last holder is released."""
        if not self._held:
            return
        self._held = False
        HookGuards._holders -= 1
        if HookGuards._holders == 0:
            from torch._dynamo import config

            config.skip_nnmodule_hook_guards = HookGuards._before


def overflow_flags(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> dict[torch.device, Tensor]:
    """The flags of each device that say whether an optimizer's unscaled gradients overflowed.

    The scaler has no public way to make two optimizers skip a step together; ``step`` asks each for its own flags.
    """
    flags: dict[torch.device, Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return dict(flags)


def plain_step(optimizer: Optimizer) -> Callable[..., Any]:
    """The step of an optimizer without hooks, past the profiler's record, whose cost is visible in short steps."""
    step = type(optimizer).step
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step


# Lightning -----------------------------------------------------------------------------------------------------------


@contextmanager
def backward_of_fabric() -> Iterator[None]:
    """A context in which Fabric allows any backward pass; in mixed precision it refuses those that it did not start."""
    wrappers: Any = [
        module
        for package in ("lightning.fabric", "lightning_fabric")
        if hasattr(module := sys.modules.get(f"{package}.wrappers"), "_in_fabric_backward")
    ]
    before = [module._in_fabric_backward for module in wrappers]
    try:
        for module in wrappers:
            module._in_fabric_backward = True
        yield
    finally:
        for module, inside in zip(wrappers, before, strict=True):
            module._in_fabric_backward = inside


def is_log_step(trainer: Trainer) -> bool:
    """Whether the loggers are updated in this step."""
    return bool(trainer._logger_connector.should_update_logs)


def spawns(trainer: Trainer) -> bool:
    """Whether the Trainer's processes are started by multiprocessing, so that the callback lives on in their parent."""
    return hasattr(trainer.strategy.launcher, "_start_method")


def after_closure(trainer: Trainer) -> tuple[Any, str]:
    """Owner and name of the method that every optimizer step calls after its gradients are unscaled.

    The callbacks' own hook would not do: the finders put callbacks aside.
    """
    return trainer.precision_plugin, "_after_closure"


def training_loaders(trainer: Trainer) -> Any:
    """The CombinedLoader of the training loop; ``None`` before the data are set up."""
    return trainer.fit_loop._combined_loader


def data_fetcher(trainer: Trainer) -> Any:
    """The source of the training loop's batches: its ``iterator`` may be replaced, its ``batches`` are read ahead."""
    return trainer.fit_loop._data_fetcher


def logged_hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """The hyper-parameters that the Trainer logs by itself: those that module and data have saved for the loggers."""
    owners = [trainer.lightning_module, getattr(trainer, "datamodule", None)]
    saved = [owner.hparams_initial for owner in owners if owner is not None and owner._log_hyperparams]
    # `_class_path` is for LightningCLI alone
    return {name: value for values in saved for name, value in values.items() if name != "_class_path"}


# where `lightning`, `pytorch_lightning` and torch define empty hooks and an empty forward
_BASES = ("LightningModule", "ModelHooks", "DataHooks", "Module")
_PACKAGES = ("lightning", "pytorch_lightning", "torch")


def parameter_names(kind: type) -> tuple[str, ...]:
    """Names of the parameters of a module class's forward."""
    forward = inspect.unwrap(getattr(kind, "forward", lambda: None))
    if not inspect.isfunction(forward):
        return ()
    code = forward.__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def overrides(module: Any, name: str) -> bool:
    """Whether a LightningModule of either package defines a hook itself, in its class or on the object.

    Lightning's own ``is_overridden`` refuses modules of the other package.
    """
    if name in vars(module):
        return True
    kind = next(kind for kind in type(module).__mro__ if name in vars(kind))
    own = kind.__module__.split(".")[0] not in _PACKAGES  # a user's class may well be called Module
    return own or kind.__name__ not in _BASES


def redefined(instance: Any, name: str) -> bool:
    """Whether a subclass, or the object itself, defines a method of the class that introduced it again."""
    return name in vars(instance) or sum(name in vars(kind) for kind in type(instance).__mro__) > 1


def has_strategy(trainer: Trainer, name: str) -> bool:
    """Whether the strategy is of a class of this name, in ``lightning`` or ``pytorch_lightning``."""
    return name in [kind.__name__ for kind in type(trainer.strategy).__mro__]
