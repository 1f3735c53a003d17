"""The published cases of the losses with parameters, in our names and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Parameters = dict[str, NDArray[np.float64]]


def parameters_of(arrays: Mapping[str, NDArray[Any]], kind: str = "param") -> Parameters:
    """A reference's parameters, or with ``kind="gradp"`` their gradients, by our names."""
    named = {name.removeprefix(f"{kind}_"): array for name, array in arrays.items() if name.startswith(f"{kind}_")}
    product_names = {"log_scale": "rho", "regressor": "mean", "generation": "generator"}
    renamed = {}
    for name, array in named.items():
        first, *rest = name.split(".")
        if first in product_names:  # the reference's own alignment is an adapter of the term
            renamed[".".join((product_names[first], *rest))] = array.astype("float64")
    return renamed


def widened(parameters: Parameters, shapes: Mapping[str, tuple[int, ...]]) -> Parameters:
    """The same with zeros for the channels that our inner layers have and the reference's have not.

    Such a channel gives nothing and gets nothing: value and gradients stay those of the narrow network.
    """
    result = {}
    for name, array in parameters.items():
        result[name] = np.zeros(shapes[name])
        result[name][tuple(slice(size) for size in array.shape)] = array
    return result


def narrowed(array: NDArray[Any], like: NDArray[Any]) -> NDArray[Any]:
    """What :func:`widened` undoes."""
    return array[tuple(slice(size) for size in like.shape)]


def focal_global_settings(reference: Mapping[str, float]) -> dict[str, float]:
    """Our settings of FocalGlobalLoss from the reference's."""
    names = {"foreground": "alpha", "background": "beta", "attention": "gamma", "context": "lambda"}
    weights = {f"{setting}_weight": reference[f"{letter}_fgd"] for setting, letter in names.items()}
    return {"temperature": reference["temp"], **weights}


def focal_global_parameters(arrays: Mapping[str, NDArray[Any]], kind: str = "param") -> Parameters:
    """The reference's contexts, or with ``kind="gradp"`` their gradients, by our names."""
    parameters = {}
    for side, letter in (("student", "s"), ("teacher", "t")):
        layers = {"attention": f"conv_mask_{letter}"}
        layers |= {name: f"channel_add_conv_{letter}.{i}" for name, i in (("reduce", 0), ("norm", 1), ("expand", 3))}
        for name, layer in layers.items():
            for part in ("weight", "bias"):
                parameters[f"{side}_context.{name}.{part}"] = arrays[f"{kind}_{layer}.{part}"]
    return parameters


def published_weights(arrays: Mapping[str, NDArray[Any]]) -> Tensor:
    """The weights of the reference's boxes: one position more at the right and at the bottom than the box covers."""
    examples, _, height, width = arrays["teacher_feat"].shape
    weights = torch.zeros(examples, height, width, dtype=torch.float64)
    owners = np.repeat(np.arange(examples), arrays["gt_counts"])
    for owner, (left, top, right, bottom) in zip(owners, arrays["gt_bboxes"], strict=True):
        image_height, image_width = arrays["img_shapes"][owner]
        columns = math.floor(left / image_width * width), math.ceil(right / image_width * width)
        rows = math.floor(top / image_height * height), math.ceil(bottom / image_height * height)
        area = (rows[1] + 1 - rows[0]) * (columns[1] + 1 - columns[0])
        inside = weights[owner, rows[0] : rows[1] + 1, columns[0] : columns[1] + 1]
        inside.clamp_(min=1 / area)
    return weights
