"""The tensor that stands where logits would be, and what a model does to it after its head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_distill import compat

Recipe = tuple[float | str, ...]  # factors and "tanh", in order: (1 / 30, "tanh", 30.0) is a soft cap of 30


class NoLogitsError(RuntimeError):
    """Raised where logits are read that are not made in this step."""

    def __init__(self, use: str) -> None:
        super().__init__(
            f"Expected the logits not to be used in this training step, where FusedLinearDistillation reads what goes"
            f" into the head and no logits are made, but got {use}. Call the model without labels;"
            " FusedLinearDistillation(task_weight=...) adds the cross entropy with them. If you need logits in"
            " training, use SequenceDistillation."
        )


class Trace:
    """Records the operations of a model on its head's output until its forward returns.

    Attributes:
        recipe: The operations so far.
        open: Whether the forward still runs.
    """

    def __init__(self) -> None:
        self.recipe: Recipe = ()
        self.open = True


def placeholder(carrier: Tensor, shape: tuple[int, ...], trace: Trace) -> Tensor:
    """A tensor that poses as logits.

    Args:
        carrier: The loss, one element: wrappers such as DDP and FSDP2 find its graph in the model's output.
        shape: Shape of the logits, ``(B, T, V)``.
        trace: Receives what the model does with them.
    """
    return _posed(_Pose.apply(carrier), shape, trace, ())  # type: ignore[no-untyped-call]


def carrier_in(output: Any) -> Tensor | None:
    """The loss that a model's output carries in the place of logits, or ``None``."""
    posed = next((leaf for leaf in tree_leaves(output) if type(leaf) is Placeholder), None)
    if posed is None or not posed.requires_grad:
        return None
    plain: Tensor = _Pose.apply(posed, True)  # type: ignore[no-untyped-call]
    return plain


def merged(recipe: Recipe) -> Recipe:
    """A recipe with neighbouring factors multiplied, and without factors of 1.

    Example:
        >>> merged((0.5, 0.5, "tanh", 2.0, 0.5))
        (0.25, 'tanh')
    """
    steps: list[float | str] = []
    for step in recipe:
        if isinstance(step, float) and steps and isinstance(steps[-1], float):
            steps[-1] *= step
        else:
            steps.append(step)
    return tuple(step for step in steps if step != 1.0)


_T = Tensor
_UNCHANGED: set[Any] = {
    *(_T.float, _T.to, _T.type_as, _T.type, _T.clone, _T.contiguous, _T.detach, _T.cpu, _T.cuda, _T.bfloat16, _T.half),
    *(_T.double, torch.clone, _T.requires_grad_),
}
_TIMES: set[Any] = {
    *(_T.mul, _T.__mul__, _T.__rmul__, torch.mul, _T.multiply, torch.multiply, _T.mul_, _T.__imul__),
}
_OVER: set[Any] = {
    *(_T.div, _T.__truediv__, torch.div, _T.true_divide, torch.true_divide, _T.div_, _T.__itruediv__),
}
_TANH: set[Any] = {_T.tanh, torch.tanh, torch.nn.functional.tanh, _T.tanh_}
_SHAPES: dict[Any, Callable[..., Any]] = {
    _T.size: lambda posed, *rest: posed.size(*rest),
    _T.dim: lambda posed: posed.dim(),
    _T.ndimension: lambda posed: posed.dim(),
    _T.numel: lambda posed: posed.numel(),
    torch.numel: lambda posed: posed.numel(),
    _T.shape.__get__: lambda posed: posed.shape,  # type: ignore[attr-defined]
    _T.ndim.__get__: lambda posed: posed.ndim,  # type: ignore[attr-defined]
    len: len,
    _T.__len__: len,
}
_FACTS: set[Any] = {
    getattr(_T, name).__get__
    for name in (
        *("dtype", "device", "requires_grad", "grad_fn", "is_leaf", "layout", "_base", "_version", "is_meta"),
        *("is_cuda", "is_sparse", "is_nested", "is_quantized", "output_nr", "grad", "_backward_hooks", "retains_grad"),
        *("is_mps", "is_cpu", "is_xla"),
    )
} | {
    *(_T.register_hook, _T.is_floating_point, torch.is_floating_point, _T.is_complex, torch.is_complex),
    *(_T.element_size, _T.get_device, _T.__hash__, _T.as_subclass, _T.is_inference, torch.is_inference, compat.IS_VIEW),
    *(_T.is_shared, _T.__dir__),
}


class Placeholder(torch.Tensor):
    """A tensor of one element that poses as logits ``(B, T, V)``.

    It lets through what wrappers do to a model's output (conversions, copies, slices of batch and positions, hooks),
    notes factors and tanh, and raises :class:`NoLogitsError` on everything else.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let an operation through, note it, or refuse it."""
        kwargs = kwargs or {}
        posed = next((argument for argument in args if type(argument) is Placeholder), None)
        if func in _FACTS:
            with compat.without_subclasses():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if posed is None or "_trace" not in posed.__dict__:
            raise NoLogitsError(name)
        shape, trace, recipe = (posed.__dict__[key] for key in ("_shape", "_trace", "_recipe"))
        if func in _SHAPES:
            return _SHAPES[func](torch.empty(shape, device="meta"), *args[1:], **kwargs)
        if func in (_T.__repr__, _T.__format__):
            return f"Placeholder(shape={tuple(shape)}: logits that are not made in this step)"
        carrier: Tensor = posed
        if func in (_T.detach, _T.__deepcopy__):
            carrier = _plain(posed).detach()
        elif func is _T.__getitem__:  # batch and positions may be cut, the vocabulary may not
            cut = torch.empty(shape, device="meta")[args[1]].shape
            if not cut or cut[-1] != shape[-1]:
                raise NoLogitsError("a part of the vocabulary")
            shape = cut
        elif func in _TIMES | _OVER | _TANH:
            recipe = merged((*recipe, _operation(func, name, posed, args)))
            if not trace.open:
                raise NoLogitsError(name)
            if name.startswith("__i") or (name.endswith("_") and not name.endswith("__")):
                return _posed(posed, shape, trace, recipe)
        elif func not in _UNCHANGED:
            raise NoLogitsError(name)
        return _posed(_Pose.apply(carrier), shape, trace, recipe)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled."""
        raise NoLogitsError("a pickle")

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NoLogitsError("a number out of them")

    numpy = tolist = item = __array__ = __bool__ = __float__ = __int__ = __index__ = __iter__ = __dlpack__ = _refuse


def _operation(func: Any, name: str, posed: Tensor, args: Any) -> float | str:
    if func in _TANH:
        return "tanh"
    factor = next((argument for argument in args if argument is not posed), None)
    trained = isinstance(factor, Tensor) and (
        factor.requires_grad or factor.numel() != 1 or type(factor) is Placeholder
    )
    if factor is None or trained:
        raise NoLogitsError(f"{name} with a tensor that is trained or has several elements")
    return float(factor) if func in _TIMES else 1.0 / float(factor)


def _posed(carrier: Tensor, shape: Any, trace: Trace, recipe: Recipe) -> Tensor:
    carrier.__dict__.update(_shape=torch.Size(shape), _trace=trace, _recipe=recipe)
    if trace.open:
        trace.recipe = recipe
    return carrier


class _Pose(torch.autograd.Function):
    """The same number as a placeholder, or back as a plain tensor; not as a view, which FSDP2 would warn of."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, back: bool = False) -> Tensor:
        with compat.without_subclasses():
            posed: Tensor = compat.as_kind(value.detach().clone(), Tensor if back else Placeholder)
            return posed

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return _plain(upstream), None


def _plain(value: Tensor) -> Tensor:
    with compat.without_subclasses():
        return value.as_subclass(Tensor)
