"""Taps: the places in a model where features are read, and the layers that they name."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import keras

from keras_distill import checks, compat

LAYOUTS = ("channels_last", "channels_first", "tokens", "heads", "scores")
# A layer or its name, and the side of it that is read.
Place: TypeAlias = "tuple[str | keras.layers.Layer, str]"
Output: TypeAlias = int | str | tuple[int | str, ...] | None


@dataclass(frozen=True)
class Tap:
    """A place in a model where a feature is read.

    Args:
        layer: Name of a layer (``"block2"``), path of names below nested models (``"backbone/block2"``), path of
            attributes (``"encoder.blocks.0"``), or the layer itself; ``""`` is the whole model.
        output: Which part of the layer's output: an index of a tuple or list, a key of a dict, or a tuple of these for
            nested outputs. With ``None`` the output must be a single tensor. ``"*"``, or a tuple that ends with it,
            stands for every tensor of a dict, list or tuple, such as the levels of a feature pyramid.
        call: Which call of the layer, counted from 0, if one forward pass runs it several times.
        where: ``"output"`` reads the layer's output, ``"input"`` its input.
        layout: Meaning of the axes if it does not follow from the layers: ``"channels_last"`` or ``"channels_first"``
            for maps, ``"tokens"`` for ``(N, L, C)``, ``"heads"`` for ``(N, L, heads, C)`` of an attention layer's
            queries, keys and values, ``"scores"`` for attention maps ``(N, heads, L, L)``.
        prefix_tokens: Number of class and register tokens at the beginning of tokens ``(N, L, C)``, which are left out.
            ``None`` leaves out none, except where an adapter needs the patches alone and finds their number.

    Raises:
        TypeError: If ``layer`` is neither a string nor a layer, or ``prefix_tokens`` is not an int.
        ValueError: If ``where`` or ``layout`` is not one of those above, or ``call`` or ``prefix_tokens`` is negative.

    Example:
        >>> Tap("backbone/block2", call=1)
        Tap(layer='backbone/block2', output=None, call=1, where='output', layout=None, prefix_tokens=None)
    """

    layer: str | keras.layers.Layer
    output: Output = None
    call: int | None = None
    where: Literal["output", "input"] = "output"
    layout: str | None = None
    prefix_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layer, (str, keras.layers.Layer)):
            received = f"layer={self.layer!r}"
            raise TypeError(checks.message("`layer` to be a layer or its name", received, "Pass the layer's name."))
        checks.one_of("where", self.where, ("output", "input"))
        if self.layout is not None:
            checks.one_of("layout", self.layout, LAYOUTS)
        if self.call is not None and (type(self.call) is not int or self.call < 0):
            raise ValueError(checks.message("`call` to be 0 or greater", f"call={self.call!r}"))
        if self.prefix_tokens is not None:
            checks.integer("prefix_tokens", self.prefix_tokens)
            checks.non_negative("prefix_tokens", self.prefix_tokens)
        output: Any = self.output
        if isinstance(output, list):  # as files hold it
            object.__setattr__(self, "output", tuple(output))

    @classmethod
    def of(cls, layer: str | keras.layers.Layer | Tap) -> Tap:
        """The tap itself, or a tap on the output of the layer."""
        return layer if isinstance(layer, Tap) else cls(layer)

    @property
    def name(self) -> str:
        """The layer's name or path."""
        return self.layer if isinstance(self.layer, str) else str(self.layer.name)

    @property
    def spreads(self) -> bool:
        """Whether the tap stands for every tensor of a dict, list or tuple."""
        return self.last == "*"

    @property
    def outer(self) -> tuple[int | str, ...]:
        """The path to the dict, list or tuple that a tap stands for."""
        return self.output[:-1] if isinstance(self.output, tuple) else ()

    @property
    def last(self) -> int | str | None:
        """The last index or key of the output, by which a level is named."""
        return self.output[-1] if isinstance(self.output, tuple) else self.output

    def level(self, key: int | str) -> Tap:
        """The tap on one of the tensors that this one stands for."""
        return replace(self, output=(*self.outer, key) if self.outer else key)

    def level_of(self, key: str) -> Tap | None:
        """The level of the tap that has this key, or None."""
        start, end = self.key.rsplit(f"[{self.output!r}]", 1)
        if not key.startswith(f"{start}[") or not key.endswith(f"]{end}"):
            return None
        try:
            output = ast.literal_eval(key[len(start) + 1 : len(key) - len(end) - 1])
        except (ValueError, SyntaxError):  # another layer with brackets in its name
            return None
        *outer, last = output if isinstance(output, tuple) else (output,)
        return self.level(last) if tuple(outer) == self.outer else None

    @property
    def place(self) -> Place:
        """The layer and the side of it that is read, ``"output"`` or ``"input"``."""
        return self.layer, self.where

    @property
    def key(self) -> str:
        """Key of the feature in `DistillTargets`: the layer's name, followed by the call, the output and the side."""
        call = "" if self.call is None else f"#{self.call}"
        output = "" if self.output is None else f"[{self.output!r}]"
        return f"{self.name}{call}{output}" + (":input" if self.where == "input" else "")

    def within(self, model: keras.Model, who: str) -> Tap:
        """A copy of the tap that names its layer by its path in a model, which a Keras file can hold.

        Args:
            model: The model.
            who: ``"student"`` or ``"teacher"``, for messages.

        Returns:
            The tap.

        Raises:
            ValueError: If no layer of the model has this name, or several layers have it.
        """
        return replace(self, layer=find_layer(model, self.layer, who)[0])

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON; a layer is named by its path."""
        optional = {"layout": self.layout, "prefix_tokens": self.prefix_tokens}
        passed = {name: value for name, value in optional.items() if value is not None}
        return {"layer": self.name, "output": self.output, "call": self.call, "where": self.where, **passed}


def select(value: Any, output: Output, name: str) -> Any:
    """The tensor that ``output`` picks from ``value``, or its only tensor if ``output`` is ``None``.

    Args:
        value: The output of a layer or a model.
        output: An index of a tuple or list, a key of a dict, a tuple of these, or ``None``.
        name: Name of the value in error messages.

    Returns:
        The tensor.

    Raises:
        ValueError: If ``output`` is None and the value holds several tensors, or ``output`` does not pick a tensor.

    Example:
        >>> select({"probabilities": 1.0, "state": 2.0}, "state", "the output")
        2.0
    """
    picked = value if output is None else entry_at(value, output if isinstance(output, tuple) else (output,))
    while isinstance(picked, (dict, list, tuple)) and len(picked) == 1 and output is None:
        picked = next(iter(picked.values())) if isinstance(picked, dict) else picked[0]
    if picked is None or isinstance(picked, (dict, list, tuple)):
        shapes = keras.tree.map_structure(lambda tensor: tuple(getattr(tensor, "shape", ())), value)
        received = f"output={output!r}, with tensors of shapes {shapes}"
        raise ValueError(checks.message(f"`output` to pick one tensor of {name}", received, "Pass output=..."))
    return picked


def entry_at(value: Any, keys: Iterable[int | str]) -> Any:
    """The entry at a path of indices and keys, or None."""
    with contextlib.suppress(LookupError, TypeError):
        for key in keys:
            value = value[key] if keras.tree.is_nested(value) else None
        return value
    return None


def by_name(keys: Iterable[Any]) -> list[Any]:
    """Indices and keys in an order that does not depend on a dict, whose order graphs do not keep."""
    return sorted(keys, key=lambda key: (isinstance(key, str), key))


def find_layer(model: keras.Model, layer: str | keras.layers.Layer, who: str) -> tuple[str, keras.layers.Layer]:
    """Find a layer of a model by its name, its path or the layer itself.

    Args:
        model: The model to look in.
        layer: Name, path of names with ``/``, path of attributes with ``.``, or the layer.
        who: ``"student"`` or ``"teacher"``, for messages.

    Returns:
        The layer's path, by which it can be found again, and the layer.

    Raises:
        ValueError: If no layer fits, or several do; the message lists candidates.
    """
    if layer == "" or layer is model:
        return "", model
    named = list(_named_sublayers(model))
    by_path = {path: sublayer for path, _, sublayer in named}
    expected = f"`{who}_layer` to name one layer of the {who} {model.name!r}"
    if not isinstance(layer, str):
        for path, sublayer in by_path.items():
            if sublayer is layer:
                return path, sublayer
        raise ValueError(checks.message(expected, f"the layer {layer.name!r}, which is not in it"))
    if layer in by_path:
        return layer, by_path[layer]
    tails = [path for path, names, _ in named if f"/{names}".endswith(f"/{layer}")]
    if len(tails) == 1:
        return tails[0], by_path[tails[0]]
    if tails:
        remedy = f"Pass one of {', '.join(map(repr, tails))}."
        raise ValueError(checks.message(expected, f"{layer!r}, the name of several layers", remedy))
    node: Any = model
    with contextlib.suppress(AttributeError, LookupError, TypeError):
        for part in layer.split("."):
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        if isinstance(node, keras.layers.Layer):
            return layer, node
    raise ValueError(checks.message(expected, f"{layer!r}", checks.closest(layer, by_path)))


def sublayers(layer: keras.layers.Layer) -> Iterator[tuple[str, keras.layers.Layer]]:
    """All layers inside a layer, each with its path; a shared layer is listed once.

    Args:
        layer: A layer or a model.

    Yields:
        The path and the layer; ``layers.0`` replaces the name of a layer that has the same name as a sibling.
    """
    return ((path, sublayer) for path, _, sublayer in _named_sublayers(layer))


def _named_sublayers(layer: keras.layers.Layer) -> Iterator[tuple[str, str, keras.layers.Layer]]:
    """All layers inside a layer: a unique path, the path of names, and the layer."""
    seen: set[int] = set()

    def walk(parent: keras.layers.Layer, prefix: str, above: str) -> Iterator[tuple[str, str, keras.layers.Layer]]:
        below = compat.sublayers_of(parent)
        below = list({id(child): child for child in below if isinstance(child, keras.layers.Layer)}.values())
        called = [child.name for child in below]
        for index, child in enumerate(below):
            if id(child) not in seen:
                seen.add(id(child))
                own = child.name if called.count(child.name) == 1 else f"layers.{index}"
                path, names = prefix + own, above + child.name
                yield path, names, child
                yield from walk(child, f"{path}/", f"{names}/")

    yield from walk(layer, "", "")
