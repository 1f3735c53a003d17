"""Check that the student gets the batch as the data loader returned it.

The teacher's outputs in a cache are those for the samples of the dataset. Augmentation in ``training_step`` or in a
batch-transfer hook (mixup, random flips, normalization) would silently pair them with other inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import Dataset

from distill_core.store import CacheError
from lightning_distill.recording import LABEL_NAMES
from lightning_distill.waiting import AT_ONCE, later

_SAMPLED = 2**14  # numbers that are compared where the loader's tensor is not on the device
_LOOKED_AT = 2000  # maximum number of objects that are searched for a batch's tensors
_PLAIN = (str, bytes, int, float, type(None))
_HOOKS = ("transfer_batch_to_device", "on_after_batch_transfer")

_Region = tuple[tuple[int, int], ...]  # for each dimension, the numbers of entries before and after a slice


class _Known(NamedTuple):
    """A tensor that the data loader has returned, or an equal one.

    Attributes:
        place: Number of the tensor in the batch.
        tensor: The tensor.
        version: Its count of in-place changes.
    """

    place: int
    tensor: Tensor
    version: int


class BatchInputs:
    """Check that the student's calls get the tensors of the current batch.

    A tensor belongs to the batch if it is one of its tensors, a view of one, or equal to one except for its device,
    dtype, layout, shape or a fixed slice. If a tensor is known by its identity, nothing is compared. Otherwise its
    numbers are compared. On a GPU only the first steps wait for the result; later results are read when they have
    arrived, so that no step waits for the device.

    Args:
        allow: If True, changed inputs are accepted and nothing is checked.
    """

    def __init__(self, allow: bool) -> None:
        self._allow = allow
        self._known: list[_Known] = []
        self._named: dict[str, int] = {}
        self._slots: dict[Any, int] = {}  # place of the tensor that each argument had in the calls so far
        self._slices: dict[int, tuple[_Region, tuple[int, ...]]] = {}  # kept over the whole fit
        self._pending: list[tuple[Callable[[], Tensor | None], torch.Size]] = []
        self._compared = 0

    def clear(self) -> None:
        """Release the batch."""
        self._known, self._named, self._slots = [], {}, {}

    def remember(self, batch: Any) -> None:
        """Add a batch as the data loader returned it, perhaps in another precision."""
        if self._allow:
            return
        seen = {id(known.tensor) for known in self._known}
        for place, tensor in enumerate(_tensors(batch)):
            if id(tensor) not in seen:
                self._known.append(_Known(place, tensor, _version(tensor)))
        self._name(batch)

    def follow(self, batch: Any, moved: Any, trainer: Trainer) -> None:
        """Add the copies of the batch on the device, if no hook of the user can have changed them.

        Args:
            batch: The batch before its transfer.
            moved: The batch after it.
            trainer: The Trainer.
        """
        if self._allow or trainer.strategy.root_device.type == "cpu":  # nothing was copied
            return
        owners = [owner for owner in (trainer.lightning_module, trainer.datamodule) if owner is not None]  # type: ignore[attr-defined]
        if any(is_overridden(hook, owner) for hook in _HOOKS for owner in owners):
            return
        before, after = _tensors(batch), _tensors(moved)
        if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
            return
        places = {id(known.tensor): known for known in self._known}
        pairs = [(places.get(id(tensor)), copied) for tensor, copied in zip(before, after, strict=True)]
        if all(known is not None for known, _ in pairs):
            # the tensors on the CPU are not needed any more
            self._known = [
                _Known(known.place, copied, _version(copied))
                for known, copied in pairs
                if known is not None and known.version == _version(known.tensor)
            ]

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Check the inputs of a call of the student.

        The check covers the first tensor, keyword arguments and entries of dicts that the batch holds under the same
        name, and floating-point tensors with the shape of a batch's tensor. Others, such as masks and positions, may be
        computed in the step. A batch without tensors, such as one of strings, cannot be checked.

        Args:
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Raises:
            CacheError: If an input does not belong to the batch.
        """
        if self._allow or not self._known:
            return
        self._look_back()
        tensors = _tensors((args, kwargs))
        if not tensors:
            return
        entries = [entry for level in (kwargs, *args) if isinstance(level, Mapping) for entry in level.items()]
        place = self._check(tensors[0])
        slot = next((name for name, value in entries if value is tensors[0]), None)
        if place is not None and self._slots.setdefault(slot, place) != place:
            raise CacheError(
                "Expected every call of the student in a step to get the same tensor of the batch, since the cache"
                " holds one output for each item, but got several tensors. Call the student on one of them, or run"
                " the other calls under torch.no_grad()."
            )
        for name, value in entries:
            if name in self._named and isinstance(value, Tensor) and value is not tensors[0]:
                self._check(value, self._named[name])
        passed = {known.place for known in self._known for tensor in tensors if _shares(tensor, known.tensor)}
        shapes = {
            known.tensor.shape
            for known in self._known
            if known.place not in passed and known.tensor.is_floating_point() and known.tensor.ndim > 1
        }
        for tensor in tensors[1:]:
            if tensor.is_floating_point() and tensor.shape in shapes:
                self._check(tensor)

    def _name(self, batch: Any) -> None:
        if isinstance(batch, Mapping):
            places = {id(known.tensor): known.place for known in self._known}
            self._named = {
                name: places[id(value)]
                for name, value in batch.items()
                if isinstance(name, str) and id(value) in places and name not in LABEL_NAMES
            }

    def _check(self, tensor: Tensor, place: int | None = None) -> int | None:
        """The place in the batch that a tensor comes from; None if the comparison has not finished."""
        known = [entry for entry in self._known if place is None or entry.place == place]
        for entry in known:
            if _shares(tensor, entry.tensor):
                if _version(entry.tensor) != entry.version:
                    raise _changed(tensor.shape, "changed in place")
                self._check_slice(entry, tensor)
                return entry.place
        candidates = [
            (entry, candidate)
            for entry in known
            if _version(entry.tensor) == entry.version  # otherwise it was changed since the loader returned it
            for candidate in _candidates(entry.tensor, tensor.shape)
        ]
        if not candidates:
            raise _changed(tensor.shape)
        if _on_host(tensor):
            for entry, candidate in candidates:
                if not bool(_differs(candidate, tensor)):
                    return entry.place
            raise _changed(tensor.shape)
        self._compare_on_device(tensor, [candidate for _, candidate in candidates])
        return None

    def _check_slice(self, entry: _Known, view: Tensor) -> None:
        """Raise an error if the student gets another view of the batch than before, such as a random crop."""
        order = tuple(sorted((axis for axis, size in enumerate(view.shape) if size > 1), key=view.stride))
        region = _region(view, entry.tensor) if view.numel() != entry.tensor.numel() else ()
        region_before, order_before = self._slices.setdefault(entry.place, (region, order))
        same = all(new[0] == old[0] or new[1] == old[1] for new, old in zip(region, region_before, strict=False))
        if not same or (len(order) == len(order_before) and order != order_before):
            raise _changed(view.shape, "another view of the batch than in the calls before (a random crop?)")

    def _compare_on_device(self, tensor: Tensor, candidates: list[Tensor]) -> None:
        self._compared += 1
        differs = torch.stack([_differs(candidate, tensor, self._compared) for candidate in candidates]).all()
        if self._compared > AT_ONCE:
            self._pending.append((later(differs), tensor.shape))
        elif bool(differs):
            raise _changed(tensor.shape)

    def _look_back(self) -> None:
        """Raise an error if an earlier comparison has found a change; unfinished comparisons are left alone."""
        while self._pending:
            arrived, shape = self._pending[0]
            differs = arrived()
            if differs is None:
                return
            del self._pending[0]
            if differs:
                raise _changed(shape, "changed in one of the last steps")


def _on_host(tensor: Tensor) -> bool:
    """Whether a number of a tensor can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def _changed(shape: torch.Size, how: str = "changed") -> CacheError:
    return CacheError(
        "Expected the student to be called with the batch as the data loader returned it, since the cache holds the"
        f" teacher's outputs for that, but got a tensor of shape {tuple(shape)} that is {how}: by `training_step`, by a"
        " callback, or by a batch-transfer hook. Move the augmentation into the dataset, where TeacherCache.build(...,"
        " transform_seed=0) makes it repeatable; or use the live teacher; or pass TeacherCache.open(path,"
        " allow_changed_inputs=True) if the teacher's outputs fit the changed inputs too."
    )


def _tensors(batch: Any) -> list[Tensor]:
    """The tensors and arrays in a batch, in order: in containers, dataclasses, and attributes of batch objects."""
    tensors: list[Tensor] = []
    waiting, seen = [batch], set[int]()
    while waiting and len(seen) < _LOOKED_AT:  # not recursive: this runs in every step
        value = waiting.pop()
        if isinstance(value, Tensor):
            tensors.append(value)
            continue
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        entries: Any = ()
        if isinstance(value, np.ndarray):
            tensors += _as_tensor(value)
        elif isinstance(value, Mapping):
            entries = value.values()
        elif isinstance(value, (list, tuple)):
            entries = () if value and isinstance(value[0], _PLAIN) and isinstance(value[-1], _PLAIN) else value
        elif is_dataclass(value):
            entries = [getattr(value, entry.name) for entry in fields(value)]
        elif not isinstance(value, (torch.nn.Module, Dataset)):
            entries = getattr(value, "__dict__", {}).values()
        waiting += reversed([*entries])
    return tensors


def _as_tensor(array: np.ndarray[Any, Any]) -> list[Tensor]:
    """A list with an array as a tensor, in shared memory if possible; empty for arrays of strings or objects."""
    try:
        plain = array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy()
        return [torch.from_numpy(plain)]
    except TypeError:
        return []


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _shares(tensor: Tensor, other: Tensor) -> bool:
    """Whether a tensor is the same object as another tensor, or a view of it."""
    if tensor is other:
        return True
    if tensor.device != other.device or tensor.dtype != other.dtype or tensor.layout != torch.strided:
        return False
    if other.layout != torch.strided or type(other) is not type(tensor):
        return False
    start = other.data_ptr()
    inside = start <= tensor.data_ptr() < start + max(_extent(other), 1)
    return inside and tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first number to its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _region(view: Tensor, whole: Tensor) -> _Region:
    """The numbers of entries before and after a view, in each dimension of a tensor."""
    offset = view.storage_offset() - whole.storage_offset()
    sizes = {stride: size for size, stride in zip(view.shape, view.stride(), strict=True) if size > 1}
    region = [(0, 0)] * whole.ndim
    for axis in sorted(range(whole.ndim), key=whole.stride, reverse=True):
        stride = whole.stride(axis)
        start = offset // stride if stride else 0
        offset -= start * stride
        region[axis] = start, whole.shape[axis] - start - sizes.get(stride, 1)
    return tuple(region)


def _candidates(whole: Tensor, shape: torch.Size) -> Iterator[Tensor]:
    """The parts and permutations of a tensor that a copy of this shape may hold with unchanged numbers."""
    if whole.shape == shape:
        yield whole
    elif whole.numel() == shape.numel():
        orders = itertools.permutations(range(1, whole.ndim)) if whole.ndim <= 5 else [range(1, whole.ndim)]
        for order in orders:  # such as channels first to channels last
            yield (whole.permute(0, *order) if whole.ndim else whole).reshape(shape)
    elif whole.ndim == len(shape) and all(part <= size for part, size in zip(shape, whole.shape, strict=True)):
        yield whole[tuple(slice(0, part) for part in shape)]
        yield whole[tuple(slice(size - part, size) for part, size in zip(shape, whole.shape, strict=True))]


def _differs(reference: Tensor, tensor: Tensor, turn: int = 0) -> Tensor:
    """Whether any number differs in the less precise dtype of both, as a scalar on the tensor's device."""
    tensor = tensor.detach()
    if reference.device != tensor.device:
        # a few numbers, other ones in each turn, so that the batch is not transferred twice
        step = max(reference.numel() // _SAMPLED, 1)
        reference, tensor = (flat.reshape(-1)[turn % step :: step] for flat in (reference, tensor))
        reference = reference.to(tensor.device, non_blocking=True)
    dtype = tensor.dtype
    if reference.is_floating_point() and tensor.is_floating_point():
        dtype = max((reference.dtype, dtype), key=lambda kind: torch.finfo(kind).eps)
    first, second = reference.to(dtype), tensor.to(dtype)
    return ((first != second) & ~((first != first) & (second != second))).any()  # NaN stays NaN
