"""Recording: read the tapped layers of a model in the same forward pass that computes its output.

While a thread records, ``keras.layers.Layer.__call__`` is replaced on the class. The replacement gets the same output
as the layer's caller, after masks, casts, rematerialization and quantization, for functional, sequential and subclassed
models on every backend. No layer is changed, and calls on threads that do not record are passed on. The record of a
call is attached to the model's output tensor, as Keras attaches masks: it is freed with the tensor, and several calls
in one step have a record each.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

from keras_distill import compat
from keras_distill.recording.arguments import Form, split_arguments
from keras_distill.recording.calls import Call, image_size
from keras_distill.recording.facts import Facts, facts_of
from keras_distill.recording.taps import Place, Tap, find_layer

_THREAD = threading.local()
_LOCK = threading.RLock()
_EVERYWHERE: list[Recording] = []  # recordings on every thread, for replicas that run on threads of their own
_USERS: dict[type, int] = {}  # how many recordings need the wrapper of a class
_ORIGINAL: dict[type, Any] = {}  # never emptied: another thread may be inside the wrapper while it is removed
# Placeholders for the model's output and its first tensor. A record is attached to that tensor: if it held the tensor
# itself, only the garbage collector could free the two.
_OUTPUT, _FIRST = object(), object()
_RECORD = "_distill_record"


class Record:
    """The record of one call of a model: its inputs, and the inputs and outputs of its tapped layers.

    Args:
        inputs: First argument of the call.

    Attributes:
        scope: The scratch graph of Keras that the call runs in, or None.
        runs: For each tapped layer, by its id, a list of (arguments, output, trouble), one entry for each call.
        facts: Facts about the tensors, by their ids.
        kept: Tensors that must live as long as the record, since their ids are the keys of ``facts``.
        within: The layers whose call is running, the outermost first.
    """

    def __init__(self, inputs: Any) -> None:
        self.inputs, self.scope = inputs, compat.get_symbolic_scope()
        self.runs: dict[int, list[tuple[Any, Any, str]]] = {}
        self.facts: dict[int, Facts] = {}
        self.kept: list[Any] = []
        self.within: list[Any] = []


class Recording:
    """One model that is being recorded.

    Args:
        model: The model.
        layers: The ids of the tapped layers; the set identifies the recorder.
        infer: Whether the facts about all tensors are recorded too.
        finished: Called with each record and the output, or None.
        watch: Called with the record, each layer that has run, its arguments and its output, or None; with ``infer``
            for other operations too.
    """

    def __init__(
        self,
        model: keras.Model,
        layers: set[int],
        infer: bool = False,
        finished: Callable[[Record, Any], None] | None = None,
        watch: Callable[[Record, Any, Any, Any], None] | None = None,
    ) -> None:
        self.model, self.infer, self.finished, self.watch = model, infer, finished, watch
        self.layers = layers
        self._thread = threading.local()

    @property
    def record(self) -> Record | None:
        """The record of the call that runs on this thread."""
        return getattr(self._thread, "record", None)

    @record.setter
    def record(self, record: Record | None) -> None:
        self._thread.record = record


@contextlib.contextmanager
def recorded(recording: Recording, everywhere: bool = False) -> Iterator[None]:
    """A context in which each call of a model attaches a record to its output; other models are not recorded.

    Args:
        recording: The model and its layers.
        everywhere: True records calls on every thread, False calls on this thread only.
    """
    classes = (keras.layers.Layer, keras.Operation) if recording.infer else (keras.layers.Layer,)
    before = getattr(_THREAD, "open", ())
    _install(classes, +1)
    if everywhere:
        _EVERYWHERE.append(recording)
    else:
        _THREAD.open = (*before, recording)
    try:
        yield
    finally:
        if everywhere:
            _EVERYWHERE.remove(recording)
        else:
            _THREAD.open = before
        _install(classes, -1)


def _as_is(function: Any) -> Any:
    """The function, protected from autograph, which would convert it inside a user's own ``tf.function``."""
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.autograph.experimental.do_not_convert(function)


def _install(classes: tuple[type, ...], change: int) -> None:
    with _LOCK:
        for cls in classes:
            wrapper = _layer_call if cls is keras.layers.Layer else _operation_call
            _USERS[cls] = _USERS.get(cls, 0) + change
            if change > 0 and _USERS[cls] == 1:
                _ORIGINAL[cls], cls.__call__ = cls.__call__, wrapper  # type: ignore[method-assign]
            elif not _USERS[cls]:
                if cls.__dict__["__call__"] is wrapper:
                    cls.__call__ = _ORIGINAL[cls]  # type: ignore[method-assign]
                else:  # another library has wrapped our wrapper meanwhile: it stays, and passes calls on
                    _USERS[cls] = 1


@_as_is
def _layer_call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _call(keras.layers.Layer, self, args, kwargs)


@_as_is
def _operation_call(self: Any, *args: Any, **kwargs: Any) -> Any:  # `x + y` of a functional model; only facts need it
    if isinstance(self, keras.layers.Layer):  # called by Layer.__call__
        return _ORIGINAL[keras.Operation](self, *args, **kwargs)
    return _call(keras.Operation, self, args, kwargs)


def _call(cls: type, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    original, recordings = _ORIGINAL[cls], (*getattr(_THREAD, "open", ()), *_EVERYWHERE)
    if not recordings:
        return original(layer, *args, **kwargs)
    for recording in recordings:
        if layer is recording.model and recording.record is None:
            recording.record = record = Record(_first(args, kwargs))
            if recording.infer:
                record.facts = {id(leaf): Facts(behind=()) for leaf in keras.tree.flatten((args, kwargs))}
    concerned = [recording for recording in recordings if recording.record is not None]
    records: list[Any] = [recording.record for recording in concerned]
    for record in records:
        record.within.append(layer)
    try:
        output = original(layer, *args, **kwargs)
    except BaseException:
        for recording in concerned:
            if layer is recording.model:
                recording.record = None
        raise
    finally:
        for record in records:
            record.within.pop()
    for recording, record in zip(concerned, records, strict=True):
        # a layer that is being built may run its sublayers in a scratch graph of Keras, which is not part of this pass
        if record.scope is compat.get_symbolic_scope():
            _note(recording, record, layer, args, kwargs, output)
        if layer is recording.model and not record.within:
            recording.record = None
            _finish(recording, record, output)
    return output


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _note(
    recording: Recording, record: Record, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    if any(isinstance(leaf, keras.KerasTensor) for leaf in keras.tree.flatten(output)):
        return
    if id(layer) in recording.layers:
        record.runs.setdefault(id(layer), []).append(((args, kwargs), output, _lost_gradient(record.within)))
    if recording.infer:
        parent = record.within[-1] if record.within else None
        record.kept.append((args, output))
        record.facts.update(facts_of(layer, parent, record.facts, (args, list(kwargs.values())), output))
    if recording.watch is not None:
        recording.watch(record, layer, (args, list(kwargs.values())), output)


def _lost_gradient(within: list[Any]) -> str:
    """Why a tensor inside these layers would have no gradient, or an empty string.

    ``tf.recompute_grad`` stops every outer tape: the gradient of a tensor in a rematerialized block is lost silently.
    """
    if keras.backend.backend() == "tensorflow":
        for outer in within:
            if compat.rematerialized(outer):
                return f"a tensor within {outer.name!r}, which is rematerialized. Tap {outer.name!r} itself."
    return ""


def _finish(recording: Recording, record: Record, output: Any) -> None:
    leaves = keras.tree.flatten(output)
    if not leaves:
        return
    graph = _graph_of(leaves[0])
    for runs in record.runs.values():
        for index, (arguments, returned, trouble) in enumerate(runs):
            inner = [_graph_of(leaf) for leaf in keras.tree.flatten(returned)]
            if any(other is not None and other is not graph for other in inner):
                trouble = "tensors of a loop or a function of its own. Tap the layer that contains it."
            if returned is output:
                returned = _OUTPUT
            elif returned is leaves[0]:
                returned = _FIRST
            runs[index] = (arguments, returned, trouble)
    if recording.finished is not None:
        recording.finished(record, output)
    records = compat.get_tensor_attr(leaves[0], _RECORD) or {}
    # several recorders may record one model: each has its own record on the output
    compat.set_tensor_attr(leaves[0], _RECORD, {**records, id(recording.layers): record})


def _restored(value: Any, output: Any) -> Any:
    if value is _FIRST:
        return keras.tree.flatten(output)[0]
    return output if value is _OUTPUT else value


def _graph_of(tensor: Any) -> Any:
    """The graph of a symbolic tensor of TensorFlow, None for every other tensor."""
    return getattr(tensor, "graph", None) if keras.backend.backend() == "tensorflow" else None


@_as_is
def _records_on(output: Any) -> dict[int, Record]:
    """The records that are attached to a model's output, by the id of their recorder's set of layers."""
    records = (compat.get_tensor_attr(leaf, _RECORD) for leaf in keras.tree.flatten(output) if leaf is not None)
    return next((record for record in records if record), {})


class Recorder:
    """Reads the features at some taps of one model.

    Args:
        model: The student or the teacher.
        taps: The places to read.
        who: ``"student"`` or ``"teacher"``, for messages.

    Raises:
        ValueError: If a tap does not name one layer of the model.
    """

    def __init__(self, model: keras.Model, taps: Iterable[Tap], who: str) -> None:
        self.model, self.who, self.taps = model, who, list(taps)
        self._layers: dict[Place, keras.layers.Layer] = {
            tap.place: find_layer(model, tap.layer, who)[1] for tap in self.taps
        }
        self._ids = {id(layer) for layer in self._layers.values()}

    def watching(
        self, everywhere: bool = False, finished: Callable[[Record, Any], None] | None = None, infer: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """A context in which calls of the model are recorded.

        Args:
            everywhere: Whether calls on other threads are recorded too.
            finished: Called with each record and the model's output.
            infer: Whether the facts about all tensors are recorded too.

        Returns:
            The context.
        """
        return recorded(Recording(self.model, self._ids, infer, finished), everywhere)

    def forward(self, inputs: Any, training: bool | None) -> Call:
        """One forward pass of the model, with the features at the taps.

        Args:
            inputs: The model's inputs.
            training: Whether dropout and batch normalisation train; with ``None`` Keras decides.

        Returns:
            The output and the features.
        """
        with self.watching():
            output = self.model(inputs, training=training)
        return self.call_of(output, self.record_of(output))

    def record_of(self, output: Any) -> Record | None:
        """The record that is attached to an output, or None."""
        records: dict[int, Record] = _records_on(output)
        return records.get(id(self._ids))

    def call_of(self, output: Any, record: Record | None) -> Call:
        """The call that a record describes.

        Args:
            output: The model's output.
            record: Its record, or None if the call was not recorded.

        Returns:
            The call.
        """
        runs: dict[Place, list[Any]] = {}
        trouble: dict[Place, str] = {}
        forms: dict[Place, list[Form]] = {}
        for place, layer in self._layers.items() if record is not None else ():
            passes = record.runs.get(id(layer), [])  # type: ignore[union-attr]
            if place[1] == "input":
                split = [split_arguments(*run[0]) for run in passes]
                runs[place], forms[place] = [inputs for inputs, _ in split], [form for _, form in split]
            else:
                runs[place] = [_restored(run[1], output) for run in passes]
            if reason := next((run[2] for run in passes if run[2]), ""):
                trouble[place] = reason
        facts = {} if record is None else record.facts
        declared = isinstance(self.model, keras.Sequential) or compat.input_structure(self.model) is not None
        image = None if record is None else image_size(record.inputs)
        return Call(
            output, runs, who=self.who, trouble=trouble, facts=facts, declared=declared, image=image, forms=forms
        )
