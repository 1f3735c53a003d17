"""Teachers that run on each batch, in inference mode and without gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
from keras import ops

from keras_distill import compat
from keras_distill.recording import Call, Recorder, Tap, find_layer, sublayers
from keras_distill.teachers.inputs import chosen_inputs


class LiveTeacher:
    """A teacher that runs on each batch.

    Args:
        model: The teacher; its weights and flags are not changed.
        taps: The places to read.
        dtype: Precision that it computes in; None keeps the model's own.

    Raises:
        ValueError: If a tap does not name one layer of the model.
    """

    def __init__(self, model: keras.Model, taps: Iterable[Tap], dtype: str | None = None) -> None:
        self.model, self.dtype = model, dtype
        self.recorder = Recorder(model, taps, "teacher")
        # all layers, once the model is built: torch.compile cannot follow the search
        self._layers: list[Any] = [model, *(layer for _, layer in sublayers(model))] if model.built else []

    @property
    def teacher(self) -> Any:
        """The teacher as the user passed it."""
        return self.model

    def answer(self, inputs: Any) -> Call:
        """Run the teacher without gradient.

        Args:
            inputs: The teacher's inputs; a dict may hold more than the teacher takes.

        Returns:
            The call.
        """
        inputs = chosen_inputs(self.model, inputs)
        layers = self._layers or [self.model, *(layer for _, layer in sublayers(self.model))]
        stateful = any(getattr(layer, "stateful", False) for layer in layers)
        if stateful and not self.model.built:
            self.model(inputs, training=False)
        self._layers = layers if self.model.built else []
        unchanged = compat.discarded_changes() if stateful else contextlib.nullcontext()
        with compat.untaped(), unchanged, compat.computed_in(layers, self.dtype):
            call = self.recorder.forward(inputs, training=False)
        return replace(call.without_gradient(), network=self)

    def called(self, layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The output of one of the teacher's layers for other inputs, to which gradients flow.

        The layer computes as in :meth:`answer`, without a gradient for its weights and without changing them.

        Args:
            layer: The layer's name or path.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Returns:
            The output.
        """
        part = find_layer(self.model, layer, "teacher")[1]
        layers = [part, *(inner for _, inner in sublayers(part))]
        values = [(variable, ops.stop_gradient(value)) for variable, value in self._values(part)]
        with compat.kept_losses(layers), compat.discarded_changes(values), compat.computed_in(layers, self.dtype):
            return part(*args, **{**kwargs, "training": False})

    def _values(self, part: keras.layers.Layer) -> list[tuple[keras.Variable, Any]]:
        """The weights of a part with their values."""
        variables = [each for each in part.variables if keras.backend.is_float_dtype(each.dtype)]
        return [(variable, ops.convert_to_tensor(variable, variable.dtype)) for variable in variables]


class StudentAsTeacher(LiveTeacher):
    """Runs the student's own layers in inference mode, with other values in the place of some of its weights.

    A subclass implements :meth:`values_instead`.

    Args:
        teacher: The teacher that the user passed, with the student in its attribute ``student``.
        taps: The places to read.
        dtype: Precision that it computes in; None keeps the student's.
    """

    def __init__(self, teacher: Any, taps: Iterable[Tap], dtype: str | None = None) -> None:
        super().__init__(teacher.student, taps, dtype)
        self._teacher = teacher

    @property
    def teacher(self) -> Any:
        """The teacher as the user passed it."""
        return self._teacher

    def values_instead(self) -> list[tuple[keras.Variable, Any]]:
        """Pairs of a variable of the student and the tensor that its layers read in its place."""
        raise NotImplementedError

    def answer(self, inputs: Any) -> Call:
        """Run the student's layers without gradient and without changing them."""
        layers = [self.model, *(layer for _, layer in sublayers(self.model))]
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(compat.untaped())
            contexts.enter_context(compat.kept_losses(layers))
            contexts.enter_context(compat.discarded_changes(self.values_instead()))
            contexts.enter_context(compat.computed_in(layers, self.dtype))
            call = self.recorder.forward(chosen_inputs(self.model, inputs), training=False)
        return replace(call.without_gradient(), network=self)
