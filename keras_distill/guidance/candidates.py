"""The layers of a model that may be paired: those that everything after them depends on, and blocks."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import keras

from distill_core.grids import find_grid
from distill_core.guidance.assignment import Layer
from keras_distill import compat
from keras_distill.recording import Facts, recorded, sublayers, symbolic
from keras_distill.recording.calls import image_size
from keras_distill.recording.recorder import Record, Recording

Key: TypeAlias = "tuple[int, int, int | str | None]"  # id of the layer, its call, the entry of its output
_ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)


@dataclass
class _Run:
    """One call of a layer or operation while shapes are inferred."""

    layer: Any
    parent: Any
    inputs: list[int]
    tensors: dict[int | str | None, Any]  # by the entry of the output


def candidates(model: keras.Model, inputs: Any, names: list[str] | None, everything: bool) -> dict[Key, Layer]:
    """The layers of a model whose outputs may be paired.

    Args:
        model: The model, which is built.
        inputs: Inputs of a batch.
        names: Paths of the layers to take; ``None`` chooses them.
        everything: Whether to take every layer that computes with weights or after such a layer.

    Returns:
        The layers by their ids, calls and entries, in the order in which they run.
    """
    paths = {id(layer): path for path, layer in sublayers(model)}
    runs, facts, kept = _runs(model, inputs)
    blocks = {id(child) for layer in [model, *(run.layer for run in runs)] for child in _blocks(layer)}
    main = _main_path(model, runs)
    blocks |= main.closing
    calls: Counter[int] = Counter()
    result: dict[Key, Layer] = {}
    places: dict[int, Key] = {}  # the key of each tensor
    several = Counter(id(run.layer) for run in runs)
    image = image_size(inputs)
    size = len(keras.tree.flatten(inputs)[0])
    scores = {id(leaf) for leaf in keras.tree.flatten(kept[-1][1]) if len(leaf.shape) == 2}
    learned = False  # whether a layer with weights has run: before, there is the input in another form
    for run in runs:
        learned = learned or bool(getattr(run.layer, "variables", []))
        call, path = calls[id(run.layer)], paths.get(id(run.layer))
        calls[id(run.layer)] += 1
        if path is None or (names is not None and path not in names):
            continue
        if names is None and not everything and id(run) not in main.runs:
            continue
        for entry, tensor in run.tensors.items():
            known = facts.get(id(tensor), Facts())
            if not _fits(tensor, size) or (names is None and (not learned or id(tensor) in scores)):
                continue
            key = (id(run.layer), call, entry)
            earlier = places.get(id(tensor))
            block = id(run.layer) in blocks
            if earlier is not None:
                # a nested model returns the output of its last layer: the outer of the two names is kept
                if entry is not None or not result[earlier].name.startswith(f"{path}/"):
                    continue
                block = block or result.pop(earlier).block
            places[id(tensor)] = key
            number = call if several[id(run.layer)] > 1 else None
            result[key] = replace(_described(path, tensor, known.layout, image), call=number, output=entry, block=block)
    if not result and scores and names is None:  # the output is the only layer
        return candidates(model, inputs, [path for path, _ in sublayers(model)], True)
    return result


def _runs(model: keras.Model, inputs: Any) -> tuple[list[_Run], dict[int, Facts], list[Any]]:
    """The calls of layers and operations, in the order of their returns, from a pass that computes nothing."""
    runs: list[_Run] = []
    facts: dict[int, Facts] = {}
    kept: list[Any] = []  # the tensors, so that no other tensor gets their ids

    def watch(record: Record, layer: Any, arguments: Any, output: Any) -> None:
        kept.append((arguments, output))
        parent = record.within[-1] if record.within else None
        # without masks and token numbers, which may lead past every layer
        used = [id(leaf) for leaf in keras.tree.flatten(arguments) if hasattr(leaf, "shape") and _is_float(leaf)]
        runs.append(_Run(layer, parent, used, entries(output)))
        facts.update(record.facts)

    def run(tensors: Any) -> Any:
        with recorded(Recording(model, set(), infer=True, watch=watch)):
            return model(tensors, training=False)

    compat.output_spec(run, symbolic(inputs))
    return runs, facts, kept


def entries(output: Any) -> dict[int | str | None, Any]:
    """The tensors in an output that a tap can read."""
    while isinstance(output, (list, tuple)) and len(output) == 1:
        output = output[0]
    if hasattr(output, "shape"):
        return {None: output}
    items = (
        output.items() if isinstance(output, dict) else enumerate(output) if isinstance(output, (list, tuple)) else ()
    )
    return {entry: tensor for entry, tensor in items if hasattr(tensor, "shape")}


def _fits(tensor: Any, size: int) -> bool:
    shape = tuple(tensor.shape)
    whole = None not in shape and len(shape) > 1 and shape[0] == size and math.prod(shape) > 0
    return whole and _is_float(tensor)


def _is_float(tensor: Any) -> bool:
    return bool(keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)))


def _described(path: str, tensor: Any, layout: str | None, image: tuple[int, int] | None) -> Layer:
    shape = tuple(tensor.shape)[1:]
    first = layout == "channels_first" or (layout is None and keras.config.image_data_format() == "channels_first")
    positions = shape[1:] if first and len(shape) > 2 else shape[:-1]
    if math.prod(positions) == 1 or (shape[-1:] == (1,) and len(shape) == 2):
        positions = ()
    elif len(shape) == 2 and image is not None:
        with contextlib.suppress(ValueError):
            grid = find_grid(shape[0], image, None, "a feature")
            positions = (grid.height, grid.width)
    return Layer(path, shape, positions)


@dataclass
class _MainPath:
    """The calls on the main path, and the layers that close a section of branches."""

    runs: set[int]
    closing: set[int]


def _main_path(model: keras.Model, runs: list[_Run]) -> _MainPath:
    """The calls whose outputs everything after them depends on, and those in subclassed layers that hold blocks.

    In a functional model a call is on the main path if no tensor from before it is used after it, such as the shortcut
    of a residual block. If a functional model has fewer than two such calls, all its layers count.
    """
    path = _MainPath(set(), set())
    waiting = [model]
    while waiting:
        parent = waiting.pop()
        inside = [run for run in runs if run.parent is parent and any(map(_is_float, run.tensors.values()))]
        chosen = inside
        if isinstance(parent, keras.Model) and compat.input_structure(parent) is not None:
            cuts = _cuts(inside)
            if sum(isinstance(run.layer, keras.layers.Layer) for run in cuts) > 1:
                chosen = cuts
                path.closing |= _closing(inside, cuts)
        path.runs |= {id(run) for run in chosen}
        waiting += [run.layer for run in chosen if isinstance(run.layer, keras.Model) or _holds_stack(run.layer)]
    return path


def _cuts(inside: list[_Run]) -> list[_Run]:
    last_use: dict[int, int] = {}
    for time, run in enumerate(inside):
        last_use |= dict.fromkeys(run.inputs, time)
    made: dict[int, int] = {}  # when a tensor was made; -1 for the inputs
    for time, run in enumerate(inside):
        made |= {tensor: -1 for tensor in run.inputs if tensor not in made}
        made |= {id(tensor): time for tensor in run.tensors.values() if id(tensor) not in made}
    cuts = []
    for time, run in enumerate(inside):
        own = {id(tensor) for tensor in run.tensors.values()}
        crossing = any(made[tensor] < time < use for tensor, use in last_use.items() if tensor not in own)
        if not crossing and len(own) == 1:
            cuts.append(run)
    return cuts


def _closing(inside: list[_Run], cuts: list[_Run]) -> set[int]:
    """The layers at the end of a section of branches, or of the activations that follow it."""
    on_path = {id(run) for run in cuts}
    closing: set[int] = set()
    branched, last = False, None
    for run in inside:
        if id(run) not in on_path:
            branched, last = True, None
        elif branched:
            # a product is a gate inside of a block, such as squeeze and excitation
            branched, last = False, None if type(run.layer).__name__ == "Multiply" else run
            closing |= set() if last is None else {id(run.layer)}
        elif last is not None and not getattr(run.layer, "variables", []) and _shapes(run) == _shapes(last):
            closing.discard(id(last.layer))
            closing.add(id(run.layer))
            last = run
        else:
            last = None
    return closing


def _shapes(run: _Run) -> list[Any]:
    return [tuple(tensor.shape) for tensor in run.tensors.values()]


def _blocks(layer: Any) -> list[Any]:
    """The alike sublayers of a layer that have several matrices or kernels each."""
    below = compat.sublayers_of(layer) if isinstance(layer, keras.layers.Layer) else []
    large = [child for child in below if not isinstance(child, _ATTENTION) and _weighted(child) > 1]
    kinds = Counter(map(type, large))
    return [child for child in large if kinds[type(child)] > 1]


def _holds_stack(layer: Any) -> bool:
    inside = sublayers(layer) if isinstance(layer, keras.layers.Layer) else ()
    return any(map(_blocks, [layer, *(inner for _, inner in inside)]))


def _weighted(layer: Any) -> int:
    """The number of layers with matrices or kernels inside a layer."""
    inside = [layer, *(inner for _, inner in sublayers(layer))] if isinstance(layer, keras.layers.Layer) else []
    own = [inner for inner in inside if not compat.sublayers_of(inner)]
    return sum(any(len(variable.shape) > 1 for variable in inner.weights) for inner in own)
