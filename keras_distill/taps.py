"""Taps, the places in a model that features are read from, and the recorder that reads them.

A :class:`Recorder` belongs to one model. While it records, the tapped layers' own methods report what they return, in
the very forward pass that gives the output, for functional, sequential and subclassed models on every backend. Nothing
is left on a layer when the recording ends, and other threads never notice it (``tf.distribute`` traces each replica on
a thread of its own).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import keras

from keras_distill import checks

_LOCK = threading.RLock()
_THREAD = threading.local()
# A layer or its name, and the side of it that is read.
Place: TypeAlias = "tuple[str | keras.layers.Layer, str]"


@dataclass(frozen=True)
class Tap:
    """A place in a model that a feature is read from.

    Args:
        layer: Name of a layer (``"block2"``), path of names below nested models (``"backbone/block2"``), path of
            attributes (``"encoder.blocks.0"``), or the layer itself; ``""`` is the whole model.
        output: Which part of what the layer gives: an index of a tuple or list or a key of a dict. ``None`` takes the
            only tensor and refuses to guess.
        call: Which call of the layer, from 0, where one forward pass runs it several times.
        where: ``"output"`` reads what the layer returns, ``"input"`` what it is called with.

    Raises:
        TypeError: If ``layer`` is neither a string nor a layer.
        ValueError: If ``where`` is neither ``"output"`` nor ``"input"``, or ``call`` is negative.

    Example:
        >>> Tap("backbone/block2", call=1)
        Tap(layer='backbone/block2', output=None, call=1, where='output')
    """

    layer: str | keras.layers.Layer
    output: int | str | None = None
    call: int | None = None
    where: Literal["output", "input"] = "output"
    path: str | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.layer, (str, keras.layers.Layer)):
            received = f"layer={self.layer!r}"
            raise TypeError(checks.message("`layer` to be a layer or its name", received, "Pass the layer's name."))
        checks.one_of("where", self.where, ("output", "input"))
        if self.call is not None and (type(self.call) is not int or self.call < 0):
            raise ValueError(checks.message("`call` to be 0 or greater", f"call={self.call!r}"))

    @classmethod
    def of(cls, layer: str | keras.layers.Layer | Tap) -> Tap:
        """The tap itself, or a tap on the output of the layer."""
        return layer if isinstance(layer, Tap) else cls(layer)

    @property
    def name(self) -> str:
        """The layer's name or path; of a layer the path to it, once a model has been searched for it."""
        return self.layer if isinstance(self.layer, str) else str(self.path or self.layer.name)

    @property
    def key(self) -> str:
        """What `DistillTargets` call the feature: the layer's name, and what else tells the tap from another."""
        call = "" if self.call is None else f"#{self.call}"
        output = "" if self.output is None else f"[{self.output!r}]"
        return f"{self.name}{call}{output}" + (":input" if self.where == "input" else "")

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON; a layer is named by its path."""
        return {"layer": self.name, "output": self.output, "call": self.call, "where": self.where}


@dataclass(eq=False)
class Call:
    """One forward pass of a model.

    Attributes:
        output: What the model returned.
        runs: What its tapped layers gave or were given, the value of each of their calls by layer and side.
        features: Features that were computed beforehand, by the key of their taps.
        who: ``"student"`` or ``"teacher"``, for messages.
    """

    output: Any
    runs: dict[Place, list[Any]] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    who: str = "student"

    def feature(self, tap: Tap) -> Any:
        """The tensor at a tap.

        Args:
            tap: The place; its layer must be among those that were recorded.

        Returns:
            The tensor.

        Raises:
            ValueError: If the layer did not run, ran several times with no ``call`` named, or gave several tensors.
        """
        if tap.key in self.features:
            return self.features[tap.key]
        runs = self.runs.get((tap.layer, tap.where), [])
        what = f"{self.who} layer {tap.name!r}"
        if not runs:
            remedy = "Name a layer that this forward pass runs, or give its feature in `DistillTargets`."
            raise ValueError(checks.message(f"{what} to run in a forward pass", "no call of it", remedy))
        if tap.call is None and len(runs) > 1:
            remedy = f"Pass Tap({tap.name!r}, call=...) to choose one of them."
            raise ValueError(checks.message(f"{what} to run once in a forward pass", f"{len(runs)} calls", remedy))
        if tap.call is not None and tap.call >= len(runs):
            raise ValueError(checks.message(f"{what} to run more than {tap.call} times", f"{len(runs)} calls"))
        return select(runs[tap.call or 0], tap.output, f"the {tap.where} of {what}")


def select(value: Any, output: int | str | None, what: str) -> Any:
    """The tensor that ``output`` picks from ``value``, or its only tensor where ``output`` is ``None``.

    Args:
        value: What a layer or a model returned.
        output: An index of a tuple or list, a key of a dict, or ``None``.
        what: Name of the value in error messages.

    Returns:
        The tensor.

    Raises:
        ValueError: If there are several tensors and none is picked, or ``output`` picks none.

    Example:
        >>> select({"probabilities": 1.0, "state": 2.0}, "state", "the output")
        2.0
    """
    picked: Any = value
    if output is not None:
        try:
            picked = value[output] if keras.tree.is_nested(value) else None
        except (LookupError, TypeError):
            picked = None
    while isinstance(picked, (dict, list, tuple)) and len(picked) == 1 and output is None:
        picked = next(iter(picked.values())) if isinstance(picked, dict) else picked[0]
    if picked is None or isinstance(picked, (dict, list, tuple)):
        there = keras.tree.map_structure(lambda tensor: tuple(getattr(tensor, "shape", ())), value)
        received = f"output={output!r}, with tensors of shapes {there}"
        raise ValueError(checks.message(f"`output` to pick one tensor of {what}", received, "Pass output=..."))
    return picked


class Recorder:
    """Reads the features at some taps of one model.

    Args:
        model: The student or the teacher.
        taps: The places to read.
        who: ``"student"`` or ``"teacher"``, for messages.

    Raises:
        ValueError: If a tap names no layer of the model, or several.
    """

    def __init__(self, model: keras.Model, taps: Iterable[Tap], who: str) -> None:
        self.model, self.who, self.taps = model, who, list(taps)
        self._layers: dict[Place, keras.layers.Layer] = {}
        for tap in self.taps:
            path, self._layers[tap.layer, tap.where] = find_layer(model, tap.layer, who)
            object.__setattr__(tap, "path", path)

    def forward(self, inputs: Any, training: bool | None) -> Call:
        """One forward pass of the model, with the features at the taps.

        Args:
            inputs: What the model takes.
            training: Whether dropout and batch normalisation train; ``None`` leaves it to Keras.

        Returns:
            The output and the features.
        """
        return self.watch(lambda: self.model(inputs, training=training))

    def watch(self, run: Callable[[], Any]) -> Call:
        """The features at the taps in one forward pass that someone else makes.

        Args:
            run: Makes it, and gives the model's output.

        Returns:
            The output and the features.
        """
        seen: dict[tuple[int, str], list[Any]] = {(id(layer), key[1]): [] for key, layer in self._layers.items()}
        with reports(list({id(layer): layer for layer in self._layers.values()}.values()), seen):
            output = run()
        runs: dict[Place, list[Any]] = {key: seen[id(layer), key[1]] for key, layer in self._layers.items()}
        return Call(output, runs, who=self.who)


def find_layer(model: keras.Model, layer: str | keras.layers.Layer, who: str) -> tuple[str, keras.layers.Layer]:
    """The layer of a model that a name, a path or the layer itself means, and a path to it.

    Args:
        model: The model to look in.
        layer: Name, path of names with ``/``, path of attributes with ``.``, or the layer.
        who: ``"student"`` or ``"teacher"``, for messages.

    Returns:
        A path by which the layer is found again, and the layer.

    Raises:
        ValueError: If there is no such layer, or there are several; the message lists candidates.
    """
    if layer == "":
        return "", model
    named = list(_named_sublayers(model))
    everything = {path: found for path, _, found in named}
    expected = f"`{who}_layer` to name one layer of the {who} {model.name!r}"
    if not isinstance(layer, str):
        for path, found in everything.items():
            if found is layer:
                return path, found
        raise ValueError(checks.message(expected, f"the layer {layer.name!r}, which is not in it"))
    if layer in everything:
        return layer, everything[layer]
    tails = [path for path, names, _ in named if f"/{names}".endswith(f"/{layer}")]
    if len(tails) == 1:
        return tails[0], everything[tails[0]]
    if tails:
        remedy = f"Pass one of {', '.join(map(repr, tails))}."
        raise ValueError(checks.message(expected, f"{layer!r}, which several layers are called", remedy))
    node: Any = model
    with contextlib.suppress(AttributeError, LookupError, TypeError):
        for part in layer.split("."):
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        if isinstance(node, keras.layers.Layer):
            return layer, node
    raise ValueError(checks.message(expected, f"{layer!r}", checks.closest(layer, everything)))


def sublayers(layer: keras.layers.Layer) -> Iterator[tuple[str, keras.layers.Layer]]:
    """Every layer below one, with the path of names to it; a shared layer once.

    Args:
        layer: A layer or a model.

    Yields:
        The path and the layer; ``layers.0`` stands for the name of a layer whose sibling is called the same.
    """
    return ((path, found) for path, _, found in _named_sublayers(layer))


def _named_sublayers(layer: keras.layers.Layer) -> Iterator[tuple[str, str, keras.layers.Layer]]:
    """A path that no other layer has, the path of names, and the layer."""
    seen: set[int] = set()

    def walk(parent: keras.layers.Layer, prefix: str, above: str) -> Iterator[tuple[str, str, keras.layers.Layer]]:
        below = parent.layers if isinstance(parent, keras.Model) else getattr(parent, "_layers", [])
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


@contextlib.contextmanager
def reports(layers: list[keras.layers.Layer], seen: dict[tuple[int, str], list[Any]]) -> Iterator[None]:
    """Lets layers report their calls on this thread.

    Args:
        layers: Each once.
        seen: For the id of a layer and ``"input"`` or ``"output"``, a list that takes what comes by.
    """
    open_ones = _THREAD.__dict__.setdefault("open", [])
    wrapped: list[keras.layers.Layer] = []
    try:
        for layer in layers:
            _wrap(layer)
            wrapped.append(layer)
        open_ones.append(seen)
        yield
    finally:
        open_ones[:] = [one for one in open_ones if one is not seen]
        for layer in wrapped:
            _unwrap(layer)


def _report(layer: keras.layers.Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    for seen in getattr(_THREAD, "open", ()):
        if (id(layer), "output") in seen:
            seen[id(layer), "output"].append(output)
        if (id(layer), "input") in seen:
            seen[id(layer), "input"].append(args[0] if args else next(iter(kwargs.values()), None))


def _wrap(layer: keras.layers.Layer) -> None:
    """Replace the layer's working method by one that reports; the second time only count."""
    with _LOCK:
        taken = layer.__dict__.get("_distill_taps")
        if taken is not None:
            taken["count"] += 1
            return
        # Keras calls one of three methods; a rematerialised one must be reported outside of what is recomputed
        remat = bool(getattr(layer, "_remat_mode", None))
        quantized = getattr(layer, "quantization_mode", None) is not None
        name = "rematerialized_call" if remat else "quantized_call" if quantized else "call"
        original = getattr(layer, name)

        @functools.wraps(original)
        def reporting(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if remat:
                return _reporting_remat(layer, output)
            _report(layer, args, kwargs, output)
            return output

        # past Keras' own __setattr__, which would track what it is given
        object.__setattr__(layer, "_distill_taps", {"count": 1, "name": name, "own": layer.__dict__.get(name)})
        object.__setattr__(layer, name, reporting)


def _reporting_remat(layer: keras.layers.Layer, rematerialized: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        output = rematerialized(*args, **kwargs)
        _report(layer, args, kwargs, output)
        return output

    return run


def _unwrap(layer: keras.layers.Layer) -> None:
    with _LOCK:
        taken = layer.__dict__["_distill_taps"]
        taken["count"] -= 1
        if taken["count"]:
            return
        if taken["own"] is None:
            object.__delattr__(layer, taken["name"])
        else:
            object.__setattr__(layer, taken["name"], taken["own"])
        object.__delattr__(layer, "_distill_taps")
