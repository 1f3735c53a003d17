"""The published cases of the losses with parameters, in our names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
