"""A recorded forward pass of a model, which the terms read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import keras
from keras import ops

from keras_distill import checks, compat
from keras_distill.recording.arguments import Form
from keras_distill.recording.facts import Facts
from keras_distill.recording.taps import Place, Tap, by_name, entry_at, select


@dataclass(eq=False)
class Call:
    """One forward pass of a model.

    Attributes:
        output: The model's output.
        runs: Outputs or inputs of its tapped layers, a list with one entry for each call, by layer and side.
        features: Features that were computed beforehand, by the key of their taps.
        who: ``"student"`` or ``"teacher"``, for messages.
        training: True if the step trains the student, False in evaluation, None if it is unknown.
        decided: Whether Python may leave out parts of a loss whose weight is 0: in eager steps, and in graphs that are
            traced again when such a part changes.
        trouble: Why the tensors of a tapped layer cannot be used, by layer and side.
        facts: Facts about each tensor, by its id; recorded only while shapes are inferred.
        declared: Whether the model declares its outputs, as functional and sequential models do. Several declared
            outputs are compared one by one; a subclassed model may return anything.
        masks: Masks of tensors that no longer carry their own, by the id of the tensor.
        inputs: The inputs of the batch, None if they are unknown.
        image: Height and width of the images that the model was called with, None without images or if unknown.
        forms: The arguments of its layers' calls without the tensors, where their input is tapped.
        network: The teacher that ran; None for stored outputs, and while shapes are inferred.

    Example:
        >>> Call(output=[1.0, 2.0]).output
        [1.0, 2.0]
    """

    output: Any
    runs: dict[Place, list[Any]] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    who: str = "student"
    training: bool | None = None
    decided: bool = False
    trouble: dict[Place, str] = field(default_factory=dict)
    facts: dict[int, Facts] = field(default_factory=dict)
    declared: bool = True
    masks: dict[int, Any] = field(default_factory=dict)
    inputs: Any = None
    image: tuple[int, int] | None = None
    forms: dict[Place, list[Form]] = field(default_factory=dict)
    network: Any = None

    def feature(self, tap: Tap) -> Any:
        """The tensor at a tap.

        Args:
            tap: The place; its layer must be one of the recorded layers.

        Returns:
            The tensor.

        Raises:
            ValueError: If the layer did not run, its tensors cannot be used outside it, or the tap does not say which
                of several calls or tensors to take.
        """
        if tap.key in self.features:
            return self.features[tap.key]
        value = self.recorded(tap)
        if tap.output is None and tap.place in self.forms and self.form(tap).several:
            value = next(iter(value.values() if isinstance(value, dict) else value))
        return select(value, tap.output, f"the {tap.where} of {self.who} layer {tap.name!r}")

    def recorded(self, tap: Tap) -> Any:
        """All that a tapped layer returned, or was called with, whatever the tap's ``output`` is.

        Args:
            tap: The place.

        Raises:
            ValueError: If the layer did not run, its tensors cannot be used outside it, or the tap does not say which
                of several calls to take.
        """
        runs = self.runs.get(tap.place, [])
        layer = f"{self.who} layer {tap.name!r}"
        if not runs:
            remedy = (
                "Name a layer that this forward pass runs, or give its feature in `DistillTargets`. If it runs inside a"
                " `tf.function` or a wrapper, tap the layer that contains it."
            )
            raise ValueError(checks.message(f"{layer} to run in a forward pass", "no call of it", remedy))
        if tap.place in self.trouble:  # before the number of calls, because Tap(call=...) would not help
            expected = f"{layer} to have an output that can be read from outside"
            raise ValueError(checks.message(expected, self.trouble[tap.place]))
        if tap.call is None and len(runs) > 1:
            remedy = f"Pass Tap({tap.name!r}, call=...) to choose one of them."
            raise ValueError(checks.message(f"{layer} to run once in a forward pass", f"{len(runs)} calls", remedy))
        if tap.call is not None and tap.call >= len(runs):
            raise ValueError(checks.message(f"{layer} to run more than {tap.call} times", f"{len(runs)} calls"))
        return runs[tap.call or 0]

    def levels(self, tap: Tap) -> list[Tap]:
        """The taps that a tap stands for: with ``output="*"`` one for each tensor at its place, else the tap itself.

        The levels of a dict are sorted by their names, since graphs do not keep the order of a dict.

        Args:
            tap: The place.

        Raises:
            ValueError: As for :meth:`recorded`, or if there is not a dict, list or tuple of tensors.
        """
        if not tap.spreads:
            return [tap]
        single = replace(tap, output=tap.outer or None)
        if single.key in self.features:
            return [single]
        stored = {level.last: level for level in map(tap.level_of, self.features) if level is not None}
        if stored:
            return [stored[key] for key in by_name(stored)]
        value = self.recorded(tap)
        inner = entry_at(value, tap.outer)
        if hasattr(inner, "shape"):  # a pyramid of one level
            return [single]
        keys: Any = by_name(inner) if isinstance(inner, dict) else range(len(inner or ()))
        if not keys or not all(hasattr(inner[key], "shape") for key in keys):
            names = by_name(value) if isinstance(value, dict) else range(len(value))
            expected = f"the {tap.where} of {self.who} layer {tap.name!r} to hold a dict, list or tuple of tensors"
            remedy = "Pass the path to it, such as output=('feature_maps', '*'), or leave out `output`."
            received = f"a {type(value).__name__} of {list(names)}"
            raise ValueError(checks.message(f"{expected} for output={tap.output!r}", received, remedy))
        return [tap.level(key) for key in keys]

    def form(self, tap: Tap) -> Form:
        """The arguments that a layer was called with, without the tensors, for a tap on its input."""
        return self.forms[tap.place][tap.call or 0]

    def mask_of(self, tensor: Any) -> Any:
        """The mask of a tensor of this pass, or None."""
        return self.masks.get(id(tensor), compat.get_keras_mask(tensor))

    def facts_of(self, tensor: Any) -> Facts:
        """The facts about a tensor of this pass."""
        return self.facts.get(id(tensor), Facts())

    def without_gradient(self) -> Call:
        """A copy of the call without gradients; masks are kept, precomputed features and facts are not."""
        everything = (self.output, list(self.runs.values()))
        stopped = keras.tree.map_structure(ops.stop_gradient, everything)
        pairs = zip(keras.tree.flatten(stopped), keras.tree.flatten(everything), strict=True)
        # without `:=`, which AutoGraph cannot read: inside `tf.data.Dataset.map` it would warn
        known = {id(new): compat.get_keras_mask(old) for new, old in pairs}
        masks = {key: mask for key, mask in known.items() if mask is not None}
        output, runs = stopped
        return Call(
            output,
            dict(zip(self.runs, runs, strict=True)),
            who=self.who,
            training=self.training,
            trouble=self.trouble,
            declared=self.declared,
            masks=masks,
            image=self.image,
            forms=self.forms,
        )


def entry_of_inputs(inputs: Any, place: str | int | Callable[[Any], Any], name: str, remedy: str) -> Any:
    """A part of a batch's inputs that is not for the models.

    Args:
        inputs: The batch's inputs.
        place: A key or an index of the inputs, or a function of them.
        name: Name of the part, for messages.
        remedy: How to pass it.

    Returns:
        The tensor, unchecked.

    Raises:
        ValueError: If the inputs do not hold it.
    """
    if callable(place):
        return place(inputs)
    fits = isinstance(inputs, dict) if isinstance(place, str) else isinstance(inputs, (list, tuple))
    if not fits or (place not in inputs if isinstance(place, str) else not -len(inputs) <= place < len(inputs)):
        held = f"the keys {sorted(inputs)}" if isinstance(inputs, dict) else f"a {type(inputs).__name__}"
        raise ValueError(checks.message(f"the inputs to hold the {name} {place!r}", held, remedy))
    return inputs[place]


def image_size(inputs: Any) -> tuple[int, int] | None:
    """Height and width of the images among a model's inputs.

    Args:
        inputs: The inputs, images ``(N, H, W, C)`` or as ``keras.config.image_data_format()`` says.

    Returns:
        The first size that is known, or None.

    Example:
        >>> image_size({"image": ops.ones((2, 8, 6, 3)), "scale": ops.ones((2,))})
        (8, 6)
    """
    first = 1 if keras.config.image_data_format() == "channels_last" else 2
    for tensor in keras.tree.flatten(inputs):
        shape = tuple(getattr(tensor, "shape", ()))
        if len(shape) == 4 and None not in shape[first : first + 2]:
            return (shape[first], shape[first + 1])
    return None
