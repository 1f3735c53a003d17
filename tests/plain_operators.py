"""Torchvision and timm for the tests, with plain operators where torchvision's wheel has no compiled ones."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_KEPT: list[Any] = []  # a library that is collected takes its operators with it


def has_torchvision() -> bool:
    """Import torchvision, from the folder where ``make install`` puts it, and give it the operators that it lacks."""
    with _its_folder():
        if importlib.util.find_spec("torchvision") is None:
            return False
        _import()
    return True


def has_timm() -> bool:
    """Import timm, which needs torchvision, from the same folder."""
    if not has_torchvision():
        return False
    with _its_folder():
        if importlib.util.find_spec("timm") is None:
            return False
        importlib.import_module("timm")
    return True


@contextmanager
def _its_folder() -> Iterator[None]:
    sys.path.append(str(Path(sys.prefix) / "vision"))
    try:
        yield
    finally:
        sys.path.pop()


def _import() -> None:
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CompositeExplicitAutograd")
    _KEPT.append(library)
    importlib.import_module("torchvision")
    boxes: Any = sys.modules["torchvision.ops.boxes"]
    boxes._assert_has_ops = lambda: None
    pooling: Any = sys.modules["torchvision.ops.roi_align"]
    pooling._roi_align = getattr(pooling._roi_align, "__wrapped__", pooling._roi_align)  # without the compiler


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The boxes that stay, the best first: each removes the others that overlap it more than the threshold."""
    areas = (dets[:, 2] - dets[:, 0]) * (dets[:, 3] - dets[:, 1])
    waiting, kept = scores.argsort(descending=True, stable=True), []
    while len(waiting):
        best, rest = waiting[0], waiting[1:]
        kept.append(best)
        low, high = torch.maximum(dets[best, :2], dets[rest, :2]), torch.minimum(dets[best, 2:], dets[rest, 2:])
        common = (high - low).clamp(min=0).prod(1)
        waiting = rest[common / (areas[best] + areas[rest] - common) <= iou_threshold]
    return torch.stack(kept) if kept else waiting
